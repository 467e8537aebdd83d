"""What holds for every method in METHODS: an ordinary adapter comes out, and nothing of the method stays behind.

A new method is in all of this by its card.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from marks import exhaustive_but
from peft import PeftModel, PromptEncoderConfig
from peft.utils import get_peft_model_state_dict
from runs import (
    Outcome,
    StopAt,
    assert_close,
    assert_same_weights,
    even_rows,
    exact_settings,
    given,
    history,
    lora,
    method_of,
    run,
    weights,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTTrainer

from safe_trainer import METHODS, SafeSFTTrainer
from safe_trainer.methods.base import SafetyMethod, overrides

# For each method as its card builds it, and for variants that go another way through it: from the paths of an aligned
# model and of the same before its alignment to the method.
PULLED = "safe_grad: trust region"
BUILD: dict[str, Callable[[str, str], SafetyMethod]] = {
    **{name: functools.partial(method_of, name) for name in METHODS},
    "salora: both sides": functools.partial(method_of, "salora", task_rank=0, protect="both"),
    "salora: GuardSpace's start": functools.partial(method_of, "salora", protect="input", start="guardspace"),
    PULLED: functools.partial(method_of, "safe_grad", rule="trust_region"),
}
VARIANTS = list(BUILD)
ENDS: dict[str, BaseException | None] = {
    "well": None,
    "failed": RuntimeError("disk full"),
    "interrupted": KeyboardInterrupt(),
}
HOW = exhaustive_but(["well", "failed"], ENDS)
KNOWN = exhaustive_but(list(METHODS), VARIANTS)
SOME = exhaustive_but(["salora", "refusal_anchor"], METHODS)
IDS = torch.randint(4, tiny.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[str, str]:
    """Save an aligned model and the same before its alignment; return their paths."""
    return tiny.save_pair(tmp_path_factory.mktemp("pair"))


def protected(name: str, pair: tuple[str, str]) -> Callable[..., SafeSFTTrainer]:
    """Return what builds a trainer with the method of that name."""
    return lambda **arguments: SafeSFTTrainer(**arguments, safety=BUILD[name](*pair))


def adapting(pair: tuple[str, str], folder: object, **changes: Any) -> dict[str, Any]:
    """Return a trainer's arguments for a LoRA on the saved model, in float32."""
    usual = {"model": pair[0], "processing_class": None, "peft_config": lora(), "bf16": False}
    return given(folder, **(usual | changes))


def logits(model: nn.Module) -> Tensor:
    """Return what a model answers outside of training, and leave its mode as it was."""
    mode = model.training
    model.eval()
    with torch.no_grad():
        answer = model(input_ids=IDS, use_cache=False).logits.float()
    model.train(mode)
    return answer


class Witness(TrainerCallback):
    """Writes beside each checkpoint what the model that was saved in it answers."""

    def on_save(self, args, state, control, model=None, **kwargs):
        torch.save(logits(model), Path(args.output_dir) / f"checkpoint-{state.global_step}" / "answers.pt")


# ---- one run for each method and each way to end, looked at from all sides


@dataclass
class Ended:
    """What a training leaves that ended in one of the ways."""

    folder: Path
    trainer: SFTTrainer
    method: SafetyMethod | None
    given: dict[str, Any]
    settings_before: dict[str, dict]
    settings_after: dict[str, dict]


def settings_of(arguments: dict[str, Any], method: SafetyMethod | None) -> dict[str, dict]:
    """Return copies of all settings that are the user's own."""
    own = {field.name: id(getattr(method, field.name)) for field in fields(method) if field.init} if method else {}
    args, adapter = arguments["args"].to_dict(), arguments["peft_config"].to_dict()
    return {"args": copy.deepcopy(args), "adapter": copy.deepcopy(adapter), "method": own}


@pytest.fixture(scope="module")
def ended(pair, tmp_path_factory) -> Callable[[str | None, str], Ended]:
    """Return a function from a method's name, `None` for plain TRL, and a way to end to what is then left."""
    made: dict[tuple[str | None, str], Ended] = {}

    def end(name: str | None, how: str) -> Ended:
        if (name, how) not in made:
            made[name, how] = train(name, how, pair, tmp_path_factory.mktemp("run"))
        return made[name, how]

    return end


