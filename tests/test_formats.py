"""What columns mean, and what each format makes of a record; every expectation is written out by hand."""

from __future__ import annotations

import json

import pytest

from safe_trainer.data import ReadOptions, as_rows
from safe_trainer.data.formats import (
    FORMATS,
    BadRowError,
    columns_of,
    conversation_of,
    format_named,
    format_of,
    format_with,
)
from safe_trainer.data.labels import safety_label


def row_of(style, columns):
    return conversation_of(style, columns).rows()[-1]


def prompt_of(style, columns):
    return conversation_of(style, columns, answered=False).asked()


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def row(*prompt, answer):
    return {"prompt": list(prompt), "completion": [assistant(answer)]}


CHAT = [system("Be brief."), user("Hi"), assistant("Hello"), user("Bye"), assistant("Ciao")]
CHAT_ROW = row(*CHAT[:-1], answer="Ciao")
SHAREGPT = [
    {"from": role, "value": turn["content"]}
    for role, turn in zip(["system", "human", "gpt", "human", "gpt"], CHAT, strict=True)
]

EXAMPLES = [
    ("messages", {"messages": CHAT}, CHAT_ROW),
    ("messages", CHAT, CHAT_ROW),
    ("sharegpt", {"conversations": SHAREGPT, "tools": "[]"}, CHAT_ROW),
    ("sharegpt", {"conversations": SHAREGPT[1:], "system": "Be brief.", "tools": ""}, CHAT_ROW),
    ("sharegpt", {"conversations": CHAT}, CHAT_ROW),
    ("prompt-completion", {"prompt": CHAT[:-1], "completion": "Ciao", "system": "Be brief."}, CHAT_ROW),
    ("alpaca", {"instruction": "Add", "input": "1, 2", "output": "3"}, row(user("Add\n1, 2"), answer="3")),
    ("alpaca", {"instruction": "Add 1, 2", "input": "", "output": 3}, row(user("Add 1, 2"), answer="3")),
    ("alpaca", {"Instruction": "Add 1, 2", " OUTPUT": "3", "text": "x"}, row(user("Add 1, 2"), answer="3")),
    (
        "alpaca",
        {"instruction": "Bye", "output": "Ciao", "system": "Be brief.", "history": [["Hi", "Hello"]]},
        CHAT_ROW,
    ),
    (
        "dolly",
        {"instruction": "Who?", "context": "Ann sang.", "response": "Ann", "category": "qa"},
        row(user("Who?\nAnn sang."), answer="Ann"),
    ),
    (
        "beavertails",
        {"prompt": "Hi", "response": "Hello", "is_safe": True, "category": {"abuse": False}},
        row(user("Hi"), answer="Hello"),
    ),
    ("prompt-completion", {"prompt": "Hi", "completion": "Hello"}, row(user("Hi"), answer="Hello")),
    ("prompt-completion", {"prompt": CHAT[:-1], "completion": CHAT[-1:]}, CHAT_ROW),
    ("prompt-response", {"prompt": "Hi", "response": "Hello", "refusal": "No"}, row(user("Hi"), answer="Hello")),
    ("prompt-target", {"prompt": "Hi", "target": "Sure"}, row(user("Hi"), answer="Sure")),
    ("prompt-answer", {"prompt": "Hi", "answer": "Hello"}, row(user("Hi"), answer="Hello")),
    ("prompt-output", {"prompt": "Hi", "output": "Hello"}, row(user("Hi"), answer="Hello")),
    ("question-response", {"question": "Hi", "response": "Hello"}, row(user("Hi"), answer="Hello")),
    ("goal-target", {"goal": "Hi", "target": "Sure"}, row(user("Hi"), answer="Sure")),
    ("question-answer", {"question": "2 + 2?", "answer": "4"}, row(user("2 + 2?"), answer="4")),
    ("text", {"text": "Once upon a time", "meta": 1}, {"text": "Once upon a time"}),
    ("question-answer", {"question": "Who?", "context": "Ann.", "answer": "A"}, row(user("Who?\nAnn."), answer="A")),
    ("query-response", {"query": "Hi", "response": "Hello"}, row(user("Hi"), answer="Hello")),
    ("toxicchat", {"user_input": "Hi", "model_output": "Hello"}, row(user("Hi"), answer="Hello")),
    ("wildjailbreak", {"vanilla": "Hi", "adversarial": "", "completion": "No"}, row(user("Hi"), answer="No")),
    ("wildjailbreak", {"vanilla": "Hi", "adversarial": "Ho", "completion": "No"}, row(user("Ho"), answer="No")),
    (
        "multiple-choice",
        {"question": "2 + 2?", "choices": ["1", "4"], "answer": 1},
        row(user("2 + 2?\nA. 1\nB. 4"), answer="B"),
    ),
    (
        "multiple-choice",
        {"question": "2 + 2?", "choices": {"text": ["1", "4"], "label": ["A", "B"]}, "answerKey": "B"},
        row(user("2 + 2?\nA. 1\nB. 4"), answer="B"),
    ),
    (
        "options",
        {"question": "2 + 2?", "options": {"A": "1", "B": "4"}, "answer": "4"},
        row(user("2 + 2?\nA. 1\nB. 4"), answer="B"),
    ),
    (
        "options",
        {"question": "2 + 2?", "options": ["1", "4"], "answer": " b "},
        row(user("2 + 2?\nA. 1\nB. 4"), answer="B"),
    ),
    (
        "multiple-choice",
        {"question": "2 + 2?", "choices": ["1", "4"], "label": 1.0},
        row(user("2 + 2?\nA. 1\nB. 4"), answer="B"),
    ),
    (
        "multiple-choice",
        {"question": "2 + 2?", "choices": {"text": ["4", "1"], "label": ["1", "4"]}, "answerKey": "1"},
        row(user("2 + 2?\n1. 4\n4. 1"), answer="1"),
    ),
    ("headerless-pairs", {"1": "Hi", "2": "Hello"}, row(user("Hi"), answer="Hello")),
]


