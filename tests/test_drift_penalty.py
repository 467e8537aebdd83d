"""DriftPenalty: against the activations themselves, in full; what it does to a run; what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from runs import given, lora
from transformers.pytorch_utils import Conv1D

from safe_trainer import DriftPenalty, SafeSFTTrainer, SafetyBasis, conversation
from safe_trainer.lora.updates import linear_layers

ROWS = [conversation(f"Make a bad thing {i} of {i * i}.", "I will not do that.") for i in range(24)]


def model_with_update(architecture: str, method: DriftPenalty, full: bool = False) -> torch.nn.Module:
    """A model with `method` attached and an update that is not zero."""
    torch.manual_seed(3)
    model = tiny.model(architecture)
    model = model if full else get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules="all-linear"))
    method.attach(model, tiny.tokenizer(), None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (full or "lora_B" in name):
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def read_inputs(architecture: str, tokens: str) -> dict[str, torch.Tensor]:
    """What every layer of the model reads at the chosen tokens of the rows, one row after the other, (n, d_in)."""
    model, tokenizer = tiny.model(architecture).eval(), tiny.tokenizer()
    read: dict[str, list[torch.Tensor]] = {name: [] for name in linear_layers(model)}
    for row in ROWS:
        start = len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"])
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"])["input_ids"]
        chosen = {"prompt": slice(0, start), "answer": slice(start, None), "all": slice(None)}[tokens]

        def keep(name: str, chosen: slice = chosen):
            return lambda _, args: read[name].append(args[0].reshape(-1, args[0].shape[-1])[chosen])

        hooks = [layer.base.register_forward_pre_hook(keep(name)) for name, layer in linear_layers(model).items()]
        with torch.no_grad():
            model(input_ids=torch.tensor([whole]), use_cache=False)
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts).double() for name, parts in read.items()}


def oriented(layer: torch.nn.Module) -> torch.Tensor:
    weight = layer.weight.detach().double()
    return weight.mT if isinstance(layer, Conv1D) else weight


def shares(architecture: str, model: torch.nn.Module, tokens: str = "prompt") -> dict[str, torch.Tensor]:
    """`E‖ΔW x‖² / E‖W x‖²` of every layer, with all matrices and all activations written out in float64."""
    found = {}
    start = {name: oriented(layer.base) for name, layer in linear_layers(tiny.model(architecture)).items()}
    inputs = read_inputs(architecture, tokens)
    for name, layer in linear_layers(model).items():
        if hasattr(layer.outer, "lora_A"):
            A, B = layer.outer.lora_A["default"].weight.double(), layer.outer.lora_B["default"].weight.double()
            change = layer.outer.scaling["default"] * B @ A
        else:
            change = oriented(layer.base) - start[name]
        squared = [(inputs[name] @ matrix.mT).square().sum() for matrix in (change, start[name])]
        found[name] = squared[0] / squared[1]
    return found


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_penalty_is_the_share_of_the_outputs_energy_that_changes_on_harmful_prompts(architecture, full):
    method = DriftPenalty(weight=7.0, safety_data=ROWS, rank=31)
    model = model_with_update(architecture, method, full)
    expected = shares(architecture, model)
    assert method.penalty(model).item() == pytest.approx(7 * torch.stack(list(expected.values())).mean().item(), 1e-3)
    measured = method.diagnostics(model)
    assert measured.keys() == {f"drift_penalty/{name}" for name in expected}
    for name, share in expected.items():
        if linear_layers(model)[name].shape[1] == 32:  # of wider layers, 31 directions leave more than one to the mean
            assert measured[f"drift_penalty/{name}"] == pytest.approx(share.item(), 1e-4), name


@pytest.mark.parametrize("tokens", ["answer", "all"])
def test_input_tokens_say_which_tokens_count(tokens):
    method = DriftPenalty(weight=1.0, safety_data=ROWS, rank=31, input_tokens=tokens)
    model = model_with_update("llama", method)
    expected = shares("llama", model, tokens)
    name = "model.layers.0.self_attn.q_proj"
    assert method.diagnostics(model)[f"drift_penalty/{name}"] == pytest.approx(expected[name].item(), 1e-4)


def test_an_update_as_large_as_the_weight_itself_changes_all_of_the_energy_whatever_the_rank():
    for rank in (2, 8, 31):
        method = DriftPenalty(weight=1.0, safety_data=ROWS, rank=rank)
        model = tiny.model()
        method.attach(model, tiny.tokenizer(), None)
        with torch.no_grad():
            for layer in linear_layers(model).values():
                layer.base.weight.mul_(2)  # ΔW = W
        assert all(share == pytest.approx(1, 1e-4) for share in method.diagnostics(model).values())


def test_gradient_is_that_of_the_activations():
    method = DriftPenalty(weight=5.0, safety_data=ROWS, rank=31)
    model = model_with_update("llama", method)
    layer = linear_layers(model)["model.layers.1.mlp.gate_proj"].outer
    trained = layer.lora_B["default"].weight
    (ours,) = torch.autograd.grad(method.penalty(model), trained)
    expected = shares("llama", model)
    (theirs,) = torch.autograd.grad(5 * expected["model.layers.1.mlp.gate_proj"] / len(expected), trained)
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6 * theirs.abs().max().item())


@pytest.mark.slow
def test_a_heavy_penalty_keeps_what_harmful_prompts_do_to_the_layers(tmp_path):
    drifts = {}
    for weight in (0.0, 1000.0):
        method = DriftPenalty(weight=weight, safety_data=ROWS, rank=16)
        trainer = SafeSFTTrainer(
            **given(tmp_path, model=tiny.model(), peft_config=lora(), max_steps=10, bf16=False), safety=method
        )
        trainer.train()
        drifts[weight] = max(method.diagnostics(trainer.model).values())
        logged = [entry["safety_penalty"] for entry in trainer.state.log_history if "safety_penalty" in entry]
        assert logged[0] == 0 and (weight == 0 or logged[-1] > 0)
    assert drifts[1000.0] < 0.1 * drifts[0.0]


def test_a_saved_basis_needs_no_data(tmp_path):
    model = tiny.model()
    basis = SafetyBasis.from_rows(model, tiny.tokenizer(), ROWS, sides=("input",), rank=16)
    basis.save(tmp_path / "basis.safetensors")
    measured = DriftPenalty(safety_data=ROWS, rank=16)
    loaded = DriftPenalty(basis=tmp_path / "basis.safetensors", rank=16)
    penalties = [method.penalty(model_with_update("llama", method)).item() for method in (measured, loaded)]
    assert penalties[0] == pytest.approx(penalties[1], 1e-6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weight": -1.0}, "at least 0"),
        ({"weight": float("nan")}, "finite"),
        ({"rank": 0}, "`rank`"),
        ({"samples": 0}, "`samples`"),
        ({"safety_data": None}, "one of `safety_data`"),
        ({"basis": "basis.safetensors"}, "one of `safety_data`"),
    ],
)
def test_wrong_settings_are_refused_at_once(settings, words):
    with pytest.raises(ValueError, match=words):
        DriftPenalty(**{"safety_data": ROWS} | settings)


def test_a_basis_without_inputs_is_refused_with_the_difference(tmp_path):
    model = tiny.model()
    basis = SafetyBasis.from_rows(model, tiny.tokenizer(), ROWS, sides=("output",), rank=8)
    with pytest.raises(ValueError, match="no input directions"):
        DriftPenalty(basis=basis, rank=8).attach(model, tiny.tokenizer(), None)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LoraConfig(use_dora=True, target_modules="all-linear"), "use_dora"),
        (PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "PROMPT_TUNING"),
    ],
    ids=["dora", "prompt tuning"],
)
def test_configurations_that_cannot_work_are_refused(config, words):
    with pytest.raises(ValueError, match=words):
        DriftPenalty(safety_data=ROWS).adapt_peft_config(config)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        DriftPenalty(safety_data=tmp_path / "nowhere.jsonl").attach(tiny.model(), tiny.tokenizer(), None)
