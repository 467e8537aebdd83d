"""Going on from a checkpoint: one that is whole, that all processes find, and that was made with the same settings."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from peft import PeftModel
from torch import nn

from .checkpoints import SETTINGS, SPREAD, Record, checkpoints_of, fault, is_whole, last_checkpoint
from .integrity import CHECKSUMS
from .lora.io import adapter_differences
from .methods.settings import MADE_FROM

_ANEW = """To go on with others, start a new run from its weights: pass `PeftModel.from_pretrained(model, checkpoint, \
is_trainable=True)` as `model`, or the checkpoint itself where all weights were trained."""
_INSTEAD = f"Resume with those of the checkpoint. {_ANEW}"


def checkpoint_to_resume(
    wanted: Any, output: str | Path, record: Record, model: nn.Module | None = None, by_content: bool = True
) -> Any:
    """Return what to resume from: a checkpoint that is whole and was made with the same methods and adapter.

    Args:
        wanted (`bool` or `str`, *optional*): What `train(resume_from_checkpoint=...)` was given.
        output (`str` or `Path`): The run's `output_dir`.
        record ([`~checkpoints.Record`]): Methods, strategy and processes of the run that goes on. Without methods,
            nothing but the checkpoint's own files is looked at, as TRL does.
        model (`nn.Module`, *optional*): The model of the run that goes on, to compare its adapter.
        by_content (`bool`, *optional*, defaults to `True`): Whether files are read to compare them with their
            checksums.

    Raises:
        ValueError: If the checkpoint was cut short or damaged, or made with other methods, settings, processes or
            another adapter; says which.
    """
    if wanted is True and Path(output).is_dir():
        wanted = last_checkpoint(output) or wanted
        by_content = False  # it has just been read
    if not isinstance(wanted, (str, os.PathLike)) or not Path(wanted).is_dir():
        return wanted  # nothing is resumed, or nothing is there, which is told in the trainer's words
    checkpoint = Path(wanted)
    if (lacking := fault(checkpoint, by_content)) is not None:
        others = reversed(checkpoints_of(checkpoint.parent))
        whole = next((folder for folder in others if folder != checkpoint and is_whole(folder)), None)
        instead = f"Go on from `{whole}`" if whole else "Start the run anew"
        raise ValueError(
            f"`{checkpoint}` was cut short while it was saved, by a kill or a full disk, or damaged since: its "
            f"`{lacking}` is missing or damaged. {instead}, and remove this one; or, if it was you who changed it, "
            f"remove its `{CHECKSUMS}` only."
        )
    _check_record(checkpoint, record)
    if record.methods and model is not None:
        _check_kind(checkpoint, model)
    return wanted


def agreed_checkpoint(wanted: Any, output: str | Path, record: Record, model: nn.Module) -> Any:
    """Return [`checkpoint_to_resume`] of the first process, or raise in all if one of them cannot go on from it.

    Where each machine has a disk of its own, the first one's checkpoints are not on the others, which would fail alone
    while the first waits for them. What is on a machine's disk is read by its first process only.

    Raises:
        ValueError: As there, and if a process does not find the first one's checkpoint; says which.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return checkpoint_to_resume(wanted, output, record, model)
    found, is_there, problem = _of_first_process(wanted, output, record, model)
    if is_there and dist.get_rank() > 0:
        try:
            by_content = os.environ.get("LOCAL_RANK", "0") == "0"
            checkpoint_to_resume(found, output, record, model, by_content)
            problem = None if Path(found).is_dir() else "there is none."
        except (ValueError, OSError) as error:
            problem = str(error)
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if problems[0] is not None:
        raise ValueError(problems[0])
    lone = next((rank for rank, trouble in enumerate(problems) if trouble is not None), None)
    if lone is not None:
        raise ValueError(
            f"Process {lone} does not find the checkpoint of process 0, `{found}`: {problems[lone]} On several "
            "machines, put `output_dir` on a disk that they share, or copy the checkpoint to all of them."
        )
    return found


def _of_first_process(
    wanted: Any, output: str | Path, record: Record, model: nn.Module
) -> tuple[Any, bool, str | None]:
    """Return what the first process goes on from, as it is called here, whether it is there, or why it cannot."""
    told: list[Any] = [None, None, None]
    if dist.get_rank() == 0:
        try:
            found = checkpoint_to_resume(wanted, output, record, model)
            is_there = isinstance(found, (str, os.PathLike)) and Path(found).is_dir()
            is_in_output = is_there and Path(found).parent == Path(output)
            told = [(Path(found).name if is_in_output else found, is_in_output), is_there, None]
        except (ValueError, OSError) as error:
            told = [(None, False), False, str(error)]
    dist.broadcast_object_list(told)
    (found, is_in_output), is_there, problem = told
    return str(Path(output) / found) if is_in_output else found, is_there, problem


