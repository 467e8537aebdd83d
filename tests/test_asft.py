"""AsFT: the penalty against dense float64 formulas, its weighting, what it refuses."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BitsAndBytesConfig
from trl import SFTConfig

from safe_trainer import AlignmentDirection, AsFT, SafeSFTTrainer
from safe_trainer.linalg import outside_norm_squared

PROJECTORS = ("published", "subspace", "random", "none")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """Aligned and unaligned checkpoint of each architecture."""
    return {name: tiny.save_pair(tmp_path_factory.mktemp(name), name) for name in tiny.ARCHITECTURES}


def lora(**settings: object) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM", **settings)


def attached(pair: tuple[str, str], method: AsFT, full: bool = False, **settings: object) -> torch.nn.Module:
    """A model with `method` attached and an update that is not zero."""
    torch.manual_seed(3)
    model = tiny.Auto.from_pretrained(pair[0], dtype=torch.float32)
    model = model if full else get_peft_model(model, lora(**settings))
    method.attach(model, None, None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (full or "lora_B" in name):
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def dense_weights(path: str) -> dict[str, torch.Tensor]:
    """Every weight of a checkpoint in float64, d_out x d_in, by module name."""
    weights = load_file(f"{path}/model.safetensors")
    transposed = "transformer.h.0.attn.c_attn.weight" in weights  # GPT-2
    return {k.removesuffix(".weight"): (v.mT if transposed else v).double() for k, v in weights.items() if v.ndim == 2}


def dense_penalty(method: AsFT, model: torch.nn.Module, pair: tuple[str, str]) -> torch.Tensor:
    """`λ Σ ‖(I − C) ΔW‖²` with every matrix written out: the published code's way."""
    aligned, unaligned = dense_weights(pair[0]), dense_weights(pair[1])
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    total = torch.zeros((), dtype=torch.float64)
    for name, layer in base.named_modules():
        if hasattr(layer, "lora_A"):
            delta = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
            delta = delta * layer.scaling["default"] if method.scaled else delta
        elif name in aligned and "lm_head" not in name and hasattr(layer, "weight") and "emb" not in name:
            if not hasattr(layer, "nf") and not isinstance(layer, torch.nn.Linear):
                continue
            weight = layer.weight.double()
            delta = (weight.mT if hasattr(layer, "nf") else weight) - aligned[name]
        else:
            continue
        d = aligned[name] - unaligned[name]
        operator = torch.zeros(d.shape[0], d.shape[0], dtype=torch.float64)
        if method.projector == "published":
            operator = d @ d.mT / d.norm()
        elif method.projector == "subspace":
            leading = torch.linalg.svd(d).U[:, : method.rank]
            operator = leading @ leading.mT
        total = total + ((torch.eye(d.shape[0]).double() - operator) @ delta).square().sum()
    return method.weight * total


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("projector", ["published", "subspace", "none"])
def test_penalty_and_gradient_equal_the_dense_formula(
    pairs: dict[str, tuple[str, str]], architecture: str, projector: str
) -> None:
    pair = pairs[architecture]
    direction = AlignmentDirection.from_checkpoints(*pair, max_error=0.0)
    method = AsFT(direction=direction, projector=projector, rank=5, weight=0.7)
    fan = {"fan_in_fan_out": True} if architecture == "gpt2" else {}
    model = attached(pair, method, **fan)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ours, theirs = method.penalty(model), dense_penalty(method, model, pair)
    assert theirs > 0.01
    assert torch.allclose(ours.double(), theirs, rtol=1e-5)
    for mine, dense in zip(
        torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True
    ):
        assert torch.allclose(mine, dense, rtol=1e-4, atol=1e-5 * dense.abs().max().item())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_full_parameter_penalty_equals_the_dense_formula(pairs: dict[str, tuple[str, str]], architecture: str) -> None:
    pair = pairs[architecture]
    method = AsFT(direction=AlignmentDirection.from_checkpoints(*pair, max_error=0.0))
    model = attached(pair, method, full=True)
    assert torch.allclose(method.penalty(model).double(), dense_penalty(method, model, pair), rtol=1e-5)


