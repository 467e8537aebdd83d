"""A GPU that is lent by the call, as on ZeroGPU; everywhere else nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

try:
    import spaces
except ImportError:
    IS_LENT = False

    def lent(function: F) -> F:
        """Return the function as it is: this machine lends nothing."""
        return function

else:
    IS_LENT = bool(spaces.config.Config.zero_gpu)

    def lent(function: F) -> F:
        """Return the function with a GPU for up to five minutes while it runs."""
        return spaces.GPU(duration=300)(function)
