"""The trainer's events, handed on to a run's callbacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

if TYPE_CHECKING:
    from .run import RunCallbacks


class Events(TrainerCallback):
    """Hands steps and log entries to `shown`, and asks `asked` in every process whether to stop."""

    def __init__(self, asked: RunCallbacks, shown: RunCallbacks) -> None:
        self.asked, self.shown, self.stopped = asked, shown, False

    def replace_printers(self, trainer: Any) -> None:
        """Take the place of what transformers prints to standard output, which is for results."""
        for printer in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(printer)
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report how many steps there will be."""
        self.shown.progress(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the step; stop after it, with a checkpoint, if that is asked for."""
        self.shown.progress(state.global_step, state.max_steps)
        if self.asked.should_stop():
            self.stopped = control.should_training_stop = control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report an entry of the log."""
        numbers = {name: v for name, v in (kwargs.get("logs") or {}).items() if isinstance(v, int | float)}
        self.shown.log({"step": state.global_step, "max_steps": state.max_steps, **numbers})
