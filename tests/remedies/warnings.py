"""What is said and goes on: gone once the advice is taken."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from datasets import Dataset
from runs import HARMFUL, REFUSED, SHORT, lora
from transformers import AutoTokenizer

from safe_trainer import ConstrainedSFT, SafetyBasis, SaLoRA, SecurityVectors, load_rows
from safe_trainer.data import ReadOptions, conversation

from .room import BEST, LONG, PLAIN, Case, compared, deaf, monitored, of, on, scanned, tiny

LABELLED = [{"prompt": f"Say {n}", "completion": "One.", "is_safe": n > 2} for n in range(8)]
SHORT_ANSWERS = Dataset.from_list([conversation(f"Say {n}", "Y") for n in range(8)])
MESSAGES = Dataset.from_list([{"messages": [*row["prompt"], *row["completion"]]} for row in tiny.rows(8)])
STRINGS = Dataset.from_list([{"prompt": f"Say {n}", "completion": "It is one."} for n in range(8)])
BRIEF = {"role": "system", "content": "Be brief."}
WITH_SYSTEM = [{**row, "prompt": [BRIEF, *row["prompt"]]} for row in REFUSED]
COMPLIED = [conversation(f"Make it {n}.", "Sure, here is how: first you take two of them.") for n in range(8)]
MANY = [conversation(f"Make a bad thing {n}.", "Sure: a bad thing.") for n in range(100)]


def loud(at: SimpleNamespace) -> Any:
    """A model whose logits can be as far apart as a target needs, which those of a random head cannot."""
    model = of(at.aligned)
    model.lm_head.weight.data *= 20
    return model


def foreword() -> Any:
    """A tokenizer whose template begins every answer with five tokens of its own."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m.content }}<e>", "(so) {{ m.content }}<e>")
    return tokenizer


def fitted(at: SimpleNamespace, **fitting: Any) -> None:
    """Train with vectors a model whose training computes past a layer, as a fused kernel does."""
    model = of(at.aligned)
    block = model.model.layers[0].mlp

    def forward(hidden: Any) -> Any:
        hidden = block.act_fn(block.gate_proj(hidden)) * block.up_proj(hidden)
        return hidden @ block.down_proj.weight.mT if block.training else block.down_proj(hidden)

    block.forward = forward
    method = SecurityVectors(harmful_data=MANY, fitting={**SHORT, **fitting})
    at.trainer(method, model=model, peft_config=on("q_proj"), max_steps=1).train()


LONGER = {"rank": 16, "learning_rate": 0.02, "max_passes": 200}

