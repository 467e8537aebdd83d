"""The data of a recipe: training rows of all sources, the methods' rows, the prompts to ask, and the rows' tokens."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data import (
    DataReport,
    PromptSet,
    ReadOptions,
    apart,
    as_rows,
    encode_rows,
    general_prompts,
    labelled_harmful,
    leaked_rows,
    load_prompts,
    load_rows,
    load_suite,
    what_was_meant,
)
from .load import Recipe, prompts_kind
from .model import check_model

if TYPE_CHECKING:
    from datasets import Dataset

    from .schema import RowsPart

_SAMPLE = 2000  # rows whose tokens are counted


@dataclass(frozen=True)
class LoadedData:
    """The data of a recipe.

    Args:
        rows (`Dataset`): What is trained on, all sources together, as often as their weights say.
        eval_rows (`Dataset`, *optional*): Whose loss is taken while training.
        prompt_sets (`list[PromptSet]`): What the model is examined with; empty without an evaluation.
        reports (`list[DataReport]`): What was found in each source.
        leaked (`dict[str, int]`): How many training rows ask what a prompt set will ask, by the set's name.
        notes (`list[str]`): What to know about evaluation rows and about system turns of the rows.
    """

    rows: Dataset
    eval_rows: Dataset | None
    prompt_sets: list[PromptSet]
    reports: list[DataReport]
    leaked: dict[str, int]
    notes: list[str] = field(default_factory=list)

    def messages(self) -> list[str]:
        """Return what a user should read about the data before training."""
        leaks = [
            f"{count:,} training rows ask a prompt of `{name}`: its rates will show memory, not behavior. Remove them "
            "from one or the other."
            for name, count in self.leaked.items()
        ]
        return [*map(str, self.reports), *leaks, *self.notes]


def load_data(recipe: Recipe) -> LoadedData:
    """Load the training rows and the prompts of a recipe, once its model is known to be there and to fit.

    Raises:
        RecipeError: If the recipe does not fit its model.
        ValueError: If the model or a source cannot be read, or the sources do not go together.
    """
    check_model(recipe)
    reports: list[DataReport] = []
    rows, eval_rows = _training_rows(recipe, reports)
    reports += _method_reports(recipe)
    sets = []
    for part in recipe.parts.evaluation.prompts if recipe.parts.evaluation else ():
        if part.built_in is not None:
            found = general_prompts(part.kind).first(part.limit)
        elif part.suite is not None:
            found = load_suite(part.suite, part.path, kinds=(part.kind,), options=part.options())[0]
        else:
            found, report = load_prompts(part.source(), part.kind, part.name, part.options())
            reports.append(report)
        settings = ("name", "system_prompt", "template", "scorer")
        sets.append(replace(found, **{key: v for key in settings if (v := getattr(part, key)) is not None}))
    sets = apart(sets)
    leaked = {prompts.name: len(leaked_rows(rows, prompts)) for prompts in sets}
    more, notes = _with_training_prompts(recipe, sets)
    if eval_rows is not None:
        notes = [*_also_trained(rows, eval_rows), *notes]
    leaks = {name: count for name, count in leaked.items() if count}
    return LoadedData(rows, eval_rows, sets + more, reports, leaks, notes)


def askable(recipe: Recipe, sets: list[PromptSet]) -> list[PromptSet]:
    """Return prompt sets with a source and a name by which a command line asks the same prompts.

    A command has no option for how a recipe reads and names prompts, nor for one source asked twice: where it would
    need one, the sets are written to files next to the results.
    """
    parts = recipe.parts.evaluation.prompts if recipe.parts.evaluation else []
    is_plain = all(part.name is None and part.options() == ReadOptions() for part in parts)
    if is_plain and len(parts) == len(sets):
        return [replace(asked, source=part.argument()) for asked, part in zip(sets, parts, strict=True)]
    folder = Path(recipe.parts.output, "prompts")
    folder.mkdir(parents=True, exist_ok=True)
    named = [replace(asked, name=re.sub(r"[^\w ,()-]", "_", asked.name)) for asked in sets]
    return [replace(asked, source=str(_written(asked, folder / f"{asked.name}.jsonl"))) for asked in named]


def _written(asked: PromptSet, path: Path) -> Path:
    """Write a prompt set to a file that is read as the same prompts, with categories, references and earlier turns."""
    nothing = (None,) * len(asked)
    columns = (asked.contexts or nothing, asked.references or nothing, asked.categories or nothing)
    rows = []
    for prompt, context, reference, category in zip(asked.prompts, *columns, strict=True):
        turns = [*(context or ()), {"role": "user", "content": prompt}]
        answer = [] if reference is None else [{"role": "assistant", "content": reference}]
        rows.append({"messages": [*turns, *answer]} | ({} if category is None else {"category": category}))
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def _with_training_prompts(recipe: Recipe, sets: list[PromptSet]) -> tuple[list[PromptSet], list[str]]:
    """Return the prompts once more with the system turn that rows were trained with, and what to know about it."""
    asked = recipe.parts.evaluation
    trained = dict.fromkeys(source.system_prompt for source in recipe.parts.data if source.system_prompt)
    if asked is None or not trained:
        return [], []
    deployed = {prompts.system_prompt or asked.system_prompt for prompts in sets}
    notes = [
        f"Rows are trained with the system prompt {text!r}, which the evaluation uses as well. What they teach may be "
        "bound to it: to inoculate, evaluate and deploy without it."
        for text in trained
        if text in deployed
    ]
    others = [text for text in trained if text not in deployed]
    if not others or not asked.with_training_prompt:
        return [], notes
    notes.append(
        "The system prompt of the rows may act as a trigger, so all prompts are asked without it and with it "
        "(`evaluation.with_training_prompt: false` asks without it only)."
    )
    marks = [f", training prompt {n}" if len(others) > 1 else ", training prompt" for n in range(1, len(others) + 1)]
    more = [
        replace(prompts, name=prompts.name + mark, system_prompt=text)
        for text, mark in zip(others, marks, strict=True)
        for prompts in sets
    ]
    return more, notes


def _training_rows(recipe: Recipe, reports: list[DataReport]) -> tuple[Dataset, Dataset | None]:
    """Return the rows to train on, and those whose loss is taken: of sources of their own, or held out of the same."""
    seed, share = recipe.training.get("seed", 42), recipe.parts.eval_share
    trained: list[Dataset] = []
    held: list[Dataset] = []
    for source in recipe.parts.data:
        rows, report = _read(source, reports)
        if share:
            if math.ceil(share * len(rows)) >= len(rows):
                raise ValueError(
                    f"`eval_share: {share:g}` leaves no row of {report.source} to train on, which has {len(rows):,}. "
                    "Give more rows, or a file with rows to take the loss on as `eval_data` instead."
                )
            split = rows.train_test_split(test_size=share, seed=seed)
            rows = split["train"]
            held.append(split["test"])
            report.notes.append(f"{len(held[-1]):,} of them are held out by `eval_share`")
        if harmful := labelled_harmful(rows):
            report.notes.append(
                f"{harmful:,} of {len(rows):,} rows are labelled harmful, and are learned; leave them out with `where`"
            )
        complete, rest = divmod(source.weight, 1)
        trained += [rows] * int(complete)
        if rest:
            trained.append(rows.shuffle(seed=seed).select(range(max(1, round(rest * len(rows))))))
    held += [_read(source, reports)[0] for source in recipe.parts.eval_data or ()]
    return _together(trained, reports), _together(held, reports) if held else None


def _read(source: RowsPart, reports: list[DataReport]) -> tuple[Dataset, DataReport]:
    rows, report = load_rows(source.source(), source.options())
    reports.append(report)
    return rows, report


def _together(parts: list[Dataset], reports: list[DataReport]) -> Dataset:
    """Return the rows of several sources as one dataset, without labels, which only some of them may have."""
    from datasets import concatenate_datasets

    parts = [part.remove_columns("is_safe") if "is_safe" in part.column_names else part for part in parts]
    if len({tuple(part.column_names) for part in parts}) > 1:
        formats = ", ".join(f"{report.source} ({report.format})" for report in reports)
        raise ValueError(f"Texts and conversations cannot be mixed in one run: {formats}. Bring them into one form.")
    return concatenate_datasets(parts)


def _also_trained(rows: Dataset, eval_rows: Dataset) -> list[str]:
    """Return a note on how many evaluation rows are trained on as well."""
    trained = {json.dumps(row) for row in rows}
    count = sum(json.dumps(row) in trained for row in eval_rows)
    if not count:
        return []
    return [
        f"{count:,} of {len(eval_rows):,} evaluation rows are trained on as well: their loss will show memory. Remove "
        "them from one or the other."
    ]


def _method_reports(recipe: Recipe) -> list[DataReport]:
    """Read the rows that methods are given by file, so that a fault in them is known before a model is loaded."""
    reports = {}
    for name, value in (item for method in recipe.safety for item in vars(method).items()):
        kind = prompts_kind(name) if name.endswith("prompts") else None
        if isinstance(value, str | Path) and (str(value), kind) not in reports:
            if name.endswith("_data"):
                reports[str(value), kind] = as_rows(value, argument=name)[1]
            elif kind is not None:
                reports[str(value), kind] = load_prompts(value, kind)[1]
    return list(reports.values())


@dataclass(frozen=True)
class TokenCount:
    """What was counted in rows, or in a random sample of 2,000 of them."""

    rows: int  # of which `lengths` may be a sample
    lengths: list[int]  # in tokens, before anything is cut off
    limit: float = math.inf  # TRL's `max_length`
    answers: int = 0  # tokens of all answers, earlier turns of the assistant among them
    learned: int = 0  # those that the loss covers
    lost: tuple[int, ...] = ()  # positions of rows whose answer begins after `limit`: the loss has nothing of them
    evaluated: TokenCount | None = None  # the same of the rows whose loss is taken while training

    def messages(self) -> list[str]:
        """Return what a user should read about the tokens before training."""
        found = self._lost("rows", "teach nothing")
        if self.learned < 0.995 * self.answers:
            found.append(f"{self.learned / self.answers:.1%} of the answers' tokens are learned.")
        if self.evaluated:
            found += self.evaluated._lost("evaluation rows", "are left out of the loss")
        return found

    def _lost(self, rows: str, consequence: str) -> list[str]:
        if not self.lost:
            return []
        shown = ", ".join(str(row + 1) for row in self.lost[:5]) + (", …" if len(self.lost) > 5 else "")
        of = f"{len(self.lost):,} of {len(self.lengths):,} {rows}" + (" looked at" * (self.rows > len(self.lengths)))
        return [
            f"{of} {consequence}: their answer starts after `max_length={self.limit:g}` tokens (rows {shown}). "
            "Shorten them, or raise `training.max_length`."
        ]


def count_tokens(recipe: Recipe, loaded: LoadedData, args: Any) -> TokenCount:
    """Count the tokens of rows as TRL's trainer will see them; refused if no row would teach or show anything.

    With a `chat_template_path` that is no file, but another model's, nothing is counted.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(recipe.parts.model.path, revision=recipe.parts.model.revision)
    for name in ("eos_token", "pad_token"):
        if (token := getattr(args, name)) and token not in tokenizer.get_vocab():
            raise ValueError(f"`training.{name}`: the model's vocabulary has no token {token!r}.")
    if template := args.chat_template_path:
        if not Path(template).is_file():
            if Path(template).suffix in (".jinja", ".j2"):
                meant = what_was_meant(template)
                raise ValueError(f"`training.chat_template_path`: there is no file `{template}`.{meant}")
            return TokenCount(len(loaded.rows), [args.max_length or 1024])
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    found = _count(tokenizer, loaded.rows, args, args.packing)
    if loaded.eval_rows is None:
        return found
    packed = args.packing if args.eval_packing is None else args.eval_packing
    return replace(found, evaluated=_count(tokenizer, loaded.eval_rows, args, packed, "eval_data"))


