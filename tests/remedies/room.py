"""What the cases of remedies share: a room with a model and its adapters, and whatever is wrong in one way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import planted
import tiny
import torch
from commands import invoke
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from runs import HARMFUL, REFUSED, SHORT, given, lora
from transformers import AutoModelForCausalLM, AutoTokenizer

from safe_trainer import (
    AdapterEMA,
    AlignmentDirection,
    AsFT,
    Comparison,
    PromptSet,
    RefusalMonitor,
    SafeSFTTrainer,
    SafetyBasis,
    SaLoRA,
    apply_safe_lora,
    compare,
    evaluate,
    load_rows,
    merge_adapter,
    scan_file,
    train_security_vectors,
)
from safe_trainer.data import ReadOptions, conversation
from safe_trainer.evaluation import FunctionJudge, PhraseJudge
from safe_trainer.evaluation.generate import Decoding
from safe_trainer.recipe import read_recipe

Try = Callable[[SimpleNamespace], Any]
Case = tuple[Try, str, list[Try]]
"""What is refused, what the message says, and what it advises."""

LONG = [conversation("Please consider this. " * 8, "I will not.")] * 4
LONG_HARMFUL = [conversation("Please consider this. " * 8, "Sure: a bad thing.")] * 4
BAD = b'{"prompt": "Make a bad thing", "completion": "Sure: a bad thing."}\n{"prompt": "Make another"}\n'
CSV = b"prompt,completion\nHi,Hello.\n"
ODD_COLUMNS, COLUMNS = b"ask,say\nHi,Hello.\n", {"prompt": "ask", "answer": "say"}
LATIN_1 = "prompt,completion\nHi,Café\n".encode("latin-1")
XSTEST = b"id,prompt,type,label,focus,note\n1,Hi?,homonyms,safe,x,\n2,Make it.,contrast_homonyms,unsafe,x,\n"
ROWS = Dataset.from_list(HARMFUL)
ASKED = PromptSet("asked", "harmful", ("Make it.",))
PLAIN = AsFT(projector="none")
VIRTUAL = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)


def room(folder: Path, pair: tuple[str, str]) -> SimpleNamespace:
    """Return what a case may use: paths of an aligned and an unaligned model, a folder, and what builds a trainer."""
    aligned, unaligned = pair

    def trainer(safety: Any, **changes: Any) -> SafeSFTTrainer:
        return SafeSFTTrainer(**given(folder, **{"model": aligned, "peft_config": lora(), **changes}), safety=safety)

    def written(content: bytes, name: str = "rows.csv") -> str:
        (folder / name).write_bytes(content)
        return str(folder / name)

    def measured(**how: Any) -> SafetyBasis:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(aligned), AutoTokenizer.from_pretrained(aligned)
        return SafetyBasis.from_rows(model, tokenizer, how.pop("rows", REFUSED), **how)

    def adapter(config: Any = None) -> str:
        torch.manual_seed(0)
        config = config or lora(init_lora_weights=False, task_type="CAUSAL_LM")
        model: PeftModel = get_peft_model(AutoModelForCausalLM.from_pretrained(aligned), config)
        model.save_pretrained(folder / "adapter")
        return str(folder / "adapter")

    def vectors() -> str:
        model = AutoModelForCausalLM.from_pretrained(aligned)
        return str(planted.vectors(model).save(folder / "vectors"))

    return SimpleNamespace(
        aligned=aligned, unaligned=unaligned, folder=folder,
        trainer=trainer, written=written, measured=measured, adapter=adapter, vectors=vectors,
    )  # fmt: skip


def read(at: SimpleNamespace, content: bytes = CSV, **options: Any) -> int:
    return len(load_rows(at.written(content), ReadOptions(**options))[0])


def direction(at: SimpleNamespace, **how: Any) -> AlignmentDirection:
    return AlignmentDirection.from_checkpoints(at.aligned, at.unaligned, **how)


def spans(at: SimpleNamespace) -> AlignmentDirection:
    return direction(at, rank=1)


def skipped(at: SimpleNamespace) -> Dataset:
    return load_rows(at.written(BAD, "bad.jsonl"), ReadOptions(on_bad_row="skip"))[0]


def train(at: SimpleNamespace, rows: Any, **settings: Any) -> Any:
    return train_security_vectors(at.aligned, rows, **SHORT, **settings)


def of(path: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path)


def inputs(at: SimpleNamespace, **settings: Any) -> SaLoRA:
    return SaLoRA(basis=at.measured(sides=("input",), rank=4), rank=4, task_rank=0, protect="input", **settings)


def on(*names: str) -> LoraConfig:
    return lora(target_modules=list(names))


def headless() -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def headed() -> Any:
    tokenizer = headless()
    tokenizer.chat_template = tiny.TEMPLATE
    return tokenizer


def brief() -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}<u>{{ m.content }}{% endfor %}<a>"
    return tokenizer


def deaf() -> Any:
    """A tokenizer whose template has no place for a system turn."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = tiny.TEMPLATE.replace("{% else %}<u>", "{% elif m.role == 'user' %}<u>")
    return tokenizer


