"""Task scores against hand counts, the ROUGE library and a plain forward pass."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from evaluation_models import PROMPTS, byte_tokenizer, tiny_llama

from safe_trainer.data import PromptSet
from safe_trainer.evaluation import (
    Answer,
    Comparison,
    Evaluation,
    PhraseJudge,
    from_json,
    judged,
    perplexity,
    rouge,
    scored,
    to_json,
    to_markdown,
    token_f1,
)
from safe_trainer.evaluation.statistics import mean_of

TASK = PromptSet("sums", "task", ("a?", "b?", "c?"), references=("red fox", "two", "blue sky"))


def evaluation(*texts, name="model"):
    answers = [Answer(text) if text is not None else Answer("", error="too long") for text in texts]
    return Evaluation(name, (judged(TASK, answers, [PhraseJudge()]),))


def test_token_f1_counts_words_as_often_as_they_occur():
    assert token_f1("the red red fox", "red fox") == pytest.approx(2 * 2 / (4 + 2))
    assert token_f1("RED, fox!", "red fox") == 1.0
    assert token_f1("blue", "red fox") == 0.0
    assert token_f1("", "red fox") == 0.0
    assert token_f1("", "") == 1.0


def test_rouge_is_the_librarys():
    # Longest common subsequence "the fox ran": precision 3/4, recall 3/5.
    assert rouge()("the fox ran home", "the red fox ran away") == pytest.approx(2 * 0.75 * 0.6 / 1.35)
    assert rouge("rouge2")("the red fox", "the red dog") == pytest.approx(0.5)


def test_scores_are_kept_for_each_answer_and_averaged():
    found = scored(evaluation("red fox", "two three", None), {"F1": token_f1, "length": lambda a, r: len(a)})
    assert found["sums"].scores["F1"] == (1.0, pytest.approx(2 / 3), None)
    assert found["sums"].mean_score("F1").value == pytest.approx(5 / 6)
    assert found["sums"].mean_score("length").value == 8.0
    assert found["sums"].headline.total == 2


def test_scores_change_prompt_by_prompt_and_survive_json():
    before = scored(evaluation("red fox", "two three", None, name="before"), {"F1": token_f1})
    after = scored(evaluation("red", "two", "blue sky", name="after"), {"F1": token_f1})
    comparison = Comparison((before, after))
    change = comparison.score_change("after", "sums", "F1")
    assert change.count == 2
    assert change.value == pytest.approx(((2 / 3 - 1) + (1 - 2 / 3)) / 2)
    assert from_json(to_json(comparison)) == comparison
    assert "| sums: F1 | 0.833 (2) [0.667, 1.000] | 0.889 (3) [" in to_markdown(comparison)


def test_a_score_that_only_one_side_has_is_not_measured_on_the_other():
    before, after = evaluation("a", "b", "c", name="a"), evaluation("a", "b", "c", name="b")
    assert "| sums: F1 | 0.000 (3) [0.000, 0.000] | not measured |" in to_markdown(
        Comparison((scored(before, {"F1": token_f1}), after))
    )


def test_a_scorer_that_gives_no_number_is_an_error():
    with pytest.raises(ValueError, match="`broken` gave nan for the answer 'red fox'"):
        scored(evaluation("red fox", "", ""), {"broken": lambda a, r: math.nan})


def test_without_a_task_there_is_nothing_to_score():
    harmful = judged(PromptSet("harm", "harmful", ("a?",)), [Answer("x")], [PhraseJudge()])
    with pytest.raises(ValueError, match="examined on no task"):
        scored(Evaluation("model", (harmful,)), {"F1": token_f1})


def test_the_interval_of_a_mean_agrees_with_scipys_bootstrap():
    values = np.random.default_rng(3).beta(2, 5, size=80)
    found = mean_of(list(values))
    reference = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=9999, rng=np.random.default_rng(1)
    ).confidence_interval
    assert found.low == pytest.approx(reference.low, abs=0.003)
    assert found.high == pytest.approx(reference.high, abs=0.003)
    assert str(mean_of([])) == "not measured"


def test_perplexity_equals_one_plain_forward_pass_for_each_reference():
    model, tokenizer = tiny_llama(initializer_range=0.1), byte_tokenizer()
    references = ("a tree", "4", "the Nile, which is longer", "because", "once", "stop it")
    losses, tokens = 0.0, 0
    for prompt, reference in zip(PROMPTS, references, strict=False):
        head = tokenizer(f"<|user|>{prompt}<|end|><|assistant|>", add_special_tokens=False)["input_ids"]
        tail = tokenizer(f"{reference}<|end|>", add_special_tokens=False)["input_ids"]
        labels = torch.tensor([[-100] * len(head) + tail])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([head + tail]), labels=labels).loss
        losses, tokens = losses + float(loss) * len(tail), tokens + len(tail)
    task = PromptSet("copy", "task", PROMPTS[:6], references=references)
    model.train()
    found = perplexity(model, tokenizer, task, batch_size=4)
    assert found.value == pytest.approx(math.exp(losses / tokens), rel=1e-4)
    assert found.low < found.value < found.high and found.count == 6
    assert model.training


def test_perplexity_needs_references_and_a_sound_model():
    with pytest.raises(ValueError, match="`harm` has no references"):
        perplexity(tiny_llama(), byte_tokenizer(), PromptSet("harm", "harmful", ("a?",)))
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="NaN"):
        perplexity(model, byte_tokenizer(), TASK)
