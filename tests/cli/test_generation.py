"""``generate`` as a user meets it: texts, token ids and figures beside the stock model's, and answers to bad input."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from diagnostics import FastKVPolicy, FullPolicy, ProjectedPolicy, SpeedPolicy, cli, load_model, parse_policy
from diagnostics.generation import generation as GENERATE
from diagnostics.generation.differences import differing
from diagnostics.generation.generation import Generation
from diagnostics.terminal.generation import show_comparison
from tests.support.policy_cases import reference_logits
from tests.support.policy_reference import SlowModel
from tests.support.runs import contents, run_command, save_tiny, write_prompts
from tests.support.tiny import N_LAYERS, random_ids, tiny_model, tiny_tokenizer
from tests.support.tokenizers import CHAT_TEMPLATE, byte_tokenizer

PROMPT_IDS = random_ids(30, seed=3)
PROMPT = " ".join(["<s>", *(f"w{i}" for i in PROMPT_IDS[1:])])
N, NEW = len(PROMPT_IDS), 12
POSITION_BYTES = 2 * 2 * 8 * 4  # keys and values, 2 KV heads of 8 numbers, float32
FASTKV = "fastkv:1:tsp_rate=0.5:retention_rate=0.4:window=4"
KEYS = {"model", "policy", "n_prompt", "token_ids", "text", "ttft_s", "tpot_s", "kv_bytes"}
# Marked text on a terminal: its colour and what is marked.
UNDERLINED = re.compile(r"\x1b\[4;(3[12])m([^\x1b]*)\x1b")
RED, GREEN = "31", "32"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with models, prompts and a run; no test may change anything in it."""
    root = tmp_path_factory.mktemp("world")
    w = SimpleNamespace(root=root, tiny=save_tiny(root / "tiny"), sliding=save_tiny(root / "sliding", "mistral"))
    lm = tiny_model("llama")
    lm.tokenizer.chat_template = CHAT_TEMPLATE
    w.chat = root / "chat"
    lm.model.save_pretrained(w.chat)
    lm.tokenizer.save_pretrained(w.chat)
    w.lm = load_model(w.tiny)
    w.stock = stock(w.lm, PROMPT_IDS)
    w.ending = shutil.copytree(w.tiny, root / "ending")
    settings = json.loads((w.ending / "generation_config.json").read_text())
    (w.ending / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": w.stock[4]}))

    def file(name, content):
        (root / name).write_bytes(content)
        return root / name

    w.prompt, w.empty = file("prompt.txt", f"{PROMPT}\n".encode()), file("empty.txt", b" \n")
    w.binary, w.long = file("binary.txt", b"w5 \xff\xfe"), file("long.txt", b"w5 " * 501)
    w.prompts = write_prompts(root / "prompts.jsonl", n_prompts=2)
    w.run = root / "run"
    asked = ("recommend", w.tiny, "--prompts", w.prompts, "--decode-tokens", 2, "--kv-budget", 0.7, "--out", w.run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["x", *map(str, asked)])
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert end.value.code == 0
    w.stable = file("stable.json", b'{"cutoff": 4, "anchors": 2, "stabilization_region": {"first": 2}}')
    w.unstable = file("unstable.json", b'{"cutoff": 4, "anchors": 1, "stabilization_region": null}')
    w.deep = file("deep.json", b'{"cutoff": 6, "anchors": 1}')
    w.words = file("words.json", b"w5 w6")
    return w


@pytest.fixture
def command(monkeypatch, capfd, tmp_path):
    """Run the command in this process, in an empty folder, on a wide terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    return lambda *arguments: run_command(monkeypatch, capfd, "generate", *arguments)


@pytest.fixture
def made(command, world):
    """Run the command with --json, on the tiny model and prompt if nothing else is said: its object."""

    def run(*options, model=world.tiny, prompt=PROMPT, new=NEW):
        status, out, err = command(model, "--prompt", prompt, "--max-new-tokens", new, "--json", *options)
        assert (status, err) == (0, "")
        return json.loads(out, parse_constant=pytest.fail)

    return run


@pytest.fixture
def clock(monkeypatch):
    """Give the times at which a generation begins, has its first token and ends, one generation after the other."""

    def run_by(*times):
        ticks = iter(times)
        monkeypatch.setattr(GENERATE, "_now", lambda _: next(ticks))

    return run_by


def stock(lm, ids, new=NEW):
    """What the stock model generates greedily."""
    ids = torch.tensor([ids])
    tokens = lm.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new)
    return tokens[0, ids.shape[1] :].tolist()


def words(ids):
    """The text of tokens; the first four are special and have none."""
    return " ".join(f"w{i}" for i in ids if i > 3)


# --- Where the prompt comes from ---


@pytest.mark.parametrize("way", ["text", "file", "stdin"])
def test_the_prompt_is_a_text_a_file_or_standard_input(world, made, monkeypatch, way):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(world.prompt.read_bytes())))
    data = made(prompt={"text": PROMPT, "file": f"@{world.prompt}", "stdin": "@-"}[way])
    assert (data["n_prompt"], data["token_ids"]) == (N, world.stock)


def test_a_file_in_the_home_folder(world, made, monkeypatch):
    monkeypatch.setenv("HOME", str(world.root))
    assert made(prompt="@~/prompt.txt")["token_ids"] == world.stock


def test_a_text_may_hold_any_mark(made):
    assert made(prompt="w5 {document} [bold] @w6", new=2)["n_prompt"] == 4


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ((), ["user"]),
        (("--chat",), ["user"]),
        (("--system", "w9 w10"), ["system", "user"]),
        (("--text",), None),
    ],
    ids=str,
)
def test_chat_template_or_plain_text(world, made, options, messages):
    text = "w5 w6 w7"
    content = {"system": "w9 w10", "user": text}
    tokenizer = tiny_tokenizer()
    if messages is not None:
        text = "<s>" + "".join(f"[{role}] {content[role]} " for role in messages) + "[assistant] "
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    data = made(*options, model=world.chat, prompt=content["user"])
    assert len(ids) == {1: 6, 2: 9, None: 3}[messages and len(messages)]
    assert (data["n_prompt"], data["token_ids"]) == (len(ids), stock(world.lm, ids))


def test_without_a_template_the_prompt_is_plain_text(world, made):
    assert made("--text")["token_ids"] == made()["token_ids"] == world.stock


# --- What is generated ---


def test_full_depth_by_default_equals_the_stock_model(world, made, clock):
    clock(10.0, 10.5, 12.7)
    assert made() == {
        "model": str(world.tiny),
        "policy": "full",
        "n_prompt": N,
        "token_ids": world.stock,
        "text": words(world.stock),
        "ttft_s": 0.5,
        "tpot_s": pytest.approx(2.2 / (NEW - 1)),
        "kv_bytes": POSITION_BYTES * N_LAYERS * (N + NEW - 1),
    }


# The positions of the prompt that each of the five layers holds.
HELD = {
    "full": [N] * 5,
    "speed:3": [N] * 3 + [2] * 2,
    "speed:3:anchors=4:boundary=2": [N] * 3 + [6] * 2,
    "speed:5": [N] * 5,
    "projected:2": [N] * 5,
    FASTKV: [12] * 5,  # 0.4 of 30
}


@pytest.mark.parametrize("spec", HELD)
def test_policies_by_their_text(world, made, spec):
    data, policy = made("--policy", spec), parse_policy(spec)
    expected = reference_logits(SlowModel(world.lm), policy, [*PROMPT_IDS, *data["token_ids"][:-1]], n_prompt=N)
    assert set(data) == KEYS
    assert (data["policy"], data["n_prompt"]) == (spec, N)
    assert data["token_ids"] == expected.argmax(-1).tolist()
    assert data["text"] == words(data["token_ids"])
    assert data["kv_bytes"] == POSITION_BYTES * sum(held + NEW - 1 for held in HELD[spec])


def test_the_policies_differ(made):
    """Or the tests of this file could not fail."""
    specs = [spec for spec in HELD if spec != "speed:5"]
    assert len({tuple(made("--policy", spec)["token_ids"]) for spec in specs}) == len(specs)


@pytest.mark.parametrize(
    ("options", "policy"),
    [
        (("--cutoff", 3), SpeedPolicy(3)),
        (("--cutoff", 3, "--policy", "speed"), SpeedPolicy(3)),
        (("--cutoff", 3, "--policy", "speed:4:anchors=0"), SpeedPolicy(3, anchors=0)),
        (("--cutoff", 3, "--policy", "projected"), ProjectedPolicy(3)),
        (("--recommendation", "run"), SpeedPolicy(3)),
        (("--recommendation", "run/recommendation.json"), SpeedPolicy(3)),
        (("--recommendation", "stable.json"), SpeedPolicy(4, anchors=2)),
        (("--recommendation", "run", "--policy", "projected"), ProjectedPolicy(3)),
        (("--recommendation", "stable.json", "--policy", "fastkv"), FastKVPolicy(tsp_layer=2)),
    ],
    ids=str,
)
def test_where_the_cutoff_comes_from(world, made, monkeypatch, options, policy):
    monkeypatch.chdir(world.root)
    asked = made(*options)
    assert parse_policy(asked["policy"]) == policy
    assert asked["token_ids"] == made("--policy", policy.spec)["token_ids"]


def test_cutoff_beside_other_parameters(made):
    """What `--policy speed:anchors=0` lacks, `--cutoff` gives."""
    assert made("--policy", "speed:anchors=0", "--cutoff", 3)["policy"] == "speed:3:anchors=0"


def test_generation_ends_where_the_model_ends_it(world, made):
    data, length = made(model=world.ending), world.stock.index(world.stock[4]) + 1
    assert data["token_ids"] == world.stock[:length]
    assert 1 < length < NEW
    assert data["kv_bytes"] == POSITION_BYTES * N_LAYERS * (N + length - 1)


def test_one_token_has_no_time_per_output_token(world, made, command):
    data = made(new=1)
    assert (data["token_ids"], data["tpot_s"]) == (world.stock[:1], None)
    _, _, err = command(world.tiny, "--prompt", PROMPT, "--max-new-tokens", 1)
    assert "TPOT" not in err
    assert "TTFT" in err


def test_chunks_and_types_of_numbers(world, made):
    for options in ((), ("--policy", "speed:3")):
        assert made(*options, "--chunk-size", 7)["token_ids"] == made(*options)["token_ids"]
    assert made("--dtype", "bfloat16")["kv_bytes"] == POSITION_BYTES // 2 * N_LAYERS * (N + NEW - 1)


def test_prompt_and_new_tokens_may_fill_the_positions(world, made):
    assert made(prompt=f"@{world.long}", new=11)["n_prompt"] == 501  # of 512


def test_a_sliding_window_model(world, made):
    lm = load_model(world.sliding)
    data = made(model=world.sliding)
    assert data["token_ids"] == stock(lm, PROMPT_IDS)
    assert data["kv_bytes"] == POSITION_BYTES * N_LAYERS * 8  # all but one of a window of 9


# --- Streaming ---


@pytest.mark.parametrize("spec", HELD)
@pytest.mark.parametrize("model", ["tiny", "chat"])
def test_the_streamed_text_is_the_generated_text(world, made, command, model, spec):
    folder = getattr(world, model)
    # A chat template writes the BoS token itself, and what it writes is refused in a message.
    prompt = PROMPT.removeprefix("<s> ") if model == "chat" else PROMPT
    text = made("--policy", spec, model=folder, prompt=prompt)["text"]
    status, out, _ = command(folder, "--prompt", prompt, "--max-new-tokens", NEW, "--policy", spec)
    assert (status, out) == (0, f"{text}\n")


def test_words_appear_while_the_model_goes_on(world, monkeypatch):
    screen, seen, decode = io.StringIO(), [], GENERATE.decode
    monkeypatch.setattr(GENERATE, "decode", lambda *arguments: (seen.append(screen.getvalue()), decode(*arguments))[1])
    arguments = ["generate", str(world.tiny), "--prompt", PROMPT, "--max-new-tokens", str(NEW)]
    monkeypatch.setattr(sys, "argv", ["x", *arguments])
    monkeypatch.setattr(sys, "stdout", screen)
    with pytest.raises(SystemExit):
        cli.main()
    text = screen.getvalue()
    assert len(seen) == NEW - 1
    assert all(text.startswith(part) for part in seen)
    # A word is shown when the next one has begun, since only then it is sure to be whole.
    assert [len(part.split()) for part in seen] == list(range(NEW - 1))


def test_the_summary_is_one_line_on_stderr(world, command, clock):
    clock(3.0, 3.25, 5.45)
    _, _, err = command(world.tiny, "--prompt", PROMPT, "--max-new-tokens", NEW, "--policy", "speed:3")
    kib = POSITION_BYTES * (3 * (N + NEW - 1) + 2 * (NEW + 1)) / 1024
    assert err == (f"[speed:3: {N} prompt tokens, {NEW} generated, TTFT 0.250 s, TPOT 200.0 ms, KV {kib:.0f} KiB]\n")


def test_standard_input_of_a_real_process(world, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "diagnostics.cli", "generate", world.tiny, "--prompt", "@-", "--max-new-tokens", "12"],
        input=world.prompt.read_bytes(),
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        timeout=120,
        check=False,
    )
    text = words(world.stock)
    assert (done.returncode, done.stdout.decode()) == (0, f"{text}\n")
    *signs, summary = done.stderr.decode().splitlines()
    assert signs == [f"loading {world.tiny}", f"Generating at most 12 tokens after {N} under full."]
    assert summary.startswith(f"[full: {N} prompt tokens, {NEW} generated, TTFT ")
    assert contents(tmp_path) == {}


# --- Drawing ---


def draw(lm, ids, temperature, top_p, seed):
    """Draw tokens from the stock model's distribution, computed anew at each step."""
    generator, tokens = torch.Generator().manual_seed(seed), list(ids)
    for _ in range(NEW):
        with torch.no_grad():
            p = (lm.model(torch.tensor([tokens])).logits[0, -1] / temperature).softmax(-1)
        order = p.argsort(descending=True)
        before = p[order].cumsum(0) - p[order]  # what is likelier than each
        p[order[before >= top_p]] = 0
        tokens.append(int(torch.multinomial(p / p.sum(), 1, generator=generator)))
    return tokens[len(ids) :]


@pytest.mark.parametrize(("temperature", "top_p", "seed"), [(1.0, 1.0, 0), (0.7, 1.0, 5), (1.5, 0.6, 0), (1.5, 0.6, 1)])
def test_drawing_is_from_the_model_and_by_the_seed(world, made, temperature, top_p, seed):
    options = ("--temperature", temperature, "--top-p", top_p, "--seed", seed)
    expected = draw(world.lm, PROMPT_IDS, temperature, top_p, seed)
    assert made(*options)["token_ids"] == expected != world.stock


def test_drawing_under_a_policy(made):
    options = ("--policy", "speed:3", "--temperature", 1.2, "--seed")
    assert made(*options, 4)["token_ids"] == made(*options, 4)["token_ids"] != made(*options, 5)["token_ids"]
    greedy = made("--policy", "speed:3")["token_ids"]
    assert made(*options, 4, "--top-p", 1e-6)["token_ids"] == greedy != made(*options, 4)["token_ids"]


@pytest.mark.parametrize("temperature", [1e-3, 1e-40])
def test_a_temperature_next_to_nothing_takes_the_most_likely_token(world, made, temperature):
    assert made("--temperature", temperature)["token_ids"] == world.stock


def test_a_seed_alone_draws_nothing(world, made):
    assert made("--seed", 7, "--top-p", 0.5)["token_ids"] == world.stock


def test_temperature_may_be_a_whole_number(world):
    """In Python; on the command line it is always read as a float."""
    tokens = [
        GENERATE.generate(
            world.lm,
            torch.tensor([PROMPT_IDS]),
            max_new_tokens=NEW,
            temperature=temperature,
            generator=torch.Generator().manual_seed(0),
        ).token_ids.tolist()
        for temperature in (1.0, 1)
    ]
    assert tokens[0] == tokens[1]


# --- Side by side ---


def test_compare_shows_both_texts_and_figures(world, made, command, clock):
    full, speed = made(), made("--policy", "speed:3")
    same = next(i for i, (a, b) in enumerate(zip(full["token_ids"], speed["token_ids"], strict=True)) if a != b)
    # The warm-up; full depth: 2 s and 110 ms per token; SPEED: 1 s and 55 ms.
    clock(*(0, 1, 2), *(10, 12, 12 + 0.11 * (NEW - 1)), *(20, 21, 21 + 0.055 * (NEW - 1)))
    status, out, err = command(
        world.tiny, "--prompt", PROMPT, "--max-new-tokens", NEW, "--policy", "speed:3", "--compare"
    )
    assert (status, err) == (0, "")
    lines = [line.split() for line in out.replace("[", "").replace("]", "").splitlines()]
    assert ["full", "speed:3"] in lines
    assert [*full["text"].split(), *speed["text"].split()] in lines
    # Where there are no colours, what differs is in brackets.
    marked = differing(full["token_ids"], speed["token_ids"])
    texts = [words([token for token, differs in zip(data["token_ids"], marks, strict=True) if differs])
             for data, marks in zip((full, speed), marked, strict=True)]  # fmt: skip
    (shown,) = [line for line in out.splitlines() if line.split()[:1] == full["text"].split()[:1]]
    assert " ".join(re.findall(r"\[([^]]*)\]", shown)).split() == " ".join(texts).split()
    assert "[Tokens] that the other side lacks are marked." in out
    assert f"The first {same} tokens are the same (of {NEW} and {NEW})." in out
    assert f"{N} prompt tokens" in out
    sizes = [data["kv_bytes"] for data in (full, speed)]
    assert ["full", "2.000", "110.0", f"{sizes[0] / 1024:.0f}", "KiB"] in lines
    assert ["speed:3", "1.000", "55.0", f"{sizes[1] / 1024:.0f}", "KiB"] in lines
    assert ["ratio", "0.50", "0.50", f"{sizes[1] / sizes[0]:.2f}"] in lines


@pytest.mark.parametrize("drawing", [(), ("--temperature", 1.5, "--seed", 2)], ids=["greedy", "drawn"])
@pytest.mark.parametrize("policy", ["speed:5", "projected:5"])
def test_compare_with_what_equals_full_depth_finds_no_difference(world, command, monkeypatch, policy, drawing):
    monkeypatch.setenv("FORCE_COLOR", "1")
    arguments = (world.tiny, "--prompt", PROMPT, "--max-new-tokens", NEW, "--compare", *drawing)
    status, out, _ = command(*arguments, "--policy", policy)
    assert status == 0
    assert f"All {NEW} tokens are the same." in out.replace("\x1b[1m", "").replace("\x1b[0m", "")
    assert UNDERLINED.findall(out) == []
    _, out, _ = command(*arguments, "--policy", "speed:1")
    assert UNDERLINED.findall(out) != []


def test_compare_as_json(made):
    both = made("--policy", "speed:3", "--compare")
    assert list(both) == ["full", "speed"]
    for name, options in (("full", ()), ("speed", ("--policy", "speed:3"))):
        alone = made(*options)
        assert set(both[name]) == KEYS
        for key in KEYS - {"ttft_s", "tpot_s"}:
            assert both[name][key] == alone[key]


def test_compare_of_one_token_has_no_time_per_output_token(world, command):
    status, out, _ = command(world.tiny, "--prompt", PROMPT, "--max-new-tokens", 1, "--cutoff", 3, "--compare")
    assert status == 0
    assert "TTFT" in out
    assert "nan" not in out


def marked(tokenizer, left, right):
    """What show_comparison prints of two lists of tokens: its text, and the marked parts by colour."""
    generations = {
        name: Generation(torch.tensor([ids]), SimpleNamespace(policy=policy), 1.0, 1.0, 1)
        for name, ids, policy in (("full", left, FullPolicy()), ("speed", right, SpeedPolicy(3)))
    }
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system="standard", highlight=False)
    prompt = torch.tensor([PROMPT_IDS])
    show_comparison(SimpleNamespace(tokenizer=tokenizer), prompt, generations, SpeedPolicy(3), console)
    out = console.file.getvalue()
    return re.sub(r"\x1b\[[0-9;]*m", "", out), [(colour, text.strip()) for colour, text in UNDERLINED.findall(out)]


