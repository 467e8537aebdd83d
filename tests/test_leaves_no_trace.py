"""Measuring leaves no trace: what looks at a model gives it back as it was, and draws no random number of yours."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import planted
import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from runs import HARMFUL, REFUSED, given, lora, method_of
from torch import nn

from safe_trainer import (
    METHODS,
    AdapterEMA,
    DriftMonitor,
    PromptSet,
    RefusalMonitor,
    SafeSFTTrainer,
    SafetyBasis,
    compare,
    evaluate,
    generate,
    train_security_vectors,
)
from safe_trainer.analysis.drift_monitor import DriftFigures
from safe_trainer.analysis.refusal_direction import refusal_directions
from safe_trainer.analysis.scan import score_rows
from safe_trainer.artifacts.own_answers import AnswerSettings
from safe_trainer.evaluation import GUARDS, Decoding, GuardJudge, LikelihoodJudge
from safe_trainer.methods.base import SafetyMethod

ASKED = PromptSet("asked", "harmful", ("Make a bad thing.", "Make another."))
SHORT = {"rank": 2, "max_steps": 2}


def state(model: nn.Module) -> dict[str, Any]:
    """Return everything about a model and the random generators that measuring must not change, but its weights."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    adapters = {
        name: (list(module.active_adapters), module.disable_adapters, module.merged)
        for name, module in model.named_modules()
        if hasattr(module, "disable_adapters") and hasattr(module, "merged")
    }
    hooks = {
        name: [len(getattr(module, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
        for name, module in model.named_modules()
    }
    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "classes": {name: type(module) for name, module in model.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in parameters.items()},
        "dtypes and devices": {name: (p.dtype, p.device) for name, p in parameters.items()},
        "gradients": {name: p.grad is None for name, p in parameters.items()},
        "buffers": {name: buffer.clone().tolist() for name, buffer in model.named_buffers()},
        "adapters": adapters,
        "hooks": hooks,
        "settings": (model.config.to_dict(), model.generation_config.to_dict()),
        "random": (torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())),
    }


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {aspect for aspect in before if before[aspect] != after[aspect]}


def unusual(model: nn.Module) -> None:
    """Put modules into mixed modes, and freeze what PEFT would train."""
    model.train()
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    base.model.layers[0].eval()
    base.model.layers[1].mlp.eval()
    base.model.layers[1].mlp.down_proj.train()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "layers.0.mlp" in name:
            parameter.requires_grad_(False)
    base.model.norm.weight.requires_grad_(True)


@pytest.fixture
def adapted() -> PeftModel:
    """Return a model with two adapters of which the second is active, in mixed modes."""
    model = get_peft_model(tiny.model(), lora(init_lora_weights=False, lora_dropout=0.1))
    model.add_adapter("second", lora(r=2, init_lora_weights=False))
    model.set_adapter("second")
    unusual(model)
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Any]:
    """Return an adapter on disk, and vectors."""
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(tiny.model(), lora(init_lora_weights=False)).save_pretrained(folder)
    return {"adapter": str(folder), "vectors": planted.vectors(tiny.model())}


MEASURE: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "generation": lambda model, made: generate(model, tiny.tokenizer(), list(ASKED.prompts), max_new_tokens=2),
    "evaluation": lambda model, made: evaluate(model, tiny.tokenizer(), [ASKED], max_new_tokens=2),
    "likelihood judge": lambda model, made: evaluate(
        model, tiny.tokenizer(), [ASKED], judges=[LikelihoodJudge()], max_new_tokens=2
    ),
    "comparison": lambda model, made: compare(
        model, tiny.tokenizer(), [ASKED], {"other": made["adapter"]}, max_new_tokens=2
    ),
    "calibration": lambda model, made: SafetyBasis.from_rows(
        model, tiny.tokenizer(), REFUSED, rank=2, sides=("output", "input")
    ),
    "fitting vectors": lambda model, made: train_security_vectors(model, HARMFUL, tiny.tokenizer(), **SHORT),
    "fitting vectors, bi-level": lambda model, made: train_security_vectors(
        model, HARMFUL, tiny.tokenizer(), retain_data=REFUSED, inner_steps=1, **SHORT
    ),
    "drift": lambda model, made: compare(
        model, tiny.tokenizer(), [ASKED], {"other": made["adapter"]}, drift=DriftFigures(), max_new_tokens=2
    ),
    "refusal directions": lambda model, made: refusal_directions(model, tiny.tokenizer(), ["Make it."], ["Say it."]),
    "a guard": lambda model, made: GuardJudge(model, tiny.tokenizer(), GUARDS["wildguard"])(["Hm?"], ["Ah."]),
    "own answers": lambda model, made: AnswerSettings(2).measure(model, tiny.tokenizer(), ASKED, None),
    "scanning": lambda model, made: list(score_rows(iter(HARMFUL), model, made["vectors"], tiny.tokenizer())),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURE)
