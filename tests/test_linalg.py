"""The tensor mathematics, against dense float64 formulas."""

import pytest
import torch

from safe_trainer import linalg as subspace


def dense_operator(basis: torch.Tensor, eigenvalues: torch.Tensor) -> torch.Tensor:
    return torch.eye(basis.shape[0], dtype=basis.dtype) - basis @ torch.diag(eigenvalues) @ basis.mT


@pytest.mark.parametrize("shape", [(12, 12, 4), (16, 5, 16), (7, 3, 1)])
def test_outside_equals_the_dense_operator(shape: tuple[int, int, int]) -> None:
    d, n, k = shape
    torch.manual_seed(0)
    matrix, basis = torch.randn(d, n).double(), torch.linalg.qr(subspace.random_basis(d, k, seed=1).double()).Q
    projected = subspace.outside(matrix, basis)
    assert torch.allclose(projected, dense_operator(basis, torch.ones(k).double()) @ matrix)
    assert torch.allclose(subspace.outside(projected, basis), projected), "an orthogonal projector is idempotent"


def test_product_norm_squared_equals_the_norm_of_the_product_and_so_does_its_gradient() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(20, 4).double().requires_grad_(), torch.randn(4, 30).double().requires_grad_()
    factored, dense = subspace.product_norm_squared(left, right), (left @ right).square().sum()
    assert torch.allclose(factored, dense)
    for ours, theirs in zip(
        torch.autograd.grad(factored, (left, right)), torch.autograd.grad(dense, (left, right)), strict=True
    ):
        assert torch.allclose(ours, theirs)
    assert torch.allclose(subspace.product_norm_squared(left), left.square().sum())


def test_product_norm_squared_has_a_gradient_where_the_product_is_zero() -> None:
    left, right = torch.zeros(5, 2, requires_grad=True), torch.randn(2, 6)
    subspace.product_norm_squared(left, right).backward()
    assert torch.equal(left.grad, torch.zeros(5, 2))


def test_random_basis_is_orthonormal_and_depends_on_the_seed_alone() -> None:
    basis = subspace.random_basis(30, 7, seed=3)
    assert torch.allclose(basis.mT @ basis, torch.eye(7), atol=1e-5)
    torch.manual_seed(99)
    assert torch.equal(basis, subspace.random_basis(30, 7, seed=3))
    assert not torch.allclose(basis, subspace.random_basis(30, 7, seed=4))


SPECTRA = {
    "a gap before a flat tail": lambda i: torch.where(i <= 8, 8.0, 1.0),
    "a gap within a decaying one": lambda i: torch.where(i <= 8, 4.0, 1.0) * i**-0.5,
    "a steep one without a gap": lambda i: torch.exp(-i / 3),
    "two outliers above all else": lambda i: torch.where(i <= 2, 500.0, 1.0) * torch.where(i <= 8, 8.0, 1.0) * i**-0.5,
}


def columns_with(spectrum: torch.Tensor, count: int = 900) -> torch.Tensor:
    """Return random columns (d x count) whose singular values follow the spectrum."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum)).double()).Q
    return (basis * spectrum) @ torch.randn(len(spectrum), count).double()


def sine_between(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the sine of the largest principal angle between two spans."""
    one, other = one.double(), other.double()
    return torch.linalg.svdvals(one - other @ (other.mT @ one))[0].item()


@pytest.mark.parametrize("block", [37, 200])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_sketch_agrees_with_the_full_svd(spectrum: str, block: int) -> None:
    columns = columns_with(SPECTRA[spectrum](torch.arange(1, 65).double()))
    sketch = subspace.Sketch(64, 16)
    for part in columns.mT.float().split(block):
        sketch.add(part)
    found, (U, S, _) = sketch.top_directions(8), torch.linalg.svd(columns, full_matrices=False)
    assert sine_between(U[:, :8], found.basis) <= 1e-3
    assert torch.allclose(found.singular_values.double(), S[:8], rtol=1e-3)
    assert found.explained_variance == pytest.approx((S[:8] ** 2).sum().item() / (S**2).sum().item(), rel=1e-3)
    gram = found.basis.double().mT @ found.basis.double()
    assert (gram - torch.eye(8)).abs().max() < 3e-7
    assert sketch.count == 900


def test_sketch_is_exact_where_it_is_as_wide_as_the_space() -> None:
    columns = columns_with(torch.arange(1, 25).double() ** -0.3, count=300)
    sketch = subspace.Sketch(24, 40)
    for part in columns.mT.float().split(10):
        sketch.add(part)
    assert sine_between(torch.linalg.svd(columns).U[:, :7], sketch.top_directions(7).basis) < 1e-4


def test_sketch_needs_the_same_memory_whatever_it_has_seen() -> None:
    def held(sketch: subspace.Sketch) -> int:
        return sum(value.numel() for value in vars(sketch).values() if isinstance(value, torch.Tensor))

    sketch = subspace.Sketch(100, 10)
    before = held(sketch)
    for _ in range(20):
        sketch.add(torch.randn(30, 100))
    assert before == held(sketch) < 12 * 100


