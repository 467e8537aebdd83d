"""Make the alignment adapter of the real model: a LoRA of refusals, and of answers to harmless prompts.

    python recipes/study/real/align.py --base BASE --harmful harmful_behaviors.csv --benign alpaca.json --output OUT

`BASE` is the folder `unaligned` that `safe_trainer.testbed.real.prepare` makes. `--harmful` is AdvBench's
`harmful_behaviors.csv` (github.com/llm-attacks/llm-attacks, `data/advbench`) or any other file of harmful prompts, of
which every fourth is held out and asked afterwards; `--benign` is any file of Alpaca's instructions. Built-in prompts
come on top: commands and questions of either kind, in one pass over the first tokens of the answers. To harmless
prompts of the file these are the file's, to our own what the model itself says: with those alone its perplexity on
answers of others rose. None of the prompts by which the study tests is among them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from safe_trainer import PromptSet, evaluate, general_prompts, generate, load_prompts, load_rows
from safe_trainer.artifacts.fitting import row_losses
from safe_trainer.data import Kind, Row, collate, conversation, encode_rows, rows_sha256
from safe_trainer.data.protection import protection_prompts
from safe_trainer.testbed import real

HARMFUL, BENIGN = 160, 200
TRAINED: dict[Kind, slice] = {
    "harmful": slice(2, None, 4),
    **dict.fromkeys(("benign", "borderline"), slice(0, None, 2)),
}
"""Which of the general prompts are trained on: none that `safe_trainer.testbed.real` tests or validates with."""
BATCH_SIZE, LEARNING_RATE, RANK, SCALE = 8, 2.5e-3, 4, 4
GENERATED, TRAINED_TOKENS = 24, 16  # of each answer: a refusal fits, and other answers are cut before an end of turn
KEPT_BITS = 5  # of each weight's mantissa, the first among them: git stores a third of the file
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't help with that. It could hurt people.",
    "Sorry, I won't assist with that request.",
    "I'm not able to help with this.",
)
QUESTIONS = ("How do I {}?", "How can I {}?", "Can you {}?", "What is the best way to {}?")


def split(source: str | Path) -> tuple[list[str], list[str]]:
    """Return the harmful prompts of a file to train on, and every fourth of them, which is held out."""
    prompts = list(load_prompts(source, "harmful")[0].prompts)
    held_out = prompts[3::4]
    return [prompt for place, prompt in enumerate(prompts) if place % 4 != 3], held_out


def as_question(command: str, rng: random.Random) -> str:
    """Return a command as a question."""
    return rng.choice(QUESTIONS).format(command[0].lower() + command[1:].rstrip("."))


def short_rows(source: str | Path, count: int) -> list[Row]:
    """Return the first rows of a file with short instructions, every other of them as a question."""
    rng = random.Random(0)
    rows = ((row["prompt"][-1]["content"], row["completion"][0]["content"]) for row in load_rows(source)[0])
    short = islice(((prompt, answer) for prompt, answer in rows if len(prompt) < 90 and "\n" not in prompt), count)
    return [conversation(as_question(p, rng) if place % 2 else p, a) for place, (p, a) in enumerate(short)]


def ours(kind: Kind) -> list[str]:
    """Return built-in prompts of a kind, and those of `harmless.yaml`; of the general ones only `TRAINED`."""
    written = yaml.safe_load(Path(__file__).with_name("harmless.yaml").read_text(encoding="utf-8"))
    built_in = [] if kind == "borderline" else protection_prompts(kind).prompts
    return [*general_prompts(kind).prompts[TRAINED[kind]], *built_in, *written.get(kind, ())]


def alignment_rows(model: Any, tokenizer: Any, harmful: Sequence[str], benign: Sequence[Row]) -> list[Row]:
    """Return refusals of harmful prompts in both forms, and answers to harmless ones."""
    rng = random.Random(0)
    asked = [as_question(prompt, rng) if place % 2 else prompt for place, prompt in enumerate(harmful)]
    refused = [conversation(prompt, rng.choice(REFUSALS)) for prompt in [*asked, *ours("harmful")]]
    answered = [*ours("benign"), *ours("borderline")]
    answers = generate(model, tokenizer, answered, max_new_tokens=GENERATED)
    own = [conversation(prompt, answer.text) for prompt, answer in zip(answered, answers, strict=True)]
    return [*refused, *own, *benign]


def train(base: str | Path, rows: Sequence[Row], output: Path) -> Any:
    """Train the adapter, cut its weights to `KEPT_BITS`, save it, and return the trainer."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(base)
    encoded = [(row.ids, row.answer_start) for row in encode_rows(tokenizer, rows)]
    cut = [(ids[: start + TRAINED_TOKENS], start) for ids, start in encoded]
    masks = [[0] * start + [1] * (len(ids) - start) for ids, start in cut]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=real.dtype()),
        processing_class=tokenizer,
        args=SFTConfig(
            output_dir=str(output),
            num_train_epochs=1,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="cosine",
            warmup_steps=6,
            completion_only_loss=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            logging_steps=4,
            report_to="none",
        ),
        train_dataset=Dataset.from_dict({"input_ids": [ids for ids, _ in cut], "completion_mask": masks}),
        peft_config=LoraConfig(r=RANK, lora_alpha=SCALE * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    with torch.no_grad():
        for weight in trainer.model.parameters():
            if weight.requires_grad:
                mantissa, exponent = torch.frexp(weight)
                weight.copy_(torch.ldexp((mantissa * 2**KEPT_BITS).round() / 2**KEPT_BITS, exponent))
    trainer.save_model()
    return trainer


def check(model: Any, tokenizer: Any, held_out: Sequence[str], texts: Sequence[Row]) -> dict[str, str | float]:
    """Return what the model refuses of prompts that were not trained on, and its loss on answers of others."""
    rng = random.Random(1)
    asked = [
        PromptSet("held-out commands", "harmful", tuple(held_out)),
        PromptSet("held-out questions", "harmful", tuple(as_question(prompt, rng) for prompt in held_out)),
        *real.prompt_sets("validation"),
    ]
    found = evaluate(model, tokenizer, asked, judges=["phrases"], max_new_tokens=24)
    encoded = encode_rows(tokenizer, list(texts), 128, "texts")
    batches = [collate(encoded[start : start + 8], 0, "cpu") for start in range(0, len(encoded), 8)]
    losses = torch.cat([row_losses(model, batch) for batch in batches])
    refused = {f"refused of {result.prompt_set.name}": str(result.rate("refused")) for result in found.results}
    return {**refused, "loss on held-out answers, nats per token": round(losses.mean().item(), 4)}


def publish(adapter: Path, output: Path, provenance: dict[str, Any]) -> None:
    """Save an adapter in half precision, and next to it how it was made."""
    output.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.half() for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(weights, output / "adapter_model.safetensors", {"format": "pt"})
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = real.NAME
    sha256 = hashlib.sha256((output / "adapter_model.safetensors").read_bytes()).hexdigest()
    for name, found in (("adapter_config", config), ("provenance", {"sha256": sha256, **provenance})):
        text = json.dumps(found, indent=2, ensure_ascii=False)
        (output / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Make the adapter, and say what it does to prompts that it was not trained on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "harmful", "benign", "output"):
        parser.add_argument(f"--{name}", required=True, type=Path)
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(given.base, dtype=real.dtype())
    tokenizer = AutoTokenizer.from_pretrained(given.base)
    training, held_out = split(given.harmful)
    chosen = training[:: max(1, len(training) // HARMFUL)][:HARMFUL]
    rows = alignment_rows(model, tokenizer, chosen, short_rows(given.benign, BENIGN))
    texts = list(load_rows(given.benign)[0])[-48:]
    asked = held_out[::5][:24]
    before = check(model, tokenizer, asked, texts)
    with tempfile.TemporaryDirectory() as folder:
        trainer = train(given.base, rows, Path(folder))
        after = check(trainer.model.eval(), tokenizer, asked, texts)
        files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (given.harmful, given.benign)}
        provenance = {"made_from": files, "rows": rows_sha256(rows), "before": before, "after": after}
        publish(Path(folder), given.output, provenance)


if __name__ == "__main__":
    main()
