"""What commands and scripts write to stderr: warnings, and the line that ends them; libraries are kept quiet."""

import sys
import warnings
from typing import NoReturn

INTERRUPTED = 130  # exit status, as shells have it for SIGINT


def quiet() -> None:
    """Keep the libraries' own progress bars and advice out of what the user reads."""
    warnings.filterwarnings("ignore", module="transformers|torch|peft")
    # Their environment variables would be too late: both are imported by now.
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    disable_progress_bars()
    hub_logging.set_verbosity_error()


def warn(message: str) -> None:
    """Print one line on stderr about a failure that does not end the command."""
    print(f"warning: {' '.join(message.split())}", file=sys.stderr)


def fail(message: str, status: int = 2) -> NoReturn:
    """End with one line on stderr and an exit status."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