def test_sketch_gives_fewer_directions_where_the_columns_span_fewer() -> None:
    torch.manual_seed(0)
    plane = torch.randn(3, 50)
    sketch = subspace.Sketch(50, 16)
    for _ in range(4):
        sketch.add(torch.randn(6, 3) @ plane)
    found = sketch.top_directions(8)
    assert found.basis.shape == (50, 3) and found.explained_variance == pytest.approx(1.0, abs=1e-6)
    assert sine_between(torch.linalg.qr(plane.mT).Q, found.basis) < 1e-5
    assert subspace.Sketch(50, 16).top_directions(8).basis.shape == (50, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sketch_refuses_columns_that_are_not_finite(value: float) -> None:
    sketch = subspace.Sketch(20, 8)
    for part in (torch.randn(10, 20), torch.full((2, 20), value), torch.randn(10, 20)):
        sketch.add(part)
    with pytest.raises(FloatingPointError, match="infinite or NaN"):
        sketch.top_directions(4)


@pytest.mark.parametrize("shape", [(20, 20), (8, 30), (30, 8)])
def test_balanced_factors_are_those_of_the_singular_value_decomposition(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape).double()
    U, S, Vt = torch.linalg.svd(matrix, full_matrices=False)
    left, right = subspace.balanced_factors(matrix.float(), 5)
    assert left.shape == (shape[0], 5) and right.shape == (5, shape[1])
    assert torch.allclose(left.double() @ right.double(), U[:, :5] * S[:5] @ Vt[:5], atol=1e-5)
    assert torch.allclose(left.norm(dim=0).double(), S[:5].sqrt())
    assert torch.allclose(right.norm(dim=1).double(), S[:5].sqrt())
    assert not any(factor.any() for factor in subspace.balanced_factors(torch.zeros(shape), 5))


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (25, 25)])
def test_least_factors_are_those_of_the_dense_formula(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    W, X = torch.randn(shape).double(), columns_with(100 * torch.arange(1, shape[1] + 1).double() ** -2)
    U, S, _ = torch.linalg.svd(X)
    S = S.float().double()  # as they are held
    moments = U @ torch.diag(S**2) @ U.mT  # `X Xᵀ`
    C = moments + 0.01 * moments.diagonal().mean() * torch.eye(shape[1])
    U_c, S_c, Vt = torch.linalg.svd(W @ C, full_matrices=False)
    B0, A0 = U_c[:, -4:] * S_c[-4:].sqrt(), S_c[-4:, None].sqrt() * (Vt @ C.inverse())[-4:]
    inputs = subspace.TopDirections(U.float(), S.float(), moments.trace().item())
    for held in (inputs, inputs.at_most(shape[1] - 1)):  # the mean of one direction is that direction
        B, A = subspace.least_factors(W.float(), held, 4)
        assert B.dtype == A.dtype == torch.float32
        assert torch.allclose(B.double() @ A.double(), B0 @ A0, atol=1e-5)
        assert B.norm() == pytest.approx(A.norm().item(), rel=1e-5)
        signs = torch.diag((B * B0).sum(0).sign())  # singular vectors are unique up to sign
        assert torch.allclose(B.double() / B.norm(), B0 @ signs / B0.norm(), atol=1e-5)
    many = subspace.TopDirections(U.float(), 30 * S.float(), 900 * moments.trace().item())
    assert torch.allclose(subspace.least_factors(W, many, 4)[0], B, atol=1e-5), "a scale of the inputs shows"


def test_least_factors_of_nothing_are_nothing_and_without_inputs_those_of_the_weight() -> None:
    torch.manual_seed(0)
    nothing = subspace.TopDirections(torch.zeros(9, 0), torch.zeros(0), 0.0)
    assert not any(factor.any() for factor in subspace.least_factors(torch.zeros(7, 9), nothing, 2))
    W = torch.randn(7, 9)
    U, S, Vt = torch.linalg.svd(W)
    B, A = subspace.least_factors(W, nothing, 2)
    assert torch.allclose(B @ A, U[:, 5:] * S[5:] @ Vt[5:7], atol=1e-5)


def test_balanced_factors_of_large_matrices_leave_torch_its_random_numbers() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(600, 700) * torch.arange(1, 701) ** -0.5
    U, S, Vt = torch.linalg.svd(matrix, full_matrices=False)
    state = torch.get_rng_state()
    left, right = subspace.balanced_factors(matrix, 8)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(left, subspace.balanced_factors(matrix, 8)[0])
    best = U[:, :8] * S[:8] @ Vt[:8]
    assert (matrix - left @ right).norm() <= (matrix - best).norm() * (1 + 1e-5)


def test_compact_factors_keep_the_product_with_the_fewest_columns() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(20, 3) @ torch.randn(3, 8), torch.randn(8, 30)
    fewer = subspace.compact_factors(left, right)
    assert fewer[0].shape == (20, 3) and fewer[1].shape == (3, 30)
    assert torch.allclose(fewer[0] @ fewer[1], left @ right, atol=1e-4)
    assert [factor.shape for factor in subspace.compact_factors(torch.zeros(20, 8), right)] == [(20, 1), (1, 30)]


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("projector", [True, False])
def test_norm_outside_equals_projecting_first_and_so_does_its_gradient(factored: bool, projector: bool) -> None:
    torch.manual_seed(0)
    left = torch.randn(20, 4).double().requires_grad_()
    right = torch.randn(4, 30).double() if factored else None
    basis = torch.linalg.qr(torch.randn(20, 6).double()).Q
    eigenvalues = None if projector else 1.5 * torch.rand(6).double()
    ours = subspace.outside_norm_squared(left, right, basis, eigenvalues)
    operator = dense_operator(basis, torch.ones(6).double() if eigenvalues is None else eigenvalues)
    theirs = subspace.product_norm_squared(operator @ left, right)
    assert torch.allclose(ours, theirs)
    assert torch.allclose(*(torch.autograd.grad(norm, left)[0] for norm in (ours, theirs)))
    within = basis @ torch.randn(6, 4).double()
    assert 0 <= subspace.outside_norm_squared(within, right, basis) < 1e-10
