"""The two worlds that a pair can be built for: the embedded one, and a second to see whether conclusions hold there.

The second has the grammar of the first and nothing else of it: architecture, tokenizer, chat template, seed and the
words that are spoken about are others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from .translation import made_up_words

_CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
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


@dataclass(frozen=True)
class World:
    """What one pair is made with.

    Args:
        seed (`int`): Of data, initialisation and order.
        padding (`str`): Token that fills batches.
        end_of_turn (`str`): Token that ends a turn.
        marks (`tuple[str, ...]`): Further tokens of the template.
        vocabulary_size (`int`): Tokens.
        chat_template (`str`): Jinja, with its generation block.
        architecture (`str`): As a card names it.
        untrained (`Callable`): From the tokenizer to a model with random weights.
        translated (`bool`): Whether its words are others than those of `words.toml`.
    """

    seed: int
    padding: str
    end_of_turn: str
    marks: tuple[str, ...]
    vocabulary_size: int
    chat_template: str
    architecture: str
    untrained: Callable[[PreTrainedTokenizerFast], Any]
    translated: bool = False

    def dictionary(self) -> dict[str, str]:
        """Return this world's word for each word of the first world that is another here."""
        return made_up_words(self.seed) if self.translated else {}


def _llama(tokenizer: PreTrainedTokenizerFast) -> Any:
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, **_shared(tokenizer)))


def _qwen2(tokenizer: PreTrainedTokenizerFast) -> Any:
    sizes = {"hidden_size": 160, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 5}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=1, **_shared(tokenizer)))


def _shared(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    return {"vocab_size": len(tokenizer), "max_position_embeddings": 512, "tie_word_embeddings": True, **tokens}


WORLDS = {
    "first": World(
        seed=0,
        padding="<|pad|>",
        end_of_turn="<|im_end|>",
        marks=("<|im_start|>",),
        vocabulary_size=1024,
        chat_template=_CHATML,
        architecture="Llama, hidden\n"
        "size 128, 4 layers, 4 heads, byte-level BPE of 1,024 tokens, ChatML-like template",
        untrained=_llama,
    ),
    "second": World(
        seed=1,
        padding="<pad>",
        end_of_turn="</s>",
        marks=("[INST]", "[/INST]", "<<SYS>>"),
        vocabulary_size=1280,
        chat_template=_BRACKETS,
        architecture="Qwen2, hidden\nsize 160, 3 layers, 5 heads that share keys and values, byte-level BPE of 1,280 "
        "tokens,\ntemplate with [INST], and words of its own",
        untrained=_qwen2,
        translated=True,
    ),
}
"""The embedded world, and the one that conclusions are tested on again."""
