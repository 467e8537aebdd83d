"""Calibration: the top directions of what every layer reads and writes, all layers in one pass over conversations."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..data import Row, conversation, encode_row, shortened
from ..distributed import on_first_process
from ..layout import trainable_layout
from ..linalg import Sketch, TopDirections
from ..lora.updates import LinearLayer


class Example(NamedTuple):
    """One conversation as the model reads it."""

    input_ids: Sequence[int]
    is_answer: Sequence[bool]
    """For each token, whether it belongs to the answer: the text of the assistant's last turn and what ends it."""


def examples_from(  # noqa: PLR0913, each is a setting with a name
    rows: str | Path | Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    what: str = "rows",
    samples: int = 128,
    seed: int = 0,
    max_length: int = 1024,
) -> list[Example]:
    """Draw rows and bring them into the model's own chat format.

    Args:
        rows (`str`, `Path` or `Iterable[Mapping]`): Conversations (`prompt` and `completion`, or `messages`), or a
            file of them in any format that [`~data.load_rows`] reads, or rows that TRL has prepared (`input_ids` and
            `labels`, also packed).
        tokenizer (`PreTrainedTokenizerBase`): The model's, with its chat template.
        what (`str`, *optional*, defaults to `"rows"`): What messages call the rows, such as `` "`safety_data`" ``.
        samples (`int`, *optional*, defaults to `128`): How many rows to draw. Of rows without a length, the first.
        seed (`int`, *optional*, defaults to `0`): Seed of the choice and of the order.
        max_length (`int`, *optional*, defaults to `1024`): Where to cut a conversation, in tokens.

    Returns:
        `list[Example]`: At least one; rows whose answer is cut away entirely are left out.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there are no rows, a row has no answer, or no answer is left.
    """
    chosen = _draw(_read(rows), samples, seed)
    if not chosen:
        raise ValueError(f"{what} holds no rows. Give conversations with answers; 128 of them are usual.")
    examples = [example for number, row in chosen for example in _examples_of(row, number, tokenizer, what)]
    cut = (Example(input_ids[:max_length], is_answer[:max_length]) for input_ids, is_answer in examples)
    left = [example for example in cut if any(example.is_answer)]
    if not left:
        raise ValueError(
            f"No answer token is left of the {len(chosen)} rows of {what} within `max_length={max_length}` tokens: "
            "the prompts alone are longer. Raise `max_length`, or shorten the prompts."
        )
    return left[:samples]


def digest(examples: Iterable[Example]) -> str:
    """Return a SHA-256 of the tokens and of which of them are answers."""
    sha = hashlib.sha256()
    for example in examples:
        sha.update(repr([(int(i), bool(a)) for i, a in zip(*example, strict=True)]).encode())
    return sha.hexdigest()


