"""ConstrainedSFT: against the paper's loss written out token by token; what it counts, and what it refuses."""

from __future__ import annotations

import pytest
import tiny
import torch
from datasets import Dataset
from peft import KasaConfig, LoraConfig, get_peft_model
from runs import assert_close, assert_same_run, exact_settings, given, lora, run
from trl import SFTTrainer

from safe_trainer import ConstrainedSFT, SafeSFTTrainer, SecurityVectors
from safe_trainer.data import conversation
from safe_trainer.methods.constrained_sft import _places

BETAS = {"first_token_beta": 0.6, "opening_beta": 3.0, "opening_tokens": 4, "beta": 0.2}
MOVED = {"init_lora_weights": False}  # an adapter that changes the model from the start
VECTORS = {"rank": 2, "max_steps": 30, "learning_rate": 0.05}


def turns() -> Dataset:
    """Return conversations of several turns, with answers of other lengths."""
    rows = []
    for i in range(8):
        asked = [f"Say {i}" + "!" * (i % 3), "And again?", "Why?"][: 1 + i % 3]
        answers = [f"It is {i * i}.", "It is still that, and it stays.", "No."]
        rows.append(
            [turn for a, b in zip(asked, answers, strict=False) for turn in sum(conversation(a, b).values(), [])]
        )
    return Dataset.from_list([{"messages": row} for row in rows])


WAYS = {
    "padded": {"per_device_train_batch_size": 8},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "padding-free": {"per_device_train_batch_size": 8, "padding_free": True, "max_length": None},
    "packed": {"per_device_train_batch_size": 8, "packing": True, "max_length": 128},
    "several turns": {"train_dataset": turns(), "per_device_train_batch_size": 8, "assistant_only_loss": True},
    "several turns, packed": {
        **{"train_dataset": turns(), "per_device_train_batch_size": 8, "assistant_only_loss": True},
        **{"packing": True, "max_length": 256},
    },
}


def arguments(folder, **changes):
    """Return a trainer's arguments for one step of gradient descent over eight rows."""
    usual = {"train_dataset": tiny.rows(8), "peft_config": lora(**MOVED)}
    config = {name: changes.pop(name) for name in list(changes) if name not in {"train_dataset", "peft_config"}}
    return given(folder, args=exact_settings(folder, max_steps=1, learning_rate=1.0, **config), **usual | changes)


def paper_loss(model: torch.nn.Module, start: torch.nn.Module, rows: list[dict]) -> torch.Tensor:
    """Return the mean of −(2/β_t) log σ(β_t (log π_θ − log π_start)) over answer tokens, one at a time."""
    terms = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        now, then = (m(input_ids=ids).logits[0].log_softmax(-1) for m in (model, start))
        t = 0
        for place, label in enumerate(row["labels"]):
            t = 0 if label == -100 else t + 1
            if t:
                beta = BETAS["first_token_beta"] if t == 1 else BETAS["opening_beta"] if t <= 4 else BETAS["beta"]
                change = now[place - 1, label] - then[place - 1, label].detach()
                terms.append(-2 / beta * torch.nn.functional.logsigmoid(beta * change))
    return torch.stack(terms).mean()


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_step_is_that_of_the_papers_loss(way, tmp_path):
    torch.manual_seed(0)
    ours = run(lambda **a: SafeSFTTrainer(**a, safety=ConstrainedSFT(**BETAS)), arguments(tmp_path, **WAYS[way]))
    torch.manual_seed(0)
    alone = {name: value for name, value in WAYS[way].items() if name in ("train_dataset", "assistant_only_loss")}
    trainer = SFTTrainer(**arguments(tmp_path, **alone))
    model, start = trainer.model.double().eval(), tiny.model().double().eval()
    loss = paper_loss(model, start, list(trainer.train_dataset))
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(loss, list(named.values()))
    expected = dict(ours.start)
    for name, gradient in zip(named, gradients, strict=True):
        expected[name] = ours.start[name] - gradient.float()
    assert_close(ours.end, expected, ours.start, tolerance=1e-4)
    plain = run(SFTTrainer, arguments(tmp_path, **WAYS[way]))
    with pytest.raises(AssertionError):  # another step than that of plain training
        assert_close(plain.end, expected, ours.start, tolerance=1e-2)


