"""What a landscape is made of, and its file: one line for each place that was measured, written at once."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...evaluation.statistics import Rate

RANDOM = "random"
PLACES, SETTINGS = "landscape.csv", "landscape.json"

AxisName = Literal["alpha", "beta"]


@dataclass(frozen=True)
class Place:
    """One place in the plane, or one checkpoint with the place that is nearest to it.

    Args:
        alpha (`float`): Along the alignment direction.
        beta (`float`): Across it.
        refused (`int`): Harmful prompts refused.
        complied (`int`): Harmful prompts complied with.
        neither (`int`): Neither; also where the model is so far off that it computes NaN.
        loss (`float`): Mean loss on the task's references, in nats per token; NaN where it was not measured.
        name (`str`, *optional*): Of a checkpoint; empty for a place of the plane.
        share (`float`, *optional*, defaults to `1.0`): Share of the checkpoint's `‖ΔW‖²` that lies in the plane. The
            counts and the loss are those of the checkpoint itself.
    """

    alpha: float
    beta: float
    refused: int
    complied: int
    neither: int
    loss: float
    name: str = ""
    share: float = 1.0

    @property
    def harmful_score(self) -> Rate:
        """Compliance with harmful prompts."""
        return self.rate("complied")

    def rate(self, outcome: str) -> Rate:
        """Return the rate of `"refused"`, `"complied"` or `"neither"`."""
        return Rate(int(getattr(self, outcome)), self.refused + self.complied + self.neither)

    @property
    def key(self) -> tuple[str, float, float]:
        """What a place is found again by."""
        return self.name, self.alpha, self.beta


@dataclass(frozen=True)
class Landscape:
    """Harmful score and task loss over a plane of weights, along its axes, and at checkpoints.

    Made by [`measure_landscape`].

    Args:
        places (`tuple[Place, ...]`): The places of the plane and of its axes.
        checkpoints (`tuple[Place, ...]`): The unaligned model, then those of the training run in their order.
        alphas (`tuple[float, ...]`): Where the plane was measured, along the alignment direction.
        betas (`tuple[float, ...]`): And across it.
        settings (`Mapping[str, Any]`): What was measured, and how.
    """

    places: tuple[Place, ...]
    checkpoints: tuple[Place, ...]
    alphas: tuple[float, ...]
    betas: tuple[float, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def axis(self, name: AxisName) -> list[Place]:
        """Return the places along one axis through the model, from the lowest to the highest."""
        other: AxisName = "beta" if name == "alpha" else "alpha"
        found = [place for place in self.places if getattr(place, other) == 0]
        return sorted(found, key=lambda place: getattr(place, name))

    def plane(self) -> list[list[Place]]:
        """Return the places of the plane: for each β a row with a place for each α."""
        held = {place.key: place for place in self.places}
        return [[held["", alpha, beta] for alpha in self.alphas] for beta in self.betas]

    def basin(self, name: AxisName) -> tuple[float, float]:
        """Return from where to where along an axis the model still refuses at least half of the harmful prompts.

        Both are of what was measured: an end of the axis means that the basin goes at least so far. NaN where the
        model itself does not refuse so many.
        """
        line = self.axis(name)
        start = next(index for index, place in enumerate(line) if getattr(place, name) == 0)
        if line[start].rate("refused").value < 0.5:
            return math.nan, math.nan
        low = high = start
        while low > 0 and line[low - 1].rate("refused").value >= 0.5:
            low -= 1
        while high < len(line) - 1 and line[high + 1].rate("refused").value >= 0.5:
            high += 1
        return getattr(line[low], name), getattr(line[high], name)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        found = dataclasses.asdict(self)
        found["basin"] = {name: self.basin(name) for name in ("alpha", "beta")}
        return _finite(found)


class Record:
    """The measured places of a folder: read when it is opened, each new one on disk before the next begins.

    Args:
        folder (`str`, `Path` or `None`): Where to write; nowhere if `None`.
        settings (`Mapping[str, Any]`): What decides on the numbers; must be that of the places which are there.

    Raises:
        ValueError: If the folder holds another landscape, or its file is damaged.
    """

    def __init__(self, folder: str | Path | None, settings: Mapping[str, Any]) -> None:
        self.held: dict[tuple[str, float, float], Place] = {}
        self._file = Path(folder) / PLACES if folder is not None else None
        if self._file is None:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        marker = self._file.with_name(SETTINGS)
        if marker.is_file() and self._file.is_file():
            _compare(json.loads(marker.read_text(encoding="utf-8")), json.loads(json.dumps(settings)), marker.parent)
            self.held = {place.key: place for place in _read(self._file)}
        else:
            marker.write_text(json.dumps(settings, indent=1), encoding="utf-8")
            self._file.write_text(",".join(_COLUMNS) + "\n", encoding="utf-8")

    def add(self, place: Place) -> None:
        """Keep a place, and write it."""
        self.held[place.key] = place
        if self._file is None:
            return
        with self._file.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(dataclasses.astuple(place))


_COLUMNS = {column.name: column.type for column in dataclasses.fields(Place)}
_READERS = {"int": int, "float": float, "str": str}


def _read(path: Path) -> Iterable[Place]:
    """Read all whole lines, and cut off one that was being written when the program ended."""
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    for number, line in enumerate(csv.DictReader(whole.splitlines()), start=2):
        try:
            yield Place(**{name: _READERS[str(kind)](line[name]) for name, kind in _COLUMNS.items()})
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(
                f"`{path}` is damaged in line {number} ({error!r}). Remove the line, or start anew."
            ) from error


def _compare(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    # The same model may lie under another path.
    different = [name for name in {**found, **wanted} if name != "source" and found.get(name) != wanted.get(name)]
    if different:
        raise ValueError(
            f"`{folder}` holds another landscape: {', '.join(different)} differ. Name another folder, or remove it."
        )


def _finite(value: Any) -> Any:
    """Return plain values with `None` for what is not a number, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