def test_penalties_and_gradients_equal_the_reference_computed_densely_in_float64() -> None:
    reference = load_file(Path(__file__).parent / "fixtures" / "asft_reference.safetensors")
    total = torch.zeros(())
    for name in ("q_proj", "v_proj", "up_proj", "down_proj"):
        d = reference[f"{name}.aligned"] - reference[f"{name}.unaligned"]
        U, s, _ = torch.linalg.svd(d, full_matrices=False)
        A, B = (reference[f"{name}.lora_{factor}"].requires_grad_() for factor in "AB")
        for prefix, operator in (("", (U, s**2 / d.norm())), ("subspace3_", (U[:, :3], None))):
            penalty = outside_norm_squared(B, A, *operator)
            gradients = torch.autograd.grad(penalty, (A, B))
            assert torch.allclose(penalty, reference[f"{name}.{prefix}penalty"], rtol=1e-5)
            for factor, gradient in zip("AB", gradients, strict=True):
                expected = reference[f"{name}.{prefix}grad_{factor}"]
                assert torch.allclose(gradient, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
            total = total + (penalty if not prefix else 0)
    assert torch.allclose(total, reference["total_penalty"], rtol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_scaled_multiplies_the_penalty_by_the_square_of_the_scaling(
    pairs: dict[str, tuple[str, str]], rslora: bool
) -> None:
    values = []
    for scaled in (False, True):
        method = AsFT(projector="none", scaled=scaled)
        values.append(method.penalty(attached(pairs["llama"], method, use_rslora=rslora)).item())
    scaling = 12 / 4**0.5 if rslora else 12 / 4
    assert values[1] == pytest.approx(values[0] * scaling**2, rel=1e-5)


@pytest.mark.slow
def test_random_projector_has_the_rank_of_the_subspace_and_other_directions(
    pairs: dict[str, tuple[str, str]],
) -> None:
    penalties = {}
    for projector in PROJECTORS:
        method = AsFT(unaligned_model=pairs["llama"][1], projector=projector, rank=8)
        penalties[projector] = method.penalty(attached(pairs["llama"], method)).item()
    assert penalties["random"] != pytest.approx(penalties["subspace"], rel=1e-3)
    assert penalties["random"] < penalties["none"] and penalties["subspace"] < penalties["none"]


def test_truncated_direction_stays_within_its_stated_bound(pairs: dict[str, tuple[str, str]]) -> None:
    pair = pairs["llama"]
    exact, cut = AlignmentDirection.from_checkpoints(*pair, max_error=0.0), AlignmentDirection.from_checkpoints(*pair)
    for name, factors in cut.modules.items():
        d = dense_weights(pair[0])[name] - dense_weights(pair[1])[name]
        operator = d @ d.mT / d.norm()
        U, s = factors.U.double(), factors.singular_values.double()
        truncated = U @ torch.diag(s**2 / factors.frobenius_norm) @ U.mT
        bound = factors.next_singular_value**2 / factors.frobenius_norm
        assert torch.linalg.matrix_norm(operator - truncated, 2) <= bound + 1e-5
        assert factors.U.shape[1] <= exact.modules[name].U.shape[1]


def test_no_step_forms_a_matrix_of_the_size_of_a_weight_or_of_its_operator(tmp_path: Path) -> None:
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            self.elements = max(self.elements, result.numel() if isinstance(result, torch.Tensor) else 0)
            return result

    pair = tiny.save_pair(tmp_path, hidden=64)
    method = AsFT(direction=AlignmentDirection.from_checkpoints(*pair, rank=4))
    model = attached(pair, method)
    smallest = min(d_out * min(d_out, d_in) for d_out, d_in in (update.shape for update in method._updates.values()))
    with Largest() as largest:
        method.penalty(model).backward()
    assert 0 < largest.elements < smallest


def test_penalty_is_computed_in_float32_under_autocast(pairs: dict[str, tuple[str, str]]) -> None:
    method = AsFT(unaligned_model=pairs["llama"][1])
    model = attached(pairs["llama"], method)
    plain = method.penalty(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(method.penalty(model), plain)


def test_diagnostics_give_the_share_of_the_update_outside_the_direction(pairs: dict[str, tuple[str, str]]) -> None:
    method = AsFT(unaligned_model=pairs["llama"][1], rank=6)
    model = attached(pairs["llama"], method)
    shares = method.diagnostics(model)
    name = "model.layers.0.self_attn.q_proj"
    layer = model.get_base_model().get_submodule(name)
    delta = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).double()
    d = dense_weights(pairs["llama"][0])[name] - dense_weights(pairs["llama"][1])[name]
    leading = torch.linalg.svd(d).U[:, :6]
    inside = (leading.mT @ delta).square().sum() / delta.square().sum()
    assert shares[f"asft/outside/{name}"] == pytest.approx(1 - inside.item(), abs=1e-5)
    assert shares[f"asft/outside_expected/{name}"] == pytest.approx(1 - 6 / 32)


def train(pair: tuple[str, str], output: Path, method: AsFT, **settings: object) -> SafeSFTTrainer:
    defaults = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    arguments = SFTConfig(
        output_dir=str(output), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, **(defaults | settings)
    )
    trainer = SafeSFTTrainer(
        model=pair[0], args=arguments, train_dataset=tiny.rows(), peft_config=lora(), safety=method
    )
    trainer.train()
    return trainer


@pytest.mark.slow
def test_training_with_a_large_weight_keeps_the_update_small_and_logs_the_penalty(
    pairs: dict[str, tuple[str, str]], tmp_path: Path
) -> None:
    norms = {}
    for weight in (0.0, 100.0):
        trainer = train(pairs["llama"], tmp_path, AsFT(unaligned_model=pairs["llama"][1], weight=weight))
        measure = AsFT(projector="none")
        measure.attach(trainer.model, None, None)
        norms[weight] = measure.penalty(trainer.model).item()
        logged = [entry["safety_penalty"] for entry in trainer.state.log_history if "safety_penalty" in entry]
        assert len(logged) == 6 and logged[0] == 0
        assert (logged[-1] > 0) == (weight > 0)
        assert any(key.startswith("asft/outside/") for key in trainer.state.log_history[-1])
    assert norms[100.0] < 0.2 * norms[0.0]


@pytest.mark.slow
def test_gradients_are_those_of_one_large_batch_whatever_the_accumulation(
    pairs: dict[str, tuple[str, str]], tmp_path: Path
) -> None:
    final = []
    for batch, accumulation in ((8, 1), (2, 4)):
        trainer = train(
            pairs["llama"],
            tmp_path,
            AsFT(unaligned_model=pairs["llama"][1], weight=5.0),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=4,
        )
        final.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]))
    assert torch.allclose(final[0], final[1], atol=2e-6)


