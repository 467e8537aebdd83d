"""Which cases of a large matrix run in `make test`; all of them run in `make test-all`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def exhaustive_but(kept: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """Return the cases for `pytest.mark.parametrize`, with `exhaustive` on all but those in `kept`."""
    cases = list(cases)
    unknown = [case for case in kept if case not in cases]
    assert not unknown, f"no such cases: {unknown}"
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    marks = [() if case in kept else pytest.mark.exhaustive for case in cases]
    return [pytest.param(*value, marks=mark) for value, mark in zip(values, marks, strict=True)]
