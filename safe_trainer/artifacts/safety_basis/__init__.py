"""Calibration: what a model's layers do while it answers, measured in one pass over conversations.

The way of a row: `tokens` brings it into the model's chat format and marks the answer, `streaming` runs the model and
keeps each layer's leading directions, `basis` is the whole, on disk with its `origin`, and `supply` hands it to a
method.
"""

from .basis import SafetyBasis, check_rank
from .streaming import InputTokens, Side, leading_directions
from .supply import supplied_basis
from .tokens import Example, examples_from

__all__ = [
    "Example",
    "InputTokens",
    "SafetyBasis",
    "Side",
    "check_rank",
    "examples_from",
    "leading_directions",
    "supplied_basis",
]
