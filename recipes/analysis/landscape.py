"""How far a model can be moved before it stops refusing, and where a fine-tune took it.

    python recipes/analysis/landscape.py --model safe_trainer/testbed/models/aligned \
        --unaligned safe_trainer/testbed/models/unaligned --run out/testbed-plain --span 0.3 --output out/landscape

The weights move to `W + α D + β R`. `D` is the alignment direction, `W_aligned − W_unaligned`; `R`, orthogonal to it
in every layer, is the update of a training run, or random. Both have the norm of the layer's weight: α = 0.1 moves a
layer by a tenth of its weight. Afterwards the model has its weights back, to the last bit. Each measured place is in
`landscape.csv` at once, so the same command continues where it stopped. After Peng et al., NeurIPS 2024, arXiv
2405.17374, and Yang et al. (AsFT), AAAI 2026, arXiv 2506.08473.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import logging
import math
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safe_trainer import PromptSet, evaluate, load_model, load_prompts, testbed
from safe_trainer.analysis.drift import updates_of
from safe_trainer.artifacts.checkpoint_reader import Checkpoint
from safe_trainer.artifacts.fitting import row_losses
from safe_trainer.data import conversation
from safe_trainer.data.encoding import collate, encode_row
from safe_trainer.evaluation import LikelihoodJudge
from safe_trainer.lora.updates import linear_layers, weight

logger = logging.getLogger("landscape")

Direction = dict[str, Tensor]  # by the layer's name, (d_out, d_in) in float32
INK, SAFE, HARMFUL, LOSS = "#1f2328", "#0b62c4", "#b5232b", "#a05a00"
HEAT = [[0, "#eef4fb"], [0.5, "#f0a35e"], [1, HARMFUL]]


@dataclasses.dataclass(frozen=True)
class Place:
    """One place in the plane, or a checkpoint (`name`) with the place nearest to it.

    `refused`, `complied` and `neither` count harmful prompts; `loss` is the mean over the task's answer tokens, in
    nats; `share` is how much of the checkpoint's `‖ΔW‖²` lies in the plane.
    """

    alpha: float
    beta: float
    refused: int
    complied: int
    neither: int
    loss: float
    name: str = ""
    share: float = 1.0

    def percent(self, outcome: str) -> float:
        """Return the rate of an outcome, in percent."""
        return 100 * int(getattr(self, outcome)) / (self.refused + self.complied + self.neither)


@contextmanager
def moving(model: Any) -> Iterator[Any]:
    """Give a function that moves the weights to the start plus multiples of directions; on leaving, they are back."""
    layers = {name: layer.base for name, layer in linear_layers(model).items()}
    starts = {name: layer.weight.detach().clone() for name, layer in layers.items()}

    @torch.no_grad()
    def move(*terms: tuple[float, Direction]) -> None:
        for name, layer in layers.items():
            layer.weight.copy_(starts[name])
            for coefficient, direction in terms:
                if coefficient and name in direction:
                    weight(layer).add_(direction[name].to(layer.weight.device), alpha=coefficient)

    try:
        yield move
    finally:
        move()


def update(base: str, tuned: str | Path) -> Direction:
    """Return `W_tuned − W_base` of each linear layer that an adapter or a whole model changes."""
    found = updates_of(base, tuned, Checkpoint("base", base))
    return {name: left if right is None else left @ right for name, (left, right) in found}


def axes(model: Any, along: Direction, across: Direction) -> tuple[Direction, Direction]:
    """Return both directions with each weight's norm, the second orthogonal to the first in every layer."""
    sizes = {name: weight(layer.outer).float().norm().cpu() for name, layer in linear_layers(model).items()}
    D = {name: sizes[name] * d / d.norm() for name, d in along.items() if d.any()}
    R = {}
    for name, r in across.items():
        free = r - (r * D[name]).sum() / D[name].square().sum() * D[name] if name in D else r
        if free.norm() > 1e-3 * r.norm():  # otherwise float32's rounding of a direction along the first
            R[name] = sizes[name] * free / free.norm()
    if not D or not R:
        raise ValueError("There is no plane: one of the two directions is zero, or both are the same.")
    return D, R


