"""Measurements taken while the model runs, one per file: a file added here is a probe added."""

import importlib
import pkgutil

from diagnostics.diagnosis.probes.probe import Probe


def all_probes() -> dict[str, type[Probe]]:
    """Return every probe class of this package by its name, in alphabetical order."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return {probe.name: probe for probe in sorted(Probe.__subclasses__(), key=lambda p: p.name) if probe.name}
