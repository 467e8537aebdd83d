"""A comparison as files that others can read: JSON with everything, Markdown for a model card, HTML for people."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from ..comparison import Comparison
from ..storage import to_json
from .content import content, place

__all__ = ["escape", "place", "to_html", "to_markdown", "replacing", "write_atomically", "write_report"]

_TEMPLATES = Path(__file__).with_name("templates")
_SPECIAL = re.compile(r"([\\`*_\[\]<>#!|~])")


def to_html(comparison: Comparison) -> str:
    """Return the comparison as one HTML document.

    Everything is in the file: no fonts, scripts, styles or pictures from elsewhere, and a Content-Security-Policy that
    lets nothing but its own script run. Prompts, answers and names are shown as text, whatever they contain; those of
    harmful sets are blurred until the reader asks for them. Light and dark follow the reader's system.

    Args:
        comparison (`Comparison`): What to show.

    Example:

    ```python
    Path("report.html").write_text(to_html(comparison), encoding="utf-8")
    ```
    """
    from markupsafe import Markup

    # Both go into the page unescaped, which is right: they are ours, and the policy names their hashes.
    own = {kind: Markup((_TEMPLATES / f"report.{kind}").read_text(encoding="utf-8")) for kind in ("css", "js")}
    hashes = {kind: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for kind, text in own.items()}
    return str(_environment().get_template("report.html").render(own=own, hashes=hashes, **content(comparison)))


def to_markdown(comparison: Comparison) -> str:
    """Return the comparison as Markdown: verdicts, what changed, all rates, how it was measured.

    Prompts and answers are left out. Refusals are listed with over-refusals and tasks; what was not measured says so.

    Args:
        comparison (`Comparison`): What to show.
    """
    text = str(_environment().get_template("report.md").render(**content(comparison)))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def escape(text: object) -> str:
    r"""Make a text show as itself in Markdown, also inside a table.

    ```python
    >>> escape("a|b <img>")
    'a\\|b \\<img\\>'

    ```
    """
    return _SPECIAL.sub(r"\\\1", " ".join(str(text).split()))


@cache
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    def tight(sentence: str) -> str:
        """Keep numbers and their signs on one line."""
        return sentence.replace(" %", "\u00a0%").replace("p = ", "p\u00a0=\u00a0").replace("p < ", "p\u00a0<\u00a0")

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=lambda name: name != "report.md",
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= {"md": escape, "tight": tight}
    return environment


def write_report(comparison: Comparison, directory: str | Path, name: str = "comparison") -> list[Path]:
    """Write `<name>.json` (everything), `<name>.md` (for a model card) and `<name>.html` (for people).

    Each file is complete or not there: a failure, such as a full disk, leaves an older file as it was.

    Args:
        comparison (`Comparison`): What to write.
        directory (`str` or `Path`): Where to; created if it is missing.
        name (`str`, *optional*, defaults to `"comparison"`): The files' name without its ending.

    Returns:
        `list[Path]`: The files.

    Example:

    ```python
    write_report(compare(model, tokenizer, prompt_sets, {"AsFT": "out/asft"}), "out/report")
    ```
    """
    contents = {".json": to_json(comparison), ".md": to_markdown(comparison), ".html": to_html(comparison)}
    return [write_atomically(Path(directory) / f"{name}{ending}", text) for ending, text in contents.items()]


def write_atomically(path: Path, text: str) -> Path:
    """Write a text file under a temporary name and rename it when it is complete; on an error the old file stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name, whose file takes the path's place when all is written; on an error the old one stays."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
