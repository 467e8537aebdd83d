"""Files of a job to send: only names are looked up here, no paths; what is not there yet is made."""

from __future__ import annotations

import tempfile
import threading
import zipfile
from pathlib import Path

from safe_trainer import merge_adapter, write_model_card

from .jobs import Job
from .progress import RANKING
from .recipes import packed_recipes

_PICKLED = {"training_args.bin"}  # of no use elsewhere, and nothing that others should load
_making = threading.Lock()  # one at a time: merging takes the memory of a model


def file_of(job: Job, variant: str, kind: str) -> tuple[Path, str] | None:
    """Return a file to send, made if need be, and its name there, or `None` if there is no such thing."""
    if variant == "all":
        fixed = {"report": job.report("html"), "numbers": job.report("json"), "ranking": job.folder / RANKING}
        path = packed_recipes(job.folder, job.variants) if kind == "recipes" and job.variants else fixed.get(kind)
        return (path, path.name) if path is not None and path.is_file() else None
    title = next((known.title for known in job.variants if known.key == variant), None)
    if title is None:
        return None
    folder, name = job.folder / variant, f"{variant}-{kind}.zip"
    if title not in job.adapters:
        return None
    if kind == "card":
        return folder / "README.md", f"{variant}-model-card.md"
    if kind == "merged":
        return _merged(job, title, job.folder / name), name
    return (_packed(folder, job.folder / name), name) if kind == "adapter" else None


def _merged(job: Job, title: str, target: Path) -> Path:
    """Pack the model that an adapter makes of its base."""
    with _making:
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=target.parent) as made:
                merge_adapter(job.adapters[title], made)
                write_model_card(made, job.comparison(), name=title)
                _pack(Path(made), target)
    return target


def _packed(folder: Path, target: Path) -> Path:
    with _making:
        if not target.exists():
            _pack(folder, target)
    return target


def _pack(folder: Path, target: Path) -> None:
    """Pack the files of a folder, without those of folders in it; weights do not get smaller by it."""
    fresh = target.with_suffix(".new")
    with zipfile.ZipFile(fresh, "w", zipfile.ZIP_STORED) as packed:
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.name not in _PICKLED:
                packed.write(path, path.name)
    fresh.replace(target)
