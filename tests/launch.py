"""Runs that several tests share, alone or on two processes: `python launch.py FOLDER PLAN` is one of the two.

On a CPU, accelerate takes neither FSDP nor DeepSpeed as it does on a GPU: FSDP silently becomes DDP, and DeepSpeed
silently becomes one process. So its state is set up beforehand, as it would be on a GPU, and what came of it is among
the facts that every run writes down.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
STEPS, SAVED = 3, 2  # of each run, and the step whose checkpoint is looked at and resumed from
ADAM, TWICE = "adam", "adam: resumed"  # with an optimizer that has a state, and once more from the checkpoint


def on_two_processes(*command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python COMMAND` on two processes of this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    settings = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **environment}
    result = subprocess.run(
        [*launcher, *command], env=os.environ | settings, capture_output=True, text=True, check=False, timeout=600
    )
    assert result.returncode == 0 or not check, result.stderr[-6000:]
    return result


def methods(folder: Path) -> dict[str, Callable[[], Any]]:
    """Return how to make what protects each run, from the models in the folder."""
    from safe_trainer import METHODS, conversation
    from safe_trainer.vectors import TrainedVectors

    harmful = [conversation(f"Make a bad thing {i}.", "Sure: a bad thing.") for i in range(8)]
    refused = [conversation(f"Make a bad thing {i}.", "I will not do that.") for i in range(8)]
    short = {"rank": 2, "max_steps": 3, "learning_rate": 0.05}

    def vectors(**settings: Any) -> Any:
        return METHODS["security_vectors"](harmful_data=harmful, fitting=short, **settings)

    made: dict[str, Callable[[], Any]] = {
        "none": lambda: None,
        "asft": lambda: METHODS["asft"](unaligned_model=str(folder / "unaligned"), weight=0.5),
        "asft: full": lambda: METHODS["asft"](unaligned_model=str(folder / "unaligned"), weight=0.5),
        "salora": lambda: METHODS["salora"](safety_data=refused, rank=4, task_rank=4),
        "salora: both sides": lambda: METHODS["salora"](safety_data=refused, rank=4, task_rank=0, protect="both"),
        "drift_penalty": lambda: METHODS["drift_penalty"](safety_data=refused, rank=8),
        "security_vectors": vectors,
        "security_vectors: folded": lambda: vectors(fold=True),
        "security_vectors: loaded": lambda: METHODS["security_vectors"](TrainedVectors.load(folder / "vectors")),
        "recommended": lambda: [vectors(), METHODS["drift_penalty"](safety_data=harmful, rank=8)],
        "all": lambda: [made["asft"](), made["salora"](), vectors()],
    }
    return made | dict.fromkeys([ADAM, TWICE], made["all"])


def facts(trainer: Any) -> dict[str, Any]:
    """Return what proves how a run was spread, on this process."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    parameters = list(trainer.model.parameters())
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    partitions = getattr(optimizer, "single_partition_of_fp32_groups", None)
    return {
        "world": dist.get_world_size() if dist.is_initialized() else 1,
        "wrapper": type(trainer.model_wrapped).__name__,
        "sharded": sum(isinstance(parameter, DTensor) for parameter in parameters),
        "held": sum(parameter.to_local().numel() for parameter in parameters if isinstance(parameter, DTensor)),
        "of": sum(parameter.numel() for parameter in parameters if isinstance(parameter, DTensor)),
        "partition": sum(part.numel() for part in partitions) if partitions else None,
        "empty": sum(parameter.numel() == 0 and parameter.ds_numel > 0 for parameter in parameters)
        if hasattr(parameters[0], "ds_numel")
        else 0,
    }


