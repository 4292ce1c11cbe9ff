"""The finished example that ships with the package: results of the embedded model, to look at before any is made.

`make example` makes it anew: see ``analyses/make_example.py``, which has the commands.
"""

from importlib.resources import files
from pathlib import Path

# What the folder holds, by the kind of result.
RUN, BENCHMARK, EVALUATION, FINETUNING = "smollm2-135m-instruct", "benchmark", "quality", "finetuned"


def example_folder() -> Path:
    """Return the folder with the example's results, a folder each; it is for reading only."""
    return Path(str(files("diagnostics.runs").joinpath("example_results")))
