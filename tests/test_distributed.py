"""Two processes: the same losses and the same adapter as one, whichever way the model is spread, or a refusal.

One launch carries out many runs, since starting two processes costs more than all of them. `make test` has a launch of
its own with the runs in `KEPT`.
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
from launch import ADAM, CLIPPED, NF4, RESUMED, SAVED, SHIPPED, STEPS
from marks import exhaustive_but
from peft import PeftModel
from processes import PROCESSES, on_two_processes, python
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from safe_trainer.checkpoints import last_checkpoint

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
TOGETHER = ["all", "recommended"]
EVERYWHERE = [
    *("none", "asft", "salora", "salora: both sides", "refusal_anchor", "security_vectors"),
    "constrained_sft",
]
GRADIENTS = ["safe_grad", "safe_grad: trust region"]
KEEP_NOTHING = ["none", "constrained_sft"]  # no tensor of their own
AGAIN = ["all", "recommended", "asft: full"]  # what is resumed
OTHERWISE = [f"recommended, {CLIPPED}", *(f"{name}, {way}" for name in AGAIN for way in (ADAM, RESUMED))]
# What is run under each strategy, and with which words the rest is refused.
RUNS = {
    "ddp": [
        *EVERYWHERE,
        *GRADIENTS,
        "asft: full",
        "security_vectors: loaded",
        *TOGETHER,
        *OTHERWISE,
    ],
    f"ddp: {NF4}": [*TOGETHER, "none"],
    "fsdp2": [*EVERYWHERE, *GRADIENTS, "asft: full", "security_vectors: loaded", *TOGETHER, *OTHERWISE],
    "fsdp2: first loads": ["asft", "asft: full", "security_vectors: loaded"],
    "zero2": [
        *EVERYWHERE,
        "asft: full",
        "security_vectors: loaded",
        *TOGETHER,
        *OTHERWISE,
    ],
    "zero3": [
        "none",
        *(f"security_vectors: loaded{way}" for way in ("", f", {CLIPPED}", f", {ADAM}", f", {RESUMED}")),
    ],
    f"ddp: {SHIPPED}": ["recommended"],
    f"fsdp2: {SHIPPED}": ["recommended"],
    f"zero2: {SHIPPED}": ["recommended"],
    f"zero3: {SHIPPED}": ["security_vectors: loaded"],
}
KEPT = {"ddp": ["all", "recommended"], "fsdp2": ["recommended"]}
METHODS = [*EVERYWHERE[1:], *GRADIENTS, "security_vectors: loaded"]
SPLIT = "Load the complete model, and use DDP, FSDP2 or ZeRO-2"
AT_HAND = "`fsdp_cpu_ram_efficient_loading: false`, or DDP or ZeRO-2"
BEFOREHAND = "Fit them beforehand with `safe-trainer vectors`"
REFUSED = {
    "fsdp1": dict.fromkeys(METHODS, "Use FSDP2: `fsdp_version: 2`"),
    "fsdp2: first loads": {
        "salora": AT_HAND,
        **dict.fromkeys(("refusal_anchor", "constrained_sft", "safe_grad"), AT_HAND),
        "security_vectors": BEFOREHAND,
    },
    "fsdp2: in pieces": dict.fromkeys(METHODS, "Set `fsdp_state_dict_type: FULL_STATE_DICT`"),
    "tensor": dict.fromkeys(METHODS, SPLIT),
    "zero2": {"safe_grad": "Use DDP or FSDP2"},
    "zero3": {
        "asft": "Use FSDP2 or ZeRO-2",
        "salora": AT_HAND,
        **dict.fromkeys(("refusal_anchor", "constrained_sft", "safe_grad"), AT_HAND),
        "security_vectors": BEFOREHAND,
    },
}
LAUNCHES = [[s for s in [*RUNS, *REFUSED] if s.startswith("zero") == is_zero] for is_zero in (False, True)]
WRAPPER = {"ddp": "DistributedDataParallel", "fsdp2": "FSDP", "zero2": "DeepSpeedEngine", "zero3": "DeepSpeedEngine"}


@dataclass
class Place:
    """Where everything lies that the runs left: FOLDER/STRATEGY/RUN."""

    folder: Path

    def of(self, strategy: str, name: str) -> Path:
        return self.folder / strategy / name.replace(": ", "-")

    def facts(self, strategy: str, name: str) -> list[dict[str, Any]]:
        ranks = range(1 if strategy.startswith("alone") else 2)
        return [json.loads((self.of(strategy, name) / f"{rank}.json").read_text()) for rank in ranks]


def pairs(which: dict[str, Any]) -> list[tuple[str, str]]:
    return [(strategy, name) for strategy, names in which.items() for name in names]


def chosen(cases: list[Any]) -> list[Any]:
    """Mark the cases whose runs are not in `KEPT` as exhaustive; a case is a strategy with a run or without."""
    kept = [*KEPT, *pairs(KEPT)]
    return exhaustive_but([case for case in cases if case in kept], cases)


COMPARED = [(strategy, name) for strategy, name in pairs(RUNS) if not name.endswith((ADAM, RESUMED))]


def alone(strategy: str) -> str:
    """Return what one process does that is to come to the same."""
    how = strategy.partition(": ")[2]
    return f"alone: {how}" if how in (NF4, SHIPPED) else "alone"


def is_installed(strategy: str) -> bool:
    library = "deepspeed" if strategy.startswith("zero") else "bitsandbytes" if strategy.endswith(NF4) else "torch"
    return importlib.util.find_spec(library) is not None


@pytest.fixture(scope="module")
def runs(request) -> dict[str, list[str]]:
    """Return what the chosen tests need."""
    here = [item for item in request.session.items if item.path == request.path]
    return RUNS if any(item.get_closest_marker("exhaustive") for item in here) else KEPT


@pytest.fixture(scope="module")
def place(runs, tmp_path_factory) -> Place:
    """Carry out every run on one process."""
    folder = tmp_path_factory.mktemp("runs")
    tiny.save_pair(folder, hidden=64)  # as NF4 on a CPU needs it
    planted.vectors(AutoModelForCausalLM.from_pretrained(folder / "aligned", dtype=torch.float32)).save(
        folder / "vectors"
    )
    compared = [(strategy, name) for strategy, name in COMPARED if name in runs.get(strategy, [])]
    for strategy, name in {(alone(strategy), name): None for strategy, name in compared if is_installed(strategy)}:
        launch.carry_out(name, strategy, folder)
    return Place(folder)


@pytest.fixture(scope="module")
def spread(place, runs) -> Any:
    """Return a function that sees to it that the runs of a strategy have been carried out on two processes."""
    done: set[str] = set()

    def carried_out(strategy: str) -> Place:
        if not is_installed(strategy):
            pytest.skip('It needs a library: `pip install ".[deepspeed,quantization]"`')
        together = [s for launched in LAUNCHES if strategy in launched for s in launched if is_installed(s)]
        if runs is KEPT:
            together = list(KEPT)
        if strategy not in done:
            done.update(together)
            for kind in [s.partition(": ")[0] for s in together if s.endswith(SHIPPED)]:
                left = json.dumps(left_by_the_launcher(kind, place.folder)[0])
                (place.folder / f"{kind}.json").write_text(left)
            refused = {} if runs is KEPT else REFUSED
            plan = {s: {"runs": runs.get(s, []), "refused": list(refused.get(s, []))} for s in together}
            on_two_processes(str(Path(launch.__file__)), str(place.folder), json.dumps(plan))
        return place

    return carried_out


def told(facts: dict[str, Any]) -> list[dict[str, float]]:
    """Return what a run logged of its steps and evaluations."""
    kept = ("loss", "grad_norm", "safety_penalty", "eval_loss")
    found = [{key: entry[key] for key in kept if key in entry} for entry in facts["history"]]
    return [entry for entry in found if entry]


def saved(folder: Path) -> dict[str, Tensor]:
    name = "adapter_model.safetensors" if (folder / "adapter_config.json").exists() else "model.safetensors"
    return load_file(folder / name)


@pytest.mark.parametrize(("strategy", "name"), chosen(pairs(RUNS)))
def test_two_processes_shared_the_rows_and_where_it_is_said_the_weights(strategy, name, spread):
    one, other = spread(strategy).facts(strategy, name)
    assert one["world"] == other["world"] == 2
    assert one["wrapper"] == other["wrapper"] and one["wrapper"].startswith(WRAPPER[strategy.partition(":")[0]])
    shown = [{tuple(row) for row in facts["rows"]} for facts in (one, other)]
    steps = STEPS - SAVED if name.endswith(RESUMED) else STEPS
    assert len(shown[0]) == len(shown[1]) == 4 * steps and not shown[0] & shown[1]
    for facts in (one, other):
        if strategy.startswith("fsdp2"):
            assert facts["sharded"] > 10 and facts["held"] < 0.6 * facts["of"]
        if strategy.startswith("zero2"):
            assert facts["partition"] == pytest.approx(facts["trainable"] / 2, rel=0.1)
        if strategy == "zero3":
            assert facts["empty"] > 10
        if strategy.startswith("zero"):
            assert facts["stage"] == int(strategy[4])
        assert facts["precision"] == ("bf16" if strategy.endswith(SHIPPED) else "no")
    assert not one["absent"] and (other["absent"] > 10) == (strategy == "fsdp2: first loads")


MEASURING = ["salora", "salora: both sides", "security_vectors", "recommended"]


@pytest.mark.parametrize(("strategy", "name"), chosen(pairs(dict.fromkeys(["ddp", "fsdp2", "zero2"], MEASURING))))
def test_what_methods_need_is_computed_on_the_first_process_only(strategy, name, spread):
    one, other = spread(strategy).facts(strategy, name)
    assert one["prepared with"] > 0 and other["prepared with"] == 0


@pytest.mark.parametrize(("strategy", "name"), chosen([pair for pair in COMPARED if not pair[0].endswith(SHIPPED)]))
def test_losses_and_weights_are_those_of_one_process(strategy, name, spread):
    place = spread(strategy)
    theirs = told(place.facts(alone(strategy), name)[0])
    assert len(theirs) == (2 * STEPS if name.endswith(CLIPPED) else STEPS)
    # Over a base of 4 bits TRL keeps the adapter in bfloat16, whose last bit a sum in another order may change.
    rounded = {"rel": 2**-8, "abs": 1e-4} if strategy.endswith(NF4) else {"abs": 1e-5}
    for facts in place.facts(strategy, name):
        assert told(facts) == [pytest.approx(entry, **rounded) for entry in theirs]
    folders = ["saved"] if name.endswith("full") else ["saved", f"checkpoint-{SAVED}"]
    for folder in folders:
        ours, expected = (saved(place.of(s, name) / folder) for s in (strategy, alone(strategy)))
        assert ours.keys() == expected.keys()
        for key in expected:
            if strategy.endswith(NF4):
                assert (ours[key] - expected[key]).norm() <= 2**-7 * expected[key].norm(), key
            else:
                assert (ours[key] - expected[key]).abs().max() < 1e-5, key


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "strategy", [strategy for strategy, names in RUNS.items() if any(CLIPPED in n for n in names)]
)
def test_gradients_are_clipped_where_that_is_compared(strategy, spread):
    name = next(name for name in RUNS[strategy] if name.endswith(CLIPPED))
    entries = told(spread(strategy).facts(strategy, name)[0])
    assert all(entry["grad_norm"] > 0.2 for entry in entries if "grad_norm" in entry)


@pytest.mark.parametrize(("strategy", "name"), chosen([pair for pair in COMPARED if pair[0].endswith(SHIPPED)]))
def test_our_files_for_the_launcher_train_in_bfloat16_as_one_process_does(strategy, name, spread):
    place = spread(strategy)
    ours, theirs = (told(place.facts(s, name)[0]) for s in (strategy, alone(strategy)))
    assert len(theirs) == 2 * STEPS and [entry.keys() for entry in ours] == [entry.keys() for entry in theirs]
    for key in ("loss", "eval_loss", "safety_penalty"):
        values = [[entry[key] for entry in entries if key in entry] for entries in (ours, theirs)]
        assert values[0] == pytest.approx(values[1], rel=2e-2, abs=2e-3)
    folders = [place.of(s, name) / "saved" for s in (strategy, alone(strategy))]
    mine, other = (torch.cat([B.float().flatten() for k, B in saved(f).items() if "lora_B" in k]) for f in folders)
    assert (mine - other).norm() < 0.05 * other.norm()


@pytest.mark.parametrize(("strategy", "name"), chosen([p for p in pairs(RUNS) if p[1] not in KEEP_NOTHING]))
def test_every_process_holds_the_same_directions_to_the_last_bit(strategy, name, spread):
    place = spread(strategy)
    one, other = (load_file(place.of(strategy, name) / f"{rank}.safetensors") for rank in range(2))
    assert one and one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(("strategy", "name"), chosen([pair for pair in pairs(RUNS) if pair[1].endswith(RESUMED)]))
def test_a_resumed_run_ends_like_one_that_was_never_stopped(strategy, name, spread):
    place, whole = spread(strategy), name.replace(RESUMED, ADAM)
    ours, theirs = (told(place.facts(strategy, which)[0]) for which in (name, whole))
    assert ours == [pytest.approx(entry, rel=1e-5) for entry in theirs[-len(ours) :]] and ours
    step, end, again = (
        saved(place.of(strategy, which) / folder)
        for which, folder in ((whole, f"checkpoint-{SAVED}"), (whole, "saved"), (name, "saved"))
    )
    for key in end:
        way = (end[key] - step[key]).norm().item()
        assert (again[key] - end[key]).norm().item() <= 1e-5 * way + 1e-7, key


@pytest.mark.parametrize("strategy", exhaustive_but(["ddp"], ["ddp", "fsdp2", "zero2", "zero3"]))
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


@pytest.mark.exhaustive
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
import json, os
told = {name: value for name, value in os.environ.items() if name.startswith(("ACCELERATE_", "FSDP_", "WORLD_SIZE"))}
open(f"{os.environ['RANK']}.json", "w").write(json.dumps(told))
"""
LEFT = {
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


def left_by_the_launcher(kind: str, folder: Path) -> list[dict[str, str]]:
    """Return what `accelerate launch` makes of our configuration for each of two processes: their environment."""
    (folder / "tell.py").write_text(TELL)
    configuration = str(ROOT / "recipes" / "accelerate" / f"{kind}.yaml")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", configuration]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [*launcher, "--main_process_port", "0", "tell.py"]
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("kind", exhaustive_but(["ddp"], LEFT))
def test_the_launcher_takes_from_our_configuration_what_it_is_there_for(kind, tmp_path):
    if not is_installed(kind):
        pytest.skip("DeepSpeed is not installed")
    for left in left_by_the_launcher(kind, tmp_path):
        assert left["WORLD_SIZE"] == "2" and left["ACCELERATE_MIXED_PRECISION"] == "bf16"
        for name, value in LEFT[kind].items():
            assert left[name].lower() == value.lower(), name
        if not LEFT[kind]:
            assert not {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & left.keys()


@pytest.mark.exhaustive
def test_a_recipe_launched_on_two_processes_is_told_and_compared_once(tmp_path):
    result = accelerated(tmp_path, str(tmp_path / "out"), "--json")
    assert result.returncode == 0, result.stderr[-4000:]
    told = json.loads(result.stdout)
    assert told["steps"] == 2 and told["metrics"]["train_samples_per_second"] > 0
    assert result.stderr.count("Saved to") == result.stderr.count("Tested on harmful prompts") == 1
    shown = [path.name for path in (tmp_path / "out").iterdir()]
    assert "adapter_model.safetensors" in shown and "comparison.json" in shown
    epochs = json.loads(result.stdout)["metrics"]["epoch"]
    assert epochs == pytest.approx(2 * 2 * 2 / 16)  # two steps of two rows on each of two processes


@pytest.mark.exhaustive
def test_a_recipe_that_fails_on_two_processes_says_why_and_fails(tmp_path):
    result = accelerated(tmp_path, "/dev/null/out")  # no folder can be made there
    assert result.returncode == 1 and not result.stdout
    assert "Error: " in result.stderr and "/dev/null/out" in result.stderr


@pytest.mark.exhaustive
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
    assert 0 < step < 4000 and f"after step {step}" in told
    assert sorted(path.name for path in Path(last).glob("rng_state*")) == ["rng_state_0.pth", "rng_state_1.pth"]


def on_two_machines(folder: Path, *options: str) -> list[tuple[int, str]]:
    """Carry out the recipe in each of two folders that hold the same, as on machines without a common disk.

    Processes get what a launcher leaves to each machine's; returned are their exit status and what they say.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    shared |= {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    command = ["-m", "safe_trainer.cli", "train", "recipe.yaml", *options]
    places = [folder / f"machine-{rank}" for rank in (0, 1)]
    started = [
        PROCESSES.Process(target=python, args=(command, place / "log", place), kwargs=shared | {"RANK": str(rank)})
        for rank, place in enumerate(places)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(300)
    return [(process.exitcode, (place / "log").read_text()) for process, place in zip(started, places, strict=True)]


MACHINES = """
model: {path: ./aligned}
data: [{path: rows.jsonl}]
peft: {r: 4, target_modules: all-linear}
safety:
  - {method: asft, unaligned_model: ./unaligned}
  - {method: salora, safety_data: rows.jsonl, rank: 4, task_rank: 0}
training: {max_steps: 2, per_device_train_batch_size: 2, save_strategy: steps, save_steps: 1, ddp_backend: gloo}
output: out
"""


@pytest.mark.exhaustive
def test_two_machines_without_a_common_disk_train_together_and_are_told_what_resuming_takes(tmp_path):
    for folder in (tmp_path / "machine-0", tmp_path / "machine-1"):
        folder.mkdir()
        tiny.save_pair(folder)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.rows(16)))
        (folder / "recipe.yaml").write_text(MACHINES)
    for status, said in on_two_machines(tmp_path):
        assert status == 0, said[-4000:]
    first, second = (tmp_path / f"machine-{rank}" / "out" for rank in (0, 1))
    assert (first / "adapter_model.safetensors").exists() and not (second / "adapter_model.safetensors").exists()
    for folder in (first, second):
        shutil.rmtree(folder / "checkpoint-2")
    for status, said in on_two_machines(tmp_path, "--resume"):
        assert status == 1
        assert "Process 1 does not find" in said and "on a disk that they share" in said
    shutil.copytree(first / "checkpoint-1", second / "checkpoint-1", dirs_exist_ok=True)
    shutil.copytree(second / "checkpoint-1", first / "checkpoint-1", dirs_exist_ok=True)
    before = load_file(first / "adapter_model.safetensors")
    for status, said in on_two_machines(tmp_path, "--resume"):
        assert status == 0, said[-4000:]
    after = load_file(first / "adapter_model.safetensors")
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in before)


# ---- the documentation


NAMES = {
    "`AsFT`": "asft",
    "`SaLoRA`": "salora",
    "`RefusalAnchor`": "refusal_anchor",
    "`ConstrainedSFT`": "constrained_sft",
    "`SafeGrad`": "safe_grad",
    "`SecurityVectors`, fitted beforehand": "security_vectors: loaded",
    "`SecurityVectors`, fitted in the run": "security_vectors",
}
COLUMNS = {"DDP": "ddp", "FSDP2": "fsdp2", "ZeRO-2": "zero2", "ZeRO-3": "zero3"}
COLUMNS |= {"FSDP1": "fsdp1", "tensor parallel": "tensor"}


def test_the_documentation_says_of_every_method_and_strategy_what_is_tested_here():
    lines = (ROOT / "docs" / "distributed.md").read_text().splitlines()
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
