"""Zip files from elsewhere: what is a run arrives whole, and nothing else leaves a trace."""

import io
import json
import shutil
import stat
import struct
import sys
import tempfile
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import check_faults
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal
from streamlit.testing.v1 import AppTest

from dashboard import upload
from dashboard.upload import MAX_FILES, MAX_MEGABYTES, import_zip
from diagnostics import UserError, diagnose, load_prompts, load_run, recommend
from diagnostics.evaluate.evaluation_folder import load_evaluation
from diagnostics.finetune.finetuning_folder import load_finetuning
from diagnostics.generation.benchmark_folder import load_benchmark
from diagnostics.runs import untrusted
from diagnostics.runs.example import BENCHMARK, EVALUATION, example_folder
from tests.support.examples import examples
from tests.support.finetunings import make_finetuning, save_finetuning
from tests.support.pages import MAIN, calm
from tests.support.runs import DECODE_TOKENS, contents, write_prompts
from tests.support.tiny import tiny_model
from tests.support.users import as_nobody

pytestmark = pytest.mark.usefixtures("one_thread")

# Where fields of a member's two headers lie: (format, offset in the local one, offset in the directory's).
FIELDS = {
    "version": ("<H", 4, 6),
    "flags": ("<H", 6, 8),
    "method": ("<H", 8, 10),
    "crc": ("<I", 14, 16),
    "size": ("<I", 22, 24),
}


class Stop(BaseException):
    pass


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A complete run with its recommendation, and one that was interrupted after two prompts."""
    place = tmp_path_factory.mktemp("runs")
    lm = tiny_model("llama")
    prompts = load_prompts(write_prompts(place / "prompts.jsonl", 4))
    run = diagnose(lm, prompts, out=place / "whole", decode_tokens=DECODE_TOKENS)
    recommend(run).save(place / "whole" / "recommendation.json")

    def stop(done, total, prompt_id):
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        diagnose(lm, prompts, out=place / "part", decode_tokens=DECODE_TOKENS, progress=stop)
    return place


@pytest.fixture(scope="module")
def files(folders):
    """The files of the complete run."""
    return files_of(folders / "whole")


@pytest.fixture
def runs(tmp_path):
    """A folder of runs with something in it, and something beside it."""
    folder = tmp_path / "runs"
    (folder / "earlier").mkdir(parents=True)
    (folder / "earlier" / "manifest.json").write_text("{}")
    (tmp_path / "beside.txt").write_text("beside")
    return folder


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def pack(files, top="", compression=zipfile.ZIP_DEFLATED, folders=()):
    """Zip (name, bytes) pairs, in their order, with names as they are given."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # duplicate names
        for name in folders:
            archive.writestr(zipfile.ZipInfo(name), b"")
        for name, data in files.items() if isinstance(files, dict) else files:
            info = zipfile.ZipInfo(top + name)
            info.compress_type = compression
            archive.writestr(info, data)
    return buffer.getvalue()


