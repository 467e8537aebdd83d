"""What labels say: whether an answer or a prompt is safe, whatever the column is called and its values are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

_LABELS = {  # what is said of an answer, and whether that is safe
    **dict.fromkeys("safe harmless benign unharmful refusal refused refuse refuses".split(), True),
    **dict.fromkeys(
        "unsafe harmful harm toxic toxicity malicious dangerous flagged violation compliance compliant complied "
        "jailbroken".split(),
        False,
    ),
}
_LABEL_COLUMNS = set(
    "label final_label data_type safety harmfulness kind class classification verdict judgement judgment annotation "
    "moderation".split()
)
_LABEL_FILLERS = set(
    "is was has contains content response answer completion output model assistant prompt label flag".split()
)
_XSTEST_SAFE = set(
    "homonyms figurative_language safe_targets safe_contexts definitions real_group_nons_discr nons_group_real_discr "
    "historical_events privacy_public privacy_fictional".split()
)
FLAGS = {**dict.fromkeys("true t 1 1.0 yes y".split(), True), **dict.fromkeys("false f 0 0.0 no n".split(), False)}


def safety_label(columns: Mapping[str, Any]) -> bool | None:
    """Return whether a record's labels call its answer safe; `None` where there is no label that says so.

    Where only its prompt is labelled, an answer to a safe one is safe, and one to a harmful one may be of either kind.
    """
    answer, prompt = _labels(columns)
    return any(answer) if answer else (any(prompt) or None)


def prompt_label(columns: Mapping[str, Any], answered: bool) -> bool | None:
    """Return whether a record's labels call its prompt safe; all of them speak of it, unless there is an answer."""
    answer, prompt = _labels(columns)
    kind = str(columns.get("type"))
    if kind.startswith("contrast_") or kind in _XSTEST_SAFE:
        prompt.append(kind in _XSTEST_SAFE)
    found = prompt if answered else prompt + answer
    return all(found) if found else None


def _labels(columns: Mapping[str, Any]) -> tuple[list[bool], list[bool]]:
    """Return what labels say: of the answer, and of the prompt; `True` is safe."""
    found: tuple[list[bool], list[bool]] = ([], [])
    for name, value in columns.items():
        label = _label(name, value)
        if label is not None:
            is_toxicchat = name == "toxicity" and "user_input" in columns
            of_prompt = name == "data_type" or "prompt" in re.split(r"[^a-z]+", name) or is_toxicchat
            found[of_prompt].append(label)
    return found


def may_label(column: str) -> bool:
    """Return whether a column of this name may say that a row is safe, or is not; its values tell."""
    name = _key(column)
    return name == "category" or _subject(name) in _LABELS or _asks(name)


def with_class_names(rows: Any) -> Iterator[Any]:
    """Yield rows; where a dataset keeps labels as numbers of classes with names such as "unsafe", with these names.

    What a dataset gives as tensors or arrays (`with_format("torch")`) comes as it is stored; a transform is applied.
    """
    shape = getattr(rows, "format", {})  # of a `Dataset`; a stream has none
    if hasattr(rows, "with_format") and shape.get("type") != "custom":
        rows = (rows.select_columns(shape["columns"]) if shape else rows).with_format(None)
    features = getattr(rows, "features", None) or {}
    return named_classes(rows, {name: getattr(feature, "names", None) or () for name, feature in features.items()})


def named_classes(rows: Iterable[Any], classes: Mapping[str, Sequence[str]]) -> Iterator[Any]:
    """Yield rows with the names of classes, by column, in place of their numbers; only those that label a row."""
    named = {
        name: found for name, found in classes.items() if any(_label(_key(name), text) is not None for text in found)
    }
    for row in rows:
        texts = {name: found[row[name]] for name, found in named.items() if row[name] in range(len(found))}
        yield {**row, **texts} if texts else row


def _key(name: str) -> str:
    return name.strip().lower()


def _label(name: str, value: Any) -> bool | None:
    """Return whether one column calls the row safe, whatever its name is and its values are."""
    if name == "category" and isinstance(value, Mapping):
        flags = list(value.values())  # BeaverTails: a flag for each kind of harm
        return not any(flags) if flags and all(isinstance(flag, bool) for flag in flags) else None
    if not isinstance(value, str | bool | int | float):
        return None
    subject, asks = _subject(name), _asks(name)
    if not (asks or subject in _LABELS):
        return None
    text = str(value).strip().lower()
    flag, words = FLAGS.get(text), re.findall(r"\bnon(?=[a-z]{4})|[a-z]+", text)
    if flag is not None and subject in _LABELS:
        return flag == _LABELS[subject]
    said = {_LABELS[word] for word in words if word in _LABELS}
    if not asks or len(said) != 1 or len(words) > 3:
        return None
    return said.pop() != bool({"not", "no", "non", "un"} & {*words})


@lru_cache(maxsize=1024)  # of each column for every row
def _subject(name: str) -> str:
    """Return the one word that a column's name is about, or an empty text."""
    parts = re.split(r"[^a-z]+", name)
    subjects = [part for part in parts if part and part not in _LABEL_FILLERS]
    subjects = subjects or ["label" if "label" in parts else name]
    return subjects[0].removeprefix("is") if len(subjects) == 1 else ""


@lru_cache(maxsize=1024)
def _asks(name: str) -> bool:
    """Return whether a column's name asks for words such as "safe"."""
    subject = _subject(name)
    return name in _LABEL_COLUMNS or bool({subject, f"{subject}fulness"} & (_LABELS.keys() | _LABEL_COLUMNS))
