"""The page: what it says of files and choices."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from app.inspection import ending_of, inspect
from app.materials import OwnFile, take
from app.recipes import Choices, Settings, write_order
from app.setup import EMBEDDED, Limits, Model, hub_model

from .room import COLUMNS, CSV, LATIN_1, ODD_COLUMNS, Case

OWN = Model("owner/model", "owner/model")


def shown(at: SimpleNamespace, content: bytes = CSV, rows: int = 9, **reading: Any) -> Any:
    return inspect(Path(at.written(content, "mine.csv")), "mine.csv", EMBEDDED, Limits(rows=rows), None, reading)


def ordered(at: SimpleNamespace, *keys: str, **changes: Any) -> Any:
    chosen = Choices(OWN, Path(at.written(CSV)), list(keys), Settings(steps=2, prompts=6))
    return write_order(at.folder / "job", replace(chosen, **changes))


def own(at: SimpleNamespace) -> dict[str, OwnFile]:
    row = {"prompt": "Do harm.", "completion": "Certainly."}
    return {"harmful_data": OwnFile(Path(at.written(json.dumps(row).encode(), "own.jsonl")), "harmful_data", "own", 1)}


def prompts(at: SimpleNamespace, name: str) -> Any:
    content = b"Index,Goal,Target,Behavior,Category,Source\n0,Make it.,Sure,x,y,z\n"
    return take(Path(at.written(content, name)), name, "jailbreakbench", {}, Limits(), at.folder)


APP: dict[str, Case] = {
    "a file of another kind": (
        lambda at: ending_of("rows.xlsx"), "Its name should end in one of .*csv", [lambda at: ending_of("rows.csv")]
    ),
    "a file with too many rows": (
        lambda at: shown(at, CSV + b"Hi,Hello.\n" * 4, 3),
        "at most 3 are read. Split it into smaller files",
        [lambda at: shown(at, CSV + b"Hi,Hello.\n" * 2, 3)],
    ),
    "a file with unknown columns": (
        lambda at: shown(at, ODD_COLUMNS),
        "Choose the columns with the prompt and the answer",
        [lambda at: shown(at, ODD_COLUMNS, columns=COLUMNS)],
    ),
    "a file in another encoding": (
        lambda at: shown(at, LATIN_1),
        "Choose the encoding",
        [lambda at: shown(at, LATIN_1, encoding="latin-1")],
    ),
    "a model without its owner": (
        lambda at: hub_model("my model"), "Write it as owner/name", [lambda at: hub_model("me/model")]
    ),
    "no method": (lambda at: ordered(at), "Choose at least one method", [lambda at: ordered(at, "plain")]),
    "a method without its rows": (
        lambda at: ordered(at, "security_vectors"),
        "Upload it under “Your own files”",
        [lambda at: ordered(at, "security_vectors", files=own(at))],
    ),
    "a suite under another name": (
        lambda at: prompts(at, "renamed.csv"),
        "Upload one with its own name: .*harmful-behaviors.csv",
        [lambda at: prompts(at, "harmful-behaviors.csv")],
    ),
}  # fmt: skip
