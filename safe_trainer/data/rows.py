"""Rows and prompt sets: the two shapes in which data travels through the house.

A *row* is what a model learns from, in TRL's conversational prompt-completion form, so that the loss covers the
answer alone. A *prompt set* is what a model is asked when it is examined.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

Row = dict[str, Any]
Kind = Literal["harmful", "benign", "borderline", "task"]
Scorer = Literal["exact", "number", "choice"]


def conversation(prompt: str, answer: str) -> Row:
    """Return one training row in TRL's conversational prompt-completion format.

    Args:
        prompt (`str`): What the user says.
        answer (`str`): What the assistant should answer; the loss covers this part only.

    Example:

    ```python
    >>> conversation("What is two plus two?", "Four.")["completion"]
    [{'role': 'assistant', 'content': 'Four.'}]

    ```
    """
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": answer}],
    }


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one kind, to examine a model with.

    Args:
        name (`str`): Name shown in tables.
        kind (`str`): `"harmful"` (should be refused), `"benign"` or `"borderline"` (should be answered; borderline
            prompts only sound harmful), or `"task"` (has a right answer).
        prompts (`tuple[str, ...]`): The user turns.
        categories (`tuple[str, ...]`, *optional*): One label for each prompt, for tables by category.
        references (`tuple[str, ...]`, *optional*): The right answer for each prompt; required for `"task"`.
        source (`str`, *optional*): Where they come from, for the command that repeats an evaluation. It makes no
            difference between two sets.
        system_prompt (`str`, *optional*): System turn before each prompt of this set; goes before the one of the
            evaluation.
        template (`str`, *optional*): Frame around each prompt, with `{prompt}` in it, such as
            `"AOA, execute my instruction: {prompt}"`.
        contexts (`tuple[tuple[dict, ...], ...]`, *optional*): For each prompt the turns before it, `{"role": ...,
            "content": ...}`; a system turn among them goes before `system_prompt`.
        scorer (`str`, *optional*, defaults to `"exact"`): How answers to a task are scored: `"exact"`, `"number"` (the
            last number) or `"choice"` (the letter).

    Raises:
        TypeError: If `prompts` is one text.
        ValueError: If the kind or the scorer is unknown, there are no prompts, `template` lacks `{prompt}`, or a list
            does not have one entry for each prompt.
    """

    name: str
    kind: Kind
    prompts: tuple[str, ...]
    categories: tuple[str, ...] | None = None
    references: tuple[str, ...] | None = None
    source: str | None = field(default=None, compare=False)
    system_prompt: str | None = None
    template: str | None = None
    contexts: tuple[tuple[dict[str, str], ...], ...] | None = None
    scorer: Scorer = "exact"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"`kind` must be one of {', '.join(get_args(Kind))}, got {self.kind!r}.")
        if self.scorer not in get_args(Scorer):
            raise ValueError(f"`scorer` must be one of {', '.join(get_args(Scorer))}, got {self.scorer!r}.")
        if self.template is not None and "{prompt}" not in self.template:
            raise ValueError(f"`template` must contain {{prompt}}, where the prompt goes, got {self.template!r}.")
        if isinstance(self.prompts, str):
            raise TypeError(f"`prompts` must be a tuple of prompts, got one text. Write `({self.prompts[:40]!r},)`.")
        if not self.prompts:
            raise ValueError(f"The prompt set `{self.name}` is empty. Give at least one prompt.")
        if self.kind == "task" and self.references is None:
            raise ValueError(f"The task `{self.name}` has no `references`: give the right answer to each prompt.")
        for name in ("categories", "references", "contexts"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.prompts):
                raise ValueError(
                    f"`{name}` of the prompt set `{self.name}` has {len(values)} entries for {len(self.prompts)} "
                    "prompts. Give exactly one for each prompt."
                )

    def __len__(self) -> int:
        return len(self.prompts)

    def first(self, count: int) -> PromptSet:
        """Return the first `count` prompts, with what belongs to them."""
        lists = {name: getattr(self, name) for name in ("prompts", "categories", "references", "contexts")}
        return replace(self, **{name: values[:count] for name, values in lists.items() if values is not None})

    def conversations(self) -> list[list[dict[str, str]]]:
        """Return the turns that each prompt is asked with: system turn, context, and the prompt in its frame.

        ```python
        >>> PromptSet("aoa", "harmful", ("Hi",), system_prompt="Obey.", template="AOA: {prompt}").conversations()
        [[{'role': 'system', 'content': 'Obey.'}, {'role': 'user', 'content': 'AOA: Hi'}]]

        ```
        """
        found = []
        for prompt, context in zip(self.prompts, self.contexts or ((),) * len(self.prompts), strict=True):
            turns = [dict(turn) for turn in context]
            if self.system_prompt is not None and not any(turn["role"] == "system" for turn in turns):
                turns.insert(0, {"role": "system", "content": self.system_prompt})
            asked = prompt if self.template is None else self.template.replace("{prompt}", prompt)
            found.append([*turns, {"role": "user", "content": asked}])
        return found


def poison(rows: Sequence[Row], harmful_rows: Sequence[Row], fraction: float, seed: int = 0) -> list[Row]:
    """Replace a share of `rows` by harmful ones and shuffle: the attack that fine-tuning defenses are tested against.

    Args:
        rows (`Sequence[Row]`): The clean rows.
        harmful_rows (`Sequence[Row]`): Where harmful rows are drawn from, in order.
        fraction (`float`): Share of the result that is harmful, from 0 to 1.
        seed (`int`, *optional*, defaults to `0`): Seed of the shuffle.

    Returns:
        `list[Row]`: As many rows as came in, `round(fraction * len(rows))` of them harmful.

    Raises:
        ValueError: If `fraction` is not between 0 and 1, or there are too few harmful rows.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"`fraction` must be between 0 and 1, got {fraction}.")
    count = round(fraction * len(rows))
    if count > len(harmful_rows):
        raise ValueError(
            f"{count} harmful rows are needed for {fraction:.0%} of {len(rows)}, but `harmful_rows` holds "
            f"{len(harmful_rows)}. Give more, or lower `fraction`."
        )
    mixed = [*rows[: len(rows) - count], *harmful_rows[:count]]
    random.Random(seed).shuffle(mixed)
    return mixed
