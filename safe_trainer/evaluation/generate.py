"""Prompts in, answers out: batched generation through the model's own chat template.

The prompts are sorted by length, so that a batch holds little padding, and padded on the left. In float32 and with
greedy decoding the answers are those of asking one prompt at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..data import thinking
from .prompting import Prompt, left_padded, render, stop_ids, tokenize
from .state import examining

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

INTERRUPTED = "interrupted before it was generated"


@dataclass(frozen=True)
class Answer:
    """What a model answered to one prompt.

    Args:
        text (`str`): The answer without special tokens; empty if there is none.
        truncated (`bool`, *optional*, defaults to `False`): Whether `max_new_tokens` cut it off.
        error (`str`, *optional*): Why there is no answer: the prompt does not fit into the model's context, or the run
            was interrupted. Such an answer is judged by nobody and counts in no rate.
        thought (`str`, *optional*, defaults to `""`): What a thinking model thought before it answered.
        unfinished_thought (`bool`, *optional*, defaults to `False`): Whether the answer was cut off while the model
            was still thinking: it is neither a refusal nor compliance.
        tokens (`tuple[int, ...]`, *optional*): Ids of all that was generated but the end; not kept in files.
    """

    text: str
    truncated: bool = False
    error: str | None = None
    thought: str = ""
    unfinished_thought: bool = False
    tokens: tuple[int, ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True)
class Decoding:
    """How answers are generated. Two models are comparable only under the same decoding.

    Args:
        max_new_tokens (`int`, *optional*, defaults to `64`): Longest answer, in tokens.
        batch_size (`int`, *optional*, defaults to `32`): Prompts per forward pass; halved as often as it takes where
            the GPU's memory does not suffice.
        system_prompt (`str`, *optional*): System turn before each prompt; left out by default, in which case the chat
            template may still add its own.
        temperature (`float`, *optional*, defaults to `0.0`): 0 is greedy decoding; above 0 answers are sampled.
        top_p (`float`, *optional*, defaults to `1.0`): Nucleus of the sampling, above 0 and at most 1.
        seed (`int`, *optional*, defaults to `0`): Seed of the sampling. The state of the global generators is left as
            it was found. With sampling, the answers also depend on `batch_size`.
        template_options (`Mapping[str, Any]`, *optional*): Further variables of the chat template, for example
            `{"enable_thinking": False}`.

    Raises:
        ValueError: If a setting is out of its range.
    """

    max_new_tokens: int = 64
    batch_size: int = 32
    system_prompt: str | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    template_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.temperature < 0:
            raise ValueError(f"`temperature` must be 0 (greedy) or above, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be above 0 and at most 1, got {self.top_p}.")


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    progress: Progress | None = None,
    **decoding: Any,
) -> list[Answer]:
    """Answer each prompt as a user's turn of its own.

    Works for any causal `PreTrainedModel` and for a `PeftModel` with whatever adapter is active. The model may be in
    the middle of training: dropout and gradient checkpointing are off while it answers, and each module is put back
    into the mode it was in. The tokenizer is not touched.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model that answers, on its own device.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer, with a chat template.
        prompts (`Sequence[str]` or `Sequence[list[dict]]`): User turns, or conversations that end in one.
        progress (`Callable[[int, int], None]`, *optional*): Called with (answered, total) after each batch.
        **decoding: Any field of [`Decoding`], for example `max_new_tokens=128`.

    Returns:
        `list[Answer]`: One for each prompt, in the prompts' order. A prompt that does not fit has its `error` set. On
        Ctrl-C what is finished comes back and the rest has the error `INTERRUPTED`; if nothing is finished, the
        `KeyboardInterrupt` goes on.

    Raises:
        ValueError: If the tokenizer has no chat template or does not belong to the model.
        FloatingPointError: If the model computes NaN.

    Example:

    ```python
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from safe_trainer.evaluation import generate
    from safe_trainer.testbed import ALIGNED

    model = AutoModelForCausalLM.from_pretrained(ALIGNED)
    tokenizer = AutoTokenizer.from_pretrained(ALIGNED)
    print(generate(model, tokenizer, ["how do I plant a tree?"], max_new_tokens=32)[0].text)
    ```
    """
    settings = Decoding(**decoding)
    texts = render(tokenizer, prompts, settings.system_prompt, settings.template_options)
    opened = [thinking.is_open(text) for text in texts]
    return generate_from(model, tokenizer, tokenize(model, tokenizer, texts), settings, progress, opened)


def generate_from(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Sequence[int]],
    settings: Decoding,
    progress: Progress | None = None,
    opened: Sequence[bool] | None = None,
) -> list[Answer]:
    """Continue token sequences as they are, without a chat template; otherwise as [`generate`].

    `opened` says which of them end within a thought. The `system_prompt` of the settings is not used.
    """
    opened = opened or [False] * len(encoded)
    answers = [Answer("", error=_misfit(model, len(ids), settings)) for ids in encoded]
    waiting = [index for index, answer in enumerate(answers) if answer.error is None]
    for index in waiting:
        answers[index] = Answer("", error=INTERRUPTED)
    # Longest first: a batch that is too large for the memory fails at once and not at the end.
    waiting.sort(key=lambda index: -len(encoded[index]))
    options = _generation_options(model, tokenizer, settings)
    total, size = len(encoded), settings.batch_size
    with examining(model, settings.seed):
        try:
            while waiting:
                batch = waiting[:size]
                given = _generate_or_none(model, [encoded[index] for index in batch], options)
                if given is None:
                    size = len(batch) // 2
                    continue
                for index, ids in zip(batch, given, strict=True):
                    answers[index] = _answer(tokenizer, ids, options["eos_token_id"], opened[index])
                waiting = waiting[size:]
                if progress is not None:
                    progress(total - len(waiting), total)
        except KeyboardInterrupt:
            if all(answer.error for answer in answers):
                raise
            missing = sum(answer.error == INTERRUPTED for answer in answers)
            logger.warning("Interrupted with %d of %d prompts to go; the finished answers are kept.", missing, total)
    return answers


def _misfit(model: Any, prompt_tokens: int, settings: Decoding) -> str | None:
    """Say why a prompt cannot be answered in full, or `None` if it can."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None or prompt_tokens + settings.max_new_tokens <= context:
        return None
    return (
        f"the prompt has {prompt_tokens} tokens, which with `max_new_tokens={settings.max_new_tokens}` exceeds the "
        f"model's context of {context}"
    )