def test_tokens_that_the_other_side_lacks_are_marked():
    text, marks = marked(tiny_tokenizer(), [10, 11, 12, 13, 14], [10, 12, 13, 15, 14, 16])
    assert marks == [(RED, "w11"), (GREEN, "w15"), (GREEN, "w16")]
    assert "The first 1 tokens are the same (of 5 and 6)." in text


def test_a_text_that_goes_on_longer():
    text, marks = marked(tiny_tokenizer(), [10, 11], [10, 11, 12])
    assert marks == [(GREEN, "w12")]
    assert "The first 2 tokens are the same (of 2 and 3)." in text


@pytest.mark.parametrize(("left", "right"), [("é", "è"), ("é", "ĩ")], ids=["last byte differs", "first byte differs"])
def test_characters_of_several_tokens_are_shown_whole_and_marked(left, right):
    tokenizer = byte_tokenizer(bos=False)
    text, marks = marked(tokenizer, tokenizer(f"a{left}b")["input_ids"], tokenizer(f"a{right}b")["input_ids"])
    assert f"a{left}b" in text
    assert f"a{right}b" in text
    assert marks == [(RED, left), (GREEN, right)]


# --- The embedded model ---


def test_the_embedded_model_by_default(smollm, command, monkeypatch):
    """README's line, and the same as JSON; the model is not loaded anew each time."""
    monkeypatch.setattr("diagnostics.models.loading.load_model", lambda name, **_: smollm)
    question = "Write one sentence about the sea."
    arguments = ("--prompt", question, "--max-new-tokens", 16)
    status, out, err = command(*arguments, "--json")
    data = json.loads(out)
    chat = [{"role": "user", "content": question}]
    ids = smollm.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    expected = stock(smollm, ids, 16)
    assert (status, err) == (0, "")
    assert (data["policy"], data["n_prompt"], data["token_ids"]) == ("full", len(ids), expected)
    assert data["text"] == smollm.tokenizer.decode(expected, skip_special_tokens=True)
    assert data["kv_bytes"] == 30 * 2 * 3 * 64 * 4 * (len(ids) + len(expected) - 1)
    _, text, _ = command(*arguments, "--cutoff", 25, "--json")
    status, out, err = command(*arguments, "--cutoff", 25)
    assert (status, out) == (0, json.loads(text)["text"] + "\n")
    assert err.startswith(f"[speed:25: {len(ids)} prompt tokens, 16 generated, TTFT ")


