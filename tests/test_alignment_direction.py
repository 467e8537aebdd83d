"""The alignment direction: against dense float64 formulas, across architectures and file layouts, and on bad input."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
from importlib.metadata import version

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from safe_trainer.artifacts.alignment_direction import AlignmentDirection, DirectionFactors
from safe_trainer.artifacts.store import load_artifact, save_artifact

FILE = "model.safetensors"
Q, V, DOWN = (f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"))


def from_checkpoints(pair, **settings):
    return AlignmentDirection.from_checkpoints(*pair, **settings)


def modules_of(pair):
    """Return `W_aligned - W_unaligned` of every linear layer but the head, (d_out, d_in), from live float64 models."""
    aligned, unaligned = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in pair)
    others = dict(unaligned.named_modules())
    differences = {}
    for name, module in aligned.named_modules():
        if name != "lm_head" and type(module).__name__ in {"Linear", "Conv1D"}:
            d = (module.weight - others[name].weight).detach()
            differences[name] = d.T if type(module).__name__ == "Conv1D" else d
    return differences


def dense(d):
    """Return the published operator `d dᵀ / ‖d‖_F` in float64."""
    d = d.double()
    return d @ d.T / d.norm()


def from_factors(factors):
    basis, s = factors.U.double(), factors.singular_values.double()
    return basis @ torch.diag(s**2 / factors.frobenius_norm) @ basis.T


def spectral_norm(matrix):
    return torch.linalg.matrix_norm(matrix, 2).item()


def rewrite(path, change):
    """Change the tensors of a saved model in place."""
    tensors = load_file(f"{path}/{FILE}")
    save_file({k: v.contiguous() for k, v in change(tensors).items()}, f"{path}/{FILE}", {"format": "pt"})


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Every architecture's pair, saved once."""
    folders = {name: tmp_path_factory.mktemp(name) for name in tiny.ARCHITECTURES}
    return {name: tiny.save_pair(folder, name) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def llama(originals):
    return originals["llama"]


@pytest.fixture
def pair(llama, tmp_path):
    """A Llama pair that a test may damage."""
    return tuple(shutil.copytree(path, tmp_path / role) for path, role in zip(llama, ("a", "u"), strict=True))


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_operator_equals_the_dense_formula_in_every_architecture(originals, architecture):
    direction = from_checkpoints(originals[architecture], max_error=0)
    expected = modules_of(originals[architecture])
    assert list(direction.modules) == list(expected) and len(expected) >= 8
    for name, d in expected.items():
        factors = direction.modules[name]
        assert factors.shape == tuple(d.shape)
        assert factors.frobenius_norm == pytest.approx(d.norm().item(), rel=1e-6)
        assert spectral_norm(from_factors(factors) - dense(d)) < 1e-6


@pytest.mark.parametrize("max_error", [0.3, 0.03, 0.003])
def test_rank_is_the_smallest_that_keeps_the_error_bound(llama, max_error):
    direction = from_checkpoints(llama, max_error=max_error)
    for name, d in modules_of(llama).items():
        factors, s = direction.modules[name], torch.linalg.svdvals(d)
        smallest = max(1, int((s**2 / d.norm() > max_error).sum()))
        assert factors.U.shape[1] == smallest
        following = s[smallest].item() if smallest < len(s) else 0.0
        assert factors.next_singular_value == pytest.approx(following, abs=1e-6)
        error = spectral_norm(from_factors(factors) - dense(d))
        assert error == pytest.approx(factors.error_bound, abs=1e-6)
        assert error <= max_error + 1e-6


def test_rank_caps_the_directions_and_the_bound_that_was_reached_is_reported(llama):
    direction = from_checkpoints(llama, rank=3, max_error=0)
    expected = modules_of(llama)
    for row in direction.summary():
        d = expected[row["module"]]
        left, s, _ = torch.linalg.svd(d)
        U = direction.modules[row["module"]].U.double()
        assert row["rank"] == 3 and row["shape"] == tuple(d.shape)
        assert row["error_bound"] == pytest.approx((s[3] ** 2 / d.norm()).item(), rel=1e-5)
        assert row["norm"] == pytest.approx(d.norm().item(), rel=1e-6)
        assert spectral_norm(U @ U.T - left[:, :3] @ left[:, :3].T) < 1e-5
    assert direction.provenance["largest_error_bound"] == max(row["error_bound"] for row in direction.summary())


def test_direction_of_a_merged_adapter_has_the_rank_of_the_adapter(llama, tmp_path):
    shutil.copytree(llama[1], tmp_path / "merged")
    torch.manual_seed(0)
    update = torch.randn(32, 2) @ torch.randn(2, 32)
    rewrite(tmp_path / "merged", lambda tensors: tensors | {f"{Q}.weight": tensors[f"{Q}.weight"] + update})
    direction = from_checkpoints((tmp_path / "merged", llama[1]), modules="q_proj", max_error=1e-6)
    assert list(direction.modules) == [Q]
    assert direction.modules[Q].U.shape == (32, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_subtracted_in_float32(llama, tmp_path, dtype):
    paths = []
    for path in llama:
        paths.append(tmp_path / path.rpartition("/")[2])
        AutoModelForCausalLM.from_pretrained(path, dtype=dtype).save_pretrained(paths[-1])
    direction = from_checkpoints(paths, max_error=0)
    for name, d in modules_of(paths).items():  # the rounded weights, subtracted in float64
        assert spectral_norm(from_factors(direction.modules[name]) - dense(d)) < 1e-6


def test_layout_of_the_files_changes_nothing(llama, tmp_path):
    """Sharded safetensors against one file."""
    aligned = AutoModelForCausalLM.from_pretrained(llama[0])
    aligned.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    whole, other = from_checkpoints(llama), from_checkpoints((tmp_path / "sharded", llama[1]))
    assert all(torch.equal(other.modules[name].U, factors.U) for name, factors in whole.modules.items())
    assert other.provenance["aligned"]["weights_sha256"] == whole.provenance["aligned"]["weights_sha256"]


def test_pickles_are_not_read(llama, tmp_path):
    shutil.copytree(llama[0], tmp_path / "pickled", ignore=shutil.ignore_patterns(FILE))
    torch.save({"a": tiny.model}, tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="`.bin` files, which are pickles.*save_pretrained"):
        from_checkpoints((tmp_path / "pickled", llama[1]))


def test_checkpoint_saved_without_its_head_matches_by_name(originals, tmp_path):
    """GPT-2 on the Hub names its tensors `h.0...` where the model has `transformer.h.0...`."""
    bare = shutil.copytree(originals["gpt2"][1], tmp_path / "bare")
    rewrite(bare, lambda tensors: {k.removeprefix("transformer."): v for k, v in tensors.items()})
    whole, other = from_checkpoints(originals["gpt2"]), from_checkpoints((originals["gpt2"][0], bare))
    assert "transformer.h.0.attn.c_attn" in whole.modules
    assert all(torch.equal(other.modules[name].U, factors.U) for name, factors in whole.modules.items())


def test_modules_are_selected_by_expression_or_by_name(llama):
    assert list(from_checkpoints(llama, modules="0.*(q|v)_proj").modules) == [Q, V]
    assert list(from_checkpoints(llama, modules=[V, Q]).modules) == [Q, V]
    with pytest.raises(ValueError, match=r"matches `modules` \('query'\). It has model.layers.0.*\(14 in all\)"):
        from_checkpoints(llama, modules="query")
    with pytest.raises(ValueError, match="matches `modules`.*output embedding is not among them"):
        from_checkpoints(llama, modules="lm_head")
    with pytest.raises(ValueError, match="names model.layers.9.nothing, which"):
        from_checkpoints(llama, modules=[Q, "model.layers.9.nothing"])


def test_progress_is_told_after_each_module(llama):
    calls = []
    from_checkpoints(llama, modules="v_proj", progress=lambda *call: calls.append(call))
    assert calls == [(1, 2, V), (2, 2, V.replace("0", "1"))]


def test_modules_that_alignment_left_alone_are_left_out_and_said_so(pair, caplog):
    original = load_file(f"{pair[0]}/{FILE}")[f"{Q}.weight"]
    rewrite(pair[1], lambda tensors: tensors | {f"{Q}.weight": original})
    with caplog.at_level(logging.WARNING):
        direction = from_checkpoints(pair)
    assert Q not in direction.modules and len(direction.modules) == 13
    assert direction.provenance["identical_modules"] == [Q] and Q in caplog.text
    with pytest.raises(ValueError, match=f"nothing for {Q} .alignment did not change {Q}"):
        direction.check_fits({Q: (32, 32)})


def test_two_identical_checkpoints_have_no_direction(llama, tmp_path):
    with pytest.raises(ValueError, match="identical in all 14 modules"):
        from_checkpoints((llama[0], llama[0]))
    assert list(tmp_path.iterdir()) == []


def test_saved_direction_comes_back_with_provenance(llama, tmp_path):
    direction = from_checkpoints(llama, rank=5)
    loaded = AlignmentDirection.load(direction.save(tmp_path / "d.safetensors"))
    assert loaded.provenance == direction.provenance
    assert loaded.summary() == direction.summary()
    for name, factors in direction.modules.items():
        assert torch.equal(loaded.modules[name].U, factors.U)
        assert torch.equal(loaded.modules[name].singular_values, factors.singular_values)
    assert direction.provenance["aligned"]["source"] == llama[0]
    assert {"rank": 5, "max_error": 0.01}.items() <= direction.provenance.items()
    assert direction.provenance["versions"]["torch"] == version("torch")


def test_commit_of_a_checkpoint_in_the_hub_cache_is_recorded(llama, tmp_path, monkeypatch):
    """Offline, a Hub id is looked up in the cache, whose folders are named after commits."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--chat"
    shutil.copytree(llama[0], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    direction = from_checkpoints(("someone/chat", llama[1]), modules="q_proj")
    assert direction.provenance["aligned"]["source"] == "someone/chat"
    assert direction.provenance["aligned"]["revision"] == commit
    with pytest.raises(
        OSError, match="`aligned` .`someone/else`. is not a folder here and could not be loaded from the Hub"
    ):
        from_checkpoints(("someone/else", llama[1]))


def test_direction_that_does_not_fit_says_where(llama):
    direction = from_checkpoints(llama, modules="v_proj")
    direction.check_fits({V: (16, 32)})
    with pytest.raises(ValueError, match=f"nothing for {Q}, {DOWN}.*other shapes: {V} .16 x 64, not 16 x 32"):
        direction.check_fits({Q: (32, 32), DOWN: (32, 64), V: (16, 64)})
    with pytest.raises(ValueError, match="only the prefix differs"):
        direction.check_fits({f"language_model.{V}": (16, 32)})


@pytest.mark.parametrize(
    "settings", [{"rank": 0}, {"max_error": -0.1}, {"max_error": 1.0}, {"max_error": float("nan")}]
)
def test_settings_out_of_range_are_refused(llama, settings):
    with pytest.raises(ValueError, match=f"`{next(iter(settings))}` must be at least"):
        from_checkpoints(llama, **settings)


def test_models_of_other_architectures_and_sizes_have_no_direction(originals, llama, tmp_path):
    with pytest.raises(ValueError, match=r"no direction.*only `aligned`.*only `unaligned`.*c_attn \(96 x 32\)"):
        from_checkpoints((llama[0], originals["gpt2"][1]))
    tiny.model("llama", hidden=64).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match=rf"other shapes.*{Q} \(32 x 32, not 64 x 64\).*\(14 in all\)"):
        from_checkpoints((llama[0], tmp_path / "wide"))
    tiny.model("llama", layers=3).save_pretrained(tmp_path / "deep")
    with pytest.raises(ValueError, match=r"only `unaligned`.*has model.layers.2.self_attn.q_proj \(32 x 32\)"):
        from_checkpoints((llama[0], tmp_path / "deep"))
    assert len(from_checkpoints((llama[0], tmp_path / "deep"), modules=r"layers\.[01]\.").modules) == 14


def test_weights_under_another_prefix_are_refused_with_a_hint(pair):
    rewrite(pair[1], lambda tensors: {f"language_model.{k}": v for k, v in tensors.items()})
    with pytest.raises(ValueError, match=f"no tensor for {Q}.weight.*`language_model.{Q}.weight`.*only the prefix"):
        from_checkpoints(pair)


def test_missing_misshapen_and_quantized_weights_are_refused(pair):
    rewrite(pair[0], lambda tensors: {k: v for k, v in tensors.items() if k != f"{Q}.weight"})
    with pytest.raises(ValueError, match=f"`aligned` .* has no tensor for {Q}.weight"):
        from_checkpoints(pair)
    rewrite(pair[0], lambda tensors: tensors | {f"{Q}.weight": torch.zeros(32, 32, dtype=torch.uint8)})
    with pytest.raises(ValueError, match=f"holds {Q}.weight 32 x 32 U8, not 32 x 32 in floating point"):
        from_checkpoints(pair)
    rewrite(pair[0], lambda tensors: tensors | {f"{Q}.weight": torch.zeros(16, 32)})
    with pytest.raises(ValueError, match=f"holds {Q}.weight 16 x 32 F32, not 32 x 32"):
        from_checkpoints(pair)


def test_weights_that_are_not_finite_are_refused(pair):
    rewrite(pair[1], lambda tensors: tensors | {f"{V}.weight": torch.full((16, 32), torch.nan)})
    with pytest.raises(ValueError, match=f"`{V}` holds infinite or NaN weights"):
        from_checkpoints(pair)


def test_config_of_a_quantized_model_is_refused(pair):
    config = json.loads((pair[0] / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (pair[0] / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is quantized. Give the full-precision checkpoint"):
        from_checkpoints(pair)


def test_adapter_folder_is_refused_with_what_to_do(pair):
    (pair[0] / "config.json").unlink()
    (pair[0] / FILE).unlink()
    (pair[0] / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is an adapter, not a complete model. Merge it first"):
        from_checkpoints(pair)


def test_missing_places_and_files_are_named(pair):
    with pytest.raises(FileNotFoundError, match="`unaligned` .*nowhere.* is not a folder"):
        from_checkpoints((pair[0], pair[1].parent / "nowhere"))
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        from_checkpoints((pair[0] / FILE, pair[1]))
    (pair[0] / FILE).unlink()
    with pytest.raises(FileNotFoundError, match="`aligned` .* has no model.safetensors"):
        from_checkpoints(pair)
    (pair[0] / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        from_checkpoints(pair)


def test_missing_shard_and_broken_index_are_named(llama, tmp_path):
    folder = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(llama[0]).save_pretrained(folder, max_shard_size="20KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {shard.name}, which `model.safetensors.index.json` names"):
        from_checkpoints((folder, llama[1]))
    (folder / f"{FILE}.index.json").write_text('{"weight_map": ')
    with pytest.raises(ValueError, match="`model.safetensors.index.json` cannot be read"):
        from_checkpoints((folder, llama[1]))


@pytest.mark.parametrize("damage", ["cut short", "header cut", "bit flipped", "another file"])
def test_damaged_weights_are_refused(pair, damage):
    file = pair[0] / FILE
    whole = file.read_bytes()
    flipped = bytes([whole[8] ^ 0x10])
    contents = {
        "cut short": whole[:-100],
        "header cut": whole[:40],
        "bit flipped": whole[:8] + flipped + whole[9:],
        "another file": b"<html>404</html>" * 4,
    }
    file.write_bytes(contents[damage])
    with pytest.raises(ValueError, match="`aligned` .*`model.safetensors` cannot be read .*cut short or damaged"):
        from_checkpoints(pair)


@pytest.mark.slow
def test_config_that_is_no_causal_language_model_is_refused(pair):
    (pair[0] / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="`aligned` .* is not a causal language model"):
        from_checkpoints(pair)


def factors(**changes):
    """Return sound factors of a 4 x 3 weight, with some of them changed."""
    sound = {
        "U": torch.eye(4)[:, :2],
        "singular_values": torch.tensor([2.0, 1.0]),
        "frobenius_norm": 2.5,
        "next_singular_value": 0.5,
        "shape": (4, 3),
    }
    return DirectionFactors(**(sound | changes))


@pytest.mark.parametrize("U", [torch.full((4, 2), torch.nan), torch.ones(4, 2), torch.eye(4)[:, :2] * 1.01])
def test_direction_file_with_unsound_factors_is_refused(tmp_path, U):
    path = AlignmentDirection({"a.b": factors()}).save(tmp_path / "d.safetensors")
    AlignmentDirection.load(path)
    AlignmentDirection({"a.b": factors(U=U)}).save(path)
    with pytest.raises(ValueError, match=f"`{path}` is damaged: .*`U` of `a.b` is not orth.*Compute or copy it again"):
        AlignmentDirection.load(path)


def test_direction_file_whose_parts_do_not_agree_is_refused(tmp_path):
    path = AlignmentDirection({"a.b": factors()}).save(tmp_path / "d.safetensors")
    tensors, details = load_artifact(path, "alignment direction", 1)
    renamed = {name.replace("a.b", "a.c"): tensor for name, tensor in tensors.items()}
    save_artifact(tmp_path / "other", "alignment direction", 1, renamed.items(), details)
    with pytest.raises(ValueError, match="do not agree.*a.b.U"):
        AlignmentDirection.load(tmp_path / "other")
    save_artifact(tmp_path / "basis", "basis", 1, tensors.items(), details)
    with pytest.raises(ValueError, match="must hold: alignment direction. Found: basis"):
        AlignmentDirection.load(tmp_path / "basis")


@pytest.mark.exhaustive
def test_memory_is_bounded_by_the_largest_tensor_and_not_by_the_models(tmp_path):
    """Two models of 350 MB in float32 within a few times their largest weight (8 MB) + 400 MB."""
    script = """
        import resource, sys, tiny, torch
        from pathlib import Path
        from safetensors.torch import save_file
        from transformers import AutoModelForCausalLM, LlamaConfig
        from safe_trainer import AlignmentDirection

        folder = Path(sys.argv[1])
        config = LlamaConfig(
            hidden_size=512, intermediate_size=4096, num_hidden_layers=12, num_attention_heads=8, vocab_size=64
        )
        with torch.device("meta"):
            shapes = {k: v.shape for k, v in AutoModelForCausalLM.from_config(config).state_dict().items()}
        small = tiny.save_pair(folder / "small")
        AlignmentDirection.from_checkpoints(*small)  # so that nothing is left to import
        pair = folder / "aligned", folder / "unaligned"
        for path in pair:
            config.save_pretrained(path)
            index = {}
            for layer in range(-1, 12):  # one shard for each layer, and one for the rest
                names = [k for k in shapes if (f"layers.{layer}." in k if layer >= 0 else "layers." not in k)]
                shard = f"model-{layer + 2:05}-of-00013.safetensors"
                save_file({k: torch.randn(shapes[k]) for k in names}, path / shard)
                index |= dict.fromkeys(names, shard)
            (path / "model.safetensors.index.json").write_text(__import__("json").dumps({"weight_map": index}))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        direction = AlignmentDirection.from_checkpoints(*pair, rank=32)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(len(direction.modules), (after - before) * 1024)
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    modules, grown = (int(word) for word in done.stdout.split())
    size = sum(file.stat().st_size for file in (tmp_path / "aligned").glob("*.safetensors"))
    limit = 3 * 4096 * 512 * 4 + 400e6
    assert modules == 84 and 2 * size > 1.5 * limit
    assert grown < limit
