"""Rows, prompts and suites."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

from datasets import DatasetDict
from runs import HARMFUL, REFUSED

from safe_trainer import PromptSet, SafetyBasis, load_prompts, load_rows, load_suite
from safe_trainer.data import ReadOptions, poison
from safe_trainer.data.prompts import apart

from .room import ASKED, COLUMNS, CSV, ODD_COLUMNS, ROWS, XSTEST, Case, headed, headless, of, read

DATA: dict[str, Case] = {
    "a folder in place of a file": (lambda at: load_rows(at.folder), "Give one of its files", [lambda at: read(at)]),
    "a sheet": (lambda at: load_rows(at.written(b"x", "rows.xlsx")), "Export the sheet as CSV", [lambda at: read(at)]),
    "a packed file": (lambda at: load_rows(at.written(b"x", "rows.zip")), "Unpack it first", [lambda at: read(at)]),
    "an unknown ending": (
        lambda at: load_rows(at.written(CSV, "rows.dat")),
        r"Rename it to one of .*\.csv",
        [lambda at: load_rows(Path(at.written(CSV, "rows.dat")).rename(at.folder / "rows.csv"))],
    ),
    "a slip in the name": (
        lambda at: (at.written(CSV), load_rows(at.folder / "rosw.csv")),
        "Did you mean `rows.csv`",
        [lambda at: load_rows(at.folder / "rows.csv")],
    ),
    "half a gzip file": (
        lambda at: load_rows(at.written(gzip.compress(CSV)[:-9], "rows.csv.gz")),
        "Copy or download it again",
        [lambda at: load_rows(at.written(gzip.compress(CSV), "rows.csv.gz"))],
    ),
    "an encoding that is unknown": (
        lambda at: read(at, encoding="utf-99"),
        "Try utf-8, utf-16 or latin-1",
        [
            lambda at: read(at, encoding="utf-8"),
            lambda at: read(at, CSV.decode().encode("utf-16"), encoding="utf-16"),
            lambda at: read(at, encoding="latin-1"),
        ],
    ),
    "an encoding that is not the file's": (
        lambda at: read(at, CSV + b"x", encoding="utf-16"),
        "`.*rows.csv` is not utf-16 text .*Name its `encoding`, or leave it out for UTF-8",
        [lambda at: read(at, encoding="utf-8"), lambda at: read(at)],
    ),
    "format and columns": (
        lambda at: read(at, format="alpaca", columns={"prompt": "instruction"}),
        "Give `format` or `columns`, not both",
        [
            lambda at: read(at, b"instruction,output\nHi,Hello.\n", format="alpaca"),
            lambda at: read(at, ODD_COLUMNS, columns=COLUMNS),
        ],
    ),
    "columns of unknown roles": (
        lambda at: read(at, b"question,reply\nHi,Hello.\n", columns={"question": "prompt"}),
        r"Write for example columns=\{'prompt': 'question', 'answer': 'reply'\}",
        [lambda at: read(at, b"question,reply\nHi,Hello.\n", columns={"prompt": "question", "answer": "reply"})],
    ),
    "a system prompt of nothing": (lambda at: read(at, system_prompt=" "), "Leave it out", [lambda at: read(at)]),
    "a limit of nothing": (lambda at: read(at, limit=0), "Leave it out to take all rows", [lambda at: read(at)]),
    "splits in memory": (
        lambda at: load_rows(DatasetDict(train=ROWS, test=ROWS)),
        r"Choose one, as in `source\['train'\]`",
        [lambda at: load_rows(DatasetDict(train=ROWS, test=ROWS)["train"])],
    ),
    "one row that is no list": (
        lambda at: load_rows({"prompt": "Hi"}),
        r'Give for example \[\{"prompt": "...", "completion": "..."\}\]',
        [lambda at: load_rows([{"prompt": "...", "completion": "..."}])],
    ),
    "no rows": (lambda at: load_rows([]), "Give at least one", [lambda at: load_rows(HARMFUL[:1])]),
    "rows that are all harmful": (
        lambda at: at.measured(rows=[{"prompt": "Make it?", "completion": "Sure.", "is_safe": False}] * 4),
        "Give rows with safe answers",
        [lambda at: at.measured(rows=[{"prompt": "Make it?", "completion": "I won't.", "is_safe": True}] * 4, rank=1)],
    ),
    "too little poison": (
        lambda at: poison(REFUSED, HARMFUL[:1], 0.5),
        "Give more, or lower `fraction`",
        [lambda at: poison(REFUSED, HARMFUL, 0.5), lambda at: poison(REFUSED, HARMFUL[:1], 0.125)],
    ),
    "a suite of another name": (
        lambda at: load_suite("xtest"),
        "Take one of .*xstest",
        [lambda at: load_suite("xstest", at.written(XSTEST))],
    ),
    "a revision of a local copy": (
        lambda at: load_suite("xstest@main", at.written(XSTEST)),
        "Give one of both",
        [lambda at: load_suite("xstest", at.written(XSTEST))],
    ),
    "one prompt that is no tuple": (
        lambda at: PromptSet("mine", "benign", "Say one."),
        r"Write `\('Say one.',\)`",
        [lambda at: PromptSet("mine", "benign", ("Say one.",))],
    ),
    "no prompts": (lambda at: PromptSet("mine", "benign", ()), "Give at least one prompt", [lambda at: ASKED]),
    "categories that do not fit": (
        lambda at: PromptSet("mine", "benign", ("a", "b"), ("x",)),
        "Give exactly one for each prompt",
        [lambda at: PromptSet("mine", "benign", ("a", "b"), ("x", "y"))],
    ),
    "a task without answers": (
        lambda at: PromptSet("mine", "task", ("1+1?",)),
        "give the right answer to each prompt",
        [lambda at: PromptSet("mine", "task", ("1+1?",), references=("2",))],
    ),
    "prompts with the system prompt of rows": (
        lambda at: load_prompts(["Say it."], "benign", options=ReadOptions(system_prompt="Be brief.")),
        "dataclasses.replace.prompt_set, system_prompt=...",
        [lambda at: replace(load_prompts(["Say it."], "benign")[0], system_prompt="Be brief.")],
    ),
    "prompt sets of one name": (
        lambda at: apart([ASKED, ASKED]),
        "Give each a name",
        [lambda at: apart([ASKED, replace(ASKED, name="others")])],
    ),
    "a tokenizer without a chat template": (
        lambda at: SafetyBasis.from_rows(of(at.aligned), headless(), REFUSED),
        "Take the tokenizer of a chat model, or set `tokenizer.chat_template`",
        [lambda at: at.measured(rank=2), lambda at: SafetyBasis.from_rows(of(at.aligned), headed(), REFUSED, rank=2)],
    ),
}  # fmt: skip
