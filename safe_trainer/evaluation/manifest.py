"""What has to be known to repeat an evaluation: which model, asked what and how, judged by whom, by which software."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..data import PromptSet

if TYPE_CHECKING:
    from .generate import Decoding
    from .judges.base import Judge

_PACKAGES = ("torch", "transformers", "peft", "tokenizers", "scipy")


def describe(
    model: Any, tokenizer: Any, prompt_sets: Sequence[PromptSet], judges: Sequence[Judge], decoding: Decoding
) -> dict[str, Any]:
    """Return the manifest of one evaluation, as values that JSON can hold; the examined adapter must be active."""
    return {
        "model": _model(model),
        "adapters": _active_adapters(model),
        "tokenizer": {
            "id": shown_id(tokenizer.name_or_path or "built in memory"),
            "class": type(tokenizer).__name__,
            "chat_template_sha256": sha256(str(tokenizer.chat_template)),
            "vocabulary_sha256": sha256(json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)),
        },
        "decoding": json.loads(json.dumps(asdict(decoding))),
        "judges": [_judge(judge) for judge in judges],
        "prompt_sets": [
            {"name": s.name, "source": s.source, "kind": s.kind, "prompts": len(s), "sha256": prompt_set_sha256(s)}
            for s in prompt_sets
        ],
        "packages": {
            "python": platform.python_version(),
            "safe-trainer": __version__,
            **{package: version(package) for package in _PACKAGES},
        },
        "hardware": _hardware(model),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def prompt_set_sha256(prompt_set: PromptSet) -> str:
    """Return a hash of the prompts, references and categories: the same for the same questions under any name."""
    content: list[Any] = [prompt_set.kind, prompt_set.prompts, prompt_set.categories, prompt_set.references]
    asked = {"system": prompt_set.system_prompt, "template": prompt_set.template, "contexts": prompt_set.contexts}
    if any(asked.values()) or prompt_set.scorer != "exact":  # otherwise the hash is that of earlier versions
        content += [asked, prompt_set.scorer]
    return sha256(json.dumps(content, ensure_ascii=False))


def sha256(text: str) -> str:
    """Return the SHA-256 of a text's UTF-8 bytes, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, read in pieces, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def adapter_provenance(path: str | Path) -> dict[str, Any]:
    """Return an adapter's Hub id or the name of its folder, the hash of its weights, and how many were loaded: all."""
    from safetensors import safe_open

    from ..lora.io import local_folder

    weights = local_folder(path) / "adapter_model.safetensors"
    if not weights.is_file():  # PyTorch's own format
        return {"id": shown_id(path), "sha256": None, "weights_loaded": None}
    with safe_open(weights, framework="pt") as opened:
        return {"id": shown_id(path), "sha256": file_sha256(weights), "weights_loaded": len(opened.keys())}


def shown_id(source: str | Path) -> str:
    """Return a Hub id as it is, and of a local path the last part only, since the rest is private.

    ```python
    >>> shown_id("Qwen/Qwen2.5-0.5B"), shown_id("/home/me/secret-project/adapter")
    ('Qwen/Qwen2.5-0.5B', 'adapter')

    ```
    """
    path = Path(source)
    return path.name if path.is_absolute() or path.exists() else str(source)


def fingerprint(model: Any) -> str:
    """Return a hash of the model in memory: names, shapes, and 64 evenly spaced values of every parameter.

    The id in a config says where training began. The fingerprint tells two states of one model apart: whatever
    training changes shows in nearly every value.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.is_meta:  # offloaded: its values are elsewhere
            continue
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        for tensor in _plain_tensors(parameter.detach()):
            flat = tensor.reshape(-1)
            digest.update(flat[:: max(1, flat.numel() // 64)].double().cpu().numpy().tobytes())
    return digest.hexdigest()


def _plain_tensors(tensor: Any) -> list[Any]:
    """Return what a tensor is made of: itself, or for torchao's quantised ones the integers and their scales."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return [plain for part in parts for plain in _plain_tensors(part)]


def _model(model: Any) -> dict[str, Any]:
    config = model.config
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    source = getattr(config, "_name_or_path", "")
    return {
        "id": shown_id(source) if source else "built in memory",
        "revision": getattr(config, "_commit_hash", None),
        "class": type(base).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": str(getattr(config, "quantization_config", None) or "none"),
        "fingerprint": fingerprint(model),
    }


def _judge(judge: Judge) -> dict[str, str]:
    described = {"name": judge.name, "version": judge.version}
    if hasattr(judge, "model"):
        described["model"] = shown_id(getattr(judge.model.config, "_name_or_path", "") or "built in memory")
    return described


def _active_adapters(model: Any) -> list[str]:
    active = getattr(model, "active_adapters", None) if hasattr(model, "peft_config") else None
    return [str(name) for name in active] if isinstance(active, list) else []


def _hardware(model: Any) -> dict[str, Any]:
    import torch

    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": device.type, "name": name, "threads": torch.get_num_threads()}
