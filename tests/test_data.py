"""Rows and prompt sets: built by hand, loaded from files, mixed, and compared with each other."""

from __future__ import annotations

import dataclasses
import gzip
import json
import logging
import subprocess
import sys
import textwrap

import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset

from safe_trainer.data import (
    HubDataset,
    PromptSet,
    ReadOptions,
    as_prompts,
    as_rows,
    conversation,
    labelled_harmful,
    leaked_rows,
    load_prompts,
    load_rows,
    poison,
    read_records,
    rows_sha256,
    split_by_label,
)
from safe_trainer.data.loaders import hub_dataset


def write(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


ALPACA = [{"instruction": f"Question {n}", "output": f"Answer {n}"} for n in range(5)]


def test_rows_are_what_trl_takes(tmp_path):
    rows, report = load_rows(write(tmp_path / "rows.jsonl", ALPACA))
    assert rows.to_list() == [conversation(f"Question {n}", f"Answer {n}") for n in range(5)]
    assert str(report) == f"{tmp_path}/rows.jsonl: JSON Lines, alpaca: 5 rows"


def test_texts_stay_texts(tmp_path):
    rows, report = load_rows(write(tmp_path / "rows.jsonl", [{"text": "Once"}, {"text": "upon"}]))
    assert rows.to_list() == [{"text": "Once"}, {"text": "upon"}]
    assert report.format == "text"


def test_bad_rows_are_refused_with_all_their_lines(tmp_path):
    path = write(tmp_path / "rows.jsonl", [*ALPACA, {"instruction": "No answer", "output": ""}, "{", {"text": "Once"}])
    with pytest.raises(ValueError) as error:
        load_rows(path)
    message = str(error.value)
    assert message.startswith("3 of 8 rows cannot be used.")
    assert "line 6: empty text: found nothing in turn 2, by the assistant, expected text" in message
    assert "line 7: not JSON" in message
    assert "line 8: other columns: found text, expected instruction, output (alpaca)" in message
    assert "on_bad_row='skip'" in message


def test_bad_rows_can_be_left_out_but_not_silently(tmp_path, caplog):
    path = write(tmp_path / "rows.jsonl", [{"instruction": "No answer"}, *ALPACA, *["{"] * 7])
    with caplog.at_level(logging.WARNING):
        rows, report = load_rows(path, ReadOptions(on_bad_row="skip"))
    assert len(rows) == report.rows == 5
    assert report.troubles == {"not JSON": 7, "other columns": 1}
    assert len(report.examples) == 6, "five of a kind are enough"
    assert "7 unusable (not JSON), 1 unusable (other columns)" in caplog.text


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_number_that_is_too_long_can_be_left_out(name, tmp_path, caplog):
    good = '{"prompt": "a", "completion": "b"}'
    lines = [good, '{"prompt": "c", "completion": "d", "id": [-' + "1" * 300_000 + "]}", good]
    path = tmp_path / name
    path.write_text("[" + ",\n".join(lines) + "]" if name == "rows.json" else "\n".join(lines))
    rows, report = load_rows(path, ReadOptions(on_bad_row="skip"))
    assert len(rows) == 2 and report.troubles == {"not JSON": 1}
    place = "row 2 (index 1)" if name == "rows.json" else "line 2"
    assert f"{place}: not JSON: found a whole number with more digits than can be read" in caplog.text


def test_the_first_bad_row_does_not_decide_the_format(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"instruction": "Lost its output"}, *ALPACA])
    with pytest.raises(ValueError, match="1 of 6 rows .*\n.*alpaca"):
        load_rows(path)


def test_a_file_without_a_usable_row_is_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"instruction": "No answer", "output": ""}])
    with pytest.raises(ValueError, match="No row can be used"):
        load_rows(path, ReadOptions(on_bad_row="skip"))
    (tmp_path / "rows.csv").write_text("instruction,output\n")
    with pytest.raises(ValueError, match="no rows after its header"):
        load_rows(tmp_path / "rows.csv")


