"""Ctrl-C and SIGTERM while a recipe trains: the step is finished and a checkpoint saved, to go on from.

SIGTERM is what a cluster's scheduler sends before it takes the machine away.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback


class Stopper(TrainerCallback):
    """Ends training behind a step, with a checkpoint, once it has been asked to.

    Attributes:
        asked (`signal.Signals` or `None`): The signal that asked.
        step (`int`): The step behind which training ended; 0 if it was not ended here.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.step = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop; behind the last step there is nothing to stop."""
        if self._asked_anywhere(args.device) and state.global_step < state.max_steps:
            self.step = state.global_step
            control.should_save = control.should_training_stop = True

    def _asked_anywhere(self, device: torch.device) -> bool:
        """Return the same in all processes: signals reach them in different steps, or only one of them."""
        if not (dist.is_available() and dist.is_initialized()):
            return self.asked is not None
        asked = torch.tensor(int(self.asked is not None), device=device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return bool(asked.item())


@contextmanager
def stopping(trainer: Any, tell: Callable[[], None]) -> Iterator[Stopper]:
    """Turn the first Ctrl-C or SIGTERM into the end of training behind the current step; a second one ends it at once.

    With several processes all stop behind the same step, and a second signal changes nothing: their launcher repeats
    the first, and ends them itself if they take too long. Outside the main thread signals do what they do without.

    Args:
        trainer (`transformers.Trainer`): What trains meanwhile.
        tell (`Callable[[], None]`): Is called at the first signal.
    """
    stopper = Stopper()
    if threading.current_thread() is not threading.main_thread():
        yield stopper
        return
    is_alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        if stopper.asked is None:
            tell()
        stopper.asked = signal.Signals(number)
        for each in before if is_alone else ():
            signal.signal(each, signal.default_int_handler)

    trainer.add_callback(stopper)
    for number in before:
        signal.signal(number, ask)
    try:
        yield stopper
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        trainer.remove_callback(stopper)