def _check_record(checkpoint: Path, record: Record) -> None:
    """Compare what a checkpoint was made with and what the run that goes on is made with."""
    path, names = checkpoint / SETTINGS, " and ".join(type(method).__name__ for method in record.methods)
    if not path.is_file():
        if names:
            raise ValueError(f"`{checkpoint}` was made without {names}, by TRL or with `safety=None`. {_INSTEAD}")
        return
    saved, current = _read(path), dict(record.content)
    if not all(isinstance(settings, dict) for settings in saved.values()):
        raise _damaged(path, "it does not hold the settings of methods by their names")
    before, now = saved.pop(SPREAD, None), current.pop(SPREAD, None)
    differences = list(_differences(saved, current))
    if differences:
        told = "; ".join(differences)
        raise ValueError(f"`{checkpoint}` was made with other safety methods or settings: {told}. {_INSTEAD}")
    if before and now and before != now:
        raise ValueError(
            f"`{checkpoint}` was made by {_spread(before)}, and this run has {_spread(now)}: neither the optimizer's "
            "state nor the random numbers would be those of a run that goes on. Launch as many processes under the "
            f"same strategy. {_ANEW}"
        )
    _check_random_state(checkpoint, record)


def _check_random_state(checkpoint: Path, record: Record) -> None:
    """Make sure that this process has its own: transformers goes on without, and draws other numbers."""
    own = "rng_state.pth" if record.processes == 1 else f"rng_state_{dist.get_rank()}.pth"
    if record.strategy and any(checkpoint.glob("rng_state*.pth")) and not (checkpoint / own).is_file():
        raise ValueError(
            f"`{checkpoint}` holds no `{own}`, the random numbers of this process: it was made by another number of "
            "processes, or the file was lost. Launch as many as it was made by; on several machines, copy the "
            "checkpoint of each to all of them."
        )


def _spread(spread: Mapping[str, Any]) -> str:
    count = spread.get("processes")
    return "one process" if count == 1 else f"{count} processes with {spread.get('strategy')}"


def _check_kind(checkpoint: Path, model: nn.Module) -> None:
    """Compare what is trained: another kind of it is not told when weights are loaded, or in no words of use."""
    if not isinstance(model, PeftModel):
        if (checkpoint / "adapter_config.json").is_file():
            raise ValueError(f"`{checkpoint}` holds an adapter, and this run trains all weights. {_INSTEAD}")
        return
    name = model.active_adapters[0]
    folder = checkpoint if name == "default" else checkpoint / name
    if (folder / "adapter_config.json").is_file():
        _check_adapter(folder, model)
    elif any(checkpoint.glob("model*.safetensors")):
        raise ValueError(f"`{checkpoint}` holds all weights, and this run trains an adapter. {_INSTEAD}")


def _check_adapter(checkpoint: Path, model: PeftModel) -> None:
    saved = _read(checkpoint / "adapter_config.json")
    differences = list(adapter_differences(saved, checkpoint, model))
    if differences:
        told = "; ".join(differences)
        raise ValueError(f"`{checkpoint}` was made with other settings of the adapter: {told}. {_INSTEAD}")


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
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
            shared = before.keys() & now.keys()  # another version may know others
            for field in sorted(shared - _exchanged(before, now)):
                if before[field] != now[field]:
                    was, is_now = json.dumps(before[field]), json.dumps(now[field])
                    yield f"`{field}` of {name} was {was} and is {is_now}"


def _exchanged(before: dict[str, Any], now: dict[str, Any]) -> set[str]:
    """Return sources of which one took the other's place, as data and the basis that was measured with it do.

    Only where both are known to come to the same; and how it was made does not count then, since it is among that.
    """
    origin = before.get(MADE_FROM)
    if not origin or origin != now.get(MADE_FROM):
        return set()
    shared = before.keys() & now.keys()
    sources = {field for field in shared if isinstance(before[field] or now[field], (dict, str))}
    gone = {field for field in sources if now[field] is None}
    new = {field for field in sources if before[field] is None}
    same = {field for field in sources if _is_content(before[field]) and _is_content(now[field])}  # in another form
    making = {field for field in shared if origin.get("settings") in (before[field], now[field]) and before[field]}
    return same | (gone | new | making if gone and new else set())


def _is_content(told: Any) -> bool:
    return isinstance(told, dict) and "sha256" in told
