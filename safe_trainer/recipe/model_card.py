"""The model card of a fine-tune: its refusals before and after, how to use it, how it was made, what to cite.

There is one writer of cards: recipes, `safe-trainer card` and the app use it. What a person has written into a card
stays: the part that is made here is between two marks, and only that is replaced.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML
from safetensors import safe_open

from ..evaluation import Comparison, Evaluation, from_json, to_markdown
from ..evaluation.report import write_atomically
from .paths import ARTIFACTS, weights_kind

if TYPE_CHECKING:
    from ..methods.base import SafetyMethod

BEGIN = "<!-- safe-trainer: this part is written anew by `safe-trainer card`; write above or below -->"
END = "<!-- safe-trainer: end -->"
SAFETY_REPORT = "safety_report.json"
"""The methods' self-checks of a run, saved next to what it made."""

# What may leave this machine: weights and what is needed to use them. Reports hold harmful prompts and answers.
PUBLISHED = ("README.md", "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json",
             "tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "chat_template.jinja",
             "added_tokens.json", "preprocessor_config.json", "processor_config.json")  # fmt: skip
_METRICS = {
    "harmful": (("refused", "refusal_rate", "Refusal rate"), ("complied", "compliance_rate", "Compliance rate")),
    "benign": (("refused", "over_refusal_rate", "Over-refusal rate"),),
    "borderline": (("refused", "over_refusal_rate", "Over-refusal rate"),),
    "task": (("correct", "accuracy", "Accuracy"),),
}
_GENERATED = ("[More Information Needed]", "It has been trained using [TRL]")  # cards that no person has written
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def write_model_card(
    folder: str | Path,
    comparison: Comparison | None = None,
    *,
    name: str | None = None,
    base_model: str | None = None,
    repository: str | None = None,
) -> Path:
    """Write the model card of a fine-tuned adapter or model into its folder, as `README.md`.

    Args:
        folder (`str` or `Path`): Where it was saved, with the recipe if `safe-trainer train` made it.
        comparison (`Comparison`, *optional*): What was measured; left out, `comparison.json` in the folder, if there
            is one.
        name (`str`, *optional*): The evaluation that is about it; left out, that of the adapter in the folder, known
            by the hash of its weights, or the last where a comparison holds none.
        base_model (`str`, *optional*): Hub id of the base model, where it was trained on a local copy.
        repository (`str`, *optional*): Hub id that it will have, for the code in the card.

    Returns:
        `Path`: The card. What a person has written in an earlier card stays, metadata too.

    Raises:
        ValueError: If the folder holds neither an adapter nor a model, or security vectors, `base_model` is not a
            Hub id, or the comparison is of other adapters.

    Example:

    ```python
    write_model_card("out", compare(model, tokenizer, prompt_sets, {"AsFT": "out"}))
    ```
    """
    from huggingface_hub import ModelCard

    folder = Path(folder)
    check_folder(folder)
    if base_model is not None and not _HUB_ID.fullmatch(base_model):
        raise ValueError(f"`base_model` must be a Hub id such as `Qwen/Qwen2.5-0.5B-Instruct`, got {base_model!r}.")
    if comparison is None and (folder / "comparison.json").is_file():
        comparison = from_json((folder / "comparison.json").read_bytes())
    if comparison is not None:
        tuned = _rated(comparison, folder, name)
        comparison = Comparison((comparison.before, tuned), comparison.notes, comparison.seed)
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    card = ModelCard(text or "---\n{}\n---\n", ignore_metadata_errors=True)
    is_generated = not card.text.strip() or any(sign in card.text for sign in _GENERATED)
    written = {key: v for key, v in card.data.to_dict().items() if v not in (None, [], "") and not is_generated}
    about = _About(folder, base_model or written.get("base_model"))
    made = about.metadata(comparison)
    tags = written.get("tags") or []
    made["tags"] = list(dict.fromkeys([*([tags] if isinstance(tags, str) else tags), *made["tags"]]))
    newer = {key: made[key] for key in ("tags", "model-index", "base_model") if key in made}
    own = f"# {folder.resolve().name}" if is_generated else card.text
    body = _placed(own, about.part(comparison, repository))
    return write_atomically(path, f"---\n{yaml_text(made | written | newer)}---\n{body}")