def train(name: str | None, how: str, pair: tuple[str, str], folder: Path) -> Ended:
    stop = [StopAt(2, ENDS[how])] if ENDS[how] is not None else []
    config = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None, "max_steps": 3}
    arguments = adapting(pair, folder, callbacks=[Witness(), *stop], **config)
    method = BUILD[name](*pair) if name else None
    before = settings_of(arguments, method)
    trainer = SafeSFTTrainer(**arguments, safety=method) if name else SFTTrainer(**arguments)
    try:
        trainer.train()
    except BaseException as error:
        assert error is ENDS[how]
    else:
        assert ENDS[how] is None
    trainer.save_model(str(folder / "saved"))
    torch.save(logits(trainer.model), folder / "saved" / "answers.pt")
    return Ended(folder, trainer, method, arguments, before, settings_of(arguments, method))


def traces(model: nn.Module) -> dict[str, Any]:
    """Return everything about a model that a method may have touched and must have put back, but for the weights."""
    hooks = [key for key in vars(nn.Module()) if key.endswith(("_hooks", "_hooks_with_kwargs"))]
    assert len(hooks) > 8  # or torch calls them something else now
    return {
        "classes": {name: type(module).__qualname__ for name, module in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": {name: [len(getattr(module, key)) for key in hooks] for name, module in model.named_modules()},
        "parametrized": [name for name, module in model.named_modules() if parametrize.is_parametrized(module)],
        "trained": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "buffers": [name for name, _ in model.named_buffers()],
        "keys": list(model.state_dict()),
        "adapter keys": sorted(get_peft_model_state_dict(model)) if isinstance(model, PeftModel) else [],
    }


LEFTOVERS: dict[str, Callable[[nn.Module], object]] = {
    "a hook": lambda model: model.model.layers[0].mlp.register_forward_hook(lambda *call: None),
    "a hook on saving": lambda model: model.register_state_dict_post_hook(lambda *call: None),
    "a parametrization": lambda model: parametrize.register_parametrization(model.lm_head, "weight", nn.Identity()),
    "a buffer": lambda model: model.register_buffer("basis", torch.zeros(2), persistent=False),
    "another forward": lambda model: setattr(model.lm_head, "forward", model.lm_head.forward),
    "a frozen weight": lambda model: model.lm_head.weight.requires_grad_(False),
    "another class": lambda model: setattr(model.lm_head, "__class__", type("Projected", (nn.Linear,), {})),
}


@pytest.mark.parametrize("leftover", LEFTOVERS)
def test_traces_show_whatever_a_method_could_leave(leftover):
    model = tiny.model()
    LEFTOVERS[leftover](model)
    assert traces(model) != traces(tiny.model())
    assert traces(tiny.model()) == traces(tiny.model())


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_of_the_method_is_left_on_the_model(name, how, ended):
    ours, theirs = traces(ended(name, how).trainer.model), traces(ended(None, how).trainer.model)
    assert {aspect for aspect in theirs if ours[aspect] != theirs[aspect]} == set()


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", VARIANTS)
def test_base_weights_are_those_of_the_checkpoint_bit_by_bit(name, how, ended, pair):
    wrapped = ended(name, how).trainer.model.get_base_model().state_dict()
    base = {key.replace(".base_layer", ""): tensor for key, tensor in wrapped.items() if ".lora_" not in key}
    assert_same_weights(base, weights(AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32)))


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", VARIANTS)
def test_settings_of_the_user_stay_as_they_were(name, how, ended):
    ours, theirs = ended(name, how), ended(None, how)
    assert ours.settings_after["adapter"] == ours.settings_before["adapter"]
    assert ours.settings_after["method"] == ours.settings_before["method"]
    filled_in, by_trl = (changed(run.settings_before["args"], run.settings_after["args"]) for run in (ours, theirs))
    assert filled_in == by_trl


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {key for key in before | after if before.get(key) != after.get(key)}


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_saved_has_the_files_and_the_names_of_a_plain_adapter(name, how, ended):
    ours, theirs = ended(name, how), ended(None, how)
    saved = [path.relative_to(theirs.folder) for path in theirs.folder.rglob("*") if path.is_file()]
    assert {path.relative_to(ours.folder) for path in ours.folder.rglob("*") if path.is_file()} == {*saved}
    adapters = [path for path in saved if path.name == "adapter_model.safetensors"]
    assert len(adapters) == (4 if how == "well" else 3)  # two or three checkpoints, and what was saved at the end
    for path in adapters:
        assert load_file(ours.folder / path).keys() == load_file(theirs.folder / path).keys()
        file = path.with_name("adapter_config.json")
        mine, plain = (json.loads((run.folder / file).read_text()) for run in (ours, theirs))
        assert changed(mine, plain) <= {"r", "lora_alpha", "target_modules"}  # the last is a set, in any order
        assert set(mine["target_modules"]) == set(plain["target_modules"])
        assert mine["lora_alpha"] / mine["r"] == plain["lora_alpha"] / plain["r"]


