"""From a recipe to a trainer: TRL's arguments, the model's quantization, the methods, the monitors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .document import RecipeError, dotted

if TYPE_CHECKING:
    from datasets import Dataset

    from ..data import PromptSet
    from ..trainer import SafeSFTTrainer
    from .load import Recipe


def arguments(recipe: Recipe) -> Any:
    """Return TRL's arguments for a recipe; refused if they contradict each other or do not fit this machine."""
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


def make_trainer(recipe: Recipe, rows: Dataset) -> SafeSFTTrainer:
    """Build the trainer of a recipe: loads the model and lets the methods prepare."""
    from ..trainer import SafeSFTTrainer

    model = recipe.parts.model
    args = arguments(recipe)
    args.disable_tqdm = True  # callbacks show the progress
    args.model_init_kwargs = {"dtype": model.dtype, "revision": model.revision}
    return SafeSFTTrainer(
        model=model.path,
        args=args,
        train_dataset=rows,
        quantization_config=_quantization(model.quantization, args.bf16),
        peft_config=recipe.peft,
        safety=recipe.safety,
    )


def add_monitors(recipe: Recipe, trainer: SafeSFTTrainer, prompt_sets: list[PromptSet]) -> None:
    """Let what the recipe's `monitor` asks for be measured while training, and logged beside the loss."""
    from ..analysis.drift_monitor import DriftMonitor
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
