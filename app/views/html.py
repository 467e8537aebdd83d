"""Pieces of HTML that several steps use. Whatever is put in by `format` is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup

from .. import texts


def join(parts: Iterable[Markup]) -> Markup:
    """Put pieces one after the other."""
    return Markup("").join(parts)


def panel(kind: str, text: str) -> Markup:
    """Return a message: `"info"`, `"good"`, `"warning"` or `"error"`; the last two are read out at once."""
    role = "alert" if kind in ("warning", "error") else "status"
    return Markup('<p class="panel {}" role="{}">{}</p>').format(kind, role, text)


def facts(pairs: Iterable[tuple[str, str]]) -> Markup:
    """Return names with their values."""
    entries = join(Markup("<div><dt>{}</dt><dd>{}</dd></div>").format(*pair) for pair in pairs)
    return Markup('<dl class="facts">{}</dl>').format(entries)


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str | Markup]]) -> Markup:
    """Return a table that scrolls sideways where it is too wide."""
    heads = join(Markup('<th scope="col">{}</th>').format(name) for name in head)
    body = join(
        Markup('<tr><th scope="row">{}</th>{}</tr>').format(
            row[0], join(Markup("<td>{}</td>").format(cell) for cell in row[1:])
        )
        for row in rows
    )
    return Markup(
        '<p class="caption">{}</p><div class="scroll" tabindex="0" role="region" aria-label="{}"><table>'
        "<thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>"
    ).format(caption, caption, heads, body)


def hidden(label: str, content: Markup) -> Markup:
    """Return content that is blurred until its box is ticked; without scripts, and by keyboard as well."""
    return Markup(
        '<div class="blurred"><label><input type="checkbox"> {}</label><div class="content">{}</div></div>'
    ).format(label, content)


def duration(seconds: float) -> str:
    """Return a time as people say it."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def size(count: float) -> str:
    """Return bytes as people say them."""
    return f"{count / 2**30:.1f} GB" if count > 2**29 else f"{count / 2**20:.0f} MB"


def working(what: str, done: int, total: int) -> Markup:
    """Return a bar, or only words where it is not known how much there is."""
    what = f"{what}: {texts.DONE_OF.format(done=done, total=total)}" if total else what
    bar = Markup('<progress max="{}" value="{}" aria-label="{}"></progress>').format(total, done, what)
    return Markup('<p class="working"><span>{}</span>{}</p>').format(what, bar if total else Markup(""))


def short(text: str, most: int = 160) -> str:
    """Cut a text for a table."""
    text = " ".join(str(text or "").split())
    return text if len(text) <= most else text[: most - 1] + "…"


def folded(title: str, content: Markup) -> Markup:
    """Return content under a heading that opens it."""
    return Markup("<details><summary>{}</summary>{}</details>").format(title, content)


def plain(value: float | None) -> str:
    """Return a number as people write it, without powers of ten."""
    return "" if value is None else f"{value:,.10f}".rstrip("0").rstrip(".")


def download(job: str, variant: str, kind: str) -> Markup:
    """Return a link to a file of a job."""
    return Markup('<a href="download/{}/{}/{}" download>{}</a> ').format(job, variant, kind, texts.DOWNLOAD[kind])


def rate(value: Any) -> Markup:
    """Return a rate with its count and interval below it."""
    rest = str(value).removeprefix(value.share).strip()
    return Markup('<span class="share">{}</span><span class="count">{}</span>').format(value.share, rest)