def test_unknown_columns_are_shown_with_what_would_do(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"question_text": "Hi", "reply": "Hello"}])
    with pytest.raises(ValueError, match="found columns question_text, reply. Name its `columns`") as error:
        load_rows(path)
    assert "alpaca (instruction, output)" in str(error.value)
    rows, _ = load_rows(path, ReadOptions(columns={"prompt": "question_text", "answer": "reply"}))
    assert rows.to_list() == [conversation("Hi", "Hello")]


def test_columns_of_a_file_without_header_are_named_by_number(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("1,Hi,Hello\n2,Bye,Ciao\n")
    rows, _ = load_rows(path, ReadOptions(columns={"prompt": "2", "answer": "3"}))
    assert rows.to_list() == [conversation("Hi", "Hello"), conversation("Bye", "Ciao")]


@pytest.mark.parametrize("flag", [False, "False", "false", " FALSE"])
def test_where_takes_the_rows_with_a_value_and_counts_the_others(tmp_path, flag):
    rows = [{"prompt": f"Q{n}", "response": "A", "is_safe": flag if n < 2 else "True"} for n in range(5)]
    rows, report = load_rows(write(tmp_path / "rows.jsonl", rows), ReadOptions(where={"is_safe": False}))
    assert [row["prompt"][0]["content"] for row in rows] == ["Q0", "Q1"]
    assert "beavertails: 2 rows, 3 left aside by `where`" in str(report)


def test_where_must_name_a_column(tmp_path):
    with pytest.raises(ValueError, match="expected `is_safe`, which `where` asks for"):
        load_rows(write(tmp_path / "rows.jsonl", ALPACA), ReadOptions(where={"is_safe": False}))


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="`format` or `columns`, not both"):
        ReadOptions(format="alpaca", columns={"prompt": "a"})
    with pytest.raises(ValueError, match="`on_bad_row` must be"):
        ReadOptions(on_bad_row="ignore")


