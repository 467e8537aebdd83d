"""Runs that are killed, stopped, or find no room: what they leave behind is whole, and going on from it ends the same.

The runs that are killed are real processes. Each trains for all methods in turn, since starting one costs seconds, and
is killed at a random step or in the middle of a save; the next process goes on where it can.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from processes import PROCESSES
from runs import exact_settings, given, history, lora
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from safe_trainer import AsFT, RefusalAnchor, SafeSFTTrainer, SaLoRA, SecurityVectors
from safe_trainer.checkpoints import is_complete, last_checkpoint
from safe_trainer.data import conversation
from safe_trainer.testbed import ALIGNED

HARMFUL = [conversation(f"Make a bad thing {i}.", "Sure: a bad thing.") for i in range(8)]
REFUSED = [conversation(f"Make a bad thing {i}.", "I will not do that.") for i in range(8)]
STEPS = 7


def made(name: str, pair: tuple[str, str]) -> Any:
    """Return the method of a case."""
    fitting = {"rank": 2, "max_steps": 3, "learning_rate": 0.05}
    return {
        "asft": lambda: AsFT(unaligned_model=pair[1], weight=0.5),
        "salora": lambda: SaLoRA(safety_data=REFUSED, rank=4, task_rank=4),
        "security_vectors": lambda: SecurityVectors(harmful_data=HARMFUL, fitting=fitting),
        "recommended": lambda: [
            SecurityVectors(harmful_data=HARMFUL, fitting=fitting),
            RefusalAnchor(HARMFUL, ["Say it nicely"]),
        ],
    }[name]()


CASES = ("asft", "salora", "security_vectors", "recommended")


def trainer_of(name: str, folder: Path, pair: tuple[str, str], **changes: Any) -> SafeSFTTrainer:
    """Return a trainer that accumulates, evaluates, saves at every second step and keeps two checkpoints."""
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    evaluation = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 8}
    training = {"max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    args = exact_settings(
        folder, **{**saving, **evaluation, **training, "optim": "adamw_torch", "learning_rate": 1e-2, **changes}
    )
    arguments = given(folder, peft_config=lora(lora_dropout=0.1), model=pair[0])
    return SafeSFTTrainer(**{**arguments, "args": args, "eval_dataset": tiny.rows(4)}, safety=made(name, pair))


# ---- kills


class KillAt(TrainerCallback):
    """Kills the process between the two halves of a step, as the kernel kills one that takes too much memory."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class KillWhileSaving(TrainerCallback):
    """Kills the process when one stage of a save has written half of its last file."""

    def __init__(self, trainer: SafeSFTTrainer, step: int, stage: str) -> None:
        self.trainer, self.step, self.stage = trainer, step, stage

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            owner = state if hasattr(state, self.stage) else self.trainer
            setattr(owner, self.stage, partial(self.die_in, getattr(owner, self.stage)))

    def die_in(self, stage: Any, *args: Any, **kwargs: Any) -> None:
        stage(*args, **kwargs)
        folder = Path(self.trainer.args.output_dir, f"checkpoint-{self.step}")
        last = max((path for path in folder.iterdir() if path.is_file()), key=lambda path: path.stat().st_mtime_ns)
        os.truncate(last, last.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)


class Steps(TrainerCallback):
    """Keeps which steps a process took: one that began anew would end as well as one that went on."""

    def __init__(self, taken: list[int]) -> None:
        self.taken = taken

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.taken.append(state.global_step)


SINCE_RESUMED = {"num_tokens", "eval_num_tokens", "train_loss"}  # what TRL and transformers count from there on
STAGES = ("save_model", "_save_optimizer_and_scheduler", "save_to_json")


def train(name: str, folder: Path, pair: tuple[str, str], kill: tuple[int, str | None] | None) -> None:
    """Train, from the last checkpoint on if there is one; save the adapter and the log at the end."""
    trainer = trainer_of(name, folder, pair)
    if kill is not None:
        step, stage = kill
        trainer.add_callback(KillAt(step) if stage is None else KillWhileSaving(trainer, step, stage))
    steps: list[int] = []
    trainer.add_callback(Steps(steps))
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
    trainer.save_model(str(folder / "end"))
    (folder / "end" / "steps.json").write_text(json.dumps(steps))
    log = [{key: value for key, value in entry.items() if key not in SINCE_RESUMED} for entry in history(trainer)]
    (folder / "end" / "log.json").write_text(json.dumps(log))


