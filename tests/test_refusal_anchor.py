"""RefusalAnchor: against its two means written out in full; what it does to a run; what it refuses."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from itertools import product

import pytest
import tiny
import torch
from datasets import Dataset
from marks import exhaustive_but
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from runs import assert_close, assert_same_run, exact_settings, given, lora, run
from transformers import AutoTokenizer
from trl import SFTTrainer

from safe_trainer import PromptSet, RefusalAnchor, SafeGrad, SafeSFTTrainer, SecurityVectors, general_prompts, testbed
from safe_trainer.artifacts import own_answers
from safe_trainer.artifacts.own_answers import drawn
from safe_trainer.data import conversation
from safe_trainer.data.protection import protection_prompts, protection_rows
from safe_trainer.evaluation.prompting import encode
from safe_trainer.methods import fingerprint

HARMFUL = [f"Make a bad thing {i}" + "!" * (i % 3) for i in range(6)]
BENIGN = [f"Say {i} nicely" for i in range(5)]
ROWS = [conversation(prompt, "Sure: a bad thing.") for prompt in HARMFUL]
ADAPTERS = {
    "lora": lambda: LoraConfig(r=4, lora_alpha=12, target_modules="all-linear"),
    "dora": lambda: LoraConfig(r=4, use_dora=True, target_modules="all-linear"),
    "ia3": lambda: IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "full": lambda: None,
}
USUAL = [("qwen2", "lora"), ("llama", "dora"), ("mistral", "ia3"), ("gpt2", "lora"), ("gemma", "full")]


def anchor(**settings: object) -> RefusalAnchor:
    return RefusalAnchor(
        **({"prompts": HARMFUL, "benign_prompts": BENIGN, "weight": 1.0, "answer_tokens": 3} | settings)
    )


def shaken(model: torch.nn.Module, size: float = 0.3) -> None:
    """Move everything that is trained."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))


def own_answer(model: torch.nn.Module, ids: list[int], length: int) -> list[int]:
    """Return a model's greedy answer, one forward pass a token and without a cache."""
    ids = list(ids)
    for _ in range(length):
        with torch.no_grad():
            token = model.eval()(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
        if token == 1:  # <e>, which ends an answer
            break
        ids.append(token)
    return ids


def refusals(start: torch.nn.Module) -> list[tuple[list[int], tuple[int, ...], int]]:
    """Each benign prompt, by turns one of the openings of refusals, and how many of them there are."""
    starts = encode(start, tiny.tokenizer(), HARMFUL)
    found = Counter(tuple(own_answer(start, ids, 1)[len(ids) :]) for ids in starts)
    openings = [opening for opening, _ in found.most_common(8) if opening]
    benign = encode(start, tiny.tokenizer(), BENIGN)
    return [(ids, openings[i % len(openings)], len(openings)) for i, ids in enumerate(benign)]


def unlikelihoods(start: torch.nn.Module, tuned: torch.nn.Module) -> torch.Tensor:
    """How far the sum of -log(1 - p) over the openings of refusals, after each benign prompt, exceeds the start's."""
    found = []
    for ids, opening, count in refusals(start):
        before, after = (-count * (1 - chance(model, ids, opening)).log() for model in (start, tuned))
        found.append((after - before.detach()).clamp(min=0))
    return torch.stack(found)


def refuses_more(start: torch.nn.Module, model: torch.nn.Module) -> None:
    """Train a model until it refuses all benign prompts more than the start does."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, asked = torch.optim.Adam(trained, lr=0.05), refusals(start)
    for _ in range(50):
        if unlikelihoods(start, model).min() > 0:
            break
        optimizer.zero_grad()
        (-sum(chance(model, ids, opening).log() for ids, opening, _ in asked)).backward()
        optimizer.step()


def chance(model: torch.nn.Module, ids: list[int], answer: tuple[int, ...]) -> torch.Tensor:
    """The probability that a model begins so, in float64."""
    logits = model.eval()(input_ids=torch.tensor([[*ids, *answer]])).logits[0, len(ids) - 1 : -1].double()
    return logits.softmax(-1).gather(-1, torch.tensor(answer).unsqueeze(-1)).prod()


@pytest.fixture
def refusing(monkeypatch):
    """Tiny random models say nothing: let whatever they answer be a refusal, from its first token."""
    monkeypatch.setattr(own_answers, "PhraseJudge", lambda: lambda prompts, answers: ["refused"] * len(answers))


def divergences(start: torch.nn.Module, tuned: torch.nn.Module, prompts: list[str], length: int = 3) -> torch.Tensor:
    """KL(start ‖ tuned) at the end of each prompt and after each token of the start's answer, in float64."""
    found = []
    for ids in encode(start, tiny.tokenizer(), prompts):
        sequence = own_answer(start, ids, length)
        p, q = (
            model.eval()(input_ids=torch.tensor([sequence])).logits[0, len(ids) - 1 :].double().log_softmax(-1)
            for model in (start, tuned)
        )
        found.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(found)


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "adapter"), exhaustive_but(USUAL, product(tiny.ARCHITECTURES, ADAPTERS)))
def test_penalty_is_the_divergence_on_own_answers_and_the_chance_of_refusing_harmless_prompts(
    refusing, architecture, adapter
):
    if adapter == "ia3" and architecture == "gpt2":
        pytest.skip("gpt2 has no v_proj")
    torch.manual_seed(1)
    config, start = ADAPTERS[adapter](), tiny.model(architecture)
    model = tiny.model(architecture)
    model = model if config is None else get_peft_model(model, config)
    method = anchor(weight=2.0, anchors_per_step=11)
    method.adapt_peft_config(config)
    method.attach(model, tiny.tokenizer(), None)
    assert method.terms(model)["held"].item() == pytest.approx(0, abs=1e-5)
    assert method.terms(model)["avoided"].item() == pytest.approx(0, abs=1e-5)
    shaken(model, 3.0 if adapter == "ia3" else 0.3)
    for move in (lambda start, model: None, refuses_more):
        move(start, model)
        # Eleven anchors a step: six turns of harmful prompts and five of benign ones, which is each of them once.
        held, avoided = divergences(start, model, HARMFUL).mean().item(), unlikelihoods(start, model).mean().item()
        assert held > 3e-5
        assert method.penalty(model).item() == pytest.approx(2 * (held + avoided), rel=1e-3)
        measured = method.diagnostics(model)
        assert measured["refusal_anchor/held"] == pytest.approx(held, rel=1e-3)
        assert measured["refusal_anchor/avoided"] == pytest.approx(avoided, rel=1e-3, abs=1e-7)
    assert avoided > 1e-6  # before, some or all are refused less than at the start, which costs nothing


