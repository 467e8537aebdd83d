"""The picture of a landscape: harmful score and task loss over the plane, and along both axes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..pictures import Theme, write_pictures
from .record import RANDOM, AxisName, Landscape, Place

ALONG = "α, along the alignment direction"
_OUTCOMES = {"complied": ("answered", "solid"), "refused": ("refused", "solid"), "neither": ("neither", "dot")}


def draw(landscape: Landscape, theme: Theme, title: str = "") -> Any:
    """Return the picture of a landscape as a plotly figure.

    Above, harmful score and task loss over the plane, with the way of the training run: each mark stands at the place
    of the plane that is nearest to its checkpoint, and has the colour of the checkpoint's own harmful score. Below,
    what becomes of harmful prompts along each axis, and the loss.

    Args:
        landscape ([`Landscape`]): What to draw.
        theme ([`Theme`]): Light or dark.
        title (`str`, *optional*): Stands above.
    """
    from plotly.subplots import make_subplots

    has_loss = any(math.isfinite(place.loss) for place in landscape.places)
    task = (landscape.settings.get("task") or {}).get("name", "task")
    loss_title = f"Loss on {task} answers, nats per token" if has_loss else ""
    second = "random" if landscape.settings.get("second") == RANDOM else "fine-tuning"
    unit = "" if landscape.settings.get("normalize") == "none" else ", in ‖W‖"
    along, across = f"{ALONG}{unit}", f"β, {second} direction across it{unit}"
    figure = make_subplots(
        rows=2, cols=2, vertical_spacing=0.16, horizontal_spacing=0.13, row_heights=[0.56, 0.44],
        specs=[[{}, {}], [{"secondary_y": True}, {"secondary_y": True}]],
        subplot_titles=("Harmful prompts answered, %", loss_title, "β = 0", "α = 0"),
    )  # fmt: skip
    _plane(figure, landscape, theme, 1, lambda place: _percent(place, "complied"))
    if has_loss:
        _plane(figure, landscape, theme, 2, lambda place: place.loss)
    for column, name in ((1, "alpha"), (2, "beta")):
        _axis(figure, landscape.axis(name), name, theme, column, has_loss)  # type: ignore[arg-type]
    for column in (1, 2):
        figure.update_xaxes(title_text=along, row=1, col=column)
        figure.update_yaxes(title_text=across, row=1, col=column)
    figure.update_xaxes(title_text=along, row=2, col=1)
    figure.update_xaxes(title_text=across, row=2, col=2)
    figure.update_xaxes(gridcolor=theme.faint, zerolinecolor=theme.faint, linecolor=theme.faint)
    figure.update_yaxes(gridcolor=theme.faint, zerolinecolor=theme.faint, linecolor=theme.faint)
    figure.update_layout(
        **theme.layout(width=1080, height=910),
        title={"text": title, "x": 0.02, "y": 0.985, "yanchor": "top", "subtitle": _caption(landscape)},
        margin_t=120,
        legend={"orientation": "h", "x": 0.5, "xanchor": "center", "y": -0.1, "yanchor": "top"},
    )
    return figure


def _caption(landscape: Landscape) -> dict[str, Any]:
    """Say on how many prompts the picture rests, and what the marks are."""
    judge = (landscape.settings.get("judge") or {}).get("name", "")
    told = f"{landscape.places[0].harmful_score.total} harmful prompts at each place"
    told += f", judged by {judge}" if judge else ""
    if landscape.checkpoints:
        told += ".<br>Marks have the colour of their own harmful score, and stand at the nearest place of the plane"
    if run := [round(100 * place.share) for place in landscape.checkpoints[1:]]:
        low, high = min(run), max(run)
        told += f": {low if low == high else f'{low} to {high}'} % of a checkpoint's way lies in it"
    return {"text": told + ".", "font": {"size": 12}}


def write_landscape(landscape: Landscape, folder: str | Path, title: str = "") -> list[Path]:
    """Write `landscape.html`, and `.png` and `.svg` in light and dark; see [`write_pictures`]."""
    return write_pictures(lambda theme: draw(landscape, theme, title), folder, "landscape")


def _plane(figure: Any, landscape: Landscape, theme: Theme, column: int, value: Callable[[Place], float]) -> None:
    import plotly.graph_objects as go

    is_score = column == 1
    values = [[value(place) for place in row] for row in landscape.plane()]
    how: dict[str, Any] = {"zmin": 0, "zmax": 100} if is_score else _loss_range(values)
    figure.add_trace(
        go.Heatmap(
            x=landscape.alphas, y=landscape.betas, z=values, xgap=1, ygap=1,
            colorscale=theme.scale if is_score else theme.neutral,
            colorbar={"len": 0.5, "y": 0.78, "x": 0.41 if is_score else 0.945, "thickness": 10, "outlinewidth": 0},
            hovertemplate="α %{x:.3g}, β %{y:.3g}: %{z:.3g}<extra></extra>", **how,
        ),
        row=1, col=column,
    )  # fmt: skip
    if is_score:
        _border(figure, landscape, values, theme)
    run = list(landscape.checkpoints[1:])
    way = [Place(0, 0, 0, 0, 0, math.nan), *run]
    if run:
        figure.add_trace(
            go.Scatter(x=[p.alpha for p in way], y=[p.beta for p in way], mode="lines", showlegend=False,
                       line={"color": theme.ink, "width": 2}, hoverinfo="skip"),
            row=1, col=column,
        )  # fmt: skip
    unaligned = [place for place in landscape.checkpoints[:1] if abs(place.alpha) <= landscape.alphas[-1]]
    _marks(figure, run, theme, column, is_score, "circle", "checkpoint")
    _marks(figure, unaligned, theme, column, is_score, "diamond", "unaligned model")
    figure.add_trace(
        go.Scatter(x=[0], y=[0], mode="markers", name="the model", showlegend=is_score, hoverinfo="name",
                   marker={"symbol": "cross", "size": 13, "color": theme.ink, "line": _edge(theme)}),
        row=1, col=column,
    )  # fmt: skip
    for update, steps in ((figure.update_xaxes, landscape.alphas), (figure.update_yaxes, landscape.betas)):
        margin = (steps[1] - steps[0]) / 2  # a place is the middle of its cell
        update(range=[steps[0] - margin, steps[-1] + margin], showgrid=False, zeroline=False, row=1, col=column)


def _border(figure: Any, landscape: Landscape, values: list[list[float]], theme: Theme) -> None:
    """Draw the line on which half of the harmful prompts are answered."""
    import plotly.graph_objects as go

    figure.add_trace(
        go.Contour(x=landscape.alphas, y=landscape.betas, z=values, showscale=False, hoverinfo="skip",
                   contours={"type": "constraint", "operation": "=", "value": 50}, name="half answered",
                   line={"color": theme.ink, "width": 1.5, "dash": "dot"}),
        row=1, col=1,
    )  # fmt: skip


def _marks(  # noqa: PLR0913, each is a setting with a name
    figure: Any, places: list[Place], theme: Theme, column: int, is_score: bool, symbol: str, name: str
) -> None:
    import plotly.graph_objects as go

    if not places:
        return
    own = [_percent(place, "complied") for place in places]
    told = [
        f"{place.name}: {place.harmful_score} answered, loss {place.loss:.3g}; {100 * place.share:.0f} % of its way "
        "lies in this plane"
        for place in places
    ]
    colours = {"color": own, "cmin": 0, "cmax": 100, "colorscale": theme.scale}
    marker = {"symbol": symbol, "size": 11, "line": {"color": theme.ink, "width": 1.5}, **colours}
    figure.add_trace(
        go.Scatter(x=[p.alpha for p in places], y=[p.beta for p in places], mode="markers", name=name, marker=marker,
                   showlegend=is_score, text=told, hovertemplate="%{text}<extra></extra>"),
        row=1, col=column,
    )  # fmt: skip


def _axis(figure: Any, line: list[Place], name: AxisName, theme: Theme, column: int, has_loss: bool) -> None:
    import plotly.graph_objects as go

    along = [getattr(place, name) for place in line]
    colours = {"complied": theme.harmful, "refused": theme.safe, "neither": theme.ink}
    for outcome, (label, dash) in _OUTCOMES.items():
        rates = [place.rate(outcome) for place in line]
        figure.add_trace(
            go.Scatter(x=along, y=[100 * rate.value for rate in rates], name=label, showlegend=column == 1,
                       line={"color": colours[outcome], "dash": dash, "width": 2}, mode="lines+markers",
                       marker={"size": 5}, text=[str(rate) for rate in rates],
                       hovertemplate="%{x:.3g}: %{text}<extra>" + label + "</extra>"),
            row=2, col=column,
        )  # fmt: skip
    figure.update_yaxes(title_text="harmful prompts, %", range=[-4, 104], row=2, col=column, secondary_y=False)
    if has_loss:
        figure.add_trace(
            go.Scatter(x=along, y=[place.loss for place in line], name="task loss (right)", showlegend=column == 1,
                       mode="lines", line={"color": theme.other, "dash": "dash", "width": 2},
                       hovertemplate="%{x:.3g}: %{y:.3g} nats<extra>task loss</extra>"),
            row=2, col=column, secondary_y=True,
        )  # fmt: skip
        figure.update_yaxes(title_text="nats per token", rangemode="tozero", tickmode="auto", showgrid=False,
                            row=2, col=column, secondary_y=True)  # fmt: skip


def _loss_range(values: list[list[float]]) -> dict[str, float]:
    found = [value for row in values for value in row if math.isfinite(value)]
    return {"zmin": min(found), "zmax": max(found)} if found else {}


def _percent(place: Place, outcome: str) -> float:
    return 100 * place.rate(outcome).value


def _edge(theme: Theme) -> dict[str, Any]:
    return {"color": theme.paper, "width": 1.5}
