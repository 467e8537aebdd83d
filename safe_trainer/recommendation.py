"""`safety="recommended"`: the combination to begin with, and where the data that it needs comes from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .methods import DriftPenalty, SafetyMethod, SaLoRA, SecurityVectors

RECOMMENDED = "recommended"
OWN_DATA = "safety/harmful.jsonl"
"""Where a model may bring its own harmful rows along, seen from its folder or Hub repository."""


def recommended(harmful_data: str | Path | Sequence[Any], *, full_parameter: bool = False) -> list[SafetyMethod]:
    """Return the methods that held in every scenario of our study: security vectors, and protected inputs.

    The vectors make harmful rows unlearnable; the inputs keep the reading of harmful prompts as it was, which is what
    wears away in benign fine-tuning. Where all weights are trained there is no LoRA to protect, and a penalty on drift
    takes the place of the subspace.

    Args:
        harmful_data (`str`, `Path` or `Sequence[dict]`): About a hundred harmful prompts with answers that comply:
            rows, or a file of any format that [`load_rows`] reads. Cover the categories that you care about.
        full_parameter (`bool`, *optional*, defaults to `False`): Whether all weights are trained instead of a LoRA.

    Returns:
        `list[SafetyMethod]`: For `safety=` of [`SafeSFTTrainer`].

    Example:

    ```python
    >>> from safe_trainer import recommended
    >>> [method.name for method in recommended("harmful.jsonl")]
    ['Security Vectors', 'SaLoRA']

    ```

    Source: ours, from published parts: Security Vectors (arXiv 2311.02105), and the input side of SaLoRA, near to
    GuardSpace (arXiv 2510.14301). Chosen on an embedded model of one million parameters, in the study whose results
    lie in `recipes/study/`; on a large model nothing of it is known until you compare.
    """
    vectors = SecurityVectors(harmful_data=harmful_data)
    if full_parameter:
        return [vectors, DriftPenalty(safety_data=harmful_data, weight=100.0)]
    return [vectors, SaLoRA(safety_data=harmful_data, protect="input", rank=64, task_rank=0)]


def recommended_for(model: Any, full_parameter: bool) -> list[SafetyMethod]:
    """Return the recommended methods with the harmful rows that a model brings along.

    Args:
        model (`str`, `Path` or `PreTrainedModel`): The model, or its folder or Hub id.
        full_parameter (`bool`): Whether all weights are trained.

    Raises:
        ValueError: If it brings none; says what to give instead.
    """
    source = str(model) if isinstance(model, (str, Path)) else getattr(model.config, "_name_or_path", "")
    found = own_data(source)
    if found is None:
        raise ValueError(
            f'`safety="recommended"` needs about a hundred harmful prompts with answers that comply, and `{source}` '
            f"brings none along (there is no `{OWN_DATA}` in it). Give yours: "
            '`safety=recommended("harmful.jsonl")` in Python, `safety: {method: recommended, harmful_data: '
            "harmful.jsonl}` in a recipe."
        )
    return recommended(found, full_parameter=full_parameter)


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
