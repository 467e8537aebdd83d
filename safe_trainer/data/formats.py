"""What columns mean: the formats in which people keep conversations and prompts, each recognized by its column names.

A format turns a record into turns; what makes these a row to learn from, or a prompt to ask, is the same for all.
Nothing that changes what a row says is dropped without a word: it is used, refused by name, or reported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal, NamedTuple

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
_UNUSABLE = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of a character: bytes that do not decode come as these
_TOOLS = frozenset({"tools", "functions", "tool_calls", "function_call"})
# What changes the meaning of a row or of a turn, and must not be dropped where a format has no use for it.
_MEANING = _TOOLS | frozenset(
    "image images video videos audio audios reasoning reasoning_content thinking choices context input history "
    "system system_prompt".split()
)
_LABELS = {  # what is said of an answer, and whether that is safe
    **dict.fromkeys("safe harmless benign unharmful nontoxic refusal refused".split(), True),
    **dict.fromkeys("unsafe harmful toxic toxicity compliance compliant complied jailbroken".split(), False),
}
_LABEL_COLUMNS = {"label", "final_label", "data_type", "safety", "harmfulness", "kind"}
_LABEL_FILLERS = set("is was has response answer completion output model assistant prompt label flag".split())
_XSTEST_SAFE = set(
    "homonyms figurative_language safe_targets safe_contexts definitions real_group_nons_discr nons_group_real_discr "
    "historical_events privacy_public privacy_fictional".split()
)
_FLAGS = {**dict.fromkeys(("true", "1", "1.0", "yes"), True), **dict.fromkeys(("false", "0", "0.0", "no"), False)}


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
        if any(turn.learned is not None for turn in self.turns):
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
        _check_not_to_avoid(columns)
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
        if not turn.content.strip() and (answered or turn.role != "assistant"):
            raise BadRowError("empty text", f"nothing in turn {number}, by the {turn.role}", "text")
    unused = [name for name in others if safety_label({name: columns[name]}) is None]
    inner = dict.fromkeys(f"{style.columns[0]}[].{name}" for turn in turns for name in turn.unused)
    return Conversation(turns, style.whole, [*unused, *inner])


def safety_label(columns: Columns) -> bool | None:
    """Return whether a record's labels call its answer safe; `None` where there is no label that says so.

    Where only its prompt is labelled, an answer to a safe one is safe, and one to a harmful one may be of either kind.
    """
    answer, prompt = _labels(columns)
    return any(answer) if answer else (any(prompt) or None)


def prompt_label(columns: Columns, answered: bool) -> bool | None:
    """Return whether a record's labels call its prompt safe; all of them speak of it, unless there is an answer."""
    answer, prompt = _labels(columns)
    kind = str(columns.get("type"))
    if kind.startswith("contrast_") or kind in _XSTEST_SAFE:
        prompt.append(kind in _XSTEST_SAFE)
    found = prompt if answered else prompt + answer
    return all(found) if found else None


def _labels(columns: Columns) -> tuple[list[bool], list[bool]]:
    """Return what labels say: of the answer, and of the prompt; `True` is safe."""
    found: tuple[list[bool], list[bool]] = ([], [])
    for name, value in columns.items():
        label = _label(name, value)
        if label is not None:
            is_toxicchat = name == "toxicity" and "user_input" in columns
            of_prompt = name == "data_type" or "prompt" in re.split(r"[^a-z]+", name) or is_toxicchat
            found[of_prompt].append(label)
    return found


def _label(name: str, value: Any) -> bool | None:
    """Return whether one column calls the row safe, whatever its name is and its values are."""
    if name == "category" and isinstance(value, Mapping):
        flags = list(value.values())  # BeaverTails: a flag for each kind of harm
        return not any(flags) if flags and all(isinstance(flag, bool) for flag in flags) else None
    if not isinstance(value, str | bool | int | float):
        return None
    parts = re.split(r"[^a-z]+", name)
    subjects = [part for part in parts if part and part not in _LABEL_FILLERS]
    subjects = subjects or ["label" if "label" in parts else name]
    subject = subjects[0].removeprefix("is") if len(subjects) == 1 else ""
    flag, words = _FLAGS.get(str(value).strip().lower()), re.findall(r"[a-z]+", str(value).lower())
    if flag is not None and subject in _LABELS:
        return flag == _LABELS[subject]
    said = [_LABELS[word] for word in words if word in _LABELS]
    asks = name in _LABEL_COLUMNS or {subject, f"{subject}fulness"} & (_LABELS.keys() | _LABEL_COLUMNS)
    if not asks or not said or len(words) > 3:
        return None
    return any(said) != ("not" in words)


