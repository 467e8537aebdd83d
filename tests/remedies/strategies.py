"""Distributed strategies: refused before any process starts another, so that one process can try them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from runs import HARMFUL

from safe_trainer import AdapterEMA, RefusalAnchor, SafeGrad, SecurityVectors
from safe_trainer.distributed import SPLIT_AT_LOADING, Strategy
from safe_trainer.evaluation.state import watchable

from .room import PLAIN, Case

DDP, FSDP2, ZERO_2 = Strategy("DDP"), Strategy("FSDP2", is_sharded=True), Strategy("ZeRO-2")
FSDP1, ZERO_3 = Strategy("FSDP1", is_sharded=True), Strategy("ZeRO-3", is_sharded=True)
SPLIT = Strategy(SPLIT_AT_LOADING, is_sharded=True)
ELSEWHERE = Strategy("FSDP2", is_sharded=True, has_weights=False)


def under(method: Any, *strategies: Strategy) -> None:
    for strategy in strategies:
        method.check_strategy(strategy)


def watched(kind: str, **state: Any) -> Strategy:
    """Ask for a monitor under what accelerate calls a strategy."""
    accelerator = SimpleNamespace(
        distributed_type=SimpleNamespace(value=kind), state=SimpleNamespace(**state), num_processes=2
    )
    trainer = SimpleNamespace(accelerator=accelerator, model=SimpleNamespace(parameters=lambda: ()))
    return watchable(trainer, "`RefusalMonitor`", "safe-trainer compare")


def sharded(version: int) -> Strategy:
    plugin = SimpleNamespace(fsdp_version=version, cpu_ram_efficient_loading=False, state_dict_type="FULL_STATE_DICT")
    return watched("FSDP", fsdp_plugin=plugin)


def zero(stage: int) -> Strategy:
    return watched("DEEPSPEED", deepspeed_plugin=SimpleNamespace(zero_stage=stage))


def averaged(deepspeed: Any) -> None:
    args = SimpleNamespace(deepspeed_plugin=deepspeed, load_best_model_at_end=False, save_strategy="no")
    AdapterEMA()._check(args, SimpleNamespace(stateful_callbacks={}, global_step=0))


STRATEGIES: dict[str, Case] = {
    "weights in one flat piece": (
        lambda at: under(PLAIN, FSDP1),
        "which keeps all weights of a layer in one flat piece. Use FSDP2: `fsdp_version: 2`",
        [lambda at: under(PLAIN, FSDP2)],
    ),
    "weights that are split as they are loaded": (
        lambda at: under(PLAIN, SPLIT),
        "Load the complete model, and use DDP, FSDP2 or ZeRO-2",
        [lambda at: under(PLAIN, DDP, FSDP2, ZERO_2)],
    ),
    "an adapter that would be saved in pieces": (
        lambda at: under(PLAIN, Strategy("FSDP2", is_sharded=True, saves_adapter=False)),
        "no adapter would be saved. Set `fsdp_state_dict_type: FULL_STATE_DICT`",
        [lambda at: under(PLAIN, FSDP2)],
    ),
    "a start model that is not in every process": (
        lambda at: under(RefusalAnchor(), ELSEWHERE),
        "Use FSDP2 with `fsdp_cpu_ram_efficient_loading: false`, or DDP or ZeRO-2",
        [lambda at: under(RefusalAnchor(), FSDP2, DDP, ZERO_2)],
    ),
    "a penalty on weights that are split again": (
        lambda at: under(PLAIN, ZERO_3),
        "which has split the weights again when the penalty is computed. Use FSDP2 or ZeRO-2",
        [lambda at: under(PLAIN, FSDP2, ZERO_2)],
    ),
    "gradients in buffers": (
        lambda at: under(SafeGrad(), ZERO_2),
        "which keeps gradients in buffers of its own after the backward pass. Use DDP or FSDP2",
        [lambda at: under(SafeGrad(), DDP, FSDP2)],
    ),
    "vectors to fit on weights that are not there": (
        lambda at: under(SecurityVectors(harmful_data=HARMFUL), ELSEWHERE),
        "Fit them beforehand with `safe-trainer vectors`, and give the folder as `vectors`. Under FSDP2, "
        "`fsdp_cpu_ram_efficient_loading: false` works, too",
        [
            lambda at: under(SecurityVectors(vectors=at.vectors()), ELSEWHERE),
            lambda at: under(SecurityVectors(harmful_data=HARMFUL), FSDP2),
        ],
    ),
    "an average under DeepSpeed": (
        lambda at: averaged(SimpleNamespace()),
        "does not work with DeepSpeed, which splits weights its own way. Use FSDP2",
        [lambda at: averaged(None)],
    ),
    "a monitor under FSDP1": (
        lambda at: sharded(1),
        "Use FSDP2 .`fsdp_version: 2` in the configuration of accelerate.",
        [lambda at: sharded(2)],
    ),
    "a monitor under ZeRO-3": (
        lambda at: zero(3),
        "Use FSDP2, ZeRO-2 or DDP",
        [lambda at: zero(2), lambda at: sharded(2), lambda at: watched("MULTI_CPU")],
    ),
}
