"""Safe LoRA: project a finished adapter towards alignment, without data and without training."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import PeftConfig, PeftModel
from torch import Tensor

from ..artifacts.alignment_direction import matching_modules, weight_differences
from ..artifacts.checkpoint_reader import Checkpoint, listing
from ..artifacts.provenance import stamp
from ..linalg import product_norm_squared
from ..lora import io
from .base import Paper

logger = logging.getLogger(__name__)

NAME = "Safe LoRA"
PAPER = Paper(
    "Safe LoRA: the Silver Lining of Reducing Safety Risks when Fine-tuning Large Language Models",
    author="Hsu, Chia-Yi and others",
    year=2024,
    arxiv="2405.16833",
    venue="Advances in Neural Information Processing Systems",
)


def apply_safe_lora(  # noqa: PLR0913, each is a setting with a name
    adapter: PeftModel | str | Path,
    output: str | Path,
    *,
    unaligned: str | Path,
    aligned: str | Path | None = None,
    threshold: float | None = None,
    number_of_layers: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Repair a finished LoRA adapter: project the updates of layers that point away from alignment.

    For each adapted weight, `V = W_aligned − W_unaligned` and `C = V Vᵀ / ‖V‖_F`. Where the cosine of `C ΔW` and
    `ΔW = B A` is below the threshold, `C ΔW` takes the place of `ΔW`: `B` becomes `V (Vᵀ B) / ‖V‖_F`. The result is
    an ordinary adapter of the same rank and scaling. Weights are read from disk, one layer at a time.

    `C` is no projector; its eigenvalues are usually far below one, so a projected update is mostly a smaller one. The
    report says how much of its norm is left. Compare the repaired adapter on your task as well as on refusals.

    Args:
        adapter (`PeftModel`, `str` or `Path`): A model with one active adapter, which stays as it is, or the folder
            or Hub id of an adapter. Biases and `modules_to_save` are kept as they are, with a warning.
        output (`str` or `Path`): The folder to write, which must not exist or be empty.
        unaligned (`str` or `Path`): The model before alignment, usually the base model: a folder or a Hub id.
        aligned (`str` or `Path`, *optional*): The aligned model; left out, the one that the adapter belongs to.
        threshold (`float`, *optional*, defaults to `0.5`): From 0 (nothing is projected) to 1 (all layers are).
        number_of_layers (`int`, *optional*): Instead of a threshold, project this many layers, the least similar.
        progress (`Callable[[int, int, str], None]`, *optional*): Called after each layer with the number done, the
            number in all, and its name.

    Returns:
        `dict[str, Any]`: What is saved next to the weights as `safe_lora.json`: the settings, where all came from, in
        `kept` the weights that are no factors, and in `layers` by name the `similarity`, the `norm` of `C ΔW` as a
        share of that of `ΔW`, and whether it was `projected`. Layers without an update, or without a difference
        between the two models, have neither figure and are kept.

    Raises:
        FileExistsError: If there is something in `output`.
        OSError: If an adapter or a model is missing.
        ValueError: If a setting is out of its range, the adapter is not plain LoRA on linear layers, security vectors
            or repaired already, or the two models do not fit it, are quantized or identical.

    Example:

    ```python
    report = apply_safe_lora("out", "out-repaired", unaligned="Qwen/Qwen2.5-0.5B")
    ```

    Source: Hsu et al., "Safe LoRA: the Silver Lining of Reducing Safety Risks when Fine-tuning Large Language
    Models", NeurIPS 2024, arXiv 2405.16833, section 3. The factored form is ours.
    """
    if threshold is not None and number_of_layers is not None:
        raise ValueError("Give `threshold` or `number_of_layers`, not both: each says which layers are projected.")
    threshold = 0.5 if threshold is None and number_of_layers is None else threshold
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"`threshold` must be from 0 to 1, got {threshold}. The default is 0.5.")
    with io.new_folder(output) as target, _on_disk(adapter) as (folder, source):
        config, tensors = _read(folder, source)
        factors = io.factor_names(config, tensors, NAME)
        pair = _checkpoints(config, source, aligned, unaligned)
        shapes = {name: (tensors[left].shape[0], tensors[right].shape[1]) for name, (right, left) in factors.items()}
        pair[0].check_fits(source, shapes)
        layers, lefts = {}, {}
        for name, V in weight_differences(*pair, matching_modules(*pair, list(shapes))):
            right, left = (tensors[factor] for factor in factors[name])
            lefts[name], layers[name] = _projected(V, left, right)
            if progress is not None:
                progress(len(layers), len(shapes), name)
        for name in _choose(layers, threshold, number_of_layers):
            layers[name]["projected"] = True
            tensors[factors[name][1]] = lefts[name]
        names = {factor for pair_ in factors.values() for factor in pair_}
        report = {
            "source": source,
            "threshold": threshold,
            "number_of_layers": number_of_layers,
            "layers": layers,
            "kept": [name.removeprefix(io.PREFIX) for name in tensors if name not in names],
            **{checkpoint.role: checkpoint.provenance() for checkpoint in pair},
            **stamp(),
        }
        _log(report)
        io.write_adapter(target, config, tensors, folder, io.TOKENIZER)
        (target / io.REPAIR_REPORT).write_text(json.dumps(report, indent=1), encoding="utf-8")
    return report


