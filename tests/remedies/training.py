"""Methods, PEFT's configurations and the trainer's arguments."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import tiny
from datasets import Dataset, DatasetDict
from peft import IA3Config, PeftModel, PrefixTuningConfig, get_peft_model
from runs import HARMFUL, REFUSED, SHORT, given, lora

from safe_trainer import (
    AdapterEMA,
    AlignmentDirection,
    AsFT,
    ConstrainedSFT,
    RefusalAnchor,
    SafeSFTTrainer,
    SaLoRA,
    SecurityVectors,
    load_model,
    merge_adapter,
)

from .room import (
    BAD,
    BEST,
    COLUMNS,
    LATIN_1,
    LONG,
    LONG_HARMFUL,
    ODD_COLUMNS,
    PLAIN,
    Case,
    averaged,
    did,
    direction,
    inputs,
    lora_model,
    merged,
    monitored,
    of,
    on,
    read,
    skipped,
    spans,
    train,
    two_adapters,
)

METHODS: dict[str, Case] = {
    "columns of no known format": (
        lambda at: read(at, ODD_COLUMNS),
        "Name its `columns`",
        [lambda at: read(at, ODD_COLUMNS, columns=COLUMNS)],
    ),
    "another encoding": (
        lambda at: read(at, LATIN_1),
        "name another as `encoding`, often `latin-1`",
        [lambda at: read(at, LATIN_1, encoding="latin-1")],
    ),
    "a bad row": (
        lambda at: at.trainer(SecurityVectors(harmful_data=at.written(BAD, "bad.jsonl"), fitting=SHORT)),
        "(?s)1 of 2 rows cannot be used.*on_bad_row='skip'",
        [lambda at: at.trainer(SecurityVectors(harmful_data=skipped(at), fitting=SHORT))],
    ),
    "splits": (
        lambda at: train(at, DatasetDict(train=Dataset.from_list(HARMFUL), test=Dataset.from_list(HARMFUL))),
        r"Choose one, as in `harmful_data\['train'\]`",
        [lambda at: train(at, DatasetDict(train=Dataset.from_list(HARMFUL))["train"])],
    ),
    "long rows for vectors": (
        lambda at: train(at, LONG_HARMFUL, max_length=32),
        "past `max_length=32`. Fix the row, or leave it out",
        [lambda at: train(at, LONG_HARMFUL, max_length=256), lambda at: train(at, HARMFUL, max_length=32)],
    ),
    "long rows for a basis": (
        lambda at: at.measured(rows=LONG, max_length=32),
        "Raise `max_length`",
        [lambda at: at.measured(rows=LONG, max_length=256, rank=2)],
    ),
    "texts for a basis": (
        lambda at: at.measured(rows=[{"text": "Make a bad thing? I will not."}]),
        "Give rows with `prompt` and `completion`",
        [lambda at: at.measured(rows=[{"prompt": "Make a bad thing?", "completion": "I will not."}], rank=2)],
    ),
    "long prompts for an anchor": (
        lambda at: at.trainer(RefusalAnchor(["Make it. " * 9], ["Say it."], max_length=32)),
        "Give shorter prompts, or raise `max_length`",
        [
            lambda at: at.trainer(RefusalAnchor(["Make it. " * 9], ["Say it."], max_length=256)),
            lambda at: at.trainer(RefusalAnchor(["Make it."], ["Say it."], max_length=32)),
        ],
    ),
    "a rank that a direction does not hold": (
        lambda at: at.trainer(AsFT(direction=spans(at), rank=2, projector="subspace")),
        "`rank=2, max_error=0`",
        [
            lambda at: at.trainer(AsFT(direction=spans(at), rank=1, projector="subspace")),
            lambda at: at.trainer(AsFT(direction=direction(at, rank=2, max_error=0), rank=2, projector="subspace")),
        ],
    ),
    "an adapter in the place of a checkpoint": (
        lambda at: AlignmentDirection.from_checkpoints(at.adapter(), at.unaligned),
        "Merge it first: `safe-trainer export",
        [
            lambda at: (
                merge_adapter(at.adapter(), at.folder / "merged", at.aligned),
                AlignmentDirection.from_checkpoints(at.folder / "merged", at.unaligned),
            )
        ],
    ),
    "a model built in memory": (
        lambda at: at.trainer(AsFT(unaligned_model=at.unaligned), model=tiny.model()),
        "Give `aligned_model`",
        [lambda at: at.trainer(AsFT(at.unaligned, aligned_model=at.aligned), model=of(at.aligned))],
    ),
    "inputs at other tokens": (
        lambda at: at.trainer(inputs(at, input_tokens="all")),
        "Give `input_tokens='prompt'`",
        [lambda at: at.trainer(inputs(at))],
    ),
    "a rank that leaves nothing to learn": (
        lambda at: at.trainer(SaLoRA(safety_data=REFUSED, rank=500)),
        "Lower `rank`, or leave `.*` out of `target_modules`",
        [lambda at: at.trainer(SaLoRA(safety_data=REFUSED, rank=4, task_rank=4))],
    ),
    "a LoRA that is too large": (
        lambda at: at.trainer(SaLoRA(safety_data=REFUSED, rank=4), peft_config=lora(r=64)),
        "Lower `r`",
        [lambda at: at.trainer(SaLoRA(safety_data=REFUSED, rank=4), peft_config=lora(r=4))],
    ),
    "a bias of the LoRA": (
        lambda at: at.trainer(SaLoRA(safety_data=REFUSED, rank=4), peft_config=lora(lora_bias=True)),
        "Remove `lora_bias`",
        [lambda at: at.trainer(SaLoRA(safety_data=REFUSED, rank=4), peft_config=lora())],
    ),
    "another start of the LoRA": (
        lambda at: at.trainer(SaLoRA(safety_data=REFUSED, rank=4), peft_config=lora(init_lora_weights="orthogonal")),
        "Remove it from `LoraConfig`, or switch SaLoRA's off: `task_rank=0`",
        [
            lambda at: at.trainer(
                SaLoRA(safety_data=REFUSED, rank=4, task_rank=0), peft_config=lora(init_lora_weights="orthogonal")
            )
        ],
    ),
    "virtual tokens": (
        lambda at: at.trainer(
            RefusalAnchor(["Make it."], ["Say it."]),
            peft_config=PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        ),
        r"Use `LoraConfig\(...\)` or another adapter of weights, or train all weights",
        [
            lambda at: at.trainer(RefusalAnchor(["Make it."], ["Say it."]), peft_config=lora()),
            lambda at: at.trainer(RefusalAnchor(["Make it."], ["Say it."]), peft_config=None),
        ],
    ),
    "a LoRA on embeddings": (
        lambda at: at.trainer(AsFT(projector="none"), peft_config=on("q_proj", "embed_tokens")),
        "Leave `embed_tokens` out of `target_modules`",
        [lambda at: at.trainer(AsFT(projector="none"), peft_config=on("q_proj"))],
    ),
    "a LoRA on the head": (
        lambda at: at.trainer(AsFT(projector="none"), peft_config=on("q_proj", "lm_head")),
        "Remove `lm_head` from `target_modules`",
        [lambda at: at.trainer(AsFT(projector="none"), peft_config=on("q_proj"))],
    ),
}  # fmt: skip

LATE = Dataset.from_dict({"input_ids": [[4, 5, 6]] * 4, "labels": [[-100, -100, 6]] * 4})
MASKED = Dataset.from_dict({"input_ids": [[4, 5, 6]] * 4, "labels": [[-100] * 3] * 4})


def given_to_two(at: SimpleNamespace) -> SafeSFTTrainer:
    """Return the first of two trainers with one method."""
    first, _ = (at.trainer(PLAIN, max_steps=1) for _ in range(2))
    return first


def with_another(trainer: SafeSFTTrainer) -> SafeSFTTrainer:
    """Return a trainer with another active adapter than when it was built."""
    trainer.model.add_adapter("second", lora())
    trainer.model.set_adapter("second")
    return trainer


class OwnLoss(SafeSFTTrainer):
    """A subclass that asks the model for its loss, without what methods add."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return model(**inputs).loss


