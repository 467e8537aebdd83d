"""Make the files of format 1 and the numbers that they give. Run once, with the version that still wrote them.

    PYTHONPATH=<checkout of that version> python tests/format1/make.py

The test beside this folder reads the files with today's code, and measures the same again from nothing.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import tiny  # noqa: E402, beside this folder

from safe_trainer import AlignmentDirection, SafetyBasis, train_security_vectors  # noqa: E402
from safe_trainer.data import conversation  # noqa: E402

REFUSALS = [conversation(f"Make {'very ' * (i % 3)}bad thing {i}.", f"I will not make {i * 7}.") for i in range(12)]
HARMFUL = [conversation(f"Do harm {i}", "Sure thing.") for i in range(10)]
IDS = torch.arange(4, 24)[None] * 7 % tiny.VOCABULARY


def columns(rows: int, count: int = 3) -> torch.Tensor:
    """Return fixed columns that lie in no subspace in particular."""
    return torch.cos(torch.arange(rows * count).double() * 1.7).reshape(rows, count)


def of_direction(direction) -> dict[str, list[float]]:
    """Return per module: ‖d‖_F, the stated error, ‖(I - C) X‖² and ‖U Uᵀ X‖² for fixed columns `X`."""
    found = {}
    for name, factors in direction.modules.items():
        U, s, X = factors.U.double(), factors.singular_values.double(), columns(factors.shape[0])
        outside = X - U @ (s[:, None] ** 2 / factors.frobenius_norm * (U.mT @ X))
        norms = outside.square().sum().item(), (U.mT @ X).square().sum().item()
        found[name] = [factors.frobenius_norm, factors.error_bound, *norms]
    return found


def of_basis(basis) -> dict[str, list[float]]:
    """Return per layer and side: the energy, the squared singular values' sum, and ‖U Uᵀ X‖²."""
    found = {}
    for side in ("output", "input"):
        for name, top in basis.side(side).items():
            squares = top.singular_values.double().square().sum().item()
            inside = (top.basis.double().mT @ columns(len(top.basis))).square().sum().item()
            total = top.total_variance if hasattr(top, "total_variance") else top.energy
            found[f"{name}.{side}"] = [total, squares, inside]
    return found


def of_vectors(vectors) -> dict[str, list[float]]:
    """Return per layer ‖B A X‖² and one entry of `B A`."""
    found = {}
    for name, (A, B) in vectors.modules.items():
        product = B.double() @ A.double()
        found[name] = [(product @ columns(A.shape[1])).square().sum().item(), product[0, 0].item()]
    return found


def speaking():
    """Return a tiny model with a head of such weight that it can be sure of a token."""
    model = tiny.model()
    with torch.no_grad():
        model.get_output_embeddings().weight *= 30
    return model


def measured_direction():
    """Return the direction between two tiny models."""
    with tempfile.TemporaryDirectory() as folder:
        return AlignmentDirection.from_checkpoints(*tiny.save_pair(folder), rank=6)


def measured_basis():
    """Return the basis of a tiny model, both sides."""
    return SafetyBasis.from_rows(tiny.model(), tiny.tokenizer(), REFUSALS, sides=("output", "input"), rank=6)


if __name__ == "__main__":
    direction, basis = measured_direction(), measured_basis()
    for role in ("aligned", "unaligned"):
        direction.provenance[role]["source"] = role  # not the temporary folder
    settings = {"rank": 4, "learning_rate": 1e-2, "batch_size": 5, "target_loss": 0.5, "max_length": 60}
    vectors = train_security_vectors(speaking(), HARMFUL, tiny.tokenizer(), **settings)
    direction.save(HERE / "direction.safetensors")
    basis.save(HERE / "basis.safetensors")
    vectors.save(HERE / "vectors")
    numbers = {"direction": of_direction(direction), "basis": of_basis(basis), "vectors": of_vectors(vectors)}
    (HERE / "numbers.json").write_text(json.dumps(numbers, indent=1))
