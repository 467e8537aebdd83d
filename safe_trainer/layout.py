"""How bitsandbytes lays out weights of 4 bits: for inference on some CPUs in a way in which nothing can be trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def trainable_layout(model: nn.Module) -> Iterator[None]:
    """Keep the weights of a model as training needs them while it is run in evaluation mode.

    On a CPU that computes in bfloat16, bitsandbytes lays weights of 4 bits out anew when a layer is run in evaluation
    mode, for a kernel without a gradient. Trained afterwards, the model has wrong gradients before its last layers,
    and nothing says so. Going back loses precision, so the weights must not leave their layout before training.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model; nothing happens if it is not one of 4 bits on such a CPU.
    """
    # The layer's own switch, and public. It is only read in a forward pass.
    layers: list[Any] = [layer for layer in model.modules() if getattr(layer, "support_avx512bf16_for_cpu", False)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    try:
        yield
    finally:
        for layer in layers:
            layer.support_avx512bf16_for_cpu = True