def held(methods: list[Any]) -> dict[str, Any]:
    """Return every tensor that the methods keep for themselves: bases, directions, vectors."""
    from torch import Tensor

    found: dict[str, Any] = {}

    def collect(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            found[name] = value.detach().clone().contiguous()
        elif isinstance(value, dict):
            for key, entry in value.items():
                collect(f"{name}.{key}", entry)
        elif isinstance(value, tuple):
            for number, entry in enumerate(value):
                collect(f"{name}.{number}", entry)

    for method in methods:
        for attribute in ("_operators", "_spans", "_bases", "_moments", "_factors"):
            collect(f"{method.tag}{attribute}", getattr(method, attribute, None))
    return found


def carry_out(name: str, strategy: str, folder: Path) -> None:
    """Train once and write down what came of it."""
    import tiny
    import torch
    from runs import exact_settings, history, lora
    from safetensors.torch import save_file

    from safe_trainer import SafeSFTTrainer

    full = name.endswith("full")
    with spread(strategy, folder) as (model, extra):
        output = folder / strategy / (ADAM if name == TWICE else name).replace(": ", "-")
        size = {"per_device_train_batch_size": 8}
        if strategy != "alone":
            size = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        saving = {"save_strategy": "no" if full else "steps", "save_steps": SAVED}
        steps = {"optim": "adamw_torch", "learning_rate": 0.01} if name in (ADAM, TWICE) else {"learning_rate": 0.5}
        args = exact_settings(output, max_steps=STEPS, **steps, **size, **saving, **extra)
        torch.manual_seed(0)
        peft_config = None if full else lora()
        rows = tiny.rows(24)
        # The one method that ZeRO-3 takes stands for all of them there.
        stopped = strategy == "zero3" and name in (ADAM, TWICE)
        safety = methods(folder)["security_vectors: loaded" if stopped else name]()
        with counted() as runs_of_layers:
            trainer = SafeSFTTrainer(model, args=args, train_dataset=rows, peft_config=peft_config, safety=safety)
    seen: list[Any] = []
    learned: set[int] = set()

    def watch(module: Any, args: Any, given: Any) -> None:
        if module.training:
            seen.extend(given["input_ids"].tolist())
            learned.add(sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad))

    trainer.model.register_forward_pre_hook(watch, with_kwargs=True)
    held_at_start = held(trainer.safety_methods)
    trainer.train(resume_from_checkpoint=str(output / f"checkpoint-{SAVED}") if name == TWICE else None)
    place = folder / strategy / name.replace(": ", "-")
    place.mkdir(parents=True, exist_ok=True)
    rank = trainer.args.process_index
    told = facts(trainer) | {"rows": seen, "trainable": max(learned), "history": history(trainer)}
    told["prepared with"] = len(runs_of_layers)
    (place / f"{rank}.json").write_text(json.dumps(told))
    save_file(held_at_start, place / f"{rank}.safetensors")
    trainer.save_model(str(place / "saved"))


@contextmanager
def counted() -> Iterator[list[None]]:
    """Add an entry to a list whenever a linear layer of any model runs."""
    from torch.nn import Linear
    from torch.nn.modules.module import register_module_forward_pre_hook

    runs: list[None] = []

    def count(module: Any, args: Any) -> None:
        if isinstance(module, Linear):
            runs.append(None)

    hook = register_module_forward_pre_hook(count)
    try:
        yield runs
    finally:
        hook.remove()


@contextmanager
def spread(strategy: str, folder: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Give the model, and the arguments that ask for the strategy, with accelerate's state as on a GPU."""
    from accelerate.state import AcceleratorState, PartialState

    path, configured = str(folder / "aligned"), {"accelerator_config": {"use_configured_state": True}}
    AcceleratorState._reset_state(reset_partial_state=True)
    if strategy.startswith("fsdp"):
        _set_up_fsdp(
            version=1 if strategy == "fsdp1" else 2,
            first_loads=strategy == "fsdp2: first loads",
            kept="SHARDED_STATE_DICT" if strategy == "fsdp2: in pieces" else "FULL_STATE_DICT",
        )
        yield path, configured
    elif strategy.startswith("zero"):
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
        yield path, {"use_cpu": False, "ddp_backend": "gloo", "deepspeed": _zero(int(strategy[-1])), **configured}
        del os.environ["ACCELERATE_USE_DEEPSPEED"]
    elif strategy == "tensor":
        from transformers import AutoModelForCausalLM

        _set_up_fsdp(version=2, first_loads=False)  # with which alone accelerate lets a CPU do it
        yield AutoModelForCausalLM.from_pretrained(path, tp_plan="auto"), configured
    else:
        yield path, {}


def _set_up_fsdp(version: int, first_loads: bool, kept: str = "FULL_STATE_DICT") -> None:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        state_dict_type=kept,
        cpu_ram_efficient_loading=False,
    )
    plugin.cpu_ram_efficient_loading = first_loads  # its constructor would look for a GPU
    Accelerator(cpu=True)
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin


def _zero(stage: int) -> dict[str, Any]:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for a minute, and gloo does it
    sharding = {"stage": stage}
    if stage == 3:  # a threshold of 0, or nothing as small as our models is split
        sharding |= {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": sharding,
    }


def refusal(name: str, strategy: str, folder: Path) -> str | None:
    """Return with which words a trainer refuses to be built, or `None` if it does not."""
    import tiny
    from runs import exact_settings, lora

    from safe_trainer import SafeSFTTrainer

    with spread(strategy, folder) as (model, extra):
        args = exact_settings(folder / "refused", **extra)
        safety = methods(folder)[name]()
        try:
            SafeSFTTrainer(model, args=args, train_dataset=tiny.rows(24), peft_config=lora(), safety=safety)
        except ValueError as error:
            return str(error)
    return None


def main(folder: Path, plan: dict[str, dict[str, list[str]]]) -> None:
    """Carry out the runs of each strategy, then ask for those that should be refused."""
    import torch.distributed as dist

    for strategy, wanted in plan.items():
        for name in wanted["runs"]:
            carry_out(name, strategy, folder)
        said = {name: refusal(name, strategy, folder) for name in wanted["refused"]}
        (folder / strategy).mkdir(exist_ok=True)
        (folder / strategy / f"refused-{os.environ['RANK']}.json").write_text(json.dumps(said))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
