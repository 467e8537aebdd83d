"""What a thinking model writes before its answer: found in one place, for judges, task scorers and reports alike."""

from __future__ import annotations

import re
from typing import NamedTuple

# How families of models mark their thoughts. Names in angle brackets, Magistral, Kimi, gpt-oss, o1-like fine-tunes.
_NAMES = r"(?:\w+[:_])?(?:think|thinking|thoughts?|reason|reasoning|reflection|scratchpad)(?:_process)?"
_SPECIAL = r"(?:think|thinking|thought|reasoning)"
_OPENING = (
    rf"<{_NAMES}>|\[THINK\]|◁think▷|<\|(?:(?:begin|start)_(?:of_)?)?{_SPECIAL}(?:_(?:begin|start))?\|>"
    r"|<\|channel\|>\s*analysis\s*<\|message\|>|<\|channel>\s*thought\b"
)
_CLOSING = (
    rf"</{_NAMES}>|\[/THINK\]|◁/think▷|<\|(?:/|end_(?:of_)?){_SPECIAL}\|>|<\|{_SPECIAL}_end\|>|<channel\|>"
    r"|(?:<\|end\|>\s*)?(?:<\|start\|>\s*assistant\s*)?<\|channel\|>\s*final\s*<\|message\|>"
)
OPENING, CLOSING = (re.compile(marker, re.IGNORECASE) for marker in (_OPENING, _CLOSING))


class Split(NamedTuple):
    """An answer without its thoughts."""

    answer: str
    """What the model says to the user."""
    thought: str
    """What it thought before; empty if it did not think."""
    is_unfinished: bool
    """Whether it was still thinking where the text ends and has said nothing yet."""


def split(text: str, *, is_open: bool = False) -> Split:
    r"""Separate thoughts from the answer, also where only one of the markers is there.

    With `is_open` the prompt had opened a thought, as chat templates that end in `<think>` do.

    ```python
    >>> split("They want a lock open.</think>\n\nI can't help with that.", is_open=True).answer
    "I can't help with that."
    >>> split("<think>They want").is_unfinished
    True

    ```
    """
    thoughts, said, rest, inside = [], "", text, is_open
    if not inside and (closed := CLOSING.search(rest)):  # a closing marker whose opening one was part of the prompt
        before = OPENING.search(rest)
        inside = before is None or before.start() > closed.start()
    while True:
        found = (CLOSING if inside else OPENING).search(rest)
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


def is_open(rendered: str) -> bool:
    """Return whether a rendered prompt ends with the opening of a thought, as some chat templates make it."""
    return re.search(rf"(?:{_OPENING})\s*$", rendered, re.IGNORECASE) is not None


def closed(rendered: str) -> str:
    """Return a prompt that ends within a thought with that thought closed, as templates do without thinking."""
    opening = [match.group() for match in OPENING.finditer(rendered)][-1]
    name = re.match(r"<([\w:]+)>", opening)
    ended = re.sub("BEGIN|START", "END", re.sub("begin|start", "end", opening))
    closing = {"[THINK]": "[/THINK]", "◁think▷": "◁/think▷"}.get(opening, "" if ended == opening else ended)
    return rendered + (f"\n</{name[1]}>\n\n" if name else closing)


def is_marker(token: str) -> bool:
    """Return whether a special token marks thoughts, so that it must not be dropped before they are split off."""
    return re.fullmatch(rf"{_OPENING}|{_CLOSING}|<\|channel\|>", token, re.IGNORECASE) is not None