@pytest.mark.parametrize(("name", "record", "expected"), EXAMPLES)
def test_each_format_is_recognised_and_becomes_a_conversation(name, record, expected):
    columns = columns_of(record)
    style = format_of(columns)
    assert style is not None and style.name == name
    assert row_of(style, columns) == expected


@pytest.mark.parametrize(
    ("name", "record", "prompt", "answer"),
    [
        ("xstest", {"prompt": "Kill a process?", "type": "homonyms", "label": "safe"}, "Kill a process?", None),
        ("prompts", {"prompt": "Hi", "category": "greeting"}, "Hi", None),
        ("prompts", "Hi", "Hi", None),
        ("instructions", {"instruction": "Hi"}, "Hi", None),
        ("goals", {"goal": "Hi"}, "Hi", None),
        ("behaviors", {"Behavior": "Hi", "SemanticCategory": "x"}, "Hi", None),
        ("behaviors", {"Behavior": "Hi", "ContextString": "Text."}, "Text.\n\n---\n\nHi", None),
        ("questions", {"question": "Hi", "risk_area": "x"}, "Hi", None),
        ("forbidden_prompt", {"forbidden_prompt": "Hi", "source": "x"}, "Hi", None),
        ("prompt_text", {"prompt_text": "Hi", "hazard": "x"}, "Hi", None),
        ("request", {"Request": "Hi", "Harmfulness": "x"}, "Hi", None),
        ("adversarial", {"adversarial": "Hi", "data_type": "x"}, "Hi", None),
        ("turns", {"turns": ["Hi"], "prompt_style": "base"}, "Hi", None),
        ("headerless-prompts", {"1": "Hi"}, "Hi", None),
        ("question-answer", {"question": "2 + 2?", "answer": "4"}, "2 + 2?", "4"),
        ("alpaca", {"instruction": "Hi", "output": ""}, "Hi", None),
        ("messages", {"messages": [user("Hi")]}, "Hi", None),
        ("text", {"text": "Hi"}, "Hi", None),
    ],
)
def test_each_format_gives_a_prompt_to_ask(name, record, prompt, answer):
    columns = columns_of(record)
    style = format_of(columns)
    assert style is not None and style.name == name
    assert prompt_of(style, columns) == (prompt, answer, ())


def test_every_format_has_an_example_here():
    shown = {name for name, *_ in EXAMPLES}
    without_answers = {"xstest", "prompts", "instructions", "goals", "behaviors", "headerless-prompts", "questions"}
    without_answers |= {"forbidden_prompt", "prompt_text", "request", "adversarial", "turns"}
    assert shown | without_answers == {style.name for style in FORMATS}


