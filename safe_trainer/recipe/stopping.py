"""Ctrl-C while a recipe trains: the step is finished and a checkpoint saved, from which the run can go on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback


class Stopper(TrainerCallback):
    """Ends training behind a step, with a checkpoint, once it has been asked to.

    Attributes:
        asked (`bool`): Whether Ctrl-C was pressed.
        step (`int`): The step behind which training ended; 0 if it was not ended here.
    """

    def __init__(self) -> None:
        self.asked = False
        self.step = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop; behind the last step there is nothing to stop."""
        if self.asked and state.global_step < state.max_steps:
            self.step = state.global_step
            control.should_save = control.should_training_stop = True


@contextmanager
def stopping(trainer: Any, tell: Callable[[], None]) -> Iterator[Stopper]:
    """Turn the first Ctrl-C into the end of training behind the current step; a second one ends it at once.

    With several processes, and outside the main thread, Ctrl-C does what it does without: the processes could not
    agree on a step to stop behind.

    Args:
        trainer (`transformers.Trainer`): What trains meanwhile.
        tell (`Callable[[], None]`): Is called at the first Ctrl-C.
    """
    stopper = Stopper()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or threading.current_thread() is not threading.main_thread():
        yield stopper
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: FrameType | None) -> None:
        stopper.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tell()

    trainer.add_callback(stopper)
    signal.signal(signal.SIGINT, ask)
    try:
        yield stopper
    finally:
        signal.signal(signal.SIGINT, before)
        trainer.remove_callback(stopper)
