"""Adapters on disk: read completely or refused by name, compared with the adapter in a model, compacted, merged.

PEFT takes what it finds: an adapter that lacks a factor becomes one that does nothing there.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from huggingface_hub import try_to_load_from_cache
from peft import PeftConfig, PeftModel, PeftModelForCausalLM, get_peft_model_state_dict, load_peft_weights
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, isfinite
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..linalg import compact_factors
from .updates import check_peft_config

logger = logging.getLogger(__name__)

HARMFUL_KIND = "security vectors (harmful by construction)"
"""The mark in the metadata of the weights of security vectors."""
HARMFUL_SETTING = {"safe_trainer": HARMFUL_KIND}
"""The same mark in the adapter's settings, as their `auto_mapping`, which causal language models have no use for."""

_ERRORS = (SafetensorError, UnpicklingError, EOFError, RuntimeError, ValueError, TypeError, KeyError, AttributeError)
"""What reading a damaged adapter may end with."""
_SCALARS = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias")
"""Settings without which the weights mean something else."""
_CHOICES = ("target_modules", "modules_to_save", "layers_to_transform", "exclude_modules", "target_parameters")
"""Settings that choose what is adapted. They may be written in many ways, so the weights' names decide."""
_AT_REVISION = re.compile(r"([\w-][\w.-]*(?:/[\w.-]+)?)@(.+)")
PREFIX = "base_model.model."
"""How the names of an adapter's weights begin, before the layer's name in the base model."""
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab*", "merges.txt",
             "*.model", "*.tiktoken")  # fmt: skip
"""Files next to an adapter's weights that are its tokenizer and its chat template."""
REPAIR_REPORT = "safe_lora.json"
"""What was done to an adapter that was repaired after training, saved next to its weights."""
_NEXT_TO_WEIGHTS = ("README.md", REPAIR_REPORT, *TOKENIZER)


@contextmanager
def naming(source: str | Path) -> Iterator[None]:
    """Name the adapter in the `ValueError` for whatever goes wrong while it is read."""
    try:
        yield
    except _ERRORS as error:
        raise ValueError(
            f"The adapter `{source}` could not be read: {error or type(error).__name__}. It was cut short or damaged, "
            "or is not an adapter; save or copy it again."
        ) from error


@contextmanager
def fitting(source: str | Path) -> Iterator[None]:
    """Name the adapter in the `ValueError` for whatever goes wrong while it is put on a model."""
    try:
        yield
    except _ERRORS as error:
        reason = _shape_mismatch(error) or str(error) or type(error).__name__
        raise ValueError(
            f"The adapter `{source}` cannot be used on this model: {reason} Give an adapter that was trained on it."
        ) from error


def _shape_mismatch(error: Exception) -> str:
    """Return torch's list of weights of other shapes, two lines for each layer, as one sentence; or an empty text."""
    lines = [line.strip() for line in str(error).splitlines() if "size mismatch for " in line]
    if not lines:
        return ""
    first = lines[0].partition("size mismatch for ")[2].rstrip(".")
    return f"{len(lines)} of its weights have other shapes, the first of them {first}."


def read_config(source: str | Path) -> PeftConfig:
    """Return the settings of an adapter, from its folder or Hub id; `ValueError` if they are damaged."""
    folder = Path(source)
    if folder.is_dir() and not (folder / CONFIG_NAME).is_file():
        named = ", ".join(f"`{file.parent}`" for file in sorted(folder.glob(f"*/{CONFIG_NAME}")))
        hint = f"Give the folder of one adapter: {named}" if named else "Give the folder that an adapter was saved to"
        raise ValueError(f"`{source}` holds no adapter: there is no `{CONFIG_NAME}` in it. {hint}.")
    with naming(source):
        config = PeftConfig.from_pretrained(str(source))
        if config.peft_type is None:
            raise ValueError("its settings do not say of which kind it is")
    return config


