"""Checkpoints: which one is whole, and how one is saved so that it can be told.

A trainer writes a checkpoint file by file into its folder, and `trainer_state.json` last. So a checkpoint without it
was cut short, by a kill or a full disk, and may hold weights of one step and an optimizer of none. Behind it the
checksums of all files are written, by which every later damage is told; see `integrity`.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError

from .distributed import Strategy
from .integrity import CHECKSUMS, damage, write_checksums
from .methods.base import SafetyMethod
from .methods.settings import settings_of

logger = logging.getLogger(__name__)

SETTINGS = "safety_methods.json"
"""The file that holds the methods' settings, beside the weights of a checkpoint."""
SPREAD = "spread"
"""What it calls the number of processes and how training was spread over them, beside the methods' names."""
_STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass
class Record:
    """What a run with methods keeps of itself beside its checkpoints, to be compared where one is resumed from.

    Args:
        methods (`Sequence[SafetyMethod]`): The run's methods. Without any, nothing is kept.
        strategy ([`~strategy.Strategy`], *optional*): How training is spread over processes.
        processes (`int`, *optional*, defaults to `1`): How many they are.

    Attributes:
        content (`dict`): The record as JSON. All rows are hashed for it, once for a run and when the methods have just
            read them: a file may change or go while the model is trained.
    """

    methods: Sequence[SafetyMethod]
    strategy: Strategy | None = None
    processes: int = 1
    content: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        spread = {SPREAD: {"processes": self.processes, "strategy": self.strategy.name}} if self.strategy else {}
        self.content = {**spread, **settings_of(self.methods)} if self.methods else {}


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
    damaged: list[Path] = []
    while found and not is_whole(found[-1]):
        damaged.insert(0, found.pop())
    if damaged and not found:
        raise ValueError(
            f"`{output}` holds no whole checkpoint: {_listing(damaged)} was cut short while it was saved, by a kill "
            "or a full disk, or damaged since. Remove it, and start the run anew without resuming."
        )
    if damaged:
        logger.warning(
            "%s was cut short while it was saved, by a kill or a full disk, or damaged since; going on from %s, the "
            "last whole one.",
            _listing(damaged),
            found[-1].name,
        )
    return str(found[-1]) if found else None


def is_whole(checkpoint: str | Path) -> bool:
    """Return whether the saving of a checkpoint came to its end, and nothing of it was lost or damaged since."""
    return fault(Path(checkpoint)) is None


def fault(checkpoint: Path, by_content: bool = True) -> str | None:
    """Return the file of a checkpoint that is missing or damaged; `None` if it is whole.

    Args:
        checkpoint (`Path`): Its folder.
        by_content (`bool`, *optional*, defaults to `True`): Whether files are read to compare them with their
            checksums; otherwise their sizes are.
    """
    try:
        state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
        if not (isinstance(state, dict) and isinstance(state.get("global_step"), int)):
            return _STATE
    except (OSError, ValueError, RecursionError):
        return _STATE
    return damage(checkpoint, by_content)


@contextmanager
def saving(
    checkpoint: str | Path, record: Record, is_first_process: bool, with_checksums: bool = True
) -> Iterator[None]:
    """Surround the saving of a checkpoint, so that it can be told apart from a whole one until it is one, and after.

    Args:
        checkpoint (`str` or `Path`): The folder that is about to be written.
        record ([`Record`]): What is saved with it.
        is_first_process (`bool`): Whether this process writes what all have in common: the first of all, or of each
            machine that has a disk of its own.
        with_checksums (`bool`, *optional*, defaults to `True`): Whether to write checksums behind it. Where it is
            uploaded meanwhile, those of one step could come to stand beside the weights of another.

    Raises:
        OSError: If the disk is full or the folder cannot be written. What was written of it is removed.
    """
    checkpoint = Path(checkpoint)
    try:
        if is_first_process:
            # One of this name may be left from a run that was resumed from an earlier one, and is now written over.
            for name in (_STATE, SETTINGS, CHECKSUMS):
                (checkpoint / name).unlink(missing_ok=True)
            if record.content:
                checkpoint.mkdir(parents=True, exist_ok=True)
                settings = json.dumps(record.content, indent=1, sort_keys=True)
                (checkpoint / SETTINGS).write_text(settings + "\n", encoding="utf-8")
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_of_the_disk(error):
            raise
        if fault(checkpoint, by_content=False) is None:
            raise  # it is whole: something behind it went wrong, such as the removal of an older one
        if is_first_process:
            shutil.rmtree(checkpoint, ignore_errors=True)  # what there is of it takes the room that it lacks
        number = error.errno if isinstance(error, OSError) else errno.EIO
        raise OSError(
            number,
            f"The checkpoint `{checkpoint}` could not be saved ({error}) and was removed. Those saved before are "
            "intact. Free some space or make the folder writable, lower `save_total_limit` or set "
            "`save_only_model=True`, and go on with `train(resume_from_checkpoint=True)`.",
        ) from error
    if dist.is_available() and dist.is_initialized():
        dist.barrier()  # each process has files of its own among them
    if is_first_process and with_checksums:
        write_checksums(checkpoint)


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