def forge(data, name, **values):
    """Overwrite fields in both headers of a member."""
    data = bytearray(data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        local, place = archive.getinfo(name).header_offset, archive.start_dir
    while data[place + 46 : place + 46 + struct.unpack_from("<H", data, place + 28)[0]] != name.encode():
        assert data[place : place + 4] == b"PK\x01\x02"
        place += 46 + sum(struct.unpack_from("<HHH", data, place + 28))
    for field, value in values.items():
        form, in_local, in_directory = FIELDS[field]
        struct.pack_into(form, data, local + in_local, value)
        struct.pack_into(form, data, place + in_directory, value)
    return bytes(data)


def refused(data, runs, match=None, filename="upload.zip"):
    """The archive is refused in one line, and nothing has changed in or beside the folder of runs."""
    before = contents(runs.parent)
    with pytest.raises(UserError, match=match) as caught:
        import_zip(data, filename, runs)
    assert contents(runs.parent) == before
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def refused_in_little_memory(data, runs, megabytes):
    tracemalloc.start()
    try:
        refused(data, runs)
        assert tracemalloc.get_traced_memory()[1] < megabytes << 20
    finally:
        tracemalloc.stop()


def assert_same(one, other):
    assert one.manifest == other.manifest
    assert set(one.tables) == set(other.tables)
    for name in one.tables:
        pd.testing.assert_frame_equal(one.tables[name], other.tables[name], check_exact=True)


# --- Runs ---


@pytest.mark.parametrize("run", ["whole", "part"])
@pytest.mark.parametrize(
    ("top", "filename", "name"),
    [
        ("", "upload.zip", "upload"),
        ("a-run_2026/", "upload.zip", "a-run_2026"),
        ("deep/in/there/", "x.zip", "there"),
        ("./", "x.zip", "x"),
    ],
)
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zipped_run_is_the_same_run(folders, runs, run, top, filename, name, compression):
    before = contents(runs)
    packed = pack(files_of(folders / run), top, compression)
    assert import_zip(packed, filename, runs) == name
    assert contents(runs / name) == contents(folders / run)
    assert_same(load_run(runs / name), load_run(folders / run))
    assert load_run(runs / name).complete == (run == "whole")
    assert {p: c for p, c in contents(runs).items() if p.split("/")[0] != name} == before


@pytest.mark.parametrize("run", ["whole", "part"])
def test_a_zip_that_another_tool_made(folders, runs, tmp_path, run):
    """With entries for folders, as `shutil`, `zip -r` and the desktops write them."""
    made = shutil.make_archive(str(tmp_path / "made"), "zip", folders, run)
    assert import_zip(Path(made).read_bytes(), "made.zip", runs) == run
    assert contents(runs / run) == contents(folders / run)


def test_what_macos_adds_is_left_out(files, runs):
    added = {"__MACOSX/run/._manifest.json": b"x", "__MACOSX/._run": b"y"}
    packed = pack({f"run/{name}": data for name, data in files.items()} | added, folders=("run/", "__MACOSX/"))
    assert import_zip(packed, "run.zip", runs) == "run"
    assert contents(runs / "run") == files


def test_a_name_that_is_taken_gets_a_number(files, runs):
    packed = pack(files, "run/")
    assert [import_zip(packed, "x.zip", runs) for _ in range(3)] == ["run", "run-2", "run-3"]
    assert import_zip(pack(files), "earlier.zip", runs) == "earlier-2"
    assert (runs / "earlier" / "manifest.json").read_text() == "{}"
    for name in ("run", "run-2", "run-3", "earlier-2"):
        assert contents(runs / name) == files


def test_a_file_or_a_link_in_the_way_is_left_alone(files, runs, tmp_path):
    (runs / "run").write_text("a file")
    (runs / "run-2").symlink_to(tmp_path / "beside.txt")
    assert import_zip(pack(files, "run/"), "x.zip", runs) == "run-3"
    assert (runs / "run").read_text() == "a file"
    assert (tmp_path / "beside.txt").read_text() == "beside"


@pytest.mark.parametrize(
    ("top", "filename", "name"),
    [
        ("", "../../etc/passwd.zip", "passwd"),
        ("", ".jobs.zip", "jobs"),
        ("", ".zip", "zip"),
        ("", "....zip", "run"),
        ("", "", "run"),
        ("", "läuft gut.zip", "l-uft-gut"),
        ("", "a\nb\0c.zip", "a-b-c"),
        ("", "--help.zip", "help"),
        (".hidden/", "x.zip", "hidden"),
        ("  /", "x.zip", "run"),
        ("<b>&amp;/", "x.zip", "b-amp"),
        ("r\u00fcn \u2603/", "x.zip", "r-n"),
    ],
)
def test_the_name_in_the_folder_is_a_plain_one(files, runs, top, filename, name):
    assert import_zip(pack(files, top), filename, runs) == name
    assert contents(runs / name) == files


def test_the_folder_of_runs_is_made_where_there_is_none(files, tmp_path):
    runs = tmp_path / "not" / "there"
    assert import_zip(pack(files), "run.zip", runs) == "run"
    assert contents(runs) == {"run": None} | {f"run/{name}": data for name, data in files.items()}


# --- Archives that lead elsewhere ---


@pytest.mark.parametrize(
    "name",
    [
        "../evil.json",
        "../../evil.json",
        "parts/../../evil.json",
        "parts/000000/../../../evil.json",
        "/tmp/evil.json",
        "/evil.json",
        "//evil.json",
        "C:/evil.json",
        "C:evil.json",
        "\\evil.json",
        "..\\evil.json",
        "..\\..\\evil.json",
        "parts\\000000\\layers.parquet",
        "./layers.json",
        "parts/./000000/layers.parquet",
        "parts//000000/layers.parquet",
        "~/evil.json",
        "x\u2024json",
        "ｅvil.json",
        "evil.json\u202e",
        "évil.json",
        "evil.json ",
        "evil.json\n",
        "parts/000000\n/layers.parquet",
        "parts/٠٠٠٠٠٠/layers.parquet",
        " ",
        ".",
        "..",
    ],
)
@pytest.mark.parametrize("top", ["", "run/"])
def test_paths_that_lead_elsewhere(files, runs, name, top):
    refused(pack(files | {name: b"evil"}, top), runs, "no part of a run")


@pytest.mark.parametrize("top", ["../", "../../", "/", "/tmp/", "a/../../", "../.."])
def test_a_prefix_that_leads_elsewhere_leads_nowhere(files, runs, top):
    """All of the run lies behind it, so there is a run to take; but only into its place."""
    packed, before = pack(files, top), contents(runs.parent)
    try:
        name = import_zip(packed, "x.zip", runs)
    except UserError:
        assert contents(runs.parent) == before
    else:
        assert "/" not in name
        assert contents(runs / name) == files
        shutil.rmtree(runs / name)
        assert contents(runs.parent) == before


@pytest.mark.parametrize("manifest", ["run\\manifest.json", "..\\manifest.json"])
def test_backslashes_are_no_folders(files, runs, manifest):
    renamed = {manifest if name == "manifest.json" else name: data for name, data in files.items()}
    refused(pack(renamed), runs, "no manifest.json")


@pytest.mark.parametrize("target", ["/etc/passwd", "../earlier/manifest.json", "manifest.json"])
@pytest.mark.parametrize("name", ["layers.parquet", "extra.json", "parts"])
def test_links(files, runs, target, name):
    buffer = io.BytesIO(pack({n: data for n, data in files.items() if n != name}))
    link = zipfile.ZipInfo(name)
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(link, target)
    refused(buffer.getvalue(), runs, "no part of a run")


# --- Archives that are too much ---


def test_a_bomb_that_says_so(files, runs):
    packed = pack(files | {"extra.parquet": bytes(1 << 20)})
    assert len(packed) < MAX_MEGABYTES << 18
    refused(forge(packed, "extra.parquet", size=MAX_MEGABYTES << 20), runs, f"more than {MAX_MEGABYTES} MB")


def test_a_bomb_of_many_parts(files, runs):
    packed = pack(files | {f"x{'x' * i}.parquet": b"" for i in range(3)})
    for i in range(3):
        packed = forge(packed, f"x{'x' * i}.parquet", size=90 << 20)
    refused(packed, runs, f"more than {MAX_MEGABYTES} MB")


@pytest.mark.parametrize("size", [0, 100, 1 << 20])
def test_a_bomb_that_says_less(files, runs, size):
    """50 MB, declared as less: neither on the disk nor in memory."""
    packed = forge(pack(files | {"extra.parquet": bytes(50 << 20)}), "extra.parquet", size=size)
    refused_in_little_memory(packed, runs, megabytes=20)


def test_the_limit_holds_while_unpacking(files, runs, monkeypatch):
    """Even if a header could say less than what comes out."""
    packed = pack(files | {"extra.parquet": bytes(3 << 20)})
    original = upload._members

    def members(archive):
        found = original(archive)
        monkeypatch.setattr(upload, "MAX_MEGABYTES", 2)
        return found

    monkeypatch.setattr(upload, "_members", members)
    refused(packed, runs, "more than 2 MB")


def test_too_many_files(files, runs):
    many = {f"parts/{i:06d}/layers.parquet": b"" for i in range(MAX_FILES + 1 - len(files))}
    refused(pack(files | many), runs, f"{MAX_FILES + 1} files")


# --- Archives that are something else ---


def test_not_a_zip(runs, files):
    packed = pack(files)
    for data in (b"", b"PK", b"PK\x05\x06", b"<html>", bytes(1000), packed[:100], b"PK\x03\x04" + bytes(100)):
        message = refused(data, runs, "not a zip file", filename="x.zip")
        assert "x.zip" in message


def test_truncated_anywhere(runs, files):
    packed = pack(files)
    for size in range(0, len(packed), len(packed) // 40):
        refused(packed[:size], runs)


def test_a_file_that_is_cut_off_inside(runs, files):
    packed = pack(files | {"layers.parquet": files["layers.parquet"][:500]})
    assert "layers.parquet" in refused(packed, runs, "damaged", filename="mine.zip")


@pytest.mark.parametrize("name", ["layers.parquet", "manifest.json"])
def test_encrypted(files, runs, name):
    refused(forge(pack(files), name, flags=1), runs, "encrypted")


@pytest.mark.parametrize("method", [1, 9, 93, 99])
def test_a_compression_that_python_lacks(files, runs, method):
    refused(forge(pack(files), "layers.parquet", method=method), runs, "unusual way")


def test_a_wrong_checksum(files, runs):
    refused(forge(pack(files), "layers.parquet", crc=1), runs, "CRC")


def test_headers_that_disagree_about_the_name(files, runs):
    packed = pack(files)
    at = packed.index(b"layers.parquet")
    refused(packed[:at] + b"../../evil.jso" + packed[at + 14 :], runs, "cannot be unpacked")


@pytest.mark.parametrize("inner", ["run.zip", "layers.zip", "parts/000000/run.zip"])
def test_a_zip_in_a_zip(files, runs, inner):
    refused(pack({inner: pack(files)}), runs, "no manifest.json")
    refused(pack(files | {inner: pack(files)}), runs, "no part of a run")


OTHERS = """notes.txt run.py layers.parquet.exe a1.json A.json parts/1/layers.parquet sub/layers.parquet .json
parts/0000000/layers.parquet parts/000000/layers.json parts/layers.parquet"""


@pytest.mark.parametrize("name", [*OTHERS.split(), "x" * 300])
def test_files_that_no_run_has(files, runs, name):
    refused(pack(files | {name: b"x"}, "run/"), runs, "no part of a run")
    refused(pack({name: b"x"}), runs, "no manifest.json")


def test_one_manifest_exactly(files, runs):
    refused(pack({n: d for n, d in files.items() if n != "manifest.json"}), runs, "no manifest.json")
    refused(pack([]), runs, "no manifest.json")
    refused(pack([], folders=("run/", "manifest.json/")), runs, "no manifest.json")
    two = {f"{top}/{name}": data for top in "ab" for name, data in files.items()}
    refused(pack(two), runs, "2 manifest.json")
    refused(pack([*files.items(), ("manifest.json", b"{}")]), runs, "2 manifest.json")
    refused(pack(files | {"parts/000000/manifest.json": b"{}"}), runs, "2 manifest.json")


def test_a_file_twice(files, runs):
    refused(pack([*files.items(), ("layers.parquet", b"other")]), runs)
    refused(pack([("layers.parquet", b"other"), *files.items()]), runs)


def test_both_a_file_and_a_folder(files, runs):
    part = {"parts/000000/layers.parquet": b"x"}
    for name in ("parts", "parts/000000", "manifest.json/layers.parquet", "layers.parquet/layers.parquet"):
        refused(pack(files | part | {name: b"x"}), runs)
        refused(pack({name: b"x"} | files | part), runs)


def test_folders_named_like_files_make_no_folders(files, runs):
    names = ("layers.parquet/", "manifest.json/", "evil/", "../evil/", "/evil/", "parts/000000/")
    assert import_zip(pack(files, "run/", folders=[*names, *(f"run/{n}" for n in names)]), "x.zip", runs)
    (added,) = {p.name for p in runs.iterdir()} - {"earlier"}
    assert contents(runs / added) == files
    assert {p.name for p in runs.parent.iterdir()} == {"runs", "beside.txt"}


def test_a_name_too_long_for_a_file(files, runs):
    refused(pack(files | {f"{'x' * 300}.json": b"x"}), runs, "cannot be unpacked")


def test_nul_in_a_name_cannot_hide_its_ending(files, runs):
    """What comes after NUL is not seen by C: neither reading may get past the check."""
    for shown, hidden in (("extra.json", "Z.exe"), ("../evil", "Z.json")):
        packed = pack(files | {shown + hidden: b"x"})
        packed = packed.replace((shown + hidden).encode(), (shown + hidden.replace("Z", "\0")).encode())
        before = contents(runs.parent)
        try:
            name = import_zip(packed, "x.zip", runs)
        except UserError:
            assert contents(runs.parent) == before
        else:
            assert set(contents(runs / name)) <= set(files) | {"extra.json"}
            shutil.rmtree(runs / name)
            assert contents(runs.parent) == before


# --- Runs that are none ---


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("manifest.json", b""),
        ("manifest.json", b"[]"),
        ("manifest.json", b"\xff\xfe"),
        ("manifest.json", b"[" * 100_000),
        ("layers.parquet", b""),
        ("prompts.parquet", None),
        ("tokens.parquet", b"x"),
    ],
)
def test_a_damaged_run(files, runs, name, data):
    damaged = {n: d for n, d in (files | {name: data}).items() if d is not None}
    refused(pack(damaged, "run/"), runs)


