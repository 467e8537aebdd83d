"""The study's pictures: compliance rate of harmful prompts against task accuracy and over-refusal rate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import plotly.graph_objects as go
from plotly.subplots import make_subplots
from study import SCENARIOS
from variants import CONTROLS, METHODS, SIMPLE, STRENGTHS

from safe_trainer.evaluation import Spread

Figures = Mapping[tuple[str, str], Mapping[str, Spread]]


class Family(NamedTuple):
    """How a method and its controls are drawn."""

    colour: str
    symbol: str


FAMILIES = {
    "plain LoRA": Family("#d1495b", "circle"),
    "AsFT": Family("#c98500", "square"),
    "SaLoRA": Family("#8d6cab", "diamond"),
    "inputs": Family("#5b8e3e", "triangle-up"),
    "security vectors": Family("#00798c", "pentagon"),
    "vectors + inputs": Family("#2f6fde", "hexagon"),
    "refusal anchor": Family("#3f3f8f", "cross"),
    "recommended": Family("#12a150", "star"),
}
"""By how a variant's name begins; the one to be seen best is drawn last."""
GRID = {"gridcolor": "rgba(128,128,128,0.25)", "zeroline": False}
HARM = "compliance, harmful, %"


def draw_trade_off(figures: Figures, path: Path) -> None:
    """Draw every variant's mean over seeds with its interval; controls are hollow."""
    chosen = ("poisoned-10", "how-to")
    titles = [
        f"{SCENARIOS[name].title}: {measure}" for name in chosen for measure in ("task accuracy, %", "over-refusal, %")
    ]
    drawing = make_subplots(len(chosen), 2, subplot_titles=titles, vertical_spacing=0.12, horizontal_spacing=0.1)
    for row, scenario in enumerate(chosen, 1):
        for column, value in enumerate((_task, _over_refusal), 1):
            for family, (colour, symbol) in FAMILIES.items():
                names = [
                    name
                    for name in (*CONTROLS, *SIMPLE, *METHODS)
                    if name.startswith(family) and (scenario, name) in figures
                ]
                found = [figures[scenario, name] for name in names]
                harm = [_around(one["compliance, harmful"]) for one in found]
                dots = go.Scatter(
                    x=[value(one) for one in found],
                    y=[mean for mean, _, _ in harm],
                    error_y=_bars([up for _, up, _ in harm], [down for _, _, down in harm], colour),
                    mode="markers",
                    name=family,
                    marker={
                        "size": 17 if symbol == "star" else 11,
                        "color": colour,
                        "symbol": [symbol if name in METHODS else f"{symbol}-open" for name in names],
                        "line": {"width": 2},
                        "opacity": 0.9,
                    },
                    showlegend=(row, column) == (1, 1),
                )
                drawing.add_trace(dots, row, column)
        drawing.update_xaxes(range=[10, 103], row=row, col=1)
        drawing.update_xaxes(range=[-0.4, 7], row=row, col=2)
    drawing.update_yaxes(title_text=HARM)
    _finish(drawing, 390 * len(chosen), path)


LINES = {
    "compliance, borderline": ("#5b8e3e", "triangle-up"),
    "task accuracy": ("#2f6fde", "square"),
    "compliance, harmful": ("#d1495b", "circle"),
}
"""How the measures are drawn where each has a line."""


def draw_strengths(figures: Figures, path: Path) -> None:
    """Draw what each method keeps and costs from weak to strong, beginning with plain LoRA; one row a scenario."""
    chosen = ("poisoned-10", "how-to")
    families = list(dict.fromkeys(name.partition(",")[0] for name in STRENGTHS))
    drawing = make_subplots(
        len(chosen),
        len(families),
        column_titles=families,
        shared_yaxes=True,
        vertical_spacing=0.16,
        horizontal_spacing=0.02,
    )
    for row, scenario in enumerate(chosen, 1):
        for column, family in enumerate(families, 1):
            settings = [name for name in STRENGTHS if name.partition(",")[0] == family]
            for measure, (colour, symbol) in LINES.items():
                line = go.Scatter(
                    x=["0", *(name.rpartition(" ")[2].replace("000", "k") for name in settings)],
                    y=[100 * figures[scenario, name][measure].mean for name in ("plain LoRA", *settings)],
                    mode="lines+markers",
                    name=measure,
                    line={"color": colour, "width": 2},
                    marker={"size": 9, "color": colour, "symbol": symbol},
                    showlegend=(row, column) == (1, 1),
                )
                drawing.add_trace(line, row, column)
            kind = settings[0].partition(", ")[2].rpartition(" ")[0]
            ticks = {"type": "category", "tickangle": 0, "tickfont": {"size": 10}}
            drawing.update_xaxes(title_text=kind, **ticks, row=row, col=column)
        drawing.update_yaxes(title_text=f"{SCENARIOS[scenario].title}, %", row=row, col=1)
    _finish(drawing, 680, path)


def _task(found: Mapping[str, Spread]) -> float:
    return 100 * found["task accuracy"].mean


def _over_refusal(found: Mapping[str, Spread]) -> float:
    return 100 * (1 - found["compliance, borderline"].mean)


def _around(spread: Spread) -> tuple[float, float, float]:
    """Return a mean in per cent, and by how far its interval over runs reaches up and down; not at all for one run."""
    mean = 100 * spread.mean
    if len(spread.rates) == 1:
        return mean, 0.0, 0.0
    low, high = spread.interval
    return mean, 100 * high - mean, mean - 100 * low


def _bars(up: list[float], down: list[float], colour: str) -> dict[str, Any]:
    return {"array": up, "arrayminus": down, "color": colour, "thickness": 1, "width": 3}


def _finish(drawing: go.Figure, height: int, path: Path) -> None:
    drawing.update_xaxes(**GRID)
    drawing.update_yaxes(range=[-8, 108], **GRID)
    drawing.update_layout(
        width=980,
        height=height,
        paper_bgcolor="rgba(0,0,0,0)",  # for light pages and dark ones
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": "#888", "size": 13},
        legend={"orientation": "h", "y": -60 / height, "yanchor": "top", "entrywidth": 140},
        margin={"l": 60, "r": 20, "t": 40, "b": 100},
    )
    drawing.write_image(path)
