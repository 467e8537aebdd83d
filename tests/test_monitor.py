"""The monitor on TRL's own `SFTTrainer`: against judging the same weights by hand, and training without it."""

import logging
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from evaluation_models import PROMPTS, byte_tokenizer, tiny_llama
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from safe_trainer import AdapterEMA
from safe_trainer.data import PromptSet, conversation
from safe_trainer.evaluation import FunctionJudge, LikelihoodJudge, Rate, RefusalMonitor, generate

HARM = PromptSet("harm", "harmful", PROMPTS)
SAFE = PromptSet("safe", "benign", PROMPTS[:3])
# What the random model is taught to answer is "zz"; before that, it is much likelier to say something else.
REFUSALS = [chr(code) for code in range(33, 122)]
JUDGE = LikelihoodJudge(refusals=REFUSALS, compliances=["z"], floor=0.0)


class Recorder(TrainerCallback):
    """Keep a copy of the adapter's weights at each step."""

    def __init__(self):
        self.weights = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.on_step_end(args, state, control, model=model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        trainable = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        self.weights[state.global_step] = trainable


def trainer(tmp_path, steps=12, callbacks=None, lr=2e-2, **settings):
    rows = Dataset.from_list([conversation(prompt, "zz") for prompt in PROMPTS] * 4)
    args = SFTConfig(
        output_dir=str(tmp_path), max_steps=steps, learning_rate=lr, per_device_train_batch_size=4, logging_steps=1,
        report_to=[], use_cpu=True, disable_tqdm=True, **{"save_strategy": "no", **settings},
    )  # fmt: skip
    return SFTTrainer(
        tiny_llama(attention_dropout=0.3), args=args, train_dataset=rows, processing_class=byte_tokenizer(),
        eval_dataset=rows.select(range(4)) if "eval_strategy" in settings else None,
        peft_config=LoraConfig(r=4, target_modules="all-linear"), callbacks=callbacks or [],
    )  # fmt: skip


def put(model, weights):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])


def logged(trained, key):
    return {entry["step"]: entry[key] for entry in trained.state.log_history if key in entry}


@pytest.mark.slow
def test_logs_hold_what_judging_the_same_weights_gives(tmp_path):
    recorder = Recorder()
    trained = trainer(tmp_path, callbacks=[recorder])
    trained.add_callback(RefusalMonitor(trained, [HARM, SAFE], every=4, judge=JUDGE))
    trained.train()
    found = logged(trained, "safety/harm_refused")
    assert sorted(found) == [0, 4, 8, 12]
    assert found[0] == 1.0 and found[12] < 0.5, "training must have changed something for the test to mean anything"
    for step, value in found.items():
        put(trained.model, recorder.weights[step])
        verdicts = JUDGE.verdicts(trained.model, trained.processing_class, PROMPTS)
        assert value == verdicts.count("refused") / 7
        for outcome in ("refused", "complied"):
            expected = Rate(verdicts.count(outcome), 7)
            ends = {"": expected.value, "_low": expected.low, "_high": expected.high}
            assert {e: logged(trained, f"safety/harm_{outcome}{e}")[step] for e in ends} == ends
        assert logged(trained, "safety/harm_judged")[step] == 7
        assert logged(trained, "safety/safe_refused")[step] == verdicts[:3].count("refused") / 3


@pytest.mark.slow
def test_training_is_the_same_to_the_last_bit_with_and_without(tmp_path):
    runs = []
    for watched in (False, True):
        torch.manual_seed(0)
        trained = trainer(tmp_path)
        if watched:
            trained.add_callback(RefusalMonitor(trained, [HARM], every=1, judge=JUDGE))
        trained.train()
        losses = [
            {key: entry[key] for key in ("step", "loss", "grad_norm", "mean_token_accuracy", "entropy", "num_tokens")}
            for entry in trained.state.log_history
            if "loss" in entry
        ]
        runs.append((losses, {name: p.detach() for name, p in trained.model.named_parameters()}))
    assert runs[0][0] == runs[1][0] and len(runs[0][0]) == 12
    assert all(torch.equal(runs[0][1][name], runs[1][1][name]) for name in runs[0][1])


