"""The truncated SVD against a full decomposition in float64: the stated bound must hold, whatever the spectrum."""

from __future__ import annotations

import math

import pytest
import torch

from safe_trainer import linalg
from safe_trainer.linalg import frobenius_norm, truncated_svd

ROWS, COLUMNS = 420, 560


def matrix(kind, seed=0, shape=(ROWS, COLUMNS)):
    """Return a matrix with a spectrum as differences of checkpoints have it, or one that is hard to decompose."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator)
    left, right = (torch.linalg.qr(torch.randn(n, 30, generator=generator)).Q for n in shape)
    planted = left @ torch.diag(torch.logspace(2, 0, 30)) @ right.T
    tied = left @ torch.diag(torch.full((30,), 50.0)) @ right.T
    return {"noise": noise, "low rank": planted, "mixed": planted + 0.2 * noise, "tied": tied + 0.01 * noise}[kind]


def error_of(d, found):
    """Return `‖D Dᵀ − U diag(s²) Uᵀ‖₂` in float64."""
    d, basis = d.double(), found.basis.double()
    difference = d @ d.T - basis @ torch.diag(found.singular_values.double() ** 2) @ basis.T
    return torch.linalg.eigvalsh(difference).abs().max().item()


@pytest.fixture
def large(monkeypatch):
    """Treat the matrices of these tests as too large for a full decomposition."""
    monkeypatch.setattr(linalg, "_EXACT_SVD_UP_TO", 0)


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (60, 60)])
def test_small_matrices_are_decomposed_exactly(shape):
    d = matrix("mixed", shape=shape)
    s = torch.linalg.svdvals(d.double())
    found = truncated_svd(d, threshold=s[20].item())
    assert found.basis.shape == (shape[0], 20)
    torch.testing.assert_close(found.singular_values.double(), s[:20], rtol=1e-6, atol=0)
    assert found.next_singular_value == pytest.approx(s[20].item(), rel=1e-6)
    assert error_of(d, found) == pytest.approx(s[20].item() ** 2, rel=1e-4)


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
def test_threshold_zero_keeps_all_that_float32_can_resolve(shape):
    left, right = (torch.linalg.qr(torch.randn(n, 40, dtype=torch.float64)).Q for n in shape)
    d = (left @ torch.diag(torch.logspace(0, -9, 40, dtype=torch.float64)) @ right.T).float()
    found = truncated_svd(d, threshold=0.0)
    assert 20 <= found.basis.shape[1] <= 40
    assert (found.basis.T @ found.basis - torch.eye(found.basis.shape[1])).abs().max() < 1e-5
    assert error_of(d, found) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["noise", "low rank", "mixed", "tied"])
@pytest.mark.parametrize("seed", range(3))
def test_bound_of_large_matrices_holds_and_is_near(large, kind, seed):
    d = matrix(kind, seed)
    s = torch.linalg.svdvals(d.double())
    for count in (1, 10, 29):
        threshold = 1.02 * s[count].item()
        found = truncated_svd(d, threshold)
        error = error_of(d, found)
        assert error <= found.next_singular_value**2 + 1e-5 * s[0].item() ** 2
        assert found.next_singular_value <= threshold
        assert s[found.basis.shape[1]] <= 1.00001 * found.next_singular_value  # Eckart and Young
        needed = max(1, int((s > threshold).sum()))
        assert needed <= found.basis.shape[1] <= max(needed, int((s > 0.92 * threshold).sum()))


@pytest.mark.parametrize("kind", ["noise", "mixed"])
def test_rank_of_large_matrices_is_kept_and_its_error_stated(large, kind):
    d = matrix(kind)
    s = torch.linalg.svdvals(d.double())
    found = truncated_svd(d, threshold=0.0, rank=12)
    assert found.basis.shape == (ROWS, 12)
    assert error_of(d, found) <= found.next_singular_value**2 <= 1.2 * s[12].item() ** 2


def test_bound_sees_a_direction_that_the_basis_missed():
    d = matrix("tied")  # thirty equal singular values: nothing tells one of them from the others
    left = torch.linalg.svd(d).U
    missed = torch.cat([left[:, :10], left[:, 11:30]], dim=1)
    assert linalg._squared_norm_bound(d, missed) >= 0.99 * 50.0**2
    assert linalg._squared_norm_bound(d, left[:, :30]) < 1.0


def test_same_matrix_gives_the_same_factors_whatever_the_global_seed(large):
    torch.manual_seed(1)
    first = truncated_svd(matrix("mixed"), 3.0)
    torch.manual_seed(2)
    assert torch.equal(first.basis, truncated_svd(matrix("mixed"), 3.0).basis)


def test_directions_fall_back_to_the_full_decomposition_when_most_are_needed(large):
    d = matrix("noise")
    s = torch.linalg.svdvals(d.double())
    found = truncated_svd(d, threshold=s[300].item())
    assert found.basis.shape == (ROWS, 300)
    assert found.next_singular_value == pytest.approx(s[300].item(), rel=1e-6)


def test_frobenius_norm_is_summed_in_float64():
    d = torch.full((3000, 2), 1e-3)
    assert frobenius_norm(d) == pytest.approx(math.sqrt(6000) * d[0, 0].item(), rel=1e-12)
