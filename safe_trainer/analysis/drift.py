"""Drift: how far a fine-tune moved each layer's weights, and which share of that touches safety."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..artifacts.alignment_direction import AlignmentDirection
from ..artifacts.checkpoint_reader import Checkpoint, listing
from ..artifacts.provenance import model_and_tokenizer
from ..artifacts.safety_basis import SafetyBasis
from ..evaluation.prompting import Prompt
from ..linalg import outside_norm_squared, product_norm_squared
from ..lora.io import (
    at_revision,
    base_revision,
    harmful_mark,
    load_adapted,
    local_folder,
    other_base,
    read_adapter,
    read_config,
    scaling,
)
from ..lora.loading import load_model, named
from ..lora.updates import check_peft_config, linear_layers, weight
from .refusal_direction import RefusalChange, refusal_changes, refusal_directions

logger = logging.getLogger(__name__)

RANK = 16
SHARES = ("alignment", "outputs", "inputs")
"""Each share of an update's squared norm that can be measured."""

Factors = tuple[Tensor, Tensor | None]
"""`M` (d_out x n) and `A` (n x d_in), whose product is an update, in float32; or the update itself and `None`."""

_FACTOR, _WRAPPED, _HEAD = ".lora_A.weight", "base_model.model.", "lm_head"


@dataclass(frozen=True)
class Subspaces:
    """Orthonormal directions by layer that an update is measured against, (d_out, k), of `inputs` (d_in, k)."""

    alignment: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]

    @classmethod
    def load(
        cls,
        direction: AlignmentDirection | str | Path | None = None,
        basis: SafetyBasis | str | Path | None = None,
        rank: int = RANK,
    ) -> Subspaces:
        """Take the top `rank` directions of artifacts."""
        if rank < 1:
            raise ValueError(f"`rank` must be at least 1, got {rank}.")
        if isinstance(direction, str | Path):
            direction = AlignmentDirection.load(direction)
        if isinstance(basis, str | Path):
            basis = SafetyBasis.load(basis)
        return cls(
            {name: factors.U[:, :rank] for name, factors in direction.modules.items()} if direction else {},
            {name: top.top(rank) for name, top in basis.outputs.items()} if basis else {},
            {name: top.top(rank) for name, top in basis.inputs.items()} if basis else {},
        )

    def check(self, layers: Collection[str]) -> None:
        """Refuse directions that have no layer in common with a model, given the names of its linear layers."""
        for share in SHARES:
            named = getattr(self, share)
            if named and not any(name in layers for name in named):
                raise ValueError(
                    f"The directions ({share}) have no layer in common with the model: theirs have names such as "
                    f"`{next(iter(named))}`. Make them for the model that is fine-tuned."
                )

    def measure(self, updates: Iterable[tuple[str, Factors]], size: Callable[[str], float]) -> dict[str, LayerDrift]:
        """Return the drift of each layer from its update, which is never multiplied out, and from `‖W‖_F`."""
        return {name: self._measure(name, update, size(name)) for name, update in updates}

    def _measure(self, name: str, update: Factors, size: float) -> LayerDrift:
        left, right = update
        turned = (left.mT, None) if right is None else (right.mT, left.mT)
        total = product_norm_squared(left, right).item()
        shares, expected = {}, {}
        for share in SHARES:
            rows, columns = turned if share == "inputs" else update
            basis = getattr(self, share).get(name)
            if basis is None:
                continue
            if len(basis) != len(rows):
                raise ValueError(
                    f"The directions of `{name}` have {len(basis)} entries and its update {len(rows)} ({share}): "
                    "they belong to another model. Make them for the one that was fine-tuned."
                )
            if total > 0:
                outside = outside_norm_squared(rows, columns, basis.to(rows.device, rows.dtype)).item()
                shares[share] = max(0.0, total - outside) / total
                expected[share] = basis.shape[1] / basis.shape[0]
        return LayerDrift(math.sqrt(total), size, shares, expected)


@dataclass(frozen=True)
class LayerDrift:
    """What a fine-tune did to one linear layer, or to the residual stream after one block.

    Args:
        size (`float`): `‖ΔW‖_F`; NaN for a block.
        weight (`float`): `‖W‖_F` of the base model; NaN for a block.
        shares (`Mapping[str, float]`): Of `‖ΔW‖²`, by subspace: `"alignment"`, `"outputs"`, `"inputs"`.
        expected (`Mapping[str, float]`): What a random update would show there.
        refusal ([`RefusalChange`], *optional*): Of the layer's outputs.
    """

    size: float = math.nan
    weight: float = math.nan
    shares: Mapping[str, float] = field(default_factory=dict)
    expected: Mapping[str, float] = field(default_factory=dict)
    refusal: RefusalChange | None = None

    @property
    def relative(self) -> float:
        """Return `‖ΔW‖ / ‖W‖`."""
        return self.size / self.weight if self.weight else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        found: dict[str, Any] = {"shares": dict(self.shares), "random": dict(self.expected)}
        if self.size > 0:
            found |= {"size": self.size, "relative": self.relative}
        if self.refusal is not None:
            found["refusal"] = self.refusal._asdict() | {"kept": self.refusal.kept}
        return found


