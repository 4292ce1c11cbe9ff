"""Playground: a prompt under several policies side by side, with what differs, and what each took."""

import math
from dataclasses import replace
from typing import Any

import pandas as pd
import streamlit as st
import torch

from dashboard.address import bind, flag, number, one_of, some_of, text, whole
from dashboard.markdown import md
from dashboard.playing import Played, is_loaded, marked, play, playground_model, text_html
from dashboard.state import current_entry, download, open_run, saved_recommendation, to_csv
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
from diagnostics.support.glossary import GLOSSARY

MOST_POLICIES = 3
TYPES = ["auto", *DTYPES]
COLUMNS = {
    "ttft_s": st.column_config.NumberColumn("TTFT, s", format="%.3f", help=GLOSSARY["TTFT"]),
    "ttft_ratio": st.column_config.NumberColumn("TTFT of full depth", format="%.3f"),
    "tpot_ms": st.column_config.NumberColumn("TPOT, ms", format="%.1f", help=GLOSSARY["TPOT"]),
    "tpot_ratio": st.column_config.NumberColumn("TPOT of full depth", format="%.3f"),
    "kv_mib": st.column_config.NumberColumn("KV, MiB", format="%.2f", help=GLOSSARY["KV cache"]),
    "kv_ratio": st.column_config.NumberColumn("KV of full depth", format="%.3f"),
    "tokens": st.column_config.NumberColumn("new tokens"),
}
PROMPT_HEIGHT = 110  # pixels: what was generated stays on the first screen


def choose_model() -> LoadedModel | None:
    """Let the reader load a model; None until one is loaded. One that this process still holds is taken as it is."""
    entry = current_entry()
    known = open_run(entry).manifest["model"] if entry else EMBEDDED_MODEL
    left, middle, right, last = st.columns([5, 2, 3, 2], vertical_alignment="bottom")
    # What was loaded stays, whichever run is looked at meanwhile.
    chosen = st.session_state.get("play_loaded", (known, "auto", "auto"))
    bind("play_model", "model", chosen[0], text(), always="play_loaded" in st.session_state)
    name = left.text_input("Model", key="play_model", help=MODEL_HELP)
    bind("play_device", "device", chosen[1], text())
    device = middle.text_input("Device", key="play_device", help="auto, map, cpu, cuda, cuda:1, mps")
    bind("play_dtype", "dtype", chosen[2], one_of(TYPES))
    dtype = right.selectbox("Type", TYPES, key="play_dtype", help="auto: float32 on cpu, else bfloat16")
    wanted = (name.strip(), device.strip(), str(dtype))
    if last.button("Load", width="stretch", key="load"):
        st.session_state["play_loaded"] = wanted
        st.session_state.pop("played", None)  # another tokenizer's tokens
    elif "play_loaded" not in st.session_state and is_loaded(*wanted):
        st.session_state["play_loaded"] = wanted
    place = st.empty()
    if st.session_state.get("play_loaded") != wanted:
        place.info("Load the model to generate with it. It stays loaded for all pages of this dashboard.")
        return None
    with place, st.spinner("Loading the model ..."):
        return playground_model(*wanted)


def choose_policies(lm: LoadedModel) -> list[Policy]:
    """Let the reader choose what to set beside full depth."""
    n_layers = lm.anatomy.n_layers
    entry = current_entry()
    start = max(1, round(0.75 * n_layers))
    if entry is not None and open_run(entry).n_layers == n_layers:
        start = saved_recommendation(entry).cutoff
    row = st.container(horizontal=True)  # as many beside each other as fit
    left, middle, right = (row.container(width=width) for width in (240, 450, 240))
    bind("play_cutoff", "cutoff", start, whole(1, n_layers), of=f"playground {lm.name} {n_layers} {start}")
    cutoff = left.slider("Cutoff", 1, n_layers, key="play_cutoff", help=GLOSSARY["cutoff"])
    offered: dict[str, Policy] = {}
    for policy in policies_at(cutoff):
        if not isinstance(policy, FullPolicy):
            offered[policy.title] = policy
            if policy.anchors:
                offered[f"{policy.title} without anchor"] = replace(policy, anchors=0)
    bind("kinds", "policies", [SpeedPolicy.title], some_of(offered))
    kinds = middle.pills(
        "Beside full depth", list(offered), selection_mode="multi", key="kinds", help=GLOSSARY["anchor"]
    )
    bind("more_policies", "more", "", text())
    more = right.text_input("More policies", key="more_policies", placeholder="speed:20, fastkv:retention_rate=0.2")
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