@pytest.mark.slow
def test_nan_in_a_layer_stops_training_with_its_name_and_keeps_the_checkpoints(
    pairs: dict[str, tuple[str, str]], tmp_path: Path
) -> None:
    method = AsFT(unaligned_model=pairs["llama"][1])
    model = attached(pairs["llama"], method)
    with torch.no_grad():
        model.get_base_model().model.layers[1].mlp.up_proj.lora_B["default"].weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"first `model.layers.1.mlp.up_proj`.*learning_rate"):
        method.penalty(model)
    with pytest.raises(FloatingPointError, match="not finite"):
        train(pairs["llama"], tmp_path, AsFT(unaligned_model=pairs["llama"][1]), learning_rate=1e25, save_steps=1)
    assert load_file(tmp_path / "checkpoint-1" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weight": -1.0}, "`weight`.*at least 0, got -1"),
        ({"weight": float("nan")}, "`weight`.*finite"),
        ({"projector": "published!"}, "`projector` must be one of published, subspace"),
        ({"rank": 0}, "`rank` must be at least 1"),
        ({"direction": "x"}, "not both"),
        ({"unaligned_model": None}, "needs the alignment direction.*unaligned_model"),
    ],
)
def test_wrong_settings_are_refused_at_once(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AsFT(**({"unaligned_model": "base"} | settings))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LoraConfig(r=4, target_modules="all-linear", use_dora=True), "DoRA"),
        (LoraConfig(r=4, target_modules=["q_proj", "lm_head"]), "lm_head"),
        (PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "PROMPT_TUNING"),
    ],
)
def test_configurations_that_cannot_work_are_refused_at_construction(
    pairs: dict[str, tuple[str, str]], tmp_path: Path, config: object, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        SafeSFTTrainer(
            model=pairs["llama"][0],
            args=SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True),
            train_dataset=tiny.rows(),
            peft_config=config,
            safety=AsFT(unaligned_model=pairs["llama"][1]),
        )


