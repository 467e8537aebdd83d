"""Every command that prints JSON: a rate never stands alone in it, its count and interval are next to it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from inspect import signature
from types import SimpleNamespace
from typing import Any

import pytest
from commands import invoke

from safe_trainer import PromptSet, testbed, write_report
from safe_trainer.cli import app
from safe_trainer.evaluation import Answer, Comparison, Evaluation, SetResult

ALIGNED, UNALIGNED = str(testbed.ALIGNED), str(testbed.UNALIGNED)
# What has to stand next to a number that is a rate, or comes from rates.
COUNTED = {
    "rate": {"count", "total", "low", "high"},
    "low": set(),  # always with one of the others
    "high": set(),
    "mean": {"count", "low", "high"},
    "difference": {"before", "after", "low", "high", "p_value"},
    "p_value": {"before", "after"},
    "kappa": {"agreed"},
    "average_precision": {"precision", "recall", "scored"},
    "below_target": {"rows_below_target"},  # of `harmful_rows`
    "mean_token_accuracy": {"num_tokens"},  # TRL's
}
# What is no rate: losses, norms, settings, durations, and shares of a row's loss or of a tensor, computed exactly.
NO_RATES = {
    "after", "before", "cosine", "drop", "entropy", "epoch", "error_bound", "inner_learning_rate", "kept",
    "largest_error_bound", "learning_rate", "loss", "loss_off", "loss_on", "loss_with_vectors", "max_error", "norm",
    "num_tokens", "relative", "relative_target", "retain_weight", "safety_penalty", "seconds", "share", "similarity",
    "size", "target_loss", "threshold", "total_flos", "train_loss", "train_runtime", "train_samples_per_second",
    "train_steps_per_second",
}  # fmt: skip


def numbers(value: Any, name: str = "", beside: frozenset[str] = frozenset()) -> Iterator[tuple[str, frozenset[str]]]:
    """Yield each number that is not whole, by its name, with the names that stand next to it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key != "values":  # of a model's weights, to know it again
                yield from numbers(inner, key, frozenset(value))
    elif isinstance(value, list):
        for inner in value:
            yield from numbers(inner, name, beside)
    elif isinstance(value, float):
        yield name, beside


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter of random weights on the embedded model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(AutoModelForCausalLM.from_pretrained(ALIGNED), config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with prompts, rows with labels, security vectors and a recipe."""
    from safe_trainer import train_security_vectors

    folder = tmp_path_factory.mktemp("files")
    asked = testbed.prompt_set("harmful").prompts[:3]
    labelled = [{**row, "bad": False} for row in testbed.task_rows("sentiment", 6)]
    labelled += [{**row, "bad": True} for row in testbed.harmful_rows(3, seed=1)]
    written = {
        "asked.jsonl": [{"prompt": prompt} for prompt in asked],
        "rows.jsonl": labelled,
        "harmful.jsonl": testbed.harmful_rows(8),
        "refusals.jsonl": testbed.refusal_rows(8),
        "fine.jsonl": [{"prompt": prompt} for prompt in testbed.prompt_set("benign").prompts[:3]],
    }
    for name, rows in written.items():
        (folder / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    recipe = {
        "model": {"path": ALIGNED},
        "data": [{"path": "rows.jsonl"}],
        "peft": {"r": 2, "target_modules": ["q_proj"]},
        "training": {"max_steps": 1, "max_length": 24, "report_to": "none"},
        "evaluation": {"prompts": [{"path": "asked.jsonl", "kind": "harmful"}], "max_new_tokens": 4},
        "output": "out",
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    train_security_vectors(ALIGNED, testbed.harmful_rows(8), max_passes=1, rank=2).save(folder / "vectors")
    write_report(comparison(), folder / "report")
    return folder


def comparison():
    """Two models on one set, by two judges that disagree on one answer."""
    asked = PromptSet("harm", "harmful", ("a?", "b?", "c?"))
    answers = (Answer("No."), Answer("Sure, do it."), Answer("Hm."))
    verdicts = {"one": ("refused", "complied", "refused"), "other": ("refused", "complied", "complied")}
    results = (SetResult(asked, answers, verdicts, scores={"other": (0.0, 0.5, 0.5)}),)
    return Comparison((Evaluation("before", results), Evaluation("after", results)))


COMMANDS = {
    "direction": "{aligned} {unaligned} -o {new} --modules q_proj --rank 2",
    "basis": "{aligned} {files}/refusals.jsonl -o {new} --rank 2 --side output",
    "vectors": "{aligned} {files}/harmful.jsonl -o {new} --rank 2 --max-passes 1 --prompts {files}/asked.jsonl",
    "scan": "{aligned} {files}/rows.jsonl --vectors {files}/vectors --label bad",
    "drift": "{aligned} {adapter} --refusal --prompts harmful={files}/asked.jsonl --prompts benign={files}/fine.jsonl",
    "evaluate": "{aligned} --prompts harmful={files}/asked.jsonl --max-new-tokens 4",
    "compare": "{aligned} --adapter {adapter} --prompts harmful={files}/asked.jsonl --max-new-tokens 4",
    "review": "{files}/report",
    "train": "{files}/recipe.yaml --set output={new}",
    "train --dry-run": "{files}/recipe.yaml",
    "demo": "-o {new}",
    "export": "{adapter} -o {new} --compact",
    "apply-safe-lora": "{adapter} -o {new} --unaligned {unaligned}",
    "card": "{adapter}",
}


def test_every_command_with_json_is_looked_at():
    named = {command.name: command.callback for command in app.registered_commands}
    with_json = {name for name, callback in named.items() if "as_json" in signature(callback).parameters}
    assert with_json == {command.split()[0] for command in COMMANDS}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_rate_in_json_has_its_count_and_interval(command, adapter, files, tmp_path, monkeypatch):
    monkeypatch.setattr("typer.getchar", lambda: "r")
    outcome = SimpleNamespace(scenario=SimpleNamespace(name="planted"), comparisons=[comparison()])
    monkeypatch.setattr("safe_trainer.testbed.demo.run_demo", lambda *_, **__: [outcome])
    filled = COMMANDS[command].format(
        aligned=ALIGNED, unaligned=UNALIGNED, adapter=adapter, files=files, new=tmp_path / "new"
    )
    result = invoke(*command.split(), *filled.split(), "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout.splitlines()[-1])
    for name, beside in numbers(told):
        exact = name == "rate" and command == "train --dry-run"  # of tokens: counted, not sampled
        missing = (COUNTED[name] - ({"low", "high"} if exact else set()) if name in COUNTED else set()) - beside
        assert name in COUNTED or name in NO_RATES, f"`{name}` is new: is it a rate?"
        assert not missing, f"`{name}` stands without {missing}"
