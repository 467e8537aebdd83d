"""Rows to tokens: the one place where rows become token ids, and which of them are the answer, as TRL encodes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .formats import Row

if TYPE_CHECKING:
    from torch import Tensor, device
    from transformers import PreTrainedTokenizerBase


class EncodedRow(NamedTuple):
    """One row as token ids; those from `answer_start` on are the answer, which the loss covers."""

    ids: list[int]
    answer_start: int


class Batch(NamedTuple):
    """Rows side by side, padded on the right."""

    input_ids: Tensor
    """Of shape (B, T)."""
    attention_mask: Tensor
    """Of shape (B, T): 0 at padding."""
    is_answer: Tensor
    """Boolean, of shape (B, T)."""


class TemplateError(ValueError):
    """The tokenizer's chat template is missing, or refuses a conversation; another row will not help."""


def encode_row(tokenizer: PreTrainedTokenizerBase, row: Row, max_length: int | None = None) -> EncodedRow:
    """Return a row's token ids through the tokenizer's chat template, as TRL's `SFTTrainer` encodes it.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): With a chat template, unless the row is plain text.
        row (`dict`): `{"prompt": ..., "completion": ...}`, both turns of a conversation or both texts, or
            `{"text": ...}`, all of which counts as answer.
        max_length (`int`, *optional*): Tokens to keep, from the beginning.

    Raises:
        TemplateError: If the tokenizer has no chat template, or it refuses the conversation.
        ValueError: If the row has no answer, or nothing of it within `max_length`.
    """
    encoded = _encoded(tokenizer, row)
    if encoded.answer_start >= len(encoded.ids[:max_length]):
        raise ValueError(f"its answer starts at token {encoded.answer_start}, past `max_length={max_length}`")
    return EncodedRow(encoded.ids[:max_length], encoded.answer_start)


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_length: int | None = None, name: str = "rows"
) -> list[EncodedRow]:
    """Return every row as token ids; see [`encode_row`].

    Raises:
        ValueError: If there are no rows, or one of them cannot be used; says which and why.
    """
    if len(rows) == 0:
        raise ValueError(f"`{name}` is empty. Give at least one row with a prompt and an answer.")
    encoded = []
    for number, row in enumerate(rows, 1):
        try:
            encoded.append(encode_row(tokenizer, row, max_length))
        except TemplateError as error:
            raise TemplateError(f"Row {number} of `{name}` cannot be used: {error}") from error
        except ValueError as error:
            raise ValueError(
                f"Row {number} of `{name}` cannot be used: {error}. Fix the row, or leave it out."
            ) from error
    return encoded


def collate(rows: Sequence[EncodedRow], pad_token_id: int, device: device | str) -> Batch:
    """Return rows as one batch on a device."""
    import torch

    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), pad_token_id)
    places = torch.arange(longest)
    lengths = torch.tensor([len(row.ids) for row in rows])[:, None]
    starts = torch.tensor([row.answer_start for row in rows])[:, None]
    for place, row in enumerate(rows):
        ids[place, : len(row.ids)] = torch.tensor(row.ids)
    present = places < lengths
    return Batch(ids.to(device), present.long().to(device), (present & (places >= starts)).to(device))


def _encoded(tokenizer: PreTrainedTokenizerBase, row: Row) -> EncodedRow:
    if "text" in row:
        return EncodedRow(_ids(tokenizer, _ended(tokenizer, row["text"])), 1)  # nothing predicts the first token
    prompt, completion = row.get("prompt"), row.get("completion")
    if not prompt or not completion:
        raise ValueError(f"it has no {'answer' if prompt else 'prompt'}: its columns are {', '.join(row) or 'none'}")
    if isinstance(completion, str):
        completion = _ended(tokenizer, completion)
    asked, ids = _ids(tokenizer, prompt, add_generation_prompt=True), _ids(tokenizer, prompt + completion)
    start = next((i for i, (one, other) in enumerate(zip(asked, ids, strict=False)) if one != other), len(asked))
    return EncodedRow(ids, max(start, 1))


def _ended(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Return a text that ends with the end-of-sequence token, as TRL ends it."""
    end = tokenizer.eos_token or ""
    return text if text.endswith(end) else text + end


def _ids(tokenizer: PreTrainedTokenizerBase, content: Any, add_generation_prompt: bool = False) -> list[int]:
    import jinja2

    if isinstance(content, str):
        return list(tokenizer(content)["input_ids"])
    if tokenizer.chat_template is None:
        raise TemplateError(
            "the tokenizer has no chat template, which conversations need. Take the tokenizer of a chat model, or set "
            "`tokenizer.chat_template`."
        )
    try:
        encoded = tokenizer.apply_chat_template(
            content, tokenize=True, add_generation_prompt=add_generation_prompt, return_dict=True
        )
    except jinja2.TemplateError as error:
        roles = ", ".join(turn["role"] for turn in content)
        raise TemplateError(
            f"the tokenizer's chat template refuses its turns ({roles}): {error}. Bring the rows into the form that "
            "this model takes, or set another `tokenizer.chat_template`."
        ) from error
    return list(encoded["input_ids"])
