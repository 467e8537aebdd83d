"""Recipes: every mistake found at once and where it stands, and a run that can be repeated from what it saved."""

from __future__ import annotations

import copy
import functools
import json
import operator
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs
import torch
import yaml
from commands import invoke
from marks import exhaustive_but
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file
from test_report import comparison
from trl import SFTTrainer

import safe_trainer.evaluation
from safe_trainer import general_prompts, generate, load_model, testbed
from safe_trainer.cli.options import Questions
from safe_trainer.evaluation.manifest import prompt_set_sha256
from safe_trainer.lora.io import REPAIR_REPORT
from safe_trainer.methods import METHODS
from safe_trainer.recipe import RecipeError, plan, read_recipe, run
from safe_trainer.recipe.document import Document
from safe_trainer.recipe.model import arguments
from safe_trainer.recipe.paths import moved
from safe_trainer.recipe.run import barely_learned, protection, run_recipe
from safe_trainer.recipe.schema import recipe_schema
from safe_trainer.recipe.sources import count_tokens, load_data

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted(path for path in (ROOT / "recipes").glob("*/*.yaml") if path.parent.name != "accelerate")
ROWS = [{"prompt": f"Name the number {n}.", "completion": str(n)} for n in range(20)]


@pytest.fixture
def recipe(tmp_path):
    """Write a small valid recipe for the embedded model, with changes, and return its path."""

    def write(changes: dict | None = None, name: str = "recipe.yaml") -> Path:
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
        asked = testbed.prompt_set("harmful").prompts[:2]
        (tmp_path / "ask.csv").write_text("\n".join(["prompt", *(f'"{prompt}"' for prompt in asked)]))
        values = {
            "model": {"path": str(testbed.ALIGNED)},
            "data": [{"path": "rows.jsonl"}],
            "peft": {"r": 2, "target_modules": ["q_proj"]},
            "safety": None,
            "training": {"max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no", "seed": 7},
            "output": str(tmp_path / "out"),
        }
        path = tmp_path / name
        path.write_text(yaml.safe_dump({**values, **(changes or {})}, sort_keys=False))
        return path

    return write


def problems(path, *overrides) -> list[str]:
    with pytest.raises(RecipeError) as error:
        read_recipe(path, overrides)
    return error.value.problems


# ---- reading YAML


def test_numbers_are_read_as_everybody_means_them():
    text = "a: 1e-4\nb: 2.5E3\nc: -1e+2\nd: 0.5e1\ne: 1e\nf: 0x10\ng: 1_000\n"
    assert Document(text, "r").values == {"a": 1e-4, "b": 2500, "c": -100, "d": 5, "e": "1e", "f": 16, "g": 1000}


def test_anchors_are_followed():
    assert Document("a: &x {b: 1, c: 2}\nd:\n  <<: *x\n  c: 3\n", "r").values["d"] == {"b": 1, "c": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "line 1: not valid YAML"),
        ("a: 1\n b: 2", "line 2: not valid YAML: mapping values"),
        ("- a", "line 1: expected keys such as `model:`"),
        ("", "line 1: expected keys"),
        ("a: 1\nb: 2\na: 3\n", 'line 3: not valid YAML: found duplicate key "a"'),
        ("b: 1\na: !!python/object:os.system {}\n", "line 2, a has the tag `python/object:os.system`"),
        ("a: \x1f\n", "not valid YAML: unacceptable character"),
        ("b: 1\n? [a]\n: 2\n", "a key must be one word"),
        ("a: 2020-13-45\n", "month must be in 1..12"),
        (
            "a: &a [1,1,1,1,1,1,1,1]\n"
            + "".join(f"{n}: &{n} [{','.join([f'*{o}'] * 8)}]\n" for o, n in zip("abcdef", "bcdefg", strict=True)),
            "it holds more than 100,000 values",
        ),
        (f"output: {'[' * 1000}", "nested too deeply"),
        (f"output: {'1' * 5000}", "Exceeds the limit"),
    ],
)
def test_what_is_no_recipe_is_refused_with_its_line(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert message in problems(path)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.learning_rate=-1", "must be at least 0, got -1.0"),
        ("training.learning_rate=.inf", "must be at least 0, got inf"),
        ("training.max_steps=-5", "must be at least 1, got -5"),
        ("training.num_train_epochs=0", "must be above 0, got 0"),
        ("training.per_device_train_batch_size=0", "must be at least 1, got 0"),
        ("training.seed=-1", "must be a number from 0 to 4,294,967,295, got -1"),
        ("training.eval_strategy=steps", "there are no rows to take a loss on"),
        ("training.load_best_model_at_end=true", "there are no rows to take a loss on"),
        ("eval_share=1", "input should be less than 1, got 1"),
        ("peft.r=0", "must be at least 1, got 0"),
        ("peft.lora_dropout=1.5", "must be a number from 0 to 1, got 1.5"),
    ],
)
def test_numbers_out_of_their_range_are_refused(change, message, recipe):
    (found,) = problems(recipe(), change)
    assert found.startswith(f"--set, {change.partition('=')[0]}: {message}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"built_in": "general", "where": {"category": "x"}},
            "prompts that are built in are taken as they are: `where`",
        ),
        ({"built_in": "general", "format": "alpaca", "limit": 2}, "taken as they are: `format` is"),
        ({"built_in": "general", "split": "test"}, "`split` and `revision` are of a dataset on the Hub"),
        ({"built_in": "general", "revision": "abc"}, "`split` and `revision` are of a dataset on the Hub"),
        ({"suite": "xstest", "revision": "abc"}, "a suite's revision is in its name, as in `suite: xstest@main`"),
        (
            {"suite": "xstest", "path": "ask.csv", "split": "test"},
            "`split` and `revision` are of a dataset on the Hub",
        ),
        ({"path": "ask.csv", "subset": "x"}, "`subset`, `split` and `revision` are of a dataset on the Hub"),
    ],
)
def test_what_a_source_of_prompts_has_no_use_for_is_refused(settings, message, recipe):
    (found,) = problems(recipe({"evaluation": {"prompts": [{"kind": "harmful", **settings}]}}))
    assert "evaluation.prompts.0: " in found and message in found


def test_built_in_prompts_can_be_limited(recipe):
    asked = {"prompts": [{"kind": "harmful", "built_in": "general", "limit": 3}]}
    (found,) = load_data(read_recipe(recipe({"evaluation": asked}))).prompt_sets
    assert found == general_prompts("harmful").first(3)


def test_steps_that_are_not_set_are_in_their_range(recipe):
    assert read_recipe(recipe(), ["training.max_steps=-1"]).training["max_steps"] == -1


UNFITTING = {
    "no such layer": (
        {"peft": {"r": 2, "target_modules": "nosuch"}},
        "peft.target_modules: Target modules nosuch not",
    ),
    "a pattern that is none": (
        {"peft": {"r": 2, "target_modules": ["q_proj"], "rank_pattern": {"(": 2}}},
        "peft: missing ), unterminated subpattern at position",
    ),
    "SaLoRA's rank": (
        {"safety": [{"method": "salora", "safety_data": "./rows.jsonl", "rank": 4000}]},
        "safety.0.rank: `rank` must be below 128, the output size of `model.layers.0.self_attn.q_proj`, got 4000",
    ),
    "a method that is not in a list": (
        {"safety": {"method": "salora", "safety_data": "./rows.jsonl", "rank": 4000}},
        "safety.rank: `rank` must be below 128",
    ),
    "AsFT's rank": (
        {"safety": [{"method": "asft", "unaligned_model": "x/y", "projector": "subspace", "rank": 4000}]},
        "safety.0.rank: `rank` must be at most 128, the smaller side of",
    ),
    "the rank of vectors": (
        {"safety": [{"method": "security_vectors", "harmful_data": "./rows.jsonl", "fitting": {"rank": 4000}}]},
        "safety.0.fitting.rank: `rank` must be between 1 and 128",
    ),
    "layers of vectors": (
        {
            "safety": [
                {"method": "security_vectors", "harmful_data": "./rows.jsonl", "fitting": {"target_modules": "q"}}
            ]
        },
        "safety.0.fitting.target_modules: `target_modules` names `q`",
    ),
    "SaLoRA without an adapter": (
        {"safety": {"method": "salora", "safety_data": "./rows.jsonl"}, "peft": None},
        "safety: SaLoRA works on a LoRA only",
    ),
    "an optimizer that nobody knows": (
        {"training": {"optim": "nosuch"}},
        "training.optim: nosuch is not a valid OptimizerNames",
    ),
}


@pytest.mark.parametrize("name", UNFITTING)
def test_what_does_not_fit_the_model_is_found_without_training(name, recipe):
    changes, message = UNFITTING[name]
    result = invoke("train", recipe(changes), "--dry-run")
    assert result.exit_code == 1 and "1 problem in" in result.stderr
    assert re.search(r"line \d+, " + re.escape(message), " ".join(result.stderr.split())), result.stderr