def test_the_embedded_model_by_its_name(smollm, made):
    data = made("--text", model="smollm2-135m-instruct", prompt="The capital of France is", new=6)
    ids = smollm.tokenizer("The capital of France is")["input_ids"]
    assert data["token_ids"] == stock(smollm, ids, 6)
    assert "Paris" in data["text"]


# --- Bad input ---

GOOD = ("--prompt", PROMPT)


def case(*arguments, said, model="tiny"):
    return model, arguments, said


BAD_INPUT = {
    # the prompt
    "no prompt": case(said=["Missing option '--prompt'"]),
    "empty prompt": case("--prompt", "", said=["the prompt is empty"]),
    "blank prompt": case("--prompt", " \n\t", said=["the prompt is empty"]),
    "empty file": case("--prompt", "@{root}/empty.txt", said=["the prompt is empty"]),
    "missing file": case("--prompt", "@nowhere.txt", said=["cannot read the prompt 'nowhere.txt'", "No such file"]),
    "no file": case("--prompt", "@", said=["cannot read the prompt", "Is a directory"]),
    "a folder": case("--prompt", "@{root}", said=["cannot read the prompt", "Is a directory"]),
    "too long a name": case("--prompt", "@" + "x" * 300, said=["cannot read the prompt", "File name too long"]),
    "home of nobody": case("--prompt", "@~nosuchuser/x.txt", said=["cannot read the prompt '~nosuchuser/x.txt'"]),
    "binary file": case("--prompt", "@{root}/binary.txt", said=["binary.txt' is not UTF-8 text"]),
    "half a character": case("--prompt", "w5 \udcff", said=["is not UTF-8"]),
    "prompt beyond the positions": case(
        *("--prompt", "@{root}/long.txt", "--max-new-tokens", 13),
        said=["501 tokens", "13 new ones", "512 positions"],
    ),
    "prompt beyond the positions by default": case("--prompt", "@{root}/long.txt", said=["128 new ones", "512"]),
    "chat without a template": case(*GOOD, "--chat", said=["has no chat template: use --text"]),
    "system without a template": case(*GOOD, "--system", "w5", said=["--system needs a chat template"]),
    "system in plain text": case(
        *GOOD, "--text", "--system", "w5", model="chat", said=["--system needs a chat template"]
    ),
    "empty system message": case(*GOOD, "--system", "", model="chat", said=["system"]),
    # the policy
    "unknown policy": case(*GOOD, "--policy", "magic", said=["'magic' is not one of: fastkv, full, projected, speed"]),
    "no cutoff": case(*GOOD, "--policy", "speed", said=["needs a cutoff: write speed:CUTOFF"]),
    "unknown parameter": case(*GOOD, "--policy", "speed:3:depth=2", said=["has no 'depth'; it has: cutoff, anchors"]),
    "parameter a word": case(*GOOD, "--policy", "speed:3:anchors=few", said=["anchors", "must be a number", "'few'"]),
    "parameter out of range": case(*GOOD, "--policy", "speed:3:boundary=0", said=["boundary is 0: give 1 or more"]),
    "rate out of range": case(*GOOD, "--policy", "fastkv:tsp_rate=2", said=["tsp_rate is 2.0"]),
    "cutoff zero": case(*GOOD, "--cutoff", 0, said=["cutoff is 0: give 1 or more"]),
    "cutoff zero in the policy": case(*GOOD, "--policy", "speed:0", said=["cutoff is 0"]),
    "cutoff above the model": case(*GOOD, "--cutoff", 6, said=["speed:6 does not fit: the model has 5 layers"]),
    "policy above the model": case(*GOOD, "--policy", "projected:6", said=["projected:6", "has 5 layers"]),
    "TSP layer above the model": case(*GOOD, "--policy", "fastkv:5", said=["fastkv:5", "has 5 layers"]),
    "cutoff a word": case(*GOOD, "--cutoff", "half", said=["--cutoff"]),
    "cutoff of full": case(*GOOD, "--policy", "full", "--cutoff", 3, said=["--cutoff is for speed and projected"]),
    "cutoff of fastkv": case(*GOOD, "--policy", "fastkv", "--cutoff", 3, said=["--cutoff is for speed and projected"]),
    "anchors above the prompt": case(
        "--prompt", "w5 w6", "--policy", "speed:3:anchors=3", said=["2 tokens, fewer than the anchors"]
    ),
    "sliding layers": case(*GOOD, "--policy", "fastkv", model="sliding", said=["fastkv", "sliding-window"]),
    # the recommendation
    "missing recommendation": case(*GOOD, "--recommendation", "none.json", said=["no recommendation in 'none.json'"]),
    "folder without": case(*GOOD, "--recommendation", "{root}/tiny", said=["no recommendation in", "`recommend`"]),
    "not JSON": case(*GOOD, "--recommendation", "{root}/words.json", said=["words.json' is not a recommendation"]),
    "recommended beyond the model": case(*GOOD, "--recommendation", "{root}/deep.json", said=["speed:6 does not fit"]),
    "no stable region": case(
        *(*GOOD, "--recommendation", "{root}/unstable.json", "--policy", "fastkv"), said=["no stabilization region"]
    ),
    "recommendation for full": case(
        *(*GOOD, "--recommendation", "{root}/run", "--policy", "full"), said=["--recommendation sets", "not of 'full'"]
    ),
    "recommendation and cutoff": case(
        *(*GOOD, "--recommendation", "{root}/run", "--cutoff", 3), said=["--cutoff and --recommendation", "give one"]
    ),
    "recommendation and parameter": case(
        *(*GOOD, "--recommendation", "{root}/run", "--policy", "speed:4"), said=["--recommendation sets the layer"]
    ),
    "compare with nothing": case(*GOOD, "--compare", said=["--compare sets a policy beside full depth"]),
    "compare full with full": case(*GOOD, "--compare", "--policy", "full", said=["--compare sets a policy beside"]),
    # numbers
    "no new tokens": case(*GOOD, "--max-new-tokens", 0, said=["max new tokens is 0: give 1 or more"]),
    "negative new tokens": case(*GOOD, "--max-new-tokens", -3, said=["max new tokens is -3"]),
    "chunks of nothing": case(*GOOD, "--chunk-size", 0, said=["chunk size is 0: give 1 or more"]),
    "fastkv in chunks": case(*GOOD, "--policy", "fastkv", "--chunk-size", 4, said=["fastkv", "in several calls"]),
    "negative temperature": case(*GOOD, "--temperature", -1, said=["temperature is -1.0: give 0 or more"]),
    "temperature not a number": case(*GOOD, "--temperature", "nan", said=["temperature is nan"]),
    "nothing to draw from": case(*GOOD, "--top-p", 0, said=["top_p is 0.0"]),
    "more than all to draw from": case(*GOOD, "--top-p", 1.5, said=["top_p is 1.5"]),
    "negative seed": case(*GOOD, "--temperature", 1, "--seed", -1, said=["--seed"]),
    "seed of 65 bits": case(*GOOD, "--temperature", 1, "--seed", 2**64, said=["seed"]),
    # the model
    "missing model": case(*GOOD, model="/nowhere/model", said=["no model folder '/nowhere/model'"]),
    "a file as model": case(*GOOD, model="prompt", said=["neither a model folder nor a .gguf file"]),
    "unknown dtype": case(*GOOD, "--dtype", "int8", said=["dtype 'int8' is not one of"]),
    "unknown option": case(*GOOD, "--nonsense", said=["No such option", "--nonsense"]),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_and_writes_nothing(world, command, tmp_path, name):
    model, arguments, said = BAD_INPUT[name]
    arguments = [str(argument).replace("{root}", str(world.root)) for argument in arguments]
    before = contents(world.root)
    status, out, err = command(getattr(world, model, model), *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert err.endswith("\n")
    for part in said:
        assert part in err
    assert contents(tmp_path) == {}
    assert contents(world.root) == before


def test_a_system_message_may_hold_any_mark(world, made):
    """{document} is how the program joins prompt and template, not something the user has asked for."""
    assert made("--system", "w5 {document}", model=world.chat, prompt="w6", new=2)["n_prompt"] == 7


def test_standard_input_that_is_no_text(world, command, monkeypatch):
    for data, said in ((b"", "the prompt is empty"), (b"\xff\xfe", "the prompt '-' is not UTF-8 text")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert command(world.tiny, "--prompt", "@-") == (2, "", f"error: {said}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--prompt", " "),
        ("--prompt", "@nowhere.txt"),
        (*GOOD, "--policy", "magic"),
        (*GOOD, "--cutoff", 0),
        (*GOOD, "--recommendation", "nowhere.json"),
        (*GOOD, "--compare"),
    ],
    ids=str,
)
def test_what_needs_no_model_is_refused_before_it_is_loaded(world, command, monkeypatch, arguments):
    monkeypatch.setattr("diagnostics.models.loading.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    assert command(world.tiny, *arguments)[0] == 2


@pytest.mark.parametrize("options", [(), ("--compare", "--cutoff", 3)], ids=str)
def test_out_of_device_memory_is_one_line(world, command, monkeypatch, options):
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")

    monkeypatch.setattr(GENERATE, "prefill", exhausted)
    status, out, err = command(world.tiny, *GOOD, *options)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "out of device memory: give a --chunk-size" in err


def test_interrupt_while_text_streams(world, command, monkeypatch):
    decode, steps = GENERATE.decode, iter(range(4))

    def until_interrupted(*arguments):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return decode(*arguments)

    monkeypatch.setattr(GENERATE, "decode", until_interrupted)
    status, out, err = command(world.tiny, *GOOD)
    assert (status, err) == (130, "error: interrupted\n")
    assert out.split() == [f"w{i}" for i in world.stock[:4]]


def test_help_lists_the_options(command):
    status, out, _ = command("--help")
    assert status == 0
    options = (
        "--prompt --policy --cutoff --recommendation --max-new-tokens --chat --text --system --temperature --top-p"
    )
    for option in [*options.split(), "--seed", "--chunk-size", "--compare", "--device", "--dtype", "--json"]:
        assert option in out
