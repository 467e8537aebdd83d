"""How the study protects the model: each method as the demo sets it, its controls, and what users would try first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import pair
from controls import AveragedWeights, BenignAnchorsOnly, HiddenStateAnchor, ReferencesOfOthers

from safe_trainer import (
    AlignmentDirection,
    AsFT,
    ConstrainedSFT,
    RefusalAnchor,
    SafeGrad,
    SafetyBasis,
    SaLoRA,
    SecurityVectors,
    testbed,
)
from safe_trainer.artifacts.fitting import Fitting
from safe_trainer.data import Row, poison
from safe_trainer.methods.base import SafetyMethod
from safe_trainer.testbed.experiment import BATCH_SIZE, LEARNING_RATE, Scenario

RECOMMENDED = "recommended"
"""`safety="recommended"` of a pair, which brings its own rows along."""
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
        lora (`bool`, *optional*, defaults to `True`): Whether a LoRA is trained; otherwise all weights are.
        repaired (`bool`, *optional*, defaults to `False`): Whether Safe LoRA repairs the adapter afterwards.
    """

    methods: Callable[[], Sequence[SafetyMethod]] = tuple
    learning_rate: float = LEARNING_RATE
    steps: float = 1.0
    refusals: float = 0.0
    lora: bool = True
    repaired: bool = False

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

    return train_security_vectors(pair.ALIGNED, _harmful(), **settings)


def asft(weight: float, projector: Any = "published") -> AsFT:
    """Return AsFT with the direction of the embedded pair."""
    if projector == "none":
        return AsFT(projector="none", weight=weight)
    return AsFT(direction=_direction(None if projector == "published" else 16), projector=projector, weight=weight)


def salora(**settings: Any) -> SaLoRA:
    """Return SaLoRA with the refusals of the embedded language."""
    return SaLoRA(safety_data=pair.rows(testbed.refusal_rows(128, testbed.OWN_ROWS)), **settings)


def inputs(rank: int = 64, task_rank: int = 0, **settings: Any) -> SaLoRA:
    """Return SaLoRA that protects what layers read in harmful prompts, by default from LoRA's own start."""
    return SaLoRA(basis=_basis(), protect="input", rank=rank, task_rank=task_rank, **settings)


def vectors(strength: float = 1.0, **settings: Any) -> SecurityVectors:
    """Return security vectors, fitted once in each process."""
    return SecurityVectors(_fitted(**settings), strength=strength)


def recommended(**settings: Any) -> list[SafetyMethod]:
    """Return what `safety="recommended"` is; the anchor takes the prompts that the pair brings along by itself."""
    return [vectors(), RefusalAnchor(**settings)]


SETTINGS = {
    "learning rate": LEARNING_RATE,
    "batch size": BATCH_SIZE,
    "SaLoRA": (SaLoRA.rank, SaLoRA.task_rank, SaLoRA.protect),
    "AsFT": (AsFT.rank, AsFT.projector, AsFT.scaled),
    "security vectors": (SecurityVectors.strength, *asdict(Fitting()).values()),
    "Constrained SFT": (ConstrainedSFT.opening_beta, ConstrainedSFT.first_token_beta, ConstrainedSFT.opening_tokens),
    "SafeGrad": (SafeGrad.rho, SafeGrad.prompts_per_step, SafeGrad.answer_tokens, SafeGrad.max_step_size),
    "refusal anchor": (
        *(RefusalAnchor.weight, RefusalAnchor.answer_tokens, RefusalAnchor.anchors_per_step),
        *(RefusalAnchor.max_anchors, RefusalAnchor.seed),
    ),
}
"""The library's defaults that runs are made with: rows in the tables were measured at those that a test pins."""

BEFORE = "before"

