"""Our trainer with methods: when each acts, how a penalty counts, what is logged, and what is left behind."""

from __future__ import annotations

import copy
import json
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import planted
import pytest
import tiny
import torch
from datasets import ClassLabel, Dataset, concatenate_datasets
from peft import LoraConfig, PeftModel, get_peft_model
from processes import on_two_processes
from runs import (
    StopAt,
    assert_close,
    assert_same_weights,
    even_rows,
    exact_settings,
    fresh,
    given,
    history,
    lora,
    run,
    same_bits,
    weights,
)
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import SFTTrainer

from safe_trainer import SafeSFTTrainer
from safe_trainer.data import as_rows, conversation
from safe_trainer.methods.base import Paper, SafetyMethod

TESTS = Path(__file__).parent


@dataclass
class Diary(SafetyMethod):
    """Writes down each moment at which it is called."""

    name: ClassVar[str] = "Diary"
    tag: ClassVar[str] = "diary"

    pages: list[str] = field(default_factory=list)
    who: str = "diary"
    value: float | None = None
    found: dict[str, Any] = field(default_factory=dict)

    def adapt_peft_config(self, config):
        self.pages.append(f"{self.who}: adapt")
        return config

    def attach(self, model, tokenizer, train_dataset):
        self.pages.append(f"{self.who}: attach")
        self.found = {"model": model, "tokenizer": tokenizer, "train_dataset": train_dataset}

    @contextmanager
    def training(self, model):
        self.pages.append(f"{self.who}: enter")
        try:
            yield
        finally:
            self.pages.append(f"{self.who}: leave")

    def penalty(self, model):
        self.pages.append(f"{self.who}: penalty")
        return None if self.value is None else torch.tensor(self.value)

    def diagnostics(self, model):
        self.pages.append(f"{self.who}: diagnostics")
        return {f"{self.who}/count": float(len(self.pages))}


@dataclass
class Other(Diary):
    """A second one, since each class may be given once."""

    name: ClassVar[str] = "Other"
    tag: ClassVar[str] = "other"


@dataclass
class Pull(SafetyMethod):
    """Pulls every trainable weight towards zero: `weight / 2 * ||w||^2`, with the gradient `weight * w`."""

    name: ClassVar[str] = "Pull"
    tag: ClassVar[str] = "pull"
    paper: ClassVar[Paper] = Paper("On Pulling", "Pull, P.", 2024, "2401.00001")

    weight: float = 0.3

    def penalty(self, model):
        return self.weight / 2 * sum((p**2).sum() for p in model.parameters() if p.requires_grad)


def safe(*methods: SafetyMethod):
    """Return what builds our trainer with these methods."""
    return lambda **arguments: SafeSFTTrainer(**arguments, safety=list(methods))


# ---- moments


@pytest.mark.slow
def test_every_moment_comes_in_its_order_for_each_method_of_a_list(tmp_path):
    pages: list[str] = []
    methods = [Diary(pages, "first"), Other(pages, "second")]
    run(safe(*methods), given(tmp_path, peft_config=lora(), max_steps=2))
    build = ["first: adapt", "second: adapt", "first: attach", "second: attach"]
    step = ["first: penalty", "second: penalty"]
    end = ["first: diagnostics", "second: diagnostics", "second: leave", "first: leave"]
    assert pages == [*build, "first: enter", "second: enter", *step, *step, *end]


@pytest.mark.slow
def test_methods_are_kept_in_order(tmp_path):
    methods = [Diary(), Other()]
    assert SafeSFTTrainer(**given(tmp_path), safety=methods).safety_methods == methods
    assert SafeSFTTrainer(**given(tmp_path), safety=methods[0]).safety_methods == methods[:1]
    assert SafeSFTTrainer(**given(tmp_path), safety=[]).safety_methods == []
    assert SafeSFTTrainer(**given(tmp_path)).safety_methods == []


def test_attach_sees_the_wrapped_model_its_tokenizer_the_prepared_rows_and_no_optimizer(tmp_path):
    optimizers = []

    class Early(Diary):
        def attach(self, model, tokenizer, train_dataset):
            super().attach(model, tokenizer, train_dataset)
            optimizers.append([name for name, p in model.named_parameters() if p.grad is not None])

    method, arguments = Early(), given(tmp_path, peft_config=lora())
    trainer = SafeSFTTrainer(**arguments, safety=method)
    assert trainer.optimizer is None
    assert optimizers == [[]]
    assert isinstance(method.found["model"], PeftModel)
    assert method.found["model"] is trainer.model
    assert method.found["tokenizer"] is arguments["processing_class"]
    assert method.found["train_dataset"] is trainer.train_dataset
    assert {"input_ids", "labels"} <= set(method.found["train_dataset"].column_names)