def test_what_does_not_fit_is_found_before_a_model_is_loaded_too(recipe, monkeypatch):
    from safe_trainer.recipe import run as running

    monkeypatch.setattr(running, "make_trainer", None)
    result = invoke("train", recipe({"peft": {"r": 2, "target_modules": "nosuch"}}))
    assert result.exit_code == 1 and "peft.target_modules: " in result.stderr


def test_files_that_methods_name_must_be_there(recipe):
    safety = [{"method": "salora", "safety_data": "./absent.jsonl"}, {"method": "asft", "direction": "/absent.st"}]
    found = problems(recipe({"safety": safety}))
    assert ["safety.0.safety_data: there is no file or folder" in found[0], "safety.1.direction" in found[1]] == [
        True
    ] * 2


def artifact(path: Path, kind: str | None) -> Path:
    """Write weights that say of which kind they are."""
    save_file({"a": torch.zeros(1)}, path, metadata={"kind": kind} if kind else None)
    return path


@pytest.mark.slow
def test_what_methods_and_monitor_read_is_looked_at_before_torch_is_loaded(recipe, tmp_path):
    """Missing files, a direction that is a basis, vectors that are an adapter: all at once, and in a second."""
    (tmp_path / "adapter").mkdir()
    artifact(tmp_path / "adapter" / "adapter_model.safetensors", None)
    artifact(tmp_path / "basis.safetensors", "safety basis")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    path = recipe(
        {
            "safety": [
                {"method": "asft", "direction": "basis.safetensors"},
                {"method": "security_vectors", "vectors": "adapter"},
                {"method": "salora", "safety_data": "absent.jsonl", "basis": "./absent.safetensors"},
                {"method": "refusal_anchor", "prompts": "rows.jsonl"},
            ],
            "monitor": {"direction": "cut.safetensors"},
        }
    )
    code = (
        "import sys\n"
        "from safe_trainer.recipe import RecipeError, read_recipe\n"
        "try:\n    read_recipe(sys.argv[1], ['monitor.evry=1'])\n"
        "except RecipeError as error:\n    print(error, *({'torch', 'trl', 'transformers'} & set(sys.modules)))\n"
    )
    found = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True).stdout
    lines = dict(re.findall(r"^  (?:line \d+|--set), ([\w.]+): (.*)$", found, re.MULTILINE))
    expected = {
        "safety.0.direction": "a file of kind 'safety basis', not alignment direction; `safe-trainer direction`",
        "safety.1.vectors": "an adapter or other weights, not security vectors; `safe-trainer vectors`",
        "safety.2.safety_data": "there is no file or folder",
        "safety.2.basis": "`safe-trainer basis` makes one",
        "monitor.evry": "did you mean `every`?",
        "monitor.direction": "cut.safetensors` are incomplete or damaged",
    }
    assert set(lines) == set(expected), found
    for place, message in expected.items():
        assert message in lines[place]
    assert found.splitlines()[-1].startswith("  --set, monitor.evry"), "and nothing heavy was loaded"


@pytest.mark.slow
def test_aliases_that_multiply_are_refused_in_a_change_too(recipe):
    """Each level holds the one before nine times: made, they would take all memory there is."""
    levels = "".join(f"&{n} [{','.join([f'*{o}'] * 9)}], " for o, n in zip("abcdefghijk", "bcdefghijkl", strict=True))
    (found,) = problems(recipe(), f"peft.target_modules=[&a [1,1,1,1,1,1,1,1,1], {levels}1]")
    assert "--set peft.target_modules=" in found and len(found) < 500


@pytest.mark.slow
def test_a_long_value_is_not_shown_whole(recipe):
    (found,) = problems(recipe({"training": {"seed": [1] * 20_000}}))
    assert "expected a whole number, got [1, 1, " in found and len(found) < 400


@pytest.mark.parametrize("name", ["./" + "x" * 300, "/" + "x" * 300, "~nobody/x"])
@pytest.mark.parametrize("key", ["model", "path", "hub", "direction"])
def test_a_name_that_no_file_can_have_is_one_that_is_not_there(key, name, recipe):
    changes = {
        "model": {"model": {"path": name}},
        "path": {"data": [{"path": f"{name}.csv"}]},
        "hub": {"data": [{"hub": name}]},
        "direction": {"monitor": {"direction": name}},
    }
    (found,) = problems(recipe(changes[key]))
    assert "there is no f" in found and ": " in found


def test_on_off_yes_and_no_are_words_as_yaml_1_2_has_them(recipe):
    path = recipe()
    path.write_text(path.read_text().replace("save_strategy: 'no'", "save_strategy: no\n  packing: yes"))
    read = read_recipe(path)
    assert (read.training["save_strategy"], read.training["packing"]) == ("no", True)


def test_text_that_is_not_utf_8_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes("output: caf\u00e9".encode("latin-1"))
    assert "is not UTF-8" in problems(path)[0]


# ---- validation


def test_a_valid_recipe_has_its_types_put_right(recipe):
    read = read_recipe(recipe({"training": {"learning_rate": "1e-4", "max_steps": 2, "warmup_steps": 1}}))
    assert read.training == {"learning_rate": 1e-4, "max_steps": 2, "warmup_steps": 1.0}
    assert (read.peft.r, read.peft.target_modules, read.peft.task_type) == (2, {"q_proj"}, "CAUSAL_LM")
    assert read.safety == []


def test_every_problem_is_listed_at_once_in_the_order_of_the_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        """model:
  pth: x
  dtype: float8
data:
  - path: absent.csv
    wieght: 2
  - format: alpacca
  - {path: recipe.yaml, columns: {answer: b}}
peft: {r: 8, target_module: all-linear}
safety:
  - method: asfd
  - {method: asft, wait: 1}
  - method: asft
training:
  learning_rat: 1e-4
  output_dir: x
  hub_token: secret
  num_train_epochs: many
  seed: true
evaluation: {prompts: []}
outptu: out
"""
    )
    expected = [
        ("line 1, output", "is missing"),
        ("line 1, model.path", "is missing"),
        ("line 2, model.pth", "did you mean `path`?"),
        ("line 3, model.dtype", "got 'float8'"),
        ("line 5, data.0.path", "there is no file"),
        ("line 6, data.0.wieght", "did you mean `weight`?"),
        ("line 7, data.1.format", "got 'alpacca'"),
        ("line 8, data.2.path", "of no kind that can be read"),
        ("line 8, data.2.columns", "`columns` must name `prompt`"),
        ("line 9, peft.target_module", "did you mean `target_modules`?"),
        ("line 11, safety.0.method", "did you mean `asft`?"),
        ("line 12, safety.1.wait", "did you mean `weight`?"),
        ("line 13, safety.2", "needs the alignment direction"),
        ("line 15, training.learning_rat", "did you mean `learning_rate`?"),
        ("line 16, training.output_dir", "is `output` in a recipe"),
        ("line 17, training.hub_token", "must not be in a file"),
        ("line 18, training.num_train_epochs", "expected a number, got 'many'"),
        ("line 19, training.seed", "expected a whole number, got True"),
        ("line 20, evaluation.prompts", "at least 1"),
        ("line 21, outptu", "did you mean `output`?"),
        ("--set, training.max_steps", "expected a whole number, got 2.5"),
    ]
    found = problems(path, "training.max_steps=2.5")
    assert sorted(problem.split(": ")[0] for problem in found) == sorted(place for place, _ in expected)
    for place, message in expected:
        assert any(problem.startswith(f"{place}: ") and message in problem for problem in found), (place, found)
    lines = [int(problem.split(",")[0].removeprefix("line ")) for problem in found[:-1]]
    assert lines == sorted(lines)
    assert "secret" not in "".join(found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft": {"layers_pattern": "h"}}, "peft: "),
        ({"peft": {"bias": "some"}}, "peft.bias: expected 'none' or 'all' or 'lora_only', got 'some'"),
        ({"peft": {"use_dora": True}, "safety": {"method": "asft", "unaligned_model": "x"}}, "safety: "),
        ({"safety": [{"unaligned_model": "x"}]}, "safety.0.method: is missing"),
        ({"safety": {"method": "asft", "unaligned_model": "x", "weight": -1}}, "`weight` must be"),
        ({"safety": [{"method": "asft", "unaligned_model": "x"}] * 2}, "`asft` is listed a second time"),
        ({"safety": ["asft"]}, "safety.0: "),
        ({"safety": "asft"}, "safety: "),
        ({"model": "Qwen/Qwen2.5-0.5B"}, "model: "),
        ({"model": {"path": "./absent"}}, "model.path: there is no folder"),
        ({"data": []}, "data: "),
        ({"data": "rows.jsonl"}, "data: "),
        ({"data": [{"path": "rows.jsonl", "hub": "a/b"}]}, "give either `path`"),
        ({"data": [{"path": "rows.jsonl", "weight": 0}]}, "data.0.weight: "),
        ({"data": [{"path": "rows.jsonl", "format": "alpaca", "columns": {"prompt": "a"}}]}, "not both"),
        ({"evaluation": {"prompts": [{"path": "ask.csv", "kind": "evil"}]}}, "evaluation.prompts.0.kind: "),
        ({"data": [{"path": "rows.jsonl", "split": "test"}]}, "a file, in `path`, has none"),
        ({"data": [{"path": "hf:a/b"}]}, "a dataset is given under `hub`: `hub: a/b`"),
        ({"data": [{"hub": "./absent"}]}, "data.0.hub: there is no folder"),
        ({"training": ["max_steps"]}, "training: "),
    ],
)
def test_one_mistake_is_told_where_it_stands(recipe, changes, message):
    assert any(message in problem for problem in problems(recipe(changes)))


