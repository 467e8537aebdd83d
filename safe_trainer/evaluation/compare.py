"""Compare a base model with adapters on it: one model in memory, whose adapters are loaded and removed in turn."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data import PromptSet
from .comparison import Comparison
from .evaluate import evaluate, offset
from .generate import INTERRUPTED, Progress
from .harness import Harness
from .judges import Judge, make_judges
from .manifest import adapter_provenance
from .results import Evaluation

logger = logging.getLogger(__name__)

BEFORE = "before"
DriftMeasure = Callable[[Any, Any, str | Path | None], Mapping[str, Mapping[str, float]]]
_EXAMINED = "examined"  # PEFT's name of the adapter while it is on


def compare(  # noqa: PLR0913, each is a setting with a name
    model: Any,
    tokenizer: Any,
    prompt_sets: Sequence[PromptSet],
    adapters: Mapping[str, str | Path | Sequence[str | Path]],
    *,
    judges: Sequence[Judge | str] | None = None,
    drift: DriftMeasure | None = None,
    harness: Harness | None = None,
    progress: Progress | None = None,
    **decoding: Any,
) -> Comparison:
    r"""Examine a base model, then the same model with each adapter, on the same prompts.

    Afterwards the model is as it was: the adapters are gone, and what was active and trainable is so again. To compare
    whole models, [`evaluate`] each and put the results into a [`Comparison`].

    Args:
        model (`PreTrainedModel` or `PeftModel`): The base. Of a `PeftModel`, "before" is the model without adapters.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer, with a chat template.
        prompt_sets (`Sequence[PromptSet]`): What to ask.
        adapters (`Mapping[str, str | Path]`): By the name to show, where each adapter is: a directory or a hub id; or
            a list of them, of training runs that differ in nothing but their seed.
        judges (`Sequence[Judge | str]`, *optional*, defaults to `["phrases", "likelihood"]`): Who judges; rates follow
            the first. See [`evaluate`].
        drift (`Callable`, *optional*): Measures how far each adapter moves the layers, such as `DriftFigures()`.
            Called with the model, the tokenizer and `None`, then with each adapter active and where it is from;
            returns by figure a value for each layer.
        harness ([`Harness`], *optional*): Tasks of the lm-evaluation-harness to ask each model, after the sets.
        progress (`Callable[[int, int], None]`, *optional*): Called with (answered, total) prompts of all models.
        **decoding: Any field of [`Decoding`].

    Returns:
        `Comparison`: The base as `"before"`, then the adapters in their order. On Ctrl-C, up to where it came.

    Raises:
        ValueError: If an adapter is called "before" or given twice, does not fit the model, or [`evaluate`] fails.

    Example:

    ```python
    adapters = {"plain LoRA": "out/plain", "AsFT": "out/asft"}
    comparison = compare(model, tokenizer, [prompt_set("harmful"), prompt_set("borderline"), task("topic")], adapters)
    for name in adapters:
        print(*comparison.sentences(name), sep="\n")
    ```
    """
    if BEFORE in adapters:
        raise ValueError(f"`{BEFORE}` is the name of the model without an adapter. Give this adapter another name.")
    made, prompts = make_judges(judges), sum(map(len, prompt_sets))
    evaluations: list[Evaluation] = []
    named, runs = _named(adapters)
    evaluated: list[tuple[str, str | Path | None]] = [(BEFORE, None), *named]
    notes = [note for name, path in evaluated if path for note in _misfits(model, tokenizer, name, path)]
    for index, (name, path) in enumerate(evaluated):
        with active_adapter(model, path) as examined:
            evaluation = evaluate(
                examined,
                tokenizer,
                prompt_sets,
                name=name,
                judges=made,
                harness=harness,
                progress=offset(progress, index * prompts, len(evaluated) * prompts),
                **decoding,
            )
            found = drift(examined, tokenizer, path) if drift is not None else {}
        evaluations.append(with_adapter(evaluation, path, found))
        if any(answer.error == INTERRUPTED for result in evaluation.results for answer in result.answers):
            notes.append(f"The comparison was interrupted while `{name}` answered; nothing after it was examined.")
            break
    done = {evaluation.name for evaluation in evaluations}
    finished = {name: tuple(run for run in listed if run in done) for name, listed in runs.items()}
    return Comparison(tuple(evaluations), tuple(notes), runs={name: r for name, r in finished.items() if r})


def with_adapter(
    evaluation: Evaluation, path: str | Path | None, drift: Mapping[str, Mapping[str, float]]
) -> Evaluation:
    """Return an evaluation with where the adapter is from that was examined, and what [`DriftMeasure`] found of it."""
    return replace(
        evaluation,
        manifest={**evaluation.manifest, "adapters": [adapter_provenance(path)] if path is not None else []},
        drift=dict(drift.get("relative", {})),
        drift_shares={figure: dict(values) for figure, values in drift.items() if figure != "relative"},
    )


def _named(
    adapters: Mapping[str, str | Path | Sequence[str | Path]],
) -> tuple[list[tuple[str, str | Path]], dict[str, tuple[str, ...]]]:
    """Give each of several runs a name of its own; return all adapters by name, and the names of each one's runs."""
    named: list[tuple[str, str | Path]] = []
    runs: dict[str, tuple[str, ...]] = {}
    for name, paths in adapters.items():
        if isinstance(paths, str | Path):
            named.append((name, paths))
            continue
        if not paths or len({str(Path(path)) for path in paths}) < len(paths):
            raise ValueError(
                f"`adapters[{name!r}]` must hold the folders of several runs, each of them once, got "
                f"{[str(path) for path in paths]}. Name every run once."
            )
        runs[name] = tuple(f"{name}, run {number}" for number in range(1, len(paths) + 1))
        named += zip(runs[name], paths, strict=True)
    return named, runs