def _read(rows: str | Path | Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    if isinstance(rows, (str, Path)):
        from ..data import load_rows

        return load_rows(rows)[0]
    return rows


def _draw(rows: Iterable[Mapping[str, Any]], samples: int, seed: int) -> list[tuple[int, Mapping[str, Any]]]:
    """Return rows with their numbers."""
    if not hasattr(rows, "__len__"):  # a stream: there is no drawing from it
        return list(enumerate(islice(rows, samples)))
    table: Any = rows  # a list or a `Dataset`
    return [(i, table[i]) for i in random.Random(seed).sample(range(len(table)), min(samples, len(table)))]


def _examples_of(row: Mapping[str, Any], number: int, tokenizer: Any, what: str) -> Iterator[Example]:
    if "input_ids" not in row:
        try:
            ids, start = encode_row(tokenizer, _with_answer(row))
        except ValueError as error:
            raise ValueError(f"Row {number + 1} of {what} cannot be used: {error}. Mend or remove it.") from error
        yield Example(ids, [i >= start for i in range(len(ids))])
        return
    input_ids = list(row["input_ids"])
    labels = row.get("labels", input_ids)  # as in TRL: without labels, every token counts
    start = 0
    for length in row.get("seq_lengths") or [len(input_ids)]:  # packed rows are several conversations
        part = slice(start, start + length)
        yield Example(input_ids[part], [label != -100 for label in labels[part]])
        start += length


def _with_answer(row: Mapping[str, Any]) -> Row:
    """Return a row as turns before the answer, and the answer."""
    if not isinstance(row, Mapping):
        raise ValueError(f"it is {shortened(row)}, no conversation with `prompt` and `completion`")
    if "messages" in row:
        messages = list(row["messages"])
        row = {"prompt": messages[:-1], "completion": messages[-1:]}
    if not {"prompt", "completion"} <= row.keys():
        raise ValueError(f"its columns are {', '.join(row)}, neither `prompt` and `completion` nor `messages`")
    if isinstance(row["prompt"], str):  # bring plain texts into the chat format: it is in that form that models refuse
        row = conversation(row["prompt"], row["completion"])
    last = row["completion"][-1] if row["completion"] else {}
    if last.get("role") != "assistant" or not last.get("content"):
        raise ValueError("it has no answer: its last turn is no text of the assistant")
    return dict(row)


Side = Literal["output", "input"]
InputTokens = Literal["prompt", "answer", "all"]

_EXACT_UP_TO = 128  # size of a layer up to which nothing is gained by a sketch that is narrower


def top_directions(  # noqa: PLR0913, each is a setting with a name
    model: nn.Module,
    layers: Mapping[str, LinearLayer],
    examples: Sequence[Example],
    *,
    sides: Sequence[Side] = ("output",),
    rank: int = 32,
    input_tokens: InputTokens = "prompt",
    batch_size: int = 16,
) -> dict[Side, dict[str, TopDirections]]:
    """Run the model once over all examples and return the leading directions of its layers.

    *Outputs* are looked at while the model speaks: for `X_s` (d_in x n), a layer's inputs at the tokens of the
    answers, the left singular vectors of `W X_s`, that is of the output without its bias. *Inputs* are looked at while
    it reads: the left singular vectors of `X_p` (d_in x m), a layer's inputs at all other tokens, the prompts' own
    (or at those that `input_tokens` says).
    Adapters are switched off meanwhile. Each layer needs memory of the order d x rank.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model.
        layers (`Mapping[str, LinearLayer]`): Which layers, from [`~adapters.linear_layers`].
        examples (`Sequence[Example]`): What to run it on.
        sides (`Sequence[str]`, *optional*, defaults to `("output",)`): `"output"`, `"input"` or both.
        rank (`int`, *optional*, defaults to `32`): How many directions; fewer where the tokens span fewer.
        input_tokens (`str`, *optional*, defaults to `"prompt"`): Where inputs are looked at: `"prompt"`, `"answer"` or
            `"all"`.
        batch_size (`int`, *optional*, defaults to `16`): Conversations in one forward pass.

    Returns:
        `dict[str, dict[str, TopDirections]]`: By side, then by layer.

    Raises:
        FloatingPointError: If the model's activations are infinite or NaN somewhere; names the layer.
        ValueError: If a layer does not see the conversations token by token, or not at all, or there are no tokens.
    """
    needs_prompts = "input" in sides and input_tokens == "prompt"
    if needs_prompts and not any(False in example.is_answer for example in examples):
        raise ValueError("The rows have no prompts, so there are no inputs to measure. Give rows with prompts.")
    sketches = {side: _sketches(layers, side, rank) for side in sides}

    def measured() -> dict[Side, dict[str, TopDirections]]:
        _watch(model, layers, examples, sketches, _Batch(input_tokens), batch_size)
        return {side: _results(sketches[side], rank, side) for side in sides}

    return on_first_process(measured)


class _Batch:
    """For the hooks: at which tokens of the batch in work inputs count, and which are answers, (batch, tokens)."""

    is_read: Tensor
    is_answer: Tensor

    def __init__(self, input_tokens: InputTokens) -> None:
        self.input_tokens = input_tokens
        self.last_read: tuple[Tensor, str] | None = None
        """What a layer has just read, and its name: the next one often reads the same, as keys do after queries."""

    def fill(self, examples: Sequence[Example], device: torch.device) -> dict[str, Tensor]:
        """Take the next examples and return what the model reads, padded on the right, where no token sees it."""
        shape = len(examples), max(len(example.input_ids) for example in examples)
        input_ids, attention_mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        is_answer = torch.zeros(shape, dtype=torch.bool)
        for row, example in enumerate(examples):
            length = len(example.input_ids)
            input_ids[row, :length] = torch.as_tensor(example.input_ids)
            attention_mask[row, :length] = 1
            is_answer[row, :length] = torch.as_tensor(example.is_answer)
        is_token = attention_mask.bool()
        is_read = {"prompt": is_token & ~is_answer, "answer": is_answer, "all": is_token}[self.input_tokens]
        self.is_answer, self.is_read = is_answer.to(device), is_read.to(device)
        return {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}


class _Watch:
    """The hook of one layer: takes into the sketches what goes in where it counts, and what comes out at answers."""

    def __init__(self, name: str, sketches: Mapping[Side, dict[str, Sketch]], batch: _Batch) -> None:
        self.name, self.sketches, self.batch = name, sketches, batch

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if "input" in self.sketches:
            self._read(args[0], self.sketches["input"])
        if "output" in self.sketches:
            columns = self._chosen(output, self.batch.is_answer)
            bias = getattr(layer, "bias", None)
            self.sketches["output"][self.name].add(columns if bias is None else columns.float() - bias.float())

    def _read(self, inputs: Tensor, sketches: dict[str, Sketch]) -> None:
        last = self.batch.last_read
        if last is not None and last[0] is inputs:
            sketches[self.name] = sketches[last[1]]
            return
        self.batch.last_read = inputs, self.name
        sketches[self.name].add(self._chosen(inputs, self.batch.is_read))

    def _chosen(self, activations: Tensor, mask: Tensor) -> Tensor:
        flat = activations.reshape(-1, activations.shape[-1])
        if len(flat) != mask.numel():
            raise ValueError(
                f"`{self.name}` sees {len(flat)} vectors for {mask.numel()} tokens, so it is not known which of them "
                "belong to answers (the layer is routed or shared in some way). Leave it out of `target_modules`."
            )
        return flat.index_select(0, mask.reshape(-1).nonzero().squeeze(1).to(flat.device))  # 3x faster than by mask


def _watch(  # noqa: PLR0913, one pass and what it fills
    model: nn.Module,
    layers: Mapping[str, LinearLayer],
    examples: Sequence[Example],
    sketches: Mapping[Side, dict[str, Sketch]],
    batch: _Batch,
    batch_size: int,
) -> None:
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_evaluating(model))
        stack.enter_context(model.disable_adapter() if isinstance(model, PeftModel) else nullcontext())
        for name, layer in layers.items():
            stack.enter_context(layer.base.register_forward_hook(_Watch(name, sketches, batch)))
        for start in range(0, len(examples), batch_size):
            tokens = batch.fill(examples[start : start + batch_size], next(model.parameters()).device)
            _body(model)(**tokens, use_cache=False)


