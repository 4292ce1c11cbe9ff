"""Files of results: whole or not there, sealed, and never more than the disk has."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diagnostics import UserError
from diagnostics.support import files
from diagnostics.support.files import (
    read_json,
    read_table,
    require_sums,
    write_json,
    write_sealed,
    write_sums,
    write_table,
    write_text,
)

TABLE = pd.DataFrame({"name": ["a", "b", "c"], "x": [1.0, 2.5, None], "some": [[1.0, 2.0], None, []]})


def test_a_table_is_read_as_it_was_written(tmp_path):
    write_table(tmp_path / "t.parquet", TABLE)
    pd.testing.assert_frame_equal(read_table(tmp_path / "t.parquet"), pd.read_parquet(tmp_path / "t.parquet"))
    assert list(tmp_path.iterdir()) == [tmp_path / "t.parquet"]


@pytest.mark.parametrize("kind", ["t.parquet", "j.json"])
def test_any_changed_byte_is_found(tmp_path, kind):
    """Every byte of the file, its seal too; what is taken for a file without a seal holds the same all the same."""
    path = tmp_path / kind
    if kind == "t.parquet":
        write_table(path, TABLE)
        read = lambda: read_table(path).to_json()  # noqa: E731
    else:
        write_sealed(path, {"cutoff": 24, "evidence": [{"kl": 0.25}], "note": "über"})
        read = lambda: read_json(path)  # noqa: E731
    whole, data = read(), path.read_bytes()
    found = 0
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        try:
            assert read() == whole
        except ValueError:
            found += 1
    assert found == len(data)
    for at in range(0, len(data), 7):
        for damaged in (data[:at], data[:at] + b"1" + data[at:]):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=r".+") as caught:
                read()
            assert "\n" not in str(caught.value)


def test_what_others_write_has_no_seal_and_is_taken(tmp_path):
    write_table(tmp_path / "t.parquet", TABLE)
    changed = pd.read_parquet(tmp_path / "t.parquet").assign(mine=1)
    changed.to_parquet(tmp_path / "t.parquet", index=False)
    assert read_table(tmp_path / "t.parquet")["mine"].tolist() == [1, 1, 1]
    (tmp_path / "j.json").write_text('{"cutoff": 3}')
    assert read_json(tmp_path / "j.json") == {"cutoff": 3}


def test_a_json_file_changed_by_hand_says_how_it_is_taken(tmp_path):
    path = tmp_path / "j.json"
    write_sealed(path, {"cutoff": 24})
    path.write_text(path.read_text().replace("24", "23"))
    with pytest.raises(ValueError, match='delete its "seal"'):
        read_json(path)
    content = json.loads(path.read_text())
    del content["seal"]
    path.write_text(json.dumps(content))
    assert read_json(path) == {"cutoff": 23}


def test_texts_that_repeat_are_texts(tmp_path):
    """As other writers encode them; one value only, too."""
    names = pa.array(["a", "a", "a"]).dictionary_encode()
    pq.write_table(pa.table({"name": names, "x": [1, 2, 3]}), tmp_path / "t.parquet")
    found = read_table(tmp_path / "t.parquet")["name"]
    assert (found == "a").all()
    assert found.map(lambda text: isinstance(text, str)).all()


@pytest.mark.parametrize(("old", "new"), [(b'"int64"', b'"int68"'), (b"numpy_type", b"numpy_tipe"), (b"[]", b"{}")])
def test_damaged_metadata_of_a_table_is_one_line(tmp_path, old, new):
    """Of a file without a seal: errors of pyarrow and pandas are of many types."""
    table = pa.Table.from_pandas(pd.DataFrame({"x": [1, 2]}))
    said = table.schema.metadata[b"pandas"]
    assert old in said or old == b"[]"
    pq.write_table(table.replace_schema_metadata({b"pandas": said.replace(old, new)}), tmp_path / "t.parquet")
    try:
        assert read_table(tmp_path / "t.parquet")["x"].tolist() == [1, 2]
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017


def test_numbers_that_are_none_are_refused_by_their_place(tmp_path):
    for number in (float("nan"), float("inf"), np.float64("nan")):
        content = {"cutoff": 3, "evidence": [{"kl": 0.1}, {"kl": number}]}
        for write in (write_json, write_sealed):
            with pytest.raises(UserError, match=r"j\.json would not be JSON: evidence\[1\]\.kl is not a finite number"):
                write(tmp_path / "j.json", content)
    assert not list(tmp_path.iterdir())
    (tmp_path / "j.json").write_text('{"kl": NaN}')
    with pytest.raises(ValueError, match="NaN is not a number"):
        read_json(tmp_path / "j.json")


@pytest.mark.parametrize(
    "write", [lambda p: write_table(p, TABLE), lambda p: write_sealed(p, {"a": 1}), lambda p: write_text(p, "new")]
)
def test_killed_while_a_file_is_written_the_old_one_is_there(tmp_path, monkeypatch, write):
    """Whatever part of the new one had come to the disk."""

    class Killed(BaseException):
        pass

    path = tmp_path / "file"
    path.write_text("old")

    def die(source, target):
        assert Path(source).read_bytes()
        assert path.read_text() == "old"
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", die)
        with pytest.raises(Killed):
            write(path)
    assert path.read_text() == "old"
    write(path)
    assert path.read_text(errors="replace") != "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_files_come_to_the_disk_before_their_name(tmp_path, monkeypatch):
    """After a power cut a name never stands for an empty file."""
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda f: (done.append("folder" if os.path.isdir(f"/proc/self/fd/{f}") else "file"), fsync(f))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("name"), replace(a, b)))
    write_table(tmp_path / "t.parquet", TABLE)
    assert done == ["file", "name", "folder"]
    done.clear()
    monkeypatch.setattr(Path, "rename", lambda a, b: (done.append("name"), os.rename(a, b)))
    files.write_folder(tmp_path / "part", {"a": TABLE, "b": TABLE})
    assert done == ["file", "file", "folder", "name", "folder"]


def test_sums_name_the_file_that_changed(tmp_path):
    for name in ("a.safetensors", "b.json"):
        (tmp_path / name).write_bytes(name.encode() * 100)
    require_sums(tmp_path)  # there are none
    write_sums(tmp_path)
    require_sums(tmp_path)
    subprocess.run(["sha256sum", "-c", "--quiet", files.SUMS], cwd=tmp_path, check=True)
    (tmp_path / "a.safetensors").write_bytes(b"b" + b"a.safetensors" * 100)
    with pytest.raises(UserError, match=r"a\.safetensors' is damaged"):
        require_sums(tmp_path)
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(UserError, match=r"a\.safetensors', named in .*, cannot be read"):
        require_sums(tmp_path)


# --- One writer ---

HOLD = """
import sys, time
from diagnostics.support.locks import hold_folder
with hold_folder(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path/a/run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "a" / "run")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_told_which_one_writes(tmp_path, holder):
    from diagnostics.support.locks import hold_folder

    for path in (tmp_path / "a" / "run", tmp_path / "a" / "b" / ".." / "run"):
        with pytest.raises(UserError, match=rf"another process \(pid {holder.pid} on .*, since 20.*\) writes to"):
            hold_folder(path).__enter__()
    with hold_folder(tmp_path / "a" / "other"):
        pass