@contextmanager
def active_adapter(model: Any, path: str | Path | None) -> Iterator[Any]:
    """Make one adapter active on the model, or none, and leave the model as it was, whether it fits or not."""
    import torch
    from peft import PeftModel

    from ..lora.modes import check_known_adapters

    check_known_adapters(model)
    kept = _base_weights(model, path)
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modules = [(name, module, module.training) for name, module in model.named_modules(remove_duplicate=False)]
    # PEFT draws a start for an adapter's weights before it loads them.
    random_state = torch.random.fork_rng(devices=range(torch.cuda.device_count()))
    try:
        if isinstance(model, PeftModel):
            with random_state, _switched(model, path):
                yield model
        elif path is None:
            yield model
        else:
            with random_state, _wrapped(model, path) as wrapped:
                yield wrapped
    finally:
        # PEFT leaves its layers in place, without an adapter, where only the deleted one needed them: checkpoints
        # would name them. The modules that they wrap are the original ones, so these go back where they were.
        for name, module, training in modules:
            if name and model.get_submodule(name) is not module:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module)
            module.training = training
        for parameter, flag in trainable:  # loading an adapter freezes the rest of the model
            parameter.requires_grad_(flag)
        with torch.no_grad():
            for parameter, start in kept:
                parameter.copy_(start)


def _base_weights(model: Any, path: str | Path | None) -> list[tuple[Any, Any]]:
    """Return a model's weights with copies of them, if putting the adapter on it will change them."""
    from ..lora.io import read_config
    from ..lora.updates import keeps_base

    own = [name for name, config in getattr(model, "peft_config", {}).items() if not keeps_base(config)]
    if own:
        raise ValueError(
            f"The adapter `{own[0]}` of this model changes its base weights (`init_lora_weights` or `bias`), so that "
            "neither the model before nor another adapter can be examined on it. Give the base model, loaded anew."
        )
    if path is None or keeps_base(read_config(path)):
        return []
    return [(parameter, parameter.detach().to("cpu", copy=True)) for parameter in model.parameters()]


@contextmanager
def _wrapped(model: Any, path: str | Path) -> Iterator[Any]:
    from peft import PeftModelForCausalLM

    from ..lora.io import fitting, load_adapter_weights, read_config

    config = read_config(path)
    config.inference_mode = True
    with fitting(path):
        wrapped = PeftModelForCausalLM(model, config, adapter_name=_EXAMINED)
    try:
        load_adapter_weights(wrapped, path, _EXAMINED)
        yield wrapped
    finally:
        if hasattr(wrapped.base_model, "unload"):  # prompt learning leaves the model itself alone
            wrapped.base_model.unload()


@contextmanager
def _switched(model: Any, path: str | Path | None) -> Iterator[None]:
    from ..lora.io import load_adapter_weights

    if path is None:
        with model.disable_adapter():
            yield
        return
    shown, active = model.active_adapter, model.active_adapters
    try:
        load_adapter_weights(model, path, _EXAMINED)
        model.set_adapter(_EXAMINED, inference_mode=True)
        yield
    finally:
        model.base_model.set_adapter(active)
        model.active_adapter = shown
        if _EXAMINED in model.peft_config:
            model.delete_adapter(_EXAMINED)


def _misfits(model: Any, tokenizer: Any, name: str, path: str | Path) -> Iterator[str]:
    """Yield what an adapter says of how it was trained that is otherwise here: its base model, its chat template."""
    from ..lora.io import local_folder, other_base, read_config

    if other := other_base(read_config(path), getattr(model.config, "_name_or_path", "")):
        logger.warning("%s: %s", name, other)
        yield f"{name}: {other}"
    trained: str | None = None
    folder = local_folder(path)
    if (folder / "chat_template.jinja").is_file():
        trained = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    elif (folder / "tokenizer_config.json").is_file():
        trained = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    if trained is not None and trained != tokenizer.chat_template:
        note = f"{name}: the chat template saved with the adapter is not the one that the model is asked with here."
        logger.warning("%s Load the tokenizer from `%s`.", note, path)
        yield note
