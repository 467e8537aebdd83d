"""What a message advises is done here, and works: each refusal with the remedies that it names."""

from __future__ import annotations

import pytest
import tiny
from remedies import app, artifacts, data, misfits, numbers, page, recipes, results, resuming, strategies, training
from remedies.elsewhere import CASES as OTHER_WORDS
from remedies.elsewhere import TESTS, UNDONE
from remedies.messages import ROOT, remedies, without
from remedies.room import room
from remedies.warnings import WARNINGS

TABLES = (
    data.DATA, training.METHODS, training.TRAINER, artifacts.ARTIFACTS, artifacts.ADAPTERS, results.EVALUATION,
    recipes.RECIPES, recipes.COMMANDS, app.APP, page.PAGE, resuming.RESUMING, misfits.MISFITS, numbers.NUMBERS,
    strategies.STRATEGIES,
)  # fmt: skip
CASES = {name: case for table in TABLES for name, case in table.items()}
# Those that train or start a command; the others read files and settings.
SLOW = {"a card without rates", *resuming.RESUMING, *training.METHODS, *training.TRAINER, *recipes.COMMANDS}
SLOW |= {*artifacts.ARTIFACTS, *WARNINGS, *numbers.NUMBERS, *page.JOBS, "a file that takes too long"}
assert len(CASES) == sum(map(len, TABLES)), "two cases have one name"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Paths of an aligned and an unaligned model, which no case changes."""
    return tiny.save_pair(tmp_path_factory.mktemp("pair"))


def marked(cases):
    return [pytest.param(case, marks=[pytest.mark.exhaustive] * (case in SLOW)) for case in cases]


@pytest.mark.slow
@pytest.mark.parametrize("case", marked(CASES))
def test_what_a_message_advises_works(case, pair, tmp_path):
    at = room(tmp_path, pair)
    refused, message, remedies = CASES[case]
    with pytest.raises((ValueError, TypeError, OSError, FloatingPointError), match=message):
        refused(at)
    for remedy in remedies:
        remedy(at)


@pytest.mark.parametrize("case", marked(WARNINGS))
def test_what_a_warning_advises_ends_it(case, pair, tmp_path, caplog):
    at = room(tmp_path, pair)
    warned, message, remedies = WARNINGS[case]
    warned(at)
    assert message in caplog.text
    for remedy in remedies:
        caplog.clear()
        remedy(at)
        assert message not in caplog.text


@pytest.mark.slow
def test_every_remedy_is_done_by_a_case_or_it_is_said_where_or_why_not():
    found, known = remedies(), {**CASES, **WARNINGS}
    named = {words: [text for text in found if words in text] for words in (*TESTS, *OTHER_WORDS, *UNDONE)}
    assert not [words for words, texts in named.items() if len(texts) != 1], "in no message, or in several"
    elsewhere = {text for texts in named.values() for text in texts}
    undone = without([message for _, message, _ in known.values()], [text for text in found if text not in elsewhere])
    assert not {found[text]: text for text in undone}, "needs a case in tests/remedies, or a place in `elsewhere`"
    assert set(OTHER_WORDS.values()) <= known.keys()
    for test in TESTS.values():
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text(), f"there is no {test}"