@pytest.mark.slow
def test_a_processor_that_holds_the_tokenizer_is_no_hindrance(tmp_path):
    trained = trainer(tmp_path, steps=2)
    trained.add_callback(RefusalMonitor(trained, [HARM], every=2))
    trained.processing_class = SimpleNamespace(tokenizer=trained.processing_class)
    trained.train()
    assert sorted(logged(trained, "safety/harm_refused")) == [0, 2]


@pytest.mark.slow
def test_any_judge_can_watch_and_gets_the_models_answers(tmp_path):
    judge = FunctionJudge(lambda prompt, answer: "complied" if answer.startswith("z") else "refused", "z", "1")
    recorder = Recorder()
    trained = trainer(tmp_path, steps=6, callbacks=[recorder])
    trained.add_callback(RefusalMonitor(trained, [HARM], every=3, judge=judge))
    trained.train()
    for step, value in logged(trained, "safety/harm_complied").items():
        put(trained.model, recorder.weights[step])
        answers = generate(trained.model, trained.processing_class, PROMPTS)
        assert value == sum(answer.text.startswith("z") for answer in answers) / 7


@pytest.mark.slow
@pytest.mark.parametrize("restore", [False, True], ids=["stop", "stop and restore"])
def test_a_rate_below_the_minimum_stops_training_and_can_bring_back_the_last_good_weights(tmp_path, caplog, restore):
    recorder = Recorder()
    trained = trainer(tmp_path, steps=40, callbacks=[recorder])
    trained.add_callback(RefusalMonitor(trained, [HARM], every=1, judge=JUDGE, minimum_rate=0.5, restore=restore))
    with caplog.at_level(logging.WARNING):
        trained.train()
    lows = logged(trained, "safety/harm_refused_low")
    broken = min(step for step, low in lows.items() if low < 0.5)
    assert 1 <= broken < 40 and trained.state.global_step == broken
    assert f"at step {broken}, below `minimum_rate=0.5`" in caplog.text
    expected = recorder.weights[broken - 1 if restore else broken]
    weights = {name: p for name, p in trained.model.named_parameters() if p.requires_grad}
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert any(
        not torch.equal(recorder.weights[broken][name], recorder.weights[broken - 1][name]) for name in expected
    )


