"""Run the self-test on a tiny random model of every causal family that transformers has.

Writes one row per family and attention implementation: whether diagnosis, policies and training are proven, or the
message that refuses the family. For a family that cannot be built as a tiny model the row says why. Nothing is
downloaded.

    python analyses/check_families.py --out analyses/results/families.csv
"""

import argparse
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from diagnostics.models.loading import LoadedModel
from diagnostics.support.errors import UserError

N_LAYERS = 4
MAX_PARAMETERS = 120_000_000
# Sizes under all names that configurations use; the window is shorter than the test's prompt, so that it is tested.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 211),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "decoder_layers", "n_layers"), N_LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "decoder_attention_heads", "n_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_intermediate_size"), 24),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 256),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("sliding_window", "attention_window", "attention_chunk_size"), 9),
    "num_key_value_heads": 2,
    "head_dim": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "attention_types": [[["global", "local"], N_LAYERS // 2]],
    "global_head_dim": 8,
    "num_experts_per_tok": 2,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Settings that some families do not take; each is left out in turn, then all of them.
OPTIONAL = (
    (),
    ("sliding_window",),
    ("head_dim",),
    ("num_key_value_heads",),
    ("num_key_value_heads", "head_dim"),
    ("num_experts_per_tok",),
    ("pad_token_id",),
    ("hidden_size_per_layer_input",),
    ("num_kv_shared_layers", "hidden_size_per_layer_input"),
    ("attention_chunk_size",),
    ("attention_chunk_size", "num_key_value_heads"),
    ("intermediate_size",),
)


def main() -> None:
    """Test every family and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("analyses/results/families.csv"))
    parser.add_argument("families", nargs="*", help="only these")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as cache:  # findings about random models are not stored in the user's cache
        os.environ["SPEED_DIAGNOSTICS_CACHE"] = cache
        for family in arguments.families or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
            for attention in ("sdpa", "eager"):
                row = {"family": family, "attention": attention} | outcome(family, attention)
                rows.append(row)
                print(*row.values(), sep=" | ", flush=True)
    pd.DataFrame(rows).to_csv(arguments.out, index=False)


def outcome(family: str, attention: str) -> dict[str, str]:
    """Return the self-test's finding on a family for each use: ``proven``, or a line."""
    from diagnostics.diagnosis.capture import make_capture
    from diagnostics.diagnosis.self_test import prove_measurable
    from diagnostics.finetune import train_under
    from diagnostics.finetune.self_test import prove_trainable
    from diagnostics.policies.self_test import prove_runnable

    uses = ("diagnosis", "policies", "training")
    try:
        model = tiny(family, attention)
    except Exception as error:  # any configuration or model code
        why = (
            f"it has no {attention}"
            if "does not support an attention implementation" in str(error)
            else one_line(error)
        )
        return dict.fromkeys(uses, f"not built: {why}") | {"seconds": ""}
    try:
        lm = LoadedModel.wrap(model, PreTrainedTokenizerFast.__new__(PreTrainedTokenizerFast), family)
    except UserError as error:
        return dict.fromkeys(uses, f"refused: {one_line(error)}") | {"seconds": ""}
    found, started = {}, time.perf_counter()
    tests = (
        lambda: prove_measurable(lm, make_capture("hooks", lm, False)),
        lambda: prove_runnable(lm.model, lm.anatomy),
        lambda: prove_trainable(lm.model, lm.anatomy, train_under),
    )
    for use, prove in zip(uses, tests, strict=True):
        try:
            failed = prove().failed
            refusing = {part: line for part, line in failed.items() if part != "contribution"}
            found[use] = "proven"
            if refusing:
                found[use] = "refused: " + "; ".join(refusing.values())
            elif failed:
                found[use] = "contribution absent: " + failed["contribution"]
        except UserError as error:
            found[use] = f"refused: {one_line(error)}"
        except Exception as error:  # what must not be
            found[use] = f"TRACEBACK {type(error).__name__}: {one_line(error)}"
    return found | {"seconds": f"{time.perf_counter() - started:.2f}"}


def tiny(family: str, attention: str) -> Any:
    """Build a small random model of a family; raise the last error if no settings fit it."""
    kind = CONFIG_MAPPING[family]
    names = set(getattr(kind, "__dataclass_fields__", {})) | set(getattr(kind, "attribute_map", {}))
    last: Exception = RuntimeError("nothing was tried")
    for left_out in OPTIONAL:
        settings = {name: value for name, value in SMALL.items() if name in names and name not in left_out}
        try:
            if "text_config" in names:
                text = {name: value for name, value in SMALL.items() if name not in left_out}
                settings = {"text_config": text}
            config = kind(**settings)
            of_text = config.get_text_config(decoder=True)
            if getattr(of_text, "layer_types", None):
                with suppress(AttributeError):  # some families derive it from other settings
                    of_text.layer_types = of_text.layer_types[:N_LAYERS]
            with torch.device("meta"):
                n_parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
            if n_parameters > MAX_PARAMETERS:
                raise ValueError(f"{n_parameters / 1e6:.0f} million parameters at the smallest")
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
            return loud(model.eval())
        except Exception as error:  # any configuration or model code
            last = error
    raise last


def loud(model: Any) -> Any:
    """Make the weights large enough, and constants uneven enough, for an error in them to show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + 0.2 * noise if parameter.ndim == 1 else 0.15 * noise)
    return model


def one_line(error: Exception) -> str:
    """Return an error's message, shortened."""
    return " ".join(str(error).split())[:160] or type(error).__name__


if __name__ == "__main__":
    main()
