"""Files of ours on disk: safetensors with provenance, written whole or not at all, refused with a clear message.

An artifact is an ordinary safetensors file, readable by any tool. Its metadata says what it is (`kind`), how it is
laid out (`format_version`), and carries `details`, JSON that tells where it came from, and a SHA-256 of all of it, by
which damage is told.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_PIECE = 2**24
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}


class Artifact(NamedTuple):
    """What [`load_artifact`] returns: the `tensors` by name, and the `details` that were saved with them."""

    tensors: dict[str, Tensor]
    details: dict[str, Any]


def save_artifact(
    path: str | Path, kind: str, version: int, tensors: Iterable[tuple[str, Tensor]], details: Mapping[str, Any]
) -> Path:
    """Write tensors and their provenance to one safetensors file, whole or not at all.

    The tensors are written as they come, so an iterator that computes them one at a time needs the memory of one. Only
    when all are on disk does the new file take the old one's name; if anything fails, the old file is untouched.

    Args:
        path (`str` or `Path`): The file to write. Missing folders are made.
        kind (`str`): What the file holds, in words such as `"alignment direction"`; checked when it is loaded.
        version (`int`): The layout of `tensors` and `details`; checked when it is loaded.
        tensors (`Iterable[tuple[str, Tensor]]`): Names and tensors, on any device.
        details (`Mapping[str, Any]`): JSON to keep beside them. Read after the last tensor, so that whoever computes
            the tensors may still fill it in.

    Returns:
        `Path`: The file.

    Raises:
        OSError: If the file cannot be written, because the disk is full for example.

    Example:

    ```python
    >>> import tempfile, torch
    >>> path = save_artifact(tempfile.mkdtemp() + "/a.safetensors", "basis", 1, [("U", torch.eye(2))], {"seed": 0})
    >>> load_artifact(path, "basis", 1).details
    {'seed': 0}

    ```
    """
    path = Path(path)
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        payload = tempfile.TemporaryFile(dir=path.parent)  # same disk as the file: if it is full, we hear of it early
    with payload:
        digests: list[bytes] = []
        header = _write_payload(payload, tensors, path, digests)
        metadata = {"kind": kind, "format_version": str(version), "details": json.dumps(details)}
        metadata["sha256"] = _checksum(metadata, digests)
        with _explained(path):
            _publish(path, {"__metadata__": metadata, **header}, payload)
    return path


def load_artifact(path: str | Path, kind: str, version: int) -> Artifact:
    """Read a file written by [`save_artifact`]. The tensors are mapped: they take memory when they are used.

    Args:
        path (`str` or `Path`): The file to read.
        kind (`str`): What it must hold.
        version (`int`): The only layout that the caller can read.

    Returns:
        [`Artifact`]: Tensors and details.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no safetensors file, is damaged, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        found = "it is a folder" if path.is_dir() else "there is no such file"
        raise FileNotFoundError(f"Cannot load the {kind} `{path}`: {found}. Give the file that it was saved to.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no dict
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"Cannot load the {kind} `{path}`: it is not a whole safetensors file ({error}). It is another file, or "
            "was cut short or damaged on its way; make or copy it again."
        ) from error
    details = _check_metadata(metadata, path, kind, version)
    if metadata.get("sha256") != _checksum(metadata, _digests(path)):
        raise ValueError(
            f"The {kind} `{path}` is damaged: by its SHA-256 it is not what was written. Make or copy it again."
        )
    return Artifact(tensors, details)


def _check_metadata(metadata: Mapping[str, str], path: Path, kind: str, version: int) -> dict[str, Any]:
    found = metadata.get("kind", "no word on what it holds, so it was not written by safe_trainer")
    if found != kind:
        raise ValueError(f"`{path}` must hold: {kind}. Found: {found}. Give the file that the {kind} was saved to.")
    if metadata.get("format_version") != str(version):
        raise ValueError(
            f"The {kind} `{path}` has format version {metadata.get('format_version')}, and this version of "
            f"safe_trainer reads {version}. Make it again, or install the version of safe_trainer that wrote it."
        )
    try:
        return dict(json.loads(metadata["details"]))
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"The details of the {kind} `{path}` are damaged ({error}); make or copy it again."
        ) from error


def _checksum(metadata: Mapping[str, str], digests: Iterable[bytes]) -> str:
    """Return a SHA-256 of what was saved, whatever the order in which the tensors lie in the file."""
    told = json.dumps([metadata.get(name) for name in ("kind", "format_version", "details")]).encode()
    return hashlib.sha256(told + b"".join(sorted(digests))).hexdigest()


def _digests(path: Path) -> Iterator[bytes]:
    """Yield the digest of each tensor of a file whose layout is sound, reading in pieces."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header.pop("__metadata__")
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            digest = _begun(name, entry)
            file.seek(8 + length + start)
            for at in range(start, end, _PIECE):
                digest.update(file.read(min(_PIECE, end - at)))
            yield digest.digest()


def _begun(name: str, entry: Mapping[str, Any]) -> Any:
    return hashlib.sha256(json.dumps([name, entry["dtype"], entry["shape"]]).encode())


def _write_payload(
    payload: IO[bytes], tensors: Iterable[tuple[str, Tensor]], path: Path, digests: list[bytes]
) -> dict[str, Any]:
    """Write the tensors' bytes one after the other and return their entries of the header; collect their digests."""
    header: dict[str, Any] = {}
    for name, tensor in tensors:  # outside of `_explained`: what fails while computing a tensor is no failure to write
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        with _explained(path):
            start = payload.tell()
            content = flat.view(torch.uint8).numpy().data
            payload.write(content)
            header[name] = {
                "dtype": _DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, payload.tell()],
            }
            digest = _begun(name, header[name])
            digest.update(content)
            digests.append(digest.digest())
    return header


def _publish(path: Path, header: dict[str, Any], payload: IO[bytes]) -> None:
    """Write header and payload beside `path`, make sure that they are on disk, and only then take the name."""
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format's alignment
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    payload.seek(0)
    try:
        with open(temporary, "xb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            shutil.copyfileobj(payload, file, 2**24)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Say of an error of the file system which file it stopped, and that nothing was lost."""
    try:
        yield
    except OSError as error:
        kept = "The file of that name is as it was before." if path.is_file() else "Nothing was written."
        raise OSError(
            error.errno,
            f"Could not save `{path}`: {error.strerror or error}. {kept} Free some space or choose a place.",
        ) from error
