"""Checkpoints: which one is complete, what a resumed run must share with the one before, and stopping with one.

A trainer writes `trainer_state.json` last, so a checkpoint that has it is complete. A run with safety methods writes
its fingerprint into it: the methods' settings, what their tensors were made from, and how it was launched.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint

from .distributed import Strategy, is_distributed, on_first_process
from .lora.io import adapter_differences
from .methods.base import SafetyMethod
from .methods.fingerprint import differences, settings_of

logger = logging.getLogger(__name__)

LAUNCH = "launch"
"""Next to the methods' names: the number of processes and the distributed strategy."""
_STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_NEW_RUN = """To train with other settings, start a new run from its weights, of an adapter merged by `safe-trainer \
export`, or from the base model. What it has lost of its refusals already is not brought back."""
_INSTEAD = f"Resume with those of the checkpoint. {_NEW_RUN}"


def checkpoints_of(output: str | Path) -> list[Path]:
    """Return the checkpoints in a run's `output_dir`, from the first to the last."""
    if not Path(output).is_dir():
        return []
    named = [(int(match[1]), path) for path in Path(output).iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(named) if path.is_dir()]


def is_complete(checkpoint: str | Path) -> bool:
    """Return whether a checkpoint was saved to the end: its `trainer_state.json`, written last, is intact."""
    return _state_of(Path(checkpoint)) is not None


def last_checkpoint(output: str | Path) -> str | None:
    """Return the last complete checkpoint in a run's `output_dir`, or `None` if there is none at all."""
    found, last = checkpoints_of(output), last_complete(output)
    cut = ", ".join(f"`{path.name}`" for path in (found[found.index(last) + 1 :] if last else found))
    if last is None:
        if not found:
            return None
        raise ValueError(
            f"`{output}` holds no complete checkpoint: saving {cut} was interrupted, by a kill or a full disk. Remove "
            "it, and start the run again without resuming."
        )
    if cut:
        message = "Saving %s was interrupted (a kill, a full disk); resuming from %s, the last complete checkpoint."
        logger.warning(message, cut, last.name)
    return str(last)


def last_complete(output: str | Path) -> Path | None:
    """Return the last complete checkpoint in a run's `output_dir`, if there is any."""
    return next(filter(is_complete, reversed(checkpoints_of(output))), None)


def _state_of(checkpoint: Path) -> dict[str, Any] | None:
    try:
        state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return state if isinstance(state, dict) and isinstance(state.get("global_step"), int) else None


@contextmanager
def saving(checkpoint: str | Path, is_first_process: bool) -> Iterator[None]:
    """Surround the saving of a checkpoint: one that cannot be written is removed, and the error says what to do."""
    checkpoint = Path(checkpoint)
    try:
        if is_first_process:  # one of this name may be left from a run that was resumed from an earlier one
            (checkpoint / _STATE).unlink(missing_ok=True)
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_of_the_disk(error) or is_complete(checkpoint):
            raise  # if it is complete, something after it failed, such as the removal of an older one
        if is_first_process:
            shutil.rmtree(checkpoint, ignore_errors=True)  # it takes the room that is missing
        number = error.errno if isinstance(error, OSError) else errno.EIO
        raise OSError(
            number,
            f"The checkpoint `{checkpoint}` could not be saved ({error}) and was removed. Earlier checkpoints are "
            "intact. Free some space or make the folder writable, lower `save_total_limit` or set "
            "`save_only_model=True`, and resume with `train(resume_from_checkpoint=True)`.",
        ) from error


def _is_of_the_disk(error: Exception) -> bool:
    """Return whether writing failed, which torch and safetensors report by their own exceptions."""
    words = ("No space left", "File too large", "I/O error", "IoError", "iostream error", "inline_container")
    return isinstance(error, OSError) or any(word in str(error) for word in words)