def coordinates(D: Direction, R: Direction, change: Direction) -> tuple[float, float, float]:
    """Return α and β of the nearest place of the plane, and the share of `‖ΔW‖²` that lies in the plane."""
    squares = [sum(matrix.square().sum().item() for matrix in axis.values()) for axis in (D, R, change)]
    held = [sum((axis[n] * change[n]).sum().item() for n in axis if n in change) for axis in (D, R)]
    share = (held[0] ** 2 / squares[0] + held[1] ** 2 / squares[1]) / squares[2]
    return round(held[0] / squares[0], 6), round(held[1] / squares[1], 6), round(min(1.0, share), 6)


def checkpoints(run: Path) -> list[tuple[str, Path]]:
    """Return the checkpoints in a run's folder by step, then the adapter or model that was saved at its end."""
    numbered = sorted((int(path.name.split("-")[1]), path) for path in run.glob("checkpoint-*[0-9]"))
    stops = [(f"step {step}", path) for step, path in numbered] + [("end", run)]
    found = [
        stop for stop in stops if (stop[1] / "adapter_config.json").exists() or (stop[1] / "config.json").exists()
    ]
    if not found:
        raise FileNotFoundError(f"`{run}` holds no adapter, no model and no `checkpoint-…`. Give the folder of a run.")
    return found


@dataclasses.dataclass(frozen=True)
class Probe:
    """What is measured at every place: refusals by `evaluate`, and the loss on a task's answers."""

    model: Any
    tokenizer: Any
    harmful: PromptSet
    task: PromptSet | None

    def at(self, alpha: float, beta: float, name: str = "", share: float = 1.0) -> Place:
        """Measure the model as it is now, for a place."""
        try:  # likelihoods need no answers, so one token is enough
            judges, prompts = [LikelihoodJudge()], [self.harmful]
            asked = evaluate(self.model, self.tokenizer, prompts, judges=judges, max_new_tokens=1, batch_size=32)
            found = Counter(asked[self.harmful.name].outcomes)
        except FloatingPointError:  # so far off that the logits are NaN
            found = Counter()
        neither = len(self.harmful.prompts) - found["refused"] - found["complied"]
        return Place(alpha, beta, found["refused"], found["complied"], neither, self.loss(), name, share)

    def loss(self) -> float:
        """Return the mean loss over the task's answer tokens, in nats."""
        total, count = 0.0, 0
        pairs = zip(self.task.prompts, self.task.references or (), strict=True) if self.task else ()
        rows = [encode_row(self.tokenizer, conversation(prompt, answer)) for prompt, answer in pairs]
        for start in range(0, len(rows), 32):
            batch = collate(rows[start : start + 32], self.tokenizer.pad_token_id or 0, self.model.device)
            tokens = batch.is_answer.sum(1)
            total, count = total + (row_losses(self.model, batch) * tokens).sum().item(), count + int(tokens.sum())
        return round(total / count, 6) if count else math.nan


