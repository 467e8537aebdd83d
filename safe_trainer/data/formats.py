"""What columns mean: the formats in which people keep conversations and prompts, each recognized by its column names.

A format turns a record into turns; what makes these a row to learn from, or a prompt to ask, is the same for all.
Nothing that changes what a row says is dropped without a word: it is used, refused by name, or reported.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal, NamedTuple

from .labels import FLAGS, safety_label
from .parsing import BadRowError, shortened

Row = dict[str, Any]
Message = dict[str, str]
Columns = Mapping[str, Any]
Answers = Literal["last", "all"]

_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot"), "assistant"),
}
_VISIBLE = re.compile(r"[^\s\u200b-\u200f\u2060\ufeff]")
_UNUSABLE = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of a character: bytes that do not decode come as these
# What changes the meaning of a row or of a turn, and must not be dropped where a format has no use for it, by its
# letters alone: people write `tool_calls`, `toolCalls` and `Tool calls`.
_TOOLS = re.compile(r"(available)?(tool|function)s?(calls?|choice)?")
_MEANING = re.compile(
    r"images?(paths?|urls?)?|videos?|audios?|files|attachments|reasoning(content|details)?|thinking|thoughts?|"
    r"(choice|option|candidate|ending)s?[a-j]?|"
    r"contexts?|input|history|documents?|passages?|paragraphs?|articles?|system(prompt|message|instructions?)?|"
    r"chattemplatekwargs|traindetail"
)
# How a turn says whether it is to be learned, and what says yes. A row may say it too, as in KTO's rows.
_LEARNED = dict.fromkeys("weight train training trainable loss loss_mask".split(), True) | {"masked": False}
_ROW_LEARNED = "label kto_tag desirable train training trainable weight sample_weight loss_mask".split()
_NO_VALUE = ("nan", "NaN", "<NA>", "NaT")  # as pandas writes empty cells that have become text
_TURNS = re.compile(
    r"""\s*\[\s*\{(?=.*["'](?:role|from)["']\s*:)(?=.*["'](?:content|value)["']\s*:).*\}\s*\]\s*""", re.DOTALL
)


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation."""

    role: str
    content: str
    learned: bool | None = None  # whether the file asks for it to be learned (`weight`, `train`), if it says so
    context: bool = False  # whether it belongs to a prompt, so that it is no answer to learn
    unused: tuple[str, ...] = ()

    @property
    def message(self) -> Message:
        """As chat templates take it."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class Format:
    """One way to keep conversations or prompts in columns: `turns` makes turns of a record, the answer last.

    It needs `columns`, in lower case, takes those that it `uses` where they are there, and with `alone` no others.
    With `whole` a record is one text, learned from beginning to end.
    """

    name: str
    columns: tuple[str, ...]
    turns: Callable[[Columns], list[Turn]]
    uses: tuple[str, ...] = ()
    whole: bool = False
    alone: bool = False


class Asked(NamedTuple):
    """A prompt to examine a model with, the answer in the file if there is one, and the turns before the prompt."""

    prompt: str
    answer: str | None = None
    before: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """What one record says."""

    turns: list[Turn]
    whole: bool
    unused: list[str]  # columns with content that no format has a use for

    @property
    def answers(self) -> list[Turn]:
        """The assistant's turns that could be learned."""
        return [turn for turn in self.turns if turn.role == "assistant" and not turn.context]

    def rows(self, answers: Answers = "last") -> list[Row]:
        """Return a row for each answer that is learned, with all turns before it as its prompt."""
        if self.whole:
            return [{"text": self.turns[0].content}]
        roles = [turn.role for turn in self.turns]
        if roles[-1] != "assistant" or "user" not in roles:
            others = f"; not used: {', '.join(self.unused)}" if self.unused else ""
            raise BadRowError(
                "no answer",
                f"turns by {', '.join(roles)}{others}",
                "a user's turn, and the assistant's at the end, or the answer's column in `columns`",
            )
        answered = (place for place, role in enumerate(roles) if role == "assistant" and "user" in roles[:place])
        places = [place for place in answered if not self.turns[place].context]
        if any(turn.learned is not None for turn in self.answers):
            places = [place for place in places if self.turns[place].learned is not False]
        elif answers == "last":
            places = places[-1:]
        if not places:
            raise BadRowError("no answer", "answers that are all switched off", "one whose `weight` is not 0")
        messages = [turn.message for turn in self.turns]
        return [{"prompt": messages[:place], "completion": [messages[place]]} for place in places]

    def asked(self) -> Asked:
        """Return the prompt to examine a model with: the user's last turn, after what was said before it."""
        turns = list(self.turns)
        answer = turns.pop().content if turns[-1].role == "assistant" else None
        if not turns or turns[-1].role != "user":
            roles = ", ".join(turn.role for turn in turns)
            raise BadRowError("not one prompt", f"turns by {roles or 'nobody'}", "a turn by the user at the end")
        return Asked(turns[-1].content, answer or None, tuple(turn.message for turn in turns[:-1]))


def columns_of(value: Any) -> Columns:
    """Return a record's columns by lower-case name; a bare list is taken for turns, a bare text for a prompt."""
    if isinstance(value, Mapping):
        found = {str(key).strip().lower(): None if _is_nan(content) else content for key, content in value.items()}
        if len(found) < len(value):
            raise BadRowError("a column twice", ", ".join(map(str, value)), "names that differ not only in their case")
        return found
    if isinstance(value, list):
        return {"messages": value}
    if isinstance(value, str):
        return {"prompt": value}
    raise BadRowError("not a row", shortened(value), "an object with columns, a list of turns, or a text")


def format_of(columns: Iterable[str]) -> Format | None:
    """Return the first format that all its columns are there for, or `None`."""
    present = set(columns)
    for candidate in FORMATS:
        if present == set(candidate.columns) or (present > set(candidate.columns) and not candidate.alone):
            return candidate
    return None


def format_named(name: str) -> Format:
    """Return a format by its name."""
    named = {candidate.name: candidate for candidate in FORMATS}
    if name not in named:
        raise ValueError(f"`format` must be one of {', '.join(named)}, got {name!r}.")
    return named[name]


def format_with(columns: Mapping[str, str]) -> Format:
    """Return a format for the columns that a user names, as `ReadOptions.columns`."""
    unknown = set(columns) - {"prompt", "answer", "context", "system"}
    if unknown or "prompt" not in columns:
        raise ValueError(
            f"`columns` must name `prompt` and may name `answer`, `context` and `system`, got {sorted(columns)}. "
            "Write for example columns={'prompt': 'question', 'answer': 'reply'}."
        )
    names = {role: name.strip().lower() for role, name in columns.items()}
    style = _pair("columns", names["prompt"], names.get("answer", ""), names.get("context", ""))
    system = names.get("system", "system")
    return replace(
        style,
        columns=tuple(names.values()),
        turns=lambda found: style.turns({**found, "system": found.get(system)}),
    )


def conversation_of(style: Format, columns: Columns, *, answered: bool = True) -> Conversation:
    """Return what a record says, or raise [`BadRowError`]; unless `answered`, answers may be empty."""
    missing = [name for name in style.columns if name not in columns]
    if missing:
        raise BadRowError("other columns", ", ".join(columns) or "none", f"{', '.join(style.columns)} ({style.name})")
    if answered and style.name != "columns":
        check_no_preference(columns)
        _check_learned(columns)
    others = _unused(columns, (*style.columns, *style.uses, "", "unnamed: 0"))
    turns = style.turns(columns)
    if not turns:
        raise BadRowError("no turns", "an empty list", "turns by the user and the assistant")
    for number, turn in enumerate(turns, 1):
        found = _UNUSABLE.search(turn.content)
        if found:
            kind = "NUL" if found.group() == "\0" else "not UTF-8"
            hint = "text without NUL" if kind == "NUL" else "UTF-8; name another as `encoding`, often `latin-1`"
            raise BadRowError(kind, f"{ascii(found.group())} in {shortened(turn.content)!a}", hint)
        if not _VISIBLE.search(turn.content) and (answered or turn.role != "assistant"):
            raise BadRowError("empty text", f"nothing in turn {number}, by the {turn.role}", "text; `nan` is none")
    unused = [name for name in others if safety_label({name: columns[name]}) is None]
    inner = dict.fromkeys(f"{style.columns[0]}[].{name}" for turn in turns for name in turn.unused)
    return Conversation(turns, style.whole, [*unused, *inner])


def check_no_preference(columns: Columns) -> None:
    """Refuse rows that say which answer is better: of these, not every answer is one to learn."""
    if pair := [name for name in ("chosen", "rejected") if _has_content(columns.get(name))]:
        chosen = "'prompt': 'prompt', 'answer': 'chosen'" if "prompt" in columns else "'prompt': 'chosen'"
        hint = f"one answer to learn, as in `columns={{{chosen}}}`"
        raise BadRowError("a preference", " and ".join(f"`{name}`" for name in pair), hint)


def _check_learned(columns: Columns) -> None:
    """Refuse a row that is marked as one not to learn, as KTO's rows and tables with a flag or a weight do it."""
    for name in _ROW_LEARNED:
        if columns.get(name) is None:
            continue
        text = str(columns[name]).strip().lower()
        if text == "false" if name == "label" else FLAGS.get(text) is False or text.startswith("["):
            wanted = {name: 1 if text[0] == "0" else True}
            hint = (
                f"answers to learn: take those with `where={wanted}`, or name the `columns` if it says another thing"
            )
            raise BadRowError("an answer to avoid", f"`{name}`: {shortened(columns[name])}", hint)


def _has_content(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null")
    if isinstance(value, list | tuple | Mapping):
        return len(value) > 0
    return value is not None and value is not False and not _is_nan(value)


def _is_nan(value: Any) -> bool:
    return (
        value in _NO_VALUE
        if isinstance(value, str)
        else isinstance(value, Real) and (value != value or value in (math.inf, -math.inf))
    )


def _unused(columns: Columns, known: Iterable[str]) -> list[str]:
    """Return the other names with content, none of which changes the meaning."""
    names = [name for name, value in columns.items() if name not in known and _has_content(value)]
    for name in names:
        letters = re.sub(r"[^a-z]", "", name)
        if _TOOLS.fullmatch(letters):
            raise BadRowError("tool calls", f"`{name}`: {shortened(columns[name])}", "a conversation without tools")
        if _MEANING.fullmatch(letters) or (letters == "a" and "b" in names):
            hint = "a row without it, or `columns` that say where prompt, answer, context and system are"
            raise BadRowError("content that would be dropped", f"`{name}`: {shortened(columns[name])}", hint)
    return names


def _text(columns: Columns, name: str) -> str:
    value = columns.get(name)
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "" if _is_nan(value) else str(value)
    raise BadRowError("wrong type", f"{shortened(value)} in `{name}`", "text")


def _list(value: Any) -> Any:
    """Return turns as a list, also where a table keeps them as JSON."""
    if isinstance(value, str) and _TURNS.fullmatch(value):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError) as error:
            found, expected = f"{shortened(value)} ({error})", "JSON, as `json.dumps` writes it"
            raise BadRowError("turns that are no JSON", found, expected) from error
        return parsed
    return list(value) if isinstance(value, tuple) else value


def _message(turn: Any, context: bool = False) -> Turn:
    if not isinstance(turn, Mapping):
        raise BadRowError("not a turn", shortened(turn), "an object with `role` and text in `content`")
    found = {str(key).lower(): value for key, value in turn.items()}
    unused = tuple(_unused(found, ("role", "from", "content", "value", *_LEARNED)))
    role, content = found.get("role", found.get("from")), found.get("content", found.get("value"))
    if isinstance(content, list):
        content = "".join(_part(part) for part in content)
    if not isinstance(content, str):
        raise BadRowError("not a turn", shortened(turn), "an object with `role` and text in `content`")
    if str(role).lower() not in _ROLES:
        raise BadRowError("unknown role", shortened(role), "system, user or assistant")
    return Turn(_ROLES[str(role).lower()], content, _flag(found), context, unused)


def _part(part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise BadRowError("content that would be dropped", f"{shortened(part)} in `content`", "text alone")


def _flag(turn: Columns) -> bool | None:
    """Return whether a turn is to be learned, as OpenAI's `weight`, axolotl's `train` and others say it."""
    for name, learned in _LEARNED.items():
        value = turn.get(name)
        if value is not None:
            if (flag := FLAGS.get(str(value).strip().lower())) is None:
                raise BadRowError("a weight in between", f"`{name}`: {shortened(value)}", "0 or 1, false or true")
            return flag is learned
    return None


def _side(columns: Columns, name: str, role: str, context: str = "") -> list[Turn]:
    """Return what one side says: a text with its context after it, or turns that are messages already."""
    value = _list(columns.get(name))
    if isinstance(value, list):
        return [_message(turn, context=role == "user") for turn in value]
    parts = [_text(columns, name), _text(columns, context) if context else ""]
    return [Turn(role, "\n".join(part for part in parts if part))]


def _history(columns: Columns) -> list[Turn]:
    """Return the turns before the prompt that some Alpaca files keep, as pairs of question and answer."""
    turns = []
    for pair in _list(columns.get("history")) or ():
        if not isinstance(pair, list) or [type(side) for side in pair] != [str, str]:
            raise BadRowError("not a turn", f"{shortened(pair)} in `history`", "a pair of texts")
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    return turns


def _with_system(columns: Columns, turns: list[Turn]) -> list[Turn]:
    """Return turns after the system turn that a column holds, unless they begin with it."""
    name = "system" if _has_content(columns.get("system")) else "system_prompt"
    if not _has_content(columns.get(name)):
        return turns
    found = _side(columns, name, "system")
    if not turns or turns[0].role != "system":
        return found + turns
    if turns[0].content != found[0].content:
        raise BadRowError("two system turns", f"{shortened(found[0].content)} in `{name}`", "one of them")
    return turns


def _pair(name: str, prompt: str, answer: str = "", context: str = "context", **settings: Any) -> Format:
    def turns(columns: Columns) -> list[Turn]:
        found = _history(columns) + _side(columns, prompt, "user", context)
        if not answer:  # a conversation in the prompt's column ends with its answer
            return _with_system(columns, [replace(turn, context=False) for turn in found])
        said = _side(columns, answer, "assistant")
        if [turn.message for turn in said[: len(found)]] == [turn.message for turn in found]:
            said = said[len(found) :]  # conversations of preferences begin with their prompt
        return _with_system(columns, found + said)

    needed = (prompt, answer) if answer else (prompt,)
    return Format(name, needed, turns, (context, "history", "system", "system_prompt"), **settings)


def _chat(name: str, column: str) -> Format:
    def turns(columns: Columns) -> list[Turn]:
        found = _list(columns[column])
        if not isinstance(found, list):
            raise BadRowError("wrong type", f"{shortened(found)} in `{column}`", "a list of turns, or JSON of one")
        return _with_system(columns, [_message(turn) for turn in found])

    return Format(name, (column,), turns, ("system", "system_prompt"))


def _choices(columns: Columns) -> list[Turn]:
    """Return a question with lettered choices, and the letter of the right one."""
    name = "choices" if "choices" in columns else "options"
    found, answers = columns[name], (columns.get(key) for key in ("answerkey", "answer", "label"))
    answer = next((answer for answer in answers if answer is not None), None)
    if isinstance(found, Mapping) and "text" not in found:  # by letter
        found = {"text": list(found.values()), "label": list(found)}
    texts = found.get("text") if isinstance(found, Mapping) else found
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadRowError("wrong type", f"{shortened(columns[name])} in `{name}`", "a list of texts")
    letters = found["label"] if isinstance(found, Mapping) and "label" in found else [chr(65 + n) for n in range(26)]
    letters = list(map(str, letters[: len(texts)]))
    lines = [f"{letter}. {text}" for letter, text in zip(letters, texts, strict=False)]
    asked = _with_system(columns, [Turn("user", "\n".join([_text(columns, "question"), *lines]))])
    if answer is None:
        return asked
    by_text, by_letter = dict(zip(texts, letters, strict=False)), {letter.upper(): letter for letter in letters}
    right: dict[Any, str] = by_text | by_letter if columns.get("answerkey") is not None else by_letter | by_text
    if isinstance(answer, Real) and not isinstance(answer, bool):
        right = dict(enumerate(letters))
    if (key := answer.strip() if isinstance(answer, str) else answer) not in right:
        key = str(answer).strip().upper()
    if key not in right:
        expected = f"one of {', '.join(letters)}, its text, or its position from 0 as a number"
        raise BadRowError("no such choice", f"{shortened(answer)} in `answer`", expected)
    return [*asked, Turn("assistant", right[key])]


def _behavior(columns: Columns) -> list[Turn]:
    """Return HarmBench's behavior after the text that it speaks of, as in its direct request."""
    parts = [_text(columns, "contextstring"), _text(columns, "behavior")]
    return [Turn("user", "\n\n---\n\n".join(part for part in parts if part))]


def _asked_turn(columns: Columns) -> list[Turn]:
    """Return the one prompt of a list of turns, as SORRY-Bench keeps it."""
    turns = columns["turns"]
    if not isinstance(turns, list) or len(turns) != 1 or not isinstance(turns[0], str):
        raise BadRowError("not one prompt", f"{shortened(turns)} in `turns`", "a list with one text")
    return [Turn("user", turns[0])]


def _whole(columns: Columns) -> list[Turn]:
    if isinstance(_list(columns["text"]), list):
        raise BadRowError(
            "wrong type", f"turns in `text`: {shortened(columns['text'])}", "text; turns go into `messages`"
        )
    return [Turn("user", _text(columns, "text"))]


def _wildjailbreak(columns: Columns) -> list[Turn]:
    asked = "adversarial" if _has_content(columns["adversarial"]) else "vanilla"
    return [Turn("user", _text(columns, asked)), Turn("assistant", _text(columns, "completion"))]


# From the most particular to the most general, since the first one that fits is taken.
FORMATS = (
    _chat("messages", "messages"),
    _chat("sharegpt", "conversations"),
    _pair("alpaca", "instruction", "output", "input"),
    _pair("dolly", "instruction", "response"),
    replace(_pair("beavertails", "prompt", "response"), columns=("prompt", "response", "is_safe")),
    Format("wildjailbreak", ("vanilla", "adversarial", "completion"), _wildjailbreak),
    *(
        _pair(f"prompt-{answer}", "prompt", answer)
        for answer in ("completion", "response", "target", "answer", "output")
    ),
    _pair("goal-target", "goal", "target"),
    *(
        Format(name, ("question", column), _choices, ("answer", "answerkey", "label", "system", "system_prompt"))
        for name, column in (("multiple-choice", "choices"), ("options", "options"))
    ),
    *(_pair(f"question-{answer}", "question", answer) for answer in ("answer", "response")),
    _pair("query-response", "query", "response"),
    _pair("toxicchat", "user_input", "model_output"),
    replace(_pair("xstest", "prompt"), columns=("prompt", "type", "label")),
    Format("text", ("text",), _whole, whole=True),
    _pair("prompts", "prompt"),
    _pair("instructions", "instruction", context="input"),
    _pair("goals", "goal"),
    Format("behaviors", ("behavior",), _behavior, ("contextstring",)),
    _pair("questions", "question"),
    *(_pair(name, name) for name in ("forbidden_prompt", "prompt_text", "request", "adversarial")),
    Format("turns", ("turns",), _asked_turn),
    _pair("headerless-pairs", "1", "2", alone=True),
    _pair("headerless-prompts", "1", alone=True),
)
