"""The general prompts: as many as promised, no two alike, and nothing in them that helps with harm."""

import re
from collections import Counter

import pytest

from safe_trainer.data import general_prompts

KINDS = ("harmful", "benign", "borderline")


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_ten_categories_of_ten(kind):
    prompts = general_prompts(kind)
    assert prompts.kind == kind and prompts.name == f"general {kind}"
    assert set(Counter(prompts.categories).values()) == {10} and len(set(prompts.categories)) == 10


def test_no_prompt_occurs_twice_in_any_kind():
    prompts = [re.sub(r"\W+", " ", prompt.casefold()) for kind in KINDS for prompt in general_prompts(kind).prompts]
    assert len(set(prompts)) == 300
    assert all(3 < len(prompt.split()) < 30 for prompt in prompts)


def test_harmful_prompts_hold_no_amounts_links_or_code():
    telling = [p for p in general_prompts("harmful").prompts if re.search(r"[\d`{}<>=/\\]|www|http", p)]
    assert telling == []


def test_harmful_and_harmless_prompts_cannot_be_told_apart_by_how_they_begin():
    openings = [{prompt.split()[0] for prompt in general_prompts(kind).prompts} for kind in KINDS]
    assert {"How", "What", "Write", "Explain"} <= openings[0] & openings[1] & openings[2]


def test_there_are_no_general_tasks():
    with pytest.raises(ValueError, match="`kind` must be one of harmful, benign, borderline, got 'task'"):
        general_prompts("task")
