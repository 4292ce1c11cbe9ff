"""The KV cache of the policies: cropped, stored and read, copied, grown, its rows chosen, and refused where misused."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from diagnostics import (
    FullPolicy,
    PolicyCache,
    ProjectedPolicy,
    SpeedPolicy,
    UserError,
    decode,
    load_cache,
    prefill,
    save_cache,
)
from diagnostics.policies import store
from tests.support.examples import mostly_slow
from tests.support.policy_cases import (
    FASTKV,
    ROWS,
    SLIDING,
    assert_close,
    each,
    left_padded,
    letters_of,
    load,
    masked_pass,
    served,
    tokens,
)
from tests.support.tiny import FAMILIES, SLIDING_WINDOW, random_ids, tiny_model

N = 40
CASES = served(["llama", "mistral", "gpt_oss"])
CHUNKED = [(family, policy) for family, policy in CASES if policy.chunked]
ON_SLIDING = [FullPolicy(), SpeedPolicy(2), SpeedPolicy(2, 0), ProjectedPolicy(2)]

pytestmark = pytest.mark.usefixtures("one_thread")
one_or_padded = pytest.mark.parametrize("padded", [False, True], ids=["one", "padded"])


def filled(family, policy, padded=False, reserve=None):
    """A cache after a prompt, of one row or of four padded ones."""
    ids, mask = left_padded(ROWS) if padded else (tokens(N), None)
    cache = PolicyCache(policy, load(family).anatomy)
    if reserve is not None:
        cache.reserve(reserve)
    return prefill(load(family), ids, mask, cache=cache)[1]


def words(n, seed, cache):
    """New tokens for every row of a cache."""
    return torch.cat([tokens(n, seed + row) for row in range(cache.batch)])


def state(cache):
    """All that a cache says of itself."""
    layers = [cache.columns(layer) for layer in range(len(cache.layers))]
    pieces = [[(p.start, p.stop, None if p.columns is None else p.columns.tolist()) for p in held] for held in layers]
    return cache.n_columns, cache.kv_bytes, pieces


# --- Cropping ---


@one_or_padded
@each(CASES)
def test_what_was_cropped_was_never_there(family, policy, padded):
    lm, cache = load(family), filled(family, policy, padded)
    first, second = words(6, 10, cache), words(6, 20, cache)
    for kept in (0, 4):
        never = cache.copy()
        decode(lm, first, cache)
        cache.crop(kept - 6)
        if kept:
            decode(lm, first[:, :kept], never)
        assert state(cache) == state(never)
        assert_close(decode(lm, second, cache), decode(lm, second, never))
        cache.crop(-6 - kept)


@each([*CHUNKED, ("mistral", SpeedPolicy(2, 0))])
def test_crop_into_the_prompt_and_go_on_with_another(family, policy):
    """The first token of the other prompt is no answer, and no decode phase."""
    lm, cache, prompt, new = load(family), filled(family, policy), random_ids(N), random_ids(10, 5)
    decode(lm, tokens(20, 1), cache)
    cache.crop(-30)
    logits, _ = prefill(lm, torch.tensor([new]), cache=cache)
    assert_close(logits, masked_pass(family, policy, prompt[:30] + new, letters_of(policy, (N, 0)))[-1:])


@each([case for case in CHUNKED if case[1].boundary == 1])
def test_crop_into_the_prompt_of_a_later_turn(family, policy):
    lm, cache, second, new = load(family), filled(family, policy), random_ids(12, 2), random_ids(5, 3)
    decode(lm, tokens(3, 1), cache)
    prefill(lm, torch.tensor([second]), cache=cache)
    cache.crop(-9)
    ids = random_ids(N) + random_ids(3, 1) + second[:3] + new
    letters = [*letters_of(policy, (N, 3)), *"dpp", *"ddddd"]  # the turn's first token ends the answer
    assert_close(decode(lm, torch.tensor([new]), cache)[0], masked_pass(family, policy, ids, letters)[-5:])


@each([case for case in CHUNKED if case[1].boundary == 1])
def test_crop_into_an_answer_and_go_on_with_another_turn(family, policy):
    """The turn's first token ends the answer and is decode phase; no further one is, nor is the turn after it."""
    lm, cache, second, third = load(family), filled(family, policy), random_ids(8, 2), random_ids(6, 3)
    decode(lm, tokens(20, 1), cache)
    cache.crop(-8)
    prefill(lm, torch.tensor([second]), cache=cache, more=True)  # as many tokens as were dropped
    logits, _ = prefill(lm, torch.tensor([third]), cache=cache)
    ids = random_ids(N) + random_ids(20, 1)[:12] + second + third
    letters = [*letters_of(policy, (N, 12)), *"dppppppp", *"pppppd"]
    assert_close(logits, masked_pass(family, policy, ids, letters)[-1:])


