"""The way of a training run: its checkpoints on disk, in their order, as updates of the model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from ...lora.updates import LinearLayer, weight
from ..drift.updates import Factors, updates_of

_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")
Stop = tuple[str, str | Path]

_MARKS = ("adapter_config.json", "config.json")


def stops_of(run: str | Path) -> list[Stop]:
    """Return the checkpoints of a training run by name, and its end if it was saved.

    Args:
        run (`str` or `Path`): The run's output folder, or the folder or Hub id of one adapter or model.

    Raises:
        FileNotFoundError: If the folder holds neither checkpoints nor an adapter or model.
    """
    folder = Path(run)
    if not folder.is_dir():
        return [("end", run)]
    numbered = [(int(found[1]), path) for path in folder.iterdir() if (found := _CHECKPOINT.search(path.name))]
    stops: list[Stop] = [(f"step {step}", path) for step, path in sorted(numbered) if _is_whole(path)]
    if _is_whole(folder) and not (stops and _weights(folder) == _weights(Path(stops[-1][1]))):
        stops.append(("end", run))
    if not stops:
        raise FileNotFoundError(f"`{run}` holds no adapter, no model and no `checkpoint-…`. Give the folder of a run.")
    return stops


def change_to(tuned: str | Path, layers: Mapping[str, LinearLayer]) -> dict[str, Factors]:
    """Return what a fine-tune changed in the model at hand, by layer.

    Args:
        tuned (`str` or `Path`): A LoRA adapter or a whole model: a folder or a Hub id.
        layers (`Mapping[str, LinearLayer]`): The model's linear layers, with the weights that training began with.
    """
    shapes = {name: layer.shape for name, layer in layers.items()}
    return dict(updates_of(tuned, lambda name: weight(layers[name].outer).float(), shapes))


def ways(stops: list[Stop], layers: Mapping[str, LinearLayer]) -> Iterator[tuple[str, dict[str, Factors]]]:
    """Yield the update of each checkpoint, one at a time in memory."""
    for name, path in stops:
        yield name, change_to(path, layers)


def _is_whole(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in _MARKS)


def _weights(folder: Path) -> list[bytes]:
    """Return the weights of an adapter as they are on disk; of a whole model nothing, it would be too much."""
    files = sorted(folder.glob("adapter_model.*"))
    return [file.read_bytes() for file in files] or [str(folder).encode()]
