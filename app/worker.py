"""A job's own process: `python -m app.worker FOLDER` carries out the job that is described in FOLDER.

What a job needs of memory goes with its process, and a process can be stopped whatever it is doing.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safe_trainer import recipe

from . import texts
from .inspection import write_lines
from .progress import CLEANED, COMPARISON, JOB, RANKING, SCAN, Progress

logger = logging.getLogger(__name__)


def main(folder: Path) -> None:
    """Carry out a job."""
    os.chdir(folder)
    logging.basicConfig(level=logging.INFO)
    warnings.filterwarnings("ignore")
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    progress = Progress.read(folder) or Progress()
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        _enter(progress, "starting")
        (scan if job["kind"] == "scan" else train)(job, progress)
        progress.end("done")
    except Exception as error:  # which the server shows the user
        logger.exception("The job has failed.")
        progress.end("failed", for_user(error, folder))
    finally:  # the trainer ends itself when it is told to stop, with a checkpoint
        progress.write(folder)
        sys.stdout.flush()
        os._exit(0)  # threads of libraries may not hold up the next job


def _end_with(server: int) -> None:
    """End this process once the server is gone: nobody is left to read what would come out."""
    while os.getppid() == server:
        time.sleep(0.5)
    os._exit(1)


def _enter(progress: Progress, phase: str, variant: str = "") -> None:
    progress.enter(phase, variant)
    progress.write(Path.cwd())


def _counted(progress: Progress) -> Callable[[int, int], None]:
    """Return what notes how far a phase is."""

    def count(done: int, total: int) -> None:
        progress.done, progress.total = done, total
        progress.write(Path.cwd(), seldom=True)

    return count


class Reporter(recipe.RunCallbacks):
    """Notes what the run of a variant reports."""

    def __init__(self, key: str, progress: Progress) -> None:
        self.key, self.shown = key, progress

    def stage(self, name: str) -> None:
        """Note a stage."""
        _enter(self.shown, name, self.key)

    def progress(self, done: int, total: int) -> None:
        """Note steps while training."""
        if self.shown.phase == "training":
            part = self.shown.part(self.key)
            part.step, part.total = done, total
            self.shown.write(Path.cwd(), seldom=done not in (0, total))

    def log(self, entry: Mapping[str, float]) -> None:
        """Note the curves."""
        self.shown.point(self.key, entry)
        self.shown.memory = _memory()
        self.shown.write(Path.cwd(), seldom=True)

    def message(self, text: str) -> None:
        """Note a sentence, without the folders of this machine."""
        self.shown.note(text.replace(f"{Path.cwd()}{os.sep}", ""))


def train(job: Mapping[str, Any], progress: Progress) -> None:
    """Carry out the recipe of every variant; one that fails leaves the others as they are. Then compare them all."""
    finished: dict[str, str] = {}
    for variant in job["variants"]:
        key = variant["key"]
        if progress.part(key).state == "done":  # before the job was stopped
            finished[variant["title"]] = key
            continue
        progress.turn(key, "running")
        goes_on = any(Path(key).glob("checkpoint-*"))
        if not goes_on:
            shutil.rmtree(key, ignore_errors=True)
        try:
            checked = recipe.read_recipe(f"{key}.yaml")
            recipe.run_recipe(checked, Reporter(key, progress), resume=goes_on, compare=False)
        except Exception as error:
            logger.exception("`%s` has failed.", key)
            progress.turn(key, "failed", for_user(error, Path.cwd()))
        else:
            progress.turn(key, "done")
            finished[variant["title"]] = key
    if not finished:
        raise ValueError(texts.NOTHING_FINISHED)
    examine(finished, progress)


def examine(adapters: Mapping[str, str], progress: Progress) -> None:
    """Ask the model before and every model after, and write the report and the cards."""
    from safe_trainer import compare, load_model, write_model_card, write_report

    _enter(progress, "comparing")
    checked = recipe.read_recipe(f"{next(iter(adapters.values()))}.yaml")
    asked = checked.parts.evaluation
    model, tokenizer = load_model(checked.parts.model.path, **recipe.model_options(checked))
    decoding = asked.model_dump(include={"max_new_tokens", "batch_size", "system_prompt", "judges"}) if asked else {}

    sets = recipe.load_data(checked).prompt_sets
    comparison = compare(model, tokenizer, sets, adapters, progress=_counted(progress), **decoding)
    write_report(comparison, Path.cwd(), COMPARISON)
    for title, folder in adapters.items():
        write_model_card(folder, comparison, name=title)


def _memory() -> int:
    """Return the bytes that this process has needed at most: of the GPU if there is one."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def scan(job: Mapping[str, Any], progress: Progress) -> None:
    """Rank the rows of a file by how harmful they look; vectors are trained first where there are none yet."""
    from safe_trainer import load_model, load_rows, scan_file, train_security_vectors
    from safe_trainer.data import ReadOptions, read_records

    _enter(progress, "loading")
    model, tokenizer = load_model(job["model"]["path"])
    vectors = Path(job["vectors"])
    if not vectors.exists():
        _enter(progress, "fitting")
        harmful, _ = load_rows("harmful_data.jsonl")
        fresh = Path("vectors").resolve()
        train_security_vectors(model, list(harmful), tokenizer).save(fresh)
        fresh.rename(vectors)  # complete or not at all
    _enter(progress, "scanning")
    reading = {name: job["reading"].get(name) for name in ("columns", "encoding")}
    result = scan_file(
        job["rows"],
        model,
        vectors,
        tokenizer,
        output=RANKING,
        reading=ReadOptions(**reading, on_bad_row="skip"),
        top=job["limit"],
        max_length=job["max_length"],
        progress=_counted(progress),
    )
    suspicious = {entry["line"] for entry in result.top if entry["share"] > result.threshold}
    read = ((one, getattr(one, "value", None)) for one in read_records(job["rows"], reading["encoding"]))
    write_lines((row for one, row in read if isinstance(row, dict) and one.line not in suspicious), Path(CLEANED))
    kept = ("rank", "line", "share", "prompt", "answer")
    found = {
        "scored": result.scored,
        "threshold": result.threshold,
        "above": len(suspicious),
        "top": [{name: entry[name] for name in kept} for entry in result.top[:20]],
    }
    Path(SCAN).write_text(json.dumps(found), encoding="utf-8")


def for_user(error: Exception, folder: Path) -> str:
    """Return what a user should know of an error: messages made for people, without the folders of this machine."""
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return texts.OUT_OF_MEMORY
    if isinstance(error, ValueError | OSError | FloatingPointError):
        return str(error).replace(f"{folder}{os.sep}", "").replace(str(folder), "")[:2000]
    return texts.UNEXPECTED.format(name=type(error).__name__)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
