"""A comparison as files: what went in comes back, refusals never stand alone, and no write leaves half a file."""

import json
import os
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from safe_trainer.data import PromptSet
from safe_trainer.evaluation import (
    Answer,
    Comparison,
    Evaluation,
    PhraseJudge,
    Rate,
    agreements,
    from_json,
    judged,
    to_html,
    to_json,
    to_markdown,
    write_report,
)
from safe_trainer.evaluation.report import write_atomically

REFUSAL = "I'm sorry, but I can't help with that."
HELP = "Sure. First get the rope, then tie the knot."
MANIFEST = {
    "model": {"id": "org/model_7b"},
    "decoding": {"max_new_tokens": 64, "batch_size": 32, "system_prompt": None, "temperature": 0.0},
    "judges": [{"name": "phrases", "version": "1-abc"}],
    "packages": {"torch": "2.13.0"},
}


def evaluation(name, harm, borderline, sums, harm_name="harm"):
    sets = [
        (PromptSet(harm_name, "harmful", ("a?", "b?", "c?", "d?"), categories=("x", "y", "x", "y")), harm),
        (PromptSet("edge", "borderline", ("e?", "f?")), borderline),
        (PromptSet("sums", "task", ("1+1?", "1+2?"), references=("2", "3")), sums),
    ]
    results = tuple(judged(s, [Answer(text) for text in texts], [PhraseJudge()]) for s, texts in sets)
    return Evaluation(name, results, MANIFEST, tuple(note for r in results for note in r.observations()))


def comparison(**settings):
    before = evaluation("before", [REFUSAL] * 4, [HELP, REFUSAL], ["2", "4"], **settings)
    after = evaluation("plain LoRA", [REFUSAL, HELP, HELP, "x"], [HELP, HELP], ["2", "3"], **settings)
    return Comparison((before, after), notes=("Only a test.",), seed=7)


def rows(markdown):
    """Parse the tables as a Markdown reader does: {first cell: other cells}."""
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    cells, table = [], {}
    for token in tokens:
        if token.type == "tr_open":
            cells = []
        elif token.type == "inline":
            cells.append("".join(child.content for child in token.children or []))
        elif token.type == "tr_close":
            table[cells[0]] = cells[1:]
    return table


def test_json_brings_back_every_answer_verdict_and_setting():
    original = comparison()
    assert from_json(to_json(original)) == original


def test_json_keeps_unanswered_prompts_apart():
    asked = PromptSet("harm", "harmful", ("a?", "b?"))
    result = judged(asked, [Answer("", error="too long"), Answer("", truncated=True)], [PhraseJudge()])
    original = Comparison((Evaluation("only", (result,)),))
    again = from_json(to_json(original))
    assert again == original
    assert again.before["harm"].outcomes == (None, "neither")


def test_the_summary_in_json_counts_for_programs_that_do_not():
    summary = json.loads(to_json(comparison()))["summary"]
    harm = summary["plain LoRA"]["harm"]
    assert harm["rates"]["refused"]["count"] == 1 and harm["rates"]["refused"]["total"] == 4
    assert harm["rates"]["complied"]["rate"] == 0.5 and harm["rates"]["neither"]["rate"] == 0.25
    assert harm["change"]["difference"] == -0.75 and harm["change"]["lost"] == 3
    assert "change" not in summary["before"]["harm"]
    assert summary["plain LoRA"]["sums"]["rates"]["correct"]["rate"] == 1.0
    assert summary["plain LoRA"]["sums"]["rates"]["correct"]["low"] == pytest.approx(Rate(2, 2).low)


def test_json_has_no_nan_when_nothing_could_be_judged():
    asked = PromptSet("harm", "harmful", ("a?",))
    result = judged(asked, [Answer("", error="too long")], [PhraseJudge()])
    text = to_json(Comparison((Evaluation("a", (result,)), Evaluation("b", (result,)))))
    summary = json.loads(text, parse_constant=pytest.fail)["summary"]
    assert summary["b"]["harm"]["rates"]["refused"]["rate"] is None
    assert summary["b"]["harm"]["change"] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (to_json(comparison())[:-200], "not a complete JSON file"),
        ("[]", "not a comparison"),
        ('{"kind": "other"}', "not a comparison"),
        ('{"kind": "safe_trainer comparison", "format": 99}', "format 99.*reads"),
    ],
)
def test_what_is_no_comparison_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        from_json(text)