STOCK = """
import json, sys
sys.modules["safe_trainer"] = None  # an import would raise
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, *folders = sys.argv[1:]
ids = torch.load(folders.pop(0))
distances = {}
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    clean = model(input_ids=ids, use_cache=False).logits
    adapted = PeftModel.from_pretrained(model, folder).eval()(input_ids=ids, use_cache=False).logits
    expected = torch.load(folder + "/answers.pt")
    distances[folder] = [(adapted - expected).norm().item(), (expected - clean).norm().item()]
print(json.dumps(distances))
"""


@pytest.mark.slow
@pytest.mark.parametrize("ways", exhaustive_but(["well, failed"], ["well, failed", "interrupted"]))
def test_every_saved_adapter_answers_the_same_in_stock_peft_without_our_package(ways, ended, pair, tmp_path):
    (tmp_path / "stock.py").write_text(STOCK)
    torch.save(IDS, tmp_path / "ids.pt")
    folders = [
        str(path.parent)
        for name, how in itertools.product(VARIANTS, ways.split(", "))
        for path in ended(name, how).folder.rglob("adapter_model.safetensors")
    ]
    command = [sys.executable, "-P", str(tmp_path / "stock.py"), pair[0], str(tmp_path / "ids.pt"), *folders]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=600)
    assert result.returncode == 0, result.stderr
    distances = json.loads(result.stdout.splitlines()[-1])
    assert len(distances) == len(VARIANTS) * sum({"well": 4}.get(how, 3) for how in ways.split(", "))
    for folder, (distance, way) in distances.items():
        assert way > 1e-3, f"{folder} holds an adapter that does nothing, so nothing was compared"
        assert distance < 1e-5 * way + 1e-5, folder


# ---- how training goes


def plain_or(name: str | None, pair: tuple[str, str]) -> Callable[..., SFTTrainer]:
    return protected(name, pair) if name else SFTTrainer


@pytest.fixture(scope="module")
def alone(pair, tmp_path_factory) -> Callable[[Callable[..., Any]], Any]:
    """Return a function from one that trains with a method to what it gives for plain TRL, once for all methods."""
    return functools.cache(lambda trained: trained(None, pair, tmp_path_factory.mktemp("run")))


def way(outcome: Outcome) -> Tensor:
    """Return how far and where the trained weights went, as one vector."""
    return torch.cat([(outcome.end[name] - outcome.start[name]).float().flatten() for name in sorted(outcome.end)])


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_accumulation_of_small_batches_is_one_large_batch(name, pair, tmp_path):
    def trained(batch, accumulation):
        size = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        args = exact_settings(tmp_path, **size, learning_rate=1.0)
        return run(protected(name, pair), adapting(pair, tmp_path, args=args, train_dataset=even_rows(24)))

    large, small = trained(8, 1), trained(2, 4)
    assert large.moved
    assert_close(small.end, large.end, large.start, tolerance=1e-4)
    logged = [
        [entry[key] for entry in history(outcome.trainer) for key in ("loss", "safety_penalty") if key in entry]
        for outcome in (large, small)
    ]
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_method_makes_a_difference(name, pair, alone, tmp_path):
    ours, theirs = answers_after(name, pair, tmp_path), alone(answers_after)
    base = logits(AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32))
    assert (ours - theirs).norm() > 1e-3 * (theirs - base).norm()


