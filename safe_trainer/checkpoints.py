"""Checkpoints: which one is whole, and how one is saved so that it can be told.

A trainer writes a checkpoint file by file into its folder, and `trainer_state.json` last. So a checkpoint without it
was cut short, by a kill or a full disk, and may hold weights of one step and an optimizer of none. One that lacks
another part was cut short while it was removed, and transformers would go on without that part.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .methods.base import SafetyMethod
from .methods.settings import settings_of

logger = logging.getLogger(__name__)

SETTINGS = "safety_methods.json"
"""The file that holds the methods' settings, beside the weights of a checkpoint."""
_STATE = "trainer_state.json"
_PARTS = {"optimizer.pt": "optimizer*", "scheduler.pt": "scheduler.pt", "rng_state.pth": "rng_state*.pth"}
_NAME = re.compile(r"checkpoint-(\d+)")


def last_checkpoint(output: str | Path) -> str | None:
    """Return the last checkpoint of a run that is whole; those behind it that are not are named in a warning.

    Args:
        output (`str` or `Path`): The run's `output_dir`.

    Returns:
        `str` or `None`: The checkpoint, or `None` if there is none at all.

    Raises:
        ValueError: If there are checkpoints, but none is whole.
    """
    found = checkpoints_of(Path(output))
    whole = [folder for folder in found if is_whole(folder)]
    if found and not whole:
        raise ValueError(
            f"`{output}` holds no whole checkpoint: {_listing(found)} was cut short while it was saved, by a kill or "
            "a full disk. Remove it, and start the run anew without resuming."
        )
    if not whole:
        return None
    damaged = found[found.index(whole[-1]) + 1 :]
    if damaged:
        logger.warning(
            "%s was cut short while it was saved, by a kill or a full disk; going on from %s, the last whole one.",
            _listing(damaged),
            whole[-1].name,
        )
    return str(whole[-1])


def is_whole(checkpoint: str | Path) -> bool:
    """Return whether the saving of a checkpoint came to its end, and nothing of its state was lost since."""
    return fault(Path(checkpoint)) is None


def fault(checkpoint: Path) -> str | None:
    """Return the file of a checkpoint's state that is missing or cut short; `None` if it is whole."""
    try:
        state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
        if not (isinstance(state, dict) and isinstance(state.get("global_step"), int)):
            return _STATE
    except (OSError, ValueError):
        return _STATE
    found = {name: sorted(checkpoint.glob(pattern)) for name, pattern in _PARTS.items()}
    absent = [name for name, paths in found.items() if not paths]
    # None at all is `save_only_model`, and DeepSpeed keeps its optimizer in a folder of its own.
    if 0 < len(absent) < len(found) and not any(checkpoint.glob("global_step*")):
        return absent[0]
    files = [path for paths in found.values() for path in paths if path.is_file()]
    # What torch saves is a zip archive, whose directory is at its end.
    return next((path.name for path in files if not zipfile.is_zipfile(path)), None)


@contextmanager
def saving(checkpoint: str | Path, methods: Sequence[SafetyMethod], is_first_process: bool) -> Iterator[None]:
    """Surround the saving of a checkpoint, so that it can be told apart from a whole one until it is one.

    Args:
        checkpoint (`str` or `Path`): The folder that is about to be written.
        methods (`Sequence[SafetyMethod]`): Their settings are saved with it.
        is_first_process (`bool`): Whether this process writes what all have in common.

    Raises:
        OSError: If the disk is full or the folder cannot be written. What was written of it is removed.
    """
    checkpoint = Path(checkpoint)
    try:
        if is_first_process:
            # One of this name may be left from a run that was resumed from an earlier one, and is now written over.
            (checkpoint / _STATE).unlink(missing_ok=True)
            (checkpoint / SETTINGS).unlink(missing_ok=True)
            if methods:
                checkpoint.mkdir(parents=True, exist_ok=True)
                settings = json.dumps(settings_of(methods), indent=1, sort_keys=True)
                (checkpoint / SETTINGS).write_text(settings + "\n", encoding="utf-8")
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_of_the_disk(error):
            raise
        if is_first_process:
            shutil.rmtree(checkpoint, ignore_errors=True)  # what there is of it takes the room that it lacks
        number = error.errno if isinstance(error, OSError) else errno.EIO
        raise OSError(
            number,
            f"The checkpoint `{checkpoint}` could not be saved ({error}) and was removed. Those saved before are "
            "intact. Free some space or make the folder writable, lower `save_total_limit` or set "
            "`save_only_model=True`, and go on with `train(resume_from_checkpoint=True)`.",
        ) from error


def _is_of_the_disk(error: Exception) -> bool:
    """Tell failures to write from others: torch and safetensors report them in exceptions of their own."""
    if isinstance(error, OSError):
        return True
    told = ("No space left", "File too large", "I/O error", "IoError", "iostream error", "inline_container")
    return any(words in str(error) for words in told)


def checkpoints_of(output: Path) -> list[Path]:
    """Return the checkpoints of a run from the first to the last."""
    if not output.is_dir():
        return []
    named = [(int(match[1]), path) for path in output.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(named) if path.is_dir()]


def _listing(folders: Sequence[Path]) -> str:
    return ", ".join(f"`{folder.name}`" for folder in folders)
