"""Adapters on disk: what is next to the weights belongs to them, merging refuses what it cannot do, the mark stays."""

from __future__ import annotations

import copy
from pathlib import Path

import planted
import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from safe_trainer import TrainedVectors, compact_adapter, write_model_card
from safe_trainer.artifacts.security_vectors import active
from safe_trainer.lora.io import harmful_mark, load_adapted, merge_adapter

IDS = torch.randint(4, tiny.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits


@pytest.fixture
def base(tmp_path: Path) -> str:
    """A saved model whose embeddings are tied."""
    config = tiny.config("llama")
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def adapter(base: str, folder: Path, tokens: int = 0, **settings: object) -> nn.Module:
    """Save an adapter that does something, trained with so many new tokens, and its tokenizer; return the model."""
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    if tokens:
        tokenizer.add_special_tokens({"additional_special_tokens": [f"<{i}>" for i in range(tokens)]})
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tokenizer.chat_template += " "
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False, **settings)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return adapted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "settings"),
    [
        (0, {}),
        (2, {}),
        (2, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (0, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (0, {"modules_to_save": ["embed_tokens"]}),
        (2, {"trainable_token_indices": {"embed_tokens": [tiny.VOCABULARY, tiny.VOCABULARY + 1]}}),
        (2, {"trainable_token_indices": [tiny.VOCABULARY, tiny.VOCABULARY + 1]}),
        (0, {"trainable_token_indices": IDS[0, :3].tolist()}),
    ],
    ids=["plain", "grown", "grown and saved", "saved", "one of two tied", "new tokens trained", "the same as a list",
         "old tokens trained"],
)  # fmt: skip
def test_a_merged_model_answers_as_the_adapter_and_has_its_tokenizer(tokens, settings, base, tmp_path):
    trained = adapter(base, tmp_path / "a", tokens, **settings)
    merge_adapter(tmp_path / "a", tmp_path / "merged")
    merged, tokenizer = (kind.from_pretrained(tmp_path / "merged") for kind in (AutoModelForCausalLM, AutoTokenizer))
    expected = logits(trained)
    assert torch.allclose(logits(merged)[..., : expected.shape[-1]], expected, atol=1e-4)
    assert len(tokenizer) == len(AutoTokenizer.from_pretrained(base)) + tokens
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tmp_path / "a").chat_template
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base", "merged"]


def test_an_adapter_without_a_tokenizer_takes_that_of_its_base(base, tmp_path):
    adapter(base, tmp_path / "a")
    for file in (tmp_path / "a").glob("*token*"):
        file.unlink()
    _, tokenizer = load_adapted(tmp_path / "a")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template


def test_a_quantized_base_is_refused_before_anything_is_written(base, tmp_path):
    adapter(base, tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    model.config.save_pretrained(base)
    with pytest.raises(ValueError, match=r"quantized \(bitsandbytes\).*full-precision.*`--model`"):
        merge_adapter(tmp_path / "a", tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base"]
    model.config.quantization_config = None
    model.save_pretrained(tmp_path / "full")
    merge_adapter(tmp_path / "a", tmp_path / "merged", str(tmp_path / "full"))  # the remedy


def test_a_base_out_of_reach_is_named_with_the_adapter(base, tmp_path):
    adapter(base, tmp_path / "a")
    with pytest.raises(OSError, match=f"(?s)`{tmp_path}/a` belongs to the base model `house/nowhere`.*`--model`"):
        merge_adapter(tmp_path / "a", tmp_path / "merged", "house/nowhere")
    with pytest.raises(OSError, match=r"could not be loaded \(there is no such folder\)"):
        merge_adapter(tmp_path / "a", tmp_path / "merged", str(tmp_path / "gone"))
    assert not (tmp_path / "merged").exists()


def test_a_failure_while_saving_leaves_nothing(base, tmp_path, monkeypatch):
    adapter(base, tmp_path / "a")

    def full(tokenizer, folder):
        assert any(Path(folder).iterdir())
        raise OSError("disk full")

    monkeypatch.setattr(type(AutoTokenizer.from_pretrained(base)), "save_pretrained", full)
    with pytest.raises(OSError, match="disk full"):
        merge_adapter(tmp_path / "a", tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base"]


def test_what_cannot_be_merged_says_so_and_leaves_nothing(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    configs = {
        "virtual tokens": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        "Impossible to merge.*as it is": LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True),
    }
    for number, (message, config) in enumerate(configs.items()):
        get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path / str(number))
        with pytest.raises(ValueError, match=message):
            merge_adapter(tmp_path / str(number), tmp_path / "merged")
        assert not (tmp_path / "merged").exists()


@pytest.mark.slow
def test_a_folder_of_several_adapters_names_them(base, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2), adapter_name="mine")
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="holds no adapter.*Give the folder of one adapter: `.*/mine`"):
        load_adapted(tmp_path / "out")
    load_adapted(tmp_path / "out" / "mine")  # as it advises