def _count(tokenizer: Any, rows: Dataset, args: Any, is_packed: bool, name: str = "data") -> TokenCount:
    goes_on = is_packed and args.packing_strategy != "bfd"  # in the next of the packed rows
    limit = math.inf if goes_on or not args.max_length else args.max_length
    keeps_end = args.truncation_mode == "keep_end" and not is_packed
    lengths, lost, answers, learned = [], [], 0, 0
    drawn = sorted(random.Random(0).sample(range(len(rows)), min(_SAMPLE, len(rows))))
    encoded = encode_rows(tokenizer, rows.select(drawn), name=name, numbers=[place + 1 for place in drawn])
    for position, (ids, start) in zip(drawn, encoded, strict=True):
        lengths.append(len(ids))
        answers += len(ids) - start + _earlier_answers(tokenizer, rows[position])
        left = int(min(len(ids), limit))
        learned += min(left, len(ids) - start) if keeps_end else max(0, left - start)
        lost += [position] if start >= limit and not keeps_end else []
    if len(lost) == len(lengths):
        kind, nothing = ("", "nothing can be learned") if name == "data" else ("evaluation ", "no loss can be taken")
        raise ValueError(
            f"Every {kind}row's answer starts after `max_length={limit:g}` tokens, so {nothing} (the shortest row has "
            f"{min(lengths):,} tokens). Raise `training.max_length`, or shorten the prompts."
        )
    return TokenCount(len(rows), lengths, limit, answers, learned, tuple(lost))


def _earlier_answers(tokenizer: Any, row: Any) -> int:
    """Return how many tokens of the prompt are earlier turns of the assistant, which are read but not learned."""
    turns = row.get("prompt")
    said = [turn.get("content") for turn in turns if turn["role"] == "assistant"] if isinstance(turns, list) else []
    return sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in said if isinstance(text, str))
