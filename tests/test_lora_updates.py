"""Updates of layers, against PEFT's own delta weights and the difference of two dense weights."""

import pytest
import tiny
import torch
from peft import BOFTConfig, LoraConfig, PromptTuningConfig, get_peft_model

from safe_trainer.lora import updates as adapters


def wrapped(architecture: str = "llama", **settings: object) -> torch.nn.Module:
    config = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "init_lora_weights": False} | settings
    return get_peft_model(tiny.model(architecture), LoraConfig(task_type="CAUSAL_LM", **config))


def delta(update: adapters.Update) -> torch.Tensor:
    left, right = update.factors()
    return left if right is None else left @ right


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("rslora", [False, True])
def test_lora_updates_equal_pefts_delta_weight_in_every_architecture(architecture: str, rslora: bool) -> None:
    model = wrapped(architecture, use_rslora=rslora, fan_in_fan_out=architecture == "gpt2")
    found = adapters.updates(model, "X")
    names = dict(tiny.model(architecture).named_modules())
    assert found and set(found) <= set(names), "names are those of the base model"
    for name, update in found.items():
        expected = update.layer.get_delta_weight("default")
        expected = expected.mT if architecture == "gpt2" else expected  # Conv1D stores d_in x d_out
        assert update.shape == tuple(adapters.weight(update.layer).shape) == tuple(expected.shape)
        assert torch.allclose(delta(update), expected, atol=1e-6), name
        unscaled = adapters.LoraUpdate(update.layer, "default", scaled=False)
        assert torch.allclose(delta(unscaled) * update.layer.scaling["default"], expected, atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_full_updates_are_the_difference_to_the_start_and_leave_the_head_out(architecture: str) -> None:
    model = tiny.model(architecture)
    found = adapters.updates(model, "X")
    assert "lm_head" not in found
    name = next(iter(found))
    layer = model.get_submodule(name)
    assert not delta(found[name]).any()
    with torch.no_grad():
        layer.weight += 0.5
    assert torch.allclose(delta(found[name]), torch.full(found[name].shape, 0.5))
    assert found[name].shape == tuple(adapters.weight(layer).shape)


def test_frozen_model_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable linear layer.*Unfreeze"):
        adapters.updates(tiny.model().requires_grad_(False), "AsFT")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LoraConfig(use_dora=True), "use_dora=True.*rescales.*Remove"),
        (LoraConfig(init_lora_weights="pissa"), "init_lora_weights='pissa'.*changes the base weight"),
        (LoraConfig(init_lora_weights="pissa_niter_4"), "changes the base weight"),
        (LoraConfig(init_lora_weights="olora"), "changes the base weight"),
        (LoraConfig(target_modules=["q_proj", "lm_head"]), "lm_head.*Remove"),
        (LoraConfig(target_parameters=["experts.weight"]), "target_parameters.*not linear"),
        (PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), "PROMPT_TUNING.*LoraConfig"),
        (BOFTConfig(), "BOFT.*LoraConfig"),
    ],
)
def test_configurations_whose_update_is_no_product_are_refused_with_the_reason(config: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        adapters.check_peft_config(config, "AsFT")


def test_lora_on_an_embedding_is_refused_by_name() -> None:
    model = wrapped(target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(ValueError, match="embed_tokens.*Embedding.*target_modules"):
        adapters.updates(model, "AsFT")


def test_a_lora_variant_is_refused_by_name() -> None:
    model = wrapped(target_modules=["q_proj"], alora_invocation_tokens=[1, 2])
    with pytest.raises(ValueError, match="plain LoRA.*variant"):
        adapters.updates(model, "AsFT")


def test_two_active_adapters_are_refused() -> None:
    model = wrapped(target_modules=["q_proj"])
    model.add_adapter("second", LoraConfig(target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="one adapter.*set_adapter"):
        adapters.updates(model, "AsFT")
