"""SafeGrad: both rules against one step computed by hand; what they leave alone; what is refused."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from runs import assert_close, assert_same_run, even_rows, exact_settings, given, lora, run
from torch.optim.optimizer import _global_optimizer_post_hooks
from trl import SFTTrainer

from safe_trainer import SafeGrad, SafeSFTTrainer
from safe_trainer.artifacts import own_answers
from safe_trainer.distributed import Strategy
from safe_trainer.evaluation.prompting import encode

HARMFUL = [f"Make a bad thing {i}" + "!" * (i % 3) for i in range(6)]
MOVED = {"init_lora_weights": False}  # an adapter that changes the model from the start, so that there is a loss
ADAPTERS = {"lora": lambda: lora(**MOVED), "full": lambda: None}


def guard(**settings: object) -> SafeGrad:
    return SafeGrad(**({"prompts": HARMFUL, "answer_tokens": 3, "prompts_per_step": 6} | settings))


def arguments(folder, adapter="lora", **config):
    """Return a trainer's arguments for one step `w − gradient` over twelve rows of one length."""
    args = exact_settings(
        folder, **{"max_steps": 1, "learning_rate": 1.0, "per_device_train_batch_size": 12, **config}
    )
    return given(folder, args=args, train_dataset=even_rows(12), peft_config=ADAPTERS[adapter]())


def safe(method):
    return lambda **given_: SafeSFTTrainer(**given_, safety=method)


def shaken(model: torch.nn.Module, size: float = 0.05) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))


def safety_loss(model: torch.nn.Module, rule: str) -> torch.Tensor:
    """Return the mean over the tokens of the start's greedy answers, a prompt and a token at a time, in float64."""
    start, terms = tiny.model().double().eval(), []
    for ids in encode(start, tiny.tokenizer(), HARMFUL):
        answer: list[int] = []
        for _ in range(3):
            with torch.no_grad():
                token = start(input_ids=torch.tensor([ids + answer])).logits[0, -1].argmax().item()
            if token == 1:  # <e>, which ends an answer
                break
            answer.append(token)
        p, q = (
            m(input_ids=torch.tensor([ids + answer])).logits[0, len(ids) - 1 :].log_softmax(-1) for m in (start, model)
        )
        if rule == "projection":
            terms.append((p.detach().exp() * (p.detach() - q)).sum(-1))
        else:
            terms.append(-q[:-1].gather(-1, torch.tensor(answer).unsqueeze(-1))[:, 0])
    return torch.cat(terms).mean()


@pytest.mark.slow
def test_a_step_that_float16_skips_leaves_the_figures_finite(tmp_path):
    method = guard()
    trainer = SafeSFTTrainer(**arguments(tmp_path), safety=method)
    with method.training(trainer.model):
        for scale in (float("inf"), 1.0):
            for parameter in trainer.model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.full_like(parameter, scale)
            method.after_backward(trainer.model)
    assert -1 <= method.diagnostics(trainer.model)["safe_grad/cosine"] <= 1


def gradients(model: torch.nn.Module, loss) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in model.double().eval().named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss(model), list(named.values())), strict=True))


def task_loss(model: torch.nn.Module, sign: float = 1.0) -> torch.Tensor:
    ids = torch.tensor(even_rows(12)["input_ids"])
    log_probs = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    return -sign * log_probs.gather(-1, ids[:, 1:, None]).mean()


