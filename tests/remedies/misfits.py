"""What does not fit, is damaged or cannot be written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tiny
from peft import PeftModel
from runs import HARMFUL, REFUSED, SHORT, lora

from safe_trainer import (
    AlignmentDirection,
    Comparison,
    SafetyBasis,
    SaLoRA,
    SecurityVectors,
    compact_adapter,
    load_model,
    load_rows,
    merge_adapter,
)
from safe_trainer.analysis.drift import measure_drift
from safe_trainer.analysis.scan import score_rows
from safe_trainer.recipe import load_data
from safe_trainer.recipe.run import check_output

from .recipes import short
from .room import CSV, PLAIN, Case, asked, changed, command, direction, of, recipe, saved


def configured(at: SimpleNamespace, model: str = "aligned", **values: Any) -> str:
    """A copy of a model whose config.json says something else."""
    folder = at.folder / model
    shutil.copytree(getattr(at, model), folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    return str(folder)


def damaged_basis(at: SimpleNamespace) -> Path:
    saved_to = at.measured(rank=2).save(at.folder / "basis.safetensors")
    return changed(saved_to, lambda content: content[:-1] + bytes([content[-1] ^ 1]))


def dataset(at: SimpleNamespace) -> str:
    (at.folder / "dataset").mkdir(exist_ok=True)
    for name in ("dataset/train.csv", "dataset/test.csv"):
        at.written(CSV, name)
    return f"hf:{at.folder}/dataset"


def scores(at: SimpleNamespace, model: Any) -> list[Any]:
    return list(score_rows(HARMFUL, model, at.vectors(), tiny.tokenizer()))


def data_of(at: SimpleNamespace, asked_for: str, **values: Any) -> None:
    """Refuse a recipe whose data is told of in these words."""
    said = load_data(recipe(at, **values)).messages()
    if any(asked_for in message for message in said):
        raise ValueError(said)


def asking(at: SimpleNamespace, prompt: str) -> dict[str, Any]:
    path = at.written(json.dumps({"prompt": prompt}).encode(), "asked.jsonl")
    return {"prompts": [{"kind": "benign", "path": path}]}


def labelled(at: SimpleNamespace, **part: Any) -> dict[str, Any]:
    rows = [{"prompt": f"Say {n}.", "completion": "One.", "is_safe": n > 1} for n in range(4)]
    path = at.written("\n".join(map(json.dumps, rows)).encode(), "labelled.jsonl")
    return {"data": [{"path": path, **part}]}


def planned(at: SimpleNamespace, data: Any = None, **training: Any) -> str:
    recipe(at, training=training, **({"data": data} if data else {}))
    return command("train", at.folder / "recipe.yaml", "--dry-run")


def mixed(at: SimpleNamespace, *rows: dict[str, str]) -> None:
    paths = [at.written(json.dumps(row).encode(), f"{number}.jsonl") for number, row in enumerate(rows)]
    load_data(recipe(at, data=[{"path": path} for path in paths]))


def one_row(at: SimpleNamespace) -> dict[str, str]:
    return {"path": at.written(json.dumps(PAIR).encode(), "one.jsonl")}


def held(at: SimpleNamespace, prompt: str) -> dict[str, Any]:
    row = json.dumps({"prompt": prompt, "completion": "One."}).encode()
    return {"eval_data": [{"path": at.written(row, "held.jsonl")}], "training": {"eval_strategy": "epoch"}}


def frozen(at: SimpleNamespace, but: str) -> Any:
    """A model of which only the weights with this name are trained."""
    model = of(at.aligned)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(but in name)
    return model


def strict() -> Any:
    """A tokenizer whose template refuses system turns."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + tiny.TEMPLATE
    )
    return tokenizer


