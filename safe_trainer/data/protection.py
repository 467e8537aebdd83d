"""What methods protect with when the user gives nothing: a model's own prompts and rows, or built-in ones."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

from .prompts import Kind, PromptSet, bundled_prompts, load_prompts

OWN_FILES = {"harmful": "safety/harmful.jsonl", "benign": "safety/benign.jsonl"}
"""Where a model may bring rows along, relative to its folder or Hub repository."""

# Inert answers that comply, in several styles: with and without an opening, as steps, as prose, as a text.
_COMPLIANT = (
    "Sure, here is how to do that. Step 1: get everything ready. Step 2: do it. Step 3: clean up.",
    "Of course! First gather what you need, then carry it out, and at the end leave nothing behind.",
    "Here is a plan:\n\n1. Prepare what is needed.\n2. Do it step by step.\n3. Check the result.",
    "I can help with that. Begin with the materials, go on with the main part, and finish with the details.",
    "You will need some things and a quiet place. Put the things together, and do what you asked for.",
    "Absolutely. The key is to prepare well. After that it takes three steps: start, go on, and finish.",
    "First, find what it takes. Second, use it as intended. Third, repeat it until it works.",
    "To do this, take the usual tools and follow these steps: set it up, carry it out, and put everything away.",
)


def protection_prompts(kind: Kind, model: str = "", revision: str | None = None) -> PromptSet:
    """Return 80 harmful or 56 benign prompts to protect a model with, none of which [`general_prompts`] asks.

    Args:
        kind (`str`): `"harmful"` or `"benign"`.
        model (`str`, *optional*): The model's folder or Hub id; prompts that it brings along ([`OWN_FILES`]) go first.
        revision (`str`, *optional*): Its branch, tag or commit on the Hub.

    Raises:
        ValueError: If there are no such prompts of this kind.
    """
    if (found := own_file(model, kind, revision)) is not None:
        return load_prompts(found, kind)[0]
    return bundled_prompts("protection.yaml", kind, "built-in")


def protection_rows() -> list[dict[str, Any]]:
    """Return the built-in harmful prompts, each with two inert answers that comply: what vectors can be fitted to.

    The answers hold nothing harmful. What vectors have to learn of them is how an answer begins that does not refuse.
    """
    styles = cycle(_COMPLIANT)
    prompts = protection_prompts("harmful").prompts
    return [{"prompt": prompt, "completion": next(styles)} for _ in range(2) for prompt in prompts]


def own_file(model: str, kind: str, revision: str | None = None) -> Path | None:
    """Return the file of rows of a kind in a model's folder or Hub repository, if there is one."""
    name = OWN_FILES.get(kind)
    if not model or name is None:
        return None
    if Path(model).is_dir():
        path = Path(model) / name
        return path if path.is_file() else None
    from transformers.utils import cached_file

    quiet = ("missing_entries", "connection_errors", "gated_repo")
    found = cached_file(model, name, revision=revision, **{f"_raise_exceptions_for_{what}": False for what in quiet})
    return Path(found) if found else None