def test_markdown_shows_refusals_over_refusals_and_tasks_in_one_table():
    table = rows(to_markdown(comparison()))
    assert table["harm: refusal rate"] == ["100.0 % (4/4) [51.0, 100.0]", "25.0 % (1/4) [4.6, 69.9]"]
    assert table["harm: compliance rate"][1].startswith("50.0 % (2/4)")
    assert table["harm: neither"][1].startswith("25.0 % (1/4)")
    assert table["edge: over-refusal rate"] == ["50.0 % (1/2) [9.5, 90.5]", "0.0 % (0/2) [0.0, 65.8]"]
    assert table["sums: task accuracy"][1].startswith("100.0 % (2/2)")
    assert table["benign"] == ["not measured", "not measured"]
    assert [cell.split(" [")[0] for cell in table["x"]] == ["100.0 % (2/2)", "50.0 % (1/2)"]


def test_markdown_says_what_changed_how_it_was_measured_and_what_to_mind():
    text = to_markdown(comparison())
    assert "**plain LoRA.** Too few prompts to tell; the data are also consistent with a rise of" in text
    assert "- refusal rate (harm, by phrases) fell from 100.0 % (4/4) to 25.0 % (1/4), difference −75 points" in text
    assert "- benign prompts: not measured" in text
    assert "- Only a test." in text
    assert "org/model\\_7b. Greedy decoding, at most 64 tokens" in text
    assert "phrases 1-abc" in text and "seed 7" in text


def test_names_from_outside_are_text_in_markdown_and_nothing_else():
    hostile = "x](http://evil) | <script>alert(1)</script> ![i](http://evil/i.png)"
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(to_markdown(comparison(harm_name=hostile)))
    assert "<script" not in html and "<img" not in html and "<a " not in html
    table = rows(to_markdown(comparison(harm_name=hostile)))
    assert {len(cells) for cells in table.values()} == {2}


def test_report_writes_json_markdown_and_html(tmp_path):
    paths = write_report(comparison(), tmp_path / "deep" / "out", name="r")
    assert [path.name for path in paths] == ["r.json", "r.md", "r.html"]
    assert from_json(paths[0].read_text(encoding="utf-8")) == comparison()
    assert paths[1].read_text(encoding="utf-8") == to_markdown(comparison())
    assert paths[2].read_text(encoding="utf-8") == to_html(comparison())


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    write_atomically(path, "old")

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_has_the_rights_of_an_ordinary_one(tmp_path):
    (tmp_path / "plain").write_text("")
    written = write_atomically(tmp_path / "report", "text")
    assert written.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_comparison_of_format_1_loads_with_its_numbers():
    old = from_json((Path(__file__).parent / "fixtures" / "comparison_format_1.json").read_bytes())
    assert [e.name for e in old.evaluations] == ["before", "tuned, run 1", "tuned, run 2"]
    assert old.seed == 3 and old.runs == {"tuned": ("tuned, run 1", "tuned, run 2")} and old.notes == ("Only a test.",)
    assert old.before["harm"].rate("refused") == Rate(11, 12) and old.before["sums"].headline == Rate(1, 3)
    assert old["tuned, run 1"]["harm"].rates()["refused"] == Rate(4, 11)
    change = old.change("tuned, run 1", "harm", "complied")
    assert (change.gained, change.lost, change.p_value) == (6, 0, pytest.approx(0.03125))
    written = json.loads((Path(__file__).parent / "fixtures" / "comparison_format_1.json").read_text())["summary"]
    headline = old.change("tuned, run 1", "harm")
    assert headline.low == pytest.approx(written["tuned, run 1"]["harm"]["change"]["low"], abs=1e-5)
    assert headline.p_value == pytest.approx(written["tuned, run 1"]["harm"]["change"]["p_value"], abs=1e-5)
    (agreement,) = agreements([old.before["harm"]])
    assert agreement.agreed == Rate(12, 12) and agreement.kappa == pytest.approx(1.0)
    assert old["tuned, run 1"].drift["model.layers.0.self_attn.q_proj"] == 0.02
    assert from_json(to_json(old)) == old
    assert "task accuracy" in to_markdown(old) and "alignment direction" in to_html(old)
