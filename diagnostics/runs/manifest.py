"""The manifest of a run: what was diagnosed, with what, and how far it got."""

from typing import Annotated, Any, Literal, Required

from pydantic import AfterValidator, BeforeValidator, NonNegativeInt, PositiveInt
from typing_extensions import TypedDict

from diagnostics.runs.places import MANIFEST
from diagnostics.support.folders import FolderKind, Head

SCHEMA_VERSION = 1


def _of_this_version(manifest: Any) -> Any:
    """Look at the version first: another one may have other fields."""
    version = manifest.get("schema_version", SCHEMA_VERSION) if isinstance(manifest, dict) else SCHEMA_VERSION
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"it was written by another version (schema {version}, this is {SCHEMA_VERSION}); run it again"
        )
    return manifest


class Shape(TypedDict):
    """Sizes of the model from which savings are predicted: see `diagnostics.cutoffs.savings`."""

    n_heads: PositiveInt
    n_kv_heads: PositiveInt
    head_dim: PositiveInt
    width: PositiveInt
    layer_parameters: list[Any]
    head_parameters: PositiveInt
    bytes_per_value: PositiveInt
    layer_types: list[Any]
    sliding_window: int | None


class RunIdentity(TypedDict):
    """What a continued run must share for its numbers to be the same; these are the fields that are read again."""

    weight_hash: str
    anchors: NonNegativeInt


class RunManifest(Head, total=False):
    """The content of ``manifest.json``; fields that are not required were added over time."""

    schema_version: Required[int]
    status: Required[Literal["running", "complete"]]
    revision: str | None
    architecture: str
    n_layers: Required[int]
    n_heads: Required[int]
    max_positions: Required[int | None]
    shape: Required[Shape]
    seed: int | None
    prompt_set: str
    sweep: bool  # whether the loss of every cutoff was measured
    n_prompts: Required[int]
    columns: dict[str, str]  # measure -> its description
    notes: Required[list[str]]
    identity: Required[RunIdentity]


def _shape_of_all_layers(manifest: RunManifest) -> RunManifest:
    for name in ("layer_parameters", "layer_types"):
        if len(manifest["shape"][name]) != manifest["n_layers"]:
            raise ValueError(f"field shape.{name} is missing or wrong")
    return manifest


RUN_FOLDER: FolderKind[Any] = FolderKind(
    "run",
    MANIFEST,
    Annotated[RunManifest, BeforeValidator(_of_this_version), AfterValidator(_shape_of_all_layers)],
)
