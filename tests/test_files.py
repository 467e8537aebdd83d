"""Files of every kind, encoding and state of repair, read record by record."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
import textwrap

import pytest

from safe_trainer import load_prompts
from safe_trainer.data import ReadOptions
from safe_trainer.data.loaders import kind_of, read_records
from safe_trainer.data.parsing import LONGEST, Record, RowError

ROWS = [{"prompt": "Say hé, “you”", "completion": "Hé,\nyou"}, {"prompt": "Two", "completion": "2"}]


def values(path, **options):
    records = list(read_records(path, **options))
    assert all(isinstance(record, Record) for record in records), records
    return [record.value for record in records]


def troubles(path, **options):
    return [record for record in read_records(path, **options) if isinstance(record, RowError)]


def as_csv(rows, delimiter=","):
    from io import StringIO

    text = StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(rows[0])
    writer.writerows(row.values() for row in rows)
    return text.getvalue()


TEXTS = {
    "rows.json": json.dumps(ROWS, indent=2),
    "compact.json": json.dumps(ROWS),
    "lines.json": "\n".join(map(json.dumps, ROWS)),
    "rows.jsonl": "\n".join(map(json.dumps, ROWS)) + "\n",
    "rows.ndjson": "\r\n".join(map(json.dumps, ROWS)),
    "rows.csv": as_csv(ROWS),
    "rows.tsv": as_csv(ROWS, "\t"),
    "semicolons.csv": as_csv(ROWS, ";"),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", TEXTS)
def test_the_same_rows_come_out_of_every_kind_of_file(tmp_path, name, zipped):
    path = tmp_path / (name + ".gz" if zipped else name)
    content = TEXTS[name].encode()
    path.write_bytes(gzip.compress(content) if zipped else content)
    assert values(path) == ROWS


@pytest.mark.parametrize("zipped", [False, True])
def test_the_same_rows_come_out_of_parquet(tmp_path, zipped):
    import pyarrow as pa
    from pyarrow import parquet

    plain = tmp_path / "rows.parquet"
    parquet.write_table(pa.Table.from_pylist(ROWS), plain)
    path = tmp_path / "zipped.parquet.gz" if zipped else plain
    if zipped:
        path.write_bytes(gzip.compress(plain.read_bytes()))
    assert values(path) == ROWS
    assert [record.line for record in read_records(path)] == [1, 2]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv"])
def test_unicode_is_told_by_its_first_bytes(tmp_path, name, encoding):
    path = tmp_path / name
    path.write_bytes(TEXTS[name].encode(encoding))
    assert values(path) == ROWS


def test_latin_1_is_read_when_it_is_named(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes("prompt,completion\ncafé,thé\n".encode("latin-1"))
    assert values(path, encoding="latin-1") == [{"prompt": "café", "completion": "thé"}]
    assert values(path) == [{"prompt": "caf\udce9", "completion": "th\udce9"}]  # told apart row by row, later


def test_unknown_encoding_is_refused_by_name(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\na,b\n")
    with pytest.raises(ValueError, match="`encoding` 'klingon' is unknown"):
        values(path, encoding="klingon")


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ('[\n  {"a": 1},\n\n  {"a":\n 2},\n  3\n]', ["row 1", "row 2", "row 3"]),
        ('{"a": 1}\n\n{"a": 2}', ["line 1", "line 3"]),
    ],
)
def test_rows_are_named_by_index_in_an_array_and_by_line_in_json_lines(tmp_path, text, lines):
    path = tmp_path / "rows.json"
    path.write_text(text)
    assert [f"{record.unit} {record.line}" for record in read_records(path)] == lines


def test_csv_rows_know_the_lines_where_they_begin(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\n"one\ntwo",2\n\n3,4\n')
    assert [record.line for record in read_records(path)] == [2, 5]


@pytest.mark.parametrize("length", [10, 2**18 - 3, 2**18 - 2, 2**18 - 1, 2**18, 2**18 + 1, 2**20])
def test_an_array_is_read_whole_wherever_the_window_ends(tmp_path, length):
    rows = [{"text": "x" * length + '\\"é'}, 12345, -1.5e-10, {"text": "last", "flag": True, "none": None}]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    assert values(path) == rows


def test_headers_are_told_from_data(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text("Write a poem about rain\nWrite a story\n")
    assert values(path) == [{"1": "Write a poem about rain"}, {"1": "Write a story"}]
    path.write_text("User question,Reply\nWrite a poem,Rain\n")
    assert values(path) == [{"User question": "Write a poem", "Reply": "Rain"}]
    assert values(path, header=False)[0] == {"1": "User question", "2": "Reply"}


def test_plain_lines_are_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("One\n\n Two \n")
    assert list(read_records(path)) == [Record(1, "One"), Record(3, "Two")]


def test_a_bad_line_of_json_is_named_and_the_rest_is_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": \n\n{"a": 3}\n' + "[" * 100_000 + "\n")
    records = list(read_records(path))
    assert [record.line for record in records] == [1, 2, 4, 5]
    assert [type(record) for record in records] == [Record, RowError, Record, RowError]
    assert "at character" in records[1].found
    assert str(records[1]).startswith("line 2: not JSON: found '{\"a\":'")


def test_a_row_with_other_cells_than_the_header_is_named(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\na,b\na,b,c\nd\ne,f\n")
    assert [(t.line, t.kind, t.found) for t in troubles(path)] == [
        (3, "wrong number of cells", "3"),
        (4, "wrong number of cells", "1"),
    ]


def test_a_header_in_the_middle_is_no_row(tmp_path):
    path = tmp_path / "joined.csv"
    path.write_text("prompt,completion\nHi,Hello\n\ufeffprompt,completion\nBye,Ciao\n", encoding="utf-8")
    good, bad, other = read_records(path)
    assert (good.line, bad.line, bad.kind, other.line) == (2, 3, "the header again", 4)


def test_an_open_quote_is_named_where_it_opens(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\na,b\n"c,d\ne,f\n')
    (trouble,) = troubles(path)
    assert (trouble.line, trouble.kind) == (3, "not CSV")
    assert "up to line 4" in trouble.found


def test_reading_goes_on_behind_a_stray_quote(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\n"c" x,d\ne,f\n')
    records = list(read_records(path))
    assert [(type(record), record.line) for record in records] == [(RowError, 2), (Record, 3)]


def test_a_cell_may_be_longer_than_the_csv_module_allows_by_itself(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\n" + "x" * 300_000 + ",y\n")
    assert len(values(path)[0]["prompt"]) == 300_000


@pytest.mark.slow
def test_one_giant_line_is_skipped_in_pieces(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n"' + "x" * (2 * LONGEST + 5) + '"\n{"a": 3}\n')
    records = list(read_records(path))
    assert [(type(record), record.line) for record in records] == [(Record, 1), (RowError, 2), (Record, 3)]
    assert records[1].kind == "too long"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", b"", "is empty"),
        ("rows.json", b'[{"a": 1}, {"a" 2}]', "line 1: found .*2"),
        ("rows.json", b'[{"a": 1},\n {"a": "x', "line 2: found .*Unterminated"),
        ("rows.json", b'[{"a": 1}\n {"a": 2}]', "line 2: found .* expected `,` or `]`"),
        ("rows.json", b'[{"a": 1},', "the end of the file"),
        ("rows.json", b'[{"a": 1}]\n[{"a": 2}]', r"line 2: .*\.jsonl"),
        ("rows.csv", b"prompt,prompt\na,b\n", "a different name for each column"),
        ("rows.csv", b"x" * (LONGEST + 2), "line breaks between rows"),
        ("rows.parquet", b"PAR1 no", "no Parquet"),
        ("rows.json.gz", b"no gzip", "not a whole gzip file"),
        ("rows.json.gz", gzip.compress(b"[1, 2, 3]" * 1000, mtime=0)[:-12], "not a whole gzip file"),
        ("rows.json", "[1]".encode("utf-16") + b"\0", "is not Unicode text .*truncated.*`encoding`"),
        ("rows.xlsx", b"PK", r"Rename it to one of \.json"),
        ("rows", b"[]", "of no kind"),
    ],
)
def test_broken_files_are_refused_with_a_reason(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        list(read_records(path))
    assert str(path) in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*absent\.json"):
        list(read_records(tmp_path / "absent.json"))


def test_kinds_are_told_by_name_whatever_its_case():
    assert [kind_of(name) for name in ("a.JSON", "b.v2.Csv.GZ", "c.parquet")] == ["JSON", "CSV", "Parquet"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_a_million_rows_are_streamed_in_bounded_memory(tmp_path, name):
    path = tmp_path / name
    row = {"prompt": "How do I boil an egg? " * 3, "completion": "Put it into boiling water for six minutes."}
    with path.open("w") as file:
        if name.endswith("csv"):
            file.write("prompt,completion\n" + f"{row['prompt']},{row['completion']}\n" * 1_000_000)
        else:
            comma, text = "," if name == "rows.json" else "", json.dumps(row)
            file.write("[" if comma else "")
            file.write(f"{text}{comma}\n" * 999_999 + text + ("]" if comma else "\n"))
    code = f"""
        import resource
        from safe_trainer.data.loaders import read_records
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        count = sum(1 for _ in read_records({str(path)!r}))
        print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    run = [sys.executable, "-c", textwrap.dedent(code)]
    count, kilobytes = map(int, subprocess.run(run, check=True, capture_output=True, text=True).stdout.split())
    assert count == 1_000_000
    assert kilobytes < 20_000