@each(CHUNKED)
def test_crop_of_everything_leaves_an_empty_cache(family, policy):
    cache = filled(family, policy, padded=True)
    decode(load(family), words(20, 1, cache), cache)
    cache.crop(-cache.n_columns)
    assert (cache.n_columns, cache.kv_bytes) == (0, 0)
    wanted, fresh = prefill(load(family), tokens(30, 7), policy=policy)
    assert_close(prefill(load(family), tokens(30, 7), cache=cache)[0], wanted)
    assert_close(decode(load(family), tokens(9), cache), decode(load(family), tokens(9), fresh))


def test_crop_after_rows_were_dropped():
    """The anchor of the short row comes in the second chunk, where the other row has an unused slot."""
    lm, policy = load("llama"), SpeedPolicy(2, 1, 4)
    ids, mask = left_padded([ROWS[0], ROWS[2]])
    _, cache = prefill(lm, ids, mask, policy=policy, chunk_size=30)
    _, alone = prefill(lm, ids[:1], policy=policy)
    cache.batch_select_indices(torch.tensor([0]))
    for some in (cache, alone):
        some.crop(-2)
    assert_close(decode(lm, tokens(5), cache), decode(lm, tokens(5), alone))


@pytest.mark.parametrize("removed", [-N - 7, 1, -7])
def test_crops_that_are_refused_change_nothing(removed):
    """FastKV chose among the whole prompt, and cannot go back into it."""
    lm, cache = load("llama"), filled("llama", FASTKV)
    decode(lm, tokens(6, 1), cache)
    before, untouched = state(cache), cache.copy()
    with pytest.raises(UserError, match="cannot crop into the prompt" if removed == -7 else "cannot crop by"):
        cache.crop(removed)
    cache.crop(0)
    assert state(cache) == before
    assert torch.equal(decode(lm, tokens(4), cache), decode(lm, tokens(4), untouched))


def decoded_beyond_its_room(family, policy, record=False):
    """A cache of 50 tokens that grew after 43 of them, and so forgot what the next one did not see."""
    cache = filled(family, policy, reserve=4)
    if record:
        cache.activate_past_recording()
    for seed, n in enumerate((3, 3, 4)):
        decode(load(family), tokens(n, seed), cache)
    return cache


@each([(family, policy) for family in ("mistral", "gpt_oss") for policy in ON_SLIDING])
def test_forgotten_tokens_cannot_be_uncovered_unless_recorded(family, policy):
    lm = load(family)
    cache, recorded = (decoded_beyond_its_room(family, policy, record) for record in (False, True))
    before = state(cache)
    with pytest.raises(UserError, match="a sliding layer has forgotten"):
        cache.crop(-8)
    assert state(cache) == before
    assert_close(decode(lm, tokens(4), cache), decode(lm, tokens(4), recorded.copy()))
    recorded.crop(-10)
    assert_close(decode(lm, tokens(9), recorded), decode(lm, tokens(9), filled(family, policy)))


@pytest.mark.parametrize("policy", ON_SLIDING, ids=str)
def test_crops_are_refused_only_where_something_is_lost(policy):
    """No layer forgot what column 43 sees: all can go back to 43 tokens."""
    cache, never, lm = decoded_beyond_its_room("mistral", policy), filled("mistral", policy), load("mistral")
    assert cache.layers[0].forgotten == 43 - SLIDING_WINDOW + 1
    cache.crop(-7)
    decode(lm, tokens(3), never)
    assert_close(decode(lm, tokens(9), cache), decode(lm, tokens(9), never))


def test_a_refused_crop_leaves_layers_before_the_sliding_ones_alone(monkeypatch):
    kind, settings = FAMILIES["gemma2"]
    monkeypatch.setitem(FAMILIES, "gemma2", (kind, settings | {"layer_types": settings["layer_types"][::-1]}))
    lm = tiny_model("gemma2")
    cache = PolicyCache(FullPolicy(), lm.anatomy)
    cache.reserve(4)
    prefill(lm, tokens(30), cache=cache)
    for seed in (1, 2):
        decode(lm, tokens(10, seed), cache)
    before = state(cache)
    with pytest.raises(UserError, match="a sliding layer has forgotten"):
        cache.crop(-20)
    assert state(cache) == before


# --- Saving and loading ---


