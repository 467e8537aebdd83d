"""The leading left singular vectors of one matrix: as many as a stated error needs, and proof that they are enough.

Small matrices are decomposed exactly. For large ones a block of random vectors is turned towards the leading
directions by subspace iteration (Halko, Martinsson and Tropp, SIAM Review 2011), and what it left out is bounded from
above.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_EXACT_UP_TO = 1024  # smaller side up to which a full decomposition takes about a second
_RESOLUTION = 1e-6  # directions below this share of the largest are rounding noise of float32 weights
_START_WIDTH = 64  # columns of the first random block
_ROUNDS = 4  # of two power iterations each, before the block is made wider
_SLACK = 0.05  # relative, of the bound below
_FAILURE = 1e-9  # probability with which the bound below may fail to hold


class Directions(NamedTuple):
    """What [`leading_directions`] returns.

    Args:
        basis (`Tensor`): `U`, orthonormal columns, of shape (m, k).
        singular_values (`Tensor`): `s`, largest first, of shape (k,).
        next_singular_value (`float`): `t` with `‖D Dᵀ − U diag(s²) Uᵀ‖₂ ≤ t²`: the (k+1)-th singular value, or an
            upper bound of it where the decomposition was not exact.
    """

    basis: Tensor
    singular_values: Tensor
    next_singular_value: float


def frobenius_norm(matrix: Tensor) -> float:
    """Return `‖D‖_F`, summed in float64 block by block."""
    return math.sqrt(sum(block.double().square().sum().item() for block in matrix.split(1024)))


def leading_directions(matrix: Tensor, threshold: float, rank: int | None = None) -> Directions:
    """Return the left singular vectors of `D` whose singular values exceed a threshold, and at least one.

    Args:
        matrix (`Tensor`): `D`, of shape (m, n), float32.
        threshold (`float`): Singular values above it are kept. With 0, all that float32 can resolve.
        rank (`int`, *optional*): Keep at most this many. The threshold may then be missed; `next_singular_value`
            tells.

    Returns:
        [`Directions`]: Factors. Above 1,024 rows and columns they may hold a few directions more than needed, and
        `next_singular_value` is an upper bound that fails with probability below 1e-9.
    """
    small = min(matrix.shape) <= _EXACT_UP_TO
    if small or (threshold == 0 and rank is None):
        return _exact(matrix, threshold, rank)
    return _iterated(matrix, threshold, rank) or _exact(matrix, threshold, rank)


def _exact(matrix: Tensor, threshold: float, rank: int | None) -> Directions:
    """Decompose the Gram matrix of the smaller side, in float64."""
    is_wide = matrix.shape[0] <= matrix.shape[1]
    squares, vectors = torch.linalg.eigh(_gram(matrix if is_wide else matrix.mT))
    values = squares.clamp(min=0).sqrt().flip(0)
    kept = max(1, int((values > max(threshold, _RESOLUTION * values[0].item())).sum()))
    kept = min(kept, rank or kept)
    leading = vectors[:, -kept:].flip(1).float()
    # From right to left singular vectors: D V = U S. The QR step keeps the columns orthonormal where S is tiny.
    del squares, vectors  # what follows is as large again
    basis = leading if is_wide else torch.linalg.qr(matrix @ leading).Q
    following = values[kept].item() if kept < len(values) else 0.0
    return Directions(basis.contiguous(), values[:kept].float(), following)


def _gram(matrix: Tensor) -> Tensor:
    """Return `D Dᵀ` in float64, never holding more than 1,024 columns of `D` in float64."""
    gram = matrix.new_zeros(matrix.shape[0], matrix.shape[0], dtype=torch.float64)
    for block in matrix.split(1024, dim=1):
        columns = block.double()
        gram.addmm_(columns, columns.mT)
    return gram


def _iterated(matrix: Tensor, threshold: float, rank: int | None) -> Directions | None:
    """Widen a block and turn it until its leading directions are proven enough; `None` if a full SVD is cheaper."""
    generator = torch.Generator().manual_seed(0)  # the same factors every time
    width = _START_WIDTH if rank is None else rank + max(_START_WIDTH, rank) // 2
    block = matrix.new_empty(matrix.shape[0], 0)
    while width <= min(matrix.shape) // 4:
        fresh = torch.randn(matrix.shape[0], width - block.shape[1], generator=generator)
        block = torch.cat([block, fresh], dim=1)
        for turn in range(_ROUNDS):
            block, values = _turn(matrix, block)
            # One in ten above the threshold, so that the bound, which is a little too high, can still reach it.
            wanted = max(1, int((values.square() > 0.9 * threshold**2).sum()))
            kept = min(wanted, rank or wanted)
            if kept > 3 * width // 4:
                break  # too few spare columns to converge: widen
            is_final = rank is not None and wanted >= rank
            found = _proven(matrix, block[:, :kept], values, max(threshold, values[kept].item()))
            if found is None and is_final and turn == _ROUNDS - 1:
                found = _proven(matrix, block[:, :kept], values, math.inf)
            if found is not None and (is_final or found.next_singular_value <= threshold):
                return found
        width *= 2
    return None


def _turn(matrix: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """Return the block after two power iterations as Ritz vectors (m, l), largest first, and their values (l,)."""
    for _ in range(2):
        block = torch.linalg.qr(matrix @ (matrix.mT @ block)).Q
    image = matrix.mT @ block  # (n, l)
    squares, rotation = torch.linalg.eigh((image.mT @ image).double())
    return block @ rotation.flip(1).float(), squares.clamp(min=0).sqrt().flip(0)


def _proven(matrix: Tensor, basis: Tensor, values: Tensor, scale: float) -> Directions | None:
    """Bound the error of `U diag(s²) Uᵀ`, or return `None` if `U` has not converged to within 5 % of `scale²`.

    In an orthonormal basis that starts with `U`, the error `D Dᵀ − U diag(s²) Uᵀ` is `[[0, Xᵀ], [X, Y]]`, where `Y`
    is what lies beyond `U` and `X` how far `U` is from invariant. Hence its norm is at most `‖X‖ + ‖Y‖`; by Weyl's
    inequality the (k+1)-th squared singular value is no larger either.
    """
    kept = basis.shape[1]
    singular_values = values[:kept]
    drift = matrix @ (matrix.mT @ basis) - basis * singular_values.float().square()
    mixing = math.sqrt(torch.linalg.eigvalsh((drift.mT @ drift).double())[-1].clamp(min=0).item())
    if mixing > _SLACK * scale**2:
        return None
    bound = _squared_norm_bound(matrix, basis) + mixing
    return Directions(basis.contiguous(), singular_values.float(), math.sqrt(bound))


def _squared_norm_bound(matrix: Tensor, basis: Tensor) -> float:
    """Return an upper bound of `‖(I − U Uᵀ) D‖₂²`, 5 % above what the Lanczos method finds.

    From a random start, `q` steps on an n x n matrix miss the largest eigenvalue by more than a share `ε` with
    probability at most `1.648 √n exp(−√ε (2q − 1))` (Kuczynski and Wozniakowski, SIAM J. Matrix Anal. Appl. 1992,
    theorem 4.2), whatever the spectrum. `q` is chosen from it.
    """
    size = matrix.shape[0]
    steps = math.ceil((math.log(1.648 * math.sqrt(size) / _FAILURE) / math.sqrt(_SLACK) + 1) / 2)
    vector = torch.randn(size, generator=torch.Generator().manual_seed(1))
    vector /= vector.norm()
    krylov = torch.zeros(size, steps)
    diagonal, off_diagonal = [], []
    for step in range(steps):
        krylov[:, step] = vector
        beyond = vector - basis @ (basis.mT @ vector)
        image = matrix @ (matrix.mT @ beyond)
        image -= basis @ (basis.mT @ image)
        diagonal.append(torch.dot(image, vector).item())
        for _ in range(2):  # twice is enough for float32
            image -= krylov[:, : step + 1] @ (krylov[:, : step + 1].mT @ image)
        length = image.norm().item()
        if length <= _RESOLUTION * max(diagonal):
            break  # the space is exhausted, its largest eigenvalue exact
        off_diagonal.append(length)
        vector = image / length
    off = torch.tensor(off_diagonal[: len(diagonal) - 1], dtype=torch.float64)
    tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
    return max(0.0, torch.linalg.eigvalsh(tridiagonal)[-1].item()) / (1 - _SLACK)
