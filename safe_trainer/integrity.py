"""Whether the files of a checkpoint are those that were saved: by their checksums, or, where it has none, by form.

`checksums.json` is written when all else is, and names size and hash of each file. A checkpoint of TRL's own has none,
nor has one whose saving was cut short behind the last file; those before it may be gone by then, so it must do. What
can be told of such a one is whether all is there and nothing was cut short.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError, safe_open

logger = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"
"""The file that names the others of a checkpoint, with their sizes and hashes."""
_PASSING = ("README.md", "checkpoint-is-incomplete.txt")
"""No part of the state: the first anyone may put into their own words, the other transformers removes when its
just-in-time checkpoint is saved."""
_WEIGHTS = ("adapter_model.*", "*/adapter_model.*", "model*.safetensors", "pytorch_model*")
_TENSORS = ("model*.safetensors", "adapter_model.safetensors", "*/adapter_model.safetensors")
_OPTIMIZER = ("optimizer.pt", "optimizer.bin", "optimizer_*", "rank*-optimizer.pt")
_STATE = ("scheduler.pt", "scaler.pt", "rng_state*.pth", "training_args.bin", "global_step*/*.pt")
_ARCHIVES = (*_OPTIMIZER, *_STATE, "pytorch_model*.bin", "adapter_model.bin", "*/adapter_model.bin")


def write_checksums(folder: Path) -> None:
    """Write size and hash of every file below a folder beside them, whole or not at all.

    Failing to is told in a warning and harms nothing: the checkpoint is judged by its form then.
    """
    temporary = folder / f".{CHECKSUMS}.{os.getpid()}.tmp"
    try:
        files = {name: {"size": path.stat().st_size, "xxh3": _hash(path)} for name, path in _files(folder)}
        with temporary.open("w", encoding="utf-8") as file:
            json.dump({"files": files}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / CHECKSUMS)
    except OSError as error:
        logger.warning(
            "The checksums of `%s` could not be written (%s). It can be resumed from; whether its files were damaged "
            "since cannot be told by them.",
            folder.name,
            error,
        )
        _remove(temporary)


def damage(folder: Path, by_content: bool = True) -> str | None:
    """Return the file of a checkpoint that is missing or not what was saved; `None` if all are as they were.

    Args:
        folder (`Path`): The checkpoint.
        by_content (`bool`, *optional*, defaults to `True`): Whether files are read to compare their hashes, or their
            sizes are enough, because another process reads them.
    """
    try:
        listed = _listed(folder / CHECKSUMS)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return CHECKSUMS
    for name, (size, hashed) in listed.items():
        path = folder / name
        try:
            if path.stat().st_size != size or (by_content and _hash(path) != hashed):
                return name
        except OSError:  # it is not there, or the disk cannot read it any more
            return name
    return _malformed(folder, listed) or (None if listed else _absent(folder))


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in (CHECKSUMS, *_PASSING) and not path.name.endswith(".tmp"):
            yield path.relative_to(folder).as_posix(), path


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def _listed(path: Path) -> dict[str, tuple[int, str]]:
    if not path.exists():
        return {}
    files: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["files"]
    return {name: (int(told["size"]), str(told["xxh3"])) for name, told in files.items()}


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass  # the disk that could not be written; it has been told


# ---- by form


def _malformed(folder: Path, listed: dict[str, tuple[int, str]]) -> str | None:
    """Return the first file that was cut short, among those of which there is no checksum."""

    def found(patterns: tuple[str, ...]) -> list[tuple[str, Path]]:
        paths = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
        named = [(path.relative_to(folder).as_posix(), path) for path in paths]
        return [(name, path) for name, path in named if name not in listed]

    for name, path in found(_TENSORS):
        if not _opens(path):
            return name
    for name, path in found(_ARCHIVES):
        if not zipfile.is_zipfile(path):  # what torch saves is a zip archive, and its directory is at its end
            return name
    for name, path in found(("*.index.json",)):
        try:
            parts = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return name
        if (missing := next((part for part in parts if not (folder / part).is_file()), None)) is not None:
            return str(missing)
    return None


def _opens(path: Path) -> bool:
    """Return whether a file of tensors has a header, and the length that the header tells."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def _absent(folder: Path) -> str | None:
    """Return a file without which transformers would go on, and should not."""
    is_of_deepspeed = (folder / "latest").is_file() or any(folder.glob("global_step*"))
    if is_of_deepspeed and (lacking := _absent_of_deepspeed(folder)) is not None:
        return lacking
    if not is_of_deepspeed and not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        return "adapter_model.safetensors" if (folder / "adapter_config.json").is_file() else "model.safetensors"
    ranks = {int(number) for path in folder.glob("rng_state_*.pth") if (number := path.stem[10:]).isdigit()}
    wanted = [f"rng_state_{rank}.pth" for rank in range(max(2, 1 + max(ranks)))] if ranks else []
    parts = {
        "optimizer.pt": any(any(folder.glob(pattern)) for pattern in _OPTIMIZER),
        "scheduler.pt": (folder / "scheduler.pt").is_file(),
        "rng_state.pth": bool(ranks) or (folder / "rng_state.pth").is_file(),
    }
    if is_of_deepspeed:
        parts = {"rng_state.pth": parts["rng_state.pth"]}
    absent = [name for name, there in parts.items() if not there]
    if absent and (len(absent) < len(parts) or is_of_deepspeed):  # none at all is `save_only_model`
        return absent[0]
    return next((name for name in wanted if not (folder / name).is_file()), None)


def _absent_of_deepspeed(folder: Path) -> str | None:
    try:
        tag = (folder / "latest").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return "latest"
    return None if any((folder / tag).glob("*model_states.pt")) else tag
