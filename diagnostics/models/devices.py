"""The device that a model runs on, and the type of its weights, from the names that a user gives."""

import torch

from diagnostics.support.errors import UserError
from diagnostics.support.suggest import most_like

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES_ELSEWHERE = {
    **{"fp32": "float32", "f32": "float32", "float": "float32", "fp16": "float16", "f16": "float16"},
    **{"half": "float16", "bf16": "bfloat16"},
}
NAMES = ("auto", "map", "cpu", "cuda", "mps", "meta")
DEVICES_ELSEWHERE = {"gpu": "cuda", "nvidia": "cuda", "metal": "mps", "apple": "mps"}


def choose_device(device: str | torch.device) -> torch.device:
    """Return the device of a name; for ``auto`` and ``map`` cuda, else mps, else cpu.

    Raises UserError, which lists what can be used, for a device that is not here.
    """
    name = str(device)
    if name in ("auto", "map"):
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(name)
        torch.ones(1, device=chosen).item()  # the meta device has no values
    except (RuntimeError, AssertionError, ImportError):
        usable = usable_devices()
        said = f"device {name!r} cannot be used here: use {', '.join(['auto', *usable])}"
        raise UserError(said + _meant(name.partition(":")[0], usable)) from None
    return chosen


def usable_devices() -> list[str]:
    """Return the devices of this machine that models can run on."""
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return devices + (["mps"] if torch.backends.mps.is_available() else [])


def _meant(kind: str, usable: list[str]) -> str:
    meant = kind if kind in NAMES else DEVICES_ELSEWHERE.get(kind.lower()) or most_like(kind, NAMES)
    said = "" if meant in (kind, None) else f"; did you mean {meant!r}?"
    found = meant not in ("cuda", "mps") or any(one.startswith(meant) for one in usable)
    return said if found else f"{said or ';'} torch finds no {meant} device"


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the type of a name; for ``auto`` float32 on cpu, else bfloat16. Raises UserError for any other name."""
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        names = ["auto", *DTYPES]
        meant = DTYPES_ELSEWHERE.get(name.lower()) or most_like(name, names)
        hint = "" if meant is None else f"; did you mean {meant!r}?"
        raise UserError(f"dtype {name!r} is not one of: {', '.join(names)}{hint}")
    return DTYPES[name]