def read_adapter(source: str | Path) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Return settings and weights of an adapter (folder or Hub id), whose factors are checked to belong together."""
    config = read_config(source)
    with naming(source):
        files = [Path(source, name) for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)]
        if Path(source).is_dir() and not any(file.is_file() for file in files):
            raise ValueError(f"it holds no `{SAFETENSORS_WEIGHTS_NAME}`")
        tensors: dict[str, Tensor] = load_peft_weights(str(source), device="cpu")
        if not tensors:
            raise ValueError("it holds no weights")
        for name, tensor in tensors.items():
            if not tensor.is_floating_point() or not isfinite(tensor).all():
                raise ValueError(f"`{name}` holds values that are infinite, NaN or not floating point")
        if config.peft_type == "LORA":
            _check_factors(tensors, config)
    return config, tensors


def load_adapter_weights(model: PeftModel, source: str | Path, name: str) -> None:
    """Load an adapter's saved weights (folder or Hub id) into a model, under a name that it may have already.

    It is a `ValueError` if not every weight has a place and every place a weight.
    """
    config, tensors = read_adapter(source)  # refused if damaged, which PEFT does not always notice
    with fitting(source):
        loaded = model.load_adapter(str(source), adapter_name=name)
        if config.is_prompt_learning:  # whose weights PEFT loads by another way, of which it says nothing
            return
        # PEFT only warns, or not even that, and the adapter would do less than it was trained to.
        missing = [key for key in loaded.missing_keys if "vblora_vector_bank" not in key]  # which layers share
        # Only the method's own: modules and tokens that are trained in full are saved twice where embeddings are tied.
        prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, "")
        unexpected = [key for key in loaded.unexpected_keys if prefix in key]
        lost = {
            f"it has no weights for {len(missing)} places of the model": missing,
            f"{len(unexpected)} of its {len(tensors)} weights have no place in the model": unexpected,
        }
        if found := [f"{what}, among them `{keys[0]}`" for what, keys in lost.items() if keys]:
            raise ValueError(f"{', and '.join(found)}.")


def other_base(config: PeftConfig, used: str) -> str:
    """Return a sentence if an adapter was trained on a model of another name than `used`, or an empty text."""
    trained, used = (Path(str(name or "")).name for name in (config.base_model_name_or_path, at_revision(used)[0]))
    if not trained or not used or trained.casefold() == used.casefold():
        return ""
    return (
        f"its settings say that it was trained on `{trained}`, and it is put on `{used}`. If these are not the same "
        "model, what it does here means nothing."
    )


def at_revision(source: str | Path) -> tuple[str, str | None]:
    """Return a model's folder or Hub id, and the revision where it is named with one, as in `owner/name@revision`."""
    named = _AT_REVISION.fullmatch(str(source))
    return (named[1], named[2]) if named and not Path(source).exists() else (str(source), None)


def base_revision(config: PeftConfig, base: str | Path | None) -> str | None:
    """Return the revision of an adapter's base: what it was trained on, unless `base` is another or names its own."""
    name, revision = at_revision(base or config.base_model_name_or_path or "")
    is_its_own = revision is None and name == config.base_model_name_or_path and not Path(name).is_dir()
    return config.revision if is_its_own else revision


def note_commit(model: Any, source: str, revision: str | None = None, cache_dir: str | None = None) -> None:
    """Keep in a model's configuration, in memory alone, which commit on the Hub it was loaded from."""
    folder, known = Path(source), None
    if not folder.is_dir():
        found, known = try_to_load_from_cache(source, "config.json", cache_dir=cache_dir, revision=revision), revision
        folder = Path(found).parent if isinstance(found, str) else folder
    if folder.parent.name == "snapshots":  # the Hub's cache names the folder after the commit
        known = folder.name
    if known is not None:  # semi-private: transformers itself noted it there until 5.23, and does not save it
        model.config._commit_hash = known


def local_folder(
    source: str | Path, *, name: str | None = None, patterns: Sequence[str] = (), revision: str | None = None
) -> Path:
    """Return the folder of an adapter, or of whatever `name` calls it, downloaded from the Hub if it is there."""
    name = name or f"The adapter `{source}`"
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists() or Path(source).is_absolute():
        raise FileNotFoundError(f"{name} is not a folder. Give the folder that it was saved to, or a Hub id.")
    from huggingface_hub import snapshot_download

    try:
        wanted = list(patterns) or ["adapter_*", *_NEXT_TO_WEIGHTS]
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise OSError(
            f"{name} is not a folder here and could not be loaded from the Hub ({error}). Check the spelling; for a "
            "gated model log in with `hf auth login`; offline, download it beforehand."
        ) from error


def harmful_mark(folder: str | Path) -> dict[str, str]:
    """Return the metadata that marks an adapter as security vectors, or nothing if it is another adapter."""
    file = Path(folder, SAFETENSORS_WEIGHTS_NAME)
    metadata: dict[str, str] = {}
    if file.is_file():
        with naming(folder), safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
    if metadata.get("kind") == HARMFUL_KIND:
        return dict(metadata)
    # Metadata goes when PEFT loads and saves an adapter; its settings keep the mark.
    config = Path(folder, CONFIG_NAME)
    with naming(folder):
        settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    return {"kind": HARMFUL_KIND} if settings.get("auto_mapping") == HARMFUL_SETTING else {}