class RunFingerprint(TrainerCallback, ExportableState):
    """What a run with methods shares with the runs that resume it: by method its settings and `made_from`; the launch.

    Made after `attach`, when all rows are hashed: a file may change or go while the model is trained.
    """

    def __init__(
        self, methods: Sequence[SafetyMethod] = (), strategy: Strategy | None = None, processes: int = 1
    ) -> None:
        self.content: dict[str, Any] = settings_of(methods)
        if strategy is not None:
            self.content[LAUNCH] = {"processes": processes, "strategy": strategy.name}

    @property
    def methods(self) -> list[str]:
        """The names of the methods."""
        return [name for name in self.content if name != LAUNCH]

    def state(self) -> dict[str, Any]:
        """Return what transformers saves."""
        return {"args": {}, "attributes": self.content}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Register in the state of a run that was resumed from a checkpoint without a fingerprint."""
        state.stateful_callbacks[type(self).__name__] = self.state()


def resolve_checkpoint(
    wanted: Any,
    output: str | Path,
    fingerprint: RunFingerprint,
    model: nn.Module,
    chat_template: str | Mapping[str, str] | None = None,
) -> Any:
    """Return what to resume from (`wanted`, or for `True` the last complete checkpoint), the same in all processes.

    Without methods the choice is left to transformers, and only a checkpoint that was made with methods is refused.

    Raises:
        ValueError: If the checkpoint is incomplete, another process does not find it, or it was made with other
            methods, settings, processes, chat template or another adapter; says which.
    """
    if not wanted:
        return wanted
    if not fingerprint.methods:
        folder = get_last_checkpoint(str(output)) if wanted is True and Path(output).is_dir() else wanted
        if isinstance(folder, (str, os.PathLike)):
            _check_fingerprint(Path(folder), fingerprint)
        return wanted
    found = on_first_process(lambda: _resolve(wanted, Path(output), fingerprint, model, chat_template))
    folder = Path(output) / found if isinstance(found, Path) else found
    if on_first_process(lambda: isinstance(folder, str | os.PathLike) and Path(folder).is_dir()):
        _check_in_all_processes(Path(folder), fingerprint)
    return str(folder) if isinstance(found, Path) else folder


def _resolve(
    wanted: Any,
    output: Path,
    fingerprint: RunFingerprint,
    model: nn.Module,
    chat_template: str | Mapping[str, str] | None,
) -> Any:
    """Return the checkpoint: its name if it is in `output`, which other machines may call otherwise, or as given."""
    if wanted is True:
        wanted = last_checkpoint(output) or wanted
    if not isinstance(wanted, (str, os.PathLike)) or not Path(wanted).is_dir():
        return wanted  # nothing is there, which transformers reports
    checkpoint = Path(wanted)
    if not is_complete(checkpoint):
        complete = last_complete(checkpoint.parent)
        instead = f"Resume from `{complete}`" if complete else "Start the run again without resuming"
        raise ValueError(
            f"`{checkpoint}` is incomplete: its `{_STATE}`, which is written last, is missing or damaged. Saving it "
            f"was interrupted, by a kill or a full disk. {instead}, and remove this one."
        )
    _check_fingerprint(checkpoint, fingerprint)
    _check_template(checkpoint, chat_template)
    _check_kind(checkpoint, model)
    _check_start(checkpoint, model)
    return Path(checkpoint.name) if checkpoint.parent == output else wanted


def _check_in_all_processes(folder: Path, fingerprint: RunFingerprint) -> None:
    """Refuse in all processes what one of them does not find on its disk, or lacks its random state for."""
    rank, own = (dist.get_rank(), f"rng_state_{dist.get_rank()}.pth") if is_distributed() else (0, "rng_state.pth")
    problem = None
    if rank and not is_complete(folder):  # a machine with its own disk may hold only its random states
        problem = (
            f"Process {rank} does not find the checkpoint of process 0, `{folder}`. On several machines, put "
            "`output_dir` on a disk that they share, or copy the checkpoint to all of them."
        )
    elif LAUNCH in fingerprint.content and any(folder.glob("rng_state*.pth")) and not (folder / own).is_file():
        problem = (
            f"`{folder}` holds no `{own}`, the random state of process {rank}: it was made by another number of "
            "processes, or the file was lost. Launch as many as it was made by; on several machines, copy the "
            "checkpoint of each to all of them."
        )
    problems = [problem]
    if is_distributed():
        problems *= dist.get_world_size()
        dist.all_gather_object(problems, problem)
    if any(problems):
        raise ValueError(next(filter(None, problems)))


def _check_fingerprint(checkpoint: Path, fingerprint: RunFingerprint) -> None:
    """Compare the settings that a checkpoint was made with to those of the run that resumes it."""
    callbacks = (_state_of(checkpoint) or {}).get("stateful_callbacks")
    kept = callbacks.get(RunFingerprint.__name__) if isinstance(callbacks, dict) else None
    saved, current = kept.get("attributes") if isinstance(kept, dict) else {}, dict(fingerprint.content)
    if not isinstance(saved, dict) or not all(isinstance(settings, dict) for settings in saved.values()):
        raise ValueError(damaged(checkpoint, f"`{_STATE}` does not hold the settings of methods by their names"))
    if not saved:
        if fingerprint.methods:
            names = " and ".join(fingerprint.methods)
            raise ValueError(f"`{checkpoint}` was made without {names}, by TRL or with `safety=None`. {_INSTEAD}")
        return
    before, now = saved.pop(LAUNCH, None), current.pop(LAUNCH, None)
    if found := "; ".join(differences(saved, current)):
        raise ValueError(f"`{checkpoint}` was made with other safety methods or settings: {found}. {_INSTEAD}")
    if before and now and before != now:
        raise ValueError(
            f"`{checkpoint}` was made by {_launch(before)}, and this run has {_launch(now)}: neither the optimizer's "
            f"state nor the random numbers would continue. Launch as many processes with the same strategy. {_NEW_RUN}"
        )


def _launch(launch: Mapping[str, Any]) -> str:
    count = launch.get("processes")
    return "one process" if count == 1 else f"{count} processes with {launch.get('strategy')}"


def _check_template(checkpoint: Path, chat_template: str | Mapping[str, str] | None) -> None:
    """Refuse other chat templates, by name, than those that the checkpoint's tokenizer was saved with."""
    files = {"default": checkpoint / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted(checkpoint.glob("additional_chat_templates/*.jinja"))}
    saved = {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.is_file()}
    if not saved or chat_template is None:
        return
    templates = {"default": chat_template} if isinstance(chat_template, str) else chat_template
    # Files are read with one kind of line ends.
    now = {name: template.replace("\r\n", "\n").replace("\r", "\n") for name, template in templates.items()}
    for name in sorted(saved.keys() | now.keys()):
        if saved.get(name) != now.get(name):
            raise ValueError(
                f"`{checkpoint}` was made with another chat template, `{files.get(name, files['default']).name}` in "
                f"it, than the tokenizer has now: the same rows would be other tokens. {_INSTEAD}"
            )


