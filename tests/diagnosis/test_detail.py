"""What a run keeps of its first prompts token by token: texts, attention, logit lens; and runs of some prompts."""

import html
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diagnostics import UserError, diagnose, figures, load_prompts
from diagnostics.generation.differences import differing, marked_text, same_start
from diagnostics.prompts.token_text import token_texts
from diagnostics.runs.schema import DETAIL_TABLES
from tests.support.examples import examples
from tests.support.reference import Reference
from tests.support.runs import write_prompts
from tests.support.tiny import N_LAYERS, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    write_prompts(path, n_prompts=4, n_tokens=30)
    return load_prompts(str(path))


def run_of(family, prompts, **options):
    return diagnose(tiny_model(family), prompts, **{"decode_tokens": 6, "detail_prompts": 2} | options)


@pytest.fixture(scope="module")
def run(prompts):
    return run_of("llama", prompts)


def tokens_of(run, prompt_id):
    return run.tokens[run.tokens["prompt_id"] == prompt_id].reset_index(drop=True)


def test_only_the_first_prompts_are_kept_and_none_where_none_is_asked_for(run, prompts):
    assert list(run.tokens["prompt_id"].unique()) == list(run.lens["prompt_id"].unique()) == ["p0", "p1"]
    nothing = run_of("llama", prompts, detail_prompts=0)
    assert nothing.tokens.empty
    assert nothing.lens.empty
    assert nothing.head_tokens.empty
    for name in ("prompts", "layers", "heads", "cutoffs"):
        pd.testing.assert_frame_equal(nothing.tables[name], run.tables[name], check_exact=True)
    with pytest.raises(UserError, match="detail prompts is -1"):
        run_of("llama", prompts, detail_prompts=-1)


@pytest.mark.parametrize("anchors", [0, 1, 3])
def test_tokens_are_the_prompt_and_the_reference_in_their_segments(prompts, anchors):
    run = run_of("llama", prompts, anchors=anchors)
    row, tokens = run.prompts.iloc[0], tokens_of(run, "p0")
    n_prompt = row["n_prompt"]
    assert len(tokens) == n_prompt + row["n_decode"]
    assert list(tokens["position"]) == list(range(len(tokens)))
    assert "".join(tokens["text"][n_prompt:]).strip() == row["reference_text"].strip()
    expected = ["anchor"] * anchors + ["prompt"] * (n_prompt - 1 - anchors)
    assert list(tokens["segment"]) == expected + ["decode"] * (len(tokens) - len(expected))
    assert [a is not None for a in tokens["attention"]] == [s == "prompt" for s in tokens["segment"]]
    # The evidence are the words 10 to 12.
    assert list(np.flatnonzero(tokens["evidence"])) == [10, 11, 12]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_oss"])