def test_a_folder_that_holds_something_is_not_overwritten(base, tmp_path):
    adapter(base, tmp_path / "a")
    with pytest.raises(FileExistsError, match="exists already. Name a new folder"):
        merge_adapter(tmp_path / "a", base)


# ---- the mark of security vectors


def test_vectors_are_never_merged(base, tmp_path):
    planted.vectors(AutoModelForCausalLM.from_pretrained(base)).save(tmp_path / "v")
    with pytest.raises(ValueError, match="security vectors, harmful by construction"):
        merge_adapter(tmp_path / "v", tmp_path / "merged", base)
    assert not (tmp_path / "merged").exists()


def test_compacted_vectors_keep_mark_card_and_effect(tmp_path):
    model = tiny.model().eval()
    found = planted.vectors(model)
    first = next(iter(found.modules))
    with torch.no_grad():
        found.modules[first].A[1:] = 0  # so that one layer needs a smaller rank than the others
    found.save(tmp_path / "v")
    assert harmful_mark(tmp_path / "v")
    assert compact_adapter(tmp_path / "v", tmp_path / "c")[first] == 1
    assert harmful_mark(tmp_path / "c") and "harmful by construction" in (tmp_path / "c" / "README.md").read_text()
    with pytest.raises(ValueError, match="security vectors"):
        merge_adapter(tmp_path / "c", tmp_path / "merged")
    loaded = TrainedVectors.load(tmp_path / "c")
    loaded.save(tmp_path / "again")  # of several ranks
    for vectors in (loaded, TrainedVectors.load(tmp_path / "again")):
        with active(found.check_fits(model), found.modules):
            expected = logits(model)
        with active(vectors.check_fits(model), vectors.modules):
            assert torch.allclose(logits(model), expected, atol=1e-4)
    stock = PeftModel.from_pretrained(tiny.model(), tmp_path / "again")
    assert torch.allclose(logits(stock), expected, atol=1e-4)


@pytest.mark.parametrize("weights", [{}, {"safe_serialization": False}], ids=["safetensors", "torch"])
def test_vectors_keep_their_mark_when_peft_loads_and_saves_them(weights, base, tmp_path):
    planted.vectors(AutoModelForCausalLM.from_pretrained(base)).save(tmp_path / "v")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "v", adapter_name="other")
    model.save_pretrained(tmp_path / "w", **weights)
    saved = tmp_path / "w" / "other"
    assert harmful_mark(saved)
    with pytest.raises(ValueError, match="security vectors"):
        merge_adapter(saved, tmp_path / "merged", base)
    compact_adapter(saved, tmp_path / "c")
    assert harmful_mark(tmp_path / "c")
    for folder in (saved, tmp_path / "c"):
        with pytest.raises(ValueError, match="security vectors"):
            write_model_card(folder)


def test_an_ordinary_adapter_has_no_mark(base, tmp_path):
    adapter(base, tmp_path / "a")
    assert not harmful_mark(tmp_path / "a")
    compact_adapter(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "c" / "tokenizer_config.json").is_file() and not harmful_mark(tmp_path / "c")
