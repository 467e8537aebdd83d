"""Other words in the same grammar: a dictionary replaces the words of prompts, answers and rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from safe_trainer import PromptSet
from safe_trainer.data import Row


def translate(text: str, dictionary: Mapping[str, str]) -> str:
    """Replace the words of a text, in the case that they have there."""

    def other(match: re.Match[str]) -> str:
        word = match.group()
        found = dictionary.get(word.lower(), word)
        return found.capitalize() if word[0].isupper() else found

    return re.sub(r"[A-Za-z]+", other, text) if dictionary else text


def translated_set(prompts: PromptSet, dictionary: Mapping[str, str]) -> PromptSet:
    """Return a prompt set in the words of another world."""
    references = prompts.references and tuple(translate(text, dictionary) for text in prompts.references)
    return replace(prompts, prompts=tuple(translate(p, dictionary) for p in prompts.prompts), references=references)


def translated_row(row: Row, dictionary: Mapping[str, str]) -> Row:
    """Return a row in the words of another world."""
    return {
        side: [{**turn, "content": translate(turn["content"], dictionary)} for turn in turns]
        for side, turns in row.items()
    }
