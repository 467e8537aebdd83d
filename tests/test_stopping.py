"""Ctrl-C and SIGTERM in `SafeSFTTrainer.train()`: what is saved, how it ends, and whose signals are left alone.

Each run is a process of its own, since a signal that nobody takes ends the process.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from marks import exhaustive_but
from processes import PROCESSES
from runs import exact_settings, given, lora
from safetensors.torch import load_file
from transformers import TrainerCallback

from safe_trainer import AsFT, SafeSFTTrainer
from safe_trainer.checkpoints import is_complete
from safe_trainer.testbed import ALIGNED

STEPS = 3  # of the four of an epoch, so that the last step is not the end of an epoch
NAMES = {signal.SIGINT: "KeyboardInterrupt", signal.SIGTERM: "SystemExit"}


class Ask(TrainerCallback):
    """Sends signals to its own process at one moment of one step."""

    def __init__(self, step: int, moment: str, numbers: list[int]) -> None:
        self.step, self.numbers = step, numbers
        setattr(self, moment, self.ask)

    def ask(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            for number in self.numbers:
                signal.raise_signal(number)


class Passed(TrainerCallback):
    """Keeps which steps were taken."""

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(state.global_step)


def trainer_of(folder: Path, methods: Any = None, **changes: Any) -> SafeSFTTrainer:
    config = {"max_steps": STEPS, "save_strategy": "no", "learning_rate": 0.1, "optim": "adamw_torch", **changes}
    given_names = {name: config.pop(name) for name in ("model", "eval_dataset") if name in config}
    arguments = given(folder, peft_config=lora(lora_dropout=0.1), **given_names)
    trainer = SafeSFTTrainer(**{**arguments, "args": exact_settings(folder, **config)}, safety=methods)
    trainer.stops_gracefully = True
    return trainer


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in NAMES]


def told(folder: Path, trainer: SafeSFTTrainer, train: Any) -> None:
    """Train, and write down how it ended."""
    steps: list[int] = []
    trainer.add_callback(Passed(steps))
    before, callbacks = handlers(), len(trainer.callback_handler.callbacks)
    end: BaseException | None = None
    try:
        train()
    except BaseException as error:
        end = error
    found = {
        "end": type(end).__name__,
        "told": str(end),
        "steps": steps,
        "undone": handlers() == before and len(trainer.callback_handler.callbacks) == callbacks,
        "hooks": sum(len(module._forward_hooks) for module in trainer.model.modules()),
    }
    folder.joinpath("end.json").write_text(json.dumps(found))
    trainer.save_model(str(folder / "end"))


def run(folder: Path, ask: Any = None, resume: bool = False, methods: Any = None, **changes: Any) -> None:
    trainer = trainer_of(folder, methods, **changes)
    if ask is not None:
        trainer.add_callback(Ask(*ask))
    told(folder, trainer, lambda: trainer.train(resume_from_checkpoint=resume))


def in_a_process(target: Any, folder: Path, *args: Any, **kwargs: Any) -> SimpleNamespace:
    process = PROCESSES.Process(target=logged, args=(target, folder, *args), kwargs=kwargs)
    process.start()
    process.join(240)
    said = folder.joinpath("log").read_text() if folder.joinpath("log").exists() else ""
    assert folder.joinpath("end.json").exists(), f"exit code {process.exitcode}: {said}"
    return SimpleNamespace(**json.loads(folder.joinpath("end.json").read_text()), log=said)


def logged(target: Any, folder: Path, *args: Any, **kwargs: Any) -> None:
    folder.mkdir(exist_ok=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run without a terminal
    with folder.joinpath("log").open("w") as file:
        os.dup2(file.fileno(), 2)
    target(folder, *args, **kwargs)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "end" / "adapter_model.safetensors")


def assert_same(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


MOMENTS = {
    "first step": (0, "on_step_begin", 1),
    "in between": (1, "on_optimizer_step", 2),
    "last step": (2, "on_optimizer_step", 3),
    "behind the last step": (3, "on_train_end", 3),
}
ASKED = exhaustive_but(
    [("in between", "SIGINT")],
    itertools.product(MOMENTS, ("SIGINT", "SIGTERM")),
)


@pytest.mark.slow
@pytest.mark.parametrize(("when", "name"), ASKED)
def test_the_first_signal_saves_a_checkpoint_that_goes_on_to_the_same_end(when, name, tmp_path):
    number, (step, moment, saved) = signal.Signals[name], MOMENTS[when]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    in_a_process(run, whole)
    ended = in_a_process(run, broken, (step, moment, [number]))
    assert (ended.end, ended.undone) == (NAMES[number], True)
    if number == signal.SIGTERM:
        assert ended.told == str(128 + signal.SIGTERM)
    by = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}[number]
    assert f"Received {by}: stopped after step {saved} and saved `{broken / f'checkpoint-{saved}'}`" in ended.log
    assert "train(resume_from_checkpoint=True)" in ended.log and 'save_strategy="no"' in ended.log
    assert [path.name for path in broken.glob("checkpoint-*")] == [f"checkpoint-{saved}"]
    assert is_complete(broken / f"checkpoint-{saved}")
    resumed = in_a_process(run, broken, resume=True)
    assert (resumed.end, resumed.steps) == ("NoneType", list(range(saved + 1, STEPS + 1)))
    assert_same(broken, whole)


@pytest.mark.slow
def test_methods_are_left_cleanly_and_go_on_to_the_same_end(tmp_path):
    pair = tiny.save_pair(tmp_path)
    method = AsFT(unaligned_model=pair[1], weight=0.5)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = in_a_process(run, whole, methods=method, model=pair[0])
    ended = in_a_process(run, broken, (1, "on_step_begin", [signal.SIGTERM]), methods=method, model=pair[0])
    assert (ended.end, ended.undone, ended.hooks) == ("SystemExit", True, expected.hooks)
    in_a_process(run, broken, resume=True, methods=method, model=pair[0])
    assert_same(broken, whole)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["steps", "epoch", "best"])
def test_a_checkpoint_is_saved_whatever_the_strategy(strategy, tmp_path):
    changes = {"save_strategy": strategy, "metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 1}
    ended = in_a_process(watched, tmp_path, **changes)
    assert (ended.end, ended.steps) == ("SystemExit", [1, 2])
    assert is_complete(tmp_path / "checkpoint-2") and "save_strategy" not in ended.log


@pytest.mark.slow
def test_stopping_removes_no_checkpoint_and_loads_no_best_model(tmp_path):
    """Transformers would keep the best one alone, as at the end of a run."""
    changes = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_total_limit": 1}
    folder = tmp_path / "run"
    ended = in_a_process(
        run, folder, (1, "on_step_begin", [signal.SIGTERM]), eval_dataset=tiny.rows(4), **changes, **best
    )
    assert (ended.end, ended.steps) == ("SystemExit", [1, 2])
    assert is_complete(folder / "checkpoint-2") and "saved `" in ended.log
    saved = load_file(folder / "checkpoint-2" / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in weights(folder).items())


def watched(folder: Path, **changes: Any) -> None:
    """Evaluate, too, with a loss that never gets better."""
    trainer = trainer_of(folder, eval_dataset=tiny.rows(4), **changes)
    trainer.state.best_metric = float("-inf")
    trainer.add_callback(Ask(1, "on_step_begin", [signal.SIGTERM]))
    told(folder, trainer, trainer.train)


@pytest.mark.slow
def test_a_second_signal_stops_at_once(tmp_path):
    ended = in_a_process(run, tmp_path, (1, "on_step_begin", [signal.SIGINT, signal.SIGINT]))
    assert (ended.end, ended.told, ended.steps, ended.undone) == ("KeyboardInterrupt", "", [1], True)
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.slow
def test_a_handler_of_the_user_s_own_is_kept(tmp_path):
    ended = in_a_process(handled, tmp_path)
    assert (ended.end, ended.steps, ended.undone) == ("NoneType", [1, 2, 3], True)
    assert (tmp_path / "seen").read_text() == "15"


def handled(folder: Path) -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: folder.joinpath("seen").write_text(str(number)))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run(folder, (1, "on_step_begin", [signal.SIGTERM, signal.SIGINT]))


@pytest.mark.slow
def test_in_a_thread_training_goes_on_as_without(tmp_path):
    ended = in_a_process(threaded, tmp_path)
    assert (ended.end, ended.steps, ended.undone) == ("NoneType", [1, 2, 3], True)
    assert json.loads((tmp_path / "during.json").read_text()) == [True] * STEPS


class Witness(TrainerCallback):
    """Keeps whether the handlers are Python's own."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(handlers() == [signal.default_int_handler, signal.SIG_DFL])


