"""What a thinking model writes before its answer: found in one place, for judges, task scorers and reports alike."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

# How families of models mark their thoughts. Names in angle brackets, Magistral, Kimi, gpt-oss, o1-like fine-tunes.
_NAMES = r"(?:\w+[:_])?(?:think|thinking|thoughts?|reason|reasoning|reflection|scratchpad)(?:_process)?"
_SPECIAL = r"(?:think|thinking|thought|reasoning)"
OPENING = (
    rf"<{_NAMES}>|\[THINK\]|◁think▷|<\|(?:(?:begin|start)_(?:of_)?)?{_SPECIAL}(?:_(?:begin|start))?\|>"
    r"|<\|channel\|>\s*analysis\s*<\|message\|>|<\|channel>\s*thought\b"
)
CLOSING = (
    rf"</{_NAMES}>|\[/THINK\]|◁/think▷|<\|(?:/|end_(?:of_)?){_SPECIAL}\|>|<\|{_SPECIAL}_end\|>|<channel\|>"
    r"|(?:<\|end\|>\s*)?(?:<\|start\|>\s*assistant\s*)?<\|channel\|>\s*final\s*<\|message\|>"
)


class Split(NamedTuple):
    """An answer without its thoughts."""

    answer: str
    """What the model says to the user."""
    thought: str
    """What it thought before; empty if it did not think."""
    is_unfinished: bool
    """Whether it was still thinking where the text ends and has said nothing yet."""


def split(text: str, *, is_open: bool = False, markers: Sequence[str] | None = None) -> Split:
    r"""Separate thoughts from the answer, also where only one of the markers is there.

    With `is_open` the prompt had opened a thought, as chat templates that end in `<think>` do.

    ```python
    >>> split("They want a lock open.</think>\n\nI can't help with that.", is_open=True).answer
    "I can't help with that."
    >>> split("<think>They want").is_unfinished
    True

    ```
    """
    opening, closing = _patterns(markers)
    thoughts, said, rest, inside = [], "", text, is_open
    if not inside and (closed := closing.search(rest)):  # a closing marker whose opening one was part of the prompt
        before = opening.search(rest)
        inside = before is None or before.start() > closed.start()
    while True:
        found = (closing if inside else opening).search(rest)
        piece, rest = (rest[: found.start()], rest[found.end() :]) if found else (rest, "")
        if inside:
            thoughts.append(piece)
        else:
            said += piece
        if found is None:
            break
        inside = not inside
    thought = "\n".join(part.strip() for part in thoughts if part.strip())
    return Split(said.strip() if thoughts else text, thought, inside and not said.strip())


def is_open(rendered: str, markers: Sequence[str] | None = None) -> bool:
    """Return whether a rendered prompt ends with the opening of a thought, as some chat templates make it."""
    opening, _ = _patterns(markers)
    return re.search(rf"(?:{opening.pattern})\s*$", rendered, re.IGNORECASE) is not None


def closed(rendered: str) -> str:
    """Return a prompt that ends within a thought with that thought closed, as templates do without thinking."""
    opening = [match.group() for match in re.finditer(OPENING, rendered, re.IGNORECASE)][-1]
    name = re.match(r"<([\w:]+)>", opening)
    ended = re.sub("BEGIN|START", "END", re.sub("begin|start", "end", opening))
    closing = {"[THINK]": "[/THINK]", "◁think▷": "◁/think▷"}.get(opening, "" if ended == opening else ended)
    return rendered + (f"\n</{name[1]}>\n\n" if name else closing)


def is_marker(token: str) -> bool:
    """Return whether a special token marks thoughts, so that it must not be dropped before they are split off."""
    return re.fullmatch(rf"{OPENING}|{CLOSING}|<\|channel\|>", token, re.IGNORECASE) is not None


def _patterns(markers: Sequence[str] | None) -> tuple[re.Pattern[str], re.Pattern[str]]:
    opening, closing = (re.escape(marker) for marker in markers) if markers else ("", "")
    return (
        re.compile(OPENING + (f"|{opening}" if opening else ""), re.IGNORECASE),
        re.compile(CLOSING + (f"|{closing}" if closing else ""), re.IGNORECASE),
    )