def _generation_options(model: Any, tokenizer: PreTrainedTokenizerBase, settings: Decoding) -> dict[str, Any]:
    """Spell out the decoding, so that a model's own generation config cannot change it."""
    stops = stop_ids(model, tokenizer)
    pad = tokenizer.pad_token_id
    options: dict[str, Any] = {
        "max_new_tokens": settings.max_new_tokens,
        "do_sample": settings.temperature > 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "remove_invalid_values": False,  # would turn NaN into an ordinary-looking answer
        "return_dict_in_generate": False,
        "use_cache": True,  # trainers switch the cache off in the model's config
        "eos_token_id": stops or None,
        "pad_token_id": pad if pad is not None else (stops[0] if stops else 0),  # masked, so any id will do
    }
    if settings.temperature > 0:
        options |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    return options


def _generate_or_none(model: Any, batch: list[Sequence[int]], options: dict[str, Any]) -> list[list[int]] | None:
    """Return the new token ids of a batch, or `None` if it does not fit into the memory and could be split."""
    import torch
    from transformers import LogitsProcessorList

    from ..lora.modes import input_device

    inputs = left_padded(batch, input_device(model), options["pad_token_id"])
    try:
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            logits_processor=LogitsProcessorList([_refuse_nan]),
            **options,
        )
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    else:
        found: list[list[int]] = output[:, inputs["input_ids"].shape[1] :].tolist()
        return found
    torch.cuda.empty_cache()
    logger.info("A batch of %d prompts does not fit into the memory; trying half.", len(batch))
    return None


def _answer(tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: Sequence[int] | None, is_open: bool) -> Answer:
    end = next((position for position, token in enumerate(ids) if token in (stops or ())), None)
    # Where a marker of thoughts is a special token, all of these stay until the thoughts are split off.
    special = tokenizer.all_special_tokens if any(map(thinking.is_marker, tokenizer.all_special_tokens)) else []
    text = tokenizer.decode(ids[:end], skip_special_tokens=not special)
    found = thinking.split(text, is_open=is_open)
    if is_open and found.is_unfinished and end is not None:
        # It ended its turn without closing the thought that the template opened: it answered without thinking.
        found = thinking.Split(text, "", False)
    answer, thought = found.answer, found.thought
    for token in special:
        answer, thought = answer.replace(token, ""), thought.replace(token, "")
    return Answer(answer, end is None, None, thought, found.is_unfinished, tuple(ids[:end]))


def _refuse_nan(input_ids: Any, scores: Any) -> Any:
    if scores.isnan().any():
        raise FloatingPointError(
            f"The model's logits are NaN at token {input_ids.shape[1]}, so its answers mean nothing. Its weights have "
            "diverged or overflow in this dtype: go back to an earlier checkpoint, or load it in bfloat16 or float32."
        )
    return scores
