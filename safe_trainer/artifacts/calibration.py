"""Calibration: the top directions of what every layer reads and writes, all layers in one pass over conversations."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain, islice, product
from typing import Any, Literal, NamedTuple

import torch
from accelerate.state import PartialState, is_initialized
from peft import PeftModel
from torch import Tensor, nn

from ..data import ReadOptions, as_rows, collate, encode_rows, without_harmful
from ..distributed import on_first_process
from ..linalg import Sketch, TopDirections
from ..lora.modes import evaluation_mode, input_device, without_adapters
from ..lora.updates import LinearLayer

logger = logging.getLogger(__name__)

Side = Literal["output", "input"]
InputTokens = Literal["prompt", "answer", "all"]

_EXACT_UP_TO = 128  # size of a layer up to which nothing is gained by a sketch that is narrower


class Example(NamedTuple):
    """One conversation as the model reads it."""

    ids: Sequence[int]
    is_answer: Sequence[bool]
    """For each token, whether it belongs to the answer: the text of the assistant's last turn and what ends it."""


@contextmanager
def measuring(model: Any) -> Iterator[None]:
    """Run a model frozen, in evaluation mode, and on the accelerator if it is on the CPU, without leaving a trace.

    Afterwards every parameter, every module's mode and torch's random numbers are as they were.
    """
    device = PartialState().device if is_initialized() else torch.accelerator.current_accelerator(True)
    moves = device is not None and device.type != "cpu" and _is_movable(model)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), evaluation_mode(model, freeze=True):
        try:
            if moves:
                try:
                    model.to(device)
                except torch.OutOfMemoryError:
                    logger.warning("The model does not fit on %s and stays on the CPU, which takes longer.", device)
                    model.to("cpu")
            yield
        finally:
            if moves:
                model.to("cpu")


def _is_movable(model: Any) -> bool:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    is_placed = getattr(base, "hf_device_map", None) is not None or getattr(base, "is_quantized", False)
    return not is_placed and all(parameter.device.type == "cpu" for parameter in model.parameters())


def examples_from(
    rows: Any, tokenizer: Any, *, argument: str = "rows", samples: int = 128, seed: int = 0, max_length: int = 1024
) -> list[Example]:
    """Draw rows and bring them into the model's own chat format; of a stream, the first.

    Takes what [`~data.as_rows`] does, and rows that TRL has prepared (`input_ids` and `labels`, also packed). Rows
    whose answer is cut away entirely at `max_length` tokens are left out, which is logged; a `ValueError` if none is
    left.
    """
    rows, is_prepared = _prepared(rows)
    if is_prepared:
        chosen = _draw(rows, samples, seed)
        examples = [example for _, row in chosen for example in _prepared_examples(row)]
    else:
        is_stream = not isinstance(rows, str) and hasattr(rows, "__iter__") and not hasattr(rows, "__len__")
        options = ReadOptions(limit=samples) if is_stream else None
        found = without_harmful(as_rows(rows, argument=argument, options=options)[0], argument)
        chosen = _draw(found, samples, seed)
        if any("text" in row for _, row in chosen):
            raise ValueError(
                f"`{argument}` holds plain texts, of which no part is an answer. Give rows with `prompt` and "
                "`completion`."
            )
        numbers = [number + 1 for number, _ in chosen]
        encoded = encode_rows(tokenizer, [dict(row) for _, row in chosen], name=argument, numbers=numbers)
        examples = [Example(row.ids, row.is_answer) for row in encoded]
    cut = (Example(ids[:max_length], is_answer[:max_length]) for ids, is_answer in examples)
    left = [example for example in cut if any(example.is_answer)]
    if not left:
        raise ValueError(
            f"No answer token is left of the {len(chosen)} rows of `{argument}` within `max_length={max_length}` "
            "tokens: the prompts alone are longer. Raise `max_length`, or shorten the prompts."
        )
    if len(left) < len(examples):
        logger.warning(
            "%d of %d rows of `%s` are left out: their answers start past `max_length=%d`. Raise `max_length`.",
            *(len(examples) - len(left), len(examples), argument, max_length),
        )
    return left[:samples]


def _prepared(rows: Any) -> tuple[Any, bool]:
    """Return the rows, and whether TRL has prepared them."""
    if isinstance(columns := getattr(rows, "column_names", None), list):
        return rows, "input_ids" in columns
    if isinstance(rows, Sequence) and not isinstance(rows, str):
        return rows, bool(rows) and isinstance(rows[0], Mapping) and "input_ids" in rows[0]
    if isinstance(rows, Iterable) and not isinstance(rows, str | Mapping):  # a stream may not know its columns
        iterator = iter(rows)
        first = list(islice(iterator, 1))
        return chain(first, iterator), bool(first) and isinstance(first[0], Mapping) and "input_ids" in first[0]
    return rows, False


def _draw(rows: Any, samples: int, seed: int) -> list[tuple[int, Mapping[str, Any]]]:
    """Return rows with their numbers."""
    if not hasattr(rows, "__len__"):
        return list(enumerate(islice(rows, samples)))
    return [(i, rows[i]) for i in random.Random(seed).sample(range(len(rows)), min(samples, len(rows)))]