# ---- odd shapes are read, and it is said how, or they are named

PLAIN = [{"prompt": "Who?", "completion": "Me."}, {"prompt": "Where?", "completion": "Here."}]
SHAPES = {
    "trailing comma.json": "[\n" + ",\n".join(map(json.dumps, PLAIN)) + ",\n]",
    "concatenated.json": "\n".join(json.dumps(row, indent=2) for row in PLAIN),
    "concatenated.jsonl": "\n".join(json.dumps(row, indent=2) for row in PLAIN),
    "glued.json": "".join(map(json.dumps, PLAIN)),
    "glued.jsonl": "".join(map(json.dumps, PLAIN)),
    "wrapped.json": json.dumps({"version": 1, "data": PLAIN}),
    "wrapped and indented.json": json.dumps({"version": 1, "data": PLAIN}, indent=2),
    "columns.json": json.dumps({"prompt": ["Who?", "Where?"], "completion": ["Me.", "Here."]}),
    "columns of which one holds objects.json": json.dumps(
        {"prompt": ["Who?", "Where?"], "completion": ["Me.", "Here."], "category": [{"a": True}, {"a": False}]}
    ),
    "by id.json": json.dumps({"a": PLAIN[0], "b": PLAIN[1]}, indent=1),
    "pandas.json": json.dumps({"prompt": {"0": "Who?", "1": "Where?"}, "completion": {"0": "Me.", "1": "Here."}}),
    "array.jsonl": json.dumps(PLAIN),
    "indented array.jsonl": json.dumps(PLAIN, indent=1),
    "commas.jsonl": ",\n".join(map(json.dumps, PLAIN)),
    "pipes.csv": as_csv(PLAIN, "|"),
    "with its separator.csv": "sep=;\n" + as_csv(PLAIN, ";"),
    "with an index.csv": ",prompt,completion\n"
    + "".join(f"{n},{r['prompt']},{r['completion']}\n" for n, r in enumerate(PLAIN)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_odd_shapes_are_read(tmp_path, name):
    path = tmp_path / name
    path.write_text(SHAPES[name])
    assert [{key: row[key] for key in PLAIN[0]} for row in values(path)] == PLAIN


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("columns.json", "columns"),
        ("by id.json", "by id"),
        ("wrapped.json", "`data`"),
        ("glued.jsonl", "one JSON document"),
    ],
)
def test_it_is_said_how_an_odd_shape_was_read(tmp_path, name, note):
    path, notes = tmp_path / name, []
    path.write_text(SHAPES[name])
    list(read_records(path, notes=notes))
    assert len(notes) == 1 and note in notes[0]