@pytest.mark.parametrize(
    "changes", [{"schema_version": 99}, {"n_layers": 4}, {"n_prompts": 5}, {"status": "running"}, {"shape": None}]
)
def test_a_manifest_of_another_run(files, runs, changes):
    manifest = json.loads(files["manifest.json"])
    del manifest["seal"]
    manifest = json.dumps(manifest | changes).encode()
    refused(pack(files | {"manifest.json": manifest}), runs)


def test_a_run_with_no_finished_prompt(folders, runs):
    refused(pack({"manifest.json": (folders / "part" / "manifest.json").read_bytes()}), runs, "no finished prompt")


def test_a_benchmark_without_its_manifest_is_nothing(files, runs):
    refused(pack({"benchmark.parquet": files["layers.parquet"]}), runs, "no manifest.json")


# --- Other results ---


@pytest.fixture(scope="module")
def results(folders, tmp_path_factory):
    """A folder of each other kind: an evaluation, a benchmark, a fine-tuning with weights."""
    place = tmp_path_factory.mktemp("results")
    shutil.copytree(example_folder() / EVALUATION, place / "quality")
    shutil.copytree(example_folder() / BENCHMARK, place / "benchmark")
    save_finetuning(place / "tuned", make_finetuning())
    (place / "tuned" / "adapter_model.safetensors").write_bytes(b"x" * 1000)
    (place / "tuned" / "adapter_config.json").write_text("{}")
    (place / "tuned" / "README.md").write_text("A card.")
    return place