@pytest.mark.parametrize("by_position", [False, True])
def test_adapt_peft_config_gets_a_copy_and_its_answer_wraps_the_model(by_position, tmp_path):
    @dataclass
    class Halve(SafetyMethod):
        def adapt_peft_config(self, config):
            config.r //= 2
            config.target_modules.discard("v_proj")
            return config

    users = LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
    before = copy.deepcopy(users.to_dict())
    arguments = given(tmp_path)
    if by_position:
        order = ("model", "args", None, "train_dataset", None, "processing_class")
        positional = [arguments.get(name) for name in order] + [None] * 3 + [(None, None)] + [None] * 3 + [users]
        trainer = SafeSFTTrainer(*positional, safety=Halve())
    else:
        trainer = SafeSFTTrainer(**arguments, peft_config=users, safety=Halve())
    assert users.to_dict() == before
    adapter = trainer.model.peft_config["default"]
    assert adapter.r == 4
    assert {name.split(".lora_A")[0][-6:] for name in weights(trainer.model) if "lora_A" in name} == {"q_proj"}


def test_each_method_of_a_list_adapts_what_the_one_before_it_made(tmp_path):
    class Add(Diary):
        def adapt_peft_config(self, config):
            config.r += 1
            return config

    class Double(Diary):
        def adapt_peft_config(self, config):
            config.r *= 2
            return config

    trainer = SafeSFTTrainer(**given(tmp_path), peft_config=lora(r=4), safety=[Add(), Double()])
    assert trainer.model.peft_config["default"].r == 10


@pytest.mark.parametrize("model", ["full", "adapted"])
def test_adapt_peft_config_gets_none_where_there_is_no_configuration(model, tmp_path):
    seen = []

    class Look(Diary):
        def adapt_peft_config(self, config):
            seen.append(config)
            return config

    made = tiny.model() if model == "full" else get_peft_model(tiny.model(), lora())
    SafeSFTTrainer(**given(tmp_path, model=made), safety=Look())
    assert seen == [None]


@pytest.mark.parametrize("moment", ["adapt_peft_config", "attach"])
def test_a_method_that_refuses_stops_construction_with_its_own_message(moment, tmp_path):
    def refuse(self, *given):
        raise ValueError("`weight` does not fit")

    method = type("Refuse", (Diary,), {moment: refuse})()
    with pytest.raises(ValueError, match="`weight` does not fit"):
        SafeSFTTrainer(**given(tmp_path), peft_config=lora(), safety=method)


# ---- how a penalty counts


def by_hand(model: torch.nn.Module, batches: list[list[list[int]]], method: Pull | None, lr: float = 0.1) -> dict:
    """Return the weights after one plain step down mean loss plus penalty for each batch, without any trainer."""
    for batch in batches:
        ids = torch.tensor(batch)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        if method is not None:
            loss = loss + method.penalty(model)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter -= lr * parameter.grad
    return weights(model)


def batches_of(rows, size: int) -> list[list[list[int]]]:
    ids = rows["input_ids"]
    return [ids[i : i + size] for i in range(0, len(ids), size)]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, lora(r=2)], ids=["full", "LoRA"])
@pytest.mark.parametrize(
    ("batch", "accumulation"), [(8, 1), (2, 4), *(pytest.param(*s, marks=pytest.mark.slow) for s in ((4, 2), (1, 8)))]
)
def test_penalty_counts_once_per_optimizer_step(batch, accumulation, adapter, tmp_path):
    rows, method = even_rows(16), Pull()
    config = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 2}
    arguments = given(tmp_path, train_dataset=rows, peft_config=adapter, args=exact_settings(tmp_path, **config))
    outcome = run(safe(method), arguments)
    twin = started_like(outcome, adapter)
    assert_close(outcome.end, by_hand(twin, batches_of(rows, 8), method), outcome.start)
    without = by_hand(started_like(outcome, adapter), batches_of(rows, 8), None)
    with pytest.raises(AssertionError):  # or the comparison would not see the penalty at all
        assert_close(outcome.end, without, outcome.start)


@pytest.mark.slow
def test_penalty_counts_once_in_a_last_step_of_fewer_batches(tmp_path):
    rows, method = even_rows(10), Pull()
    config = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "max_steps": -1,
        "num_train_epochs": 1,
    }
    outcome = run(safe(method), given(tmp_path, train_dataset=rows, args=exact_settings(tmp_path, **config)))
    assert outcome.trainer.state.global_step == 2
    assert_close(outcome.end, by_hand(started_like(outcome, None), batches_of(rows, 8), method), outcome.start)


