"""Factors that are trained through a rule: what everyone else sees of them, and the smallest rank that is exact."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from runs import weights
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize

from safe_trainer import compact_adapter
from safe_trainer.linalg import outside, random_basis
from safe_trainer.lora.reparametrize import IncrementA, IncrementB, set_factors, trained_through
from safe_trainer.lora.updates import lora_updates

IDS = torch.randint(4, tiny.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


def adapted(**config: object) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(tiny.model(), LoraConfig(**({"r": 6, "target_modules": "all-linear"} | config)))


def bases(update: object, rank: int = 5) -> tuple[Tensor, Tensor]:
    """Return `U` and `V` for a layer, the same every time."""
    d_out, d_in = update.shape
    return random_basis(d_out, rank, seed=d_out), random_basis(d_in, rank, seed=d_in)


def protected(model: PeftModel) -> tuple[dict, object]:
    """Give every layer factors that keep clear of its bases; return the layers and the rules."""
    updates = lora_updates(model, "The test")
    for update in updates.values():
        U, V = bases(update)
        torch.manual_seed(2)
        B, A = torch.randn(update.shape[0], 6) / 10, torch.randn(6, update.shape[1]) / 10
        set_factors(update, outside(B, U), outside(A.mT, V).mT)

    def rules(name: str) -> tuple[nn.Module, nn.Module]:
        U, V = bases(updates[name])
        return IncrementA(V, True), IncrementB(U, True)

    return updates, rules


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def step(model: nn.Module) -> None:
    """Take one large step of Adam."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.slow
def test_factors_and_their_names_are_the_same_inside_and_outside() -> None:
    model = adapted()
    updates, rules = protected(model)
    before, answer, names = weights(model), logits(model), [name for name, _ in model.named_parameters()]
    with trained_through(updates, rules):
        inside = weights(model)
        assert torch.allclose(logits(model), answer, atol=1e-6)
        assert get_peft_model_state_dict(model).keys() == get_peft_model_state_dict(adapted()).keys()
    assert before.keys() == inside.keys() == weights(model).keys()
    assert all(torch.allclose(before[name], inside[name], atol=1e-7) for name in before)
    assert names == [name for name, _ in model.named_parameters()]
    assert not any(parametrize.is_parametrized(module) for module in model.modules())


def test_parameters_stay_the_same_objects_so_that_an_optimizer_still_knows_them() -> None:
    model = adapted()
    updates, rules = protected(model)
    before = {id(parameter) for parameter in model.parameters()}
    with trained_through(updates, rules):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert {id(parameter) for parameter in model.parameters()} == before
        assert all(3 in parameter.shape for parameter in trained)  # r, and not 2r
    assert {id(parameter) for parameter in model.parameters()} == before


def test_what_was_trained_inside_is_there_afterwards_and_can_be_trained_on() -> None:
    model = adapted()
    updates, rules = protected(model)
    start = logits(model)
    for _ in range(2):
        with trained_through(updates, rules):
            step(model)
            inside = logits(model)
        assert torch.allclose(logits(model), inside, atol=1e-6) and not torch.allclose(inside, start, atol=1e-2)
        for update in updates.values():
            (B, A), (U, V) = update.factors(), bases(update)
            leaks = (U.mT @ B @ A).norm(), (B @ A @ V).norm()
            assert max(leaks) < 1e-6 * (B @ A).norm()


def test_factors_are_plain_again_after_an_exception() -> None:
    model = adapted()
    updates, rules = protected(model)
    with pytest.raises(KeyboardInterrupt), trained_through(updates, rules):
        model(IDS, labels=IDS).loss.backward()
        raise KeyboardInterrupt
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert not any(parameter.grad is not None for parameter in model.parameters())
    step(model)


@pytest.mark.slow
def test_a_checkpoint_written_inside_loads_in_stock_peft_and_inside_again(tmp_path: Path) -> None:
    model = adapted()
    updates, rules = protected(model)
    with trained_through(updates, rules):
        step(model)
        model.save_pretrained(tmp_path)
        answer = logits(model)
    assert torch.allclose(logits(PeftModel.from_pretrained(tiny.model(), tmp_path)), answer, atol=1e-6)
    again = adapted()
    updates, rules = protected(again)
    with trained_through(updates, rules):
        again.load_adapter(str(tmp_path), "default")
        assert torch.allclose(logits(again), answer, atol=1e-6)


