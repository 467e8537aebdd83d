"""The testbed's tokenizer: a byte-level BPE trained on its own corpus, with its world's chat template."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .world import World


def train_tokenizer(texts: Iterable[str], world: World) -> PreTrainedTokenizerFast:
    """Train the tokenizer of a world: every byte and digit is a token of its own, so that no text is unknown to it.

    Args:
        texts (`Iterable[str]`): What users and assistants say in the training corpus.
        world (`World`): Says how many tokens there are, which are special, and how the chat template goes.
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
