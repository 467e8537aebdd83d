"""What a job's process does: trains recipes one after the other, asks all models, or ranks rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safe_trainer import (
    DriftFigures,
    compare,
    recipe,
    scan_file,
    train_security_vectors,
    write_model_card,
    write_report,
)

from .protocol import COMPARISON, SCAN, Events, Stop


class Reporter(recipe.RunCallbacks):
    """Tells the server what a run does; when that is wanted, ends it between two steps with a checkpoint."""

    def __init__(self, key: str, events: Events, stop: Stop) -> None:
        self.key, self.events, self.stop, self._stage, self._step = key, events, stop, "", 0

    def stage(self, name: str) -> None:
        """Say what begins."""
        self._stage = name
        if name in ("loading", "preparing", "training"):
            self.stop.check()
            self.events.tell("phase", variant=self.key, phase=name)

    def progress(self, done: int, total: int) -> None:
        """Say how far training is."""
        self._step = done
        tell = self.events.tell_sometimes if done else self.events.tell
        tell("step", variant=self.key, step=done, total=total)

    def log(self, entry: Mapping[str, float]) -> None:
        """Pass on the curves."""
        values = {n: v for n, v in entry.items() if n in ("loss", "safety_penalty") or n.startswith("safety/")}
        if values:
            self.events.tell("point", variant=self.key, step=entry["step"], values=values)

    def should_stop(self) -> bool:
        """Return whether the user has had enough."""
        if self.stop.wanted.is_set():
            self.stop.saving()
            self.events.tell("stopping", variant=self.key, step=self._step)
        return self.stop.wanted.is_set()


def train(key: str, events: Events, stop: Stop) -> None:
    """Carry out one recipe as `safe-trainer train` does, telling the server of everything.

    Args:
        key (`str`): The recipe is `<key>.yaml` in the working directory.
        events ([`Events`]): Where to tell.
        stop ([`Stop`]): The wish to end.
    """
    checked = recipe.read_recipe(f"{key}.yaml")
    with stop.between_steps():
        recipe.run_recipe(checked, Reporter(key, events, stop), compare=False)


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

    sets = recipe.load_data(checked).prompt_sets
    tokenizer = AutoTokenizer.from_pretrained(path)
    comparison = compare(model, tokenizer, sets, adapters, drift=DriftFigures(), progress=progress, **decoding)
    write_report(comparison, Path.cwd(), COMPARISON)
    for title, folder in adapters.items():
        write_model_card(folder, comparison, name=title)


def quiet() -> None:
    """Keep the libraries' progress bars out of the log."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def scan(job: Mapping[str, Any], events: Events) -> None:
    """Rank the rows of a file by how harmful they look; vectors are fitted first where there are none yet."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from safe_trainer import ReadOptions, load_rows

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
        reading=ReadOptions(on_bad_row="skip"),
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