def test_no_token_weighs_less_than_a_thousandth_and_none_more_than_two():
    model = get_peft_model(tiny.model(), lora(**MOVED))
    method = ConstrainedSFT(opening_beta=1e4, first_token_beta=1e4, beta=1e4)
    with method.training(model):
        labels = torch.full((1, 9), 7)
        inputs = {"input_ids": labels, "labels": labels}

        class Scored:
            log_probs = torch.zeros(1, 8)

        class Scoring(torch.nn.Module):
            def forward(self, **inputs):
                return Scored

        weights = method.token_weights(Scoring(), inputs, torch.tensor([[1.0, -1.0] * 4]))
    assert weights.tolist() == [pytest.approx([1e-3, 2.0] * 4)]


@pytest.mark.slow
def test_betas_of_nearly_zero_are_plain_training_to_the_last_bit(tmp_path):
    """So the pass of the start model leaves modes, dropout's random numbers and gradients alone."""
    config = {"peft_config": lora(lora_dropout=0.5), "bf16": False}
    none = ConstrainedSFT(opening_beta=1e-30, first_token_beta=1e-30, beta=1e-30)
    ours = run(SafeSFTTrainer, given(tmp_path, **config) | {"safety": none})
    assert ours.trainer.state.log_history.pop()["constrained_sft/later_weight"] == 1.0
    theirs = run(SFTTrainer, given(tmp_path, **config))
    theirs.trainer.state.log_history = theirs.trainer.state.log_history[:-1]
    ours.trainer.state.log_history = ours.trainer.state.log_history[: len(theirs.trainer.state.log_history)]
    assert_same_run(ours, theirs)


@pytest.mark.slow
def test_security_vectors_act_in_both_models(tmp_path):
    rows = [conversation(f"Make a bad thing {i}.", "Sure: a bad thing.") for i in range(8)]
    for vectors in (SecurityVectors(harmful_data=rows, fitting=VECTORS, strength=strength) for strength in (1.0, 4.0)):
        method = ConstrainedSFT()
        trainer = SafeSFTTrainer(**given(tmp_path, peft_config=lora(), max_steps=1), safety=[vectors, method])
        trainer.train()
        assert method.diagnostics(trainer.model) == {
            "constrained_sft/opening_weight": pytest.approx(1, abs=2e-3),
            "constrained_sft/later_weight": pytest.approx(1, abs=2e-3),
        }


@pytest.mark.slow
def test_openings_are_learned_less_than_by_plain_training_and_the_rest_as_well(tmp_path):
    rows = Dataset.from_list([conversation(f"Say {i}", "Aye! It is so, and it will be so.") for i in range(16)])
    method, losses = ConstrainedSFT(), {}
    for name, build in (("plain", SFTTrainer), ("ours", lambda **a: SafeSFTTrainer(**a, safety=method))):
        model = tiny.model()
        model.lm_head.weight.data.mul_(20)  # or nothing that is trained before it makes a token likely
        args = exact_settings(tmp_path, optim="adamw_torch", learning_rate=1e-2, max_steps=30)
        outcome = run(build, given(tmp_path, model=model, args=args, peft_config=lora(), train_dataset=rows))
        ids, labels = (torch.tensor(outcome.trainer.train_dataset[0][column]) for column in ("input_ids", "labels"))
        answer = ids[labels != -100]
        with torch.no_grad():
            logits = outcome.trainer.model.eval()(input_ids=ids.unsqueeze(0)).logits[0, -len(answer) - 1 : -1]
        losses[name] = torch.nn.functional.cross_entropy(logits, answer, reduction="none")
    opening, later = (
        losses["ours"][part].mean() - losses["plain"][part].mean() for part in (slice(5), slice(5, None))
    )
    assert opening > 1 and later < 0.3, (opening, later)
    weights = method.diagnostics(outcome.trainer.model)
    assert weights["constrained_sft/opening_weight"] < 0.7 < weights["constrained_sft/later_weight"]


@pytest.mark.parametrize(
    ("covered", "restarts", "expected"),
    [
        ([0, 1, 1, 1, 0, 0, 1, 1], None, [0, 1, 2, 3, 0, 0, 1, 2]),
        ([1, 1, 1, 1, 1, 1, 1, 1], None, [1, 2, 3, 4, 5, 6, 7, 8]),
        ([1, 1, 1, 1, 1, 0, 1, 1], [0, 0, 1, 0, 0, 0, 0, 1], [1, 2, 1, 2, 3, 0, 1, 1]),
        ([0, 0, 0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]),
    ],
    ids=["turns", "text", "packed", "nothing"],
)
def test_places_are_counted_anew_in_each_answer(covered, restarts, expected):
    packed = None if restarts is None else torch.tensor([restarts]).bool()
    assert _places(torch.tensor([covered]).bool(), packed).tolist() == [expected]