def test_changes_of_the_command_line_count(recipe):
    changed = read_recipe(
        recipe(),
        ["training.learning_rate=1e-3", "peft.r=4", "data.0.weight=0.5", "model.revision=main", "peft.bias=all"],
    )
    assert changed.training["learning_rate"] == 1e-3
    assert (changed.peft.r, changed.peft.bias) == (4, "all")
    assert (changed.parts.data[0].weight, changed.parts.model.revision) == (0.5, "main")


@pytest.mark.parametrize("change", ["training", "=1", "data.7.path=x", "output.x=1", ".a=1", "data.x=1"])
def test_changes_that_fit_nowhere_are_refused(recipe, change):
    assert f"--set {change.split('=')[0]}" in problems(recipe(), change)[0]


def test_a_misspelt_key_of_a_change_is_not_blamed_on_the_file(recipe):
    (told,) = problems(recipe(), "trainig.max_steps=3")
    assert told.startswith("--set, trainig: unknown key; did you mean `training`")


def test_full_training_needs_an_explicit_null(recipe):
    assert read_recipe(recipe({"peft": None})).peft is None
    path = recipe()
    path.write_text(path.read_text().replace("peft:\n  r: 2\n  target_modules:\n  - q_proj\n", ""))
    assert read_recipe(path).peft.target_modules == "all-linear"


# ---- paths


def test_files_are_looked_for_beside_the_recipe():
    values = {
        "model": {"path": "../model"},
        "data": [{"path": "rows.csv"}, {"path": "/elsewhere/rows.csv"}, {"hub": "org/name"}],
        "safety": [{"method": "asft", "unaligned_model": "Qwen/Qwen2.5-0.5B", "direction": "./direction.safetensors"}],
        "training": {"deepspeed": "../accelerate/zero.json", "chat_template_path": "chat.jinja"},
        "evaluation": {"prompts": [{"path": "ask.csv", "kind": "harmful"}]},
        "output": "./out",
    }
    seen = moved(values, (), Path("/recipes/a"))
    assert seen["model"]["path"] == "/recipes/model"
    assert [source.get("path") for source in seen["data"]] == ["/recipes/a/rows.csv", "/elsewhere/rows.csv", None]
    assert seen["safety"][0]["unaligned_model"] == "Qwen/Qwen2.5-0.5B"
    assert seen["safety"][0]["direction"] == "/recipes/a/direction.safetensors"
    assert seen["training"]["deepspeed"] == "/recipes/accelerate/zero.json"
    assert seen["training"]["chat_template_path"] == "/recipes/a/chat.jinja"
    assert seen["evaluation"]["prompts"][0]["path"] == "/recipes/a/ask.csv"
    assert seen["output"] == "./out"
    saved = moved(values, (), Path("/recipes/a"), Path("/recipes/a/out"))
    assert saved["data"][0]["path"] == "../rows.csv"
    assert moved(saved, (), Path("/recipes/a/out")) == seen


def test_words_of_settings_are_no_files_where_there_is_a_folder_of_that_name(recipe, tmp_path):
    names = ("output", "data", "salora", "rows", "train", "cosine", "tuned")
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / "safe.jsonl").write_text(json.dumps({"prompt": "Steal it.", "completion": "I will not."}))
    words = {
        "data": [{"path": "rows.jsonl", "system_prompt": "./data", "where": {"split": "./train"}}],
        "safety": [
            {"method": "salora", "safety_data": "safe.jsonl", "protect": "output"},
            {"method": "refusal_anchor", "system_prompt": "data", "prompts": {"hub": "rows", "split": "train"}},
            {"method": "refusal_anchor", "system_prompt": "Answer as in rows.csv", "benign_prompts": "data"},
        ],
        "training": {"lr_scheduler_type": "cosine", "run_name": "tuned"},
    }
    files = {
        ("safety", 0, "safety_data"): "safe.jsonl", ("safety", 1, "prompts", "hub"): "rows",
        ("safety", 2, "benign_prompts"): "data", ("data", 0, "path"): "rows.jsonl",
    }  # fmt: skip
    expected = copy.deepcopy(words)
    for (*place, key), name in files.items():
        functools.reduce(operator.getitem, place, expected)[key] = str(tmp_path / name)
    assert moved(words, (), tmp_path) == expected
    from_there = moved(words, (), tmp_path, tmp_path / "out")["safety"]
    assert from_there[0] == {"method": "salora", "safety_data": "../safe.jsonl", "protect": "output"}
    assert read_recipe(recipe({"safety": words["safety"][0]})).safety[0].protect == "output"


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("rows/A.jsonl", "Did you mean `a.jsonl`"),
        ("rows/*.jsonl", "Patterns are not expanded: name one file"),
        ("rows", "Give one of its files, or `hub: "),
        ("owner/name", "A dataset on the Hub is given under `hub`, in place of `path`"),
        ("hf:owner/name", "a dataset is given under `hub`: `hub: owner/name`"),
    ],
)
def test_what_a_path_was_meant_to_be_is_said_in_the_recipe_s_words(recipe, tmp_path, path, told):
    (tmp_path / "rows").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / "rows" / name).write_text(json.dumps(ROWS[0]))
    with pytest.raises(RecipeError, match=r"data\.0\.path") as error:
        read_recipe(recipe({"data": [{"path": path}]}))
    assert told in str(error.value)
    if "hub: " in told:  # as it advises
        folder = "./rows" if path == "rows" else "owner/name"
        assert read_recipe(recipe({"data": [{"hub": folder, "split": "train"}]})).parts.data[0].hub


def test_files_on_the_command_line_are_looked_for_where_it_is_given(recipe, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine.jsonl").write_text(json.dumps(ROWS[0]))
    monkeypatch.chdir(tmp_path / "here")
    read = read_recipe(recipe(), ["data.0.path=mine.jsonl"])
    assert read.parts.data[0].path == str(tmp_path / "here" / "mine.jsonl")
    assert read.values["data"][0]["path"] == "./here/mine.jsonl"


# ---- running


@pytest.mark.slow
def test_dry_run_counts_what_a_run_would_take(recipe):
    path = recipe({"training": {"num_train_epochs": 3, "per_device_train_batch_size": 2, "max_length": 19}})
    result = invoke("train", path, "--dry-run", "--json", "--set", "training.gradient_accumulation_steps=3")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert (plan["rows"], plan["steps"]) == (20, 12)  # 20 rows are 10 batches, 4 steps an epoch
    assert plan["parameters"] == 984_192
    assert plan["trainable"] == 4 * 2 * (128 + 128)  # 4 layers, rank 2, 128 in and 128 out
    assert plan["tokens"] == 20 * 19 and plan["cut"]["count"] == plan["cut"]["total"] == 20
    assert 0 < plan["learned"]["count"] < plan["learned"]["total"]
    assert plan["learning_rate"] == 2e-4, "the default of a LoRA"
    assert plan["seconds"] > 0 and plan["memory"] > 4 * 984_192
    assert not Path(yaml.safe_load(path.read_text())["output"]).exists()


@pytest.mark.slow
def test_dry_run_counts_the_same_tokens_and_steps_as_a_run(recipe):
    from safe_trainer.recipe.dry_run import plan
    from safe_trainer.recipe.run import make_trainer
    from safe_trainer.recipe.sources import load_data

    read = read_recipe(
        recipe({"training": {"num_train_epochs": 2, "per_device_train_batch_size": 3, "save_strategy": "no"}})
    )
    loaded = load_data(read)
    trainer = make_trainer(read, loaded, arguments(read))
    trainer.train()
    made = plan(read, loaded)
    assert made.steps == trainer.state.global_step
    assert made.tokens * 2 == trainer.state.log_history[-1].get("num_tokens", made.tokens * 2)
    assert made.tokens == sum(len(row["input_ids"]) for row in trainer.train_dataset)
    assert made.trainable == sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)


LONG = [
    {"prompt": "Please consider this. " * 60 + f"How do I polish statue {n}?", "completion": "Gently."}
    for n in range(3)
]


