"""Running a recipe, from its data to the report: `run_recipe` is the one workflow of command line and app."""

from __future__ import annotations

import copy
import gc
import json
import os
import shlex
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from .. import __version__
from ..data import PromptSet
from .load import Recipe
from .model import arguments
from .paths import moved
from .sources import LoadedData, askable, count_tokens, load_data

if TYPE_CHECKING:
    from trl import SFTConfig

    from ..evaluation import Comparison
    from ..trainer import SafeSFTTrainer

TUNED, REPAIRED = "fine-tuned", "repaired"
_DECODING = {"max_new_tokens", "batch_size", "system_prompt"}  # of `evaluation`: how it asks, while training as well


class RunCallbacks:
    """What a run reports while it goes on; override what you want to show. The defaults do nothing.

    Example:

    ```python
    class Printer(RunCallbacks):
        def message(self, text):
            print(text)


    run_recipe(read_recipe("recipe.yaml"), Printer())
    ```
    """

    def stage(self, name: str) -> None:
        """Receive the stage that begins: loading, preparing, training, saving, comparing or done."""

    def progress(self, done: int, total: int) -> None:
        """Receive how far the stage is: optimizer steps while training, prompts while comparing."""

    def log(self, entry: Mapping[str, float]) -> None:
        """Receive an entry of the trainer's log (losses, penalties, monitors' rates) with its `step`."""

    def message(self, text: str) -> None:
        """Receive a sentence for the user: a data report, a warning, a conclusion."""

    def should_stop(self) -> bool:
        """Return whether to stop after the current step, with a checkpoint to resume from."""
        return False


@dataclass(frozen=True)
class RunResult:
    """What a run has produced.

    Args:
        output (`Path`): The folder of the adapter or model, the recipe and the report.
        steps (`int`): Optimizer steps taken.
        metrics (`dict[str, float]`): What the trainer measured: runtime, loss.
        comparison ([`Comparison`], *optional*): The model before and after; `None` without an evaluation.
        files (`list[Path]`): Report and model card.
        stopped (`bool`): Whether `RunCallbacks.should_stop` ended training; then only a checkpoint is saved.
        compare_command (`str`, *optional*): The command to compare with afterwards, where several processes each hold
            a part of the model.
    """

    output: Path
    steps: int
    metrics: dict[str, float] = field(default_factory=dict)
    comparison: Comparison | None = None
    files: list[Path] = field(default_factory=list)
    stopped: bool = False
    compare_command: str | None = None


def run_recipe(
    recipe: Recipe, callbacks: RunCallbacks | None = None, *, resume: bool = False, compare: bool = True
) -> RunResult:
    """Carry out a recipe: load and check its data, train, save, compare before and after, write report and card.

    Args:
        recipe ([`Recipe`]): From [`read_recipe`].
        callbacks ([`RunCallbacks`], *optional*): Receives stages, progress, log entries and messages.
        resume (`bool`, *optional*, defaults to `False`): Go on from the last complete checkpoint in the output.
        compare (`bool`, *optional*, defaults to `True`): Whether to ask the prompts of `evaluation` before and after.

    Returns:
        [`RunResult`]: Output folder, comparison and files.

    Raises:
        RecipeError: If the recipe does not fit its model.
        ValueError: If the output holds a run already, there is nothing to resume from, or data cannot be read.
        OSError: If the output cannot be written.
        KeyboardInterrupt: After Ctrl-C; a checkpoint is saved and reported by then.
    """
    asked = callbacks or RunCallbacks()
    callbacks = asked if _is_first_process() else RunCallbacks()  # the others run silently
    output = recipe.parts.output
    check_output(output, resume)

    callbacks.stage("loading")
    loaded, args = load_data(recipe), arguments(recipe)
    for text in [*loaded.messages(), *count_tokens(recipe, loaded, args).messages()]:
        callbacks.message(text)

    callbacks.stage("preparing")
    trainer = make_trainer(recipe, loaded, args)
    add_callbacks(recipe, trainer, loaded.prompt_sets)

    callbacks.stage("training")
    metrics, stopped = _train(recipe, trainer, asked, callbacks, resume)
    result = RunResult(Path(output), trainer.state.global_step, metrics, stopped=stopped)
    if stopped:
        return result
    if unlearned := barely_learned(trainer.state.log_history, trainer.args.learning_rate):
        callbacks.message(unlearned)

    with _reporting_interrupts(recipe, callbacks):
        callbacks.stage("saving")
        with _saving(recipe):
            trainer.save_model(output)
        if trainer.is_world_process_zero():
            adapters = _save_results(recipe, loaded, trainer, callbacks)
            result = _compare(recipe, loaded, trainer, callbacks, result, adapters, compare)
    callbacks.stage("done")
    return result


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def check_output(output: str, resume: bool) -> None:
    """Fail before training, not after, if the output is not writable, holds a run, or nothing to resume from."""
    from ..checkpoints import checkpoints_of

    if Path(output).exists() and not Path(output).is_dir():
        raise ValueError(f"`{output}` is a file. Choose a folder for the run with --set output=FOLDER.")
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        problem = f"`{output}` cannot be written ({error.strerror}). Choose another folder with --set output=FOLDER."
        raise OSError(error.errno, problem) from error
    if not _is_first_process():  # another process may have begun to write there
        return
    found = checkpoints_of(Path(output))  # the trainer checks which is complete: all processes resume from the same
    if resume and not found:
        raise ValueError(
            f"There is no checkpoint in `{output}` to resume from. Leave out --resume, or check `output`."
        )
    if found and not resume:
        raise ValueError(
            f"`{output}` holds a run, up to `{found[-1]}`. Resume it with --resume, or choose another `output`."
        )
    if not resume and Path(output, "recipe.yaml").is_file():
        raise ValueError(f"`{output}` holds a finished run. Choose another with --set output=FOLDER, or remove it.")


