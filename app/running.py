"""What a job's process does: trains recipes one after the other, asks all models, or ranks rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from safe_trainer import RefusalMonitor, compare, recipe, scan_file, train_security_vectors, write_report

from .protocol import COMPARISON, SCAN, Events, Stop

WATCHED = 40  # prompts of each kind whose refusals are watched while training
CHECKS = 8


class Reporter(TrainerCallback):
    """Tells the server what the trainer does; when that is wanted, ends it between two steps with a checkpoint."""

    def __init__(self, key: str, events: Events, stop: Stop) -> None:
        self.key, self.events, self.stop = key, events, stop

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say how many steps there will be."""
        self.events.tell("phase", variant=self.key, phase="training")
        self.events.tell("step", variant=self.key, step=state.global_step, total=state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say how far it is, or end it."""
        self.events.tell_sometimes("step", variant=self.key, step=state.global_step, total=state.max_steps)
        if self.stop.wanted.is_set():
            self.stop.saving()
            self.events.tell("stopping", variant=self.key, step=state.global_step)
            control.should_training_stop = control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Pass on the curves."""
        values = {
            name: value
            for name, value in (logs or {}).items()
            if name in ("loss", "safety_penalty") or name.startswith("safety/")
        }
        if values:
            self.events.tell("point", variant=self.key, step=state.global_step, values=values)


def train(key: str, events: Events, stop: Stop) -> None:
    """Carry out one recipe as `safe-trainer train` does, telling the server of everything.

    Args:
        key (`str`): The recipe is `<key>.yaml` in the working directory.
        events ([`Events`]): Where to tell.
        stop ([`Stop`]): The wish to end.
    """
    events.tell("phase", variant=key, phase="loading")
    checked = recipe.read_recipe(f"{key}.yaml")
    loaded = recipe.load(checked)
    events.tell("phase", variant=key, phase="preparing")
    trainer = recipe.make_trainer(checked, loaded.rows, show_bars=False)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Reporter(key, events, stop))
    sets = [s.first(WATCHED) for s in loaded.prompt_sets if s.kind in ("harmful", "borderline")]
    if sets:
        every = max(1, checked.training["max_steps"] // CHECKS)
        trainer.add_callback(RefusalMonitor(trainer, sets, every=every))
    stop.check()
    with stop.between_steps():
        trainer.train()
    trainer.save_model(checked.parts.output)
    recipe.save_recipe(checked, loaded)


def examine(adapters: Mapping[str, str], events: Events) -> None:
    """Ask the model before and every model after, and write the report.

    Args:
        adapters (`Mapping[str, str]`): Folders of the adapters, which their recipes are named after, by title.
        events ([`Events`]): Where to tell.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    events.tell("phase", phase="comparing")
    checked = recipe.read_recipe(f"{next(iter(adapters.values()))}.yaml")
    path, asked = checked.parts.model.path, checked.parts.evaluation
    model = AutoModelForCausalLM.from_pretrained(path, dtype=checked.parts.model.dtype)
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    decoding = asked.model_dump(include={"max_new_tokens", "batch_size", "system_prompt"}) if asked else {}

    def progress(done: int, total: int) -> None:
        events.tell_sometimes("progress", done=done, total=total)

    sets = recipe.load(checked).prompt_sets
    comparison = compare(model, AutoTokenizer.from_pretrained(path), sets, adapters, progress=progress, **decoding)
    write_report(comparison, Path.cwd(), COMPARISON)


def quiet() -> None:
    """Keep the libraries' progress bars out of the log."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def scan(job: Mapping[str, Any], events: Events) -> None:
    """Rank the rows of a file by how harmful they look; vectors are fitted first where there are none yet."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from safe_trainer import Reading, load_rows

    events.tell("phase", phase="loading")
    model = AutoModelForCausalLM.from_pretrained(job["model"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    vectors = Path(job["vectors"])
    if not vectors.exists():
        events.tell("phase", phase="fitting")
        harmful, _ = load_rows("harmful.jsonl")
        fresh = Path("vectors").resolve()
        train_security_vectors(model, list(harmful), tokenizer).save(fresh)
        fresh.rename(vectors)  # whole or not at all
    events.tell("phase", phase="scanning")
    result = scan_file(
        job["rows"],
        model,
        vectors,
        tokenizer,
        reading=Reading(on_bad_row="skip"),
        top=20,
        max_length=job["max_length"],
        progress=lambda done, total: events.tell_sometimes("progress", done=done, total=total),
    )
    kept = ("rank", "line", "share", "prompt", "answer")
    found = {
        "scored": result.scored,
        "threshold": result.threshold,
        "above": result.above.count if result.above else 0,
        "top": [{name: entry[name] for name in kept} for entry in result.top],
    }
    Path(SCAN).write_text(json.dumps(found), encoding="utf-8")
