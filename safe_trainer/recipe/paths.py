"""The files and folders that a recipe names: where they are, and whether they hold what they are for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..data import KINDS, PREFIX, kind_of, what_was_meant

Place = tuple[str | int, ...]
"""Where a value is: the keys and positions that lead to it, such as `("data", 0, "path")`."""
ARTIFACTS = {"direction": "alignment direction", "basis": "safety basis", "vectors": "security vectors"}
"""What a file must hold that a recipe gives under one of these keys."""
_FILES = (
    *(["data", "path"], ["eval_data", "path"], ["evaluation", "prompts", "path"]),
    *(["monitor", "direction"], ["monitor", "basis"]),
)
_SOURCES = ("_data", "prompts", "_model", "hub", "chat_template_path", *ARTIFACTS)
"""How the settings end that may name a file or folder without saying so by `./` or an ending; others are words."""
_TEXTS = {"system_prompt", "template", "name", "where", "columns"}
"""Settings that name no files, whatever they say."""


def moved(value: Any, place: Place, folder: Path, seat: Path | None = None) -> Any:
    """Return a value of a recipe with the paths in it made absolute, or relative to another folder.

    Paths are the files of data, prompts and monitor, and the models of judges; elsewhere texts that begin with `./` or
    `../`; and in settings the names of files (`harmful.jsonl`, `direction.safetensors`) and, where they name a source,
    of what is in the recipe's folder. They are relative to `folder`, and become relative to `seat`, if there is one.
    The output is relative to the working directory, and absolute paths stay.
    """
    if isinstance(value, dict):
        return {key: moved(inner, (*place, key), folder, seat) for key, inner in value.items()}
    if isinstance(value, list):
        return [moved(inner, (*place, n), folder, seat) for n, inner in enumerate(value)]
    if isinstance(value, str) and place[:2] == ("evaluation", "judges"):  # `phrases`, or `guard:MODEL`
        kind, colon, model = value.partition(":")
        return kind + colon + moved(model, ("model", "path"), folder, seat)
    if not isinstance(value, str) or not _is_path(value, place, folder) or os.path.isabs(value):
        return value
    target = os.path.abspath(folder / os.path.expanduser(value))  # a user that there is not is left as it is
    if seat is None:
        return target
    seen = Path(os.path.relpath(target, seat)).as_posix()
    return seen if seen.startswith("../") else f"./{seen}"


def _is_path(value: str, place: Place, folder: Path) -> bool:
    keys = [key for key in place if isinstance(key, str)]
    if keys == ["output"] or value.startswith(PREFIX) or not value or not _TEXTS.isdisjoint(keys):
        return False
    if value.startswith(("./", "../")) or keys in _FILES or (keys[0] == "safety" and keys[-1] == "path"):
        return True
    if len(keys) > 1 and keys[0] in ("safety", "training", "peft"):
        named = Path(value.lower().removesuffix(".gz")).suffix in (*KINDS, ".safetensors", ".jinja", ".j2")
        return named or (keys[-1].endswith(_SOURCES) and exists(folder / value))
    models_and_datasets = (["model", "path"], ["data", "hub"], ["eval_data", "hub"], ["safe_lora", "unaligned"])
    return keys in models_and_datasets and exists(folder / value)


def exists(path: str | Path) -> bool:
    """Return whether there is such a file or folder; an impossible name does not exist."""
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long, of no user, or with a null character
        return False


def is_given(path: str) -> bool:
    """Return whether a text can only be a path, not a Hub id."""
    return path.startswith(("/", "~"))


def check_data_file(path: str) -> str:
    """Return the path of a file of rows or prompts; refused if it is missing, or of a kind that cannot be read."""
    if path.startswith(PREFIX):
        raise ValueError(f"a dataset is given under `hub`: `hub: {path.removeprefix(PREFIX)}`")
    try:
        kind_of(path)
    except ValueError as error:
        reason = str(error).replace(f"`{PREFIX}{path}`", f"`hub: {path}`")
        raise ValueError(f"{reason} A dataset on the Hub is given under `hub`, in place of `path`") from error
    if not (exists(path) and Path(path).is_file()):
        raise ValueError(f"there is no file `{path}`.{what_was_meant(path)}")
    return path


def check_artifact(key: str, path: str) -> str:
    """Return the path of what a method reads; refused if it is missing, or an artifact of another kind."""
    makes = f"; `safe-trainer {key}` makes one" if key in ARTIFACTS else ""
    if is_given(path) and not exists(path):
        raise ValueError(f"there is no file or folder `{path}`{makes or what_was_meant(path)}")
    if key in ARTIFACTS and exists(path):
        file = Path(path).expanduser()
        file = file / "adapter_model.safetensors" if file.is_dir() else file
        kind = weights_kind(file) if file.is_file() else None
        if not str(kind).startswith(ARTIFACTS[key]):
            found = f"a file of kind {kind!r}" if kind else "an adapter or other weights"
            raise ValueError(f"`{path}` is {found}, not {ARTIFACTS[key]}{makes}")
    return path


def check_model(path: str) -> str:
    """Return the folder or Hub id of a model; refused if a folder is missing, empty, an adapter's, or damaged."""
    if not exists(path) or not (folder := Path(path).expanduser()).is_dir():
        if is_given(path) or exists(path):
            raise ValueError(f"there is no folder `{path}`")
        return path
    if not any(folder.iterdir()):
        raise ValueError(f"the folder `{path}` is empty")
    if not (folder / "config.json").is_file():
        from ..lora.loading import refuse_adapter

        refuse_adapter(path)
        raise ValueError(f"the folder `{path}` holds no model: there is no config.json in it")
    for file in folder.glob("*.safetensors"):
        weights_kind(file)
    return path


def weights_kind(file: Path) -> str | None:
    """Return the kind that a file of weights declares, as artifacts do and models do not; refused if damaged."""
    try:
        with safe_open(file, framework="np") as opened:
            return (opened.metadata() or {}).get("kind")
    except SafetensorError as error:
        raise ValueError(
            f"the weights `{file}` are incomplete or damaged ({error}); make or copy them again"
        ) from error
