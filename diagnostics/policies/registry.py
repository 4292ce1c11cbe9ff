"""Policies by name: those of this package, and those of other distributions.

A policy of this package is a file in it. Another distribution names its class in the entry point group
``speed_diagnostics.policies``::

    [project.entry-points."speed_diagnostics.policies"]
    mine = "my_package:MyPolicy"
"""

import importlib
import re
import warnings
from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from importlib.metadata import EntryPoint
from importlib.resources import files
from types import UnionType
from typing import Any, cast, get_args, get_type_hints

from diagnostics.policies.base import Policy
from diagnostics.support.errors import UserError
from diagnostics.support.plugins import load_plugin, plugins, unusable
from diagnostics.support.suggest import did_you_mean

GROUP = "speed_diagnostics.policies"
PACKAGE = __name__.rpartition(".")[0]
# What people write in place of ``speed:24``: with another sign, or none.
OTHER_SPELLING = re.compile(r"([A-Za-z_]+)[=\s@,/-]*(\d+.*)")
DEFINES_A_POLICY = re.compile(r"^class \w+\(Policy\)", re.MULTILINE)


def all_policies() -> dict[str, type[Policy]]:
    """Return every policy class by its name, in the order of names.

    A policy of another distribution that cannot be used is left out with a warning; `find_policy` says why.
    """
    policies = {policy.name: policy for policy in Policy.__subclasses__()}  # including classes of the running process
    for point in plugins(GROUP):
        try:
            policies[point.name] = _load(point)
        except UserError as error:
            policies.pop(point.name, None)
            warnings.warn(str(error), stacklevel=2)
    return dict(sorted((policies | _built_in()).items()))


def menu() -> list[type[Policy]]:
    """Return every policy class in the order of menus and tables: by rank, then by name."""
    return sorted(all_policies().values(), key=lambda policy: (policy.rank, policy.name))


def policies_at(cutoff: int) -> list[Policy]:
    """Return one policy of every kind, in the order of menus: at this cutoff if it takes one, else with its defaults.

    A kind that needs another parameter is left out.
    """
    kinds = [kind for kind in menu() if _required(kind) <= {"cutoff"}]
    return [kind(**({"cutoff": cutoff} if kind.takes_cutoff() else {})) for kind in kinds]


def find_policy(name: str) -> type[Policy]:
    """Return the policy class of this name; raise a UserError that lists the known names where there is none."""
    if (policy := _built_in().get(name)) is not None:
        return policy
    for point in plugins(GROUP):
        if point.name == name:
            return _load(point)
    policies = all_policies()
    if name not in policies:
        hint = did_you_mean(name, policies)
        spelling = OTHER_SPELLING.fullmatch(name.strip())
        if spelling and (kind := spelling[1].lower()) in policies:
            hint = f"; did you mean '{kind}:{spelling[2]}'?"
        raise UserError(f"policy {name!r} is not one of: {', '.join(policies)}{hint}")
    return policies[name]


def as_policies(policies: Any) -> list[Policy]:
    """Return one or several policies, given as objects or as texts for `parse_policy`; raise UserError for others."""
    if isinstance(policies, str | Policy):
        policies = [policies]
    how = "give SpeedPolicy(24), 'speed:24', or a list of such"
    if isinstance(policies, type) or not isinstance(policies, Iterable):
        raise UserError(f"policies are {policies!r}: {how}")
    made = [parse_policy(one) if isinstance(one, str) else one for one in policies]
    for one in made:
        if not isinstance(one, Policy):
            raise UserError(f"a policy is {one!r}: {how}")
    return made


def parse_policy(text: str) -> Policy:
    """Read ``NAME``, ``NAME:VALUE`` or ``NAME:FIELD=VALUE:...``, such as ``full`` or ``speed:24:anchors=0``.

    A value without a name sets the first field. Anything else raises a UserError that lists what exists.
    """
    name, *settings = text.strip().split(":")
    policy = find_policy(name)
    names = [field.name for field in fields(policy)]
    values: dict[str, Any] = {}
    for position, setting in enumerate(settings):
        key, equals, value = setting.rpartition("=")
        if not equals and position == 0 and names:
            key = names[0]
        if key not in names:
            known, hint = ", ".join(names) or "no parameters", did_you_mean(key or setting, names)
            raise UserError(f"policy {name!r} has no {key or setting!r}; it has: {known}{hint}")
        values[key] = _number(policy, key, value)
    if missing := [field for field in names if field in _required(policy) - values.keys()]:
        raise UserError(f"policy {name!r} needs a {missing[0]}: write {name}:{missing[0].upper()}")
    return policy(**values)


def _required(policy: type[Policy]) -> set[str]:
    """Return the names of the fields without a default."""
    return {f.name for f in fields(policy) if f.default is MISSING and f.default_factory is MISSING}


def _number(policy: type[Policy], field: str, value: str) -> Any:
    """Convert ``value`` to the number type of a policy's field."""
    kind = get_type_hints(policy)[field]
    if isinstance(kind, UnionType):
        kind = next(option for option in get_args(kind) if option is not type(None))
    try:
        return kind(value)
    except ValueError:
        raise UserError(f"{field} of policy {policy.name!r} must be a number, not {value!r}") from None


# --- Policies of this package ---


@cache
def _built_in() -> dict[str, type[Policy]]:
    for file in files(PACKAGE).iterdir():
        # Selected by their text: importing the others would load torch.
        if file.name.endswith(".py") and DEFINES_A_POLICY.search(file.read_text(encoding="utf-8")):
            importlib.import_module(f"{PACKAGE}.{file.name.removesuffix('.py')}")
    own = [policy for policy in Policy.__subclasses__() if policy.__module__.startswith(f"{PACKAGE}.")]
    return {policy.name: policy for policy in own}


# --- Policies of other distributions ---


def _load(point: EntryPoint) -> type[Policy]:
    """Load the policy class that an entry point names; raise a UserError that names the plugin where it is none."""
    policy = load_plugin(point)
    if not (isinstance(policy, type) and issubclass(policy, Policy) and is_dataclass(policy)):
        raise unusable(point, f"{point.value} is no dataclass derived from diagnostics.Policy")
    if getattr(policy, "name", None) != point.name:
        raise unusable(point, f"{point.value} has another name, {getattr(policy, 'name', None)!r}")
    if point.name in _built_in():
        raise unusable(point, f"{PACKAGE} has a policy of this name")
    if abstract := getattr(policy, "__abstractmethods__", None):
        raise unusable(point, f"{point.value} lacks {', '.join(sorted(abstract))}")
    return cast(type[Policy], policy)