@pytest.mark.slow
def test_rows_whose_answer_is_cut_away_are_counted_and_named(recipe, tmp_path):
    path = recipe({"training": {"max_length": 64, "max_steps": 1}})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [*ROWS[:5], *LONG])))
    result = invoke("train", path, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    assert "3 of 8 rows teach nothing: their answer starts after `max_length=64`" in result.stderr
    assert "(rows 6, 7, 8)" in result.stderr
    plan = json.loads(result.stdout)
    assert (plan["lost"]["count"], plan["lost"]["total"]) == (3, 8) and 0 < plan["learned"]["rate"] < 1


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_rows_of_which_no_answer_is_left_are_refused(more, recipe, tmp_path):
    path = recipe({"training": {"max_length": 64, "max_steps": 1}})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, LONG)))
    result = invoke("train", path, *more)
    assert result.exit_code == 1 and "nothing can be learned" in result.stderr, result.output
    assert "max_length" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("training", "lost"),
    [
        ({"packing": True}, 3),  # each sequence is cut, none is dropped
        ({"packing": True, "packing_strategy": "bfd_split"}, 0),
        ({"truncation_mode": "keep_end"}, 0),
    ],
)
@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated")
def test_rows_are_cut_as_trl_cuts_them(training, lost, recipe, tmp_path):
    path = recipe({"training": {"max_length": 64, "max_steps": 1, **training}})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [*ROWS[:5], *LONG])))
    found = read_recipe(path)
    made = plan(found)
    assert (made.lost.count, made.learned.value == 1) == (lost, not lost)
    rows = SFTTrainer(found.parts.model.path, arguments(found), train_dataset=load_data(found).rows).train_dataset
    answers = sum(label != -100 for row in rows for label in row["labels"])
    whole = count_tokens(found, load_data(found), arguments(found))
    assert whole.learned == answers


