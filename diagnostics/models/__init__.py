"""Models: loading, parts and identity."""

from typing import TYPE_CHECKING

from diagnostics.support.lazy import find_on_demand

if TYPE_CHECKING:
    from diagnostics.models.anatomy import Anatomy, dissect
    from diagnostics.models.embedded import embedded_model_folder
    from diagnostics.models.identity import ModelIdentity
    from diagnostics.models.loading import LoadedModel, load_model
    from diagnostics.models.outline import ModelOutline, check_model

_HOMES = {
    "anatomy": (
        "Anatomy",
        "dissect",
    ),
    "embedded": ("embedded_model_folder",),
    "identity": ("ModelIdentity",),
    "loading": (
        "LoadedModel",
        "load_model",
    ),
    "outline": (
        "ModelOutline",
        "check_model",
    ),
}

__all__ = [
    "Anatomy",
    "LoadedModel",
    "ModelIdentity",
    "ModelOutline",
    "check_model",
    "dissect",
    "embedded_model_folder",
    "load_model",
]

find_on_demand(__name__, _HOMES)
