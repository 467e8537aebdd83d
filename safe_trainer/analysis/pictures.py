"""How our pictures look and how they come to disk: in light and dark, as PNG, SVG and one HTML file."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Theme:
    """The colours of a picture. What is safe is blue and what is harmful red, in both themes and to the colour-blind.

    Args:
        name (`str`): `"light"` or `"dark"`.
        paper (`str`): Background; every picture has its own, so that it can be read on any page.
        ink (`str`): Text and lines.
        faint (`str`): Grids and what matters less.
        safe (`str`): Refusals.
        harmful (`str`): Compliance with harm.
        low (`str`): Lower end of a scale; blends into the background.
        middle (`str`): Its middle.
        hot (`str`): Its upper end, where much is bad; text can be read on it.
        cool (`str`): Its upper end, where much is not bad.
        other (`str`): A further quantity in the same chart.
    """

    name: str
    paper: str
    ink: str
    faint: str
    safe: str
    harmful: str
    low: str
    middle: str
    hot: str
    cool: str
    other: str

    @property
    def scale(self) -> list[list[Any]]:
        """Colours from nothing to much."""
        return [[0.0, self.low], [0.5, self.middle], [1.0, self.hot]]

    @property
    def neutral(self) -> list[list[Any]]:
        """Colours from nothing to much, where much is not bad."""
        return [[0.0, self.low], [1.0, self.cool]]

    def layout(self, **settings: Any) -> dict[str, Any]:
        """Return what every figure's layout has."""
        return {
            "paper_bgcolor": self.paper,
            "plot_bgcolor": self.paper,
            "font": {"family": "Helvetica, Arial, sans-serif", "size": 13, "color": self.ink},
            "margin": {"l": 70, "r": 30, "t": 70, "b": 60},
            **settings,
        }


LIGHT = Theme(
    name="light", paper="#ffffff", ink="#1f2328", faint="#d0d7de", safe="#0b62c4", harmful="#b5232b",
    low="#eef4fb", middle="#f0a35e", hot="#b5232b", cool="#0b62c4", other="#a05a00",
)  # fmt: skip
DARK = Theme(
    name="dark", paper="#0d1117", ink="#e6edf3", faint="#3d444d", safe="#58a6ff", harmful="#ff6b6b",
    low="#16202c", middle="#a8652b", hot="#d2403f", cool="#2b74c9", other="#f0b35e",
)  # fmt: skip

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><meta name="color-scheme" content="light dark">
<style>
body {{ margin: 0; background: {light}; }} .dark {{ display: none; }}
@media (prefers-color-scheme: dark) {{
  body {{ background: {dark}; }} .light {{ display: none; }} .dark {{ display: block; }}
}}
</style></head><body>
<div class="light">{light_figure}</div>
<div class="dark">{dark_figure}</div>
</body></html>
"""


def write_pictures(draw: Callable[[Theme], Any], folder: str | Path, name: str) -> list[Path]:
    """Draw a figure in both themes and write it: `name.html`, and `name.png`, `name.svg` with `name-dark` of each.

    The HTML file needs no network and follows the reader's system. PNG and SVG need a Chrome or Chromium; where there
    is none, they are left out with a warning.

    Args:
        draw (`Callable[[Theme], Figure]`): Makes the plotly figure in a theme; its layout has a width and a height.
        folder (`str` or `Path`): Where to write.
        name (`str`): What the files are called.

    Returns:
        `list[Path]`: The files that were written.

    Raises:
        ImportError: If plotly is not installed.
        OSError: If a file cannot be written.
    """
    try:
        import plotly.io
    except ImportError as error:
        raise ImportError("Pictures need plotly and kaleido: pip install 'safe-trainer[pictures]'.") from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {theme.name: draw(theme) for theme in (LIGHT, DARK)}
    parts = {
        theme: figure.to_html(full_html=False, include_plotlyjs=theme == "light", config={"displaylogo": False})
        for theme, figure in figures.items()
    }
    page = folder / f"{name}.html"
    page.write_text(
        _PAGE.format(
            title=name, light=LIGHT.paper, dark=DARK.paper, light_figure=parts["light"], dark_figure=parts["dark"]
        ),
        encoding="utf-8",
    )
    wanted = {
        folder / f"{name}{'' if theme == 'light' else '-dark'}.{kind}": figure
        for theme, figure in figures.items()
        for kind in ("png", "svg")
    }
    try:
        sizes = {side: [figure.layout[side] for figure in wanted.values()] for side in ("width", "height")}
        plotly.io.write_images(list(wanted.values()), [str(path) for path in wanted], **sizes)
    except (ImportError, ValueError, RuntimeError) as error:  # how plotly says that kaleido or the browser is missing
        logger.warning("Written as HTML only: PNG and SVG need kaleido and a Chrome or Chromium (%s).", error)
        return [page]
    return [page, *wanted]
