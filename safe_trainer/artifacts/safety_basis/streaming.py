"""One pass of a model over conversations: the leading directions of what every layer reads and says, all at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from ...distributed import on_first_process
from ...layout import trainable_layout
from ...linalg import Leading, Sketch
from ...lora.updates import LinearLayer
from .tokens import Example

Side = Literal["output", "input"]
InputTokens = Literal["prompt", "answer", "all"]

_EXACT_UP_TO = 128  # size of a layer up to which nothing is gained by a sketch that is narrower


def leading_directions(  # noqa: PLR0913, each is a setting with a name
    model: nn.Module,
    layers: Mapping[str, LinearLayer],
    examples: Sequence[Example],
    *,
    sides: Sequence[Side] = ("output",),
    rank: int = 32,
    input_tokens: InputTokens = "prompt",
    batch_size: int = 16,
) -> dict[Side, dict[str, Leading]]:
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
        `dict[str, dict[str, Leading]]`: By side, then by layer.

    Raises:
        FloatingPointError: If the model's activations are infinite or NaN somewhere; names the layer.
        ValueError: If a layer does not see the conversations token by token, or not at all, or there are no tokens.
    """
    needs_prompts = "input" in sides and input_tokens == "prompt"
    if needs_prompts and not any(False in example.is_answer for example in examples):
        raise ValueError("The rows have no prompts, so there are no inputs to measure. Give rows with prompts.")
    sketches = {side: _sketches(layers, side, rank) for side in sides}

    def measured() -> dict[Side, dict[str, Leading]]:
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


def _results(sketches: Mapping[str, Sketch], rank: int, side: Side) -> dict[str, Leading]:
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
        found[name] = Leading(leading.basis.cpu(), leading.singular_values.cpu(), leading.energy)
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
