"""Data -> training under SPEED -> adapter, measured before, during and after; a killed run resumes."""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

from transformers import PrinterCallback, TrainerState, TrainingArguments

from diagnostics.cutoffs.criterion import Criterion
from diagnostics.cutoffs.recommendation import recommend
from diagnostics.diagnosis.diagnosis import diagnose
from diagnostics.diagnosis.teacher import Teacher, observe_teacher
from diagnostics.finetune.card import model_card
from diagnostics.finetune.example_encoding import collate
from diagnostics.finetune.examples import IGNORED, Example
from diagnostics.finetune.finetuning_folder import (
    AFTER,
    BEFORE,
    CARD,
    CHECKPOINTS,
    FINETUNING_FOLDER,
    TRAINER_STATE,
    FineTuning,
    FineTuningManifest,
    FineTuningWriter,
    load_finetuning,
)
from diagnostics.finetune.lora import add_lora, require_peft
from diagnostics.finetune.settings import Settings
from diagnostics.finetune.sources import Source
from diagnostics.finetune.trainer import SpeedTrainer
from diagnostics.finetune.watch import Watch
from diagnostics.models.loading import LoadedModel
from diagnostics.prompts.digests import inputs_digest, tokenizer_digest
from diagnostics.prompts.encoding import EncodedPrompt, encode_for_diagnosis
from diagnostics.prompts.given import as_prompts
from diagnostics.prompts.prompt import PromptSet
from diagnostics.runs.places import RECOMMENDATION
from diagnostics.support.errors import UserError, require
from diagnostics.support.files import write_text
from diagnostics.support.folders import manifest_head
from diagnostics.support.locks import one_writer
from diagnostics.support.progress import Progress, reporter

KEPT_CHECKPOINTS = 2


@one_writer
def finetune(
    lm: LoadedModel,
    source: Source,
    held_out: PromptSet | Sequence[Any] | str,
    settings: Settings,
    *,
    out: str | Path,
    resume: bool = False,
    goals: dict[str, Any] | None = None,
    progress: Progress | bool = True,
    arguments: dict[str, Any] | None = None,
) -> FineTuning:
    """Train a model under SPEED so that it loses less at a cutoff, and measure what it loses at all of them.

    Parameters
    ----------
    lm
        The model; it is trained in place, and ends with the training merged into its weights.
    source
        The data to train on: see `diagnostics.finetune.sources`.
    held_out
        Prompts to measure on, as `diagnostics.diagnose` takes them; none of them is trained on.
    settings
        How to train.
    out, resume
        Folder to write, see `diagnostics.finetune.finetuning_folder`, and whether to continue the same fine-tuning in
        it: losses and weights then equal those of an uninterrupted one. A finished one is read.
    goals
        Goals of the recommendation, as arguments of `recommend`.
    progress
        Bars on stderr by default, False for none, or a function that is called as ``progress(done, total, what)`` at
        every part of the work.
    arguments
        What the user asked for; the manifest keeps it unchanged.

    Returns
    -------
    FineTuning
        With the diagnoses before and after and ``recommendation.json`` in its folder.

    Raises
    ------
    UserError
        If settings are invalid, data cannot be used, the folder holds something else, the loss is not finite, or for
        what `train_under` and `diagnose` refuse.
    """
    lm, held_out, report = LoadedModel.of(lm), as_prompts(held_out), reporter(progress, "fine-tuning")
    require(isinstance(source, Source), f"the data are {source!r:.60}: give Source(load_data(...), NAME)")
    require(isinstance(settings, Settings), f"the settings are {settings!r:.60}: give Settings(cutoff=...)")
    _require_trainable(lm)
    settings = settings.settled(lm)
    goals = goals or {}
    Criterion(**{name: goal for name, goal in goals.items() if name in Criterion.__dataclass_fields__})
    if settings.method == "lora":
        require_peft()
    # Raises errors in prompts and numbers before any work.
    encoded = encode_for_diagnosis(held_out, lm.tokenizer, lm.anatomy.max_positions, settings.decode_tokens)
    source.make(lm, source.n_parts)  # this part is empty: only the checks run
    folder = FineTuningWriter(Path(out), _manifest(lm, source, held_out, encoded, settings, arguments), resume=resume)
    if folder.complete:
        return load_finetuning(folder.path)
    with FINETUNING_FOLDER.writing(folder.path):
        return _carry_out(lm, source, held_out, encoded, settings, goals, folder, report)


def _carry_out(
    lm: LoadedModel,
    source: Source,
    held_out: PromptSet,
    encoded: Sequence[EncodedPrompt],
    settings: Settings,
    goals: dict[str, Any],
    folder: FineTuningWriter,
    report: Progress,
) -> FineTuning:
    """Do the steps of a fine-tuning that are left: rows, measurement before, training, measurement after."""
    rows, _ = folder.examples(source.n_parts, partial(_make_part, lm, source, report))
    examples = _without(rows, {prompt.token_ids for prompt in encoded})
    if not examples:
        folder.discard()
        raise UserError(f"nothing to train on is left of {source.name}: {source.advice}")
    folder.note(held_out_dropped=len(rows) - len(examples))
    measured: Any = {"decode_tokens": settings.decode_tokens, "anchors": settings.anchors, "resume": True}
    diagnose(lm, held_out, out=folder.path / BEFORE, progress=_labelled(report, "before"), **measured)
    teacher = observe_teacher(lm, held_out, decode_tokens=settings.decode_tokens, progress=_labelled(report, "teacher"))
    tuned = _train(lm, examples, encoded, teacher, settings, folder, report)
    after = diagnose(
        tuned,
        held_out,
        out=folder.path / AFTER,
        teacher=teacher if settings.against == "base" else None,
        progress=_labelled(report, "after"),
        **measured,
    )
    recommendation = recommend(after, **goals)
    recommendation.save(folder.path / AFTER / RECOMMENDATION)
    recommendation.save(folder.path / RECOMMENDATION)
    write_text(folder.path / CARD, model_card(load_finetuning(folder.path), lm.name))
    return folder.finish()