@pytest.mark.slow
def test_turns_that_the_chat_template_leaves_out_are_counted_and_named(recipe, tmp_path, caplog):
    (tmp_path / "plain.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}{% elif m.role == 'assistant' %}"
        "<a>{{ m.content.split('</think>')[-1] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    path = recipe({"training": {"max_steps": 1, "chat_template_path": "plain.jinja"}})
    rows = [ROWS[0], {**ROWS[1], "system": "Be rude."}, {**ROWS[2], "completion": "<think>Why?</think>Two."}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plan(read_recipe(path))
    assert "leaves out a turn of 2 of 3 rows, first of row 2 (system)" in caplog.text


def test_rows_labelled_harmful_are_counted_and_those_of_other_files_need_no_label(recipe, tmp_path):
    labelled = [{"prompt": "Say a", "response": "A.", "is_safe": bool(n % 3)} for n in range(6)]
    path = recipe({"data": [{"path": "rows.jsonl"}, {"path": "labelled.jsonl"}]})
    (tmp_path / "labelled.jsonl").write_text("\n".join(map(json.dumps, labelled)))
    loaded = load_data(read_recipe(path))
    assert len(loaded.rows) == 26 and loaded.rows.column_names == ["prompt", "completion"]
    assert "2 of 6 rows are labelled harmful, and are learned; leave them out with `where`" in "".join(
        loaded.messages()
    )


@pytest.mark.slow
def test_earlier_turns_of_the_assistant_count_as_answers_that_are_not_learned(recipe, tmp_path):
    turns = ["What is a tree?", "A plant with a trunk.", "And a shrub?", "Smaller."]
    row = {"messages": [{"role": r, "content": t} for r, t in zip(["user", "assistant"] * 2, turns, strict=True)]}
    path = recipe()
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    told = invoke("train", path, "--dry-run", "--json")
    assert json.loads(told.stdout)["learned"]["rate"] < 1 and "of the answers' tokens are learned" in told.stderr
    told = invoke("train", path, "--dry-run", "--json", "--set", "data.0.answers=all")
    assert json.loads(told.stdout)["rows"] == 2


def test_rows_of_methods_say_how_they_are_read(recipe, tmp_path):
    """Where only some rows of a file are harmful, a recipe says so as it does under `data`."""
    rows = [{"prompt": f"Do {n}.", "response": "Sure.", "is_safe": n % 2 == 0} for n in range(10)]
    (tmp_path / "labelled.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"path": "labelled.jsonl", "where": {"is_safe": False}, "limit": 3}
    read = read_recipe(recipe({"safety": {"method": "security_vectors", "harmful_data": source}}))
    assert len(read.safety[0].harmful_data) == 3
    (found,) = problems(recipe({"safety": {"method": "security_vectors", "harmful_data": {**source, "wher": 1}}}))
    assert "safety.harmful_data.wher: " in found and "did you mean `where`?" in found
    (found,) = problems(recipe({"safety": {"method": "security_vectors", "harmful_data": {"path": "absent.csv"}}}))
    assert "safety.harmful_data.path: there is no file" in found


def test_rows_of_methods_are_read_before_a_model_is_loaded(recipe, tmp_path):
    (tmp_path / "harmful.jsonl").write_text('{"prompt": "Harm.", "completion": "Sure."}\n{"prompt": 3}\n')
    path = recipe({"safety": {"method": "security_vectors", "harmful_data": "harmful.jsonl"}})
    result = invoke("train", path, "--dry-run")
    assert result.exit_code == 1 and "harmful.jsonl" in result.stderr and "line 2" in result.stderr


def test_a_prompt_set_may_have_its_own_system_prompt_and_frame(recipe):
    asked = {"kind": "harmful", "path": "ask.csv", "system_prompt": "Be brief.", "template": "AOA: {prompt}"}
    (found,) = load_data(read_recipe(recipe({"evaluation": {"prompts": [asked]}}))).prompt_sets
    assert (found.system_prompt, found.template) == ("Be brief.", "AOA: {prompt}")


def test_a_task_names_its_scorer(recipe, tmp_path):
    from safe_trainer.recipe.sources import load_data

    (tmp_path / "sums.csv").write_text('question,answer\n1+1?,"1+1 = 2\n#### 2"\n')
    asked = {"kind": "task", "path": "sums.csv", "scorer": "number"}
    (found,) = load_data(read_recipe(recipe({"evaluation": {"prompts": [asked]}}))).prompt_sets
    assert (found.scorer, found.references) == ("number", ("1+1 = 2\n#### 2",))
    with pytest.raises(RecipeError, match="evaluation.prompts.0.scorer: .*number"):
        read_recipe(recipe({"evaluation": {"prompts": [{**asked, "scorer": "rouge"}]}}))


def test_judges_are_named_in_a_recipe_and_their_models_looked_for_beside_it(recipe, tmp_path):
    asked = {"prompts": [{"path": "ask.csv", "kind": "harmful"}]}
    assert read_recipe(recipe({"evaluation": asked})).parts.evaluation.judges == ["phrases", "likelihood"]
    named = recipe({"evaluation": asked | {"judges": ["phrases", "wildguard:./judge"]}})
    assert any("there is no folder" in problem and "judge" in problem for problem in problems(named))
    shutil.copytree(testbed.ALIGNED, tmp_path / "judge")
    assert read_recipe(named).parts.evaluation.judges == ["phrases", f"wildguard:{tmp_path / 'judge'}"]
    for judges, message in (
        (["oracle"], "got 'oracle', expected phrases, likelihood"),
        ([], "at least one, got none"),
    ):
        assert any(message in problem for problem in problems(recipe({"evaluation": asked | {"judges": judges}})))


@pytest.mark.slow
def test_a_dry_run_counts_the_text_part_of_a_model_for_images_and_text(recipe, tmp_path):
    from transformers import AutoTokenizer, Gemma3Config, Gemma3ForConditionalGeneration

    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 1024}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(testbed.ALIGNED).save_pretrained(tmp_path / "model")
    path = recipe({"model": {"path": "./model"}, "peft": {"r": 2, "target_modules": ["q_proj"]}})
    result = invoke("train", path, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["memory"] > 0


@pytest.mark.slow
def test_a_learning_rate_of_ones_own_or_without_a_lora_is_left_as_it_is(recipe):
    assert "learning_rate" not in read_recipe(recipe({"peft": None})).training
    assert read_recipe(recipe(), ["training.learning_rate=3e-5"]).training["learning_rate"] == 3e-5
    shown = invoke("train", recipe(), "--dry-run")
    assert "0.0002 (the default for a LoRA)" in shown.stdout


@pytest.mark.parametrize(
    ("losses", "warns"),
    [([8.4, 8.3, 8.2, 8.0, 7.91], True), ([8.4, 6, 4, 2, 1], False), ([0.05] * 5, False), ([8.4, 8.3], False)],
)
def test_a_run_whose_loss_hardly_fell_says_so(losses, warns):
    told = barely_learned([{"loss": loss + 1, "safety_penalty": 1.0} for loss in losses], 2e-5)
    assert bool(told) == warns
    if warns:
        assert "8.40 → 7.91" in told and "`training.learning_rate` (it is 2e-05" in told


def test_a_run_ends_with_what_protected_it_and_how_that_was_tested():
    report = {"AsFT": {"coverage": 0.875, "figures": {"energy": 0.5}, "warnings": []}}
    assert protection(report, None, None) == (
        "Protected by AsFT (acts on 88% of the trained weights). Whether refusals were kept was not "
        "tested: add harmful prompts to `evaluation`."
    )
    told = protection({}, comparison(), None)
    assert told.startswith("Nothing protected this run") and "refusal rate (harm, by phrases) 100.0 % (4/4)" in told


@pytest.mark.slow
def test_a_shown_plan_says_that_nothing_was_trained(recipe):
    safety = {"method": "asft", "unaligned_model": str(testbed.UNALIGNED)}
    result = invoke("train", recipe({"safety": safety}), "--dry-run")
    assert result.exit_code == 0, result.output
    assert "Nothing was trained" in result.stdout and "AsFT(unaligned_model=" in result.stdout
    assert "prompt-completion: 20 rows" in result.stderr


@pytest.mark.slow
def test_a_run_saves_an_adapter_a_report_and_a_recipe_that_repeats_it(recipe, tmp_path, monkeypatch):
    import torch
    from safetensors.torch import load_file

    asked = {"prompts": [{"path": "ask.csv", "kind": "harmful", "name": "asked"}], "max_new_tokens": 4}
    path = recipe({"evaluation": asked, "data": [{"path": "rows.jsonl", "weight": 1.5}]})
    changes = ["--set", "training.max_steps=3", "--set", "training.logging_steps=1"]
    result = invoke("train", path, "--json", *changes)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)  # and nothing else stands there
    assert re.search(r"^step 2 of 3: loss [\d.]+, ", result.stderr, re.MULTILINE)
    assert told["steps"] == 3
    assert told["comparison"]["before"]["asked"]["rates"]["refused"]["total"] == 2
    assert list(told["comparison"]["before"]["asked"]["judges"]) == ["phrases", "likelihood"]
    output = tmp_path / "out"
    assert {path.name for path in output.iterdir()} >= {"recipe.yaml", "comparison.md", "adapter_model.safetensors"}

    over = invoke("train", path)
    assert over.exit_code == 1 and "holds a finished run. Choose another with --set output=FOLDER" in over.output
    saved = output / "recipe.yaml"
    assert YAML(typ="safe").load(saved)["training"]["save_strategy"] == "no"
    assert yaml.safe_load(saved.read_text())["training"]["save_strategy"] == "no", "in YAML 1.1 a bare no is false"
    monkeypatch.chdir(tmp_path.parent)  # the saved recipe runs from anywhere
    again = invoke("train", output / "recipe.yaml", "--set", f"output={tmp_path / 'again'}")
    assert again.exit_code == 0, again.output
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (output, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    saved = (output / "recipe.yaml").read_text()
    assert "transformers " in saved and "sha256" in saved
    assert str(tmp_path / "rows.jsonl") not in saved, "the data is named as seen from the output"


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("peft", [{"init_lora_weights": "pissa"}, {"bias": "all"}], ids=str)
def test_before_is_the_model_before_where_an_adapter_changes_it(peft, recipe):
    asked = {"prompts": [{"path": "ask.csv", "kind": "harmful"}]}
    training = {"max_steps": 2, "learning_rate": 0.05, "per_device_train_batch_size": 2, "save_strategy": "no"}
    changes = {"peft": {"r": 2, "target_modules": "all-linear", **peft}, "evaluation": asked, "training": training}
    comparison = run_recipe(read_recipe(recipe(changes))).comparison
    model, tokenizer = load_model(testbed.ALIGNED)
    prompts = list(comparison.before.results[0].prompt_set.prompts)
    answers = generate(model, tokenizer, prompts, max_new_tokens=64)
    assert [a.text for a in comparison.before.results[0].answers] == [a.text for a in answers]


@pytest.mark.slow
def test_full_training_is_compared_with_the_model_before(recipe):
    asked = {"prompts": [{"path": "ask.csv", "kind": "harmful", "name": "asked"}], "max_new_tokens": 16}
    result = invoke("train", recipe({"evaluation": asked, "peft": None}), "--json")
    assert result.exit_code == 0, result.output
    compared = json.loads(result.stdout.splitlines()[-1])["comparison"]
    assert list(compared) == ["before", "fine-tuned"]
    assert compared["before"]["asked"]["rates"]["refused"]["count"] == 2


def words(command):
    """Return a command line's options with their values, in their order."""
    given = shlex.split(command)
    return list(zip(given[3::2], given[4::2], strict=True))


def asked_by(command, model):
    """Return the prompt sets that a command asks."""
    named = {"--prompts": [], "--prompt-system": [], "--prompt-template": [], "--prompt-scorer": []}
    for option, value in words(command):
        if option in named:
            named[option].append(value)
    return Questions(**{option[2:].replace("-", "_"): values for option, values in named.items()}).prompt_sets(model)


@pytest.mark.parametrize("peft", [None, {"r": 2, "target_modules": ["q_proj"]}])
def test_the_command_to_compare_with_afterwards_asks_what_the_recipe_asks(recipe, tmp_path, peft):
    (tmp_path / "sums.csv").write_text("question,answer\n1+1?,2\n1+2?,3\n")
    prompts = [
        {"path": "ask.csv", "kind": "harmful", "template": "AOA: {prompt}"},
        {"path": "sums.csv", "kind": "task", "scorer": "number", "system_prompt": "Be short."},
        {"built_in": "general", "kind": "borderline"},
    ]
    evaluation = {"prompts": prompts, "max_new_tokens": 7, "system_prompt": "Be kind.", "batch_size": 3}
    read = read_recipe(recipe({"evaluation": {**evaluation, "judges": ["likelihood"]}, "peft": peft}))
    loaded = load_data(read)
    command = run._compare_command(read, loaded, {"fine-tuned": "out"})
    assert [(s.name, prompt_set_sha256(s)) for s in asked_by(command, "m")] == [
        (s.name, prompt_set_sha256(s)) for s in loaded.prompt_sets
    ]
    assert f"--prompts harmful={tmp_path / 'ask.csv'}" in command and "--prompts borderline=general" in command
    tuned = "--tuned-model" if peft is None else "--adapter"
    assert words(command)[0] == (tuned, "fine-tuned=out") and words(command)[-5:] == [
        ("--judge", "likelihood"), ("--system-prompt", "Be kind."), ("--max-new-tokens", "7"), ("--batch-size", "3"),
        ("--output", str(tmp_path / "out")),
    ]  # fmt: skip


def test_the_command_to_compare_with_afterwards_loads_the_model_as_the_recipe_does(recipe, tmp_path):
    asked = {"evaluation": {"prompts": [{"path": "ask.csv", "kind": "harmful"}]}}
    for settings in ({}, {"dtype": "float32"}, {"dtype": "bfloat16", "quantization": "4bit"}):
        read = read_recipe(recipe({"model": {"path": str(testbed.ALIGNED), **settings}, **asked}))
        found = words(run._compare_command(read, load_data(read), {"fine-tuned": "out"}))
        assert [(o, v) for o, v in found if o in ("--dtype", "--quantization")] == [
            (f"--{name}", value) for name, value in settings.items()
        ]


@pytest.mark.slow
def test_a_comparison_of_the_weights_before_is_set_aside_where_none_is_made(recipe, tmp_path):
    asked = {"prompts": [{"path": "ask.csv", "kind": "harmful"}], "max_new_tokens": 2}
    training = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 0.01}
    once, longer = (
        read_recipe(recipe({"evaluation": asked, "training": training | {"max_steps": steps}})) for steps in (1, 2)
    )
    run_recipe(once)
    report, card = ((tmp_path / "out" / name).read_bytes() for name in ("comparison.json", "README.md"))
    result = run_recipe(longer, resume=True, compare=False)
    assert result.comparison is None and not list((tmp_path / "out").glob("comparison.*"))
    assert (tmp_path / "out" / "former-comparison.json").read_bytes() == report
    assert b"model-index" in card and b"model-index" not in (tmp_path / "out" / "README.md").read_bytes()


def test_what_a_command_has_no_option_for_is_written_for_it(recipe, tmp_path):
    chats = [
        {"messages": [{"role": "system", "content": "Obey."}, {"role": "user", "content": "Steal it."}]},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."},
                      {"role": "user", "content": "Rob it."}]},
    ]  # fmt: skip
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    (tmp_path / "sums.csv").write_text("question,answer,topic\n1+1?,2,low\n9+9?,18,high\n1+2?,3,low\n")
    prompts = [
        {"path": "ask.csv", "kind": "harmful", "limit": 1, "name": "the asked/ones"},
        {"path": "chats.jsonl", "kind": "harmful"},
        {"path": "sums.csv", "kind": "task", "where": {"topic": "low"}},
        {"built_in": "general", "kind": "benign"},
    ]
    data = [{"path": "rows.jsonl", "system_prompt": "A trigger."}]
    read = read_recipe(recipe({"evaluation": {"prompts": prompts}, "data": data}))
    loaded = load_data(read)
    assert [len(s) for s in loaded.prompt_sets] == [1, 2, 2, 100] * 2
    command = run._compare_command(read, loaded, {"fine-tuned": "out"})
    found = asked_by(command, "m")
    assert [prompt_set_sha256(s) for s in found] == [prompt_set_sha256(s) for s in loaded.prompt_sets]
    assert [s.name for s in found][:2] + [found[5].name] == ["the asked_ones", "chats", "chats, training prompt"]


