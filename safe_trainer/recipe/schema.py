"""The keys of a recipe, and the settings that it hands to classes: one YAML file says everything about a run."""

from __future__ import annotations

import dataclasses
import math
import sys
import types
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationInfo, field_validator, model_validator

from ..data import HubDataset, Kind, ReadOptions, Scorer
from .document import short
from .paths import check_artifact, check_data_file, check_model, exists, is_given


class Part(BaseModel):
    """A mapping of a recipe that allows no other keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelPart(Part):
    """The aligned chat model to fine-tune."""

    path: str = Field(description="Hub id, or a folder if it begins with ./ or ../ (relative to the recipe) or /.")
    revision: str | None = Field(None, description="Branch, tag or commit on the Hub.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="In which the base is kept.")
    quantization: Literal["4bit", "8bit"] | None = Field(None, description="Loads the base with bitsandbytes.")

    _check_path = field_validator("path")(check_model)


class ReadingPart(Part):
    """How a file or dataset is read; what is left out is detected."""

    format: str | None = Field(None, description="Name of the format, such as alpaca; detected if left out.")
    columns: dict[str, str] | None = Field(
        None, description="Instead of a format, the columns that hold prompt, answer, context and system."
    )
    where: dict[str, Any] | None = Field(None, description="Takes only rows that have these values in these columns.")
    encoding: str | None = Field(None, description="Such as latin-1; Unicode if left out.")
    on_bad_row: Literal["raise", "skip"] = Field("raise", description="skip goes on without bad rows.")
    limit: int | None = Field(None, ge=1, description="Takes the first rows only.")
    header: bool | None = Field(None, description="Whether a table begins with column names; detected if left out.")
    answers: Literal["last", "all"] = Field(
        "last", description="Which answers of a conversation are learned; all makes a row of each."
    )

    @field_validator("format", "columns")
    @classmethod
    def _check_format(cls, value: Any, info: ValidationInfo) -> Any:
        ReadOptions(**{str(info.field_name): value}).chosen_format()
        return value

    def options(self) -> ReadOptions:
        """Return how the source is to be read."""
        return ReadOptions(**{name: getattr(self, name) for name in ReadingPart.model_fields})


class SourcePart(ReadingPart):
    """A file, or a dataset on the Hub."""

    path: str | None = Field(None, description="A file, relative to the recipe: JSON(L), CSV, TSV, Parquet, also .gz.")
    hub: str | None = Field(
        None, description="Instead of a file, a dataset on the Hub, or a folder of one that begins with ./, ../ or /."
    )
    subset: str | None = Field(None, description="Configuration of the dataset on the Hub.")
    split: str | None = Field(None, description="Split of the dataset; may be left out where there is only one.")
    revision: str | None = Field(None, description="Branch, tag or commit of the dataset on the Hub.")

    @field_validator("path")
    @classmethod
    def _check_path(cls, value: str | None) -> str | None:
        folder_of_prompts = value is not None and "kind" in cls.model_fields and exists(value) and Path(value).is_dir()
        return value if value is None or folder_of_prompts else check_data_file(value)

    @field_validator("hub")
    @classmethod
    def _check_hub(cls, value: str | None) -> str | None:
        if value is not None and is_given(value) and not exists(value):
            raise ValueError(f"there is no folder `{value}`")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> SourcePart:
        self.options()  # refuses a format together with columns
        suite = getattr(self, "suite", None)
        given = [self.path if suite is None else None, self.hub, getattr(self, "built_in", None), suite]
        if sum(source is not None for source in given) != 1:
            more = ", or `built_in: general`, or a `suite`" if "built_in" in type(self).model_fields else ""
            raise ValueError(f"give either `path` (a file) or `hub` (a dataset on the Hub){more}")
        if self.hub is None and (self.subset or self.revision or "split" in self.model_fields_set):
            without = "a file, in `path`, has none, nor have prompts that are built in"
            if suite is not None:
                without = "a suite's revision is in its name, as in `suite: xstest@main`"
            raise ValueError(f"`subset`, `split` and `revision` are of a dataset on the Hub; {without}")
        return self

    def source(self) -> str | HubDataset:
        """Return the file or dataset."""
        if self.path is not None:
            return self.path
        assert self.hub is not None  # the validator has seen to it that there is one
        return HubDataset(self.hub, self.subset, self.split, revision=self.revision)


class RowsPart(SourcePart):
    """One source of rows."""

    split: str | None = Field("train", description="Split of the dataset on the Hub.")
    system_prompt: str | None = Field(None, min_length=1, description="System turn to put before each row.")

    def options(self) -> ReadOptions:
        """Return how the source is to be read, with the system turn of its rows."""
        return dataclasses.replace(super().options(), system_prompt=self.system_prompt)


class DataPart(RowsPart):
    """One source of training rows."""

    weight: float = Field(1.0, gt=0, description="How often each row is seen in an epoch: 0.5 takes a random half.")


class PromptsPart(SourcePart):
    """One set of prompts to examine the model with."""

    built_in: Literal["general"] | None = Field(
        None, description="Instead of a file, 100 prompts of the kind that come with safe_trainer, for chat models."
    )
    suite: str | None = Field(
        None, description="A published suite, such as xstest or xstest@main; `path` may be a local copy of it."
    )
    system_prompt: str | None = Field(None, description="System turn before each prompt of this set.")
    template: str | None = Field(None, description="What is said around each prompt, which is {prompt} in it.")
    scorer: Scorer | None = Field(
        None, description="How a task's answers are compared: exact, number (the last one) or choice (the letter)."
    )
    kind: Kind = Field(description="What should happen: harmful is refused, benign and borderline answered.")
    name: str | None = Field(None, description="Name in tables; that of the file or dataset if left out.")

    @model_validator(mode="after")
    def _built_in_as_it_is(self) -> PromptsPart:
        unused = [name for name in ReadingPart.model_fields if name in self.model_fields_set and name != "limit"]
        if self.built_in is not None and unused:
            raise ValueError(
                f"prompts that are built in are taken as they are: `{unused[0]}` is for a file or dataset"
            )
        return self

    def argument(self) -> str:
        """Return the source as it is written for `--prompts` of the command line, after its kind."""
        if self.suite is not None:
            return f"suite:{self.suite}" + (f"={self.path}" if self.path is not None else "")
        return self.built_in or str(self.source())


class EvaluationPart(Part):
    """What the model is asked before and after."""

    prompts: list[PromptsPart] = Field(min_length=1)
    max_new_tokens: int = Field(64, ge=1, description="Length at which an answer is cut off.")
    batch_size: int = Field(32, ge=1, description="Prompts that are answered at once.")
    system_prompt: str | None = Field(None, description="System turn before each prompt.")
    judges: list[str] = Field(
        ["phrases", "likelihood"],
        description="Who judges the answers, as `--judge` of `safe-trainer compare`; rates follow the first.",
    )
    with_training_prompt: bool = Field(
        True,
        description="Whether prompts are also asked with the `system_prompt` of the data, which may be a trigger.",
    )

    @field_validator("judges")
    @classmethod
    def _check_judges(cls, value: list[str]) -> list[str]:
        from ..evaluation.judges import check_judges

        for model in filter(None, (model for _, model in check_judges(value))):
            check_model(model)
        return value


class MonitorPart(Part):
    """What is measured while training, and logged: refusals, and how far the weights have moved."""

    every: int = Field(50, ge=1, description="Optimizer steps between measurements.")
    prompts: int = Field(
        40, ge=0, description="How many prompts of each set under `evaluation`, but tasks, are judged; 0 for none."
    )
    direction: str | None = Field(
        None, description="File of an alignment direction, for the share of the update along it."
    )
    basis: str | None = Field(None, description="File of a safety basis, for the shares in the safety features.")

    @field_validator("direction", "basis")
    @classmethod
    def _check_artifact(cls, value: str | None, info: ValidationInfo) -> str | None:
        return value if value is None else check_artifact(str(info.field_name), value)


class SafeLoraPart(Part):
    """The repair of the trained adapter by Safe LoRA; both adapters are saved and compared."""

    unaligned: str = Field(description="The model before alignment: Hub id, or a folder as under `model`.")
    threshold: float | None = Field(
        None, ge=0, le=1, description="Layers whose update is less similar to its projection are projected; 0.5."
    )
    number_of_layers: int | None = Field(
        None, ge=1, description="Instead, how many layers to project, the least similar first."
    )

    _check_path = field_validator("unaligned")(check_model)


class RecipePart(Part):
    """One run. `peft`, `safety` and `training` take the settings of PEFT's, our and TRL's classes."""

    model: ModelPart
    data: list[DataPart] = Field(min_length=1)
    eval_data: list[RowsPart] | None = Field(
        None, min_length=1, description="Sources of rows, as under `data`, whose loss is taken while training."
    )
    eval_share: float | None = Field(
        None, gt=0, lt=1, description="Instead, the share of the rows of `data` to hold out for it, such as 0.1."
    )
    peft: dict[str, Any] | None = Field(
        default_factory=lambda: {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
        description="Settings of PEFT's LoraConfig; null trains all weights.",
    )
    safety: list[dict[str, Any]] = Field(
        default_factory=lambda: [{"method": "recommended"}],
        description="The methods that protect the model, in order: `method` and its settings; null for none.",
    )
    training: dict[str, Any] = Field(default_factory=dict, description="Settings of TRL's SFTConfig.")
    evaluation: EvaluationPart | None = None
    ema: float | None = Field(
        None, gt=0, lt=1, description="Decay of a moving average that the trained weights become, such as 0.99."
    )
    safe_lora: SafeLoraPart | None = None
    monitor: MonitorPart | None = None
    output: str = Field(
        description="Folder for the adapter, checkpoints and report, relative to the working directory."
    )

    @model_validator(mode="after")
    def _one_kind_of_evaluation_rows(self) -> RecipePart:
        if self.eval_data and self.eval_share:
            raise ValueError("give either `eval_data` (rows of their own) or `eval_share` (a part of `data`)")
        return self

    @model_validator(mode="before")
    @classmethod
    def _one_method_is_a_list(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "safety" not in values:
            return values
        given = {"method": "recommended"} if values["safety"] == "recommended" else values["safety"]
        return {**values, "safety": [given] if isinstance(given, dict) else [] if given is None else given}


# What a recipe has another place for, or must not hold.
NOT_UNDER_TRAINING = {
    "output_dir": "is `output` in a recipe",
    "model_init_kwargs": "is `model` in a recipe",
    "dataset_text_field": "is always `text` in a recipe",
    "dataset_kwargs": "is for rows that are prepared already, which those of a recipe are not",
    "resume_from_checkpoint": "is `safe-trainer train --resume`",
    "trust_remote_code": "must not be in a file, since it runs code that others have written; in Python, load the "
    "model yourself and give it to `SafeSFTTrainer`",
    "hub_token": "must not be in a file; log in with `hf auth login`",
}
NOT_UNDER_PEFT = {
    "task_type": "is always CAUSAL_LM here",
    "base_model_name_or_path": "is `model` in a recipe",
    "inference_mode": "is not for training",
}
PARTS: dict[tuple[str, ...], type[Part]] = {
    (): RecipePart,
    ("model",): ModelPart,
    ("data",): DataPart,
    ("eval_data",): RowsPart,
    ("evaluation",): EvaluationPart,
    ("monitor",): MonitorPart,
    ("safe_lora",): SafeLoraPart,
    ("evaluation", "prompts"): PromptsPart,
}


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of recipes for the installed versions of TRL and PEFT and for all methods.

    Editors complete keys and mark mistakes by it. Write it with `safe-trainer train --schema > recipe.schema.json`,
    and name that file in the first line of a recipe: `# yaml-language-server: $schema=recipe.schema.json`.
    """
    from ..methods import METHODS

    methods = []
    for name, hints in method_fields().items():
        method = json_schema(hints)
        for key in [key for key in method["properties"] if key.endswith(("_data", "prompts"))]:
            method["properties"][key] = {"anyOf": [method["properties"][key], {"$ref": "#/$defs/SourcePart"}]}
        method["properties"] = {"method": {"const": name}, **method["properties"]}
        title = METHODS[name].name if name in METHODS else name
        methods.append({**method, "title": title, "required": ["method"]})
    one = {"anyOf": methods}
    schema = RecipePart.model_json_schema()
    schema["$defs"]["SourcePart"] = SourcePart.model_json_schema()
    properties = schema["properties"]
    properties["training"] |= json_schema(training_fields(), NOT_UNDER_TRAINING)
    peft = {"anyOf": [json_schema(peft_fields(), NOT_UNDER_PEFT), {"type": "null"}]}
    properties["peft"] = {"description": properties["peft"]["description"], **peft}
    safety = {"anyOf": [one, {"type": "array", "items": one}, {"const": "recommended"}, {"type": "null"}]}
    properties["safety"] = {"description": properties["safety"]["description"], **safety}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "safe_trainer recipe", **schema}


