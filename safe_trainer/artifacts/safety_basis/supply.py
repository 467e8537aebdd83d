"""Where a method gets a model's directions from: measured on rows now, or measured before and loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ...lora.updates import LinearLayer
from .basis import SafetyBasis
from .streaming import Side


def supplied_basis(  # noqa: PLR0913, what is given and what is wanted
    given: SafetyBasis | str | Path | None,
    rows: str | Path | Iterable[Mapping[str, Any]] | None,
    model: nn.Module,
    tokenizer: Any,
    *,
    layers: Mapping[str, LinearLayer],
    sides: Sequence[Side],
    rank: int,
    **measuring: Any,
) -> SafetyBasis:
    """Return the directions that were given, once they are known to fit the model, or measure them.

    Args:
        given ([`SafetyBasis`], `str` or `Path`, *optional*): Directions, or their file.
        rows (`str`, `Path` or `Iterable[Mapping]`, *optional*): What to measure on where none are given.
        model (`PreTrainedModel` or `PeftModel`): The model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        layers (`Mapping[str, LinearLayer]`): The layers that need them.
        sides (`Sequence[str]`): `"output"`, `"input"` or both.
        rank (`int`): How many for each layer.
        **measuring: Further arguments of [`SafetyBasis.from_rows`].

    Raises:
        ValueError: If neither is given, or what is given does not fit.
    """
    if given is None:
        if rows is None:
            raise ValueError("There is neither a basis nor rows to measure one on.")
        wanted = {"modules": list(layers), "sides": sides, "rank": rank, **measuring}
        return SafetyBasis.from_rows(model, tokenizer, rows, **wanted)
    basis = given if isinstance(given, SafetyBasis) else SafetyBasis.load(given)
    basis.check_fits(model, list(layers), sides, rank)
    measured, wanted_at = basis.provenance.get("input_tokens"), measuring.get("input_tokens", "prompt")
    if "input" in sides and measured not in (None, wanted_at):
        raise ValueError(
            f"The basis holds what layers read at `input_tokens={measured!r}`, and {wanted_at!r} is wanted. Give "
            f"`input_tokens={measured!r}`, or measure another basis."
        )
    return basis
