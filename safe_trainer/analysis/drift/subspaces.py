"""What an update is measured against: the alignment direction, and the subspaces in which the model's safety works."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ...artifacts import AlignmentDirection, SafetyBasis
from ...linalg import outside_norm_squared, product_norm_squared
from .updates import Factors

RANK = 16

FIGURES = {
    "alignment": "share along the alignment direction",
    "outputs": "share in the safety features' outputs",
    "inputs": "share in the safety features' inputs",
}


@dataclass(frozen=True)
class Subspaces:
    """Orthonormal directions by layer, of up to three kinds.

    Args:
        alignment (`Mapping[str, Tensor]`): Top left singular vectors of the alignment direction, (d_out, k).
        outputs (`Mapping[str, Tensor]`): What each layer says when the model refuses, (d_out, k).
        inputs (`Mapping[str, Tensor]`): What each layer reads in harmful prompts, (d_in, k).

    Example:

    ```python
    subspaces = Subspaces.load("direction.safetensors", "basis.safetensors")
    ```
    """

    alignment: Mapping[str, Tensor] = field(default_factory=dict)
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        direction: AlignmentDirection | str | Path | None = None,
        basis: SafetyBasis | str | Path | None = None,
        rank: int = RANK,
    ) -> Subspaces:
        """Take the leading directions of what was made before.

        Args:
            direction ([`AlignmentDirection`], `str` or `Path`, *optional*): See `safe-trainer direction`.
            basis ([`SafetyBasis`], `str` or `Path`, *optional*): See `safe-trainer basis`.
            rank (`int`, *optional*, defaults to `16`): Directions of each kind and layer; fewer where there are fewer.

        Raises:
            ValueError: If `rank` is below 1, or a file is damaged.
        """
        if rank < 1:
            raise ValueError(f"`rank` must be at least 1, got {rank}.")
        if isinstance(direction, str | Path):
            direction = AlignmentDirection.load(direction)
        if isinstance(basis, str | Path):
            basis = SafetyBasis.load(basis)
        return cls(
            {name: factors.U[:, :rank] for name, factors in direction.modules.items()} if direction else {},
            {name: leading.top(rank) for name, leading in basis.outputs.items()} if basis else {},
            {name: leading.top(rank) for name, leading in basis.inputs.items()} if basis else {},
        )

    def check(self, layers: Collection[str]) -> None:
        """Refuse directions that have no layer in common with a model, given the names of its linear layers."""
        for figure in FIGURES:
            named = getattr(self, figure)
            if named and not any(name in layers for name in named):
                raise ValueError(
                    f"The directions ({figure}) have no layer in common with the model: theirs are called as in "
                    f"`{next(iter(named))}`. Make them for the model that is fine-tuned."
                )

    def held(self, name: str, update: Factors) -> dict[str, float]:
        """Return how much of `‖ΔW‖²` lies in each subspace that is known for the layer; `"all"` is the whole.

        Args:
            name (`str`): The layer.
            update ([`Factors`]): Its update; never multiplied out.

        Raises:
            ValueError: If a subspace belongs to a layer of another size.
        """
        left, right = update
        whole = product_norm_squared(left, right).item()
        found = {"all": whole}
        for figure, (basis, rows, columns) in self._sides(name, left, right).items():
            if len(basis) != len(rows):
                raise ValueError(
                    f"The directions of `{name}` have {len(basis)} entries and its update {len(rows)} ({figure}): "
                    "they belong to another model. Make them for the one that was fine-tuned."
                )
            beyond = outside_norm_squared(rows, columns, basis.to(rows.device, rows.dtype)).item()
            found[figure] = max(0.0, whole - beyond)
        return found

    def expected(self, name: str) -> dict[str, float]:
        """Return the share that a random update would have in each subspace: k / d."""
        named = {figure: getattr(self, figure).get(name) for figure in FIGURES}
        return {figure: basis.shape[1] / basis.shape[0] for figure, basis in named.items() if basis is not None}

    def _sides(self, name: str, left: Tensor, right: Tensor | None) -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
        """Return each basis with the factors of the update, turned so that the basis is on their left."""
        turned = (left.mT, None) if right is None else (right.mT, left.mT)
        sides = {figure: (left, right) for figure in ("alignment", "outputs")} | {"inputs": turned}
        bases = {figure: getattr(self, figure).get(name) for figure in sides}
        return {figure: (basis, *sides[figure]) for figure, basis in bases.items() if basis is not None}
