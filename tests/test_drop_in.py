"""With `safety=None`, and with a method that does nothing, our trainer is TRL's: rows, log and weights, bit by bit.

Every case returns what is different about it. It is called once for each trainer, since trainers change what they get.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import trl
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from marks import exhaustive_but
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from runs import (
    TIMINGS,
    assert_same_run,
    assert_same_weights,
    even_rows,
    fresh,
    given,
    history,
    lora,
    refusal,
    run,
    settings,
    weights,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import safe_trainer.methods.fingerprint
import safe_trainer.trainer
from safe_trainer import SafeSFTTrainer
from safe_trainer.methods.base import SafetyMethod


@dataclass
class Nothing(SafetyMethod):
    """A method that is there and does nothing, so that a run takes our way through every moment."""


OURS = {
    "no safety": functools.partial(SafeSFTTrainer, safety=None),
    "a method that does nothing": lambda *args, **kwargs: SafeSFTTrainer(*args, safety=Nothing(), **kwargs),
}

# ---- rows


def text_rows(count: int = 12, column: str = "text") -> Dataset:
    return Dataset.from_dict({column: [f"The square of {i} is {i * i}." + "!" * (i % 4) for i in range(count)]})


def message_rows(turns: int = 1) -> Dataset:
    def talk(i: int) -> list[dict[str, str]]:
        asked = {"role": "user", "content": f"Say {i}" + "?" * (i % 3)}
        return [asked, {"role": "assistant", "content": f"It is {i * i}."}] * turns

    return Dataset.from_dict({"messages": [talk(i) for i in range(12)]})


def sharegpt_rows() -> Dataset:
    talks = [[{"from": m["role"], "value": m["content"]} for m in row["messages"]] for row in message_rows()]
    return Dataset.from_dict({"conversations": talks})


def plain_pairs() -> Dataset:
    prompts, completions = [f"{i} times {i} is" for i in range(12)], [f" {i * i}." for i in range(12)]
    return Dataset.from_dict({"prompt": prompts, "completion": completions})


def long_talk_rows() -> Dataset:
    """Return prompt-completion rows with a user's turn inside the completion, which is not learned."""

    def lengthened(row: dict) -> dict:
        return {"completion": row["completion"] + row["prompt"] + row["completion"]}

    return Dataset.from_list([row | lengthened(row) for row in tiny.rows(12)])


def masked_rows(mask: str) -> Dataset:
    """Return tokenized rows of which a mask says what is learned; of the first, only the end."""
    masks = [[0] * 10 + [1] * 2] + [[i % 2] * 6 + [1] * 6 for i in range(11)]
    return even_rows(12).add_column(mask, masks)


def labelled_rows() -> Dataset:
    """Return tokenized rows with labels of their own, and a mask that must then be ignored."""
    rows = even_rows(12)
    labels = [[-100] * 4 + ids[4:] for ids in rows["input_ids"]]
    return rows.add_column("labels", labels).add_column("assistant_masks", [[1] * 12] * 12)


def streamed(rows: Dataset) -> IterableDataset:
    return rows.to_iterable_dataset()


def suffixed(batch: dict) -> dict:
    return {"text": [text + " <more>" for text in batch["text"]]}


def as_tokens(batch: dict) -> dict:
    return {"input_ids": [tiny.tokenizer()(text)["input_ids"] for text in batch["text"]]}


TOOL = {"type": "function", "function": {"name": "square", "parameters": {"type": "object", "properties": {"x": {}}}}}
TOOL_TEMPLATE = "{% for t in tools or [] %}<u>{{ t.function.name }}{% endfor %}" + tiny.TEMPLATE
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
LOUD_TEMPLATE = tiny.TEMPLATE.replace("<u>{{ m.content }}", "<u>{{ m.content | upper if loud else m.content }}")


def speaking(template: str) -> Any:
    """Return the tokenizer with another chat template."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


# ---- models

SAVED = "the path of a saved model"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Save a tiny model with its tokenizer; return its path."""
    return tiny.save_pair(tmp_path_factory.mktemp("models"))[0]


EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
GROUPED = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
STATES = {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2}
ARCHITECTURES = {
    "cohere2": {},
    "deepseek_v3": EXPERTS | LATENT | GROUPED | {"n_group": 2, "topk_group": 1, "num_key_value_heads": 4},
    "falcon_mamba": {"state_size": 4},
    "glm4_moe": EXPERTS | GROUPED | {"head_dim": 8},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    | {"layer_types": ["sliding_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "nemotron_h": STATES | {"layers_block_type": ["mamba", "attention"], "head_dim": 8},
    "olmo3": {},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": EXPERTS | {"head_dim": 8, "num_experts": 4},
}


def architecture(kind: str) -> PreTrainedModel:
    """Return a tiny random model of an architecture that is not in the usual matrix."""
    shared = {"vocab_size": tiny.VOCABULARY, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    usual = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(shared | usual | {"num_key_value_heads": 2} | ARCHITECTURES[kind]))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def adapted(config: object) -> PeftModel:
    torch.manual_seed(7)
    return get_peft_model(tiny.model(), config)


def virtual_tokens(kind: type, **more: object) -> object:
    return kind(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3, **more)


# ---- what users may pass in


class StopAfterTwo(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


class OwnDescent(torch.optim.SGD):
    """An optimizer of the user's own."""


def own_optimizers() -> dict:
    model = tiny.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return {"model": model, "optimizers": (optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))}


def doubled_loss(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return 2 * torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def accuracy(prediction) -> dict[str, float]:
    assert prediction.predictions.shape[-1] == tiny.VOCABULARY, "these are the logits of the whole vocabulary"
    return {"first_token": float(prediction.predictions[..., 0].mean())}


DATA = {
    "text": lambda: {"train_dataset": text_rows()},
    "text in another column": lambda: {"train_dataset": text_rows(column="body"), "dataset_text_field": "body"},
    "messages": lambda: {"train_dataset": message_rows()},
    "messages of several turns": lambda: {"train_dataset": message_rows(turns=2)},
    "from/value conversations": lambda: {"train_dataset": sharegpt_rows()},
    "prompt-completion, plain": lambda: {"train_dataset": plain_pairs()},
    "prompt-completion, conversational": lambda: {"train_dataset": tiny.rows()},
    "prompt-completion, the whole learned": lambda: {"completion_only_loss": False},
    "assistant turns only": lambda: {"train_dataset": message_rows(turns=2), "assistant_only_loss": True},
    "assistant turns of a stream": lambda: {"train_dataset": streamed(message_rows()), "assistant_only_loss": True},
    "assistant turns of completions": lambda: {"train_dataset": long_talk_rows(), "assistant_only_loss": True},
    "assistant turns, the template exchanged by TRL": lambda: {
        "train_dataset": message_rows(),
        "assistant_only_loss": True,
        "processing_class": speaking((TEMPLATES / "qwen3.jinja").read_text()),
    },
    "tokenized": lambda: {"train_dataset": even_rows(12)},
    "tokenized with labels": lambda: {"train_dataset": labelled_rows()},
    "tokenized with assistant masks": lambda: {"train_dataset": masked_rows("assistant_masks")},
    "tokenized with completion masks": lambda: {
        "train_dataset": masked_rows("completion_mask"),
        "completion_only_loss": True,
    },
    "truncated, masked rows dropped": lambda: {"train_dataset": masked_rows("assistant_masks"), "max_length": 10},
    "truncated from the left": lambda: {"max_length": 8, "truncation_mode": "keep_end"},
    "a formatting function": lambda: {
        "train_dataset": plain_pairs(),
        "completion_only_loss": False,
        "formatting_func": lambda row: f"Q: {row['prompt']} A: {row['completion']}",
    },
    "tools": lambda: {
        "train_dataset": message_rows().add_column("tools", [[TOOL]] * 12),
        "processing_class": speaking(TOOL_TEMPLATE),
    },
    "tools as JSON": lambda: {
        "train_dataset": message_rows().add_column("tools", [json.dumps([TOOL])] * 12),
        "processing_class": speaking(TOOL_TEMPLATE),
    },
    "template arguments of each row": lambda: {
        "train_dataset": message_rows().add_column("chat_template_kwargs", [{"loud": i % 2 == 1} for i in range(12)]),
        "processing_class": speaking(LOUD_TEMPLATE),
    },
    "streamed": lambda: {"train_dataset": streamed(tiny.rows())},
    "streamed text": lambda: {"train_dataset": streamed(text_rows())},
    "shuffled": lambda: {"shuffle_dataset": True},
    "prepared by the user": lambda: {
        "train_dataset": even_rows(12),
        "dataset_kwargs": {"skip_prepare_dataset": True},
    },
    "transformed as it is read": lambda: {
        "train_dataset": text_rows().with_transform(as_tokens),
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "remove_unused_columns": False,
    },
}
BATCHES = {
    "packed, bfd": lambda: {"packing": True, "max_length": 32},
    "packed, bfd_split": lambda: {"packing": True, "max_length": 10, "packing_strategy": "bfd_split"},
    "packed, wrapped": lambda: {"packing": True, "max_length": 32, "packing_strategy": "wrapped"},
    "packed with LoRA": lambda: {"packing": True, "max_length": 32, "peft_config": lora()},
    "packed stream": lambda: {"train_dataset": streamed(text_rows()), "packing": True, "max_length": 32},
    "padding-free": lambda: {"padding_free": True, "max_length": None},
    "padding-free with LoRA": lambda: {"padding_free": True, "max_length": None, "peft_config": lora()},
    "padded to a multiple": lambda: {"pad_to_multiple_of": 16},
    "grouped by length": lambda: {"train_sampling_strategy": "group_by_length", "train_dataset": even_rows(12)},
    "a collator of the user's": lambda: {
        "data_collator": DataCollatorForLanguageModeling(pad_token_id=5, pad_to_multiple_of=8)
    },
    "accumulation, the last one incomplete": lambda: {
        "train_dataset": tiny.rows(10),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": -1,
        "num_train_epochs": 2,
    },
    "accumulation with LoRA": lambda: {
        "train_dataset": tiny.rows(10),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "peft_config": lora(),
    },
}
TRAINING = {
    "full fine-tuning": dict,
    "float32": lambda: {"bf16": False},
    "dft loss": lambda: {"loss_type": "dft"},
    "a loss by its old name": lambda: {"loss_type": "chunked_nll"},
    "label smoothing": lambda: {"label_smoothing_factor": 0.1},
    "a loss function of the user's": lambda: {"compute_loss_func": doubled_loss},
    "no gradient checkpointing": lambda: {"gradient_checkpointing": False},
    "reentrant checkpointing": lambda: {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "non-reentrant checkpointing": lambda: {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "selective checkpointing": lambda: {"gradient_checkpointing_kwargs": {"selective": True}},
    "noisy embeddings": lambda: {"neftune_noise_alpha": 5.0},
    "tokens counted": lambda: {"include_num_input_tokens_seen": "all"},
    "a batch size that is found": lambda: {"auto_find_batch_size": True},
    "optimizers of the user's": own_optimizers,
    "an optimizer class of the user's": lambda: {"optimizer_cls_and_kwargs": (OwnDescent, {"lr": 0.1})},
    "callbacks": lambda: {"callbacks": [StopAfterTwo()]},
    "another end of sequence": lambda: {"train_dataset": text_rows(), "eos_token": "<u>"},
}
ADAPTERS = {
    "LoRA": lambda: {"peft_config": lora()},
    "LoRA with dropout": lambda: {"peft_config": lora(lora_dropout=0.5)},
    "DoRA": lambda: {"peft_config": lora(use_dora=True)},
    "modules to save": lambda: {"peft_config": lora(modules_to_save=["lm_head"])},
    "LoRA, reentrant checkpointing": lambda: {
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
        "peft_config": lora(),
    },
    "LoRA, non-reentrant checkpointing": lambda: {
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "peft_config": lora(),
    },
    "LoRA on experts' parameters": lambda: {
        "model": architecture("gpt_oss"),
        "peft_config": LoraConfig(r=4, target_parameters=["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]),
    },
    "a PeftModel": lambda: {"model": adapted(lora())},
    "a PeftModel, no checkpointing": lambda: {"model": adapted(lora()), "gradient_checkpointing": False},
    "prompt tuning": lambda: {"peft_config": virtual_tokens(PromptTuningConfig), "gradient_checkpointing": False},
    "prefix tuning": lambda: {"peft_config": virtual_tokens(PrefixTuningConfig), "gradient_checkpointing": False},
    "p-tuning": lambda: {"peft_config": virtual_tokens(PromptEncoderConfig), "gradient_checkpointing": False},
    "p-tuning, gradient checkpointing": lambda: {"peft_config": virtual_tokens(PromptEncoderConfig)},
    "a p-tuned PeftModel": lambda: {"model": adapted(virtual_tokens(PromptEncoderConfig))},
}
MODELS = {
    "a path": lambda: {"model": SAVED},
    "a path with LoRA": lambda: {"model": SAVED, "peft_config": lora()},
    "a path in float16": lambda: {"model": SAVED, "model_init_kwargs": {"dtype": torch.float16}, "learning_rate": 0.1},
    "a path in bfloat16": lambda: {"model": SAVED, "model_init_kwargs": {"dtype": "bfloat16"}, "learning_rate": 0.1},
    "experts with more balance": lambda: {"model": architecture("qwen3_moe"), "router_aux_loss_coef": 0.5},
    "experts without balance": lambda: {"model": architecture("qwen3_moe"), "router_aux_loss_coef": 0.0},
    "experts with LoRA": lambda: {"model": architecture("qwen3_moe"), "peft_config": lora()},
}
CASES = DATA | BATCHES | TRAINING | ADAPTERS | MODELS
CASES |= {kind: lambda kind=kind: {"model": tiny.model(kind)} for kind in tiny.ARCHITECTURES}
CASES |= {kind: lambda kind=kind: {"model": architecture(kind)} for kind in ARCHITECTURES}


USUAL = ["text", "prompt-completion, conversational", "streamed", "packed with LoRA", "accumulation with LoRA"]
USUAL += ["full fine-tuning", "LoRA with dropout", "a path with LoRA", "experts with LoRA"]


def arguments_of(case: str, folder: object, path: str) -> dict[str, Any]:
    arguments = given(folder, **CASES[case]())
    if arguments["model"] is SAVED:  # the tokenizer too is then found at the path
        arguments |= {"model": path, "processing_class": None}
    return arguments


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's, about what it will remove; parity holds until it does
@pytest.mark.parametrize("case", exhaustive_but(USUAL, CASES))
def test_rows_log_and_weights_are_those_of_trl(case, path, tmp_path):
    with fresh(tmp_path / "run") as folder:
        theirs = run(SFTTrainer, arguments_of(case, folder, path))
    for build in OURS.values():
        with fresh(tmp_path / "run") as folder:
            ours = run(build, arguments_of(case, folder, path))
        assert_same_run(ours, theirs)
        assert ours.trainer.args.to_dict() == theirs.trainer.args.to_dict()
        assert ours.trainer.model.config.to_dict() == theirs.trainer.model.config.to_dict()
        assert set(theirs.trainer.model.model_tags) <= set(ours.trainer.model.model_tags)


@pytest.mark.slow
def test_a_model_quantized_by_the_trainer_trains_as_with_trl(path, tmp_path):
    pytest.importorskip("bitsandbytes")

    def arguments():
        four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
        changes = {"model": path, "processing_class": None, "quantization_config": four_bits, "learning_rate": 0.1}
        return given(tmp_path / "run", peft_config=lora(), **changes)

    theirs = run(SFTTrainer, arguments())
    assert theirs.trainer.model.base_model.model.is_loaded_in_4bit
    for build in OURS.values():
        assert_same_run(run(build, arguments()), theirs)


@pytest.mark.slow
def test_plain_training_arguments_are_completed_as_trl_does(tmp_path):
    plain = {"use_cpu": True, "max_steps": 3, "logging_steps": 1, "learning_rate": 1e-2, "report_to": "none"}
    theirs, *ours = [
        run(build, given(tmp_path / "run", args=TrainingArguments(str(tmp_path / "run"), **plain)))
        for build in (SFTTrainer, *OURS.values())
    ]
    for outcome in ours:
        assert_same_run(outcome, theirs)
        assert outcome.trainer.args == theirs.trainer.args


# ---- files and settings


class Surroundings(TrainerCallback):
    """Keeps what surrounds each step: signal handlers, callbacks and hooks."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
        self.seen.append([signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), hooks])


@pytest.mark.slow
def test_without_methods_nothing_is_added_to_trl_s_trainer(tmp_path, monkeypatch):
    """No hashing, no signal handler, no context, no file."""

    def unused(*args, **kwargs):
        raise AssertionError("this is for runs with methods")

    for name in ("graceful_stop", "saving", "trainable_layout", "load_peft_weights"):
        monkeypatch.setattr(safe_trainer.trainer, name, unused)
    monkeypatch.setattr(safe_trainer.methods.fingerprint, "_sha256", unused)
    config = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "peft_config": lora()}
    found = []
    for build in (SFTTrainer, OURS["no safety"]):
        with fresh(tmp_path / "run") as folder:
            around = Surroundings()
            trainer = build(**given(folder, **config, callbacks=[around]))
            trainer.train()
            kinds = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
            files = {path.relative_to(folder) for path in folder.rglob("*")}
            states = [
                json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text()) for step in (1, 2)
            ]
            found.append((around.seen, kinds, files, [state["stateful_callbacks"] for state in states]))
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "LoRA"])
def test_a_run_resumed_from_a_checkpoint_of_trl_ends_like_one_that_trl_resumed(peft_config, tmp_path):
    def arguments(steps):
        config = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
        return given(tmp_path / "run", peft_config=peft_config, **config)

    whole = run(SFTTrainer, arguments(4))
    half = str(tmp_path / "run" / "checkpoint-2")
    theirs = run(SFTTrainer, arguments(4), resume_from_checkpoint=half)
    resumed = run(OURS["no safety"], arguments(4), resume_from_checkpoint=half)
    assert_same_run(resumed, theirs)
    assert_same_weights(resumed.end, whole.end)
    with pytest.raises(ValueError, match="was made without Nothing, by TRL"):
        run(OURS["a method that does nothing"], arguments(4), resume_from_checkpoint=half)


@pytest.mark.slow
def test_without_settings_the_folder_and_the_settings_are_those_of_trl(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # TRL's defaults ask for bf16, which transformers grants to a CPU only where `use_cpu` says so.
    for module in ("transformers.training_args", "safe_trainer.trainer"):
        monkeypatch.setattr(f"{module}.is_torch_bf16_gpu_available", lambda: True)
    theirs = run(SFTTrainer, {"model": path, "train_dataset": tiny.rows(8)})
    for build in OURS.values():
        ours = run(build, {"model": path, "train_dataset": tiny.rows(8)})
        assert_same_run(ours, theirs)
        assert ours.trainer.args.output_dir == theirs.trainer.args.output_dir == "aligned-SFT"


@pytest.mark.parametrize("loaded", [False, True])
def test_where_the_machine_refuses_the_default_settings_of_trl_others_are_taken_and_reported(
    loaded, path, tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    for module in ("transformers.training_args", "safe_trainer.trainer"):
        monkeypatch.setattr(f"{module}.is_torch_bf16_gpu_available", lambda: False)
    model = AutoModelForCausalLM.from_pretrained(path) if loaded else path
    with pytest.raises(ValueError, match="doesn't support bf16"):
        SFTTrainer(model, train_dataset=tiny.rows(8))
    for build in OURS.values():
        args = build(model, train_dataset=tiny.rows(8)).args
        assert (args.output_dir, args.bf16, args.fp16) == ("aligned-SFT", False, False)
        assert "TRL's default arguments need" in caplog.text
        caplog.clear()


@pytest.mark.slow
@pytest.mark.parametrize("ours", OURS)
def test_arguments_may_come_by_position(ours, tmp_path):
    def arguments():
        names = list(inspect.signature(SFTTrainer).parameters)
        named = given(tmp_path / "run", callbacks=[StopAfterTwo()], optimizers=(None, None), peft_config=lora())
        return [named.get(name) for name in names[: names.index("peft_config") + 1]]

    theirs = run(lambda: SFTTrainer(*arguments()), {})
    trainer = run(lambda: OURS[ours](*arguments()), {})
    assert_same_run(trainer, theirs)
    assert isinstance(trainer.trainer.model, PeftModel)


@pytest.mark.slow
def test_adapter_starts_from_the_seed_of_the_settings_alone(tmp_path):
    starts = []
    for state in (1, 2):
        torch.manual_seed(state)
        trainer = OURS["a method that does nothing"](**given(tmp_path / "run"), peft_config=lora())
        starts.append(weights(trainer.model))
    assert_same_weights(*starts)


@pytest.mark.slow
@pytest.mark.parametrize("source", exhaustive_but(["template.jinja"], ["template.jinja", "other_tokenizer"]))
@pytest.mark.parametrize("peft", [False, True], ids=["full", "LoRA"])
def test_a_chat_template_from_elsewhere_is_taken_over_as_trl_does(source, peft, tmp_path):
    other = tiny.tokenizer()
    other.add_tokens(["<new>"])
    other.chat_template = tiny.TEMPLATE.replace("<u>", "<new>")
    other.save_pretrained(tmp_path / "other_tokenizer")
    (tmp_path / "template.jinja").write_text(LOUD_TEMPLATE)

    def arguments(folder):
        config = {"chat_template_path": str(tmp_path / source), "save_strategy": "steps", "save_steps": 3}
        return given(folder, train_dataset=message_rows(), peft_config=lora() if peft else None, **config)

    with fresh(tmp_path / "run") as folder:
        theirs = run(SFTTrainer, arguments(folder))
        template = (folder / "checkpoint-3" / "chat_template.jinja").read_text()
    for build in OURS.values():
        with fresh(tmp_path / "run") as folder:
            ours = run(build, arguments(folder))
            assert (folder / "checkpoint-3" / "chat_template.jinja").read_text() == template
        assert_same_run(ours, theirs)


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.slow
def test_custom_code_of_a_model_is_trusted_only_when_allowed(path, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))  # the cache of modules is added to it
    folder = tmp_path / "own"
    shutil.copytree(path, folder)
    (folder / "own.py").write_text(OWN_CODE)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "own", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))

    def arguments(**given):
        return {"model": str(folder), "args": settings(tmp_path / "run", **given), "train_dataset": tiny.rows()}

    refused = [refusal(lambda b=b: b(**arguments())) for b in (SFTTrainer, *OURS.values())]
    assert len({str(error) for error in refused}) == 1
    assert "custom code" in str(refused[0])
    theirs = run(SFTTrainer, arguments(trust_remote_code=True))
    for build in OURS.values():
        ours = run(build, arguments(trust_remote_code=True))
        assert type(ours.trainer.model).__name__ == "OwnModel"
        assert_same_run(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("held", [[2, 3], 2, None, [3, 2]], ids=str)
def test_end_and_padding_tokens_reach_the_model_as_with_trl(held, tmp_path):
    def configured(build):
        model, tokenizer = tiny.model(), tiny.tokenizer()
        model.generation_config.eos_token_id = held
        tokenizer.pad_token = None
        changes = {"model": model, "processing_class": tokenizer, "train_dataset": text_rows()}
        trainer = build(**given(tmp_path / "run", eos_token="<a>", **changes))
        ids = trainer.processing_class.eos_token_id, trainer.processing_class.pad_token_id
        return ids, trainer.model.config.to_dict(), trainer.model.generation_config.to_dict()

    theirs = configured(SFTTrainer)
    assert theirs[0] == (3, 3)
    assert all(configured(build) == theirs for build in OURS.values())


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa", "kernels-community/flash-attn2"])
def test_warnings_about_attention_are_those_of_trl(attention, tmp_path, caplog):
    def warned(build):
        caplog.clear()
        model = tiny.model()
        model.config._attn_implementation = attention  # only the name is looked at; no kernel is loaded to build
        with caplog.at_level(logging.WARNING, "trl.trainer.sft_trainer"):
            build(**given(tmp_path / "run", model=model, padding_free=True, max_length=None))
        return [record.getMessage() for record in caplog.records if record.name.startswith("trl")]

    theirs = warned(SFTTrainer)
    assert all(warned(build) == theirs for build in OURS.values())


# ---- evaluation

EVALUATED = {
    "a dataset": text_rows(6),
    "a stream": streamed(text_rows(6)),
    "a DatasetDict": DatasetDict({"one": text_rows(6), "two": text_rows(4)}),
    "an IterableDatasetDict": IterableDatasetDict({"one": streamed(text_rows(6)), "two": streamed(text_rows(4))}),
    "a dict of datasets": {"one": text_rows(6), "two": text_rows(4)},
    "a dict of streams": {"one": streamed(text_rows(6)), "two": streamed(text_rows(4))},
}
EVALUATING = {
    "plain": {},
    "dft": {"loss_type": "dft"},
    "the best model at the end": {
        "metric_for_best_model": "eval_mean_token_accuracy",
        "load_best_model_at_end": True,
        "save_strategy": "steps",
        "save_steps": 1,
    },
    "packed": {"packing": True, "max_length": 32},
    "packed for training only": {"packing": True, "max_length": 32, "eval_packing": False},
}


@pytest.mark.slow
@pytest.mark.parametrize("rows", exhaustive_but(["a dataset", "a dict of streams"], EVALUATED))
def test_evaluation_while_training_is_that_of_trl(rows, tmp_path):
    def arguments():
        config = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
        return given(tmp_path / "run", train_dataset=text_rows(), eval_dataset=EVALUATED[rows], **config)

    theirs = run(SFTTrainer, arguments())
    assert any(key.startswith("eval_") for key in history(theirs.trainer)[1])
    for build in OURS.values():
        assert_same_run(run(build, arguments()), theirs)


@pytest.mark.slow
@pytest.mark.parametrize("rows", exhaustive_but(["a dataset", "a dict of streams"], EVALUATED))
def test_evaluation_of_rows_given_later_is_that_of_trl(rows, tmp_path):
    trainers = [build(**given(tmp_path / "run", train_dataset=text_rows())) for build in (SFTTrainer, *OURS.values())]
    theirs, *ours = [without_times(trainer.evaluate(EVALUATED[rows])) for trainer in trainers]
    assert any(key.endswith("loss") for key in theirs)
    assert all(metrics == theirs for metrics in ours)


@pytest.mark.slow
@pytest.mark.parametrize("config", exhaustive_but(["the best model at the end", "packed"], EVALUATING))
def test_evaluation_under_each_setting_is_that_of_trl(config, tmp_path):
    def arguments(folder):
        changes = {"eval_strategy": "steps", "eval_steps": 1, "peft_config": lora(), **EVALUATING[config]}
        return given(folder, train_dataset=text_rows(), eval_dataset=text_rows(6), **changes)

    with fresh(tmp_path / "run") as folder:
        theirs = run(SFTTrainer, arguments(folder))
    for build in OURS.values():
        with fresh(tmp_path / "run") as folder:
            ours = run(build, arguments(folder))
        assert_same_run(ours, theirs)
        assert list(ours.trainer.eval_dataset) == list(theirs.trainer.eval_dataset)
        assert ours.trainer.state.best_metric == theirs.trainer.state.best_metric


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_metrics_and_predictions_see_the_logits_that_trl_gives(tmp_path):
    def arguments():
        config = {"eval_strategy": "steps", "eval_steps": 2}
        logits = {"compute_metrics": accuracy, "preprocess_logits_for_metrics": lambda logits, labels: 2 * logits}
        return given(tmp_path / "run", train_dataset=text_rows(), eval_dataset=text_rows(6), **config, **logits)

    theirs = run(SFTTrainer, arguments())
    predicted = theirs.trainer.predict(theirs.trainer.eval_dataset).predictions
    assert "eval_first_token" in history(theirs.trainer)[2]
    for build in OURS.values():
        ours = run(build, arguments())
        assert_same_run(ours, theirs)
        assert (ours.trainer.predict(ours.trainer.eval_dataset).predictions == predicted).all()


def without_times(metrics: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if not k.endswith(TIMINGS)}


# ---- refusals

UNPREPARED = {"skip_prepare_dataset": True}
REFUSED = {
    "no rows": lambda: {"train_dataset": None},
    "a dict of rows": lambda: {"train_dataset": DatasetDict({"train": tiny.rows()})},
    "a stream without an end": lambda: {"train_dataset": streamed(tiny.rows()), "max_steps": -1},
    "rows with a transform": lambda: {"train_dataset": text_rows().with_transform(suffixed)},
    "masks, unprepared": lambda: {"train_dataset": masked_rows("assistant_masks"), "dataset_kwargs": UNPREPARED},
    "images for a model without eyes": lambda: {"train_dataset": tiny.rows().add_column("image", ["none"] * 16)},
    "padding-free with a length": lambda: {"padding_free": True, "max_length": 16},
    "padding-free with a collator": lambda: {
        "padding_free": True,
        "max_length": None,
        "data_collator": DataCollatorForLanguageModeling(pad_token_id=0),
    },
    "packing without a length": lambda: {"packing": True, "max_length": None},
    "assistant turns of text": lambda: {"train_dataset": text_rows(), "assistant_only_loss": True},
    "formatting of completions": lambda: {"formatting_func": str},
    "balance of experts that are not there": lambda: {"router_aux_loss_coef": 0.5},
    "an unknown loss": lambda: {"loss_type": "mse"},
    "two losses": lambda: {"loss_type": "dft", "compute_loss_func": doubled_loss},
    "an unknown end of sequence": lambda: {"eos_token": "<nowhere>"},
    "LoRA on the head": lambda: {"peft_config": LoraConfig(target_modules=["lm_head"])},
    "an adapter on an adapter": lambda: {"model": adapted(lora()), "peft_config": lora()},
    "an adapter that is none": lambda: {"peft_config": {"r": 4}},
    "a tokenizer that is none": lambda: {"processing_class": "tokenizer"},
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("case", REFUSED)
def test_what_trl_refuses_is_refused_in_its_words(case, ours, tmp_path):
    theirs = refusal(lambda: SFTTrainer(**given(tmp_path / "run", **REFUSED[case]())))
    mine = refusal(lambda: OURS[ours](**given(tmp_path / "run", **REFUSED[case]())))
    assert type(mine) is type(theirs)
    assert str(mine).replace("SafeSFTTrainer", "SFTTrainer") == str(theirs)


@pytest.mark.parametrize("build", [SFTTrainer, *OURS.values()], ids=["TRL", *OURS])
def test_arguments_that_do_not_exist_or_are_missing_are_named(build, tmp_path):
    arguments = given(tmp_path / "run")
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_seq_length'"):
        build(**arguments, max_seq_length=8)
    del arguments["model"]
    with pytest.raises(TypeError, match="missing a?1? ?required (positional )?argument: 'model'"):
        build(**arguments)