def test_text_is_kept_to_the_last_space():
    record = {"instruction": " Judge:\n", "input": " fine ", "output": " positive\n"}
    assert row_of(format_named("alpaca"), record) == row(user(" Judge:\n\n fine "), answer=" positive\n")


def test_columns_that_a_user_names():
    style = format_with({"prompt": "Question", "answer": "Reply", "context": "Passage", "system": "Setup"})
    columns = columns_of({"question": "Who?", "reply": "Ann", "passage": "Ann sang.", "SETUP": "Be brief."})
    assert row_of(style, columns) == row(system("Be brief."), user("Who?\nAnn sang."), answer="Ann")


@pytest.mark.parametrize("columns", [{"answer": "b"}, {"prompt": "a", "completion": "b"}])
def test_columns_that_cannot_be_named_are_refused(columns):
    with pytest.raises(ValueError, match="`columns` must name `prompt`"):
        format_with(columns)


def test_unknown_format_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="must be one of messages, .*got 'alpacca'"):
        format_named("alpacca")


@pytest.mark.parametrize("columns", [{"a", "b"}, {"1", "2", "3"}, {"chosen", "rejected"}, set()])
def test_unknown_columns_are_in_no_format(columns):
    assert format_of(columns) is None


@pytest.mark.parametrize(
    ("name", "record", "kind", "found", "expected"),
    [
        ("alpaca", {"instruction": "Add"}, "other columns", "instruction", "instruction, output (alpaca)"),
        ("alpaca", {"instruction": "Add", "output": ["3"]}, "not a turn", "'3'", "`role`"),
        ("alpaca", {"instruction": "Add", "output": {"a": 1}}, "wrong type", '{"a": 1} in `output`', "text"),
        ("alpaca", {"instruction": "Add", "output": True}, "wrong type", "true in `output`", "text"),
        ("alpaca", {"instruction": "Add", "output": None}, "empty text", "turn 2, by the assistant", "text"),
        ("alpaca", {"instruction": " ", "output": "3"}, "empty text", "turn 1, by the user", "text"),
        ("alpaca", {"instruction": "A", "output": "b", "history": ["x"]}, "not a turn", "`history`", "pair"),
        ("messages", {"messages": "Hi"}, "wrong type", "'Hi' in `messages`", "list of turns"),
        ("messages", {"messages": []}, "no turns", "an empty list", "turns"),
        ("messages", {"messages": [user("Hi")]}, "no answer", "turns by user", "assistant's at the end"),
        ("messages", {"messages": [assistant("Hi")]}, "no answer", "turns by assistant", "a user's turn"),
        ("messages", {"messages": [{"role": "user"}]}, "not a turn", '{"role": "user"}', "`content`"),
        ("messages", {"messages": [{"role": "tool", "content": "x"}]}, "unknown role", "'tool'", "user or assistant"),
        ("sharegpt", {"conversations": None}, "wrong type", "null in `conversations`", "list of turns"),
        ("sharegpt", {"conversations": SHAREGPT, "tools": '[{"name": "f"}]'}, "tool calls", "name", "without tools"),
        ("text", {"text": "a\0b"}, "NUL", "'\\x00'", "without NUL"),
        ("text", {"text": "caf\udce9"}, "not UTF-8", "'\\udce9'", "latin-1"),
        ("xstest", {"prompt": "Hi", "type": "a", "label": "safe"}, "no answer", "turns by user", "at the end"),
    ],
)
def test_bad_rows_say_what_was_found_and_what_was_expected(name, record, kind, found, expected):
    with pytest.raises(BadRowError) as error:
        row_of(format_named(name), record)
    assert error.value.kind == kind
    assert found in error.value.found
    assert expected in error.value.expected
    str(error.value).encode()  # a message must itself be text that can be written


@pytest.mark.parametrize("value", [3, None, 1.5, True])
def test_what_has_no_columns_is_no_row(value):
    with pytest.raises(BadRowError, match="not a row"):
        columns_of(value)


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (CHAT, ("Bye", "Ciao", tuple(CHAT[:3]))),
        (CHAT[:-1], ("Bye", None, tuple(CHAT[:3]))),
        ([system("Be brief."), user("Hi")], ("Hi", None, (system("Be brief."),))),
    ],
)
def test_of_a_conversation_the_last_user_turn_is_asked_after_the_turns_before_it(turns, expected):
    assert prompt_of(format_named("messages"), {"messages": turns}) == expected


