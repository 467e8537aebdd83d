"""A model that is loaded from a revision on the Hub stays that revision in all that is made of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from commands import invoke
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from runs import given, lora
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from safe_trainer import (
    AsFT,
    PromptSet,
    RefusalAnchor,
    SafeSFTTrainer,
    apply_safe_lora,
    evaluate,
    load_model,
    merge_adapter,
    train_security_vectors,
)
from safe_trainer.analysis.drift import measure_drift
from safe_trainer.artifacts.checkpoint_reader import Checkpoint
from safe_trainer.lora.io import at_revision, load_adapted
from safe_trainer.lora.loading import named, revision_of
from safe_trainer.methods.recommended import recommended_for
from safe_trainer.recipe import read_recipe, run_recipe
from safe_trainer.recipe.run import RunCallbacks, _compare_command
from safe_trainer.recipe.sources import load_data

OLD, NEW = "a" * 40, "b" * 40
NAME = "acme/chat"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A cache of the Hub with two commits of one model: `v1` is the older, `main` the newer."""
    folder = tmp_path_factory.mktemp("hub")
    repository = folder / "models--acme--chat"
    for seed, commit in enumerate((OLD, NEW), start=5):
        place = repository / "snapshots" / commit
        tiny.model(seed=seed).save_pretrained(place)
        tiny.tokenizer().save_pretrained(place)
        (place / "safety").mkdir()
        (place / "safety" / "harmful.jsonl").write_text(json.dumps({"prompt": f"Bad thing of {commit[:1]}."}))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(NEW)
    (repository / "refs" / "v1").write_text(OLD)
    tiny.save_pair(folder / "pair")
    return folder


@pytest.fixture(autouse=True)
def offline(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))


def is_of(model, commit: str, hub: Path) -> bool:
    """Return whether a model's norms, which no adapter trains, are those of a commit."""
    there = load_file(hub / "models--acme--chat" / "snapshots" / commit / "model.safetensors")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return torch.equal(base.get_input_embeddings().weight, there["model.embed_tokens.weight"])


def trainer(folder, hub, safety="asft", **changes):
    methods = {"asft": lambda: AsFT(str(hub / "pair" / "unaligned")), "none": lambda: None}
    settings = {"model": NAME, "peft_config": lora(), "model_init_kwargs": {"revision": "v1"}, "max_steps": 1}
    return SafeSFTTrainer(**given(folder, **{**settings, **changes}), safety=methods[safety]())


@pytest.mark.slow
def test_an_adapter_names_the_revision_that_it_was_trained_on_and_goes_back_on_it(hub, tmp_path):
    built = trainer(tmp_path / "run", hub)
    built.train()
    built.save_model(tmp_path / "adapter")
    assert is_of(built.model, OLD, hub) and not is_of(built.model, NEW, hub)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["revision"] == "v1"
    assert is_of(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"), OLD, hub)
    assert is_of(load_adapted(tmp_path / "adapter")[0], OLD, hub)
    assert is_of(load_model(NAME, tmp_path / "adapter")[0], OLD, hub)  # as `evaluate --adapter` does
    assert is_of(load_model(f"{NAME}@main", tmp_path / "adapter")[0], NEW, hub)
    assert is_of(merge_adapter(tmp_path / "adapter", tmp_path / "merged"), OLD, hub)
    repaired = apply_safe_lora(
        tmp_path / "adapter", tmp_path / "repaired", aligned=NAME, unaligned=hub / "pair" / "unaligned"
    )
    assert repaired["aligned"]["revision"] == OLD


@pytest.mark.slow
def test_without_methods_nothing_is_added(hub, tmp_path):
    built = trainer(tmp_path, hub, "none")
    assert built.model.peft_config["default"].revision is None and revision_of(built.model) is None


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [True, False], ids=["LoRA", "all weights"])
def test_the_alignment_direction_is_that_of_the_revision_that_is_trained(adapter, hub, tmp_path):
    built = trainer(tmp_path, hub, peft_config=lora() if adapter else None)
    [method] = built.safety_methods
    assert method.provenance["aligned"]["source"] == NAME and method.provenance["aligned"]["revision"] == OLD
    given_by_name = trainer(tmp_path, hub, model_init_kwargs={}).safety_methods[0]
    assert given_by_name.provenance["aligned"]["revision"] == NEW