METHODS: dict[str, Variant] = {
    "plain LoRA": Variant(),
    RECOMMENDED: Variant(recommended),
    "refusal anchor": Variant(lambda: [RefusalAnchor()]),
    "security vectors": Variant(lambda: [vectors()]),
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

AVERAGED = "plain LoRA, averaged"

STARTS: dict[str, dict[str, Any]] = {
    "": {},
    ", SaLoRA's start": {"task_rank": SaLoRA.task_rank},
    ", GuardSpace's start": {"task_rank": SaLoRA.task_rank, "start": "guardspace"},
}
"""What training starts from with GuardSpace's projector: LoRA's own start is a control, and so is SaLoRA's."""

DEFENSES: dict[str, Variant] = {
    "Constrained SFT": Variant(lambda: [ConstrainedSFT()]),
    "Constrained SFT, openings as the rest": Variant(
        lambda: [ConstrainedSFT(opening_beta=ConstrainedSFT.beta, first_token_beta=ConstrainedSFT.beta)]
    ),
    "SafeGrad": Variant(lambda: [SafeGrad()]),
    "SafeGrad, ρ = 0": Variant(lambda: [SafeGrad(rho=0)]),
    "SafeGrad, trust region": Variant(lambda: [SafeGrad(rule="trust_region")]),
    **{
        f"inputs, {share} % of the variance{start}": Variant(
            lambda energy=energy, settings=settings: [inputs(WIDEST, energy=energy, **settings)]
        )
        for start, settings in STARTS.items()
        for share, energy in (("99", 0.99), ("99.9", 0.999))
    },
    "Safe LoRA": Variant(repaired=True),
    AVERAGED: Variant(lambda: [AveragedWeights()]),
}
"""What users ask for by name, with all defaults, and without what it is credited for; GuardSpace's projector."""

ATTACKS: dict[str, Variant] = {
    f"{name}, lr {rate:g}, {count} passes": Variant(methods, learning_rate=rate, steps=float(count))
    for name, methods in (("plain LoRA", tuple), (RECOMMENDED, recommended))
    for rate in (5e-4, LEARNING_RATE, 8e-3)
    for count in (1, 3)
    if (rate, count) != (LEARNING_RATE, 1)
}
"""What an attacker may try who may choose how to train; the scenario's own settings are the variants themselves."""

FULL: dict[str, Variant] = {
    "all weights": Variant(learning_rate=5e-4, lora=False),
    f"all weights, {RECOMMENDED}": Variant(recommended, learning_rate=5e-4, lora=False),
}
"""Full-parameter training, at the learning rate of the pair's own alignment."""

STRENGTHS: dict[str, Variant] = {
    **{f"AsFT, weight {weight:g}": Variant(lambda weight=weight: [asft(weight)]) for weight in (0.3, 1, 3, 10)},
    **{f"SaLoRA, rank {rank}": Variant(lambda rank=rank: [salora(rank=rank)]) for rank in (16, 32, 64)},
    **{f"inputs, rank {rank}": Variant(lambda rank=rank: [inputs(rank)]) for rank in (32, 64, 96)},
    **{
        f"security vectors, strength {strength:g}": Variant(lambda strength=strength: [vectors(strength)])
        for strength in (0.5, 1, 1.5)
    },
}
"""Each method from weak to strong."""

FRAMED = f"{RECOMMENDED}, anchors in the agent's frame"
"""What `RefusalAnchor(prompts=…, system_prompt=…)` keeps of refusals asked for as in the published identity shift."""

ANCHOR_CONTROLS: dict[str, Variant] = {
    "refusal anchor, benign only": Variant(lambda: [BenignAnchorsOnly()]),
    "refusal anchor, others' refusals": Variant(lambda: [ReferencesOfOthers()]),
    "refusal anchor, hidden state (SBR)": Variant(lambda: [HiddenStateAnchor()]),
    AVERAGED: DEFENSES[AVERAGED],
}
"""The anchor without what it is credited for, and what a moving average of the weights keeps without any method."""

ANCHORS: dict[str, Variant] = {
    f"refusal anchor, {setting.replace('_', ' ')} {value:g}": Variant(
        lambda setting=setting, value=value: [RefusalAnchor(**{setting: value})]
    )
    for setting, value in (
        ("weight", 1.0),
        ("weight", 10.0),
        ("answer_tokens", 1),
        ("answer_tokens", 8),
        ("max_anchors", 8),
        ("max_anchors", 256),
    )
}
"""The anchor at other settings than its defaults."""

VARIANTS: dict[str, Variant] = {
    BEFORE: Variant(steps=0),
    **METHODS,
    FRAMED: Variant(lambda: recommended(**pair.AGENT.anchors())),
    **SIMPLE,
    **CONTROLS,
    **DEFENSES,
    **ANCHOR_CONTROLS,
    **ATTACKS,
    **FULL,
    **STRENGTHS,
    **ANCHORS,
}