@pytest.mark.slow
def test_penalty_counts_once_where_the_loss_is_averaged_over_batches_and_not_over_tokens(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        total = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        return total / num_items_in_batch

    rows, method = even_rows(16), Pull()
    config = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 2}
    arguments = given(tmp_path, train_dataset=rows, args=exact_settings(tmp_path, **config))
    with pytest.warns(FutureWarning, match="compute_loss_func"):
        outcome = run(safe(method), arguments | {"compute_loss_func": loss})
    assert_close(outcome.end, by_hand(started_like(outcome, None), batches_of(rows, 8), method), outcome.start)


@pytest.mark.slow
def test_penalty_counts_once_for_models_whose_loss_takes_no_count_of_tokens(tmp_path):
    @dataclass
    class Uncounted(Pull):
        """The trainer then divides by the number of batches itself, which a method's trainer must know."""

    class Trainer(SafeSFTTrainer):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.model_accepts_loss_kwargs = False

    rows, method = even_rows(16), Uncounted()
    config = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 2}
    arguments = given(tmp_path, train_dataset=rows, args=exact_settings(tmp_path, **config))
    outcome = run(lambda **given: Trainer(**given, safety=method), arguments)
    assert_close(outcome.end, by_hand(started_like(outcome, None), batches_of(rows, 8), method), outcome.start)


def started_like(outcome, adapter) -> torch.nn.Module:
    """Return a model at the weights at which a run began."""
    model = tiny.model()
    if adapter is not None:
        model = get_peft_model(model, copy.deepcopy(adapter))
    model.load_state_dict(outcome.start)
    return model


@pytest.mark.slow
def test_penalties_of_several_methods_add_up(tmp_path):
    class Second(Pull):
        """The same pull once more."""

    arguments = {"train_dataset": even_rows(8), "args": exact_settings(tmp_path, max_steps=1)}
    twice = run(safe(Pull(0.1), Second(0.2)), given(tmp_path, **arguments))
    once = run(safe(Pull(0.3)), given(tmp_path, **arguments))
    assert_close(twice.end, once.end, once.start)
    assert history(twice.trainer)[0]["safety_penalty"] == pytest.approx(history(once.trainer)[0]["safety_penalty"])


@pytest.mark.slow
def test_a_penalty_of_zero_or_none_changes_no_bit(tmp_path):
    plain = run(SFTTrainer, given(tmp_path, peft_config=lora()))
    for method in (Pull(weight=0.0), Diary()):
        outcome = run(safe(method), given(tmp_path, peft_config=lora()))
        assert_same_weights(outcome.end, plain.end)


# ---- what is logged


@dataclass
class Counting(SafetyMethod):
    """Its penalty is how often it has been asked: 1, 2, 3, ..."""

    asked: int = 0

    def penalty(self, model):
        self.asked += 1
        return torch.tensor(float(self.asked))


@pytest.mark.slow
def test_the_log_holds_the_mean_penalty_of_the_batches_since_the_last_one(tmp_path):
    config = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 5, "logging_steps": 2}
    outcome = run(safe(Counting()), given(tmp_path, train_dataset=even_rows(10), **config))
    logged = [entry["safety_penalty"] for entry in history(outcome.trainer) if "safety_penalty" in entry]
    assert logged == [2.5, 6.5, 9.5]  # of 1..4, 5..8 and the rest, 9 and 10


@pytest.mark.slow
def test_the_loss_that_is_logged_includes_the_penalty_once(tmp_path):
    def losses(build, accumulation):
        size = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
        args = exact_settings(tmp_path, learning_rate=0.0, max_steps=1, **size)
        return history(run_still(build, given(tmp_path, train_dataset=even_rows(8), args=args)))[0]["loss"]

    for accumulation in (1, 4):
        plain = losses(SFTTrainer, accumulation)
        assert losses(safe(Diary(value=7.0)), accumulation) == pytest.approx(plain + 7.0, rel=1e-6)


def run_still(build, arguments):
    trainer = build(**arguments)
    trainer.train()
    return trainer


