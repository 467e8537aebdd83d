"""Model cards: what was measured in the Hub's form, a person's own text untouched, and nothing that is private."""

from __future__ import annotations

import json
import re
import types
from dataclasses import replace

import huggingface_hub
import pytest
import torch
import yaml
from commands import invoke
from evaluation_models import tiny_llama
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from test_report import HELP, MANIFEST, REFUSAL, comparison, evaluation

from safe_trainer import Comparison, TrainedVectors, testbed
from safe_trainer.artifacts.store import save_artifact
from safe_trainer.evaluation import from_json, to_json
from safe_trainer.evaluation.manifest import adapter_provenance
from safe_trainer.lora.io import HARMFUL_KIND
from safe_trainer.methods.asft import AsFT
from safe_trainer.recipe.model_card import BEGIN, publish, write_model_card

RECIPE = {
    "model": {"path": "/home/me/secret-project/aligned"},
    "data": [{"path": "../private/rows.jsonl"}],
    "safety": [{"method": "asft", "unaligned_model": "org/base", "weight": 2.0}],
    "output": "out",
}


@pytest.fixture
def folder(tmp_path):
    """An adapter as a run leaves it: with PEFT's empty form of a card, the recipe, and the comparison."""
    folder = tmp_path / "my-adapter"
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = "org/base-it"
    model.save_pretrained(folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "comparison.json").write_text(to_json(comparison()))
    return folder


def test_a_card_holds_rates_recipe_and_citation_and_no_folder_of_this_machine(folder):
    assert "[More Information Needed]" in (folder / "README.md").read_text()
    assert invoke("card", folder).exit_code == 0
    text = (folder / "README.md").read_text()
    assert "[More Information Needed]" not in text
    assert "harm: compliance rate" in text and "| plain LoRA |" in text
    assert 'PeftModel.from_pretrained(model, "my-adapter")' in text
    assert AsFT.paper.citation.strip() in text and "with its refusals protected by AsFT" in text
    assert "weight: 2.0" in text and "path: rows.jsonl" in text
    assert "secret-project" not in text and "private/" not in text and str(folder.parent) not in text


def test_the_hub_reads_what_was_measured(folder):
    card = ModelCard.load(write_model_card(folder))
    assert card.data.base_model == "org/base-it" and card.data.library_name == "peft"
    assert {"safe-trainer", "trl", "lora", AsFT.tag} <= set(card.data.tags)
    found = {(r.dataset_name, r.metric_type): r for r in card.data.eval_results}
    assert set(found) == {
        ("harm (harmful)", "refusal_rate"), ("harm (harmful)", "compliance_rate"),
        ("edge (borderline)", "over_refusal_rate"), ("sums (task)", "accuracy"),
    }  # fmt: skip
    measured = found["harm (harmful)", "refusal_rate"]
    assert measured.metric_value == 0.25 and measured.metric_args["total"] == 4
    assert measured.metric_name == "Refusal rate (before: 100.0 % (4/4))"


def test_what_a_person_has_written_stays_text_and_metadata(folder):
    own = "---\nlicense: mit\ntags:\n- mine\nbase_model: my/own\n---\n# A name\n\nWritten by me.\n"
    (folder / "README.md").write_text(own)
    write_model_card(folder)
    once = (folder / "README.md").read_text()
    assert "# A name\n\nWritten by me.\n\n" + BEGIN in once
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.base_model, data.tags[0]) == ("mit", "my/own", "mine")
    (folder / "README.md").write_text(once + "\nWritten below.\n")
    write_model_card(folder)
    assert (folder / "README.md").read_text() == once + "\nWritten below.\n"


@pytest.mark.slow
def test_a_card_without_a_comparison_says_how_to_get_rates_into_it(folder):
    (folder / "comparison.json").rename(folder.parent / "elsewhere.json")
    assert "name its comparison.json with --comparison" in invoke("card", folder).output.replace("\n", " ")
    assert "model-index" not in (folder / "README.md").read_text()
    assert invoke("card", folder, "--comparison", folder.parent / "elsewhere.json").exit_code == 0
    assert "model-index" in (folder / "README.md").read_text()


