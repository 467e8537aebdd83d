"""Where a basis comes from: the model, the tokens, the versions, the date."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from torch import nn

from ... import __version__
from ...lora.updates import LinearLayer
from ..security_vectors.identity import describe
from .tokens import Example, digest

_LIBRARIES = ("torch", "transformers", "safetensors")


def origin(model: nn.Module, layers: Mapping[str, LinearLayer], examples: Sequence[Example]) -> dict[str, Any]:
    """Return the provenance of what is measured on these layers at these examples."""
    return {
        "model": describe(model, layers),
        "rows": len(examples),
        "rows_sha256": digest(examples),
        "answer_tokens": sum(sum(example.is_answer) for example in examples),
        "prompt_tokens": sum(len(example.is_answer) - sum(example.is_answer) for example in examples),
        "versions": {"safe_trainer": __version__, **{name: version(name) for name in _LIBRARIES}},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
