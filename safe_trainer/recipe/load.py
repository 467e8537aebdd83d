"""Reads a recipe and validates it: every problem is listed at once, with its line, before anything is loaded."""

from __future__ import annotations

import copy
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ..data import KINDS, PREFIX, is_file, kind_of
from .document import Document, Place, RecipeError, assignment, did_you_mean
from .fields import Hints, check_field, is_torch_loaded, method_fields, peft_fields, short, training_fields
from .schema import NOT_UNDER_PEFT, NOT_UNDER_TRAINING, PARTS, RecipePart, SourcePart

if TYPE_CHECKING:
    from peft import LoraConfig

    from ..methods import SafetyMethod

LORA_LEARNING_RATE = 2e-4
"""The learning rate of a LoRA where a recipe gives none: TRL's own, 2e-5, is one for training all weights."""
ARTIFACTS = {"direction": "alignment direction", "basis": "safety basis", "vectors": "security vectors"}
"""What a file must hold that a recipe gives under one of these keys."""
_FILES = (["data", "path"], ["evaluation", "prompts", "path"], ["monitor", "direction"], ["monitor", "basis"])
PEFT_DEFAULT = RecipePart.model_fields["peft"].get_default(call_default_factory=True)
_SAFETY = "expected `recommended`, `null` or methods with their settings, as in `{method: asft, unaligned_model: …}`"


@dataclass(frozen=True)
class Recipe:
    """A run that has been found valid.

    Args:
        path (`Path`): The file.
        values (`dict[str, Any]`): What it says, with the changes of `--set`.
        parts ([`RecipePart`]): The same with the defaults, and absolute paths.
        training (`dict[str, Any]`): Arguments for TRL's `SFTConfig`, except the output folder.
        peft ([`~peft.LoraConfig`], *optional*): The adapter to train; `None` trains all weights.
        safety (`list[SafetyMethod]`): The methods, in order.
        document ([`Document`]): The file, for what is found wrong with it later.
        changes (`tuple[str, ...]`): The changes of `--set`.
    """

    path: Path
    values: dict[str, Any]
    parts: RecipePart
    training: dict[str, Any]
    peft: LoraConfig | None
    safety: list[SafetyMethod]
    document: Document = field(repr=False, compare=False)
    changes: tuple[str, ...] = ()

    def command(self, *options: str) -> str:
        """Return the command that runs this recipe with these changes."""
        changes = [part for change in self.changes for part in ("--set", change)]
        return shlex.join(["safe-trainer", "train", str(self.path), *changes, *options])


