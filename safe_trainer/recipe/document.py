"""A YAML text as values that know their lines, so that a complaint can point at the place that it is about."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import yaml

_LARGEST = 100_000  # values in a recipe, aliases each time they stand there; a bomb of aliases has millions
_SHOWN = 200  # characters of a value in a message

Place = tuple[str | int, ...]
"""Where a value stands: the keys and positions that lead to it, such as `("data", 0, "path")`."""


class RecipeError(ValueError):
    """A recipe cannot be run; lists everything that is wrong with it, each with its place."""

    def __init__(self, name: str, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        count = f"{len(self.problems)} problem" + ("s" if len(self.problems) != 1 else "")
        super().__init__("\n".join([f"{count} in `{name}`:", *(f"  {problem}" for problem in self.problems)]))


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with a value of a recipe.

    Args:
        place (`Place`): Where the value stands.
        message (`str`): What was found, and what was expected.
    """

    place: Place
    message: str


class Document:
    """Values of a YAML text with their lines, and with what the command line changed about them.

    Args:
        text (`str`): The YAML text: a mapping.
        name (`str`): What messages call it; usually the path of its file.

    Raises:
        RecipeError: If it is no YAML, no mapping, or names a key twice, which YAML itself would let pass.
    """

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        self._lines: dict[Place, str] = {}
        self._problems: list[Problem] = []
        try:
            loader = _Loader(text)
            node = loader.get_single_node()
            _check_size(node)
            self.values: dict[str, Any] = self._construct(loader, node, ())
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f"line {mark.line + 1}: " if mark else ""
            raise RecipeError(name, [f"{line}no YAML: {getattr(error, 'problem', None) or error}"]) from error
        except (RecursionError, ValueError, AttributeError) as error:  # values within themselves, dates that are none
            raise RecipeError(name, [f"no YAML that can be read: {error}"]) from error
        if not isinstance(self.values, dict):
            raise RecipeError(name, [f"line 1: expected keys such as `model:`, found {self.values!r}"])
        self.complain(self._problems)

    def complain(self, problems: Iterable[Problem]) -> None:
        """Raise one error that lists all problems in the order of the file, if there are any."""
        found = sorted(problems, key=lambda problem: self._order(problem.place))
        if found:
            raise RecipeError(self.name, [f"{self.where(p.place)}{dotted(p.place)}: {p.message}" for p in found])

    def where(self, place: Place) -> str:
        """Return the line of a value, or of the nearest value around it."""
        while place and place not in self._lines:
            place = place[:-1]
        return f"{self._lines[place]}, " if place in self._lines else ""

    def put(self, place: Place, value: Any) -> None:
        """Change a value for the command line; keys that are not there yet are added.

        Raises:
            RecipeError: If it would stand in something that is no mapping, or behind the end of a list.
        """
        here: Any = self.values
        for key in place[:-1]:
            if isinstance(here, dict) and here.get(key) is None:
                here[key] = {}
            here = _inside(here, key)
        if not isinstance(here, dict) and _inside(here, place[-1]) is None:
            raise RecipeError(self.name, [f"--set {dotted(place)}: there is no such place in this recipe"])
        here[place[-1]] = value
        self._lines[place] = "--set"

    def _order(self, place: Place) -> tuple[bool, int]:
        line = self.where(place).removeprefix("line ").rstrip(", ")
        return (not line.isdecimal(), int(line) if line.isdecimal() else 0)

    def _construct(self, loader: _Loader, node: yaml.Node | None, place: Place) -> Any:
        if node is None:
            return None
        self._lines.setdefault(place, f"line {node.start_mark.line + 1}")
        if isinstance(node, yaml.SequenceNode) and node.tag.endswith(":seq"):
            return [self._construct(loader, item, (*place, n)) for n, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode) or not node.tag.endswith(":map"):
            return loader.construct_object(node, deep=True)  # refuses tags that would make Python objects
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(None, None, "a key must be one word", key_node.start_mark)
            inner, line = (*place, key_node.value), key_node.start_mark.line + 1
            if inner in self._lines:
                self._problems.append(Problem(inner, f"stands in line {line} a second time"))
            self._lines.setdefault(inner, f"line {line}")
        loader.flatten_mapping(node)  # `<<: *anchor`, whose keys come before those that stand here
        values: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node, deep=True)
            values[key] = self._construct(loader, value_node, (*place, key))
        return values


class _Loader(yaml.SafeLoader):
    """Reads `1e-4` as a number, as everybody means it; YAML 1.1 wants a point in it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def assignment(text: str) -> tuple[Place, Any]:
    """Return place and value of a change such as `training.learning_rate=1e-4`.

    Raises:
        ValueError: If it has another form.
    """
    path, sign, value = text.partition("=")
    text = _cut(text)
    place: Place = tuple(int(part) if part.isdecimal() else part for part in path.strip().split("."))
    if not sign or "" in place:
        raise ValueError(f"--set {text}: expected a form such as training.learning_rate=1e-4")
    try:
        _check_size(_Loader(value).get_single_node())
        return place, yaml.load(value, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        raise ValueError(f"--set {text}: the value is no YAML. Quote it: --set '{_cut(path)}=\"…\"'") from error


def dotted(place: Place) -> str:
    """Return a place as a user writes it: `data.0.path`."""
    return ".".join(map(str, place)) or "recipe"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a hint at the known word that is nearest, or at all of them if they are few."""
    known = list(known)
    near = get_close_matches(str(word).lower(), known, n=1, cutoff=0.6)
    if near:
        return f"did you mean `{near[0]}`?"
    return f"known are {', '.join(known)}" if len(known) <= 12 else "it is not among those that are known"


def told(value: Any) -> str:
    """Return a value as a message shows it: not the whole of a long one."""
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _check_size(node: yaml.Node | None) -> None:
    """Refuse what would hold too many values, before it is made: aliases in each other multiply."""
    if node is not None and _size(node, {}) > _LARGEST:
        raise ValueError(f"it holds more than {_LARGEST:,} values; is there an anchor within itself?")


def _size(node: yaml.Node, known: dict[int, float]) -> float:
    """Return how many values a node holds, with those behind its aliases; no end of them if it is within itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        inner: list[Any] = [] if isinstance(node, yaml.ScalarNode) else list(node.value)
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in inner for part in pair]
        known[id(node)] = 1 + sum(_size(part, known) for part in inner)
    return known[id(node)]


def _inside(values: Any, key: str | int) -> Any:
    if isinstance(values, dict):
        return values.get(key)
    return values[key] if isinstance(values, list) and isinstance(key, int) and key < len(values) else None
