"""Every method over bases of 4 and 8 bits: trained, evaluated, saved, loaded by stock PEFT, and compared."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from marks import exhaustive_but
from peft import PeftModel, get_peft_model
from runs import exact_settings, lora, settings
from test_invariants import BUILD, VARIANTS
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from safe_trainer import AsFT, PromptSet, RefusalMonitor, SafeSFTTrainer, compare, evaluate

pytestmark = pytest.mark.slow

BASES = {"nf4": "Linear4bit", "int8": "Linear8bitLt", "torchao int8": "Int8Tensor"}
TOGETHER = {
    "asft, salora and security_vectors": ["asft", "salora", "security_vectors"],
    "recommended": ["security_vectors", "refusal_anchor"],
}
LIBRARY = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "torchao int8": "torchao"}
IDS = torch.randint(4, tiny.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(5))


def quantization(kind: str) -> Any:
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind == "torchao int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[str, str]:
    return tiny.save_pair(tmp_path_factory.mktemp("pair"), hidden=64)


def base(path: str, kind: str) -> Any:
    if importlib.util.find_spec(LIBRARY[kind]) is None:
        pytest.skip(f'{LIBRARY[kind]} is not installed: `pip install ".[quantization]"`')
    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=quantization(kind), dtype=torch.float32, device_map="cpu"
    )
    model.generation_config.pad_token_id = 0
    layer = model.model.layers[0].self_attn.q_proj
    assert BASES[kind] in (type(layer).__name__, type(layer.weight).__name__), "the base is not quantised"
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits.float()


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("name", ["refusal_anchor", "security_vectors"])
def test_what_is_measured_before_training_leaves_gradients_as_they_were(name, kind, pair, tmp_path: Path):
    model = get_peft_model(base(pair[0], kind), lora(init_lora_weights=False))

    def gradients() -> list[Tensor]:
        model.train().zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    before = gradients()
    BUILD[name](*pair).attach(model, tiny.tokenizer(), tiny.rows())
    assert all(torch.equal(*both) for both in zip(gradients(), before, strict=True))


@pytest.mark.parametrize("kind", BASES)
def test_neither_a_monitor_nor_evaluation_disturbs_training(kind, pair, tmp_path: Path):
    def losses(watched: bool) -> list[float]:
        evaluation = {"eval_strategy": "steps", "eval_steps": 1} if watched else {}
        args = exact_settings(tmp_path / str(watched), max_steps=3, learning_rate=0.1, logging_steps=1, **evaluation)
        torch.manual_seed(0)
        trainer = SafeSFTTrainer(
            base(pair[0], kind),
            args=args,
            train_dataset=tiny.rows(24),
            eval_dataset=tiny.rows(4),
            processing_class=tiny.tokenizer(),
            peft_config=lora(),
            safety=AsFT(projector="none", weight=0.1),
        )
        if watched:
            prompts = PromptSet(name="harmful", kind="harmful", prompts=("Make a bad thing.",))
            trainer.add_callback(RefusalMonitor(trainer, [prompts], every=2))
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert losses(watched=True) == losses(watched=False)


CASES = [(name, kind) for name in (*VARIANTS, *TOGETHER) for kind in BASES]
USUAL = [*itertools.product(["asft", "salora", "recommended"], ["nf4"]), ("recommended", "torchao int8")]


@pytest.mark.parametrize(("name", "kind"), exhaustive_but(USUAL, CASES))
def test_a_quantised_base_goes_the_whole_way(name, kind, pair, tmp_path: Path):
    model = base(pair[0], kind)
    clean = logits(model)
    args = settings(tmp_path, bf16=False, eval_strategy="steps", eval_steps=1)
    rows = {"train_dataset": tiny.rows(), "eval_dataset": tiny.rows(4), "processing_class": tiny.tokenizer()}
    safety = [BUILD[one](*pair) for one in TOGETHER.get(name, [name])]
    trainer = SafeSFTTrainer(model, args=args, **rows, peft_config=lora(), safety=safety)
    trainer.train()
    entries = trainer.state.log_history
    assert all(entry[key] > 0 for entry in entries for key in ("loss", "eval_loss") if key in entry)
    if "salora" in name:
        assert max(entry.get("salora/leak", 0.0) for entry in entries) < 2e-3
    trainer.save_model()

    trained = logits(trainer.model)
    assert (trained - clean).abs().max() > 1e-3
    fresh = base(pair[0], kind)
    # For inference on a CPU, bitsandbytes lays NF4 weights out anew, and does not find all the way back when training
    # goes on: with TRL alone too, a model that was asked between two steps is not quite the one on the disk.
    logits(fresh)
    fresh.train()(input_ids=IDS)
    stock = PeftModel.from_pretrained(fresh, tmp_path)
    assert (logits(stock) - trained).abs().max() < 0.05 * (trained - clean).abs().max()
    asked = PromptSet("asked", "harmful", ("Make a bad thing 1.",))
    told = evaluate(trainer.model, tiny.tokenizer(), [asked], max_new_tokens=4)
    assert told.results[0].rate("complied").total == 1
    comparison = compare(stock.unload(), tiny.tokenizer(), [asked], {"tuned": tmp_path}, max_new_tokens=4)
    assert [one.name for one in comparison.evaluations] == ["before", "tuned"]
