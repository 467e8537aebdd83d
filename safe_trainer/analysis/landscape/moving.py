"""A model's weights moved to other places, and put back to the last bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ...lora.updates import linear_layers
from ..drift.updates import Factors


class Mover:
    """Sets the weights of some linear layers to `W + c₁ D₁ + c₂ D₂ + …`; made by [`moving`]."""

    def __init__(self, starts: Mapping[str, tuple[Any, Tensor]]) -> None:
        self._starts = starts

    @torch.no_grad()
    def to(self, *terms: tuple[float, Mapping[str, Factors]]) -> None:
        """Move to the start plus each direction times its coefficient; computed in float32 from the start each time.

        Args:
            *terms (`tuple[float, Mapping[str, Factors]]`): A coefficient and a direction by layer.
        """
        for name, (layer, start) in self._starts.items():
            moved = start.to(torch.float32, copy=True)
            matrix = moved.mT if isinstance(layer, Conv1D) else moved  # (d_out, d_in), a view
            for coefficient, direction in terms:
                if coefficient and name in direction:
                    left, right = direction[name]
                    if right is None:
                        matrix.add_(left.to(matrix.device), alpha=coefficient)
                    else:
                        matrix.addmm_(left.to(matrix.device), right.to(matrix.device), alpha=coefficient)
            layer.weight.copy_(moved)


@contextmanager
def moving(model: Any, names: Iterable[str]) -> Iterator[Mover]:
    """Give a context in which the weights of some linear layers can be moved.

    Afterwards they are as they were to the last bit, also after an exception: a copy of them is kept meanwhile, which
    takes as much memory as they do.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model.
        names (`Iterable[str]`): The layers by their names in the base model; all others stay where they are.

    Raises:
        ValueError: If a layer is not there, or its weight is quantised or not in memory.

    Example:

    ```python
    with moving(model, direction) as mover:
        mover.to((0.1, direction))
        ...
    ```
    """
    layers = linear_layers(model)
    names = list(dict.fromkeys(names))
    missing = [name for name in names if name not in layers]
    if missing:
        raise ValueError(f"The model has no linear layer `{missing[0]}` ({len(missing)} of {len(names)} are missing).")
    starts = {}
    for name in names:
        layer: Any = layers[name].base
        if not isinstance(layer, torch.nn.Linear | Conv1D) or not layer.weight.is_floating_point():
            raise ValueError(f"The weight of `{name}` is quantised and cannot be moved. Load the model in bfloat16.")
        if layer.weight.is_meta:
            raise ValueError(f"The weight of `{name}` is not in memory: it is offloaded. Load the model whole.")
        starts[name] = (layer, layer.weight.detach().clone())
    try:
        yield Mover(starts)
    finally:
        with torch.no_grad():
            for layer, start in starts.values():
                layer.weight.copy_(start)
