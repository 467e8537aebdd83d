"""Generation against the plainest reference there is: one prompt, no padding, argmax of a full forward pass."""

import logging
import subprocess
import sys
import time

import pytest
import torch
from evaluation_models import PROMPTS, TEMPLATE, byte_tokenizer, tiny_gpt2, tiny_llama
from peft import LoraConfig, get_peft_model
from tokenizers import decoders

from safe_trainer.evaluation.generate import INTERRUPTED, Decoding, generate


def exact_tokenizer():
    """Return the byte tokenizer with one visible character for each byte, so that equal texts are equal tokens."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    return tokenizer


def reference_answer(model, tokenizer, prompt, new_tokens, stops=(4, 5)):
    """Decode greedily without padding, cache or `generate`: a full forward pass for each token."""
    text = f"<|user|>{prompt}<|end|><|assistant|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = []
    for _ in range(new_tokens):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + answer]), use_cache=False).logits[0, -1]
        token = int(logits.argmax())
        if token in stops:
            return tokenizer.decode(answer, skip_special_tokens=True), False
        answer.append(token)
    return tokenizer.decode(answer, skip_special_tokens=True), True


def lora(model, seed=3):
    """Wrap the model with a LoRA adapter whose B is not zero, so that it changes the answers."""
    targets = ["c_attn"] if model.config.model_type == "gpt2" else ["q_proj", "v_proj"]
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    torch.manual_seed(seed)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return peft_model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "lora"])
def test_batched_answers_equal_one_at_a_time_token_for_token(build, adapted):
    model, tokenizer = build(), exact_tokenizer()
    plain = [reference_answer(model, tokenizer, prompt, 24) for prompt in PROMPTS]
    expected = plain
    if adapted:
        model = lora(model)
        expected = [reference_answer(model, tokenizer, prompt, 24) for prompt in PROMPTS]
        assert expected != plain
    answers = generate(model, tokenizer, PROMPTS, max_new_tokens=24, batch_size=4)
    assert [(answer.text, answer.truncated) for answer in answers] == expected
    assert len({text for text, _ in expected}) > 3, "a reference of equal answers would prove nothing"


def test_an_answer_stops_where_the_template_closes_the_turn():
    model, tokenizer = tiny_llama(), exact_tokenizer()
    free, _ = reference_answer(model, tokenizer, "hi", 24, stops=())
    third = tokenizer.convert_tokens_to_ids(free[2])
    assert third not in tokenizer.convert_tokens_to_ids(list(free[:2]))
    # Make the model close the turn there, which neither its config nor the tokenizer calls an end.
    with torch.no_grad():
        model.lm_head.weight[[4, third]] = model.lm_head.weight[[third, 4]]
    assert model.generation_config.eos_token_id == 5 and tokenizer.eos_token_id == 5
    answer = generate(model, tokenizer, ["hi"], max_new_tokens=24)[0]
    assert (answer.text, answer.truncated) == (free[:2], False)


def test_the_models_own_generation_config_does_not_change_the_decoding():
    model, tokenizer = tiny_llama(), byte_tokenizer()
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=12)
    model.generation_config.update(do_sample=True, temperature=3.0, top_k=2, repetition_penalty=1.9, num_beams=2)
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=12) == expected


def test_a_model_in_training_answers_the_same_and_is_left_as_it_was():
    tokenizer = byte_tokenizer()
    expected = generate(lora(tiny_llama(attention_dropout=0.5)), tokenizer, PROMPTS, max_new_tokens=12)
    model = lora(tiny_llama(attention_dropout=0.5))
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.config.use_cache = False
    model.train()
    frozen = model.base_model.model.model.layers[0].mlp
    frozen.eval()
    tokenizer.padding_side = "right"
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()

    assert generate(model, tokenizer, PROMPTS, max_new_tokens=12) == expected

    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert tokenizer.padding_side == "right"
    assert model.config.use_cache is False
    ids = torch.tensor([tokenizer("abc")["input_ids"]])
    model(input_ids=ids, labels=ids).loss.backward()  # checkpointing still works
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)


def test_mode_is_restored_when_generation_fails():
    model, tokenizer = tiny_llama(), byte_tokenizer()
    model.train()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError):
        generate(model, tokenizer, ["hi"])
    assert all(module.training for module in model.modules())


def test_nan_logits_stop_with_an_error_that_names_them():
    model, tokenizer = tiny_llama(), byte_tokenizer()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    model.generation_config.remove_invalid_values = True
    with pytest.raises(FloatingPointError, match="logits are NaN"):
        generate(model, tokenizer, PROMPTS, max_new_tokens=4)


def test_prompts_that_do_not_fit_get_an_error_and_the_others_an_answer():
    model, tokenizer = tiny_llama(max_position_embeddings=64), byte_tokenizer()
    # Each byte is a token and the template adds three: 64 - 3 - 20 leaves room for 41 bytes.
    answers = generate(model, tokenizer, ["a" * 41, "a" * 42, "b"], max_new_tokens=20)
    assert [answer.error is None for answer in answers] == [True, False, True]
    assert "45 tokens" in answers[1].error and "context of 64" in answers[1].error
    assert answers[1].text == "" and answers[0].text != ""


def test_missing_chat_template_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match="`tokenizer` has no chat template.*tokenizer.chat_template"):
        generate(tiny_llama(), byte_tokenizer(template=None), ["hi"])


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(ValueError, match="token id 133.*vocabulary ends at 99"):
        generate(tiny_llama(vocab_size=100), byte_tokenizer(), ["é"])


def test_system_prompt_reaches_the_model_through_the_template():
    model, tokenizer = tiny_llama(), byte_tokenizer()
    seen = []
    embed = model.get_input_embeddings()
    hook = embed.register_forward_pre_hook(lambda module, args: seen.append(tokenizer.decode(args[0][0])))
    generate(model, tokenizer, ["hi"], max_new_tokens=1, system_prompt="Be kind.")
    hook.remove()
    assert seen == ["<|system|>Be kind.<|end|><|user|>hi<|end|><|assistant|>"]


def test_template_options_reach_the_template():
    template = "{{ messages[0]['content'] }}{% if not enable_thinking %}|no thinking{% endif %}"
    model, tokenizer = tiny_llama(), byte_tokenizer(template)
    seen = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: seen.append(tokenizer.decode(args[0][0]))
    )
    generate(model, tokenizer, ["hi"], max_new_tokens=1, template_options={"enable_thinking": False})
    generate(model, tokenizer, ["hi"], max_new_tokens=1, template_options={"enable_thinking": True})
    assert seen == ["hi|no thinking", "hi"]


def test_a_batch_that_does_not_fit_into_the_memory_is_halved():
    model, tokenizer = tiny_llama(), byte_tokenizer()
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=6)
    tried, original = [], model.generate

    def small_memory(**options):
        tried.append(len(options["input_ids"]))
        if tried[-1] > 2:
            raise torch.OutOfMemoryError
        return original(**options)

    model.generate = small_memory
    calls = []
    answers = generate(model, tokenizer, PROMPTS, max_new_tokens=6, progress=lambda done, total: calls.append(done))
    assert answers == expected
    assert tried == [7, 3, 1, 1, 1, 1, 1, 1, 1] and calls == list(range(1, 8))


def test_a_single_prompt_that_does_not_fit_is_an_error():
    model = tiny_llama()

    def no_memory(**options):
        raise torch.OutOfMemoryError

    model.generate = no_memory
    with pytest.raises(torch.OutOfMemoryError):
        generate(model, byte_tokenizer(), PROMPTS)


@pytest.mark.exhaustive
def test_batching_pays():
    model, tokenizer = tiny_llama(hidden_size=128, intermediate_size=256, num_hidden_layers=4), byte_tokenizer()
    prompts = [prompt * (1 + index % 3) for index, prompt in enumerate(PROMPTS * 6)]
    batched = process_time(lambda: generate(model, tokenizer, prompts, max_new_tokens=24))
    single = process_time(lambda: [generate(model, tokenizer, [prompt], max_new_tokens=24) for prompt in prompts])
    assert single > 3 * batched, f"{single:.2f} s one by one, {batched:.2f} s batched"


def process_time(work):
    start = time.process_time()
    work()
    return time.process_time() - start


def test_a_template_without_system_turns_is_a_clear_error():
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + TEMPLATE
    with pytest.raises(ValueError, match="no system turn.*Leave out `system_prompt`"):
        generate(tiny_llama(), byte_tokenizer(refusing), ["hi"], system_prompt="Be kind.")


def test_a_template_that_leaves_a_turn_out_is_a_clear_error():
    dropping = TEMPLATE.replace("for m in messages", "for m in messages if m.role != 'system'")
    assert dropping != TEMPLATE
    with pytest.raises(ValueError, match="leaves out the system turn 'Be kind.'.*Leave out `system_prompt`"):
        generate(tiny_llama(), byte_tokenizer(dropping), ["hi"], system_prompt="Be kind.")


def test_ctrl_c_returns_what_is_finished(caplog):
    model, tokenizer = tiny_llama(), byte_tokenizer()
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=6)

    def stop_after_four(done, total):
        assert total == len(PROMPTS)
        if done >= 4:
            raise KeyboardInterrupt

    with caplog.at_level(logging.WARNING):
        answers = generate(model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=2, progress=stop_after_four)
    longest_four = sorted(range(len(PROMPTS)), key=lambda i: -len(PROMPTS[i]))[:4]
    for index, answer in enumerate(answers):
        if index in longest_four:
            assert answer == expected[index]
        else:
            assert (answer.text, answer.error) == ("", INTERRUPTED)
    assert "3 of 7 prompts to go" in caplog.text


def test_ctrl_c_before_anything_is_finished_goes_on():
    model, tokenizer = tiny_llama(), byte_tokenizer()

    def interrupt(module, args):
        raise KeyboardInterrupt

    model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(model, tokenizer, PROMPTS)


def test_progress_counts_every_prompt_once():
    calls = []
    generate(
        tiny_llama(max_position_embeddings=64),
        byte_tokenizer(),
        [*PROMPTS, "x" * 99],
        max_new_tokens=2,
        batch_size=3,
        progress=lambda done, total: calls.append((done, total)),
    )
    # The longest of the prompts (82 bytes) and the added one do not fit and are counted from the start.
    assert calls == [(5, 8), (8, 8)]


def test_sampling_repeats_with_its_seed_and_differs_with_another():
    model, tokenizer = tiny_llama(), byte_tokenizer()
    settings = {"max_new_tokens": 12, "temperature": 1.5, "top_p": 0.95}
    first = generate(model, tokenizer, PROMPTS, seed=1, **settings)
    torch.manual_seed(99)
    assert generate(model, tokenizer, PROMPTS, seed=1, **settings) == first
    assert generate(model, tokenizer, PROMPTS, seed=2, **settings) != first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"temperature": -1.0}, "`temperature` must be 0"),
        ({"top_p": 0.0}, "`top_p` must be above 0"),
    ],
)
def test_decoding_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**settings)


def test_the_package_is_imported_without_torch_and_transformers():
    heavy = "('torch', 'transformers', 'scipy', 'jinja2')"
    code = f"import sys, safe_trainer.evaluation; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
