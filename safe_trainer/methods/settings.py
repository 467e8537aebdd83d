"""The settings of methods as JSON: to be kept beside a checkpoint and compared when it is resumed from.

Data is told by a hash, so that nothing of it is in the file, and local files by their content, so that a run may be
moved to another folder; of a local path no more than the last part is kept. Beside the settings stands what a method's
tensors were made from, as their provenance tells it: so data may be exchanged for what was made from it, and for
nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set, Sized
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from .base import SafetyMethod

MADE_FROM = "made_from"
"""What stands beside the settings: hashes of the data or the weights from which a method's tensors were made."""
_ORIGINS = ("rows_sha256", "harmful_rows", "retain_rows", "settings", "aligned", "unaligned", "rank", "max_error")
_OF_THE_DAY = {"created", "versions", "report"}  # what differs where the same thing is computed once more
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_PIECE = 1000  # rows that a table gives at once


def settings_of(methods: Sequence[SafetyMethod]) -> dict[str, Any]:
    """Return the settings of each method by its name.

    Args:
        methods (`Sequence[SafetyMethod]`): Methods whose settings are the fields of a dataclass; others have none.

    Example:

    ```python
    >>> from safe_trainer import AsFT
    >>> settings_of([AsFT(unaligned_model="/home/me/base", weight=0.5)])["AsFT"]["unaligned_model"]
    'base'

    ```
    """
    return {type(method).__name__: {**_settings(method), **_origin(method)} for method in methods}


def _settings(method: Any) -> dict[str, Any]:
    if not is_dataclass(method):
        return {}
    # A name such as "output" may be that of a file, too: only what may be a path is looked for on the disk.
    return {
        field.name: _told(getattr(method, field.name), may_be_path="Path" in str(field.type))
        for field in fields(method)
        if field.init
    }


def _origin(method: SafetyMethod) -> dict[str, Any]:
    """Return what the tensors at work were made from, without what the same data may be used with in another run."""
    provenance = method.provenance
    if not provenance:
        return {}
    found = {name: provenance[name] for name in _ORIGINS if provenance.get(name) is not None}
    if "rows_sha256" in found:
        found.pop("rank", None)  # of a larger basis a method takes the leading directions
    for role in found.keys() & {"aligned", "unaligned"}:
        found[role] = found[role].get("weights_sha256")  # under whatever name they were found
    return {MADE_FROM: json.loads(_ENCODER.encode(found))} if found else {}


def _told(value: Any, may_be_path: bool = False) -> Any:
    """Return a value as JSON that tells it from others and nothing else."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (str, Path)):
        return _source(str(value), may_be_path or isinstance(value, Path))
    provenance = getattr(value, "provenance", None)
    if isinstance(provenance, Mapping):  # a direction, a basis, vectors: tensors that know where they come from
        kept = {name: entry for name, entry in provenance.items() if name not in _OF_THE_DAY}
        return {"kind": type(value).__name__, "sha256": _digest([kept])}
    if hasattr(value, "tolist"):  # a number or an array of NumPy or torch
        return _told(value.tolist())
    if isinstance(value, Mapping):
        return {str(name): _told(inner) for name, inner in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return _told(asdict(value))
    if isinstance(value, Iterable) and isinstance(value, Sized):
        return {"rows": len(value), "sha256": _digest(_rows(value))}
    return {"kind": type(value).__name__}  # an iterator that is read once, or something of a user's own


def _rows(value: Any) -> Iterator[Any]:
    """Yield rows, of a table of `datasets` many at once: one by one takes ten times as long."""
    if isinstance(value, Set):
        yield from sorted(_ENCODER.encode(entry) for entry in value)  # has another order in every process
    elif hasattr(value, "column_names") and hasattr(value, "iter"):
        for columns in value.iter(batch_size=_PIECE):
            yield from (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    else:
        yield from value


def _source(source: str, may_be_path: bool) -> Any:
    path = Path(source)
    try:
        path = path.expanduser()
        is_folder = path.is_dir()
    except (OSError, RuntimeError):  # a text that no path can be
        return source
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) if is_folder else []
    if may_be_path and files:
        digest = hashlib.sha256()
        for file in files:
            digest.update(b"%d." % file.stat().st_size)
            with file.open("rb") as stream:
                while piece := stream.read(2**24):
                    digest.update(piece)
        return {"sha256": digest.hexdigest()}
    is_local = os.path.isabs(source) or source.startswith((".", "~")) or (is_folder and os.sep in source)
    return path.name if is_local else source


def _plain(value: Any) -> Any:
    """Return what JSON does not know as something that it does, the same in every process."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Set):
        return sorted(_ENCODER.encode(entry) for entry in value)
    return _ADDRESS.sub("", repr(value))


_ENCODER = json.JSONEncoder(sort_keys=True, default=_plain)


def _digest(values: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(_ENCODER.encode(value).encode() + b"\n")
    return digest.hexdigest()