def ask(lm: LoadedModel, is_ready: bool) -> tuple[str, dict[str, Any], Any]:
    """Ask for the prompt and how to go on from it; where to generate, return the place of the button that stops it."""
    bind("prompt", "prompt", "", text())
    prompt = st.text_area(
        "Prompt", key="prompt", height=PROMPT_HEIGHT, placeholder="Type or paste a prompt; long ones show more."
    )
    row = st.container(horizontal=True, vertical_alignment="center")
    wanted = row.button("Generate", type="primary", icon=":material/play_arrow:", key="generate", disabled=not is_ready)
    place = row.empty()
    with row.popover("Settings", icon=":material/tune:"):
        options = settings(lm)
    with row.popover("Take a long built-in prompt", icon=":material/auto_stories:"):
        st.selectbox("Kind", [p.category for p in load_prompts("builtin", max_prompts=7)], key="example")
        most = min(lm.anatomy.max_positions or 8192, 131072)
        lengths = [n for n in (256, 512, 1024, 2048, 4096, 8192, 32768, 131072) if n <= most]
        st.select_slider("Tokens", lengths, lengths[min(2, len(lengths) - 1)], key="example_length")
        st.button("Fill in", on_click=fill, args=(lm,), key="fill")
    return prompt, options, place if wanted else None


def settings(lm: LoadedModel) -> dict[str, Any]:
    """Ask how to generate."""
    templated = bool(getattr(lm.tokenizer, "chat_template", None))
    bind("chat", "chat", templated, flag(), of=str(templated))
    bind("new_tokens", "new_tokens", 64, whole(1, 4096))
    bind("temperature", "temperature", 0.0, number(0, 10))
    bind("top_p", "top_p", 1.0, number(0.01, 1))
    bind("seed", "seed", 0, whole(0, 2**31))
    return {
        "chat": st.toggle("Chat template", disabled=not templated, key="chat"),
        "max_new_tokens": st.number_input("New tokens", 1, 4096, key="new_tokens"),
        "temperature": st.number_input("Temperature", 0.0, 10.0, step=0.1, key="temperature", help="0: greedy"),
        "top_p": st.number_input("top-p", 0.01, 1.0, step=0.05, key="top_p"),
        "seed": st.number_input("Seed", 0, 2**31, key="seed", help="of sampling, at a temperature above 0"),
    }


def stopped() -> None:
    """Note that the reader stopped what was running."""
    st.session_state["stopped"] = True


def run(lm: LoadedModel, policies: list[Policy], prompt: str, options: dict[str, Any], place: Any) -> None:
    """Generate under full depth and every policy, one after the other, side by side; a button at ``place`` stops it."""
    st.session_state.pop("played", None)
    if not prompt.strip():
        raise UserError("the prompt is empty")
    chat, seed = bool(options.pop("chat")), int(options.pop("seed"))
    ids = encode_input(lm, prompt, chat=chat, max_new_tokens=int(options["max_new_tokens"]))
    # Streamlit ends what runs at any click.
    place.button("Stop", key="stop", icon=":material/stop:", on_click=stopped)
    every: list[Policy] = [FullPolicy(), *(p for p in policies if p != FullPolicy())]
    slots = []
    for column, policy in zip(st.columns(len(every)), every, strict=True):
        column.markdown(f"**{md(policy.spec)}**")
        slots.append(column.empty())
        slots[-1].caption("waiting")
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
    lines = pd.DataFrame(
        {
            "policy": one.spec,
            "ttft_s": one.ttft_s,
            "ttft_ratio": one.ttft_s / full.ttft_s,
            "tpot_ms": 1000 * one.tpot_s,
            "tpot_ratio": math.nan if math.isnan(one.tpot_s) else one.tpot_s / full.tpot_s,
            "kv_mib": one.kv_bytes / 2**20,
            "kv_ratio": one.kv_bytes / full.kv_bytes,
            "tokens": len(one.token_ids),
        }
        for one in results
    )
    st.dataframe(lines, hide_index=True, width="stretch", column_config=COLUMNS)
    row = st.container(horizontal=True, vertical_alignment="center")
    row.caption(f"{n_prompt:,} prompt tokens. One run of each, with painting the text in it: for figures use `bench`.")
    download(row, "CSV", to_csv(lines), "playground.csv", "text/csv", type="tertiary")


st.title("Full depth and a policy, side by side")
model = choose_model()
if model is not None:
    chosen: list[Policy] | None = None
    try:
        chosen = choose_policies(model)
    except UserError as error:  # the prompt stays below it
        st.error(md(error))
    prompt, options, place = ask(model, is_ready=chosen is not None)
    was_stopped = st.session_state.pop("stopped", False)
    if place is not None and chosen is not None:
        run(model, chosen, prompt, options, place)
    elif "played" in st.session_state:
        show(model, *st.session_state["played"])
    elif was_stopped:
        st.caption("Stopped.")