@pytest.mark.slow
def test_gradient_is_that_of_both_means(refusing):
    start, model = tiny.model(), get_peft_model(tiny.model(), ADAPTERS["lora"]())
    method = anchor(anchors_per_step=11)
    method.attach(model, tiny.tokenizer(), None)
    shaken(model, 0.1)
    refuses_more(start, model)
    assert unlikelihoods(start, model).min() > 0
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ours = torch.autograd.grad(method.penalty(model), trained)
    theirs = torch.autograd.grad(
        divergences(start, model, HARMFUL).mean() + unlikelihoods(start, model).mean(), trained
    )
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other.float(), rtol=1e-3, atol=1e-6)


def test_tokens_beyond_the_most_likely_count_as_one(monkeypatch):
    monkeypatch.setattr("safe_trainer.artifacts.own_answers._SMALL_VOCABULARY", 10)
    start, model = tiny.model(), get_peft_model(tiny.model(), ADAPTERS["lora"]())
    method = anchor(prompts=HARMFUL[:1], benign_prompts=[], anchors_per_step=1, top_k=7)
    method.attach(model, tiny.tokenizer(), None)
    shaken(model)
    (ids,) = encode(start, tiny.tokenizer(), HARMFUL[:1])
    sequence = torch.tensor([own_answer(start, ids, 3)])
    terms = []
    with torch.no_grad():
        distributions = [m.eval()(input_ids=sequence).logits[0, len(ids) - 1 :].softmax(-1) for m in (start, model)]
    for p, q in zip(*distributions, strict=True):
        kept = p.topk(7).indices
        p, q = (torch.cat([d[kept], 1 - d[kept].sum(0, keepdim=True)]).double() for d in (p, q))
        terms.append((p * (p / q).log()).sum())
    assert method.penalty(model).item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-3)


def test_reference_is_the_model_without_the_adapter_that_the_trainer_adds():
    config = LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear")  # changes the model from the start
    model = get_peft_model(tiny.model(), config)
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    method = anchor(anchors_per_step=6)
    method.adapt_peft_config(config)
    method.attach(model, tiny.tokenizer(), None)
    assert method.penalty(model).item() == pytest.approx(
        divergences(tiny.model(), model, HARMFUL).mean().item(), rel=1e-4
    )
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trained


