import hashlib
import random
import re
import subprocess
import sys
from collections import Counter

import pytest

from diagnostics.prompts.builtin import CATEGORIES, PROMPTS_PER_CATEGORY
from diagnostics.prompts.encoding import encode_prompts
from diagnostics.prompts.load import load_prompts
from diagnostics.prompts.prompt import Prompt
from tests.support.paths import ROOT
from tests.support.tokenizers import smollm_tokenizer


def filled(prompt: Prompt, characters: int | None = None) -> str:
    messages = prompt.fill(prompt.document[:characters])
    assert not isinstance(messages, str)
    return messages[-1]["content"]


def of(category: str, **arguments) -> list[Prompt]:
    return [prompt for prompt in load_prompts("builtin", **arguments) if prompt.category == category]


def test_size_names_and_balance():
    prompts = load_prompts()
    assert (prompts.name, prompts.context_length, prompts.seed) == ("builtin", 1024, 0)
    assert len(prompts) >= 16
    assert len({prompt.id for prompt in prompts}) == len(prompts)
    assert Counter(p.category for p in prompts) == dict.fromkeys(CATEGORIES, PROMPTS_PER_CATEGORY)
    for n in range(1, len(prompts) + 1):
        counts = Counter(p.category for p in prompts[:n])
        assert max(counts.values()) - min(counts[category] for category in CATEGORIES) <= 1


def test_fewer_prompts_are_the_start_of_the_set():
    assert list(load_prompts(max_prompts=5)) == list(load_prompts()[:5])
    assert len(load_prompts(max_prompts=1000)) == len(load_prompts())


def test_the_seed_decides_everything_and_nothing_else_does():
    random.seed(1)
    state = random.getstate()
    first = load_prompts(context_length=128, seed=3)
    assert random.getstate() == state
    random.seed(2)
    assert load_prompts(context_length=128, seed=3).fingerprint == first.fingerprint
    other = load_prompts(context_length=128, seed=4)
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_another_process_makes_the_same_set():
    program = "from diagnostics.prompts.load import load_prompts; print(load_prompts(context_length=99).fingerprint)"
    output = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONHASHSEED": "7"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert output.stdout.strip() == load_prompts(context_length=99).fingerprint


def test_prompts_differ_from_each_other():
    prompts = load_prompts(context_length=512)
    digests = {hashlib.sha256(filled(prompt, 500).encode()).digest() for prompt in prompts}
    assert len(digests) == len(prompts)
    questions = [prompt.evidence for prompt in prompts if prompt.category == "question"]
    assert len(set(questions)) == len(questions)


@pytest.mark.parametrize("context_length", [64, 1000, 131_072])
def test_there_is_always_enough_text(context_length):
    for prompt in load_prompts(context_length=context_length, max_prompts=len(CATEGORIES)):
        assert 8 * context_length <= len(prompt.document) <= 10 * context_length + 200


@pytest.mark.parametrize("characters", [0, 400, 3000])
@pytest.mark.parametrize("seed", range(5))
def test_evidence_survives_every_cut(characters, seed):
    prompts = [prompt for prompt in load_prompts(context_length=512, seed=seed) if prompt.evidence]
    assert len(prompts) == 4 * PROMPTS_PER_CATEGORY
    for prompt in prompts:
        for text in prompt.evidence:
            assert filled(prompt, characters).count(text) == 1


# --- Each task asks what its text answers ---


@pytest.mark.parametrize("seed", range(5))
def test_needles_have_several_keys_and_one_answer(seed):
    for prompt in of("needle", seed=seed):
        text = filled(prompt)
        codes = dict(re.findall(r"The secret access code for (\w+) is (\d{6})\.", text))
        assert len(codes) == 4
        (asked,) = re.findall(r"what is the secret access code for (\w+)\?", text)
        assert prompt.evidence == (f"The secret access code for {asked} is {codes[asked]}.",)


def test_what_is_asked_for_stands_at_all_depths():
    for category in ("question", "needle", "code"):
        depths = []
        for prompt in of(category, context_length=8192):
            text = filled(prompt)
            depths.append(text.index(prompt.evidence[0]) / len(text))
        assert depths == pytest.approx([0.125, 0.375, 0.625, 0.875], abs=0.05)


@pytest.mark.parametrize("seed", range(5))
def test_variables_can_be_followed_in_order(seed):
    for prompt in of("variables", seed=seed):
        text = filled(prompt, 2000)
        values: dict[str, str] = {}
        for name, source in re.findall(r"The variable (\w+) is set to (?:the value of )?(\w+)\.", text):
            assert name not in values
            values[name] = source if source.isdigit() else values[source]
        assert len(values) == len(prompt.evidence) + 2
        (asked,) = re.findall(r"what is the value of (\w+)\?", text)
        assert values[asked] in prompt.evidence[0]
        assert f"The variable {asked} is" in prompt.evidence[-1]
        assert len(set(values.values())) == 2


@pytest.mark.parametrize("seed", range(5))
def test_code_runs_and_returns(seed):
    for prompt in of("code", seed=seed):
        (function,) = prompt.evidence
        (call,) = re.findall(r"what does (\w+\(\d+\)) return\?", filled(prompt))
        namespace: dict[str, object] = {}
        exec(function, namespace)
        assert eval(call, namespace) is not None


def test_arithmetic_is_right():
    for prompt in of("arithmetic"):
        shots = prompt.document.split("\n\n")
        assert len(shots) > 30
        for shot in shots:
            left, sign, right, result = re.fullmatch(
                r"Problem: [^\n]+\nAnswer: (\d+) ([-+*/]) (\d+) = (\d+)\. [^\n]+\.", shot
            ).groups()
            assert eval(f"{left} {sign} {right}") == int(result)
            assert left in shot.split("\n")[0]
            assert right in shot.split("\n")[0]


def test_the_reference_reads_as_running_text():
    text = of("summary", context_length=8192)[0].document
    assert not re.search(r"^[*=-]{3,}$|^\s*\+[-=]+\+", text, flags=re.MULTILINE)
    prose = [line for line in text.split("\n") if re.match(r"[A-Z][a-z]+ [a-z]+ ", line)]
    assert sum(len(line) > 80 for line in prose) > len(prose) / 2


# --- With a real tokenizer ---


@pytest.mark.parametrize("context_length", [256, 1024, 4096])
def test_all_fit_and_fill_the_context(context_length):
    prompts = load_prompts(context_length=context_length)
    for prompt, encoded in zip(prompts, encode_prompts(prompts, smollm_tokenizer()), strict=True):
        assert encoded.has_bos
        assert encoded.notes[0].startswith("document cut from")
        # Beside the tolerance, what the next problem, line or word would need is left over.
        rest = {"paragraph": 48, "line": 24, "word": 12}[prompt.cut] + context_length // 200
        assert context_length - rest <= encoded.n_prompt <= context_length
        decoded = "".join(smollm_tokenizer().decode(encoded.token_ids[a:b]) for a, b in encoded.evidence)
        assert all(text in decoded for text in prompt.evidence)
        last = filled(prompt).split("\n\n")[-1]
        assert last in encoded.text