@pytest.mark.parametrize("turns", [[assistant("Hi")], [system("Be brief.")]])
def test_what_no_user_says_is_no_prompt(turns):
    with pytest.raises(BadRowError, match="not one prompt"):
        prompt_of(format_named("messages"), {"messages": turns})


# ---- nothing that changes what a row says is dropped without a word


@pytest.mark.parametrize(
    ("record", "kind", "found"),
    [
        ({"messages": CHAT[:3], "functions": [{"name": "f"}]}, "tool calls", "`functions`"),
        ({"messages": CHAT[:3], "tools": [{"name": "f"}]}, "tool calls", "`tools`"),
        (
            {"messages": [user("Hi"), {**assistant("Look"), "tool_calls": [{}]}]},
            "tool calls",
            "`tool_calls`",
        ),
        ({"messages": [user("Hi"), {**assistant("4"), "reasoning_content": "2+2"}]}, "dropped", "`reasoning_content`"),
        ({"messages": [user("Hi"), {**assistant("4"), "thinking": "2+2"}]}, "dropped", "`thinking`"),
        ({"messages": CHAT[:3], "images": ["a.png"]}, "dropped", "`images`"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, "dropped", "image"),
        ({"prompt": "Hi", "completion": "Hello", "input": "1, 2"}, "dropped", "`input`"),
        ({"instruction": "Hi", "output": "Hello", "context": "Noon."}, "dropped", "`context`"),
        ({"messages": CHAT, "system": "Be long."}, "two system turns", "Be long."),
        ({"prompt": CHAT[:-1], "completion": "Ciao", "system": "Be long."}, "two system turns", "Be long."),
        ({"question": "2 + 2?", "choices": ["3", "4"], "answer": -1}, "no such choice", "-1 in `answer`"),
        ({"question": "2 + 2?", "choices": ["3", "4"], "answer": "1"}, "no such choice", "'1' in `answer`"),
        ({"question": "2 + 2?", "choices": ["3", "4"], "answer": "E"}, "no such choice", "'E' in `answer`"),
        ({"messages": [user("Hi"), {**assistant("4"), "weight": 0.5}]}, "a weight in between", "0.5"),
        ({"messages": [user("Hi"), {**assistant("4"), "loss": False}]}, "no answer", "switched off"),
        (
            {"messages": [user("Hi"), {**assistant("4"), "train_detail": [{"train": False}]}]},
            "dropped",
            "train_detail",
        ),
        ({"messages": CHAT[:3], "loss_mask": [0, 0, 1]}, "avoid", "`loss_mask`"),
        ({"messages": CHAT[:3], "chat_template_kwargs": {"enable_thinking": False}}, "dropped", "kwargs"),
        ({"messages": [user("Hi"), {**assistant("Look"), "toolCalls": [{}]}]}, "tool calls", "`toolcalls`"),
        ({"messages": CHAT[:3], "Available tools": [{"name": "f"}]}, "tool calls", "`available tools`"),
        ({"messages": [user("Hi"), {**assistant("4"), "reasoningContent": "2+2"}]}, "dropped", "`reasoningcontent`"),
        ({"prompt": "Hi", "completion": "Hello", "system_message": "Be rude."}, "dropped", "`system_message`"),
        ({"prompt": "Hi", "completion": "Hello", "System Prompt": "Be rude."}, "dropped", "`system prompt`"),
        ({"question": "Who?", "passage": "Ann came.", "answer": "Ann"}, "dropped", "`passage`"),
        ({"question": "2 + 2?", "answer": "B", "option_a": "3", "option_b": "4"}, "dropped", "`option_a`"),
        ({"question": "2 + 2?", "answer": "B", "A": "3", "B": "4"}, "dropped", "`a`"),
        ({"prompt": "Hi", "completion": "nan"}, "empty text", "turn 2"),
        ({"prompt": "Hi", "completion": float("inf")}, "empty text", "turn 2"),
        ({"prompt": "Hi", "completion": "\u200b\ufeff"}, "empty text", "turn 2"),
        ({"text": CHAT[:3]}, "wrong type", "turns in `text`"),
        ({"text": json.dumps(CHAT[:3])}, "wrong type", "turns in `text`"),
        ({"prompt": str(CHAT[1:2]), "completion": "Hello"}, "no JSON", "'role'"),
        ({"messages": [user("Hi"), {**assistant("4"), "train": False}]}, "no answer", "switched off"),
        ({"Prompt": "Hi", "prompt": "Ho", "completion": "Hello"}, "a column twice", "Prompt, prompt"),
    ],
)
def test_what_would_be_lost_is_refused_by_its_name(record, kind, found):
    with pytest.raises(BadRowError) as error:
        columns = columns_of(record)
        row_of(format_of(columns), columns)
    assert kind in error.value.kind and found in error.value.found