def _check_kind(checkpoint: Path, model: nn.Module) -> None:
    """Refuse a checkpoint of other trained weights, which transformers does not notice or reports unclearly."""
    if not isinstance(model, PeftModel):
        if (checkpoint / "adapter_config.json").is_file():
            raise ValueError(f"`{checkpoint}` holds an adapter, and this run trains all weights. {_INSTEAD}")
        return
    name = model.active_adapters[0]
    folder = checkpoint if name == "default" else checkpoint / name
    config = folder / "adapter_config.json"
    if config.is_file():
        try:
            saved = json.loads(config.read_text(encoding="utf-8"))
            found = "; ".join(adapter_differences(saved, folder, model))
        except (ValueError, SafetensorError) as error:
            raise ValueError(damaged(folder, error)) from error
        if found:
            raise ValueError(f"`{checkpoint}` was made with other settings of the adapter: {found}. {_INSTEAD}")
    elif any(checkpoint.glob("model*.safetensors")):
        raise ValueError(f"`{checkpoint}` holds all weights, and this run trains an adapter. {_INSTEAD}")


def _check_start(checkpoint: Path, model: nn.Module) -> None:
    """Refuse a model that was loaded from a checkpoint of the run: what methods measure would not be its start."""
    own, files = dict(model.named_parameters()), "model*.safetensors"
    if isinstance(model, PeftModel):
        own, files = get_peft_model_state_dict(model, save_embedding_layers=False), "adapter_model.safetensors"
    for saved in dict.fromkeys([checkpoint, *checkpoints_of(checkpoint.parent)]):
        if (_state_of(saved) or {"global_step": 0})["global_step"] < 2:  # the first step of a warmup changes nothing
            continue
        try:
            same = _are_in(own, sorted(saved.glob(files)))
        except SafetensorError as error:
            if saved != checkpoint:  # from which nothing is read
                continue
            raise ValueError(damaged(saved, error)) from error
        if same:
            raise ValueError(
                f"The model has the weights of `{saved}` already, so the methods would take what was trained for the "
                "model before training. Give the model that the run began with: the base model and `peft_config`, or "
                "the adapter or weights that it started from."
            )


def _are_in(weights: Mapping[str, torch.Tensor], files: list[Path]) -> bool:
    """Return whether files hold these very weights, as far as they hold any of them."""
    compared = 0
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in sorted(weights.keys() & set(opened.keys())):
                weight, saved = weights[name].detach(), opened.get_tensor(name)
                if isinstance(weight, DTensor) or not torch.equal(weight.cpu(), saved):
                    return False
                compared += 1
    return compared > 0


