"""The alignment direction: what alignment did to each weight, from two checkpoints, as a few factors."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..linalg import frobenius_norm, truncated_svd
from .checkpoint_reader import Checkpoint, by, listing, prefix_hint
from .provenance import stamp
from .store import load_artifact, save_artifact

logger = logging.getLogger(__name__)

_KIND, _VERSION = "alignment direction", 1


@dataclass(frozen=True)
class DirectionFactors:
    """The alignment direction `d` of one weight, cut after its top `k` left singular vectors.

    The operator of AsFT, `C = d dᵀ / ‖d‖_F`, is `U diag(s² / ‖d‖_F) Uᵀ` up to `error_bound`.

    Args:
        U (`Tensor`): Left singular vectors, float32, of shape (d_out, k).
        singular_values (`Tensor`): `s`, largest first, float32, of shape (k,).
        frobenius_norm (`float`): `‖d‖_F` of the complete `d`.
        next_singular_value (`float`): The first one cut off; for large weights an upper bound of it.
        shape (`tuple[int, int]`): (d_out, d_in) of `d`.
    """

    U: Tensor
    singular_values: Tensor
    frobenius_norm: float
    next_singular_value: float
    shape: tuple[int, int]

    @property
    def error_bound(self) -> float:
        """Upper bound of `‖C − U diag(s² / ‖d‖_F) Uᵀ‖₂`, that is `s_{k+1}² / ‖d‖_F`."""
        return self.next_singular_value**2 / self.frobenius_norm


@dataclass
class AlignmentDirection:
    """What alignment did to each weight: `d = W_aligned − W_unaligned`, kept as a few singular vectors per module.

    AsFT (Yang et al., AAAI 2026, arXiv 2506.08473) anchors fine-tuning to this direction: the model is safest along
    it, and leaves the "narrow safety basin" across it. Compute it once from two checkpoints, and use it for every run.

    Args:
        modules (`dict[str, DirectionFactors]`): Factors by module name of the base model, such as
            `"model.layers.0.self_attn.q_proj"`.
        provenance (`dict[str, Any]`, *optional*): Both checkpoints with commit and a SHA-256 of the weights that were
            compared, the settings, the versions of the libraries, and the date.

    Example:

    ```python
    >>> from safe_trainer import AlignmentDirection
    >>> from safe_trainer.testbed import ALIGNED, UNALIGNED
    >>> direction = AlignmentDirection.from_checkpoints(ALIGNED, UNALIGNED, modules="q_proj|v_proj", rank=4)
    >>> direction.modules["model.layers.0.self_attn.q_proj"].U.shape[1] <= 4
    True

    ```
    """

    modules: dict[str, DirectionFactors]
    provenance: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_checkpoints(
        cls,
        aligned: str | Path,
        unaligned: str | Path,
        *,
        modules: str | Collection[str] | None = None,
        rank: int | None = None,
        max_error: float = 0.01,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> AlignmentDirection:
        """Compute the direction from two checkpoints on disk, one tensor at a time.

        The memory needed is that of a few times the largest weight, whatever the size of the models, plus the factors.

        Args:
            aligned (`str` or `Path`): The aligned model, usually the chat model: a folder or a Hub id.
            unaligned (`str` or `Path`): The model before alignment, usually the base model that it was trained from.
            modules (`str` or `Collection[str]`, *optional*): A regular expression that is searched in module names
                (`"q_proj|v_proj"`), or the names themselves. Left out, every linear layer but the output embedding.
            rank (`int`, *optional*): Keep at most this many directions per module, even where that is too few for
                `max_error`. With `max_error=0`, exactly this many where the weight has them.
            max_error (`float`, *optional*, defaults to `0.01`): Upper bound of `‖C − C_k‖₂`, from which the fewest
                directions of each module follow. The norm of no update `(I − C) ΔW` is off by more than this share of
                `‖ΔW‖`. With 0, everything that float32 can resolve is kept.
            progress (`Callable[[int, int, str], None]`, *optional*): Called after each module with the number done,
                the number in all, and its name.

        Returns:
            [`AlignmentDirection`]: Without the modules that are identical in both checkpoints, which are logged.

        Raises:
            OSError: If a checkpoint or a file of it is missing.
            ValueError: If a setting is out of its range, a checkpoint is damaged, quantized or only an adapter, or the
                two do not have the same modules, or are identical.
        """
        if rank is not None and rank < 1:
            raise ValueError(f"`rank` must be at least 1, got {rank}. Leave it out to let `max_error` choose it.")
        if not 0 <= max_error < 1:
            raise ValueError(f"`max_error` must be at least 0 and below 1, got {max_error}. The default is 0.01.")
        pair = Checkpoint("aligned", aligned), Checkpoint("unaligned", unaligned)
        shapes = matching_modules(*pair, modules)
        found = dict(_factorize(pair, shapes, max_error, rank, progress))
        identical = [name for name in shapes if name not in found]
        if not found:
            raise ValueError(
                f"{pair[0].name} and {pair[1].name} are identical in all {len(shapes)} modules, so there is no "
                "direction between them. Give the aligned model and the model before its alignment."
            )
        if identical:
            logger.warning("Left out, because both checkpoints are identical there: %s", listing(identical))
        largest = max(factors.error_bound for factors in found.values())
        logger.info("Alignment direction of %d modules, error at most %.2g", len(found), largest)
        provenance = {
            "max_error": max_error,
            "rank": rank,
            **{checkpoint.role: checkpoint.provenance() for checkpoint in pair},
            **stamp(),
            "identical_modules": identical,
            "largest_error_bound": largest,
        }
        return cls(found, provenance)

    def save(self, path: str | Path) -> Path:
        """Save to one safetensors file; see [`load`]. On an `OSError` an old file of that name is untouched."""
        parts = ("shape", "frobenius_norm", "next_singular_value")
        entries = {name: {part: getattr(one, part) for part in parts} for name, one in self.modules.items()}
        tensors = (
            (f"{name}.{part}", getattr(factors, part))
            for name, factors in self.modules.items()
            for part in ("U", "singular_values")
        )
        return save_artifact(path, _KIND, _VERSION, tensors, {"modules": entries, "provenance": self.provenance})

    @classmethod
    def load(cls, path: str | Path) -> AlignmentDirection:
        """Load a file written by [`save`], and check that it is sound: complete, with finite and orthonormal `U`.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged, or holds something else.
        """
        tensors, details = load_artifact(path, _KIND, _VERSION)
        try:
            modules = {
                name: DirectionFactors(
                    tensors[f"{name}.U"],
                    tensors[f"{name}.singular_values"],
                    float(entry["frobenius_norm"]),
                    float(entry["next_singular_value"]),
                    (int(entry["shape"][0]), int(entry["shape"][1])),
                )
                for name, entry in details["modules"].items()
            }
            for name, factors in modules.items():
                if not torch.allclose(factors.U.mT @ factors.U, torch.eye(factors.U.shape[1]), atol=1e-3):
                    raise ValueError(f"`U` of `{name}` is not orthonormal")
            return cls(modules, dict(details["provenance"]))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ValueError(
                f"The {_KIND} `{path}` is damaged: its tensors and its details do not agree ({error!r}). Compute or "
                "copy it again."
            ) from error

    def check_fits(self, named_shapes: Mapping[str, tuple[int, int]]) -> None:
        """Make sure that the direction covers the weights to be trained, given as (d_out, d_in) by name.

        Raises:
            ValueError: If a module is not in the direction, or has another shape there; names them.
        """
        missing = [name for name in named_shapes if name not in self.modules]
        unequal = [
            f"{name} ({by(shape)}, not {by(self.modules[name].shape)} as in the direction)"
            for name, shape in named_shapes.items()
            if name in self.modules and tuple(shape) != tuple(self.modules[name].shape)
        ]
        complaints = []
        if missing:
            identical = [name for name in missing if name in set(self.provenance.get("identical_modules", ()))]
            reason = f" (alignment did not change {listing(identical)}, so they have none)" if identical else ""
            hint = prefix_hint(missing, list(self.modules))
            complaints.append(f"it has nothing for {listing(missing)}{reason}{hint}")
        if unequal:
            complaints.append(f"other shapes: {listing(unequal)}")
        if complaints:
            sources = [
                self.provenance.get(role, {}).get("source", "an unknown model") for role in ("aligned", "unaligned")
            ]
            raise ValueError(
                f"The alignment direction ({len(self.modules)} modules, from {' and '.join(sources)}) does not fit "
                f"the {len(named_shapes)} weights to be trained: {'; '.join(complaints)}. Compute it from the "
                "checkpoint that is being fine-tuned, for these modules, or train only modules that it has."
            )

    def summary(self) -> list[dict[str, Any]]:
        """Return one row per module for a table: `module`, `shape`, `rank` (k), `error_bound` and `norm` (`‖d‖_F`)."""
        return [
            {
                "module": name,
                "shape": one.shape,
                "rank": one.U.shape[1],
                "error_bound": one.error_bound,
                "norm": one.frobenius_norm,
            }
            for name, one in self.modules.items()
        ]


def _factorize(
    pair: tuple[Checkpoint, Checkpoint],
    shapes: Mapping[str, tuple[int, int]],
    max_error: float,
    rank: int | None,
    progress: Callable[[int, int, str], None] | None,
) -> Iterator[tuple[str, DirectionFactors]]:
    """Yield the factors of one module after the other, without those that are identical."""
    for done, (name, d) in enumerate(weight_differences(*pair, shapes), start=1):
        norm = frobenius_norm(d)
        if norm > 0:
            U, singular_values, following = truncated_svd(d, math.sqrt(max_error * norm), rank)
            yield name, DirectionFactors(U, singular_values, norm, following, shapes[name])
        if progress is not None:
            progress(done, len(shapes), name)


def weight_differences(
    aligned: Checkpoint, unaligned: Checkpoint, names: Iterable[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield `W_aligned − W_unaligned` (d_out, d_in) of one layer after the other, in float32; refused if not finite.

    The names are those of [`matching_modules`].
    """
    for name in names:
        d = aligned.weight(name) - unaligned.weight(name)
        if not math.isfinite(frobenius_norm(d)):
            raise ValueError(
                f"`{name}` holds infinite or NaN weights in {aligned.name} or {unaligned.name}. Download or save it "
                "again."
            )
        yield name, d


