"""Ways to run a model on a prompt, one policy per file; each is found here by its name."""

import importlib
import pkgutil
from dataclasses import MISSING, fields
from types import UnionType
from typing import Any, get_args, get_type_hints

from diagnostics.policies.base import Policy, Workload
from diagnostics.policies.cache import PolicyCache
from diagnostics.support.errors import UserError

__all__ = ["Policy", "PolicyCache", "Workload", "all_policies", "parse_policy"]


def all_policies() -> dict[str, type[Policy]]:
    """Return every policy class by its name: those defined in the files of this package."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return {policy.name: policy for policy in sorted(Policy.__subclasses__(), key=lambda policy: policy.name)}


def parse_policy(text: str) -> Policy:
    """Read ``NAME``, ``NAME:VALUE`` or ``NAME:FIELD=VALUE:...``, such as ``full`` or ``speed:24:anchors=0``.

    A value without a name is that of the first field. Raises UserError, with what there is, for anything else.
    """
    name, *settings = text.strip().split(":")
    policies = all_policies()
    if name not in policies:
        raise UserError(f"policy {name!r} is not one of: {', '.join(policies)}")
    policy = policies[name]
    names = [field.name for field in fields(policy)]
    values: dict[str, Any] = {}
    for position, setting in enumerate(settings):
        key, equals, value = setting.rpartition("=")
        if not equals and position == 0 and names:
            key = names[0]
        if key not in names:
            raise UserError(f"policy {name!r} has no {key or setting!r}; it has: {', '.join(names) or 'no parameters'}")
        values[key] = _number(policy, key, value)
    required = [field.name for field in fields(policy) if field.default is MISSING and field.name not in values]
    if required:
        raise UserError(f"policy {name!r} needs a {required[0]}: write {name}:{required[0].upper()}")
    return policy(**values)


def _number(policy: type[Policy], field: str, value: str) -> Any:
    """Read a number of the type that a policy's field has."""
    kind = get_type_hints(policy)[field]
    if isinstance(kind, UnionType):
        kind = next(option for option in get_args(kind) if option is not type(None))
    try:
        return kind(value)
    except ValueError:
        raise UserError(f"{field} of policy {policy.name!r} must be a number, not {value!r}") from None