def damaged(checkpoint: str | Path, error: Exception | str) -> str:
    """Return the message for a checkpoint whose files cannot be read."""
    return f"`{checkpoint}` is damaged ({error}). Copy the checkpoint again, or resume from an earlier one."


class GracefulStop(TrainerCallback):
    """Ends training after the current step, with a checkpoint, once a signal has reached one of the processes."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None  # by this process
        self.agreed: signal.Signals | None = None  # by all
        self._saved = -1  # the step of the last checkpoint

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop."""
        if self._is_agreed(args.device):
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save if a signal came since the last step, or its checkpoint was not saved."""
        if self._is_agreed(args.device) and self._saved < state.global_step:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the step; a run that stops here is not at its end, so no best model is loaded and none removed."""
        self._saved = state.global_step
        if self.agreed is not None:
            args.load_best_model_at_end, args.save_total_limit = False, None

    def lacks_checkpoint(self, trainer: Any) -> bool:
        """Return whether training ended and was to stop, without a checkpoint of its last step."""
        # The signal came after the last step, or only the best are saved; a best model loaded by now is not the last.
        lacks = self._is_agreed(trainer.args.device) and self._saved < trainer.state.global_step
        return lacks and not trainer.args.load_best_model_at_end

    def message(self, trainer: Any, resume_command: str) -> str:
        """Return which step was the last, where its checkpoint is, and how to resume."""
        assert self.agreed is not None
        step, output = trainer.state.global_step, trainer.args.output_dir
        folder = os.path.join(output, f"checkpoint-{step}")
        saved = f"saved `{folder}`" if os.path.isdir(folder) else f"the last checkpoint is in `{output}`"
        anyway = ' (although `save_strategy="no"`)' if trainer.args.save_strategy == "no" else ""
        by = "Ctrl-C" if self.agreed == signal.SIGINT else self.agreed.name
        return f"Received {by}: stopped after step {step} and {saved}{anyway}. Resume with: {resume_command}"

    def _is_agreed(self, device: torch.device) -> bool:
        """Return the same in all processes: signals reach them in different steps, or only one of them."""
        if self.agreed is None:
            number = int(self.received or 0)
            if is_distributed():
                largest = torch.tensor(number, device=device)
                dist.all_reduce(largest, dist.ReduceOp.MAX)
                number = int(largest.item())
            self.agreed = signal.Signals(number) if number else None
        return self.agreed is not None


@contextmanager
def graceful_stop(trainer: Any, resume_command: str) -> Iterator[GracefulStop]:
    """Let the first Ctrl-C or SIGTERM end training after the current step; a second one ends it at once.

    With several processes all stop after the same step, and a second signal changes nothing: their launcher repeats
    the first. A signal that already has a handler is left to it; outside the main thread all are.

    Raises:
        KeyboardInterrupt: When all is done, if Ctrl-C has stopped training.
        SystemExit: When all is done, if SIGTERM has: with 143, as a shell expects.
    """
    stop, args = GracefulStop(), trainer.args
    trainer.add_callback(stop)
    ending = args.load_best_model_at_end, args.save_total_limit
    try:
        with _signal_handlers(stop, trainer.is_world_process_zero()):
            yield stop
    finally:
        trainer.remove_callback(stop)
        args.load_best_model_at_end, args.save_total_limit = ending
    if stop.agreed is not None:
        message = stop.message(trainer, resume_command)
        if trainer.is_world_process_zero():
            logger.warning(message)
        raise KeyboardInterrupt(message) if stop.agreed == signal.SIGINT else SystemExit(128 + stop.agreed)
    if stop.received is not None:  # too late for training to be stopped by it
        signal.raise_signal(stop.received)


@contextmanager
def _signal_handlers(stop: GracefulStop, is_first_process: bool) -> Iterator[None]:
    """Handle the signals that have no other handler."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    is_main = threading.current_thread() is threading.main_thread()
    ours = {number: free for number, free in defaults.items() if is_main and signal.getsignal(number) == free}
    is_alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    process = os.getpid()

    def receive(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a process that this one has started, such as a data loader
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        if stop.received is None and is_first_process:
            again = " Press Ctrl-C again to quit without saving." if is_alone else ""
            logger.warning("Stopping after this step; a checkpoint will be saved.%s", again)
        stop.received = signal.Signals(number)
        for each in ours if is_alone else ():
            signal.signal(each, signal.default_int_handler)

    for number in ours:
        signal.signal(number, receive)
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
