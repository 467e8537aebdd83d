"""Build the study's second pair: the grammar of the first, with other words, template, tokenizer, architecture, seed.

    python recipes/study/second_world.py --output build/second

Words that questions, refusals and openings are made of stay, so that the same judges can read the answers.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from safe_trainer.testbed import language, tasks

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "testbed" / "build"))
from build_pair import main
from world import World, shared_settings

SEED = 1
_LITTLE = "a an the my your some of in on at to by from into up off out with for and or then first get is are it step"
_BRACKETS = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '</s>' -}}{%- endgeneration -%}
{%- elif message['role'] == 'system' -%}
{{- '<<SYS>>' + message['content'] + '\\n' -}}
{%- else -%}
{{- '[INST] ' + message['content'] + ' [/INST]' -}}
{%- endif -%}
{%- endfor -%}
"""


def made_up_words(seed: int) -> dict[str, str]:
    """Return a made-up word of syllables for each word of acts and tasks.

    Args:
        seed (`int`): Seed of the syllables.
    """
    return dict(zip(_content_words(), _syllables(seed), strict=False))


def _content_words() -> list[str]:
    """List the words of acts and tasks, except those that questions, openings and refusals use as well."""
    groups = chain(*language.GROUPS.values(), *language.UNSEEN.values())
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


def _qwen2(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    sizes = {"hidden_size": 160, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 5}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=1, **shared_settings(tokenizer)))


SECOND = World(
    seed=SEED,
    padding="<pad>",
    end_of_turn="</s>",
    marks=("[INST]", "[/INST]", "<<SYS>>"),
    vocabulary_size=1280,
    chat_template=_BRACKETS,
    architecture="Qwen2, hidden\nsize 160, 3 layers, 5 heads that share keys and values, byte-level BPE of 1,280 "
    "tokens,\ntemplate with [INST], and words of its own",
    untrained=_qwen2,
    dictionary=made_up_words(SEED),
)

if __name__ == "__main__":
    main(SECOND)