def test_a_strict_load_of_the_whole_model_works_inside() -> None:
    model = adapted()
    updates, rules = protected(model)
    state = weights(model)
    with trained_through(updates, rules):
        step(model)
        model.load_state_dict(state, strict=True)
    assert all(torch.allclose(state[name], tensor, atol=1e-7) for name, tensor in weights(model).items())


def test_factors_in_protected_directions_are_refused_by_the_name_of_the_layer(tmp_path: Path) -> None:
    stranger = adapted(init_lora_weights=False)
    with (
        pytest.raises(ValueError, match="`model.layers.0.self_attn.q_proj` cannot be trained on: .*% of one factor"),
        trained_through(lora_updates(stranger, "The test"), protected(adapted())[1]),
    ):
        pass
    assert not any(parametrize.is_parametrized(module) for module in stranger.modules())
    stranger.save_pretrained(tmp_path)
    model = adapted()
    updates, rules = protected(model)
    with pytest.raises(ValueError, match="or with none. Give the basis"), trained_through(updates, rules):
        model.load_adapter(str(tmp_path), "default")


def test_increments_are_the_ones_of_the_formula() -> None:
    torch.manual_seed(0)
    U, V = random_basis(12, 4, seed=1), random_basis(10, 3, seed=2)
    C, P = torch.eye(12) - U @ U.mT, torch.eye(10) - V @ V.mT
    A0, B0, dA, dB = torch.randn(2, 10), torch.randn(12, 2), torch.randn(2, 10), torch.randn(12, 2)
    ruleA, ruleB = IncrementA(V, True), IncrementB(U, True)
    ruleA.right_inverse(torch.cat([A0 @ P, torch.zeros_like(A0)]))
    ruleB.right_inverse(torch.cat([torch.zeros_like(B0), C @ B0], dim=1))
    direct = C @ ((B0 + dB) @ (A0 + dA) - B0 @ A0) @ P
    assert torch.allclose(ruleB(dB) @ ruleA(dA), direct, atol=1e-5)
    assert torch.allclose(ruleA(ruleA.right_inverse(ruleA(dA))), ruleA(dA), atol=1e-6)
    assert torch.allclose(ruleB(ruleB.right_inverse(ruleB(dB))), ruleB(dB), atol=1e-6)
    assert torch.allclose(IncrementB(U, False)(dB) @ IncrementA(V, False)(dA), C @ dB @ dA @ P, atol=1e-5)


def test_autocast_does_not_round_a_factor() -> None:
    U = random_basis(64, 8, seed=1)
    rule, increment = IncrementB(U, False), torch.randn(64, 4)
    with torch.autocast("cpu", torch.bfloat16):
        factor = rule(increment)
    assert factor.dtype == torch.float32 and (U.mT @ factor).norm() < 1e-5
    assert rule(increment.bfloat16()).dtype == torch.bfloat16


def train_sharded(rank: int, folder: str) -> None:
    """Train two steps under FSDP2; keep the adapter as it is inside and afterwards, and what the model answers."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = adapted()
    updates, rules = protected(model)
    with trained_through(updates, rules):
        for layer in model.get_base_model().model.layers:
            fully_shard(layer)
        fully_shard(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(2):
            model(IDS[rank : rank + 1], labels=IDS[rank : rank + 1]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        inside = get_peft_model_state_dict(model)
    answer = logits(model)
    if rank == 0:
        torch.save({"inside": inside, "after": get_peft_model_state_dict(model), "answer": answer}, f"{folder}/0.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.exhaustive
def test_factors_are_whole_in_every_state_dict_of_a_sharded_model(tmp_path: Path) -> None:
    mp.spawn(train_sharded, (str(tmp_path),), nprocs=2)
    sharded = torch.load(tmp_path / "0.pt")
    model = adapted()
    updates, rules = protected(model)
    with trained_through(updates, rules):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(2):
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    whole = get_peft_model_state_dict(model)
    for state in (sharded["inside"], sharded["after"]):
        assert state.keys() == whole.keys()
        for key, tensor in state.items():
            assert type(tensor) is Tensor and torch.allclose(tensor, whole[key], atol=1e-5)
    assert torch.allclose(sharded["answer"], logits(model), atol=1e-4)


NEVER_LEFT = """
import builtins
from types import SimpleNamespace
import torch
from safe_trainer.lora.reparametrize import IncrementA, IncrementB, trained_through

