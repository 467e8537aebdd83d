"""Models by name are put where TRL would put them; tests pretend that there is an accelerator."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from safe_trainer import load_model
from safe_trainer.artifacts.provenance import model_and_tokenizer
from safe_trainer.lora import loading


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save_pair(tmp_path_factory.mktemp("pair"))[0]


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, init_lora_weights=False))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def loads(monkeypatch):
    """Return what is asked of `from_pretrained`, whose models then go to the CPU."""
    asked, load = [], AutoModelForCausalLM.from_pretrained

    def recorded(name, **options):
        asked.append(dict(options))
        options.pop("device_map", None)
        return load(name, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", recorded)
    return asked


def pretend(monkeypatch, kind, index=0):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: index)


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="There is an accelerator here.")
def test_without_an_accelerator_models_are_on_the_cpu_as_from_pretrained_leaves_them(base, adapter, loads):
    for model, tokenizer in (load_model(base), load_model(base, adapter), model_and_tokenizer(base, None)):
        assert model.device.type == "cpu" and not model.training and len(tokenizer) == tiny.VOCABULARY
    assert all(asked.get("device_map") is None for asked in loads) and len(loads) == 3


def test_an_accelerator_takes_models_with_adapters_and_without_as_in_trl(base, adapter, loads, monkeypatch):
    pretend(monkeypatch, "cuda")
    load_model(base)
    load_model(base, adapter)
    model_and_tokenizer(base, None)  # of vectors, scan and drift
    assert [asked["device_map"] for asked in loads] == ["auto"] * 3


def test_each_of_several_processes_takes_its_own_accelerator(base, loads, monkeypatch):
    pretend(monkeypatch, "cuda", index=1)
    monkeypatch.setattr(loading, "is_initialized", lambda: True)
    load_model(base)
    assert loads[0]["device_map"] == {"": 1}


def test_a_model_goes_to_mps_only_when_it_is_loaded(monkeypatch):
    moves = []
    model = SimpleNamespace(to=lambda device: moves.append(device.type) or "moved")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name, **options: options or model)
    pretend(monkeypatch, "mps")
    assert loading.load_weights("m") == "moved" and moves == ["mps"]


def test_options_reach_the_model_and_where_it_goes_can_be_said(base, loads, monkeypatch):
    pretend(monkeypatch, "cuda")
    model, _ = load_model(base, dtype="bfloat16", trust_remote_code=False, device_map="cpu")
    assert model.dtype == torch.bfloat16
    assert loads == [{"dtype": "bfloat16", "trust_remote_code": False, "device_map": "cpu"}]


def test_a_model_that_is_not_there_is_named_with_what_to_do():
    with pytest.raises(ValueError, match=r"(?s)`absent/model` could not be loaded: .*`hf auth login`"):
        load_model("absent/model")