@dataclass(frozen=True)
class Drift:
    """What a fine-tune changed in a model, by layer; made by [`measure_drift`].

    Args:
        layers (`Mapping[str, LayerDrift]`): By the name in the base model. Layers that did not change are listed only
            where their outputs were looked at.
        provenance (`Mapping[str, Any]`): Both models, and the settings.
    """

    layers: Mapping[str, LayerDrift]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def relative(self) -> float:
        """Return `‖ΔW‖ / ‖W‖` of all changed layers together."""
        changed = [layer for layer in self.layers.values() if layer.size > 0]
        return math.hypot(*(x.size for x in changed)) / math.hypot(*(x.weight for x in changed)) if changed else 0.0

    def share(self, name: str) -> tuple[float, float] | None:
        """Return the share of the update in a subspace (as in `LayerDrift.shares`), and that of a random one.

        Over the layers whose subspace is known; `None` if there is none.
        """
        known = [layer for layer in self.layers.values() if name in layer.shares]
        total = sum(layer.size**2 for layer in known)
        if not total:
            return None
        found = sum(layer.size**2 * layer.shares[name] for layer in known)
        return found / total, sum(layer.size**2 * layer.expected[name] for layer in known) / total

    def figure(self, name: str) -> dict[str, float]:
        """Return one figure by layer: `"relative"`, a subspace, or `"refusal"`, the share of its direction kept."""
        if name == "relative":
            return {key: layer.relative for key, layer in self.layers.items() if layer.size > 0}
        if name == "refusal":
            return {key: layer.refusal.kept for key, layer in self.layers.items() if layer.refusal is not None}
        return {key: layer.shares[name] for key, layer in self.layers.items() if name in layer.shares}

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        shares = {name: found for name in SHARES if (found := self.share(name))}
        return {
            "relative": self.relative,
            "shares": {name: {"found": found, "random": random} for name, (found, random) in shares.items()},
            "layers": {name: layer.to_dict() for name, layer in self.layers.items()},
            "provenance": dict(self.provenance),
        }


