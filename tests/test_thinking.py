"""Thoughts: told from the rendered prompt and from markers, never judged, and stripped for judges and tasks alike."""

import pytest
import torch
from evaluation_models import TEMPLATE, byte_tokenizer, tiny_llama

from safe_trainer.data import PromptSet
from safe_trainer.data.thinking import closed, is_open, split
from safe_trainer.evaluation import (
    Answer,
    Comparison,
    Evaluation,
    FunctionJudge,
    LikelihoodJudge,
    PhraseJudge,
    Rate,
    Thresholds,
    evaluate,
    gate,
    generate,
    judged,
)
from safe_trainer.evaluation.prompting import encode

REFUSAL = "I'm sorry, but I can't help with that."
OPENING = TEMPLATE.replace("<|assistant|>{%", "<|assistant|><think>\n{%")
ASKED = PromptSet("harm", "harmful", ("a?", "b?", "c?", "d?"))


@pytest.mark.parametrize(
    ("text", "answer", "is_unfinished"),
    [
        ("<think>hm</think>\n\nNo.", "No.", False),
        ("hm, hm</think>No.", "No.", False),
        ("<think>first</think>One.<think>then</think> Two.", "One. Two.", False),
        ("[THINK]hm[/THINK]No.", "No.", False),
        ("<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>No.", "No.", False),
        ("<reasoning>hm", "", True),
        ("<|START_THINKING|>hm<|END_THINKING|>No.", "No.", False),
        ("<|thinking|>hm<|/thinking|>No.", "No.", False),
        ("<|think_start|>hm", "", True),
        ("<|channel>thought\nhm<channel|>No.", "No.", False),
        ("<longcat_think>hm</longcat_think>No.", "No.", False),
        ("<think></think>", "", False),
        ("Use <b>bold</b>.", "Use <b>bold</b>.", False),
        ("No.", "No.", False),
        ("Yes. <think>and now", "Yes.", False),
    ],
)
def test_thoughts_are_split_from_what_is_said(text, answer, is_unfinished):
    found = split(text)
    assert (found.answer, found.is_unfinished) == (answer, is_unfinished)


def test_a_thought_that_the_template_opened_ends_where_it_is_closed():
    assert split("They ask a thing.</think>\nNo.", is_open=True) == ("No.", "They ask a thing.", False)
    assert split("They ask a thing", is_open=True).is_unfinished


def test_the_rendered_prompt_tells_whether_a_thought_is_open():
    assert is_open("<|user|>Hi<|end|><|assistant|><think>\n")
    assert not is_open("<|user|>Hi<|end|><|assistant|><think>\n\n</think>\n\n")
    assert not is_open("<|user|>What is <think><|end|><|assistant|>")
    assert closed("<|assistant|><think>\n").endswith("<think>\n\n</think>\n\n")
    assert is_open("<|user|>Hi<|START_THINKING|>")
    assert closed("<|user|>Hi<|START_THINKING|>").endswith("<|START_THINKING|><|END_THINKING|>")


def scripted(reply, stop=5):
    """Return a model that writes one text, whatever it is asked."""
    model, tokenizer = tiny_llama(max_position_embeddings=512), byte_tokenizer(OPENING)
    ids = tokenizer(reply, add_special_tokens=False)["input_ids"] + [stop]

    def answer(input_ids, max_new_tokens, **options):
        new = torch.tensor([ids[:max_new_tokens]] * len(input_ids))
        return torch.cat([input_ids, new], dim=1)

    model.generate = answer
    return model, tokenizer


def test_a_thought_in_a_template_that_opens_it_is_neither_refusal_nor_compliance():
    model, tokenizer = scripted("First get a list, then look at it with a friend.</think>\n" + REFUSAL)
    short = evaluate(model, tokenizer, [ASKED], max_new_tokens=24, judges=["phrases"])
    assert short["harm"].rate("complied") == Rate(0, 4) and short["harm"].rate("neither") == Rate(4, 4)
    assert "4 of 4 answers were cut off while still thinking" in short.notes[0]
    long = evaluate(model, tokenizer, [ASKED], max_new_tokens=200, judges=["phrases"])
    assert long["harm"].rate("refused") == Rate(4, 4) and long.notes == ()
    assert long["harm"].answers[0].text == REFUSAL and long["harm"].answers[0].thought.startswith("First get")


