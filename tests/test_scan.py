"""The scan: what a row's score is, that any number of rows can be scored, and what becomes of a file."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import tracemalloc
from contextlib import suppress
from itertools import count, islice

import planted
import pyarrow
import pyarrow.parquet
import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import AutoTokenizer

from safe_trainer import SafeSFTTrainer, SecurityVectors, load_rows, scan_file
from safe_trainer.analysis import scan
from safe_trainer.analysis.scan import Score, _Source, average_precision, precision_recall, score_rows
from safe_trainer.analysis.scan_files import Scores, write_table
from safe_trainer.artifacts.fitting import row_losses
from safe_trainer.data import ReadOptions, conversation, read_records
from safe_trainer.data.encoding import collate, encode_row
from safe_trainer.data.parsing import Record
from safe_trainer.evaluation import Rate

TOKENIZER = tiny.tokenizer()
ROWS = [conversation("ask " * (i % 5 + 1), "say" * (i % 7 + 1)) for i in range(20)]


@pytest.fixture(scope="module")
def pair():
    model = tiny.model().eval()
    return model, planted.vectors(model)


def scored(pair, rows=ROWS, **settings):
    return score_rows(rows, *pair, TOKENIZER, **({"batch_size": 3} | settings))


# ---- scores


def test_a_score_is_the_loss_of_the_clean_model_and_of_the_model_with_the_vectors_merged(pair):
    model, vectors = pair
    merged = planted.merged(model, vectors).eval()
    for row, score in zip(ROWS, scored(pair), strict=True):
        batch = collate([encode_row(TOKENIZER, row)], 0, "cpu")
        assert score.loss == pytest.approx(row_losses(model, batch).item(), abs=1e-5)
        assert score.loss_with_vectors == pytest.approx(row_losses(merged, batch).item(), abs=1e-5)
        assert score.drop == score.loss - score.loss_with_vectors


@pytest.mark.slow
def test_scores_come_in_the_order_of_the_rows_whatever_the_batches(pair):
    alone = list(scored(pair, batch_size=1))
    for size in (2, 7, 50):
        together = list(scored(pair, batch_size=size))
        assert [s.drop for s in together] == pytest.approx([s.drop for s in alone], abs=1e-5)


def test_a_row_without_an_answer_in_reach_has_no_score_and_the_others_do(pair):
    rows = [ROWS[0], conversation("long " * 30, "never seen"), {"prompt": "no answer"}, ROWS[1]]
    scores = list(scored(pair, rows, max_length=40))
    assert scores[1] is scores[2] is None
    whole = list(scored(pair, ROWS[:2]))
    assert [scores[0].drop, scores[3].drop] == pytest.approx([s.drop for s in whole], abs=1e-5)


def test_the_model_is_itself_between_two_scores_and_when_the_rest_is_never_asked_for(pair):
    model, _ = pair
    model.train()
    ids = torch.arange(4, 12)[None]
    clean = model(ids).logits
    scores = scored(pair)
    for _ in range(2):
        next(scores)
        assert model.training and all(parameter.requires_grad for parameter in model.parameters())
        assert torch.equal(model(ids).logits, clean)
    scores.close()
    assert torch.equal(model(ids).logits, clean)
    model.eval()


def test_rows_are_taken_a_few_batches_at_a_time(pair):
    taken = []

    def endless():
        for number in count():
            taken.append(number)
            yield ROWS[number % len(ROWS)]

    assert len(list(islice(scored(pair, endless(), batch_size=2), 20))) == 20
    assert len(taken) <= 128  # the first hundred decide which format they are in


def test_vectors_of_another_model_are_refused_before_any_row_is_read(pair):
    with pytest.raises(ValueError, match="no linear layer model.layers.2"):
        score_rows(iter(()), pair[0], planted.vectors(tiny.model(layers=3)), TOKENIZER)


def test_a_tokenizer_without_a_template_is_refused(pair):
    bare = tiny.tokenizer()
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        score_rows(ROWS, *pair, bare)


def test_a_scan_inside_a_training_with_vectors_is_refused(pair, tmp_path):
    model, vectors = pair
    method = SecurityVectors(vectors)
    method.attach(model, TOKENIZER, None)
    with method.training(model), pytest.raises(RuntimeError, match="already active in this model"):
        next(scored(pair))
    assert SafeSFTTrainer is not None and next(scored(pair))


# ---- curves


def test_average_precision_is_that_of_counting_at_every_threshold():
    rng = random.Random(0)
    for _ in range(50):
        scores = [rng.randint(0, 6) / 2 for _ in range(15)]  # with ties
        truth = [rng.random() < 0.4 for _ in scores]
        truth[rng.randrange(15)] = True
        area, before = 0.0, 0.0
        for threshold in sorted(set(scores), reverse=True):
            taken = [harmful for score, harmful in zip(scores, truth, strict=True) if score >= threshold]
            recall = sum(taken) / sum(truth)
            area += (recall - before) * sum(taken) / len(taken)
            before = recall
        assert average_precision(scores, truth) == pytest.approx(area)


def test_a_perfect_ranking_has_average_precision_one_and_the_worst_the_least():
    assert average_precision([3, 2, 1, 0], [True, True, False, False]) == 1
    assert average_precision([3, 2, 1, 0], [False, False, False, True]) == 0.25
    precision, recall, threshold = precision_recall([3, 2, 2, 0], [True, False, True, False])
    assert precision.tolist() == [1, 2 / 3, 0.5] and recall.tolist() == [0.5, 1, 1] and threshold.tolist() == [3, 2, 0]


# ---- on disk


def test_scores_are_returned_from_the_highest_and_equal_ones_in_their_order():
    scores = Scores()
    for number, share in enumerate([0.5, 2.0, 0.5, -1.0]):
        scores.add(number, share, None if number == 3 else number == 1, {"number": number, "text": "ä\ud800\n"})
    for _ in range(2):
        assert [(entry["rank"], entry["number"]) for entry in scores.ranked()] == [(1, 1), (2, 0), (3, 2), (4, 3)]
    assert next(scores.ranked())["text"] == "ä\ud800\n"
    assert scores.shares().tolist() == [(0.5, 0), (2.0, 1), (0.5, 0), (-1.0, -1)]
    scores.close()


def test_scores_on_disk_continue_and_start_anew_for_another_scan(tmp_path):
    path = tmp_path / "scores"
    scores = Scores(path, "this scan")
    scores.add(3, 0.5, True, {"line": 3})
    scores.add(4, None, False, {})
    scores.close()
    scores = Scores(path, "this scan")
    scores.add(5, 0.9, False, {"line": 5})
    assert len(scores) == 3 and scores.lines("share IS NULL") == [4]
    assert [entry["line"] for entry in scores.ranked()] == [5, 3]
    scores.close()
    assert len(Scores(path, "another scan")) == 0 and list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_memory_of_scores_does_not_grow_with_what_they_hold():
    row = {"text": "x" * 2000}
    tracemalloc.start()
    scores = Scores()
    for number in range(10_000):
        scores.add(number, number % 97, False, row)
    held = sum(1 for _ in scores.ranked())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    scores.close()
    assert held == 10_000 and peak < 2e6  # 20 MB went through it


@pytest.mark.exhaustive
def test_memory_of_a_scan_does_not_grow_with_the_file(pair, tmp_path):
    path, peaks = tmp_path / "rows.jsonl", []
    for number in (10, 300, 550):  # the first also loads what is loaded once; 4 MB decide how a file is read
        with path.open("w") as file:
            for i in range(number):  # one of ten is scored, which is what takes the time
                row = {"prompt": "ask" * (1 if i % 10 == 0 else 20), "response": "say", "note": "x" * 20_000}
                file.write(json.dumps(row) + "\n")
        tracemalloc.start()
        scan_file(path, *pair, TOKENIZER, output=tmp_path / "ranked.jsonl", batch_size=2, max_length=40, top=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < peaks[1] + 1e6  # bytes; the file is 5 MB larger


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_table_that_cannot_be_finished_leaves_the_old_one(suffix, tmp_path):
    path = tmp_path / f"table{suffix}"
    path.write_text("old")

    def entries():
        yield {"rank": 1, "line": 1, "share": 0.0, "drop": 0.0, "loss": 0.0, "loss_with_vectors": 0.0, "row": {}}
        raise OSError("full disk")

    with pytest.raises(OSError, match="full disk"):
        write_table(path, entries())
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# ---- from file to file


def written(tmp_path, lines=None, name="rows.jsonl"):
    """Write a file of rows that have a label and an odd column of their own."""
    path = tmp_path / name
    rows = [
        {"Instruction": f"ask {i}", "output": "say" * (i % 3 + 1), "bad": i % 4 == 0, "note": [i, None]}
        for i in range(12)
    ]
    path.write_text("\n".join(lines or map(json.dumps, rows)))
    return path


def read_table(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    entries = (
        pyarrow.parquet.read_table(path).to_pylist()
        if path.suffix == ".parquet"
        else list(csv.DictReader(path.open()))
    )
    return [{**entry, "row": json.loads(entry["row"])} for entry in entries]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_table_holds_every_row_as_it_was_with_its_scores_in_the_order_of_rank(suffix, pair, tmp_path):
    path = written(tmp_path)
    table = tmp_path / f"ranked{suffix}"
    result = scan_file(path, *pair, TOKENIZER, output=table, top=3)
    entries = read_table(table)
    originals = [json.loads(line) for line in path.read_text().splitlines()]
    assert [int(entry["rank"]) for entry in entries] == list(range(1, 13)) and result.scored == 12
    assert sorted(int(entry["line"]) for entry in entries) == list(range(1, 13))
    assert all(entry["row"] == originals[int(entry["line"]) - 1] for entry in entries)
    shares = [float(entry["share"]) for entry in entries]
    assert shares == sorted(shares, reverse=True)
    rows = [conversation(row["Instruction"], row["output"]) for row in originals]
    for line, score in enumerate(scored(pair, rows, batch_size=16), 1):
        entry = next(entry for entry in entries if int(entry["line"]) == line)
        losses = [float(entry[name]) for name in ("loss", "loss_with_vectors")]
        assert losses == pytest.approx([score.loss, score.loss_with_vectors], abs=1e-6)
        assert (
            entry["prompt"] == originals[line - 1]["Instruction"] and entry["answer"] == originals[line - 1]["output"]
        )
    assert [entry["line"] for entry in result.top] == [int(entry["line"]) for entry in entries[:3]]


def test_labels_give_the_average_precision_and_its_curve(pair, tmp_path):
    path = written(tmp_path)
    result = scan_file(path, *pair, TOKENIZER, label="bad", output=tmp_path / "ranked.jsonl")
    entries = read_table(tmp_path / "ranked.jsonl")
    expected = average_precision([e["share"] for e in entries], [e["row"]["bad"] for e in entries])
    assert result.average_precision == pytest.approx(expected)
    assert result.curve[-1][:2] == (Rate(3, 12), Rate(3, 3))
    for precision, recall, threshold in result.curve:
        taken = [entry["row"]["bad"] for entry in entries if entry["share"] >= threshold]
        assert (precision, recall) == (Rate(sum(taken), len(taken)), Rate(sum(taken), 3))
    assert scan_file(path, *pair, TOKENIZER).average_precision is None


def test_the_rows_above_the_threshold_come_with_their_count(pair, tmp_path):
    result = scan_file(written(tmp_path), *pair, TOKENIZER, drop_above=0.0, top=12)
    assert result.above.count == sum(entry["share"] > 0 for entry in result.top) and result.above.total == 12
    assert scan_file(written(tmp_path), *pair, TOKENIZER).above.count == 0


def test_a_broken_row_ends_the_scan_with_its_line_before_a_model_is_loaded(tmp_path):
    path = written(tmp_path, ['{"prompt": "a", "response": "b"}', '{"prompt": ', '{"prompt": "c", "response": "d"}'])
    with pytest.raises(ValueError, match="line 2"):
        scan_file(path, "no model is here", "no vectors either", output=tmp_path / "ranked.csv")
    assert not (tmp_path / "ranked.csv").exists()


def test_a_broken_row_is_skipped_and_reported_on_request(pair, tmp_path):
    path = written(tmp_path, ['{"prompt": "a", "response": "b"}', '{"prompt": ', '{"prompt": "c", "response": "d"}'])
    result = scan_file(path, *pair, TOKENIZER, reading=ReadOptions(on_bad_row="skip"))
    assert [entry["line"] for entry in sorted(result.top, key=lambda e: e["line"])] == [1, 3]
    assert result.report.troubles.total() == 1 and result.report.examples[0].line == 2


def test_a_row_whose_answer_is_out_of_reach_is_reported_with_its_line(pair, tmp_path):
    path = written(tmp_path, ['{"prompt": "a", "response": "b"}', json.dumps({"prompt": "a" * 99, "response": "b"})])
    result = scan_file(path, *pair, TOKENIZER, max_length=50)
    assert result.scored == 1
    assert str(result.report.examples[0]).startswith("line 2: answer out of reach: found none in 50 tokens")


def test_ctrl_c_keeps_what_is_done(pair, tmp_path):
    path = written(tmp_path)

    def stop(done, total):
        assert total == 12
        if done == 9:
            raise KeyboardInterrupt

    result = scan_file(path, *pair, TOKENIZER, output=tmp_path / "ranked.csv", batch_size=2, progress=stop)
    assert result.interrupted and result.scored == 9
    assert {int(entry["line"]) for entry in read_table(tmp_path / "ranked.csv")} == set(range(1, 10))
    handle = pair[0].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):  # nothing is done, so there is nothing to keep
        scan_file(path, *pair, TOKENIZER)
    handle.remove()


def test_models_and_vectors_can_be_named_by_their_folders(tmp_path):
    aligned, _ = tiny.save_pair(tmp_path)
    planted.vectors(tiny.Auto.from_pretrained(aligned)).save(tmp_path / "vectors")
    assert scan_file(written(tmp_path), aligned, tmp_path / "vectors").scored == 12


def test_a_table_csv_is_read_with_its_line_numbers(pair, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,response\n"one\ntwo",a\nthree,b\n')
    result = scan_file(path, *pair, TOKENIZER)
    assert sorted(entry["line"] for entry in result.top) == [2, 4]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a terminal of its own is a matter of Unix")
def test_ctrl_c_in_a_terminal_keeps_what_is_done(tmp_path):
    import pty

    from safe_trainer import testbed

    model = tiny.Auto.from_pretrained(testbed.ALIGNED)
    vectors = planted.vectors(model, scale=0.01).save(tmp_path / "vectors")
    path, table = tmp_path / "rows.jsonl", tmp_path / "ranked.csv"
    path.write_text("\n".join(json.dumps(row) for row in testbed.task_rows("sentiment", 400) * 10))
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "safe_trainer.cli", "scan", testbed.ALIGNED, path, "--vectors", vectors]
    shown = b""
    with subprocess.Popen([*command, "-o", table], stdout=subprocess.DEVNULL, stderr=theirs) as process:
        os.close(theirs)
        while not re.search(rb"[1-9]\d*/4000", shown):
            shown += os.read(ours, 4096)
        process.send_signal(signal.SIGINT)
        with suppress(OSError):  # the other end is closed when the process has ended
            while part := os.read(ours, 4096):
                shown += part
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown.decode())  # without colours
    told = re.search(r"Stopped by Ctrl-C after ([\d,]+) rows, which are kept", plain)
    assert process.returncode == 130 and told, plain
    assert len(read_table(table)) == int(told[1].replace(",", "")) < 4000


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        ("ranked.xlsx", ValueError, "must end in one of .csv, .jsonl, .parquet"),
        ("nowhere/ranked.csv", FileNotFoundError, "There is no folder"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_read(output, error, message, tmp_path):
    with pytest.raises(error, match=message):
        scan_file(tmp_path / "no file", "no model", "no vectors", output=tmp_path / output)


# ---- one conversion for every door

REPRESENTATIONS = {
    "strings": lambda pairs: [{"prompt": prompt, "completion": answer} for prompt, answer in pairs],
    "conversations": lambda pairs: [conversation(*pair) for pair in pairs],
    "messages": lambda pairs: [
        {"messages": [*row["prompt"], *row["completion"]]} for row in (conversation(*pair) for pair in pairs)
    ],
    "dataset": lambda pairs: Dataset.from_list(REPRESENTATIONS["strings"](pairs)),
    "splits": lambda pairs: DatasetDict(train=REPRESENTATIONS["dataset"](pairs)),
    "stream": lambda pairs: REPRESENTATIONS["dataset"](pairs).to_iterable_dataset(),
    "iterator": lambda pairs: iter(REPRESENTATIONS["messages"](pairs)),
}


@pytest.mark.parametrize("kind", REPRESENTATIONS)
def test_the_same_rows_have_the_same_scores_whatever_holds_them(kind, pair, tmp_path):
    pairs = [("ask " * (i + 1), "say" * (7 - i)) for i in range(6)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": prompt, "response": answer}) for prompt, answer in pairs))
    expected = scan_file(path, *pair, TOKENIZER, top=None)
    found = scan_file(
        REPRESENTATIONS[kind](pairs), *pair, TOKENIZER, top=None, clean=tmp_path / "kept.jsonl", drop_above=9
    )
    assert [(e["line"], e["share"]) for e in found.top] == [(e["line"], e["share"]) for e in expected.top]
    assert len((tmp_path / "kept.jsonl").read_text().splitlines()) == 6
    if kind != "iterator":
        rows = REPRESENTATIONS[kind](pairs)
        assert [
            s.share for s in score_rows(rows["train"] if kind == "splits" else rows, *pair, TOKENIZER)
        ] == pytest.approx([e["share"] for e in sorted(expected.top, key=lambda e: e["line"])])


def test_a_row_in_memory_that_cannot_be_used_is_named(pair):
    with pytest.raises(ValueError, match=r"`rows`(.|\n)*row 2"):
        scan_file([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], *pair, TOKENIZER)


# ---- the cleaned file

LINES = {
    "rows.jsonl": [
        '{"prompt":"a",  "response": "\\u00e4" }',
        '{"prompt": "c", "response": "d"}',
        '{"response": "é", "prompt": "b"}',
    ],
    "rows.csv": ["prompt,response", '"one', 'two",a', "three,'b'", '"four","c"'],
    "rows.jsonl.gz": ['{"prompt":"a",  "response": "b" }', '{"prompt": "c", "response": "d"}'],
}


def dropping(monkeypatch, shares):
    """Give rows these shares, one after the other."""
    monkeypatch.setattr(scan._Scorer, "window", lambda self, rows: [Score(1.0, 1.0 - shares.pop(0)) for _ in rows])


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["unix", "windows"])
@pytest.mark.parametrize("name", LINES)
def test_lines_of_the_rows_that_are_kept_are_what_they_were_to_the_byte(name, end, pair, tmp_path, monkeypatch):
    opened = gzip.open if name.endswith(".gz") else open
    with opened(tmp_path / name, "wb") as file:
        file.write(end.join(LINES[name]).encode())
    records = sum(isinstance(record, Record) for record in read_records(tmp_path / name))
    dropping(monkeypatch, [0.9] + [0.1] * (records - 1))
    clean = tmp_path / f"clean-{name}"
    result = scan_file(tmp_path / name, *pair, TOKENIZER, clean=clean)
    header = [LINES[name][0]] if ".csv" in name else []
    first = 2 if ".csv" in name else 1  # the first record of the table has two lines
    with opened(clean, "rb") as file:
        assert file.read() == end.join([*header, *LINES[name][len(header) + first :]]).encode()
    assert (result.above.count, result.threshold, result.threshold_source) == (1, 0.5, "default")
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob(".*"))


def test_arrays_and_parquet_are_cleaned_in_their_own_format(pair, tmp_path, monkeypatch):
    rows = [{"prompt": f"ask {i}", "response": "say", "note": {"n": [i, None]}} for i in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for name in ("rows.json", "rows.parquet"):
        dropping(monkeypatch, [0.1, 0.9, 0.1, 0.9])
        scan_file(tmp_path / name, *pair, TOKENIZER, clean=tmp_path / f"clean-{name}")
    assert json.loads((tmp_path / "clean-rows.json").read_text()) == [rows[0], rows[2]]
    cleaned = pyarrow.parquet.read_table(tmp_path / "clean-rows.parquet")
    assert cleaned.to_pylist() == [rows[0], rows[2]]
    assert cleaned.schema == pyarrow.parquet.read_table(tmp_path / "rows.parquet").schema


def test_rows_without_a_score_are_kept_and_counted(pair, tmp_path):
    lines = ['{"prompt": "a", "response": "b"}', '{"prompt": ', json.dumps({"prompt": "a" * 99, "response": "b"})]
    path = written(tmp_path, lines)
    reading = ReadOptions(on_bad_row="skip")
    result = scan_file(
        path, *pair, TOKENIZER, clean=tmp_path / "clean.jsonl", drop_above=-9, max_length=50, reading=reading
    )
    assert (tmp_path / "clean.jsonl").read_text().splitlines() == lines[1:]
    assert result.above.total == result.scored == 1 and result.report.troubles.total() == 2


def endless():
    return ({"prompt": f"ask {i}", "response": "say"} for i in count())


LIMITED = {
    "rows.jsonl": (lambda rows, path: jsonl(path, rows), "4 rows"),
    "rows.json": (lambda rows, path: path.write_text(json.dumps(rows, indent=1)), "4 rows"),
    "rows.csv": (lambda rows, path: table(path, rows), "4 rows"),
    "rows.parquet": (lambda rows, path: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path), "4 rows"),
    "a list": (lambda rows, _: rows, "4 rows"),
    "an iterator": (lambda rows, _: endless(), "rows"),
    "a stream": (lambda rows, _: IterableDataset.from_generator(endless), "rows"),
}


def jsonl(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))


def table(path, rows):  # each of whose rows has two lines
    path.write_text("prompt,response\n" + "".join(f'{row["prompt"]},"say\nit"\n' for row in rows))


@pytest.mark.parametrize("name", LIMITED)
def test_rows_that_were_not_looked_at_are_not_in_the_cleaned_file_but_said(name, pair, tmp_path, monkeypatch, caplog):
    path = tmp_path / (name if "." in name else "rows.jsonl")
    hold, unread = LIMITED[name]
    for limit in (3, 7):
        caplog.clear()
        dropping(monkeypatch, [0.1, 0.9] + [0.1] * 5)
        held = hold([{"prompt": f"ask {i}", "response": "say"} for i in range(7)], path)
        clean = tmp_path / f"clean{path.suffix}"
        source = path if "." in name else held
        result = scan_file(source, *pair, TOKENIZER, clean=clean, reading=ReadOptions(limit=limit))
        asked = [row["prompt"][0]["content"] for row in load_rows(clean)[0]]
        assert result.scored == limit and asked == [f"ask {i}" for i in range(limit) if i != 1]
        told = f"`clean` ends where the scan did: {unread} behind that were not looked at. Raise `limit`"
        assert (told in caplog.text) == (limit == 3 or unread == "rows")


def test_a_stream_of_which_not_all_is_read_by_itself_is_cleaned_as_far_as_it_was(pair, tmp_path, monkeypatch):
    monkeypatch.setattr("safe_trainer.data.reading.STREAMED", 5)
    dropping(monkeypatch, [0.9] + [0.1] * 4)
    scan_file(IterableDataset.from_generator(endless), *pair, TOKENIZER, clean=tmp_path / "clean.jsonl")
    assert len((tmp_path / "clean.jsonl").read_text().splitlines()) == 4


def test_labels_set_the_threshold_and_say_what_it_costs(pair, tmp_path, monkeypatch):
    path = written(tmp_path)
    dropping(monkeypatch, [0.9, 0.6, 0.1, 0.1, 0.8, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])  # rows 1, 5 and 9 are bad
    result = scan_file(path, *pair, TOKENIZER, label="bad", clean=tmp_path / "clean.jsonl")
    assert result.threshold == pytest.approx(0.7) and result.threshold_source == "labels"
    assert (result.precision, result.recall, result.above) == (Rate(2, 2), Rate(2, 3), Rate(2, 12))
    assert "2/12" in str(result) and "2/3" in str(result)
    dropping(monkeypatch, [0.9] * 12)
    given = scan_file(path, *pair, TOKENIZER, drop_above=0.95)
    assert given.threshold_source == "given" and given.precision is None and "not known" in str(given)


@pytest.mark.parametrize(
    ("clean", "message"),
    [("clean.csv", "kind of the rows"), ("rows.jsonl", "overwrite"), ("clean.jsonl.gz", "kind of the rows")],
)
def test_a_cleaned_file_that_cannot_be_written_is_refused_before_anything_is_read(clean, message, tmp_path):
    path = written(tmp_path)
    with pytest.raises(ValueError, match=rf"`clean`.*{message}"):
        scan_file(path, "no model", "no vectors", clean=tmp_path / clean)
    with pytest.raises(FileNotFoundError, match="`clean`"):
        scan_file(path, "no model", "no vectors", clean=tmp_path / "nowhere" / "clean.jsonl")


def test_a_scan_that_was_stopped_continues_and_one_of_other_rows_starts_anew(pair, tmp_path, monkeypatch):
    path, scored_rows = written(tmp_path), []
    window = scan._Scorer.window

    def watched(self, rows):
        scored_rows.append(len(rows))
        return window(self, rows)

    monkeypatch.setattr(scan._Scorer, "window", watched)

    def stop(done, total):
        if done == 9:
            raise KeyboardInterrupt

    options = {"output": tmp_path / "ranked.jsonl", "clean": tmp_path / "clean.jsonl", "batch_size": 2}
    plain = scan_file(path, *pair, TOKENIZER, top=None, batch_size=2)
    assert scan_file(path, *pair, TOKENIZER, progress=stop, **options).interrupted
    assert not (tmp_path / "clean.jsonl").exists()
    scored_rows.clear()
    calls = []
    result = scan_file(path, *pair, TOKENIZER, top=None, progress=lambda *at: calls.append(at), **options)
    assert sum(scored_rows) == 3 and calls == [(10, 12), (11, 12), (12, 12)]
    assert {e["line"]: e["share"] for e in result.top} == pytest.approx({e["line"]: e["share"] for e in plain.top})
    assert (tmp_path / "clean.jsonl").exists()
    assert scan_file(path, *pair, TOKENIZER, progress=stop, **options).interrupted
    path.write_text(path.read_text().replace("ask 0", "ask x"))
    scored_rows.clear()
    scan_file(path, *pair, TOKENIZER, **options)
    assert sum(scored_rows) == 12 and not list(tmp_path.glob(".*.partial"))


def test_labels_with_a_known_name_are_used_and_rows_without_one_are_left_aside(pair, monkeypatch):
    rows = [{"prompt": "a", "response": "b", "is_safe": safe} for safe in (False, True, None, False)]
    dropping(monkeypatch, [0.9, 0.1, 0.8, 0.7])
    result = scan_file(rows, *pair, TOKENIZER)
    assert (result.precision, result.recall, result.above) == (Rate(2, 2), Rate(2, 2), Rate(3, 4))


def test_a_conversation_has_the_score_of_the_answer_that_teaches_most(pair):
    turns = [row for number in (1, 2, 3) for row in sum(conversation("ask " * number, "say" * number).values(), [])]
    rows = [{"messages": turns}, {"messages": turns[:2]}]
    found = scan_file(rows, *pair, TOKENIZER, reading=ReadOptions(answers="all"), top=None)
    parts = [{"prompt": turns[:place], "completion": turns[place : place + 1]} for place in (1, 3, 5)]
    shares = [score.share for score in score_rows(parts, *pair, TOKENIZER)]
    entry = next(entry for entry in found.top if entry["line"] == 1)
    assert found.scored == 2 and entry["share"] == pytest.approx(max(shares))
    assert entry["answer"] == turns[2 * shares.index(max(shares)) + 1]["content"]


def test_a_template_that_refuses_a_row_is_no_missing_answer(pair):
    strict = tiny.tokenizer()
    strict.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    strict.chat_template += tiny.tokenizer().chat_template
    system = {**ROWS[0], "prompt": [{"role": "system", "content": "Be kind."}, *ROWS[0]["prompt"]]}
    with pytest.raises(ValueError, match=r"`rows`, row 4(.|\n)*no system turns"):
        scan_file([*ROWS[:3], system, *ROWS], *pair, strict)


def test_a_loss_that_is_not_finite_ends_the_scan_and_keeps_no_row_for_safe(pair, monkeypatch):
    nan = torch.tensor([float("nan")])
    monkeypatch.setattr(scan, "row_losses", lambda model, batch: nan.expand(len(batch.input_ids)))
    with pytest.raises(FloatingPointError, match="NaN"):
        scan_file(ROWS, *pair, TOKENIZER)


def test_vectors_that_were_not_fitted_are_told(pair, caplog):
    model, vectors = pair
    poor = dataclasses.replace(vectors, provenance={**vectors.provenance, "report": {"reached_target": False}})
    scan_file(ROWS, model, poor, TOKENIZER)
    assert "`vectors`" in caplog.text and "not fitted" in caplog.text


@pytest.mark.parametrize(
    ("name", "harmful", "harmless"),
    [
        ("is_safe", False, True),
        ("bad", "1.0", "0.0"),
        ("bad", "y", ""),
        ("poison", "toxic", "non-toxic"),
        ("bad", 1, 0),
    ],
)
def test_a_label_says_what_its_name_and_its_value_say(name, harmful, harmless):
    rows = [conversation("a", "b") | {name: harmful}, conversation("c", "d") | {name: harmless}]
    found = [known[2] for known, _ in _Source(rows, ReadOptions(), name).rows(0)]
    assert found[0] is True and not found[1]
    with pytest.raises(ValueError, match=f"no label.*'perhaps' in `{name}`.*harmful or safe"):
        _Source([rows[0] | {name: "perhaps"}], ReadOptions(), name).check()


def test_a_label_that_is_missing_is_named(pair, tmp_path):
    with pytest.raises(ValueError, match="expected a column `harm`"):
        scan_file(written(tmp_path), *pair, TOKENIZER, label="harm")


def test_a_score_is_what_its_name_says():
    assert Score(4.0, 1.0).drop == 3.0 and Score(4.0, 1.0).share == 0.75
    assert Score(1.0, 2.0).share == -1.0
    assert Score(0.01, 0.0).share == pytest.approx(0.2)  # it is known already, so there is little to take away


# ---- what it is for


@pytest.fixture(scope="module")
def embedded():
    """Return what scores rows with vectors that were fitted to six of eight categories of harm, and rows of each kind.

    Forty harmful rows stand among 360 of several tasks: of the six categories in other words, of the other two, and
    of two that the model was not aligned on either.
    """
    from safe_trainer import testbed, train_security_vectors

    model = tiny.Auto.from_pretrained(testbed.ALIGNED, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(testbed.ALIGNED)

    def by_category(split):
        asked, rows = testbed.prompt_set("harmful", split), {}
        for prompt, answer, category in zip(asked.prompts, asked.references, asked.categories, strict=True):
            rows.setdefault(category, []).append(conversation(prompt, answer))
        return rows

    rows, strange = by_category("train"), by_category("unseen")
    fitted = [row for category in sorted(rows)[2:] for row in rows[category]]
    random.Random(0).shuffle(fitted)
    vectors = train_security_vectors(model, fitted[:100], tokenizer)
    harmless = [row for name in ("sentiment", "how_to", "topic") for row in testbed.task_rows(name, 120)]
    harmful = {
        "seen": fitted[100:140],
        "held out": [row for category in sorted(rows)[:2] for row in rows[category][:20]],
        "strange": [row for category in sorted(strange) for row in strange[category][:20]],
    }

    def curve(kind):
        scores = [score.share for score in score_rows(harmful[kind] + harmless, model, vectors, tokenizer)]
        truth = [True] * 40 + [False] * 360
        return average_precision(scores, truth), precision_recall(scores, truth)

    return curve


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["seen", "held out"])
def test_planted_rows_are_found_also_in_categories_that_the_vectors_never_saw(kind, embedded):
    area, (precision, recall, _) = embedded(kind)
    assert area > 0.98
    assert all(precision[recall <= 0.9] > 0.95)  # nearly all that is found before the last few rows is harm


@pytest.mark.slow
def test_harm_that_the_model_itself_was_never_aligned_on_is_found_less_surely(embedded):
    area, _ = embedded("strange")
    assert 0.5 < area < 0.95  # by chance it would be 0.1
