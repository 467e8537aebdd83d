"""A prompt as the model sees it: the chat template's text, its token ids, and the tokens that end an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..data import left_out, thinking

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


Prompt = str | Sequence[Mapping[str, str]]


def tokenizer_in(processor: Any) -> Any:
    """Return the tokenizer: of a model that sees, the trainer's processor holds it."""
    return getattr(processor, "tokenizer", processor)


def encode(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    system_prompt: str | None = None,
    template_options: Mapping[str, Any] | None = None,
    *,
    close_thought: bool = False,
) -> list[list[int]]:
    """Return each prompt's token ids, up to and including the opening of the assistant's turn.

    The system prompt is put before conversations that have none. With `close_thought`, a thought that the chat
    template opens is closed again, so that what follows is the answer.
    """
    texts = render(tokenizer, prompts, system_prompt, template_options)
    if close_thought:
        texts = [thinking.closed(text) if thinking.is_open(text) else text for text in texts]
    return tokenize(model, tokenizer, texts)


def render(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    system_prompt: str | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> list[str]:
    """Return each prompt as the chat template writes it; arguments and errors as in [`encode`]."""
    from jinja2 import TemplateError

    if isinstance(prompts, str):  # which would be taken for as many prompts as it has letters
        raise TypeError("`prompts` must be a list of prompts, got one text. Write `[prompt]`.")
    if tokenizer.chat_template is None:
        raise ValueError(
            "`tokenizer` has no chat template, so a prompt cannot be put to the model in the form that it was trained "
            "on. Load the tokenizer of the chat model, or set `tokenizer.chat_template`."
        )
    options = {"tokenize": False, "add_generation_prompt": True, **(template_options or {})}
    texts = []
    for prompt in prompts:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
        if system_prompt is not None and not any(turn["role"] == "system" for turn in turns):
            turns.insert(0, {"role": "system", "content": system_prompt})
        try:
            texts.append(str(tokenizer.apply_chat_template(turns, **options)))
        except TemplateError as error:
            problem = f"refused the conversation: {error}. {_advice(turns)}"
            raise ValueError(f"The tokenizer's chat template {problem}") from error
        if lost := left_out(texts[-1], [turn for turn in turns if turn["role"] != "assistant"]):
            raise ValueError(
                f"The tokenizer's chat template leaves out the {lost['role']} turn {lost['content'][:40]!r}, so that "
                f"the model would not read it. {_advice(turns)}"
            )
    return texts


def _advice(turns: Sequence[Mapping[str, str]]) -> str:
    if any(turn["role"] == "system" for turn in turns):
        return "Leave out `system_prompt`, and ask prompts without a system turn of their own."
    return "Repair `tokenizer.chat_template`."


def tokenize(model: Any, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of rendered prompts, checked against the model's vocabulary."""
    # The template writes the special tokens itself; adding them again would double the beginning-of-text token.
    encoded: list[list[int]] = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if not vocabulary:
        raise ValueError(
            "The model's weights are not in this process: DeepSpeed ZeRO-3 has split them. Save the model, "
            "and examine it after training: `safe-trainer compare`."
        )
    largest = max((max(ids, default=0) for ids in encoded), default=0)
    if largest >= vocabulary:
        raise ValueError(
            f"`tokenizer` gave the token id {largest}, but the model's vocabulary ends at {vocabulary - 1}. "
            "Load the tokenizer that belongs to this model."
        )
    return encoded


def left_padded(rows: Sequence[Sequence[int]], device: Any, pad: int = 0) -> dict[str, Tensor]:
    """Return rows of token ids as a model's inputs, padded on the left so that each row's last token is the last."""
    import torch

    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def stop_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every token that ends an answer: the model's, the tokenizer's, and what closes a turn in the template.

    The last one matters after fine-tuning a base model on a chat template: its generation config still names the end
    of a document only, and an answer would run on into an invented next turn.
    """
    configured = model.generation_config.eos_token_id
    stops = configured if isinstance(configured, list) else [configured]
    stops = [*stops, tokenizer.eos_token_id, *turn_end(tokenizer)]
    return list(dict.fromkeys(stop for stop in stops if stop is not None))


def turn_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token that closes the assistant's turn in the chat template, or nothing if it has none."""
    from jinja2 import TemplateError

    mark = "ANSWER"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    if tokenizer.chat_template is None:
        return []
    try:
        rendered = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except TemplateError:  # a guard model's template, which wants more than turns
        return []
    _, found, after = rendered.rpartition(mark)
    closing = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"][:1] if found else []
    return [token for token in closing if token in tokenizer.all_special_ids]