def dot(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> torch.Tensor:
    return sum((one[name] * other[name]).sum() for name in one)


def at_start(model, adapter):
    """Move a model that is trained in full, which would otherwise be the start itself."""
    if adapter == "full":
        shaken(model)


def ours(folder, method, adapter="lora", **config):
    torch.manual_seed(0)
    trainer = SafeSFTTrainer(**arguments(folder, adapter, **config), safety=method)
    at_start(trainer.model, adapter)
    return run(lambda: trainer, {})


def reference(folder, adapter="lora"):
    """Return the model that a step starts from, in float64."""
    torch.manual_seed(0)
    model = SFTTrainer(**arguments(folder, adapter)).model
    at_start(model, adapter)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("rho", [0.0, 1.0])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_step_is_the_projection_over_all_weights_as_one_vector(rho, adapter, tmp_path):
    outcome = ours(tmp_path, guard(rho=rho), adapter)
    model = reference(tmp_path, adapter)
    task = gradients(model, task_loss)
    safety = gradients(model, lambda model: safety_loss(model, "projection"))
    product = dot(task, safety)
    expected = dict(outcome.start)
    for name in task:
        step = task[name] + (rho - min(product, 0) / dot(safety, safety)) * safety[name]
        expected[name] = outcome.start[name] - step.float()
    assert_close(outcome.end, expected, outcome.start, tolerance=1e-3)
    figures = outcome.trainer.safety_methods[0]
    assert figures._cosines == [
        pytest.approx((product / (dot(task, task) * dot(safety, safety)).sqrt()).item(), rel=1e-3)
    ]


@pytest.mark.slow
def test_a_conflict_is_taken_out_and_nothing_else():
    """With a task that undoes the answers the safety loss does not rise, and what is at a right angle to it stays."""
    torch.manual_seed(0)
    model = get_peft_model(tiny.model(), lora(**MOVED))
    method = guard(rho=0.0)
    method.adapt_peft_config(lora(**MOVED))
    method.attach(model, tiny.tokenizer(), None)
    safety = gradients(model, lambda model: safety_loss(model, "projection"))
    model.float()
    torch.manual_seed(1)
    for against in (True, False):
        side = {name: torch.randn_like(g) for name, g in safety.items()}
        share = dot(side, safety) / dot(safety, safety)
        side = {name: side[name] - share * safety[name] for name in side}  # at a right angle
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.grad = (side[name] + (-3 if against else 3) * safety[name]).float()
        before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        method.after_backward(model)
        after = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        expected = side if against else before
        for name in expected:
            assert torch.allclose(after[name], expected[name].float(), atol=1e-4), (against, name)
    assert [cosine < 0 for cosine in method._cosines] == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("max_step_size", [1e-4, 100.0], ids=["short", "Polyak"])
def test_the_trust_region_is_a_step_of_its_own_after_the_optimizers(max_step_size, adapter, tmp_path):
    outcome = ours(tmp_path, guard(rule="trust_region", tau=0.5, max_step_size=max_step_size), adapter)
    model = reference(tmp_path, adapter)
    task = gradients(model, task_loss)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in task:
                parameter.sub_(task[name])
    loss = safety_loss(model, "trust_region").item()
    safety = gradients(model, lambda model: safety_loss(model, "trust_region"))
    size = min((loss - 0.5) / dot(safety, safety).item(), max_step_size)
    assert loss > 0.5 and (size == max_step_size) == (max_step_size == 1e-4)
    expected = dict(outcome.end)
    for name, parameter in model.named_parameters():
        if name in task:
            expected[name] = (parameter - size * safety[name]).float()
    assert_close(outcome.end, expected, outcome.start, tolerance=1e-3)


@pytest.mark.slow
def test_within_the_trust_region_training_is_plain_to_the_last_bit(tmp_path):
    assert_plain(guard(rule="trust_region", tau=1e9), tmp_path)


@pytest.mark.slow
def test_without_a_conflict_and_rho_zero_training_is_plain_to_the_last_bit(tmp_path, monkeypatch):
    """The gradient that the method sees agrees with the task's: both say the same, so there is nothing to take out."""
    monkeypatch.setattr(SafeGrad, "_safety", lambda self, model, trained: (1.0, [p.grad.clone() for p in trained]))
    assert_plain(guard(rho=0.0), tmp_path)


def assert_plain(method, folder):
    def kept(outcome):
        names = ("loss", "grad_norm", "learning_rate", "entropy", "num_tokens", "mean_token_accuracy")
        log = outcome.trainer.state.log_history
        outcome.trainer.state.log_history = [{k: e[k] for k in names if k in e} for e in log if "loss" in e]
        return outcome

    settings = {"peft_config": lora(lora_dropout=0.5), "bf16": False}
    mine = run(safe(method), given(folder, **settings))
    assert_same_run(kept(mine), kept(run(SFTTrainer, given(folder, **settings))))


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["projection", "trust_region"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_accumulation_changes_nothing(rule, checkpointing, tmp_path):
    ends = []
    for batch, accumulation in ((12, 1), (3, 4)):
        size = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        config = {**size, "gradient_checkpointing": checkpointing, "max_steps": 3, "learning_rate": 0.1}
        ends.append(ours(tmp_path, guard(rule=rule, tau=0.0, max_step_size=0.05), **config))
    assert_close(ends[1].end, ends[0].end, ends[0].start, tolerance=1e-4)


@pytest.mark.slow
def test_it_is_clipped_after_and_what_is_logged_is_what_is_clipped(tmp_path):
    outcome = ours(tmp_path, guard(rho=50.0), max_grad_norm=1e-3)
    (norm,) = [entry["grad_norm"] for entry in outcome.trainer.state.log_history if "grad_norm" in entry]
    moved = torch.stack([(outcome.end[name] - outcome.start[name]).norm() for name in outcome.moved]).norm()
    model = reference(tmp_path)
    task, safety = gradients(model, task_loss), gradients(model, lambda m: safety_loss(m, "projection"))
    product = min(dot(task, safety), 0) / dot(safety, safety)
    total = {name: task[name] + (50 - product) * safety[name] for name in task}
    assert norm == pytest.approx(dot(total, total).sqrt().item(), rel=1e-3)
    assert moved.item() == pytest.approx(1e-3, rel=1e-2)


def test_modes_gradients_and_random_numbers_are_left_alone():
    config = lora(lora_dropout=0.5, **MOVED)
    model = get_peft_model(tiny.model(), config)
    method = guard(rho=0.0)
    method.adapt_peft_config(config)
    method.attach(model, tiny.tokenizer(), None)
    model.train()
    model.get_base_model().model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    untouched, *others = trained  # a weight that the task's loss does not reach
    for parameter in others:
        parameter.grad = torch.zeros_like(parameter)
    state = torch.get_rng_state()
    method.after_backward(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert untouched.grad is None and not any(parameter.grad.any() for parameter in others)


@pytest.mark.parametrize("ending", [None, RuntimeError("disk full")], ids=["well", "failed"])
def test_the_optimizers_hook_is_gone_afterwards(ending, tmp_path):
    before = dict(_global_optimizer_post_hooks)
    method = guard(rule="trust_region")
    try:
        with method.training(tiny.model()):
            assert len(_global_optimizer_post_hooks) == len(before) + 1
            if ending is not None:
                raise ending
    except RuntimeError as error:
        assert error is ending
    assert dict(_global_optimizer_post_hooks) == before


def test_steps_of_other_optimizers_and_steps_without_a_backward_pass_are_not_followed():
    """As those of another model, and the one that FSDP2 takes to save an optimizer which has no state yet."""
    model, other = get_peft_model(tiny.model(), lora(**MOVED)), torch.nn.Linear(2, 2)
    method = guard(rule="trust_region", tau=0.0)
    method.adapt_peft_config(None)
    method.attach(model, tiny.tokenizer(), None)
    with method.training(model):
        own = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        own.step()
        method.after_backward(model)
        other(torch.ones(1, 2)).sum().backward()
        torch.optim.SGD(other.parameters(), lr=0.1).step()
        assert method._corrected == []
        own.step()
        own.step()
    assert method._corrected == [True]


@pytest.mark.slow
def test_answers_are_kept_that_plain_training_changes(tmp_path):
    settings = {"max_steps": 20, "learning_rate": 3e-2, "bf16": False}

    def ends(method, rule):
        trainer = SafeSFTTrainer(**given(tmp_path, peft_config=lora(), **settings), safety=method)
        trainer.train()
        with torch.no_grad():
            return safety_loss(trainer.model.double().eval(), rule).item()

    off = guard(rule="trust_region", tau=1e9)
    assert ends(guard(rho=1.0), "projection") < 0.5 * ends(off, "projection")
    pulled = ends(guard(rule="trust_region", max_step_size=1.0), "trust_region")
    assert pulled < ends(off, "trust_region") - 0.2


@pytest.mark.slow
def test_a_trust_region_that_diverges_is_stopped(tmp_path):
    settings = {"bf16": False, "max_steps": 2, "learning_rate": 1e25}  # so far that an update is infinite
    with pytest.raises(FloatingPointError, match="at step 0.*`max_step_size`"):
        SafeSFTTrainer(**given(tmp_path, peft_config=lora(), **settings), safety=guard(rule="trust_region")).train()


@pytest.mark.slow
def test_a_trust_region_that_did_not_hold_is_said_to_have_failed(tmp_path, caplog):
    method = guard(rule="trust_region", tau=0.5, max_step_size=1e-9)
    SafeSFTTrainer(**given(tmp_path, peft_config=lora()), safety=method).train()
    assert "above `tau=0.5`" in caplog.text and "`max_step_size`" in caplog.text


@pytest.mark.slow
def test_a_start_that_does_not_refuse_is_warned_of_and_one_that_does_is_not(monkeypatch):
    def checked():
        method = guard()
        method.attach(tiny.model(), tiny.tokenizer(), None)
        return method.self_check(tiny.model())

    assert "0%" in checked().warnings[0] and checked().figures["harmful_prompts_held"] == 6
    monkeypatch.setattr(own_answers, "PhraseJudge", lambda: lambda prompts, answers: ["refused"] * len(answers))
    assert checked().warnings == () and checked().figures["harmful_prompts_refused_at_start"] == 1


def test_deepspeed_and_prompt_learning_are_refused():
    for stage in ("ZeRO-2", "ZeRO-3"):
        with pytest.raises(ValueError, match="SafeGrad does not work with ZeRO"):
            guard().check_strategy(Strategy(stage))
    with pytest.raises(ValueError, match="PromptTuningConfig"):
        guard().adapt_peft_config(PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    assert guard().adapt_peft_config(LoraConfig(use_dora=True)).use_dora


@pytest.mark.parametrize(
    "settings",
    [
        {"rule": "surgery"},
        {"rho": -1.0},
        {"tau": float("nan")},
        {"max_step_size": 0.0},
        {"max_step_size": None},
        {"prompts_per_step": 0},
        {"answer_tokens": 0},
        {"max_prompts": 0},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_wrong_settings_are_refused_at_once(settings):
    with pytest.raises((TypeError, ValueError), match=f"`{next(iter(settings))}`"):
        guard(**settings)
