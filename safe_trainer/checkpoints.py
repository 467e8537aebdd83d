"""Checkpoints: which one is whole, whether it belongs to the methods at hand, and what they were when it was made.

A trainer writes a checkpoint file by file into its folder, and `trainer_state.json` last. So a checkpoint without it
was cut short, by a kill or a full disk, and may hold weights of one step and an optimizer of none.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .methods.base import SafetyMethod
from .methods.settings import settings_of

logger = logging.getLogger(__name__)

SETTINGS = "safety_methods.json"
"""The file that holds the methods' settings, beside the weights of a checkpoint."""
_STATE = "trainer_state.json"
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
    found = _checkpoints(Path(output))
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
    """Return whether the saving of a checkpoint came to its end."""
    try:
        return isinstance(json.loads((Path(checkpoint) / _STATE).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def checkpoint_to_resume(wanted: Any, output: str | Path, methods: Sequence[SafetyMethod]) -> Any:
    """Return what to resume from: a checkpoint that is whole and was made with the same methods.

    Args:
        wanted (`bool` or `str`, *optional*): What `train(resume_from_checkpoint=...)` was given.
        output (`str` or `Path`): The run's `output_dir`.
        methods (`Sequence[SafetyMethod]`): The methods of the run that goes on.

    Raises:
        ValueError: If the checkpoint was cut short, or made with other methods or settings; says which.
    """
    if wanted is True and Path(output).is_dir():
        wanted = last_checkpoint(output) or wanted
    if not isinstance(wanted, (str, os.PathLike)) or not Path(wanted).is_dir():
        return wanted  # nothing is resumed, or nothing is there, which is told in the trainer's words
    checkpoint = Path(wanted)
    if not is_whole(checkpoint):
        others = [folder for folder in _checkpoints(checkpoint.parent) if is_whole(folder)]
        instead = f"Go on from `{others[-1]}`" if others else "Start the run anew"
        raise ValueError(
            f"`{checkpoint}` was cut short while it was saved, by a kill or a full disk: its `{_STATE}`, which is "
            f"written last, is missing or damaged. {instead}, and remove this one."
        )
    _check_methods(checkpoint, methods)
    return wanted


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


def _check_methods(checkpoint: Path, methods: Sequence[SafetyMethod]) -> None:
    path = checkpoint / SETTINGS
    if not path.is_file():
        if methods:
            logger.warning(
                "`%s` does not say which safety methods it was made with; it goes on with %s.",
                checkpoint,
                " and ".join(method.name for method in methods),
            )
        return
    try:
        saved = dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"`{path}` is damaged ({error}). Copy the checkpoint again, or take another.") from error
    differences = list(_differences(saved, settings_of(methods)))
    if differences:
        raise ValueError(
            f"`{checkpoint}` was made with other safety methods or settings: {'; '.join(differences)}. Resume with "
            "those of the checkpoint. To go on with others, start a new run from its weights: pass "
            "`PeftModel.from_pretrained(model, checkpoint, is_trainable=True)` as `model`, or the checkpoint itself "
            "where all weights were trained."
        )


def _differences(saved: dict[str, Any], current: dict[str, Any]) -> Iterator[str]:
    for name in sorted(saved.keys() | current.keys()):
        if name not in current:
            yield f"the checkpoint was made with {name}, this run has none"
        elif name not in saved:
            yield f"the checkpoint was made without {name}"
        else:
            before, now = saved[name], current[name]
            fields = before.keys() & now.keys()  # another version may know others
            for field in sorted(fields - _exchanged(before, now)):
                if before[field] != now[field]:
                    was, is_now = json.dumps(before[field]), json.dumps(now[field])
                    yield f"`{field}` of {name} was {was} and is {is_now}"


def _exchanged(before: dict[str, Any], now: dict[str, Any]) -> set[str]:
    """Return sources of which one took the other's place, as data and the basis that was measured with it do."""
    sources = {field for field in before.keys() & now.keys() if isinstance(before[field] or now[field], (dict, str))}
    gone = {field for field in sources if now[field] is None}
    new = {field for field in sources if before[field] is None}
    return gone | new if gone and new else set()


def _checkpoints(output: Path) -> list[Path]:
    """Return the checkpoints of a run from the first to the last."""
    if not output.is_dir():
        return []
    named = [(int(match[1]), path) for path in output.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(named) if path.is_dir()]


def _listing(folders: Sequence[Path]) -> str:
    return ", ".join(f"`{folder.name}`" for folder in folders)
