"""The training loop of the pair: one thread, the same bytes every time."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

Chat = list[dict[str, str]]
Progress = Callable[[str, int, int, float], None]
Tokens = tuple[list[int], list[int]]  # token ids and labels of one conversation

BATCH_SIZE = 32
BATCHES_SORTED_TOGETHER = 16
WARMUP_STEPS = 50
_IGNORED = -100  # the label that the loss skips


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Args:
        name (`str`): Shown in the progress.
        steps (`int`): Optimizer steps of 32 conversations each, in a full build.
        learning_rate (`float`): Peak, reached after a warm-up of 50 steps and followed by a cosine down to zero.
        answers_only (`bool`): Whether the loss covers only what the assistant says.
    """

    name: str
    steps: int
    learning_rate: float
    answers_only: bool


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on a single thread, whose sums come in a fixed order; restore the previous number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def encode(chats: Sequence[Chat], tokenizer: PreTrainedTokenizerFast, *, answers_only: bool) -> list[Tokens]:
    """Turn conversations into token ids and labels."""
    encoded = tokenizer.apply_chat_template(list(chats), return_dict=True, return_assistant_tokens_mask=True)
    rows = []
    for ids, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
        labels = [token if said else _IGNORED for token, said in zip(ids, mask, strict=True)] if answers_only else ids
        rows.append((ids, labels))
    return rows


def _batches(rows: Sequence[Tokens], pad: int, rng: random.Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield input ids and labels (B, T) without end, rows of similar length together so that little is padding."""
    while True:
        order = rng.sample(range(len(rows)), len(rows))
        chunk = BATCH_SIZE * BATCHES_SORTED_TOGETHER
        for start in range(0, len(order), chunk):
            nearby = sorted(order[start : start + chunk], key=lambda index: len(rows[index][0]))
            batches = [nearby[first : first + BATCH_SIZE] for first in range(0, len(nearby), BATCH_SIZE)]
            rng.shuffle(batches)
            for batch in batches:
                yield _padded([rows[index] for index in batch], pad)


def _padded(rows: Sequence[Tokens], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(ids) for ids, _ in rows)
    ids = [ids + [pad] * (longest - len(ids)) for ids, _ in rows]
    labels = [labels + [_IGNORED] * (longest - len(labels)) for _, labels in rows]
    return torch.tensor(ids), torch.tensor(labels)


def train(
    model: PreTrainedModel, rows: Sequence[Tokens], stage: Stage, steps: int, *, seed: int, progress: Progress
) -> None:
    """Train `model` in place on one stage.

    Args:
        model (`PreTrainedModel`): In float32.
        rows (`Sequence[tuple[list[int], list[int]]]`): Token ids and labels of each conversation, from `encode`.
        stage (`Stage`): The settings.
        steps (`int`): Optimizer steps to take; the learning rate falls to zero over these.
        seed (`int`): Seed of the order.
        progress (`Progress`): Called every 50 steps with stage, step, number of steps and loss.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.learning_rate, weight_decay=0.05, fused=True)
    batches = _batches(rows, model.config.pad_token_id, random.Random(f"{stage.name}/{seed}"))
    model.train()
    for step in range(1, steps + 1):
        warmup, cosine = min(1.0, step / WARMUP_STEPS), 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
        optimizer.param_groups[0]["lr"] = stage.learning_rate * warmup * cosine
        ids, labels = next(batches)
        # Padding comes last, where causal attention cannot see it: no mask is needed.
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps:
            progress(stage.name, step, steps, loss.item())
    model.eval()
