"""The geometry of the report's figures, which the template draws."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..results import Evaluation

_LAYER = re.compile(r"\.(\d+)(?:\.(.+))?$")


def plane(evaluations: Sequence[Evaluation]) -> dict[str, Any] | None:
    """Place each model by its refusals (up) and over-refusals (right); `None` unless both were measured."""
    across = next((kind for kind in ("borderline", "benign") if evaluations[0].of_kind(kind)), None)
    if across is None or not evaluations[0].of_kind("harmful"):
        return None
    dots: list[dict[str, Any]] = []
    for evaluation in evaluations:
        up, right = evaluation.pooled("refused", "harmful"), evaluation.pooled("refused", across)
        tasks = evaluation.pooled("correct", "task")
        if up.total and right.total:
            label = _shortened(evaluation.name)
            dots.append(
                {
                    "name": evaluation.name, "x": _x(right.value), "y": _y(up.value),
                    "left": _x(right.low), "right": _x(right.high), "top": _y(up.high), "bottom": _y(up.low),
                    "label": label + (f" · {100 * tasks.value:.0f} %" if tasks.total else ""),
                    "harmful": str(up), "other": str(right), "tasks": str(tasks),
                }
            )  # fmt: skip
    _label(dots)
    ticks = [{"x": _x(share), "y": _y(share), "label": round(100 * share)} for share in (0, 0.25, 0.5, 0.75, 1)]
    return {"across": f"{across} prompts", "dots": dots, "ticks": ticks}


def heats(evaluations: Sequence[Evaluation]) -> dict[str, dict[str, dict[tuple[int, str], float]]]:
    """Return by figure of drift and model in which it was measured a value for each layer and weight."""
    found: dict[str, dict[str, Mapping[str, float]]] = {"": {e.name: e.drift for e in evaluations}}
    for figure in dict.fromkeys(figure for e in evaluations for figure in e.drift_shares):
        found[figure] = {e.name: e.drift_shares.get(figure, {}) for e in evaluations}
    placed = {
        figure: {name: {place(key): share for key, share in drift.items()} for name, drift in drifts.items() if drift}
        for figure, drifts in found.items()
    }
    return {figure: models for figure, models in placed.items() if models}


def place(name: str) -> tuple[int, str]:
    """Split `model.layers.3.self_attn.q_proj` into 3 and `self_attn.q_proj`; what has no layer comes first.

    The layer itself, `model.layers.3`, is what it adds up to, the residual stream after it.
    """
    found = _LAYER.search(name)
    return (int(found[1]), found[2] or "residual stream") if found else (-1, name)


def _label(dots: list[dict[str, Any]]) -> None:
    """Put each name next to its dot, on the side that has room, and names that would cover each other apart."""
    taken: list[tuple[float, float, float]] = []
    for dot in sorted(dots, key=lambda dot: dot["y"]):
        width = 6.6 * len(dot["label"])
        end = dot["x"] + 11 + width > 410
        start, y = (dot["x"] - 11 - width, dot["y"] + 4) if end else (dot["x"] + 11, dot["y"] + 4)
        while any(start < right and left < start + width and abs(y - other) < 13 for left, right, other in taken):
            y += 13 if dot["y"] <= _y(0.5) else -13  # away from the axes
        taken.append((start, start + width, y))
        dot.update(
            label_x=_round(start + width if end else start), label_y=_round(y), anchor="end" if end else "start"
        )


def _shortened(name: str) -> str:
    return name if len(name) <= 22 else f"{name[:13]}…{name[-8:]}"  # the end tells one run from another


def _x(share: float) -> float:
    return _round(50 + 350 * share)


def _y(share: float) -> float:
    return _round(280 - 260 * share)


def _round(value: float) -> float:
    return round(value, 2)
