"""The alignment direction of one weight after the other, cut to a few factors."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from ... import __version__
from .checkpoints import Checkpoint, by, listing
from .pairing import difference
from .spectrum import frobenius_norm, leading_directions

_LIBRARIES = ("torch", "transformers", "safetensors")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DirectionFactors:
    """The alignment direction `d` of one weight, cut after its `k` leading left singular vectors.

    The operator of AsFT, `C = d dᵀ / ‖d‖_F`, is `U diag(s² / ‖d‖_F) Uᵀ` up to `error_bound`.

    Args:
        U (`Tensor`): Left singular vectors, float32, of shape (d_out, k).
        singular_values (`Tensor`): `s`, largest first, float32, of shape (k,).
        frobenius_norm (`float`): `‖d‖_F` of the whole, uncut `d`.
        next_singular_value (`float`): The first one cut off; for large weights an upper bound of it.
        shape (`tuple[int, int]`): (d_out, d_in) of `d`.
    """

    U: Tensor
    singular_values: Tensor
    frobenius_norm: float
    next_singular_value: float
    shape: tuple[int, int]

    @property
    def error_bound(self) -> float:
        """Upper bound of `‖C − U diag(s² / ‖d‖_F) Uᵀ‖₂`, that is `s_{k+1}² / ‖d‖_F`."""
        return self.next_singular_value**2 / self.frobenius_norm

    def problem(self) -> str | None:
        """Return what is wrong with the factors, in words, or `None` if they are sound."""
        d_out, d_in = self.shape
        k = self.singular_values.numel()
        if self.U.shape != (d_out, k) or self.singular_values.shape != (k,) or not 1 <= k <= min(d_out, d_in):
            found = f"{by(self.U.shape)} and {by(self.singular_values.shape)}"
            return f"`U` and `singular_values` are {found}, which does not fit a weight of {by(self.shape)}"
        if not (torch.isfinite(self.U).all() and torch.isfinite(self.singular_values).all()):
            return "`U` or `singular_values` is not finite"
        norms = self.frobenius_norm, self.next_singular_value
        if not all(math.isfinite(norm) for norm in norms) or self.frobenius_norm <= 0 or self.next_singular_value < 0:
            return f"the norms {norms} are out of range"
        falls = bool((self.singular_values.diff() <= 0).all()) and self.singular_values[-1].item() >= 0
        if not falls or self.singular_values.double().norm().item() > 1.001 * self.frobenius_norm:
            return "`singular_values` do not fall, or exceed the norm of the whole"
        if (self.U.mT @ self.U - torch.eye(k)).abs().max() > 1e-3:
            return "`U` is not orthonormal"
        return None


def factorize(
    pair: tuple[Checkpoint, Checkpoint],
    shapes: Mapping[str, tuple[int, int]],
    provenance: dict[str, Any],
    progress: Callable[[int, int, str], None] | None,
) -> Iterator[tuple[str, DirectionFactors]]:
    """Yield the factors of one module after the other.

    Args:
        pair (`tuple[Checkpoint, Checkpoint]`): The aligned and the unaligned checkpoint.
        shapes (`Mapping[str, tuple[int, int]]`): (d_out, d_in) of the modules by name, known to both.
        provenance (`dict[str, Any]`): Holds `rank` and `max_error`; is completed when all has been read.
        progress (`Callable[[int, int, str], None]`, *optional*): Called after each module.

    Raises:
        ValueError: If a weight is not finite, or the checkpoints are identical.
    """
    identical, largest = [], 0.0
    for done, (name, shape) in enumerate(shapes.items(), start=1):
        d = difference(*pair, name)  # (d_out, d_in)
        norm = frobenius_norm(d)
        if not math.isfinite(norm):
            raise ValueError(
                f"`{name}` holds infinite or NaN weights in {pair[0].name} or {pair[1].name}. Download or save it "
                "again."
            )
        if norm == 0:
            identical.append(name)
        else:
            threshold = math.sqrt(provenance["max_error"] * norm)  # s² / ‖d‖_F <= max_error
            U, singular_values, following = leading_directions(d, threshold, provenance["rank"])
            factors = DirectionFactors(U, singular_values, norm, following, shape)
            largest = max(largest, factors.error_bound)
            yield name, factors
        if progress is not None:
            progress(done, len(shapes), name)
    if len(identical) == len(shapes):
        raise ValueError(
            f"{pair[0].name} and {pair[1].name} are identical in all {len(shapes)} modules, so there is no direction "
            "between them. Give the aligned model and the model before its alignment."
        )
    if identical:
        logger.warning("Left out, because both checkpoints are identical there: %s", listing(identical))
    logger.info("Alignment direction of %d modules, error at most %.2g", len(shapes) - len(identical), largest)
    provenance.update(_origin(pair), identical_modules=identical, largest_error_bound=largest)


def _origin(pair: tuple[Checkpoint, Checkpoint]) -> dict[str, Any]:
    """Return where the factors come from: both checkpoints, the versions of the libraries, the date."""
    return {
        **{checkpoint.role: checkpoint.provenance() for checkpoint in pair},
        "versions": {"safe_trainer": __version__, **{name: version(name) for name in _LIBRARIES}},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