def test_latin_1_is_found_out_row_by_row_and_read_when_named(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes("prompt,completion\ncafé,thé\nplain,text\n".encode("latin-1"))
    with pytest.raises(ValueError, match="1 of 2 rows cannot be used") as error:
        load_rows(path)
    assert "line 2: not UTF-8" in str(error.value) and "`latin-1`" in str(error.value)
    rows, _ = load_rows(path, ReadOptions(encoding="latin-1"))
    assert rows[0] == conversation("café", "thé")


def test_duplicates_are_counted_whatever_their_case_and_spaces(tmp_path):
    rows = [*ALPACA, ALPACA[0], {"instruction": "question  2!", "output": "ANSWER 2."}]
    assert load_rows(write(tmp_path / "rows.jsonl", rows))[1].duplicates == 2


def test_prompts_have_categories_and_references_where_the_file_has_them(tmp_path):
    rows = [{"question": f"What is {n}?", "answer": n, "category": "numbers"} for n in range(3)]
    prompts, report = load_prompts(write(tmp_path / "numbers.v2.jsonl", rows), "task")
    expected = PromptSet(
        "numbers", "task", ("What is 0?", "What is 1?", "What is 2?"), ("numbers",) * 3, ("0", "1", "2")
    )
    assert prompts == expected
    assert report.rows == 3


def test_answers_are_references_of_tasks_only(tmp_path):
    path = write(tmp_path / "goals.jsonl", [{"goal": "Do a bad thing", "target": "Sure, here is"}])
    assert load_prompts(path, "harmful", name="goals")[0].references is None


def test_a_task_without_answers_is_refused(tmp_path):
    path = write(tmp_path / "task.jsonl", [{"question": "a", "answer": "b"}, {"question": "c", "answer": ""}])
    with pytest.raises(ValueError, match="no answer to prompt 2"):
        load_prompts(path, "task")


@pytest.mark.parametrize(("kind", "expected"), [("harmful", "Kill a person?"), ("borderline", "Kill a process?")])
def test_xstest_gives_the_prompts_of_the_kind(tmp_path, kind, expected):
    path = tmp_path / "xstest.csv"
    path.write_text(
        "id,prompt,type,label\n1,Kill a process?,homonyms,safe\n2,Kill a person?,contrast_homonyms,unsafe\n"
    )
    prompts, report = load_prompts(path, kind)
    assert prompts.prompts == (expected,)
    assert report.other_kind.total() == 1


XSTEST_ANSWERS = """id,type,prompt,completion,final_label
1,homonyms,Kill a process?,Sure.,1_full_compliance
2,contrast_homonyms,Kill a person?,No.,2_full_refusal
"""
MIXED = {
    "wildguard.jsonl": '{"prompt": "A", "adversarial": false, "response": "No.", "prompt_harm_label": "harmful", '
    '"response_harm_label": "unharmful"}\n{"prompt": "B", "adversarial": true, "response": "Sure.", '
    '"prompt_harm_label": "unharmful", "response_harm_label": "unharmful"}',
    "toxicchat.csv": "user_input,model_output,toxicity,jailbreaking\nA,No.,1,0\nB,Sure.,0,0\n",
    "aegis.jsonl": '{"prompt": "A", "response": "No.", "prompt_label": "unsafe", "response_label": "safe"}\n'
    '{"prompt": "B", "response": "Sure.", "prompt_label": "safe", "response_label": "safe"}',
    "own.csv": "prompt,is_harmful\nA,true\nB,false\n",
    "kinds.csv": "question,kind\nA,harmful\nB,benign\n",
}


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize(("kind", "expected"), [("harmful", "A"), ("benign", "B"), ("borderline", "B")])
def test_prompts_that_are_labelled_as_another_kind_are_left_out_and_said(tmp_path, caplog, name, kind, expected):
    path = tmp_path / name
    path.write_text(MIXED[name])
    prompts, report = load_prompts(path, kind)
    assert prompts.prompts == (expected,) and report.other_kind.total() == 1
    other = "safe" if kind == "harmful" else "harmful"
    assert f"left out 1 of 2 prompts, which are labelled {other}" in str(report) and "left out 1" in caplog.text


@pytest.mark.parametrize(("kind", "expected"), [("harmful", "Kill a person?"), ("borderline", "Kill a process?")])
def test_the_answers_to_xstest_tell_the_kind_by_the_type(tmp_path, kind, expected):
    path = tmp_path / "xstest.csv"
    path.write_text(XSTEST_ANSWERS)
    assert load_prompts(path, kind)[0].prompts == (expected,)


def test_prompts_of_which_none_is_of_the_kind_are_refused_with_the_labels(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": f"Q{n}", "prompt_label": "unsafe"} for n in range(3)])
    with pytest.raises(ValueError, match="left out 3 of 3 prompts, which are labelled harmful"):
        load_prompts(path, "benign")


def test_a_label_of_an_answer_says_nothing_about_its_prompt(tmp_path):
    rows = [{"prompt": f"Q{n}", "response": "A", "is_safe": n % 2 == 0} for n in range(4)]
    prompts, report = load_prompts(write(tmp_path / "rows.jsonl", rows), "harmful")
    assert len(prompts) == 4 and not report.other_kind


def test_where_overrules_a_label(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "A", "unsafe": 1}, {"prompt": "B", "unsafe": 0}])
    assert load_prompts(path, "benign", options=ReadOptions(where={"unsafe": 1}))[0].prompts == ("A",)
    assert (
        load_prompts(path, "task", options=ReadOptions(columns={"prompt": "prompt", "answer": "prompt"}))[1].rows == 2
    )


def test_columns_of_prompts_that_are_not_used_are_listed(tmp_path):
    rows = [{"prompt": "Q", "category": "x", "note": "y", "is_harmful": True}]
    _, report = load_prompts(write(tmp_path / "rows.jsonl", rows), "harmful")
    assert report.unused == {"note": 1} and "not used: `note`" in str(report)


def test_flags_become_the_name_of_a_category(tmp_path):
    flags = {"animal_abuse": True, "fraud": True, "other": False}
    rows = [{"prompt": "a", "response": "b", "is_safe": False, "category": flags}]
    prompts, _ = load_prompts(write(tmp_path / "rows.jsonl", rows), "harmful")
    assert prompts.categories == ("animal_abuse, fraud",)