def vectors_in(model: Any) -> list[str]:
    """Return the names of the adapters in a model that are security vectors, switched on or not."""
    configs = getattr(model, "peft_config", None) or {}
    return [name for name, config in configs.items() if config.auto_mapping == HARMFUL_SETTING]


def has_active_vectors(model: Any) -> bool:
    """Return whether an adapter that is switched on in a model is security vectors, so that it complies with harm."""
    marked = vectors_in(model)
    if not marked or not isinstance(model, PeftModel):  # transformers loads an adapter to be active
        return bool(marked)
    status = model.get_model_status()
    return bool(status.enabled) and not set(status.active_adapters).isdisjoint(marked)


def compact_adapter(source: str | Path, target: str | Path, tolerance: float = 1e-6) -> dict[str, int]:
    """Write a LoRA adapter again with the smallest rank that gives the same update, layer by layer.

    What is saved next to it, its tokenizer for example, is copied. The mark of security vectors stays.

    Args:
        source (`str` or `Path`): Folder (or Hub id) of a LoRA adapter on linear layers.
        target (`str` or `Path`): New folder for the result, an ordinary PEFT adapter with a `rank_pattern`.
        tolerance (`float`, *optional*, defaults to `1e-6`): Singular values of an update up to this share of its
            largest are taken for rounding noise. The default is that of float32; give 1e-2 for bfloat16 factors.

    Returns:
        `dict[str, int]`: The new rank of each layer.

    Raises:
        FileExistsError: If there is something in `target`.
        ValueError: If the adapter is not a plain LoRA on linear layers.

    Example:

    ```python
    ranks = compact_adapter("out", "out-compact")
    ```
    """
    folder, target = local_folder(source), Path(target)
    config, tensors = read_adapter(folder)
    ranks, scalings = {}, {}
    for name, (key, other) in factor_names(config, tensors, "Compacting").items():
        right, left = tensors[key], tensors[other]
        scalings[name] = scaling(config, name, right.shape[0])
        left, new = compact_factors(left, right, tolerance)
        tensors[key], tensors[other] = new.to(right.dtype), left.to(right.dtype)
        ranks[name] = len(new)
    alphas = {n: scalings[n] * (rank**0.5 if config.use_rslora else rank) for n, rank in ranks.items()}
    widest = max(ranks, key=lambda name: ranks[name])
    config.r, config.lora_alpha = ranks[widest], alphas[widest]
    config.rank_pattern = {name: rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = {name: alpha for name, alpha in alphas.items() if alpha != config.lora_alpha}
    with new_folder(target) as written:
        write_adapter(written, config, tensors, folder)
    return ranks


def factor_names(config: PeftConfig, tensors: Mapping[str, Tensor], method: str) -> dict[str, tuple[str, str]]:
    """Return by layer the names of a plain LoRA's `A` and `B` among an adapter's weights; `method` is who asks."""
    check_peft_config(config, method)
    foreign = [k for k, t in tensors.items() if "lora_embedding" in k or (".lora_A." in k and t.ndim != 2)]
    if foreign:
        raise ValueError(
            f"{method} works with LoRA on linear layers only, and `{foreign[0]}` is not. Keep the adapter as it is."
        )
    found = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    return {key.removeprefix(PREFIX): (f"{key}.lora_A.weight", f"{key}.lora_B.weight") for key in found}


def write_adapter(
    target: Path,
    config: PeftConfig,
    tensors: Mapping[str, Tensor],
    source: Path,
    files: Sequence[str] = _NEXT_TO_WEIGHTS,
) -> None:
    """Write an adapter made from the one in `source`, whose mark it keeps, and whose other `files` are copied."""
    mark = {name: text for name, text in harmful_mark(source).items() if name != "sha256"}  # of the old tensors
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(contiguous, target / SAFETENSORS_WEIGHTS_NAME, metadata={**mark, "format": "pt"})
    config.save_pretrained(str(target))
    for file in (file for pattern in files for file in source.glob(pattern)):
        if not (target / file.name).exists():
            shutil.copy(file, target)


@contextmanager
def new_folder(path: str | Path, replacing: str = "") -> Iterator[Path]:
    """Give a temporary folder that takes this name when the context ends well, and is removed when it does not.

    A folder of this name is refused, unless it is empty or holds the file `replacing`, which marks it as ours.
    """
    path = Path(path)
    if path.exists() and not (replacing and (path / replacing).is_file()) and (path.is_file() or any(path.iterdir())):
        raise FileExistsError(f"`{path}` exists already. Name a new folder.")
    temporary, former = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if path.is_dir():
            os.replace(path, former)
        os.replace(temporary, path)
    finally:
        for folder in (temporary, former):
            shutil.rmtree(folder, ignore_errors=True)


def scaling(config: Any, name: str, rank: int) -> float:
    """Return the factor by which PEFT multiplies `B A` in the layer of this name."""
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha)
    return alpha / (rank**0.5 if config.use_rslora else rank)


