"""Module paths of earlier versions that notebooks and scripts may still name; each warns and leads to the new one."""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# The paths that README and notebooks of 0.1.0 name; CHANGELOG.md lists the others.
MOVED = {
    "diagnostics.benchmark": ("diagnostics.generation.benchmarks",),
    "diagnostics.embedded": ("diagnostics.models.embedded",),
    "diagnostics.encoding": ("diagnostics.prompts.encoding", "diagnostics.generation.inputs"),
    "diagnostics.savings": ("diagnostics.cutoffs.savings",),
}


class MovedModules(MetaPathFinder, Loader):
    """Finds a module of `MOVED` under its old path."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for an old path, None for any other."""
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Let the import system make the module."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Give the old module the names of those that replace it."""
        homes = MOVED[module.__name__]
        warnings.warn(f"{module.__name__} is now {' and '.join(homes)}", DeprecationWarning, stacklevel=2)
        for home in homes:
            module.__dict__.update({k: v for k, v in vars(import_module(home)).items() if not k.startswith("__")})


def find_moved() -> None:
    """Make the old paths importable, after everything else has been tried."""
    sys.meta_path.append(MovedModules())
