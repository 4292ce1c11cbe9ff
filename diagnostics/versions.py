"""What a result was made with: package versions and hardware, kept in every manifest."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("speed-diagnostics", "torch", "transformers", "numpy", "scipy", "pandas", "pyarrow")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a checkout that is not installed
            found[package] = "unknown"
    return found


def hardware(device: torch.device) -> str:
    """Name of the graphics card, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = info.read_text().split("model name") if info.exists() else []
    return names[1].split(":")[1].split("\n")[0].strip() if len(names) > 1 else platform.machine()