def summary(report: Mapping[str, Any]) -> str:
    """Return in a sentence how many layers were projected, by which rule, and what is left of their updates."""
    layers = report["layers"].values()
    norms = [layer["norm"] for layer in layers if layer["projected"]]
    by_number = report["threshold"] is None
    rule = "the least similar" if by_number else f"those whose similarity is below {report['threshold']:g}"
    left = f"; {min(norms):.1%} to {max(norms):.1%} of the norm of their updates is left" if norms else ""
    return f"{len(norms)} of {len(layers)} layers were projected, {rule}{left}"


@contextmanager
def _on_disk(adapter: PeftModel | str | Path) -> Iterator[tuple[Path, str]]:
    """Give an adapter's folder and its name for messages; for a model in memory a temporary folder."""
    if not isinstance(adapter, PeftModel):
        yield io.local_folder(adapter), str(adapter)
        return
    if len(adapter.active_adapters) != 1:
        raise ValueError(
            f"{NAME} repairs one adapter, but {adapter.active_adapters} are active. Call `model.set_adapter(name)`."
        )
    (name,) = adapter.active_adapters
    with TemporaryDirectory() as folder:
        adapter.save_pretrained(folder, selected_adapters=[name])
        yield Path(folder) if name == "default" else Path(folder, name), "a model in memory"


def _read(folder: Path, source: str) -> tuple[PeftConfig, dict[str, Tensor]]:
    if io.harmful_mark(folder):
        raise ValueError(
            f"The adapter `{source}` is security vectors, harmful by construction: there is nothing to repair. Give "
            "the adapter that was trained with them."
        )
    if (folder / io.REPAIR_REPORT).is_file():
        raise ValueError(
            f"The adapter `{source}` was repaired already (it has a `{io.REPAIR_REPORT}`). Give the one that it was "
            "made from, with the settings that you want."
        )
    return io.read_adapter(folder)


def _checkpoints(
    config: PeftConfig, source: str, aligned: str | Path | None, unaligned: str | Path
) -> tuple[Checkpoint, Checkpoint]:
    found = aligned or config.base_model_name_or_path
    if not found:
        raise ValueError(f"The adapter `{source}` does not say which model it belongs to. Give `aligned`.")
    return Checkpoint("aligned", found, io.base_revision(config, aligned)), Checkpoint("unaligned", unaligned)


def _projected(V: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Return `C B`, and the figures of one layer, from `V` (d_out x d_in), `B` (d_out x r) and `A` (r x d_in)."""
    B, A, norm = left.double(), right.double(), V.norm()
    CB = (V @ (V.mT @ left.float()) / norm).double()
    change, projected = (product_norm_squared(factor, A).sqrt() for factor in (B, CB))
    if not (norm > 0 and change > 0):
        return left, {"similarity": None, "norm": None, "projected": False}
    cosine = ((CB.mT @ B) * (A @ A.mT)).sum() / (change * projected).clamp(min=1e-30)
    figures = {"similarity": cosine.item(), "norm": (projected / change).item(), "projected": False}
    return CB.to(left.dtype), figures


def _choose(layers: Mapping[str, dict[str, Any]], threshold: float | None, count: int | None) -> list[str]:
    """Return the layers to project: those below the threshold, or the `count` least similar."""
    similar = {name: layer["similarity"] for name, layer in layers.items() if layer["similarity"] is not None}
    if not similar:
        raise ValueError(
            f"There is nothing to project: in all {len(layers)} layers the update is zero, or `aligned` and "
            "`unaligned` are identical. Give a trained adapter, the aligned model and the one before its alignment."
        )
    if count is None:
        return [name for name, similarity in similar.items() if similarity < threshold]
    if not 1 <= count <= len(similar):
        raise ValueError(
            f"`number_of_layers` must be from 1 to {len(similar)}, the layers with an update, got {count}."
        )
    return sorted(similar, key=lambda name: similar[name])[:count]


def _log(report: Mapping[str, Any]) -> None:
    logger.info("%s: %s.", NAME, summary(report))
    if unknown := [f"`{name}`" for name, layer in report["layers"].items() if layer["similarity"] is None]:
        message = "%s kept these as they are, because they have no update or do not differ between the two models: %s"
        logger.warning(message, NAME, listing(unknown))
    if report["kept"]:
        kept = listing([f"`{name}`" for name in report["kept"]])
        logger.warning("%s projects factors only. Also trained, and kept as they are: %s", NAME, kept)
