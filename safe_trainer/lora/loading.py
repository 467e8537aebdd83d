"""Models by name, loaded where TRL would put them: on the accelerator, if there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME
from torch.distributed import is_available, is_initialized
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import is_torch_bf16_gpu_available

from .io import at_revision, load_adapted, note_commit


def load_model(name: str | Path, adapter: str | Path | None = None, **options: Any) -> tuple[Any, Any]:
    """Load a model and its tokenizer, for example to compare it or to fit security vectors to it.

    As with TRL, the model is put on the accelerator, on several if one is too small, and on the CPU if there is none.

    Args:
        name (`str` or `Path`): Folder or Hub id of the model; `owner/name@revision` for another than its newest.
        adapter (`str` or `Path`, *optional*): Folder or Hub id of an adapter to put on it; the tokenizer is then the
            one that is saved next to it, if there is one.
        **options: Of `from_pretrained`, such as `dtype`; `device_map` puts the model elsewhere.

    Returns:
        `tuple`: The model (`PreTrainedModel`, or `PeftModel` with an adapter), and the tokenizer.

    Raises:
        ValueError: If the model could not be loaded or is an adapter itself, or the adapter is damaged.
        OSError: If the model could not be loaded for the adapter; names both.

    Example:

    ```python
    from safe_trainer import load_model, testbed

    model, tokenizer = load_model(testbed.ALIGNED)
    ```
    """
    if adapter is not None:
        placed: Any = _placing(options)
        model, tokenizer = load_adapted(adapter, str(name), **placed)
        return _moved(model, placed), tokenizer
    refuse_adapter(name)
    name, revision = at_revision(name)
    options = options if revision is None else {"revision": revision, **options}
    about = {key: options[key] for key in ("revision", "trust_remote_code") if key in options}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **about)
        return load_weights(name, **options), tokenizer
    except (OSError, ValueError) as error:  # messages of libraries leave the model's name out
        raise ValueError(
            f"The model `{name}` could not be loaded: {str(error).strip()} Give a folder or a Hub id; for a private "
            "or gated model, log in with `hf auth login`."
        ) from error


def refuse_adapter(source: str | Path, name: str = "") -> None:
    """Refuse an adapter's folder in the place of a model: libraries report it badly, or silently load both."""
    folder = Path(source).expanduser()
    if (folder / CONFIG_NAME).is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"{name or f'`{source}`'} is an adapter, not a complete model. Merge it first: `safe-trainer export "
            "ADAPTER --output FOLDER`, or give its base model."
        )


def source_of(model: Any) -> str:
    """Return the folder or Hub id of a model, itself or given by it; empty for one that was built in memory."""
    return str(model) if isinstance(model, str | Path) else getattr(model.config, "_name_or_path", "")


def revision_of(model: Any) -> str | None:
    """Return the commit or other revision on the Hub that a model in memory was loaded from, where that is known."""
    commit: str | None = getattr(getattr(model, "config", None), "_commit_hash", None)
    adapters = (getattr(model, "peft_config", None) or {}).values()
    return commit or next((adapter.revision for adapter in adapters if adapter.revision), None)


def named(model: Any, revision: str | None = None) -> str:
    """Return a model's folder or Hub id with its revision, given or known of it, as `owner/name@revision`."""
    source, revision = source_of(model), revision or revision_of(model)
    return f"{source}@{revision}" if source and revision and not Path(source).is_dir() else source


def load_weights(name: str | Path, **options: Any) -> Any:
    """Load a model alone, where [`load_model`] puts it; `options` are the same."""
    placed = _placing(options)
    model = AutoModelForCausalLM.from_pretrained(name, **placed)
    note_commit(model, str(name), options.get("revision"), options.get("cache_dir"))
    return _moved(model, placed)


def quantized(bits: str | None, bf16: bool | None = None) -> dict[str, Any]:
    """Return what `from_pretrained` takes to load a model in `"4bit"` or `"8bit"` by bitsandbytes; for `None` nothing.

    `bf16` says whether 4-bit weights compute in bfloat16 or in float32; left out, whether the GPU does.
    """
    if bits is None:
        return {}
    if bits == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    bf16 = is_torch_bf16_gpu_available() if bf16 is None else bf16
    compute = torch.bfloat16 if bf16 else torch.float32
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    return {"quantization_config": nf4}


def _placing(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `from_pretrained` with a `device_map`, unless there is no accelerator or one is given."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if "device_map" in options or accelerator is None or accelerator.type == "mps":
        return options
    is_one_of_several = is_available() and is_initialized()
    device_map = {"": torch.accelerator.current_device_index()} if is_one_of_several else "auto"
    return {**options, "device_map": device_map}


def _moved(model: Any, placed: dict[str, Any]) -> Any:
    """Move a model that has no `device_map` to the accelerator: on MPS, which TRL gives none either."""
    if "device_map" in placed or not torch.accelerator.is_available():
        return model
    return model.to(torch.accelerator.current_accelerator())