PREFERENCES = [
    {"prompt": "Hi", "chosen": "Hello", "rejected": "No"},
    {"prompt": "Hi", "chosen": CHAT[1:3], "rejected": CHAT[1:3]},
    {"prompt": CHAT[1:2], "chosen": CHAT[2:3], "rejected": CHAT[2:3]},
    {"prompt": CHAT[1:2], "chosen": CHAT[1:3], "rejected": CHAT[1:3]},
    {"messages": CHAT[1:3], "prompt": "Hi", "chosen": CHAT[1:3], "rejected": CHAT[1:3]},
]


@pytest.mark.parametrize("record", PREFERENCES)
def test_a_preference_is_refused_until_it_is_said_which_answer_is_learned(record):
    columns = columns_of(record)
    with pytest.raises(BadRowError, match="a preference.*`chosen` and `rejected`.*'answer': 'chosen'"):
        row_of(format_of(columns), columns)
    assert row_of(format_with({"prompt": "prompt", "answer": "chosen"}), columns) == row(user("Hi"), answer="Hello")
    assert prompt_of(format_of(columns), columns).prompt == "Hi"


def test_a_preference_between_conversations_is_refused_until_one_of_them_is_chosen():
    rows = [{"chosen": CHAT[1:3], "rejected": CHAT[1:3]}]
    with pytest.raises(ValueError, match="a preference.*`chosen` and `rejected`.*columns={'prompt': 'chosen'}"):
        as_rows(rows)
    learned, _ = as_rows(rows, options=ReadOptions(columns={"prompt": "chosen"}))
    assert learned.to_list() == [row(user("Hi"), answer="Hello")]


@pytest.mark.parametrize(
    ("mark", "wanted"),
    [({"weight": 0}, 1), ({"sample_weight": 0.0}, 1), ({"train": "false"}, True), ({"kto_tag": False}, True)],
)
def test_a_row_that_is_not_to_be_learned_is_refused_until_where_chooses(mark, wanted):
    name = next(iter(mark))
    rows = [{"prompt": "Hi", "completion": "No"} | mark, {"prompt": "Hi", "completion": "Hello", name: wanted}]
    with pytest.raises(ValueError, match=f"an answer to avoid.*`{name}`.*where={{'{name}': {wanted}}}"):
        as_rows(rows)
    learned, report = as_rows(rows, options=ReadOptions(where={name: wanted}))
    assert learned.to_list() == [row(user("Hi"), answer="Hello")] and report.filtered == 1


@pytest.mark.parametrize(
    "turns", [json.dumps(CHAT[:2]), json.dumps(CHAT[:2], indent=1), f" [ {json.dumps(CHAT[1])} ]"]
)
def test_turns_that_a_table_keeps_as_json_are_turns_however_they_are_written(turns):
    learned, _ = as_rows([{"prompt": turns, "completion": "Hello"}])
    assert learned[0]["prompt"][-1] == user("Hi")


@pytest.mark.parametrize("false", [False, "False"])
def test_an_answer_to_avoid_is_refused_until_it_is_said_that_it_is_learned(false):
    columns = columns_of({"prompt": "Hi", "completion": "No", "label": false})
    with pytest.raises(BadRowError, match="an answer to avoid.*`label`.*where={'label': True}"):
        row_of(format_of(columns), columns)
    assert row_of(format_with({"prompt": "prompt", "answer": "completion"}), columns) == row(user("Hi"), answer="No")