def measure_drift(  # noqa: PLR0913, each is a setting with a name
    base: str | Path,
    tuned: str | Path,
    *,
    direction: AlignmentDirection | str | Path | None = None,
    basis: SafetyBasis | str | Path | None = None,
    rank: int = RANK,
    prompts: tuple[Sequence[Prompt], Sequence[Prompt]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Drift:
    """Measure what any fine-tune changed: an adapter or a full fine-tune against its base, wherever it was trained.

    Both are read from disk layer by layer. Only `prompts` load the two models, one after the other; and an adapter of
    another kind than LoRA, such as DoRA, is merged into its base. Linear layers are measured: no embeddings, norms and
    output head.

    Args:
        base (`str` or `Path`): The model before fine-tuning: a folder or a Hub id.
        tuned (`str` or `Path`): An adapter on it, or the model after fine-tuning.
        direction ([`AlignmentDirection`], `str` or `Path`, *optional*): For the share along the alignment direction:
            that in the span of its leading left singular vectors.
        basis ([`SafetyBasis`], `str` or `Path`, *optional*): For the shares in the safety features' subspaces, of the
            layers' outputs and inputs.
        rank (`int`, *optional*, defaults to `16`): Top directions of each subspace. Every share is listed next to
            that of a random update, which is `rank` over the size of the layer.
        prompts (`tuple[Sequence, Sequence]`, *optional*): Harmful and harmless prompts, texts or conversations, for
            the change of the refusal direction; see [`refusal_directions`].
        progress (`Callable[[int, int], None]`, *optional*): Called with (done, total) layers.

    Raises:
        OSError: If a checkpoint could not be found.
        ValueError: If `rank` is below 1, the adapter changes no weights, or something does not fit the base.

    Example:

    ```python
    drift = measure_drift("Qwen/Qwen2.5-0.5B-Instruct", "out", direction="direction.safetensors")
    print(f"{drift.relative:.2%} of the weights' size, shares {drift.share('alignment')} (found, random)")
    ```
    """
    if _is_adapter(tuned) and (revision := base_revision(read_config(tuned), base)):
        base = named(at_revision(base)[0], revision)
    start, subspaces = Checkpoint("base", base), Subspaces.load(direction, basis, rank)
    subspaces.check(start.linears)

    def shown() -> Iterator[tuple[str, Factors]]:
        for done, update in enumerate(updates_of(base, tuned, start), start=1):
            yield update
            if progress is not None:
                progress(done, len(start.linears))

    layers = subspaces.measure(shown(), lambda name: start.weight(name).norm().item())
    if prompts is not None:
        for name, change in _refusal_changes_on_disk(base, tuned, *prompts).items():
            layers[name] = replace(layers.get(name, LayerDrift()), refusal=change)
    order = {name: number for number, name in enumerate(start.linears)}  # the model's, then its blocks
    ordered = dict(sorted(layers.items(), key=lambda item: order.get(item[0], len(order))))
    provenance: dict[str, Any] = {"base": str(base), "tuned": str(tuned), "rank": rank}
    if prompts is not None:
        provenance["prompts"] = dict(zip(("harmful", "harmless"), map(len, prompts), strict=True))
    mark = harmful_mark(local_folder(tuned)) if _is_adapter(tuned) else {}
    return Drift(ordered, provenance | ({"tuned_is": mark["kind"]} if mark else {}))


def updates_of(base: str | Path, tuned: str | Path, start: Checkpoint) -> Iterator[tuple[str, Factors]]:
    """Yield `ΔW = W_tuned − W_base` of each linear layer that changed; arguments and errors: [`measure_drift`]."""
    if not _is_adapter(tuned):
        yield from _whole_updates(tuned, start)
    elif _is_plain(tuned):
        if other := other_base(read_config(tuned), str(base)):
            logger.warning("The adapter `%s`: %s", tuned, other)
        found = adapter_factors(tuned)
        start.check_fits(tuned, {name: (len(left), right.shape[1]) for name, (left, right) in found.items()})
        yield from found.items()
    else:
        yield from _merged_updates(base, tuned, start)


def adapter_factors(source: str | Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the factors of `ΔW = scaling · B A`, by the name of the linear layer that a LoRA adapter changes."""
    config, tensors = read_adapter(source)
    found = {}
    for key in [key for key in tensors if key.endswith(_FACTOR) and tensors[key].ndim == 2]:
        prefix = key.removesuffix(_FACTOR)
        name = prefix.removeprefix(_WRAPPED)
        if name.split(".")[-1] == _HEAD:
            continue  # nor is the head of complete models counted
        right, left = tensors.pop(key).float(), tensors.pop(f"{prefix}.lora_B.weight").float()
        found[name] = scaling(config, name, right.shape[0]) * left, right
    if not found:
        raise ValueError(f"The adapter `{source}` holds no LoRA on a linear layer, so there is no drift to measure.")
    if tensors:
        logger.warning("`%s` also changes %s, which is not counted.", source, listing(list(tensors), 3))
    return found


def _is_adapter(source: str | Path) -> bool:
    """Return whether a folder or Hub id holds a PEFT adapter and no complete model."""
    from peft import PeftConfig

    if Path(source).is_dir():
        # Some trainers leave the model's config.json next to an adapter.
        has_weights = any(any(Path(source).glob(name)) for name in ("model*.safetensors", "pytorch_model*.bin"))
        return (Path(source) / "adapter_config.json").is_file() and not has_weights
    try:
        PeftConfig.from_pretrained(str(source))
    except (ValueError, OSError):  # PEFT's errors where there is none
        return False
    return True


def _is_plain(source: str | Path) -> bool:
    """Return whether an adapter is a LoRA whose update is `scaling · B A`."""
    config = read_config(source)
    config.target_modules = None  # a LoRA on the head, which methods refuse, can be left out here
    try:
        check_peft_config(config, "The drift")
    except ValueError:
        return False
    return True


def _whole_updates(tuned: str | Path, start: Checkpoint) -> Iterator[tuple[str, Factors]]:
    folder = Path(tuned)
    if folder.is_absolute() and not folder.exists() or folder.is_dir() and not (folder / "config.json").is_file():
        named = [str(file.parent) for file in sorted(folder.glob("*/adapter_config.json"))]
        hint = f"the folder of one adapter: {listing(named)}" if named else "the folder of one, or a Hub id"
        raise FileNotFoundError(f"`{tuned}` holds no adapter and no complete model. Give {hint}.")
    checkpoint = Checkpoint("tuned", tuned)
    start.check_fits(tuned, checkpoint.shapes(checkpoint.linears))
    for name in checkpoint.linears:
        change = checkpoint.weight(name) - start.weight(name)
        if change.any():
            yield name, (change, None)


def _merged_updates(base: str | Path, adapter: str | Path, start: Checkpoint) -> Iterator[tuple[str, Factors]]:
    model, _ = load_adapted(adapter, str(base), dtype="float32")
    if not hasattr(model, "merge_and_unload"):
        raise ValueError(f"The adapter `{adapter}` changes no weights, so there is no drift to measure.")
    for name, layer in linear_layers(model.merge_and_unload()).items():
        change = weight(layer.outer).float() - start.weight(name)
        if change.any():
            yield name, (change, None)


def _refusal_changes_on_disk(
    base: str | Path, tuned: str | Path, harmful: Sequence[Prompt], harmless: Sequence[Prompt]
) -> dict[str, RefusalChange]:
    """Measure both models, one after the other, each with its own tokenizer."""
    model, tokenizer = model_and_tokenizer(base, None)
    before = refusal_directions(model, tokenizer, harmful, harmless)
    del model
    if _is_adapter(tuned):
        model, tokenizer = load_model(base, tuned)
    else:
        has_own = not Path(tuned).is_dir() or (Path(tuned) / "tokenizer_config.json").is_file()
        model, tokenizer = model_and_tokenizer(tuned, None if has_own else tokenizer)
    return refusal_changes(before, refusal_directions(model, tokenizer, harmful, harmless))
