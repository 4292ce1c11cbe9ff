"""Measurements taken while the model runs, one per file: a file added here is a probe added.

Other distributions add theirs by an entry point, whose name is the probe's::

    [project.entry-points."speed_diagnostics.probes"]
    mine = "my_package:MyProbe"
"""

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint

from diagnostics.cutoffs.rules import named_rules
from diagnostics.diagnosis.probes.cutoff_sweep import CutoffSweep
from diagnostics.diagnosis.probes.probe import Probe
from diagnostics.support.errors import UserError
from diagnostics.support.plugins import load_plugin, plugins, unusable

GROUP = "speed_diagnostics.probes"


def all_probes() -> dict[str, type[Probe]]:
    """Return every probe class by its name, in alphabetical order: of this package, of this process, and plugins.

    Raises UserError for a plugin that cannot be used, since a run without its columns would look complete, and for a
    class that has the name of a probe of this package.
    """
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    added = {point: _load(point) for point in plugins(GROUP)}
    found = [probe for probe in Probe.__subclasses__() if probe.name and probe not in added.values()]
    own = {probe.name: probe for probe in found if probe.__module__.startswith(f"{__name__}.")}
    probes = dict(own)
    for probe in found:
        if own.get(probe.name, probe) is not probe:
            raise UserError(f"{probe.__module__}.{probe.__qualname__} has the name of another probe, {probe.name!r}")
        probes[probe.name] = probe  # of a class that is defined again, as in a notebook, the last counts
    for point, probe in added.items():
        if probe.name in probes:
            raise unusable(point, "another probe has this name")
        for other in probes.values():
            if shared := other.describes.keys() & probe.describes.keys():
                raise unusable(point, f"the probe {other.name!r} writes the column {min(shared)!r} too")
        probes[probe.name] = probe
    return dict(sorted(probes.items()))


def chosen_probes(rules: str | Sequence[str], *, sweep: bool = True) -> dict[str, type[Probe]]:
    """Return the probes of a diagnosis by name: all but those that no chosen rule reads.

    ``rules`` are as `diagnostics.cutoffs.rules.named_rules` takes them; without ``sweep`` the cutoff sweep is left out.
    """
    every, named = named_rules(rules)
    columns = {column for rule in named for column in (*rule.reads, *rule.reads_heads)}

    def wanted(probe: type[Probe]) -> bool:
        if probe is CutoffSweep:
            return sweep
        return not probe.optional or (every and not probe.costly) or not columns.isdisjoint(probe.describes)

    return {name: probe for name, probe in all_probes().items() if wanted(probe)}


def require_backend(probes: Mapping[str, type[Probe]], backend: str) -> None:
    """Raise UserError if one of some probes cannot run through a backend."""
    for name, probe in probes.items():
        if probe.backends and backend not in probe.backends:
            raise UserError(
                f"the {backend} backend cannot measure {name}: use the {' or '.join(probe.backends)} backend, or leave "
                "out the rules that read it"
            )


def added_probes(probes: Mapping[str, type[Probe]]) -> list[str]:
    """Return those of some probes that this package does not bring, as ``module.class``."""
    others = (probe for probe in probes.values() if not probe.__module__.startswith(f"{__name__}."))
    return [f"{probe.__module__}.{probe.__qualname__}" for probe in others]


def _load(point: EntryPoint) -> type[Probe]:
    probe = load_plugin(point)
    if not (isinstance(probe, type) and issubclass(probe, Probe)):
        raise unusable(point, f"{point.value} is no subclass of diagnostics.diagnosis.probes.probe.Probe")
    if probe.name != point.name:
        raise unusable(point, f"its class has another name, {probe.name!r}")
    return probe
