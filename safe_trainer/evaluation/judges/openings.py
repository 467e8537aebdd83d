"""How likely is it that an answer starts with one of these words? Read off the model without generating."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

# A branch that the model takes less often than this is not followed: its whole probability is below the threshold,
# so that a group's probability is at most too small by this much for each branch that was left.
NEGLIGIBLE = 1e-3


@dataclass
class Node:
    """A place in the tree of openings: which groups have an opening that ends here, and which tokens go on."""

    ends: set[int] = field(default_factory=set)
    children: dict[int, Node] = field(default_factory=dict)


def tree(tokenizer: Any, groups: Sequence[Sequence[str]]) -> Node:
    """Put all openings into one tree of tokens, so that a common beginning is read once.

    An opening that continues a shorter one of its group is left out: the shorter one's probability contains its own.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Cuts the openings into tokens.
        groups (`Sequence[Sequence[str]]`): Openings, group by group.
    """
    root = Node()
    for number, openings in enumerate(groups):
        encoded = (tokenizer(opening, add_special_tokens=False)["input_ids"] for opening in openings)
        for ids in sorted(encoded, key=len):
            node = root
            for token in ids:
                if number in node.ends:
                    break
                node = node.children.setdefault(token, Node())
            if ids:
                node.ends.add(number)
    return root


def log_probabilities(model: Any, batch: Sequence[Sequence[int]], root: Node, groups: int) -> list[list[float]]:
    """Return log P(the answer starts with an opening of the group) for each prompt and group.

    The prompts are read once. Then the tree is walked level by level, one token for each branch that matters, with the
    prompt's cache behind it.

    Args:
        model (`PreTrainedModel` or `PeftModel`): A causal model, in evaluation mode.
        batch (`Sequence[Sequence[int]]`): Token ids of each prompt, up to the opening of the assistant's turn.
        root (`Node`): The openings, from [`tree`].
        groups (`int`): How many groups there are.

    Raises:
        FloatingPointError: If the model computes NaN.
    """
    import torch

    longest = max(len(ids) for ids in batch)
    prompts = torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in batch], device=model.device)  # (B, T)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in batch], device=model.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = [[-math.inf] * groups for _ in batch]
    live = [(row, root, 0.0) for row in range(len(batch))]  # prompt, place in the tree, log P of the way there
    with torch.no_grad():
        read = model(input_ids=prompts, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
        position = positions[:, -1:]
        while True:
            scores = read.logits[:, -1].float().log_softmax(-1)  # (live branches, V)
            if scores.isnan().any():
                raise FloatingPointError("The model's logits are NaN, so nothing can be said about its answers.")
            steps = _steps(live, scores, found)
            if not steps:
                return found
            rows = torch.tensor([row for row, *_ in steps], device=model.device)
            mask = torch.cat([mask[rows], mask.new_ones(len(steps), 1)], dim=-1)
            position = position[rows] + 1
            cache = read.past_key_values
            cache.batch_select_indices(rows)
            live = [(live[row][0], node, likelihood) for row, _, node, likelihood in steps]
            read = model(
                input_ids=torch.tensor([[token] for _, token, *_ in steps], device=model.device),
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
            )


def _steps(
    live: list[tuple[int, Node, float]], scores: Any, found: list[list[float]]
) -> list[tuple[int, int, Node, float]]:
    """Take one token down each branch: book the openings that end, and return the branches that go on."""
    steps = []
    for row, (prompt, node, before) in enumerate(live):
        for token, child in node.children.items():
            likelihood = before + float(scores[row, token])
            for group in child.ends:
                found[prompt][group] = _log_add(found[prompt][group], likelihood)
            if child.children and likelihood > math.log(NEGLIGIBLE):
                steps.append((row, token, child, likelihood))
    return steps


def _log_add(a: float, b: float) -> float:
    """Return log(exp(a) + exp(b)) without leaving the range of floats."""
    high, low = max(a, b), min(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))
