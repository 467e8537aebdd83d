"""Options of PEFT with every method: each works, or is refused with what to do; what is not protected is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from marks import exhaustive_but
from peft import IA3Config, KasaConfig, LNTuningConfig, LoraConfig, PeftModel, get_peft_model
from runs import given, lora, method_of
from transformers import AutoModelForCausalLM

from safe_trainer import METHODS, SafeSFTTrainer
from safe_trainer.lora.updates import linear_layers

ON = ["q_proj", "v_proj", "down_proj"]
OPTIONS: dict[str, Callable[[], Any]] = {
    "trainable_token_indices": lambda: lora(target_modules=ON, trainable_token_indices=[5, 6]),
    "embeddings and head": lambda: lora(target_modules=ON, modules_to_save=["embed_tokens", "lm_head"]),
    "a layer in full": lambda: lora(target_modules=ON, modules_to_save=["gate_proj"]),
    "layers_to_transform": lambda: lora(target_modules=ON, layers_to_transform=[1]),
    "rank_pattern": lambda: lora(target_modules=ON, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 32}),
    "use_dora": lambda: lora(target_modules=ON, use_dora=True),
    "use_rslora": lambda: lora(target_modules=ON, use_rslora=True),
    "lora_bias": lambda: lora(target_modules=ON, lora_bias=True),
    "bias": lambda: lora(target_modules=ON, bias="all"),
    "target_parameters": lambda: lora(target_modules=[], target_parameters=["q_proj.weight"]),
    "exclude_modules": lambda: lora(exclude_modules=["q_proj"]),
    "layer_replication": lambda: lora(target_modules=ON, layer_replication=[[0, 2], [1, 2]]),
    "pissa": lambda: lora(target_modules=ON, init_lora_weights="pissa"),
    "olora": lambda: lora(target_modules=ON, init_lora_weights="olora"),
    "KaSA": lambda: lora(target_modules=ON, kasa_config=KasaConfig()),
    "eva": lambda: lora(target_modules=ON, init_lora_weights="eva"),
    "embeddings": lambda: lora(target_modules=["q_proj", "embed_tokens"]),
    "IA3": lambda: IA3Config(task_type="CAUSAL_LM"),
    "norms": lambda: LNTuningConfig(task_type="CAUSAL_LM", target_modules=["norm"]),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny.save_pair(tmp_path_factory.mktemp("pair"), "qwen2")  # whose layers have biases


@pytest.fixture(scope="module")
def plain_pair(tmp_path_factory):
    return tiny.save_pair(tmp_path_factory.mktemp("plain"))


def trained(pair: tuple[str, str], folder: Any, method: str, config: Any, model: Any = None) -> SafeSFTTrainer:
    model = model or AutoModelForCausalLM.from_pretrained(pair[0])
    changes = {"model": model, "peft_config": config, "max_steps": 1}
    trainer = SafeSFTTrainer(**given(folder, **changes), safety=method_of(method, *pair))
    trainer.train()
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "method"),
    exhaustive_but([("a layer in full", "security_vectors")], [(o, m) for o in OPTIONS for m in METHODS]),
)
def test_an_option_of_peft_works_or_is_refused_with_what_to_do(option, method, pair, plain_pair, tmp_path):
    if option == "layer_replication":  # which transformers cannot run on a Qwen2
        pair = plain_pair
    try:
        trainer = trained(pair, tmp_path, method, OPTIONS[option]())
    except ValueError as error:
        assert str(error).startswith(METHODS[method].name) and any(f"{verb} " in str(error) for verb in ADVICE)
    else:
        assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


ADVICE = ("Remove", "Use", "Leave", "Give", "leave")


@pytest.mark.slow
def test_biases_that_a_penalty_does_not_see_are_told_and_those_past_a_projector_refused(pair, tmp_path):
    for option in ("bias", "lora_bias"):
        report = trained(pair, tmp_path, "asft", OPTIONS[option]()).safety_report["AsFT"]
        assert report["coverage"] < 1 and any("does not act on biases" in warning for warning in report["warnings"])
        with pytest.raises(ValueError, match="no projector stands between a bias.*Remove `(lora_)?bias`"):
            trained(pair, tmp_path, "salora", OPTIONS[option]())
    report = trained(pair, tmp_path, "asft", lora(target_modules=ON)).safety_report["AsFT"]  # as it advises
    assert report["coverage"] == 1 and not report["warnings"]


@pytest.mark.slow
def test_tokens_of_a_tied_head_are_refused_with_what_works(pair, tmp_path):
    def tied() -> Any:
        model = AutoModelForCausalLM.from_pretrained(pair[0])
        model.config.tie_word_embeddings = True
        model.tie_weights()
        return model

    with pytest.raises(ValueError, match="`trainable_token_indices` does not work on a model whose output head"):
        trained(pair, tmp_path, "asft", lora(target_modules=ON, trainable_token_indices=[5]), tied())
    trained(pair, tmp_path, "asft", lora(target_modules=ON, modules_to_save=["embed_tokens"]), tied())  # as it advises


def test_a_layer_that_is_trained_in_full_is_one_layer_under_its_own_name():
    plain = tiny.model()
    model: PeftModel = get_peft_model(tiny.model(), LoraConfig(target_modules=ON, modules_to_save=["gate_proj"]))
    found = linear_layers(model)
    assert found.keys() == linear_layers(plain).keys()
    layer = found["model.layers.0.mlp.gate_proj"]
    assert layer.base is layer.outer.original_module and layer.shape == (64, 32)