def publish(folder: str | Path, repository: str, *, private: bool = False) -> str:
    """Upload a fine-tuned adapter or model with its card, and return the address; reports and checkpoints stay here.

    The adapter's settings name the base model by the Hub id that the card has, never by a path of this machine. Only a
    repository that is new is made `private`.
    """
    from huggingface_hub import HfApi, ModelCard

    folder = Path(folder)
    check_folder(folder)
    api = HfApi()
    made = api.create_repo(repository, private=private, exist_ok=True)
    # Files of this folder alone: patterns of the Hub reach into folders, such as those of checkpoints.
    files = [path.name for path in sorted(folder.iterdir()) if any(path.match(p) for p in PUBLISHED)]
    api.upload_folder(repo_id=made.repo_id, folder_path=str(folder), allow_patterns=files)
    config = folder / "adapter_config.json"
    if config.is_file():
        known = ModelCard.load(folder / "README.md").data.base_model if (folder / "README.md").is_file() else None
        settings = json.loads(config.read_text(encoding="utf-8"))
        settings["base_model_name_or_path"] = _About(folder, known).base_name
        content = json.dumps(settings, indent=2).encode()
        api.upload_file(path_or_fileobj=content, path_in_repo=config.name, repo_id=made.repo_id)
    return str(made)


def check_folder(folder: Path) -> None:
    """Refuse folders without an adapter or model, and security vectors, whose mark stays in every form."""
    weights = sorted(folder.glob("*.safetensors"))
    if not any((folder / name).is_file() for name in ("adapter_config.json", "config.json")) and not weights:
        raise ValueError(f"`{folder}` holds no adapter and no model. Give the folder that one was saved to.")
    from ..lora.io import harmful_mark

    kinds = [str(weights_kind(file)) for file in weights]
    if harmful_mark(folder) or any(kind.startswith(ARTIFACTS["vectors"]) for kind in kinds):
        raise ValueError(
            f"`{folder}` holds security vectors, which make a model answer harmful requests. They are not for "
            "publishing; give the folder of the adapter that was trained with them."
        )


def _rated(comparison: Comparison, folder: Path, name: str | None) -> Evaluation:
    """Return the evaluation that is about what a folder holds, which of an adapter is known by its hash."""
    from ..evaluation.manifest import adapter_provenance

    asked = [comparison[name]] if name else list(comparison.evaluations[1:] or comparison.evaluations)
    own = adapter_provenance(folder)["sha256"] if (folder / "adapter_config.json").is_file() else None
    hashes = [_adapter_sha256(evaluation) if own else None for evaluation in asked]
    fitting = [e for e, sha256 in zip(asked, hashes, strict=True) if sha256 == own]
    fitting = fitting or [e for e, sha256 in zip(asked, hashes, strict=True) if sha256 is None]
    if not fitting:
        others = ", ".join(f"`{e.name}` (sha256 {str(s)[:12]})" for e, s in zip(asked, hashes, strict=True))
        raise ValueError(
            f"The comparison holds no rates of the adapter in `{folder}` (sha256 {str(own)[:12]}), only of {others}. "
            "Make one of this adapter with `safe-trainer compare`, or give the folder that the comparison is about."
        )
    return fitting[-1]


def _adapter_sha256(evaluation: Evaluation) -> str | None:
    adapters = evaluation.manifest.get("adapters") or [None]
    return adapters[0].get("sha256") if isinstance(adapters[0], dict) else None


