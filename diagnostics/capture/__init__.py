"""Ways to read activations, one file per backend; all hand the same rows to the same observers."""

from diagnostics.capture.base import Capture
from diagnostics.errors import UserError
from diagnostics.models import LoadedModel

BACKENDS = ("hooks",)


def make_capture(backend: str, lm: LoadedModel) -> Capture:
    """Return the capture of this name for a model; raise UserError for a name that is none."""
    if backend == "hooks":
        from diagnostics.capture.hooks import HooksCapture

        return HooksCapture(lm)
    raise UserError(f"backend {backend!r} is not one of: {', '.join(BACKENDS)}")