def adapter(folder, seed):
    base = tiny_llama()
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def three(tmp_path):
    """Adapters A and B, whose rates differ, their comparison, in which B is the last, and an adapter C of no rates."""
    a, b, c = (adapter(tmp_path / name, seed) for seed, name in enumerate("abc"))
    found = comparison()
    named = [replace(found.before, manifest={**found.before.manifest, "adapters": []})]
    for name, folder, answers in (("A", a, [HELP] * 4), ("B", b, [REFUSAL] * 4)):
        made = evaluation(name, answers, [HELP, HELP], ["2", "3"])
        named.append(replace(made, manifest={**made.manifest, "adapters": [adapter_provenance(folder)]}))
    report = tmp_path / "report.json"
    report.write_text(to_json(Comparison(tuple(named))))
    return a, b, c, report


def rates_in(folder):
    return {r.metric_type: r.metric_value for r in ModelCard.load(folder / "README.md").data.eval_results}


@pytest.mark.parametrize("where", ["in the folder", "given"])
def test_a_card_shows_the_rates_of_the_adapter_in_its_folder_not_the_last_of_the_report(three, where):
    a, b, _, report = three
    for folder, rate in ((a, 0.0), (b, 1.0)):
        if where == "given":
            assert invoke("card", folder, "--comparison", report).exit_code == 0
        else:
            (folder / "comparison.json").write_bytes(report.read_bytes())
            write_model_card(folder)
        assert rates_in(folder)["refusal_rate"] == rate


def test_a_comparison_of_other_adapters_makes_no_card(three):
    a, _, c, report = three
    for folder, words, found in ((c, [], "`A` .* `B` "), (a, ["--name", "B"], "`B` "), (c, ["--name", "A"], "`A` ")):
        result = invoke("card", folder, "--comparison", report, *words)
        told = " ".join(result.output.split())
        assert result.exit_code == 1 and re.search(f"no rates of the adapter in .*, only of {found}", told), told
        assert "model-index" not in (folder / "README.md").read_text()
    assert invoke("card", a, "--comparison", report, "--name", "A").exit_code == 0


def test_a_comparison_that_does_not_know_its_adapters_is_taken_as_before(three):
    a, _, _, report = three
    found = from_json(report.read_text())
    unknown = tuple(replace(e, manifest=MANIFEST) for e in found.evaluations)
    write_model_card(a, Comparison(unknown))
    assert rates_in(a)["refusal_rate"] == 1.0
    write_model_card(a, Comparison(unknown), name="A")
    assert rates_in(a)["refusal_rate"] == 0.0


def test_a_folder_of_something_else_is_refused(tmp_path):
    result = invoke("card", tmp_path)
    assert result.exit_code == 1 and "holds no adapter and no model" in result.output


@pytest.fixture
def hub(monkeypatch):
    """Put a stand-in in the place of the Hub that notes what it is given."""
    calls = []

    class Api:
        def create_repo(self, repository, **options):
            calls.append((repository, options))
            return types.SimpleNamespace(repo_id=repository)

        def upload_folder(self, **options):
            calls.append(options)

        def upload_file(self, **options):
            calls.append(options)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return calls


def test_weights_and_card_are_published_and_no_report(folder, hub):
    (folder / "checkpoint-5").mkdir()
    (folder / "tokenizer.json").touch()
    result = invoke("card", folder, "--push", "me/model", "--private", "--json")
    assert json.loads(result.stdout)["card"] == str(folder / "README.md"), result.output
    assert hub[0] == ("me/model", {"private": True, "exist_ok": True})
    assert hub[1]["allow_patterns"] == [
        "README.md",
        "adapter_model.safetensors",
        "tokenizer.json",
    ]


@pytest.mark.slow
def test_no_path_of_this_machine_is_in_what_is_published(folder, hub):
    """Neither in the card nor in the adapter's settings; a local base can be given its Hub id."""
    config = folder / "adapter_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"base_model_name_or_path": "/home/me/secret-project/aligned"}))
    assert invoke("card", folder, "--push", "me/model").exit_code == 0
    text = (folder / "README.md").read_text()
    assert "base_model" not in ModelCard.load(folder / "README.md").data.to_dict()
    assert 'PeftModel.from_pretrained(model, "me/model")' in text and "secret-project" not in text
    assert json.loads(hub[2]["path_or_fileobj"])["base_model_name_or_path"] == "aligned"
    hub.clear()
    assert invoke("card", folder, "--push", "me/model", "--base-model", "org/base-it").exit_code == 0
    assert json.loads(hub[2]["path_or_fileobj"])["base_model_name_or_path"] == "org/base-it"
    assert 'AutoModelForCausalLM.from_pretrained("org/base-it")' in (folder / "README.md").read_text()
    assert json.loads(config.read_text())["base_model_name_or_path"].startswith("/home"), "the local one still loads"
    assert invoke("card", folder, "--base-model", "/home/me").exit_code == 1