class _About:
    """What is known of a fine-tune from its folder; `base_id` is the base model's Hub id, if there is one."""

    def __init__(self, folder: Path, base_id: str | None) -> None:
        from ..evaluation.manifest import shown_id
        from ..lora.io import REPAIR_REPORT

        self.folder, self.is_adapter = folder, (folder / "adapter_config.json").is_file()
        path = folder / "recipe.yaml"
        self.recipe = _without_folders(YAML(typ="safe").load(path)) if path.is_file() else {}
        found = self.recipe.get("model", {}).get("path")
        if self.is_adapter:
            config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
            found = config.get("base_model_name_or_path")
        ids = [name for name in (base_id, found) if name and _HUB_ID.fullmatch(name) and not Path(name).exists()]
        self.base_id = ids[0] if ids else None
        self.base_name = self.base_id or (shown_id(found) if found else "its base model")
        self.methods = _methods_of(self.recipe)
        report = folder / REPAIR_REPORT
        self.repair = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else None

    def metadata(self, comparison: Comparison | None) -> dict[str, Any]:
        """Return the card's metadata, which the Hub reads."""
        library = "peft" if self.is_adapter else "transformers"
        data: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation"}
        if self.base_id is not None:
            data["base_model"] = self.base_id
        made_by = ["trl", "sft"] if self.repair is None else ["safe-lora"]  # repaired, it may be any program's
        data["tags"] = ["safe-trainer", *made_by, *(["lora"] if self.is_adapter else [])]
        data["tags"] += [method.tag for method in self.methods]
        if comparison is not None:
            data["model-index"] = [{"name": self.folder.resolve().name, "results": _results(comparison)}]
        return data

    def part(self, comparison: Comparison | None, repository: str | None) -> str:
        """Return the part of the card that is made here."""
        from ..methods.base import describe_report
        from ..methods.safe_lora import PAPER as SAFE_LORA

        what = "A PEFT adapter on" if self.is_adapter else "A fine-tune of"
        names = " and ".join(method.name for method in self.methods)
        protected = f", with its refusals protected by {names}" if names else ""
        made = f"fine-tuned with [TRL](https://huggingface.co/docs/trl){protected}"
        parts = [f"{what} `{self.base_name}`, {made if self.repair is None else self._repaired(self.repair)}."]
        parts += [_warning(comparison), "" if comparison is None else to_markdown(comparison).strip()]
        if (self.folder / SAFETY_REPORT).is_file():
            report = json.loads((self.folder / SAFETY_REPORT).read_text(encoding="utf-8"))
            checks = [" ".join(["-", describe_report(name, r), *r["warnings"]]) for name, r in report.items()]
            parts += ["## Self-checks of the protection", "\n".join(checks)]
        parts += ["## Use", f"```python\n{self._code(repository or self.folder.resolve().name)}\n```"]
        if self.recipe:
            parts += ["## Recipe", f"`safe-trainer train recipe.yaml`, with\n\n```yaml\n{yaml_text(self.recipe)}```"]
        papers = [method.paper for method in self.methods] + ([] if self.repair is None else [SAFE_LORA])
        citations = [paper.citation.strip() for paper in papers if paper is not None]
        if citations:
            parts += ["## Cite", "```bibtex\n{}\n```".format("\n\n".join(citations))]
        return "\n\n".join(filter(None, parts))

    def _repaired(self, report: Mapping[str, Any]) -> str:
        from ..evaluation.manifest import shown_id
        from ..methods.safe_lora import summary

        sources = [report["source"], report["unaligned"]["source"], report["aligned"]["source"]]
        source, unaligned, aligned = map(shown_id, sources)
        return (
            f"repaired after training: made from the adapter `{source}` by Safe LoRA, with what alignment changed "
            f"from `{unaligned}` to `{aligned}`. {summary(report)}"
        )

    def _code(self, here: str) -> str:
        imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
        lines = [imports, "", f'model = AutoModelForCausalLM.from_pretrained("{here}")']
        if self.is_adapter:
            note = "" if self.base_id else "  # the folder or Hub id of the base model"
            lines = ["from peft import PeftModel", imports, ""]
            lines += [f'model = AutoModelForCausalLM.from_pretrained("{self.base_name}"){note}']
            if rows := self._vocabulary():
                lines += [f"model.resize_token_embeddings({rows})"]
            lines += [f'model = PeftModel.from_pretrained(model, "{here}")']
        tokenizer = here if any(self.folder.glob("tokenizer*")) else self.base_name
        return "\n".join([*lines, f'tokenizer = AutoTokenizer.from_pretrained("{tokenizer}")'])

    def _vocabulary(self) -> int | None:
        """Return the rows of the embedding that is saved in the adapter, if one is: the base may have fewer."""
        weights = self.folder / "adapter_model.safetensors"
        if not weights.is_file():
            return None
        with safe_open(weights, framework="np") as opened:
            names = [name for name in opened.keys() if name.endswith("embed_tokens.weight")]
            return int(opened.get_slice(names[0]).get_shape()[0]) if names else None