def check_no_preference(columns: Columns) -> None:
    """Refuse rows that say which answer is better: of these, not every answer is one to learn."""
    if pair := [name for name in ("chosen", "rejected") if _has_content(columns.get(name))]:
        chosen = "'prompt': 'prompt', 'answer': 'chosen'" if "prompt" in columns else "'prompt': 'chosen'"
        hint = f"one answer to learn, as in `columns={{{chosen}}}`"
        raise BadRowError("a preference", " and ".join(f"`{name}`" for name in pair), hint)


def _check_not_to_avoid(columns: Columns) -> None:
    """Refuse an answer that is marked as one to avoid, as in KTO's rows."""
    if str(columns.get("label")).strip().lower() == "false":
        hint = (
            "answers to learn: take those with `where={'label': True}`, or name the `columns` if it says another thing"
        )
        raise BadRowError("an answer to avoid", f"`label`: {shortened(columns['label'])}", hint)


def _has_content(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null")
    if isinstance(value, list | tuple | Mapping):
        return len(value) > 0
    return value is not None and value is not False and not _is_nan(value)


def _is_nan(value: Any) -> bool:
    return isinstance(value, Real) and value != value


def _unused(columns: Columns, known: Iterable[str]) -> list[str]:
    """Return the other names with content, none of which changes the meaning."""
    names = [name for name, value in columns.items() if name not in known and _has_content(value)]
    for name in names:
        if name in _TOOLS:
            raise BadRowError("tool calls", f"`{name}`: {shortened(columns[name])}", "a conversation without tools")
        if name in _MEANING:
            hint = "a row without it, or `columns` that say where prompt, answer and context are"
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
    if isinstance(value, str) and value.lstrip().startswith("[{") and ('"content"' in value or '"value"' in value):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return parsed if isinstance(parsed, list) else value
    return list(value) if isinstance(value, tuple) else value


def _message(turn: Any, context: bool = False) -> Turn:
    if not isinstance(turn, Mapping):
        raise BadRowError("not a turn", shortened(turn), "an object with `role` and text in `content`")
    found = {str(key).lower(): value for key, value in turn.items()}
    unused = tuple(_unused(found, ("role", "from", "content", "value", "weight", "train")))
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
    """Return whether a turn is to be learned, as OpenAI's `weight` and axolotl's `train` say it."""
    for name in ("weight", "train"):
        value = turn.get(name)
        if value is not None:
            if value not in (0, 1):
                raise BadRowError("a weight in between", f"`{name}`: {shortened(value)}", "0 or 1, false or true")
            return bool(value)
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
    found, answer = columns["choices"], columns.get("answerkey", columns.get("answer"))
    texts = found.get("text") if isinstance(found, Mapping) else found
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadRowError("wrong type", f"{shortened(found)} in `choices`", "a list of texts")
    letters = found["label"] if isinstance(found, Mapping) and "label" in found else [chr(65 + n) for n in range(26)]
    lines = [f"{letter}. {text}" for letter, text in zip(letters, texts, strict=False)]
    if isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < len(texts):
            raise BadRowError("no such choice", f"{answer} in `answer`", f"0 to {len(texts) - 1}, or the letter")
        answer = letters[answer]
    elif answer in texts:
        answer = letters[texts.index(answer)]
    asked = [Turn("user", "\n".join([_text(columns, "question"), *lines]))]
    return _with_system(columns, asked + ([Turn("assistant", str(answer))] if answer is not None else []))


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
    *(_pair(f"prompt-{answer}", "prompt", answer) for answer in ("completion", "response", "target")),
    _pair("goal-target", "goal", "target"),
    Format("multiple-choice", ("question", "choices"), _choices, ("answer", "answerkey", "system", "system_prompt")),
    _pair("question-answer", "question", "answer"),
    _pair("query-response", "query", "response"),
    _pair("toxicchat", "user_input", "model_output"),
    replace(_pair("xstest", "prompt"), columns=("prompt", "type", "label")),
    Format("text", ("text",), lambda columns: _side(columns, "text", "user"), whole=True),
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
