"""Going on from a checkpoint: one that is whole, that all processes find, and that was made with the same settings."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from peft import PeftModel
from torch import nn

from .checkpoints import SETTINGS, checkpoints_of, fault, is_whole, last_checkpoint
from .methods.base import SafetyMethod
from .methods.settings import settings_of

_INSTEAD = """Resume with those of the checkpoint. To go on with others, start a new run from its weights: pass \
`PeftModel.from_pretrained(model, checkpoint, is_trainable=True)` as `model`, or the checkpoint itself where all \
weights were trained."""
_ADAPTER = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
"""Settings of an adapter without which its weights mean something else."""


def checkpoint_to_resume(
    wanted: Any, output: str | Path, methods: Sequence[SafetyMethod], model: nn.Module | None = None
) -> Any:
    """Return what to resume from: a checkpoint that is whole and was made with the same methods and adapter.

    Args:
        wanted (`bool` or `str`, *optional*): What `train(resume_from_checkpoint=...)` was given.
        output (`str` or `Path`): The run's `output_dir`.
        methods (`Sequence[SafetyMethod]`): The methods of the run that goes on. Without any, settings are not
            compared, as TRL does not.
        model (`nn.Module`, *optional*): The model of the run that goes on, to compare its adapter.

    Raises:
        ValueError: If the checkpoint was cut short, or made with other methods, settings or another adapter; says
            which.
    """
    if wanted is True and Path(output).is_dir():
        wanted = last_checkpoint(output) or wanted
    if not isinstance(wanted, (str, os.PathLike)) or not Path(wanted).is_dir():
        return wanted  # nothing is resumed, or nothing is there, which is told in the trainer's words
    checkpoint = Path(wanted)
    if (lacking := fault(checkpoint)) is not None:
        others = [folder for folder in checkpoints_of(checkpoint.parent) if is_whole(folder)]
        instead = f"Go on from `{others[-1]}`" if others else "Start the run anew"
        raise ValueError(
            f"`{checkpoint}` was cut short while it was saved, by a kill or a full disk, or damaged since: its "
            f"`{lacking}` is missing or damaged. {instead}, and remove this one."
        )
    _check_methods(checkpoint, methods)
    if methods and isinstance(model, PeftModel):
        _check_adapter(checkpoint / "adapter_config.json", model)
    return wanted


def agreed_checkpoint(wanted: Any, output: str | Path, methods: Sequence[SafetyMethod], model: nn.Module) -> Any:
    """Return [`checkpoint_to_resume`], or raise in all processes if one of them cannot go on from it.

    Where each machine has a disk of its own, the first one's checkpoints are not on the others, which would fail alone
    while the first waits for them.

    Raises:
        ValueError: As there, and if processes do not find the same checkpoint; says which.
    """
    if not wanted or not (dist.is_available() and dist.is_initialized()):
        return checkpoint_to_resume(wanted, output, methods, model)
    found, problem = wanted, None
    try:
        found = checkpoint_to_resume(wanted, output, methods, model)
    except ValueError as error:
        problem = error
    held: list[Any] = [None] * dist.get_world_size()
    path = "none" if found is True else f"`{found}`"
    dist.all_gather_object(held, (path, problem and str(problem)))
    if problem is not None and held[0][1]:
        raise problem
    lone = [rank for rank, answer in enumerate(held) if answer != held[0]]
    if lone:
        path, trouble = held[lone[0]]
        raise ValueError(
            f"Process {lone[0]} does not find the checkpoint of process 0, {held[0][0]}: "
            f"{trouble or f'it finds {path}.'} On several machines, put `output_dir` on a disk that they share, or "
            "copy the checkpoint to all of them."
        )
    return found


def _check_methods(checkpoint: Path, methods: Sequence[SafetyMethod]) -> None:
    path = checkpoint / SETTINGS
    if not path.is_file():
        if methods:
            names = " and ".join(type(method).__name__ for method in methods)
            raise ValueError(f"`{checkpoint}` was made without {names}, by TRL or with `safety=None`. {_INSTEAD}")
        return
    saved = _read(path)
    if not all(isinstance(settings, dict) for settings in saved.values()):
        raise _damaged(path, "it does not hold the settings of methods by their names")
    differences = list(_differences(saved, settings_of(methods)))
    if differences:
        told = "; ".join(differences)
        raise ValueError(f"`{checkpoint}` was made with other safety methods or settings: {told}. {_INSTEAD}")


def _check_adapter(path: Path, model: PeftModel) -> None:
    if not path.is_file():
        return  # all weights were trained, which is told when they are loaded
    saved, current = _read(path), model.peft_config[model.active_adapter].to_dict()
    differences = [
        f"`{name}` was {json.dumps(saved[name])} and is {json.dumps(current[name])}"
        for name in _ADAPTER
        if name in saved and name in current and saved[name] != current[name]
    ]
    if differences:
        told = "; ".join(differences)
        raise ValueError(f"`{path.parent}` was made with other settings of the adapter: {told}. {_INSTEAD}")


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(found, dict):
        raise _damaged(path, "it does not hold settings by their names")
    return found


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"`{path}` is damaged ({why}). Copy the checkpoint again, or take another.")


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