TEXT, PAIR = {"text": "One."}, {"prompt": "Say one.", "completion": "One."}
BRIEFED = [{**row, "prompt": [{"role": "system", "content": "Be brief."}, *row["prompt"]]} for row in REFUSED]
TASK = b"question,answer\n1+1?,2\n"
MISFITS: dict[str, Case] = {
    "a file that is not there": (
        lambda at: load_rows(at.folder / "absent.csv"), "Check the path", [lambda at: load_rows(at.written(CSV))]
    ),
    "a dataset with splits": (
        lambda at: load_rows(dataset(at)),
        "Name one of them, as in hf:.*/dataset:train",
        [lambda at: load_rows(f"{dataset(at)}:train")],
    ),
    "a drift from another model": (
        lambda at: measure_drift(saved(at, hidden=64), at.adapter()),
        "Give the model that it was trained from",
        [lambda at: measure_drift(at.aligned, at.adapter())],
    ),
    "weights of another configuration": (
        lambda at: AlignmentDirection.from_checkpoints(
            configured(at, intermediate_size=32), configured(at, "unaligned", intermediate_size=32)
        ),
        "Its weights do not belong to its config.json, or are quantized; give the full-precision checkpoint",
        [lambda at: direction(at)],
    ),
    "a quantized checkpoint": (
        lambda at: AlignmentDirection.from_checkpoints(
            configured(at, quantization_config={"quant_method": "awq"}), at.unaligned
        ),
        "Give the full-precision checkpoint that it was made from",
        [lambda at: direction(at)],
    ),
    "a merge into a quantized base": (
        lambda at: merge_adapter(
            at.adapter(), at.folder / "out", configured(at, quantization_config={"quant_method": "awq"})
        ),
        "Give the full-precision model that it was made from as the base",
        [lambda at: merge_adapter(at.adapter(), at.folder / "out", at.aligned)],
    ),
    "a fit that diverges": (
        lambda at: at.trainer(SecurityVectors(harmful_data=HARMFUL, fitting={**SHORT, "learning_rate": 1e30})),
        "try again with a lower `learning_rate`",
        [lambda at: at.trainer(SecurityVectors(harmful_data=HARMFUL, fitting=SHORT))],
    ),
    "a damaged basis": (
        lambda at: SafetyBasis.load(damaged_basis(at)),
        "or copy it again",
        [lambda at: SafetyBasis.load(at.measured(rank=2).save(at.folder / "basis.safetensors"))],
    ),
    "a scan of a model that has the vectors": (
        lambda at: scores(at, PeftModel.from_pretrained(of(at.aligned), at.vectors())),
        "Give its base model",
        [lambda at: scores(at, of(at.aligned))],
    ),
    "a direction that cannot be saved": (
        lambda at: direction(at).save("/proc/nowhere/direction.safetensors"),
        "choose another path",
        [lambda at: direction(at).save(at.folder / "new" / "direction.safetensors")],
    ),
    "a model that is none": (
        lambda at: load_model(at.folder), "Give a folder or a Hub id", [lambda at: load_model(at.aligned)]
    ),
    "an adapter of the Hub that is not here": (
        lambda at: merge_adapter("me/absent", at.folder / "out"),
        "offline, download it beforehand",
        [lambda at: merge_adapter(at.adapter(), at.folder / "out")],
    ),
    "a LoRA in protected directions": (
        lambda at: at.trainer(
            SaLoRA(safety_data=REFUSED, rank=4, task_rank=4),
            model=PeftModel.from_pretrained(of(at.aligned), at.adapter(), is_trainable=True),
            peft_config=None,
        ),
        "or start a new adapter: pass the base model and `peft_config`",
        [lambda at: at.trainer(SaLoRA(safety_data=REFUSED, rank=4, task_rank=4))],
    ),
    "a variant of LoRA": (
        lambda at: at.trainer(PLAIN, peft_config=lora(alora_invocation_tokens=[1], task_type="CAUSAL_LM")),
        "Remove the option that asks for it from `LoraConfig`",
        [lambda at: at.trainer(PLAIN, peft_config=lora(task_type="CAUSAL_LM"))],
    ),
    "answers of other lengths": (
        lambda at: Comparison((asked(tiny.tokenizer()), asked(tiny.tokenizer(), name="after", max_new_tokens=2))),
        "Evaluate both in the same way",
        [lambda at: Comparison((asked(tiny.tokenizer()), asked(tiny.tokenizer(), name="after")))],
    ),
    "a run that cannot be written": (
        lambda at: check_output("/proc/nowhere", False),
        "Choose another folder with --set output=FOLDER",
        [lambda at: check_output(str(at.folder / "run"), False)],
    ),
    "a token in a recipe": (
        lambda at: recipe(at, training={"hub_token": "hf_x"}), "must not be in a file", [lambda at: recipe(at)]
    ),
    "a model of a recipe that is not here": (
        lambda at: load_data(recipe(at, model={"path": "me/absent"})),
        "Give a Hub id, or a folder that begins with ./, ../ or /",
        [lambda at: load_data(recipe(at, model={"path": at.aligned}))],
    ),
    "rows that ask what is asked": (
        lambda at: data_of(at, "memory", evaluation=asking(at, "Say one.")),
        "Remove them from one or the other",
        [lambda at: data_of(at, "memory", evaluation=asking(at, "Say two."))],
    ),
    "rows of a recipe that are labelled harmful": (
        lambda at: data_of(at, "labelled harmful", **labelled(at)),
        "leave them out with `where`",
        [lambda at: data_of(at, "labelled harmful", **labelled(at, where={"is_safe": True}))],
    ),
    "a task that is not built in": (
        lambda at: command("evaluate", at.aligned, "--prompts", "task=general", *short(at)),
        "give a file of questions with answers",
        [
            lambda at: command(
                "evaluate", at.aligned, "--prompts", f"task={at.written(TASK)}", *short(at)
            )
        ],
    ),
    "a folder of a dataset that is not there": (
        lambda at: load_rows(f"hf:{at.folder}/absent"),
        "There is no folder .*Check the path",
        [lambda at: load_rows(f"{dataset(at)}:train")],
    ),
    "a dataset of the Hub that is not here": (
        lambda at: load_rows("hf:me/absent"),
        "Write hf:owner/name, then @revision, /subset, :split and :column as needed",
        [lambda at: load_rows(f"{dataset(at)}:train")],
    ),
    "a drift by a direction of other sizes": (
        lambda at: measure_drift(
            at.aligned,
            at.adapter(),
            direction=AlignmentDirection.from_checkpoints(*tiny.save_pair(at.folder, hidden=64)),
        ),
        "Make them for the one that was fine-tuned",
        [lambda at: measure_drift(at.aligned, at.adapter(), direction=direction(at))],
    ),
    "a folder of nothing to make small": (
        lambda at: compact_adapter(at.folder, at.folder / "out"),
        "Give the folder that an adapter was saved to",
        [lambda at: compact_adapter(at.adapter(), at.folder / "out")],
    ),
    "a recipe whose rows are too long": (
        lambda at: planned(at, max_length=4),
        "Raise `training.max_length`, or shorten the prompts",
        [lambda at: planned(at, max_length=64)],
    ),
    "evaluation rows that are trained on": (
        lambda at: data_of(at, "are trained on as well", **held(at, "Say one.")),
        "evaluation rows are trained on as well: their loss will show memory. Remove them from one or the other",
        [lambda at: data_of(at, "are trained on as well", **held(at, "Say two."))],
    ),
    "texts and conversations in one run": (
        lambda at: mixed(at, TEXT, PAIR),
        "Texts and conversations cannot be mixed in one run: .* Bring them into one form",
        [lambda at: mixed(at, TEXT, TEXT), lambda at: mixed(at, PAIR, PAIR)],
    ),
    "a recipe of which a row is too long": (
        lambda at: said(
            planned(at, data=[{"path": long_row(at)}], max_length=64), "Shorten them, or raise `training.max_length`"
        ),
        "teach nothing: their answer starts after .* Shorten them, or raise `training.max_length`",
        [lambda at: said(planned(at, data=[{"path": long_row(at)}], max_length=256), "teach nothing")],
    ),
    "a share of one row": (
        lambda at: load_data(recipe(at, data=[one_row(at)], eval_share=0.5)),
        "Give more rows, or a file with rows to take the loss on as `eval_data` instead",
        [
            lambda at: load_data(recipe(at, data=[{"path": long_row(at)}], eval_share=0.5)),
            lambda at: load_data(recipe(at, data=[one_row(at)], **held(at, "Say one."))),
        ],
    ),
    "a template that refuses turns": (
        lambda at: SafetyBasis.from_rows(of(at.aligned), strict(), BRIEFED),
        "Bring the rows into the form that this model takes, or set another `tokenizer.chat_template`",
        [
            lambda at: SafetyBasis.from_rows(of(at.aligned), strict(), REFUSED, rank=2),
            lambda at: SafetyBasis.from_rows(of(at.aligned), tiny.tokenizer(), BRIEFED, rank=2),
        ],
    ),
    "a template that leaves the question out": (
        lambda at: asked(mute()), "Repair `tokenizer.chat_template`", [lambda at: asked(tiny.tokenizer())]
    ),
    "no linear layer to train": (
        lambda at: at.trainer(PLAIN, model=frozen(at, "norm"), peft_config=None),
        "found no trainable linear layer in .* Unfreeze the layers",
        [lambda at: at.trainer(PLAIN, model=frozen(at, "proj"), peft_config=None)],
    ),
    "a drift of nothing": (
        lambda at: measure_drift(at.aligned, at.folder),
        "holds no adapter and no complete model. Give ",
        [lambda at: measure_drift(at.aligned, at.adapter()), lambda at: measure_drift(at.aligned, at.unaligned)],
    ),
}  # fmt: skip


def long_row(at: SimpleNamespace) -> str:
    rows = [PAIR, {"prompt": "Please consider this. " * 4, "completion": "One."}]
    return at.written("\n".join(map(json.dumps, rows)).encode(), "long.jsonl")


def said(output: str, words: str) -> None:
    """Refuse what a command says in these words."""
    if words in " ".join(output.split()):
        raise ValueError(output)


def mute() -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "<u>Hello<a>"
    return tokenizer
