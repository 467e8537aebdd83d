"""The pictures of drift: one heat map for each figure, weights by layers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...evaluation.charts import place
from ..pictures import Theme, write_pictures
from .measuring import Drift
from .subspaces import FIGURES

TITLES = {"relative": "‖ΔW‖ / ‖W‖", **FIGURES, "refusal": "refusal direction kept"}


def draw(drift: Drift, theme: Theme, title: str = "") -> Any:
    """Return the heat maps of whatever was measured as one plotly figure, all in percent.

    Args:
        drift ([`Drift`]): What to draw.
        theme ([`Theme`]): Light or dark.
        title (`str`, *optional*): Stands above.
    """
    from plotly.subplots import make_subplots

    maps = {name: found for name in TITLES if (found := drift.figure(name))}
    order = _weights(drift.layers)
    weights = {name: sorted(_weights(found), key=order.index) for name, found in maps.items()}
    heights = [len(rows) for rows in weights.values()]
    layers = sorted({place(key)[0] for found in maps.values() for key in found})
    titles = [_title(name, drift) for name in maps]
    rows = max(1, len(maps))
    pixels = [28 * count + 70 for count in heights]
    figure = make_subplots(rows=rows, cols=1, subplot_titles=titles, row_heights=heights or None,
                           vertical_spacing=min(1.0 / rows, 70 / max(1, sum(pixels))))  # fmt: skip
    for row, (name, found) in enumerate(maps.items(), start=1):
        _heat(figure, found, weights[name], layers, name, theme, row)
    width = max(700, 240 + 46 * len(layers))
    figure.update_layout(**theme.layout(width=width, height=150 + sum(pixels), title={"text": title, "x": 0.02}))
    figure.update_layout(margin={"l": 170})
    # Titles may be longer than a map is wide: they begin under the whole picture's.
    figure.update_annotations(x=-155 / (width - 200), xanchor="left")
    if not maps:
        figure.add_annotation(text="No linear layer changed.", x=0, y=0.5, xref="paper", yref="paper", showarrow=False)
        figure.update_xaxes(visible=False).update_yaxes(visible=False)
    figure.update_xaxes(showgrid=False, zeroline=False, type="category")
    figure.update_yaxes(showgrid=False, zeroline=False, autorange="reversed")
    figure.update_xaxes(title_text="layer", row=rows, col=1)
    return figure


def write_drift(drift: Drift, folder: str | Path, title: str = "") -> list[Path]:
    """Write `drift.html`, and `.png` and `.svg` in light and dark; see [`write_pictures`]."""
    return write_pictures(lambda theme: draw(drift, theme, title), folder, "drift")


def _heat(  # noqa: PLR0913, each is a setting with a name
    figure: Any, found: dict[str, float], rows: list[str], layers: list[int], name: str, theme: Theme, row: int
) -> None:
    import plotly.graph_objects as go

    held = {place(key): 100 * value for key, value in found.items()}
    values = [[held.get((layer, weight)) for layer in layers] for weight in rows]
    labels = [["" if value is None else f"{value:.3g}" for value in line] for line in values]
    is_kept = name == "refusal"
    # What is kept is good, what is changed is not; both begin at nothing.
    most = 100 if is_kept else max([*held.values(), 1e-9])
    how: dict[str, Any] = {"colorscale": theme.neutral if is_kept else theme.scale, "zmin": 0, "zmax": most}
    figure.add_trace(
        go.Heatmap(x=[str(layer) if layer >= 0 else "–" for layer in layers], y=rows, z=values, text=labels,
                   texttemplate="%{text}", xgap=2, ygap=2, showscale=False,
                   hovertemplate="layer %{x}, %{y}: %{z:.4g} %<extra></extra>", **how),
        row=row, col=1,
    )  # fmt: skip


def _title(name: str, drift: Drift) -> str:
    if name == "relative":
        return f"{TITLES[name]}, % (all together {100 * drift.relative:.2g})"
    share = drift.share(name) if name in FIGURES else None
    if share is None:
        return f"{TITLES[name]}, %"
    return f"{TITLES[name]}, % (all together {100 * share[0]:.2g}, random {100 * share[1]:.2g})"


def _weights(found: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(place(key)[1] for key in found))
