"""`safety="recommended"`: the combination to begin with, and where the data that it needs comes from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import DriftPenalty, SafetyMethod, SecurityVectors

RECOMMENDED = "recommended"
OWN_DATA = "safety/harmful.jsonl"
"""Where a model may bring its own harmful rows along, seen from its folder or Hub repository."""


def recommended(harmful_data: str | Path | Sequence[Any]) -> list[SafetyMethod]:
    """Return the methods to begin with: security vectors, and a penalty on drift in what harmful prompts produce.

    The vectors make harmful rows unlearnable; the penalty keeps the reading of harmful prompts as it was, which is
    what wears away in benign fine-tuning. For LoRA, quantised bases and full-parameter training alike.

    Args:
        harmful_data (`str`, `Path` or `Sequence[dict]`): About a hundred harmful prompts with answers that comply:
            rows, or a file of any format that [`load_rows`] reads. Cover the categories that you care about.

    Returns:
        `list[SafetyMethod]`: For `safety=` of [`SafeSFTTrainer`].

    Example:

    ```python
    >>> from safe_trainer import recommended
    >>> [method.name for method in recommended("harmful.jsonl")]
    ['Security Vectors', 'Drift penalty']

    ```

    Source: Security Vectors are Zhou et al.'s (arXiv 2311.02105), the penalty and the combination ours. Chosen on an
    embedded model of one million parameters, in the study whose results lie in `recipes/study/`; of a large model
    nothing is known until you compare. It does not stop data that shifts the model's identity without a harmful row.
    """
    return [SecurityVectors(harmful_data=harmful_data), DriftPenalty(safety_data=harmful_data)]


def recommended_for(model: Any) -> list[SafetyMethod]:
    """Return the recommended methods with the harmful rows that a model brings along.

    Args:
        model (`str`, `Path` or `PreTrainedModel`): The model, or its folder or Hub id.

    Raises:
        ValueError: If it brings none; says what to give instead.
    """
    source = str(model) if isinstance(model, (str, Path)) else getattr(model.config, "_name_or_path", "")
    found = own_data(source)
    if found is None:
        told = f"`{source}`" if source else "this model"
        raise ValueError(
            f'`safety="recommended"` needs about a hundred harmful prompts with answers that comply, and {told} '
            f"brings none along (there is no `{OWN_DATA}` in it). Give yours: "
            '`safety=recommended("harmful.jsonl")` in Python, `safety: {method: recommended, harmful_data: '
            "harmful.jsonl}` in a recipe."
        )
    return recommended(found)


def own_data(source: str) -> Path | None:
    """Return the file of harmful rows in a model's folder or Hub repository, if there is one."""
    if Path(source).is_dir():
        path = Path(source) / OWN_DATA
        return path if path.is_file() else None
    if not source:
        return None
    from transformers.utils import cached_file

    found = cached_file(
        source,
        OWN_DATA,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return Path(found) if found else None