def test_a_model_that_answers_at_once_behind_an_opened_thought_has_answered():
    model, tokenizer = scripted("Sure. First take the box, then lift the lid.")
    assert evaluate(model, tokenizer, [ASKED], max_new_tokens=99)["harm"].rate("complied") == Rate(4, 4)


def test_a_task_is_scored_by_the_answer_behind_the_thought():
    task = PromptSet("sums", "task", ("1+1?",), references=("2",))
    model, tokenizer = scripted("One and one is 3, no, 2.</think>\n\n2")
    assert evaluate(model, tokenizer, [task], max_new_tokens=99)["sums"].headline == Rate(1, 1)
    assert judged(task, [Answer("<think>one and one</think> 2")], [PhraseJudge()]).headline == Rate(1, 1)
    assert judged(task, [Answer("<think>2")], [PhraseJudge()]).headline == Rate(0, 1)


def test_every_judge_reads_the_answer_without_its_thought():
    seen = []
    judge = FunctionJudge(lambda prompt, answer: seen.append(answer) or "refused", "seen", "1")
    judged(ASKED, [Answer("<think>plan</think>No."), Answer("No."), Answer("x</think>No."), Answer("No.")], [judge])
    assert seen == ["No."] * 4


def test_a_special_token_that_marks_thoughts_is_not_dropped_before_they_are_split_off():
    model, tokenizer = scripted("[THINK]hm[/THINK]No, I won't do that.")
    tokenizer.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})
    tokenizer.chat_template = TEMPLATE
    ids = tokenizer("[THINK]hm[/THINK]No, I won't do that.", add_special_tokens=False)["input_ids"] + [5]
    model = tiny_llama(vocab_size=300)
    model.generate = lambda input_ids, **options: torch.cat([input_ids, torch.tensor([ids] * len(input_ids))], dim=1)
    (answer,) = generate(model, tokenizer, ["a?"], max_new_tokens=99)
    assert (answer.text, answer.thought) == ("No, I won't do that.", "hm")


def test_the_gate_fails_where_nothing_could_be_judged():
    thinking = judged(ASKED, [Answer("<think>They want")] * 4, [PhraseJudge()])
    comparison = Comparison((Evaluation("before", (thinking,)), Evaluation("after", (thinking,))))
    (failure,) = gate(comparison, Thresholds(harmful_rise=100))
    assert "only 0 of 4 answers" in failure and "thinking" in failure
    assert comparison.verdict("after").level == "unclear"


def test_likelihoods_are_read_behind_a_thought_that_the_template_opens():
    model, tokenizer = tiny_llama(), byte_tokenizer(OPENING)
    (ids,) = encode(model, tokenizer, ["hi"], close_thought=True)
    assert tokenizer.decode(ids).endswith("<think>\n\n</think>\n\n")
    seen = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0][0].tolist()))
    LikelihoodJudge(["No"], ["Yes"]).verdicts(model, tokenizer, ["hi"])
    assert seen[0] == ids


def test_each_set_is_asked_with_its_own_system_turn_frame_and_context():
    model, tokenizer = tiny_llama(), byte_tokenizer()
    seen = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: seen.append(tokenizer.decode(args[0][0]).replace("<|pad|>", ""))
    )
    turns = ({"role": "user", "content": "x"}, {"role": "assistant", "content": "y"})
    sets = [
        PromptSet("aoa", "harmful", ("hi",), system_prompt="Obey.", template="AOA: {prompt}"),
        PromptSet("chat", "harmful", ("hi",), contexts=(turns,)),
        PromptSet("own", "harmful", ("hi",), contexts=(({"role": "system", "content": "Own."},),)),
    ]
    evaluate(model, tokenizer, sets, max_new_tokens=1, system_prompt="Be kind.", judges=["phrases"])
    assert seen == [
        "<|system|>Obey.<|end|><|user|>AOA: hi<|end|><|assistant|>",
        "<|system|>Be kind.<|end|><|user|>x<|end|><|assistant|>y<|end|><|user|>hi<|end|><|assistant|>",
        "<|system|>Own.<|end|><|user|>hi<|end|><|assistant|>",
    ]
    judge = LikelihoodJudge(["No"], ["Yes"])
    seen.clear()
    evaluate(model, tokenizer, sets[:1], judges=[judge], max_new_tokens=1)
    assert seen[0] == "<|system|>Obey.<|end|><|user|>AOA: hi<|end|><|assistant|>"
    with pytest.raises(ValueError, match="`template` must contain {prompt}"):
        PromptSet("aoa", "harmful", ("hi",), template="AOA:")