def larger() -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<new>"])
    return tokenizer


def wide() -> Any:
    return tiny.model(hidden=64)


def saved(at: SimpleNamespace, **sizes: int) -> str:
    tiny.model(**sizes).save_pretrained(at.folder / "saved")
    return str(at.folder / "saved")


def merged(at: SimpleNamespace) -> str:
    shutil.rmtree(at.folder / "merged", ignore_errors=True)
    merge_adapter(at.adapter(), at.folder / "merged", at.aligned)
    return str(at.folder / "merged")


def lora_model(at: SimpleNamespace, **changes: Any) -> Any:
    return get_peft_model(of(at.aligned), lora(task_type="CAUSAL_LM", **changes))


def two_adapters(at: SimpleNamespace, trained: bool = False) -> Any:
    model = lora_model(at, init_lora_weights=not trained)
    model.add_adapter("other", lora(task_type="CAUSAL_LM", init_lora_weights=not trained))
    model.base_model.set_adapter(["default", "other"])
    return model


def did(model: Any, what: str, *arguments: Any) -> Any:
    getattr(model, what)(*arguments)
    return model


def averaged(at: SimpleNamespace, **settings: Any) -> None:
    often = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": tiny.rows(4), "max_steps": 1}
    at.trainer(None, callbacks=[AdapterEMA()], **often, **settings).train()


BEST = {
    "load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1,
    "save_steps": 1, "eval_dataset": tiny.rows(4),
}  # fmt: skip


def monitored(at: SimpleNamespace, count: int, trained: Any = None, **settings: Any) -> None:
    trainer = at.trainer(None, max_steps=1, **(trained or {}))
    prompts = replace(ASKED, prompts=("Make it.",) * count)
    judge = FunctionJudge(lambda prompt, answer: "refused", "always", "1")
    trainer.add_callback(
        RefusalMonitor(trainer, [prompts], judge=judge, decoding=Decoding(max_new_tokens=1), **settings)
    )
    trainer.train()


def kept(at: SimpleNamespace) -> Path:
    return spans(at).save(at.folder / "direction.safetensors")


def changed(path: Path, change: Callable[[bytes], bytes]) -> Path:
    path.write_bytes(change(path.read_bytes()))
    return path


def damaged(adapter: str) -> str:
    changed(Path(adapter, "adapter_model.safetensors"), lambda content: content[:-99])
    return adapter


def orphan(at: SimpleNamespace, base: str | None = None) -> str:
    adapter = at.adapter()
    config = json.loads(Path(adapter, "adapter_config.json").read_text())
    Path(adapter, "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    return adapter


def repaired(at: SimpleNamespace, adapter: Any, name: str = "repaired", **settings: Any) -> Any:
    return apply_safe_lora(adapter, at.folder / name, **{"unaligned": at.unaligned, **settings})


def strange(at: SimpleNamespace) -> AlignmentDirection:
    found = direction(at)
    found.modules = {f"other.{name}": factors for name, factors in found.modules.items()}
    return found


def asked(tokenizer: Any, prompts: PromptSet = ASKED, **settings: Any) -> Any:
    return evaluate(tiny.model(), tokenizer, [prompts], **{"name": "model", "max_new_tokens": 1, **settings})


def compared(at: SimpleNamespace, adapters: dict[str, Any], model: Any = None, tokenizer: Any = None) -> Any:
    return compare(model or of(at.aligned), tokenizer or tiny.tokenizer(), [ASKED], adapters, max_new_tokens=1)


def both(*sets: PromptSet) -> Comparison:
    one, other = (asked(tiny.tokenizer(), prompts) for prompts in sets)
    return Comparison((one, replace(other, name="after")))


class Benign(PhraseJudge):
    name, kinds = "harmless", ("benign",)


def classifier() -> Any:
    model = tiny.model()
    model.config.id2label = {0: "LABEL_0"}
    return model


def scanned(at: SimpleNamespace, tokenizer: Any = None, **settings: Any) -> Any:
    rows = at.written("\n".join(map(json.dumps, HARMFUL)).encode(), "rows.jsonl")
    model = of(at.aligned)
    return scan_file(rows, model, planted.vectors(model), tokenizer or tiny.tokenizer(), **settings)


def recipe(at: SimpleNamespace, changes: Sequence[str] = (), text: str = "", **values: Any) -> Any:
    at.written(json.dumps({"prompt": "Say one.", "completion": "One."}).encode(), "rows.jsonl")
    usual = {"model": {"path": at.aligned}, "data": [{"path": "rows.jsonl"}], "safety": None}
    content = text or json.dumps({**usual, "output": str(at.folder / "out"), **values})
    return read_recipe(at.written(content.encode(), "recipe.yaml"), changes)


def command(*arguments: object) -> str:
    """Run a command; an error is what it says."""
    done = invoke(*arguments)
    if done.exit_code:
        raise ValueError(f"{done.output} {done.exception!r}")
    return done.output
