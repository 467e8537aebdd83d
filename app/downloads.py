"""Files of a job to send: only names are looked up here, no paths; what is not there yet is made."""

from __future__ import annotations

import tempfile
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from safe_trainer import merge_adapter, testbed, write_model_card

from . import texts
from .jobs import Job
from .progress import RANKING
from .recipes import ROWS

Entries = Iterator[tuple[str, Path | str]]
"""Files, or their text, by their names in an archive."""

_PICKLED = {"training_args.bin"}  # of no use elsewhere, and nothing that others should load
_making = threading.Lock()  # one at a time: merging takes the memory of a model


def file_of(job: Job, variant: str, kind: str) -> tuple[Path, str] | None:
    """Return a file to send, made if need be, and its name there, or `None` if there is no such thing."""
    if variant == "all":
        if kind == "recipes" and job.variants:
            return _packed(job.folder / "recipes.zip", _recipes(job)), "recipes.zip"
        path = {"report": job.report("html"), "numbers": job.report("json"), "ranking": job.folder / RANKING}.get(kind)
        return (path, path.name) if path is not None and path.is_file() else None
    title = next((known.title for known in job.variants if known.key == variant), None)
    if title not in job.adapters:
        return None
    if kind == "card":
        return job.folder / variant / "README.md", f"{variant}-model-card.md"
    if kind not in ("adapter", "merged"):
        return None
    name, entries = f"{variant}-{kind}.zip", _files if kind == "adapter" else partial(_merged, job, title)
    return _packed(job.folder / name, entries(job.folder / variant)), name


def _packed(target: Path, entries: Entries) -> Path:
    """Pack what is not packed yet, complete or not at all; weights do not get smaller by it."""
    with _making:
        if not target.exists():
            fresh = target.with_suffix(".new")
            with zipfile.ZipFile(fresh, "w", zipfile.ZIP_STORED) as packed:
                for name, what in entries:
                    packed.write(what, name) if isinstance(what, Path) else packed.writestr(name, what)
            fresh.replace(target)
    return target


def _files(folder: Path) -> Entries:
    """Yield the files of a folder, without those of folders in it."""
    yield from ((path.name, path) for path in sorted(folder.iterdir()) if path.is_file() and path.name not in _PICKLED)


def _merged(job: Job, title: str, adapter: Path) -> Entries:
    """Yield the files of the model that an adapter makes of its base."""
    with tempfile.TemporaryDirectory(dir=job.folder) as made:
        merge_adapter(adapter, made)
        write_model_card(made, job.comparison(), name=title)
        yield from _files(Path(made))


def _recipes(job: Job) -> Entries:
    """Yield the recipes of a job with all that they read, the embedded model too, ready to run anywhere."""
    used = set()
    for variant in job.variants:
        text = (job.folder / variant.recipe).read_text(encoding="utf-8")
        for model in (testbed.ALIGNED, testbed.UNALIGNED):
            used |= {model} if f"{model}\n" in text else set()
            text = text.replace(f"{model}\n", f"./{model.name}\n")
        yield variant.recipe, text
    read = (f"{ROWS}.", "ask-", *(f"{name}." for name in texts.MATERIALS))
    yield from ((name, path) for name, path in _files(job.folder) if name.startswith(read))
    for model in used:
        for path in sorted(model.rglob("*")):
            if path.is_file():
                yield f"{model.name}/{path.relative_to(model)}", path