def test_the_lock_of_a_process_that_was_killed_is_none(tmp_path, holder):
    from diagnostics.support.locks import hold_folder

    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert list((tmp_path / "a").iterdir())  # its file is still there
    with hold_folder(tmp_path / "a" / "run"):
        pass
    assert not list((tmp_path / "a").iterdir())


def test_a_lock_leaves_nothing_behind(tmp_path):
    from diagnostics.support.locks import hold_folder

    with hold_folder(tmp_path / "x" / "y" / "run"), hold_folder(tmp_path / "x" / "y" / "run"):
        assert (tmp_path / "x" / "y").is_dir()
    assert not list(tmp_path.iterdir())
    with hold_folder(tmp_path / "x" / "y" / "run"):
        (tmp_path / "x" / "y" / "run").mkdir()
    assert [p.name for p in (tmp_path / "x" / "y").iterdir()] == ["run"]


def test_another_thread_is_refused(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    from diagnostics.support.locks import hold_folder

    refused = pytest.raises(UserError, match="another thread")
    with ThreadPoolExecutor(1) as pool, hold_folder(tmp_path / "run"), refused:
        pool.submit(lambda: hold_folder(tmp_path / "run").__enter__()).result()
    started = time.monotonic()
    with hold_folder(tmp_path / "run"):
        assert time.monotonic() - started < 5


def test_where_nothing_can_be_locked_the_work_goes_on(tmp_path):
    from diagnostics.support.locks import hold_folder

    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "run", tmp_path / ("x" * 300) / "run", Path("/proc/nothing/run")):
        with hold_folder(path):
            pass
