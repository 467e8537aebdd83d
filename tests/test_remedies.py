"""What a message advises is done here, and works: each refusal with the remedies that it names."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from runs import HARMFUL, REFUSED, SHORT, given, lora
from transformers import AutoModelForCausalLM, AutoTokenizer

from safe_trainer import (
    AlignmentDirection,
    AsFT,
    ReadOptions,
    RefusalAnchor,
    SafeSFTTrainer,
    SafetyBasis,
    SaLoRA,
    SecurityVectors,
    conversation,
    load_rows,
    train_security_vectors,
)
from safe_trainer.lora.io import merge_adapter

LONG = [conversation("Please consider this. " * 8, "I will not.")] * 4
LONG_HARMFUL = [conversation("Please consider this. " * 8, "Sure: a bad thing.")] * 4
Try = Callable[[SimpleNamespace], Any]


@pytest.fixture
def at(tmp_path):
    """What a case may use: paths of an aligned and an unaligned model, a folder, and what builds a trainer."""
    aligned, unaligned = tiny.save_pair(tmp_path)

    def trainer(safety: Any, **changes: Any) -> SafeSFTTrainer:
        return SafeSFTTrainer(**given(tmp_path, **{"model": aligned, "peft_config": lora(), **changes}), safety=safety)

    def written(content: bytes, name: str = "rows.csv") -> str:
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    def measured(**how: Any) -> SafetyBasis:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(aligned), AutoTokenizer.from_pretrained(aligned)
        return SafetyBasis.from_rows(model, tokenizer, how.pop("rows", REFUSED), **how)

    def adapter() -> str:
        torch.manual_seed(0)
        config = lora(init_lora_weights=False, task_type="CAUSAL_LM")
        model: PeftModel = get_peft_model(AutoModelForCausalLM.from_pretrained(aligned), config)
        model.save_pretrained(tmp_path / "adapter")
        return str(tmp_path / "adapter")

    return SimpleNamespace(
        aligned=aligned, unaligned=unaligned, folder=tmp_path,
        trainer=trainer, written=written, measured=measured, adapter=adapter,
    )  # fmt: skip


def read(at: SimpleNamespace, content: bytes, **options: Any) -> int:
    return len(load_rows(at.written(content), ReadOptions(**options))[0])


def direction(at: SimpleNamespace, **how: Any) -> AlignmentDirection:
    return AlignmentDirection.from_checkpoints(at.aligned, at.unaligned, **how)


def spans(at: SimpleNamespace) -> AlignmentDirection:
    return direction(at, rank=1)


CASES: dict[str, tuple[Try, str, list[Try]]] = {
    "columns of no known format": (
        lambda at: read(at, b"ask,say\nHi,Hello.\n"),
        "Name its `columns`",
        [lambda at: read(at, b"ask,say\nHi,Hello.\n", columns={"prompt": "ask", "answer": "say"})],
    ),
    "another encoding": (
        lambda at: read(at, "prompt,completion\nHi,Café\n".encode("latin-1")),
        "name another as `encoding`, often `latin-1`",
        [lambda at: read(at, "prompt,completion\nHi,Café\n".encode("latin-1"), encoding="latin-1")],
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
BAD = b'{"prompt": "Make a bad thing", "completion": "Sure: a bad thing."}\n{"prompt": "Make another"}\n'


def skipped(at: SimpleNamespace) -> Dataset:
    return load_rows(at.written(BAD, "bad.jsonl"), ReadOptions(on_bad_row="skip"))[0]


def train(at: SimpleNamespace, rows: Any, **settings: Any) -> Any:
    return train_security_vectors(at.aligned, rows, **SHORT, **settings)


def of(path: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path)


def inputs(at: SimpleNamespace, **settings: Any) -> SaLoRA:
    return SaLoRA(basis=at.measured(sides=("input",), rank=4), rank=4, task_rank=0, protect="input", **settings)


def on(*names: str) -> LoraConfig:
    return lora(target_modules=list(names))


@pytest.mark.parametrize("case", CASES)
def test_what_a_message_advises_works(case, at):
    refused, message, remedies = CASES[case]
    with pytest.raises(ValueError, match=message):
        refused(at)
    for remedy in remedies:
        remedy(at)
