"""The moments that few methods use, and what every method reports: token weights, gradients, coverage, self-checks."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from runs import assert_close, even_rows, exact_settings, given, lora, run
from transformers import MixtralConfig, MixtralForCausalLM
from trl import SFTTrainer

from safe_trainer import METHODS, AsFT, SafeSFTTrainer, SaLoRA, SecurityVectors
from safe_trainer.data import conversation
from safe_trainer.distributed import Strategy
from safe_trainer.methods.base import Materials, PenaltyMethod, SafetyMethod, SelfCheck, coverage

HARMFUL = [conversation(f"Make a bad thing {i}.", "Sure: a bad thing.") for i in range(8)]
REFUSED = [conversation(f"Make a bad thing {i}.", "I will not do that.") for i in range(8)]


def safe(*methods: SafetyMethod):
    return lambda **arguments: SafeSFTTrainer(**arguments, safety=list(methods))


def exact(folder, **changes):
    config = {name: changes.pop(name) for name in list(changes) if name in SFT_FIELDS}
    return given(
        folder,
        **{"args": exact_settings(folder, learning_rate=1.0, **config), "train_dataset": even_rows(12), **changes},
    )


SFT_FIELDS = {"per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "max_steps", "loss_type"}


# ---- token weights


@dataclass
class Upweight(SafetyMethod):
    """Weights the tokens of a position."""

    name: ClassVar[str] = "Upweight"
    weights: tuple[float, ...] = (1.0,)

    def token_weights(self, model, inputs, log_probs):
        assert not log_probs.requires_grad
        with torch.no_grad():
            assert torch.equal(model(**inputs).log_probs, log_probs)
        length = inputs["labels"].shape[1]
        return torch.tensor(self.weights).repeat(length)[1:length].expand(log_probs.shape)


@pytest.mark.slow
def test_token_weights_of_one_change_nothing_and_of_two_double_the_step(tmp_path):
    theirs = run(SFTTrainer, exact(tmp_path, max_steps=1))
    same = run(safe(Upweight()), exact(tmp_path, max_steps=1))
    twice = run(safe(Upweight((2.0,))), exact(tmp_path, max_steps=1))
    assert_close(same.end, theirs.end, theirs.start)
    expected = {name: 2 * theirs.end[name] - theirs.start[name] for name in theirs.end}
    assert_close(twice.end, expected, theirs.start, tolerance=5e-3)


@pytest.mark.slow
def test_a_token_of_weight_zero_is_not_learned(tmp_path):
    """The weights are those of the targets: a dataset with the other labels masked takes the same direction."""
    rows = even_rows(12)
    masked = [
        {"input_ids": row["input_ids"], "labels": [t if i % 2 else -100 for i, t in enumerate(row["input_ids"])]}
        for row in rows
    ]
    ours = run(safe(Upweight((0.0, 1.0))), exact(tmp_path, max_steps=1, train_dataset=rows))
    theirs = run(SFTTrainer, exact(tmp_path, max_steps=1, train_dataset=Dataset.from_list(masked)))
    tokens, kept = 11, 6  # targets of a row, and those of them at odd places
    expected = {
        name: theirs.start[name] + (theirs.end[name] - theirs.start[name]) * kept / tokens for name in theirs.end
    }
    assert_close(ours.end, expected, theirs.start, tolerance=5e-3)


@pytest.mark.filterwarnings("ignore:`compute_loss_func` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "changes", [{"loss_type": "dft"}, {"compute_loss_func": lambda *args, **kwargs: 0}], ids=["loss_type", "function"]
)
def test_token_weights_need_the_plain_loss(changes, tmp_path):
    with pytest.raises(ValueError, match="Upweight weights tokens.*`compute_loss_func`"):
        SafeSFTTrainer(**exact(tmp_path, **changes), safety=Upweight())


# ---- gradients


@dataclass
class Halve(SafetyMethod):
    """Halves every gradient, and keeps their norms."""

    name: ClassVar[str] = "Halve"
    norms: list[float] = field(default_factory=list)

    def after_backward(self, model):
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        self.norms.append(torch.stack([g.norm() for g in gradients]).norm().item())
        for gradient in gradients:
            gradient.mul_(0.5)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 3])
def test_gradients_are_seen_once_per_optimizer_step_accumulated(accumulation, tmp_path):
    size = {"per_device_train_batch_size": 12 // accumulation, "gradient_accumulation_steps": accumulation}
    method = Halve()
    theirs = run(SFTTrainer, exact(tmp_path, max_steps=1, **size))
    ours = run(safe(method), exact(tmp_path, max_steps=1, **size))
    assert len(method.norms) == 1
    expected = {name: (theirs.start[name] + theirs.end[name]) / 2 for name in theirs.end}
    assert_close(ours.end, expected, theirs.start, tolerance=5e-3)


@pytest.mark.slow
def test_gradients_are_seen_before_they_are_clipped(tmp_path):
    method = Halve()
    theirs = run(SFTTrainer, exact(tmp_path, max_steps=1, max_grad_norm=1e-3))
    ours = run(safe(method), exact(tmp_path, max_steps=1, max_grad_norm=1e-3))
    assert method.norms[0] > 1e-2
    assert_close(ours.end, theirs.end, theirs.start, tolerance=5e-3)  # half of it is clipped to the same length


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_scaled_gradients_of_float16_are_seen_unscaled_and_step_as_others(accumulation, tmp_path):
    """accelerate scales losses under float16, on a GPU only; its scaler by itself runs on a CPU, in float32."""
    plain, scaled = Halve(), Halve()

    def with_scaler(**arguments):
        trainer = SafeSFTTrainer(**arguments, safety=[scaled, Upweight()])
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        return trainer

    settings = {"max_steps": 2, "gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 2}
    ours = run(with_scaler, exact(tmp_path, **settings))
    theirs = run(safe(plain, Upweight()), exact(tmp_path, **settings))
    assert scaled.norms == pytest.approx(plain.norms, rel=1e-5) and len(plain.norms) == 2
    assert_close(ours.end, theirs.end, theirs.start)


@pytest.mark.slow
def test_an_optimizer_that_steps_within_the_backward_pass_is_refused_where_a_method_needs_gradients(tmp_path):
    def layerwise(**arguments):
        trainer = SafeSFTTrainer(**arguments, safety=Halve())
        for parameter in trainer.model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        return trainer

    with pytest.raises(ValueError, match="Halve.*`optim`"):
        run(layerwise, exact(tmp_path, max_steps=1))


# ---- subclasses of the trainer


def mean_loss(model, inputs):
    """Return the loss of a subclass that computes it by itself."""
    labels = inputs.pop("labels")
    logits = model(**inputs).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


class OwnLoss(SafeSFTTrainer):
    """Computes its loss by itself, without what methods add to it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return mean_loss(model, inputs)


