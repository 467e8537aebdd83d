"""`safety="recommended"`: the methods to begin with, which need nothing from the user."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..data.protection import own_file, protection_rows
from ..lora.loading import revision_of, source_of
from .base import SafetyMethod
from .refusal_anchor import RefusalAnchor
from .security_vectors import SecurityVectors

RECOMMENDED = "recommended"


def recommended(harmful_data: Any = None, prompts: Any = None, benign_prompts: Any = None) -> list[SafetyMethod]:
    """Return the methods to begin with: security vectors, and an anchor on the model's own refusals.

    The vectors make harmful rows unlearnable; the anchor holds the first words of refusals where data
    without a harmful row would erode them. For LoRA, quantised bases and full-parameter training alike.

    Args:
        harmful_data (`str`, `Path`, `Dataset` or `Sequence[dict]`, *optional*): About a hundred harmful prompts with
            answers that comply; without, 160 built-in rows with inert answers. Your own rows, in the style of the
            harm that you expect, protect better against it.
        prompts (as `harmful_data`, *optional*): Harmful prompts for the anchor; without, those of `harmful_data`, or
            built-in ones.
        benign_prompts (as `harmful_data`, *optional*): Harmless prompts for the anchor; without, built-in ones.

    Returns:
        `list[SafetyMethod]`: For `safety=` of [`SafeSFTTrainer`].

    Example:

    ```python
    >>> from safe_trainer import recommended
    >>> [method.name for method in recommended()]
    ['Security Vectors', 'Refusal anchor']

    ```

    Source: Security Vectors are Zhou et al.'s (arXiv 2311.02105), the anchor and the combination ours.
    """
    if isinstance(harmful_data, Iterator):
        harmful_data = list(harmful_data)  # both methods read it
    rows = protection_rows() if harmful_data is None else harmful_data
    asked = harmful_data if prompts is None else prompts
    return [SecurityVectors(harmful_data=rows), RefusalAnchor(prompts=asked, benign_prompts=benign_prompts)]


def recommended_for(
    model: Any, harmful_data: Any = None, *, revision: str | None = None, **prompts: Any
) -> list[SafetyMethod]:
    """Return the recommended methods for a model: with the harmful rows that it brings along, or built-in ones.

    Args:
        model (`str`, `Path` or `PreTrainedModel`): The model, or its folder or Hub id.
        harmful_data (*optional*): Other rows, as for [`recommended`].
        revision (`str`, *optional*): Branch, tag or commit of a model on the Hub that is given by its id.
        **prompts: As for [`recommended`].
    """
    own = own_file(source_of(model), "harmful", revision or revision_of(model)) if harmful_data is None else None
    return recommended(harmful_data if own is None else own, **prompts)
