"""Rules that name a cutoff from the layers alone, one family per file: a file added here is a rule added.

Other distributions add theirs by an entry point, whose name is the rule's::

    [project.entry-points."speed_diagnostics.rules"]
    mine = "my_package:MY_RULE"
"""

import importlib
import pkgutil
from collections.abc import Sequence

from diagnostics.cutoffs.rules.rule import Rule
from diagnostics.support.errors import UserError
from diagnostics.support.plugins import load_plugin, plugins, unusable
from diagnostics.support.suggest import did_you_mean

GROUP = "speed_diagnostics.rules"
ALL, NONE = "all", "none"


def all_rules() -> dict[str, Rule]:
    """Return every rule by its name: those of this package in alphabetical order of their files, then plugins.

    Raises UserError for a plugin that cannot be used.
    """
    rules: dict[str, Rule] = {}
    for module in pkgutil.iter_modules(__path__):
        for rule in getattr(importlib.import_module(f"{__name__}.{module.name}"), "RULES", ()):
            rules[rule.name] = rule
    for point in plugins(GROUP):
        rule = load_plugin(point)
        if not isinstance(rule, Rule):
            raise unusable(point, f"{point.value} is no instance of diagnostics.cutoffs.rules.rule.Rule")
        if rule.name != point.name:
            raise unusable(point, f"its rule has another name, {rule.name!r}")
        if rule.name in rules:
            raise unusable(point, "another rule has this name")
        rules[rule.name] = rule
    return rules


def named_rules(names: str | Sequence[str]) -> tuple[bool, list[Rule]]:
    """Return whether ``all`` is among the names, and the rules that are named besides.

    ``names`` is ``"all"``, ``"none"``, or names of rules, as a sequence or with commas between. Raises UserError for a
    name that is none of a rule.
    """
    given = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
    if given == [NONE]:
        return False, []
    known = all_rules()
    chosen = [name for name in given if name != ALL]
    for name in chosen:
        if name not in known:
            meant = did_you_mean(name, known) or f": give {ALL}, {NONE}, or some of {', '.join(known)}"
            raise UserError(f"there is no rule {name!r}{meant}")
    return ALL in given, [known[name] for name in chosen]
