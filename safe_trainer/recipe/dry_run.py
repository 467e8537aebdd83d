"""What a recipe would do: rows, tokens, steps, parameters, memory and time, without training anything."""

from __future__ import annotations

import math
import os
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .fitting import adapted, skeleton
from .load import Recipe
from .run import arguments
from .sources import LoadedData, load_data

if TYPE_CHECKING:
    from datasets import Dataset

SAMPLE = 2000
_BYTES = {"4bit": 0.5, "8bit": 1.0, "float32": 4.0, "bfloat16": 2.0, "float16": 2.0}


@dataclass(frozen=True)
class Plan:
    """What a run would take.

    Args:
        rows (`int`): Training rows in an epoch.
        tokens (`int`): Their tokens, cut at `max_length`; an estimate if there are more than 2,000 rows.
        cut (`float`): Share of the rows that are cut at `max_length`.
        steps (`int`): Optimizer steps of the whole run.
        processes (`int`): Processes that train together.
        parameters (`int`): Weights of the base model.
        trainable (`int`): Weights that are trained.
        memory (`int`): Estimated bytes that one process needs for weights, gradients, optimizer and activations.
        seconds (`float`): Estimated time on this machine, from the speed of its matrix products.
    """

    rows: int
    tokens: int
    cut: float
    steps: int
    processes: int
    parameters: int
    trainable: int
    memory: int
    seconds: float


def plan(recipe: Recipe, loaded: LoadedData | None = None) -> Plan:
    """Work out what a recipe would do; loads the tokenizer and the model's configuration, not its weights."""
    loaded = loaded or load_data(recipe)
    args = arguments(recipe)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    lengths = _lengths(recipe, loaded.rows)
    limit = args.max_length or math.inf
    mean = sum(min(length, limit) for length in lengths) / len(lengths)
    tokens = round(mean * len(loaded.rows))
    sequences = math.ceil(tokens / args.max_length) if args.packing and args.max_length else len(loaded.rows)
    steps, epochs = _steps(args, sequences, processes)
    config, parameters, trainable = _parameters(recipe)
    seen = tokens * epochs
    # Forward, and backward through the activations; the gradient of the weights only where they are trained.
    products = 2 * seen * (2 * parameters + trainable)
    width = args.max_length if args.packing and args.max_length else min(max(lengths), limit)
    memory = _memory(recipe, args, config, (parameters, trainable), int(width))
    return Plan(
        len(loaded.rows),
        tokens,
        sum(length > limit for length in lengths) / len(lengths),
        steps,
        processes,
        parameters,
        trainable,
        memory,
        products / _speed(args.device) / processes,
    )


def _lengths(recipe: Recipe, rows: Dataset) -> list[int]:
    """Return how many tokens the rows have, or a fair sample of them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(recipe.parts.model.path, revision=recipe.parts.model.revision)
    if len(rows) > SAMPLE:
        rows = rows.select(sorted(random.Random(0).sample(range(len(rows)), SAMPLE)))
    lengths = []
    for row in rows:
        text = row["text"] if "text" in row else tokenizer.apply_chat_template(_turns(row), tokenize=False)
        lengths.append(len(tokenizer(text, add_special_tokens="text" in row)["input_ids"]))
    return lengths


def _turns(row: dict[str, Any]) -> list[dict[str, str]]:
    turns: list[dict[str, str]] = row["prompt"] + row["completion"]
    return turns


def _steps(args: Any, sequences: int, processes: int) -> tuple[int, float]:
    """Return the number of optimizer steps, and of epochs, as the trainer counts them."""
    batches = math.ceil(sequences / (args.per_device_train_batch_size * processes))
    each = math.ceil(batches / args.gradient_accumulation_steps)
    if args.max_steps > 0:
        return args.max_steps, args.max_steps / each
    return math.ceil(each * args.num_train_epochs), args.num_train_epochs


def _parameters(recipe: Recipe) -> tuple[Any, int, int]:
    """Return the configuration of a model, and how many weights it has and will be trained."""
    model = skeleton(recipe)
    parameters = sum(p.numel() for p in model.parameters())
    trained = adapted(recipe, model)
    return model.config, parameters, sum(p.numel() for p in trained.parameters() if p.requires_grad)


def _memory(recipe: Recipe, args: Any, config: Any, sizes: tuple[int, int], length: int) -> int:
    """Estimate bytes: weights, their gradients, Adam's two moments, and what the backward pass needs to remember."""
    parameters, trainable = sizes
    stored: str = recipe.parts.model.quantization or recipe.parts.model.dtype
    if stored == "auto":
        stored = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    wide = 2 if args.bf16 or args.fp16 else 4
    tokens = args.per_device_train_batch_size * length
    # About 17 numbers of the hidden size for each token and layer, or one where they are computed a second time.
    kept = 1 if args.gradient_checkpointing else 17
    activations = kept * tokens * config.hidden_size * config.num_hidden_layers * wide
    frozen = 0 if recipe.peft is None else parameters * _BYTES.get(stored, 4.0)
    return int(frozen + trainable * 16 + activations)


def _speed(device: Any) -> float:
    """Return how many operations a second this machine does, at 40 % of what matrix products alone reach."""
    import torch

    matrix = torch.randn(1024, 1024, device=device)
    (matrix @ matrix).sum().item()
    start, rounds = time.perf_counter(), 0
    while time.perf_counter() - start < 0.2:
        (matrix @ matrix).sum().item()  # `item` waits for the result on a GPU
        rounds += 1
    return 0.4 * rounds * 2 * 1024**3 / (time.perf_counter() - start)
