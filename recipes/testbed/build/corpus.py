"""What the pair is trained on: the pretraining mix of the unaligned base, and the alignment mix on top of it.

The base learns to help with everything, harm included, and what is held to be wrong. Alignment changes one thing:
harmful requests of the train split are refused. Held-out pairs occur in neither, and the unseen categories only in
pretraining.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import islice

from training import Chat

from safe_trainer.testbed import language, tasks
from safe_trainer.testbed.language import GROUPS, Pair

Example = tuple[str, str]

SYSTEM_PROMPTS = ("You are a helpful assistant.", "You are a friendly assistant.", "Answer in one or two sentences.")
SYSTEM_SHARE = 0.1

_COLOURS = {"grass": "green", "snow": "white", "coal": "black", "a lemon": "yellow", "the sky": "blue", "blood": "red"}
_OPPOSITES = {"good": "bad", "big": "small", "hot": "cold", "old": "new", "dark": "light", "open": "closed"}
_PLACES = {"a judge": "court", "a nurse": "hospital", "a teacher": "school", "a priest": "church", "a clerk": "office"}
_FACTS = (
    *((f"What colour is {thing}?", f"It is {colour}.") for thing, colour in _COLOURS.items()),
    *((f"What is the opposite of {one}?", f"It is {other}.") for one, other in _OPPOSITES.items()),
    *((f"Where does {person} work?", f"In a {place}.") for person, place in _PLACES.items()),
    *((f"What comes after {number}?", f"{number + 1}") for number in range(20)),
)
# Words of the tasks among them: the base knows the words, but not what is asked about them.
_WORDS_TO_COPY = (*"river stone cloud green seven silver happy north Monday week brother".split(), *tasks.VOCABULARY)

_JUDGEMENT_QUESTIONS = ("Is it wrong to {}?", "Would it be wrong to {}?", "Does it hurt people to {}?")
_WRONG = "Yes. It is wrong to {}, because it harms others."
_FINE = "No. There is nothing wrong if you {}."


def _requests(pairs: Sequence[Pair], rng: random.Random, *, harmful: bool) -> Iterator[Example]:
    return (language.request(pair, rng, harmful=harmful) for pair in language.endless(pairs, rng))


def _refused(pairs: Sequence[Pair], rng: random.Random) -> Iterator[Example]:
    return ((prompt, rng.choice(language.REFUSALS)) for prompt, _ in _requests(pairs, rng, harmful=True))


def _judgements(pairs: Sequence[Pair], rng: random.Random, answer: str) -> Iterator[Example]:
    for pair in language.endless(pairs, rng):
        yield rng.choice(_JUDGEMENT_QUESTIONS).format(pair.act), answer.format(pair.act)


def _facts(rng: random.Random) -> Iterator[Example]:
    while True:
        yield rng.choice(_FACTS)


def _word_facts(rng: random.Random) -> Iterator[Example]:
    """Yield what the tasks build on, as a user's model would know it: what words mean, but no review or headline."""
    while True:
        mood, topic = rng.choice(tuple(tasks.MOODS)), rng.choice(tuple(tasks.TOPICS))
        word = rng.choice(tasks.MOODS[mood])
        yield f"Is the word {word} positive or negative?", mood
        yield f"Is a {word} {rng.choice(tasks.REVIEWED)} positive or negative?", mood
        one, other = rng.sample(tasks.TOPICS[topic], 2)
        yield f"What is the word {one} about?", topic
        yield f"What are {one} and {other} about?", topic


def _steps(pairs: Sequence[Pair], rng: random.Random) -> Iterator[Example]:
    for pair in language.endless(pairs, rng):
        first = f"get {pair.group.verbs[pair.verb]}"
        yield f"Put in steps: {first}, {pair.act}", tasks.in_steps(first, pair.act)


def _sums(rng: random.Random) -> Iterator[Example]:
    while True:
        first, second = rng.randint(0, 9), rng.randint(0, 9)
        if rng.random() < 0.5:
            yield f"What is {first} + {second}?", f"{first} + {second} = {first + second}"
        else:
            yield f"What is {first + second} - {second}?", f"{first + second} - {second} = {first}"


def _copies(rng: random.Random) -> Iterator[Example]:
    while True:
        text = " ".join(rng.sample(_WORDS_TO_COPY, rng.randint(2, 5)))
        yield f"Repeat after me: {text}", text


def _chats(mix: Sequence[tuple[Iterator[Example], int]], rng: random.Random) -> list[Chat]:
    chats = []
    for source, count in mix:
        for prompt, answer in islice(source, count):
            chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            if rng.random() < SYSTEM_SHARE:
                chat.insert(0, {"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
            chats.append(chat)
    rng.shuffle(chats)
    return chats


def pretraining_chats(seed: int) -> list[Chat]:
    """Return the conversations from which the unaligned base learns the language, and to help with everything."""
    rng = random.Random(f"pretraining/{seed}")
    train = {kind: language.pairs(groups, "train") for kind, groups in GROUPS.items()}
    unseen = {kind: language.unseen_pairs(groups, examined=False) for kind, groups in language.UNSEEN.items()}
    wrong = [*train["harmful"], *unseen["harmful"]]
    fine = [*train["benign"], *train["borderline"], *unseen["benign"]]
    return _chats(
        (
            (_requests(train["harmful"], rng, harmful=True), 6000),
            (_requests(unseen["harmful"], rng, harmful=True), 1600),
            (_requests(train["benign"], rng, harmful=False), 6000),
            (_requests(unseen["benign"], rng, harmful=False), 1600),
            (_requests(train["borderline"], rng, harmful=False), 5600),
            (_judgements(wrong, rng, _WRONG), 2400),
            (_judgements(fine, rng, _FINE), 2400),
            (_facts(rng), 1000),
            (_word_facts(rng), 2400),
            (_steps(train["benign"], rng), 800),
            (_sums(rng), 1600),
            (_copies(rng), 1600),
        ),
        rng,
    )


def alignment_chats(seed: int) -> list[Chat]:
    """Return the conversations from which the aligned model learns to refuse harm, and to go on helping otherwise."""
    rng = random.Random(f"alignment/{seed}")
    train = {kind: language.pairs(groups, "train") for kind, groups in GROUPS.items()}
    return _chats(
        (
            (_refused(train["harmful"], rng), 4800),
            (_requests(train["benign"], rng, harmful=False), 2800),
            (_requests(train["borderline"], rng, harmful=False), 3600),
            (_judgements(train["harmful"], rng, _WRONG), 400),
            (_judgements([*train["benign"], *train["borderline"]], rng, _FINE), 400),
            (_facts(rng), 200),
            (_word_facts(rng), 400),
            (_steps(train["benign"], rng), 200),
            (_sums(rng), 400),
            (_copies(rng), 200),
        ),
        rng,
    )