WARNINGS: dict[str, Case] = {
    "harmful rows in training": (
        lambda at: at.trainer(None, train_dataset=load_rows(LABELLED)[0]),
        r"Leave them out, as with `load_rows(..., ReadOptions(where={'is_safe': True}))`",
        [lambda at: at.trainer(None, train_dataset=load_rows(LABELLED, ReadOptions(where={"is_safe": True}))[0])],
    ),
    "rows that a scan did not look at": (
        lambda at: scanned(at, clean=at.folder / "clean.jsonl", reading=ReadOptions(limit=3)),
        "Raise `limit` of `reading` to look at more",
        [lambda at: scanned(at, clean=at.folder / "clean.jsonl", reading=ReadOptions(limit=8))],
    ),
    "rows that start too late": (
        lambda at: at.measured(rows=[*LONG, *REFUSED], max_length=64, rank=2),
        "Raise `max_length`",
        [lambda at: at.measured(rows=[*LONG, *REFUSED], max_length=256, rank=2)],
    ),
    "safety data that complies": (
        lambda at: at.trainer(SaLoRA(safety_data=COMPLIED, rank=4, task_rank=0)),
        "Give harmful prompts with refusals",
        [lambda at: at.trainer(SaLoRA(safety_data=REFUSED, rank=4, task_rank=0))],
    ),
    "fewer directions than the rank": (
        lambda at: at.trainer(SaLoRA(safety_data=REFUSED[:1], rank=28, task_rank=0), peft_config=on("down_proj")),
        "Give more rows, or lower `rank`",
        [
            lambda at: at.trainer(SaLoRA(safety_data=REFUSED, rank=28, task_rank=0), peft_config=on("down_proj")),
            lambda at: at.trainer(SaLoRA(safety_data=REFUSED[:1], rank=4, task_rank=0)),
        ],
    ),
    "answers that are all opening": (
        lambda at: at.trainer(ConstrainedSFT(), train_dataset=SHORT_ANSWERS),
        "Use another method, or lower `opening_tokens`",
        [lambda at: at.trainer(PLAIN, train_dataset=SHORT_ANSWERS), lambda at: at.trainer(ConstrainedSFT(1))],
    ),
    "an opening of the prompt": (
        lambda at: at.trainer(ConstrainedSFT(), train_dataset=MESSAGES),
        "Give rows with `prompt` and `completion`, or set `assistant_only_loss=True`",
        [
            lambda at: at.trainer(ConstrainedSFT()),
            lambda at: at.trainer(ConstrainedSFT(), train_dataset=MESSAGES, assistant_only_loss=True),
        ],
    ),
    "openings of the template's own": (
        lambda at: at.trainer(ConstrainedSFT(), processing_class=foreword()),
        "Raise `opening_tokens` to 10",
        [lambda at: at.trainer(ConstrainedSFT(opening_tokens=10), processing_class=foreword())],
    ),
    "rows outside the chat template": (
        lambda at: at.trainer(PLAIN, train_dataset=STRINGS),
        "Give rows as `messages`, or with turns as `prompt` and `completion`, such as `load_rows` returns",
        [
            lambda at: at.trainer(PLAIN, train_dataset=MESSAGES),
            lambda at: at.trainer(PLAIN),
            lambda at: at.trainer(PLAIN, train_dataset=load_rows(STRINGS)[0]),
        ],
    ),
    "weights that a method does not reach": (
        lambda at: at.trainer(PLAIN, peft_config=lora(modules_to_save=["embed_tokens"])),
        "Train linear layers only",
        [lambda at: at.trainer(PLAIN, peft_config=lora())],
    ),
    "vectors that do not reach their target": (
        lambda at: at.trainer(SecurityVectors(harmful_data=HARMFUL, fitting=SHORT), model=loud(at)),
        "Raise `max_passes`, `learning_rate` or `rank` in `fitting`",
        [lambda at: at.trainer(SecurityVectors(harmful_data=HARMFUL, fitting=LONGER), model=loud(at))],
    ),
    "vectors of a few rows": (
        lambda at: at.trainer(SecurityVectors(harmful_data=HARMFUL, fitting=SHORT)),
        "Give about 100 as `harmful_data`",
        [lambda at: at.trainer(SecurityVectors(harmful_data=MANY, fitting=SHORT))],
    ),
    "vectors of layers that training computes past": (
        lambda at: fitted(at),
        "Fit vectors to the other layers, with `target_modules` in `fitting`",
        [lambda at: fitted(at, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"])],
    ),
    "a turn that the template leaves out": (
        lambda at: SafetyBasis.from_rows(of(at.aligned), deaf(), WITH_SYSTEM, rank=2),
        "Give rows without it, or another chat template",
        [
            lambda at: SafetyBasis.from_rows(of(at.aligned), deaf(), REFUSED, rank=2),
            lambda at: SafetyBasis.from_rows(of(at.aligned), tiny.tokenizer(), WITH_SYSTEM, rank=2),
        ],
    ),
    "a best checkpoint that may not hold the minimum": (
        lambda at: monitored(at, 9, BEST, minimum_rate=0.5),
        "and it may not hold `minimum_rate=0.5`. Remove `load_best_model_at_end`",
        [lambda at: monitored(at, 9, minimum_rate=0.5)],
    ),
    "another template than in training": (
        lambda at: (deaf().save_pretrained(at.adapter()), compared(at, {"after": at.folder / "adapter"})),
        "Load the tokenizer from `",
        [
            lambda at: compared(
                at,
                {"after": at.folder / "adapter"},
                tokenizer=AutoTokenizer.from_pretrained(at.folder / "adapter"),
            )
        ],
    ),
}