@pytest.mark.slow
def test_evaluation_knows_no_penalty(tmp_path):
    def evaluated(build, method=None):
        changes = {"eval_dataset": even_rows(6), "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0}
        trainer = run_still(build, given(tmp_path, max_steps=2, **changes))
        return trainer, [entry for entry in history(trainer) if "eval_loss" in entry]

    method = Counting()
    _, theirs = evaluated(SFTTrainer)
    trainer, ours = evaluated(safe(method))
    assert len(ours) == 2
    assert ours == theirs
    assert method.asked == 2  # once for each step
    trainer.evaluate()
    assert method.asked == 2


@pytest.mark.slow
def test_diagnostics_of_all_methods_are_logged_once_at_the_end(tmp_path):
    trainer = run_still(safe(Diary(who="one"), Other(who="two")), given(tmp_path, max_steps=2))
    entries = [entry for entry in history(trainer) if "one/count" in entry]
    assert entries == [history(trainer)[-1]]
    assert {"one/count", "two/count"} <= set(entries[0])
    assert not any(key.startswith("eval") for key in entries[0])


@pytest.mark.slow
def test_nothing_is_logged_at_the_end_where_methods_have_nothing_to_say(tmp_path):
    trainer = run_still(safe(Pull()), given(tmp_path))
    assert "train_loss" in history(trainer)[-1]


@pytest.mark.slow
def test_training_output_is_that_of_trl(tmp_path):
    plain = SFTTrainer(**given(tmp_path)).train()
    ours = SafeSFTTrainer(**given(tmp_path), safety=Diary()).train()
    assert (ours.global_step, ours.training_loss) == (plain.global_step, plain.training_loss)


# ---- how training may end


class Hooked(Diary):
    """Keeps a hook on the model while it trains."""

    @contextmanager
    def training(self, model):
        hook = model.register_forward_hook(lambda *call: None)
        try:
            with super().training(model):
                yield
        finally:
            hook.remove()


ENDS = {"well": None, "with an error": RuntimeError("disk full"), "interrupted": KeyboardInterrupt()}


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
def test_training_contexts_are_closed_however_training_ends(end, tmp_path):
    pages: list[str] = []
    callbacks = [StopAt(1, ENDS[end])] if ENDS[end] is not None else []
    methods = [Hooked(pages, "outer"), Other(pages, "inner")]
    trainer = SafeSFTTrainer(**given(tmp_path, callbacks=callbacks), safety=methods)
    if ENDS[end] is None:
        trainer.train()
    else:
        with pytest.raises(type(ENDS[end])) as raised:
            trainer.train()
        assert raised.value is ENDS[end]
    assert pages[-2:] == ["inner: leave", "outer: leave"]
    assert not trainer.model._forward_hooks
    assert ("outer: diagnostics" in pages) == (end == "well")


def test_a_context_that_cannot_be_entered_closes_those_before_it(tmp_path):
    class Stuck(Other):
        @contextmanager
        def training(self, model):
            raise RuntimeError("no vectors")
            yield

    outer = Hooked()
    trainer = SafeSFTTrainer(**given(tmp_path), safety=[outer, Stuck()])
    with pytest.raises(RuntimeError, match="no vectors"):
        trainer.train()
    assert outer.pages[-2:] == ["diary: enter", "diary: leave"]
    assert not trainer.model._forward_hooks


@pytest.mark.slow
def test_contexts_are_opened_anew_each_time_that_training_begins(tmp_path):
    method = Diary()
    trainer = SafeSFTTrainer(**given(tmp_path, max_steps=1), safety=method)
    trainer.train()
    trainer.train()
    assert method.pages.count("diary: enter") == method.pages.count("diary: leave") == 2


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_a_penalty_that_is_not_finite_stops_training_and_leaves_earlier_checkpoints_intact(value, tmp_path):
    @dataclass
    class Breaks(Pull):
        asked: int = field(default=0, init=False)

        def penalty(self, model):
            self.asked += 1
            return super().penalty(model) * (value if self.asked == 3 else 1.0)

    config = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "peft_config": lora()}
    trainer = SafeSFTTrainer(**given(tmp_path / "run", **config), safety=Breaks())
    last = []
    trainer.add_callback(KeepAt(2, last))
    with pytest.raises(FloatingPointError, match=rf"penalty became {value} at step 2.*{tmp_path / 'run'}.*intact"):
        trainer.train()
    assert {entry.name for entry in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    saved = load_file(tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors")
    assert saved and all(torch.isfinite(tensor).all() for tensor in saved.values())
    assert_same_weights(weights(trainer.model), last[0])  # the step with the bad penalty was not taken
    resumed = SafeSFTTrainer(**given(tmp_path / "run", **config), safety=Breaks())
    resumed.train(resume_from_checkpoint=True)  # two steps, so that none is the third
    assert resumed.state.global_step == 4


class KeepAt(TrainerCallback):
    """Keep a copy of the weights as they are after a step."""

    def __init__(self, step: int, kept: list) -> None:
        self.step, self.kept = step, kept

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.kept.append(weights(model))


# ---- what is refused


@pytest.mark.parametrize(
    ("safety", "error", "message"),
    [
        (Pull, TypeError, r"`safety` takes methods, not classes: write `Pull\(...\)`"),
        ([Diary(), Pull], TypeError, r"`safety` takes methods, not classes: write `Pull\(...\)`"),
        ("asft", TypeError, r"`safety` takes a method, a list of them, 'recommended' or None, got str \('asft'\)"),
        ([Pull(), None], TypeError, "got NoneType"),
        ({"asft": Pull()}, TypeError, "got dict"),
        (True, TypeError, "got bool"),
        ([Pull(), Diary(), Pull(0.1)], ValueError, "`safety` holds Pull 2 times. Give each method once."),
    ],
    ids=["a class", "a class in a list", "a name", "None in a list", "a dict", "a flag", "one twice"],
)
def test_what_is_no_method_is_refused_before_anything_is_loaded(safety, error, message, tmp_path):
    with pytest.raises(error, match=message):
        SafeSFTTrainer(model="a path that does not exist", safety=safety)


# ---- tags, model card, loss by hand


def card(build, folder: Path) -> str:
    with fresh(folder):
        run_still(build, given(folder, save_strategy="steps", save_steps=2, max_steps=2))
        return (folder / "README.md").read_text()


@pytest.mark.slow
def test_without_methods_card_and_tags_are_those_of_trl(tmp_path):
    build = SafeSFTTrainer
    assert sorted(card(build, tmp_path / "run").splitlines()) == sorted(
        card(SFTTrainer, tmp_path / "run").splitlines()
    )
    assert SafeSFTTrainer(**given(tmp_path)).model.model_tags == SFTTrainer(**given(tmp_path)).model.model_tags


@pytest.mark.slow
def test_card_and_tags_name_the_methods_beside_what_trl_writes(tmp_path):
    theirs, ours = card(SFTTrainer, tmp_path / "run"), card(safe(Pull(), Diary()), tmp_path / "run")
    assert "trained with SFT with Pull and Diary, a method introduced in [On Pulling]" in ours
    assert "(https://huggingface.co/papers/2401.00001)" in ours
    assert "Cite SFT with Pull and Diary as:\n\n```bibtex\n@misc{pull2024on,\n" in ours
    for tag in ("trl", "sft", "safe-trainer", "pull", "diary"):
        assert f"\n- {tag}\n" in ours
    missing = [line for line in theirs.splitlines() if line not in ours.splitlines()]
    assert missing == ["This model was trained with SFT."]
    tags = SafeSFTTrainer(**given(tmp_path), safety=Pull()).model.model_tags
    assert set(tags) == {"trl", "sft", "safe-trainer", "pull"}
    assert SFTTrainer._tag_names == SafeSFTTrainer._tag_names == ["trl", "sft"]  # the classes are untouched


@pytest.mark.slow
def test_methods_without_a_paper_leave_the_citations_to_trl(tmp_path):
    text = card(safe(Diary()), tmp_path / "run")
    assert "trained with SFT with Diary." in text
    assert "Cite SFT" not in text and "Cite TRL as" in text


@pytest.mark.slow
def test_the_citations_of_all_methods_are_on_the_card(tmp_path):
    class Push(Other):
        paper: ClassVar[Paper] = Paper("On Pushing", "Push, P.", 2024, "2401.00002", venue="Pushing")

    text = card(safe(Pull(), Push()), tmp_path / "run")
    assert "@misc{pull2024on,\n  title = {{On Pulling}}" in text and "@inproceedings{push2024on" in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`return_outputs:FutureWarning")
@pytest.mark.parametrize(("count", "accumulation", "share"), [(None, 4, 1), (40, 4, 4), (40, None, 1)])
def test_compute_loss_returns_outputs_and_adds_the_penalty_only_while_training(count, accumulation, share, tmp_path):
    def computed(build, mode):
        trainer = build(**given(tmp_path, train_dataset=even_rows(8), bf16=False))
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.train(mode)
        if accumulation:  # what `train()` notes before each step
            trainer.current_gradient_accumulation_steps = accumulation
        return trainer.compute_loss(trainer.model, dict(batch), return_outputs=True, num_items_in_batch=count)

    for mode, penalty in ((True, 6.0), (False, 0.0)):
        (loss, outputs), (plain, theirs) = computed(safe(Diary(value=6.0)), mode), computed(SFTTrainer, mode)
        assert loss.item() == pytest.approx(plain.item() + penalty / share, rel=1e-6)
        assert same_bits(outputs.logits, theirs.logits)


# ---- two processes

TWO = """
import json, sys
import torch, torch.distributed as dist
from launch import leave
from runs import even_rows, exact_settings, given, weights
from test_trainer import Pull
from safe_trainer import SafeSFTTrainer

folder = sys.argv[1]
for batch, accumulation, counted in ((4, 1, "together"), (2, 2, "together"), (2, 2, "apart")):
    size = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 2}
    tokens = {"average_tokens_across_devices": counted == "together"}
    args = exact_settings(folder, ddp_backend="gloo", **size, **tokens)
    trainer = SafeSFTTrainer(**given(folder, train_dataset=even_rows(16), args=args), safety=Pull())
    seen = []
    trainer.model.register_forward_pre_hook(lambda m, a, k: seen.extend(k["input_ids"].tolist()), with_kwargs=True)
    trainer.train()
    name = f"{folder}/{batch}x{accumulation}-{counted}-{dist.get_rank()}"
    torch.save(weights(trainer.model), f"{name}.pt")
    logged = [entry["safety_penalty"] for entry in trainer.state.log_history if "safety_penalty" in entry]
    facts = {"world": dist.get_world_size(), "backend": dist.get_backend(), "rows": seen, "penalties": logged}
    json.dump(facts, open(f"{name}.json", "w"))
leave()
"""


@pytest.mark.slow
def test_penalty_counts_once_on_two_processes(tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    on_two_processes(str(tmp_path / "two.py"), str(tmp_path))

    alone = exact_settings(tmp_path, per_device_train_batch_size=8, max_steps=2)
    single = run(safe(Pull()), given(tmp_path, train_dataset=even_rows(16), args=alone))
    expected = [entry["safety_penalty"] for entry in history(single.trainer) if "safety_penalty" in entry]
    for size in ("4x1-together", "2x2-together", "2x2-apart"):
        facts = [json.loads((tmp_path / f"{size}-{rank}.json").read_text()) for rank in range(2)]
        assert [(fact["world"], fact["backend"]) for fact in facts] == [(2, "gloo")] * 2
        shown = [{tuple(row) for row in fact["rows"]} for fact in facts]
        assert len(shown[0]) == len(shown[1]) == 8 and not shown[0] & shown[1]  # each process had a half of its own
        for rank in range(2):
            assert_close(torch.load(tmp_path / f"{size}-{rank}.pt"), single.end, single.start)
        assert facts[0]["penalties"] == pytest.approx(expected, rel=1e-5)


# ---- rows whose answers are cut away


@pytest.mark.slow
def test_rows_whose_answers_are_cut_away_are_counted(tmp_path, caplog):
    long = [conversation("Please consider this. " * 8, "Yes.")] * 3
    for safety in (None, Diary()):
        rows = Dataset.from_list([*tiny.rows(5), *long])
        trainer = SafeSFTTrainer(**given(tmp_path, train_dataset=rows, max_length=64), safety=safety)
        assert len(trainer.train_dataset) == 5
        assert "3 of 8 rows of `train_dataset` teach nothing" in caplog.text and "`max_length=64`" in caplog.text
        caplog.clear()
        raised = SafeSFTTrainer(**given(tmp_path, train_dataset=rows, max_length=256), safety=safety)  # as it advises
        assert len(raised.train_dataset) == 8 and "teach nothing" not in caplog.text
        SafeSFTTrainer(**given(tmp_path, train_dataset=rows, max_length=64, packing=True), safety=safety)
        assert "3 of 8 rows of `train_dataset` teach nothing" in caplog.text
        for more in ({}, {"packing": True}):
            arguments = given(tmp_path, train_dataset=Dataset.from_list(long), max_length=64, **more)
            with pytest.raises(ValueError, match="None of the 3 rows.*`max_length=64`.*Raise `max_length`"):
                SafeSFTTrainer(**arguments, safety=safety)


@pytest.mark.slow
def test_evaluation_rows_whose_answers_are_cut_away_are_counted_by_name(tmp_path, caplog):
    long = [conversation("Please consider this. " * 8, "Yes.")] * 3
    rows = Dataset.from_list([*tiny.rows(5), *long])
    cases = (rows, "3 of 8 rows of `eval_dataset` have"), ({"a": rows}, "3 of 8 rows of `eval_dataset['a']` have")
    for safety, (held, told) in product((None, Diary()), cases):
        SafeSFTTrainer(**given(tmp_path, eval_dataset=held, max_length=64), safety=safety)
        assert told in caplog.text and "teach nothing" not in caplog.text
        caplog.clear()
        SafeSFTTrainer(**given(tmp_path, eval_dataset=held, max_length=256), safety=safety)  # as it advises
        assert "have nothing to take a loss on" not in caplog.text
    for more in ({}, {"eval_packing": True}):
        arguments = given(tmp_path, eval_dataset=Dataset.from_list(long), max_length=64, **more)
        with pytest.raises(ValueError, match="None of the 3 rows of `eval_dataset` has .*Raise `max_length`"):
            SafeSFTTrainer(**arguments)


@pytest.mark.slow
def test_rows_whose_labels_are_all_masked_are_counted_with_that_cause(tmp_path, caplog):
    ids = even_rows(8)["input_ids"]
    masked = Dataset.from_dict({"input_ids": ids, "labels": [[-100] * 12] * 3 + ids[3:]})
    for more in ({}, {"max_length": None}, {"packing": True}):
        caplog.clear()
        SafeSFTTrainer(**given(tmp_path, train_dataset=masked, **more))
        assert "3 of 8 rows of `train_dataset` teach nothing: their `labels` are all -100" in caplog.text
        with pytest.raises(ValueError, match="None of the 3 rows.*all -100.*Check the mask"):
            SafeSFTTrainer(**given(tmp_path, train_dataset=masked.select(range(3)), **more))


@pytest.mark.slow
def test_an_empty_row_counts_as_one_that_teaches_nothing(tmp_path, caplog):
    rows = Dataset.from_dict({"input_ids": [[], [5, 6, 7], [5, 6, 7]], "labels": [[], [5, 6, 7], [5, 6, 7]]})
    SafeSFTTrainer(**given(tmp_path, train_dataset=rows, max_length=None))
    assert "1 of 3 rows of `train_dataset` teach nothing: their `labels` are all -100. Check the mask" in caplog.text


OUTSIDE = {
    "texts": lambda: Dataset.from_list([{"text": f"Say {i}. It is {i}."} for i in range(6)]),
    "strings": lambda: Dataset.from_list([{"prompt": f"Say {i}.", "completion": f"It is {i}."} for i in range(6)]),
    "a stream of strings": lambda: OUTSIDE["strings"]().to_iterable_dataset(),
    "tokens": lambda: even_rows(6),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", OUTSIDE)
def test_rows_outside_the_chat_template_are_counted_where_methods_protect_the_model_in_it(form, tmp_path, caplog):
    told = "6 of 6 rows of `train_dataset` looked at are trained without the chat template"
    for safety, packing, is_told in ((Diary(), False, True), (Diary(), True, True), (None, False, False)):
        rows = OUTSIDE[form]()
        if packing and form != "tokens":
            continue
        arguments = given(tmp_path, train_dataset=rows, max_steps=1, packing=packing)
        SafeSFTTrainer(**arguments, safety=safety)
        assert (("looked at are trained without the chat template" if packing else told) in caplog.text) is is_told
        caplog.clear()
    tokenizer = tiny.tokenizer()
    texts = [
        {"text": tokenizer.apply_chat_template(r["prompt"] + r["completion"], tokenize=False)} for r in tiny.rows(6)
    ]
    inside = (Dataset.from_list(texts), tiny.rows(6), tiny.rows(6).to_iterable_dataset())
    for rows in inside:  # as it advises
        SafeSFTTrainer(**given(tmp_path, train_dataset=rows, max_steps=1), safety=Diary())
    assert "without the chat template" not in caplog.text


@pytest.mark.slow
def test_rows_handed_to_evaluate_are_counted_as_those_of_the_trainer(tmp_path, caplog):
    long = [conversation("Please consider this. " * 8, "Yes.")] * 3
    rows = Dataset.from_list([*tiny.rows(5), *long])
    for safety in (None, Diary()):
        trainer = SafeSFTTrainer(**given(tmp_path, max_length=64), safety=safety)
        for held, told in ((rows, "`eval_dataset`"), ({"a": rows}, "`eval_dataset['a']`")):
            caplog.clear()
            found = trainer.evaluate(held)
            assert caplog.text.count(f"3 of 8 rows of {told} have nothing to take a loss on") == 1
            kept = trainer.evaluate(Dataset.from_list(tiny.rows(5)))
            assert found["eval_a_loss" if isinstance(held, dict) else "eval_loss"] == pytest.approx(kept["eval_loss"])
        with pytest.raises(ValueError, match="None of the 3 rows of `eval_dataset` has .*Raise `max_length`"):
            trainer.evaluate(Dataset.from_list(long))


@pytest.mark.slow
def test_the_first_rows_of_a_stream_whose_answers_are_cut_away_are_counted(tmp_path, caplog):
    long = [conversation("Please consider this. " * 8, "Yes.")] * 3
    stream = Dataset.from_list([*tiny.rows(5), *long]).to_iterable_dataset()
    for max_length, told in ((64, True), (256, False)):
        arguments = given(tmp_path, train_dataset=stream, max_length=max_length, max_steps=1)
        trainer = SafeSFTTrainer(**arguments, safety=Diary())
        assert ("3 of 8 rows of `train_dataset` looked at teach nothing" in caplog.text) is told
        assert sum(1 for _ in trainer.train_dataset) == (5 if told else 8)
        caplog.clear()


@pytest.mark.slow
def test_a_model_of_which_nothing_would_be_trained_is_refused(tmp_path):
    def trainer(model: Any) -> SafeSFTTrainer:
        return SafeSFTTrainer(**given(tmp_path, model=model), safety=Diary())

    adapted = get_peft_model(tiny.model(), lora(init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="requires a gradient.*is_trainable=True"):
        trainer(PeftModel.from_pretrained(tiny.model(), tmp_path / "adapter"))
    trainer(PeftModel.from_pretrained(tiny.model(), tmp_path / "adapter", is_trainable=True))  # as it advises
    adapted.merge_adapter()
    with pytest.raises(ValueError, match="merged into its weights.*unmerge_adapter"):
        trainer(adapted)
    adapted.unmerge_adapter()
    trainer(adapted)


def test_rows_that_are_labelled_harmful_are_counted(tmp_path, caplog):
    rows = tiny.rows(4).add_column("is_safe", [True, False, None, False])
    SafeSFTTrainer(**given(tmp_path, train_dataset=rows))
    assert "2 of 4 rows of `train_dataset` are labelled harmful" in caplog.text
    caplog.clear()
    SafeSFTTrainer(**given(tmp_path, train_dataset=rows.remove_columns("is_safe")))
    assert "labelled" not in caplog.text


@pytest.mark.slow
def test_labels_that_come_late_count_too(tmp_path, caplog):
    rows = tiny.rows(8)
    many = concatenate_datasets([rows] * 20)  # the first rows do not tell which columns are labels
    late = many.add_column("safety", [None] * 150 + ["unsafe"] * 10)
    SafeSFTTrainer(**given(tmp_path, train_dataset=late))
    assert "10 of 160 rows of `train_dataset` are labelled harmful" in caplog.text


@pytest.mark.slow
def test_labels_that_are_classes_are_read_by_their_names(tmp_path, caplog):
    rows = tiny.rows(3).add_column("label", [0, 1, -1]).cast_column("label", ClassLabel(names=["safe", "unsafe"]))
    SafeSFTTrainer(**given(tmp_path, train_dataset=rows))
    assert "1 of 3 rows of `train_dataset` are labelled harmful" in caplog.text
    assert as_rows(rows)[0]["is_safe"][:] == [True, False, None]
    flags = [{"violence": False, "fraud": n > 0} for n in range(3)]
    caplog.clear()
    SafeSFTTrainer(**given(tmp_path, train_dataset=tiny.rows(3).add_column("category", flags)))
    assert "2 of 3 rows of `train_dataset` are labelled harmful" in caplog.text  # as BeaverTails does it


def test_a_label_of_prompts_is_none_of_answers(tmp_path, caplog):
    rows = tiny.rows(2).add_column("toxicity", [0, 1]).add_column("user_input", ["Hi", "Bad"])  # ToxicChat's
    SafeSFTTrainer(**given(tmp_path, train_dataset=rows))
    assert "labelled harmful" not in caplog.text


@pytest.mark.slow
def test_security_vectors_from_the_hub_are_refused_as_a_model(tmp_path, monkeypatch):
    vectors = planted.vectors(tiny.model()).save(tmp_path / "vectors")

    def from_the_hub(*_: Any, **__: Any) -> Any:  # as transformers loads an adapter: its base model with it
        model = tiny.model()
        model.load_adapter(vectors)
        return model

    monkeypatch.setattr("trl.trainer.sft_trainer.create_model_from_path", from_the_hub)
    for safety in (None, Diary()):
        with pytest.raises(ValueError, match="is security vectors, harmful by construction.*Give their base model"):
            SafeSFTTrainer(**given(tmp_path, model="me/vectors"), safety=safety)


def test_adapters_from_the_hub_are_refused_as_a_model_that_gets_an_adapter(tmp_path, monkeypatch):
    repository, commit = tmp_path / "models--me--vectors", "0123456789abcdef0123456789abcdef01234567"
    planted.vectors(tiny.model()).save(repository / "snapshots" / commit)
    ordinary = tmp_path / "models--me--ordinary"
    get_peft_model(tiny.model(), lora()).save_pretrained(ordinary / "snapshots" / commit)
    (ordinary / "refs").mkdir()
    (ordinary / "refs" / "main").write_text(commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for safety in (None, Diary()):
        with pytest.raises(ValueError, match=r"`model` \('me/vectors'\) is security vectors, .*Give their base model"):
            SafeSFTTrainer(**given(tmp_path, model="me/vectors", peft_config=lora()), safety=safety)
        with pytest.raises(ValueError, match="`me/ordinary` is an adapter, not a complete model"):
            SafeSFTTrainer(**given(tmp_path, model="me/ordinary", peft_config=lora()), safety=safety)
    shutil.move(repository / "refs" / "main", repository / "refs" / "v2")
    settings_of_v2 = {"model": "me/vectors", "peft_config": lora(), "model_init_kwargs": {"revision": "v2"}}
    with pytest.raises(ValueError, match="is security vectors"):
        SafeSFTTrainer(**given(tmp_path, **settings_of_v2))
    for name in ("me/other", "no/such/model"):  # is looked for as TRL does
        with pytest.raises(OSError):
            SafeSFTTrainer(**given(tmp_path, model=name, peft_config=lora()))
