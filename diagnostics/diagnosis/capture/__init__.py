"""Ways to read activations, one file per backend; all hand the same rows to the same observers."""

from diagnostics.diagnosis.observers import Capture
from diagnostics.models.libraries import NNSIGHT, TRANSFORMER_LENS, TRANSFORMERS
from diagnostics.models.loading import LoadedModel
from diagnostics.support.errors import UserError

HOOKS = "hooks"
BACKENDS = (HOOKS, TRANSFORMER_LENS, NNSIGHT)


def make_capture(backend: str | None, lm: LoadedModel, remote: bool | str = False) -> Capture:
    """Return the capture of this name for a model; raise UserError for an unknown name or a model that it cannot serve.

    By default a bridge is read by TransformerLens, an nnsight model by nnsight, and any other by plain hooks.
    ``remote`` is nnsight's: True for NDIF, ``"local"`` for a rehearsal of it on this machine.
    """
    if backend is None:
        backend = HOOKS if lm.library == TRANSFORMERS else lm.library
    if backend not in BACKENDS:
        raise UserError(f"backend {backend!r} is not one of: {', '.join(BACKENDS)}")
    if lm.library == TRANSFORMER_LENS != backend:
        raise UserError(
            f"a TransformerBridge computes attention itself, where the {backend} backend cannot see it: "
            "use the transformer-lens backend, or give the stock model"
        )
    if remote and (backend != NNSIGHT or lm.library != NNSIGHT):
        raise UserError("remote runs need an nnsight model: diagnose(nnsight.TransformersModel(NAME), remote=True)")
    if backend == TRANSFORMER_LENS:
        from diagnostics.diagnosis.capture.transformer_lens import TransformerLensCapture

        return TransformerLensCapture(lm)
    if backend == NNSIGHT and remote:
        from diagnostics.diagnosis.capture.nnsight_remote import RemoteNNsightCapture

        return RemoteNNsightCapture(lm, remote)
    if backend == NNSIGHT:
        from diagnostics.diagnosis.capture.nnsight import NNsightCapture

        return NNsightCapture(lm)
    from diagnostics.diagnosis.capture.hooks import HooksCapture

    return HooksCapture(lm)