class Record:
    """The measured places of a folder: read when opened, each new one on disk before the next is measured."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file, marker = folder / "landscape.csv", folder / "landscape.json"
        if marker.is_file() and json.loads(marker.read_text()) != settings:
            raise ValueError(f"`{folder}` holds a landscape with other settings. Choose another `--output`.")
        marker.write_text(json.dumps(settings))
        lines = self.file.read_text().splitlines(keepends=True) if self.file.is_file() else []
        whole = [line for line in lines if line.endswith("\n")]  # the last may be cut off, if the program was killed
        self.file.write_text("".join(whole))
        kinds = [{"int": int, "float": float, "str": str}[str(f.type)] for f in dataclasses.fields(Place)]
        places = [Place(*(kind(value) for kind, value in zip(kinds, row, strict=True))) for row in csv.reader(whole)]
        self.held = {(place.name, place.alpha, place.beta): place for place in places}

    def add(self, place: Place) -> None:
        """Keep a place and write it."""
        self.held[place.name, place.alpha, place.beta] = place
        with self.file.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(dataclasses.astuple(place))


def measure(args: argparse.Namespace, probe: Probe) -> tuple[list[Place], list[Place], list[float], list[float]]:
    """Return the plane's places, the checkpoints' and the steps along both axes."""
    d = {name: -change for name, change in update(args.model, args.unaligned).items()}
    stops = checkpoints(args.run) if args.run else []
    seeds = {name: torch.Generator().manual_seed(args.seed + zlib.crc32(name.encode())) for name in d}
    random = {name: torch.randn(d[name].shape, generator=generator) for name, generator in seeds.items()}
    across = update(args.model, stops[-1][1]) if stops and not args.random else random
    D, R = axes(probe.model, d, across)
    names = ("model", "unaligned", "run", "random", "seed", "harmful", "task", "count")
    record = Record(args.output, {name: str(getattr(args, name)) for name in names})
    with moving(probe.model) as move:
        way = []
        for name, source in [("unaligned", args.unaligned), *stops]:
            change = update(args.model, source)
            alpha, beta, share = coordinates(D, R, change)
            if (name, alpha, beta) not in record.held:
                move((1.0, change))
                record.add(probe.at(alpha, beta, name, share))
            way.append(record.held[name, alpha, beta])
        reached = 0 if args.random else 2.5 * max((abs(place.beta) for place in way[1:]), default=0)
        alphas, betas = (steps(span, args.points) for span in (args.span, args.span_across or reached or args.span))
        grid = [(a, b) for a in alphas for b in betas if not a or not b or (a in alphas[::2] and b in betas[::2])]
        for done, (alpha, beta) in enumerate(grid, 1):
            if ("", alpha, beta) not in record.held:
                move((alpha, D), (beta, R))
                record.add(probe.at(alpha, beta))
            logger.info("%d of %d places", done, len(grid))
    return [record.held["", alpha, beta] for alpha, beta in grid], way, alphas, betas


def steps(span: float, points: int) -> list[float]:
    """Return places along an axis, twice as many as the plane has, with the model in the middle."""
    return [float(f"{span * step / (points - 1):.6g}") for step in range(1 - points, points)]


def draw(places: list[Place], way: list[Place], alphas: list[float], betas: list[float], title: str) -> Any:
    """Return the figure: harmful prompts complied with and loss over the plane, and outcomes along both axes."""
    from plotly.graph_objects import Heatmap, Scatter
    from plotly.subplots import make_subplots

    held = {(place.alpha, place.beta): place for place in places}
    titles = ("Harmful prompts complied with, %", "Loss on task answers, nats per token", "β = 0", "α = 0")
    specs = [[{}, {}], [{"secondary_y": True}] * 2]
    figure = make_subplots(rows=2, cols=2, subplot_titles=titles, horizontal_spacing=0.13, specs=specs)
    plane = [[held[alpha, beta] for alpha in alphas[::2]] for beta in betas[::2]]
    for column, (scale, bar) in enumerate(((HEAT, 0.41), ("Blues", 0.945)), 1):
        z = [[place.percent("complied") if column == 1 else place.loss for place in line] for line in plane]
        span = {"zmin": 0, "zmax": 100} if column == 1 else {}
        bars = {"x": bar, "y": 0.78, "len": 0.5, "thickness": 10}
        heat = Heatmap(x=alphas[::2], y=betas[::2], z=z, colorscale=scale, colorbar=bars, **span)
        figure.add_trace(heat, row=1, col=column)
        for marks, symbol, name in ((way[:1], "diamond", "unaligned model"), (way[1:], "circle", "checkpoint")):
            inside = [p for p in marks if abs(p.alpha) <= alphas[-1] and abs(p.beta) <= betas[-1]]
            colours = {"color": [p.percent("complied") for p in inside], "cmin": 0, "cmax": 100, "colorscale": HEAT}
            marker = {"symbol": symbol, "size": 11, "line": {"color": INK, "width": 1.5}, **colours}
            told = [f"{p.name}, {p.share:.0%} in the plane" for p in inside]
            dots = Scatter(
                x=[p.alpha for p in inside], y=[p.beta for p in inside], text=told, marker=marker, name=name
            )
            figure.add_trace(dots.update(mode="markers", showlegend=column == 1), row=1, col=column)
        line = [held[alpha, 0.0] for alpha in alphas] if column == 1 else [held[0.0, beta] for beta in betas]
        x = [p.alpha if column == 1 else p.beta for p in line]
        for outcome, colour in (("complied", HARMFUL), ("refused", SAFE), ("neither", INK)):
            curve = Scatter(x=x, y=[p.percent(outcome) for p in line], name=outcome, line_color=colour)
            figure.add_trace(curve.update(showlegend=column == 1), row=2, col=column)
        loss = Scatter(x=x, y=[p.loss for p in line], name="task loss (right)", line={"color": LOSS, "dash": "dash"})
        figure.add_trace(loss.update(showlegend=column == 1), row=2, col=column, secondary_y=True)
        figure.update_xaxes(title_text="α, along the alignment direction, in ‖W‖", row=1, col=column)
        figure.update_yaxes(title_text="β, across it, in ‖W‖", row=1, col=column)
    figure.update_layout(title=title, template="plotly_white", width=1080, height=910, legend_orientation="h")
    return figure


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the aligned model: folder or Hub id")
    parser.add_argument("--unaligned", required=True, help="the model that it was aligned from")
    parser.add_argument("--run", type=Path, help="a training run's output folder, with its checkpoints")
    parser.add_argument("--random", action="store_true", help="a random second direction also with --run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random direction")
    parser.add_argument("--span", type=float, default=0.5, help="how far to go along, to both sides, in ‖W‖")
    parser.add_argument("--span-across", type=float, help="how far across; left out, 2.5 times as far as the run went")
    parser.add_argument("--points", type=int, default=11, help="places along each side of the plane, an odd number")
    parser.add_argument("--harmful", default="testbed", help="file of harmful prompts, or `testbed`")
    parser.add_argument("--task", default="testbed", help="file of prompts with answers, `testbed`, or nothing")
    parser.add_argument("--count", type=int, default=40, help="how many prompts of each to use")
    parser.add_argument("--output", type=Path, default=Path("landscape"))
    args = parser.parse_args(arguments)
    if args.points < 3 or args.points % 2 == 0 or args.span <= 0 or (args.span_across or 1) <= 0:
        parser.error("--points must be an odd number of at least 3, --span and --span-across above 0.")
    return args


def main(arguments: list[str] | None = None) -> None:
    """Measure and draw."""
    args = parse(arguments)
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    own = args.harmful == "testbed", args.task == "testbed"
    harmful = testbed.prompt_set("harmful") if own[0] else load_prompts(args.harmful, "harmful")[0]
    task = testbed.prompt_set("benign") if own[1] else load_prompts(args.task, "task")[0] if args.task else None
    model, tokenizer = load_model(args.model, dtype=torch.float32)
    probe = Probe(model, tokenizer, harmful.first(args.count), task and task.first(args.count))
    figure = draw(*measure(args, probe), title=f"Safety around {Path(args.model).name}")
    figure.write_html(args.output / "landscape.html")
    try:
        figure.write_image(args.output / "landscape.png")
    except (ImportError, ValueError, RuntimeError) as error:  # kaleido, or its browser, is missing
        logger.warning("Wrote HTML only: PNG needs kaleido and Chrome or Chromium (%s).", error)


if __name__ == "__main__":
    main()
