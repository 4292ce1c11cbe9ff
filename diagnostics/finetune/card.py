"""The README.md of a fine-tuned model, as the hub shows it: what it is for, what it loses, how to load it."""

from __future__ import annotations

from huggingface_hub import ModelCard, ModelCardData

from diagnostics.finetune.finetuning_folder import FineTuning


def model_card(finetuning: FineTuning, base: str) -> str:
    """Return the card of a finished fine-tuning of ``base``, in Markdown."""
    settings, n_layers = finetuning.manifest["settings"], int(finetuning.manifest["n_layers"])
    cutoff, lora = int(settings["cutoff"]), settings["method"] == "lora"
    before, after = finetuning.curve(0), finetuning.curve()
    reference = "its own full depth" if settings["against"] == "itself" else "the base model at full depth"
    rows = [
        f"| {k}{' (trained)' if k == cutoff else ' (full depth)' if k == n_layers else ''} "
        f"| {before[k]:.3f} | {after[k]:.3f} |"
        for k in sorted({*range(max(1, cutoff - 2), min(n_layers, cutoff + 4) + 1), n_layers})
    ]
    body = [
        f"# {base} for prompts of {cutoff} of {n_layers} layers",
        "",
        "Trained so that prompt tokens can stop at a lower layer (SPEED: Shallow Prefill, dEEp Decode,",
        "arXiv 2605.06105).",
        f"Mean KL from {reference} on {finetuning.manifest['held_out']['n_prompts']} held-out prompts, nats per token:",
        "",
        "| cutoff | before | after |",
        "| --- | --- | --- |",
        *rows,
        "",
        "In the folder of this file:",
        "",
        "```python",
        "from diagnostics import SpeedPolicy, load_model",
        "",
        'lm = load_model(".")',
        'inputs = lm.tokenizer("The sea is", return_tensors="pt").to(lm.device)',
        f"with SpeedPolicy({cutoff}, anchors={settings['anchors']})(lm.model):",
        "    tokens = lm.model.generate(**inputs, max_new_tokens=16)",
        "print(lm.tokenizer.decode(tokens[0]))",
        "```",
        "",
        "`recommendation.json` has the cutoff recommended for it, `finetuning.json` how it was trained.",
        "",
    ]
    metadata = ModelCardData(base_model=base, library_name="peft" if lora else None, tags=["speed", "shallow-prefill"])
    return str(ModelCard("\n".join(["---", metadata.to_yaml(), "---", "", *body]), ignore_metadata_errors=True))