def answers_after(which, pair, folder):
    args = exact_settings(folder, learning_rate=1.0)
    return logits(
        run(plain_or(which, pair), adapting(pair, folder, args=args, train_dataset=even_rows(24))).trainer.model
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_bf16_autocast_goes_the_way_of_float32(name, pair, tmp_path):
    def trained(bf16):
        args = exact_settings(tmp_path, bf16=bf16, learning_rate=1.0)
        return run(protected(name, pair), adapting(pair, tmp_path, args=args, train_dataset=even_rows(12)))

    exact, rounded = trained(False), trained(True)
    assert {tensor.dtype for tensor in rounded.end.values()} == {torch.float32}
    assert (way(rounded) - way(exact)).norm() < 0.1 * way(exact).norm()


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_a_resumed_run_ends_like_one_that_was_never_stopped(name, pair, tmp_path):
    def arguments(steps):
        schedule = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2}
        return adapting(pair, tmp_path, max_steps=steps, **schedule)

    whole = run(protected(name, pair), arguments(5))
    resumed = run(protected(name, pair), arguments(5), resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.trainer.state.global_step == 5
    assert_close(resumed.end, whole.end, whole.start, tolerance=1e-3)
    losses = [[entry["loss"] for entry in history(one.trainer) if "loss" in entry] for one in (resumed, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != PULLED])  # which moves at any learning rate
def test_evaluation_during_training_sees_the_model_that_is_delivered(name, pair, alone, tmp_path):
    ours, theirs = evaluated(name, pair, tmp_path), alone(evaluated)  # without a step taken, that is the base model
    assert len(ours) == 2
    for mine, plain in zip(ours, theirs, strict=True):
        assert mine.keys() == plain.keys()
        assert mine == pytest.approx(plain, rel=1e-5)


def evaluated(which, pair, folder):
    config = {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0, "max_steps": 2}
    outcome = run(plain_or(which, pair), adapting(pair, folder, eval_dataset=tiny.rows(6), **config))
    return [entry for entry in history(outcome.trainer) if "eval_loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_a_method_serves_a_second_trainer_as_it_served_the_first(name, pair, tmp_path):
    method = BUILD[name](*pair)
    first, second = (
        run(lambda **arguments: SafeSFTTrainer(**arguments, safety=method), adapting(pair, tmp_path)) for _ in range(2)
    )
    assert_same_weights(second.end, first.end)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_training_can_go_on_with_the_same_trainer(name, pair, tmp_path):
    trainer = protected(name, pair)(**adapting(pair, tmp_path))
    trainer.train()
    once = weights(trainer.model)
    trainer.train()
    assert any(not torch.equal(tensor, once[key]) for key, tensor in weights(trainer.model).items())
    assert all(torch.isfinite(tensor).all() for tensor in weights(trainer.model).values())


WAYS = {
    "messages": lambda: {"train_dataset": messages()},
    "tokenized": lambda: {"train_dataset": even_rows(12)},
    "streamed": lambda: {"train_dataset": tiny.rows().to_iterable_dataset()},
    "packed": lambda: {"packing": True, "max_length": 32},
    "packed, wrapped": lambda: {"packing": True, "max_length": 32, "packing_strategy": "wrapped"},
    "padding-free": lambda: {"padding_free": True, "max_length": None},
    "dft loss": lambda: {"loss_type": "dft"},
    "no gradient checkpointing": lambda: {"gradient_checkpointing": False},
    "reentrant checkpointing": lambda: {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "dropout": lambda: {"peft_config": lora(lora_dropout=0.3)},
    "rank-stabilised": lambda: {"peft_config": lora(use_rslora=True)},
    "a rank for each layer": lambda: {"peft_config": lora(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 4})},
}


def messages() -> Dataset:
    return Dataset.from_list([{"messages": row["prompt"] + row["completion"]} for row in tiny.rows()])


@pytest.fixture(scope="module")
def plainly_moved(pair, tmp_path_factory) -> Callable[[str], set[str]]:
    """Return a function from a way to train to the factors `B` that a run of plain TRL moves."""

    @functools.cache
    def moved(way: str) -> set[str]:
        outcome = run(SFTTrainer, adapting(pair, tmp_path_factory.mktemp("run"), **WAYS[way]()))
        return {key for key in outcome.moved if "lora_B" in key}

    return moved


@pytest.mark.slow
@pytest.mark.parametrize("way", exhaustive_but(["packed", "streamed"], WAYS))
@pytest.mark.parametrize("name", METHODS)
def test_every_way_to_train_works_with_the_method_or_is_refused_with_the_reason(
    name, way, pair, plainly_moved, tmp_path
):
    arguments = adapting(pair, tmp_path, **WAYS[way]())
    if way == "dft loss" and overrides(BUILD[name](*pair), "token_weights"):
        with pytest.raises(ValueError, match=f"{METHODS[name].name} weights tokens"):
            protected(name, pair)(**arguments)
        return
    outcome = run(protected(name, pair), arguments)
    assert {key for key in outcome.moved if "lora_B" in key} == plainly_moved(way)
    assert all(torch.isfinite(tensor).all() for tensor in outcome.end.values())


@pytest.mark.slow
@pytest.mark.parametrize("architecture", exhaustive_but(["qwen2"], tiny.ARCHITECTURES))
@pytest.mark.parametrize("name", METHODS)
def test_every_architecture_works_with_the_method(name, architecture, tmp_path):
    pair = tiny.save_pair(tmp_path, architecture)
    targets = ["c_attn", "c_proj"] if architecture == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    config = lora(target_modules=targets, fan_in_fan_out=architecture == "gpt2")
    outcome = run(protected(name, pair), adapting(pair, tmp_path, peft_config=config))
    assert outcome.moved and all("lora_" in key for key in outcome.moved)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_training_in_full_works_or_is_refused_with_the_reason(name, pair, tmp_path):
    arguments = adapting(pair, tmp_path, peft_config=None)
    try:
        trainer = protected(name, pair)(**arguments)
    except ValueError as refusal:
        assert METHODS[name].name in str(refusal)
        return
    assert_leaves_no_traces(trainer, SFTTrainer(**adapting(pair, tmp_path, peft_config=None)))


def assert_leaves_no_traces(ours: SFTTrainer, theirs: SFTTrainer) -> None:
    """Assert that after training a model is as it is after plain training, but for the weights."""
    for trainer in (ours, theirs):
        trainer.train()
    left, plain = traces(ours.model), traces(theirs.model)
    assert {aspect for aspect in plain if left[aspect] != plain[aspect]} == set()


# ---- methods together, and how they present themselves


PAIRS = exhaustive_but(
    [("security_vectors", "refusal_anchor"), ("asft", "salora")], itertools.permutations(METHODS, 2)
)


@pytest.mark.slow
@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_two_methods_work_together_or_are_refused_with_the_reason(one, other, pair, tmp_path):
    methods = [BUILD[one](*pair), BUILD[other](*pair)]
    try:
        trainer = SafeSFTTrainer(**adapting(pair, tmp_path), safety=methods)
    except ValueError as refusal:
        assert METHODS[one].name in str(refusal) or METHODS[other].name in str(refusal)
        return
    assert_leaves_no_traces(trainer, SFTTrainer(**adapting(pair, tmp_path)))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_names_itself_and_its_source(name):
    method = METHODS[name]
    assert method.name != SafetyMethod.name and method.tag != SafetyMethod.tag
    if method.paper is None:
        assert "Source: ours" in method.__doc__
    else:
        assert method.paper.arxiv in method.__doc__
        assert method.paper.arxiv in method.paper.citation and method.paper.title in method.paper.citation
    for field in fields(method):
        assert not field.init or f"{field.name} (" in method.__doc__, f"`{field.name}` is not in the docstring"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_refuses_an_adapter_that_is_no_lora_or_trains_with_it(name, pair, tmp_path):
    config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    try:
        trainer = protected(name, pair)(**adapting(pair, tmp_path, peft_config=config, gradient_checkpointing=False))
    except ValueError as refusal:
        assert "LoraConfig" in str(refusal)
    else:
        trainer.train()
