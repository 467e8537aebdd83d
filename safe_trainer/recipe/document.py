"""YAML text as values with their line numbers, so that messages can name the line."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import YAMLError

from .paths import Place

_CHANGED = sys.maxsize  # the line of what `--set` changed
_UNREADABLE = (ValueError, AttributeError, TypeError, KeyError, AssertionError)  # of impossible dates and so on
_LARGEST = 100_000  # values in a recipe, aliases counted each time: nested aliases make millions


class RecipeError(ValueError):
    """A recipe cannot be run; lists everything that is wrong with it, each with its line."""

    def __init__(self, name: str, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        count = f"{len(self.problems)} problem" + ("s" if len(self.problems) != 1 else "")
        super().__init__("\n".join([f"{count} in `{name}`:", *(f"  {problem}" for problem in self.problems)]))


class Document:
    """The values of a YAML text, the line of each, and the problems that are found in them; `name` is its file."""

    def __init__(self, text: str, name: str) -> None:
        self.name, self._size = name, 0
        self._lines: dict[Place, int] = {(): 1}
        self._found: list[tuple[Place, str]] = []
        try:
            self.values: dict[str, Any] = self._plain(YAML().load(text), ())  # round trip, which knows the lines
        except YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f"line {mark.line + 1}: " if mark else ""
            reason = str(getattr(error, "problem", None) or error).partition("\n")[0]
            raise RecipeError(name, [f"{line}not valid YAML: {reason}"]) from error
        except RecursionError as error:
            raise RecipeError(name, ["not readable YAML: a value is nested too deeply, or contains itself"]) from error
        except _UNREADABLE as error:
            raise RecipeError(name, [f"not readable YAML: {error}"]) from error
        if not isinstance(self.values, dict):
            raise RecipeError(name, [f"line 1: expected keys such as `model:`, found {short(self.values)}"])

    def problem(self, place: Place, message: str) -> None:
        """Note what is wrong with a value, once."""
        if (place, message) not in self._found:
            self._found.append((place, message))

    @contextmanager
    def noting(self, place: Place) -> Iterator[None]:
        """Note an error that is raised in this context as the problem of a value."""
        try:
            yield
        except (ValueError, TypeError) as error:
            self.problem(place, str(error))

    def raise_problems(self) -> None:
        """Raise one error that lists all problems in the order of the file, if there are any."""
        if self._found:
            ordered = sorted(self._found, key=lambda found: self._line(found[0]))
            raise RecipeError(self.name, [f"{self._where(p)}, {dotted(p)}: {message}" for p, message in ordered])

    def _line(self, place: Place) -> int:
        """Return the line of a value, or of the nearest value around it."""
        while place not in self._lines:
            place = place[:-1]
        return self._lines[place]

    def _where(self, place: Place) -> str:
        line = self._line(place)
        return "--set" if line == _CHANGED else f"line {line}"

    def put(self, place: Place, value: Any) -> None:
        """Change a value for `--set`; keys that are not there yet are added."""
        here: Any = self.values
        for number, key in enumerate(place[:-1], 1):
            if isinstance(here, dict) and here.get(key) is None:
                here[key] = {}
                self._lines[place[:number]] = _CHANGED
            here = _inside(here, key)
        if not isinstance(here, dict) and _inside(here, place[-1]) is None:
            raise RecipeError(self.name, [f"--set {dotted(place)}: there is no such place in this recipe"])
        here[place[-1]] = value
        self._lines = {known: line for known, line in self._lines.items() if known[: len(place)] != place}
        self._lines[place] = _CHANGED

    def _plain(self, value: Any, place: Place) -> Any:
        """Return a value of the YAML library as Python's own, and note its lines."""
        self._size += 1
        if self._size > _LARGEST:
            raise ValueError(f"it holds more than {_LARGEST:,} values; does an anchor contain itself?")
        tag = getattr(getattr(value, "tag", None), "value", None)
        if tag is not None:
            name = str(tag).removeprefix("tag:yaml.org,2002:")
            raise ValueError(f"{self._where(place)}, {dotted(place)} has the tag `{name}`; remove it")
        if isinstance(value, CommentedMap):
            for key in value:
                if not isinstance(key, str | int | float):
                    raise ValueError(f"{self._where(place)}, a key must be one word, got {short(key)}")
                if key in value.lc.data:  # keys of `<<: *anchor` have no line of their own
                    self._lines[(*place, _scalar(key))] = value.lc.key(key)[0] + 1
            return {_scalar(key): self._plain(inner, (*place, _scalar(key))) for key, inner in value.items()}
        if isinstance(value, CommentedSeq):
            for n in value.lc.data or ():
                self._lines[(*place, n)] = value.lc.item(n)[0] + 1
            return [self._plain(inner, (*place, n)) for n, inner in enumerate(value)]
        return _scalar(value)


def _scalar(value: Any) -> Any:
    """Return a scalar of the YAML library, which remembers how it was written, as Python's own."""
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def assignment(text: str, name: str) -> tuple[Place, Any]:
    """Return place and value of a change such as `training.learning_rate=1e-4` to the recipe of this name."""
    path, sign, value = text.partition("=")
    place: Place = tuple(int(part) if part.isdecimal() else part for part in path.strip().split("."))
    if not sign or "" in place:
        raise RecipeError(name, [f"--set {_cut(text)}: expected a form such as training.learning_rate=1e-4"])
    try:
        return place, Document(f"value: {value}" if "\n" not in value else f"value:\n{value}", "--set").values["value"]
    except RecipeError as error:
        reason = error.problems[0].rpartition(": ")[2]
    except KeyError:
        reason = "it is more than one value"
    advice = f"Quote it: --set '{_cut(path)}=\"…\"'"
    raise RecipeError(name, [f"--set {_cut(text)}: the value is not valid YAML ({reason}). {advice}"])


def dotted(place: Place) -> str:
    """Return a place as a user writes it: `data.0.path`."""
    return ".".join(map(str, place)) or "recipe"


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    """Return a hint at the nearest known word, or at all of them if they are few."""
    known = list(known)
    near = get_close_matches(str(word).lower(), known, n=1, cutoff=0.6)
    if near:
        return f"did you mean `{near[0]}`?"
    return f"known are {', '.join(known)}" if len(known) <= 12 else "it is not among those that are known"


def _inside(values: Any, key: str | int) -> Any:
    if isinstance(values, dict):
        return values.get(key)
    return values[key] if isinstance(values, list) and isinstance(key, int) and key < len(values) else None


def short(value: Any) -> str:
    """Return a value for a message, cut off if it is long."""
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"