def test_one_object_is_one_row(tmp_path):
    path, notes = tmp_path / "row.json", []
    path.write_text(json.dumps(PLAIN[0], indent=1))
    assert [record.value for record in read_records(path, notes=notes)] == PLAIN[:1]
    assert "one row" in notes[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("two.json", json.dumps({"train": PLAIN, "test": PLAIN}), "several lists of rows: train, test"),
        ("uneven.json", json.dumps({"prompt": ["a", "b"], "completion": ["c"]}), "columns of different lengths"),
        ("comment.json", "// rows\n" + json.dumps(PLAIN), r"row 1 \(index 0\), line 1: found '// rows"),
        ("python.jsonl", "\n".join(map(repr, PLAIN)), "double quotes"),
        ("twice.jsonl", '{"prompt": "a", "completion": "b", "completion": "c"}', "`completion` twice"),
        ("sheet.xlsx", "x", "Export the sheet as CSV"),
        ("rows.jsonl.zst", "x", "Unpack it"),
    ],
)
def test_what_cannot_be_read_is_named_with_what_to_do(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        for record in read_records(path):
            if isinstance(record, RowError):
                raise ValueError(str(record))


@pytest.mark.slow
@pytest.mark.parametrize("size", [10, 60_000])
def test_numbers_that_are_none_are_nothing_in_arrays_of_any_size(tmp_path, size):
    path = tmp_path / "rows.json"
    rows = [{"text": 'a "NaN" and\\ Infinity \\', "input": float("nan"), "n": -1.5}] * size + [{"big": float("-inf")}]
    path.write_text(json.dumps(rows))
    found = values(path)
    assert len(found) == size + 1 and found[size - 1]["text"] == rows[0]["text"]
    assert found[0]["n"] == -1.5 and not (found[0]["input"] or 0) > 0


@pytest.mark.slow
def test_a_large_array_that_breaks_names_the_index(tmp_path):
    path, row = tmp_path / "rows.json", '{"text": "' + "x" * 100 + '"},\n'
    path.write_text("[" + row * 60_000 + '{"text" 1}]')
    with pytest.raises(ValueError, match=r"row 60001 \(index 60000\)"):
        list(read_records(path))


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 60_000])
def test_a_row_that_cannot_be_used_ends_no_array_of_any_size(tmp_path, count):
    path, row = tmp_path / "rows.json", json.dumps({"text": "x" * 100})
    bad = ['{"text": "a", "text": "b"}', '{"id": ' + "1" * 5000 + "}"]
    path.write_text("[" + ",\n".join([*[row] * count, *bad, row]) + "]")
    found = list(read_records(path))
    assert [(error.line, error.kind) for error in found if isinstance(error, RowError)] == [
        (count + 1, "a key twice"),
        (count + 2, "not JSON"),
    ]
    assert len(found) == count + 3 and found[-1].value == json.loads(row)


