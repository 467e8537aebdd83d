"""A checkpoint's linear layers, read from disk one at a time.

The configuration builds the model without memory, on the meta device, and so shows which modules are linear layers and
which way round their weight is stored. The weights themselves are never loaded all at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..lora.io import at_revision, local_folder
from ..lora.loading import refuse_adapter
from ..lora.updates import linear_layers

_FLOATS = {"F64", "F32", "F16", "BF16"}
_WEIGHTS = "model.safetensors"
_UNREADABLE = SafetensorError, OSError, ValueError, LookupError, AttributeError, TypeError


class _Stored(NamedTuple):
    file: Path
    shape: tuple[int, ...]
    dtype: str


class _Linear(NamedTuple):
    shape: tuple[int, int]  # (d_out, d_in), however it is stored
    is_transposed: bool  # stored as d_in x d_out, as GPT-2 does
    keys: tuple[str, str]  # what its weight may be called in the file


class Checkpoint:
    """One checkpoint, open for reading tensor by tensor; `role` is the argument that named it, for messages.

    Raises:
        OSError: If there is no such checkpoint, or its weights are missing.
        ValueError: If it is something else than a causal language model in full precision, or is damaged.
    """

    def __init__(self, role: str, source: str | Path, revision: str | None = None) -> None:
        self.source, named = at_revision(source)
        self.role, self.name = role, f"`{role}` (`{source}`)"
        self._folder = self._find_folder(revision or named)
        self._stored = self._find_tensors()
        self.linears = self._find_linears()
        self._digest = hashlib.sha256()

    def shapes(self, names: Iterable[str]) -> dict[str, tuple[int, int]]:
        """Return (d_out, d_in) of each named layer; refused if the files hold another shape or no floating point."""
        missing, wrong = [], []
        for name in names:
            linear, stored = self.linears[name], self._stored.get(self._key(name))
            expected = linear.shape[::-1] if linear.is_transposed else linear.shape
            if stored is None:
                missing.append(f"{name}.weight")
            elif stored.shape != expected or stored.dtype not in _FLOATS:
                wrong.append(f"{name}.weight {by(stored.shape)} {stored.dtype}, not {by(expected)} in floating point")
        if missing:
            raise ValueError(
                f"{self.name} has no tensor for {listing(missing)}{prefix_hint(missing, list(self._stored))}. Its "
                "weights do not belong to its config.json, or are incomplete; download or save it again."
            )
        if wrong:
            raise ValueError(
                f"{self.name} holds {listing(wrong)}. Its weights do not belong to its config.json, or are "
                "quantized; give the full-precision checkpoint."
            )
        return {name: self.linears[name].shape for name in names}

    def check_fits(self, source: str | Path, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Refuse what has layers, given as (d_out, d_in) by name, that are missing or have another shape here."""
        held = {name: self.linears[name].shape for name in shapes if name in self.linears}
        odd = [
            f"{name} ({by(shape)}, not {by(held[name])})" if name in held else f"{name} (missing)"
            for name, shape in shapes.items()
            if shape != held.get(name)
        ]
        if odd:
            raise ValueError(
                f"`{source}` does not fit {self.name}: {len(odd)} of its {len(shapes)} layers are missing there or "
                f"have another shape: {listing(odd, 3)}. Give the model that it was trained from."
            )

    def weight(self, name: str) -> Tensor:
        """Return one layer's weight from disk, (d_out, d_in) in float32."""
        key = self._key(name)
        # Opened for each: the pages of a mapped file count as memory until it is closed.
        with safe_open(self._stored[key].file, framework="pt") as file:
            found = file.get_tensor(key)
        self._digest.update(found.contiguous().view(torch.uint8).numpy().data)
        return found.float().mT if self.linears[name].is_transposed else found.float()

    def provenance(self) -> dict[str, Any]:
        """Return where the weights came from, and the SHA-256 of all that were read, in this order."""
        is_snapshot = self._folder.parent.name == "snapshots"  # the Hub's cache names the folder after the commit
        commit = self._folder.name if is_snapshot else None
        return {"source": self.source, "revision": commit, "weights_sha256": self._digest.hexdigest()}

    def _key(self, name: str) -> str:
        """Return what the layer's weight is called in the files, or should be."""
        keys = self.linears[name].keys
        return next((key for key in keys if key in self._stored), keys[0])

    def _find_folder(self, revision: str | None) -> Path:
        # Neither other formats nor second copies of the weights, such as `consolidated.safetensors`.
        wanted = ["config.json", "adapter_config.json", "model*.safetensors", f"{_WEIGHTS}.index.json"]
        folder = local_folder(self.source, name=self.name, patterns=wanted, revision=revision)
        if not (folder / "config.json").exists():
            refuse_adapter(folder, self.name)
            raise FileNotFoundError(f"{self.name} has no config.json. Give the folder of a transformers model.")
        return folder

    def _find_tensors(self) -> dict[str, _Stored]:
        """Return shape and dtype of all that the files hold, without reading it."""
        stored: dict[str, _Stored] = {}
        for file in self._find_files():
            with self._reading(file), safe_open(file, framework="pt") as opened:
                slices = {key: opened.get_slice(key) for key in opened.keys()}
                stored |= {k: _Stored(file, tuple(s.get_shape()), s.get_dtype()) for k, s in slices.items()}
        return stored

    def _find_files(self) -> list[Path]:
        if (self._folder / _WEIGHTS).exists():
            return [self._folder / _WEIGHTS]
        index = self._folder / f"{_WEIGHTS}.index.json"
        if not index.exists():
            raise FileNotFoundError(
                f"{self.name} has no {_WEIGHTS} and no {index.name}. If its weights are in `.bin` files, which are "
                "pickles, load it with transformers and save it again with `save_pretrained`."
            )
        with self._reading(index):
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if missing := [name for name in names if not (self._folder / name).exists()]:
            raise FileNotFoundError(
                f"{self.name} lacks {listing(missing)}, which `{index.name}` names; download it again."
            )
        return [self._folder / name for name in names]

    @contextmanager
    def _reading(self, file: Path) -> Iterator[None]:
        try:
            yield
        except _UNREADABLE as error:
            raise ValueError(
                f"{self.name}: `{file.name}` cannot be read ({error}). It was cut short or damaged; download or save "
                "it again."
            ) from error

    def _find_linears(self) -> dict[str, _Linear]:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.pytorch_utils import Conv1D

        try:
            config = AutoConfig.from_pretrained(self._folder, trust_remote_code=False)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            raise ValueError(
                f"{self.name} is not a causal language model that transformers can build: {error}"
            ) from error
        if getattr(config, "quantization_config", None):
            raise ValueError(f"{self.name} is quantized. Give the full-precision checkpoint that it was made from.")
        prefix, linears = f"{model.base_model_prefix}.", {}
        for name, layer in linear_layers(model).items():
            # Some files were saved from the model without its head: transformers reads both, and so do we.
            keys = (f"{name}.weight", f"{name.removeprefix(prefix)}.weight")
            if isinstance(layer.base, torch.nn.Linear | Conv1D):
                linears[name] = _Linear(layer.shape, isinstance(layer.base, Conv1D), keys)
        return linears


def listing(entries: Sequence[str], limit: int = 10) -> str:
    """Return the first entries for a message, and how many there are if not all are shown."""
    shown = ", ".join(entries[:limit])
    return shown if len(entries) <= limit else f"{shown}, ... ({len(entries)} in all)"


def by(shape: Sequence[int]) -> str:
    """Return a shape as in `64 x 32`."""
    return " x ".join(str(size) for size in shape)


def prefix_hint(names: Sequence[str], others: Sequence[str]) -> str:
    """Return a hint for a message where two names differ only in their prefix."""
    for name in names:
        for other in others:
            if other.endswith(f".{name}") or name.endswith(f".{other}"):
                return f" (it names `{other}` what should be `{name}`: only the prefix differs)"
    return ""