def matching_modules(
    aligned: Checkpoint, unaligned: Checkpoint, modules: str | Collection[str] | None
) -> dict[str, tuple[int, int]]:
    """Return (d_out, d_in) of the selected linear layers, which both checkpoints must have in the same shape."""
    here, there = _select(aligned, modules), _select(unaligned, modules)
    if not here and not there:
        raise ValueError(
            f"No linear layer of {aligned.name} matches `modules` ({modules!r}). It has "
            f"{listing(list(aligned.linears))}; the output embedding is not among them."
        )
    wanted = [] if modules is None or isinstance(modules, str) else list(modules)
    unknown = [name for name in wanted if name not in here and name not in there]
    if unknown:
        raise ValueError(f"`modules` names {listing(unknown)}, which {aligned.name} has no linear layer for.")
    complaints = []
    for one, names, others in ((aligned, here, there), (unaligned, there, here)):
        missing = [f"{name} ({by(one.linears[name].shape)})" for name in names if name not in others]
        if missing:
            complaints.append(f"only {one.name} has {listing(missing)}")
    hint = prefix_hint([name for name in here if name not in there], [name for name in there if name not in here])
    shapes = {name: (aligned.linears[name].shape, unaligned.linears[name].shape) for name in here if name in there}
    unequal = [f"{name} ({by(a)}, not {by(b)})" for name, (a, b) in shapes.items() if a != b]
    if unequal:
        complaints.append(f"other shapes in {aligned.name} than in {unaligned.name}: {listing(unequal)}")
    if complaints:
        raise ValueError(
            f"There is no direction between these two checkpoints: {'; '.join(complaints)}{hint}. Give an aligned "
            "model and the model that it was trained from, or select the `modules` that they share."
        )
    unaligned.shapes(there)
    return aligned.shapes(here)


def _select(checkpoint: Checkpoint, modules: str | Collection[str] | None) -> list[str]:
    modules = "" if modules is None else modules
    if isinstance(modules, str):
        try:
            return [name for name in checkpoint.linears if re.search(modules, name)]
        except re.error as error:
            raise ValueError(f"`modules` is not a regular expression ({error}), got {modules!r}.") from error
    return [name for name in checkpoint.linears if name in set(modules)]
