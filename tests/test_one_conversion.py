"""One conversion for every door: whatever holds the same rows, the rows, their hash and their tokens are equal."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unicodedata import category

import pyarrow as pa
import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as some
from pyarrow import parquet
from trl import SFTConfig

from safe_trainer import SafeSFTTrainer, load_rows, train_security_vectors
from safe_trainer.analysis.scan import score_rows
from safe_trainer.artifacts.calibration import examples_from
from safe_trainer.data import ReadOptions, as_rows, conversation, encode_rows, rows_sha256

steady = settings(max_examples=25, deadline=None, derandomize=True, database=None)
texts = some.text(
    some.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=30
).filter(lambda text: text != "NaN" and any(not c.isspace() and category(c) != "Cf" for c in text))
pairs = some.lists(some.tuples(texts, texts), min_size=1, max_size=4)

PAIRS = [("Who is it?", "Me."), ("Where?", "Here.")]
EXPECTED = [conversation(prompt, answer) for prompt, answer in PAIRS]
STRINGS = [{"prompt": prompt, "completion": answer} for prompt, answer in PAIRS]

Pairs = list[tuple[str, str]]


def turns(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


COLUMNS: dict[str, Callable[[str, str], Any]] = {
    "strings": lambda p, a: {"prompt": p, "completion": a},
    "conversational": lambda p, a: {"prompt": turns(p, a)[:1], "completion": turns(p, a)[1:]},
    "messages": lambda p, a: {"messages": turns(p, a)},
    "messages as JSON": lambda p, a: {"messages": json.dumps(turns(p, a))},
    "parts": lambda p, a: {
        "messages": [t | {"content": [{"type": "text", "text": t["content"]}]} for t in turns(p, a)]
    },
    "sharegpt": lambda p, a: {"conversations": [{"from": "human", "value": p}, {"from": "gpt", "value": a}]},
    "alpaca": lambda p, a: {"instruction": p, "input": "", "output": a},
    "question-answer": lambda p, a: {"Question": p, "Answer": a, "id": 7},
    "columns in other order": lambda p, a: {"response": a, "prompt": p, "system": None},
}


HOME = tempfile.TemporaryDirectory(prefix="safe_trainer_tests_")  # goes when the process ends


def file(name: str, content: bytes) -> Path:
    path = Path(tempfile.mkdtemp(dir=HOME.name), name)
    path.write_bytes(content)
    return path


def table(rows: list[dict[str, Any]]) -> bytes:
    found = io.StringIO(newline="")
    writer = csv.writer(found, quoting=csv.QUOTE_ALL)
    writer.writerows(
        [list(rows[0]), *([v if isinstance(v, str) else json.dumps(v) for v in r.values()] for r in rows)]
    )
    return found.getvalue().encode()


def parquet_file(rows: list[dict[str, Any]]) -> Path:
    path = Path(tempfile.mkdtemp(dir=HOME.name), "rows.parquet")
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


HOLDERS: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "list": list,
    "generator": lambda rows: (row for row in rows),
    "Dataset": Dataset.from_list,
    "DatasetDict": lambda rows: DatasetDict(train=Dataset.from_list(rows)),
    "IterableDataset": lambda rows: Dataset.from_list(rows).to_iterable_dataset(),
    "Dataset as arrays": lambda rows: Dataset.from_list(rows).with_format("numpy"),
    "Dataset as tensors": lambda rows: Dataset.from_list(rows).with_format("torch"),
    "JSON Lines": lambda rows: file("rows.jsonl", "\n".join(map(json.dumps, rows)).encode()),
    "JSON": lambda rows: file("rows.json", json.dumps(rows, ensure_ascii=False).encode()),
    "gzip": lambda rows: str(file("rows.json.gz", gzip.compress(json.dumps(rows, indent=1).encode()))),
    "Parquet": parquet_file,
    "loaded": lambda rows: as_rows(rows)[0],
}


@pytest.mark.slow
@pytest.mark.parametrize("columns", COLUMNS)
@steady
@given(pairs, some.sampled_from(sorted(HOLDERS)))
def test_any_representation_gives_the_same_rows_hash_and_tokens(columns, found, holder):
    expected = [conversation(prompt, answer) for prompt, answer in found]

    def held() -> Any:
        return HOLDERS[holder]([COLUMNS[columns](prompt, answer) for prompt, answer in found])

    rows, report = as_rows(held())
    assert rows.to_list() == expected and report.learned_share == 1
    assert rows_sha256(held()) == rows_sha256(expected)
    assert encode_rows(tiny.tokenizer(), rows) == encode_rows(tiny.tokenizer(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("columns", sorted(set(COLUMNS) - {"parts", "sharegpt", "columns in other order"}))
@steady
@given(some.lists(some.tuples(texts.filter(lambda t: "\r" not in t), texts), min_size=1, max_size=4))
def test_tables_give_the_same_rows_too(columns, found):
    path = file("rows.csv", table([COLUMNS[columns](prompt, answer) for prompt, answer in found]))
    assert as_rows(path)[0].to_list() == [conversation(prompt, answer) for prompt, answer in found]


@pytest.mark.parametrize("columns", COLUMNS)
def test_rows_are_trained_on_with_the_tokens_that_everything_else_reads(columns, tmp_path):
    path = file("rows.jsonl", "\n".join(json.dumps(COLUMNS[columns](*pair)) for pair in PAIRS).encode())
    arguments = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=64)
    trainer = SafeSFTTrainer(
        tiny.model(), arguments, train_dataset=load_rows(path)[0], processing_class=tiny.tokenizer(), safety=None
    )
    for ours, theirs in zip(encode_rows(tiny.tokenizer(), EXPECTED), trainer.train_dataset, strict=True):
        assert list(theirs["input_ids"]) == ours.ids
        learned = [place for place, label in enumerate(theirs["labels"]) if label != -100]
        assert learned == list(range(ours.answer_start, len(ours.ids)))


def test_a_system_turn_is_the_same_in_a_column_and_in_the_conversation():
    system = {"role": "system", "content": "Be brief."}
    conversations = [
        {"messages": [system, *turns("Hi", "Hello")]},
        {"messages": turns("Hi", "Hello"), "system": "Be brief."},
        {"prompt": "Hi", "completion": "Hello", "system_prompt": "Be brief."},
        {"prompt": [system, turns("Hi", "Hello")[0]], "completion": turns("Hi", "Hello")[1:]},
        {
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
            "system": "Be brief.",
        },
    ]
    assert len({rows_sha256([row]) for row in conversations}) == 1


def test_a_dataset_dict_is_one_split_or_a_question():
    two = DatasetDict(train=Dataset.from_list(STRINGS), test=Dataset.from_list(STRINGS[:1]))
    with pytest.raises(ValueError, match=r"`harmful_data` has the splits train, test. .*`harmful_data\['train'\]`"):
        as_rows(two, argument="harmful_data")
    assert as_rows(two, options=ReadOptions(split="test"))[0].to_list() == EXPECTED[:1]
    with pytest.raises(ValueError, match="has no split 'valid'; it has train, test"):
        as_rows(two, options=ReadOptions(split="valid"))


def test_a_stream_is_read_up_to_the_limit():
    def endless():
        while True:
            yield STRINGS[0]

    rows, report = as_rows(IterableDataset.from_generator(endless), options=ReadOptions(limit=3))
    assert (len(rows), report.rows, report.kind) == (3, 3, "stream")


@pytest.mark.parametrize("source", [3, None, {"prompt": "a", "completion": "b"}])
def test_what_holds_no_rows_is_refused_with_the_argument(source):
    with pytest.raises(TypeError, match="`harmful_data` must be a file"):
        as_rows(source, argument="harmful_data")


@pytest.mark.parametrize("held", [list, Dataset.from_list, lambda rows: file("r.json", json.dumps(rows).encode())])
def test_a_bad_row_is_named_with_the_argument_and_its_index(held):
    with pytest.raises(ValueError, match=r"(?s)`safety_data`.*row 2 \(index 1\): empty text"):
        as_rows(held([STRINGS[0], {"prompt": "a", "completion": ""}]), argument="safety_data")


def test_a_missing_file_is_named_with_the_argument():
    with pytest.raises(FileNotFoundError, match="`harmful_data`: There is no file `absent.jsonl`"):
        as_rows("absent.jsonl", argument="harmful_data")


def test_other_rows_have_another_hash():
    assert rows_sha256(STRINGS) != rows_sha256(STRINGS[::-1])


# ---- templates


def test_a_missing_template_is_not_blamed_on_the_row():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="`harmful_data`.*no chat template.*tokenizer of a chat model") as error:
        encode_rows(tokenizer, EXPECTED, name="harmful_data")
    assert "Fix the row" not in str(error.value)


def test_a_template_that_refuses_a_row_names_it():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ValueError, match="Row 1 of `harmful_data`.*refuses its turns .user.: System role not support"):
        encode_rows(tokenizer, EXPECTED, name="harmful_data")


# ---- the doors


def held_everywhere() -> list[Any]:
    rows = [conversation(f"Do thing {n}", "Sure.") for n in range(4)]
    strings = [{"prompt": f"Do thing {n}", "completion": "Sure."} for n in range(4)]
    path = file("rows.jsonl", "\n".join(map(json.dumps, strings)).encode())
    return [
        rows,
        strings,
        Dataset.from_list(strings),
        path,
        [{"messages": r["prompt"] + r["completion"]} for r in rows],
    ]


def test_calibration_reads_the_same_tokens_of_any_representation():
    found = [examples_from(rows, tiny.tokenizer()) for rows in held_everywhere()]
    assert len(found[0]) == 4 and all(examples == found[0] for examples in found)


@pytest.mark.slow
def test_vectors_are_fitted_to_the_same_rows_of_any_representation():
    found = [
        train_security_vectors(tiny.model(), rows, tiny.tokenizer(), rank=2, max_steps=2, max_length=64)
        for rows in held_everywhere()
    ]
    assert len({json.dumps(vectors.provenance["harmful_rows"]) for vectors in found}) == 1
    for vectors in found[1:]:
        assert all(torch.equal(vectors.modules[name].B, one.B) for name, one in found[0].modules.items())


def test_a_scan_scores_any_representation_alike():
    vectors = train_security_vectors(tiny.model(), held_everywhere()[0], tiny.tokenizer(), rank=2, max_steps=2)
    found = [list(score_rows(rows, tiny.model(), vectors, tiny.tokenizer())) for rows in held_everywhere()]
    assert all(scores == found[0] for scores in found)


@pytest.mark.parametrize("kind", ["numpy", "torch", "pandas", "arrow"])
def test_labels_of_a_dataset_count_whatever_it_gives_its_rows_as(kind):
    rows = Dataset.from_list([{**row, "toxicity": n % 2} for n, row in enumerate(STRINGS)])
    assert as_rows(rows.with_format(kind))[0]["is_safe"][:] == [True, False]
    streamed = rows.to_iterable_dataset().with_format(kind)
    assert as_rows(streamed)[0]["is_safe"][:] == [True, False]
