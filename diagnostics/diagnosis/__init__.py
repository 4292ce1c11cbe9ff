"""Diagnosis: measures what each layer of a model does with a prompt while the model runs."""

from typing import TYPE_CHECKING

from diagnostics.support.lazy import find_on_demand

if TYPE_CHECKING:
    from diagnostics.diagnosis.diagnosis import diagnose
    from diagnostics.diagnosis.teacher import Teacher, observe_teacher

_HOMES = {
    "diagnosis": ("diagnose",),
    "teacher": (
        "Teacher",
        "observe_teacher",
    ),
}

__all__ = [
    "Teacher",
    "diagnose",
    "observe_teacher",
]

find_on_demand(__name__, _HOMES)
