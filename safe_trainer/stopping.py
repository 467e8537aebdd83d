"""Ctrl-C and SIGTERM while a model trains: the step is finished and a checkpoint saved, to go on from.

SIGTERM is what a cluster's scheduler sends before it takes the machine away.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

UNTAKEN = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
"""The signals that stop training, each with the handler by which nobody else has taken it."""


class Stopper(TrainerCallback):
    """Ends training behind a step, with a checkpoint, once it has been asked to.

    Attributes:
        asked (`signal.Signals` or `None`): The signal that has reached this process.
        agreed (`signal.Signals` or `None`): The signal for which all processes stop.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.agreed: signal.Signals | None = None
        self._saved = -1  # the step of the last checkpoint

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop."""
        if self._is_agreed(args.device):
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save if that was asked for since, or did not come about."""
        if self._is_agreed(args.device) and self._saved < state.global_step:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Know of the checkpoint; a run that stops here is not at its end, so nothing is loaded or removed for it."""
        self._saved = state.global_step
        if self.agreed is not None:
            args.load_best_model_at_end, args.save_total_limit = False, None

    def lacks_checkpoint(self, trainer: Any) -> bool:
        """Return whether training has ended, was to stop, and there is no checkpoint of its end.

        So it is if the signal came behind the last step, or only the best checkpoints are saved. Where the best model
        is loaded at the end, it is too late for one.
        """
        lacks = self._is_agreed(trainer.args.device) and self._saved < trainer.state.global_step
        return lacks and not trainer.args.load_best_model_at_end

    def message(self, trainer: Any, go_on: str) -> str:
        """Say which step is the last, where its checkpoint is, and how to go on."""
        assert self.agreed is not None
        by = {signal.SIGINT: "Ctrl-C"}.get(self.agreed, self.agreed.name)
        step, output = trainer.state.global_step, trainer.args.output_dir
        folder = os.path.join(output, f"checkpoint-{step}")
        kept = f"the checkpoint is `{folder}`" if os.path.isdir(folder) else f"the last checkpoint is in `{output}`"
        anyway = ', in spite of `save_strategy="no"`' if trainer.args.save_strategy == "no" else ""
        return f"Stopped by {by} behind step {step}; {kept}{anyway}. Go on with: {go_on}"

    def _is_agreed(self, device: torch.device) -> bool:
        """Return the same in all processes: signals reach them in different steps, or only one of them."""
        if self.agreed is None:
            number = int(self.asked or 0)
            if dist.is_available() and dist.is_initialized():
                largest = torch.tensor(number, device=device)
                dist.all_reduce(largest, dist.ReduceOp.MAX)
                number = int(largest.item())
            self.agreed = signal.Signals(number) if number else None
        return self.agreed is not None


@contextmanager
def stopping(trainer: Any, go_on: str) -> Iterator[Stopper]:
    """Turn the first Ctrl-C or SIGTERM into the end of training behind the current step; a second one ends it at once.

    With several processes all stop behind the same step, and a second signal changes nothing: their launcher repeats
    the first, and ends them itself if they take too long. Signals that somebody else has taken, and all of them
    outside the main thread, do what they do without.

    Args:
        trainer (`transformers.Trainer`): What trains meanwhile.
        go_on (`str`): The command with which the run goes on, for messages.

    Raises:
        KeyboardInterrupt: When all is done, if Ctrl-C has stopped training.
        SystemExit: When all is done, if SIGTERM has: with 143, as a shell expects.
    """
    stopper = Stopper()
    trainer.add_callback(stopper)
    args = trainer.args
    ending = args.load_best_model_at_end, args.save_total_limit
    try:
        with _handled(stopper, trainer):
            yield stopper
    finally:
        trainer.remove_callback(stopper)
        args.load_best_model_at_end, args.save_total_limit = ending
    if stopper.agreed is not None:
        told = stopper.message(trainer, go_on)
        if trainer.is_world_process_zero():
            logger.warning(told)
        raise KeyboardInterrupt(told) if stopper.agreed == signal.SIGINT else SystemExit(128 + stopper.agreed)
    if stopper.asked is not None:  # too late for training to be stopped by it
        signal.raise_signal(stopper.asked)


@contextmanager
def _handled(stopper: Stopper, trainer: Any) -> Iterator[None]:
    """Let the stopper hear of the signals that nobody else has taken."""
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: free for number, free in UNTAKEN.items() if is_main and signal.getsignal(number) == free}
    is_alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    process = os.getpid()

    def ask(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # one that this has started, such as a loader of data
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        if stopper.asked is None and trainer.is_world_process_zero():
            again = " Once more stops at once and loses it." if is_alone else ""
            logger.warning("Stopping: a checkpoint is saved behind this step.%s", again)
        stopper.asked = signal.Signals(number)
        for each in before if is_alone else ():
            signal.signal(each, signal.default_int_handler)

    for number in before:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
