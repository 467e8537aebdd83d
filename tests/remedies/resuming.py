"""Checkpoints that do not fit, are cut short or damaged."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from runs import lora

from safe_trainer import AdapterEMA, AsFT
from safe_trainer.lora.io import merge_adapter

from .room import PLAIN, Case, changed


def run(at: SimpleNamespace, safety: Any = PLAIN, resume: Any = True, **changes: Any) -> None:
    """Go on with a run of two steps and two checkpoints, or begin it."""
    steps = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3 if resume else 2}
    at.trainer(safety, **steps, **changes).train(resume_from_checkpoint=resume)


def begun(at: SimpleNamespace, **changes: Any) -> Path:
    """Return the last checkpoint of a run; one that was begun before is begun anew."""
    run(at, resume=False, **changes)
    return at.folder / "checkpoint-2"


def halved(checkpoint: Path, file: str) -> Path:
    changed(checkpoint / file, lambda content: content[: len(content) // 2])
    return checkpoint


def cut_all(at: SimpleNamespace) -> None:
    halved(begun(at), "trainer_state.json")
    halved(at.folder / "checkpoint-1", "trainer_state.json")


def removed(at: SimpleNamespace) -> None:
    for checkpoint in at.folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def of_checkpoint(at: SimpleNamespace) -> Any:
    shutil.rmtree(at.folder / "merged", ignore_errors=True)
    return merge_adapter(begun(at), at.folder / "merged", at.aligned)


RESUMING: dict[str, Case] = {
    "another setting of the method": (
        lambda at: (begun(at), run(at, AsFT(projector="none", weight=9.0))),
        "Resume with those of the checkpoint. To train with other settings, .*adapter merged by `safe-trainer export`",
        [
            lambda at: run(at),
            lambda at: run(at, AsFT(projector="none", weight=9.0), resume=False, model=of_checkpoint(at)),
        ],
    ),
    "another rank of the adapter": (
        lambda at: (begun(at), run(at, peft_config=lora(r=8))),
        "Resume with those of the checkpoint",
        [lambda at: run(at)],
    ),
    "another chat template": (
        lambda at: (begun(at), changed(begun(at) / "chat_template.jinja", lambda text: text + b" "), run(at)),
        "same rows would be other tokens. Resume with those of the checkpoint",
        [lambda at: (begun(at), run(at))],
    ),
    "an interrupted checkpoint": (
        lambda at: run(at, resume=halved(begun(at), "trainer_state.json")),
        "Resume from `.*checkpoint-1`, and remove this one",
        [lambda at: run(at, resume=at.folder / "checkpoint-1")],
    ),
    "a damaged checkpoint": (
        lambda at: run(at, resume=halved(begun(at), "adapter_model.safetensors")),
        "Copy the checkpoint again, or resume from an earlier one",
        [lambda at: run(at, resume=at.folder / "checkpoint-1"), lambda at: run(at, resume=begun(at))],
    ),
    "an average that the checkpoint does not hold": (
        lambda at: (begun(at), run(at, callbacks=[AdapterEMA()])),
        "Resume without the callback, or start a new run",
        [lambda at: run(at), lambda at: run(at, resume=False, callbacks=[AdapterEMA()])],
    ),
    "an average of another decay": (
        lambda at: (begun(at, callbacks=[AdapterEMA(0.5)]), run(at, callbacks=[AdapterEMA(0.9)])),
        "Resume with the same",
        [lambda at: run(at, callbacks=[AdapterEMA(0.5)])],
    ),
    "no checkpoint that is complete": (
        lambda at: (cut_all(at), run(at)),
        "Remove it, and start the run again without resuming",
        [lambda at: (removed(at), run(at, resume=False))],
    ),
    "an only checkpoint that is incomplete": (
        lambda at: (cut_all(at), run(at, resume=at.folder / "checkpoint-2")),
        "Start the run again without resuming, and remove this one",
        [lambda at: (removed(at), run(at, resume=False))],
    ),
}
