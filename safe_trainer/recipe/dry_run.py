"""What a recipe would do: rows, tokens, steps, parameters, memory and time, without training anything."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from typing import Any

from ..evaluation import Rate
from .load import Recipe
from .model import adapted, arguments, skeleton
from .sources import LoadedData, count_tokens, load_data

_BYTES = {"4bit": 0.5, "8bit": 1.0, "float32": 4.0, "bfloat16": 2.0, "float16": 2.0}


@dataclass(frozen=True)
class Plan:
    """What a run would take.

    Args:
        rows (`int`): Training rows in an epoch.
        eval_rows (`int`): Rows whose loss is taken while training.
        tokens (`int`): Their tokens, cut at `max_length`; an estimate if there are more than 2,000 rows.
        cut (`Rate`): How many of the rows looked at are cut off at `max_length`.
        learned (`Rate`, *optional*): How many of the answers' tokens in them the loss covers, where it can be known.
        lost (`Rate`): How many of them have their answer cut off completely.
        steps (`int`): Optimizer steps of the whole run.
        processes (`int`): Processes that train together.
        learning_rate (`float`): The peak learning rate.
        parameters (`int`): Weights of the base model.
        trainable (`int`): Weights that are trained.
        memory (`int`): Estimated bytes that one process needs for weights, gradients, optimizer and activations.
        seconds (`float`): Estimated time on this machine, from the speed of its matrix products.
        messages (`tuple[str, ...]`): What to know about the tokens before training.
    """

    rows: int
    eval_rows: int
    tokens: int
    cut: Rate
    learned: Rate | None
    lost: Rate
    steps: int
    processes: int
    learning_rate: float
    parameters: int
    trainable: int
    memory: int
    seconds: float
    messages: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON; the tokens' share without an interval, since tokens of a row go together."""
        found = {**vars(self), "cut": self.cut.to_dict(), "lost": self.lost.to_dict()}
        if self.learned is not None:
            found["learned"] = {key: self.learned.to_dict()[key] for key in ("count", "total", "rate")}
        return found


def plan(recipe: Recipe, loaded: LoadedData | None = None) -> Plan:
    """Work out what a recipe would do; loads data, tokenizer and the model's configuration, not its weights.

    Raises:
        RecipeError: If the recipe does not fit its model.
        ValueError: If the data cannot be read, or would teach nothing.
    """
    loaded = loaded or load_data(recipe)
    args = arguments(recipe)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    counted = count_tokens(recipe, loaded, args)
    kept = [min(length, counted.limit) for length in counted.lengths]
    tokens = round(sum(kept) / len(kept) * len(loaded.rows))
    packed = args.max_length if args.packing else None
    steps, epochs = _steps(args, math.ceil(tokens / packed) if packed else len(loaded.rows), processes)
    model = skeleton(recipe)
    parameters = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in adapted(recipe, model).parameters() if p.requires_grad)
    # Forward, and backward through the activations; the gradient of the weights only where they are trained.
    products = 2 * tokens * epochs * (2 * parameters + trainable)
    frozen = 0 if recipe.peft is None else parameters
    return Plan(
        rows=len(loaded.rows),
        eval_rows=0 if loaded.eval_rows is None else len(loaded.eval_rows),
        tokens=tokens,
        cut=Rate(sum(length > counted.limit for length in counted.lengths), len(kept)),
        learned=Rate(counted.learned, counted.answers) if counted.answers else None,
        lost=Rate(len(counted.lost), len(kept)),
        steps=steps,
        processes=processes,
        learning_rate=args.learning_rate,
        parameters=parameters,
        trainable=trainable,
        memory=_memory(recipe, args, model.config, frozen, trainable, int(packed or max(kept))),
        seconds=products / _speed(args.device) / processes,
        messages=tuple(counted.messages()),
    )


def _steps(args: Any, sequences: int, processes: int) -> tuple[int, float]:
    """Return the number of optimizer steps, and of epochs, as the trainer counts them."""
    batches = math.ceil(sequences / (args.per_device_train_batch_size * processes))
    each = math.ceil(batches / args.gradient_accumulation_steps)
    if args.max_steps > 0:
        return args.max_steps, args.max_steps / each
    return math.ceil(each * args.num_train_epochs), args.num_train_epochs


def _memory(recipe: Recipe, args: Any, config: Any, frozen: int, trainable: int, length: int) -> int:
    """Estimate bytes: weights, their gradients, Adam's two moments, and what the backward pass needs to remember."""
    text = config.get_text_config()  # of a model for images and text, the part that reads text
    stored = str(recipe.parts.model.quantization or recipe.parts.model.dtype)
    if stored == "auto":
        stored = str(getattr(config, "dtype", None) or getattr(text, "dtype", None) or "float32").removeprefix(
            "torch."
        )
    # About 17 numbers of the hidden size for each token and layer, or one where they are computed a second time.
    kept = 1 if args.gradient_checkpointing else 17
    tokens = args.per_device_train_batch_size * length
    activations = kept * tokens * text.hidden_size * text.num_hidden_layers * (2 if args.bf16 or args.fp16 else 4)
    return int(frozen * _BYTES.get(stored, 4.0) + trainable * 16 + activations)


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
