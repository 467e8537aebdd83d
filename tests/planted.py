"""Security vectors for tests: made at random, large enough to be seen, and the model into which they were merged."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from safe_trainer.artifacts.provenance import describe
from safe_trainer.artifacts.security_vectors import TrainedVectors, VectorFactors
from safe_trainer.lora.updates import linear_layers


def vectors(model: nn.Module, rank: int = 3, scale: float = 0.2, seed: int = 5) -> TrainedVectors:
    """Return random vectors on every linear layer of a model, with its identity."""
    generator = torch.Generator().manual_seed(seed)
    layers = linear_layers(model)
    modules = {}
    for name, layer in layers.items():
        d_out, d_in = layer.shape
        A, B = torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
        modules[name] = VectorFactors(scale * A, scale * B)
    transposed = any(isinstance(layer.base, Conv1D) for layer in layers.values())
    return TrainedVectors(modules, {"base_model": describe(model, layers), "transposed": transposed})


def merged(model: Any, found: TrainedVectors, strength: float = 1.0) -> Any:
    """Return a copy of a model with `W + B A` for `W`: what training with the vectors sees, by another way."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, (A, B) in found.modules.items():
            layer, product = model.get_submodule(name), strength * B @ A
            layer.weight += (product.mT if isinstance(layer, Conv1D) else product).to(layer.weight.dtype)
    return model
