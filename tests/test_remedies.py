"""What a message advises is done here, and works: each refusal with the remedies that it names."""

from __future__ import annotations

import pytest
import tiny
from remedies import app, artifacts, data, misfits, recipes, results, resuming, training
from remedies.room import room
from remedies.warnings import WARNINGS

TABLES = (
    data.DATA, training.METHODS, training.TRAINER, artifacts.ARTIFACTS, artifacts.ADAPTERS, results.EVALUATION,
    recipes.RECIPES, recipes.COMMANDS, app.APP, resuming.RESUMING, misfits.MISFITS,
)  # fmt: skip
CASES = {name: case for table in TABLES for name, case in table.items()}
# Those that train or start a command; the others read files and settings.
SLOW = {"a card without rates", *resuming.RESUMING, *training.METHODS, *training.TRAINER, *recipes.COMMANDS}
SLOW |= {*artifacts.ARTIFACTS, *WARNINGS}
assert len(CASES) == sum(map(len, TABLES)), "two cases have one name"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Paths of an aligned and an unaligned model, which no case changes."""
    return tiny.save_pair(tmp_path_factory.mktemp("pair"))


def marked(cases):
    return [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in cases]


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