class OwnStep(SafeSFTTrainer):
    """A subclass that takes its steps by itself, without what methods do around them."""

    def training_step(self, model: Any, inputs: Any, *args: Any) -> Any:
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        return loss.detach()


class CallsSuper(SafeSFTTrainer):
    """A subclass that calls what it overrides."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().compute_loss(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        return super().training_step(*args, **kwargs)


def subclassed(at: SimpleNamespace, trainer: type[SafeSFTTrainer], safety: Any) -> None:
    """Train in a subclass of the trainer."""
    trainer(**given(at.folder, model=at.aligned, peft_config=lora(), max_steps=1), safety=safety).train()


def second_adapter(at: SimpleNamespace) -> PeftModel:
    """Return a model whose second adapter is active."""
    model = get_peft_model(of(at.aligned), lora())
    model.add_adapter("second", lora())
    model.set_adapter("second")
    return model


TRAINER: dict[str, Case] = {
    "an adapter in the place of a model": (
        lambda at: at.trainer(None, model=at.adapter()),
        "is an adapter, not a complete model. Merge it first: `safe-trainer export ADAPTER.*, or give its base model",
        [lambda at: at.trainer(None, model=merged(at)), lambda at: at.trainer(None)],
    ),
    "an adapter in the place of a model to load": (
        lambda at: load_model(at.adapter()),
        "is an adapter, not a complete model. Merge it first: `safe-trainer export",
        [lambda at: load_model(merged(at)), lambda at: load_model(at.aligned, at.adapter())],
    ),
    "vectors in the place of a model": (
        lambda at: at.trainer(None, model=at.vectors()),
        r"Give their base model, and the vectors as `safety=SecurityVectors\(...\)`",
        [lambda at: at.trainer(SecurityVectors(vectors=at.vectors()))],
    ),
    "rows that are too long": (
        lambda at: at.trainer(None, max_length=4),
        "Raise `max_length`, or shorten the prompts",
        [lambda at: at.trainer(None, max_length=64)],
    ),
    "labels that are all masked": (
        lambda at: at.trainer(None, train_dataset=MASKED),
        "their `labels` are all -100 within `max_length=1024` tokens. Check the mask that they were made with",
        [lambda at: at.trainer(None, train_dataset=MASKED.remove_columns("labels"))],
    ),
    "labels past the length": (
        lambda at: at.trainer(None, train_dataset=LATE, max_length=2),
        "Check the mask that they were made with, or raise `max_length`",
        [lambda at: at.trainer(None, train_dataset=LATE, max_length=3)],
    ),
    "a method of two trainers": (
        lambda at: given_to_two(at).train(),
        r"Make a new `AsFT\(...\)` for each trainer, and build this one again",
        [lambda at: at.trainer(AsFT(projector="none"), max_steps=1).train()],
    ),
    "a subclass with a loss of its own": (
        lambda at: subclassed(at, OwnLoss, PLAIN),
        r"AsFT did not act in step 1.*Call `super\(\).compute_loss\(...\)` in it",
        [lambda at: subclassed(at, CallsSuper, PLAIN)],
    ),
    "a subclass with steps of its own": (
        lambda at: subclassed(at, OwnStep, SecurityVectors(at.vectors())),
        r"Security Vectors did not act in step 1.*Call `super\(\).training_step\(...\)` in it",
        [lambda at: subclassed(at, CallsSuper, SecurityVectors(at.vectors()))],
    ),
    "another adapter after building": (
        lambda at: with_another(at.trainer(PLAIN, max_steps=1)).train(),
        "Load, freeze, exchange and activate layers and adapters first, and then build the trainer",
        [lambda at: at.trainer(PLAIN, model=second_adapter(at), peft_config=None, max_steps=1).train()],
    ),
    "a method twice": (
        lambda at: at.trainer([PLAIN, PLAIN]), "Give each method once", [lambda at: at.trainer(PLAIN)]
    ),
    "a method that does nothing": (
        lambda at: SaLoRA(safety_data=REFUSED, rank=0, task_rank=0),
        "Use no method instead",
        [lambda at: at.trainer(None)],
    ),
    "a start without inputs": (
        lambda at: SaLoRA(safety_data=REFUSED, rank=4, start="guardspace"),
        "`start='guardspace'` needs `protect='input'` or `'both'`, .*above 0, got .*, or leave `start` out",
        [
            lambda at: at.trainer(SaLoRA(safety_data=REFUSED, rank=4, start="guardspace", protect="input")),
            lambda at: at.trainer(SaLoRA(safety_data=REFUSED, rank=4, start="guardspace", protect="both")),
            lambda at: at.trainer(SaLoRA(safety_data=REFUSED, rank=4, task_rank=4)),
        ],
    ),
    "two sources of a direction": (
        lambda at: AsFT(at.unaligned, direction=spans(at)),
        "Give `unaligned_model` or `direction`, not both",
        [lambda at: at.trainer(AsFT(at.unaligned)), lambda at: at.trainer(AsFT(direction=spans(at)))],
    ),
    "a start model without an adapter": (
        lambda at: at.trainer(ConstrainedSFT(), peft_config=None),
        r"Pass the base model and `peft_config=LoraConfig\(...\)`",
        [lambda at: at.trainer(ConstrainedSFT(), peft_config=lora())],
    ),
    "a start model that the LoRA changes": (
        lambda at: at.trainer(ConstrainedSFT(), peft_config=lora(init_lora_weights="pissa")),
        "Leave it out",
        [lambda at: at.trainer(ConstrainedSFT(), peft_config=lora())],
    ),
    "a start model whose biases are trained": (
        lambda at: at.trainer(ConstrainedSFT(), peft_config=lora(bias="all")),
        'Use `bias="none"`',
        [lambda at: at.trainer(ConstrainedSFT(), peft_config=lora(bias="none"))],
    ),
    "weighted tokens of another loss": (
        lambda at: at.trainer(ConstrainedSFT(), loss_type="dft"),
        'Remove `compute_loss_func` and `label_smoothing_factor`, and use `loss_type="nll"`',
        [lambda at: at.trainer(ConstrainedSFT(), loss_type="nll")],
    ),
    "DoRA": (
        lambda at: at.trainer(PLAIN, peft_config=lora(use_dora=True)),
        "Remove `use_dora=True` from `LoraConfig`",
        [lambda at: at.trainer(PLAIN, peft_config=lora())],
    ),
    "a start that changes the weights": (
        lambda at: at.trainer(PLAIN, peft_config=lora(init_lora_weights="pissa")),
        "Remove `init_lora_weights='pissa'` from `LoraConfig`",
        [lambda at: at.trainer(PLAIN, peft_config=lora())],
    ),
    "bare parameters": (
        lambda at: at.trainer(PLAIN, peft_config=lora(target_parameters=["q_proj.weight"])),
        r'name linear layers in `target_modules`, such as `\["q_proj", "k_proj", "v_proj", "o_proj"\]`',
        [lambda at: at.trainer(PLAIN, peft_config=on("q_proj", "k_proj", "v_proj", "o_proj"))],
    ),
    "an adapter that is no LoRA": (
        lambda at: at.trainer(PLAIN, peft_config=IA3Config(task_type="CAUSAL_LM")),
        r"Use `LoraConfig\(...\)`, or leave `peft_config` out",
        [lambda at: at.trainer(PLAIN, peft_config=lora()), lambda at: at.trainer(PLAIN, peft_config=None)],
    ),
    "SaLoRA on all weights": (
        lambda at: at.trainer(SaLoRA(safety_data=REFUSED, rank=4), peft_config=None),
        r"Give `peft_config=LoraConfig\(...\)`",
        [lambda at: at.trainer(SaLoRA(safety_data=REFUSED, rank=4, task_rank=4), peft_config=lora())],
    ),
    "a LoRA that SaLoRA did not make": (
        lambda at: at.trainer(SaLoRA(safety_data=REFUSED, rank=4), model=lora_model(at), peft_config=None),
        "Pass the base model and `peft_config`",
        [lambda at: at.trainer(SaLoRA(safety_data=REFUSED, rank=4, task_rank=4), peft_config=lora())],
    ),
    "two active adapters": (
        lambda at: at.trainer(PLAIN, model=two_adapters(at), peft_config=None),
        r"Call `model.set_adapter\(name\)` first",
        [lambda at: at.trainer(PLAIN, model=did(two_adapters(at), "set_adapter", "default"), peft_config=None)],
    ),
    "a merged adapter": (
        lambda at: at.trainer(PLAIN, model=did(lora_model(at), "merge_adapter"), peft_config=None),
        r"Call `model.unmerge_adapter\(\)`, or give the merged model and a `peft_config`",
        [
            lambda at: at.trainer(
                PLAIN, model=did(did(lora_model(at), "merge_adapter"), "unmerge_adapter"), peft_config=None
            ),
            lambda at: at.trainer(PLAIN, model=lora_model(at).merge_and_unload()),
        ],
    ),
    "an adapter that no PeftModel holds": (
        lambda at: at.trainer(PLAIN, model=did(of(at.aligned), "add_adapter", lora()), peft_config=None),
        r"Load the base model, and its adapter with `PeftModel.from_pretrained\(model, adapter, is_trainable=True\)`, "
        "or give a `peft_config`",
        [
            lambda at: at.trainer(
                PLAIN,
                model=PeftModel.from_pretrained(of(at.aligned), at.adapter(), is_trainable=True),
                peft_config=None,
            ),
            lambda at: at.trainer(PLAIN, model=of(at.aligned), peft_config=lora()),
        ],
    ),
    "nothing to train": (
        lambda at: at.trainer(PLAIN, model=PeftModel.from_pretrained(of(at.aligned), at.adapter()), peft_config=None),
        r"Give a `peft_config`, or load .*PeftModel.from_pretrained\(model, adapter, is_trainable=True\)",
        [
            lambda at: at.trainer(PLAIN, model=of(at.aligned).requires_grad_(False)),
            lambda at: at.trainer(
                PLAIN,
                model=PeftModel.from_pretrained(of(at.aligned), at.adapter(), is_trainable=True),
                peft_config=None,
            ),
        ],
    ),
    "an average and the best checkpoint": (
        lambda at: averaged(at, save_strategy="best", metric_for_best_model="loss"),
        'Remove `load_best_model_at_end` and `save_strategy="best"`',
        [lambda at: averaged(at)],
    ),
    "weights to put back and the best checkpoint": (
        lambda at: monitored(at, 9, BEST, minimum_rate=0.5, restore=True),
        'Remove `load_best_model_at_end` and `save_strategy="best"`, or `restore`',
        [
            lambda at: monitored(at, 9, minimum_rate=0.5, restore=True),
            lambda at: monitored(at, 9, BEST, minimum_rate=0.5),
        ],
    ),
    "weights to put back and an average": (
        lambda at: monitored(at, 9, {"callbacks": [AdapterEMA()]}, minimum_rate=0.5, restore=True),
        "replaces the weights at the end, and so does `AdapterEMA`: the one would undo the other. Remove that "
        "callback, or `restore`",
        [
            lambda at: monitored(at, 9, minimum_rate=0.5, restore=True),
            lambda at: monitored(at, 9, {"callbacks": [AdapterEMA()]}, minimum_rate=0.5),
        ],
    ),
    "a rate that a monitor cannot hold": (
        lambda at: monitored(at, 1, minimum_rate=0.5),
        "Lower `minimum_rate` or leave it out, or give more harmful prompts",
        [
            lambda at: monitored(at, 1, minimum_rate=0.1),
            lambda at: monitored(at, 1),
            lambda at: monitored(at, 9, minimum_rate=0.5),
        ],
    ),
}  # fmt: skip
