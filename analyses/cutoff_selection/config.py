"""The config of many models and prompt sets: read from TOML or YAML, every key checked."""

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from diagnostics import UserError, load_prompts
from diagnostics.cutoffs.criterion import Criterion
from diagnostics.cutoffs.goals import GOALS
from diagnostics.diagnosis.capture import BACKENDS, HOOKS
from diagnostics.diagnosis.probes.probe import LENS_POSITIONS
from diagnostics.models.devices import DTYPES
from diagnostics.models.embedded import EMBEDDED_MODEL
from diagnostics.prompts.encoding import DECODE_TOKENS
from diagnostics.prompts.load import MIN_CONTEXT_LENGTH
from diagnostics.support.defaults import MAX_KL

RUNS = "runs"
RATIOS = ("ttft", "tpot", "kv")
BEFORE_RATIOS = {
    **dict.fromkeys(("model", "prompts", "status"), "string"),
    **dict.fromkeys(("cutoff", "n_layers"), "Int64"),
    **dict.fromkeys(("depth_fraction", "kl", "kl_bound", "top1_agreement", "nll_increase"), "float64"),
    **dict.fromkeys(("selection_region", "stabilization_region"), "string"),
}
AFTER_RATIOS = {
    **dict.fromkeys(("n_prompts", "max_positions"), "Int64"),
    "seconds": "float64",
    **dict.fromkeys(("device", "dtype", "run_folder", "notes", "error"), "string"),
}


@dataclass(frozen=True)
class Key:
    """What the value of a key may be, in words and as types; numbers may have a range, texts a list of choices."""

    words: str
    kinds: tuple[type, ...]
    least: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()

    def check(self, where: str, value: Any) -> Any:
        """Return the value; raise UserError if it is not allowed. True is no number here, NaN is in no range."""
        good = type(value) in self.kinds and (not self.choices or value in self.choices)
        if good and self.least is not None:
            good = self.least <= value and (self.most is None or value <= self.most)
        if good and isinstance(value, str):
            good = value.isprintable() and bool(value.strip())
        if not good:
            raise UserError(f"{where} must be {self.words}, not {value!r:.60}")
        return value


def whole(least: int, most: int = 10**9) -> Key:
    return Key(f"a whole number from {least} to {most}", (int,), least, most)


def one_of(*choices: str) -> Key:
    return Key(f"one of {', '.join(choices)}", (str,), choices=choices)


TEXT, NUMBER = Key("text", (str,)), Key("a number", (int, float))
SWITCH, LIST, TABLE_KEY = Key("true or false", (bool,)), Key("a list", (list,)), Key("a table of keys", (dict,))
LOADING = {"device": TEXT, "dtype": one_of("auto", *DTYPES)}
MEASURING = {
    "decode_tokens": whole(1),
    "anchors": whole(0),
    "lens_positions": whole(1),
    "backend": one_of(*BACKENDS),
}
ASKING = {"max_prompts": whole(1), "context_length": whole(MIN_CONTEXT_LENGTH), "seed": whole(0)}
MODEL = {"name": TEXT, "label": TEXT, "revision": TEXT, "trust_remote_code": SWITCH, **LOADING, **MEASURING}
PROMPTS = {"source": TEXT, "label": TEXT, **ASKING}
GOAL = dict.fromkeys((*GOALS, "confidence"), NUMBER)
CONFIG = {
    **{"out": TEXT, "goal": TABLE_KEY, "lengths": LIST, "defaults": TABLE_KEY},
    **{"models": LIST, "prompts": LIST},
}
DEFAULTS: dict[str, Any] = {
    **{"device": "auto", "dtype": "auto", "revision": None, "trust_remote_code": False},
    **{"decode_tokens": DECODE_TOKENS, "anchors": 1, "lens_positions": LENS_POSITIONS, "backend": HOOKS},
    **{"max_prompts": None, "context_length": None, "seed": 0},
}


@dataclass(frozen=True)
class Plan:
    """A config that was checked; ``models`` have every key of MODEL, ``prompts`` a label, a seed and a PromptSet."""

    name: str
    out: Path
    goal: dict[str, float]
    lengths: list[int]
    models: list[dict[str, Any]]
    prompts: list[dict[str, Any]]

    @property
    def columns(self) -> dict[str, str]:
        """Name of every column of the table with its pandas type."""
        ratios = {f"{name}_ratio_{length}": "float64" for length in self.lengths for name in RATIOS}
        return BEFORE_RATIOS | ratios | AFTER_RATIOS


