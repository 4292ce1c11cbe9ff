"""Measurements taken while the model runs, one per file: a file added here is a probe added.

Other distributions add theirs by an entry point, whose name is the probe's::

    [project.entry-points."speed_diagnostics.probes"]
    mine = "my_package:MyProbe"
"""

import importlib
import pkgutil

from diagnostics.diagnosis.probes.probe import Probe
from diagnostics.support.plugins import load_plugin, plugins, unusable

GROUP = "speed_diagnostics.probes"


def all_probes() -> dict[str, type[Probe]]:
    """Return every probe class by its name: those of this package in alphabetical order, then those of others.

    Raises UserError for a plugin that cannot be used: a run without its columns would look complete.
    """
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    own = [probe for probe in Probe.__subclasses__() if probe.name and probe.__module__.startswith(f"{__name__}.")]
    probes = {probe.name: probe for probe in sorted(own, key=lambda probe: probe.name)}
    for point in plugins(GROUP):
        probe = load_plugin(point)
        if not (isinstance(probe, type) and issubclass(probe, Probe)):
            raise unusable(point, f"{point.value} is no subclass of {Probe.__module__}.Probe")
        if probe.name != point.name:
            raise unusable(point, f"the probe's own name is {probe.name!r}")
        if probe.name in probes:
            raise unusable(point, "another probe has this name")
        if known := {column for other in probes.values() for column in other.describes} & probe.describes.keys():
            raise unusable(point, f"another probe writes the column {min(known)!r}")
        probes[probe.name] = probe
    return probes