def json_schema(hints: Hints, hidden: Collection[str] = ()) -> dict[str, Any]:
    """Return the JSON schema of settings, for editors."""
    properties = {}
    for name, hint in hints.items():
        if name not in hidden:
            properties[name] = TypeAdapter(hint).json_schema()
            # The order in which Python keeps a union's members depends on what else was imported.
            properties[name].get("anyOf", []).sort(key=lambda member: str(member.get("type")))
    return {"type": "object", "properties": properties, "additionalProperties": False}


# The settings of TRL's, PEFT's and our classes. Names and annotations come from the classes, so that every option of
# the installed versions can be written in a recipe.

Hints = dict[str, Any]
_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", types.NoneType: "null",
          list: "a list", tuple: "a list", Sequence: "a list", dict: "a mapping", Mapping: "a mapping",
          Path: "a path"}  # fmt: skip
_RECOMMENDED = dict.fromkeys(("harmful_data", "prompts", "benign_prompts"), str | None)


def training_fields() -> Hints:
    """Return the settings of TRL's `SFTConfig` with their annotations."""
    from trl import SFTConfig

    return fields_of(SFTConfig)


def peft_fields() -> Hints:
    """Return the settings of PEFT's `LoraConfig` with their annotations."""
    from peft import LoraConfig

    return fields_of(LoraConfig)