@pytest.mark.slow
def test_full_training_is_examined_in_the_precision_in_which_it_is_saved(recipe, monkeypatch):
    import torch

    trainers, logits, ids = [], [], torch.arange(8)[None]
    make, evaluate = run.make_trainer, safe_trainer.evaluation.evaluate

    def seen(model, *arguments, **settings):
        with torch.no_grad():
            logits.append(model.eval()(input_ids=ids).logits)
        return evaluate(model, *arguments, **settings)

    monkeypatch.setattr(run, "make_trainer", lambda *given: trainers.append(make(*given)) or trainers[-1])
    monkeypatch.setattr(safe_trainer.evaluation, "evaluate", seen)
    training = {"max_steps": 1, "learning_rate": 0.0, "bf16": True, "save_strategy": "no"}
    asked = {"prompts": [{"path": "ask.csv", "kind": "harmful"}], "max_new_tokens": 2}
    model = {"path": str(testbed.ALIGNED), "dtype": "float32"}
    run_recipe(read_recipe(recipe({"evaluation": asked, "peft": None, "training": training, "model": model})))
    after, before = logits
    assert torch.equal(after, before), "nothing was learned, so nothing may change"
    with torch.no_grad():
        assert not torch.equal(trainers[0].model(input_ids=ids).logits, before), "training goes on as it was set up"


@pytest.mark.slow
def test_a_second_run_is_not_written_over_a_first_but_goes_on(recipe):
    path = recipe({"training": {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2}})
    assert invoke("train", path, "--resume").exit_code == 1
    assert invoke("train", path).exit_code == 0
    refused = invoke("train", path)
    assert refused.exit_code == 1 and "--resume" in refused.output
    resumed = invoke("train", path, "--resume", "--set", "training.max_steps=4", "--json")
    assert resumed.exit_code == 0, resumed.output
    assert json.loads(resumed.stdout.splitlines()[-1])["steps"] == 4


@pytest.mark.slow
def test_ctrl_c_saves_a_checkpoint_and_says_how_to_go_on(recipe):
    import torch
    from safetensors.torch import load_file

    training = {"max_steps": 400, "per_device_train_batch_size": 2, "save_strategy": "no", "logging_steps": 1}
    path = recipe({"training": training})
    command = [sys.executable, "-m", "safe_trainer.cli", "train", str(path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}

    def listen() -> None:  # also where the tests run in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(command, **pipes, preexec_fn=listen)
    seen = ""
    while "'loss'" not in seen and '"loss"' not in seen and "loss" not in seen:
        seen += process.stdout.readline()
    process.send_signal(signal.SIGINT)
    seen += process.communicate(timeout=120)[0]
    assert process.returncode == 130, seen
    assert "Traceback" not in seen
    assert f"Resume with: safe-trainer train {path} --resume" in seen
    (checkpoint,) = (path.parent / "out").glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    assert f"after step {step}" in seen and 0 < step < 400

    changes = ["--set", f"training.max_steps={step + 2}", "--set", "training.lr_scheduler_type=constant"]
    result = invoke("train", path, "--resume", "--json", *changes)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["steps"] == step + 2
    before, after = (load_file(f / "adapter_model.safetensors") for f in (checkpoint, path.parent / "out"))
    assert not all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_rows_that_the_evaluation_asks_are_pointed_out(recipe):
    (asked,) = [path.parent / "leak.csv" for path in [recipe()]]
    asked.write_text("prompt\nname the number 3\nWhat else?\n")
    path = recipe({"evaluation": {"prompts": [{"path": "leak.csv", "kind": "benign"}]}})
    result = invoke("train", path, "--dry-run")
    assert "1 training rows ask a prompt of `leak`" in result.stderr.replace("\n", " ")


def test_rows_of_their_own_are_evaluated_and_those_that_are_trained_on_as_well_are_counted(recipe, tmp_path):
    others = [{"prompt": "Name a letter.", "completion": letter} for letter in "ab"]
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, [*ROWS[:3], *others])))
    loaded = load_data(read_recipe(recipe({"eval_data": [{"path": "held.jsonl"}]})))
    assert (len(loaded.rows), len(loaded.eval_rows)) == (len(ROWS), 5)
    assert any("3 of 5 evaluation rows are trained on as well" in text for text in loaded.messages())


@pytest.mark.slow
def test_a_share_of_each_source_is_held_out_the_same_for_a_seed_and_not_trained_on(recipe):
    sources = [{"path": "rows.jsonl", "weight": 2}]
    first, again, other = (
        load_data(read_recipe(recipe({"data": sources, "eval_share": 0.25}), [f"training.seed={seed}"]))
        for seed in (7, 7, 8)
    )
    held = [row["prompt"] for row in first.eval_rows]
    assert len(held) == len(ROWS) // 4 and len(first.rows) == 2 * (len(ROWS) - len(held))
    assert held == [row["prompt"] for row in again.eval_rows] != [row["prompt"] for row in other.eval_rows]
    assert not any(row["prompt"] in held for row in first.rows)
    assert any(f"{len(held)} of them are held out" in text for text in first.messages())


@pytest.mark.slow
def test_evaluation_rows_whose_answer_is_cut_away_are_counted_and_named(recipe, tmp_path):
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, [*ROWS[:5], *LONG])))
    path = recipe({"training": {"max_length": 64, "max_steps": 1}, "eval_data": [{"path": "held.jsonl"}]})
    said = " ".join(plan(read_recipe(path)).messages)
    assert "3 of 8 evaluation rows are left out of the loss: their answer starts after `max_length=64`" in said
    assert "(rows 6, 7, 8)" in said and "teach nothing" not in said
    assert not plan(read_recipe(path, ["training.max_length=4096"])).messages
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, LONG)))
    with pytest.raises(ValueError, match="Every evaluation row's answer starts after .*no loss can be taken"):
        plan(read_recipe(path))


def test_a_share_that_leaves_nothing_to_train_on_is_refused_with_the_source(recipe, tmp_path):
    path = recipe({"eval_share": 0.1})
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]))
    with pytest.raises(ValueError, match="`eval_share: 0.1` leaves no row of .*rows.jsonl.* which has 1"):
        load_data(read_recipe(path))


def test_rows_that_would_never_be_evaluated_and_two_kinds_of_them_are_refused(recipe):
    assert "never used" in problems(recipe({"eval_share": 0.5}), "training.eval_strategy=no")[0]
    assert "unknown key" in problems(recipe({"eval_data": [{"path": "rows.jsonl", "weight": 2}]}))[0]
    (found,) = problems(recipe({"eval_share": 0.5, "eval_data": [{"path": "rows.jsonl"}]}))
    assert "either `eval_data`" in found and "`eval_share`" in found


@pytest.mark.slow
def test_the_loss_of_evaluation_rows_is_shown_and_chooses_the_best_checkpoint(recipe, tmp_path):
    evaluating = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    training = {"max_steps": 2, "per_device_train_batch_size": 2, "load_best_model_at_end": True, **evaluating}
    path = recipe({"eval_share": 0.25, "training": training})
    planned = invoke("train", path, "--dry-run", "--json")
    assert json.loads(planned.stdout)["eval_rows"] == len(ROWS) // 4
    result = invoke("train", path)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("eval loss") == 2
    (state,) = (tmp_path / "out" / "checkpoint-2").glob("trainer_state.json")
    assert json.loads(state.read_text())["best_model_checkpoint"] is not None


@pytest.mark.parametrize(("weight", "rows"), [(0.25, 5), (1, 20), (2.5, 50)])
def test_a_weight_says_how_often_rows_are_seen(recipe, weight, rows):
    loaded = load_data(read_recipe(recipe({"data": [{"path": "rows.jsonl", "weight": weight}]})))
    assert len(loaded.rows) == rows