class OwnStep(SafeSFTTrainer):
    """Takes its steps by itself, without what methods do around them."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()


class OwnBoth(OwnLoss, OwnStep):
    """Does both by itself."""


class CallsSuper(SafeSFTTrainer):
    """Overrides both, and calls what it overrides; in every second batch the loss is its own."""

    batches = 0

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.batches += self.model.training
        return mean_loss(model, inputs) if self.batches % 2 else super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, *args, **kwargs):
        return super().training_step(*args, **kwargs)


@dataclass
class Around(SafetyMethod):
    """Acts around a step."""

    name: ClassVar[str] = "Around"
    steps: list[int] = field(default_factory=list)

    @contextmanager
    def training_step(self, model):
        self.steps.append(self.step)
        yield


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "method", "place"),
    [
        (OwnLoss, AsFT(projector="none"), "compute_loss"),
        (OwnLoss, Upweight(), "compute_loss"),
        (OwnBoth, AsFT(projector="none"), "compute_loss"),
        (OwnStep, Around(), "training_step"),
        (OwnStep, Halve(), "training_step"),
        (OwnBoth, Halve(), "training_step"),
    ],
    ids=lambda value: getattr(value, "__name__", getattr(value, "name", value)),
)
def test_a_subclass_that_leaves_methods_out_is_refused_before_its_first_step(trainer, method, place, tmp_path):
    built = trainer(**exact(tmp_path, gradient_accumulation_steps=2), safety=[method])
    start = {name: parameter.detach().clone() for name, parameter in built.model.named_parameters()}
    message = rf"{method.name} .*`{trainer.__name__}.{place}`.*Call `super\(\).{place}\(\.\.\.\)` in it"
    with pytest.raises(ValueError, match=message):
        built.train()
    assert all(torch.equal(parameter, start[name]) for name, parameter in built.model.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "methods"),
    [
        (OwnLoss, [Around(), Halve()]),
        (OwnStep, [AsFT(projector="none")]),
        (OwnBoth, []),
        (CallsSuper, [AsFT(projector="none"), Upweight(), Around(), Halve()]),
    ],
    ids=["its own loss", "its own step", "no methods", "calls super"],
)
def test_a_subclass_trains_where_every_method_acts_in_each_optimizer_step(trainer, methods, tmp_path):
    changes = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 2}
    built = trainer(**exact(tmp_path, **changes, eval_dataset=even_rows(4)), safety=methods)
    built.train()
    if trainer is not OwnStep and trainer is not OwnBoth:
        built.evaluate()
    assert built.state.global_step == 2


@pytest.mark.slow
def test_methods_know_the_step_in_a_subclass_that_computes_its_own_loss(tmp_path):
    method = Around()
    run(lambda **arguments: OwnLoss(**arguments, safety=method), exact(tmp_path, max_steps=3))
    assert method.steps == [0, 1, 2]


# ---- strategies


class Penalized(SafetyMethod):
    name: ClassVar[str] = "Penalized"

    def penalty(self, model):
        return torch.zeros(())


class Allowed(Penalized):
    penalty_works_with_zero3: ClassVar[bool] = True


def test_a_penalty_is_refused_under_zero3_unless_a_method_says_that_it_works():
    zero3 = Strategy("ZeRO-3", is_sharded=True, has_weights=False)
    with pytest.raises(ValueError, match="Penalized does not work with ZeRO-3.*FSDP2"):
        Penalized().check_strategy(zero3)
    Allowed().check_strategy(zero3)
    SafetyMethod().check_strategy(zero3)
    for stage in ("ZeRO-1", "ZeRO-2", "ZeRO-3"):
        with pytest.raises(ValueError, match="gradients in buffers of its own"):
            Halve().check_strategy(Strategy(stage))


# ---- coverage


def test_coverage_is_reported_and_low_coverage_is_warned_about(tmp_path, caplog):
    config = lora(modules_to_save=["lm_head"])
    method = AsFT(projector="none", weight=0.5)
    trainer = SafeSFTTrainer(**given(tmp_path, peft_config=config), safety=method)
    model = trainer.model
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    expected = sum(size for name, size in sizes.items() if "lora_" in name) / sum(sizes.values())
    report = trainer.safety_report["AsFT"]
    assert report["coverage"] == pytest.approx(expected) and 0 < expected < 0.9
    assert any("are not protected" in warning for warning in report["warnings"])
    assert "AsFT: it acts on" in caplog.text


@pytest.mark.parametrize("method", [AsFT(projector="none"), SaLoRA(safety_data=REFUSED, rank=4, task_rank=0)])
def test_a_lora_is_covered_completely(method, tmp_path, caplog):
    trainer = SafeSFTTrainer(**given(tmp_path, peft_config=lora()), safety=method)
    (report,) = trainer.safety_report.values()
    assert report["coverage"] == 1.0 and report["warnings"] == [] and not caplog.text


def test_a_method_that_acts_on_the_loss_covers_everything():
    assert coverage(SafetyMethod(), tiny.model()) == 1.0


def experts() -> MixtralForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=tiny.VOCABULARY, **sizes, **more))


@pytest.mark.slow
def test_advice_on_a_mixture_of_experts_is_something_the_user_wrote_and_works(tmp_path):
    """PEFT turns the experts of `all-linear` into `target_parameters`, which the user never wrote."""
    method = AsFT(projector="none", weight=0.5)
    with pytest.raises(
        ValueError, match='name linear layers in `target_modules`, such as `(.*?)`.*`"all-linear"`'
    ) as raised:
        SafeSFTTrainer(**given(tmp_path, model=experts(), peft_config=lora()), safety=method)
    (advised,) = re.findall(r"such as `(.*?)`", str(raised.value))
    config = lora(target_modules=json.loads(advised))
    trainer = SafeSFTTrainer(**given(tmp_path, model=experts(), peft_config=config), safety=method)
    trainer.train()
    assert trainer.safety_report["AsFT"]["coverage"] == 1.0


def test_experts_that_are_trained_in_full_are_not_covered(tmp_path):
    trainer = SafeSFTTrainer(**given(tmp_path, model=experts()), safety=AsFT(projector="none", weight=0.5))
    assert trainer.safety_report["AsFT"]["coverage"] < 0.5
    assert any("experts" in warning for warning in trainer.safety_report["AsFT"]["warnings"])


# ---- self-checks


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny.save_pair(tmp_path_factory.mktemp("pair"))


def reported(method: SafetyMethod, folder, pair) -> dict:
    arguments = given(folder, model=pair[0], processing_class=None, peft_config=lora())
    trainer = SafeSFTTrainer(**arguments, safety=method)
    return trainer.safety_report[method.name]


@pytest.mark.slow
def test_vectors_report_the_loss_that_they_leave_and_warn_where_they_did_not_fit(pair, tmp_path):
    short = {"rank": 2, "max_steps": 2}
    report = reported(SecurityVectors(harmful_data=HARMFUL, fitting=short), tmp_path, pair)
    figures = report["figures"]
    assert figures["loss on harmful rows with vectors"] > figures["target loss"] > 0
    assert figures["share of harmful rows below the target"] == 0.0
    assert any("still teach something. Raise `max_" in warning for warning in report["warnings"])
    long = {"rank": 4, "max_steps": 300, "learning_rate": 0.01, "target_loss": 5.0}
    report = reported(SecurityVectors(harmful_data=HARMFUL, fitting=long), tmp_path, pair)
    assert report["figures"]["loss on harmful rows with vectors"] < 5
    assert not any("still teach something. Raise `max_" in warning for warning in report["warnings"])
    assert report["figures"]["share of harmful rows below the target"] > 0


@pytest.mark.slow
def test_asft_reports_the_energy_of_the_direction(pair, tmp_path):
    report = reported(AsFT(unaligned_model=pair[1], rank=4), tmp_path, pair)
    assert 0 < report["figures"]["direction energy in the top 4 (mean)"] <= 1
    report = reported(AsFT(unaligned_model=pair[1], projector="subspace", rank=4), tmp_path, pair)
    assert report["figures"]["largest eigenvalue of C (median)"] == 1.0


def test_measured_subspaces_report_what_they_explain(pair, tmp_path):
    report = reported(SaLoRA(safety_data=REFUSED, rank=4, task_rank=0), tmp_path, pair)
    (share,) = (value for name, value in report["figures"].items() if "explained variance" in name)
    assert 0 < share <= 1


@pytest.mark.slow
def test_a_weight_of_zero_and_a_rank_of_zero_are_said_to_protect_nothing(pair, tmp_path):
    for method in (AsFT(projector="none", weight=0.0), SaLoRA(rank=0, task_rank=2)):
        warnings = reported(method, tmp_path, pair)["warnings"]
        assert any("nothing is protected" in warning for warning in warnings)


# ---- rows of any form


def plain(rows: list[dict]) -> list[dict]:
    return [{side: row[side][-1]["content"] for side in ("prompt", "completion")} for row in rows]


def forms(rows: list[dict], folder: Path) -> dict[str, Any]:
    """Return the same rows in every form that users have them in."""
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, plain(rows))))
    return {
        "conversations": rows,
        "strings": plain(rows),
        "messages": [{"messages": row["prompt"] + row["completion"]} for row in rows],
        "dataset": Dataset.from_list(plain(rows)),
        "dataset of splits": DatasetDict(train=Dataset.from_list(rows)),
        "stream": Dataset.from_list(plain(rows)).to_iterable_dataset(),
        "file": file,
        "name of a file": str(file),
    }


DOORS: dict[str, tuple[str, Callable[..., SafetyMethod]]] = {
    "security_vectors": (
        "harmful_data",
        lambda rows: SecurityVectors(harmful_data=rows, fitting={"rank": 2, "max_steps": 2}),
    ),
    "salora": ("safety_data", lambda rows: SaLoRA(safety_data=rows, rank=4, task_rank=0)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DOORS)
def test_rows_in_any_form_make_the_same_protection(name, tmp_path):
    """Plain strings in a list once made vectors that had never seen the chat template, and protected nothing."""
    _, build = DOORS[name]
    rows = HARMFUL if name == "security_vectors" else REFUSED
    made = {}
    for form, given_rows in forms(rows, tmp_path).items():
        method = build(given_rows)
        model = get_peft_model(tiny.model(), method.adapt_peft_config(lora()))
        method.attach(model, tiny.tokenizer(), None)
        origin = method.provenance
        made[form] = json.dumps(origin.get("rows_sha256") or origin["harmful_rows"], sort_keys=True)
    assert set(made.values()) == {made["conversations"]}, made


@pytest.mark.parametrize("name", DOORS)
@pytest.mark.parametrize("rows", [[{"prompt": "A prompt."}], 3, "absent.jsonl", []], ids=str)
def test_rows_that_cannot_be_used_are_refused_under_the_name_of_the_argument(name, rows):
    argument, build = DOORS[name]
    method = build(rows)
    model = get_peft_model(tiny.model(), method.adapt_peft_config(lora()))
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=f"`{argument}`"):
        method.attach(model, tiny.tokenizer(), None)


# ---- penalties


@dataclass
class Terms(PenaltyMethod):
    """A penalty with given terms."""

    name: ClassVar[str] = "Terms"
    weight: float = 2.0
    values: dict[str, float] = field(default_factory=dict)

    def terms(self, model):
        return {name: torch.tensor(value) for name, value in self.values.items()}


def test_a_penalty_is_the_weighted_sum_of_its_terms():
    assert Terms(values={"a": 1.0, "b": 0.5}).penalty(tiny.model()).item() == 3.0
    assert Terms().penalty(tiny.model()) is None
    assert Terms(weight=0.0).self_check(tiny.model()) == SelfCheck(
        {}, ("`weight=0` only measures; nothing is protected.",)
    )


def test_the_layers_of_a_penalty_that_is_not_finite_are_named_with_advice_that_can_be_followed():
    with pytest.raises(FloatingPointError, match="in 1 of 2 layers, first `b`") as raised:
        Terms(values={"a": 1.0, "b": float("nan")}).penalty(tiny.model())
    assert "new run" in str(raised.value) and "lower `weight`" not in str(raised.value)


def test_dora_is_refused_by_penalties_on_updates(tmp_path):
    with pytest.raises(ValueError, match="use_dora"):
        SafeSFTTrainer(**given(tmp_path, peft_config=LoraConfig(use_dora=True)), safety=Terms())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_a_model_that_is_spread_over_devices_is_penalized_layer_by_layer(pair):
    def attached(model):
        torch.manual_seed(0)
        model = get_peft_model(model, lora(init_lora_weights=False))
        method = AsFT(unaligned_model=pair[1], aligned_model=pair[0])
        method.attach(model, tiny.tokenizer(), None)
        return model, method

    model, method = attached(tiny.model())
    expected = method.penalty(model).item()
    spread = copy.deepcopy(model)
    model.get_base_model().model.layers[1].to("cuda")
    penalty = method.penalty(model)
    assert penalty.item() == pytest.approx(expected, rel=1e-5)
    penalty.backward()
    assert spread is not model


# ---- settings and cards


@pytest.mark.parametrize("name", METHODS)
def test_every_card_builds_its_method_and_its_fields_are_settings(name):
    card = METHODS[name].card
    materials = Materials(HARMFUL, REFUSED, "unaligned", "aligned", ["Make a bad thing."], ["Make a good thing."])
    method = card.example(materials)
    assert type(method) is METHODS[name]
    for field_ in card.fields:
        assert hasattr(method, field_.name)
    for text in (card.title, card.summary, card.needs, card.cost, card.avoid):
        assert text and "\n" not in text
    assert card.needs_unaligned == ("unaligned_model" in method.settings())


def test_settings_are_those_that_differ_from_their_defaults():
    assert AsFT(unaligned_model="base", weight=10.0).settings() == {"unaligned_model": "base", "weight": 10.0}
    assert SecurityVectors("vectors").settings() == {"vectors": "vectors"}
    assert SafetyMethod().settings() == {}