def make_trainer(recipe: Recipe, loaded: LoadedData, args: SFTConfig) -> SafeSFTTrainer:
    """Build the trainer of a recipe: loads the model and lets the methods prepare."""
    from ..lora.io import note_commit
    from ..lora.loading import quantized
    from ..trainer import SafeSFTTrainer

    model, peft = recipe.parts.model, copy.copy(recipe.peft)
    if peft is not None and model.revision is not None:
        peft.revision = model.revision  # for whoever loads the adapter, also without methods
    args.disable_tqdm = True  # callbacks show the progress
    args.model_init_kwargs = {"dtype": model.dtype, "revision": model.revision}
    trainer = SafeSFTTrainer(
        model=model.path,
        args=args,
        train_dataset=loaded.rows,
        eval_dataset=loaded.eval_rows,
        peft_config=peft,
        safety=recipe.safety,
        **quantized(model.quantization, args.bf16),
    )
    note_commit(trainer.model, model.path, model.revision)
    return trainer


def model_options(recipe: Recipe) -> dict[str, Any]:
    """Return the options of [`load_model`] with which training loads the model of a recipe, to ask it afterwards."""
    from ..lora.loading import quantized

    model = recipe.parts.model
    given = {name: value for name in ("dtype", "revision") if (value := getattr(model, name)) is not None}
    return given | quantized(model.quantization, arguments(recipe).bf16)


def add_callbacks(recipe: Recipe, trainer: SafeSFTTrainer, prompt_sets: list[PromptSet]) -> None:
    """Add the moving average that `ema` asks for, and what `monitor` measures while training, next to the loss."""
    from ..analysis.drift_monitor import DriftMonitor
    from ..evaluation import Decoding, RefusalMonitor
    from ..methods.adapter_ema import AdapterEMA

    if recipe.parts.ema is not None:
        trainer.add_callback(AdapterEMA(recipe.parts.ema))
    asked = recipe.parts.monitor
    if asked is None:
        return
    trainer.add_callback(DriftMonitor(trainer, asked.every, direction=asked.direction, basis=asked.basis))
    sets = [prompts.spread(asked.prompts) for prompts in prompt_sets if prompts.kind != "task" and asked.prompts]
    if sets and recipe.parts.evaluation is not None:
        decoding = Decoding(**recipe.parts.evaluation.model_dump(include=_DECODING))
        trainer.add_callback(RefusalMonitor(trainer, sets, asked.every, decoding=decoding))


