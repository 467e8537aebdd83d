"""Task scorers against answers as models write them, and references as data sets do."""

import pytest

from safe_trainer.data import PromptSet
from safe_trainer.evaluation import Answer, PhraseJudge, Rate, choice_match, exact_match, judged, number_match


@pytest.mark.parametrize(
    ("answer", "reference", "is_right"),
    [
        (" Positive.\n", "positive", True), ("**Rust**", "rust", True), ("`x`", "x", True), ("Yes", "yes!", True),
        ("8 - 5  = 3", "8 - 5 = 3", True), ("C", "C++", False), ("C++", "C", False), ("C#", "C", False),
        ("-5", "5", False), ("3.5", "35", False), ("50%", "50", False), ("!=", "==", False), ("x < y", "x > y", False),
        ("", "...", False), ("<b>", "b", False), ("positive, mostly", "positive", False), ("", "a", False),
    ],
)  # fmt: skip
def test_exact_match_forgives_form_and_never_meaning(answer, reference, is_right):
    assert exact_match(answer, reference) is is_right


@pytest.mark.parametrize(
    ("answer", "reference", "is_right"),
    [
        ("He had 12 and gave 5 away, so 7 are left.", "12 - 5 = 7\n#### 7", True),
        ("It is 1,250.", "1250", True), ("1 000 000 people", "1000000", True), ("#### 1,234", "1234", True),
        ("$3.50", "3.5", True), ("It costs 3,5 euros.", "3.5", True), ("3/4", "0.75", True), ("1 1/2", "1.5", True),
        (r"\boxed{\frac{3}{4}}", "3/4", True), ("\u22127", "-7", True), ("10 - 5 = 5", "5", True), ("50%", "50", True),
        ("-5", "5", False), ("5", "-5", False), ("3.5", "35", False), ("none", "4", False), ("7 of 12", "7", False),
    ],
)  # fmt: skip
def test_the_number_scorer_compares_the_last_numbers(answer, reference, is_right):
    assert number_match(answer, reference) is is_right


@pytest.mark.parametrize(
    ("answer", "reference", "is_right"),
    [
        ("B", "B", True), ("(B)", "B", True), ("**B**", "B", True), ("b", "B", True), ("B. Lyon", "B", True),
        ("The correct answer is C.", "C", True), ("Answer: D", "D", True), ("It is (C), since A is wrong.", "C", True),
        ("The best option is B", "B. Lyon", True), ("Lyon", "B", False), ("A city in France.", "A", False),
        ("", "A", False),
    ],
)  # fmt: skip
def test_the_choice_scorer_compares_letters(answer, reference, is_right):
    assert choice_match(answer, reference) is is_right


@pytest.mark.parametrize(("scorer", "right"), [("exact", 0), ("number", 2), ("choice", 0)])
def test_a_set_names_its_scorer_and_none_is_guessed(scorer, right):
    task = PromptSet("sums", "task", ("a?", "b?"), references=("5 + 2 = 7\n#### 7", "#### 1,000"), scorer=scorer)
    result = judged(task, [Answer("That makes 7."), Answer("So 1000 in all.")], [PhraseJudge()])
    assert result.headline == Rate(right, 2) and list(result.verdicts) == [f"{scorer} match"]


def test_an_unknown_scorer_is_refused():
    with pytest.raises(ValueError, match="`scorer` must be one of exact, number, choice, got 'rouge'"):
        PromptSet("sums", "task", ("a?",), references=("1",), scorer="rouge")