@each([case for case in CASES if case[0] != "llama"])
def test_a_loaded_cache_goes_on_bit_by_bit(family, policy, tmp_path):
    lm, cache = load(family), filled(family, policy, padded=True)
    decode(lm, words(3, 1, cache), cache)
    save_cache(cache, tmp_path / "a.safetensors", lm)
    loaded = load_cache(tmp_path / "a.safetensors", lm.model)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert (loaded.policy, state(loaded)) == (policy, state(cache))
    more = words(5, 30, cache)
    for step in (decode, lambda *args: prefill(args[0], args[1], cache=args[2])[0], decode):
        assert torch.equal(step(lm, more, loaded), step(lm, more, cache))


@each([case for case in CHUNKED if case[0] == "llama"])
def test_a_document_is_asked_after_copying_loading_and_cropping(family, policy, tmp_path):
    lm, question = load(family), tokens(8, 3)
    _, cache = prefill(lm, tokens(N), policy=policy, more=True)
    save_cache(cache, tmp_path / "a", lm)
    wanted, _ = prefill(lm, question, cache=cache.copy())
    assert torch.equal(prefill(lm, question, cache=load_cache(tmp_path / "a", lm))[0], wanted)
    prefill(lm, tokens(9, 4), cache=cache)
    cache.crop(-9)
    assert_close(prefill(lm, question, cache=cache)[0], wanted)


@each([case for case in CHUNKED if case[1].boundary == 1])
def test_the_turn_after_a_loaded_answer(family, policy, tmp_path):
    """Its first token ends the answer and is decode phase, in a saved cache as in one that was kept."""
    lm, cache = load(family), filled(family, policy)
    decode(lm, tokens(4, 1), cache)
    save_cache(cache, tmp_path / "a", lm)
    for step in (cache, loaded := load_cache(tmp_path / "a", lm)):
        prefill(lm, tokens(9, 2), cache=step, more=True)
    assert state(loaded) == state(cache)


@pytest.mark.parametrize("policy", ON_SLIDING, ids=str)
def test_a_loaded_cache_can_be_cropped_as_far_as_it_holds_tokens(policy, tmp_path):
    lm, cache = load("mistral"), filled("mistral", policy)
    save_cache(cache, tmp_path / "a", lm)
    loaded = load_cache(tmp_path / "a", lm)
    for some in (cache, loaded):
        decode(lm, tokens(6, 1), some)
        some.crop(-6)
    assert_close(decode(lm, tokens(6), loaded), decode(lm, tokens(6), cache))
    with pytest.raises(UserError, match="a sliding layer has forgotten"):
        loaded.crop(-7)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_cache(filled("llama", SpeedPolicy(2), padded=True), path, load("llama"))
    return path


def refused(path, message, lm=None):
    with pytest.raises(UserError, match=message) as caught:
        load_cache(path, lm or load("llama"))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_caches_are_refused(tmp_path):
    refused(tmp_path / "nothing", "cannot read")
    refused(tmp_path, "cannot read|not a KV cache")
    (tmp_path / "empty").touch()
    (tmp_path / "zeros").write_bytes(bytes(999))
    save_file({"keys.0": torch.ones(2)}, tmp_path / "foreign")
    save_file({"keys.0": torch.ones(2)}, tmp_path / "no_json", metadata={store.HEADER: "{"})
    save_file({"keys.0": torch.ones(2)}, tmp_path / "list", metadata={store.HEADER: "[]"})
    for name in ("empty", "zeros", "foreign", "no_json", "list"):
        refused(tmp_path / name, "is not a KV cache")


def test_damaged_files_and_other_types_are_refused(file):
    refused(file, "by another model", tiny_model("llama", dtype=torch.bfloat16))
    data = file.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    for size in (4, 8, 100, start, start + 1, len(data) - 1):
        file.write_bytes(data[:size])
        refused(file, "not a KV cache, or a damaged one")


@pytest.mark.parametrize(
    "change",
    [
        *(lambda _, header, key=key: header.pop(key) for key in ("format", "policy", "model", "n_prompt", "batch")),
        lambda table, _: table.update({"k": table.pop("keys.2")}),
        lambda table, _: table.update({"c": table.pop("columns.3.0")}),
        lambda _, header: header["layers"].pop(),
        lambda _, header: header["layers"].append(header["layers"][0]),
        lambda _, header: header.update(layers=3),
        lambda _, header: header.update(model="x"),
        lambda _, header: header.update(policy="nothing:3"),
    ],
)
def test_headers_that_do_not_fit_are_refused(file, change):
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    table = json.loads(data[8 : 8 + size])
    header = json.loads(table["__metadata__"][store.HEADER])
    change(table, header)
    table["__metadata__"][store.HEADER] = json.dumps(header)
    text = json.dumps(table).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    refused(file, "is not a KV cache|policy 'nothing'")


