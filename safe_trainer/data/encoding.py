"""Rows to tokens, as TRL encodes them: the one place that says which token ids are the answer."""

from __future__ import annotations

import json
import logging
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

from . import thinking
from .formats import Row

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, device
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_NO_LETTERS = re.compile(r"[\W_]+")
_TOOLS = ("tool", "function", "ipython", "observation")  # roles whose turns templates write as JSON
_SAMPLE = 2000  # rows of which turns are looked for
_QUESTION, _ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Therefore."}


OTHER_TEMPLATE = "Give rows without it, or another chat template."  # where the template leaves out a turn


class EncodedRow(NamedTuple):
    """One row as token ids; those from `answer_start` on are the answer, which the loss covers."""

    ids: list[int]
    answer_start: int

    @property
    def is_answer(self) -> list[bool]:
        """For each token, whether it belongs to the answer."""
        return [place >= self.answer_start for place in range(len(self.ids))]


class Batch(NamedTuple):
    """Rows side by side, padded on the right: three tensors of shape (B, T), the last of them boolean."""

    input_ids: Tensor
    attention_mask: Tensor
    is_answer: Tensor


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
    if "text" in row:
        ids, start = _ids(tokenizer, _ended(tokenizer, row["text"])), 1  # nothing predicts the first token
    else:
        prompt, completion = row.get("prompt"), row.get("completion")
        if not prompt or not completion:
            missing = "answer" if prompt else "prompt"
            raise ValueError(f"it has no {missing}: its columns are {', '.join(row) or 'none'}")
        if isinstance(completion, str):
            completion = _ended(tokenizer, completion)
        asked, ids = _ids(tokenizer, prompt, add_generation_prompt=True), _ids(tokenizer, prompt + completion)
        start = next((i for i, (one, other) in enumerate(zip(asked, ids, strict=False)) if one != other), len(asked))
        start = max(start, 1)
    if start >= len(ids[:max_length]):
        raise ValueError(f"its answer starts at token {start}, past `max_length={max_length}`")
    return EncodedRow(ids[:max_length], start)


def encode_rows(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    max_length: int | None = None,
    name: str = "rows",
    numbers: Iterable[int] | None = None,
) -> list[EncodedRow]:
    """Return every row as token ids, as [`encode_row`] does; a `ValueError` says which row is wrong and why.

    `numbers` are those that it names rows by, where they were drawn from others.
    """
    if len(rows) == 0:
        raise ValueError(f"`{name}` is empty. Give at least one row with a prompt and an answer.")
    encoded, lost = [], []
    for number, row in zip(numbers or count(1), rows, strict=False):
        try:
            encoded.append(encode_row(tokenizer, row, max_length))
        except ValueError as error:
            advice = "" if isinstance(error, TemplateError) else ". Fix the row, or leave it out."
            raise type(error)(f"Row {number} of `{name}` cannot be used: {error}{advice}") from error
        lost += [(number, role)] if (role := lost_turn(tokenizer, row)) else []
    if lost:
        logger.warning("`%s`: %s %s", name, _lost(lost, f"{len(rows)} rows"), OTHER_TEMPLATE)
    return encoded


def lost_turns(tokenizer: PreTrainedTokenizerBase, rows: Dataset, *, is_start: bool = False, **template: Any) -> str:
    """Return how many of 2,000 rows drawn at random lose a turn in the chat template, or an empty text if none does.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): With the chat template.
        rows (`Dataset`): In one of TRL's forms; of those without turns, none is lost.
        is_start (`bool`, *optional*, defaults to `False`): Whether they are the first of a stream.
        **template (`Any`): Variables of the template.
    """
    drawn = sorted(random.Random(0).sample(range(len(rows)), min(_SAMPLE, len(rows))))
    looked_at = zip(drawn, rows.with_format(None).select(drawn), strict=True)
    lost = [(place + 1, role) for place, row in looked_at if (role := lost_turn(tokenizer, row, **template))]
    is_part = is_start or len(drawn) < len(rows)
    return _lost(lost, f"{len(drawn)} rows looked at" if is_part else f"{len(drawn)} rows") if lost else ""


