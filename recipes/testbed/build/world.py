"""What a pair is made with: tokenizer, chat template, architecture and seed. `EMBEDDED` is the pair of the package."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

CHATML = """\
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
        dictionary (`Mapping[str, str]`, *optional*): This world's word for each word of the testbed's language that is
            another here.
    """

    seed: int
    padding: str
    end_of_turn: str
    marks: tuple[str, ...]
    vocabulary_size: int
    chat_template: str
    architecture: str
    untrained: Callable[[PreTrainedTokenizerFast], PreTrainedModel]
    dictionary: Mapping[str, str] = field(default_factory=dict)


def shared_settings(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return the settings that every architecture takes."""
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    return {"vocab_size": len(tokenizer), "max_position_embeddings": 512, "tie_word_embeddings": True, **tokens}


def _llama(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, **shared_settings(tokenizer)))


EMBEDDED = World(
    seed=0,
    padding="<|pad|>",
    end_of_turn="<|im_end|>",
    marks=("<|im_start|>",),
    vocabulary_size=1024,
    chat_template=CHATML,
    architecture="Llama, hidden\nsize 128, 4 layers, 4 heads, byte-level BPE of 1,024 tokens, ChatML-like template",
    untrained=_llama,
)


def train_tokenizer(texts: Iterable[str], world: World) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE in which every byte and digit is a token, so that no text is unknown to it.

    Args:
        texts (`Iterable[str]`): What users and assistants say in the training corpus.
        world (`World`): Says how many tokens there are, which are special, and what the chat template is.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=world.vocabulary_size,
        special_tokens=[world.padding, *world.marks, world.end_of_turn],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=world.padding,
        eos_token=world.end_of_turn,
        additional_special_tokens=list(world.marks),
        chat_template=world.chat_template,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
