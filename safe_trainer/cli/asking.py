"""What `compare` and `evaluate` share: who is asked what, and who judges the answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .shell import errors, pairs

if TYPE_CHECKING:
    from ..data import PromptSet
    from ..evaluation import Judge

KINDS = ("harmful", "benign", "borderline", "task")
BUILT_IN = ("general", "testbed")
GUARD = "guard"

Prompts = Annotated[
    list[str] | None,
    typer.Option(
        help="KIND=SOURCE of prompts to ask; may be given several times. KIND is harmful, benign, borderline or task; "
        "SOURCE is a file, or file:column; a folder with a file for each category; hf:owner/name/subset:split:column "
        "for a dataset on the Hub; suite:NAME for a published suite; `general` or `testbed` for built-in ones. Left "
        "out, all built-in ones that suit the model."
    ),
]
Suites = Annotated[
    list[str] | None,
    typer.Option(
        "--suite",
        help="NAME of a published suite, such as xstest or strongreject, with all its kinds of prompts, or NAME=PATH "
        "of a local copy; may be given several times.",
    ),
]
Judges = Annotated[
    list[str] | None,
    typer.Option(
        "--judge",
        help="Who judges the answers: phrases, likelihood, guard:MODEL for a guard model (folder or Hub id), or "
        "NAME:MODEL to name how it is asked: llama-guard, shieldgemma, wildguard or harmbench. May be given several "
        "times: rates follow the first, and agreement is shown. [default: phrases]",
    ),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Length at which an answer is cut off.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts that are answered at once.")]
SystemPrompt = Annotated[str | None, typer.Option(help="System turn before each prompt.")]


def prompt_sets(listed: list[str] | None, model: str, suites: list[str] | None = None) -> list[PromptSet]:
    """Return the prompt sets that `--prompts` and `--suite` name, or those built in for the model."""
    sources = pairs(listed or [], "--prompts", "harmful=asked.csv")
    unknown = [kind for kind, _ in sources if kind not in KINDS]
    if unknown:
        raise _misused("--prompts", f"got the kind {unknown[0]!r}, expected {', '.join(KINDS)}.")
    if not sources and not suites:
        fitting = "testbed" if _is_embedded(model) else "general"
        sources = [(kind, fitting) for kind in KINDS[:3]]
    return [_prompt_set(kind, source) for kind, source in sources] + _suites(suites or [])


def _suites(listed: list[str]) -> list[PromptSet]:
    from ..data import load_suite

    parts = [written.partition("=") for written in listed]
    return [found for name, _, path in parts for found in load_suite(name, path or None)]


def _prompt_set(kind: str, source: str) -> PromptSet:
    from ..data import ReadOptions, is_file, load_prompts, load_suite

    if source.startswith("suite:"):
        return load_suite(source.removeprefix("suite:"), kinds=(kind,))[0]  # type: ignore[arg-type]
    if source not in BUILT_IN:
        file, _, column = source.rpartition(":")
        reading = ReadOptions(columns={"prompt": column}) if is_file(file) else None
        source = file if reading else source
        prompts, report = load_prompts(source, kind, options=reading)  # type: ignore[arg-type]  # checked by the caller
        errors.print(str(report), markup=False, soft_wrap=True)
        return prompts
    if kind == "task":
        raise _misused("--prompts", f"there is no {source} task; give a file of questions with answers.")
    if source == "testbed":
        from ..testbed import prompt_set

        return dataclasses.replace(prompt_set(kind), source=source)  # type: ignore[arg-type]  # checked by the caller
    from ..data import general_prompts

    return general_prompts(kind)  # type: ignore[arg-type]  # checked by the caller


def _is_embedded(model: str) -> bool:
    from ..testbed import ALIGNED, UNALIGNED

    return Path(model).resolve() in (ALIGNED.resolve(), UNALIGNED.resolve())


def check_judges(listed: list[str] | None) -> list[tuple[str, str]]:
    """Return name and model of each judge that `--judge` names, before anything is loaded.

    Raises:
        BadParameter: If one of them is unknown, lacks its model, or stands there twice.
    """
    from ..evaluation.judges.guards import GUARDS

    found = []
    for written in listed or ["phrases"]:
        name, _, model = written.partition(":")
        if name in ("phrases", "likelihood"):
            if model:
                raise _misused("--judge", f"{name} takes no model, got {written!r}.")
        elif name not in (GUARD, *GUARDS):
            known = ", ".join(("phrases", "likelihood", *(f"{guard}:MODEL" for guard in (GUARD, *GUARDS))))
            raise _misused("--judge", f"got {written!r}, expected {known}.")
        elif not model:
            raise _misused("--judge", f"{name} needs a model: {name}:MODEL, a folder or a Hub id.")
        elif name == GUARD:
            name = _guard_by_name(model)
        found.append((name, model))
    names = [name for name, _ in found]
    if len(set(names)) < len(names):
        raise _misused("--judge", f"each may be given once, got {', '.join(names)}.")
    return found


def _guard_by_name(model: str) -> str:
    """Tell from a model's name how it is asked."""
    from ..evaluation.judges.guards import GUARDS

    plain = model.lower().replace("-", "").replace("_", "")
    for name in GUARDS:
        if name.replace("-", "") in plain:
            return name
    known = ", ".join(f"{name}:{model}" for name in GUARDS)
    raise _misused("--judge", f"how {model} is asked cannot be told from its name; write one of {known}.")


def load_judges(checked: list[tuple[str, str]]) -> list[Judge]:
    """Return the judges, with their models."""
    from ..evaluation import LikelihoodJudge, PhraseJudge

    makers: dict[str, Any] = {"phrases": PhraseJudge, "likelihood": LikelihoodJudge}
    return [_guard(name, model) if model else makers[name]() for name, model in checked]


def _guard(name: str, model: str) -> Judge:
    from ..evaluation import GUARDS, GuardJudge

    return GuardJudge(*load_model(model), GUARDS[name])


def check_folder(option: str, source: str, what: str = "adapter") -> None:
    """Refuse what can only be a folder and is none, before anything is loaded.

    Raises:
        BadParameter: If so. The id of an adapter on the Hub has an owner, as in `me/my-adapter`.
    """
    may_be_id = source[:1] not in (".", "/", "~") and ("/" in source or what == "model")
    if not may_be_id and not Path(source).expanduser().is_dir():
        raise _misused(option, f"there is no folder `{source}`. Give the folder of the {what}, or its Hub id.")


def load_model(name: str) -> tuple[Any, Any]:
    """Return a model and its tokenizer.

    Raises:
        ValueError: If they cannot be had; names the model, which messages of libraries leave out.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        return AutoModelForCausalLM.from_pretrained(name, device_map="auto"), tokenizer
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The model `{name}` could not be loaded: {str(error).strip()} Give a folder or a Hub id; for a private "
            "or gated model, log in with `hf auth login`."
        ) from error


def _misused(option: str, problem: str) -> typer.BadParameter:
    return typer.BadParameter(problem, param_hint=f"'{option}'")