def checked(folder, **changes):
    trainer = SafeSFTTrainer(**given(folder, peft_config=lora(), **changes), safety=ConstrainedSFT())
    return trainer.safety_report["Constrained SFT"]


@pytest.mark.slow
def test_labels_are_warned_of_with_their_share(tmp_path):
    def rows(labels: int) -> Dataset:
        answers = ["yes"] * labels + ["It is so, and it will be so."] * (20 - labels)
        return Dataset.from_list([conversation(f"Is it {i}?", answer) for i, answer in enumerate(answers)])

    report = checked(tmp_path, train_dataset=rows(5))
    assert report["figures"]["share of answers within the opening"] == 0.25
    assert "25% of 20 answers" in report["warnings"][0] and "`opening_tokens`" in report["warnings"][0]
    report = checked(tmp_path, train_dataset=rows(0))
    assert report["warnings"] == [] and report["figures"]["share of answers within the opening"] == 0


@pytest.mark.slow
def test_a_template_that_begins_answers_itself_is_warned_of_with_the_tokens_that_it_takes(tmp_path):
    tokenizer, rows = tiny.tokenizer(), [conversation(f"Is it {i}?", "It is so, and will be so.") for i in range(8)]
    template = tokenizer.chat_template
    for opening, told in (("(so) ", "with 5 tokens of its own"), ("", None)):
        tokenizer.chat_template = template.replace("{{ m.content }}<e>", f"{opening}{{{{ m.content }}}}<e>")
        changes = {"processing_class": tokenizer, "train_dataset": Dataset.from_list(rows)}
        warnings = checked(tmp_path, **changes)["warnings"]
        assert len(warnings) == (told is not None)
        assert told is None or (told in warnings[0] and "Raise `opening_tokens` to 10" in warnings[0])


@pytest.mark.slow
def test_the_start_log_probability_of_openings_is_reported(tmp_path):
    report = checked(tmp_path)
    found = []
    for row in SFTTrainer(**given(tmp_path)).train_dataset:
        log_probs = tiny.model()(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        places = [place for place, label in enumerate(row["labels"]) if label != -100][:5]
        found += [log_probs[place - 1, row["labels"][place]].item() for place in places]
    figure = report["figures"]["log-probability of an opening's token at the start (mean)"]
    assert figure == pytest.approx(sum(found) / len(found), rel=1e-4)


@pytest.mark.slow
def test_rows_whose_prompts_the_loss_covers_are_warned_of(tmp_path):
    report = checked(tmp_path, train_dataset=turns())
    assert any("100% of the rows" in warning and "`completion`" in warning for warning in report["warnings"])
    assert not any(
        "`completion`" in w for w in checked(tmp_path, train_dataset=turns(), assistant_only_loss=True)["warnings"]
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_config": None}, "needs `peft_config`"),
        ({"peft_config": None, "model": "adapted"}, "needs `peft_config`"),
        ({"peft_config": LoraConfig(init_lora_weights="pissa")}, "init_lora_weights='pissa'"),
        ({"peft_config": LoraConfig(kasa_config=KasaConfig())}, "`kasa_config`, which changes the base weights"),
        ({"peft_config": LoraConfig(bias="all")}, "`bias='all'`"),
        ({"loss_type": "dft"}, 'loss_type="nll"'),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ],
    ids=["full", "adapted", "pissa", "KaSA", "biases", "dft", "smoothing"],
)
@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
def test_what_has_no_start_model_or_no_token_losses_is_refused(changes, words, tmp_path):
    changes = {"peft_config": lora(), **changes}
    if changes.get("model"):
        changes["model"] = get_peft_model(tiny.model(), lora())
    with pytest.raises(ValueError, match=words):
        SafeSFTTrainer(**given(tmp_path, **changes), safety=ConstrainedSFT())


@pytest.mark.parametrize(
    "settings",
    [{"beta": 0.0}, {"opening_beta": -1.0}, {"first_token_beta": float("inf")}, {"opening_tokens": 0}],
    ids=["beta", "opening_beta", "first_token_beta", "opening_tokens"],
)
def test_wrong_settings_are_refused_at_once(settings):
    with pytest.raises(ValueError, match=f"`{next(iter(settings))}`"):
        ConstrainedSFT(**settings)
