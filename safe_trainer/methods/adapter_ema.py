"""The moving average of the trained weights: a baseline that needs no data, only an average."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..distributed import from_first_process
from ..evaluation.state import check_replaces_alone
from .base import check_number

logger = logging.getLogger(__name__)

_KEY = "adapter_ema"
"""Where an average is kept: with the optimizer's state of its weight, so that it is saved and resumed with it."""


class AdapterEMA(TrainerCallback, ExportableState):
    """Train as usual, and end with the exponential moving average of the trained weights.

    A plain `TrainerCallback`, for TRL's own `SFTTrainer` as well. The average starts from the weights before training
    and follows them with each optimizer step, `average = decay · average + (1 − decay) · weights`, in float32 on
    their device. When training ends it takes their place; until then evaluation and checkpoints see the weights
    themselves, and the average is in a checkpoint's optimizer state, from which a run resumes. For DDP and FSDP2.

    A baseline for safety methods: an average moves less, so it forgets less and also learns less. With few steps it
    is mostly the start, whose share, `decay ** steps`, is logged.

    Args:
        decay (`float`, *optional*, defaults to `0.99`): Between 0 and 1; the average reaches back about
            `1 / (1 − decay)` steps.

    Raises:
        ValueError: If `decay` is out of its range; when training begins, if DeepSpeed is in use, if the best
            checkpoint is to be loaded or saved, or if a run resumes with another `decay` or without an average.

    Example:

    ```python
    trainer = SFTTrainer(model, train_dataset=rows, peft_config=LoraConfig(), callbacks=[AdapterEMA(0.98)])
    ```

    Source: Kim et al., "Rethinking Safety in LLM Fine-tuning: An Optimization Perspective", COLM 2025, arXiv
    2508.12531. The default is ours.
    """

    replaces_weights = True

    def __init__(self, decay: float = 0.99) -> None:
        self.decay = decay
        check_number(self, "decay", "The default is 0.99.", above=0)
        if decay >= 1:
            raise ValueError(f"`decay` must be below 1, got {decay}. The default is 0.99.")
        self._averages: dict[nn.Parameter, Tensor] = {}

    def state(self) -> dict[str, Any]:
        """Return what transformers saves."""
        return {"args": {"decay": self.decay}, "attributes": {}}

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Start from the weights, or from the average in the optimizer's state of a run that resumes."""
        self._check(args, state)
        trained = [weight for group in optimizer.param_groups for weight in group["params"] if weight.requires_grad]
        saved = [optimizer.state.get(weight, {}).get(_KEY) for weight in trained]
        if state.global_step and any(isinstance(weight, DTensor) for weight in trained):
            # Complete, and on the first process alone: torch spreads only what the optimizer itself keeps.
            saved = from_first_process([None if average is None else average.cpu() for average in saved])
        if state.global_step and not any(average is not None for average in saved):
            raise ValueError(
                "The checkpoint holds no average for `AdapterEMA`: it was made without it, or without the optimizer's "
                "state. Resume without the callback, or start a new run."
            )
        self._averages = {weight: _placed(average, weight) for weight, average in zip(trained, saved, strict=True)}
        state.stateful_callbacks[type(self).__name__] = self.state()

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Let the average follow, unless float16 overflowed and the step was skipped."""
        if getattr(optimizer, "step_was_skipped", False):
            return
        for weight, average in self._averages.items():
            average.lerp_(weight.detach().float(), 1 - self.decay)
            # An optimizer makes the state of a weight with its first gradient, and only where there is none yet.
            if weight.grad is not None or optimizer.state.get(weight):
                optimizer.state[weight][_KEY] = average

    @torch.no_grad()
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the average in the weights' place."""
        for weight, average in self._averages.items():
            weight.copy_(average)
        self._averages = {}
        logger.info(
            "The trained weights are now their moving average over %d steps; %.1f %% of it is the start.",
            state.global_step,
            100 * self.decay**state.global_step,
        )

    def _check(self, args: Any, state: Any) -> None:
        if args.deepspeed_plugin is not None:
            raise ValueError("`AdapterEMA` does not work with DeepSpeed, which splits weights its own way. Use FSDP2.")
        check_replaces_alone("`AdapterEMA`", "the callback", args)
        saved = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step and saved and saved["args"]["decay"] != self.decay:
            raise ValueError(
                f"`decay` of `AdapterEMA` was {saved['args']['decay']} in the checkpoint and is {self.decay}. Resume "
                "with the same."
            )


def _placed(average: Tensor | None, weight: nn.Parameter) -> Tensor:
    """Return an average in float32 as its weight is placed; the weight itself where there is none yet."""
    if average is None:
        return weight.detach().float().clone()
    if isinstance(weight, DTensor) and not isinstance(average, DTensor):
        average = distribute_tensor(average, weight.device_mesh, weight.placements)
    return average.float()
