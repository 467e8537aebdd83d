"""The two axes of a landscape: the alignment direction and one orthogonal to it, layer by layer, as factors."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ...artifacts import AlignmentDirection
from ...artifacts.checkpoint_reader import Checkpoint, listing
from ...lora.updates import LinearLayer, weight
from ..drift.updates import Factors, read_weight, row_products

Normalize = Literal["layer", "filter", "none"]

_NOISE = 1e-6  # share of a squared norm that float32 leaves where nothing should be
_ALIKE = 0.02  # share by which singular values may differ: those of large weights are not exact


@dataclass(frozen=True)
class Axes:
    """A plane through the model's weights: `W + α along + β across` in every layer.

    Args:
        along (`Mapping[str, Factors]`): The alignment direction by layer; with α > 0 the model goes further the way
            that alignment went, with α < 0 back to the unaligned model.
        across (`Mapping[str, Factors]`): A direction orthogonal to it in every layer.
    """

    along: Mapping[str, Factors]
    across: Mapping[str, Factors]

    def coordinates(self, update: Mapping[str, Factors]) -> tuple[float, float, float]:
        """Return α and β of the point of the plane that is nearest to an update, and the update's share in the plane.

        The share is that of `‖ΔW‖²` over all layers: the picture shows so much of the way, and no more.
        """
        whole = sum(_inner(factors, factors) for factors in update.values())
        found, held = [], 0.0
        for axis in (self.along, self.across):
            shared = [name for name in axis if name in update]
            product = sum(_inner(axis[name], update[name]) for name in shared)
            square = sum(_inner(factors, factors) for factors in axis.values())
            found.append(product / square if square else 0.0)
            held += product**2 / square if square else 0.0
        return found[0], found[1], min(1.0, held / whole) if whole else 1.0


def alignment(
    layers: Mapping[str, LinearLayer], direction: AlignmentDirection | None, unaligned: str | Path | None
) -> dict[str, Factors]:
    """Return `d = W_aligned − W_unaligned` by layer, up to the directions that an [`AlignmentDirection`] holds.

    An alignment direction holds left singular vectors `U` only, which is all that a penalty needs. The other factor,
    `Uᵀ d`, is read anew from the unaligned checkpoint.

    Args:
        layers (`Mapping[str, LinearLayer]`): The aligned model's linear layers.
        direction ([`AlignmentDirection`], *optional*): Which layers and how many directions; left out, all of `d`.
        unaligned (`str` or `Path`, *optional*): The unaligned checkpoint; left out, the one that `direction` names.

    Raises:
        ValueError: If neither is given, or they do not belong together or to the model.
        OSError: If the unaligned checkpoint is not there.
    """
    if direction is None and unaligned is None:
        raise ValueError("The alignment direction is missing: give `direction`, `unaligned`, or both.")
    source = unaligned or (direction.provenance.get("unaligned", {}).get("source") if direction else None)
    if not source:
        raise ValueError("The alignment direction does not say which unaligned model it is from. Give `unaligned`.")
    checkpoint = Checkpoint("unaligned", source)
    names = list(layers) if direction is None else list(direction.modules)
    missing = [name for name in names if name not in layers or name not in checkpoint.linears]
    shapes = checkpoint.shapes([name for name in names if name not in missing])
    missing += [name for name, shape in shapes.items() if tuple(shape) != tuple(layers[name].shape)]
    if missing:
        raise ValueError(
            f"The alignment direction does not fit the model: {listing(missing, 3)} are missing on one side, or have "
            "another shape there. Compute it from the model at hand."
        )
    found = {}
    for name in names:
        d = weight(layers[name].outer).float().cpu() - read_weight(checkpoint, name)
        factors = Factors(d) if direction is None else _within(name, d, direction, str(source))
        if factors.left.any():
            found[name] = factors
    if not found:
        raise ValueError(f"The model and `{source}` are the same, so there is no direction between them.")
    return found


def _within(name: str, d: Tensor, direction: AlignmentDirection, source: str) -> Factors:
    factors = direction.modules[name]
    right = factors.U.mT @ d  # (k, d_in): its rows have the length of the singular values, if it is the same d
    expected, found = factors.singular_values.norm().item(), right.norm().item()
    if not math.isclose(expected, found, rel_tol=_ALIKE):
        raise ValueError(
            f"The alignment direction was not computed from this model and `{source}`: in `{name}` its size is "
            f"{expected:.4g}, and that of their difference {found:.4g}. Compute it anew: `safe-trainer direction`."
        )
    return Factors(factors.U.contiguous(), right)


def random_direction(shapes: Mapping[str, tuple[int, int]], seed: int) -> dict[str, Factors]:
    """Return a matrix of independent normal numbers for each layer; the same seed gives the same ones."""
    found = {}
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
        found[name] = Factors(torch.randn(shape, generator=generator))
    return found


def axes(
    layers: Mapping[str, LinearLayer],
    along: Mapping[str, Factors],
    across: Mapping[str, Factors],
    normalize: Normalize = "layer",
) -> Axes:
    """Return both directions in comparable units, with `across` orthogonal to `along`.

    Weights can be scaled up in one layer and down in the next without a change of the function, so a step has to be
    measured in each layer by the size of its weight. `"filter"` (Li et al., "Visualizing the Loss Landscape of Neural
    Nets", NeurIPS 2018, arXiv 1712.09913, section 4) gives each row of a direction, the weights of one output, the
    norm of that row of `W`; `"layer"`, its coarser form, gives each layer's direction the norm of the layer's `W`. So
    α = 0.1 moves every layer by a tenth of its weight. With `"none"`, α = −1 is the unaligned model itself.

    Args:
        layers (`Mapping[str, LinearLayer]`): The model's linear layers.
        along (`Mapping[str, Factors]`): The alignment direction.
        across (`Mapping[str, Factors]`): The other direction, not yet orthogonal.
        normalize (`str`, *optional*, defaults to `"layer"`): `"layer"`, `"filter"` or `"none"`.

    Raises:
        ValueError: If nothing of `across` is orthogonal to `along`, or it is zero.
    """
    by_row = normalize == "filter"
    sizes = {name: _row_squares(layers[name]) for name in {**along, **across}} if normalize != "none" else {}
    scaled = {name: _scaled(factors, sizes.get(name), by_row) for name, factors in along.items()}
    other = {}
    for name, factors in across.items():
        free = _orthogonal(factors, scaled[name], by_row) if name in scaled else factors
        if _inner(free, free) > _NOISE * _inner(factors, factors):
            other[name] = _scaled(free, sizes.get(name), by_row)
    if not any(_inner(factors, factors) > 0 for factors in across.values()):
        raise ValueError("The second direction is zero: that fine-tune changes nothing in the model's linear layers.")
    if not other:
        raise ValueError("The second direction lies wholly along the alignment direction. Choose another one.")
    return Axes(scaled, other)


def _orthogonal(factors: Factors, along: Factors, by_row: bool) -> Factors:
    """Return what is left of a direction without its part along another one, row by row or as a whole."""
    products, squares = row_products(factors, along), row_products(along, along)
    if not by_row:
        products, squares = products.sum(), squares.sum()
    # Rows of length zero have no direction to be orthogonal to.
    part = torch.where(squares > 0, products / squares, 0.0).to(factors.left.dtype).reshape(-1, 1) * along.left
    if factors.right is not None and along.right is not None:
        return Factors(torch.cat([factors.left, -part], dim=1), torch.cat([factors.right, along.right]))
    return Factors(_dense(factors) - (part if along.right is None else part @ along.right))


def _scaled(factors: Factors, squares: Tensor | None, by_row: bool) -> Factors:
    if squares is None:
        return factors
    own = row_products(factors, factors).clamp(min=0)
    if not by_row:
        own, squares = own.sum(), squares.sum()
    ratio = torch.where(own > 0, squares / own, 0.0).sqrt().to(factors.left.dtype).reshape(-1, 1)
    return Factors(ratio * factors.left, factors.right)


def _row_squares(layer: LinearLayer) -> Tensor:
    return weight(layer.outer).double().square().sum(dim=1).cpu()


def _inner(one: Factors, other: Factors) -> float:
    return row_products(one, other).sum().item()


def _dense(factors: Factors) -> Tensor:
    return factors.left if factors.right is None else factors.left @ factors.right
