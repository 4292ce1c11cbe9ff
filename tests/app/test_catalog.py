"""What the dashboard lists of a folder: runs, other results, and what cannot be read."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from dashboard.catalog import find_runs
from dashboard.state import saved_recommendation
from diagnostics import load_run, recommend
from diagnostics.cutoffs.regions import RegionRules
from diagnostics.support.files import read_json
from tests.support.runs import contents, write_run
from tests.support.users import as_nobody


def set_time(folder, seconds):
    """Give everything in a folder one time."""
    for path in (*folder.rglob("*"), folder):
        os.utime(path, ns=(seconds * 10**9,) * 2)


def only(folder):
    (entry,) = find_runs(folder)
    return entry


@pytest.fixture
def open_place():
    """A folder that another user can get to, unlike `tmp_path`."""
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        yield Path(place)
        for path in Path(place).rglob("*"):
            path.chmod(0o755)


def test_a_complete_run(tmp_path):
    folder = write_run(tmp_path / "run")
    entry = only(tmp_path)
    assert (entry.path, entry.name, entry.problem, entry.has_benchmark) == (folder, "run", None, False)
    assert (entry.status, entry.finished_prompts, entry.readable) == ("complete", 3, True)
    assert entry.manifest == load_run(folder).manifest


@pytest.mark.parametrize("finished", [0, 1, 2, 3])
def test_an_interrupted_run(tmp_path, finished):
    folder = write_run(tmp_path / "run", finished=finished)
    (folder / "parts").mkdir(exist_ok=True)
    for leftover in (folder / ".writing-a", folder / "parts" / ".writing-b"):
        leftover.mkdir()
        (leftover / "layers.parquet").write_bytes(b"half")
    entry = only(tmp_path)
    assert (entry.status, entry.finished_prompts) == (f"{finished} of 3 prompts", finished)
    assert entry.readable == (finished > 0)
    assert entry.problem is None
    if finished:
        assert len(load_run(folder).prompts) == finished


def test_a_benchmark_alone_and_beside_a_run(tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "benchmark.parquet").write_bytes(b"")
    entry = only(tmp_path)
    assert (entry.status, entry.problem, entry.has_benchmark, entry.readable) == ("benchmark", None, True, False)
    assert entry.finished_prompts == 0
    assert only(tmp_path / "bench").name == "bench"
    folder = write_run(tmp_path / "run")
    shutil.copy(tmp_path / "bench" / "benchmark.parquet", folder)
    entry = only(folder)
    assert (entry.status, entry.has_benchmark, entry.readable) == ("complete", True, True)
    (folder / "manifest.json").write_text("{")
    entry = only(folder)
    assert (entry.status, entry.has_benchmark, entry.readable) == ("benchmark", True, False)
    assert "damaged" in entry.problem


def test_a_folder_that_is_something_else(tmp_path):
    (tmp_path / "photos" / "2026").mkdir(parents=True)
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a-file").write_text("x")
    found = {entry.name: entry for entry in find_runs(tmp_path)}
    assert set(found) == {"photos", "empty"}
    for entry in found.values():
        assert (entry.status, entry.manifest, entry.readable, entry.goals) == ("not a run", None, False, {})
        assert "has no manifest.json" in entry.problem
        assert "\n" not in entry.problem


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "damaged"),
        (b"{", "damaged"),
        (b"\xff\xfe", "damaged"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"schema_version": 7}', "another version"),
        (b'{"schema_version": 1}', "field model"),
        ({"n_prompts": "3"}, "field n_prompts"),
        ({"shape": []}, "field shape"),
        ({"identity": None}, "field identity"),
        ({"status": "done"}, "field status"),
        ({"status": ["complete"]}, "field status"),
    ],
)
def test_a_broken_manifest(tmp_path, data, problem):
    folder = write_run(tmp_path / "run")
    whole = read_json(folder / "manifest.json")
    (folder / "manifest.json").write_bytes(json.dumps(whole | data).encode() if isinstance(data, dict) else data)
    write_run(tmp_path / "good")
    found = {entry.name: entry for entry in find_runs(tmp_path)}
    assert problem in found["run"].problem
    assert (found["run"].status, found["run"].readable, found["run"].finished_prompts) == ("not a run", False, 0)
    assert found["good"].readable
    assert problem in only(folder).problem


def test_a_manifest_that_is_a_folder_or_a_dangling_link(tmp_path):
    (tmp_path / "folder" / "manifest.json").mkdir(parents=True)
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "manifest.json").symlink_to("nowhere")
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "manifest.json").symlink_to("manifest.json")
    assert {entry.status for entry in find_runs(tmp_path)} == {"not a run"}
    assert len(find_runs(tmp_path)) == 3


def test_a_run_given_itself(tmp_path):
    folder = write_run(tmp_path / "run", finished=2)
    entry = only(folder)
    assert (entry.path, entry.name, entry.status) == (folder, "run", "2 of 3 prompts")


def test_a_folder_that_is_missing_or_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "missing", tmp_path / "file", tmp_path / "file" / "deeper"):
        assert find_runs(folder) == []
    assert find_runs(tmp_path) == []


def test_hidden_folders_are_skipped(tmp_path):
    for name in (".jobs", ".writing-abc", ".hidden"):
        write_run(tmp_path / name)
    write_run(tmp_path / "seen")
    assert only(tmp_path).name == "seen"


def test_links_to_runs_are_followed_and_dangling_ones_are_not(tmp_path):
    write_run(tmp_path / "elsewhere" / "run")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "elsewhere" / "run")
    (tmp_path / "runs" / "dangling").symlink_to(tmp_path / "nowhere")
    assert (only(tmp_path / "runs").name, only(tmp_path / "runs").readable) == ("link", True)


def test_newest_first(tmp_path):
    for name, seconds in (("b", 3000), ("a", 1000), ("d", 2000), ("c", 2000)):
        set_time(write_run(tmp_path / name), seconds)
    (tmp_path / "empty").mkdir()
    set_time(write_run(tmp_path / "part", finished=2), 500)
    assert [entry.name for entry in find_runs(tmp_path)] == ["b", "d", "c", "a", "part", "empty"]
    os.utime(tmp_path / "a" / "heads.parquet", (4000, 4000))
    os.utime(tmp_path / "part" / "parts" / "000001", (5000, 5000))
    assert [entry.name for entry in find_runs(tmp_path)] == ["part", "a", "b", "d", "c", "empty"]


def test_the_signature_changes_with_any_file_and_with_nothing_else(tmp_path):
    folder = write_run(tmp_path / "run")
    set_time(folder, 1000)
    before = only(tmp_path).signature
    assert only(tmp_path).signature == only(folder).signature == before
    assert {name for name, *_ in before} == set(contents(folder))
    seen = {before}
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        file.write_bytes(data)  # the same size, another time
        seen.add(one := only(tmp_path).signature)
        os.utime(file, (1000, 1000))
        assert only(tmp_path).signature == before
        file.write_bytes(data + b" ")  # another size, the same time
        os.utime(file, (1000, 1000))
        seen.add(other := only(tmp_path).signature)
        file.unlink()
        seen.add(only(tmp_path).signature)
        file.write_bytes(data)
        os.utime(file, (1000, 1000))
        assert one != other
    assert len(seen) == 1 + 3 * len(before)
    (folder / "recommendation.json").write_text("{}")
    assert only(tmp_path).signature != before


def test_the_signature_changes_with_the_parts(tmp_path):
    folder = write_run(tmp_path / "run", finished=1)
    seen = {only(folder).signature}
    (folder / "parts" / ".writing-a").mkdir()
    assert only(folder).signature in seen
    for name in ("000001", "000002"):
        (folder / "parts" / name).mkdir()
        assert only(folder).signature not in seen
        seen.add(only(folder).signature)
    shutil.rmtree(folder / "parts")
    assert only(folder).signature not in seen
    assert hash(only(folder).signature)


def test_goals_are_those_that_were_saved(tmp_path):
    folder = write_run(tmp_path / "run", n_prompts=6)
    assert only(folder).goals == {}
    for goals in ({}, {"max_kl": 0.5}, {"max_nll_increase": 0.25, "min_agreement": 0.5, "confidence": 0.9}):
        made = recommend(load_run(folder), **goals)
        made.save(folder / "recommendation.json")
        found = only(folder).goals
        assert goals.items() <= found.items()
        assert recommend(load_run(folder), **found).data == made.data


def test_region_rules_are_those_of_the_saved_recommendation(tmp_path):
    folder = write_run(tmp_path / "run")
    assert only(folder).region_rules is None
    rules = RegionRules(max_drift=0.4, max_gap=1)
    made = recommend(load_run(folder), max_kl=0.3, rules=rules)
    made.save(folder / "recommendation.json")
    assert only(folder).region_rules == rules
    assert saved_recommendation(only(folder)).data == made.data


CRITERIA = ["null", "[1]", '{"max_kl": "x"}', '{"max_kl": null}']


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", "{}", "\0", *(f'{{"criterion": {text}}}' for text in CRITERIA)]
)
def test_goals_that_cannot_be_read(tmp_path, text):
    folder = write_run(tmp_path / "run")
    (folder / "recommendation.json").write_text(text)
    assert only(folder).goals is None
    (folder / "recommendation.json").unlink()
    (folder / "recommendation.json").mkdir()
    assert only(folder).goals is None


def test_a_folder_that_cannot_be_listed(open_place):
    """Searched but not listed, and listed but not searched."""
    write_run(open_place / "runs" / "run")
    for mode in (0o711, 0o744):
        (open_place / "runs").chmod(mode)
        with as_nobody():
            try:
                assert find_runs(open_place / "runs") == []
            except PermissionError:
                assert mode == 0o744  # see test_a_folder_that_cannot_be_searched


def test_a_manifest_that_cannot_be_read(open_place):
    (write_run(open_place / "runs" / "run") / "manifest.json").chmod(0o600)
    write_run(open_place / "runs" / "good")
    with as_nobody():
        found = {entry.name: entry for entry in find_runs(open_place / "runs")}
    assert "Permission denied" in found["run"].problem
    assert (found["run"].readable, found["good"].readable) == (False, True)


@pytest.mark.parametrize("where", ["inside", "itself"])
def test_a_folder_that_cannot_be_searched(open_place, where):
    """PermissionError of `(folder / MANIFEST).exists()` and of `(path / BENCHMARK).exists()`, outside of the `try`."""
    write_run(open_place / "runs" / "good")
    closed = write_run(open_place / "runs" / "closed")
    closed.chmod(0o700)
    with as_nobody():
        found = find_runs(closed if where == "itself" else open_place / "runs")
    by_name = {entry.name: entry for entry in found}
    if where == "inside":
        assert by_name["good"].readable
        assert "Permission denied" in by_name["closed"].problem
    assert not any(entry.readable for entry in found if entry.name == "closed")


@pytest.mark.parametrize("folder", ["x" * 300, "x/" * 3000, "a\0b"], ids=["long", "deep", "NUL"])
def test_a_folder_that_cannot_be(tmp_path, folder):
    """OSError and ValueError of pathlib; such a folder can be given to the command or on the page."""
    assert find_runs(tmp_path / folder) == []


@pytest.mark.parametrize("name", ["manifest.json", "recommendation.json"])
def test_json_nested_too_deep(tmp_path, name):
    """RecursionError of the JSON parser: one such file takes every page away."""
    folder = write_run(tmp_path / "run")
    (folder / name).write_text("[" * 100_000)
    entry = only(tmp_path)
    assert entry.goals == (None if name == "recommendation.json" else {})
    assert entry.readable == (name != "manifest.json")