@pytest.mark.parametrize("top", ["", "mine/"])
@pytest.mark.parametrize("kind", ["quality", "benchmark", "tuned"])
def test_other_results_arrive_too(results, runs, kind, top):
    sent = files_of(results / kind)
    name = import_zip(pack(sent, top), f"{kind}.zip", runs)
    arrived = files_of(runs / name)
    assert name == (top.strip("/") or kind)
    weights = {"adapter_model.safetensors", "adapter_config.json", "README.md"} if kind == "tuned" else set()
    assert arrived == {path: data for path, data in sent.items() if path not in weights}


def test_what_arrived_is_read_as_before(results, runs):
    names = [
        import_zip(pack(files_of(results / kind)), f"{kind}.zip", runs) for kind in ("quality", "benchmark", "tuned")
    ]
    evaluation, bench, tuned = (runs / name for name in names)
    assert_frame_equal(load_evaluation(evaluation).items, load_evaluation(results / "quality").items)
    assert_frame_equal(load_benchmark(bench).rows, load_benchmark(results / "benchmark").rows)
    assert_frame_equal(load_finetuning(tuned).sweeps, load_finetuning(results / "tuned").sweeps)
    assert load_run(tuned / "after").n_layers == load_run(results / "tuned" / "after").n_layers


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("quality", "notes.txt", "no part of an evaluation"),
        ("quality", "parts/x.parquet", "no part of an evaluation"),
        ("benchmark", "layers.parquet", "no part of a benchmark"),
        ("tuned", "before/run.py", "no part of a fine-tuning"),
        ("tuned", "before/model.safetensors", "no part of a fine-tuning"),
        ("tuned", "evil.py", "no part of a fine-tuning"),
        ("tuned", "adapter/../../evil.json", "no part of a fine-tuning"),
    ],
)
def test_files_that_no_such_results_have(results, runs, kind, name, said):
    refused(pack(files_of(results / kind) | {name: b"x"}), runs, said)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("quality", "items.parquet"),
        ("quality", "evaluation.json"),
        ("benchmark", "benchmark.parquet"),
        ("benchmark", "benchmark.json"),
        ("tuned", "sweeps.parquet"),
        ("tuned", "after/layers.parquet"),
        ("tuned", "before/manifest.json"),
    ],
)
@pytest.mark.parametrize("data", [b"", b"PAR1", b"[]"])
def test_damaged_results(results, runs, kind, name, data):
    refused(pack(files_of(results / kind) | {name: data}), runs)


