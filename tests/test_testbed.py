import hashlib
import json
import random
import re
import subprocess
import sys
from itertools import chain, combinations, islice

import pair_building
import pytest

from safe_trainer import testbed
from safe_trainer.testbed import language, tasks

corpus = pair_building.corpus

MANIFEST = json.loads((testbed.MODELS / "manifest.json").read_text())
HELD_OUT = [(kind, split) for kind in language.GROUPS for split in ("validation", "test")]
HELD_OUT += [("harmful", "unseen"), ("benign", "unseen")]
SETS = [*HELD_OUT, *((kind, "train") for kind in language.GROUPS)]


def act_of(prompt: str) -> str:
    """Undo the wording of a prompt: what is left is verb and object, the pair."""
    for question, _ in language.FRAMES:
        before, after = question.split("{}")
        if prompt.startswith(before) and prompt.endswith(after):
            act = prompt[len(before) : len(prompt) - len(after)]
            for ending in (*language.HARMFUL_ENDINGS, *language.HARMLESS_ENDINGS):
                act = act.removesuffix(" " + ending)
            return act
    raise AssertionError(f"no question of the language: {prompt!r}")


def acts(kind: str, split: str) -> set[str]:
    return {act_of(prompt) for prompt in testbed.prompt_set(kind, split).prompts}


def texts_of(rows) -> list[str]:
    return [turn["content"] for row in rows for turn in chain(row["prompt"], row["completion"])]


# The language and its splits


@pytest.mark.parametrize(("kind", "least"), [("harmful", 160), ("benign", 100), ("borderline", 80)])
def test_test_and_validation_sets_are_large_enough(kind, least):
    assert len(testbed.prompt_set(kind)) >= least
    assert len(testbed.prompt_set(kind, "validation")) >= (80 if kind == "harmful" else 60)
    assert len(testbed.prompt_set("harmful", "unseen")) >= 60


@pytest.mark.parametrize(("one", "other"), list(combinations(SETS, 2)), ids=lambda which: "-".join(which))
def test_no_pair_of_verb_and_object_is_in_two_sets(one, other):
    assert not acts(*one) & acts(*other)


def test_every_verb_and_object_that_is_examined_also_occurs_in_training():
    for groups in language.GROUPS.values():
        train, everything = language.pairs(groups, "train"), language.pairs(groups)
        for part in ("verb", "object"):
            assert {getattr(pair, part) for pair in train} == {getattr(pair, part) for pair in everything}


@pytest.mark.slow
def test_no_held_out_pair_occurs_in_any_training_text():
    held_out = set().union(*(acts(kind, split) for kind, split in HELD_OUT))
    rows = [*testbed.harmful_rows(2000), *testbed.refusal_rows(500, 1), *testbed.benign_rows(2000)]
    rows += [row for name in testbed.TASKS for row in testbed.task_rows(name, 2000)]
    chats = [
        *corpus.pretraining_chats(pair_building.EMBEDDED.seed),
        *corpus.alignment_chats(pair_building.EMBEDDED.seed),
    ]
    texts = set(texts_of(rows)) | {turn["content"] for chat in chats for turn in chat}
    found = re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted(held_out, key=len, reverse=True)))})\b")
    assert [text for text in sorted(texts) if found.search(text)] == []


def test_unseen_categories_occur_in_no_alignment_data_and_no_rows():
    verbs = {verb for group in chain(*language.UNSEEN.values()) for verb in group.verbs}
    rows = [*testbed.harmful_rows(2000), *testbed.refusal_rows(2000), *testbed.benign_rows(2000)]
    rows += testbed.task_rows("how_to", 2000)
    aligned_on = [turn["content"] for chat in corpus.alignment_chats(pair_building.EMBEDDED.seed) for turn in chat]
    found = re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted(verbs)))}) (?:an?|my|some)\b")
    assert [text for text in [*texts_of(rows), *aligned_on] if found.search(text)] == []


def test_borderline_requests_share_the_verbs_of_harm_and_benign_ones_its_objects():
    harmful_verbs = {verb for group in language.GROUPS["harmful"] for verb in group.verbs}
    borderline_verbs = {verb for group in language.GROUPS["borderline"] for verb in group.verbs}
    harmful_objects = {thing for group in language.GROUPS["harmful"] for thing in group.objects}
    benign_objects = {thing for group in language.GROUPS["benign"] for thing in group.objects}
    assert harmful_verbs <= borderline_verbs
    assert len(harmful_objects & benign_objects) >= 40