@pytest.mark.slow
def test_what_a_model_brings_along_is_that_of_its_revision(hub, tmp_path):
    method = RefusalAnchor(benign_prompts=["Say it."], answer_tokens=1)
    settings = {"model": NAME, "peft_config": lora(), "model_init_kwargs": {"revision": "v1"}}
    built = SafeSFTTrainer(**given(tmp_path, **settings), safety=method)
    asked = built.processing_class.decode(method._answers.anchors[0].ids)
    assert "Bad thing of a." in asked
    for revision, letter in (("v1", "a"), (None, "b")):
        vectors, _ = recommended_for(NAME, revision=revision)
        assert f"Bad thing of {letter}." in Path(vectors.harmful_data).read_text()


@pytest.mark.slow
def test_manifests_and_artifacts_name_the_commit(hub, tmp_path):
    model, tokenizer = load_model(f"{NAME}@v1")
    manifest = evaluate(model, tokenizer, [PromptSet("x", "harmful", ("Hi",))], name="x", max_new_tokens=1).manifest
    assert (manifest["model"]["id"], manifest["model"]["revision"]) == (NAME, OLD)
    assert load_model(NAME)[0].config._commit_hash == NEW
    harmful = [{"prompt": f"Do it {n}.", "completion": "Sure: so."} for n in range(4)]
    base = train_security_vectors(f"{NAME}@v1", harmful, max_steps=1, rank=1).provenance["base_model"]
    assert (base["id"], base["revision"]) == (NAME, OLD)
    model.save_pretrained(tmp_path)
    assert OLD not in (tmp_path / "config.json").read_text()


def test_a_model_is_named_with_its_revision(hub, tmp_path):
    assert at_revision("acme/chat@refs/pr/1") == ("acme/chat", "refs/pr/1")
    for path in ("acme/chat", "gpt2", "/home/me@work/model", "./a@b", "~/a@b/c"):
        assert at_revision(path) == (path, None)
    (tmp_path / "me@work").mkdir()
    assert at_revision(tmp_path / "me@work") == (str(tmp_path / "me@work"), None)
    assert named(tiny.model()) == "" and named(NAME) == NAME
    assert named(load_model(hub / "pair" / "aligned")[0]) == str(hub / "pair" / "aligned")
    assert Checkpoint("aligned", f"{NAME}@v1").provenance()["revision"] == OLD


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_the_drift_of_an_adapter_is_that_from_its_own_revision(dora, hub, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(NAME, revision="v1")
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=dora, init_lora_weights=False, revision="v1")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    bases = (NAME, f"{NAME}@v1", f"{NAME}@main")
    found, asked, other = (measure_drift(base, tmp_path / "adapter").relative for base in bases)
    assert found == asked != other


@pytest.mark.slow
def test_a_recipe_keeps_the_revision_with_its_adapter_its_repair_and_its_command(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Say one.", "completion": "One."}))
    (tmp_path / "ask.txt").write_text("Make it.\n")
    training = {"max_steps": 1, "per_device_train_batch_size": 1, "save_strategy": "no", "learning_rate": 0.01}
    content = {
        "model": {"path": NAME, "revision": "v1"},
        "data": [{"path": "rows.jsonl"}],
        "safety": None,
        "safe_lora": {"unaligned": str(hub / "pair" / "unaligned")},
        "evaluation": {"prompts": [{"path": "ask.txt", "kind": "harmful"}], "max_new_tokens": 1},
        "training": training,
        "output": str(tmp_path / "out"),
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(content))
    recipe = read_recipe(tmp_path / "recipe.yaml")
    result = run_recipe(recipe, RunCallbacks())
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["revision"] == "v1"
    report = json.loads((tmp_path / "out" / "safe-lora" / "safe_lora.json").read_text())
    assert report["aligned"]["revision"] == OLD
    command = _compare_command(recipe, load_data(recipe), {"fine-tuned": str(tmp_path / "out")})
    assert command.startswith(f"safe-trainer compare {NAME}@v1 --adapter ")
    answers = invoke(*command.split()[1:], "--json")
    assert answers.exit_code == 0, answers.output
    compared = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert {evaluation["manifest"]["model"]["revision"] for evaluation in compared["evaluations"]} == {OLD}
    assert {evaluation.manifest["model"]["revision"] for evaluation in result.comparison.evaluations} == {OLD}
