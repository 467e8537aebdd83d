"""Two checkpoints side by side: which layers they share by name, and the difference of one layer's weights."""

from __future__ import annotations

import re
from collections.abc import Collection

import torch
from torch import Tensor

from .checkpoints import Checkpoint, by, listing, prefix_hint


def matching_modules(
    aligned: Checkpoint, unaligned: Checkpoint, modules: str | Collection[str] | None = None
) -> dict[str, tuple[int, int]]:
    """Return the selected linear layers, which both checkpoints must have in the same shape.

    Args:
        aligned ([`Checkpoint`]): The aligned model.
        unaligned ([`Checkpoint`]): The model before alignment.
        modules (`str` or `Collection[str]`, *optional*): A regular expression, or names; left out, all.

    Returns:
        `dict[str, tuple[int, int]]`: (d_out, d_in) by module name, in the order of the aligned model.

    Raises:
        ValueError: If nothing is selected, or a selected layer is missing on one side or has another shape there.
    """
    here, there = _select(aligned, modules), _select(unaligned, modules)
    if not here and not there:
        raise ValueError(
            f"No linear layer of {aligned.name} matches `modules` ({modules!r}). It has "
            f"{listing(list(aligned.linears))}; the output embedding is not among them."
        )
    wanted = [] if modules is None or isinstance(modules, str) else list(modules)
    unknown = [name for name in wanted if name not in here and name not in there]
    if unknown:
        raise ValueError(f"`modules` names {listing(unknown)}, which {aligned.name} has no linear layer for.")
    complaints = []
    for one, names, others in ((aligned, here, there), (unaligned, there, here)):
        missing = [f"{name} ({by(one.linears[name].shape)})" for name in names if name not in others]
        if missing:
            complaints.append(f"only {one.name} has {listing(missing)}")
    hint = prefix_hint([name for name in here if name not in there], [name for name in there if name not in here])
    shapes = {name: (aligned.linears[name].shape, unaligned.linears[name].shape) for name in here if name in there}
    unequal = [f"{name} ({by(a)}, not {by(b)})" for name, (a, b) in shapes.items() if a != b]
    if unequal:
        complaints.append(f"other shapes in {aligned.name} than in {unaligned.name}: {listing(unequal)}")
    if complaints:
        raise ValueError(
            f"There is no direction between these two checkpoints: {'; '.join(complaints)}{hint}. Give an aligned "
            "model and the very model that it was trained from, or select the `modules` that they share."
        )
    unaligned.shapes(there)
    return aligned.shapes(here)


def difference(aligned: Checkpoint, unaligned: Checkpoint, name: str) -> Tensor:
    """Return `W_aligned − W_unaligned` of one layer, (d_out, d_in) in float32, a block of rows at a time."""
    d_out, d_in = aligned.linears[name].shape
    rows, columns = (d_in, d_out) if aligned.linears[name].is_transposed else (d_out, d_in)
    result = torch.empty(rows, columns)
    step = max(1, 2**24 // columns)  # 64 MB in float32
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        torch.sub(aligned.rows(name, start, stop), unaligned.rows(name, start, stop), out=result[start:stop])
    return result.mT if aligned.linears[name].is_transposed else result


def _select(checkpoint: Checkpoint, modules: str | Collection[str] | None) -> list[str]:
    if modules is None:
        return list(checkpoint.linears)
    if isinstance(modules, str):
        try:
            return [name for name in checkpoint.linears if re.search(modules, name)]
        except re.error as error:
            raise ValueError(f"`modules` is no regular expression ({error}), got {modules!r}.") from error
    return [name for name in checkpoint.linears if name in set(modules)]