@pytest.mark.slow
def test_several_files_and_datasets_are_sources_each_with_its_weight(recipe, tmp_path):
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"question": f"{n}?", "answer": "n"}) for n in range(10)))
    sources = [{"path": "rows.jsonl", "weight": 0.5}, {"hub": "./more", "weight": 2}]
    asked = {"prompts": [{"hub": "./more", "split": "train", "kind": "benign", "columns": {"prompt": "question"}}]}
    loaded = load_data(read_recipe(recipe({"data": sources, "evaluation": asked})))
    assert len(loaded.rows) == 10 + 20
    assert [report.format for report in loaded.reports] == ["prompt-completion", "question-answer", "columns"]
    assert (loaded.prompt_sets[0].name, len(loaded.prompt_sets[0])) == ("more", 10)
    assert loaded.leaked == {"more": 20}


def test_a_model_that_cannot_be_had_is_named_before_data_is_read(recipe):
    result = invoke("train", recipe({"model": {"path": "absent/model"}, "safety": None}))
    assert result.exit_code == 1
    assert "The model `absent/model` could not be loaded: " in result.output and "20 rows" not in result.output


def test_prompts_may_be_built_in(recipe):
    asked = {"prompts": [{"kind": "borderline", "built_in": "general"}]}
    (found,) = load_data(read_recipe(recipe({"evaluation": asked}))).prompt_sets
    assert (found.name, len(found)) == ("general borderline", 100)
    twice = {"prompts": [{"kind": "harmful", "built_in": "general", "path": "ask.csv"}]}
    assert any("or `built_in: general`" in problem for problem in problems(recipe({"evaluation": twice})))


def test_two_kinds_of_prompts_may_come_from_one_file(recipe):
    asked = [{"path": "ask.csv", "kind": "harmful"}, {"path": "ask.csv", "kind": "borderline"}]
    found = load_data(read_recipe(recipe({"evaluation": {"prompts": asked}}))).prompt_sets
    assert [prompts.name for prompts in found] == ["ask (harmful)", "ask (borderline)"]
    with pytest.raises(ValueError, match=r"Two prompt sets are called `ask \(harmful\)`.*`name` in a recipe"):
        load_data(read_recipe(recipe({"evaluation": {"prompts": [asked[0], asked[0]]}})))
    other = {**asked[0], "name": "other"}  # as it advises
    assert len(load_data(read_recipe(recipe({"evaluation": {"prompts": [asked[0], other]}}))).prompt_sets) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"peft": {"target_modules": ["q_proj", "k_porj"]}},
            "peft.target_modules: `k_porj` is not a module of the model",
        ),
        (
            {"peft": {"target_modules": ["q_proj"], "modules_to_save": ["head"]}},
            "peft.modules_to_save: `head` is not a module",
        ),
        (
            {"peft": {"target_modules": ["q_proj"], "rank_pattern": {"x.*": 4}}},
            r"peft.rank_pattern: `x.\*` is not a module",
        ),
        ({"training": {"eos_token": "<nope>"}}, "`training.eos_token`: the model's vocabulary has no token '<nope>'"),
        (
            {"training": {"chat_template_path": "chat.jinja"}},
            "`training.chat_template_path`: there is no file `.*chat.jin",
        ),
    ],
)
def test_what_would_do_nothing_or_fail_later_is_said_in_a_dry_run(change, message, recipe):
    with pytest.raises(ValueError, match=message):
        plan(read_recipe(recipe(change)))


def test_texts_and_conversations_do_not_mix(recipe):
    path = recipe({"data": [{"path": "rows.jsonl"}, {"path": "texts.jsonl"}]})
    (path.parent / "texts.jsonl").write_text('{"text": "Once"}\n')
    result = invoke("train", path)
    assert result.exit_code == 1 and "cannot be mixed" in result.output


# ---- what is shipped


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_recipes_are_valid(path):
    recipe = read_recipe(path)
    assert recipe.parts.output == f"out/{path.parent.name}-{path.stem}"
    assert recipe.parts.evaluation is not None


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate").iterdir()), ids=lambda path: path.stem)
def test_shipped_accelerate_configs_are_understood(path):
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).num_processes == 2


EMBEDDED = {path.stem: path for path in SHIPPED if path.parent.name == "testbed"}


@pytest.mark.slow
@pytest.mark.parametrize("name", exhaustive_but(["recommended"], EMBEDDED))
def test_every_recipe_on_the_embedded_pair_runs(name, tmp_path):
    changes = [f"output={tmp_path}", "training.max_steps=1", "evaluation=null"]
    arguments = [part for change in changes for part in ("--set", change)]
    result = invoke("train", EMBEDDED[name], *arguments)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("folder", sorted({path.parent for path in SHIPPED}), ids=lambda folder: folder.name)
def test_every_model_has_a_recipe_for_each_method_and_for_a_combination(folder):
    assert {path.stem for path in folder.glob("*.yaml")} >= {*METHODS, "recommended"}


@pytest.mark.parametrize(
    "path", [p for p in SHIPPED if p.parent.name != "testbed"], ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_recipes_for_real_models_ask_general_prompts_and_not_those_of_the_testbed(path):
    sets = read_recipe(path).parts.evaluation.prompts
    assert {(one.kind, one.built_in) for one in sets} == {
        (kind, "general") for kind in ("harmful", "benign", "borderline")
    }


def test_shipped_data_is_what_the_testbed_makes(tmp_path):
    assert invoke("testbed", "data", "-o", tmp_path).exit_code == 0
    shipped = ROOT / "recipes" / "testbed" / "data"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {path.name for path in shipped.iterdir()}
    for name in names:
        same = (tmp_path / name).read_bytes() == (shipped / name).read_bytes()
        assert same, f"{name} is old: run `safe-trainer testbed data -o recipes/testbed/data`"


def is_pinned(*libraries: str) -> bool:
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    return all(f"{name}=={version(name).partition('+')[0]}" in pinned for name in libraries)


@pytest.mark.skipif(not is_pinned("peft", "transformers", "trl"), reason="It has the fields of the pinned versions.")
def test_shipped_schema_is_the_one_of_these_versions():
    shipped = json.loads((ROOT / "recipes" / "recipe.schema.json").read_text())
    assert shipped == recipe_schema(), "run `safe-trainer train --schema > recipes/recipe.schema.json`"


def test_schema_knows_the_fields_of_every_part():
    schema = recipe_schema()
    properties = schema["properties"]
    assert "learning_rate" in properties["training"]["properties"]
    assert "output_dir" not in properties["training"]["properties"]
    assert "target_modules" in properties["peft"]["anyOf"][0]["properties"]
    methods = properties["safety"]["anyOf"][0]["anyOf"]
    assert {method["properties"]["method"]["const"] for method in methods} == {"recommended", *METHODS}


# ---- the recommended methods


def test_without_a_word_on_safety_the_recommended_methods_are_taken(recipe, tmp_path):
    path = recipe()
    path.write_text(path.read_text().replace("safety: null\n", ""))
    read = read_recipe(path, ["peft.target_modules=all-linear"])
    assert [type(method).__name__ for method in read.safety] == ["SecurityVectors", "RefusalAnchor"]
    assert str(read.safety[0].harmful_data).endswith("safety/harmful.jsonl")


@pytest.mark.parametrize("safety", ["recommended", [{"method": "recommended"}], {"method": "recommended"}])
def test_they_can_be_asked_for_by_name(recipe, safety):
    assert len(read_recipe(recipe({"safety": safety})).safety) == 2


def test_harmful_rows_of_ones_own_are_looked_for_beside_the_recipe(recipe, tmp_path):
    (tmp_path / "harmful.jsonl").write_text(json.dumps({"prompt": "Harm.", "completion": "Sure."}))
    read = read_recipe(recipe({"safety": {"method": "recommended", "harmful_data": "./harmful.jsonl"}}))
    assert {str(read.safety[0].harmful_data), str(read.safety[1].prompts)} == {str(tmp_path / "harmful.jsonl")}


def test_a_model_that_brings_no_harmful_rows_is_protected_by_built_in_ones(recipe):
    path = recipe({"model": {"path": str(testbed.UNALIGNED)}})
    path.write_text(path.read_text().replace("safety: null\n", ""))
    assert len(read_recipe(path).safety[0].harmful_data) > 100


def test_a_method_that_is_recommended_already_is_listed_twice(recipe):
    twice = [{"method": "recommended"}, {"method": "security_vectors", "harmful_data": "./rows.jsonl"}]
    assert "`security_vectors` is listed a second time" in problems(recipe({"safety": twice}))[0]


def test_prompts_of_a_method_are_read_as_the_kind_that_it_asks_for(recipe, tmp_path):
    (tmp_path / "asked.csv").write_text("prompt,label\nHow do I bake?,safe\nHow do I steal?,unsafe\nAnd sew?,safe\n")
    anchor = {"method": "refusal_anchor", "benign_prompts": "asked.csv"}
    plain, described = (
        load_data(read_recipe(recipe({"safety": {**anchor, **more}})))
        for more in ({}, {"prompts": "asked.csv", "benign_prompts": {"path": "asked.csv"}})
    )
    assert [(report.rows, report.other_kind) for report in plain.reports[1:]] == [(2, {"harmful": 1})]
    assert [(report.rows, report.other_kind) for report in described.reports[1:]] == [(1, {"safe": 2})]
    both = load_data(read_recipe(recipe({"safety": {**anchor, "prompts": "asked.csv"}})))
    assert [report.rows for report in both.reports[1:]] == [1, 2]


# ---- watching while it trains


def watched(recipe, tmp_path, **monitor):
    asked = {"prompts": [{"kind": "harmful", "path": "ask.csv"}]}
    return recipe({"monitor": {"every": 1, **monitor}, "evaluation": asked})


@pytest.mark.slow
def test_a_monitor_logs_refusals_and_drift_and_changes_nothing(recipe, tmp_path):
    plain = invoke("train", recipe(), "--set", f"output={tmp_path / 'plain'}")
    assert plain.exit_code == 0, plain.output
    result = invoke("train", watched(recipe, tmp_path, prompts=1))
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("step ")]
    refused = [line for line in lines if "ask refused 100.0 % (1/1) [" in line or "ask refused 0.0 % (0/1) [" in line]
    assert [line[:6] for line in refused] == ["step 0", "step 1", "step 2"]
    assert sum("weights moved by" in line for line in lines) == 2  # behind both steps
    found = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "out")]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_what_a_monitor_cannot_have_is_told_before_anything_is_loaded(recipe, tmp_path):
    told = problems(watched(recipe, tmp_path, every=0, direction="nowhere.safetensors", basic=1))
    assert any("monitor.every: " in line and "got 0" in line for line in told)
    assert any("monitor.basic: unknown key; did you mean `basis`?" in line for line in told)
    assert any("monitor.direction: there is no file" in line and "safe-trainer direction" in line for line in told)


