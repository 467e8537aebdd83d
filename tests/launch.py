"""Runs that several tests share, alone or on two processes: `python launch.py FOLDER PLAN` is one of the two.

On a CPU, accelerate takes neither FSDP nor DeepSpeed as it does on a GPU: FSDP silently becomes DDP, and DeepSpeed
silently becomes one process. So its state is set up beforehand, as it would be on a GPU, from the variables that its
launcher leaves to processes, and what came of it is among the facts that every run writes down.

A run's name is that of its method and, behind a comma, how it is carried out: `"asft: full, resumed"`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

TESTS = Path(__file__).parent
STEPS, SAVED = 3, 2  # of each run, and the step whose checkpoint is looked at and resumed from
ADAM, RESUMED = "adam", "resumed"  # with an optimizer that has a state, and once more from its checkpoint
CLIPPED = "clipped"  # gradients, to less than they are, and evaluated behind every step
SHIPPED = "as shipped"  # a strategy from our own file for accelerate's launcher, in bfloat16 as that says
NF4 = "nf4"  # a strategy over a base of 4 bits
FSDP2 = {
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
FSDP = {
    "fsdp1": {"FSDP_VERSION": "1", "FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"},
    "fsdp2": {},
    "fsdp2: first loads": {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
    "fsdp2: in pieces": {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
}
"""In what each kind of FSDP differs from `FSDP2`."""


def leave() -> None:
    """End one of the processes when all have come so far, at once: torch's threads may abort an orderly exit."""
    import torch.distributed as dist

    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def methods(folder: Path) -> dict[str, Callable[[], Any]]:
    """Return how to make what protects each run, from the models in the folder."""
    from safe_trainer import METHODS
    from safe_trainer.artifacts.security_vectors import TrainedVectors
    from safe_trainer.data import conversation

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
        "security_vectors": vectors,
        "security_vectors: loaded": lambda: METHODS["security_vectors"](TrainedVectors.load(folder / "vectors")),
        "refusal_anchor": lambda: METHODS["refusal_anchor"](refused, ["Say it nicely", "Say 2"], weight=5.0),
        "constrained_sft": lambda: METHODS["constrained_sft"](),
        "safe_grad": lambda: METHODS["safe_grad"](refused, rho=5.0),
        "safe_grad: trust region": lambda: METHODS["safe_grad"](refused, rule="trust_region", max_step_size=0.2),
        "recommended": lambda: [vectors(), made["refusal_anchor"]()],
        "all": lambda: [made["asft"](), made["salora"](), vectors()],
    }
    return made


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
        "precision": trainer.args.mixed_precision,
        "stage": getattr(trainer.accelerator.deepspeed_plugin, "zero_stage", None)
        if trainer.is_deepspeed_enabled
        else None,
        "partition": sum(part.numel() for part in partitions) if partitions else None,
        "empty": sum(parameter.numel() == 0 and parameter.ds_numel > 0 for parameter in parameters)
        if hasattr(parameters[0], "ds_numel")
        else 0,
    }


