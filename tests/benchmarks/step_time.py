"""Step time of each method against plain `SFTTrainer`, in one run. Their peak memory is in `memory.py`.

    python tests/benchmarks/step_time.py                       # Llama, hidden 1024, 8 layers, 4 x 256 tokens, r = 16
    python tests/benchmarks/step_time.py --hidden 256 --rounds 9
    python tests/benchmarks/step_time.py --only SaLoRA --rounds 15 --targets q_proj,v_proj

The variants take turns, one step each, in an order that changes from round to round. CPU time of the process is
compared, since other work on the machine hardly disturbs it; the ratio of each round is taken and the median reported.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

sys.path.insert(0, str(Path(__file__).parents[1]))

import planted
import tiny

from safe_trainer import (
    AdapterEMA,
    AlignmentDirection,
    AsFT,
    ConstrainedSFT,
    RefusalAnchor,
    SafeGrad,
    SafeSFTTrainer,
    SafetyBasis,
    SaLoRA,
    SecurityVectors,
    TrainedVectors,
)
from safe_trainer.linalg import TopDirections, random_basis
from safe_trainer.lora.updates import linear_layers
from safe_trainer.methods.base import SafetyMethod

WEIGHTS = "adapter_model.safetensors"
PROMPTS = [f"{number:038}" for number in range(16)]


@dataclass
class DenseAsFT(SafetyMethod):
    """The published form: every `C` (d_out x d_out) and `ΔW` (d_out x d_in) written out, as a yardstick."""

    pair: tuple[str, str]

    def attach(self, model: Any, tokenizer: Any, train_dataset: Any) -> None:
        """Form `C` of each layer from both checkpoints."""
        aligned, unaligned = (tiny.Auto.from_pretrained(path, dtype=torch.float32) for path in self.pair)
        self.layers = []
        for name, layer in model.get_base_model().named_modules():
            if hasattr(layer, "lora_A"):
                d = (aligned.get_submodule(name).weight - unaligned.get_submodule(name).weight).detach()
                self.layers.append((layer, torch.eye(d.shape[0]) - d @ d.mT / d.norm()))

    def penalty(self, model: Any) -> torch.Tensor:
        """Return the penalty from dense matrices."""
        terms = [
            (complement @ (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)).square().sum()
            for layer, complement in self.layers
        ]
        return torch.stack(terms).sum()


class DenseSaLoRA(SafetyMethod):
    """The authors' form: every `C` (d_out x d_out) written out and applied to the activations, as a yardstick."""

    def attach(self, model: Any, tokenizer: Any, train_dataset: Any) -> None:
        """Hook `C` behind every LoRA; what is taken from the base weights costs no time in a step."""
        for layer in list(model.modules()):
            if hasattr(layer, "lora_A"):
                U = random_basis(layer.out_features, 32, 0)
                layer.lora_B["default"].register_forward_hook(_times(torch.eye(layer.out_features) - U @ U.mT))


def _times(complement: torch.Tensor) -> Callable[..., torch.Tensor]:
    return lambda module, given, output: output @ complement