def read_recipe(path: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe and validate all of it.

    What can be known without torch is checked first, in well under a second: keys, values, files, artifacts. Then TRL,
    PEFT and the methods check what is theirs.

    Args:
        path (`str` or `Path`): The YAML file. Files that it names are seen from its folder.
        changes (`Sequence[str]`, *optional*): Such as `"training.learning_rate=1e-4"`, in the order in which they are
            made. Files that they name are seen from the working directory.

    Returns:
        [`Recipe`]: Ready to run.

    Raises:
        RecipeError: With all problems, each with its line.
        OSError: If the file cannot be read.

    Example:

    ```python
    >>> recipe = read_recipe("recipes/testbed/asft.yaml", ["training.max_steps=10"])
    >>> recipe.training["max_steps"]
    10

    ```
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(str(path), [f"is not UTF-8 text: {error}"]) from error
    document, folder = Document(text, str(path)), Path(path).parent
    for change in changes:
        try:
            place, value = assignment(change)
        except ValueError as error:
            raise RecipeError(str(path), [str(error)]) from error
        document.put(place, moved(value, place, Path.cwd(), folder))
    values = moved(document.values, (), folder)
    parts = _check_parts(values, document)
    _check_files(values, document)
    training = _check_training(values, document)
    lora = _check_settings(values.get("peft", PEFT_DEFAULT), peft_fields(), ("peft",), document, NOT_UNDER_PEFT)
    entries = _check_entries(values, document)
    if not is_torch_loaded():
        document.raise_problems()
    peft = _make_peft(values.get("peft", PEFT_DEFAULT), lora, document)
    safety = _make_methods(values, entries, peft, document)
    document.raise_problems()
    assert parts is not None  # otherwise there were problems
    if peft is not None:
        training.setdefault("learning_rate", LORA_LEARNING_RATE)
    return Recipe(Path(path), document.values, parts, training, peft, safety, document, tuple(changes))


def _check_parts(values: dict[str, Any], document: Document) -> RecipePart | None:
    try:
        return RecipePart.model_validate(values)
    except ValidationError as error:
        for found in error.errors():
            place = tuple(found["loc"])
            part = PARTS.get(tuple(key for key in place[:-1] if isinstance(key, str)))
            if found["type"] == "extra_forbidden" and part:
                message = f"unknown key; {did_you_mean(place[-1], part.model_fields)}"
            elif found["type"] == "missing" and part:
                message = f"is missing. {part.model_fields[str(place[-1])].description or ''}".strip()
            elif place == ("safety",):
                message = f"{_SAFETY}, got {short(found['input'])}; {did_you_mean(found['input'], method_fields())}"
            elif found["type"] == "value_error":
                message = found["msg"].removeprefix("Value error, ")
            else:
                message = f"{found['msg'][0].lower()}{found['msg'][1:]}, got {short(found['input'])}"
            document.problem(place, message)
    return None


def _check_settings(
    settings: Any, known: Hints, place: Place, document: Document, elsewhere: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return settings with their types put right; those that have `elsewhere` a place, or no meaning, are refused."""
    elsewhere, checked = elsewhere or {}, {}
    known = {name: hint for name, hint in known.items() if name not in elsewhere}
    for name, value in settings.items() if isinstance(settings, dict) else ():
        if name in known and place[0] == "safety" and _is_data(name, value):
            if (source := _data_source(value, (*place, name), document)) is not None:
                checked[name] = source
            continue
        if name in known:
            right, message = check_field(name, value, known[name], in_range=place[0] != "safety")
        else:
            right, message = None, elsewhere.get(name) or f"unknown setting; {did_you_mean(name, known)}"
        if message is None:
            checked[name] = right
        else:
            document.problem((*place, name), message)
    return checked


def _data_source(value: dict[str, Any], place: Place, document: Document) -> SourcePart | None:
    """Return the source of a method's rows."""
    try:
        return SourcePart.model_validate(value)
    except ValidationError as error:
        for found in error.errors():
            inner = (*place, *found["loc"])
            hint = (
                f"; {did_you_mean(inner[-1], SourcePart.model_fields)}" if found["type"] == "extra_forbidden" else ""
            )
            document.problem(inner, f"{found['msg'].removeprefix('Value error, ')}{hint}, got {short(found['input'])}")
    return None


def _check_training(values: dict[str, Any], document: Document) -> dict[str, Any]:
    place: Place = ("training",)
    checked = _check_settings(values.get("training"), training_fields(), place, document, NOT_UNDER_TRAINING)
    if str(checked.get("eval_strategy") or "no") != "no":
        reason = "a recipe has no rows to take a loss on; ask prompts instead, with `evaluation` and `monitor`"
        document.problem((*place, "eval_strategy"), reason)
    return checked


def _check_entries(values: dict[str, Any], document: Document) -> list[tuple[Place, str, dict[str, Any]]]:
    """Return place, method and settings of each entry of `safety`, as far as they are right."""
    known = method_fields()
    found = []
    listed = values.get("safety", "recommended") or []
    for position, entry in enumerate(listed if isinstance(listed, list) else [listed]):
        place: Place = ("safety", position) if isinstance(listed, list) else ("safety",)
        settings = {"method": entry} if entry == "recommended" else dict(entry) if isinstance(entry, dict) else None
        if settings is None:
            continue  # the schema has complained
        name = settings.pop("method", None)
        if not isinstance(name, str) or name not in known:
            hint = did_you_mean(name or "", known)
            document.problem((*place, "method"), f"got {short(name)}; {hint}" if name else f"is missing; {hint}")
            continue
        checked = _check_settings(settings, known[name], place, document)
        if len(checked) == len(settings):
            found.append((place, name, checked))
    return found


def _make_peft(settings: Any, checked: dict[str, Any], document: Document) -> LoraConfig | None:
    if not isinstance(settings, dict):
        return None
    from peft import LoraConfig

    try:
        return LoraConfig(**checked, task_type="CAUSAL_LM")
    except (ValueError, TypeError) as error:
        document.problem(("peft",), str(error))
        return None


def _make_methods(
    values: dict[str, Any],
    entries: list[tuple[Place, str, dict[str, Any]]],
    peft: LoraConfig | None,
    document: Document,
) -> list[SafetyMethod]:
    """Return the methods, each of which has looked at the adapter it is to protect."""
    from ..methods import METHODS

    methods: list[SafetyMethod] = []
    for place, name, settings in entries:
        if document.is_faulty(place):
            continue
        try:
            settings = {key: _rows_of(value, key) for key, value in settings.items()}
            made = _recommended(values, **settings) if name == "recommended" else [METHODS[name](**settings)]
        except (ValueError, TypeError, OSError) as error:
            hint = "" if "safety" in values else " Or write `safety: null` to train without protection."
            document.problem(place, f"{error}{hint}")
            continue
        for method in made:
            try:
                peft = method.adapt_peft_config(copy.deepcopy(peft))
            except (ValueError, TypeError) as error:
                document.problem(place, str(error))
                continue
            if any(type(other) is type(method) for other in methods):
                twice = next(name for name, kind in METHODS.items() if kind is type(method))
                document.problem((*place, "method"), f"`{twice}` is listed a second time")
            methods.append(method)
    return methods


def _rows_of(value: Any, name: str) -> Any:
    """Return the rows or prompts of a source that says how it is read; other settings as they are."""
    if not isinstance(value, SourcePart):
        return value
    from ..data import Kind, as_prompts, as_rows

    if name.endswith("prompts"):
        kind: Kind = "benign" if name.startswith("benign") else "harmful"
        return as_prompts(value.source(), kind, argument=name, options=value.options())
    return as_rows(value.source(), argument=name, options=value.options())[0]


def _recommended(values: dict[str, Any], **settings: Any) -> list[SafetyMethod]:
    from ..data.protection import own_file
    from ..methods.recommended import recommended

    if settings.get("harmful_data") is None:
        model = values.get("model")
        path = model.get("path") if isinstance(model, dict) else None
        settings["harmful_data"] = own_file(str(path), "harmful") if path else None
    return recommended(**settings)


def moved(value: Any, place: Place, folder: Path, seat: Path | None = None) -> Any:
    """Return a value of a recipe with the paths in it made absolute, or as they are seen from another folder.

    Paths are the files of data, prompts and monitor; elsewhere texts that begin with `./` or `../`; and in settings
    the names of files (`harmful.jsonl`, `direction.safetensors`) and of what there is in the recipe's folder. The
    output is made where the command is given, and absolute paths stay what they are.

    Args:
        value (`Any`): The value, or several in lists and mappings.
        place (`Place`): Where it is in the recipe; `()` for all of it.
        folder (`Path`): The folder that its paths are seen from.
        seat (`Path`, *optional*): The folder that they are to be seen from; left out, they become absolute.
    """
    if isinstance(value, dict):
        return {key: moved(inner, (*place, key), folder, seat) for key, inner in value.items()}
    if isinstance(value, list):
        return [moved(inner, (*place, n), folder, seat) for n, inner in enumerate(value)]
    if not isinstance(value, str) or not _is_path(value, place, folder) or os.path.isabs(value):
        return value
    target = os.path.abspath(folder / os.path.expanduser(value))  # a user that there is not is left as it is
    if seat is None:
        return target
    seen = Path(os.path.relpath(target, seat)).as_posix()
    return seen if seen.startswith("../") else f"./{seen}"


def _is_path(value: str, place: Place, folder: Path) -> bool:
    keys = [key for key in place if isinstance(key, str)]
    if keys == ["output"] or value.startswith(PREFIX) or not value:
        return False
    if value.startswith(("./", "../")) or keys in _FILES:
        return True
    if keys[0] == "safety" and keys[-1] == "path":
        return True
    if len(keys) > 1 and keys[-1] != "method" and keys[0] in ("safety", "training", "peft"):
        suffixes = [suffix.lower() for suffix in Path(value).suffixes if suffix.lower() != ".gz"]
        return suffixes[-1:] != [] and suffixes[-1] in (*KINDS, ".safetensors") or (
            keys[0] == "safety" and _exists(folder / value)
        )  # fmt: skip
    return keys in (["model", "path"], ["data", "hub"]) and _exists(folder / value)


def _exists(path: str | Path) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # a name that is too long, of no user, or with a null character
        return False


def _is_folder(path: str | Path) -> bool:
    return _exists(path) and Path(path).expanduser().is_dir()


def _check_files(values: dict[str, Any], document: Document) -> None:
    """Check what can be known of models, data, prompts and artifacts without loading them."""
    from ..data import ReadOptions

    for place, source in _named(values):
        for key, value in source.items():
            if isinstance(value, str) and (problem := _file_problem(place, key, value)):
                document.problem((*place, key), problem)
        settings = {name: source[name] for name in ("format", "columns") if source.get(name) is not None}
        if settings and (place[0] in ("data", "evaluation") or _is_data(str(place[-1]), source)):
            try:
                ReadOptions(**settings).chosen_format()
            except (ValueError, TypeError, AttributeError) as error:
                document.problem((*place, next(iter(settings))), str(error))


def _file_problem(place: Place, key: str, value: str) -> str:
    """Return what is wrong with the file or folder that a key names; an empty text if nothing is."""
    is_given = value.startswith(("/", "~"))
    if key == "hub" or (place, key) == (("model",), "path"):
        if is_given and not _is_folder(value):
            return f"there is no folder `{value}`"
        return model_problem(value) if key == "path" else ""
    try:
        if key == "path" and not (place[0] == "evaluation" and _is_folder(value)):  # a folder of prompts by category
            _check_data_file(value)
        elif key != "path" and is_given and not _exists(value):
            return f"there is no file or folder `{value}`" + _makes(key)
        elif key in ARTIFACTS and _exists(value):
            _check_artifact(value, key)
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def _makes(key: str) -> str:
    return f"; `safe-trainer {key}` makes one" if key in ARTIFACTS else ""


def _check_data_file(path: str) -> None:
    if path.startswith(PREFIX):
        raise ValueError(f"a dataset is given under `hub`: `hub: {path.removeprefix(PREFIX)}`")
    kind_of(path)
    if not is_file(path):
        folder = Path(path).expanduser().parent
        near = get_close_matches(
            Path(path).name, [file.name for file in folder.iterdir()] if _is_folder(folder) else []
        )
        raise ValueError(f"there is no file `{path}`" + (f"; did you mean `{near[0]}`?" if near else ""))


def _check_artifact(path: str, key: str) -> None:
    """See that a file or folder holds what its key says, from the header of its weights."""
    from safetensors import SafetensorError, safe_open

    file = Path(path).expanduser()
    file = file / "adapter_model.safetensors" if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"`{path}` holds no {ARTIFACTS[key]}; `safe-trainer {key}` makes them")
    try:
        with safe_open(file, framework="np") as opened:
            kind = (opened.metadata() or {}).get("kind")
    except SafetensorError as error:
        raise ValueError(f"`{file}` is not a complete safetensors file ({error}); make or copy it again") from error
    if not str(kind).startswith(ARTIFACTS[key]):
        found = f"a file of kind {kind!r}" if kind else "an adapter or other weights"
        raise ValueError(f"`{path}` is {found}, not {ARTIFACTS[key]}; `safe-trainer {key}` makes them")


def model_problem(source: str) -> str:
    """Return what is wrong with the folder of a model, as far as its files tell; an empty text if nothing is.

    Args:
        source (`str`): Folder or Hub id; of an id nothing is known.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(source).expanduser()
    if not folder.is_dir():
        return f"`{source}` is a file, not the folder of a model" if folder.is_file() else ""
    if not any(folder.iterdir()):
        return f"the folder `{source}` is empty"
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return f"`{source}` is an adapter, not a model: give its base model here, and the adapter as such"
    if not (folder / "config.json").is_file():
        return f"the folder `{source}` holds no model: there is no config.json in it"
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="np"):
                pass
        except SafetensorError as error:
            return f"the weights `{file}` are incomplete or damaged ({error}). Save or download the model again"
    return ""


def _named(values: dict[str, Any]) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Yield each mapping that names files, with its place."""
    evaluation = values.get("evaluation")
    for place, found in (
        (("model",), values.get("model")),
        (("data",), values.get("data")),
        (("evaluation", "prompts"), evaluation.get("prompts") if isinstance(evaluation, dict) else None),
        (("monitor",), values.get("monitor")),
        (("safety",), values.get("safety")),
    ):
        listed = [
            (place, found),
            *(((*place, n), item) for n, item in enumerate(found if isinstance(found, list) else ())),
        ]
        for inner, source in listed:
            if isinstance(source, dict):
                yield inner, source
                rows = source.items() if place == ("safety",) else ()
                yield from (((*inner, key), data) for key, data in rows if _is_data(key, data))


def _is_data(key: str, value: Any) -> bool:
    """Return whether a method's setting is rows with options for how they are read, as under `data`."""
    return key.endswith(("_data", "prompts")) and isinstance(value, dict)
