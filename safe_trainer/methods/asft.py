"""AsFT: anchor safety in fine-tuning by a penalty on updates that leave the alignment direction."""

from __future__ import annotations

import logging
import statistics
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from .. import linalg
from ..artifacts.alignment_direction import AlignmentDirection, DirectionFactors
from ..distributed import on_first_process
from ..lora import updates as adapters
from ..lora.loading import named, source_of
from .base import (
    FormField,
    MethodCard,
    Paper,
    PenaltyMethod,
    SelfCheck,
    check_choices,
    check_number,
    check_whole,
    moved,
)

logger = logging.getLogger(__name__)

Projector = Literal["published", "subspace", "random", "none"]


@dataclass
class AsFT(PenaltyMethod):
    """Anchoring Safety in Fine-Tuning: adds `λ Σ ‖(I − C) ΔW‖_F²` to the loss.

    For each target weight the *alignment direction* is `d = W_aligned − W_unaligned`, what alignment did to it (the
    chat checkpoint minus the base checkpoint). The penalty keeps the update `ΔW` of fine-tuning close to it. It is
    computed from the factors of `ΔW = B A` and of `C = U diag(c) Uᵀ`; a step forms no d_out x d_in matrix.

    When to use it: for LoRA or full-parameter fine-tuning of a model whose unaligned sibling is available, on data
    that may hold harmful rows. What to know: the published `C = d dᵀ / ‖d‖_F` is not a projector; its eigenvalues are
    usually far below one, so the penalty is close to `λ‖ΔW‖²`, which `projector="none"` is exactly: compare with it
    and with `"random"`. Not to be confused with *Anchored SFT*, which some trainers call `asft`.

    Args:
        unaligned_model (`str`, *optional*): The checkpoint before alignment, such as `"Qwen/Qwen2.5-0.5B"`: Hub id or
            path. Give this or `direction`.
        direction ([`AlignmentDirection`], `str` or `Path`, *optional*): A direction computed before, or its file.
        weight (`float`, *optional*, defaults to `1.0`): `λ`. The paper's value is 1; `0` only measures.
        projector (`str`, *optional*, defaults to `"published"`): `"published"`: `C = d dᵀ / ‖d‖_F`, the authors'
            formula. `"subspace"`: `C = U_k U_kᵀ`, the orthogonal projector on the top left singular vectors of `d`.
            Controls: `"random"`, a random subspace of the same size, and `"none"`, `C = 0`, without any direction.
        rank (`int`, *optional*, defaults to `16`): `k`, also the number of vectors in the shares that are reported.
        scaled (`bool`, *optional*, defaults to `False`): Whether a LoRA update is `scaling · B A`, as the layer
            applies it, or `B A`, as in the authors' code.
        aligned_model (`str`, *optional*): The checkpoint after alignment; defaults to the one that is fine-tuned.
        seed (`int`, *optional*, defaults to `0`): Seed of `projector="random"`.

    Raises:
        ValueError: If a setting is out of its range, the direction is missing or does not fit the model, or the PEFT
            configuration is not plain LoRA.
        FloatingPointError: If the penalty becomes infinite or NaN while training; names the layers.

    Example:

    ```python
    >>> from safe_trainer import AsFT
    >>> AsFT(unaligned_model="Qwen/Qwen2.5-0.5B", weight=1.0).projector
    'published'

    ```

    Source: Yang et al., "AsFT: Anchoring Safety During LLM Fine-Tuning Within Narrow Safety Basin", AAAI 2026,
    arXiv 2506.08473, section 4. From the paper: the penalty, `weight=1.0`, `projector="published"`, `scaled=False`.
    Ours: the factored form, `"subspace"`, the controls, full-parameter training.
    """

    name: ClassVar[str] = "AsFT"
    tag: ClassVar[str] = "asft"
    paper: ClassVar[Paper] = Paper(
        "AsFT: Anchoring Safety During LLM Fine-Tuning Within Narrow Safety Basin",
        author="Yang, Shuo and others",
        year=2026,
        arxiv="2506.08473",
        venue="Proceedings of the AAAI Conference on Artificial Intelligence",
    )
    card: ClassVar[MethodCard] = MethodCard(
        title="AsFT",
        summary="A penalty keeps every update close to the direction in which alignment once moved the model.",
        needs="the checkpoint before alignment, such as Qwen2.5-0.5B for Qwen2.5-0.5B-Instruct",
        cost="a penalty in each step, and task accuracy that falls as `weight` grows",
        avoid="a model whose checkpoint before alignment is not available, or a task where every point counts",
        fields=(
            FormField("weight", "AsFT: weight λ", 0.0, 100.0, 0.1, help="Larger protects more and learns less."),
            FormField("projector", "AsFT: projector", choices=get_args(Projector)),
        ),
        example=lambda given: AsFT(unaligned_model=given.unaligned_model, weight=10.0),
        needs_unaligned=True,
    )

    unaligned_model: str | None = None
    direction: AlignmentDirection | str | Path | None = None
    weight: float = 1.0
    projector: Projector = "published"
    rank: int = 16
    scaled: bool = False
    aligned_model: str | None = None
    seed: int = 0
    _operators: dict[str, tuple[Tensor, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _factors: dict[str, DirectionFactors] = field(default_factory=dict, init=False, repr=False, compare=False)
    _updates: dict[str, adapters.Update] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_number(self, "weight", "The paper uses 1.0.")
        check_choices(self, projector=Projector)
        check_whole(self, rank=1)
        if self.direction is not None and self.unaligned_model is not None:
            raise ValueError("Give `unaligned_model` or `direction`, not both: a direction already knows its models.")
        if self.direction is None and self.unaligned_model is None and self.projector != "none":
            raise ValueError(
                "AsFT needs the alignment direction: give `unaligned_model` (the checkpoint before alignment) or "
                "`direction` (an AlignmentDirection, or the file that `safe-trainer direction` wrote)."
            )

    def check_model(self, model: nn.Module) -> None:
        """Refuse a `rank` that no direction of the layers can have, where the projector has exactly that rank."""
        for name, update in adapters.updates(model, self.name, copied=False).items():
            if self.projector in ("subspace", "random") and self.rank > min(update.shape):
                raise ValueError(
                    f"`rank` must be at most {min(update.shape)}, the smaller side of `{name}`, got {self.rank}."
                )

    def attach(self, model: nn.Module, tokenizer: Any, train_dataset: Any) -> None:
        """Load or compute the direction and match it with the trained layers by name."""
        self._updates = adapters.updates(model, self.name, self.scaled)
        self.covered_layers = list(self._updates)
        self._operators, self._factors = {}, {}
        if self.projector == "none":
            return
        direction = self._direction(model)
        self.provenance = direction.provenance
        direction.check_fits({name: update.shape for name, update in self._updates.items()})
        _compare_sources(direction, self.aligned_model or source_of(model))
        self._factors = {name: direction.modules[name] for name in self._updates}
        self._operators = {name: self._operator(name, factors) for name, factors in self._factors.items()}

    def self_check(self, model: nn.Module) -> SelfCheck:
        """Return how much of the direction its top `rank` vectors hold, and the eigenvalues of `C`."""
        figures = {}
        if self._operators:
            largest = [eigenvalues.max().item() for _, eigenvalues in self._operators.values()]
            energies = [
                d.singular_values[: self.rank].double().square().sum().item() / d.frobenius_norm**2
                for d in self._factors.values()
            ]
            figures = {
                f"direction energy in the top {self.rank} (mean)": statistics.fmean(energies),
                "largest eigenvalue of C (median)": statistics.median(largest),
            }
        return SelfCheck(figures, super().self_check(model).warnings)

    def terms(self, model: nn.Module) -> dict[str, Tensor]:
        """Return `‖(I − C) ΔW‖_F²` of each layer."""
        return {name: self._norm_outside(name) for name in self._updates}

    def diagnostics(self, model: nn.Module) -> dict[str, float]:
        """Return for each layer the share of `‖ΔW‖_F²` outside the span of the direction's top `rank` vectors.

        A random update would show `1 − rank / d_out`, which is logged as `asft/outside_expected`. Empty for
        `projector="none"`, which knows no direction.
        """
        shares: dict[str, float] = {}
        with torch.no_grad():
            for name, factors in self._factors.items():
                left, right = self._updates[name].factors()
                span = factors.U[:, : self.rank]
                total = linalg.product_norm_squared(left, right).item()
                if total > 0:
                    outside = linalg.outside_norm_squared(left, right, span.to(left.device)).item()
                    shares[f"asft/outside/{name}"] = outside / total
                    shares[f"asft/outside_expected/{name}"] = 1 - span.shape[1] / span.shape[0]
        return shares

    def _norm_outside(self, name: str) -> Tensor:
        left, right = self._updates[name].factors()
        if name not in self._operators:
            return linalg.product_norm_squared(left, right)
        return linalg.outside_norm_squared(left, right, *moved(self._operators, name, left.device))

    def _operator(self, name: str, factors: DirectionFactors) -> tuple[Tensor, Tensor]:
        """Return `U` (d_out x k) and the eigenvalues `c` (k,) of `C = U diag(c) Uᵀ`."""
        if self.projector == "published":
            return factors.U, factors.singular_values**2 / factors.frobenius_norm
        basis = factors.U[:, : self.rank]
        if basis.shape[1] < self.rank:
            raise ValueError(
                f"`rank` must be at most {basis.shape[1]}, which is what the direction holds for `{name}`, got "
                f"{self.rank}. Lower `rank`, or compute the direction with `rank={self.rank}, max_error=0`."
            )
        if self.projector == "random":  # with another seed for each layer, or layers of one shape would share it
            d_out, k = basis.shape
            basis = linalg.random_basis(d_out, k, self.seed + zlib.crc32(name.encode()))
        return basis, torch.ones(basis.shape[1])

    def _direction(self, model: Any) -> AlignmentDirection:
        if self.direction is not None:
            given = self.direction
            return given if isinstance(given, AlignmentDirection) else AlignmentDirection.load(given)
        aligned = self.aligned_model or named(model)
        if not aligned:
            raise ValueError(
                "The model has no checkpoint that the alignment direction could start from (its `name_or_path` is "
                "empty). Give `aligned_model`, or a `direction` made with `AlignmentDirection.from_checkpoints`."
            )
        logger.info("Computing the alignment direction from %s and %s", aligned, self.unaligned_model)
        # For a projector exactly `rank` vectors, however little they leave out.
        size: dict[str, Any] = {} if self.projector == "published" else {"rank": self.rank, "max_error": 0.0}
        return on_first_process(
            lambda: AlignmentDirection.from_checkpoints(
                aligned, str(self.unaligned_model), modules=list(self._updates), **size
            )
        )


def _compare_sources(direction: AlignmentDirection, source: str) -> None:
    """Warn where shapes fit but the direction was computed for a model of another name: it may be another model's."""
    aligned = direction.provenance.get("aligned", {}).get("source", "")
    if source and aligned and Path(source).name != Path(aligned).name:
        logger.warning(
            "The alignment direction was computed for `%s`, and `%s` is being fine-tuned. Shapes fit; if it is not "
            "the same model, compute the direction again: `safe-trainer direction %s %s`.",
            *(aligned, source, source, direction.provenance.get("unaligned", {}).get("source", "UNALIGNED")),
        )