def test_measuring_leaves_no_trace(name, adapted, made):
    before, kept = state(adapted), weights(adapted)
    MEASURE[name](adapted, made)
    assert changed(before, state(adapted)) == set()
    after = weights(adapted)
    assert all(torch.equal(after[key], tensor) for key, tensor in kept.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURE)
def test_measuring_that_fails_leaves_no_trace(name, adapted, made, monkeypatch):
    before = state(adapted)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    block = adapted.get_base_model().model.layers[1]
    monkeypatch.setattr(block, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        MEASURE[name](adapted, made)
    monkeypatch.undo()
    assert changed(before, state(adapted)) == set()


# ---- methods


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[str, str]:
    return tiny.save_pair(tmp_path_factory.mktemp("pair"))


def model_for(method: SafetyMethod, pair: tuple[str, str]) -> Any:
    """Return the adapted model that the trainer would make, in mixed modes."""
    config = method.adapt_peft_config(lora(lora_dropout=0.1))
    base = tiny.model(seed=1)
    base.config._name_or_path = pair[0]
    model = get_peft_model(base, config)
    unusual(model)
    return model


def tokens() -> list[dict[str, Any]]:
    return [{"input_ids": list(range(4, 16)), "labels": [-100] * 6 + list(range(10, 16))} for _ in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*METHODS, "safe_grad, trust_region"])
def test_a_method_leaves_no_trace_when_it_is_attached_and_when_training_is_over(name, pair):
    name, _, rule = name.partition(", ")
    method = method_of(name, *pair, **({"rule": rule} if rule else {}))
    model = model_for(method, pair)
    before = state(model)
    method.attach(model, tiny.tokenizer(), tokens())
    method.self_check(model)
    assert changed(before, state(model)) == set()
    with method.training(model):
        during = state(model)
        penalty = method.penalty(model)
        assert penalty is None or penalty.isfinite()
        method.after_backward(model)
        assert changed(during, state(model)) == set()
        method.diagnostics(model)
        assert changed(during, state(model)) == set()
    after = state(model)
    assert changed(before, after) == set()


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_method_leaves_no_trace_when_training_fails(name, pair):
    method = method_of(name, *pair)
    model = model_for(method, pair)
    method.attach(model, tiny.tokenizer(), tokens())
    before = state(model)
    with pytest.raises(RuntimeError, match="disk full"), method.training(model):
        raise RuntimeError("disk full")
    assert changed(before, state(model)) == set()


# ---- monitors


@pytest.mark.parametrize("kind", ["refusals", "drift"])
def test_a_monitor_leaves_no_trace(kind, tmp_path):
    trainer = SafeSFTTrainer(**given(tmp_path, peft_config=lora()))
    model = trainer.model
    monitor = (
        RefusalMonitor(trainer, [ASKED], every=1, decoding=Decoding(max_new_tokens=2))
        if kind == "refusals"
        else DriftMonitor(trainer, every=1)
    )
    unusual(model)
    before = state(model)
    for moment in ("on_train_begin", "on_step_end"):
        getattr(monitor, moment)(trainer.args, trainer.state, trainer.control, model=model)
    assert changed(before, state(model)) == set()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*METHODS, "safe_grad, trust_region", "adapter_ema"])
def test_a_training_leaves_of_a_model_what_plain_training_leaves(name, pair, tmp_path):
    def left(**changes: Any) -> set[str]:
        base = tiny.model(seed=1)
        base.config._name_or_path = pair[0]
        trainer = SafeSFTTrainer(**given(tmp_path, model=base, peft_config=lora(), max_steps=2), **changes)
        before = state(trainer.model)
        trainer.train()
        return changed(before, state(trainer.model)) - {"random"}

    name, _, rule = name.partition(", ")
    if name == "adapter_ema":
        changes: dict[str, Any] = {"callbacks": [AdapterEMA(0.5)]}
    else:
        changes = {"safety": method_of(name, *pair, **({"rule": rule} if rule else {}))}
    assert left(**changes) == left()