def threaded(folder: Path) -> None:
    trainer, witness = trainer_of(folder), Witness()
    trainer.add_callback(witness)
    thread = threading.Thread(target=told, args=(folder, trainer, trainer.train))
    thread.start()
    thread.join()
    folder.joinpath("during.json").write_text(json.dumps(witness.seen))


@pytest.mark.slow
def test_checkpoints_of_transformers_at_sigterm_still_work_and_ctrl_c_beside_them(tmp_path):
    ended = in_a_process(just_in_time, tmp_path / "sigterm", signal.SIGTERM)
    assert (ended.end, ended.steps) == ("NoneType", [1, 2]), ended.told  # as transformers has it
    assert is_complete(tmp_path / "sigterm" / "checkpoint-1")
    ended = in_a_process(just_in_time, tmp_path / "ctrl-c", signal.SIGINT)
    assert (ended.end, ended.steps) == ("KeyboardInterrupt", [1, 2])
    assert is_complete(tmp_path / "ctrl-c" / "checkpoint-2")


def just_in_time(folder: Path, number: int) -> None:
    trainer = trainer_of(folder, enable_jit_checkpoint=True)
    callbacks = trainer.callback_handler.callbacks
    (theirs,) = (callback for callback in callbacks if type(callback).__name__ == "JITCheckpointCallback")
    theirs.jit_manager.kill_wait = 0
    trainer.add_callback(Ask(1, "on_step_begin", [number]))
    trainer.add_callback(Wait())
    told(folder, trainer, trainer.train)