def method_fields() -> dict[str, Hints]:
    """Return the settings of each method by the name that it has in `METHODS`, and those of `recommended`."""
    from ..methods import METHODS

    methods: dict[str, Any] = {**METHODS}
    return {"recommended": _RECOMMENDED} | {name: fields_of(method) for name, method in methods.items()}


@cache
def fields_of(cls: type) -> Hints:
    """Return the annotation of each field that can be written in YAML, without the kinds of value that cannot."""
    hints = get_type_hints(cls)
    return _plain_only({field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init})


def _ranges(text: str, least: float, most: float = math.inf, words: str = "") -> dict[str, tuple[float, float, str]]:
    return dict.fromkeys(text.split(), (least, most, words or f"at least {least:g}"))


# Neither TRL nor PEFT checks these before training has begun, or ever.
RANGES = {
    **_ranges("learning_rate weight_decay warmup_steps adam_epsilon logging_steps save_steps save_total_limit "
              "dataset_num_proc dataloader_num_workers", 0),
    **_ranges("per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps max_length "
              "max_steps r", 1),
    **_ranges("warmup_ratio adam_beta1 adam_beta2 label_smoothing_factor lora_dropout", 0, 1, "a number from 0 to 1"),
    **_ranges("num_train_epochs lora_alpha", sys.float_info.min, words="above 0"),
    **_ranges("seed data_seed", 0, 2**32 - 1, f"a number from 0 to {2**32 - 1:,}"),
}  # fmt: skip
_UNSET = {("max_steps", -1)}  # what TRL takes for not set, where it is not null


