"""Package versions and hardware that produced a result; every manifest keeps them."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("speed-diagnostics", "torch", "transformers", "numpy", "scipy", "pandas", "pyarrow")
# Recorded if they are in use.
OPTIONAL = {"transformer_lens": "transformer-lens", "nnsight": "nnsight", "peft": "peft", "lm_eval": "lm-eval"}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers."""
    installed = {"python": platform.python_version()}
    for package in (*PACKAGES, *(name for module, name in OPTIONAL.items() if module in sys.modules)):
        try:
            installed[package] = version(package)
        except PackageNotFoundError:  # run from a checkout that is not installed
            installed[package] = "unknown"
    return installed


def hardware(device: torch.device) -> str:
    """Name of the graphics card, or of the processor; ``remote`` for a model whose weights are elsewhere."""
    if device.type == "meta":
        return "remote"
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = info.read_text().split("model name") if info.exists() else []
    return names[1].split(":")[1].split("\n")[0].strip() if len(names) > 1 else platform.machine()