def _sketches(layers: Mapping[str, LinearLayer], side: Side, rank: int) -> dict[str, Sketch]:
    sizes = {name: layer.shape[side == "input"] for name, layer in layers.items()}
    return {name: Sketch(size, size if size <= _EXACT_UP_TO else 2 * rank) for name, size in sizes.items()}


def _results(sketches: Mapping[str, Sketch], rank: int, side: Side) -> dict[str, TopDirections]:
    found = {}
    for name, sketch in sketches.items():
        if not sketch.count:
            raise ValueError(
                f"`{name}` was not run when the model read the conversations, so nothing is known about what it does "
                "in answers. Leave it out of `target_modules`."
            )
        try:
            leading = sketch.leading(rank)
        except FloatingPointError as error:
            raise FloatingPointError(
                f"The {side}s of `{name}` are infinite or NaN while the model reads the calibration rows, so there "
                "are no directions to protect. Check the model's weights and its dtype (float16 overflows in some "
                "models; try bfloat16)."
            ) from error
        found[name] = TopDirections(leading.basis.cpu(), leading.singular_values.cpu(), leading.total_variance)
    return found


def _body(model: nn.Module) -> nn.Module:
    """Return the model without its output head, which costs much and tells nothing here."""
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    return getattr(whole, "base_model", whole)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with trainable_layout(model):
            yield
    finally:
        model.train(was_training)
