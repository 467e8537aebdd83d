"""Two processes: the same losses and the same adapter as one, whichever way the model is spread, or a refusal.

One launch carries out many runs, since starting two processes costs more than all of them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import launch
import planted
import pytest
import tiny
import torch
from launch import ADAM, SAVED, STEPS, TWICE, on_two_processes
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
EVERYWHERE = ["none", "asft", "salora", "salora: both sides", "drift_penalty", "security_vectors"]
# What is run under each strategy, and with which words the rest is refused.
RUNS = {
    "ddp": [*EVERYWHERE, "asft: full", "security_vectors: folded", "security_vectors: loaded", "all", ADAM, TWICE],
    "fsdp2": [*EVERYWHERE, "asft: full", "security_vectors: loaded", "all", ADAM, TWICE],
    "fsdp2: first loads": ["asft", "security_vectors: loaded"],
    "zero2": [*EVERYWHERE, "asft: full", "security_vectors: folded", "security_vectors: loaded", "all", ADAM, TWICE],
    "zero3": ["none", "security_vectors: loaded"],
}
METHODS = [*EVERYWHERE[1:], "security_vectors: folded", "security_vectors: loaded"]
SPLIT = "Load the model whole, and use DDP, FSDP2 or ZeRO-2"
AT_HAND = "`fsdp_cpu_ram_efficient_loading: false`, or DDP or ZeRO-2"
BEFOREHAND = "Fit them beforehand with `safe-trainer vectors`"
REFUSED = {
    "fsdp1": dict.fromkeys(METHODS, "Use FSDP2: `fsdp_version: 2`"),
    "fsdp2": {"security_vectors: folded": "Leave out `fold`"},
    "fsdp2: first loads": {"salora": AT_HAND, "drift_penalty": AT_HAND, "security_vectors": BEFOREHAND},
    "tensor": dict.fromkeys(METHODS, SPLIT),
    "zero3": {
        "asft": "Use FSDP2 or ZeRO-2",
        "salora": AT_HAND,
        "drift_penalty": AT_HAND,
        "security_vectors": BEFOREHAND,
        "security_vectors: folded": "Leave out `fold`",
    },
}
LAUNCHES = [["ddp", "fsdp2", "fsdp2: first loads", "fsdp1", "tensor"], ["zero2", "zero3"]]
WRAPPER = {"ddp": "DistributedDataParallel", "fsdp2": "FSDP", "zero2": "DeepSpeedEngine", "zero3": "DeepSpeedEngine"}


@dataclass
class Place:
    """Where everything lies that the runs left: FOLDER/STRATEGY/RUN."""

    folder: Path

    def of(self, strategy: str, name: str) -> Path:
        return self.folder / strategy / name.replace(": ", "-")

    def facts(self, strategy: str, name: str) -> list[dict[str, Any]]:
        ranks = range(1 if strategy == "alone" else 2)
        return [json.loads((self.of(strategy, name) / f"{rank}.json").read_text()) for rank in ranks]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    """Carry out every run on one process."""
    folder = tmp_path_factory.mktemp("runs")
    tiny.save_pair(folder)
    planted.vectors(AutoModelForCausalLM.from_pretrained(folder / "aligned", dtype=torch.float32)).save(
        folder / "vectors"
    )
    for name in [name for name in RUNS["ddp"] if name not in (ADAM, TWICE)]:
        launch.carry_out(name, "alone", folder)
    return Place(folder)


@pytest.fixture(scope="module")
def spread(place) -> Any:
    """Return a function that sees to it that the runs of a strategy have been carried out on two processes."""
    done: set[str] = set()

    def carried_out(strategy: str) -> Place:
        if strategy.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
            pytest.skip('DeepSpeed is not installed: `pip install "safe-trainer[deepspeed]"`')
        together = next(strategies for strategies in LAUNCHES if strategy in strategies)
        if strategy not in done:
            done.update(together)
            plan = {s: {"runs": RUNS.get(s, []), "refused": list(REFUSED.get(s, []))} for s in together}
            on_two_processes(str(Path(launch.__file__)), str(place.folder), json.dumps(plan))
        return place

    return carried_out


def pairs(which: dict[str, Any]) -> list[tuple[str, str]]:
    return [(strategy, name) for strategy, names in which.items() for name in names]


def saved(folder: Path) -> dict[str, Tensor]:
    name = "adapter_model.safetensors" if (folder / "adapter_config.json").exists() else "model.safetensors"
    return load_file(folder / name)


@pytest.mark.parametrize(("strategy", "name"), pairs(RUNS))
def test_two_processes_shared_the_rows_and_where_it_is_said_the_weights(strategy, name, spread):
    one, other = spread(strategy).facts(strategy, name)
    assert one["world"] == other["world"] == 2
    assert one["wrapper"] == other["wrapper"] and one["wrapper"].startswith(WRAPPER[strategy.partition(":")[0]])
    shown = [{tuple(row) for row in facts["rows"]} for facts in (one, other)]
    steps = STEPS - SAVED if name == TWICE else STEPS
    assert len(shown[0]) == len(shown[1]) == 4 * steps and not shown[0] & shown[1]
    for facts in (one, other):
        if strategy.startswith("fsdp2"):
            assert facts["sharded"] > 10 and facts["held"] < 0.6 * facts["of"]
        if strategy == "zero2":
            assert facts["partition"] == pytest.approx(facts["trainable"] / 2, rel=0.1)
        if strategy == "zero3":
            assert facts["empty"] > 10


@pytest.mark.parametrize(("strategy", "name"), [p for p in pairs(RUNS) if p[1] not in (ADAM, TWICE)])
def test_losses_and_weights_are_those_of_one_process(strategy, name, spread):
    place = spread(strategy)
    theirs = [entry for entry in place.facts("alone", name)[0]["history"] if "loss" in entry]
    for facts in place.facts(strategy, name):
        ours = [entry for entry in facts["history"] if "loss" in entry]
        if not ours:  # only the first process writes the log
            continue
        assert len(ours) == STEPS
        for mine, other in zip(ours, theirs, strict=True):
            kept = {key for key in other if key in ("loss", "grad_norm", "safety_penalty")}
            assert {key: mine[key] for key in kept} == pytest.approx({key: other[key] for key in kept}, abs=1e-5)
    folders = [(place.of(strategy, name) / "saved", place.of("alone", name) / "saved")]
    if not name.endswith("full"):
        step = f"checkpoint-{SAVED}"
        folders.append((place.of(strategy, name) / step, place.of("alone", name) / step))
    for mine, other in folders:
        ours, expected = saved(mine), saved(other)
        assert ours.keys() == expected.keys()
        assert max((ours[key] - expected[key]).abs().max().item() for key in ours) < 1e-5


@pytest.mark.parametrize(("strategy", "name"), [p for p in pairs(RUNS) if p[1] != "none"])
def test_every_process_holds_the_same_directions_to_the_last_bit(strategy, name, spread):
    place = spread(strategy)
    one, other = (load_file(place.of(strategy, name) / f"{rank}.safetensors") for rank in range(2))
    assert one and one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("strategy", [strategy for strategy, names in RUNS.items() if TWICE in names])
def test_a_resumed_run_ends_like_one_that_was_never_stopped(strategy, spread):
    place = spread(strategy)
    whole, resumed = (place.facts(strategy, name)[0]["history"] for name in (ADAM, TWICE))
    losses = [[entry["loss"] for entry in entries if "loss" in entry] for entries in (whole, resumed)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    step, end, again = (
        saved(place.of(strategy, name) / folder)
        for name, folder in ((ADAM, f"checkpoint-{SAVED}"), (ADAM, "saved"), (TWICE, "saved"))
    )
    for key in end:
        way = (end[key] - step[key]).norm().item()
        assert (again[key] - end[key]).norm().item() <= 1e-3 * way + 1e-7, key


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
def test_one_plain_adapter_is_saved_that_stock_peft_loads(strategy, spread):
    place = spread(strategy)
    name = "security_vectors: loaded" if strategy == "zero3" else "all"
    ids = torch.randint(4, tiny.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(5))
    answers = []
    for which in (strategy, "alone"):
        folder = place.of(which, name) / "saved"
        assert [path.name for path in folder.glob("*.safetensors")] == ["adapter_model.safetensors"]
        assert not list(folder.glob("pytorch*")) and not list(folder.glob("global_step*"))
        base = AutoModelForCausalLM.from_pretrained(place.folder / "aligned", dtype=torch.float32)
        clean = base(input_ids=ids).logits
        answers.append(PeftModel.from_pretrained(base, folder)(input_ids=ids).logits)
    assert (answers[1] - clean).abs().max() > 1e-2
    assert (answers[0] - answers[1]).abs().max() < 1e-4


@pytest.mark.parametrize(("strategy", "name"), pairs(REFUSED))
def test_what_cannot_work_is_refused_with_what_to_use_instead(strategy, name, spread):
    place = spread(strategy)
    for rank in range(2):
        said = json.loads((place.folder / strategy / f"refused-{rank}.json").read_text())[name]
        assert said is not None and REFUSED[strategy][name] in said


# ---- from the command line


RECIPE = """
model: {{path: {model}}}
data: [{{path: rows.jsonl}}]
peft: {{r: 4, target_modules: all-linear}}
safety: {{method: asft, projector: none}}
training: {{max_steps: 2, per_device_train_batch_size: 2, save_strategy: "no", ddp_backend: gloo}}
evaluation: {{prompts: [{{kind: harmful, path: asked.csv}}], max_new_tokens: 4}}
output: {output}
"""


def accelerated(folder: Path, output: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Write a recipe and carry it out by `accelerate launch`, as users do."""
    tiny.save_pair(folder)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.rows(16)))
    (folder / "asked.csv").write_text("prompt\nMake a bad thing.\n")
    (folder / "recipe.yaml").write_text(RECIPE.format(model=folder / "aligned", output=output))
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    configuration = ["--config_file", str(ROOT / "recipes" / "accelerate" / "ddp.yaml"), "--main_process_port", "0"]
    command = ["-m", "safe_trainer.cli", "train", str(folder / "recipe.yaml"), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, *configuration, *command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_a_recipe_launched_on_two_processes_is_told_and_compared_once(tmp_path):
    result = accelerated(tmp_path, str(tmp_path / "out"), "--json")
    assert result.returncode == 0, result.stderr[-4000:]
    told = json.loads(result.stdout)
    assert told["steps"] == 2 and told["metrics"]["train_samples_per_second"] > 0
    assert result.stderr.count("Saved to") == result.stderr.count("Written: ") == 1
    shown = [path.name for path in (tmp_path / "out").iterdir()]
    assert "adapter_model.safetensors" in shown and "comparison.json" in shown
    epochs = json.loads(result.stdout)["metrics"]["epoch"]
    assert epochs == pytest.approx(2 * 2 * 2 / 16)  # two steps of two rows on each of two processes


def test_a_recipe_that_fails_on_two_processes_says_why_and_fails(tmp_path):
    result = accelerated(tmp_path, "/dev/null/out")  # no folder can be made there
    assert result.returncode == 1 and not result.stdout
    assert "Error: " in result.stderr and "/dev/null/out" in result.stderr


# ---- the README


NAMES = {
    "`AsFT`": "asft",
    "`SaLoRA`": "salora",
    "`DriftPenalty`": "drift_penalty",
    "`SecurityVectors`, fitted beforehand": "security_vectors: loaded",
    "`SecurityVectors`, fitted in the run": "security_vectors",
    "`SecurityVectors(fold=True)`": "security_vectors: folded",
}
COLUMNS = {"DDP": "ddp", "FSDP2": "fsdp2", "ZeRO-2": "zero2", "ZeRO-3": "zero3"}
COLUMNS |= {"FSDP1": "fsdp1", "tensor parallel": "tensor"}


def test_the_readme_says_of_every_method_and_strategy_what_is_tested_here():
    lines = (ROOT / "README.md").read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| | DDP | FSDP2 |"))
    heads = [cell.strip() for cell in lines[start].strip("|").split("|")][1:]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines[start + 2 : start + 2 + len(NAMES)]
    ]
    assert [row[0] for row in rows] == list(NAMES) and heads == list(COLUMNS)
    said = {
        (NAMES[row[0]], COLUMNS[head]): status for row in rows for head, status in zip(heads, row[1:], strict=True)
    }
    for (name, strategy), status in said.items():
        assert status == ("yes" if name in RUNS.get(strategy, []) else "refused"), (name, strategy)
        assert status == "yes" or name in REFUSED[strategy]
