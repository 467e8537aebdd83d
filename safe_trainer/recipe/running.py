"""A recipe carried out: data loaded, trainer built, trained, saved with the recipe beside it, and examined."""

from __future__ import annotations

import gc
import hashlib
import logging
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .. import __version__
from ..data import PromptSet, Report, leaked_rows, load_prompts, load_rows
from ..evaluation.general import general_prompts
from .document import RecipeError, dotted
from .fitting import adapted, skeleton
from .sources import moved, reading_of, source_of
from .validation import Recipe

if TYPE_CHECKING:
    from datasets import Dataset

    from ..evaluation import Comparison
    from ..trainer import SafeSFTTrainer

logger = logging.getLogger(__name__)

TUNED = "fine-tuned"


@dataclass(frozen=True)
class Loaded:
    """The data of a recipe.

    Args:
        rows (`Dataset`): What is trained on, all sources together, as often as their weights say.
        prompt_sets (`list[PromptSet]`): What the model is examined with; empty without an evaluation.
        reports (`list[Report]`): What was found in each source.
        leaked (`dict[str, int]`): How many training rows ask what a prompt set will ask, by the set's name.
    """

    rows: Dataset
    prompt_sets: list[PromptSet]
    reports: list[Report]
    leaked: dict[str, int]


def load(recipe: Recipe) -> Loaded:
    """Load the training rows and the prompts of a recipe.

    Raises:
        ValueError: If one of its sources cannot be read, or they do not go together.
    """
    _check_model(recipe)
    reports: list[Report] = []
    rows = _training_rows(recipe, reports)
    sets = []
    for part in recipe.parts.evaluation.prompts if recipe.parts.evaluation else ():
        if part.built_in is not None:
            found = general_prompts(part.kind)
            sets.append(replace(found, name=part.name or found.name))
            continue
        prompts, report = load_prompts(source_of(part), part.kind, part.name, reading_of(part))
        sets.append(prompts)
        reports.append(report)
    leaked = {prompts.name: len(leaked_rows(rows, prompts)) for prompts in sets}
    return Loaded(rows, sets, reports, {name: count for name, count in leaked.items() if count})


def _check_model(recipe: Recipe) -> None:
    """See that the model is there, and that the recipe fits it, before data is read, which may take long."""
    from transformers import AutoConfig

    model = recipe.parts.model
    try:
        AutoConfig.from_pretrained(model.path, revision=model.revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The model `{model.path}` cannot be had: {str(error).strip()} Give a Hub id, or a folder that begins "
            "with ./, ../ or /; for a private or gated model, log in with `hf auth login`."
        ) from error
    try:
        empty = skeleton(recipe)
    except Exception:  # says nothing of the recipe: what is wrong is told when the model itself is loaded
        return
    adapted(recipe, empty)


def _training_rows(recipe: Recipe, reports: list[Report]) -> Dataset:
    from datasets import concatenate_datasets

    seed = recipe.training.get("seed", 42)
    parts: list[Dataset] = []
    for source in recipe.parts.data:
        rows, report = load_rows(source_of(source), reading_of(source))
        reports.append(report)
        whole, rest = divmod(source.weight, 1)
        parts += [rows] * int(whole)
        if rest:
            parts.append(rows.shuffle(seed=seed).select(range(max(1, round(rest * len(rows))))))
    kinds = {tuple(part.column_names) for part in parts}
    if len(kinds) > 1:
        formats = ", ".join(f"{report.source} ({report.format})" for report in reports)
        raise ValueError(f"Texts and conversations cannot be mixed in one run: {formats}. Bring them into one form.")
    return concatenate_datasets(parts)


def arguments(recipe: Recipe) -> Any:
    """Return TRL's arguments for a recipe.

    Raises:
        RecipeError: If they contradict each other, or ask for what this machine does not have.
    """
    import torch
    from trl import SFTConfig

    settings = {"report_to": "none", **recipe.training}
    if not torch.accelerator.is_available():
        # TRL's own default, bfloat16 on a GPU, is refused on a machine without one.
        settings = {"use_cpu": True, "bf16": False, **settings}
    try:
        return SFTConfig(output_dir=recipe.parts.output, **settings)
    except ValueError as error:
        # The libraries name the value that they do not know, but not the setting.
        texts = [name for name, value in recipe.training.items() if isinstance(value, str) and value]
        names = [name for name in texts if str(error).startswith(f"{recipe.training[name]} ")]
        place = ("training", *names[:1])
        raise RecipeError(recipe.document.name, [f"{recipe.document.where(place)}{dotted(place)}: {error}"]) from error


