"""The house's floors: imports between the rooms of `diagnostics` run downwards only, and nothing goes in a circle.

A *room* is a package or module directly inside `diagnostics`; an *arrow* says that one room imports from another, in a
module or inside a function. Imports under ``TYPE_CHECKING`` do not run and do not count.
"""

from collections import defaultdict

import grimp
import pytest

# From the ground up. Rooms of one floor do not know each other.
FLOORS = (
    ("support",),
    ("models", "runs"),
    ("self_test",),
    ("prompts", "policies"),
    ("cutoffs",),
    ("diagnosis", "generation"),
    ("evaluate", "finetune"),
    ("terminal", "figures"),
    ("report",),
    ("cli",),
)
# The package itself: its public names come from all rooms on demand, by name, and it may be asked where it lies.
ROOF = "diagnostics"

# Modules of one room that know each other all the same, and why.
CIRCLES = {
    # A policy opens the block that runs a model, which first has the model tested under two policies.
    frozenset(f"diagnostics.policies.{name}" for name in ("base", "block", "full", "self_test", "speed")),
}


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph("diagnostics", exclude_type_checking_imports=True, cache_dir=None)


def imports(graph):
    """Every import as (importing module, imported module), those of the package itself left out."""
    return {
        (module, other)
        for module in graph.modules
        for other in graph.find_modules_directly_imported_by(module)
        if ROOF not in (module, other)
    }


def room_of(module):
    return module.split(".")[1]


def arrows(graph):
    """Between rooms: (from, to) -> the imports that make it."""
    found = defaultdict(list)
    for module, other in imports(graph):
        if room_of(module) != room_of(other):
            found[room_of(module), room_of(other)].append(f"{module} -> {other}")
    return found


def test_every_room_has_one_floor(graph):
    rooms = {room_of(module) for module in graph.modules if module != ROOF}
    assert sorted(room for floor in FLOORS for room in floor) == sorted(rooms)


def test_nothing_is_imported_upwards(graph):
    """Nor between two rooms of one floor, so there is no circle of rooms either."""
    height = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    upwards = [
        line for (room, other), lines in arrows(graph).items() if height[room] <= height[other] for line in lines
    ]
    assert upwards == []


def test_modules_of_a_room_go_in_no_circle(graph):
    found = circles(imports(graph))
    assert found == CIRCLES


def test_the_library_knows_neither_dashboard_nor_studies():
    graph = grimp.build_graph("diagnostics", include_external_packages=True, cache_dir=None)
    assert not {"analyses", "app", "dashboard", "speed_diagnostics_app", "streamlit", "tests"} & graph.modules
    assert {"torch", "transformers"} < graph.modules


def test_the_package_itself_knows_only_the_ground(graph):
    assert {room_of(module) for module in graph.find_modules_directly_imported_by(ROOF)} == {"support"}


def circles(edges):
    """The sets of modules that reach each other."""
    reached = defaultdict(set)
    for module, other in edges:
        reached[module].add(other)
    growing = True
    while growing:
        growing = False
        for module in list(reached):
            more = set().union(reached[module], *(reached.get(other, set()) for other in reached[module]))
            growing |= more != reached[module]
            reached[module] = more
    return {
        frozenset(other for other in reached[module] if module in reached.get(other, ()))
        for module in reached
        if module in reached[module]
    }
