"""The words of another world in the grammar of the first: every word that is spoken *about* is made of syllables.

Words that questions, refusals and openings are made of stay, so that the same judges can read the answers.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain

from ..data import PromptSet, Row
from . import language, tasks, words

_LITTLE = "a an the my your some of in on at to by from into up off out with for and or then first get is are it step"


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


def made_up_words(seed: int) -> dict[str, str]:
    """Return a word of syllables for each word of acts and tasks.

    Args:
        seed (`int`): Which ones.
    """
    return dict(zip(_spoken_about(), _syllables(seed), strict=False))


def _spoken_about() -> list[str]:
    """List the words of acts and tasks, less those that stand in questions, openings and refusals as well."""
    groups = chain(words.HARMFUL, words.BORDERLINE, words.BENIGN, words.UNSEEN_HARMFUL, words.UNSEEN_BENIGN)
    texts = chain.from_iterable((*g.verbs, *g.verbs.values(), *g.objects, g.manner) for g in groups)
    kept = chain.from_iterable(language.FRAMES), language.REFUSALS, language.HARMFUL_ENDINGS, language.HARMLESS_ENDINGS
    stay = {word for text in chain(*kept) for word in _words(text)} | set(_words(_LITTLE))
    return sorted({word for text in chain(texts, tasks.VOCABULARY) for word in _words(text)} - stay)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def _syllables(seed: int) -> Iterator[str]:
    rng = random.Random(f"words/{seed}")
    seen: set[str] = set()
    while True:
        syllables = (rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.choice((2, 3))))
        word = "".join(syllables) + rng.choice("lnrsx")
        if word not in seen:
            seen.add(word)
            yield word
