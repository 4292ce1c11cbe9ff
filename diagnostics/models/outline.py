"""What is known of a model before its weights are read: enough to refuse, in a second, what cannot work."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diagnostics.models.adapters import (
    base_errors,
    beside_a_model,
    holds_adapter,
    is_adapter,
    merge_errors,
    read_adapter,
)
from diagnostics.models.anatomy import layer_types, refuse_config
from diagnostics.models.devices import choose_device, choose_dtype
from diagnostics.models.embedded import EMBEDDED_MODEL
from diagnostics.models.lookup import hub_problem, locate, require_on_hub
from diagnostics.support.errors import UserError, one_line

if TYPE_CHECKING:
    from diagnostics.policies import Policy

# Each of these shows that a folder has a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class ModelOutline:
    """A model by its configuration alone.

    ``n_layers`` (L), ``n_heads``, ``layer_types`` (one per layer) and ``max_positions`` are as in
    `diagnostics.models.anatomy.Anatomy`. ``n_layers`` and the others are None, and ``layer_types`` empty, where only
    loading tells: for GGUF files, adapters on the hub, and the built-in model before its first use.
    """

    name: str
    device: torch.device
    dtype: torch.dtype
    n_layers: int | None = None
    n_heads: int | None = None
    max_positions: int | None = None
    layer_types: tuple[str, ...] = field(default=(), repr=False)

    def require(self, policies: Iterable["Policy"]) -> None:
        """Raise UserError for a policy that does not fit the model, as far as its configuration tells.

        A policy of another distribution may look at more of the model than is known here, and is left to loading.
        """
        if self.n_layers is None:
            return
        for policy in policies:
            if type(policy).check.__module__.startswith("diagnostics."):
                policy.check(self)  # type: ignore[arg-type]


def check_model(
    model: str | Path = EMBEDDED_MODEL,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> ModelOutline:
    """Check, without its weights, that a model is there and can be served here; the arguments are as for `load_model`.

    Takes a fraction of a second once transformers is imported; from the hub it fetches ``config.json`` alone. Raises
    UserError as `load_model` would.
    """
    name = str(model)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    if is_adapter(name):
        with merge_errors(name):
            adapter = read_adapter(name, Path(os.path.expanduser(name)))
            with base_errors(name):
                base = check_model(adapter.base, revision=revision or adapter.revision, **options)
        return replace(base, name=name)
    torch_device = choose_device(device)
    outline = ModelOutline(name, torch_device, choose_dtype(dtype, torch_device))
    source = locate(name, convert=False)
    if source is None:
        return outline
    config = _configuration(source, name, revision, trust_remote_code)
    if config is None:
        return outline
    refuse_config(config, name)
    if os.path.isdir(source) and not any(os.path.isfile(os.path.join(source, file)) for file in TOKENIZER_FILES):
        raise UserError(f"folder {name!r} holds no tokenizer: it has no tokenizer.json")
    text = config.get_text_config(decoder=True)
    return replace(
        outline,
        n_layers=int(text.num_hidden_layers),
        n_heads=int(text.num_attention_heads),
        max_positions=getattr(text, "max_position_embeddings", None),
        layer_types=layer_types(text),
    )


def _configuration(source: str, name: str, revision: str | None, trust_remote_code: bool) -> Any:
    """Return the configuration in a folder or on the hub, None for an adapter there."""
    from transformers import AutoConfig

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code} | ({"revision": revision} if revision else {})
    try:
        if not os.path.isdir(source):
            require_on_hub(source, revision)
        if holds_adapter(source, revision):
            if os.path.isdir(source):
                raise beside_a_model(name)
            return None
        return AutoConfig.from_pretrained(source, **options)
    except UserError:
        raise
    except Exception as error:  # a damaged file raises different errors in different libraries
        problem = hub_problem(error, name, revision)
        raise problem or UserError(f"model {name!r} cannot be loaded: {one_line(error)}") from error
