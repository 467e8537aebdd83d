"""Safe LoRA against the published formula written out in float64, and against stock PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import planted
import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from safe_trainer import apply_safe_lora, compact_adapter, write_model_card
from safe_trainer.cli import app
from safe_trainer.lora.updates import linear_layers, lora_updates, weight

IDS = torch.randint(4, tiny.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
WEIGHTS = "adapter_model.safetensors"
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"lora_alpha": 9, "use_rslora": True},
    "of several ranks": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 5}},
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Callable[..., tuple[str, str]]:
    """Return the paths of an aligned model and of the same before its alignment, by architecture."""
    made: dict[str, tuple[str, str]] = {}

    def pair(architecture: str = "llama") -> tuple[str, str]:
        if architecture not in made:
            made[architecture] = tiny.save_pair(tmp_path_factory.mktemp(architecture), architecture)
        return made[architecture]

    return pair


def base(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def adapter(aligned: str, folder: Path, seed: int = 0, **settings: Any) -> PeftModel:
    """Save an adapter that does something; of its layers some point along the direction more than others."""
    torch.manual_seed(seed)
    usual = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    model = get_peft_model(base(aligned), LoraConfig(**(usual | settings)))
    model.save_pretrained(folder)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits


def dense(model: PeftModel, pair: tuple[str, str]) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Return by layer `ΔW`, `C ΔW` and their cosine, with every matrix written out in float64."""
    aligned, unaligned = (
        {name: weight(layer.base).double() for name, layer in linear_layers(base(folder)).items()} for folder in pair
    )
    found = {}
    for name, update in lora_updates(model, "The test").items():
        V = aligned[name] - unaligned[name]
        B, A = (factor.detach().double() for factor in update.factors())
        change = B @ A
        projected = V @ V.T / V.norm() @ change
        cosine = torch.nn.functional.cosine_similarity(change.flatten(), projected.flatten(), dim=0).item()
        found[name] = change, projected, cosine
    return found


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_updates_below_the_threshold_become_those_of_the_dense_formula(architecture, settings, pairs, tmp_path):
    pair = pairs(architecture)
    kept = {} if architecture == "llama" else {"fan_in_fan_out": True}
    patterns = SETTINGS[settings] if architecture == "llama" or "pattern" not in str(SETTINGS[settings]) else {}
    expected = dense(adapter(pair[0], tmp_path / "a", **patterns, **kept), pair)
    cosines = sorted(cosine for *_, cosine in expected.values())
    threshold = sum(cosines[len(cosines) // 2 :][:2]) / 2
    report = apply_safe_lora(tmp_path / "a", tmp_path / "repaired", unaligned=pair[1], threshold=threshold)
    repaired = PeftModel.from_pretrained(base(pair[0]), tmp_path / "repaired")
    assert 0 < sum(layer["projected"] for layer in report["layers"].values()) < len(expected)
    for name, update in lora_updates(repaired, "The test").items():
        change, projected, cosine = expected[name]
        layer = report["layers"][name]
        assert layer["similarity"] == pytest.approx(cosine, abs=1e-5)
        assert layer["norm"] == pytest.approx((projected.norm() / change.norm()).item(), rel=1e-4)
        assert layer["projected"] == (cosine < threshold)
        B, A = (factor.detach().double() for factor in update.factors())
        wanted = projected if layer["projected"] else change
        assert (B @ A - wanted).norm() < 1e-5 * wanted.norm(), name


@pytest.mark.slow
def test_stock_peft_answers_as_a_model_whose_weights_were_changed_by_the_dense_formula(pairs, tmp_path):
    pair = pairs()
    expected = dense(adapter(pair[0], tmp_path / "a"), pair)
    apply_safe_lora(tmp_path / "a", tmp_path / "repaired", unaligned=pair[1], aligned=pair[0], threshold=1.0)
    changed = base(pair[0])
    with torch.no_grad():
        for name, (_, projected, _) in expected.items():
            changed.get_submodule(name).weight += projected.float()
    repaired = logits(PeftModel.from_pretrained(base(pair[0]), tmp_path / "repaired"))
    assert torch.allclose(repaired, logits(changed), atol=1e-5)
    assert (repaired - logits(base(pair[0]))).abs().max() > 1e-4


def test_the_least_similar_layers_are_projected_where_their_number_is_given(pairs, tmp_path):
    pair = pairs()
    expected = dense(adapter(pair[0], tmp_path / "a"), pair)
    report = apply_safe_lora(tmp_path / "a", tmp_path / "b", unaligned=pair[1], number_of_layers=3)
    least = sorted(expected, key=lambda name: expected[name][2])[:3]
    assert {name for name, layer in report["layers"].items() if layer["projected"]} == set(least)


def test_at_threshold_zero_the_adapter_is_the_same_to_the_last_bit_and_at_one_nothing_is_left_as_it_was(
    pairs, tmp_path
):
    pair = pairs()
    adapter(pair[0], tmp_path / "a")
    before = load_file(tmp_path / "a" / WEIGHTS)
    for threshold, projected in ((0.0, 0), (1.0, len(before) // 2)):
        folder = tmp_path / str(threshold)
        report = apply_safe_lora(tmp_path / "a", folder, unaligned=pair[1], threshold=threshold)
        assert sum(layer["projected"] for layer in report["layers"].values()) == projected
        after = load_file(folder / WEIGHTS)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {name for name in before if projected and ".lora_B." in name}
        assert {name: t.shape for name, t in after.items()} == {name: t.shape for name, t in before.items()}


@pytest.mark.slow
def test_a_model_in_memory_is_repaired_as_its_folder_is_and_stays_as_it_was(pairs, tmp_path):
    pair = pairs()
    model = adapter(pair[0], tmp_path / "a")
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for source, folder in ((model, "memory"), (tmp_path / "a", "disk")):
        apply_safe_lora(source, tmp_path / folder, unaligned=pair[1], threshold=1.0)
    one, other = (load_file(tmp_path / folder / WEIGHTS) for folder in ("memory", "disk"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert all(torch.equal(start[name], tensor) for name, tensor in model.state_dict().items())


def test_what_is_not_a_factor_is_kept_and_told(pairs, tmp_path, caplog):
    pair = pairs()
    model = adapter(pair[0], tmp_path / "a", modules_to_save=["lm_head"])
    report = apply_safe_lora(tmp_path / "a", tmp_path / "b", unaligned=pair[1], threshold=1.0)
    assert report["kept"] == ["lm_head.weight"] and "`lm_head.weight`" in caplog.text
    one, other = (load_file(tmp_path / folder / WEIGHTS) for folder in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one if "lm_head" in name) and model is not None


def test_layers_without_an_update_or_without_a_direction_are_kept_and_told(pairs, tmp_path, caplog):
    aligned, unaligned = pairs()
    model = adapter(aligned, tmp_path / "a")
    names = list(lora_updates(model, "The test"))
    weights = load_file(tmp_path / "a" / WEIGHTS)
    weights[f"base_model.model.{names[0]}.lora_B.weight"].zero_()
    save_file(weights, tmp_path / "a" / WEIGHTS, metadata={"format": "pt"})
    same = base(unaligned)
    with torch.no_grad():
        same.get_submodule(names[1]).weight.copy_(base(aligned).get_submodule(names[1]).weight)
    same.save_pretrained(tmp_path / "unaligned")
    report = apply_safe_lora(tmp_path / "a", tmp_path / "b", unaligned=tmp_path / "unaligned", threshold=1.0)
    for name in names[:2]:
        assert report["layers"][name] == {"similarity": None, "norm": None, "projected": False}
        assert f"`{name}`" in caplog.text
    assert all(report["layers"][name]["projected"] for name in names[2:])


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a threshold out of range": ({}, {"threshold": 1.5}, "`threshold` must be from 0 to 1, got 1.5"),
    "both ways to choose": ({}, {"threshold": 0.5, "number_of_layers": 2}, "`threshold` or `number_of_layers`"),
    "more layers than there are": ({}, {"number_of_layers": 99}, "`number_of_layers` must be from 1 to 14.* got 99"),
    "DoRA": ({"use_dora": True}, {}, "use_dora"),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, {}, "LoRA on linear layers only"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_projected_is_refused_and_nothing_is_written(case, pairs, tmp_path):
    settings, arguments, message = REFUSED[case]
    pair = pairs()
    adapter(pair[0], tmp_path / "a", **settings)
    with pytest.raises(ValueError, match=message):
        apply_safe_lora(tmp_path / "a", tmp_path / "b", **{"unaligned": pair[1], **arguments})
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


@pytest.mark.slow
def test_checkpoints_that_do_not_fit_are_refused_with_the_difference(pairs, tmp_path):
    aligned, unaligned = pairs()
    adapter(aligned, tmp_path / "a")
    other, wider = pairs("gpt2")[0], str(tmp_path / "wider")
    tiny.model(hidden=64).save_pretrained(wider)
    quantized = str(tmp_path / "quantized")
    base(unaligned).save_pretrained(quantized)
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(config))
    for folder, message in (
        (other, "only `aligned`.*q_proj"),
        (wider, "other shapes"),
        (quantized, "`unaligned`.*is quantized.*full-precision"),
        (aligned, "identical"),
    ):
        with pytest.raises(ValueError, match=message):
            apply_safe_lora(tmp_path / "a", tmp_path / "b", unaligned=folder)
    # the adapter is of another model than the two checkpoints, which fit each other
    second = str(tmp_path / "second")
    tiny.model(hidden=64, seed=1).save_pretrained(second)
    with pytest.raises(
        ValueError, match=r"does not fit `aligned`.*model.layers.0.mlp.down_proj \(32 x 64, not 64 x 128\)"
    ):
        apply_safe_lora(tmp_path / "a", tmp_path / "b", aligned=wider, unaligned=second)
    assert not (tmp_path / "b").exists()


def test_an_output_that_exists_vectors_and_a_second_repair_are_refused(pairs, tmp_path):
    aligned, unaligned = pairs()
    adapter(aligned, tmp_path / "a")
    with pytest.raises(FileExistsError, match="exists already"):
        apply_safe_lora(tmp_path / "a", tmp_path / "a", unaligned=unaligned)
    planted.vectors(base(aligned)).save(tmp_path / "v")
    with pytest.raises(ValueError, match="security vectors, harmful by construction"):
        apply_safe_lora(tmp_path / "v", tmp_path / "b", unaligned=unaligned, aligned=aligned)
    apply_safe_lora(tmp_path / "a", tmp_path / "b", unaligned=unaligned)
    compact_adapter(tmp_path / "b", tmp_path / "c", tolerance=1e-4)
    for folder in "bc":
        with pytest.raises(ValueError, match="repaired already"):
            apply_safe_lora(tmp_path / folder, tmp_path / "d", unaligned=unaligned)


def test_the_card_says_that_it_was_repaired_by_what_and_from_what(pairs, tmp_path):
    aligned, unaligned = pairs()
    adapter(aligned, tmp_path / "mine")
    (tmp_path / "mine" / "README.md").write_text("# Mine\n\nRefuses all of it.\n")
    report = apply_safe_lora(tmp_path / "mine", tmp_path / "b", unaligned=unaligned)
    text = write_model_card(tmp_path / "b").read_text()
    projected = sum(layer["projected"] for layer in report["layers"].values())
    assert f"{projected} of 14 layers" in text and "below 0.5" in text and "`mine`" in text
    assert "2405.16833" in text and "safe-lora" in text and "was not measured" in text
    assert "Refuses all of it" not in text and str(tmp_path) not in text and "- trl" not in text
    assert report["aligned"]["weights_sha256"] and report["unaligned"]["source"] == unaligned


@pytest.mark.slow
def test_the_command_shows_each_layer_and_writes_adapter_and_card(pairs, tmp_path):
    aligned, unaligned = pairs()
    adapter(aligned, tmp_path / "a")
    command = ["apply-safe-lora", str(tmp_path / "a"), "--unaligned", unaligned, "-o"]
    result = CliRunner().invoke(app, [*command, str(tmp_path / "b"), "--threshold", "1"], prog_name="safe-trainer")
    assert result.exit_code == 0, result.output
    assert "14 of 14 layers" in result.output and (tmp_path / "b" / "README.md").is_file()
    result = CliRunner().invoke(app, [*command, str(tmp_path / "c"), "--layers", "2", "--json"])
    told = json.loads(result.stdout)
    assert sum(layer["projected"] for layer in told["layers"].values()) == 2
    assert CliRunner().invoke(app, [*command, str(tmp_path / "c")]).exit_code == 2