def test_attention_and_lens_equal_the_models_own(prompts, family):
    """Against the weights that eager attention returns and the hidden states, through the model's norm and head."""
    lm = tiny_model(family)
    run = run_of(family, prompts)
    tokens = tokens_of(run, "p1")
    n_prompt, ids = run.prompts["n_prompt"][1], torch.tensor([list(tokens["token_id"])[:-1]])
    before = lm.model.config._attn_implementation
    lm.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            out = lm.model(ids, output_attentions=True, output_hidden_states=True)
    finally:
        lm.model.set_attn_implementation(before)
    inside = slice(1, n_prompt - 1)
    received = np.stack(tokens["attention"][inside])
    assert received.shape == (n_prompt - 2, N_LAYERS)
    for layer, weights in enumerate(out.attentions):
        np.testing.assert_allclose(
            received[:, layer], weights[0, :, n_prompt - 1 :, inside].mean((0, 1)).numpy(), atol=1e-5
        )
    mass = run.layers[run.layers["prompt_id"] == "p1"]["mass_prompt"]
    np.testing.assert_allclose(received.sum(0), mass, atol=1e-5)

    lens = run.lens[run.lens["prompt_id"] == "p1"]
    shown = lens.pivot(index="position", columns="layer", values=["lens_token", "lens_probability"])
    assert list(shown.index) == list(range(n_prompt - 1, ids.shape[1]))
    final = out.logits[0, n_prompt - 1 :].softmax(-1).max(-1)
    assert list(shown["lens_token"][N_LAYERS - 1]) == final.indices.tolist()
    np.testing.assert_allclose(shown["lens_probability"][N_LAYERS - 1].to_numpy(float), final.values, atol=1e-4)
    head = lm.model.get_output_embeddings()
    for layer in range(N_LAYERS - 1):
        with torch.no_grad():
            logits = head(lm.anatomy.final_norm(out.hidden_states[layer + 1][0, n_prompt - 1 :]))
        cap = lm.anatomy.logit_softcap
        p = (logits if cap is None else cap * torch.tanh(logits / cap)).softmax(-1).max(-1)
        assert list(shown["lens_token"][layer]) == p.indices.tolist()
        np.testing.assert_allclose(shown["lens_probability"][layer].to_numpy(float), p.values, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_oss"])
def test_selectivity_and_the_tokens_of_heads_equal_their_formulas(prompts, family):
    """In float64, from every attention matrix; ``gemma3`` slides over less than the prompt, so that zeros occur."""
    lm, run = tiny_model(family), run_of(family, prompts, decode_tokens=9)
    tokens, n_prompt = tokens_of(run, "p1"), run.prompts["n_prompt"][1]
    reference = Reference(
        lm.model, lm.anatomy.layers, lm.anatomy.attentions, list(tokens["token_id"])[:-1], n_prompt, 1
    )
    parts = np.stack(tokens["selectivity"][1 : n_prompt - 1])
    assert tokens["selectivity"].notna().sum() == len(parts) == n_prompt - 2
    top = run.head_tokens[run.head_tokens["prompt_id"] == "p1"].set_index(["layer", "head"])
    for layer in range(N_LAYERS):
        np.testing.assert_allclose(parts[:, layer], reference.token_selectivity(layer), atol=1e-6)
        for head, expected in enumerate(reference.head_attention(layer)):
            found = top.loc[[(layer, head)]]
            n = min(32, np.count_nonzero(expected))
            np.testing.assert_allclose(found["attention"], np.sort(expected)[::-1][:n], atol=1e-6)
            np.testing.assert_allclose(found["attention"], expected[found["position"] - 1], atol=1e-6)
            assert found["position"].is_unique


@pytest.mark.parametrize("anchors", [0, 1, 3])
def test_the_parts_of_tokens_add_up_to_the_selectivity_of_the_layer(prompts, anchors):
    run = run_of("llama", prompts, anchors=anchors)
    layers = run.layers.pivot(index="prompt_id", columns="layer", values="selectivity")
    for prompt_id in ("p0", "p1"):
        parts = np.stack(tokens_of(run, prompt_id)["selectivity"].dropna())
        assert (parts >= 0).all()
        np.testing.assert_allclose(parts.sum(0), layers.loc[prompt_id], rtol=1e-5)
        of_heads = run.head_tokens[run.head_tokens["prompt_id"] == prompt_id]
        assert of_heads["position"].between(anchors, anchors + len(parts) - 1).all()


@pytest.mark.parametrize("other", [{"backend": "transformer-lens"}, {"backend": "nnsight"}, {"remote": "local"}])
def test_backends_keep_the_same(run, prompts, other):
    model = tiny_model("llama")
    if "remote" in other:
        from nnsight import TransformersModel

        model = TransformersModel(model.model, tokenizer=model.tokenizer)
    other = diagnose(model, prompts, decode_tokens=6, detail_prompts=2, **other)
    per_layer = ["attention", "selectivity"]
    for name in per_layer:
        for ours, theirs in zip(run.tokens[name], other.tokens[name], strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                np.testing.assert_allclose(ours, theirs, atol=1e-5)
    pd.testing.assert_frame_equal(run.tokens.drop(columns=per_layer), other.tokens.drop(columns=per_layer))
    pd.testing.assert_frame_equal(run.lens, other.lens, atol=1e-4)
    pd.testing.assert_frame_equal(run.head_tokens, other.head_tokens, atol=1e-5)


@pytest.mark.parametrize("n_prompt", [1, 2, 3])
def test_prompts_of_hardly_any_token(tmp_path, n_prompt):
    path = tmp_path / "short.jsonl"
    path.write_text(json.dumps({"text": " ".join(["<s>", "w5", "w6"][:n_prompt])}) + "\n")
    run = run_of("llama", load_prompts(str(path)), out=tmp_path / "run")
    assert run.tokens["attention"].notna().sum() == run.tokens["selectivity"].notna().sum() == max(0, n_prompt - 2)
    assert len(run.head_tokens) == max(0, n_prompt - 2) * N_LAYERS * run.manifest["n_heads"]
    figures.logit_lens(run, "line-1").to_json()


def test_the_embedded_models_text_comes_back(smollm):
    run = diagnose(smollm, load_prompts("builtin", context_length=256, max_prompts=2), decode_tokens=6)
    tokens = tokens_of(run, run.prompts["prompt_id"][1])
    assert "".join(tokens["text"]) == smollm.tokenizer.decode(list(tokens["token_id"]))
    received = np.stack(tokens["attention"].dropna())
    rows = run.layers[run.layers["prompt_id"] == run.prompts["prompt_id"][1]]
    np.testing.assert_allclose(received.sum(0), rows["mass_prompt"], atol=1e-4)
    last = run.lens[run.lens["layer"] == 29].groupby("prompt_id")["lens_token"].agg(list)
    for prompt_id, said in last.items():  # greedy: what the last layer says is the next token
        row = run.prompts[run.prompts["prompt_id"] == prompt_id].iloc[0]
        assert said == list(tokens_of(run, prompt_id)["token_id"][row["n_prompt"] :])


@examples(60)
@given(text=st.text(alphabet=st.sampled_from("ab \n\té中文🙂👩‍👩‍👧\u200bß."), max_size=40), skip=st.booleans())
def test_texts_of_tokens_join_to_the_text(smollm, text, skip):
    ids = smollm.tokenizer("<|im_start|>" + text + "<|im_end|>")["input_ids"]
    pieces = token_texts(smollm.tokenizer, ids, skip_special_tokens=skip)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == smollm.tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert all("\ufffd" not in piece for piece in pieces)


@examples(60)
@given(st.lists(st.integers(4, 12), max_size=12), st.lists(st.integers(4, 12), max_size=12))
def test_differing_tokens(left, right):
    marks = differing(left, right)
    kept = [
        [t for t, m in zip(ids, mark, strict=True) if not m] for ids, mark in zip((left, right), marks, strict=True)
    ]
    assert kept[0] == kept[1]
    same = same_start(left, right)
    assert left[:same] == right[:same]
    assert left[same : same + 1] != right[same : same + 1] or same == len(left) == len(right)
    if left == right:
        assert not any(marks[0])
    tokenizer = tiny_tokenizer()
    assert "".join(text for text, _ in marked_text(tokenizer, left, marks[0])) == tokenizer.decode(left)


def test_a_run_of_some_prompts(run):
    some = run.select(["p3", "p1"])
    assert list(some.prompts["prompt_id"]) == ["p1", "p3"]
    for name, table in some.tables.items():
        assert set(table["prompt_id"]) == ({"p1"} if name in DETAIL_TABLES else {"p1", "p3"})
    np.testing.assert_array_equal(some.array("kl"), run.array("kl")[[1, 3]])
    with pytest.raises(UserError, match="none of these prompts"):
        run.select(["p9"])


def test_the_lens_figure_shows_tokens_and_marks_what_the_end_says(run):
    figure = figures.logit_lens(run, "p0", first=1, count=4)
    lens = run.lens[run.lens["prompt_id"] == "p0"].pivot(index="layer", columns="position", values="lens_text")
    shown = np.full((N_LAYERS, 4), "", dtype=object)
    for texts in figure.data[1:]:  # one per colour
        shown[np.asarray(texts.y), np.asarray(texts.x)] = texts.text
    assert all(cell.startswith("<b>") for cell in shown[-1])
    for layer in range(N_LAYERS):
        for column in range(4):
            cell = lens.iloc[layer, column + 1]
            visible = html.unescape(shown[layer][column].removeprefix("<b>").removesuffix("</b>"))
            assert visible == cell.replace(" ", "\u00b7")
    following = tokens_of(run, "p0")["text"][run.prompts["n_prompt"][0] + 1 :].iloc[:4]
    assert [label.replace("\u00b7", " ") for label in figure.layout.xaxis.ticktext] == list(following)
    with pytest.raises(UserError, match="keeps no tokens of prompt 'p3'"):
        figures.logit_lens(run, "p3")


def test_tokens_are_no_markup(run):
    tables = dict(run.tables) | {"lens": run.lens.assign(lens_text="<b onclick=x>&\n")}
    figure = figures.logit_lens(replace(run, tables=tables), "p0")
    assert figure.data[1].text[0]
    assert not any("onclick" in str(texts.text) for texts in figure.data[1:])
    assert figure.data[0].customdata[0][0] == "&lt;b\u00b7onclick=x&gt;&amp;\u21b5"
