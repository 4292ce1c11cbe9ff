"""Loads a model, its tokenizer and its parts from a hub id, a folder, an adapter, a GGUF file or the built-in name."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diagnostics.models.adapters import (
    base_errors,
    beside_a_model,
    fetch_adapter,
    holds_adapter,
    is_adapter,
    merge,
    merge_errors,
    read_adapter,
)
from diagnostics.models.anatomy import Anatomy, dissect, refuse_config
from diagnostics.models.embedded import EMBEDDED_MODEL
from diagnostics.models.identity import ModelIdentity
from diagnostics.models.libraries import NNSIGHT, TRANSFORMER_LENS, TRANSFORMERS, library_of, stock_model
from diagnostics.models.lookup import hub_problem, locate
from diagnostics.models.outline import check_model as check_model
from diagnostics.support.errors import UserError, one_line
from diagnostics.support.files import require_sums
from diagnostics.support.overview import Overview, Readable

# Tensors of old checkpoints that are computed from the configuration.
DERIVED = ("rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias", ".attention.masked_bias")


@dataclass(frozen=True, eq=False, repr=False)
class LoadedModel(Readable):
    """A transformers causal language model, its tokenizer and its parts.

    ``model`` is the stock object: nothing is folded, centred or patched. ``revision`` is the hub commit, or None.
    ``wrapper`` is the TransformerBridge or nnsight model that holds ``model``, or None; ``library`` is the library of
    the wrapper, or ``transformers``. ``base`` is the model that an adapter was merged into, None for any other model.
    """

    name: str
    model: Any
    tokenizer: Any
    anatomy: Anatomy
    revision: str | None = None
    wrapper: Any = None
    library: str = TRANSFORMERS
    base: str | None = None

    @classmethod
    def wrap(cls, model: Any, tokenizer: Any = None, name: str | None = None, *, weights: bool = True) -> "LoadedModel":
        """Wrap a model that is already in memory: a transformers model, a `TransformerBridge`, or an nnsight model.

        A bridge and an nnsight model have a tokenizer; a transformers model needs one. With ``weights=False`` an
        nnsight model whose weights are not loaded stays so. Raises UserError if the model cannot be served.
        """
        if isinstance(model, str | Path):
            raise UserError(f"the model is a name, {str(model)!r}: load it first, with load_model({str(model)!r})")
        library = library_of(model)
        wrapper = None if library == TRANSFORMERS else model
        if library == NNSIGHT and weights and not model.dispatched:
            model.dispatch()
        inner = model if library == TRANSFORMERS else stock_model(model)
        if not hasattr(inner, "config"):
            raise UserError(
                f"{type(model).__name__} is not a transformers model, a TransformerBridge or an nnsight model"
            )
        if tokenizer is None:
            tokenizer = getattr(wrapper, "tokenizer", None)
            if library == TRANSFORMER_LENS and tokenizer is not None:
                tokenizer = _own_tokenizer(tokenizer)
        if tokenizer is None:
            raise UserError("the model comes without a tokenizer: use LoadedModel.wrap(model, tokenizer)")
        name = name or getattr(inner.config, "_name_or_path", "") or "model"
        inner.eval()
        return cls(
            name=name,
            model=inner,
            tokenizer=tokenizer,
            anatomy=dissect(inner, name),
            revision=getattr(inner.config, "_commit_hash", None),
            wrapper=wrapper,
            library=library,
        )

    @classmethod
    def of(cls, model: Any) -> "LoadedModel":
        """Return a loaded model as it is, and wrap any other; raises UserError as `wrap` does."""
        return model if isinstance(model, cls) else cls.wrap(model)

    def overview(self) -> Overview:
        """Its size, and where it runs."""
        anatomy, positions = self.anatomy, self.anatomy.max_positions
        heads = f"{anatomy.n_heads} heads of {anatomy.head_dim} ({anatomy.n_kv_heads} KV)"
        facts = {
            "layers": f"{anatomy.n_layers}, each {heads}",
            "positions": None if positions is None else f"{positions:,}",
            "weights": f"{str(self.dtype).removeprefix('torch.')} on {self.device}",
            "class": type(self.model).__name__,
            "library": self.library,
            "revision": self.revision,
            "adapter of": self.base,
        }
        return Overview(f"Model {self.name}", facts=facts)

    @property
    def device(self) -> torch.device:
        """Device for token ids: that of the input embeddings."""
        return self.model.get_input_embeddings().weight.device

    def identity(self) -> ModelIdentity:
        """Return the identity of this model in its present state; reads every weight."""
        return ModelIdentity.of(self.model)

    @property
    def weight_hash(self) -> str:
        """SHA-256 (hex) of all weights in their present state."""
        return self.identity().weights

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return self.model.dtype


def load_model(
    model: str | Path = EMBEDDED_MODEL,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a decoder-only model from a hub id, a folder, a ``.gguf`` file or the built-in name; LoRA adapters too.

    ``device``: ``auto`` (cuda, else mps, else cpu; spread over all GPUs when one is too small), ``map`` (always
    spread, needs accelerate), or any torch device. ``dtype``: ``auto`` (bfloat16 on cuda and mps, float32 on cpu),
    ``float32``, ``bfloat16`` or ``float16``. Weights are read from safetensors or GGUF only, never from pickles; remote
    code runs only with ``trust_remote_code``. `check_model` has already looked at all this before weights are read.

    An adapter is merged into the base that it names: the options apply to the base, and the tokenizer is the base's.
    For an adapter in a folder, ``revision`` is that of the base and overrides the one that the adapter names; for an
    adapter on the hub it is the adapter's own. Raises UserError for anything that cannot be found, read or served.
    """
    name = str(model)
    base_options: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    if is_adapter(name):
        return _load_adapter(name, Path(os.path.expanduser(name)), revision, **base_options)
    outline = check_model(name, revision=revision, **base_options)
    torch_device, torch_dtype = outline.device, outline.dtype
    source = str(locate(name))
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    options |= {"revision": revision} if revision else {}

    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        if holds_adapter(source, revision):  # transformers would load it unmerged, and also from a pickle
            fetched = fetch_adapter(source, revision)
            if fetched is None:
                raise beside_a_model(name)
            return _load_adapter(name, fetched, None, **base_options)
        if os.path.isdir(source):
            require_sums(Path(source))
        config = AutoConfig.from_pretrained(source, **options)
        refuse_config(config, name)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        spread = device == "map" or (device == "auto" and _exceeds_one_gpu(config, torch_dtype))
        with _without_bar():
            loaded, report = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=torch_dtype,
                use_safetensors=True,
                device_map="auto" if spread else None,
                ignore_mismatched_sizes=True,  # refused below, by name
                output_loading_info=True,
                **options,
            )
        _require_all_weights(report, name)
        if not spread:
            loaded = loaded.to(torch_device)
    except UserError:
        raise
    except torch.OutOfMemoryError:
        raise UserError(
            f'model {name!r} does not fit on {torch_device} in {torch_dtype}; try `dtype="bfloat16"` or `device="map"`'
        ) from None
    except Exception as error:  # a damaged file raises different errors in different libraries
        problem = hub_problem(error, name, revision)
        raise problem or UserError(f"model {name!r} cannot be loaded: {one_line(error)}") from error
    return LoadedModel.wrap(loaded, tokenizer, name)