def test_reference_is_the_start_where_the_adapter_takes_its_part_of_the_base_weights():
    """Without its adapter such a model is not the start: the anchor would hold it to another model's answers."""
    config = LoraConfig(r=4, init_lora_weights="pissa", target_modules="all-linear")
    model = get_peft_model(tiny.model(), config)
    method = anchor(anchors_per_step=6)
    method.adapt_peft_config(config)
    method.attach(model, tiny.tokenizer(), None)
    assert method.penalty(model).item() == pytest.approx(0, abs=1e-4)
    assert divergences(tiny.model(), model, HARMFUL).mean().item() == pytest.approx(0, abs=1e-4)


def test_reference_of_a_model_that_came_with_an_adapter_is_that_model():
    model = get_peft_model(tiny.model(), LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear"))
    method = anchor()
    method.adapt_peft_config(None)
    method.attach(model, tiny.tokenizer(), None)
    assert method.penalty(model).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
def test_weight_zero_is_plain_training_to_the_last_bit(tmp_path):
    arguments = given(tmp_path, peft_config=lora(lora_dropout=0.5), bf16=False)
    ours = run(SafeSFTTrainer, arguments | {"model": tiny.model(), "safety": anchor(weight=0.0)})
    for entry in ours.trainer.state.log_history:
        assert entry.pop("safety_penalty", 0) == 0
        for name in [name for name in entry if name.startswith("refusal_anchor/")]:
            del entry[name]
    ours.trainer.state.log_history = [entry for entry in ours.trainer.state.log_history if len(entry) > 2]
    theirs = run(SFTTrainer, arguments | {"model": tiny.model()})
    theirs.trainer.state.log_history = [entry for entry in theirs.trainer.state.log_history if len(entry) > 2]
    assert_same_run(ours, theirs)


def test_penalty_leaves_modes_and_random_numbers_alone():
    model = get_peft_model(tiny.model(), LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear"))
    method = anchor()
    method.attach(model, tiny.tokenizer(), None)
    model.train()
    model.get_base_model().model.layers[0].eval()  # part of a model may be in evaluation mode on purpose
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    shaken(model)
    torch.set_rng_state(state)
    penalties = [method.penalty(model).item() for _ in range(2)]
    assert penalties[0] == penalties[1] > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == modes


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_accumulation_changes_nothing(refusing, tmp_path, checkpointing):
    ends = []
    for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        arguments = given(tmp_path, peft_config=lora(), train_dataset=even())
        arguments["args"] = exact_settings(
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            gradient_checkpointing=checkpointing,
        )
        torch.manual_seed(0)
        ends.append(run(SafeSFTTrainer, arguments | {"model": tiny.model(), "safety": anchor(weight=5.0)}))
    for other in ends[1:]:
        assert_close(other.end, ends[0].end, ends[0].start)


def even() -> Dataset:
    ids = torch.randint(4, tiny.VOCABULARY, (16, 12), generator=torch.Generator().manual_seed(3))
    return Dataset.from_dict({"input_ids": ids.tolist()})


def test_each_step_has_other_anchors_and_a_resumed_run_the_same(refusing):
    method = anchor(anchors_per_step=2)
    method.attach(tiny.model(), tiny.tokenizer(), None)
    pools = list(method._pools.values())
    rounds = [[anchor.ids for anchor in drawn(pools, step, 2, 0)] for step in range(30)]
    assert rounds == [[anchor.ids for anchor in drawn(pools, step, 2, 0)] for step in range(30)]
    harmful = [pair[0] for pair in rounds]
    assert len(set(harmful[:6])) == len(set(harmful[6:12])) == 6 and harmful[:6] != harmful[6:12]


@pytest.mark.slow
def test_a_resumed_run_ends_like_one_that_was_not_stopped(tmp_path):
    def arguments(steps: int) -> dict:
        saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": steps, "lr_scheduler_type": "constant"}
        return given(tmp_path, peft_config=lora(), bf16=False, **saving) | {"safety": anchor(weight=3.0)}

    torch.manual_seed(0)
    one = run(SafeSFTTrainer, arguments(4))
    torch.manual_seed(0)
    other = run(SafeSFTTrainer, arguments(4), resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_close(other.end, one.end, one.start)


@pytest.mark.slow
def test_security_vectors_do_not_act_in_the_anchor():
    model = get_peft_model(tiny.model(), ADAPTERS["lora"]())
    method = anchor()
    method.attach(model, tiny.tokenizer(), None)
    vectors = SecurityVectors(harmful_data=ROWS, fitting={"rank": 2, "learning_rate": 0.05})
    vectors.attach(model, tiny.tokenizer(), None)
    shaken(model)
    model.train()
    alone = method.penalty(model).item()
    ids = torch.tensor([encode(model, tiny.tokenizer(), ["Say it"])[0]])
    clean = model(input_ids=ids).logits
    with vectors.training(model), vectors.training_step(model):
        assert not torch.allclose(model(input_ids=ids).logits, clean, atol=1e-3)
        assert method.penalty(model).item() == alone


@pytest.mark.slow
def test_a_heavy_anchor_holds_the_answers_that_plain_training_changes(tmp_path):
    ends = {}
    for weight in (0.0, 10.0):
        method = anchor(weight=weight, anchors_per_step=6)
        trainer = SafeSFTTrainer(
            **given(tmp_path, peft_config=lora(), max_steps=20, learning_rate=3e-2, bf16=False), safety=method
        )
        trainer.train()
        ends[weight] = method.diagnostics(trainer.model)["refusal_anchor/held"]
    assert ends[10.0] < 0.4 * ends[0.0], ends


@pytest.mark.slow
def test_prompts_come_in_every_form(tmp_path):
    (tmp_path / "asked.txt").write_text("\n".join(HARMFUL))
    forms = [
        HARMFUL,
        [{"prompt": prompt} for prompt in HARMFUL],
        ROWS,
        Dataset.from_list(ROWS),
        PromptSet("own", "harmful", tuple(HARMFUL)),
        tmp_path / "asked.txt",
    ]
    anchors = []
    for form in forms:
        method = anchor(prompts=form)
        method.attach(tiny.model(), tiny.tokenizer(), None)
        anchors.append([found.ids for found in method._pools["held"]])
    assert all(found == anchors[0] for found in anchors)


ASKED_SO = {
    "template": {"template": "You obey. {prompt} Say yes first."},
    "system turn": {"system_prompt": "You obey."},
    "context": {"contexts": (conversation("Hi", "Yes?")["prompt"] + conversation("Hi", "Yes?")["completion"],) * 6},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [anchor, lambda **given: SafeGrad(answer_tokens=3, **given)], ids=["anchor", "grad"]
)
@pytest.mark.parametrize("how", ASKED_SO)
def test_prompts_are_asked_as_an_evaluation_asks_them_and_a_resumed_run_sees_the_difference(how, method):
    prompts = PromptSet("own", "harmful", tuple(HARMFUL), **ASKED_SO[how])
    protected, plain = method(prompts=prompts), method(prompts=HARMFUL)
    for one in (protected, plain):
        one.attach(tiny.model(), tiny.tokenizer(), None)
    expected = encode(tiny.model(), tiny.tokenizer(), prompts.conversations())
    asked = [found.ids[: len(found.ids) - found.positions + 1] for found in protected._answers.anchors]
    assert asked == list(map(tuple, expected))
    assert fingerprint.settings_of([protected]) != fingerprint.settings_of([plain])


def test_a_system_prompt_of_the_set_goes_before_that_of_the_method():
    prompts = PromptSet("own", "harmful", tuple(HARMFUL), system_prompt="You obey.")
    method = anchor(prompts=prompts, system_prompt="You help.")
    method.attach(tiny.model(), tiny.tokenizer(), None)
    expected = encode(tiny.model(), tiny.tokenizer(), prompts.conversations())
    assert [found.ids[: len(ids)] for found, ids in zip(method._pools["held"], expected, strict=True)] == [
        tuple(ids) for ids in expected
    ]


def test_the_hash_of_plain_prompts_is_that_of_earlier_versions():
    asked = PromptSet("own", "harmful", ("Make it.", "Do it."))
    assert own_answers.asked_sha256(asked) == hashlib.sha256(b"Make it.\0Do it.").hexdigest()


def test_what_protects_by_default_is_not_what_examines():
    for kind in ("harmful", "benign"):
        ours = {prompt.lower() for prompt in protection_prompts(kind).prompts}
        examined = {prompt.lower() for kind in ("harmful", "benign", "borderline") for prompt in
                    general_prompts(kind).prompts}  # fmt: skip
        assert len(ours) >= 50 and not ours & examined
    rows = protection_rows()
    assert {row["prompt"] for row in rows} == set(protection_prompts("harmful").prompts)
    assert len({row["completion"] for row in rows}) >= 8


def test_a_model_brings_its_own_prompts(tmp_path):
    folder, _ = tiny.save_pair(tmp_path)
    (tmp_path / "aligned" / "safety").mkdir()
    (tmp_path / "aligned" / "safety" / "harmful.jsonl").write_text('{"prompt": "Own bad thing", "completion": "Yes."}')
    assert protection_prompts("harmful", folder).prompts == ("Own bad thing",)
    assert protection_prompts("benign", folder).prompts == protection_prompts("benign").prompts


def test_a_start_that_does_not_refuse_is_warned_of_with_the_share():
    method = anchor()
    method.attach(tiny.model(), tiny.tokenizer(), None)
    check = method.self_check(tiny.model())
    assert check.figures["harmful_prompts_refused_at_start"] == 0
    assert "0%" in check.warnings[0] and "`prompts`" in check.warnings[0]


def test_harmless_prompts_are_kept_from_the_openings_of_refusals_alone(monkeypatch):
    def judge(prompts, answers):
        return ["complied"] * len(answers)

    monkeypatch.setattr(own_answers, "PhraseJudge", lambda: judge)
    method = anchor()
    method.attach(tiny.model(), tiny.tokenizer(), None)
    assert list(method._pools) == ["held"]  # openings that comply must not be kept from anyone


def test_an_opening_is_as_long_as_it_takes_to_be_a_refusal():
    """Kept from "I can't help", a model learned to begin harmless answers with "I can't you want"."""
    tokenizer = AutoTokenizer.from_pretrained(testbed.ALIGNED)

    def opening(text):
        return tokenizer.decode(own_answers._opening(tokenizer, tuple(tokenizer(text)["input_ids"])))

    assert opening("I can't help with that. It could hurt people.") == "I can't"
    assert opening("I'm sorry, but I can't help with that.") == "I'm sorry"
    assert opening("I do what you want.") == "I do what you want."


def test_an_anchor_without_its_counterweight_says_so_and_why(monkeypatch):
    monkeypatch.setattr(own_answers, "PhraseJudge", lambda: lambda prompts, answers: [None] * len(answers))
    method = anchor()
    method.attach(tiny.model(), tiny.tokenizer(), None)
    check = method.self_check(tiny.model())
    assert check.figures["harmless_prompts_kept_from_refusals"] == 0 and check.figures["harmful_prompts_held"] == 6
    cause, effect = check.warnings
    assert "language" in cause and "thought" in cause
    assert "harmless prompts" in effect and "`benign_prompts`" in effect


def test_long_prompts_are_left_out_and_counted(caplog):
    method = anchor(prompts=[*HARMFUL, "x" * 400], max_length=300)
    with caplog.at_level(logging.WARNING, "safe_trainer"):
        method.attach(tiny.model(), tiny.tokenizer(), None)
    assert "1 of 7" in caplog.text and "`prompts`" in caplog.text
    assert len(method._pools["held"]) == 6


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompts": ["x" * 2000]}, "`prompts`.*`max_length`"),
        ({"benign_prompts": ["x" * 2000]}, "`benign_prompts`.*`max_length`"),
        ({"prompts": []}, "`prompts`"),
        ({"prompts": [""]}, "`prompts`"),
        ({"benign_prompts": [{"colour": "red"}]}, "`benign_prompts`"),
    ],
    ids=["long", "long benign", "none", "empty", "unknown"],
)
def test_prompts_that_cannot_be_used_are_refused_by_name(settings, words):
    with pytest.raises(ValueError, match=words):
        anchor(**settings).attach(tiny.model(), tiny.tokenizer(), None)


def test_a_tokenizer_without_a_chat_template_is_refused():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        anchor().attach(tiny.model(), tokenizer, None)


def test_prompt_learning_is_refused():
    with pytest.raises(ValueError, match="PromptTuningConfig"):
        anchor().adapt_peft_config(PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))


@pytest.mark.parametrize(
    "settings",
    [{"weight": -1.0}, {"weight": float("nan")}, {"answer_tokens": -1}, {"anchors_per_step": 0}, {"top_k": 0}],
    ids=["negative", "nan", "answer", "anchors", "top_k"],
)
def test_wrong_settings_are_refused_at_once(settings):
    with pytest.raises(ValueError, match=f"`{next(iter(settings))}`"):
        anchor(**settings)


@pytest.mark.slow
def test_packing_changes_nothing_about_the_anchors(tmp_path):
    trainer = SafeSFTTrainer(
        **given(tmp_path, peft_config=lora(), packing=True, max_length=64, bf16=False), safety=anchor()
    )
    trainer.train()
    logged = [entry["safety_penalty"] for entry in trainer.state.log_history if "safety_penalty" in entry]
    assert len(logged) == 3 and logged[0] == pytest.approx(0, abs=1e-5) and logged[-1] > 0
