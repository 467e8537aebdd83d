"""The settings of methods as JSON: to be kept beside a checkpoint and compared when it is resumed from.

Data is told by a hash, so that nothing of it is in the file, and local files by their content, so that a run may be
moved to another folder; of a local path no more than the last part is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import asdict, fields, is_dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from .base import SafetyMethod

_END = 4 * 2**20  # bytes from the beginning and from the end of a file that its hash is made of, beside its size
_ROWS = 10_000
_OF_THE_DAY = {"created", "versions", "report"}  # what differs where the same thing is computed once more


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
    return {type(method).__name__: _settings(method) for method in methods}


def _settings(method: Any) -> dict[str, Any]:
    if not is_dataclass(method):
        return {}
    # A name such as "output" may be that of a file, too: only what may be a path is looked for on the disk.
    return {
        field.name: _told(getattr(method, field.name), may_be_path="Path" in str(field.type))
        for field in fields(method)
        if field.init
    }


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
    if isinstance(value, Mapping):
        return {str(name): _told(inner) for name, inner in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return _told(asdict(value))
    if isinstance(value, Iterable) and isinstance(value, Sized):
        return {"rows": len(value), "sha256": _digest(islice(value, _ROWS))}
    return {"kind": type(value).__name__}  # an iterator that is read once, or something of a user's own


def _source(source: str, may_be_path: bool) -> Any:
    path = Path(source).expanduser()
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if may_be_path and files:
        digest = hashlib.sha256()
        for file in files:
            digest.update(_ends(file))
        return {"sha256": digest.hexdigest()}
    is_local = os.path.isabs(source) or source.startswith((".", "~"))
    return path.name if is_local else source


def _ends(file: Path) -> bytes:
    """Return size, beginning and end of a file: enough to tell it from others without reading gigabytes."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(_END)
        stream.seek(max(size - _END, stream.tell()))
        return b"%d." % size + start + stream.read()


def _digest(values: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, sort_keys=True, default=repr).encode() + b"\n")
    return digest.hexdigest()
