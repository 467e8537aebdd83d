"""What a message advises is done here, and works: each refusal with the remedies that it names."""

from __future__ import annotations

import pytest
import tiny
from remedies import artifacts, data, results, training
from remedies.room import room

TABLES = (data.DATA, training.METHODS, training.TRAINER, artifacts.ARTIFACTS, artifacts.ADAPTERS, results.EVALUATION)
CASES = {name: case for table in TABLES for name, case in table.items()}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Paths of an aligned and an unaligned model, which no case changes."""
    return tiny.save_pair(tmp_path_factory.mktemp("pair"))


@pytest.mark.parametrize("case", CASES)
def test_what_a_message_advises_works(case, pair, tmp_path):
    at = room(tmp_path, pair)
    refused, message, remedies = CASES[case]
    with pytest.raises((ValueError, TypeError, OSError), match=message):
        refused(at)
    for remedy in remedies:
        remedy(at)
