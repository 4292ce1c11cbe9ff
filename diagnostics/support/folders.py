"""A folder of results: claiming it, continuing it, its manifest, and the error where it is damaged.

Every kind of result (run, benchmark, evaluation, fine-tuning) is a folder of tables with a manifest: a sealed JSON file
that says what was asked, of which model, with which versions. The type of a manifest is a ``TypedDict``: in Python it
is a plain dictionary, and a file is checked against the type when it is read.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, Required, TypeVar

import pandas as pd
from typing_extensions import TypedDict

from diagnostics.support.errors import UserError
from diagnostics.support.files import (
    SCRATCH,
    read_json,
    read_table,
    remove_scratch,
    scratch_folder,
    write_problem,
    write_sealed,
)
from diagnostics.support.locks import LOCK
from diagnostics.support.sameness import difference
from diagnostics.support.suggest import whats_there

if TYPE_CHECKING:
    import torch

Manifest = TypeVar("Manifest", bound=Mapping[str, Any])


class Head(TypedDict, total=False):
    """The fields that every manifest begins with; earlier versions wrote fewer."""

    created: str  # UTC, ISO 8601
    model: Required[str]
    hardware: str
    versions: dict[str, str]
    arguments: dict[str, Any]  # what the user asked for, as it was given
    configuration: dict[str, Any]  # of the model


class DescribedModel(Protocol):
    """What a manifest says of a `diagnostics.models.loading.LoadedModel`."""

    @property
    def name(self) -> str:
        """Its name for people."""

    @property
    def anatomy(self) -> Any:
        """Its parts: a `diagnostics.models.anatomy.Anatomy`."""

    @property
    def device(self) -> "torch.device":
        """Where the model runs."""

    def identity(self) -> Any:
        """Return what tells it from other models: a `diagnostics.models.identity.ModelIdentity`."""


def manifest_head(lm: DescribedModel, arguments: dict[str, Any] | None, **identity: Any) -> dict[str, Any]:
    """Return the fields that every manifest has: `Head`, ``n_layers``, ``notes`` and ``identity``.

    ``identity`` is all that a continued result must share with the one in the folder: the model's own, and these
    arguments.
    """
    from diagnostics.support.versions import hardware, versions

    model = lm.identity()
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": lm.name,
        "n_layers": lm.anatomy.n_layers,
        "hardware": hardware(lm.device),
        "versions": versions(),
        "notes": model.notes,
        "arguments": arguments or {},
        "configuration": model.configuration,
        "identity": model.entries() | identity,
    }


@dataclass(frozen=True)
class FolderKind(Generic[Manifest]):
    """One kind of result and its folder.

    Attributes
    ----------
    name
        Its name in messages, such as ``run``.
    manifest
        Name of the manifest's file. A folder that has it holds such a result.
    fields
        The manifest's type: a ``TypedDict``, or one with a validator.
    tables
        Other files, each of which shows that the folder holds such a result.
    beside
        Files of other results that may share the folder.
    resumable
        Whether an interrupted one can be continued.
    """

    name: str
    manifest: str
    fields: Any
    tables: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    resumable: bool = True

    def read(self, path: str | Path) -> Manifest:
        """Read and check the manifest; raise UserError where there is none, or it is damaged."""
        folder = Path(path)
        if not os.path.isdir(folder):
            hint = whats_there(str(path), lambda entry: (entry / self.manifest).is_file(), f"{self.name}s")
            raise UserError(f"there is no {self.name} folder {str(path)!r}{hint}")
        try:
            content = read_json(folder / self.manifest)
        except FileNotFoundError:
            raise UserError(f"folder {str(path)!r} is not {self._a_result}: it has no {self.manifest}") from None
        except (ValueError, OSError) as error:
            raise self.damaged(folder, f"{self.manifest} cannot be read ({error})") from None
        if problem := self._problem(content):
            raise self.damaged(folder, f"{self.manifest}: {problem}")
        return content

    def read_table(self, path: str | Path, file: str) -> pd.DataFrame:
        """Read a table of the folder; raise UserError where it is missing or damaged."""
        try:
            return read_table(Path(path) / file)
        except FileNotFoundError:
            raise self.damaged(path, f"{file} is missing") from None
        except (OSError, ValueError) as error:
            raise self.damaged(path, f"{file} cannot be read ({error})") from None

    def damaged(self, path: str | Path, problem: str) -> UserError:
        """Return the error that says what is wrong in a folder."""
        return UserError(f"{self.name} {str(path)!r} is damaged: {problem}")

    def require_free(self, path: Path, *, resume: bool = False) -> None:
        """Raise UserError unless a result can be written to ``path``, or continued there; leave nothing behind."""
        with self.writing(path):
            if any((path / name).exists() for name in (self.manifest, *self.tables)):
                if not resume:
                    ways = "give `resume=True` to continue it, or another `out`"
                    ways = ways if self.resumable else "give another `out`"
                    raise UserError(f"folder {str(path)!r} holds {self._a_result} already: {ways}")
                return
            if path.exists() and not (path.is_dir() and self._may_hold(path)):
                raise UserError(f"{str(path)!r} exists and is not {self._a_result} folder: give another `out`")
            require_writable(path)

    def claim(self, path: Path, asked: Manifest, *, resume: bool) -> Manifest | None:
        """Return the manifest of the result to continue in ``path``, None where a new one is to be written.

        Raises UserError if something is in the way, if ``path`` cannot be written, or if it holds a result of something
        else: what must be the same is ``identity``.
        """
        self.require_free(path, resume=resume)
        if not (path / self.manifest).exists():
            return None
        kept = self.read(path)
        if differs := difference(kept, asked):
            raise UserError(f"folder {str(path)!r} holds another {self.name} ({differs}): give another `out`")
        remove_scratch(path)
        return kept

    def start(self, path: Path, manifest: Manifest) -> None:
        """Create the folder with its manifest; raise UserError where that is not possible."""
        with self.writing(path):
            path.mkdir(parents=True, exist_ok=True)
            remove_scratch(path)
            write_sealed(path / self.manifest, manifest)

    @contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        """Turn an error of the file system into one line that says whether results are kept."""
        try:
            yield
        except Exception as error:
            reason = write_problem(error)
            if reason is None:
                raise
            after = "give another `out`"
            if self.resumable:
                after += ", or continue with `resume=True` when it can be written"
                if os.path.exists(path / self.manifest):
                    after = "what is finished is kept: continue with `resume=True`"
            raise UserError(f"cannot write {self.name} folder {str(path)!r}: {reason}; {after}") from None

    @property
    def _a_result(self) -> str:
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"

    def _may_hold(self, folder: Path) -> bool:
        return is_unused(folder) or any((folder / name).is_file() for name in self.beside)

    @cached_property
    def _validator(self) -> Any:
        from pydantic import TypeAdapter

        return TypeAdapter(self.fields)

    def _problem(self, content: Any) -> str | None:
        """Return which field of a manifest is wrong; None if none is."""
        from pydantic import ValidationError

        try:
            self._validator.validate_python(content, strict=True)
        except ValidationError as invalid:
            error = invalid.errors(include_url=False)[0]
            if error["type"] == "value_error":
                return str(error["ctx"]["error"])
            field = ".".join(map(str, error["loc"]))
            return f"field {field} is missing or wrong" if field else "it is not a JSON object"
        return None


def is_unused(path: Path) -> bool:
    """Whether a folder is empty but for what a process that was killed may have left: scratch folders, a lock."""
    return all(inside.name.startswith((SCRATCH, LOCK)) for inside in path.iterdir())


def require_writable(path: Path) -> None:
    """Raise OSError unless a folder can be made at ``path``, or written to; leave nothing behind."""
    nearest = next(folder for folder in (path, *path.parents) if folder.exists())
    with scratch_folder(nearest):
        pass
