"""Methods protect the model of the trainer that they were given to last, as it was then; all else is refused."""

from __future__ import annotations

import pytest
import tiny
import torch
from runs import REFUSED, given, lora, method_of
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from safe_trainer import METHODS, PromptSet, SafeSFTTrainer, SafetyBasis, compare

pytestmark = pytest.mark.slow

OTHERS = "Other weights are trained than when the safety methods were attached: "


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny.save_pair(tmp_path_factory.mktemp("pair"))


def trainer_of(folder, pair, name, **changes):
    return trainer_with(folder, pair, method_of(name, *pair), **changes)


def trainer_with(folder, pair, method, **changes):
    arguments = {"model": AutoModelForCausalLM.from_pretrained(pair[0]), "peft_config": lora(), "max_steps": 1}
    return SafeSFTTrainer(**given(folder, **(arguments | changes)), safety=method)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_was_given_to_another_trainer_since_protects_that_ones_model_only(name, pair, tmp_path):
    method = method_of(name, *pair)
    first, second = (trainer_with(tmp_path, pair, method) for _ in range(2))
    with pytest.raises(ValueError, match=rf"given to another trainer after this one.*new `{type(method).__name__}"):
        first.train()
    second.train()
    trainer_of(tmp_path, pair, name).train()  # as it advises: one of its own


def test_one_trainer_trains_twice_with_its_methods(pair, tmp_path):
    trainer = trainer_of(tmp_path, pair, "asft")
    trainer.train()
    trainer.train()


def test_another_adapter_than_the_one_that_is_protected_is_refused(pair, tmp_path):
    trainer = trainer_of(tmp_path, pair, "salora")
    trainer.model.add_adapter("second", lora())
    trainer.model.set_adapter("second")
    with pytest.raises(ValueError, match=OTHERS + r"\d+ differ, such as `base_model.*and then build the trainer"):
        trainer.train()
    trainer.model.set_adapter("default")
    trainer.train()


def test_layers_that_are_unfrozen_or_exchanged_after_building_are_refused(pair, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(pair[0])
    frozen = next(iter(model.parameters())).requires_grad_(False)
    trainer = trainer_of(tmp_path, pair, "asft", model=model, peft_config=None)
    frozen.requires_grad_(True)
    with pytest.raises(ValueError, match=OTHERS + "1 differ"):
        trainer.train()
    frozen.requires_grad_(False)
    block = model.model.layers[0].mlp
    old, block.up_proj = block.up_proj, nn.Linear(*reversed(block.up_proj.weight.shape), bias=False)
    block.up_proj.weight = old.weight
    with pytest.raises(ValueError, match=OTHERS + r"1 differ, such as `model.layers.0.mlp.up_proj.weight`"):
        trainer.train()
    block.up_proj = old
    trainer.train()


def with_a_native_adapter(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.add_adapter(lora())
    return model


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["its own", "another"])
@pytest.mark.parametrize("name", METHODS)
def test_an_adapter_that_no_peft_model_holds_is_refused(name, peft_config, pair, tmp_path):
    model = with_a_native_adapter(pair[0])
    with pytest.raises(ValueError, match="has an adapter in its layers that no `PeftModel` holds"):
        trainer_of(tmp_path, pair, name, model=model, peft_config=peft_config)


def test_an_adapter_that_no_peft_model_holds_is_no_start_to_measure(pair):
    model, tokenizer = with_a_native_adapter(pair[0]), AutoTokenizer.from_pretrained(pair[0])
    asked = PromptSet("asked", "harmful", ("Say it.",))
    for measure in (
        lambda: SafetyBasis.from_rows(model, tokenizer, REFUSED, rank=2),
        lambda: compare(model, tokenizer, [asked], {}, max_new_tokens=2),
    ):
        with pytest.raises(ValueError, match="has an adapter in its layers that no `PeftModel` holds"):
            measure()


class Asking(TrainerCallback):
    """Asks the model as it is after a step, in training mode, as TRL's own callback that logs answers does."""

    def on_step_end(self, args, state, control, model, **kwargs):
        assert model.training
        ids = torch.arange(4, 12)[None]
        with torch.no_grad():
            self.here = model(ids, use_cache=False).logits
            model.eval()
            self.clean = model(ids, use_cache=False).logits
            model.train()


def test_what_a_callback_asks_between_steps_is_answered_without_security_vectors(pair, tmp_path):
    asking, method = Asking(), method_of("security_vectors", *pair, strength=8.0)
    trainer = trainer_with(tmp_path, pair, method)
    trainer.add_callback(asking)
    trainer.train()
    assert torch.equal(asking.here, asking.clean)
    ids, model = torch.arange(4, 12)[None], trainer.model.train()
    with method.training(model), method.training_step(model):
        assert (model(ids, use_cache=False).logits - asking.clean).abs().max() > 1e-3  # they do act in steps
