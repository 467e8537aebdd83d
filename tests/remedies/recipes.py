"""Recipes and commands, of which the advice is typed as it is written."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .room import Case, changed, command, merged, recipe

RECIPES: dict[str, Case] = {
    "a misspelt key": (
        lambda at: recipe(at, outptu="./x"), "did you mean `output`", [lambda at: recipe(at, output="./x")]
    ),
    "a misspelt method": (
        lambda at: recipe(at, safety={"method": "asfd", "projector": "none"}),
        "did you mean `asft`",
        [lambda at: recipe(at, safety={"method": "asft", "projector": "none"})],
    ),
    "a setting of another type": (
        lambda at: recipe(at, training={"max_steps": "many"}),
        "expected a whole number, got 'many'",
        [lambda at: recipe(at, training={"max_steps": 3})],
    ),
    "a dataset under path": (
        lambda at: recipe(at, data=[{"path": "hf:me/rows"}]),
        "a dataset is given under `hub`: `hub: me/rows`",
        [lambda at: recipe(at, data=[{"hub": "me/rows"}])],
    ),
    "two sources in one": (
        lambda at: recipe(at, data=[{"path": "rows.jsonl", "hub": "me/rows"}]),
        "give either `path` .* or `hub`",
        [lambda at: recipe(at, data=[{"path": "rows.jsonl"}]), lambda at: recipe(at, data=[{"hub": "me/rows"}])],
    ),
    "a loss on no rows": (
        lambda at: recipe(at, training={"eval_strategy": "steps"}),
        "give some, with `eval_data` or `eval_share`",
        [
            lambda at: recipe(at, training={"eval_strategy": "steps"}, eval_share=0.5),
            lambda at: recipe(at, training={"eval_strategy": "steps"}, eval_data=[{"path": "rows.jsonl"}]),
        ],
    ),
    "an adapter as the model of a recipe": (
        lambda at: recipe(at, model={"path": at.adapter()}),
        "is an adapter, not a complete model. Merge it first: .*, or give its base model",
        [lambda at: recipe(at, model={"path": merged(at)}), lambda at: recipe(at, model={"path": at.aligned})],
    ),
    "half a model": (
        lambda at: recipe(at, model={"path": str(cut(Path(shutil.copytree(at.aligned, at.folder / "cut"))))}),
        "make or copy them again",
        [lambda at: recipe(at, model={"path": str(shutil.copytree(at.aligned, at.folder / "whole"))})],
    ),
    "a basis in the place of a direction": (
        lambda at: recipe(at, safety={"method": "asft", "direction": basis(at)}),
        "`safe-trainer direction` makes one",
        [
            lambda at: (
                command("direction", at.aligned, at.unaligned, "--output", at.folder / "made.safetensors"),
                recipe(at, safety={"method": "asft", "direction": str(at.folder / "made.safetensors")}),
            )
        ],
    ),
    "a change without a value": (
        lambda at: recipe(at, ["training"]),
        "expected a form such as training.learning_rate=1e-4",
        [lambda at: recipe(at, ["training.learning_rate=1e-4"])],
    ),
    "a change that is no YAML": (
        lambda at: recipe(at, ["output=a: b: c"]),
        "Quote it: --set 'output=\"…\"'",
        [lambda at: recipe(at, ['output="a: b: c"'])],
    ),
    "a tag": (
        lambda at: recipe(at, text="a: !!python/name:os.system"), "has the tag .*; remove it", [lambda at: recipe(at)]
    ),
}  # fmt: skip
COMMANDS: dict[str, Case] = {
    "a direction over a file": (
        lambda at: command("direction", at.aligned, at.unaligned, "--output", at.written(b"x", "d.safetensors")),
        "exists already. Name another, or remove it",
        [
            lambda at: command("direction", at.aligned, at.unaligned, "--output", at.folder / "e.safetensors"),
            lambda at: (
                (at.folder / "d.safetensors").unlink(),
                command("direction", at.aligned, at.unaligned, "--output", at.folder / "d.safetensors"),
            ),
        ],
    ),
    "a comparison with nothing": (
        lambda at: command("compare", at.aligned, *short(at)),
        "name what was fine-tuned, as in --adapter out .or --tuned-model out",
        [
            lambda at: command("compare", at.aligned, "--adapter", at.adapter(), *short(at)),
            lambda at: command("compare", at.aligned, "--tuned-model", at.unaligned, *short(at)),
        ],
    ),
    "an adapter as the model of a command": (
        lambda at: command("compare", at.adapter(), "--tuned-model", at.unaligned, *short(at)),
        "Merge it first: `safe-trainer export ADAPTER --output FOLDER`, or give its base model",
        [
            lambda at: (
                command("export", at.folder / "adapter", "--output", at.folder / "merged"),
                command("compare", at.folder / "merged", "--tuned-model", at.unaligned, *short(at)),
            ),
            lambda at: command("compare", at.aligned, "--tuned-model", at.unaligned, *short(at)),
        ],
    ),
    "an adapter twice": (
        lambda at: command("compare", at.aligned, "--adapter", at.adapter(), "--adapter", at.adapter(), *short(at)),
        "is given twice. Write NAME=FOLDER",
        [lambda at: command("compare", at.aligned, "--adapter", f"tuned={at.adapter()}", *short(at))],
    ),
    "a folder that is not there": (
        lambda at: command("compare", at.aligned, "--adapter", "./out", *short(at)),
        "Give the folder of the adapter, or its Hub id",
        [lambda at: command("compare", at.aligned, "--adapter", at.adapter(), *short(at))],
    ),
    "prompts without a kind": (
        lambda at: command("evaluate", at.aligned, "--prompts", at.written(b"prompt\nMake it.\n", "asked.csv")),
        "expected a form such as harmful=",
        [lambda at: command("evaluate", at.aligned, *short(at))],
    ),
    "a direction of refusals from one kind": (
        lambda at: command("drift", at.aligned, at.adapter(), *short(at)[:2]),
        "the refusal direction needs harmful and benign prompts: give both",
        [
            lambda at: command(
                "drift", at.aligned, at.adapter(), *short(at)[:2], "--prompts", f"benign={at.folder}/asked.csv"
            )
        ],
    ),
    "a card without rates": (
        lambda at: told("card", at.adapter()),
        "Make one with `safe-trainer compare … --output DIR` and name its comparison.json with --comparison",
        [
            lambda at: (
                command(
                    "compare", at.aligned, "--adapter", at.adapter(), *short(at), "--output", at.folder / "report"
                ),
                command("card", at.adapter(), "--comparison", at.folder / "report/comparison.json"),
            )
        ],
    ),
}  # fmt: skip


def cut(folder: Path) -> Path:
    changed(folder / "model.safetensors", lambda content: content[:-99])
    return folder


def basis(at: SimpleNamespace) -> str:
    return str(at.measured(rank=2).save(at.folder / "basis.safetensors"))


def asking(at: SimpleNamespace) -> dict[str, Any]:
    return {"prompts": [{"kind": "harmful", "path": at.written(b"prompt\nMake it.\n", "asked.csv")}]}


def short(at: SimpleNamespace) -> list[str]:
    prompts = at.written(b"prompt\nMake it.\n", "asked.csv")
    return ["--prompts", f"harmful={prompts}", "--max-new-tokens", "1", "--judge", "phrases"]


def told(*arguments: object) -> None:
    raise ValueError(command(*arguments))
