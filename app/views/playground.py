"""Playground: a prompt under several policies side by side, with what differs, and what each took."""

import math
from dataclasses import replace

import pandas as pd
import streamlit as st
import torch

from dashboard.playing import Played, marked, play, playground_model, text_html
from dashboard.state import current_entry, md, open_run, saved_recommendation
from diagnostics.cli.options import MODEL_HELP
from diagnostics.generation.differences import marked_text, same_start
from diagnostics.generation.inputs import encode_input
from diagnostics.models.devices import DTYPES
from diagnostics.models.embedded import EMBEDDED_MODEL
from diagnostics.models.loading import LoadedModel
from diagnostics.policies import Policy, parse_policy
from diagnostics.policies.full import FullPolicy
from diagnostics.policies.registry import policies_at
from diagnostics.policies.speed import SpeedPolicy
from diagnostics.prompts.encoding import encode_prompt
from diagnostics.prompts.load import load_prompts
from diagnostics.support.errors import UserError

MOST_POLICIES = 3
TYPES = ["auto", *DTYPES]


def choose_model() -> LoadedModel | None:
    """Let the reader load a model; None until one is loaded."""
    entry = current_entry()
    known = open_run(entry).manifest["model"] if entry else EMBEDDED_MODEL
    # What was loaded stays, whichever run is looked at meanwhile.
    known, device_name, kind = st.session_state.get("play_loaded", (known, "auto", "auto"))
    left, middle, right, last = st.columns([5, 2, 3, 2], vertical_alignment="bottom")
    name = left.text_input("Model", known, key="play_model", help=MODEL_HELP)
    device = middle.text_input("Device", device_name, key="play_device")
    dtype = right.selectbox("Type", TYPES, TYPES.index(kind), key="play_dtype")
    wanted = (name.strip(), device.strip(), str(dtype))
    if last.button("Load", width="stretch", key="load"):
        st.session_state["play_loaded"] = wanted
        st.session_state.pop("played", None)  # another tokenizer's tokens
    if st.session_state.get("play_loaded") != wanted:
        st.info("Load the model to generate with it.")
        return None
    return playground_model(*wanted)


def choose_policies(lm: LoadedModel) -> list[Policy]:
    """Let the reader choose what to set beside full depth."""
    n_layers = lm.anatomy.n_layers
    entry = current_entry()
    start = max(1, round(0.75 * n_layers))
    if entry is not None and open_run(entry).n_layers == n_layers:
        start = saved_recommendation(entry).cutoff
    left, right = st.columns([1, 1])
    cutoff = left.slider("Cutoff", 1, n_layers, start, key=f"play_cutoff {n_layers} {start}")
    offered: dict[str, Policy] = {}
    for policy in policies_at(cutoff):
        if not isinstance(policy, FullPolicy):
            offered[policy.title] = policy
            if policy.anchors:
                offered[f"{policy.title} without anchor"] = replace(policy, anchors=0)
    kinds = right.pills(
        "Beside full depth", list(offered), selection_mode="multi", default=[SpeedPolicy.title], key="kinds"
    )
    more = right.text_input(
        "More policies", "", key="more_policies", placeholder="such as speed:20, fastkv:retention_rate=0.2"
    )
    asked = [policy for title, policy in offered.items() if title in kinds]
    policies = list(dict.fromkeys([*asked, *(parse_policy(spec) for spec in more.split(",") if spec.strip())]))
    for policy in policies:
        policy.check(lm.anatomy)
    if len(policies) > MOST_POLICIES:
        raise UserError(f"{len(policies)} policies do not fit beside each other: choose {MOST_POLICIES} at most")
    return policies


def fill(lm: LoadedModel) -> None:
    """Put a built-in prompt into the text field."""
    length = int(st.session_state["example_length"])
    prompts = load_prompts("builtin", context_length=length, max_prompts=7)
    chosen = next(p for p in prompts if p.category == st.session_state["example"])
    encoded = encode_prompt(chosen, lm.tokenizer, context_length=length)
    # The message alone: the chat template is put around it again. The document in it is cut to the length.
    content = (chosen.messages or ({"content": chosen.text or ""},))[-1]["content"]
    before, _, after = content.partition("{document}")
    body = encoded.text[encoded.text.index(before[:40]) :] if before else encoded.text
    end = body.rfind(after[-40:]) + len(after[-40:]) if after else len(body)
    st.session_state["prompt"] = body[:end]


