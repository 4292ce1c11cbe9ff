"""Low-rank adapters (LoRA, arXiv 2106.09685) with peft."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from diagnostics.support.errors import UserError

if TYPE_CHECKING:
    from diagnostics.models.loading import LoadedModel


def require_peft() -> None:
    """Raise UserError without peft."""
    if find_spec("peft") is None:
        raise UserError("LoRA needs peft: pip install 'speed-diagnostics[finetune]'")


def add_lora(lm: LoadedModel, rank: int, seed: int = 0) -> Any:
    """Add a low-rank adapter to all linear layers but the head, in place, and return peft's wrapper of the model.

    It is scaled by 2 and contributes nothing at first. Its base model keeps the name that the user gave.
    """
    require_peft()
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        revision=lm.revision,
    )
    wrapped = get_peft_model(lm.model, config)
    # get_peft_model stores the path of the files, which for a built-in name or a hub id differs between machines.
    base = os.path.abspath(lm.name) if os.path.isdir(lm.name) else lm.name
    wrapped.peft_config["default"].base_model_name_or_path = base
    return wrapped
