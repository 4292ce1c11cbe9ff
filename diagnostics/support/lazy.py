"""Packages whose public names come from their modules when first used, so that reading a run loads no torch."""

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any


class LazyPackage(ModuleType):
    """A package whose names are imported on demand; ``HOME_OF`` maps each name to its module."""

    HOME_OF: Mapping[str, str]

    def __getattr__(self, name: str) -> Any:
        if name not in self.HOME_OF:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{self.__name__}.{self.HOME_OF[name]}"), name)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.HOME_OF})


def find_on_demand(package: str, homes: Mapping[str, Sequence[str]]) -> None:
    """Make an imported package find its public names in their modules, given as module -> names."""
    vars(sys.modules[package])["HOME_OF"] = {name: module for module, names in homes.items() for name in names}
    sys.modules[package].__class__ = LazyPackage
