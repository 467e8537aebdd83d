"""Projectors, norms and decompositions that the methods share.

A weight update is never formed: for `M` (d_out x r) and `A` (r x d_in) the r x r Gram matrices carry all that counts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_EXACT_UP_TO = 512  # smaller side up to which a full decomposition takes less than 0.1 s
_EXACT_SVD_UP_TO = 1024  # and up to which one takes about a second, which is fine for what is computed once
_NOISE = 1e-12  # share of the largest eigenvalue below which one is rounding noise of float32 columns
_RESOLUTION = 1e-6  # share of the largest singular value below which one is rounding noise of float32 weights
_LOADING = 0.01  # of their mean, added to all second moments before they divide; as in CorDA's and GuardSpace's code
_START_WIDTH = 64  # columns of the first randomized decomposition
_SQUARINGS = 7  # of a residual's Gram matrix; its norm is then known to a factor of n^(1 / 128), 1.07 for n = 4,096


def outside(matrix: Tensor, basis: Tensor) -> Tensor:
    """Return `(I - U Uᵀ) X`, the part of `X` (d x n) outside the subspace of the orthonormal `U` (d x k)."""
    return matrix - basis @ (basis.mT @ matrix)


def product_norm_squared(left: Tensor, right: Tensor | None = None) -> Tensor:
    """Return `‖M A‖_F²` from `M` (d_out x r) and `A` (r x d_in; `None` is an identity) without forming the product."""
    if right is None:
        return left.square().sum()
    # Rounding may leave -1e-12 where the product vanishes.
    return ((left.mT @ left) * (right @ right.mT)).sum().clamp(min=0)


def outside_norm_squared(
    left: Tensor, right: Tensor | None, basis: Tensor, eigenvalues: Tensor | None = None
) -> Tensor:
    """Return `‖(I - U diag(c) Uᵀ) M A‖_F²`: what an operator leaves out of `M` (d_out x r) times `A` (`None` is `I`).

    As the columns of `U` (d_out x k) are orthonormal, it is `‖M A‖_F²` less `2c - c²` (one without `c`) times what
    each of them holds: half the work of projecting first. What is left out is known to a share of 1e-7 of the whole.
    """
    inside = basis.mT @ left  # (k, r)
    weighted = inside if eigenvalues is None else (2 * eigenvalues - eigenvalues**2)[:, None] * inside
    if right is None:
        return (left.square().sum() - (weighted * inside).sum()).clamp(min=0)
    return ((left.mT @ left - weighted.mT @ inside) * (right @ right.mT)).sum().clamp(min=0)


def random_basis(dimension: int, rank: int, seed: int) -> Tensor:
    """Return orthonormal columns of shape (dimension, rank), uniformly random: the control for a learned subspace."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dimension, rank, generator=generator)).Q


def balanced_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return `U √S` (d_out x rank) and `√S Vᵀ` (rank x d_in) of the rank-`rank` singular value decomposition of `W`.

    Up to 512 rows or columns their product, in float32, is the best approximation of `W` (d_out x d_in) of that rank;
    above, to within the little that 16 power iterations leave.
    """
    if min(matrix.shape) > _EXACT_UP_TO:
        U, S, V = _randomized_svd(matrix.float(), min(2 * rank, *matrix.shape), 16)
        roots = S[:rank].sqrt()
        return U[:, :rank] * roots, (V[:, :rank] * roots).mT.contiguous()
    matrix = matrix.double()
    if matrix.shape[0] > matrix.shape[1]:
        left, right = balanced_factors(matrix.mT, rank)
        return right.mT.contiguous(), left.mT.contiguous()
    # The Gram matrix of the smaller side: several times faster than an SVD, and in float64 no less exact here.
    squares, vectors = torch.linalg.eigh(matrix @ matrix.mT)
    squares, vectors = squares[-rank:].flip(0).clamp(min=0), vectors[:, -rank:].flip(1)
    roots = squares.pow(0.25)  # √S, largest first
    image = vectors.mT @ matrix  # S Vᵀ
    balanced = torch.where(roots[:, None] > 0, image / roots[:, None], 0.0)
    return (vectors * roots).float(), balanced.float()


def compact_factors(left: Tensor, right: Tensor, tolerance: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Return factors of the same product `M A` with the fewest columns, balanced as in [`balanced_factors`].

    At least one column is left. Singular values up to the share `tolerance` of the largest are taken for rounding
    noise; the default is float32's.
    """
    left_basis, left_core = torch.linalg.qr(left.double())
    right_basis, right_core = torch.linalg.qr(right.double().mT)
    U, S, Vt = torch.linalg.svd(left_core @ right_core.mT, full_matrices=False)
    kept = max(1, int((S > tolerance * S[0]).sum()))
    roots = S[:kept].sqrt()
    return (left_basis @ U[:, :kept] * roots).float(), (roots[:, None] * (Vt[:kept] @ right_basis.mT)).float()


