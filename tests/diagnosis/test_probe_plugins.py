"""Probes of other distributions, found through the entry point group ``speed_diagnostics.probes``."""

import sys

import pytest

from diagnostics import UserError, diagnose
from diagnostics.diagnosis.probes import all_probes
from diagnostics.diagnosis.probes.probe import Probe
from diagnostics.prompts.prompt import Prompt, PromptSet
from tests.support.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = PromptSet((Prompt("p", text="<s> w8 w9 w10", reference="w7 w8"),), "set")
BUILT_IN = tuple(all_probes())  # before any plugin is there
PROBE = """
import numpy as np
from diagnostics.diagnosis.probes.probe import Measured, Probe

class {name}(Probe):
    name = "layer_number"
    describes = {{{column!r}: "number of the layer"}}

    def measured(self):
        return Measured(layers={{{column!r}: np.arange(self.context.n_layers{more})}})
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a distribution with one entry point on the path; what its module defines is forgotten afterwards."""
    modules = []

    def installed(code, *, point="layer_number", module="other_probes"):
        folder = tmp_path / "other_probes-1.2.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: other-probes\nVersion: 1.2\n")
        (folder / "entry_points.txt").write_text(f"[speed_diagnostics.probes]\n{point} = {module}:Found\n")
        (tmp_path / f"{module}.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        modules.append(module)

    yield installed
    for module in modules:
        sys.modules.pop(module, None)
    for probe in Probe.__subclasses__():
        if probe.__module__ in modules:
            probe.name = ""


def test_a_probe_of_another_distribution_measures(install):
    install(PROBE.format(name="Found", column="layer_number", more=""))
    for _ in range(2):
        assert list(all_probes()) == sorted([*BUILT_IN, "layer_number"])
    run = diagnose(tiny_model("llama"), PROMPTS, decode_tokens=2)
    assert run.layers["layer_number"].tolist() == [0, 1, 2, 3, 4]
    assert run.manifest["columns"]["layer_number"] == "number of the layer"
    assert run.manifest["identity"]["added_probes"] == ["other_probes.Found"]


def test_a_run_is_continued_with_the_same_probes_alone(install, tmp_path):
    class Stop(Exception):
        pass

    def stop(done, total, prompt):
        if done == 1:
            raise Stop

    prompts = PromptSet((*PROMPTS, Prompt("q", text="<s> w4 w5", reference="w7 w8")), "set")
    with pytest.raises(Stop):
        diagnose(tiny_model("llama"), prompts, decode_tokens=2, out=tmp_path / "run", progress=stop)
    install(PROBE.format(name="Found", column="layer_number", more=""))
    with pytest.raises(UserError, match=r"added_probes is None, not other_probes.Found"):
        diagnose(tiny_model("llama"), prompts, decode_tokens=2, out=tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("code", "point", "reason"),
    [
        ("import no_such_library", "layer_number", "No module named 'no_such_library'"),
        ("Found = 3", "layer_number", "other_probes:Found is no subclass of"),
        (PROBE.format(name="Found", column="a", more=""), "mine", "its class has another name, 'layer_number'"),
        (PROBE.format(name="Found", column="kl", more=""), "layer_number", "'cutoff_sweep' writes the column 'kl'"),
        (PROBE.format(name="Other", column="a", more="").replace("layer_number", "drift")
         + "Found = Other", "drift", "another probe has this name"),
    ],
    ids=["import", "no probe", "name", "column", "name of another"],
)  # fmt: skip
def test_a_broken_plugin_is_named_in_one_line(install, code, point, reason):
    install(code, point=point)
    with pytest.raises(UserError, match=reason) as error:
        diagnose(tiny_model("llama"), PROMPTS, decode_tokens=2)
    assert str(error.value).startswith(f"the probe plugin {point!r} of other-probes 1.2 cannot be ")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=reason):  # nor does its class stay behind
        all_probes()


def test_columns_of_another_shape_are_refused(install):
    install(PROBE.format(name="Found", column="layer_number", more=" + 1"))
    with pytest.raises(UserError, match=r"probe 'layer_number': column 'layer_number' has shape \(6,\), not \(5,\)"):
        diagnose(tiny_model("llama"), PROMPTS, decode_tokens=2)


def test_columns_that_were_not_announced_do_not_replace_others(install):
    code = PROBE.format(name="Found", column="layer_number", more="").replace(
        "layers={'layer_number'", "layers={'drift_prompt'"
    )
    install(code)
    with pytest.raises(UserError, match="probe 'layer_number' writes the column 'drift_prompt', which another"):
        diagnose(tiny_model("llama"), PROMPTS, decode_tokens=2)


def test_a_class_of_this_process_is_a_probe_and_replaces_none():
    class Mine(Probe):
        name = "mine"

    try:
        assert all_probes()["mine"] is Mine
        Mine.name = "drift"
        with pytest.raises(UserError, match="Mine has the name of another probe, 'drift'"):
            all_probes()
    finally:
        Mine.name = ""