def _require_trainable(lm: LoadedModel) -> None:
    """Refuse, before any work, what would fail after hours."""
    if getattr(lm.model, "is_quantized", False):
        raise UserError(f"the weights of {lm.name!r} are quantised: an adapter could not be merged into them")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a fine-tuning is one process: launch SpeedTrainer in a script of your own instead")
    if lm.device.type == "cuda" and lm.device.index and not hasattr(lm.model, "hf_device_map"):
        raise UserError(f"training takes the first GPU that it sees: set CUDA_VISIBLE_DEVICES={lm.device.index}")


def _make_part(lm: LoadedModel, source: Source, report: Progress, number: int) -> Any:
    report(number, source.n_parts, "answers")
    return source.make(lm, number)


def _without(rows: Sequence[Example], prompts: Collection[tuple[int, ...]]) -> list[Example]:
    """Leave out rows that begin with one of the prompts and its answer."""
    starts = [row["labels"].index(next(label for label in row["labels"] if label != IGNORED)) for row in rows]
    return [row for row, start in zip(rows, starts, strict=True) if tuple(row["input_ids"][:start]) not in prompts]


def _train(
    lm: LoadedModel,
    examples: Sequence[Example],
    held_out: Sequence[EncodedPrompt],
    teacher: Teacher,
    settings: Settings,
    folder: FineTuningWriter,
    report: Progress,
) -> LoadedModel:
    """Train, save, and return the model with the training merged into its weights."""
    frozen = None
    model: Any = lm.model
    if settings.rank is not None:
        model = add_lora(lm, settings.rank, settings.seed)
    elif settings.supervised < 1:
        frozen = copy.deepcopy(lm.model)
    watch = Watch(lm, held_out, teacher, settings, folder, report)
    trainer = SpeedTrainer(
        model,
        schedule=settings.schedule(lm.anatomy.n_layers),
        anchors=settings.anchors,
        supervised=settings.supervised,
        teacher=frozen,
        args=_training_arguments(lm, settings, folder),
        train_dataset=list(examples),
        data_collator=partial(collate, pad_token_id=lm.tokenizer.pad_token_id or 0),
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    last = folder.checkpoint()
    if last is not None and last.name == f"checkpoint-{settings.steps}":
        # A Trainer resumed after its last step would train to the end of the epoch.
        trainer._load_from_checkpoint(str(last))
        watch.write_steps(TrainerState.load_from_json(str(last / TRAINER_STATE)))
    else:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    folder.save_weights(model, None if settings.method == "lora" else lm.tokenizer)
    if settings.method == "lora":
        model.merge_and_unload()
    return LoadedModel.wrap(lm.model, lm.tokenizer, folder.path.name)


def _training_arguments(lm: LoadedModel, settings: Settings, folder: FineTuningWriter) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder.path / CHECKPOINTS),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, settings.steps // 10),
        weight_decay=0.0,
        max_grad_norm=1.0,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        seed=settings.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=settings.checkpoint_every,
        save_total_limit=KEPT_CHECKPOINTS,
        use_cpu=lm.device.type == "cpu",
        bf16=False,  # the weights keep the type that they were loaded in
        remove_unused_columns=False,
        dataloader_pin_memory=lm.device.type == "cuda",
        report_to=[],
        disable_tqdm=True,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # DataParallel would use the others, and no policy runs under it
    return arguments


def _labelled(report: Progress, what: str) -> Progress:
    return lambda done, total, prompt_id: report(done, total, f"{what} {prompt_id}".strip())


def _manifest(
    lm: LoadedModel,
    source: Source,
    held_out: PromptSet,
    encoded: Sequence[EncodedPrompt],
    settings: Settings,
    arguments: dict[str, Any] | None,
) -> FineTuningManifest:
    """Return the folder's manifest; its ``identity`` is what a continued fine-tuning must share."""
    chosen = asdict(settings)
    identity: dict[str, Any] = {
        "tokenizer": tokenizer_digest(lm.tokenizer),
        "dtype": str(lm.dtype).removeprefix("torch."),
        "data": source.fingerprint,
        "held-out prompts": held_out.fingerprint,
        "token_ids": inputs_digest(encoded),
    }
    about = {
        "status": "running",
        "revision": lm.revision,
        "settings": chosen,
        "source": source.name,
        "held_out": {"name": held_out.name, "n_prompts": len(held_out)},
    }
    return cast(FineTuningManifest, manifest_head(lm, arguments, **identity, **chosen) | about)