def ask(lm: LoadedModel) -> tuple[str, dict[str, object]]:
    """Ask for the prompt and how to go on from it."""
    with st.expander("Take a long built-in prompt", icon=":material/auto_stories:"):
        left, middle, right = st.columns([2, 2, 1], vertical_alignment="bottom")
        left.selectbox("Kind", [p.category for p in load_prompts("builtin", max_prompts=7)], key="example")
        most = min(lm.anatomy.max_positions or 8192, 131072)
        lengths = [n for n in (256, 512, 1024, 2048, 4096, 8192, 32768, 131072) if n <= most]
        middle.select_slider("Tokens", lengths, lengths[min(2, len(lengths) - 1)], key="example_length")
        right.button("Fill in", on_click=fill, args=(lm,), width="stretch", key="fill")
    # Two keys: Streamlit forgets a widget's own when the page is left.
    st.session_state.setdefault("prompt", st.session_state.get("own_prompt", ""))
    text = st.text_area("Prompt", key="prompt", height=160, placeholder="Type or paste a prompt; long ones show more.")
    st.session_state["own_prompt"] = text
    columns = st.columns(5, vertical_alignment="bottom")
    templated = bool(getattr(lm.tokenizer, "chat_template", None))
    options: dict[str, object] = {
        "chat": columns[0].toggle("Chat template", templated, disabled=not templated, key="chat"),
        "max_new_tokens": columns[1].number_input("New tokens", 1, 4096, 64, key="new_tokens"),
        "temperature": columns[2].number_input("Temperature", 0.0, 10.0, 0.0, 0.1, key="temperature"),
        "top_p": columns[3].number_input("top-p", 0.01, 1.0, 1.0, 0.05, key="top_p"),
        "seed": columns[4].number_input("Seed", 0, 2**31, 0, key="seed"),
    }
    return text, options


def run(lm: LoadedModel, policies: list[Policy], text: str, options: dict[str, object]) -> None:
    """Generate under full depth and every policy, one after the other, side by side on the page."""
    if not text.strip():
        raise UserError("the prompt is empty")
    chat, seed = bool(options.pop("chat")), int(options.pop("seed"))  # type: ignore[call-overload]
    ids = encode_input(lm, text, chat=chat, max_new_tokens=int(options["max_new_tokens"]))  # type: ignore[call-overload]
    st.session_state.pop("played", None)
    every: list[Policy] = [FullPolicy(), *(p for p in policies if p != FullPolicy())]
    slots = []
    for column, policy in zip(st.columns(len(every)), every, strict=True):
        column.markdown(f"**{md(policy.spec)}**")
        slots.append(column.empty())
        slots[-1].caption("waiting")
    st.button("Stop", key="stop", icon=":material/stop:")  # any click makes the page begin anew
    results = []
    for slot, policy in zip(slots, every, strict=True):
        generator = torch.Generator(lm.device).manual_seed(seed)
        try:
            results.append(play(lm, ids, policy, slot.html, generator=generator, **options))
        except torch.OutOfMemoryError:
            raise UserError("out of device memory: take a shorter prompt") from None
    st.session_state["played"] = (ids.shape[1], results)
    st.rerun()


def show(lm: LoadedModel, n_prompt: int, results: list[Played]) -> None:
    """Show what was generated: texts with their differences, and what each took."""
    full, *others = results
    columns = st.columns(len(results))
    columns[0].markdown(f"**{md(full.spec)}**")
    plain = text_html(marked_text(lm.tokenizer, full.token_ids, [False] * len(full.token_ids)))
    # Beside one policy full depth shows what the other lacks; beside several it is the common yardstick.
    columns[0].html(marked(lm, full, others[0])[0] if len(others) == 1 else plain)
    for column, other in zip(columns[1:], others, strict=True):
        column.markdown(f"**{md(other.spec)}**")
        column.html(marked(lm, full, other)[1])
        same = same_start(full.token_ids, other.token_ids)
        equal = full.token_ids == other.token_ids
        column.caption("the same tokens" if equal else f"the same for {same} tokens, then different")
    lines = [
        {
            "policy": one.spec,
            "TTFT, s": one.ttft_s,
            "of full": one.ttft_s / full.ttft_s,
            "TPOT, ms": 1000 * one.tpot_s,
            "of full ": math.nan if math.isnan(one.tpot_s) else one.tpot_s / full.tpot_s,
            "KV, MiB": one.kv_bytes / 2**20,
            "of full  ": one.kv_bytes / full.kv_bytes,
            "tokens": len(one.token_ids),
        }
        for one in results
    ]
    st.dataframe(pd.DataFrame(lines).round(3), hide_index=True, width="stretch")
    st.caption(f"{n_prompt:,} prompt tokens. One run of each, with painting the text in it: for figures use `bench`.")


st.title("Full depth and a policy, side by side")
model = choose_model()
if model is not None:
    chosen: list[Policy] | None = None
    try:
        chosen = choose_policies(model)
    except UserError as error:  # the prompt stays below it
        st.error(md(error))
    prompt, settings = ask(model)
    asked = st.button("Generate", type="primary", icon=":material/play_arrow:", key="generate", disabled=chosen is None)
    if asked and chosen is not None:
        run(model, chosen, prompt, settings)
    elif "played" in st.session_state:
        show(model, *st.session_state["played"])
