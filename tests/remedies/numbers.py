"""Numbers that are infinite or NaN: models that overflow, and training that diverges."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import planted
import tiny
import torch
from runs import HARMFUL, REFUSED

from safe_trainer import SafeGrad, SafetyBasis
from safe_trainer.analysis.scan import score_rows
from safe_trainer.methods.base import SafetyMethod

from .room import PLAIN, Case, of

WILD = {"optim": "sgd", "learning_rate": 1e25, "bf16": False, "max_grad_norm": 1.0}
CALM = {**WILD, "learning_rate": 1e-3}


@dataclass
class Cubes(SafetyMethod):
    """A penalty of one's own, which nothing but the trainer looks at."""

    def penalty(self, model: Any) -> Any:
        return sum((p**4).sum() for p in model.parameters() if p.requires_grad)


def trained(at: SimpleNamespace, safety: Any, **settings: Any) -> None:
    at.trainer(safety, **settings).train()


def loud(at: SimpleNamespace, dtype: torch.dtype) -> Any:
    """A model whose last norm takes it beyond what float16 can hold."""
    model = of(at.aligned)
    model.model.layers[-1].mlp.down_proj.weight.data *= 1e7
    return model.to(dtype)


def scored(at: SimpleNamespace, dtype: torch.dtype) -> Any:
    model = loud(at, dtype)
    return list(score_rows(HARMFUL, model, planted.vectors(model), tiny.tokenizer()))


def measured(at: SimpleNamespace, dtype: torch.dtype) -> Any:
    return SafetyBasis.from_rows(loud(at, dtype), tiny.tokenizer(), REFUSED, rank=2)


def guarded(**settings: Any) -> SafeGrad:
    return SafeGrad(["Make it."], answer_tokens=3, prompts_per_step=1, **settings)


NUMBERS: dict[str, Case] = {
    "a scan that overflows": (
        lambda at: scored(at, torch.float16),
        "Load it in bfloat16 or float32",
        [lambda at: scored(at, torch.bfloat16), lambda at: scored(at, torch.float32)],
    ),
    "a basis that overflows": (
        lambda at: measured(at, torch.float16),
        r"Check the model's weights and its dtype \(float16 overflows in some models; try bfloat16\)",
        [lambda at: measured(at, torch.bfloat16), lambda at: measured(at, torch.float32)],
    ),
    "a penalty that diverges": (
        lambda at: trained(at, PLAIN, **WILD),
        "Start a new run with a lower `learning_rate`, or with `max_grad_norm` below its current value",
        [lambda at: trained(at, PLAIN, **CALM), lambda at: trained(at, PLAIN, **{**WILD, "max_grad_norm": 1e-28})],
    ),
    "a penalty of one's own that diverges": (
        lambda at: trained(at, Cubes(), **WILD),
        "are intact, but resume with the same settings. Start a new run, from the base model or from a checkpoint's "
        "weights, with a lower `learning_rate`",
        [lambda at: trained(at, Cubes(), **CALM)],
    ),
    "a safety loss that diverges": (
        lambda at: trained(at, guarded(), **WILD),
        "Start a new run with a lower `learning_rate`, or with a lower `max_step_size` where the rule is the trust",
        [
            lambda at: trained(at, guarded(), **CALM),
            lambda at: trained(at, guarded(rule="trust_region", tau=0.0, max_step_size=1e-3), **CALM),
        ],
    ),
    "an optimizer that steps within the backward pass": (
        lambda at: stepped(at, within=True),
        "Use an `optim` that does not step within that pass",
        [lambda at: stepped(at, within=False)],
    ),
}


def stepped(at: SimpleNamespace, within: bool) -> None:
    """Train; within the backward pass gradients are gone at once, as layer-wise optimizers leave it."""
    trainer = at.trainer(guarded(), **CALM)
    for parameter in trainer.model.parameters() if within else ():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    trainer.train()
