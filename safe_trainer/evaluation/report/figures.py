"""The geometry of the report's figures, which the template draws as inline SVG."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..results import HEADLINES, RATES, Evaluation, SetResult

_LAYER = re.compile(r"\.(\d+)(?:\.(.+))?$")


def bar(name: str, result: SetResult) -> dict[str, Any]:
    """Return the stacked bar of one model on one prompt set, in percent of its width, with its headline's interval."""
    headline = HEADLINES[result.prompt_set.kind]
    outcomes = ("correct",) if headline == "correct" else ("refused", "neither", "complied")
    rates = {outcome: result.rate(outcome) for outcome in outcomes}
    parts, start = [], 0.0
    for outcome, rate in rates.items():
        width = 100 * rate.value if rate.total else 0.0
        parts.append({"outcome": outcome, "start": _round(start), "width": _round(width)})
        start += width
    rate, names = rates[headline], RATES[result.prompt_set.kind]
    return {
        "name": name,
        "parts": parts,
        "low": _round(100 * rate.low),
        "high": _round(100 * rate.high),
        "measured": rate.total > 0,
        "value": f"{names[headline]} {rate}",
        "spoken": ", ".join(f"{names[outcome]} {rate.share}" for outcome, rate in rates.items()),
    }


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


def heats(evaluations: Sequence[Evaluation]) -> dict[str, list[dict[str, Any]]]:
    """Return by figure of drift a table of weights by layers for each model in which it was measured."""
    names = dict.fromkeys(figure for e in evaluations for figure in e.drift_shares)
    found = {"": {e.name: e.drift for e in evaluations if e.drift}} | {
        figure: {e.name: e.drift_shares[figure] for e in evaluations if figure in e.drift_shares} for figure in names
    }
    return {figure: heat(drifts) for figure, drifts in found.items() if drifts}


def heat(drifts: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Arrange each model's drift as a table of weights by layers, on one scale for all."""
    most = max((ratio for drift in drifts.values() for ratio in drift.values()), default=0.0)
    tables = []
    for name, drift in drifts.items():
        placed = {key: place(key) for key in drift}
        layers = sorted({layer for layer, _ in placed.values()})
        weights = list(dict.fromkeys(weight for _, weight in placed.values()))
        by_place = {placed[key]: ratio for key, ratio in drift.items()}
        rows = [
            {"name": weight, "cells": [_cell(by_place.get((layer, weight)), most) for layer in layers]}
            for weight in weights
        ]
        tables.append({"name": name, "layers": layers, "rows": rows, "most": f"{100 * most:.2g} %"})
    return tables


def place(name: str) -> tuple[int, str]:
    """Split `model.layers.3.self_attn.q_proj` into 3 and `self_attn.q_proj`; what has no layer comes first.

    The layer itself, `model.layers.3`, is what it adds up to, the residual stream after it.
    """
    found = _LAYER.search(name)
    return (int(found[1]), found[2] or "residual stream") if found else (-1, name)


def _cell(ratio: float | None, most: float) -> dict[str, Any]:
    if ratio is None:
        return {"label": "not changed", "strength": 0}
    return {"label": f"{100 * ratio:.2g} %", "strength": _round(max(0.0, ratio / most) if most > 0 else 0)}


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