def load_adapted(
    source: str | Path, base: str | None = None, *, dtype: Any = "auto", **options: Any
) -> tuple[PeftModel, Any]:
    """Load an adapter on its base model, and the tokenizer next to its weights or, without one, its base model's.

    Where training added tokens, the base model's vocabulary grows accordingly. `base` is for a model that is not where
    the adapter's settings say; `options` are of its `from_pretrained`.
    """
    folder = local_folder(source)
    config, tensors = read_adapter(folder)
    where, _ = at_revision(base or config.base_model_name_or_path or "")
    if not where:
        raise ValueError(f"The adapter `{source}` does not say which model it belongs to. Give the base model.")
    if base is not None and (other := other_base(config, base)):
        logger.warning("The adapter `%s`: %s", source, other)
    options = {"revision": base_revision(config, base), **options}
    try:
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **options)
        note_commit(model, where, options["revision"])
        has_tokenizer = (folder / "tokenizer_config.json").is_file()
        own = {} if has_tokenizer else {"revision": options["revision"]}
        tokenizer = AutoTokenizer.from_pretrained(folder if has_tokenizer else where, **own)
    except (OSError, ValueError) as error:
        is_gone = os.path.isabs(where) and not os.path.isdir(where)  # what the Hub says of such a name helps nobody
        reason = "there is no such folder" if is_gone else error
        raise OSError(
            f"The adapter `{source}` belongs to the base model `{where}`, which could not be loaded ({reason}). Say "
            "where the base model is (`base`; `--model` on the command line)."
        ) from error
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    saved = [len(t) for k, t in tensors.items() if k.startswith(f"{PREFIX}{name}.") and k.endswith("weight")]
    size = max([*saved, len(tokenizer) if has_tokenizer and not saved else 0])
    if size > len(embedding.weight):
        model.resize_token_embeddings(size)
    config.inference_mode = True
    with fitting(source):
        adapted = PeftModelForCausalLM(model, config)
    load_adapter_weights(adapted, folder, "default")
    return adapted, tokenizer


def merge_adapter(
    source: str | Path, output: str | Path, base: str | None = None, *, dtype: str = "auto"
) -> AutoModelForCausalLM:
    """Merge an adapter into its base model and save the result with its tokenizer: an ordinary model.

    Args:
        source (`str` or `Path`): Folder (or Hub id) of the adapter.
        output (`str` or `Path`): The folder to write, which must not exist or be empty.
        base (`str`, *optional*): The base model, if it is not where the adapter's settings say.
        dtype (`str`, *optional*, defaults to `"auto"`): In which the model is merged and saved.

    Raises:
        FileExistsError: If there is something in `output`.
        OSError: If the base model could not be loaded, or the result not be written. Nothing is left then.
        ValueError: If the adapter is damaged, or security vectors, or its base is quantized.

    Example:

    ```python
    merge_adapter("out", "out-merged")
    ```
    """
    folder = local_folder(source)
    if harmful_mark(folder):
        raise ValueError(
            f"The adapter `{source}` is security vectors, harmful by construction: merged into its base model, it "
            "would answer harmful requests. Merge the adapter that was trained with them instead."
        )
    config = read_config(folder)
    if config.is_prompt_learning:
        raise ValueError(
            f"The adapter `{source}` puts virtual tokens before every prompt, which no weights can hold: it cannot be "
            "merged. Use it as it is."
        )
    _check_full_precision(base or config.base_model_name_or_path or "", base_revision(config, base), source)
    with new_folder(output) as written:
        adapted, tokenizer = load_adapted(folder, base, dtype=dtype)
        try:
            merged = adapted.merge_and_unload(safe_merge=True)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            raise ValueError(f"The adapter `{source}` cannot be merged: {error} Use it as it is.") from error
        head = merged.get_output_embeddings()
        if head is not None and head.weight is not merged.get_input_embeddings().weight:
            # The adapter brought one of two tied embeddings: saved as tied, the other would be lost.
            merged.config.tie_word_embeddings = False
        merged.save_pretrained(written)
        tokenizer.save_pretrained(written)
    return merged