class TopDirections(NamedTuple):
    """The top left singular vectors of a matrix `X` (d x n), largest first."""

    basis: Tensor
    """`U`, orthonormal columns, of shape (d, k), float32."""
    singular_values: Tensor
    """Of shape (k,), float32."""
    total_variance: float
    """`‖X‖_F²`, also of the directions that are not kept."""

    @property
    def explained_variance(self) -> float:
        """Return the share of the total variance that the `k` directions hold."""
        kept = self.singular_values.double().square().sum().item()
        return kept / self.total_variance if self.total_variance > 0 else 0.0

    def at_most(self, count: int) -> TopDirections:
        """Return the top `count` directions with their singular values."""
        return TopDirections(self.basis[:, :count], self.singular_values[:count], self.total_variance)

    def top(self, count: int, explained_variance: float | None = None) -> Tensor:
        """Return the top `count` directions, or the fewest of them that hold this share of the total variance."""
        if explained_variance is not None and self.total_variance > 0:
            held = self.singular_values.double().square().cumsum(0) / self.total_variance
            count = min(count, int((held < explained_variance).sum()) + 1)
        return self.basis[:, :count]


def least_factors(matrix: Tensor, inputs: TopDirections, rank: int) -> tuple[Tensor, Tensor]:
    """Return `B` (d_out x rank) and `A` (rank x d_in), whose product is the part of `W` that these inputs need least.

    With the inputs' second moments `C` (d_in x d_in) and `W C = U Σ Vᵀ`, of the `rank` smallest components
    `B = U √Σ` and `A = √Σ Vᵀ C⁻¹`, so that `B A = U Uᵀ W`. As `Vᵀ C⁻¹` is `Σ⁻¹ Uᵀ W`, nothing is inverted; all is
    float64, as `Σ` spans several powers of ten. The scale of `C`, a sum over as many inputs as there were, shows in no
    product; it is taken so that `B` and `A` have the same norm.

    Args:
        matrix (`Tensor`): `W`, of shape (d_out, d_in).
        inputs (`TopDirections`): Directions `Q` of the inputs, with singular values `s`. From them, `C = Q diag(s²) Qᵀ
            + α (I − Q Qᵀ) + λ I`, with `α` the mean variance that they leave to the others, and `λ` 1 % of the mean of
            all.
        rank (`int`): At most the smaller side of `W`.

    Source: GuardSpace, arXiv 2510.14301; `λ` is that of the authors' code.
    """
    W, Q = matrix.double(), inputs.basis.to(matrix.device).double()
    squares = inputs.singular_values.to(matrix.device).double().square()
    left = max(0.0, inputs.total_variance - squares.sum().item()) / max(1, len(Q) - len(squares))
    loaded = left + (_LOADING * inputs.total_variance / len(Q) or 1.0)
    U, S, _ = torch.linalg.svd(loaded * W + (W @ Q * (squares - left)) @ Q.mT, full_matrices=False)
    U, roots = U[:, -rank:], S[-rank:].sqrt()
    B, A = U * roots, torch.where(roots[:, None] > 0, U.mT @ W / roots[:, None], 0.0)
    scale = (A.norm() / B.norm()).sqrt() if B.any() else 1.0
    return (scale * B).float(), (A / scale).float()


