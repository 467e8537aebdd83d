"""The settings of methods as JSON: saved with a checkpoint, and compared when a run resumes from it.

Next to the settings is what a method's tensors were made from, by their provenance: so data may be replaced by what
was made from it, and by nothing else.
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
"""Next to a method's settings: hashes of the data or the weights from which its tensors were made."""
_DATA = ("rows_sha256", "prompts_sha256", "harmful_rows", "retain_rows")
_ORIGINS = (*_DATA, "settings", "aligned", "unaligned", "rank", "max_error")
_VOLATILE = {"created", "versions", "report"}  # what differs where the same thing is computed again
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def settings_of(methods: Sequence[SafetyMethod]) -> dict[str, Any]:
    """Return the settings of each method as JSON by the name of its class.

    Data is represented by a hash and local files by that of their content, so a run may be moved to another folder; of
    another local path only the last part is kept.
    """
    return {type(method).__name__: {**_settings(method), **_origin(method)} for method in methods}


def _settings(method: Any) -> dict[str, Any]:
    listed = [field for field in fields(method) if field.init] if is_dataclass(method) else []
    # A name such as "output" may be that of a file, too: only what may be a path is looked for on the disk.
    return {field.name: _as_json(getattr(method, field.name), "Path" in str(field.type)) for field in listed}


def _origin(method: SafetyMethod) -> dict[str, Any]:
    """Return what the tensors were made from, without what the same data may be used with in another run."""
    provenance = method.provenance or {}
    found = {name: provenance[name] for name in _ORIGINS if provenance.get(name) is not None}
    if "rows_sha256" in found:
        found.pop("rank", None)  # of a larger basis a method takes the top directions
    for role in found.keys() & {"aligned", "unaligned"}:
        found[role] = found[role].get("weights_sha256")  # under whatever name they were found
    return {MADE_FROM: json.loads(_encoded(found))} if found else {}


def _as_json(value: Any, may_be_path: bool = False) -> Any:
    """Return a value as JSON that identifies it and reveals nothing else."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (str, Path)):
        return _source(str(value), may_be_path or isinstance(value, Path))
    provenance = getattr(value, "provenance", None)
    if isinstance(provenance, Mapping):  # a direction, a basis, vectors: tensors that know where they come from
        kept = {name: entry for name, entry in provenance.items() if name not in _VOLATILE}
        return {"kind": type(value).__name__, "sha256": _sha256([kept])}
    if hasattr(value, "tolist"):  # a number or an array of NumPy or torch
        return _as_json(value.tolist())
    if isinstance(value, Mapping):
        return {str(name): _as_json(inner) for name, inner in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return _as_json(asdict(value))
    if isinstance(value, Iterable) and isinstance(value, Sized):
        return {"rows": len(value), "sha256": _sha256(value)}
    return {"kind": type(value).__name__}  # an iterator that is read once, or something of a user's own


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
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return {"sha256": digest.hexdigest()}
    is_local = os.path.isabs(source) or source.startswith((".", "~")) or (is_folder and os.sep in source)
    return path.name if is_local else source


def _plain(value: Any) -> Any:
    """Return a value that JSON does not know in a form that it does, the same in every process."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Set):
        return sorted(map(_encoded, value))
    return dict(value) if isinstance(value, Mapping) else _ADDRESS.sub("", repr(value))


def _encoded(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=_plain)


def _sha256(values: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for value in _plain(values) if isinstance(values, Set) else values:
        digest.update(_encoded(value).encode() + b"\n")
    return digest.hexdigest()


def differences(saved: dict[str, Any], current: dict[str, Any]) -> Iterator[str]:
    """Yield a sentence for each difference between the settings of two runs."""
    for name in sorted(saved.keys() | current.keys()):
        if name not in current:
            yield f"the checkpoint was made with {name}, this run has none"
        elif name not in saved:
            yield f"the checkpoint was made without {name}"
        else:
            before, now = saved[name], current[name]
            shared = before.keys() & now.keys()  # another version may know others
            for field in sorted(shared - _exchanged(before, now)):
                if before[field] != now[field]:
                    yield f"`{field}` of {name} was {json.dumps(before[field])} and is {json.dumps(now[field])}"


def _exchanged(before: dict[str, Any], now: dict[str, Any]) -> set[str]:
    """Return sources that may take each other's place, as data and the basis that was measured with them do."""
    origin = before.get(MADE_FROM)
    if not origin or origin != now.get(MADE_FROM):
        return set()
    shared = before.keys() & now.keys()
    sources = {field for field in shared if isinstance(before[field] or now[field], (dict, str))}
    gone = {field for field in sources if now[field] is None}
    new = {field for field in sources if before[field] is None}
    same = {field for field in sources if _is_content(before[field]) and _is_content(now[field])}  # in another form
    making = {field for field in shared if origin.get("settings") in (before[field], now[field]) and before[field]}
    return same | (gone | new | making if gone and new else set())


def _is_content(value: Any) -> bool:
    return isinstance(value, dict) and "sha256" in value