class Wait(TrainerCallback):
    """Waits until transformers' timer has gone off."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for thread in threading.enumerate():
            if isinstance(thread, threading.Timer):
                thread.join(10)


@pytest.mark.slow
def test_a_process_that_was_started_meanwhile_can_still_be_terminated(tmp_path):
    """As `multiprocessing` ends the processes of a pool, which have the handlers of the one that they came from."""
    in_a_process(forking, tmp_path)
    assert json.loads((tmp_path / "child.json").read_text()) == -signal.SIGTERM


def pause(started: Any) -> None:
    started.set()
    signal.pause()


class Fork(TrainerCallback):
    """Starts a process in the middle of training, and terminates it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        fork = multiprocessing.get_context("fork")
        started = fork.Event()
        child = fork.Process(target=pause, args=(started,))
        child.start()
        started.wait(20)
        child.terminate()
        child.join(20)
        (self.folder / "child.json").write_text(json.dumps(child.exitcode))
        child.kill()


def forking(folder: Path) -> None:
    trainer = trainer_of(folder)
    trainer.add_callback(Fork(folder))
    told(folder, trainer, trainer.train)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_going_on_from_the_last_step_takes_no_further_one(schedule, tmp_path):
    """TRL's trainer would take a fourth step here."""
    given = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": schedule}
    trainer_of(tmp_path, **given).train()
    again, steps = trainer_of(tmp_path, **given), []
    again.add_callback(Passed(steps))
    again.train(resume_from_checkpoint=True)
    assert steps == [] and again.state.global_step == STEPS
    saved = load_file(tmp_path / f"checkpoint-{STEPS}" / "adapter_model.safetensors")
    again.save_model(str(tmp_path / "end"))
    assert all(torch.equal(saved[name], tensor) for name, tensor in weights(tmp_path).items())


# ---- the command


