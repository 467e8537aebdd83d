"""Two processes that are killed and resumed end like two that were not, and go on with nothing that was lost.

`python test_distributed_resuming.py FOLDER PLAN` is one of the two.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import launch
import pytest
import tiny
import torch
from launch import leave
from processes import on_two_processes
from safetensors.torch import load_file
from transformers import TrainerCallback

from safe_trainer.checkpoints import LAUNCH, is_complete, last_checkpoint

pytestmark = pytest.mark.exhaustive

STEPS = 5


# ---- one of the processes


class Kill(TrainerCallback):
    """Kills all processes between the two halves of a step, or when the first has half written a file of a save."""

    def __init__(self, trainer: Any, step: int, stage: str | None) -> None:
        self.trainer, self.step, self.stage = trainer, step, stage

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stage is None and state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stage is not None and state.global_step + 1 == self.step:
            setattr(self.trainer, self.stage, partial(self.die_in, getattr(self.trainer, self.stage)))

    def die_in(self, stage: Any, *args: Any, **kwargs: Any) -> None:
        stage(*args, **kwargs)
        if self.trainer.args.process_index == 0:
            folder = Path(self.trainer.args.output_dir, f"checkpoint-{self.step}")
            last = max((path for path in folder.iterdir() if path.is_file()), key=lambda path: path.stat().st_mtime_ns)
            os.truncate(last, last.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)


def trainer_of(name: str, strategy: str, folder: Path, output: Path) -> Any:
    """Return a trainer whose steps are of two halves and draw random numbers, and which saves at every second."""
    from runs import exact_settings, lora

    from safe_trainer import SafeSFTTrainer

    with launch.spread(strategy, folder) as (model, extra):
        saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "max_steps": STEPS}
        size = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        optimizer = {"optim": "adamw_torch", "learning_rate": 0.01}
        args = exact_settings(output, **saving, **size, **optimizer, **extra)
        rows, safety = tiny.rows(24), launch.methods(folder)[name]()
        peft_config = lora(lora_dropout=0.2)
        return SafeSFTTrainer(model, args=args, train_dataset=rows, peft_config=peft_config, safety=safety)


def carry_out(name: str, strategy: str, folder: Path, run: str, kill: Any, resume: Any) -> None:
    output = folder / run
    trainer = trainer_of(name, strategy, folder, output)
    if kill is not None:
        trainer.add_callback(Kill(trainer, *kill))
    told = ""
    try:
        trainer.train(resume_from_checkpoint=resume)
    except ValueError as error:
        told = str(error)
    output.mkdir(exist_ok=True)
    (output / f"told-{os.environ.get('RANK', '0')}").write_text(told)
    if not told:
        trainer.save_model(str(output / "end"))


def main(folder: Path, plan: list[list[Any]]) -> None:
    for name, strategy, run, kill, resume in plan:
        carry_out(name, strategy, folder, run, kill, resume)
    leave()


# ---- both


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    tiny.save_pair(folder)
    return folder


def launched(folder: Path, *plan: list[Any], check: bool = True) -> None:
    on_two_processes(__file__, str(folder), json.dumps(plan), check=check)


def told(folder: Path, run: str) -> list[str]:
    return [(folder / run / f"told-{rank}").read_text() for rank in range(2)]


def assert_same_end(folder: Path, run: str) -> None:
    expected, found = (load_file(folder / name / "end" / "adapter_model.safetensors") for name in ("whole", run))
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-6, msg=key)


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    launched(folder, ["recommended", "ddp", "whole", None, None], ["none", "ddp", "plain", None, None])
    return folder


KILLS = {  # and the checkpoint that is the last whole one then
    "while saving the random numbers": ((4, "_save_rng_state"), 2),
    "while saving weights": ((4, "save_model"), 2),
    "in a step": ((3, None), 2),
    "behind a save": ((4, None), 4),
}


def test_two_processes_that_are_killed_and_resumed_end_like_two_that_were_not(whole):
    for number, (when, (kill, last)) in enumerate(KILLS.items()):
        launched(whole, ["recommended", "ddp", "killed", kill, number > 0], check=False)
        assert not (whole / "killed" / "end").exists()
        assert last_checkpoint(whole / "killed").endswith(f"-{last}"), when
    launched(whole, ["recommended", "ddp", "killed", None, True])
    assert told(whole, "killed") == ["", ""]
    assert_same_end(whole, "killed")
    state = json.loads((whole / "killed" / "checkpoint-5" / "trainer_state.json").read_text())
    kept = state["stateful_callbacks"]["RunFingerprint"]["attributes"]
    assert kept[LAUNCH] == {"processes": 2, "strategy": "DDP"}


def copied(folder: Path, source: str, run: str, checkpoint: str = "checkpoint-4") -> Path:
    target = folder / run / checkpoint
    shutil.copytree(folder / source / checkpoint, target)
    return target


def test_a_random_state_that_was_lost_is_reported_in_all_processes(whole):
    folder = copied(whole, "whole", "lost")
    (folder / "rng_state_1.pth").unlink()
    plan = ["recommended", "ddp", "lost", None, str(folder)]
    launched(whole, plan, ["none", "ddp", "absent", None, str(whole / "absent" / "checkpoint-4")])
    assert all("Can't find a valid checkpoint" in words for words in told(whole, "absent"))  # as transformers tells it
    one, other = told(whole, "lost")
    assert one == other and "holds no `rng_state_1.pth`, the random state of process 1" in one


def test_an_incomplete_checkpoint_is_passed_over_by_all_processes(whole):
    for step in (4, 5):
        copied(whole, "whole", "passed", f"checkpoint-{step}")
    (whole / "passed" / "checkpoint-5" / "trainer_state.json").write_text("{")
    launched(whole, ["recommended", "ddp", "passed", None, True])
    assert told(whole, "passed") == ["", ""]
    assert_same_end(whole, "passed")


# ---- other numbers of processes, other strategies


def test_one_process_does_not_go_on_where_two_were_unless_there_are_no_methods(whole):
    copied(whole, "whole", "alone")
    carry_out("recommended", "alone", whole, "alone", None, True)
    (words,) = [(whole / "alone" / "told-0").read_text()]
    assert "was made by 2 processes with DDP, and this run has one process" in words
    assert "start a new run from its weights" in words
    copied(whole, "plain", "alone-none")
    carry_out("none", "alone", whole, "alone-none", None, True)  # as TRL does it
    assert not (whole / "alone-none" / "told-0").read_text()


def test_two_processes_do_not_go_on_where_one_was(whole):
    carry_out("recommended", "alone", whole, "one", None, None)
    copied(whole, "one", "two")
    launched(whole, ["recommended", "ddp", "two", None, True])
    for words in told(whole, "two"):
        assert "was made by one process, and this run has 2 processes with DDP" in words


@pytest.mark.parametrize("strategy", ["fsdp2", "zero2"])
def test_another_strategy_does_not_go_on_from_a_checkpoint(strategy, whole):
    if strategy == "zero2" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: `pip install deepspeed`")
    launched(whole, *([name, strategy, f"{strategy}-{name}", None, None] for name in ("recommended", "none")))
    assert is_complete(whole / f"{strategy}-none" / "checkpoint-4")
    for name in ("recommended", "none"):
        copied(whole, f"{strategy}-{name}", f"ddp-{strategy}-{name}")
    launched(whole, *([n, "ddp", f"ddp-{strategy}-{n}", None, True] for n in ("recommended", "none")))
    called = {"fsdp2": "FSDP2", "zero2": "ZeRO-2"}[strategy]
    for words in told(whole, f"ddp-{strategy}-recommended"):
        assert f"was made by 2 processes with {called}, and this run has 2 processes with DDP" in words
    for words in told(whole, f"ddp-{strategy}-none"):
        # Without methods it is as with TRL, which lets DeepSpeed's optimizer be left behind.
        assert ("is only supported when using PyTorch FSDP" in words) == (strategy == "fsdp2")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
