"""What holds for every input: rows come back as they were written, and whatever is no input is refused in words.

Hypothesis makes the inputs, always the same ones, so that a run of the tests does not depend on chance.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import tempfile
from pathlib import Path
from typing import Any
from unicodedata import category

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as some

from safe_trainer import load_rows
from safe_trainer.data import ReadOptions, conversation
from safe_trainer.recipe import RecipeError, read_recipe
from safe_trainer.recipe.document import Document, assignment, dotted

steady = settings(max_examples=60, deadline=None, derandomize=True, database=None)

# What a row may hold: any text but the two characters that are refused, and not one in which nothing is to be seen.
texts = some.text(
    some.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=40
).filter(lambda text: text != "NaN" and any(not c.isspace() and category(c) != "Cf" for c in text))
pairs = some.lists(some.tuples(texts, texts), min_size=1, max_size=6)
numbers = some.integers(-(10**9), 10**9) | some.floats(allow_nan=False, allow_infinity=False, width=32)
words = some.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True)
values = some.recursive(
    some.none() | some.booleans() | numbers | texts,
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)


HOME = tempfile.TemporaryDirectory(prefix="safe_trainer_tests_")  # goes when the process ends


def written(name: str, content: bytes) -> Path:
    path = Path(tempfile.mkdtemp(dir=HOME.name), name)
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def as_csv(rows: list[tuple[str, str]]) -> bytes:
    file = io.StringIO(newline="")
    table = csv.writer(file, quoting=csv.QUOTE_ALL)
    table.writerows([("instruction", "output"), *rows])
    return file.getvalue().encode()


# ---- data


@pytest.mark.slow
@steady
@given(pairs, some.sampled_from([".jsonl", ".jsonl.gz", ".json"]), some.booleans())
def test_rows_of_json_come_back_as_they_were_written(rows, suffix, ascii):
    records = [json.dumps({"prompt": p, "completion": c}, ensure_ascii=ascii) for p, c in rows]
    content = "[" + ",\n".join(records) + "]" if suffix == ".json" else "\n".join(records)
    found, report = load_rows(written(f"rows{suffix}", content.encode()))
    assert list(found) == [conversation(p, c) for p, c in rows]
    assert report.rows == len(rows) and not report.troubles


@pytest.mark.slow
@steady
@given(pairs)
def test_rows_of_csv_come_back_as_they_were_written(rows):
    found, report = load_rows(written("rows.csv", as_csv(rows)))
    assert list(found) == [conversation(p, c) for p, c in rows]
    assert report.format == "alpaca"


@pytest.mark.slow
@steady
@given(pairs, some.lists(some.integers(0, 10**6), min_size=1, max_size=3))
def test_what_is_read_and_what_cannot_be_used_add_up_to_what_was_written(rows, places):
    lines = [json.dumps({"prompt": p, "completion": c}) for p, c in rows]
    for place in places:
        lines.insert(place % (len(lines) + 1), '{"prompt": "half')
    found, report = load_rows(written("rows.jsonl", "\n".join(lines).encode()), ReadOptions(on_bad_row="skip"))
    assert len(found) == report.rows == len(rows)
    assert sum(report.troubles.values()) == len(places)
    assert [trouble.line for trouble in report.examples] == [
        n for n, line in enumerate(lines, 1) if line.endswith("half")
    ][:5]


@pytest.mark.slow
@settings(steady, max_examples=150)
@given(
    some.binary(max_size=200), some.sampled_from([".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet", ".csv.gz"])
)
def test_bytes_of_any_kind_are_rows_or_are_refused_in_words(content, suffix):
    for path in (Path(tempfile.mkdtemp(dir=HOME.name), f"rows{suffix}"),):
        path.write_bytes(content)
        refused_or(lambda path=path: load_rows(path), str(path))


@pytest.mark.slow
@settings(steady, max_examples=100)
@given(some.lists(values, max_size=4))
def test_values_of_any_kind_are_rows_or_are_refused_in_words(records):
    path = written("rows.jsonl", "\n".join(map(json.dumps, records)).encode())
    refused_or(lambda: load_rows(path), str(path))


def refused_or(load: Any, path: str) -> None:
    """Load; if that is refused, then as a `ValueError` that names the file and says more than that."""
    try:
        rows, report = load()
    except ValueError as error:
        assert path in str(error) or "Fix them" in str(error), repr(error)
        assert len(str(error)) > len(path) + 20
    else:
        assert len(rows) == report.rows > 0


# ---- recipes


@pytest.mark.slow
@steady
@given(some.dictionaries(words, values, min_size=1, max_size=4))
def test_a_recipe_is_read_as_yaml_is_but_for_numbers_with_an_exponent(content):
    text = yaml.safe_dump(content, allow_unicode=True)
    assert Document(text, "r").values == content


@settings(steady, max_examples=150)
@given(some.text(max_size=60) | some.text(alphabet="abc:- \n[]{}&*!|>'\"#%,?", max_size=60))
def test_a_text_of_any_kind_is_a_mapping_or_is_refused_in_words(text):
    try:
        document = Document(text, "recipe.yaml")
    except RecipeError as error:
        assert "recipe.yaml" in str(error) and error.problems and all(error.problems)
    else:
        assert isinstance(document.values, dict)


@steady
@given(some.lists(words, min_size=1, max_size=4), some.booleans() | some.integers(-99, 99) | words)
def test_a_change_of_the_command_line_is_put_where_it_says(path, value):
    place, found = assignment(f"{'.'.join(path)}={json.dumps(value)}", "r")
    assert dotted(place) == ".".join(path) and found == value
    document = Document("a_key_that_is_there: 1", "r")
    document.put(place, found)
    here: Any = document.values
    for key in place:
        here = here[key]
    assert here == value


@settings(steady, max_examples=100)
@given(some.text(max_size=30))
def test_a_change_of_any_kind_has_a_place_or_is_refused_in_words(text):
    try:
        place, _ = assignment(text, "r")
    except ValueError as error:
        assert text in str(error)
    else:
        assert place and "" not in place


def valid() -> dict[str, Any]:
    """Return a recipe that is valid, with rows that are there."""
    rows = written("rows.jsonl", json.dumps(conversation("Say one.", "One.")).encode())
    return {
        "model": {"path": "a/model", "dtype": "float32"},
        "data": [{"path": str(rows), "weight": 1.5, "columns": None}],
        "peft": {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "lora_dropout": 0.1},
        "safety": [{"method": "asft", "unaligned_model": "a/base", "weight": 1.0}],
        "training": {"max_steps": 2, "learning_rate": 1e-4, "save_strategy": "no", "logging_steps": 1},
        "evaluation": {"prompts": [{"built_in": "general", "kind": "harmful"}], "max_new_tokens": 4},
        "monitor": {"every": 1, "prompts": 2, "direction": None},
        "output": "out",
    }


VALID = valid()
paths = some.sampled_from(["./x", "/x", "~x", "~", "x/y", "x" * 300, "./" + "x" * 300, "\0", "/\0", "..", "."])
anything = values | paths | some.integers() | some.sampled_from([True, float("inf"), float("nan"), 10**400, [[]], {}])


def places(inside: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = inside.items() if isinstance(inside, dict) else enumerate(inside) if isinstance(inside, list) else ()
    return [place, *(found for key, value in inner for found in places(value, (*place, key)))]


def changed(inside: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    copied = dict(inside) if isinstance(inside, dict) else list(inside)
    copied[place[0]] = changed(inside[place[0]], place[1:], value)
    return copied


def read(content: bytes) -> None:
    """Read a recipe; if that is refused, then as a `RecipeError` that names the file and says more than that."""
    path = written("recipe.yaml", content)
    try:
        read_recipe(path)
    except RecipeError as error:
        assert str(path) in str(error) and error.problems and all(error.problems)


def test_the_recipe_that_is_changed_is_valid():
    read_recipe(written("recipe.yaml", yaml.safe_dump(VALID).encode()))


@pytest.mark.slow
@settings(steady, max_examples=200)
@given(some.sampled_from(places(VALID)), anything)
def test_a_recipe_with_one_value_of_any_kind_is_read_or_is_refused_in_words(place, value):
    read(yaml.safe_dump(changed(VALID, place, value), allow_unicode=True).encode())


@pytest.mark.slow
@settings(steady, max_examples=100)
@given(some.sampled_from(["training", "peft", "safety", "monitor", "evaluation", "model"]), words, anything)
def test_a_recipe_with_a_key_of_any_name_is_read_or_is_refused_in_words(part, key, value):
    inner = VALID[part][0] if part == "safety" else VALID[part]
    read(yaml.safe_dump({**VALID, part: {**inner, key: value}}, allow_unicode=True).encode())


@settings(steady, max_examples=100)
@given(
    some.binary(max_size=60) | some.text(alphabet="model:data{}[]&*!|>-'\"#%,? \n\t1.", max_size=60).map(str.encode)
)
def test_a_file_of_any_kind_is_no_recipe_and_is_refused_in_words(content):
    read(content)