layer = SimpleNamespace(lora_A={"a": torch.nn.Linear(4, 2)}, lora_B={"a": torch.nn.Linear(2, 4)})
nothing = torch.zeros(4, 0)
builtins.held = trained_through(
    {"layer": SimpleNamespace(layer=layer, adapter="a")},
    lambda name: (IncrementA(nothing, False), IncrementB(nothing, False)),
)
builtins.held.__enter__()
"""


@pytest.mark.exhaustive
def test_a_context_that_is_never_left_does_not_disturb_the_end_of_python() -> None:
    result = subprocess.run([sys.executable, "-c", NEVER_LEFT], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Exception ignored" not in result.stderr


# ---- compact


@pytest.mark.parametrize(
    "config", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"up_proj": 5}}]
)
def test_a_compact_adapter_gives_the_same_answers_from_the_smallest_rank(tmp_path: Path, config: dict) -> None:
    model = adapted(lora_alpha=9, **config)
    ranks = {}
    for number, (name, update) in enumerate(lora_updates(model, "The test").items()):
        torch.manual_seed(number)
        B, A = update.factors()
        ranks[name] = 1 + number % 4
        thin = torch.randn(B.shape[0], ranks[name]) @ torch.randn(ranks[name], B.shape[1])
        set_factors(update, thin / 10, torch.randn_like(A) / 10)
    model.save_pretrained(tmp_path / "whole")
    assert compact_adapter(tmp_path / "whole", tmp_path / "compact") == ranks
    compact = PeftModel.from_pretrained(tiny.model(), tmp_path / "compact")
    assert torch.allclose(logits(compact), logits(model), atol=1e-5)
    held = {name: update.factors()[0].shape[1] for name, update in lora_updates(compact, "The test").items()}
    assert held == ranks
    files = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("whole", "compact"))
    whole, small = (sum(tensor.numel() for tensor in file.values()) for file in files)
    assert small < whole


@pytest.mark.slow
def test_compacting_twice_changes_nothing(tmp_path: Path) -> None:
    model = adapted(init_lora_weights=False)
    model.save_pretrained(tmp_path / "0")
    for turn in (0, 1):
        compact_adapter(tmp_path / str(turn), tmp_path / str(turn + 1))
    first, second = (json.loads((tmp_path / turn / "adapter_config.json").read_text()) for turn in "12")
    assert {**first, "target_modules": None} == {**second, "target_modules": None}
    answers = [logits(PeftModel.from_pretrained(tiny.model(), tmp_path / turn)) for turn in "012"]
    assert torch.allclose(answers[0], answers[1], atol=1e-5) and torch.allclose(answers[1], answers[2], atol=1e-5)


def test_compacting_keeps_what_else_an_adapter_holds(tmp_path: Path) -> None:
    model = adapted(modules_to_save=["lm_head"], init_lora_weights=False)
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.add_(1.0)
    model.save_pretrained(tmp_path / "whole")
    compact_adapter(tmp_path / "whole", tmp_path / "compact")
    compact = PeftModel.from_pretrained(tiny.model(), tmp_path / "compact")
    assert torch.allclose(logits(compact), logits(model), atol=1e-4)


def test_compacting_refuses_what_is_not_a_lora_on_linear_layers(tmp_path: Path) -> None:
    adapted(target_modules=["embed_tokens", "q_proj"]).save_pretrained(tmp_path / "embedding")
    with pytest.raises(ValueError, match="LoRA on linear layers only.*lora_embedding"):
        compact_adapter(tmp_path / "embedding", tmp_path / "compact")
    adapted(use_dora=True).save_pretrained(tmp_path / "dora")
    with pytest.raises(ValueError, match="use_dora"):
        compact_adapter(tmp_path / "dora", tmp_path / "compact")
    assert not (tmp_path / "compact").exists()


def test_set_factors_overwrites_both() -> None:
    model = adapted()
    update = next(iter(lora_updates(model, "The test").values()))
    B, A = torch.randn(update.shape[0], 6), torch.randn(6, update.shape[1])
    set_factors(update, B, A)
    held = update.layer.lora_B["default"].weight, update.layer.lora_A["default"].weight
    assert torch.equal(held[0], B) and torch.equal(held[1], A)