def variants(pair: tuple[str, str], arguments: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return what is compared: the trainer's extra arguments by name."""
    rank, targets = arguments.rank, arguments.targets
    return {
        "plain SFTTrainer": dict,
        "plain SFTTrainer, rank 2r": lambda: {"peft_config": lora(2 * rank, targets)},
        "SafeSFTTrainer(safety=None)": lambda: {"safety": None},
        "AsFT, published, exact": lambda: {
            "safety": AsFT(direction=AlignmentDirection.from_checkpoints(*pair, max_error=0.0))
        },
        "AsFT, published": lambda: {"safety": AsFT(unaligned_model=pair[1])},
        "AsFT, subspace, rank 64": lambda: {"safety": AsFT(unaligned_model=pair[1], projector="subspace", rank=64)},
        "AsFT, dense (authors' form)": lambda: {"safety": DenseAsFT(pair)},
        # Random directions, since which ones are protected costs no time.
        "SaLoRA": lambda: {"safety": SaLoRA(directions="random")},
        "SaLoRA, inputs, own start": lambda: {"safety": SaLoRA(directions="random", protect="input", task_rank=0)},
        "SaLoRA, dense (authors' form)": lambda: {"safety": DenseSaLoRA()},
        "Security Vectors, rank 8": lambda: {"safety": SecurityVectors(random_vectors(pair[0]))},
        "Constrained SFT": lambda: {"safety": ConstrainedSFT()},
        "SafeGrad, 8 prompts": lambda: {"safety": SafeGrad(PROMPTS)},
        "SaLoRA, inputs, GuardSpace's start": lambda: {
            "safety": SaLoRA(safety_data=refusals(), protect="input", rank=64, start="guardspace")
        },
        "averaged weights": lambda: {"callbacks": [AdapterEMA()]},
        "Refusal anchor": lambda: {"safety": anchor()},
        "Refusal anchor and Security Vectors": lambda: {
            "safety": [SecurityVectors(random_vectors(pair[0])), anchor()]
        },
    }


def save_pair(folder: str, hidden: int, layers: int, dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    """Save a random model and one that alignment has moved as far as the embedded pair's; return paths, aligned first.

    By a fifth of each weight's norm, and with singular values that fall as there, to 2 % of the largest: random
    differences alone would have full rank, which those of real pairs do not.
    """
    paths = tiny.save_pair(folder, shift=0.0, hidden=hidden, layers=layers)
    model = tiny.Auto.from_pretrained(paths[1])
    if dtype != model.dtype:
        model.to(dtype).save_pretrained(paths[1])
    torch.manual_seed(2)
    for layer in linear_layers(model).values():
        W = layer.base.weight
        inner = min(W.shape)
        falling = torch.exp(torch.linspace(0, -4, inner))
        d = (torch.randn(W.shape[0], inner) * falling) @ torch.randn(inner, W.shape[1])
        with torch.no_grad():
            W.add_((0.2 * W.norm() / d.norm() * d).to(dtype))
    model.save_pretrained(paths[0])
    return paths


def lora(rank: int, targets: str) -> LoraConfig:
    """Return the LoRA that all variants have, but for its rank."""
    modules = targets if targets == "all-linear" else targets.split(",")
    return LoraConfig(r=rank, target_modules=modules, task_type="CAUSAL_LM")


def random_inputs(path: str, rank: int = 64) -> SafetyBasis:
    """Return input directions of every linear layer; which ones they are costs no time."""
    shapes = {name: layer.shape for name, layer in linear_layers(tiny.Auto.from_pretrained(path)).items()}
    falling = torch.arange(rank, 0, -1, dtype=torch.float32)
    energy = 2 * falling.square().sum().item()
    inputs = {n: TopDirections(random_basis(d_in, rank, 0), falling, energy) for n, (_, d_in) in shapes.items()}
    return SafetyBasis({}, inputs)


def random_vectors(path: str) -> TrainedVectors:
    """Return vectors on every linear layer; what they hold costs no time."""
    return planted.vectors(tiny.Auto.from_pretrained(path), rank=8, scale=0.01)


def anchor() -> RefusalAnchor:
    """Return an anchor with four anchors of 64 tokens a step; which ones they are costs no time."""
    return RefusalAnchor(PROMPTS, benign_prompts=[])


def refusals() -> list[dict[str, str]]:
    """Return harmful prompts with refusals; which ones they are costs no time."""
    return [{"prompt": prompt, "completion": "No, not I."} for prompt in PROMPTS]


class Stepper:
    """A trainer that is advanced one optimizer step at a time."""

    def __init__(self, path: str, arguments: argparse.Namespace, extra: dict[str, Any]) -> None:
        kind = SafeSFTTrainer if "safety" in extra else SFTTrainer
        rows = {"input_ids": torch.randint(4, tiny.VOCABULARY, (arguments.batch, arguments.length)).tolist()}
        start = time.perf_counter()
        self.trainer = kind(
            model=path,
            args=SFTConfig(
                output_dir=tempfile.mkdtemp(),
                report_to="none",
                use_cpu=True,
                bf16=False,
                max_length=None,
                per_device_train_batch_size=arguments.batch,
                gradient_checkpointing=False,
            ),
            train_dataset=Dataset.from_dict(rows),
            processing_class=tiny.tokenizer(),
            **({"peft_config": lora(arguments.rank, arguments.targets)} | extra),
        )
        self.preparation = time.perf_counter() - start
        self.trainer.create_optimizer()
        self.batch = next(iter(self.trainer.get_train_dataloader()))
        self.trainer.current_gradient_accumulation_steps = 1
        self.contexts = ExitStack()
        for method in getattr(self.trainer, "safety_methods", ()):
            self.contexts.enter_context(method.training(self.trainer.model))
        self.callbacks = extra.get("callbacks", ())
        for callback in self.callbacks:
            callback.on_train_begin(**self.state())

    def state(self) -> dict[str, Any]:
        """Return what callbacks are given."""
        trainer = self.trainer
        given = {"args": trainer.args, "state": trainer.state, "control": trainer.control}
        return given | {"model": trainer.model, "optimizer": trainer.optimizer}

    def step(self) -> float:
        """Run one step and return its CPU seconds."""
        start = time.process_time()
        tokens = (self.batch["labels"] != -100).sum()
        self.trainer.training_step(self.trainer.model, dict(self.batch), tokens)
        self.trainer.optimizer.step()
        for callback in self.callbacks:
            callback.on_optimizer_step(**self.state())
        self.trainer.optimizer.zero_grad()
        return time.process_time() - start


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return for each variant its median step time, its ratio to plain `SFTTrainer` and its preparation time."""
    with tempfile.TemporaryDirectory() as folder:
        pair = save_pair(folder, arguments.hidden, arguments.layers)
        found = variants(pair, arguments)
        chosen = {name: build for name, build in found.items() if re.search(arguments.only, name) or "plain" in name}
        steppers = {name: Stepper(pair[0], arguments, build()) for name, build in chosen.items()}
        times: dict[str, list[float]] = {name: [] for name in steppers}
        for stepper in steppers.values():
            stepper.step()
        for turn in range(arguments.rounds):
            for name in random.Random(turn).sample(list(steppers), len(steppers)):
                times[name].append(steppers[name].step())
    plain = times["plain SFTTrainer"]
    return {
        name: {
            "seconds": statistics.median(spent),
            "ratio": statistics.median(ours / theirs for ours, theirs in zip(spent, plain, strict=True)),
            "preparation": steppers[name].preparation,
        }
        for name, spent in times.items()
    }


def sized_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the sizes of what is measured."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"hidden": 1024, "layers": 8, "length": 256, "batch": 4, "rank": 16, "rounds": 7}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--targets", default="all-linear", help="all-linear, or names such as q_proj,v_proj")
    return parser


def main() -> None:
    """Measure and write a Markdown table, or JSON."""
    parser = sized_parser(__doc__)
    parser.add_argument(
        "--only", default="", help="only variants with such a name, a regular expression, beside plain SFTTrainer"
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results = measure(arguments)
    if arguments.json:
        sys.stdout.write(json.dumps(vars(arguments) | {"results": results}, indent=1) + "\n")
        return
    sys.stdout.write("| variant | CPU s per step | ratio | preparation, s |\n|---|---|---|---|\n")
    for name, row in results.items():
        sys.stdout.write(f"| {name} | {row['seconds']:.2f} | {row['ratio']:.3f} | {row['preparation']:.1f} |\n")
    sys.stdout.write(f"\nMedians of {arguments.rounds} rounds. torch {torch.__version__}\n")


if __name__ == "__main__":
    main()