class Sketch:
    """The top left singular vectors of a matrix whose columns, of length d, come in blocks and are seen once.

    `X Xᵀ` (d x d) is modelled as `Q H Qᵀ + α (I − Q Qᵀ)`: exact numbers `H` within a basis `Q` of `width` columns, and
    outside of it the mean `α` of what was seen there. A new block is added to the model, and `Q` turned towards the
    top directions of the sum by subspace iteration, starting from the old `Q`. Memory is d x `width` and the block.
    Where the k-th singular value stands out, the k top vectors come out to about `(s_{k+1} / s_k)²` times the little
    by which the rest differs from its mean: take twice as many columns as are wanted. If `width` reaches d, they are
    exact.
    """

    def __init__(self, dimension: int, width: int) -> None:
        width = min(dimension, width)
        self.count = 0  # columns seen
        self._basis = random_basis(dimension, width, seed=0)  # Q
        self._gram = torch.zeros(width, width, dtype=torch.float64)  # H
        self._beyond = torch.zeros((), dtype=torch.float64)  # α
        self._energy = torch.zeros((), dtype=torch.float64)

    def add(self, columns: Tensor) -> None:
        """Take in a block (n, d), whose rows are columns of `X`; the sketch lives where its first block does."""
        if not len(columns):
            return
        if not self.count:
            device = "cpu" if columns.device.type == "mps" else columns.device  # Apple's chips lack float64
            state = self._basis, self._gram, self._beyond, self._energy
            self._basis, self._gram, self._beyond, self._energy = (tensor.to(device) for tensor in state)
        block = columns.to(self._basis.device, torch.float32)
        basis = self._basis
        for _ in range(1 if self.count else 4):  # the first block starts from a random basis
            basis = torch.linalg.qr(self._times(basis) + block.mT @ (block @ basis)).Q
        image = (block @ basis).double()
        overlap = (self._basis.mT @ basis).double()
        eye = torch.eye(basis.shape[1], dtype=torch.float64, device=basis.device)
        self._gram = overlap.mT @ (self._gram - self._beyond * eye) @ overlap + self._beyond * eye + image.mT @ image
        # Row by row first: one sum in float64 over all entries takes as long as a product with the basis.
        self._energy = self._energy + block.square().sum(1).sum(dtype=torch.float64)
        dimension, width = basis.shape
        self._beyond = ((self._energy - self._gram.trace()) / max(1, dimension - width)).clamp(min=0)
        self._basis = basis
        self.count += len(block)

    def top_directions(self, rank: int) -> TopDirections:
        """Return at most `rank` directions, fewer where the columns span fewer; `FloatingPointError` if any is NaN."""
        energy = self._energy.item()
        if not math.isfinite(energy):
            raise FloatingPointError("The columns hold infinite or NaN values.")
        squares, vectors = torch.linalg.eigh(self._gram)
        squares, vectors = squares[-rank:].flip(0), vectors[:, -rank:].flip(1)
        kept = int((squares > _NOISE * squares[:1]).sum()) if energy > 0 else 0
        # In float64 and made orthonormal once more, so that a projector on them lets through float32's error only.
        basis = torch.linalg.qr(self._basis.double() @ vectors[:, :kept]).Q
        return TopDirections(basis.float().contiguous(), squares[:kept].sqrt().float(), energy)

    def _times(self, basis: Tensor) -> Tensor:
        inside = self._basis.mT @ basis
        shrunk = self._gram.float() @ inside - self._beyond.float() * inside
        return self._basis @ shrunk + self._beyond.float() * basis


class TruncatedSVD(NamedTuple):
    """What [`truncated_svd`] returns."""

    basis: Tensor
    """`U`, orthonormal columns, of shape (m, k)."""
    singular_values: Tensor
    """`s`, largest first, of shape (k,)."""
    next_singular_value: float
    """`t` with `‖D Dᵀ − U diag(s²) Uᵀ‖₂ ≤ t²`: the (k+1)-th singular value, or for large matrices a bound of it."""


def frobenius_norm(matrix: Tensor) -> float:
    """Return `‖D‖_F`, summed in float64 block by block."""
    return math.sqrt(sum(block.double().square().sum().item() for block in matrix.split(1024)))


