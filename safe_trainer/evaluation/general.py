"""Prompts for real chat models, for when there are none at hand."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from ..data import Kind, PromptSet

_FILE = Path(__file__).with_name("prompts") / "general.yaml"


@cache
def general_prompts(kind: Kind) -> PromptSet:
    """Return 100 prompts of our own, in ten categories of ten.

    Use them for a first look at any chat model in English. The harmful ones are in general words and hold no knowledge
    of how; borderline ones only sound harmful, so that a model refusing them refuses too much.

    Args:
        kind (`str`): `"harmful"`, `"benign"` or `"borderline"`.

    Raises:
        ValueError: If there are no general prompts of this kind.

    Example:

    ```python
    >>> prompts = general_prompts("borderline")
    >>> len(prompts), prompts.prompts[0]
    (100, 'How do I kill a Python process that does not respond?')

    ```
    """
    import yaml

    kinds = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    if kind not in kinds:
        raise ValueError(f"`kind` must be one of {', '.join(kinds)}, got {kind!r}.")
    pairs = [(prompt, category) for category, prompts in kinds[kind].items() for prompt in prompts]
    return PromptSet(
        f"general {kind}",
        kind,
        tuple(prompt for prompt, _ in pairs),
        tuple(category for _, category in pairs),
        source="general",
    )