def read_config(path: Path, out: Path | None = None) -> Plan:
    """Read and check a config and its prompts; raise UserError, naming file and place, for what makes no sense."""
    config = _parse(path)
    try:
        _check(config, CONFIG, "the config")
        goal = _check(config.get("goal", {}), GOAL, "goal")
        Criterion(**goal)
        if not any(name in goal for name in GOALS):
            goal = goal | {"max_kl": MAX_KL}
        lengths = [whole(1).check("lengths: an entry", length) for length in config.get("lengths", [8192])]
        if not lengths:
            raise UserError("lengths is empty: leave it out for 8192")
        defaults = DEFAULTS | _check(config.get("defaults", {}), LOADING | MEASURING | ASKING, "defaults")
        models = [_model(entry, defaults, path.parent) for _, entry in _entries(config, "models", "name", MODEL)]
        prompts = [
            _prompts(entry, where, defaults, path.parent)
            for where, entry in _entries({"prompts": ["builtin"]} | config, "prompts", "source", PROMPTS)
        ]
    except (UserError, ValueError) as error:  # a number may be too long to be shown
        raise UserError(f"{path}: {error}") from None
    if out is None:
        out = path.parent / config["out"] if "out" in config else Path(RUNS) / path.stem
    return Plan(path.name, out, goal, list(dict.fromkeys(lengths)), models, prompts)


def _parse(path: Path) -> Any:
    if path.suffix.lower() not in (".toml", ".yaml", ".yml"):
        raise UserError(f"config {str(path)!r} must be a .toml, .yaml or .yml file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read config {str(path)!r}: {getattr(error, 'strerror', error)}") from None
    try:
        if path.suffix.lower() == ".toml":
            return tomllib.loads(text)
        _refuse_repeated_keys(yaml.compose(text, yaml.SafeLoader))
        return yaml.safe_load(text)
    except Exception as error:  # PyYAML lets through what the conversion of a value raises
        raise UserError(f"{path} is not valid: {error}") from None


def _refuse_repeated_keys(node: Any) -> None:
    """Raise UserError where a YAML table has a key twice, of which PyYAML would take the last."""
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f"key {key!r} is there twice")
    inside = node.value if isinstance(node, yaml.CollectionNode) else []
    for child in inside:
        for one in child if isinstance(child, tuple) else (child,):
            _refuse_repeated_keys(one)


def _check(table: Any, keys: dict[str, Key], where: str) -> dict[str, Any]:
    """Return a table whose keys and values are all allowed."""
    TABLE_KEY.check(where, table)
    for name, value in table.items():
        if name not in keys:
            raise UserError(f"{where}: unknown key {name!r:.60}; the keys are {', '.join(keys)}")
        keys[name].check(f"{where}: {name}", value)
    return table


def _entries(config: dict[str, Any], section: str, first: str, keys: dict[str, Key]) -> list[tuple[str, Any]]:
    """Every entry of a list as a table with a label, with where it stands; a text stands for its first key."""
    entries, labels = [], set()
    for number, entry in enumerate(config.get(section, []), start=1):
        where = f"{section}, entry {number}"
        entry = _check({first: entry} if isinstance(entry, str) else entry, keys, where)
        if first not in entry:
            raise UserError(f"{where}: {first!r} is missing")
        length = f" at {entry['context_length']}" if "context_length" in entry else ""
        entry = {"label": entry[first] + length} | entry
        if entry["label"] in labels:
            raise UserError(f"{where}: there is another {entry['label']!r}: give one of them a 'label' of its own")
        labels.add(entry["label"])
        entries.append((where, entry))
    if not entries:
        raise UserError(f"there are no {section}: give at least one")
    return entries


def _model(entry: dict[str, Any], defaults: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Every setting of a model; the name of a file or folder as an absolute path, the same from wherever it is said."""
    settings = {name: value for name, value in defaults.items() if name in MODEL} | entry
    given = os.path.expanduser(entry["name"])
    there = next((path for path in (folder / given, given) if os.path.exists(path)), None)
    if there is not None and entry["name"].lower() != EMBEDDED_MODEL:
        settings["name"] = os.path.abspath(there)
    return settings


def _prompts(entry: dict[str, Any], where: str, defaults: dict[str, Any], folder: Path) -> dict[str, Any]:
    asked = {name: entry.get(name, defaults[name]) for name in ASKING}
    source = entry["source"] if entry["source"] == "builtin" else str(folder / os.path.expanduser(entry["source"]))
    try:
        return {"label": entry["label"], "seed": asked["seed"], "set": load_prompts(source, **asked)}
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