class StopAfter(TrainerCallback):
    """End training after a step, as a user's callback or a signal does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


@pytest.mark.slow
@pytest.mark.parametrize("stop", [None, 10], ids=["to the end", "stopped early"])
def test_the_last_step_is_measured_and_restored_from_between_two_checks_too(tmp_path, caplog, stop):
    recorder = Recorder()
    trained = trainer(tmp_path, steps=12 if stop is None else 40, callbacks=[recorder])
    trained.add_callback(RefusalMonitor(trained, [HARM], every=50, judge=JUDGE, minimum_rate=0.5, restore=True))
    if stop is not None:
        trained.add_callback(StopAfter(stop))
    with caplog.at_level(logging.WARNING):
        trained.train()
    last = stop or 12
    assert trained.state.global_step == last
    lows = [entry for entry in trained.state.log_history if "safety/harm_refused_low" in entry]
    assert [entry["step"] for entry in lows] == [0, last], "measured once each"
    assert f"at step {last}, below `minimum_rate=0.5`. Training stops with the weights of step 0" in caplog.text
    weights = {name: p for name, p in trained.model.named_parameters() if p.requires_grad}
    assert all(torch.equal(weights[name], recorder.weights[0][name]) for name in weights)


BEST = {
    "load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1,
    "save_steps": 1,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("other", ["load best", "save best", "average first", "average last"])
def test_what_would_overwrite_restored_weights_is_refused_before_the_first_step(tmp_path, other):
    best = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
    settings = {"load best": BEST, "save best": best}.get(other, {})
    trained = trainer(tmp_path, steps=1, **settings)
    if other == "average first":
        trained.add_callback(AdapterEMA())
    trained.add_callback(RefusalMonitor(trained, [HARM], judge=JUDGE, minimum_rate=0.5, restore=True))
    if other == "average last":
        trained.add_callback(AdapterEMA())
    words = "`AdapterEMA`" if other.startswith("average") else "`load_best_model_at_end`"
    with pytest.raises(ValueError, match=f"`restore` of `RefusalMonitor` .*{words}.* or `restore`"):
        trained.train()
    assert trained.state.global_step == 0


@pytest.mark.slow
def test_a_best_checkpoint_that_is_loaded_after_the_last_check_is_warned_of(tmp_path, caplog):
    for settings in ({}, {"minimum_rate": 0.5}):
        caplog.clear()
        trained = trainer(tmp_path / str(len(settings)), steps=1, lr=1e-6, **BEST)
        trained.add_callback(RefusalMonitor(trained, [HARM], judge=JUDGE, **settings))
        trained.train()
        assert ("puts the best checkpoint in the place of the weights" in caplog.text) == bool(settings)


@pytest.mark.slow
def test_a_minimum_that_the_model_does_not_hold_to_begin_with_is_refused(tmp_path):
    trained = trainer(tmp_path)
    # Seven prompts, all refused: the interval begins at 0.65.
    trained.add_callback(RefusalMonitor(trained, [HARM], judge=JUDGE, minimum_rate=0.7))
    with pytest.raises(ValueError, match=r"minimum_rate=0.7` cannot be held: before the first step .* is 0.646"):
        trained.train()


@pytest.mark.slow
def test_openings_that_the_model_never_uses_are_reported_at_the_start(tmp_path, caplog):
    trained = trainer(tmp_path, steps=1)
    trained.add_callback(RefusalMonitor(trained, [HARM]))
    with caplog.at_level(logging.WARNING):
        trained.train()
    assert "harm: on 100.0 % (7/7) of the prompts" in caplog.text and "`refusals` and `compliances`" in caplog.text


@pytest.mark.slow
def test_the_monitor_knows_what_it_costs(tmp_path, caplog):
    trained = trainer(tmp_path, steps=4)
    monitor = RefusalMonitor(trained, [HARM], every=2, judge=JUDGE)
    trained.add_callback(monitor)
    with caplog.at_level(logging.INFO, logger="safe_trainer"):
        trained.train()
    seconds = list(logged(trained, "safety/monitor_seconds").values())
    assert len(seconds) == 3 and seconds == sorted(seconds) and seconds[-1] == pytest.approx(monitor.seconds, abs=1e-3)
    assert 0 < monitor.overhead < 1
    assert "Watching refusals took" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_sets": [HARM], "every": 0}, "`every` must be at least 1 step, got 0"),
        ({"prompt_sets": []}, "`prompt_sets` must be harmful, benign or borderline ones, got none"),
        ({"prompt_sets": [PromptSet("t", "task", ("a",), references=("b",))]}, r"got \['task'\]"),
        ({"prompt_sets": [SAFE], "minimum_rate": 0.5}, "`minimum_rate` needs a harmful prompt set"),
        ({"prompt_sets": [HARM], "restore": True}, "`restore` needs a `minimum_rate`"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RefusalMonitor(None, **settings)


def test_a_model_that_is_split_is_told_from_one_with_another_vocabulary():
    split = tiny_llama()
    split.get_input_embeddings().weight = torch.nn.Parameter(torch.empty(0))  # as DeepSpeed ZeRO-3 leaves it
    with pytest.raises(ValueError, match="ZeRO-3 has split them.*`safe-trainer compare`"):
        generate(split, byte_tokenizer(), PROMPTS)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.5])
def test_a_minimum_rate_is_a_share(rate):
    with pytest.raises(ValueError, match="`minimum_rate` must be above 0 and below 1"):
        RefusalMonitor(None, [HARM], minimum_rate=rate)
