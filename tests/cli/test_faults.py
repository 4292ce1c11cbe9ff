"""Kills, full disks and damages, a few of each; the figures are those of analyses/check_faults.py."""

import random

import check_faults
import pytest

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return check_faults.World(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize(("name", "number"), [("kills", 3), ("disks", 3), ("damages", 60)])
def test_no_fault_is_silent(world, name, number):
    said = []
    count = getattr(check_faults, name)(world, number, random.Random(7), lambda *text: said.append(text))
    assert not said
    assert count["faults"] == 0
    assert sum(count.values()) >= number