def full_disk(_, path, metadata):
    path.write_text("half")
    raise OSError("No space left on device")


@pytest.mark.parametrize("name", ["folder", "missing/file", "n" * 300, "/", "old"])
def test_places_that_cannot_be_written(name, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "old").write_text("old")
    if name == "old":
        monkeypatch.setattr(store, "save_file", full_disk)
    with pytest.raises(UserError, match="cannot write"):
        save_cache(filled("llama", SpeedPolicy(2)), tmp_path / name, load("llama"))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "old"]
    assert (tmp_path / "old").read_text() == "old"


# --- Rows, copies, growth ---


@each([case for case in CASES if case[0] != "gpt_oss"])
def test_rows_of_a_batch(family, policy):
    lm, full = load(family), filled(family, policy, padded=True)
    answer = words(3, 1, full)
    decode(lm, answer, full)
    for choose, rows in (
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2, 3, 3]),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 3, 0])), [1, 1, 3, 0]),
    ):
        cache = full.copy()
        choose(cache)
        new = words(5, 9, cache)
        together = decode(lm, new, cache)
        for at, row in enumerate(rows):
            _, alone = prefill(lm, torch.tensor([ROWS[row]]), policy=policy)
            decode(lm, answer[row : row + 1], alone)
            assert_close(together[at : at + 1], decode(lm, new[at : at + 1], alone))


@each(
    mostly_slow(
        [case for case in CASES if case[0] != "gpt_oss"],
        ("llama", SpeedPolicy(3, 3, 4)),
        ("llama", FASTKV),
        ("mistral", SpeedPolicy(2)),
    )
)
def test_growth_changes_nothing(family, policy):
    lm, ids = load(family), tokens(120, 4)
    small, large = filled(family, policy, reserve=1), filled(family, policy, reserve=130)
    storage = large.allocated_bytes
    wanted = decode(lm, ids, large)
    assert large.allocated_bytes == storage >= large.kv_bytes
    grown, sizes = [], set()
    for token in ids[0]:
        grown.append(decode(lm, token.view(1, 1), small))
        sizes.add(small.allocated_bytes)
        assert small.allocated_bytes >= small.kv_bytes
    assert_close(torch.cat(grown, dim=1), wanted)
    assert len(sizes) > 5 or family in SLIDING
    assert small.kv_bytes == large.kv_bytes
    if family in SLIDING:  # forgets what no token sees any more
        assert small.allocated_bytes < 2 * small.kv_bytes


# --- Misuse ---


def test_tokens_that_do_not_fit_a_cache_are_refused(monkeypatch):
    lm, cache = load("llama"), filled("llama", SpeedPolicy(2))
    untouched = cache.copy()
    for run in (decode, lambda lm, ids, cache: prefill(lm, ids, cache=cache)):
        with pytest.raises(UserError, match="holds 1 rows, the input 2"):
            run(lm, tokens(3).expand(2, -1), cache)
        with pytest.raises(UserError, match="no tokens"):
            run(lm, tokens(3)[:, :0], cache)
    with pytest.raises(UserError, match="was made under"):
        prefill(lm, tokens(3), policy=FASTKV, cache=cache)
    kind, settings = FAMILIES["llama"]
    monkeypatch.setitem(FAMILIES, "llama", (kind, settings | {"num_hidden_layers": 4}))
    with pytest.raises(UserError, match="has 5 layers, the model 4"):
        decode(tiny_model("llama"), tokens(3), cache)
    assert torch.equal(decode(lm, tokens(3), cache), decode(lm, tokens(3), untouched))


@each([case for case in CASES if case[0] == "llama"])
def test_an_interrupted_cache_is_refused(family, policy, tmp_path):
    lm, cache = load(family), filled(family, policy)
    handle = lm.anatomy.layers[3].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        decode(lm, tokens(2), cache)
    handle.remove()
    for run in (
        lambda: decode(lm, tokens(3), cache.copy()),
        lambda: prefill(lm, tokens(3), cache=cache),
        lambda: save_cache(cache, tmp_path / "a", lm),
    ):
        with pytest.raises(UserError, match="interrupted"):
            run()
    cache.reset()
    wanted, _ = prefill(lm, tokens(9), policy=policy)
    assert torch.equal(prefill(lm, tokens(9), cache=cache)[0], wanted)