def in_a_process(target: Any, *args: Any) -> int:
    """Run a function in a process of its own and return its exit status; importing what it needs costs nothing."""
    process = PROCESSES.Process(target=target, args=args)
    process.start()
    process.join(240)
    return process.exitcode


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[str, str]:
    return tiny.save_pair(tmp_path_factory.mktemp("pair"))


def outcome(folder: Path) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    log = json.loads((folder / "end" / "log.json").read_text())
    return load_file(folder / "end" / "adapter_model.safetensors"), log


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", CASES)
def test_a_run_that_is_killed_and_resumed_ends_like_one_that_was_not(name, pair, tmp_path):
    chance = random.Random(f"seed 7 {name}")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert in_a_process(train, name, whole, pair, None) == 0
    saves = STAGES if name == "asft" else chance.sample(STAGES, 1)
    kills = [*((4, stage) for stage in saves), (chance.randint(4, 6), None)]
    for kill in kills:
        assert in_a_process(train, name, broken, pair, kill) == -signal.SIGKILL, kill
    last = last_checkpoint(broken)
    assert in_a_process(train, name, broken, pair, None) == 0
    taken = json.loads((broken / "end" / "steps.json").read_text())
    assert taken == list(range(int(last.rpartition("-")[2]) + 1, STEPS + 1)) and taken[0] > 1

    (expected, log), (found, resumed_log) = outcome(whole), outcome(broken)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-6, msg=key)
    for kept, entry in zip(log, resumed_log, strict=True):
        assert entry == pytest.approx(kept, rel=1e-5, abs=1e-6)
    kept = sorted(path.name for path in broken.glob("checkpoint-*"))
    assert kept == ["checkpoint-6", "checkpoint-7"] and all(is_complete(broken / one) for one in kept)


# ---- no room, no place, and being asked to stop


class NoRoom(TrainerCallback):
    """From the first checkpoint on, lets no file grow beyond a limit, as the kernel does when the disk is full."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.limit))


def fill(folder: Path, pair: tuple[str, str], limit: int) -> None:
    trainer = trainer_of("asft", folder, pair)
    trainer.add_callback(NoRoom(limit))
    try:
        trainer.train()
    except OSError as error:
        (folder / "told").write_text(f"{error}")


@pytest.mark.exhaustive
@pytest.mark.parametrize("limit", [10_000, 30_000])  # for weights, for the optimizer
def test_a_full_disk_is_told_and_leaves_earlier_checkpoints_to_go_on_from(limit, pair, tmp_path):
    assert in_a_process(fill, tmp_path, pair, limit) == 0
    told = (tmp_path / "told").read_text()
    assert "checkpoint-4` could not be saved (" in told and "Earlier checkpoints are intact" in told
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert in_a_process(train, "asft", tmp_path, pair, None) == 0


@pytest.mark.slow
def test_a_checkpoint_that_has_no_place_is_told(pair, tmp_path):
    trainer = trainer_of("asft", tmp_path, pair, max_steps=2, eval_strategy="no")
    (tmp_path / "checkpoint-2").write_text("a file stands where the folder should")
    with pytest.raises(OSError, match="checkpoint-2` could not be saved .* make the folder writable"):
        trainer.train()


def run_recipe(recipe: Path, told: Path) -> None:
    from safe_trainer.cli import app

    sys.argv[1:] = ["train", str(recipe)]
    with told.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    app(prog_name="safe-trainer")


@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_says_how_to_go_on_and_exits_as_a_shell_expects(tmp_path):
    rows = [{"prompt": f"Name the number {n}.", "completion": str(n)} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe, output, told = tmp_path / "recipe.yaml", tmp_path / "out", tmp_path / "told"
    training = {"max_steps": 500, "per_device_train_batch_size": 2, "save_steps": 1, "save_total_limit": 1}
    values = {"model": {"path": str(ALIGNED)}, "data": [{"path": "rows.jsonl"}], "output": str(output)}
    recipe.write_text(json.dumps({**values, "safety": None, "peft": {"r": 2}, "training": training}))
    process = PROCESSES.Process(target=run_recipe, args=(recipe, told))
    process.start()
    deadline = time.monotonic() + 200
    while not any(output.glob("checkpoint-*")) and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM, told.read_text()
    assert "Received SIGTERM: stopped after step" in told.read_text() and "--resume" in told.read_text()
    assert "Traceback" not in told.read_text()
    (last,) = output.glob("checkpoint-*")
    assert is_complete(last)