def test_weights_do_not_count_as_size(results, runs, monkeypatch):
    monkeypatch.setattr(upload, "MAX_MEGABYTES", 1)
    big = files_of(results / "tuned") | {"model.safetensors": bytes(2 << 20)}
    assert import_zip(pack(big), "tuned.zip", runs) == "tuned"


def test_a_linked_weight_is_left_out_like_any(results, runs):
    assert import_zip(pack(files_of(results / "tuned") | {"checkpoints/1/a.bin": b"x"}), "tuned.zip", runs) == "tuned"
    assert not (runs / "tuned" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("kind", "title"), [("quality", "What quality"), ("benchmark", "What policies cost"), ("tuned", "fine-tuning")]
)
def test_the_added_one_is_opened_on_its_page(results, tmp_path, monkeypatch, kind, title):
    monkeypatch.setenv("SPEED_DIAGNOSTICS_RUNS", str(tmp_path / "runs"))
    at = AppTest.from_file(str(MAIN), default_timeout=60).run()
    at.file_uploader(key="zip").upload(f"{kind}.zip", pack(files_of(results / kind))).run()
    at.button(key="add").click().run()
    assert calm(at) == []
    assert title in at.title[0].value
    assert (tmp_path / "runs" / kind).is_dir()


def test_the_error_names_the_archive_and_not_a_folder_that_is_gone(files, runs):
    message = refused(pack(files | {"layers.parquet": b"x"}), runs, filename="mine.zip")
    assert "mine.zip" in message
    assert ".writing-" not in message