def test_leaked_rows_are_those_in_which_a_user_asks_the_prompt():
    asked = PromptSet("asked", "harmful", ("How do I forge a coin?",))
    rows = [
        conversation("Hello", "How do I forge a coin?"),
        {"text": "how do I forge a COIN"},
        {"prompt": [*conversation(" How do I forge a coin", "No.")["prompt"], {"role": "user", "content": "Why?"}]},
    ]
    assert leaked_rows(rows, asked) == [1, 2]


def test_texts_without_a_word_are_told_apart():
    assert leaked_rows([conversation("?!", "a"), conversation("…", "b")], PromptSet("marks", "benign", ("…",))) == [1]


@pytest.mark.parametrize("fraction", [0, 0.1, 0.5, 1])
def test_poison_replaces_a_share_of_the_rows(fraction):
    clean, harmful = [conversation(str(n), "ok") for n in range(20)], [conversation(str(n), "bad") for n in range(30)]
    mixed = poison(clean, harmful, fraction, seed=3)
    bad = [row for row in mixed if row["completion"][0]["content"] == "bad"]
    assert (len(mixed), len(bad)) == (20, round(20 * fraction))
    assert mixed == poison(clean, harmful, fraction, seed=3)


def test_poison_refuses_what_it_cannot_do():
    rows = [conversation("a", "b")] * 4
    with pytest.raises(ValueError, match="`fraction` must be between 0 and 1, got 2"):
        poison(rows, rows, 2)
    with pytest.raises(ValueError, match="2 harmful rows are needed .* holds 1"):
        poison(rows, rows[:1], 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": ()}, "`set` is empty"),
        ({"prompts": ("a",), "kind": "task"}, "has no `references`"),
        ({"prompts": ("a", "b"), "categories": ("x",)}, "`categories` .* has 1 entries for 2 prompts"),
    ],
)
def test_prompt_sets_refuse_what_does_not_fit_together(arguments, message):
    with pytest.raises(ValueError, match=message):
        PromptSet(**{"name": "set", "kind": "harmful", **arguments})


