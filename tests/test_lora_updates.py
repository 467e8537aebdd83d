"""Updates of layers, against PEFT's own delta weights and the difference of two dense weights."""

from dataclasses import fields
from typing import get_args, get_type_hints

import pytest
import tiny
import torch
from peft import BOFTConfig, KasaConfig, LoraConfig, MontecloraConfig, PromptTuningConfig, VeloraConfig, get_peft_model

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
        (LoraConfig(init_lora_weights="of next year"), "init_lora_weights='of next year'.*not known to keep it"),
        (LoraConfig(kasa_config=KasaConfig()), "`kasa_config`.*changes the base weight.*Remove `kasa_config`"),
        (LoraConfig(target_modules=["q_proj", "lm_head"]), "lm_head.*Remove"),
        (LoraConfig(target_parameters=["experts.weight"]), "target_parameters.*not linear"),
        (PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), "PROMPT_TUNING.*LoraConfig"),
        (BOFTConfig(), "BOFT.*LoraConfig"),
    ],
)
def test_configurations_whose_update_is_no_product_are_refused_with_the_reason(config: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        adapters.check_peft_config(config, "AsFT")


# Those that need data, a quantised base or other adapters, which a test of one model does not have.
NEED_MORE = {"corda", "loftq", "lora_ga", "arrow_config", "eva_config", "corda_config", "loftq_config"}
NEED_MORE |= {"lora_ga_config", "megatron_config", "runtime_config"}
STARTS = {"pissa_niter_[number of iters]": "pissa_niter_4"}
VARIANTS = {"kasa_config": KasaConfig, "monteclora_config": MontecloraConfig, "velora_config": VeloraConfig}


def options() -> list[tuple[str, object]]:
    """Return the starts and the configurations within a configuration that the installed PEFT knows."""
    hint = get_type_hints(LoraConfig)["init_lora_weights"]
    starts = [name for part in get_args(hint) for name in get_args(part)]
    configs = [field.name for field in fields(LoraConfig) if field.name.endswith("_config")]
    found = [("init_lora_weights", STARTS.get(name, name)) for name in [True, False, *starts] if name not in NEED_MORE]
    return found + [(name, VARIANTS[name]()) for name in configs if name not in NEED_MORE]


@pytest.mark.parametrize(("option", "value"), options(), ids=lambda value: str(value)[:24])
def test_what_an_adapter_does_to_base_weights_is_known_of_every_option_of_the_installed_peft(option, value) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **{option: value})
    base = tiny.model().state_dict()
    layers = adapters.linear_layers(get_peft_model(tiny.model(), config))
    is_changed = any(not torch.equal(layer.base.weight, base[f"{name}.weight"]) for name, layer in layers.items())
    assert adapters.changes_base(config) is is_changed
    assert adapters.keeps_base(config) is not is_changed


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
