"""Self-contained HTML pages of runs, benchmarks, evaluations and fine-tunings, to send by mail; they need no network.

Every page begins with the answer in one sentence, and ends with how it was measured and what its terms mean.
"""

from diagnostics.report.benchmarks import benchmark_report
from diagnostics.report.evaluations import asked_margin, asked_seed, evaluation_report
from diagnostics.report.finetunings import finetuning_data, finetuning_report
from diagnostics.report.page_file import write_report
from diagnostics.report.runs import report

__all__ = [
    "asked_margin",
    "asked_seed",
    "benchmark_report",
    "evaluation_report",
    "finetuning_data",
    "finetuning_report",
    "report",
    "write_report",
]
