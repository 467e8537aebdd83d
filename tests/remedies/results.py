"""Comparisons, reviews, scans and the folders of runs."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny
from transformers import AutoTokenizer

from safe_trainer import generate, write_report
from safe_trainer.evaluation import GUARDS, ClassifierJudge, GuardJudge, PhraseJudge, Review, from_json
from safe_trainer.recipe.run import check_output

from .room import (
    ASKED,
    Benign,
    Case,
    asked,
    both,
    brief,
    classifier,
    compared,
    headed,
    headless,
    larger,
    lora_model,
    of,
    scanned,
    wide,
)


def silent() -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "Verdict:"
    return tokenizer


def guarded(tokenizer: Any) -> Any:
    return GuardJudge(tiny.model(), tokenizer, GUARDS["llama-guard"])(["How?"], ["Sure: so."])


EVALUATION: dict[str, Case] = {
    "an adapter called before": (
        lambda at: compared(at, {"before": at.adapter()}),
        "Give this adapter another name",
        [lambda at: compared(at, {"after": at.adapter()})],
    ),
    "a run twice": (
        lambda at: compared(at, {"tuned": [at.adapter(), f"{at.folder}/adapter/"]}),
        "each of them once, got .*adapter.*Name every run once",
        [lambda at: compared(at, {"tuned": [at.adapter(), shutil.copytree(at.adapter(), at.folder / "again")]})],
    ),
    "an adapter of another model": (
        lambda at: compared(at, {"after": at.adapter()}, wide()),
        "Give an adapter that was trained on it",
        [lambda at: compared(at, {"after": at.adapter()})],
    ),
    "a model whose adapter trains its biases": (
        lambda at: compared(at, {"after": at.adapter()}, lora_model(at, bias="all")),
        "Give the base model, loaded anew",
        [lambda at: compared(at, {"after": at.adapter()}, of(at.aligned))],
    ),
    "no chat template": (
        lambda at: asked(headless()),
        "Load the tokenizer of the chat model, or set `tokenizer.chat_template`",
        [lambda at: asked(AutoTokenizer.from_pretrained(at.aligned)), lambda at: asked(headed())],
    ),
    "one prompt": (
        lambda at: generate(tiny.model(), tiny.tokenizer(), "Say one.", max_new_tokens=1),
        r"Write `\[prompt\]`",
        [lambda at: generate(tiny.model(), tiny.tokenizer(), ["Say one."], max_new_tokens=1)],
    ),
    "a tokenizer of another model": (
        lambda at: asked(larger(), replace(ASKED, prompts=("Say <new>.",))),
        "Load the tokenizer that belongs to this model",
        [lambda at: asked(tiny.tokenizer(), replace(ASKED, prompts=("Say <new>.",)))],
    ),
    "a system prompt that a template leaves out": (
        lambda at: asked(brief(), system_prompt="Be brief."),
        "Leave out `system_prompt`",
        [lambda at: asked(brief())],
    ),
    "no judge for the kind": (
        lambda at: asked(tiny.tokenizer(), judges=[Benign()]),
        r"Add one that does, such as `PhraseJudge\(\)`",
        [lambda at: asked(tiny.tokenizer(), judges=[Benign(), PhraseJudge()])],
    ),
    "a guard that would judge unread": (
        lambda at: guarded(silent()),
        "The judge `llama-guard` .* leaves out the user turn .* Load the tokenizer that belongs to the judge, or "
        "repair its `chat_template`",
        [lambda at: guarded(tiny.tokenizer()), lambda at: guarded(headed())],
    ),
    "answers without prompts": (
        lambda at: PhraseJudge()(["a"], []), "Give one for each", [lambda at: PhraseJudge()(["a"], ["No."])]
    ),
    "labels that say nothing": (
        lambda at: ClassifierJudge(classifier(), tiny.tokenizer()),
        r"Give for example \{'LABEL_0': 'refused'\}",
        [lambda at: ClassifierJudge(classifier(), tiny.tokenizer(), {"LABEL_0": "refused"})],
    ),
    "other prompts before than after": (
        lambda at: both(ASKED, replace(ASKED, prompts=("Make another.",))),
        "Evaluate both on the same prompt sets, in the same order",
        [lambda at: both(ASKED, ASKED)],
    ),
    "no comparison to review": (
        lambda at: Review(at.folder),
        "Give the folder that `--output` wrote",
        [lambda at: (write_report(both(ASKED, ASKED), at.folder), Review(at.folder))],
    ),
    "labels that cannot be read": (
        lambda at: (
            write_report(both(ASKED, ASKED), at.folder),
            at.written(b"{", "comparison.labels.json"),
            Review(at.folder),
        ),
        "move it away to begin again",
        [lambda at: ((at.folder / "comparison.labels.json").unlink(), Review(at.folder))],
    ),
    "an edited comparison": (
        lambda at: (
            write_report(both(ASKED, ASKED), at.folder),
            from_json((at.folder / "comparison.json").read_bytes().replace(b"Make it.", b"Make two.")),
        ),
        "Make it again, or copy the file again",
        [lambda at: from_json((at.folder / "comparison.json").read_bytes())],
    ),
    "a scan without a chat template": (
        lambda at: scanned(at, tokenizer=headless()),
        "Set `tokenizer.chat_template` to the model's",
        [lambda at: scanned(at, tokenizer=headed())],
    ),
    "a scan with a threshold that is no number": (
        lambda at: scanned(at, drop_above=math.nan),
        "`drop_above` must be a number, got nan. Leave it out to have it chosen",
        [lambda at: scanned(at)],
    ),
    "a scan over its own rows": (
        lambda at: scanned(at, clean=at.folder / "rows.jsonl", drop_above=0.5),
        "Give another file",
        [lambda at: scanned(at, clean=at.folder / "clean.jsonl", drop_above=0.5)],
    ),
    "a scan into no folder": (
        lambda at: scanned(at, output=at.folder / "new" / "ranked.csv"),
        "Make it first",
        [lambda at: ((at.folder / "new").mkdir(), scanned(at, output=at.folder / "new" / "ranked.csv"))],
    ),
    "a run into a file": (
        lambda at: check_output(at.written(b"x"), False),
        "Choose a folder for the run with --set output=FOLDER",
        [lambda at: check_output(str(at.folder / "run"), False)],
    ),
    "a run where one is finished": (
        lambda at: check_output(str(Path(at.written(b"", "recipe.yaml")).parent), False),
        "Choose another with --set output=FOLDER, or remove it",
        [
            lambda at: check_output(str(at.folder / "run"), False),
            lambda at: ((at.folder / "recipe.yaml").unlink(), check_output(str(at.folder), False)),
        ],
    ),
    "nothing to resume": (
        lambda at: check_output(str(at.folder), True),
        "Leave out --resume, or check `output`",
        [lambda at: check_output(str(at.folder), False)],
    ),
    "a run that is not finished": (
        lambda at: ((at.folder / "checkpoint-3").mkdir(), check_output(str(at.folder), False)),
        "Resume it with --resume, or choose another `output`",
        [lambda at: check_output(str(at.folder), True), lambda at: check_output(str(at.folder / "new"), False)],
    ),
}  # fmt: skip
