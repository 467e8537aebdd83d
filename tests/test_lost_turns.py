"""A chat template that leaves out a turn is reported: of rows that encode to tokens, and of those given to TRL."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import tiny
from datasets import Dataset
from runs import given

from safe_trainer import SafeSFTTrainer
from safe_trainer.data import OTHER_TEMPLATE, conversation
from safe_trainer.data.encoding import encode_rows, lost_turn
from safe_trainer.methods.base import SafetyMethod

NO_SYSTEM = tiny.TEMPLATE.replace("{% else %}<u>", "{% elif m.role == 'user' %}<u>")
LAST_ANSWER = tiny.TEMPLATE.replace(
    "{% if m.role == 'assistant' %}",
    "{% if m.role == 'assistant' and not loop.last %}{% elif m.role == 'assistant' %}",
)
NO_THOUGHTS = tiny.TEMPLATE.replace("{{ m.content }}<e>", "{{ m.content.split('</think>')[-1] }}<e>")
SYSTEM = {"role": "system", "content": "Be brief."}


def talk(n: int, *answers: str, system: bool = False) -> list[dict[str, str]]:
    said = [turn for k, answer in enumerate(answers) for turn in turns(f"Say {n}, part {k}.", answer)]
    return [SYSTEM, *said] if system else said


def turns(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def split(messages: list[dict[str, str]]) -> dict[str, Any]:
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def sharegpt(messages: list[dict[str, str]]) -> dict[str, Any]:
    return {"conversations": [{"from": turn["role"], "value": turn["content"]} for turn in messages]}


FORMS = {"prompt-completion": split, "messages": lambda found: {"messages": found}, "sharegpt": sharegpt}


def with_template(template: str) -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def warned(caplog: Any, tmp_path: Any, rows: Any, template: str, safety: Any, **more: Any) -> str:
    caplog.clear()
    changes = {"train_dataset": rows, "processing_class": with_template(template), **more}
    SafeSFTTrainer(**given(tmp_path, **changes), safety=safety)
    return next((record.getMessage() for record in caplog.records if OTHER_TEMPLATE in record.getMessage()), "")


@pytest.mark.parametrize("form", FORMS)
def test_a_turn_that_the_template_leaves_out_of_training_rows_is_counted(form, tmp_path, caplog):
    found = [talk(n, "One.", system=n >= 6) for n in range(8)]
    rows = Dataset.from_list([FORMS[form](messages) for messages in found])
    message = warned(caplog, tmp_path, rows, NO_SYSTEM, SafetyMethod())
    assert "`train_dataset`" in message and "2 of 8 rows, first of row 7 (system)" in message
    assert "another chat template" in message
    assert not warned(caplog, tmp_path, rows, tiny.TEMPLATE, SafetyMethod())  # as it advises
    assert not warned(caplog, tmp_path, rows, NO_SYSTEM, None)  # which costs what TRL costs


@pytest.mark.parametrize("form", FORMS)
def test_earlier_answers_may_lose_their_thoughts_but_not_themselves(form, tmp_path, caplog):
    several = [talk(n, "<think>Of what?</think>\n\nOne, surely.", "Two of them.") for n in range(4)]
    rows = Dataset.from_list([FORMS[form](messages) for messages in several])
    assert "4 of 4 rows, first of row 1 (assistant)" in warned(caplog, tmp_path, rows, LAST_ANSWER, SafetyMethod())
    assert not warned(caplog, tmp_path, rows, NO_THOUGHTS, SafetyMethod())
    last = Dataset.from_list([FORMS[form](talk(n, "<think>Of what?</think>\n\nOne, surely.")) for n in range(4)])
    assert "4 of 4 rows" in warned(
        caplog, tmp_path, last, NO_THOUGHTS, SafetyMethod()
    )  # thoughts that are to be learned


def test_reasoning_and_repeated_turns_that_are_left_out_are_found():
    reasoned = [
        {**turn, "reasoning_content": "Of what?" if turn["role"] == "assistant" else None} for turn in talk(1, "A")
    ]
    assert lost_turn(tiny.tokenizer(), {"messages": reasoned}) == "assistant"
    first = "{{ messages[0].content }}<a>{{ messages[1].content }}<e>"  # of two exchanges alike, only one is written
    assert lost_turn(with_template(first), {"messages": turns("Say it.", "No.") * 2}) == "user"
    assert not lost_turn(tiny.tokenizer(), {"messages": turns("Say it.", "No.") * 2})
    parts = [{"role": "user", "content": [{"type": "text", "text": "Say it."}]}, *turns("", "No.")[1:]]
    joined = tiny.TEMPLATE.replace("<u>{{ m.content }}", "<u>{{ m.content[0].text }}")
    assert not lost_turn(with_template(joined), {"messages": parts})


def test_rows_are_looked_at_with_their_own_template_options(tmp_path, caplog):
    switched = tiny.TEMPLATE.replace("{% else %}<u>", "{% elif m.role == 'user' or keep %}<u>")
    rows = [split(talk(n, "One.", system=True)) | {"chat_template_kwargs": {"keep": n > 0}} for n in range(4)]
    assert "1 of 4 rows, first of row 1" in warned(caplog, tmp_path, Dataset.from_list(rows), switched, SafetyMethod())


def test_of_many_rows_a_sample_is_looked_at_and_said_so(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("safe_trainer.data.encoding._SAMPLE", 4)
    rows = Dataset.from_list([split(talk(n, "One.", system=True)) for n in range(8)])
    assert "4 of 4 rows looked at" in warned(caplog, tmp_path, rows, NO_SYSTEM, SafetyMethod())


def test_of_a_stream_the_first_rows_are_looked_at(tmp_path, caplog):
    rows = Dataset.from_list([split(talk(n, "One.", system=n > 1)) | {"is_safe": n > 2} for n in range(8)])
    message = warned(caplog, tmp_path, rows.to_iterable_dataset(), NO_SYSTEM, SafetyMethod())
    assert "6 of 8 rows looked at, first of row 3 (system)" in message
    assert "3 of 8 rows of `train_dataset` looked at are labelled harmful" in caplog.text


def test_texts_and_tokens_have_no_turns_to_lose(tmp_path, caplog):
    for rows in (Dataset.from_list([{"text": "One."}] * 4), Dataset.from_list([{"input_ids": [5, 6, 7]}] * 4)):
        assert not warned(caplog, tmp_path, rows, NO_SYSTEM, SafetyMethod())


def test_encoding_counts_earlier_answers_too(caplog):
    rows = [conversation("Say one.", "One."), split(talk(1, "One, surely.", "Two."))]
    with caplog.at_level(logging.WARNING):
        encode_rows(with_template(LAST_ANSWER), rows, name="safety_data")
    assert "1 of 2 rows, first of row 2 (assistant)" in caplog.text
