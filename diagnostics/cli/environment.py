"""Environment variables that libraries read once, as they are loaded: set before that, unless the user has."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

# Threads that wait for others sleep instead of spinning. A spinning thread holds a core that another process could use:
# two processes on two cores would then spend most of their time waiting for each other. The first is OpenMP's own name,
# which GNU's runtime (in torch's wheels for Linux) follows; LLVM's (macOS) needs the second, too.
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
WAITING_BY_THE_USER = (*WAITING, "GOMP_SPINCOUNT")
# Bars that no other setting of their library turns off, such as that of transformers' conversion of GGUF files.
BARS = {"TQDM_DISABLE": "1"}


@contextmanager
def library_settings() -> Iterator[None]:
    """Set the variables for the time of the block, and for the processes that are started in it."""
    settings = {} if any(name in os.environ for name in WAITING_BY_THE_USER) else dict(WAITING)
    settings |= {name: value for name, value in BARS.items() if name not in os.environ}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name in settings:
            os.environ.pop(name, None)
