"""Two processes: the same losses and the same adapter as one, whichever way the model is spread, or a refusal.

One launch carries out many runs, since starting two processes costs more than all of them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
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

from safe_trainer.checkpoints import last_checkpoint

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
TOGETHER = ["all", "recommended"]
EVERYWHERE = ["none", "asft", "salora", "salora: both sides", "drift_penalty", "security_vectors"]
# What is run under each strategy, and with which words the rest is refused.
RUNS = {
    "ddp": [*EVERYWHERE, "asft: full", "security_vectors: folded", "security_vectors: loaded", *TOGETHER, ADAM, TWICE],
    "fsdp2": [*EVERYWHERE, "asft: full", "security_vectors: loaded", *TOGETHER, ADAM, TWICE],
    "fsdp2: first loads": ["asft", "security_vectors: loaded"],
    "zero2": [
        *EVERYWHERE,
        "asft: full",
        "security_vectors: folded",
        "security_vectors: loaded",
        *TOGETHER,
        ADAM,
        TWICE,
    ],
    "zero3": ["none", "security_vectors: loaded", ADAM, TWICE],
}
METHODS = [*EVERYWHERE[1:], "security_vectors: folded", "security_vectors: loaded"]
SPLIT = "Load the model whole, and use DDP, FSDP2 or ZeRO-2"
AT_HAND = "`fsdp_cpu_ram_efficient_loading: false`, or DDP or ZeRO-2"
BEFOREHAND = "Fit them beforehand with `safe-trainer vectors`"
REFUSED = {
    "fsdp1": dict.fromkeys(METHODS, "Use FSDP2: `fsdp_version: 2`"),
    "fsdp2": {"security_vectors: folded": "Leave out `fold`"},
    "fsdp2: first loads": {"salora": AT_HAND, "drift_penalty": AT_HAND, "security_vectors": BEFOREHAND},
    "fsdp2: in pieces": dict.fromkeys(METHODS, "Set `fsdp_state_dict_type: FULL_STATE_DICT`"),
    "tensor": dict.fromkeys(METHODS, SPLIT),
    "zero3": {
        "asft": "Use FSDP2 or ZeRO-2",
        "salora": AT_HAND,
        "drift_penalty": AT_HAND,
        "security_vectors": BEFOREHAND,
        "security_vectors: folded": "Leave out `fold`",
    },
}
LAUNCHES = [["ddp", "fsdp2", "fsdp2: first loads", "fsdp2: in pieces", "fsdp1", "tensor"], ["zero2", "zero3"]]
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


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2"])
@pytest.mark.parametrize("name", ["salora", "salora: both sides", "drift_penalty", "security_vectors", "recommended"])
def test_what_methods_need_is_computed_on_the_first_process_only(strategy, name, spread):
    one, other = spread(strategy).facts(strategy, name)
    assert one["prepared with"] > 0 and other["prepared with"] == 0


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


@contextmanager
def started(folder: Path, output: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Write a recipe and begin to carry it out by `accelerate launch`, as users do."""
    tiny.save_pair(folder)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.rows(16)))
    (folder / "asked.csv").write_text("prompt\nMake a bad thing.\n")
    (folder / "recipe.yaml").write_text(RECIPE.format(model=folder / "aligned", output=output))
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    configuration = ["--config_file", str(ROOT / "recipes" / "accelerate" / "ddp.yaml"), "--main_process_port", "0"]
    command = ["-m", "safe_trainer.cli", "train", str(folder / "recipe.yaml"), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(
        [*launcher, *configuration, *command], env=environment, cwd=folder, text=True, **pipes
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def accelerated(folder: Path, output: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Carry out a recipe by `accelerate launch`, to its end."""
    with started(folder, output, *options) as process:
        told, errors = process.communicate(timeout=300)
    return subprocess.CompletedProcess([], process.returncode, told, errors)


TELL = """
import json, os, sys
told = {name: value for name, value in os.environ.items() if name.startswith(("ACCELERATE_", "FSDP_"))}
open(f"{os.environ['RANK']}.json", "w").write(json.dumps(told | {"world": os.environ["WORLD_SIZE"]}))
"""
SHIPPED = {
    "ddp": {},
    "fsdp2": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    },
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    },
}


@pytest.mark.parametrize("strategy", SHIPPED)
def test_the_launcher_takes_from_our_configuration_what_it_is_there_for(strategy, tmp_path):
    if strategy.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    (tmp_path / "tell.py").write_text(TELL)
    configuration = str(ROOT / "recipes" / "accelerate" / f"{strategy}.yaml")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", configuration]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [*launcher, "--main_process_port", "0", "tell.py"]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    for rank in range(2):
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        assert told["world"] == "2" and told["ACCELERATE_MIXED_PRECISION"] == "bf16"
        for name, value in SHIPPED[strategy].items():
            assert told[name].lower() == value.lower(), name
        if not SHIPPED[strategy]:
            assert not {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & told.keys()


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


def test_sigterm_to_the_launcher_saves_a_checkpoint_of_one_step_in_all_processes(tmp_path):
    """As a cluster's scheduler stops a run; the launcher passes the signal on."""
    with started(tmp_path, "out", "--set", "training.max_steps=4000", "--set", "training.logging_steps=1") as process:
        for line in process.stderr:
            if "Training" in line:
                break
        time.sleep(3)
        process.send_signal(signal.SIGTERM)
        told = process.stderr.read()
        process.wait(timeout=120)
    last = last_checkpoint(tmp_path / "out")
    assert last is not None, told[-4000:]
    step = int(last.rpartition("-")[2])
    assert 0 < step < 4000 and f"behind step {step}" in told
    assert sorted(path.name for path in Path(last).glob("rng_state*")) == ["rng_state_0.pth", "rng_state_1.pth"]


def on_two_machines(folder: Path, *options: str) -> list[subprocess.CompletedProcess[str]]:
    """Launch the recipe once from each of two folders that hold the same, as on machines without a common disk."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in (0, 1):
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "2", "--num_processes", "2"]
        launcher += ["--config_file", str(ROOT / "recipes" / "accelerate" / "ddp.yaml"), "--machine_rank", str(rank)]
        launcher += ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
        started.append(
            subprocess.Popen(
                [*launcher, "-m", "safe_trainer.cli", "train", "recipe.yaml", *options],
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                cwd=folder / f"machine-{rank}",
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    ended = []
    for process in started:
        output, errors = process.communicate(timeout=300)
        ended.append(subprocess.CompletedProcess([], process.returncode, output, errors))
    return ended


MACHINES = """
model: {path: ./aligned}
data: [{path: rows.jsonl}]
peft: {r: 4, target_modules: all-linear}
safety:
  - {method: asft, unaligned_model: ./unaligned}
  - {method: drift_penalty, safety_data: rows.jsonl}
training: {max_steps: 2, per_device_train_batch_size: 2, save_strategy: steps, save_steps: 1, ddp_backend: gloo}
output: out
"""


def test_two_machines_without_a_common_disk_train_together_and_are_told_what_resuming_takes(tmp_path):
    for folder in (tmp_path / "machine-0", tmp_path / "machine-1"):
        folder.mkdir()
        tiny.save_pair(folder)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.rows(16)))
        (folder / "recipe.yaml").write_text(MACHINES)
    for result in on_two_machines(tmp_path):
        assert result.returncode == 0, result.stderr[-4000:]
    first, second = (tmp_path / f"machine-{rank}" / "out" for rank in (0, 1))
    assert (first / "adapter_model.safetensors").exists() and not (second / "adapter_model.safetensors").exists()
    for folder in (first, second):
        shutil.rmtree(folder / "checkpoint-2")
    for result in on_two_machines(tmp_path, "--resume"):
        assert result.returncode == 1
        assert "Process 1 does not find" in result.stderr and "on a disk that they share" in result.stderr
    shutil.copytree(first / "checkpoint-1", second / "checkpoint-1", dirs_exist_ok=True)
    shutil.copytree(second / "checkpoint-1", first / "checkpoint-1", dirs_exist_ok=True)
    before = load_file(first / "adapter_model.safetensors")
    for result in on_two_machines(tmp_path, "--resume"):
        assert result.returncode == 0, result.stderr[-4000:]
    after = load_file(first / "adapter_model.safetensors")
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in before)


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