@pytest.mark.parametrize("nothing", [None, "", [], {}, float("nan"), "[]", False])
def test_columns_with_nothing_in_them_lose_nothing(nothing):
    columns = columns_of(
        {"prompt": "Hi", "completion": "Hello", "input": nothing, "tools": nothing, "images": nothing}
    )
    assert row_of(format_of(columns), columns) == row(user("Hi"), answer="Hello")


def test_columns_that_are_not_used_are_known():
    columns = columns_of({"messages": [{**user("Hi"), "name": "Ann"}, assistant("Hello")], "id": 7, "is_safe": True})
    assert conversation_of(format_of(columns), columns).unused == ["id", "messages[].name"]


def test_each_answer_can_be_a_row():
    found = conversation_of(format_named("messages"), {"messages": CHAT})
    assert found.rows() == [CHAT_ROW]
    assert found.rows("all") == [row(*CHAT[:2], answer="Hello"), CHAT_ROW]


@pytest.mark.parametrize(
    "mark",
    [{"weight": 0}, {"train": False}, {"loss": False}, {"loss_mask": 0}, {"trainable": "false"}, {"training": 0.0}]
    + [{"masked": True}],
)
def test_marks_of_turns_say_which_answers_are_learned(mark):
    turns = [user("a"), assistant("b") | mark, user("c"), assistant("d"), user("e"), assistant("f")]
    rows = conversation_of(format_named("messages"), {"messages": turns}).rows()
    assert [found["completion"][0]["content"] for found in rows] == ["d", "f"]
    assert rows[0]["prompt"] == [user("a"), assistant("b"), user("c")]


def test_answers_within_a_prompt_are_context():
    found = conversation_of(format_named("prompt-completion"), {"prompt": CHAT[:-1], "completion": CHAT[-1:]})
    assert found.rows("all") == [CHAT_ROW]


@pytest.mark.parametrize(
    ("record", "label"),
    [
        ({"is_safe": True}, True),
        ({"is_safe": "False"}, False),
        ({"is_harmful": 1}, False),
        ({"label": "unsafe"}, False),
        ({"label": 1}, None),
        ({"response_refusal_label": "refusal"}, True),
        ({"response_harm_label": "unharmful"}, True),
        ({"response_harm_label": "harmful", "response_refusal_label": "compliance"}, False),
        ({"is_response_safe": "yes"}, True),
        ({"isSafe": True}, True),
        ({"refused": True}, True),
        ({"unsafe": 0}, True),
        ({"safety_label": "not safe"}, False),
        ({"label": "non-toxic"}, True),
        ({"classification": "unsafe"}, False),
        ({"label": "nonharmful"}, True),
        ({"harm": True}, False),
        ({"flagged": True}, False),
        ({"contains_harm": "f"}, True),
        ({"label": "safe/unsafe"}, None),
        ({"label": "not harmful"}, True),
        ({"toxicity": 0}, True),
        ({"toxicity": 0.31}, None),
        ({"final_label": "2_full_refusal"}, True),
        ({"data_type": "vanilla_benign"}, True),
        ({"data_type": "vanilla_harmful"}, None),  # of the prompt, which may have been refused
        ({"prompt_label": "safe", "response_label": "unsafe"}, False),
        ({"prompt_label": "unsafe", "response_label": "safe"}, True),
        ({"user_input": "Hi", "toxicity": 1}, None),
        ({"prompt_harm_label": "unharmful"}, True),
        ({"prompt_harm_label": "harmful"}, None),
        ({"safe": "Keep it in a safe place, and close the door."}, None),
        ({"answer": "Refused."}, None),
        ({"category": {"fraud": False, "abuse": True}}, False),
        ({"category": "fraud"}, None),
        ({}, None),
    ],
)
def test_labels_of_answers_are_understood(record, label):
    assert safety_label(columns_of(record)) is label


def test_values_of_any_kind_in_memory_are_content_or_none():
    np = pytest.importorskip("numpy")
    columns = columns_of(
        {"prompt": "Hi", "completion": "Hello", "vector": np.ones(3), "none": np.float32("nan"), "n": 0}
    )
    found = conversation_of(format_of(columns), columns)
    assert found.rows() == [row(user("Hi"), answer="Hello")] and found.unused == ["vector", "n"]