@contextmanager
def _without_bar() -> Iterator[None]:
    """Keep transformers' bar of the weights out of sight; those of downloads stay, and all are as before afterwards."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    shown, downloads_shown = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.disable_progress_bar()  # and those of downloads
    if downloads_shown:
        enable_progress_bars()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
        if not downloads_shown:
            disable_progress_bars()


def _load_adapter(name: str, folder: Path, revision: str | None, **options: Any) -> LoadedModel:
    with merge_errors(name):
        adapter = read_adapter(name, folder)
        with base_errors(name):
            source = str(locate(adapter.base))
            if not os.path.isdir(source) and holds_adapter(source, revision or adapter.revision):
                raise UserError(f"{adapter.base!r} is itself an adapter")
            base = load_model(adapter.base, revision=revision or adapter.revision, **options)
        merged = merge(adapter, base.model)
    return replace(LoadedModel.wrap(merged, base.tokenizer, name), base=adapter.base)


def _own_tokenizer(bridged: Any) -> Any:
    """Load a model's own tokenizer: TransformerLens makes every tokenizer add BoS before a text."""
    if bridged.bos_token_id is None:
        return bridged

    from transformers import AutoTokenizer

    source = bridged.init_kwargs.get("name_or_path") or bridged.name_or_path
    try:
        own = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # no such folder, no hub, or a name that the user chose
        raise UserError(
            f"the bridge's tokenizer adds BoS, and the model's own cannot be loaded from {source!r}: "
            "use LoadedModel.wrap(bridge, tokenizer)"
        ) from error
    own.chat_template = bridged.chat_template or own.chat_template
    return own


def _require_all_weights(report: dict[str, Any], name: str) -> None:
    """Refuse a model if transformers initialised or left out some weights: its config.json belongs to another model.

    transformers does not report weights that the class of the family declares useless.
    """
    if report["mismatched_keys"]:
        key, shape, expected = min(report["mismatched_keys"])
        raise UserError(
            f"model {name!r} cannot be loaded: its weights do not fit its config.json "
            f"({key} is {tuple(shape)}, not {tuple(expected)})"
        )
    if report["missing_keys"]:
        raise UserError(
            f"model {name!r} cannot be loaded: {len(report['missing_keys'])} of its weights are missing "
            f"({min(report['missing_keys'])}, ...)"
        )
    if unused := sorted(key for key in report["unexpected_keys"] if not key.endswith(DERIVED)):
        raise UserError(
            f"model {name!r} cannot be loaded: its config.json leaves out {len(unused)} of its weights ({unused[0]}, "
            "...), as if the model had fewer layers or other parts"
        )


def _exceeds_one_gpu(config: Any, dtype: torch.dtype) -> bool:
    """Whether the weights alone exceed the first GPU on a machine with several."""
    if torch.cuda.device_count() < 2:
        return False
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    free, _ = torch.cuda.mem_get_info(0)
    return weights * dtype.itemsize > 0.9 * free
