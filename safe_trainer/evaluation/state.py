"""A model is examined without being changed: its modes and everybody's random numbers are put back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..distributed import Strategy


@contextmanager
def examining(model: Any, seed: int = 0) -> Iterator[None]:
    """Put a model into evaluation mode and seed torch; afterwards everything is as it was."""
    import torch

    from ..lora.modes import evaluation_mode

    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), evaluation_mode(model):
        torch.manual_seed(seed)
        yield


def log_between(trainer: Any, values: Mapping[str, float]) -> None:
    """Write into a trainer's logs from a callback, without touching the training log of the same step."""
    # Logging in between must not cost the training log of this step: it clears the flag that asks for it, and, with
    # the model in training mode, SFTTrainer would spend on it what it has collected for that log.
    due = trainer.control.should_log
    with examining(trainer.model):
        trainer.log(dict(values))
    trainer.control.should_log = due


def is_due(state: Any, every: int) -> bool:
    """Return whether a monitor measures after this step: every few, and the last, before the best takes its place."""
    return bool(state.global_step % every == 0 or state.global_step >= state.max_steps)


def check_replaces_alone(who: str, what: str, args: Any, others: Iterable[Any] = ()) -> None:
    """Refuse what would overwrite the weights that a callback puts in place at the end, or be overwritten by it.

    Args:
        who (`str`): The callback, for the message.
        what (`str`): What of it can be left out instead.
        args (`TrainingArguments`): Which may ask for the best checkpoint.
        others (`Iterable[TrainerCallback]`, *optional*): Callbacks of the same training; one that does so, too, says
            it by an attribute `replaces_weights`.
    """
    if args.load_best_model_at_end or args.save_strategy == "best":
        raise ValueError(
            f"{who} replaces the weights at the end, so no best checkpoint can be kept or loaded. Remove "
            f'`load_best_model_at_end` and `save_strategy="best"`, or {what}.'
        )
    for other in others:
        if getattr(other, "replaces_weights", False):
            raise ValueError(
                f"{who} replaces the weights at the end, and so does `{type(other).__name__}`: the one would undo the "
                f"other. Remove that callback, or {what}."
            )


def watchable(trainer: Any, monitor: str, afterwards: str) -> Strategy:
    """Return how a training is spread over processes, if its model can be watched meanwhile.

    A `ValueError` names what to use instead: another strategy, or `afterwards`, a command that measures the same
    later.
    """
    from ..distributed import SPLIT_AT_LOADING, strategy_of

    strategy = strategy_of(trainer.accelerator, trainer.model)
    ways = {
        "FSDP1": "Use FSDP2 (`fsdp_version: 2` in the configuration of accelerate)",
        "ZeRO-3": "Use FSDP2, ZeRO-2 or DDP",
        SPLIT_AT_LOADING: "Load the whole model in each process and use FSDP2, ZeRO-2 or DDP",
    }
    if strategy.name in ways:
        raise ValueError(
            f"{monitor} does not work under {strategy.name}, where no process can look at the model as a whole. "
            f"{ways[strategy.name]}, or measure when training has ended, with `{afterwards}`."
        )
    return strategy
