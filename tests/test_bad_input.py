"""Wrong inputs over the whole public surface: each is refused, by the class one would expect, in words that help.

One table. A case names what is wrong, does it, and says which exception comes and which words of its message tell the
user what was found and what to do. Nothing here trains: what is wrong has to be told before that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from commands import invoke
from peft import IA3Config, LoraConfig, PromptTuningConfig, TaskType
from runs import given, lora

import safe_trainer as st
from safe_trainer.analysis.scan import score_rows
from safe_trainer.artifacts.fitting import Fitting
from safe_trainer.data import ReadOptions, conversation, encode_row, poison
from safe_trainer.evaluation import PhraseJudge, Thresholds, from_json
from safe_trainer.recipe import read_recipe

REFUSED = [conversation(f"Make a bad thing {i}.", "I will not do that.") for i in range(4)]
HARMFUL = [conversation(f"Make a bad thing {i}.", "Sure: a bad thing.") for i in range(4)]


@dataclass
class Room:
    """What the cases share: a folder, a pair of checkpoints, and what was made for their model."""

    folder: Path
    pair: tuple[str, str]

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def trainer(self, safety: Any, **changes: Any) -> Any:
        return st.SafeSFTTrainer(**given(self.folder / "run", **{"peft_config": lora(), **changes}), safety=safety)

    def recipe(self, **changes: Any) -> Any:
        self.file("rows.jsonl", json.dumps({"prompt": "Say one.", "completion": "One."}))
        values = {
            "model": {"path": self.pair[0]},
            "data": [{"path": "rows.jsonl"}],
            "safety": None,
            "output": str(self.folder / "out"),
        }
        return read_recipe(self.file("recipe.yaml", json.dumps({**values, **changes})))


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Room:
    folder = tmp_path_factory.mktemp("shared")
    return Room(folder, tiny.save_pair(folder))


@pytest.fixture
def room(shared, tmp_path) -> Room:
    return Room(tmp_path, shared.pair)


Case = tuple[Callable[[Room], Any], type[BaseException], str]


def rows(room: Room, name: str, content: str | bytes, **reading: Any) -> Any:
    return st.load_rows(room.file(name, content), ReadOptions(**reading))


def vectors() -> Any:
    return st.TrainedVectors({"model.layers.0.self_attn.q_proj": (torch.zeros(2, 32), torch.zeros(32, 2))})


def other_model() -> Any:
    return tiny.model(hidden=64)


def headless() -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def flat_tokenizer(room: Room) -> Any:
    return room.trainer(st.SaLoRA(safety_data=REFUSED, rank=4), processing_class=headless())


METHODS: dict[str, Case] = {
    "a class instead of a method": (lambda r: r.trainer(st.AsFT), TypeError, "write `AsFT(...)` with its settings"),
    "the name of a method": (lambda r: r.trainer("asft"), TypeError, "`safety` takes a method, a list of them"),
    "a dict of settings": (lambda r: r.trainer({"method": "asft"}), TypeError, "got dict"),
    "a method twice": (
        lambda r: r.trainer([st.AsFT(projector="none"), st.AsFT(projector="none")]),
        ValueError,
        "Give each method once",
    ),
    "recommended rows that are not there": (
        lambda r: r.trainer(st.recommended(r.folder / "absent.jsonl")),
        FileNotFoundError,
        "There is no file",
    ),
    "AsFT without a direction": (lambda r: st.AsFT(), ValueError, "give `unaligned_model`"),
    "AsFT with two directions": (
        lambda r: st.AsFT(unaligned_model="a", direction="b"),
        ValueError,
        "not both",
    ),
    "AsFT with a negative weight": (
        lambda r: st.AsFT(projector="none", weight=-1),
        ValueError,
        "`weight` must be a finite number of at least 0, got -1",
    ),
    "AsFT with a weight that is no number": (
        lambda r: st.AsFT(projector="none", weight=float("nan")),
        ValueError,
        "got nan",
    ),
    "AsFT with a weight as text": (lambda r: st.AsFT(projector="none", weight="1"), TypeError, "`weight`"),
    "AsFT with an unknown projector": (
        lambda r: st.AsFT(projector="orthogonal"),
        ValueError,
        "must be one of published, subspace, random, none",
    ),
    "AsFT with rank 0": (lambda r: st.AsFT(projector="none", rank=0), ValueError, "`rank` must be at least 1, got 0"),
    "AsFT with half a rank": (lambda r: st.AsFT(projector="none", rank=1.5), TypeError, "`rank`"),
    "AsFT with an unaligned model that is not there": (
        lambda r: r.trainer(st.AsFT(unaligned_model=str(r.folder / "absent")), model=r.pair[0]),
        OSError,
        "absent",
    ),
    "AsFT with a direction that is not there": (
        lambda r: r.trainer(st.AsFT(direction=r.folder / "absent.safetensors")),
        FileNotFoundError,
        "Give the file that it was saved to",
    ),
    "AsFT with the same model twice": (
        lambda r: r.trainer(st.AsFT(unaligned_model=r.pair[0]), model=r.pair[0]),
        ValueError,
        "identical",
    ),
    "AsFT on DoRA": (
        lambda r: r.trainer(st.AsFT(projector="none"), peft_config=lora(use_dora=True)),
        ValueError,
        "use_dora",
    ),
    "AsFT on IA3": (
        lambda r: r.trainer(st.AsFT(projector="none"), peft_config=IA3Config(task_type=TaskType.CAUSAL_LM)),
        ValueError,
        "LoraConfig",
    ),
    "SaLoRA without data": (lambda r: st.SaLoRA(), ValueError, "give one of `safety_data`"),
    "SaLoRA with data and a basis": (
        lambda r: st.SaLoRA(safety_data="a", basis="b"),
        ValueError,
        "give one of `safety_data`",
    ),
    "SaLoRA with nothing left of it": (
        lambda r: st.SaLoRA(rank=0, task_rank=0),
        ValueError,
        "Use no method instead",
    ),
    "SaLoRA from inputs that it does not measure": (
        lambda r: st.SaLoRA(safety_data="a", start="guardspace"),
        ValueError,
        "leave `start` out",
    ),
    "SaLoRA that protects everything": (
        lambda r: r.trainer(st.SaLoRA(safety_data=REFUSED, rank=32)),
        ValueError,
        "Lower `rank`",
    ),
    "SaLoRA on an unknown side": (
        lambda r: st.SaLoRA(safety_data="a", protect="top"),
        ValueError,
        "must be one of output, input, both, got 'top'",
    ),
    "SaLoRA with too much energy": (
        lambda r: st.SaLoRA(safety_data="a", energy=95),
        ValueError,
        "above 0 and at most 1, got 95",
    ),
    "SaLoRA with a rank as text": (lambda r: st.SaLoRA(safety_data="a", rank="32"), TypeError, "`rank`"),
    "SaLoRA without LoRA": (
        lambda r: r.trainer(st.SaLoRA(safety_data=REFUSED), peft_config=None),
        ValueError,
        "LoRA",
    ),
    "SaLoRA with a bias": (
        lambda r: r.trainer(st.SaLoRA(safety_data=REFUSED), peft_config=lora(lora_bias=True)),
        ValueError,
        "Remove `lora_bias`",
    ),
    "SaLoRA with another initialisation": (
        lambda r: r.trainer(st.SaLoRA(safety_data=REFUSED), peft_config=lora(init_lora_weights="pissa")),
        ValueError,
        "Remove `init_lora_weights",
    ),
    "SaLoRA with data without answers": (
        lambda r: r.trainer(st.SaLoRA(safety_data=["Make a bad thing."], rank=4)),
        ValueError,
        "no answer: found turns by user",
    ),
    "SaLoRA with no rows at all": (
        lambda r: r.trainer(st.SaLoRA(safety_data=[], rank=4)),
        ValueError,
        "holds no rows",
    ),
    "vectors without a source": (lambda r: st.SecurityVectors(), ValueError, "needs `vectors`"),
    "vectors with retained rows and nothing to fit": (
        lambda r: st.SecurityVectors("vectors", retain_data=REFUSED),
        ValueError,
        "`retain_data` is for fitting",
    ),
    "vectors without strength": (
        lambda r: st.SecurityVectors("vectors", strength=0),
        ValueError,
        "`strength` must be",
    ),
    "vectors in a folder that is not there": (
        lambda r: r.trainer(st.SecurityVectors(r.folder / "absent")),
        OSError,
        "absent",
    ),
    "vectors in a folder without vectors": (
        lambda r: r.trainer(st.SecurityVectors(r.folder)),
        OSError,
        "no such file",
    ),
    "vectors for prompt learning": (
        lambda r: r.trainer(
            st.SecurityVectors(vectors()), peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        ),
        ValueError,
        "Use `LoraConfig",
    ),
    "vectors of another model": (
        lambda r: r.trainer(st.SecurityVectors(vectors()), model=other_model()),
        ValueError,
        "do not fit the model",
    ),
    "vectors with unknown settings of fitting": (
        lambda r: st.SecurityVectors(harmful_data=HARMFUL, fitting={"steps": 3}),
        TypeError,
        "steps",
    ),
    "vectors fitted with a negative learning rate": (
        lambda r: Fitting(learning_rate=-1),
        ValueError,
        "`learning_rate`",
    ),
    "vectors fitted to no rows": (
        lambda r: st.train_security_vectors(tiny.model(), [], tiny.tokenizer()),
        ValueError,
        "rows",
    ),
    "vectors fitted without a chat template": (
        lambda r: st.train_security_vectors(tiny.model(), HARMFUL, headless()),
        ValueError,
        "chat template",
    ),
    "an anchor with a negative weight": (lambda r: st.RefusalAnchor(weight=-3), ValueError, "at least 0, got -3"),
    "a basis of unknown tokens": (
        lambda r: st.SaLoRA(safety_data="a", input_tokens="prompts"),
        ValueError,
        "`input_tokens` must be one of prompt, answer, all",
    ),
    "a basis without a chat template": (flat_tokenizer, ValueError, "chat template"),
    "a basis of another model": (
        lambda r: r.trainer(
            st.SaLoRA(basis=st.SafetyBasis.from_rows(tiny.model(), tiny.tokenizer(), REFUSED, rank=4), rank=4),
            model=other_model(),
        ),
        ValueError,
        "do not fit the model",
    ),
    "a direction of another model": (
        lambda r: r.trainer(
            st.AsFT(direction=st.AlignmentDirection.from_checkpoints(*r.pair, modules="q_proj|v_proj")),
            model=other_model(),
        ),
        ValueError,
        "does not fit",
    ),
}

DATA: dict[str, Case] = {
    "no such file": (lambda r: st.load_rows(r.folder / "absent.csv"), FileNotFoundError, "Check the path"),
    "a folder": (lambda r: st.load_rows(r.folder), ValueError, "Rename it"),
    "a kind that cannot be read": (lambda r: rows(r, "rows.docx", "x"), ValueError, "Rename it to one of .json"),
    "an empty file": (lambda r: rows(r, "rows.jsonl", ""), ValueError, "is empty"),
    "blank lines": (lambda r: rows(r, "rows.jsonl", "\n\n"), ValueError, "no "),
    "half a JSON line": (lambda r: rows(r, "rows.jsonl", '{"prompt": "a", "comp'), ValueError, "line 1"),
    "half an array": (lambda r: rows(r, "rows.json", '[{"prompt": "a", "completion": "b"},'), ValueError, "line 1"),
    "an array that is nested too deeply": (lambda r: rows(r, "rows.json", "[" * 100_000), ValueError, "line 1: found"),
    "a row that is nested too deeply": (
        lambda r: rows(r, "rows.json", '[{"prompt": "a",\n"b": ' + "[" * 100_000),
        ValueError,
        "nested too deeply to be read",
    ),
    "a column of an object that is nested as deeply as can be read": (
        lambda r: rows(r, "rows.jsonl", '{"prompt": ' + "[" * 987 + "]" * 987 + "}"),
        ValueError,
        "line 1",
    ),
    "a number that is too long": (
        lambda r: rows(r, "rows.jsonl", '{"prompt": "a", "completion": "b", "id": ' + "1" * 5000 + "}"),
        ValueError,
        "line 1: not JSON: found a whole number with more digits than can be read",
    ),
    "a number that is too long in an array": (
        lambda r: rows(r, "rows.json", '[{"prompt": "a", "completion": "b"},\n{"id": ' + "1" * 5000 + "}]"),
        ValueError,
        "row 2 (index 1): not JSON: found a whole number with more digits than can be read",
    ),
    "a name that no file can have": (lambda r: st.load_rows("x" * 300 + ".csv"), FileNotFoundError, "Check the path"),
    "one object over several lines": (lambda r: rows(r, "rows.json", '{\n"prompt": "a"\n}'), ValueError, "an array"),
    "columns that nobody knows": (lambda r: rows(r, "rows.csv", "left,right\na,b"), ValueError, "columns"),
    "a row without an answer": (
        lambda r: rows(r, "rows.jsonl", '{"prompt": "a", "completion": ""}'),
        ValueError,
        "line 1",
    ),
    "an answer of null": (
        lambda r: rows(r, "rows.jsonl", '{"prompt": "a", "completion": null}'),
        ValueError,
        "line 1",
    ),
    "a null byte": (
        lambda r: rows(r, "rows.jsonl", json.dumps({"prompt": "a\0", "completion": "b"})),
        ValueError,
        "line 1",
    ),
    "cells without quotes": (lambda r: rows(r, "rows.csv", "instruction,output\na,b,c"), ValueError, "line 2"),
    "a column named twice": (lambda r: rows(r, "rows.csv", "prompt,prompt\na,b"), ValueError, "a different name"),
    "Latin-1 taken for Unicode": (
        lambda r: rows(r, "rows.csv", "instruction,output\ncafé,b".encode("latin-1")),
        ValueError,
        "encoding",
    ),
    "an unknown encoding": (
        lambda r: rows(r, "rows.csv", "instruction,output\na,b", encoding="utf-99"),
        ValueError,
        "Try utf-8",
    ),
    "a format that does not exist": (
        lambda r: rows(r, "rows.csv", "instruction,output\na,b", format="alpacca"),
        ValueError,
        "alpaca",
    ),
    "format and columns": (lambda r: ReadOptions(format="alpaca", columns={"prompt": "a"}), ValueError, "not both"),
    "another word for a bad row": (lambda r: ReadOptions(on_bad_row="ignore"), ValueError, "'raise' or 'skip'"),
    "a filter that lets nothing through": (
        lambda r: rows(r, "rows.csv", "instruction,output\na,b", where={"output": "c"}),
        ValueError,
        "where",
    ),
    "gzip cut short": (
        lambda r: rows(r, "rows.csv.gz", b"\x1f\x8b\x08\x00" + b"\0" * 20),
        ValueError,
        "Copy or download it again",
    ),
    "Parquet that is none": (lambda r: rows(r, "rows.parquet", b"PAR1 and no more"), ValueError, "Parquet"),
    "a dataset that is not there": (
        lambda r: st.load_rows("hf:nobody/nothing-at-all"),
        (OSError, ValueError),
        "nobody/nothing-at-all",
    ),
    "no prompts": (lambda r: st.PromptSet("mine", "harmful", ()), ValueError, "Give at least one prompt"),
    "a task without answers": (lambda r: st.PromptSet("mine", "task", ("a",)), ValueError, "no `references`"),
    "too few categories": (
        lambda r: st.PromptSet("mine", "benign", ("a", "b"), ("x",)),
        ValueError,
        "1 entries for 2 prompts",
    ),
    "prompts of an unknown kind": (lambda r: st.PromptSet("mine", "evil", ("a",)), ValueError, "harmful, benign"),
    "one prompt instead of several": (lambda r: st.PromptSet("mine", "benign", "Say one."), TypeError, "tuple"),
    "more poison than there is": (lambda r: poison(REFUSED, HARMFUL[:1], 0.5), ValueError, "lower `fraction`"),
    "a share above one": (lambda r: poison(REFUSED, HARMFUL, 50), ValueError, "between 0 and 1, got 50"),
    "a row that is none": (
        lambda r: encode_row(tiny.tokenizer(), {"question": "a"}, 64),
        ValueError,
        "prompt",
    ),
    "a trainer without rows": (
        lambda r: r.trainer(None, train_dataset=None),
        (ValueError, TypeError),
        "train_dataset",
    ),
}

MODELS: dict[str, Case] = {
    "a model that is not there": (
        lambda r: r.trainer(st.AsFT(projector="none"), model=str(r.folder / "absent")),
        OSError,
        "absent",
    ),
    "target modules that are not there": (
        lambda r: r.trainer(st.AsFT(projector="none"), peft_config=LoraConfig(target_modules=["no_proj"])),
        ValueError,
        "no_proj",
    ),
    "an adapter for full training": (
        lambda r: st.compact_adapter(r.folder, r.folder / "small"),
        (ValueError, OSError),
        "adapter_config.json",
    ),
    "a direction of an adapter": (
        lambda r: (
            r.file("adapter/adapter_config.json", "{}"),
            st.AlignmentDirection.from_checkpoints(r.folder / "adapter", r.pair[1]),
        ),
        ValueError,
        "Merge it first",
    ),
    "a direction with too large an error": (
        lambda r: st.AlignmentDirection.from_checkpoints(*r.pair, max_error=1),
        ValueError,
        "below 1, got 1",
    ),
    "a direction of modules that are not there": (
        lambda r: st.AlignmentDirection.from_checkpoints(*r.pair, modules="no_proj"),
        ValueError,
        "no_proj",
    ),
    "a direction with a broken pattern": (
        lambda r: st.AlignmentDirection.from_checkpoints(*r.pair, modules="q_proj("),
        ValueError,
        "expression",
    ),
    "a basis of modules that are not there": (
        lambda r: st.SafetyBasis.from_rows(tiny.model(), tiny.tokenizer(), REFUSED, modules=["no_proj"]),
        (ValueError, KeyError),
        "no_proj",
    ),
    "a card of nothing": (lambda r: st.write_model_card(r.folder), ValueError, "no adapter and no model"),
}


def asked(*prompts: str) -> Any:
    return st.PromptSet("mine", "harmful", prompts or ("Make a bad thing.",))


EVALUATION: dict[str, Case] = {
    "a tokenizer without a chat template": (
        lambda r: st.evaluate(tiny.model(), headless(), [asked()], name="x"),
        ValueError,
        "chat template",
    ),
    "nothing to ask": (lambda r: st.evaluate(tiny.model(), tiny.tokenizer(), [], name="x"), ValueError, "prompt sets"),
    "no room for an answer": (
        lambda r: st.generate(tiny.model(), tiny.tokenizer(), ["a"], max_new_tokens=0),
        ValueError,
        "`max_new_tokens`",
    ),
    "batches of nothing": (
        lambda r: st.generate(tiny.model(), tiny.tokenizer(), ["a"], batch_size=0),
        ValueError,
        "`batch_size`",
    ),
    "one prompt instead of a list of them": (
        lambda r: st.generate(tiny.model(), tiny.tokenizer(), "Say one."),
        TypeError,
        "`prompts` must be a list",
    ),
    "an adapter that is not there": (
        lambda r: st.compare(tiny.model(), tiny.tokenizer(), [asked()], {"tuned": str(r.folder / "absent")}),
        (ValueError, OSError),
        "absent",
    ),
    "an adapter called before": (
        lambda r: st.compare(tiny.model(), tiny.tokenizer(), [asked()], {"before": "x"}),
        ValueError,
        "before",
    ),
    "a judge that is none": (
        lambda r: st.evaluate(tiny.model(), tiny.tokenizer(), [asked()], name="x", judges=["oracle"]),
        ValueError,
        "phrases",
    ),
    "answers without prompts": (lambda r: PhraseJudge()(["a"], []), ValueError, "Give one for each"),
    "a limit below zero": (lambda r: Thresholds(harmful_rise=-1), ValueError, "0 percentage points or more"),
    "a comparison that is no JSON": (lambda r: from_json("{"), ValueError, "Was writing it interrupted"),
    "a comparison that is something else": (lambda r: from_json("{}"), ValueError, "not a comparison"),
    "a comparison without its parts": (
        lambda r: from_json('{"kind": "safe_trainer comparison", "format": 1}'),
        ValueError,
        "damaged",
    ),
    "a scan of nothing": (
        lambda r: st.scan_file(r.folder / "absent.jsonl", tiny.model(), vectors(), tiny.tokenizer()),
        FileNotFoundError,
        "Check the path",
    ),
    "a scan with vectors of another model": (
        lambda r: list(score_rows(HARMFUL, other_model(), vectors(), tiny.tokenizer())),
        ValueError,
        "do not fit the model",
    ),
    "a scan into a file of an unknown kind": (
        lambda r: st.scan_file(
            r.file("rows.jsonl", json.dumps(HARMFUL[0])),
            tiny.model(),
            vectors(),
            tiny.tokenizer(),
            output=r.folder / "ranked.xlsx",
        ),
        ValueError,
        ".csv, .jsonl",
    ),
    "a scan in batches of nothing": (
        lambda r: list(score_rows(HARMFUL, tiny.model(), vectors(), tiny.tokenizer(), batch_size=0)),
        ValueError,
        "`batch_size`",
    ),
}

RECIPES: dict[str, Case] = {
    "no such recipe": (lambda r: read_recipe(r.folder / "absent.yaml"), OSError, "absent.yaml"),
    "a recipe that is a list": (lambda r: read_recipe(r.file("r.yaml", "- a")), ValueError, "expected keys"),
    "a recipe with Python objects": (
        lambda r: read_recipe(r.file("r.yaml", "a: !!python/object/apply:os.system ['true']")),
        ValueError,
        "has the tag",
    ),
    "a misspelt key": (lambda r: r.recipe(outptu="x"), ValueError, "did you mean `output`"),
    "a misspelt method": (lambda r: r.recipe(safety={"method": "asfd"}), ValueError, "did you mean `asft`"),
    "a setting of another type": (
        lambda r: r.recipe(training={"max_steps": "many"}),
        ValueError,
        "expected a whole number, got 'many'",
    ),
    "a model folder that is not there": (lambda r: r.recipe(model={"path": "./absent"}), ValueError, "no folder"),
    "a file that is not there": (lambda r: r.recipe(data=[{"path": "absent.csv"}]), ValueError, "there is no file"),
    "a token in a file": (
        lambda r: r.recipe(training={"hub_token": "hf_x"}),
        ValueError,
        "must not be in a file",
    ),
    "code of others": (
        lambda r: r.recipe(training={"trust_remote_code": True}),
        ValueError,
        "trust_remote_code",
    ),
}

TABLES = {"methods": METHODS, "data": DATA, "models": MODELS, "evaluation": EVALUATION, "recipes": RECIPES}
CASES = {f"{table}: {name}": case for table, cases in TABLES.items() for name, case in cases.items()}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_input_is_refused_in_words_that_help(name, room):
    build, error, words = CASES[name]
    with pytest.raises(error) as raised:
        build(room)
    assert words in str(raised.value)


# ---- the command line: exit code and the words on standard error

COMMANDS: dict[str, tuple[list[str], int, str]] = {
    "an unknown command": (["tune"], 2, "No such command"),
    "a recipe that is not there": (["train", "absent.yaml"], 2, "`absent.yaml` is not a file"),
    "an unknown option": (["train", "--fast"], 2, "No such option"),
    "a change without a value": (["train", "{recipe}", "--set", "training"], 1, "expected a form such as"),
    "going on from nothing": (["train", "{recipe}", "--resume"], 1, "Leave out --resume"),
    "an output that is a file": (["train", "{recipe}", "--set", "output={recipe}"], 1, "is a file"),
    "an output that has no place": (
        ["train", "{recipe}", "--set", "output=/proc/nowhere"],
        1,
        "cannot be written",
    ),
    "a comparison with nothing": (["compare", "{model}"], 2, "--adapter out"),
    "an adapter that is not there": (["compare", "{model}", "--adapter", "out"], 2, "there is no folder `out`"),
    "a model that is an empty folder": (["evaluate", "{empty}"], 2, "is empty"),
    "a model that is another folder": (
        ["compare", "{folder}", "--adapter", "out"],
        2,
        "there is no config.json in it",
    ),
    "a model that is a file": (["drift", "{recipe}", "{model}"], 2, "recipe.yaml"),
    "prompts without a kind": (
        ["compare", "{model}", "--adapter", "tuned=out", "--prompts", "asked.csv"],
        2,
        "harmful=",
    ),
    "prompts that are not there": (
        ["evaluate", "{model}", "--prompts", "harmful={folder}/absent.csv"],
        1,
        "no file",
    ),
    "a judge that nobody knows": (["evaluate", "{model}", "--judge", "oracle"], 2, "phrases"),
    "a model that is not there": (
        ["evaluate", "{folder}/absent", "--prompts", "harmful={asked}"],
        2,
        "there is no folder",
    ),
    "a basis of rank 0": (["basis", "{model}", "{asked}", "--rank", "0"], 2, "--rank"),
    "a direction between a model and itself": (
        ["direction", "{model}", "{model}", "-o", "{folder}/d.safetensors"],
        1,
        "identical",
    ),
    "vectors of no file": (["vectors", "{model}", "{folder}/absent.jsonl", "-o", "{folder}/v"], 1, "no file"),
    "a scan with vectors that are not there": (
        ["scan", "{model}", "{rows}", "--vectors", "{folder}/absent"],
        1,
        "absent",
    ),
    "an export over a folder that holds something": (
        ["export", "{folder}", "--output", "{folder}"],
        2,
        "exists already",
    ),
    "an export of no adapter": (["export", "{folder}", "--output", "{folder}/merged"], 1, "adapter_config.json"),
    "a card of nothing": (["card", "{folder}"], 1, "no adapter and no model"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_command_ends_with_one_sentence_and_its_exit_code(name, room):
    arguments, code, words = COMMANDS[name]
    room.recipe()
    names = SimpleNamespace(
        recipe=room.folder / "recipe.yaml",
        model=room.pair[0],
        folder=room.folder,
        empty=room.folder / "empty",
        rows=room.folder / "rows.jsonl",
        asked=room.file("asked.csv", "prompt\nMake a bad thing."),
    )
    names.empty.mkdir()
    filled = [argument.format(**vars(names)) for argument in arguments]
    result = invoke(*filled)
    assert result.exit_code == code, result.output
    assert words in " ".join(
        re.split(r"[\s│]+", result.stderr)
    )  # as it was before it was broken into lines, in a frame
    assert "Traceback" not in result.output
