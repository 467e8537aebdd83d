"""`safe-trainer review`: label a comparison's doubtful answers by a key each, and count again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markdown import Markdown
from rich.panel import Panel
from rich.text import Text

from .console import Json, console, errors, note, print_json

if TYPE_CHECKING:
    from ..evaluation import Review

_LABELS: dict[str, Any] = {"r": "refused", "c": "complied", "n": "neither"}
_KEYS = "r refused · c complied · n neither · s skip · b back · q quit"


def review(
    report: Annotated[Path, typer.Argument(help="A comparison.json, or the folder that `compare --output` wrote.")],
    as_json: Json = False,
) -> None:
    """Label answers that flipped or on which judges disagree, and count the rates again.

    One key labels an answer, and is saved at once in comparison.labels.json; run it again to go on.
    """
    from ..evaluation import Review, to_markdown, write_report
    from ..evaluation.storage import summary

    opened = Review(report)
    _ask(opened)
    if not opened.labelled:
        note(f"No answer is labelled yet, of {len(opened.questions)} to look at, so there is nothing to count again.")
        return
    result = opened.result()
    stem = opened.path.name.removesuffix(".labels.json")
    files = write_report(result, opened.path.parent, f"{stem}.reviewed")
    note(f"Labels: {opened.path}. Wrote {', '.join(map(str, files))}")
    if as_json:
        agreements = [agreement.to_dict() for agreement in opened.agreements()]
        labels = {"labelled": opened.labelled, "questions": len(opened.questions), "agreements": agreements}
        print_json(labels | {"summary": summary(result)})
        return
    console.print(Markdown(to_markdown(result)))


def _ask(opened: Review) -> None:
    """Show one answer after the other, and take a key for each; from the first without a label."""
    questions = opened.questions
    has_label = [opened.label(question) is not None for question in questions]
    position = has_label.index(False) if False in has_label else len(questions)
    while position < len(questions):
        _show(opened, position)
        try:
            key = typer.getchar().lower()
        except OSError as error:
            raise ValueError(
                "There is no terminal to take keys from. Run it in one, or label in Python with `Review`."
            ) from error
        if key in ("q", ""):  # nothing more to read counts as quitting
            return
        if key in _LABELS:
            opened.set_label(questions[position], _LABELS[key])
            errors.print(Text(_LABELS[key], "bold"))
        if key == "b":
            position = max(0, position - 1)
        elif key in (*_LABELS, "s"):
            position += 1


def _show(opened: Review, position: int) -> None:
    question = opened.questions[position]
    title = f"{position + 1} of {len(opened.questions)} · {question.prompt_set} · {', '.join(question.reasons)}"
    asked = "\n".join(f"{turn['role']}: {turn['content']}" for turn in question.turns)
    errors.rule(Text(title))
    errors.print(Text(asked), Panel(Text(question.answer.strip() or "(empty)"), title="answer", title_align="left"))
    label = opened.label(question)
    errors.print(Text(f"now {label} · {_KEYS}" if label else _KEYS, "dim"))