def truncated_svd(matrix: Tensor, threshold: float, rank: int | None = None) -> TruncatedSVD:
    """Return the left singular vectors of `D` (m x n, float32) whose singular values exceed a threshold, at least one.

    Small matrices are decomposed exactly. Large ones by a randomized decomposition (Halko, Martinsson and Tropp, SIAM
    Review 2011), whose error is computed afterwards, and which is made wider until the error is small enough; it may
    hold a few directions more than needed. With a threshold of 0, everything that float32 can resolve is kept; with a
    `rank`, at most that many, and `next_singular_value` may then exceed the threshold.
    """
    width = _START_WIDTH if rank is None else rank + max(_START_WIDTH, rank // 2)
    is_small = min(matrix.shape) <= _EXACT_SVD_UP_TO or (threshold == 0 and rank is None)
    while not is_small and width <= min(matrix.shape) // 4:
        U, S, _ = _randomized_svd(matrix, width, 8)
        # One in ten above the threshold, so that the bound, which is a little too high, can still reach it.
        wanted = max(1, int((S.double().square() > 0.9 * threshold**2).sum()))
        is_capped = rank is not None and wanted >= rank
        kept = min(wanted, rank or wanted)
        if is_capped or kept <= 3 * width // 4:  # with columns to spare, without which the last ones are inaccurate
            basis, values = U[:, :kept].contiguous(), S[:kept].contiguous()
            bound = _squared_error_bound(matrix, basis, values)
            if is_capped or bound <= threshold**2:
                return TruncatedSVD(basis, values, math.sqrt(bound))
        width *= 2
    return _exact_svd(matrix, threshold, rank)


def _exact_svd(matrix: Tensor, threshold: float, rank: int | None) -> TruncatedSVD:
    """Decompose the Gram matrix of the smaller side, in float64."""
    is_wide = matrix.shape[0] <= matrix.shape[1]
    squares, vectors = torch.linalg.eigh(_gram(matrix if is_wide else matrix.mT))
    values = squares.clamp(min=0).sqrt().flip(0)
    kept = max(1, int((values > max(threshold, _RESOLUTION * values[0].item())).sum()))
    kept = min(kept, rank or kept)
    top = vectors[:, -kept:].flip(1).float()
    # From right to left singular vectors: D V = U S. The QR step keeps the columns orthonormal where S is tiny.
    del squares, vectors  # what follows is as large again
    basis = top if is_wide else torch.linalg.qr(matrix @ top).Q
    following = values[kept].item() if kept < len(values) else 0.0
    return TruncatedSVD(basis.contiguous(), values[:kept].float(), following)


def _randomized_svd(matrix: Tensor, width: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    with torch.random.fork_rng([matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)
        U, S, V = torch.svd_lowrank(matrix, q=width, niter=iterations)
        return U, S, V


def _gram(matrix: Tensor) -> Tensor:
    """Return `D Dᵀ` in float64, never holding more than 1,024 columns of `D` in float64."""
    gram = matrix.new_zeros(matrix.shape[0], matrix.shape[0], dtype=torch.float64)
    for block in matrix.split(1024, dim=1):
        columns = block.double()
        gram.addmm_(columns, columns.mT)
    return gram


def _squared_error_bound(matrix: Tensor, basis: Tensor, values: Tensor) -> float:
    """Return an upper bound of `‖D Dᵀ − U diag(s²) Uᵀ‖₂`: how far `U` is from invariant, plus what lies beyond it."""
    drift = matrix @ (matrix.mT @ basis) - basis * values.square()
    mixing = torch.linalg.eigvalsh((drift.mT @ drift).double())[-1].clamp(min=0).sqrt().item()
    return _squared_norm_bound(matrix, basis) + mixing


def _squared_norm_bound(matrix: Tensor, basis: Tensor) -> float:
    """Return an upper bound of `‖(I − U Uᵀ) D‖₂²`, by `‖G‖₂ ≤ ‖G^p‖_F^(1/p)` for the Gram matrix `G` of the rest."""
    rest = outside(matrix, basis)
    gram = rest @ rest.mT if rest.shape[0] <= rest.shape[1] else rest.mT @ rest
    logarithm = 0.0
    for squaring in range(_SQUARINGS):
        norm = gram.norm().item()
        if norm == 0:
            return 0.0
        logarithm += math.log(norm) / 2**squaring
        gram = gram / norm
        gram = gram @ gram
    return math.exp(logarithm + math.log(max(gram.norm().item(), 1e-30)) / 2**_SQUARINGS)
