"""The files and folders that a recipe names: where they are, and whether they can be what they are for."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..data import HubDataset, ReadOptions
from ..data.files import is_file, kind_of
from ..data.hub import PREFIX
from .document import Place, Problem
from .schema import ReadingPart, SourcePart

FILES = (["data", "path"], ["evaluation", "prompts", "path"], ["monitor", "direction"], ["monitor", "basis"])
"""Keys of a recipe under which a file stands."""


def moved(value: Any, place: Place, folder: Path, seat: Path | None = None) -> Any:
    """Return a value of a recipe with the paths in it made absolute, or as they are seen from another folder.

    Paths are the files of data, prompts and monitor, and elsewhere all texts that begin with `./` or `../`; but the
    output is made where the command is given, and absolute paths stay what they are.

    Args:
        value (`Any`): The value, or several in lists and mappings.
        place (`Place`): Where it stands in the recipe; `()` for the whole.
        folder (`Path`): The folder that its paths are seen from.
        seat (`Path`, *optional*): The folder that they are to be seen from; left out, they become absolute.
    """
    if isinstance(value, dict):
        return {key: moved(inner, (*place, key), folder, seat) for key, inner in value.items()}
    if isinstance(value, list):
        return [moved(inner, (*place, n), folder, seat) for n, inner in enumerate(value)]
    keys = [key for key in place if isinstance(key, str)]
    names_file = keys in FILES and not str(value).startswith(PREFIX)
    is_path = isinstance(value, str) and (names_file or value.startswith(("./", "../"))) and keys != ["output"]
    if not is_path or os.path.isabs(value):
        return value
    target = os.path.abspath(folder / os.path.expanduser(value))  # leaves users be that there are not
    if seat is None:
        return target
    seen = Path(os.path.relpath(target, seat)).as_posix()
    return seen if seen.startswith("../") else f"./{seen}"


def check_sources(values: dict[str, Any], problems: list[Problem]) -> None:
    """Check what can be known of models, data and prompts without loading them."""
    model = values.get("model")
    path = model.get("path") if isinstance(model, dict) else None
    if isinstance(path, str) and path.startswith(("/", "~")) and not _is_folder(path):
        problems.append(Problem(("model", "path"), f"there is no folder `{path}`"))
    _check_monitor(values.get("monitor"), problems)
    _check_safety(values.get("safety"), problems)
    for place, source in _sources(values):
        path = source.get("path")
        hub = source.get("hub")
        if isinstance(hub, str) and hub.startswith(("/", "~")) and not _is_folder(hub):
            problems.append(Problem((*place, "hub"), f"there is no folder `{hub}`"))
        if isinstance(path, str):
            try:
                if path.startswith(PREFIX):
                    raise ValueError(f"a dataset stands under `hub`: `hub: {path.removeprefix(PREFIX)}`")
                kind_of(path)
                if not is_file(path):
                    raise ValueError(f"there is no file `{path}`")
            except ValueError as error:
                problems.append(Problem((*place, "path"), str(error)))
        settings: dict[str, Any] = {
            name: source.get(name) for name in ("format", "columns") if source.get(name) is not None
        }
        try:
            ReadOptions(**settings).chosen_format()
        except (ValueError, TypeError, AttributeError) as error:
            problems.append(Problem((*place, next(iter(settings))), str(error)))


def _check_monitor(monitor: Any, problems: list[Problem]) -> None:
    for key in ("direction", "basis"):
        path = monitor.get(key) if isinstance(monitor, dict) else None
        if isinstance(path, str) and not is_file(path):
            problems.append(Problem(("monitor", key), f"there is no file `{path}`; `safe-trainer {key}` writes one"))


def _check_safety(safety: Any, problems: list[Problem]) -> None:
    entries = enumerate(safety) if isinstance(safety, list) else [((), safety)]
    for position, entry in entries:
        place: Place = ("safety", position) if isinstance(position, int) else ("safety",)
        for name, value in entry.items() if isinstance(entry, dict) else ():
            if isinstance(value, str) and os.path.isabs(value) and not (is_file(value) or _is_folder(value)):
                problems.append(Problem((*place, name), f"there is no file or folder `{value}`"))


def _is_folder(path: str) -> bool:
    try:
        return Path(path).expanduser().is_dir()
    except (OSError, RuntimeError):  # a name that is too long, or of a user that there is not
        return False


def _sources(values: dict[str, Any]) -> Iterator[tuple[Place, dict[str, Any]]]:
    evaluation = values.get("evaluation")
    prompts = evaluation.get("prompts") if isinstance(evaluation, dict) else None
    for place, sources in ((("data",), values.get("data")), (("evaluation", "prompts"), prompts)):
        for position, source in enumerate(sources if isinstance(sources, list) else ()):
            if isinstance(source, dict):
                yield (*place, position), source


def source_of(part: SourcePart) -> str | HubDataset:
    """Return the file or dataset that a part of a recipe names."""
    if part.path is not None:
        return part.path
    assert part.hub is not None  # the schema has seen to it that there is one
    return HubDataset(part.hub, part.subset, part.split)


def reading_of(part: ReadingPart) -> ReadOptions:
    """Return how a source of a recipe is to be read."""
    names = [field.name for field in dataclasses.fields(ReadOptions) if hasattr(part, field.name)]
    settings: dict[str, Any] = {name: getattr(part, name) for name in names}
    return ReadOptions(**settings)