def _prepared_examples(row: Mapping[str, Any]) -> Iterator[Example]:
    input_ids = list(row["input_ids"])
    labels = row.get("labels", input_ids)  # as in TRL: without labels, every token counts
    start = 0
    for length in row.get("seq_lengths") or [len(input_ids)]:  # packed rows are several conversations
        part = slice(start, start + length)
        yield Example(input_ids[part], [label != -100 for label in labels[part]])
        start += length


def examples_sha256(examples: Iterable[Example]) -> str:
    """Return a SHA-256 of the tokens and of which of them are answers."""
    sha = hashlib.sha256()
    for example in examples:
        sha.update(repr([(int(i), bool(a)) for i, a in zip(*example, strict=True)]).encode())
    return sha.hexdigest()


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
    """Run the model once over all examples and return the top directions of its layers, by side and layer.

    *Outputs* are taken at the tokens of the answers: for `X_s` (d_in x n), a layer's inputs there, the left singular
    vectors of `W X_s`, that is of the output without its bias. *Inputs* are taken at the `input_tokens`, `"prompt"`,
    `"answer"` or `"all"`: the left singular vectors of these inputs. Adapters are switched off, the model is in
    evaluation mode, and nothing d x d is formed. Several processes all take what the first one found.
    """
    needs_prompts = "input" in sides and input_tokens == "prompt"
    if needs_prompts and not any(False in example.is_answer for example in examples):
        raise ValueError("The rows have no prompts, so there are no inputs to measure. Give rows with prompts.")

    def measured() -> dict[Side, dict[str, TopDirections]]:
        seen = _Pass(layers, sides, rank, input_tokens)
        body = model.get_base_model() if isinstance(model, PeftModel) else model
        body = getattr(body, "base_model", body)  # without the output head, which is expensive and not needed here
        with torch.no_grad(), measuring(model), without_adapters(model), ExitStack() as stack:
            for name, layer in layers.items():
                stack.enter_context(layer.base.register_forward_hook(partial(seen.watch, name)))
            device = input_device(model)
            for start in range(0, len(examples), batch_size):
                body(**seen.fill(examples[start : start + batch_size], device), use_cache=False)
        return {side: _results(seen.sketches[side], rank, side) for side in sides}

    return on_first_process(measured)


class _Pass:
    """One pass over conversations: the sketches, and at which tokens of the current batch what counts."""

    is_read: Tensor
    is_answer: Tensor

    def __init__(
        self, layers: Mapping[str, LinearLayer], sides: Sequence[Side], rank: int, tokens: InputTokens
    ) -> None:
        self.input_tokens = tokens
        self.sketches: dict[Side, dict[str, Sketch]] = {side: {} for side in sides}
        for side, name in product(sides, layers):
            size = layers[name].shape[side == "input"]
            self.sketches[side][name] = Sketch(size, size if size <= _EXACT_UP_TO else 2 * rank)
        self.last_read: tuple[Tensor, str] | None = None
        """What a layer has just read, and its name: the next one often reads the same, as keys do after queries."""

    def fill(self, examples: Sequence[Example], device: torch.device) -> dict[str, Tensor]:
        """Take the next examples and return what the model reads, padded on the right, where no token sees it."""
        input_ids, attention_mask, is_answer = collate(examples, 0, device)
        is_token = attention_mask.bool()
        is_read = {"prompt": is_token & ~is_answer, "answer": is_answer, "all": is_token}
        self.is_answer, self.is_read = is_answer, is_read[self.input_tokens]
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def watch(self, name: str, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Add a layer's inputs where they count, and its outputs at answers, to the sketches; its forward hook."""
        if "input" in self.sketches:
            self._read(name, args[0], self.sketches["input"])
        if "output" in self.sketches:
            columns = _chosen(name, output, self.is_answer)
            bias = getattr(layer, "bias", None)
            self.sketches["output"][name].add(columns if bias is None else columns.float() - bias.float())

    def _read(self, name: str, inputs: Tensor, sketches: dict[str, Sketch]) -> None:
        if self.last_read is not None and self.last_read[0] is inputs:
            sketches[name] = sketches[self.last_read[1]]
            return
        self.last_read = inputs, name
        sketches[name].add(_chosen(name, inputs, self.is_read))


def _chosen(name: str, activations: Tensor, mask: Tensor) -> Tensor:
    flat = activations.reshape(-1, activations.shape[-1])
    if len(flat) != mask.numel():
        raise ValueError(
            f"`{name}` sees {len(flat)} vectors for {mask.numel()} tokens, so it is not known which of them belong to "
            "answers (the layer is routed or shared in some way). Leave it out of `target_modules`."
        )
    return flat.index_select(0, mask.reshape(-1).nonzero().squeeze(1).to(flat.device))  # 3x faster than by mask


def _results(sketches: Mapping[str, Sketch], rank: int, side: Side) -> dict[str, TopDirections]:
    found = {}
    for name, sketch in sketches.items():
        if not sketch.count:
            raise ValueError(
                f"`{name}` was not run when the model read the conversations, so nothing is known about what it does "
                "in answers. Leave it out of `target_modules`."
            )
        try:
            top = sketch.top_directions(rank)
        except FloatingPointError as error:
            raise FloatingPointError(
                f"The {side}s of `{name}` are infinite or NaN while the model reads the calibration rows, so there "
                "are no directions to protect. Check the model's weights and its dtype (float16 overflows in some "
                "models; try bfloat16)."
            ) from error
        found[name] = TopDirections(top.basis.cpu(), top.singular_values.cpu(), top.total_variance)
    return found
