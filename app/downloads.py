"""The files of a job that its owner may have, by name."""

from __future__ import annotations

import zipfile
from pathlib import Path

from .actions import last_checkpoint
from .jobs import Job
from .protocol import COMPARISON

_PICKLED = {"training_args.bin"}  # of no use without this machine's paths, and nothing that others should load


def file_of(job: Job, variant: str, kind: str) -> Path | None:
    """Return a file to send, made if need be, or `None` if there is no such thing.

    Args:
        job ([`Job`]): A job of the session that asks.
        variant (`str`): Key of one of its variants, or `"all"`.
        kind (`str`): A key of `texts.DOWNLOAD`.
    """
    if variant == "all":
        endings = {"report": ".html", "numbers": ".json"}
        path = job.folder / f"{COMPARISON}{endings[kind]}" if kind in endings else None
        return path if path is not None and path.is_file() else None
    if variant not in {known.key for known in job.variants}:
        return None
    if kind == "recipe":
        path = job.folder / f"{variant}.yaml"
        return path if path.is_file() else None
    if kind == "adapter" and (job.folder / variant / "adapter_config.json").is_file():
        return _packed(job.folder / variant, job.folder / f"adapter-{variant}.zip")
    if kind == "checkpoint" and (checkpoint := last_checkpoint(job, variant)) is not None:
        return _packed(checkpoint, job.folder / f"{checkpoint.name}-{variant}.zip")
    return None


def _packed(folder: Path, target: Path) -> Path:
    """Pack the files of a folder, without those of folders in it."""
    if not target.exists():
        fresh = target.with_suffix(".new")
        with zipfile.ZipFile(fresh, "w", zipfile.ZIP_DEFLATED) as packed:
            for path in sorted(folder.iterdir()):
                if path.is_file() and path.name not in _PICKLED:
                    packed.write(path, path.name)
        fresh.replace(target)
    return target