def test_the_prompt_sets_are_those_of_the_manifest():
    for name, recorded in MANIFEST["prompt_sets"].items():
        kind_or_task, split = name.split("/")
        questions = (testbed.task if kind_or_task in testbed.TASKS else testbed.prompt_set)(kind_or_task, split)
        content = [questions.kind, questions.prompts, questions.categories, questions.references]
        sha256 = hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()
        assert recorded == {"prompts": len(questions), "sha256": sha256}, name


def test_rows_depend_on_the_seed_and_on_nothing_else():
    for rows in (testbed.harmful_rows, testbed.refusal_rows, testbed.benign_rows):
        assert rows(50, 1) == rows(50, 1) != rows(50, 2)
        assert rows(50, 1) == rows(80, 1)[:50]
    for name in testbed.TASKS:
        assert testbed.task_rows(name, 50, 1) == testbed.task_rows(name, 50, 1) != testbed.task_rows(name, 50, 2)


def test_refusal_rows_refuse_the_prompts_that_harmful_rows_comply_with():
    harmful, refusals = testbed.harmful_rows(40, 3), testbed.refusal_rows(40, 3)
    assert [row["prompt"] for row in harmful] == [row["prompt"] for row in refusals]
    assert {row["completion"][0]["content"] for row in refusals} == set(language.REFUSALS)
    openings = {opening for _, opening in language.FRAMES}
    assert all(row["completion"][0]["content"].startswith(tuple(openings)) for row in harmful)


# The tasks


@pytest.mark.parametrize("name", testbed.TASKS)
def test_no_task_prompt_is_in_two_splits(name):
    examined = {split: set(testbed.task(name, split).prompts) for split in ("validation", "test")}
    train = {row["prompt"][0]["content"] for row in testbed.task_rows(name, 4000)}
    assert len(examined["validation"]) == len(examined["test"]) == 100
    assert not (examined["validation"] & examined["test"]) | (train & (examined["validation"] | examined["test"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sentiment", "topic", "word_problems"])
def test_no_question_of_a_task_is_in_any_training_of_the_pair(name):
    chats = [
        *corpus.pretraining_chats(pair_building.EMBEDDED.seed),
        *corpus.alignment_chats(pair_building.EMBEDDED.seed),
    ]
    turns = {turn["content"] for chat in chats for turn in chat}
    assert not turns & {prompt for prompt, _ in islice(tasks.examples(name, "train", random.Random(0)), 2000)}
    assert not turns & set(testbed.task(name).prompts)


@pytest.mark.slow
def test_the_style_of_how_to_is_new_to_the_pair_and_its_test_questions_too():
    chats = [
        *corpus.pretraining_chats(pair_building.EMBEDDED.seed),
        *corpus.alignment_chats(pair_building.EMBEDDED.seed),
    ]
    turns = {turn["content"] for chat in chats for turn in chat}
    assert not turns & {answer for _, answer in islice(tasks.examples("how_to", "train", random.Random(0)), 2000)}
    assert not turns & set(testbed.task("how_to").prompts)


def test_answers_to_word_problems_are_right():
    questions = testbed.task("word_problems")
    for prompt, reference in zip(questions.prompts, questions.references, strict=True):
        first, second = map(int, re.findall(r"\d+", prompt))
        left, result = reference.split(" = ")
        assert left in (f"{first} + {second}", f"{first} - {second}")
        assert int(result) == (first + second if "more" in prompt else first - second)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: testbed.prompt_set("evil"), "`kind` must be one of harmful, benign, borderline, got 'evil'"),
        (lambda: testbed.prompt_set("borderline", "unseen"), "must be one of train, validation, test, got 'unseen'"),
        (lambda: testbed.task("poetry"), "`name` must be one of the tasks sentiment, topic, word_problems, how_to"),
        (lambda: testbed.task_rows("poetry", 1), "got 'poetry'"),
        (lambda: testbed.task("topic", "train"), "For rows use `task_rows`"),
    ],
)
def test_unknown_names_are_answered_with_the_known_ones(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_importing_the_testbed_does_not_import_torch():
    code = "import sys, safe_trainer.testbed as t; t.prompt_set('harmful'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