def held(methods: list[Any]) -> dict[str, Any]:
    """Return every tensor that the methods keep for themselves: bases, directions, vectors, anchors."""
    from torch import Tensor

    found: dict[str, Any] = {}

    def collect(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            found[name] = value.detach().clone().contiguous()
        elif isinstance(value, dict):
            for key, entry in value.items():
                collect(f"{name}.{key}", entry)
        elif isinstance(value, list | tuple):
            for number, entry in enumerate(value):
                collect(f"{name}.{number}", entry)

    for method in methods:
        for attribute in ("_operators", "_spans", "_bases", "_moments", "_factors", "_pools", "_answers"):
            collect(f"{method.tag}{attribute}", getattr(method, attribute, None))
    return found


def settings_of(method: str, way: str, strategy: str) -> dict[str, Any]:
    """Return the settings of a run. Two processes see in a step what one sees."""
    size: dict[str, Any] = {"per_device_train_batch_size": 8}
    if not strategy.startswith("alone"):
        size = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    saving = {"save_strategy": "steps", "save_steps": SAVED}
    if method.endswith("full") and way not in (ADAM, RESUMED):
        saving = {"save_strategy": "no"}
    chosen: dict[str, Any] = {"learning_rate": 0.5}
    if way in (ADAM, RESUMED):
        chosen = {"optim": "adamw_torch", "learning_rate": 0.01}
    if way == CLIPPED or strategy.endswith(SHIPPED):
        chosen |= {"eval_strategy": "steps", "eval_steps": 1, "max_grad_norm": 0.2}
    return chosen | size | saving | {"max_steps": STEPS, "bf16": strategy.endswith(SHIPPED)}


def carry_out(name: str, strategy: str, folder: Path) -> None:
    """Train once and write down what came of it."""
    import tiny
    import torch
    from runs import exact_settings, history, lora
    from safetensors.torch import save_file

    from safe_trainer import SafeSFTTrainer

    method, _, way = name.partition(", ")
    resumed = way == RESUMED
    with spread(strategy, folder) as (model, extra):
        output = folder / strategy / (f"{method}, {ADAM}" if resumed else name).replace(": ", "-")
        args = exact_settings(output, **settings_of(method, way, strategy), **extra)
        torch.manual_seed(0)
        # For evaluation, answers of one length, so that their mean is that of their tokens.
        rows = {"train_dataset": tiny.rows(24), "eval_dataset": tiny.rows(4)}
        peft_config, safety = None if method.endswith("full") else lora(), methods(folder)[method]()
        with counted() as runs_of_layers:
            trainer = SafeSFTTrainer(model, args=args, **rows, peft_config=peft_config, safety=safety)
    absent = sum(bool(parameter.isnan().any()) for parameter in trainer.model.parameters())
    seen: list[Any] = []
    learned: set[int] = set()

    def watch(module: Any, args: Any, given: Any) -> None:
        if module.training:
            seen.extend(given["input_ids"].tolist())
            learned.add(sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad))

    trainer.model.register_forward_pre_hook(watch, with_kwargs=True)
    held_at_start = held(trainer.safety_methods)
    trainer.train(resume_from_checkpoint=str(output / f"checkpoint-{SAVED}") if resumed else None)
    place = folder / strategy / name.replace(": ", "-")
    place.mkdir(parents=True, exist_ok=True)
    rank = trainer.args.process_index
    told = facts(trainer) | {"rows": seen, "trainable": max(learned), "history": history(trainer)}
    told |= {"prepared with": len(runs_of_layers), "absent": absent}
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
    """Give the model, and the arguments that ask for the strategy, with accelerate's state as on a GPU.

    What our own file for accelerate's launcher makes of a process's environment is read from FOLDER/KIND.json.
    """
    from accelerate.state import AcceleratorState

    path, configured = str(folder / "aligned"), {"accelerator_config": {"use_configured_state": True}}
    AcceleratorState._reset_state(reset_partial_state=True)
    kind, _, how = strategy.partition(": ")
    shipped = json.loads((folder / f"{kind}.json").read_text()) if how == SHIPPED and kind != "alone" else {}
    with patch.dict(os.environ, shipped):
        if kind.startswith("fsdp"):
            _set_up_fsdp(shipped or FSDP2 | FSDP[strategy])
            yield _on_first(path) if how == "first loads" else path, configured
        elif kind.startswith("zero"):
            yield path, _set_up_zero(int(kind[-1]), shipped=bool(shipped)) | configured
        elif kind == "tensor":
            from transformers import AutoModelForCausalLM

            _set_up_fsdp(FSDP2)  # with which alone accelerate lets a CPU do it
            yield AutoModelForCausalLM.from_pretrained(path, tp_plan="auto"), configured
        else:
            yield _quantised(path) if how == NF4 else path, {}


def _set_up_fsdp(settings: dict[str, str]) -> None:
    """Let accelerate's state be what its launcher's variables make of it on a GPU."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    precision = Accelerator(cpu=True).mixed_precision
    os.environ.update(settings | {"ACCELERATE_USE_FSDP": "true"})
    plugin = FullyShardedDataParallelPlugin()
    if precision != "no":
        plugin.set_mixed_precision(precision)
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin


def _on_first(path: str) -> Any:
    """Load a model whose weights are in the first process alone: in the others is what was in the memory before."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if int(os.environ["RANK"]):
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, torch.nan)
    return model


def _set_up_zero(stage: int, shipped: bool) -> dict[str, Any]:
    """Start DeepSpeed, and return the arguments that ask for it."""
    import deepspeed
    from accelerate.state import PartialState

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for a minute, and gloo does it
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    if shipped:
        return {}
    sharding: dict[str, Any] = {"stage": stage}
    if stage == 3:  # a threshold of 0, or nothing as small as our models is split
        sharding |= {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    settings = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": sharding,
    }
    return {"use_cpu": False, "ddp_backend": "gloo", "deepspeed": settings}


def _quantised(path: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )


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
    for strategy, wanted in plan.items():
        for name in wanted["runs"]:
            carry_out(name, strategy, folder)
        said = {name: refusal(name, strategy, folder) for name in wanted["refused"]}
        (folder / strategy).mkdir(exist_ok=True)
        (folder / strategy / f"refused-{os.environ['RANK']}.json").write_text(json.dumps(said))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
