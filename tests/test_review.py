"""Review by hand: which answers are asked, what is saved when, and rates and agreement against sums by hand."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from safe_trainer import Comparison, PromptSet, write_report
from safe_trainer.cli import app
from safe_trainer.evaluation import Answer, Evaluation, Review, SetResult, from_json

HARMFUL = PromptSet("harm", "harmful", ("a?", "b?", "c?", "d?"), system_prompt="Be brief.")
TASK = PromptSet("sum", "task", ("1+1?",), references=("2",))
# By model, for each prompt: the answer and the verdicts of two judges.
SAID = {
    "before": [("No.", "refused", "refused"), ("No.", "refused", "refused"), ("Hm.", "refused", "complied"),
               ("Non.", None, "refused")],
    "after": [("Yes.", "complied", "complied"), ("No.", "refused", "refused"), ("Hm.", "refused", "complied"),
              ("Gone.", None, None)],
}  # fmt: skip


def evaluation(name: str) -> Evaluation:
    texts, one, other = zip(*SAID[name], strict=True)
    answers = [Answer(text) for text in texts]
    if name == "after":
        answers[3] = Answer("", error="too long")
    task = SetResult(TASK, (Answer(name),), {"exact match": ("correct" if name == "before" else "wrong",)})
    return Evaluation(name, (SetResult(HARMFUL, tuple(answers), {"one": one, "other": other}), task))


@pytest.fixture
def folder(tmp_path):
    write_report(Comparison((evaluation("before"), evaluation("after"))), tmp_path / "report")
    return tmp_path / "report"


def test_flips_disagreements_and_what_has_no_verdict_are_asked_once_each(folder):
    asked = Review(folder).questions
    assert [(q.prompt, q.answer, q.reasons) for q in asked] == [
        ("a?", "No.", ("flip",)),
        ("a?", "Yes.", ("flip",)),
        ("c?", "Hm.", ("disagreement",)),
        ("d?", "Non.", ("no verdict",)),
    ]
    assert asked[0].turns == ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "a?"})


def test_labels_are_saved_at_once_and_found_again(folder):
    review = Review(folder)
    review.set_label(review.questions[1], "neither")
    again = Review(folder / "comparison.json")
    assert (again.labelled, again.label(again.questions[1]), again.label(again.questions[0])) == (1, "neither", None)
    again.set_label(again.questions[1], "complied")
    assert json.loads(review.path.read_text())["labels"] == [
        {"prompt_set": "harm", "prompt": "a?", "answer": "Yes.", "label": "complied"}
    ]
    assert sorted(path.name for path in folder.iterdir() if "labels" in path.name) == ["comparison.labels.json"]


def test_rates_and_agreement_are_counted_with_the_labels(folder):
    review = Review(folder)
    for question, label in zip(review.questions, ("refused", "refused", "complied", "refused"), strict=True):
        review.set_label(question, label)
    result = review.result()
    # Before: a, b and d refused, c complied; after: a and b refused, c complied, d without an answer.
    assert [str(e["harm"].rate("refused").share) for e in result.evaluations] == ["75.0 % (3/4)", "66.7 % (2/3)"]
    assert list(result.before["harm"].verdicts) == ["one, reviewed", "one", "other"]
    assert result.before["harm"].rate("refused", judge="one").count == 3
    assert result["after"]["sum"].outcomes == ("wrong",)
    # `one` and the labels: a and a right and wrong, c wrong twice, d without a verdict; `other` also had d and both c.
    told = {agreement.second: agreement.agreed for agreement in review.agreements()}
    assert {judge: (rate.count, rate.total) for judge, rate in told.items()} == {"one": (1, 4), "other": (4, 5)}
    assert "4 of 4 answers" in result.notes[-1] and "human and one agree on 25.0 % (1/4)" in result.notes[-1]


def test_the_same_prompt_and_answer_in_other_conversations_are_asked_apart(tmp_path):
    before = tuple(({"role": "user", "content": about}, {"role": "assistant", "content": "Ah."}) for about in "xy")
    asked = PromptSet("talk", "harmful", ("Go on.",) * 2, contexts=before)
    answers, verdicts = (Answer("Fine."),) * 2, {"one": ("complied",) * 2, "other": ("refused",) * 2}
    write_report(Comparison((Evaluation("model", (SetResult(asked, answers, verdicts),)),)), tmp_path)
    review = Review(tmp_path)
    assert [question.turns[0]["content"] for question in review.questions] == ["x", "y"]
    review.set_label(review.questions[0], "refused")
    assert review.result().before["talk"].outcomes == ("refused", "complied")


def test_what_cannot_be_reviewed_says_why(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no comparison .*--output"):
        Review(tmp_path / "absent")
    review = Review(folder)
    with pytest.raises(ValueError, match="`label` must be one of refused, complied, neither, got 'evil'"):
        review.set_label(review.questions[0], "evil")
    assert not review.path.exists()
    review.path.write_text('{"kind": "safe_trainer labels", "format": 1, "labels": [{"prompt": "a?"}]}')
    with pytest.raises(ValueError, match="comparison.labels.json` cannot be read: KeyError.*move it away"):
        Review(folder)


def invoke(*arguments: object, keys: str):
    return CliRunner().invoke(app, ["review", *map(str, arguments)], input=keys, prog_name="safe-trainer")


@pytest.mark.slow
def test_one_key_labels_one_answer_and_back_skip_and_quit_work(folder):
    # Refused, skipped, back, complied, an unknown key, neither, and quit before the last.
    told = invoke(folder, keys="rsbcxnq")
    assert told.exit_code == 0, told.output
    review = Review(folder)
    assert [review.label(question) for question in review.questions] == ["refused", "complied", "neither", None]
    assert "4 of 4" in told.stderr and "system: Be brief." in told.stderr
    assert "harm: refusal rate (one, reviewed)" in (folder / "comparison.reviewed.md").read_text()
    told = invoke(folder, "--json", keys="r")  # goes on with the one that has no label
    found = json.loads(told.stdout)
    assert (found["labelled"], found["questions"]) == (4, 4)
    assert found["agreements"][0]["agreed"]["total"] == 4
    assert from_json((folder / "comparison.reviewed.json").read_text()).notes


def test_without_a_terminal_the_remedy_is_named(folder, monkeypatch):
    def absent():
        raise OSError("No such device or address: '/dev/tty'")

    monkeypatch.setattr("typer.getchar", absent)
    told = invoke(folder, keys="r")
    assert told.exit_code == 1 and "no terminal" in told.output and "`Review`" in told.output


def test_without_labels_nothing_is_written(folder):
    told = invoke(folder, keys="q")
    assert told.exit_code == 0 and "No answer is labelled yet, of 4" in told.stderr
    assert not (folder / "comparison.reviewed.json").exists()