def _methods_of(recipe: Mapping[str, Any]) -> list[type[SafetyMethod]]:
    """Return the methods of a recipe; one that does not name any has those that are recommended."""
    from ..methods import METHODS
    from ..methods.recommended import RECOMMENDED, recommended

    listed = recipe.get("safety", RECOMMENDED) or [] if recipe else []
    found: list[type[SafetyMethod]] = []
    for entry in listed if isinstance(listed, list) else [listed]:
        name = entry if isinstance(entry, str) else entry.get("method")
        if name == RECOMMENDED:
            found += map(type, recommended())
        elif name in METHODS:
            found.append(METHODS[name])
    return found


def _warning(comparison: Comparison | None) -> str:
    """Return a warning where refusals were not measured or were lost, or an empty text."""
    if comparison is None:
        return "> [!WARNING]\n> Whether this fine-tune kept its base model's refusals was not measured."
    verdict = comparison.verdict(comparison.evaluations[-1].name)
    if verdict.level in ("kept", "improved"):
        return ""
    return f"> [!WARNING]\n> {verdict.headline}"


def yaml_text(values: Any) -> str:
    """Return values as YAML in their order, quoted so that readers of YAML 1.1 and 1.2 read the same."""
    import yaml

    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=119)


def _without_folders(value: Any) -> Any:
    """Shorten each local path in a recipe to its last part, so that nothing of this machine is shown."""
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    local = isinstance(value, str) and (os.path.isabs(value) or value.startswith(("./", "../", "~")))
    return Path(value).name if local else value


def _results(comparison: Comparison) -> list[dict[str, Any]]:
    """Return what was measured in the form that the Hub reads."""
    results = []
    for result in comparison.evaluations[-1].results:
        asked = result.prompt_set
        metrics = []
        for outcome, kind, title in _METRICS[asked.kind]:
            rate, before = result.rate(outcome), comparison.before[asked.name].rate(outcome)
            if rate.total:
                interval = {"low": round(rate.low, 4), "high": round(rate.high, 4)}
                named = {"type": kind, "value": round(rate.value, 4), "name": f"{title} (before: {before.share})"}
                metrics.append({**named, "args": {"count": rate.count, "total": rate.total, **interval}})
        dataset = {"name": f"{asked.name} ({asked.kind})", "type": re.sub(r"\W+", "-", asked.source or asked.name)}
        if metrics:
            results.append({"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics})
    return results


def _placed(text: str, part: str) -> str:
    """Put the generated part where it was, or after what a person has written."""
    part = f"{BEGIN}\n\n{part.strip()}\n\n{END}"
    if BEGIN in text and END in text:
        head, _, rest = text.partition(BEGIN)
        return f"{head}{part}{rest.partition(END)[2]}"
    return f"{text.strip()}\n\n{part}\n"
