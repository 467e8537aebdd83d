"""Monitors on two processes: they log what they log alone, in every process, or are refused when they are built.

`python test_distributed_monitors.py FOLDER PLAN` is one of the two processes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from launch import leave, spread
from processes import on_two_processes
from runs import exact_settings, lora
from transformers import AutoModelForCausalLM

from safe_trainer import AlignmentDirection, DriftMonitor, PromptSet, RefusalMonitor, SafeSFTTrainer, SafetyBasis
from safe_trainer.evaluation import Decoding, FunctionJudge, LikelihoodJudge
from safe_trainer.linalg import TopDirections, random_basis
from safe_trainer.lora.updates import linear_layers, whole

pytestmark = pytest.mark.exhaustive

STEPS, SAVED = 6, 3
VARIANTS = ["", ": directions", ": resumed", ": floor"]
KINDS = [kind + variant for variant in VARIANTS for kind in ("lora", "full")]
FIRST_LOADS = ["full", "lora: directions", "full: resumed"]
RUNS = {
    "ddp": KINDS,
    "fsdp2": KINDS,
    "fsdp2: first loads": FIRST_LOADS,
    "zero2": ["full", "full: resumed", "lora: floor"],
}
REFUSED = {"fsdp1": "Use FSDP2", "tensor": "Load the whole model", "zero3": "Use FSDP2, ZeRO-2 or DDP"}
LAUNCHES = [["ddp", "fsdp2", "fsdp2: first loads", "fsdp1", "tensor"], ["zero2", "zero3"]]
ASKED = PromptSet("harm", "harmful", tuple(chr(97 + i) * (i + 1) for i in range(16)))
LETTERS = [chr(code) for code in range(33, 127)]


def subspaces(folder: Path) -> dict[str, str]:
    """Write a direction and a basis for the model in the folder; return where they are."""
    layers = linear_layers(AutoModelForCausalLM.from_pretrained(folder / "aligned"))
    sides = [
        {name: TopDirections(random_basis(layer.shape[i], 5, i), torch.ones(5), 5.0) for name, layer in layers.items()}
        for i in (0, 1)
    ]
    given = {"direction": str(folder / "direction.safetensors"), "basis": str(folder / "basis.safetensors")}
    pair = folder / "unaligned", folder / "aligned"
    AlignmentDirection.from_checkpoints(*pair, rank=6, max_error=0).save(given["direction"])
    SafetyBasis(*sides).save(given["basis"])
    return given


def monitors(trainer: Any, folder: Path, variant: str) -> list[Any]:
    """Return a drift monitor, one that asks for likelihoods, and one that has answers generated."""
    given = {"rank": 4, **subspaces(folder)} if variant == "directions" else {}
    halves = LETTERS[::2], LETTERS[1::2]
    refusals, compliances = halves[::-1] if variant == "floor" else halves  # the second half is left while training
    judge = LikelihoodJudge(refusals, compliances, floor=0.0)
    answers = FunctionJudge(lambda _, answer: "refused" if sum(map(ord, answer)) % 2 else "complied", "parity", "1")
    generated = PromptSet("answered", "harmful", ASKED.prompts[::2])
    least = {"minimum_rate": 0.25, "restore": True} if variant == "floor" else {}
    return [
        DriftMonitor(trainer, every=1, **given),
        RefusalMonitor(trainer, [ASKED], every=1, judge=judge, decoding=Decoding(batch_size=4), **least),
        RefusalMonitor(trainer, [generated], every=SAVED, judge=answers, decoding=Decoding(max_new_tokens=6)),
    ]


def carry_out(name: str, strategy: str, folder: Path) -> None:
    """Train once with every monitor and write down what it logged on this process."""
    kind, _, variant = name.partition(": ")
    size = {"per_device_train_batch_size": 8}
    if strategy != "alone":
        size = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    with spread(strategy, folder) as (model, extra):
        output = folder / strategy / f"trained-{kind}"
        settings = {"max_steps": STEPS, "save_strategy": "no" if variant else "steps", "save_steps": SAVED}
        # FSDP resumes only with an optimizer that has a state; with an epsilon of 1, Adam does not magnify rounding.
        adam = {"optim": "adamw_torch", "adam_epsilon": 1.0, "learning_rate": 0.5}
        args = exact_settings(output, **settings, **adam, **size, **extra)
        torch.manual_seed(0)
        peft_config = lora() if kind == "lora" else None
        trainer = SafeSFTTrainer(model, args=args, train_dataset=tiny.rows(32), peft_config=peft_config)
        for monitor in monitors(trainer, folder, variant):
            trainer.add_callback(monitor)
    trainer.train(resume_from_checkpoint=str(output / f"checkpoint-{SAVED}") if variant == "resumed" else None)
    trained = {name: whole(p).norm().item() for name, p in trainer.model.named_parameters() if p.requires_grad}
    place = folder / strategy / name.replace(": ", "-")
    place.mkdir(parents=True, exist_ok=True)
    told = {"log": trainer.state.log_history, "weights": trained}
    (place / f"{trainer.args.process_index}.json").write_text(json.dumps(told))


def said(strategy: str, folder: Path) -> list[str | None]:
    """Return with which words each kind of monitor refuses to be built, or `None` where it does not."""
    found: list[str | None] = []
    with spread(strategy, folder) as (model, extra):
        args = exact_settings(folder / "refused", **extra)
        trainer = SafeSFTTrainer(model, args=args, train_dataset=tiny.rows(8), peft_config=lora())
    for build in (lambda: DriftMonitor(trainer), lambda: RefusalMonitor(trainer, [ASKED])):
        try:
            build()
            found.append(None)
        except ValueError as error:
            found.append(str(error))
    return found


def told(folder: Path, strategy: str, name: str, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / strategy / name.replace(": ", "-") / f"{rank}.json").read_text())


def logged(folder: Path, strategy: str, name: str, rank: int = 0) -> dict[int, dict[str, float]]:
    """Return what the monitors of a run wrote into the log, by step; of a resumed run what they wrote since."""
    found: dict[int, dict[str, float]] = {}
    for entry in told(folder, strategy, name, rank)["log"]:
        values = {key: value for key, value in entry.items() if key.startswith(("drift/", "safety/"))}
        values.pop("safety/monitor_seconds", None)
        if not (name.endswith("resumed") and entry["step"] <= SAVED):
            found.setdefault(entry["step"], {}).update(values)
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """Carry out every run on one process."""
    folder = tmp_path_factory.mktemp("runs")
    tiny.save_pair(folder)
    for name in KINDS:
        carry_out(name, "alone", folder)
    return folder


@pytest.fixture(scope="module")
def together(alone) -> Any:
    """Return a function that sees to it that the runs of a strategy have been carried out on two processes."""
    done: set[str] = set()

    def carried_out(strategy: str) -> Path:
        if strategy.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
            pytest.skip("DeepSpeed is not installed: `pip install deepspeed`")
        launch = next(strategies for strategies in LAUNCHES if strategy in strategies)
        if strategy not in done:
            done.update(launch)
            plan = {name: RUNS.get(name, []) for name in launch}
            on_two_processes(__file__, str(alone), json.dumps(plan))
        return alone

    return carried_out


@pytest.mark.parametrize(("strategy", "name"), [(s, name) for s, names in RUNS.items() for name in names])
def test_monitors_log_in_every_process_what_they_log_alone(strategy, name, together):
    folder = together(strategy)
    expected, weights = logged(folder, "alone", name), told(folder, "alone", name)["weights"]
    assert max(expected) == STEPS or "floor" in name
    for rank in (0, 1):
        found = logged(folder, strategy, name, rank)
        assert found.keys() == expected.keys()
        for step, values in expected.items():
            assert found[step] == pytest.approx(values, rel=1e-5, abs=1e-7), (rank, step)
        assert told(folder, strategy, name, rank)["weights"] == pytest.approx(weights, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_resumed_run_logs_what_the_uninterrupted_one_does(kind, alone):
    whole_run, resumed = logged(alone, "alone", kind), logged(alone, "alone", f"{kind}: resumed")
    assert list(resumed) == list(range(SAVED + 1, STEPS + 1))
    for step, values in resumed.items():
        assert values == pytest.approx(whole_run[step], rel=1e-5)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_is_watched_moves_and_a_floor_breaks(kind, alone):
    found = logged(alone, "alone", kind)
    for key in ("drift/relative", "safety/harm_refused", "safety/answered_refused"):
        assert len({values[key] for values in found.values() if key in values}) > 1
    assert 0 < max(logged(alone, "alone", f"{kind}: floor")) < STEPS


@pytest.mark.parametrize("strategy", REFUSED)
def test_monitors_that_would_fail_are_refused_when_they_are_built(strategy, together):
    folder = together(strategy)
    for rank in (0, 1):
        drift, refusals = json.loads((folder / strategy / f"refused-{rank}.json").read_text())
        assert REFUSED[strategy] in drift and "`safe-trainer drift`" in drift
        assert REFUSED[strategy] in refusals and "`safe-trainer compare`" in refusals


def main(folder: Path, plan: dict[str, list[str]]) -> None:
    """Carry out the runs of each strategy, and ask for those that should be refused."""
    for strategy, names in plan.items():
        for name in names:
            carry_out(name, strategy, folder)
        if strategy in REFUSED:
            (folder / strategy).mkdir(exist_ok=True)
            (folder / strategy / f"refused-{os.environ['RANK']}.json").write_text(json.dumps(said(strategy, folder)))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
