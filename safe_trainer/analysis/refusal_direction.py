"""The refusal direction: how activations on harmful prompts differ from those on harmless ones, layer by layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..evaluation.prompting import Prompt, encode, left_padded
from ..evaluation.state import examining
from ..lora.modes import accepted_inputs, input_device
from ..lora.updates import linear_layers

_NOISE = 1e-5  # share of an activation below which a difference is rounding
_BLOCK = re.compile(r"^(.*?\.\d+)\.")


class RefusalChange(NamedTuple):
    """What a fine-tune did to the refusal direction at one place."""

    before: float
    """Its length in the model before: how far harmful prompts are from harmless ones."""
    after: float
    """The new difference, projected on the old direction."""
    cosine: float
    """Between the old and the new direction."""

    @property
    def kept(self) -> float:
        """Return the share of the projection that is left; 1 is no change; below 0 the direction is reversed."""
        return self.after / self.before


def refusal_directions(
    model: Any,
    tokenizer: Any,
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    *,
    batch_size: int = 16,
    system_prompt: str | None = None,
) -> dict[str, Tensor]:
    """Return by layer the difference of mean activations (d,), harmful minus harmless, at a prompt's last token.

    It is taken at the output of every linear layer and of every block (the residual stream), in one pass. Layers that
    see no difference are left out, as the first attention where a template ends every prompt.

    Source: Arditi et al., "Refusal in Language Models Is Mediated by a Single Direction", NeurIPS 2024, arXiv
    2406.11717, section 2.3.
    """
    if not harmful or not harmless:
        raise ValueError(f"Both kinds of prompts are needed, got {len(harmful)} harmful and {len(harmless)} harmless.")
    means = [_means(model, encode(model, tokenizer, prompts, system_prompt), batch_size)
             for prompts in (harmful, harmless)]  # fmt: skip
    found = {name: means[0][name] - means[1][name] for name in means[0] if name in means[1]}
    return {name: r for name, r in found.items() if r.norm() > _NOISE * means[0][name].norm()}


def refusal_changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, RefusalChange]:
    """Compare the refusal directions of a model before and after; arguments from [`refusal_directions`]."""
    found = {}
    for name in (name for name in before if name in after):
        old, new = before[name].double(), after[name].double()
        length, projected = old.norm().item(), (old @ new / old.norm()).item()
        found[name] = RefusalChange(length, projected, projected / new.norm().item())
    return found


def _means(model: Any, encoded: Sequence[Sequence[int]], batch_size: int) -> dict[str, Tensor]:
    """Return the mean of what each linear layer and each block puts out at the last token."""
    sums: dict[str, Tensor] = {}

    def add(module: nn.Module, inputs: Any, output: Any, *, name: str) -> None:
        shown = output[0] if isinstance(output, tuple) else output  # (B, T, d)
        if shown.ndim == 3:  # experts see tokens and not rows
            total = shown[:, -1].float().sum(dim=0).cpu().double()
            sums[name] = sums[name] + total if name in sums else total

    layers = linear_layers(model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    blocks = dict.fromkeys(found[1] for name in layers if (found := _BLOCK.match(name)))
    places = {name: layer.outer for name, layer in layers.items()}
    places |= {name: base.get_submodule(name) for name in blocks}
    order = sorted(encoded, key=len)
    with examining(model), torch.no_grad(), ExitStack() as stack:
        for name, module in places.items():
            stack.callback(module.register_forward_hook(partial(add, name=name)).remove)
        for start in range(0, len(order), batch_size):
            inputs = left_padded(order[start : start + batch_size], input_device(model))
            model(**accepted_inputs(model, **inputs, use_cache=False, logits_to_keep=1))
    return {name: total / len(encoded) for name, total in sums.items()}