@pytest.mark.parametrize(
    "header",
    [
        "prompt (English),answer", "Prompt,Réponse", "Question?,Answer", "1st prompt,answer", "prompt:,completion:",
        "instruction*,output", "Q,A", "Frage,Antwort", "提示,回答", "#,text", "question_text|en,answer",
    ],
)  # fmt: skip
def test_what_looks_like_a_header_is_no_row(tmp_path, header):
    path = tmp_path / "rows.csv"
    path.write_text(header + "\nName a colour.,Blue.\n")
    assert values(path) == [dict(zip(header.split(","), ["Name a colour.", "Blue."], strict=True))]


@pytest.mark.parametrize(
    "header",
    [
        "User's question,Bot's answer",
        "what the user has asked,the reply",
        "User prompt",
        "What to ask",
        "Frage an Modell",
        "User's prompts (v2)",
    ],
)
def test_what_may_be_a_header_is_asked_about(tmp_path, header):
    path = tmp_path / "rows.csv"
    path.write_text(header + "\n" + ("Name a colour.,Blue.\n" if "," in header else "Name a colour.\n"))
    with pytest.raises(ValueError, match="names of columns or a row.*`header=True` or `header=False`"):
        values(path)
    assert len(values(path, header=True)) == 1 and len(values(path, header=False)) == 2
    for name, rows in ((header.partition(",")[0], 1), ("1", 2)):  # as the message advises
        assert len(load_prompts(path, "benign", options=ReadOptions(columns={"prompt": name}))[0]) == rows


def test_a_file_that_is_almost_there_is_suggested(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(FileNotFoundError, match="Did you mean `rows.jsonl`"):
        list(read_records(tmp_path / "Rows.jsonl"))
    with pytest.raises(FileNotFoundError, match="Patterns are not expanded"):
        list(read_records(tmp_path / "*.jsonl"))
    with pytest.raises(ValueError, match=r"For a dataset on the Hub, write `hf:owner/name`"):
        list(read_records("owner/name"))
    with pytest.raises(ValueError, match="is a folder. Give one of its files"):
        list(read_records(tmp_path))


def test_a_table_by_columns_whose_first_has_gaps_keeps_its_rows(tmp_path):
    table = {"prompt": {"0": "Who?", "1": "Where?"}, "note": {"1": "late", "2": "alone"}}
    (tmp_path / "table.json").write_text(json.dumps(table))
    found = [record.value for record in read_records(tmp_path / "table.json")]
    assert [row["prompt"] for row in found] == ["Who?", "Where?", None]
    assert [row["note"] for row in found] == [None, "late", "alone"]