def test_a_direction_of_another_model_is_refused_with_the_difference(pairs: dict[str, tuple[str, str]]) -> None:
    with pytest.raises(ValueError, match=r"q_proj|c_attn"):
        attached(
            pairs["gpt2"], AsFT(direction=AlignmentDirection.from_checkpoints(*pairs["llama"])), fan_in_fan_out=True
        )


def test_a_direction_of_a_model_of_another_name_is_pointed_out(
    pairs: dict[str, tuple[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    direction = AlignmentDirection.from_checkpoints(*pairs["llama"][::-1])
    attached(pairs["llama"], AsFT(direction=direction))
    assert "computed for" in caplog.text and "safe-trainer direction" in caplog.text
    caplog.clear()
    attached(pairs["llama"], AsFT(direction=AlignmentDirection.from_checkpoints(*pairs["llama"])))
    assert "computed for" not in caplog.text


def test_rank_beyond_what_the_direction_holds_is_refused_with_the_layer(pairs: dict[str, tuple[str, str]]) -> None:
    with pytest.raises(ValueError, match="`rank` must be at most .*proj.*got 99"):
        attached(pairs["llama"], AsFT(unaligned_model=pairs["llama"][1], projector="subspace", rank=99))


def test_a_model_without_a_checkpoint_asks_for_the_aligned_one(pairs: dict[str, tuple[str, str]]) -> None:
    model = get_peft_model(tiny.model(), lora())
    with pytest.raises(ValueError, match="aligned_model"):
        AsFT(unaligned_model=pairs["llama"][1]).attach(model, None, None)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base_trains_with_the_penalty(pairs: dict[str, tuple[str, str]], tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    quantization = BitsAndBytesConfig(
        **{f"load_in_{bits}bit": True}, **({"bnb_4bit_quant_type": "nf4"} if bits == 4 else {})
    )
    trainer = SafeSFTTrainer(
        model=pairs["llama"][0],
        args=SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, max_steps=3, logging_steps=1),
        train_dataset=tiny.rows(),
        peft_config=lora(),
        quantization_config=quantization,
        safety=AsFT(unaligned_model=pairs["llama"][1]),
    )
    trainer.train()
    assert any(
        getattr(layer, "weight", None).__class__.__name__ in ("Params4bit", "Int8Params")
        for layer in trainer.model.modules()
    )
    penalties = [entry["safety_penalty"] for entry in trainer.state.log_history if "safety_penalty" in entry]
    assert penalties[0] == 0 and penalties[-1] > 0


@pytest.mark.slow
def test_card_names_the_paper(
    pairs: dict[str, tuple[str, str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    train(pairs["llama"], tmp_path, AsFT(unaligned_model=pairs["llama"][1]), max_steps=1, save_steps=1)
    card = (tmp_path / "README.md").read_text()
    assert "2506.08473" in card and "yang2026asft" in card and "- asft" in card and "- trl" in card
    assert "alignment direction" in caplog.text