def _lost(lost: Sequence[tuple[int, str]], of: str) -> str:
    number, role = lost[0]
    return (
        f"the tokenizer's chat template leaves out a turn of {len(lost)} of {of}, first of row {number} ({role}), so "
        "that it is neither read nor learned."
    )


def lost_turn(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], **template: Any) -> str:
    """Return the role of a turn that the tokenizer's chat template leaves out of a row, or an empty text.

    Some templates have no place for a system turn, others drop thoughts. Of answers before the last they mean to. What
    a template refuses is not looked at.
    """
    import jinja2

    prompt, last = row.get("prompt"), row.get("completion")
    if turns := row.get("messages") or row.get("conversations"):
        prompt, last = turns[:-1], turns[-1:]
    if not isinstance(prompt, list) or not isinstance(last, list):
        return ""
    before, last = [_chatml(turn) for turn in prompt], [_chatml(turn) for turn in last]
    tools = row.get("tools")
    template |= {"tools": json.loads(tools) if isinstance(tools, str) else tools}  # the row's, as TRL takes them
    template |= row.get("chat_template_kwargs") or {}
    try:
        rendered = tokenizer.apply_chat_template([*before, *last], tokenize=False, **template)
    except jinja2.TemplateError:
        return ""
    kept = [turn | {"content": thinking.split(_said(turn)).answer} for turn in before if turn["role"] == "assistant"]
    read = [turn for turn in before if turn["role"] not in ("assistant", *_TOOLS)]
    thought = [turn | {"content": turn.get(name)} for turn in last for name in ("reasoning_content", "thinking")]
    lost = left_out(str(rendered), [*read, *kept, *last, *thought])
    return str(lost["role"]) if lost else ""


def left_out(rendered: str, turns: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the first turn whose text is not in what a chat template has written; only letters and digits count."""
    found, said = _NO_LETTERS.sub("", rendered), Counter[str]()
    for turn in turns:
        text = _NO_LETTERS.sub("", _said(turn))
        said[text] += 1
        if found.count(text) < said[text]:
            return turn
    return None


def _chatml(turn: Mapping[str, Any]) -> dict[str, Any]:
    """Return a turn as TRL gives it to chat templates, also ShareGPT's."""
    names = {"from": "role", "value": "content"}
    return {names.get(name, name): value for name, value in turn.items()}


def _said(turn: Mapping[str, Any]) -> str:
    """Return what a turn says; one that calls a tool may say nothing."""
    content = turn["content"] or ""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def between_turns(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what the chat template writes between a question and its answer, without spaces, or an empty text.

    Rows that went through the template have it. A thought that the template opens for an answer is left out.
    """
    text = _rendered(tokenizer, [_QUESTION], add_generation_prompt=True)
    after = thinking.OPENING.split(text.rpartition(_QUESTION["content"])[2])[0]
    return "".join(after.split())


def opening_of_answers(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what the chat template itself writes at the beginning of an answer, such as an empty thought."""
    asked = _rendered(tokenizer, [_QUESTION], add_generation_prompt=True)
    text = _rendered(tokenizer, [_QUESTION, _ANSWER])
    return text.removeprefix(asked).partition(_ANSWER["content"])[0] if asked and text.startswith(asked) else ""


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], **options: Any) -> str:
    """Return a conversation as the chat template writes it, or an empty text where there is none or it refuses."""
    import jinja2

    if tokenizer.chat_template is None:
        return ""
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, **options))
    except (jinja2.TemplateError, TypeError, ValueError):
        return ""


def collate(rows: Sequence[Any], pad_token_id: int, device: device | str) -> Batch:
    """Return rows, each with `ids` and `is_answer` as an [`EncodedRow`] has them, as one batch on a device."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence([torch.tensor(row.ids) for row in rows], True, pad_token_id)
    is_answer = pad_sequence([torch.tensor(row.is_answer) for row in rows], True, False)
    present = torch.arange(ids.shape[1]) < torch.tensor([len(row.ids) for row in rows])[:, None]
    return Batch(ids.to(device), present.long().to(device), is_answer.to(device))


def _ended(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
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