def _train(
    recipe: Recipe, trainer: SafeSFTTrainer, asked: RunCallbacks, shown: RunCallbacks, resume: bool
) -> tuple[dict[str, float], bool]:
    """Train, and return the trainer's metrics and whether `should_stop` ended it."""
    from transformers import PrinterCallback, ProgressCallback, TrainerCallback

    class Events(TrainerCallback):
        stopped = False

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            shown.progress(state.global_step, state.max_steps)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            shown.progress(state.global_step, state.max_steps)
            if asked.should_stop():  # in every process
                self.stopped = control.should_training_stop = control.should_save = True

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            numbers = {name: v for name, v in (kwargs.get("logs") or {}).items() if isinstance(v, int | float)}
            shown.log({"step": state.global_step, "max_steps": state.max_steps, **numbers})

    events = Events()
    trainer.add_callback(events)
    for printer in (PrinterCallback, ProgressCallback):  # in their place, `shown` has steps and log entries
        trainer.remove_callback(printer)
    trainer.resume_command, trainer.stops_gracefully = recipe.command("--resume"), True
    try:
        return trainer.train(resume_from_checkpoint=resume).metrics, events.stopped
    except KeyboardInterrupt as error:
        if not error.args:  # the trainer has saved and reported nothing: a second Ctrl-C, or one after training
            step, output = trainer.state.global_step, recipe.parts.output
            shown.message(f"Stopped after step {step}. If `{output}` holds a checkpoint, --resume goes on from it.")
        raise


