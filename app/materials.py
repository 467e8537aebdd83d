"""What users give beside their rows: files for the methods, and the prompts that the comparison asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safe_trainer import PromptSet, load_prompts, load_rows, load_suite
from safe_trainer.data import ReadOptions, suites

from . import texts
from .inspection import Unusable, columns_of, read_file, write_lines
from .setup import KINDS, Limits

SAID = ("system_prompt", "template", "scorer")
"""What may be said of a set of prompts, as in a recipe."""
SHOWN = 3
"""Prompts of a set that are shown."""


@dataclass(frozen=True)
class OwnFile:
    """Rows or prompts of the user's own, or a set of a published suite.

    Args:
        path (`Path`): Where it is, in the session's folder: JSON Lines in plain form.
        kind (`str`): What it holds: a key of `texts.MATERIALS` for methods, of `texts.KINDS` for the comparison.
        name (`str`): Name of the file or suite.
        count (`int`): Its rows.
        said (`Mapping[str, str]`): `system_prompt`, `template` and `scorer` as in a recipe, where there are any.
        shown (`list`): The first prompts of the comparison as they will be asked: the turns of each.
    """

    path: Path
    kind: str
    name: str
    count: int
    said: Mapping[str, str] = field(default_factory=dict)
    shown: list[Any] = field(default_factory=list)


def take(
    path: Path | None, name: str, what: str, said: Mapping[str, str], limits: Limits, folder: Path
) -> list[OwnFile]:
    """Read a file for methods or the comparison, check it, and write it in plain form.

    Args:
        path (`Path`, *optional*): An uploaded file; without, a suite is downloaded.
        name (`str`): What the user called it.
        what (`str`): Its kind (see [`OwnFile`]), or the name of a published suite.
        said (`Mapping[str, str]`): What the user says of `system_prompt`, `template` and `scorer` of prompts.
        limits ([`Limits`]): What is let in.
        folder (`Path`): Where to write.
    """
    file, title = Path(str(path)), Path(name).stem
    if what.endswith("_data"):
        rows, _ = read_file(file, name, limits, columns_of(file), lambda: load_rows(file, ReadOptions()))
        target = folder / f"{what}.jsonl"
        return [OwnFile(target, what, title, write_lines(rows, target))]
    if what in texts.MATERIALS:
        found, target = _prompts_in(file, name, what.removesuffix("_prompts"), limits), folder / f"{what}.jsonl"
        return [OwnFile(target, what, title, write_lines(prompt_lines(found), target))]
    sets = [_prompts_in(file, name, what, limits)] if what in KINDS else _suite(what, path, name, limits)
    taken = []
    for number, found in enumerate(sets):
        if len(found) > limits.rows:
            raise Unusable(texts.TOO_MANY_ROWS.format(count=len(found), limit=limits.rows))
        given = {"system_prompt": found.system_prompt, "template": found.template, **said}
        own = {key: value for key, value in given.items() if value and (key != "scorer" or found.kind == "task")}
        shown = PromptSet(**{**vars(found), **own}).first(SHOWN).conversations()
        target = folder / f"asked-{number}.jsonl"
        count = write_lines(prompt_lines(found), target)
        taken.append(OwnFile(target, found.kind, title if what in KINDS else what, count, own, shown))
    return taken


def _suite(suite: str, path: Path | None, name: str, limits: Limits) -> list[PromptSet]:
    """Load a published suite, from the official file if that was uploaded: its name tells what is in it."""
    try:
        if path is None:
            return load_suite(suite)
        files = {part["file"] for part in suites()[suite]["sets"]}
        if name in files:
            path = path.rename(path.with_name(name))
        elif len(files) > 1:
            raise Unusable(texts.SUITE_FILES.format(name=name, files=", ".join(sorted(files))))
        sets: list[PromptSet] = read_file(path, name, limits, (), lambda: load_suite(suite, path))
        return sets
    except ValueError as error:
        raise Unusable(str(error).replace("and give the file or folder as `path`", texts.SUITE_UPLOAD)) from None


def _prompts_in(path: Path, name: str, kind: str, limits: Limits) -> PromptSet:
    load: Any = load_prompts  # which says of itself what is no kind
    found: PromptSet = read_file(path, name, limits, columns_of(path), lambda: load(path, kind))[0]
    return found


def prompt_lines(found: PromptSet) -> list[dict[str, Any]]:
    """Return prompts as rows of a file; with turns before it a prompt is a conversation that ends in its reference."""
    lines: list[dict[str, Any]] = [{"prompt": prompt} for prompt in found.prompts]
    for key, values in (("target", found.references), ("category", found.categories)):
        for line, value in zip(lines, values or (), strict=False):
            line[key] = value
    for line, before in zip(lines, found.contexts or (), strict=False):
        if before:
            answer = [{"role": "assistant", "content": line.pop("target")}] if "target" in line else []
            line["messages"] = [*before, {"role": "user", "content": line.pop("prompt")}, *answer]
    return lines
