"""Looks at the settings of a diagnosis before a model is loaded: what cannot work is said at once."""

from dataclasses import dataclass

from diagnostics.models.loading import check_model
from diagnostics.models.lookup import locate
from diagnostics.prompts.encoding import encode_for_diagnosis
from diagnostics.prompts.load import load_prompts


@dataclass(frozen=True)
class Settings:
    """What the form asks for; ``prompts`` is ``builtin`` or the path of a file."""

    model: str
    prompts: str
    context: int
    max_prompts: int
    decode: int
    device: str
    dtype: str


def check_settings(settings: Settings) -> None:
    """Raise UserError for a model, device or type that cannot be used, and for prompts that do not fit.

    Reads no weights, only the configuration and the tokenizer. What only loading tells is left to the diagnosis.
    """
    prompts = load_prompts(settings.prompts, context_length=settings.context, max_prompts=settings.max_prompts)
    outline = check_model(settings.model, device=settings.device, dtype=settings.dtype)
    source = None if outline.n_layers is None else locate(settings.model, convert=False)
    if source is None:
        return
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception:  # libraries raise anything; the diagnosis says what is wrong with it
        return
    encode_for_diagnosis(prompts, tokenizer, outline.max_positions, settings.decode)
