"""Checks that the settings of several methods share: of the right type, within their range, or refused with both."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, get_args


def check_whole(method: Any, **least: int) -> None:
    """Make sure that settings are whole numbers of at least so much.

    Args:
        method (`SafetyMethod`): The method, with its settings as attributes.
        **least (`int`): The smallest value of each setting, by its name.

    Raises:
        TypeError: If one is no whole number.
        ValueError: If one is below its smallest value.
    """
    for name, smallest in least.items():
        value = getattr(method, name)
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise TypeError(f"`{name}` must be a whole number, got {value!r}.")
        if value < smallest:
            raise ValueError(f"`{name}` must be at least {smallest}, got {value}.")


def check_weight(weight: Any, usual: str) -> None:
    """Make sure that the weight of a penalty is a finite number of at least 0.

    Args:
        weight (`float`): The weight.
        usual (`str`): A sentence on its usual value.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is negative, infinite or NaN.
    """
    if not isinstance(weight, Real) or isinstance(weight, bool):
        raise TypeError(f"`weight` must be a number, got {weight!r}. {usual}")
    if not (math.isfinite(weight) and float(weight) >= 0):
        raise ValueError(f"`weight` must be a finite number of at least 0, got {weight}. {usual}")


def check_choices(method: Any, **choices: Any) -> None:
    """Make sure that settings are among those that are known.

    Args:
        method (`SafetyMethod`): The method, with its settings as attributes.
        **choices (`Literal`): The type that lists the known values of each setting, by its name.

    Raises:
        ValueError: If one is not; lists those that are.
    """
    for name, known in choices.items():
        if (value := getattr(method, name)) not in get_args(known):
            raise ValueError(f"`{name}` must be one of {', '.join(get_args(known))}, got {value!r}.")