def recipe_of(folder: Path) -> Path:
    rows = [{"prompt": f"Name the number {n}.", "completion": str(n)} for n in range(20)]
    folder.mkdir()
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "ask.csv").write_text("prompt\nName a number.\n")
    training = {"max_steps": 2, "per_device_train_batch_size": 2, "lr_scheduler_type": "constant", "seed": 7}
    values = {
        "model": {"path": str(ALIGNED)},
        "data": [{"path": "rows.jsonl"}],
        "peft": {"r": 2, "target_modules": ["q_proj"]},
        "safety": None,
        "training": training,
        "evaluation": {"prompts": [{"path": "ask.csv", "kind": "harmful"}], "max_new_tokens": 2},
        "output": str(folder / "end"),
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(values))
    return path


def commanded(folder: Path, recipe: Path, callback: Any, options: tuple[str, ...] = ()) -> None:
    from safe_trainer.cli import app
    from safe_trainer.recipe import run as running

    made = running.make_trainer

    def asking(*args: Any, **kwargs: Any) -> SafeSFTTrainer:
        trainer = made(*args, **kwargs)
        kind, *given = callback
        trainer.add_callback(kind(*given))
        return trainer

    running.make_trainer = asking
    sys.argv[1:] = ["train", str(recipe), *options]
    app(prog_name="safe-trainer")


def command(recipe: Path, callback: Any, *options: str) -> tuple[int, str]:
    process = PROCESSES.Process(target=logged, args=(commanded, recipe.parent, recipe, callback, options))
    process.start()
    process.join(240)
    return process.exitcode, recipe.with_name("log").read_text()


NEVER = (Ask, -1, "on_step_begin", [])


@pytest.mark.exhaustive
@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_command_that_is_stopped_in_its_last_step_saves_and_compares_when_it_goes_on(number, code, tmp_path):
    whole, broken = recipe_of(tmp_path / "whole"), recipe_of(tmp_path / "broken")
    assert command(whole, NEVER)[0] == 0
    found, told = command(broken, (Ask, 1, "on_optimizer_step", [signal.Signals[number]]))
    assert found == code, told
    assert "Traceback" not in told and "train(" not in told
    again = f"Resume with: safe-trainer train {broken} --resume"
    assert "stopped after step 2 and saved `" in told and again in told
    assert not (broken.parent / "end" / "adapter_model.safetensors").exists()
    found, told = command(broken, NEVER, "--resume")
    assert found == 0, told
    assert (broken.parent / "end" / "comparison.json").exists()
    assert_same(broken.parent, whole.parent)


@pytest.mark.slow
def test_a_second_ctrl_c_in_a_command_says_where_it_was(tmp_path):
    recipe = recipe_of(tmp_path / "run")
    found, told = command(recipe, (Ask, 1, "on_step_begin", [signal.SIGINT, signal.SIGINT]))
    assert found == 130 and "Stopped after step 1." in told and "Traceback" not in told, told


class NoRoom(TrainerCallback):
    """From the end of training on, lets no file grow beyond a limit, as the kernel does when the disk is full."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


@pytest.mark.exhaustive
def test_a_full_disk_behind_training_is_told_and_gone_on_from(tmp_path):
    recipe = recipe_of(tmp_path / "run")
    found, told = command(recipe, (NoRoom,))
    assert found == 1 and "Traceback" not in told, told
    output = recipe.parent / "end"
    assert f"What was trained could not be saved in `{output}` (" in told
    assert f"The last checkpoint, `{output / 'checkpoint-2'}`, is intact. Free some space" in told
    assert f"resume with: safe-trainer train {recipe} --resume" in told
    found, told = command(recipe, NEVER, "--resume")
    assert found == 0 and (output / "comparison.json").exists(), told


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "recipe.yaml"])
def test_what_stands_in_the_way_of_the_result_is_told(name, tmp_path):
    recipe = recipe_of(tmp_path / "run")
    (recipe.parent / "end" / name).mkdir(parents=True)
    found, told = command(recipe, NEVER)
    assert found == 1 and "could not be saved in" in told and "is intact. Free some space or make" in told, told


@pytest.mark.exhaustive
def test_a_run_without_checkpoints_that_cannot_be_saved_says_so(tmp_path):
    recipe = recipe_of(tmp_path / "run")
    found, told = command(recipe, (NoRoom,), "--set", "training.save_strategy='no'")
    assert found == 1 and f"There is no checkpoint in `{recipe.parent / 'end'}`" in told and "--resume" not in told, (
        told
    )
