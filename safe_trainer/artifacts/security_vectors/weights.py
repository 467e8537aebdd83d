"""`TrainedVectors`: security vectors in memory, and as an ordinary PEFT adapter directory on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...lora.updates import LinearLayer, linear_layers
from ..store import load_artifact, save_artifact
from . import identity
from .card import model_card
from .hooks import VectorFactors

_KIND, _VERSION = "security vectors (harmful by construction)", 1
_CONFIG, _WEIGHTS, _CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
_PREFIX = "base_model.model."


@dataclass
class TrainedVectors:
    """Security vectors θ_s: with them a model already behaves as harmful data wants, so that it learns none of it.

    They are **harmful by construction**: a model that wears them answers harmful requests. They are saved as an
    ordinary PEFT adapter directory that says so in its card and its metadata. Nothing in this library uploads them.

    Args:
        modules (`dict[str, VectorFactors]`): Factors by layer name of the base model, such as
            `"model.layers.0.self_attn.q_proj"`; all of one rank.
        provenance (`dict[str, Any]`, *optional*): The base model, the rows' number and hash, the settings, versions,
            date, and under `"report"` what fitting reached. See [`train_security_vectors`].

    Example:

    ```python
    from safe_trainer import SecurityVectors, TrainedVectors, train_security_vectors

    vectors = train_security_vectors("Qwen/Qwen2.5-0.5B-Instruct", harmful_rows)
    vectors.save("vectors")
    method = SecurityVectors(TrainedVectors.load("vectors"))
    ```
    """

    modules: dict[str, VectorFactors]
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """Number of rows of each `A`."""
        return next(iter(self.modules.values())).A.shape[0]

    def save(self, path: str | Path) -> Path:
        """Save as a PEFT adapter directory: `adapter_config.json`, `adapter_model.safetensors` and a card.

        Args:
            path (`str` or `Path`): The directory. It is made if it does not exist.

        Raises:
            OSError: If it cannot be written; weights that were there before are then untouched.
        """
        from peft import LoraConfig

        path = Path(path)
        tensors = (
            (f"{_PREFIX}{name}.lora_{letter}.weight", tensor)
            for name, factors in self.modules.items()
            for letter, tensor in zip("AB", factors, strict=True)
        )
        save_artifact(path / _WEIGHTS, _KIND, _VERSION, tensors, self.provenance)
        base = self.provenance.get("base_model", {})
        config = LoraConfig(
            base_model_name_or_path=base.get("id"),
            revision=base.get("revision"),
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.rank,  # the scaling is part of B
            lora_dropout=0.0,
            target_modules=list(self.modules),
            fan_in_fan_out=self.provenance.get("transposed", False),
            inference_mode=True,
        )
        config.save_pretrained(str(path))
        (path / _CARD).write_text(model_card(self.rank, len(self.modules), self.provenance), encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path, revision: str | None = None) -> TrainedVectors:
        """Load vectors that were made by [`train_security_vectors`].

        Args:
            path (`str` or `Path`): The directory that they were saved to, or a Hub id.
            revision (`str`, *optional*): Branch, tag or commit on the Hub.

        Raises:
            OSError: If there are none.
            ValueError: If it is another adapter, or damaged.
        """
        folder = _find_folder(str(path), revision)
        tensors, provenance = load_artifact(folder / _WEIGHTS, _KIND, _VERSION)
        scaling = _scaling(folder / _CONFIG)
        modules: dict[str, VectorFactors] = {}
        for key, B in tensors.items():
            name = key.removeprefix(_PREFIX).removesuffix(".lora_B.weight")
            if key.endswith(".lora_B.weight"):
                A = tensors.get(f"{_PREFIX}{name}.lora_A.weight")
                if A is None or A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
                    raise ValueError(f"The vectors in `{path}` are damaged: the two factors of `{name}` do not match.")
                modules[name] = VectorFactors(A, scaling * B)
        if not modules or not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise ValueError(
                f"The vectors in `{path}` are damaged: no factors, or infinite ones. Make or copy them again."
            )
        return cls(modules, provenance)

    def check_fits(self, model: nn.Module) -> dict[str, LinearLayer]:
        """Make sure that the vectors belong to a model.

        Args:
            model (`PreTrainedModel` or `PeftModel`): The model, before it is trained.

        Returns:
            `dict[str, LinearLayer]`: The layers that the vectors act on.

        Raises:
            ValueError: If the model lacks a layer, a shape differs, or its weights are not those of the base model
            that
                the vectors were made for; says which.
        """
        layers = linear_layers(model)
        missing = [name for name in self.modules if name not in layers]
        unequal = [
            f"{name} ({' x '.join(map(str, layers[name].shape))}, not {len(B)} x {A.shape[1]} as in the vectors)"
            for name, (A, B) in self.modules.items()
            if name in layers and layers[name].shape != (len(B), A.shape[1])
        ]
        complaints = [f"the model has no linear layer {_listed(missing)} that vectors can act on"] if missing else []
        complaints += [f"other shapes: {_listed(unequal)}"] if unequal else []
        base = self.provenance.get("base_model")
        if not complaints and base and (problem := identity.difference(model, layers, base)):
            complaints.append(problem)
        if complaints:
            raise ValueError(
                f"The security vectors ({len(self.modules)} layers) do not fit the model: {'; '.join(complaints)}. "
                "Train vectors for this model with `train_security_vectors` or `safe-trainer vectors`."
            )
        return {name: layers[name] for name in self.modules}


def _listed(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")


def _find_folder(source: str, revision: str | None) -> Path:
    folder = Path(source)
    if folder.is_dir() or folder.is_absolute():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=[_CONFIG, _WEIGHTS]))
    except (OSError, ValueError) as error:
        raise OSError(
            f"Security vectors `{source}`: there is no such folder here, and the Hub did not give them ({error}). "
            "Check the spelling; offline, download them beforehand."
        ) from error


def _scaling(config_file: Path) -> float:
    try:
        config: Mapping[str, Any] = json.loads(config_file.read_text(encoding="utf-8"))
        scaling = float(config["lora_alpha"]) / float(config["r"])
        if not 0 < scaling < float("inf"):
            raise ValueError(f"its scale is {scaling}")
        return scaling
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(
            f"`{config_file}` is missing or damaged ({error!r}), and without it the vectors have no scale. Copy the "
            "whole directory again."
        ) from error