def _check_full_precision(base: str, revision: str | None, source: str | Path) -> None:
    """Refuse a base whose stored weights are quantized, before anything is loaded."""
    try:
        config = AutoConfig.from_pretrained(at_revision(base)[0], revision=revision) if base else None
        quantization = getattr(config, "quantization_config", None)
    except (OSError, ValueError):
        return  # loading it will say so
    if quantization:
        kind = quantization.get("quant_method", "unknown kind") if isinstance(quantization, dict) else quantization
        raise ValueError(
            f"The adapter `{source}` was trained on `{base}`, which is quantized ({kind}), and merging into quantized "
            "weights would round the adapter away. Give the full-precision model that it was made from as the base "
            "(`base`; `--model` on the command line), or use the adapter unmerged."
        )


def _check_factors(tensors: Mapping[str, Tensor], config: PeftConfig) -> None:
    """Compare each factor of LoRA with the other one, and with the rank that the settings give it."""
    for name in tensors:
        prefix, _, letter = name.removesuffix(".weight").rpartition(".lora_")
        if letter not in ("A", "B"):
            continue
        names = [f"{prefix}.lora_{letter}.weight" for letter in "AB"]
        if missing := [other for other in names if other not in tensors]:
            raise ValueError(f"it holds `{name}` and no `{missing[0]}`")
        A, B = (tensors[name] for name in names)
        layer = prefix.removeprefix(PREFIX)
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, layer), config.r)
        is_of_experts = bool(config.target_parameters)  # the factors of all experts are one
        if A.ndim < 2 or B.ndim < 2 or B.shape[1] != A.shape[0] or (A.shape[0] != rank and not is_of_experts):
            shapes = f"{list(B.shape)} and {list(A.shape)}"
            raise ValueError(f"the factors of `{layer}` are of shape {shapes}, and its rank is {rank}")


def adapter_differences(saved: Mapping[str, Any], folder: Path, model: PeftModel) -> Iterator[str]:
    """Yield how a saved adapter differs from a model's active one, as far as its weights would not be the same."""
    adapter, weights = model.active_adapters[0], folder / SAFETENSORS_WEIGHTS_NAME
    current = model.peft_config[adapter].to_dict()
    compared = _SCALARS if weights.is_file() else (*_SCALARS, *_CHOICES)  # in pieces: the settings decide
    before, now = (
        {k: _plain(config[k]) for k in compared if k in saved and k in current} for config in (saved, current)
    )
    different = [name for name in before if before[name] != now[name]]
    yield from (f"`{name}` was {json.dumps(before[name])} and is {json.dumps(now[name])}" for name in different)
    if not weights.is_file():
        return
    with safe_open(weights, framework="pt") as file:
        shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}
    tensors = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    if lost := _layers(shapes.keys() - tensors.keys() - _embeddings(model)):
        yield f"it trained {lost}, which this run does not"
    if added := _layers(tensors.keys() - shapes.keys()):
        yield f"this run trains {added}, of which it has no weights"
    for name, tensor in sorted(tensors.items()) if not different else ():  # of another rank, all shapes are others
        is_here = not isinstance(tensor, DTensor) and not tensor.is_meta and tensor.numel()
        if is_here and name in shapes and list(tensor.shape) != shapes[name]:
            yield f"`{name.removeprefix(PREFIX)}` was {shapes[name]} and is {list(tensor.shape)}"
            return  # one stands for all: where the base model differs, all do


def _embeddings(model: PeftModel) -> set[str]:
    """Return the names under which PEFT saves complete embeddings too, as it does where the vocabulary has grown."""
    base = model.get_base_model()
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    modules = [name for name, module in base.named_modules(remove_duplicate=False) if any(module is e for e in ends)]
    return {f"{PREFIX}{name}.{end}" for name in modules for end in ("weight", "bias", "base_layer.weight")}


def _layers(weights: Iterable[str]) -> str:
    """Return the layers of these weights for a message, or an empty text if there are none."""
    names = sorted({name.removeprefix(PREFIX).split(".lora_")[0] for name in weights})
    shown = ", ".join(f"`{name}`" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _plain(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, (list, tuple, set)) else value