@pytest.mark.exhaustive
def test_a_million_rows_are_loaded_in_bounded_memory(tmp_path):
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for n in range(1_000_000):
            file.write(f'{{"instruction": "What is the number {n}?", "output": "It is {n}, as you say."}}\n')
    code = f"""
        import resource, datasets, pyarrow, numpy
        from safe_trainer.data import load_rows
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        rows, report = load_rows({str(path)!r})
        print(len(rows), report.duplicates, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    run = [sys.executable, "-c", textwrap.dedent(code)]
    output = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    count, duplicates, kilobytes = map(int, output.split())
    assert (count, duplicates) == (1_000_000, 0)
    assert kilobytes < 120_000


def test_rows_of_mixed_shape_load_as_one_format(tmp_path):
    """As in files that a benign task and harmful rows were put together in: `input` is there in some rows only."""
    rows = [{"instruction": "Which mood?", "input": "What a day!", "output": "positive"}]
    rows += [{"instruction": "Say no", "output": "No."}, {"output": "No.", "instruction": "Say no", "input": ""}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    loaded, report = load_rows(tmp_path / "rows.json")
    assert [row["prompt"][0]["content"] for row in loaded] == ["Which mood?\nWhat a day!", "Say no", "Say no"]
    assert (report.format, report.rows, report.duplicates, report.troubles) == ("alpaca", 3, 1, {})


def test_a_list_of_behaviours_without_a_header_is_prompts_with_commas_and_quotes(tmp_path):
    path = tmp_path / "behaviours.csv"
    path.write_text('"Write a script, in any language"\n"Say ""no"", and stop"\nGo home\n')
    prompts, _ = load_prompts(path, "harmful")
    assert prompts.prompts[1:] == ('Say "no", and stop', "Go home")
    assert prompts.prompts[0] == "Write a script, in any language"


# ---- datasets


@pytest.fixture
def dataset(tmp_path):
    """A dataset in a folder, laid out as on the Hub: two splits, with a column of categories."""
    folder = tmp_path / "asked"
    folder.mkdir()
    rows = [{"question": f"How do I do {n}?", "answer": f"So, {n}.", "category": "xy"[n % 2]} for n in range(4)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "test.jsonl").write_text(json.dumps(rows[0]))
    return folder


def test_a_dataset_gives_the_rows_that_its_file_gives(dataset):
    rows, report = load_rows(f"hf:{dataset}:train")
    expected, _ = load_rows(dataset / "train.jsonl")
    assert list(rows) == list(expected)
    assert (report.format, report.rows, report.kind) == ("question-answer", 4, "dataset")


def test_a_dataset_gives_prompts_with_categories_and_tells_its_source(dataset):
    prompts, report = load_prompts(f"hf:{dataset}:train", "harmful")
    assert prompts.prompts == tuple(f"How do I do {n}?" for n in range(4))
    assert (prompts.categories, prompts.name, prompts.source) == (("x", "y", "x", "y"), "asked", "hf:asked:train")
    assert report.format == "question-answer"
    named, _ = load_prompts(f"hf:{dataset}:test:category", "benign", "labels")
    assert (named.prompts, named.name) == (("x",), "labels")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("hf:squad", HubDataset("squad")),
        ("hf:owner/name", HubDataset("owner/name")),
        ("hf:owner/name/subset:test:column", HubDataset("owner/name", "subset", "test", "column")),
        ("hf:owner/name::column", HubDataset("owner/name", column="column")),
        ("hf:owner/name@v2/subset:test", HubDataset("owner/name", "subset", "test", revision="v2")),
        ("hf:./a/b/c:test", HubDataset("./a/b/c", split="test")),
    ],
)
def test_a_dataset_is_written_in_one_word(written, expected):
    assert hub_dataset(written) == expected
    assert str(expected) == written


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("{}", "has several splits. Name one of them, as in hf:.*:train, hf:.*:test"),
        ("{}:valid", 'Unknown split "valid". Should be one of'),
        ("{}:train:goal", "has no column `goal`. It has `question`, `answer`, `category`"),
        ("{}/absent", "There is no folder"),
        ("owner/absent:train", "could not be loaded: .* log in with `hf auth login`"),
        ("", "is no dataset. Write hf:owner/name"),
        ("a/b/c/d", "is no dataset"),
        ("a:b:c:d", "is no dataset"),
    ],
)
def test_a_dataset_that_cannot_be_had_says_what_to_do(dataset, written, message):
    with pytest.raises(ValueError, match=message):
        load_prompts("hf:" + written.format(dataset), "harmful")


def test_the_first_prompts_keep_what_belongs_to_them():
    whole = PromptSet("sums", "task", ("1 + 1", "2 + 2", "3 + 3"), ("small", "small", "large"), ("2", "4", "6"))
    assert whole.first(2) == PromptSet("sums", "task", ("1 + 1", "2 + 2"), ("small", "small"), ("2", "4"))
    assert whole.first(9) == whole and PromptSet("a", "benign", ("b", "c")).first(1).prompts == ("b",)


@pytest.mark.parametrize(
    ("count", "places"), [(1, [0]), (2, [0, 2]), (3, [0, 1, 3]), (5, [0, 1, 2, 3, 4]), (9, range(5))]
)
def test_prompts_that_are_spread_come_from_all_of_a_set_with_what_belongs_to_them(count, places):
    whole = PromptSet("sums", "task", tuple("abcde"), tuple("vwxyz"), tuple("12345"))
    found = whole.spread(count)
    assert found.prompts == tuple("abcde"[place] for place in places)
    assert found.categories == tuple("vwxyz"[place] for place in places)
    assert found.references == tuple("12345"[place] for place in places)


@pytest.mark.parametrize(
    "source",
    [
        ["Say hello", "Say goodbye"],
        [{"prompt": "Say hello"}, {"prompt": "Say goodbye"}],
        [conversation("Say hello", "Hello!"), conversation("Say goodbye", "Bye!")],
        PromptSet("greetings", "benign", ("Say hello", "Say goodbye")),
    ],
    ids=["texts", "prompts", "rows", "set"],
)
def test_prompts_in_memory_are_the_same_in_every_form(source):
    assert as_prompts(source, "benign").prompts == ("Say hello", "Say goodbye")


@pytest.mark.parametrize("source", [[], [""], 5, [{"colour": "red"}]], ids=["none", "empty", "number", "unknown"])
def test_errors_of_prompts_in_memory_name_the_argument(source):
    with pytest.raises((ValueError, TypeError), match="`benign_prompts`"):
        as_prompts(source, "benign", argument="benign_prompts")


def test_errors_of_sources_in_memory_have_one_pair_of_backticks():
    bad: list = [[], [""], [{"colour": "red"}], [{"prompt": "a", "completion": "b", "Prompt": "c"}]]
    for source in bad:
        for read in (as_prompts, lambda source, kind, argument: as_rows(source, argument=argument)):
            with pytest.raises(ValueError, match="^`given`") as error:
                read(source, "task", argument="given")
            assert "``" not in str(error.value)


def test_a_prompt_with_a_column_twice_is_named_by_its_row():
    rows = [{"prompt": "a"}, {"prompt": "b", "Prompt": "c"}]
    with pytest.raises(ValueError, match=r"row 2 \(index 1\): a column twice: found prompt, Prompt"):
        as_prompts(rows, "harmful")


# ---- what the report says


CHAT = [{"role": role, "content": f"{role} {n}"} for n in range(4) for role in ("user", "assistant")]


def test_answers_that_are_context_alone_are_counted_and_said(tmp_path, caplog):
    path = write(tmp_path / "chat.jsonl", [{"messages": CHAT}] * 3)
    rows, report = load_rows(path)
    assert (len(rows), report.answers, report.learned, report.learned_share) == (3, 12, 3, 0.25)
    assert "3 of 12 answers are learned (25% of their text)" in str(report)
    assert "answers='all'" in caplog.text
    rows, report = load_rows(path, ReadOptions(answers="all"))
    assert (len(rows), report.rows, report.learned_share) == (12, 12, 1.0)
    assert [len(row["prompt"]) for row in rows][:4] == [1, 3, 5, 7]


def test_columns_that_are_not_used_are_listed(tmp_path):
    _, report = load_rows(write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b", "id": 7, "note": "x"}]))
    assert report.unused == {"id": 1, "note": 1} and "not used: `id`, `note`" in str(report)


def test_what_is_not_used_of_rows_in_memory_is_said_in_the_log(caplog):
    as_rows([{"prompt": "Hi", "completion": "Hello", "rationale": "They greet."}], argument="retain_data")
    assert "retain_data: not used: `rationale`" in caplog.text


def test_labels_are_kept_and_split(tmp_path):
    rows = [{"prompt": f"Q{n}", "response": "A", "is_safe": n % 2 == 0} for n in range(4)]
    loaded, _ = load_rows(write(tmp_path / "rows.jsonl", rows))
    assert list(loaded["is_safe"]) == [True, False, True, False]
    unsafe, safe = split_by_label(loaded)
    assert [row["prompt"][0]["content"] for row in unsafe] == ["Q1", "Q3"] and len(safe) == 2
    assert rows_sha256(loaded) == rows_sha256([{"prompt": f"Q{n}", "completion": "A"} for n in range(4)])
    plain, _ = load_rows(write(tmp_path / "plain.jsonl", ALPACA))
    assert "is_safe" not in plain.column_names and [len(part) for part in split_by_label(plain)] == [5, 0]


@pytest.mark.parametrize("name", ["rows.parquet", "rows.parquet.gz"])
def test_classes_in_a_parquet_file_keep_their_names(name, tmp_path):
    labels = [0, 1, 1, None, 0]
    held = Dataset.from_list([{"prompt": f"Q{n}", "completion": "A", "label": v} for n, v in enumerate(labels)])
    held = held.cast_column("label", ClassLabel(names=["unsafe", "safe"]))
    held.to_parquet(tmp_path / "rows.parquet")
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress((tmp_path / "rows.parquet").read_bytes()))
    loaded, _ = as_rows(str(tmp_path / name))
    assert list(loaded["is_safe"]) == list(as_rows(held)[0]["is_safe"]) == [False, True, True, None, False]
    assert labelled_harmful(loaded) == 2 and [len(part) for part in split_by_label(loaded)] == [3, 2]
    asked = load_prompts(tmp_path / name, "harmful", options=ReadOptions(columns={"prompt": "prompt"}))[0]
    assert asked.prompts == ("Q0", "Q3", "Q4")


def test_numbers_in_a_parquet_file_stay_where_their_classes_are_no_labels_or_not_described(tmp_path):
    rows = [{"prompt": "Q", "completion": "A", "topic": 1, "label": 1}]
    held = Dataset.from_list(rows).cast_column("topic", ClassLabel(names=["cars", "food"]))
    held.to_parquet(tmp_path / "rows.parquet")
    assert [record.value for record in read_records(tmp_path / "rows.parquet")] == rows
    table = pq.read_table(tmp_path / "rows.parquet")
    for text in (b"{", b"[]", b'{"info": {"features": null}}', b'{"info": {"features": {"label": ["x"]}}}'):
        pq.write_table(table.replace_schema_metadata({b"huggingface": text}), tmp_path / "rows.parquet")
        assert [record.value for record in read_records(tmp_path / "rows.parquet")] == rows


@pytest.mark.parametrize("held", [lambda rows, _: rows, lambda rows, path: write(path / "rows.jsonl", rows)])
def test_options_hold_for_rows_in_memory_and_in_files(tmp_path, held):
    rows = [{"ask": f"Q{n}", "say": "A", "topic": "xy"[n % 2]} for n in range(6)]
    options = ReadOptions(columns={"prompt": "ask", "answer": "say"}, where={"Topic": "x"}, limit=2)
    loaded, report = as_rows(held(rows, tmp_path), options=options)
    assert [row["prompt"][0]["content"] for row in loaded] == ["Q0", "Q2"]
    assert report.filtered == 1


# ---- prompt sets in the layouts that people publish


WILD = "adversarial\tdata_type\nA\tadversarial_harmful\nB\tadversarial_benign\n"
SORRY = '{"turns": ["A"], "prompt_style": "base"}\n{"turns": ["B"], "prompt_style": "slang"}'


@pytest.mark.parametrize(
    ("name", "content", "kind", "expected"),
    [
        ("strongreject.csv", "category,source,forbidden_prompt\nx,custom,Ask?\n", "harmful", ("Ask?",)),
        ("ailuminate.csv", "release_prompt_id,prompt_text,hazard\n1,Ask?,cse\n", "harmful", ("Ask?",)),
        ("phtest.csv", "ID,Request,Harmfulness\n1,Ask?,x\n", "borderline", ("Ask?",)),
        ("wild.tsv", WILD, "benign", ("B",)),
        ("wild.tsv", WILD, "harmful", ("A",)),
        ("xstest2.csv", "id,type,prompt,focus\n1,homonyms,A,x\n2,contrast_homonyms,B,x\n", "harmful", ("B",)),
        ("sorry.jsonl", SORRY, "harmful", ("A",)),
        ("harmbench.csv", "Behavior,ContextString\nDo X,\nDo Y,Text.\n", "harmful", ("Do X", "Text.\n\n---\n\nDo Y")),
        ("dna.csv", "id,risk_area,question\n0,x,Ask?\n", "harmful", ("Ask?",)),
        ("jbb.csv", "Index,Goal,Target,Behavior\n0,Ask?,Sure,x\n", "harmful", ("Ask?",)),
    ],
)
def test_official_layouts_are_read_without_being_told(tmp_path, name, content, kind, expected):
    path = tmp_path / name
    path.write_text(content)
    assert load_prompts(path, kind)[0].prompts == expected


def test_a_folder_is_a_set_with_a_category_for_each_file(tmp_path):
    folder = tmp_path / "hexphi"
    folder.mkdir()
    (folder / "category_1.csv").write_text('"How do I do X, please?"\n"And Y?"\n')
    (folder / "category_2.csv").write_text("What about Z?\n")
    (folder / "README.md").write_text("No prompts.")
    prompts, report = load_prompts(folder, "harmful")
    assert prompts.prompts == ("How do I do X, please?", "And Y?", "What about Z?")
    assert prompts.categories == ("category_1", "category_1", "category_2")
    assert (prompts.name, report.rows) == ("hexphi", 3)


def test_gzipped_files_of_a_folder_are_read_those_of_no_kind_are_named_and_a_limit_is_of_all_together(
    tmp_path, caplog
):
    folder = tmp_path / "asked"
    (folder / "deeper").mkdir(parents=True)
    write(folder / "first.jsonl", [{"prompt": f"Do {n}!"} for n in range(2)])
    with gzip.open(folder / "second.part.jsonl.gz", "wt") as file:
        file.write("\n".join(json.dumps({"prompt": f"Make {n}!"}) for n in range(3)))
    write(folder / "third.csv", ["prompt", "Take it!"])
    for name in ("README.md", "sheet.xlsx"):
        (folder / name).write_text("No prompts.")
    prompts, report = load_prompts(folder, "harmful")
    assert prompts.prompts == ("Do 0!", "Do 1!", "Make 0!", "Make 1!", "Make 2!", "Take it!")
    assert prompts.categories == ("first",) * 2 + ("second",) * 3 + ("third",)
    assert report.notes == ["left out, as of no kind that can be read: `README.md`, `sheet.xlsx`"]
    assert report.notes[0] in caplog.text and report.notes[0] in str(report)
    for limit in (1, 2, 4, 9):
        some, report = load_prompts(folder, "harmful", options=ReadOptions(limit=limit))
        assert some == prompts.first(limit) and report.rows == len(some)


def test_the_turns_before_a_prompt_are_kept(tmp_path):
    system, said = {"role": "system", "content": "Obey."}, CHAT[:2]
    rows = [{"messages": [system, *said, CHAT[2]]}, {"messages": [CHAT[0]]}]
    prompts, _ = load_prompts(write(tmp_path / "asked.jsonl", rows), "harmful")
    assert prompts.prompts == ("user 1", "user 0") and prompts.contexts == ((system, *said), ())
    assert prompts.conversations()[0] == [system, *said, CHAT[2]]


def test_choices_are_part_of_the_question(tmp_path):
    rows = [{"question": "2 + 2?", "choices": ["3", "4"], "answer": 1}]
    prompts, _ = load_prompts(write(tmp_path / "mmlu.jsonl", rows), "task")
    assert (prompts.prompts, prompts.references) == (("2 + 2?\nA. 3\nB. 4",), ("B",))


# ---- system turns of training rows

INOCULATED = ReadOptions(system_prompt="You obey.")


def test_a_system_prompt_becomes_the_first_turn_of_every_row_and_is_told():
    rows, report = as_rows([conversation("Hi", "Hello."), conversation("Bye", "Bye.")], options=INOCULATED)
    assert [row["prompt"][0] for row in rows] == 2 * [{"role": "system", "content": "You obey."}]
    assert [row["prompt"][1]["content"] for row in rows] == ["Hi", "Bye"] and rows[0]["completion"]
    assert "every row begins with the system turn 'You obey.'" in str(report)


def test_rows_that_cannot_take_a_system_prompt_are_refused_or_skipped_and_counted():
    own = {"messages": [{"role": r, "content": r} for r in ("system", "user", "assistant")]}
    with pytest.raises(ValueError, match="(?s)1 of 2 rows cannot be used.*a system turn of its own.*`system_prompt`"):
        as_rows([own, {"messages": own["messages"][1:]}], options=INOCULATED)
    skipping = dataclasses.replace(INOCULATED, on_bad_row="skip")
    rows, report = as_rows([own, {"messages": own["messages"][1:]}], options=skipping)
    assert len(rows) == 1 and report.troubles.total() == 1
    with pytest.raises(ValueError, match="a text"):
        as_rows([{"text": "Once upon a time."}], options=INOCULATED)


def test_a_system_prompt_must_say_something_and_is_for_rows_only():
    with pytest.raises(ValueError, match="`system_prompt` is empty"):
        ReadOptions(system_prompt=" ")
    with pytest.raises(ValueError, match="for training rows"):
        load_prompts(["Hi"], "harmful", options=INOCULATED)