# --- Folders that cannot be written ---


def test_runs_is_a_file(files, runs):
    refused(pack(files), runs / "earlier" / "manifest.json", "cannot write")
    refused(pack(files), runs / "earlier" / "manifest.json" / "deeper", "cannot write")


def test_runs_cannot_be_written(files):
    import_zip(pack(files), "warm.zip", Path(tempfile.mkdtemp(dir=tempfile.gettempdir())) / "runs")
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        runs = Path(place) / "runs"
        runs.mkdir()
        runs.chmod(0o555)
        with as_nobody():
            refused(pack(files), runs, "cannot write")
            refused(pack(files), runs / "deeper", "cannot write")


def test_a_disk_that_is_full(files, runs, monkeypatch):
    original = upload._unpack

    def unpack(archive, info, target, most):
        if info.filename == "layers.parquet":
            target.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return original(archive, info, target, most)

    monkeypatch.setattr(upload, "_unpack", unpack)
    refused(pack(files), runs, "No space left")


# --- Any names ---

FRAGMENTS = """.. . / / \\ C: ~ manifest.json layers.parquet parts 000000 run a ü .writing-x .jobs __MACOSX earlier
beside.txt %2e%2e $HOME"""
PIECES = st.sampled_from([*FRAGMENTS.split(), "\0", "\n", " ", "\u2028", "x" * 120])
ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NAMES = st.lists(PIECES | ANY, min_size=1, max_size=8).map("".join).filter(lambda n: n.strip("\0") == n and n)


@given(top=st.just("") | NAMES, extra=st.lists(NAMES, max_size=3), whole=st.booleans())
@examples(60)
def test_no_name_leads_out_of_the_folder(files, top, extra, whole):
    # Longer names of folders are in a test of their own.
    top = top if len(top.strip("/").split("/")[-1]) <= 200 else ""
    packed = pack([*([(top + n, d) for n, d in files.items()] if whole else []), *((n, b"evil") for n in extra)])
    with tempfile.TemporaryDirectory() as place:
        runs = Path(place) / "runs"
        (runs / "earlier").mkdir(parents=True)
        (Path(place) / "beside.txt").write_text("beside")
        before = contents(place)
        try:
            name = import_zip(packed, "x.zip", runs)
        except UserError:
            pass
        else:
            added = contents(runs / name)
            assert files.items() <= added.items()
            assert set(added) - set(files) <= {"parts", *(n for n in added if n.endswith((".json", ".parquet")))}
            assert load_run(runs / name).complete
            shutil.rmtree(runs / name)
        assert contents(place) == before


# --- Odd files ---