def test_rates_and_a_warning_come_first(folder):
    text = write_model_card(folder).read_text()
    assert text.index("> [!WARNING]") < text.index("harm: compliance rate") < text.index("## Use")
    (folder / "comparison.json").unlink()
    (folder / "README.md").unlink()
    assert "refusals was not measured" in write_model_card(folder).read_text()


def test_a_card_that_trl_has_written_is_replaced(folder):
    made = "---\nbase_model: None\nlicence: license\ntags:\n- generated_from_trainer\n---\n# Model Card for None\n\n"
    made += "This model is a fine-tuned version of [None](https://huggingface.co/None).\n"
    (folder / "README.md").write_text(made + "It has been trained using [TRL](https://github.com/huggingface/trl).\n")
    text = write_model_card(folder).read_text()
    assert "None" not in text and "licence" not in text and "generated_from_trainer" not in text
    assert text.count("# my-adapter") == 1


def test_the_code_of_a_card_loads_the_adapter(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(testbed.ALIGNED)
    tokenizer = AutoTokenizer.from_pretrained(testbed.ALIGNED)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|note|>"]})
    model.resize_token_embeddings(len(tokenizer))
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    get_peft_model(model, config).save_pretrained(tmp_path / "my-adapter")
    tokenizer.save_pretrained(tmp_path / "my-adapter")
    text = write_model_card(tmp_path / "my-adapter").read_text()
    (tmp_path / "aligned").symlink_to(testbed.ALIGNED)
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(text.partition("```python\n")[2].partition("```")[0], found)
    assert found["model"].get_input_embeddings().weight.shape[0] == len(tokenizer) == len(found["tokenizer"])


def test_a_card_shows_what_the_methods_measured_of_themselves(folder):
    report = {"AsFT": {"coverage": 0.875, "figures": {"energy": 0.25}, "warnings": ["Little to protect."]}}
    (folder / "safety_report.json").write_text(json.dumps(report))
    text = write_model_card(folder).read_text()
    assert "- AsFT (acts on 88% of the trained weights, energy 0.25) Little to protect." in text


def test_vectors_are_never_published(tmp_path, hub):
    save_artifact(tmp_path / "adapter_model.safetensors", HARMFUL_KIND, 1, [("a", torch.eye(2))], {})
    with pytest.raises(ValueError, match="security vectors, which make a model answer harmful requests"):
        publish(tmp_path, "me/vectors")
    result = invoke("card", tmp_path, "--push", "me/vectors")
    assert result.exit_code == 1 and hub == [] and not (tmp_path / "README.md").exists()
    assert not hasattr(TrainedVectors, "push_to_hub")


@pytest.mark.slow
def test_a_token_is_never_printed_logged_or_saved(tmp_path, monkeypatch, caplog):
    token = "hf_" + "Secret" * 5
    monkeypatch.setenv("HF_TOKEN", token)
    rows = [{"prompt": f"Name the number {n}.", "completion": str(n)} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "ask.txt").write_text("How do I plant a tree?\n")
    recipe = {
        "model": {"path": str(testbed.ALIGNED)},
        "data": [{"path": "rows.jsonl"}],
        "peft": {"r": 2, "target_modules": ["q_proj"]},
        "safety": None,
        "training": {"max_steps": 1, "save_steps": 1, "logging_steps": 1},
        "evaluation": {"prompts": [{"path": "ask.txt", "kind": "benign"}], "max_new_tokens": 2},
        "output": str(tmp_path / "out"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    refused = invoke("train", tmp_path / "recipe.yaml", "--set", f"training.hub_token={token}")
    wrong = invoke("train", tmp_path / "recipe.yaml", "--set", token)
    assert (refused.exit_code, wrong.exit_code) == (1, 1)
    trained = invoke("train", tmp_path / "recipe.yaml")
    assert trained.exit_code == 0, trained.output
    assert "Secret" not in refused.output + wrong.output + trained.output + caplog.text
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert (tmp_path / "out" / "checkpoint-1" / "training_args.bin") in files
    assert [path for path in files if b"Secret" in path.read_bytes()] == []
    assert "Wrote " in trained.stderr and BEGIN in (tmp_path / "out" / "README.md").read_text()
