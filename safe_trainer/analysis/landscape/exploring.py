"""`measure_landscape`: a model's weights moved over a plane, and what it says and how well it works at every place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ...artifacts import AlignmentDirection
from ...data import PromptSet
from ...evaluation import Judge, LikelihoodJudge
from ...evaluation.answers import Decoding
from ...lora.updates import linear_layers
from ..drift.updates import Factors, norm
from .axes import Axes, Normalize, alignment, axes, random_direction
from .moving import Mover, moving
from .probing import Probe
from .record import RANDOM, Landscape, Place, Record
from .way import change_to, stops_of, ways

UNALIGNED = "unaligned"
SPAN = 0.5
_ROOM = 2.5  # times as far as the farthest checkpoint, so that the picture shows what lies beyond


def measure_landscape(  # noqa: PLR0913, each is a setting with a name
    model: Any,
    tokenizer: Any,
    harmful: PromptSet,
    *,
    direction: AlignmentDirection | str | Path | None = None,
    unaligned: str | Path | None = None,
    task: PromptSet | None = None,
    run: str | Path | None = None,
    across: str | Path | None = None,
    span: float | None = None,
    span_across: float | None = None,
    points: int = 11,
    normalize: Normalize = "layer",
    judge: Judge | LikelihoodJudge | None = None,
    seed: int = 0,
    output: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    **decoding: Any,
) -> Landscape:
    """Measure harmful score and task loss around a model: along its alignment direction, and across it.

    The weights go to `W + α D + β R` and back: `D` is the alignment direction, `R` a random or a fine-tuning direction
    orthogonal to it in every layer, both with the norm of the layer's weight. Whatever happens, the model has its
    weights back afterwards, to the last bit. With `output`, every place is on disk before the next is measured, and
    what is there is not measured again.

    Args:
        model (`PreTrainedModel`): The aligned model. In float32, if it is small: bfloat16 rounds small moves away.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer, with a chat template.
        harmful (`PromptSet`): Harmful prompts; 30 to 100 of them.
        direction ([`AlignmentDirection`], `str` or `Path`, *optional*): Which layers and how many of their directions.
        unaligned (`str` or `Path`, *optional*): The unaligned model, from which the directions' other half is read;
            left out, the one that `direction` names. Without `direction`, the whole difference of all layers.
        task (`PromptSet`, *optional*): Prompts with references, for the loss.
        run (`str` or `Path`, *optional*): A training run on this model: an adapter or a whole model, with the
            `checkpoint-…` folders in it, whose way is drawn in.
        across (`str` or `Path`, *optional*): `"random"`, or the adapter or model whose update is the second direction.
            Left out, the end of `run` if there is one.
        span (`float`, *optional*): How far to go along the alignment direction, to both sides, in norms of the weights
            (with `normalize="none"` in units of the direction). Left out, 0.5.
        span_across (`float`, *optional*): The same for the second direction. Left out, 0.5; along the way of a run,
            two and a half times as far as its checkpoints went.
        points (`int`, *optional*, defaults to `11`): Places along each side of the plane, an odd number; the two axes
            have twice as many. The time goes with its square.
        normalize (`str`, *optional*, defaults to `"layer"`): `"layer"`, `"filter"` or `"none"`; see [`axes`].
        judge (`Judge` or `LikelihoodJudge`, *optional*, defaults to `LikelihoodJudge()`): Who judges. The default
            needs no answers; any other judge has them generated, which takes many times as long.
        seed (`int`, *optional*, defaults to `0`): Seed of the random direction.
        output (`str` or `Path`, *optional*): Folder for the measured places.
        progress (`Callable[[int, int], None]`, *optional*): Called with (measured, total) places.
        **decoding: Any field of [`Decoding`], for example `batch_size=16`.

    Returns:
        [`Landscape`]: See [`draw`] for its picture.

    Raises:
        ValueError: If a setting is out of its range, the directions do not fit the model, or `output` holds another
            landscape.

    Example:

    ```python
    from safe_trainer.testbed import UNALIGNED, prompt_set

    found = measure_landscape(model, tokenizer, prompt_set("harmful"), unaligned=UNALIGNED, run="out", output="basin")
    print(found.basin("alpha"), found.basin("beta"))
    ```

    Source: the plane and its normalisation are those of Li et al., NeurIPS 2018, arXiv 1712.09913; safety over it is
    Peng et al., "Navigating the Safety Landscape", NeurIPS 2024, arXiv 2405.17374; along and across the alignment
    direction, Yang et al. (AsFT), AAAI 2026, arXiv 2506.08473.
    """
    _check(points, span, span_across, harmful)
    if isinstance(direction, str | Path):
        direction = AlignmentDirection.load(direction)
    layers = linear_layers(model)
    stops = stops_of(run) if run is not None else []
    d = alignment(layers, direction, unaligned)
    source = across or (stops[-1][1] if stops else RANDOM)
    is_random = source == RANDOM
    second = random_direction({n: layers[n].shape for n in d}, seed) if is_random else change_to(source, layers)
    plane = axes(layers, d, second, normalize)
    probe = Probe(model, tokenizer, harmful, task, judge or LikelihoodJudge(), Decoding(**decoding))
    settings = {
        **probe.settings(layers), "second": RANDOM if is_random else "run", "seed": seed, "normalize": normalize,
        "along": _size(d), "across": _size(second), "orthogonal": _size(plane.across),
    }  # fmt: skip
    record = Record(output, settings)
    with moving(model, layers if stops else {**plane.along, **plane.across}) as mover:
        total = 1 + len(stops) + 4 * points - 3 + (points - 1) ** 2  # the plane shares its middle with the axes
        explorer = _Explorer(plane, probe, mover, record, progress or (lambda done, total: None), total)
        way = explorer.follow([(UNALIGNED, _turned(d))]) + explorer.follow(ways(stops, layers))
        # Towards random directions as far as along; of a run, what it reached and some more.
        reached = _ROOM * max((abs(place.beta) for place in way[1:]), default=0.0)
        alphas = _steps(span or SPAN, points)
        betas = _steps(span_across or (not is_random and reached) or SPAN, points)
        places = explorer.explore(_grid(alphas, betas))
    return Landscape(tuple(places), tuple(way), tuple(alphas[::2]), tuple(betas[::2]), settings)


class _Explorer:
    """Goes to places and measures, where that was not done before."""

    def __init__(  # noqa: PLR0913, what it goes with
        self, plane: Axes, probe: Probe, mover: Mover, record: Record, progress: Callable[[int, int], None], total: int
    ) -> None:
        self.plane, self.probe, self.mover, self.record, self.progress = plane, probe, mover, record, progress
        self.done, self.total = 0, total

    def follow(self, updates: Iterable[tuple[str, Mapping[str, Factors]]]) -> list[Place]:
        """Measure checkpoints, each at its own weights."""
        found = []
        for name, update in updates:
            alpha, beta, share = (round(value, 6) for value in self.plane.coordinates(update))
            if (name, alpha, beta) not in self.record.held:
                self.mover.to((1.0, update))
                self.record.add(self.probe.at(alpha, beta, name, share))
                self.mover.to()  # home: the next update may be read off as a difference to the model
            found.append(self.record.held[name, alpha, beta])
            self._tell()
        return found

    def explore(self, grid: list[tuple[float, float]]) -> list[Place]:
        """Measure places of the plane."""
        for alpha, beta in grid:
            if ("", alpha, beta) not in self.record.held:
                self.mover.to((alpha, self.plane.along), (beta, self.plane.across))
                self.record.add(self.probe.at(alpha, beta))
            self._tell()
        return [self.record.held["", alpha, beta] for alpha, beta in grid]

    def _tell(self) -> None:
        self.done += 1
        self.progress(self.done, self.total)


def _check(points: int, span: float | None, span_across: float | None, harmful: PromptSet) -> None:
    if points < 3 or points % 2 == 0:
        raise ValueError(f"`points` must be an odd number of at least 3, so that the model is one, got {points}.")
    if any(far is not None and not far > 0 for far in (span, span_across)):
        raise ValueError(f"`span` and `span_across` must be above 0, got {span} and {span_across}.")
    if harmful.kind != "harmful":
        raise ValueError(f"`harmful` must be a set of harmful prompts, got {harmful.kind} ones.")


def _turned(direction: Mapping[str, Factors]) -> dict[str, Factors]:
    return {name: Factors(-left, right) for name, (left, right) in direction.items()}


def _steps(span: float, points: int) -> list[float]:
    """Return twice as many places along an axis as the plane has, the model in their middle."""
    digits = max(6, 3 - math.floor(math.log10(span / (points - 1))))  # more where steps are small
    return [round(span * step / (points - 1), digits) for step in range(1 - points, points)]


def _grid(alphas: list[float], betas: list[float]) -> list[tuple[float, float]]:
    """Return the axes and then the plane, each from the model outwards, so that what matters most comes first."""
    lines = [(alpha, 0.0) for alpha in alphas] + [(0.0, beta) for beta in betas]
    plane = [(alpha, beta) for alpha in alphas[::2] for beta in betas[::2]]

    def distance(place: tuple[float, float]) -> float:
        return (place[0] / alphas[-1]) ** 2 + (place[1] / betas[-1]) ** 2

    return list(dict.fromkeys([*sorted(lines, key=distance), *sorted(plane, key=distance)]))


def _size(direction: Mapping[str, Factors]) -> dict[str, float]:
    """Return by what a direction is known again: its norm in the first and the last layer, and how many there are."""
    names = list(direction)
    return {"layers": len(names), **{name: float(f"{norm(direction[name]):.5g}") for name in (names[0], names[-1])}}