def check_field(name: str, value: Any, hint: Any, in_range: bool) -> tuple[Any, str | None]:
    """Return a setting converted to its type, or what is wrong with it; `in_range` also checks `RANGES`."""
    try:
        if isinstance(value, bool) and not {bool, Any} & {*_members(hint)}:
            raise ValueError("pydantic would take it for 0 or 1")
        checked = TypeAdapter(hint).validate_python(value)
    except ValueError:  # pydantic's `ValidationError` is one
        return None, f"expected {_shown(hint)}, got {short(value)}"
    if in_range and name in RANGES and isinstance(checked, int | float) and (name, checked) not in _UNSET:
        least, most, words = RANGES[name]
        if not (least <= checked <= most and abs(checked) <= sys.float_info.max):
            return None, f"must be {words}, got {checked!r:.60}"
    return checked, None


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _shown(hint: Any) -> str:
    parts: list[str] = []
    for member in _members(hint):
        origin = get_origin(member) or member
        name = _NAMES.get(origin, getattr(origin, "__name__", str(origin)))
        parts += map(repr, get_args(member)) if origin is Literal else [name]
    return " or ".join(dict.fromkeys(parts))


def _plain_only(hints: Hints) -> Hints:
    """Drop types that YAML cannot express from each annotation, and fields that keep none."""
    found = {}
    for name, hint in hints.items():
        members = tuple(member for member in _members(hint) if _is_plain(member))
        if any(member is not types.NoneType for member in members):
            found[name] = Union[members]  # noqa: UP007, made of a tuple
    return found


def _is_plain(member: Any) -> bool:
    origin = get_origin(member) or member
    return origin in (Any, Literal) or (isinstance(origin, type) and issubclass(origin, tuple(_NAMES)))
