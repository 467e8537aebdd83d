"""Artifact files: safetensors with provenance, written completely or not at all, refused with a clear message.

The metadata says what it is (`kind`), its layout (`format_version`), where it comes from (`details`, JSON), and
a SHA-256 of all of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..evaluation.report import replacing

_DTYPES = {  # as the checksum of format 1 spells them
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
    """Write tensors and their provenance to one safetensors file, which takes the old one's name when it is complete.

    `kind` and `version` say what the file holds and in which layout, and are checked when it is loaded; `details` is
    JSON. An `OSError`, for example for a full disk, leaves an old file untouched.
    """
    path = Path(path)
    # Separate copies, since safetensors refuses tensors that share memory.
    copies = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors}
    metadata = {"kind": kind, "format_version": str(version), "details": json.dumps(details)}
    metadata["sha256"] = _checksum(metadata, copies)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_file(copies, temporary, metadata=metadata)
    except (OSError, SafetensorError) as error:
        kept = "The old file of that name is as it was before." if path.is_file() else "Nothing was written."
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"Could not save `{path}`: {reason}. {kept} Free some space or choose another path.") from error
    return path


def load_artifact(path: str | Path, kind: str, version: int) -> Artifact:
    """Read a file written by [`save_artifact`], which must be intact and hold this kind in this version."""
    path = Path(path)
    if not path.is_file():
        found = "it is a folder" if path.is_dir() else "there is no such file"
        raise FileNotFoundError(f"Cannot load the {kind} `{path}`: {found}. Give the file that it was saved to.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"Cannot load the {kind} `{path}`: it is not a complete safetensors file ({error}). It is another file, "
            "or was cut short or damaged; make or copy it again."
        ) from error
    details = _check_metadata(metadata, path, kind, version)
    if "sha256" in metadata and metadata["sha256"] != _checksum(metadata, tensors):
        raise ValueError(f"The {kind} `{path}` is damaged: its SHA-256 does not match. Make or copy it again.")
    return Artifact(tensors, details)


def _check_metadata(metadata: Mapping[str, str], path: Path, kind: str, version: int) -> dict[str, Any]:
    found = metadata.get("kind", "nothing that says what it is, so it was not written by safe_trainer")
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


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of metadata and tensors, whatever the order in which the tensors are stored."""
    digests = []
    for name, tensor in tensors.items():
        head = json.dumps([name, _DTYPES.get(tensor.dtype, str(tensor.dtype)), list(tensor.shape)])
        digest = hashlib.sha256(head.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        digests.append(digest.digest())
    head = json.dumps([metadata.get(name) for name in ("kind", "format_version", "details")])
    return hashlib.sha256(head.encode() + b"".join(sorted(digests))).hexdigest()
