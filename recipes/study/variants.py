"""How the study protects the model: each method as the demo sets it, its controls, and what users would try first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import pair

from safe_trainer import AlignmentDirection, AsFT, DriftPenalty, SafetyBasis, SaLoRA, SecurityVectors, poison, testbed
from safe_trainer.artifacts import Fitting
from safe_trainer.data import Row
from safe_trainer.methods import SafetyMethod
from safe_trainer.testbed.experiment import BATCH_SIZE, LEARNING_RATE, Scenario

COMBINED = "vectors + drift penalty"
"""What `safety="recommended"` was when the committed runs were made; it is another combination now."""
FIT = {"max_steps": 300, "target_loss": 0.02}
"""How vectors were fitted for the committed runs."""
WIDEST = 127
"""Input directions that are measured: one fewer than the narrowest layer of the embedded pair has."""


@dataclass(frozen=True)
class Variant:
    """One way to fine-tune.

    Args:
        methods (`Callable`): Makes the safety methods.
        learning_rate (`float`, *optional*): Another than the scenario's.
        steps (`float`, *optional*, defaults to `1.0`): Share of the scenario's steps after which to stop; with `0` the
            model stays as it was.
        refusals (`float`, *optional*, defaults to `0.0`): Share of the rows whose places safety rows take.
    """

    methods: Callable[[], Sequence[SafetyMethod]] = tuple
    learning_rate: float = LEARNING_RATE
    steps: float = 1.0
    refusals: float = 0.0

    def rows(self, scenario: Scenario, seed: int) -> list[Row]:
        """Return the training rows."""
        rows = scenario.rows(seed)
        if not self.refusals:
            return rows
        return poison(
            rows, testbed.refusal_rows(round(self.refusals * len(rows)), testbed.OWN_ROWS), self.refusals, seed
        )


@cache
def _model() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(pair.ALIGNED), AutoTokenizer.from_pretrained(pair.ALIGNED)


def _harmful() -> list[Row]:
    return pair.rows(testbed.harmful_rows(100, testbed.OWN_ROWS))


@cache
def _basis() -> SafetyBasis:
    return SafetyBasis.from_rows(*_model(), _harmful(), sides=("input",), rank=WIDEST)


@cache
def _direction(rank: int | None) -> AlignmentDirection:
    exactly: dict[str, Any] = {} if rank is None else {"rank": rank, "max_error": 0.0}
    return AlignmentDirection.from_checkpoints(pair.ALIGNED, pair.UNALIGNED, **exactly)


@cache
def _fitted(**settings: Any) -> Any:
    from safe_trainer import train_security_vectors

    return train_security_vectors(pair.ALIGNED, _harmful(), **{**FIT, **settings})


def asft(weight: float, projector: Any = "published") -> AsFT:
    """Return AsFT with the direction of the embedded pair."""
    if projector == "none":
        return AsFT(projector="none", weight=weight)
    return AsFT(direction=_direction(None if projector == "published" else 16), projector=projector, weight=weight)


def salora(**settings: Any) -> SaLoRA:
    """Return SaLoRA with the refusals of the embedded language."""
    return SaLoRA(safety_data=pair.rows(testbed.refusal_rows(128, testbed.OWN_ROWS)), **settings)


def inputs(rank: int = 64, **settings: Any) -> SaLoRA:
    """Return SaLoRA that protects what layers read in harmful prompts, from LoRA's own start."""
    return SaLoRA(basis=_basis(), protect="input", rank=rank, task_rank=0, **settings)


def vectors(strength: float = 1.0, **settings: Any) -> SecurityVectors:
    """Return security vectors, fitted once in each process."""
    return SecurityVectors(_fitted(**settings), strength=strength)


def drift(weight: float = DriftPenalty.weight) -> DriftPenalty:
    """Return the penalty on what changes in harmful prompts."""
    return DriftPenalty(basis=_basis(), weight=weight)


SETTINGS = {
    "learning rate": LEARNING_RATE,
    "batch size": BATCH_SIZE,
    "drift penalty": (DriftPenalty.weight, DriftPenalty.rank),
    "SaLoRA": (SaLoRA.rank, SaLoRA.task_rank, SaLoRA.protect),
    "AsFT": (AsFT.rank, AsFT.projector, AsFT.scaled),
    "security vectors": (
        SecurityVectors.strength,
        *(value for name, value in asdict(Fitting(**FIT)).items() if name not in ("max_passes", "relative_target")),
    ),
}
"""The library's defaults that runs are made with: rows in the tables were measured at those that a test pins."""

BEFORE = "before"

METHODS: dict[str, Variant] = {
    "plain LoRA": Variant(),
    COMBINED: Variant(lambda: [vectors(), drift()]),
    "security vectors": Variant(lambda: [vectors()]),
    "drift penalty": Variant(lambda: [drift()]),
    "vectors + inputs": Variant(lambda: [vectors(), inputs()]),
    "AsFT": Variant(lambda: [asft(10.0)]),
    "SaLoRA": Variant(lambda: [salora()]),
}
"""What the study compares, at the settings that `STRENGTHS` was run to choose."""

SIMPLE: dict[str, Variant] = {
    "plain LoRA, lr 5e-4": Variant(learning_rate=5e-4),
    "plain LoRA, a third of the steps": Variant(steps=1 / 3),
    "plain LoRA, 10 % refusals mixed in": Variant(refusals=0.1),
}
"""What needs no method, and what users would try first."""

CONTROLS: dict[str, Variant] = {
    "drift penalty, weight 3000": Variant(lambda: [drift(3000)]),
    "inputs": Variant(lambda: [inputs()]),
    "inputs, random": Variant(lambda: [SaLoRA(directions="random", protect="input", rank=64, task_rank=0)]),
    "AsFT, weight 1 (paper)": Variant(lambda: [asft(1.0)]),
    "AsFT, C = 0": Variant(lambda: [asft(10.0, "none")]),
    "AsFT, random subspace": Variant(lambda: [asft(10.0, "random")]),
    "SaLoRA, lr 5e-4": Variant(lambda: [salora()], learning_rate=5e-4),
    "SaLoRA, random": Variant(lambda: [SaLoRA(directions="random")]),
    "SaLoRA, start only": Variant(lambda: [SaLoRA(rank=0)]),
}
"""Each method without what it is credited for, or at another strength."""

STRENGTHS: dict[str, Variant] = {
    **{f"AsFT, weight {weight:g}": Variant(lambda weight=weight: [asft(weight)]) for weight in (0.3, 1, 3, 10)},
    **{f"SaLoRA, rank {rank}": Variant(lambda rank=rank: [salora(rank=rank)]) for rank in (16, 32, 64)},
    **{f"inputs, rank {rank}": Variant(lambda rank=rank: [inputs(rank)]) for rank in (32, 64, 96)},
    **{
        f"security vectors, strength {strength:g}": Variant(lambda strength=strength: [vectors(strength)])
        for strength in (0.5, 1, 1.5)
    },
    **{
        f"drift penalty, weight {weight:g}": Variant(lambda weight=weight: [drift(weight)])
        for weight in (1, 3, 10, 30, 300, 3000)
    },
    **{
        f"{COMBINED}, weight {weight:g}": Variant(lambda weight=weight: [vectors(), drift(weight)])
        for weight in (1, 3, 10, 30)
    },
}
"""Each method from weak to strong."""

VARIANTS: dict[str, Variant] = {BEFORE: Variant(steps=0), **METHODS, **SIMPLE, **CONTROLS, **STRENGTHS}
