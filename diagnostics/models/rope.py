"""Rotary frequencies that depend on the length of a text, and the lengths that one computation may mix.

Most rotary embeddings rotate position p by the same angles in every text. Two kinds do not: ``longrope`` (Phi-3-128k,
Phi-3.5, Phi-4-mini) has one set of frequencies up to ``original_max_position_embeddings`` and another beyond, for all
positions of the text; ``dynamic`` has different frequencies for every length beyond ``max_position_embeddings``.
transformers takes the length from the largest position of a *call*. So keys cached by a call on one side of a switch do
not fit queries of a call on the other: the numbers are silently wrong.

`RopeLengths` says which lengths share their frequencies. `frequencies_of_length` makes a call use the frequencies of
another length, so that a prompt in chunks, or a text scored in pieces, gives the numbers of one call.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diagnostics.models.anatomy import parameter_names, unwrapped
from diagnostics.support.errors import UserError


@dataclass(frozen=True, eq=False)
class RopeLengths:
    """Which lengths of a text share their rotary frequencies in one model.

    Attributes
    ----------
    switches
        Lengths, ascending: texts up to one of them have other frequencies than longer texts.
    longest
        Length beyond which every length has different frequencies, or None.
    modules
        The rotary embeddings whose frequencies depend on the length.
    """

    switches: tuple[int, ...] = ()
    longest: int | None = None
    modules: tuple[nn.Module, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.modules)

    def factors(self, length: int) -> int:
        """Return the index, from 0, of the set of frequencies for a text of ``length`` tokens.

        Raises UserError beyond `longest`, where every length has different frequencies.
        """
        if self.longest is not None and length > self.longest:
            raise UserError(
                f"beyond {self.longest} positions the rotary frequencies of this model change with every token "
                f"(dynamic RoPE), so no cache fits: {length} tokens are too many, stay within {self.longest}"
            )
        return bisect_left(self.switches, length)

    def mixes(self, *lengths: int) -> bool:
        """Whether some of these lengths have different frequencies; raises UserError as `factors` does."""
        return len({self.factors(length) for length in lengths}) > 1

    @property
    def reason(self) -> str:
        """Why some lengths cannot be mixed, as the beginning of an error message."""
        lengths = ", ".join(map(str, self.switches))
        return f"the rotary frequencies of this model change beyond {lengths} positions (longrope)"

    def settle(self) -> None:
        """Restore the frequencies of short texts: calls beyond `longest` change the module.

        transformers itself restores them in a shorter call, but not in one of exactly `longest` tokens.
        """
        module: Any
        for module in self.modules if self.longest is not None else ():
            kinds = module.rope_type if isinstance(module.rope_type, dict) else {None: module.rope_type}
            for layer_type, kind in kinds.items():
                inverse = getattr(module, "inv_freq" if layer_type is None else f"{layer_type}_inv_freq", None)
                if "dynamic" in kind and isinstance(inverse, Tensor) and inverse.device.type != "meta":
                    first = torch.zeros(1, 1, dtype=torch.long, device=inverse.device)
                    module(inverse.new_zeros(1, 1, 1), first, *(() if layer_type is None else (layer_type,)))


def rope_lengths(stack: nn.Module) -> RopeLengths:
    """Determine which lengths of a text share their rotary frequencies, from a decoder stack's rotary embeddings."""
    switches: set[int] = set()
    longest: int | None = None
    modules: list[nn.Module] = []
    for part in stack.modules():
        module: Any = unwrapped(part)
        kinds = getattr(module, "rope_type", None)
        if not isinstance(kinds, (str, dict)):
            continue
        for layer_type, kind in kinds.items() if isinstance(kinds, dict) else ((None, kinds),):
            if "dynamic" in kind:
                limit = int(module.original_max_seq_len)
                longest = limit if longest is None else min(longest, limit)
            elif kind == "longrope":
                parameters = module.config.rope_parameters
                parameters = parameters if layer_type is None else parameters[layer_type]
                switches.add(int(parameters["original_max_position_embeddings"]))
            else:
                continue
            if not any(module is other for other in modules):
                modules.append(module)
    return RopeLengths(tuple(sorted(switches)), longest, tuple(modules))


@contextmanager
def frequencies_of_length(rope: RopeLengths, length: Callable[[], int | None]) -> Iterator[None]:
    """Make every call inside the block use the frequencies of a text of ``length()`` tokens; None leaves the call's."""
    with ExitStack() as stack:
        for module in rope.modules if rope.switches else ():
            hooks = _LengthHooks(module, length)
            stack.callback(module.register_forward_pre_hook(hooks.before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(hooks.after).remove)
        yield


class _LengthHooks:
    """Hooks of one rotary embedding: they add the last position of a text of that length, and drop its angles."""

    def __init__(self, module: nn.Module, length: Callable[[], int | None]) -> None:
        self.names, self.length, self.added = parameter_names(module), length, False

    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        length = self.length()
        self.added = length is not None
        if length is None:
            return None
        named = dict(zip(self.names, args, strict=False)) | kwargs
        positions = named["position_ids"]
        end = positions.new_full((*positions.shape[:-1], 1), length - 1)
        return (), named | {"position_ids": torch.cat([positions, end], dim=-1)}

    def after(self, _: nn.Module, __: tuple[Any, ...], angles: Any) -> Any:
        return tuple(part[..., :-1, :] for part in angles) if self.added else None