@pytest.mark.parametrize("size", [230, 253, 255, 256, 300, 5000])
def test_names_too_long_for_a_folder(files, runs, size):
    """OSError 'File name too long' of `_free_name`, which is outside of every `try`."""
    before = set(contents(runs.parent))
    for top, filename in ((f"{'n' * size}/", "x.zip"), ("", f"{'n' * size}.zip")):
        try:
            name = import_zip(pack(files, top), filename, runs)
        except UserError:
            assert set(contents(runs.parent)) == before
        else:
            assert contents(runs / name) == files
            shutil.rmtree(runs / name)
            assert set(contents(runs.parent)) == before


def test_a_name_that_is_empty(files, runs):
    """IndexError of `ZipInfo.is_dir` in Python 3.11."""
    refused(pack(files | {"ZZZZ": b"x"}).replace(b"ZZZZ", b"\0ZZZ"), runs)


def test_a_version_that_python_lacks(files, runs):
    """NotImplementedError of `ZipFile()`."""
    refused(forge(pack(files), "layers.parquet", version=99), runs)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_data_that_is_damaged(files, runs, method):
    """zlib.error and LZMAError are neither OSError nor ValueError."""
    packed = bytearray(pack(files, compression=method))
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        info = archive.getinfo("layers.parquet")
    start = info.header_offset + 30 + len(info.filename)
    packed[start : start + info.compress_size] = b"\xa5" * info.compress_size
    refused(bytes(packed), runs)


@given(data=st.data())
@examples(40)
def test_damage_anywhere(files, data):
    """As above; a bit that nobody reads may as well be wrong."""
    packed = bytearray(pack(files, "run/"))
    for _ in range(data.draw(st.integers(1, 4))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as place:
        try:
            name = import_zip(bytes(packed), "x.zip", Path(place) / "runs")
        except UserError:
            assert not any(path.is_file() for path in Path(place).rglob("*"))
        else:
            assert load_run(Path(place) / "runs" / name)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_bomb_in_memory(files, runs, method):
    """Python decompresses bzip2 and LZMA a block of input at a time, however much comes out of it.

    100 MB of zeros in less than 20 kB here; 1 MB could hold many GB.
    """
    packed = forge(pack(files | {"extra.parquet": bytes(100 << 20)}, compression=method), "extra.parquet", size=100)
    refused_in_little_memory(packed, runs, megabytes=20)


@pytest.mark.parametrize("name", ["layers.parquet", f"{'x' * 300}.json"], ids=["twice", "long"])
def test_no_error_names_a_folder_that_is_gone(files, runs, name):
    """The path of the scratch folder, where the message comes from the file system."""
    assert ".writing-" not in refused(pack([*files.items(), (name, b"x")]), runs)


def test_an_error_of_several_lines(files, runs):
    """pyarrow's, in the middle of that of `load_run`, which promises one line."""
    refused(pack(files | {"layers.parquet": b"PAR1" + bytes(100) + b"PAR1"}), runs)


# The others are a run like any other, or take long to make; analyses/check_faults.py has them all.
BOMBS = [
    getattr(check_faults, name)
    for name in ("_many_rows", "_long_texts", "_long_texts_elsewhere", "_deep", "_structures")
]


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb.__name__)
def test_little_files_that_hold_much(files, runs, bomb):
    """Rows that repeat, long texts, lists and beginnings: none of it is ever in this process."""
    packed = pack(bomb(files))
    assert len(packed) < 20 << 20
    refused_in_little_memory(packed, runs, megabytes=100)


def test_files_that_hold_much_are_refused_before_they_are_read(folders, monkeypatch):
    """By the count in their footers, where memory would hold them."""
    assert untrusted.describe_problem(folders / "whole") is None
    monkeypatch.setattr(untrusted, "MAX_CELLS", 10)
    assert "million values" in untrusted.describe_problem(folders / "whole")


def test_texts_that_repeat_are_a_run_like_any_other(files, folders, runs):
    """Dictionary-encoded, as other writers leave them."""
    name = import_zip(pack(check_faults._one_category(files)), "upload.zip", runs)
    assert_same(load_run(runs / name), load_run(folders / "whole"))


def test_types_that_pandas_does_not_know(files, runs):
    refused(pack(check_faults._odd_types(files)), runs, "prompts.parquet|damaged")


def test_a_reader_that_crashes_or_hangs_is_a_refusal(files, runs, monkeypatch):
    for code, said in (
        ("import os; os.abort()", "cannot be read within"),
        ("import time; time.sleep(60)", "1 s: copy"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(untrusted, "SECONDS", 1)
            patch.setattr(untrusted, "READER", [sys.executable, "-c", code])
            refused(pack(files), runs, said)