def barely_learned(history: list[dict[str, Any]], learning_rate: float) -> str:
    """Return a warning if the loss hardly fell between the first and the last entries of a trainer's log."""
    losses = [entry["loss"] - entry.get("safety_penalty", 0.0) for entry in history if "loss" in entry]
    if len(losses) < 4:
        return ""
    count = max(1, len(losses) // 5)
    first, last = sum(losses[:count]) / count, sum(losses[-count:]) / count
    if last < 0.9 * first or first < 0.1:  # nats per token: such rows were known before
        return ""
    return (
        f"The training loss hardly fell ({first:.2f} → {last:.2f} nats per token): little or nothing was learned, so "
        "kept refusals prove little. Raise `training.learning_rate` (it is "
        f"{learning_rate:g}; 1e-4 to 2e-4 is usual for a LoRA), or train for more steps."
    )


@contextmanager
def _reporting_interrupts(recipe: Recipe, callbacks: RunCallbacks) -> Iterator[None]:
    """Report what is left when Ctrl-C comes after training."""
    try:
        yield
    except KeyboardInterrupt:
        kept, go_on = _left(recipe)
        callbacks.message(f"Stopped by Ctrl-C after training. {kept}; {go_on}")
        raise


@contextmanager
def _saving(recipe: Recipe) -> Iterator[None]:
    """Explain a disk that is full, or a folder that cannot be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        kept, go_on = _left(recipe)
        raise OSError(
            f"What was trained could not be saved in `{recipe.parts.output}` ({error}). {kept}. Free some space or "
            f"make the folder writable, and {go_on}"
        ) from error


def _left(recipe: Recipe) -> tuple[str, str]:
    """Return which checkpoint is left when the end of training was not saved, and how to resume from it."""
    from ..checkpoints import last_complete

    output = recipe.parts.output
    complete = last_complete(output)
    if complete is not None:
        return f"The last checkpoint, `{complete}`, is intact", f"resume with: {recipe.command('--resume')}"
    return f"There is no checkpoint in `{output}`", "train again, with a `training.save_strategy`."


def _save_results(
    recipe: Recipe, loaded: LoadedData, trainer: SafeSFTTrainer, callbacks: RunCallbacks
) -> dict[str, str]:
    """Save the recipe and the methods' report next to what was trained, and return the folders to compare by name."""
    from .model_card import SAFETY_REPORT

    output, report = recipe.parts.output, getattr(trainer, "safety_report", {})
    with _saving(recipe):
        saved = save_recipe(recipe, loaded)
        Path(output, SAFETY_REPORT).unlink(missing_ok=True)
        if report:
            Path(output, SAFETY_REPORT).write_text(json.dumps(report, indent=1), encoding="utf-8")
    again = shlex.join(["safe-trainer", "train", str(saved), "--set", f"output={output}-again"])
    callbacks.message(f"Saved to {output}. Run the same recipe again with: {again}")
    return {TUNED: output} | ({} if recipe.parts.safe_lora is None else {REPAIRED: _repair(recipe, callbacks)})


def save_recipe(recipe: Recipe, loaded: LoadedData) -> Path:
    """Save the recipe as it was run, with versions and hashes, next to its results, so that it can be run again."""
    from ..evaluation.manifest import file_sha256
    from .model_card import yaml_text

    output = Path(recipe.parts.output)
    values = moved(recipe.values, (), recipe.path.parent, output)
    made = {"seed": 42} | ({} if recipe.peft is None else {"learning_rate": recipe.training["learning_rate"]})
    values["training"] = {**made, **(values.get("training") or {})}  # defaults, which may change
    values.setdefault("peft", recipe.parts.peft)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft"))
    lines = [f"# Run from {recipe.path.name} with safe_trainer {__version__}, {versions}"]
    for report in loaded.reports:
        source = Path(report.source)
        digest = f", sha256 {file_sha256(source)}" if source.is_file() else ""
        lines.append(f"# Read {source.name}: {report.format}, {report.rows} rows{digest}")
    path = output / "recipe.yaml"
    path.write_text("\n".join(lines) + "\n" + yaml_text(values), encoding="utf-8")
    return path


def _repair(recipe: Recipe, callbacks: RunCallbacks) -> str:
    """Repair the adapter by Safe LoRA, and return the folder of the result."""
    from ..lora.io import REPAIR_REPORT, new_folder
    from ..methods.safe_lora import apply_safe_lora, summary

    asked = recipe.parts.safe_lora
    assert asked is not None  # otherwise there is nothing to repair
    folder = os.path.join(recipe.parts.output, "safe-lora")
    with _saving(recipe), new_folder(folder, replacing=REPAIR_REPORT) as made:  # of the weights before, on resuming
        report = apply_safe_lora(recipe.parts.output, made, aligned=recipe.parts.model.path, **asked.model_dump())
    callbacks.message(f"Saved a repaired adapter to {folder}: {summary(report)}.")
    return folder


def _compare(  # noqa: PLR0913, what one run has by now
    recipe: Recipe,
    loaded: LoadedData,
    trainer: SafeSFTTrainer,
    callbacks: RunCallbacks,
    result: RunResult,
    adapters: dict[str, str],
    compare: bool,
) -> RunResult:
    """Compare the model before and after, and write report and card."""
    from ..distributed import strategy_of
    from ..evaluation import write_report
    from .model_card import publish, write_model_card

    output, comparison, files = recipe.parts.output, None, []
    by_hand, is_sharded = None, strategy_of(trainer.accelerator, trainer.model).is_sharded
    if loaded.prompt_sets and (is_sharded or not compare):
        with _saving(recipe):
            by_hand = _compare_command(recipe, loaded, adapters)
    if by_hand is not None and compare:
        callbacks.message(f"Each process holds a part of the model only, so compare it afterwards with:\n{by_hand}")
    elif loaded.prompt_sets and compare:
        callbacks.stage("comparing")
        comparison = examine(recipe, trainer, loaded.prompt_sets, adapters, callbacks.progress)
        with _saving(recipe):
            files = list(write_report(comparison, output))
        for name in adapters:
            for sentence in [comparison.verdict(name).headline, *comparison.sentences(name)]:
                callbacks.message(sentence)
    with _saving(recipe):
        if comparison is None:
            _set_aside(Path(output), callbacks)
        files += [write_model_card(folder, comparison, name=name) for name, folder in adapters.items()]
    callbacks.message(f"Wrote {', '.join(map(str, files))}")
    callbacks.message(protection(getattr(trainer, "safety_report", {}), comparison, by_hand))
    if trainer.args.push_to_hub:  # the trainer has pushed before there was a report
        write_model_card(output, comparison, name=TUNED, repository=trainer.hub_model_id)
        publish(output, trainer.hub_model_id)
    return replace(result, comparison=comparison, files=files, compare_command=by_hand)


def _set_aside(folder: Path, callbacks: RunCallbacks) -> None:
    """Rename a comparison that was made before the run went on: its rates are of other weights."""
    if former := [path for path in sorted(folder.glob("comparison.*")) if path.is_file()]:
        for path in former:
            path.replace(folder / f"former-{path.name}")
        callbacks.message(f"Renamed the comparison of the weights before to {folder / f'former-{former[0].name}'}.")


def _compare_command(recipe: Recipe, loaded: LoadedData, adapters: Mapping[str, str]) -> str:
    from ..evaluation.report.content import asked_options
    from ..lora.loading import named

    asked, kind = recipe.parts.evaluation, "--adapter" if recipe.peft is not None else "--tuned-model"
    assert asked is not None  # otherwise there are no prompt sets either
    options = [part for name, folder in adapters.items() for part in (kind, f"{name}={folder}")]
    model = recipe.parts.model
    options += ["--dtype", model.dtype] if model.dtype != "auto" else []
    options += ["--quantization", model.quantization] if model.quantization else []
    options += asked_options(askable(recipe, loaded.prompt_sets))
    options += [part for judge in asked.judges for part in ("--judge", judge)]
    options += ["--system-prompt", asked.system_prompt] if asked.system_prompt else []
    options += ["--max-new-tokens", str(asked.max_new_tokens), "--batch-size", str(asked.batch_size)]
    base = named(model.path, model.revision)
    return shlex.join(["safe-trainer", "compare", base, *options, "--output", recipe.parts.output])


def examine(
    recipe: Recipe,
    trainer: SafeSFTTrainer,
    prompt_sets: list[PromptSet],
    adapters: Mapping[str, str],
    progress: Any = None,
) -> Comparison:
    """Ask the model before and the model after the same prompts; adapters are read back from where they were saved."""
    from ..analysis.drift_monitor import DriftFigures
    from ..evaluation import Comparison, compare, evaluate
    from ..evaluation.judges import make_judges
    from ..evaluation.prompting import tokenizer_in
    from ..lora.loading import load_weights
    from ..lora.modes import without_autocast
    from ..lora.updates import keeps_base

    asked = recipe.parts.evaluation
    assert asked is not None  # otherwise there are no prompt sets either
    settings: dict[str, Any] = asked.model_dump(include=_DECODING)
    settings |= {"judges": make_judges(asked.judges), "progress": progress}
    tokenizer = tokenizer_in(trainer.processing_class)
    if recipe.peft is not None and keeps_base(recipe.peft):
        return compare(trainer.model, tokenizer, prompt_sets, dict(adapters), drift=DriftFigures(), **settings)
    after = None
    if recipe.peft is None:
        with without_autocast(trainer.model):  # in which the model before does not compute
            after = evaluate(trainer.model, tokenizer, prompt_sets, name=TUNED, **settings)
    where = {"device_map": trainer.model.device, "dtype": trainer.model.dtype}
    trainer.model.cpu()
    gc.collect()  # the model before takes the place of the model after
    base = load_weights(recipe.parts.model.path, revision=recipe.parts.model.revision, **where)
    if after is None:
        return compare(base, tokenizer, prompt_sets, dict(adapters), drift=DriftFigures(), **settings)
    before = evaluate(base, tokenizer, prompt_sets, name="before", **settings)
    return Comparison((before, after))


def protection(report: Mapping[str, Any], comparison: Comparison | None, compare_command: str | None) -> str:
    """Return one line: what protected the run (the trainer's `safety_report`) and how strongly it was tested."""
    methods = [f"{name} (acts on {found['coverage']:.0%} of the trained weights)" for name, found in report.items()]
    protected = f"Protected by {' and '.join(methods)}." if methods else "Nothing protected this run (`safety: null`)."
    results = [] if comparison is None else [r for r in comparison.before.results if r.prompt_set.kind == "harmful"]
    if comparison is None or not results:
        why = f"compare it with: {compare_command}" if compare_command else "add harmful prompts to `evaluation`"
        return f"{protected} Whether refusals were kept was not tested: {why}."
    asked = []
    for before in results:
        rate = comparison.evaluations[1][before.prompt_set.name].rate("refused")
        asked.append(f"{before.subject('refused')} {before.rate('refused')} before, {rate} after")
    return f"{protected} Tested on harmful prompts: {'; '.join(asked)}."
