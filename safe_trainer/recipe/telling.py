"""What a run says while it trains: where it is, and one short line for each entry of the trainer's log."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

SHOWN = ("loss", "safety_penalty", "eval_loss", "mean_token_accuracy", "learning_rate")
DRIFT, REFUSED = "drift/relative", "_refused"  # what the monitors log that is told as well


class Teller(TrainerCallback):
    """Tells of steps and of what is logged.

    Args:
        step (`Callable[[int, int], None]`): Is called with (done, total) steps.
        line (`Callable[[str], None]`): Is called with one line for each entry of the log that has a loss, or
            what a monitor measured.
    """

    def __init__(self, step: Callable[[int, int], None], line: Callable[[str], None]) -> None:
        self.step, self.line = step, line

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell where training is."""
        self.step(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell what was logged, without what only a plot can show; all of it is in the trainer's own log."""
        if not state.is_local_process_zero:
            return
        logs: Mapping[str, Any] = kwargs.get("logs") or {}
        values = {name: float(logs[name]) for name in SHOWN if name in logs}
        watched = {name: float(logs[name]) for name in logs if name == DRIFT or name.endswith(REFUSED)}
        if "loss" in values or "eval_loss" in values or watched:
            told = ", ".join(
                [f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items()]
                + [f"{_called(name)} {value:.1%}" for name, value in watched.items()]
            )
            self.line(f"step {state.global_step} of {state.max_steps}: {told}")


def _called(name: str) -> str:
    return "weights moved by" if name == DRIFT else name.removeprefix("safety/").replace("_", " ")


def tell(trainer: Any, step: Callable[[int, int], None], line: Callable[[str], None]) -> None:
    """Put a [`Teller`] in the place of what transformers prints to standard output, which is for results.

    Args:
        trainer (`transformers.Trainer`): What is going to train.
        step (`Callable[[int, int], None]`): As for [`Teller`].
        line (`Callable[[str], None]`): As for [`Teller`].
    """
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    trainer.add_callback(Teller(step, line))
