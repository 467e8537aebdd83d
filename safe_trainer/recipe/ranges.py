"""Ranges of TRL's and PEFT's settings: neither checks them before training has begun, or ever."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from .document import Place, Problem


class Range(NamedTuple):
    """Where a number may lie: from `least` to `most`, with both of them unless it must be `above` the least."""

    least: float
    most: float = math.inf
    above: bool = False

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:  # not a number, or of any size
            return False
        return self.least <= value <= self.most and not (self.above and value == self.least)

    def __str__(self) -> str:
        if self.most < math.inf:
            return f"a number from {self.least:,} to {self.most:,}"
        return f"{'above' if self.above else 'at least'} {self.least:g}"


_ANY, _POSITIVE, _COUNT, _SHARE = Range(0), Range(0, above=True), Range(1), Range(0, 1)
_SEED = Range(0, 2**32 - 1)
TRAINING = {
    "learning_rate": _ANY,
    "weight_decay": _ANY,
    "warmup_steps": _ANY,
    "warmup_ratio": _SHARE,
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_epsilon": _ANY,
    "label_smoothing_factor": _SHARE,
    "num_train_epochs": _POSITIVE,
    "max_steps": _COUNT,
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "max_length": _COUNT,
    "logging_steps": _ANY,
    "save_steps": _ANY,
    "save_total_limit": _ANY,
    "dataset_num_proc": _ANY,
    "dataloader_num_workers": _ANY,
    "seed": _SEED,
    "data_seed": _SEED,
}
PEFT = {"r": _COUNT, "lora_alpha": _POSITIVE, "lora_dropout": _SHARE}
_UNSET = {("max_steps", -1)}  # what TRL takes for not set, where it is not null


def check_ranges(settings: Mapping[str, Any], ranges: Mapping[str, Range], place: Place) -> list[Problem]:
    """Return a problem for each number that is out of its range; `None` is none.

    Args:
        settings (`Mapping[str, Any]`): The settings by name.
        ranges (`Mapping[str, Range]`): Their ranges; a setting that has none may be anything.
        place (`Place`): Where they stand.
    """
    return [
        Problem((*place, name), f"must be {ranges[name]}, got {value!r:.60}")
        for name, value in settings.items()
        if name in ranges and value is not None and (name, value) not in _UNSET and value not in ranges[name]
    ]