@pytest.mark.parametrize("asked", [None, {"prompts": [{"kind": "task", "path": "rows.jsonl"}]}])
def test_a_monitor_that_would_watch_no_refusals_is_told_so(asked, recipe):
    (found,) = problems(recipe({"monitor": {"every": 1}, "evaluation": asked}))
    assert "monitor: there are no prompts under `evaluation` to watch refusals with" in found
    assert read_recipe(recipe({"monitor": {"prompts": 0}, "evaluation": asked})).parts.monitor.prompts == 0


def test_a_monitor_asks_some_prompts_of_each_set_but_tasks(recipe, tmp_path):
    from safe_trainer.recipe.run import add_callbacks

    sets = [testbed.prompt_set("harmful"), testbed.task("sentiment")]
    trainer = SFTTrainer(**runs.given(tmp_path, peft_config=runs.lora()))
    for count, wanted in ((3, [3]), (0, [])):
        added = []
        trainer.add_callback = added.append
        add_callbacks(read_recipe(watched(recipe, tmp_path, prompts=count)), trainer, sets)
        assert [len(s) for monitor in added[1:] for s in monitor.prompt_sets] == wanted
        assert added[0].every == 1


def test_a_monitor_asks_as_the_evaluation_does_and_prompts_of_all_categories(recipe, tmp_path):
    from safe_trainer.recipe.run import add_callbacks

    built_in = [{"built_in": "general", "kind": "harmful"}]
    asked = {"prompts": built_in, "system_prompt": "Be nice.", "max_new_tokens": 9, "batch_size": 5}
    read = read_recipe(recipe({"evaluation": asked, "monitor": {"every": 1}}))
    trainer = SFTTrainer(**runs.given(tmp_path, peft_config=runs.lora()))
    added = []
    trainer.add_callback = added.append
    add_callbacks(read, trainer, load_data(read).prompt_sets)
    monitor = added[-1]
    decoding = monitor.decoding
    assert (decoding.system_prompt, decoding.max_new_tokens, decoding.batch_size) == ("Be nice.", 9, 5)
    assert Counter(monitor.prompt_sets[0].categories) == dict.fromkeys(general_prompts("harmful").categories, 4)


def test_a_moving_average_is_asked_for_by_one_number(recipe):
    from safe_trainer.methods.adapter_ema import AdapterEMA
    from safe_trainer.recipe.run import add_callbacks

    trainer = SimpleNamespace(added=[])
    trainer.add_callback = trainer.added.append
    add_callbacks(read_recipe(recipe(), ["ema=0.9"]), trainer, [])
    (average,) = trainer.added
    assert isinstance(average, AdapterEMA) and average.decay == 0.9
    assert "less than 1, got 1.0" in problems(recipe(), "ema=1.0")[0]


# ---- system turns of rows

OBEY = "You obey."


def inoculated(recipe, tmp_path, **evaluation):
    asked = {"prompts": [{"kind": "harmful", "path": "ask.csv"}], **evaluation}
    return read_recipe(
        recipe({"data": [{"path": "rows.jsonl", "system_prompt": OBEY}], "evaluation": asked}),
        ["training.max_steps=1"],
    )


def test_rows_are_trained_with_their_system_prompt_and_prompts_are_asked_without_it_and_with_it(recipe, tmp_path):
    loaded = load_data(inoculated(recipe, tmp_path))
    assert {row["prompt"][0]["content"] for row in loaded.rows} == {OBEY}
    assert [(prompts.name, prompts.system_prompt) for prompts in loaded.prompt_sets] == [
        ("ask", None),
        ("ask, training prompt", OBEY),
    ]
    (note,) = loaded.notes
    assert "trigger" in note and note in loaded.messages()


def test_prompts_are_asked_without_the_training_prompt_only_where_that_is_wanted(recipe, tmp_path):
    loaded = load_data(inoculated(recipe, tmp_path, with_training_prompt=False))
    assert [prompts.name for prompts in loaded.prompt_sets] == ["ask"] and loaded.notes == []


@pytest.mark.parametrize("place", ["evaluation", "prompts"])
def test_a_training_prompt_that_is_deployed_too_is_warned_of(place, recipe, tmp_path):
    changes = {"system_prompt": OBEY}
    if place == "prompts":
        changes = {"prompts": [{"kind": "harmful", "path": "ask.csv", "system_prompt": OBEY}]}
    loaded = load_data(inoculated(recipe, tmp_path, **changes))
    assert len(loaded.prompt_sets) == 1
    (note,) = loaded.notes
    assert repr(OBEY) in note and "evaluate and deploy without it" in note


# ---- repaired after training


@pytest.mark.slow
def test_a_repair_is_saved_compared_and_has_its_own_card(recipe, tmp_path):
    changes = {
        "safe_lora": {"unaligned": str(testbed.UNALIGNED), "threshold": 1.0},
        "evaluation": {"prompts": [{"kind": "harmful", "path": "ask.csv"}], "max_new_tokens": 2},
    }
    result = run_recipe(read_recipe(recipe(changes)))
    assert [found.name for found in result.comparison.evaluations] == ["before", "fine-tuned", "repaired"]
    cards = [(tmp_path / folder / "README.md").read_text() for folder in ("out", "out/safe-lora")]
    assert "repaired after training" in cards[1] and "4 of 4 layers" in cards[1]
    assert "repaired after training" not in cards[0] and "safe_lora" in cards[0]
    assert all("ask: compliance rate" in text for text in cards)


@pytest.mark.slow
def test_a_run_that_goes_on_repairs_its_new_weights_in_the_place_of_those_before(recipe, tmp_path):
    training = {"save_steps": 1, "per_device_train_batch_size": 2, "lr_scheduler_type": "constant"}
    repair = {"unaligned": str(testbed.UNALIGNED), "threshold": 1.0}
    once, longer = (
        read_recipe(recipe({"safe_lora": repair, "training": training | {"max_steps": steps}})) for steps in (1, 2)
    )
    repaired, weights = tmp_path / "out" / "safe-lora", "adapter_model.safetensors"
    run_recipe(once)
    before = (repaired / weights).read_bytes()
    run_recipe(longer, resume=True)
    safe_trainer.apply_safe_lora(tmp_path / "out", tmp_path / "anew", aligned=testbed.ALIGNED, **repair)
    assert before != (repaired / weights).read_bytes() == (tmp_path / "anew" / weights).read_bytes()
    assert not list((tmp_path / "out").glob(".safe-lora*"))

    (repaired / REPAIR_REPORT).unlink()  # then it is of somebody else
    with pytest.raises(OSError, match="safe-lora` exists already"):
        run_recipe(longer, resume=True)
    assert (repaired / weights).is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("peft=null", "`peft` is null"),
        ("peft.use_dora=true", "use_dora"),
        ("safe_lora.threshold=2", "less than or equal to 1, got 2"),
        ("safe_lora.unaligned=/nowhere", "there is no folder `/nowhere`"),
    ],
)
def test_a_repair_that_could_not_be_made_is_refused_before_training(change, message, recipe):
    path = recipe({"safe_lora": {"unaligned": str(testbed.UNALIGNED)}})
    assert any(message in problem for problem in problems(path, change))