def make_trainer(recipe: Recipe, rows: Dataset, show_bars: bool = True) -> SafeSFTTrainer:
    """Build the trainer of a recipe: loads the model and lets the methods prepare."""
    from ..trainer import SafeSFTTrainer

    model = recipe.parts.model
    args = arguments(recipe)
    args.disable_tqdm = args.disable_tqdm or not show_bars
    args.model_init_kwargs = {"dtype": model.dtype, "revision": model.revision}
    return SafeSFTTrainer(
        model=model.path,
        args=args,
        train_dataset=rows,
        quantization_config=_quantization(model.quantization, args.bf16),
        peft_config=recipe.peft,
        safety=recipe.safety,
    )


def watch(recipe: Recipe, trainer: SafeSFTTrainer, prompt_sets: list[PromptSet]) -> None:
    """Let what the recipe's `monitor` asks for be measured while training, and logged beside the loss."""
    from ..analysis.drift import DriftMonitor
    from ..evaluation import RefusalMonitor

    asked = recipe.parts.monitor
    if asked is None:
        return
    drift = DriftMonitor(trainer, asked.every, direction=asked.direction, basis=asked.basis)
    trainer.add_callback(drift)
    sets = [prompts.first(asked.prompts) for prompts in prompt_sets if prompts.kind != "task" and asked.prompts]
    if sets:
        trainer.add_callback(RefusalMonitor(trainer, sets, asked.every))


def _quantization(bits: str | None, bf16: bool) -> Any:
    if bits is None:
        return None
    import torch
    from transformers import BitsAndBytesConfig

    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if bf16 else torch.float32
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def examine(recipe: Recipe, trainer: SafeSFTTrainer, prompt_sets: list[PromptSet], progress: Any = None) -> Comparison:
    """Ask the model before and the model after the same prompts; the adapter is read back from where it was saved."""
    from transformers import AutoModelForCausalLM

    from ..evaluation import Comparison, compare, evaluate

    asked = recipe.parts.evaluation
    assert asked is not None  # otherwise there are no prompt sets either
    decoding = asked.model_dump(include={"max_new_tokens", "batch_size", "system_prompt"})
    tokenizer = trainer.processing_class
    if recipe.peft is not None:
        adapters = {TUNED: recipe.parts.output}
        return compare(trainer.model, tokenizer, prompt_sets, adapters, progress=progress, **decoding)
    after = evaluate(trainer.model, tokenizer, prompt_sets, name=TUNED, progress=progress, **decoding)
    device, dtype = trainer.model.device, trainer.model.dtype
    trainer.model.cpu()
    gc.collect()  # the model before takes the place of the model after
    base = AutoModelForCausalLM.from_pretrained(recipe.parts.model.path, revision=recipe.parts.model.revision)
    base = base.to(device, dtype)
    before = evaluate(base, tokenizer, prompt_sets, name="before", progress=progress, **decoding)
    return Comparison((before, after))


def save_recipe(recipe: Recipe, loaded: Loaded) -> Path:
    """Write the recipe beside what came of it, as it was run and with the versions, so that it can be run again."""
    output = Path(recipe.parts.output)
    values = moved(recipe.values, (), recipe.path.parent, output)
    values["training"] = {
        "seed": 42,
        **(values.get("training") or {}),
    }  # TRL's default, which a later one may not share
    values.setdefault("peft", recipe.parts.peft)
    names = ("torch", "transformers", "trl", "peft")
    versions = ", ".join([f"safe_trainer {__version__}", *(f"{name} {version(name)}" for name in names)])
    lines = [f"# Run from {recipe.path.name} with {versions}"]
    for report in loaded.reports:
        digest = f", sha256 {_sha256(report.source)}" if Path(report.source).is_file() else ""
        lines.append(f"# Read {Path(report.source).name}: {report.format}, {report.rows} rows{digest}")
    path = output / "recipe.yaml"
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    path.write_text("\n".join(lines) + "\n" + text, encoding="utf-8")
    return path


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
