"""The model card of something fine-tuned: what it is, what became of its refusals, how it was made, whom to cite.

A card is written beside the adapter or model. What a person has written into it stays: the part that is made here
stands between two marks, and only that is written anew.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..evaluation import Comparison, Evaluation, from_json, to_markdown
from ..evaluation.manifest import shown_id
from ..evaluation.report import write_atomically
from ..methods import METHODS, SafetyMethod
from ..methods.recommended import RECOMMENDED, recommended

BEGIN = "<!-- safe-trainer: this part is written anew by `safe-trainer card`; write above or below -->"
END = "<!-- safe-trainer: end -->"

# What may leave this machine: weights and what is needed to use them. Reports hold harmful prompts and answers.
PUBLISHED = ("README.md", "*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json",
             "generation_config.json", "tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt",
             "chat_template.jinja", "added_tokens.json")  # fmt: skip
_METRICS = {
    "harmful": (("refused", "refusal_rate", "Refusal rate"), ("complied", "attack_success_rate", "Harmful answered")),
    "benign": (("refused", "over_refusal_rate", "Over-refusal rate"),),
    "borderline": (("refused", "over_refusal_rate", "Over-refusal rate"),),
    "task": (("correct", "accuracy", "Accuracy"),),
}


def write_model_card(folder: str | Path, comparison: Comparison | None = None, *, name: str | None = None) -> Path:
    """Write the model card of a fine-tuned adapter or model beside it, as `README.md`.

    Args:
        folder (`str` or `Path`): Where it was saved, with the recipe if `safe-trainer train` made it.
        comparison (`Comparison`, *optional*): What it was found to do; left out, `comparison.json` in the folder, if
            there is one.
        name (`str`, *optional*): The evaluation that is about it; left out, the comparison's last.

    Returns:
        `Path`: The card. Text of one's own in an earlier card stays as it is, metadata too.

    Raises:
        ValueError: If the folder holds neither an adapter nor a model, or security vectors.

    Example:

    ```python
    write_model_card("out", compare(model, tokenizer, prompt_sets, {"AsFT": "out"}))
    ```
    """
    from huggingface_hub import ModelCard

    folder = Path(folder)
    _check_folder(folder)
    if comparison is None and (folder / "comparison.json").is_file():
        comparison = from_json((folder / "comparison.json").read_bytes())
    tuned = None
    if comparison is not None:
        tuned = comparison[name] if name else comparison.evaluations[-1]
        comparison = Comparison((comparison.before, tuned), comparison.notes, comparison.seed)
    recipe = _recipe(folder)
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    card = ModelCard(text or "---\n{}\n---\n", ignore_metadata_errors=True)
    metadata = _merged(card.data.to_dict(), _metadata(folder, recipe, comparison, tuned))
    body = _placed(card.text, _part(folder, recipe, comparison), folder.resolve().name)
    import yaml

    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    return write_atomically(path, f"---\n{front}---\n{body}")


def publish(folder: str | Path, repository: str, *, private: bool = False) -> str:
    """Upload a fine-tuned adapter or model with its card; reports and checkpoints stay here.

    Args:
        folder (`str` or `Path`): Where it was saved.
        repository (`str`): Such as `"me/my-model"`; made if it is not there.
        private (`bool`, *optional*, defaults to `False`): Whether a new repository can be seen by its owner only.

    Returns:
        `str`: Its address.

    Raises:
        ValueError: If the folder holds neither an adapter nor a model, or security vectors.
    """
    from huggingface_hub import HfApi

    _check_folder(Path(folder))
    api = HfApi()
    made = api.create_repo(repository, private=private, exist_ok=True)
    # Files of this folder alone: patterns of the Hub reach into folders, and checkpoints lie in some.
    files = [path.name for path in sorted(Path(folder).iterdir()) if any(path.match(p) for p in PUBLISHED)]
    api.upload_folder(repo_id=made.repo_id, folder_path=str(folder), allow_patterns=files)
    return str(made)


def _check_folder(folder: Path) -> None:
    from safetensors import safe_open

    weights = folder / "adapter_model.safetensors"
    if not weights.is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"`{folder}` holds no adapter and no model. Give the folder that one was saved to.")
    if weights.is_file():
        with safe_open(weights, framework="pt") as file:
            kind = (file.metadata() or {}).get("kind")
        if kind is not None and kind.startswith("security vectors"):
            raise ValueError(
                f"`{folder}` holds security vectors, which make a model answer harmful requests. They have a card of "
                "their own and are not for publishing; give the folder of the adapter that was trained with them."
            )


def _recipe(folder: Path) -> dict[str, Any]:
    """Read the recipe without what is nobody's business: folders of this machine."""
    import yaml

    path = folder / "recipe.yaml"
    return _without_folders(yaml.safe_load(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    local = isinstance(value, str) and (os.path.isabs(value) or value.startswith(("./", "../")))
    return Path(value).name if local else value


def _methods(recipe: dict[str, Any]) -> list[type[SafetyMethod]]:
    """Return the methods of a recipe; one that says nothing of them has those that are recommended."""
    if not recipe:
        return []
    listed = recipe.get("safety", RECOMMENDED) or []
    found: list[type[SafetyMethod]] = []
    for entry in listed if isinstance(listed, list) else [listed]:
        name = entry if isinstance(entry, str) else entry.get("method")
        if name == RECOMMENDED:
            found += map(type, recommended("harmful.jsonl"))  # asked for its kinds alone
        elif name in METHODS:
            found.append(METHODS[name])
    return found


def _base(folder: Path, recipe: dict[str, Any]) -> str:
    config = folder / "adapter_config.json"
    if config.is_file():
        found = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    else:
        found = recipe.get("model", {}).get("path")
    return shown_id(found) if found else "unknown"


def _metadata(
    folder: Path, recipe: dict[str, Any], comparison: Comparison | None, tuned: Evaluation | None
) -> dict[str, Any]:
    base, is_adapter = _base(folder, recipe), (folder / "adapter_config.json").is_file()
    library = "peft" if is_adapter else "transformers"
    data: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation"}
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base):  # the Hub refuses a card whose base is no id
        data["base_model"] = base
    tags = ["safe-trainer", "trl", "sft", *(["lora"] if is_adapter else [])]
    data["tags"] = tags + [method.tag for method in _methods(recipe)]
    if comparison is not None and tuned is not None:
        data["model-index"] = [{"name": folder.resolve().name, "results": _results(comparison, tuned)}]
    return data


def _results(comparison: Comparison, tuned: Evaluation) -> list[dict[str, Any]]:
    """Return what was measured in the form that the Hub reads."""
    results = []
    for result in tuned.results:
        asked = result.prompt_set
        metrics = []
        for outcome, kind, title in _METRICS[asked.kind]:
            rate, before = result.rate(outcome), comparison.before[asked.name].rate(outcome)
            if rate.total:
                counts = {"count": rate.count, "total": rate.total}
                interval = {"low": round(rate.low, 4), "high": round(rate.high, 4)}
                named = {"type": kind, "value": round(rate.value, 4), "name": f"{title} (before: {before.share})"}
                metrics.append({**named, "args": {**counts, **interval}})
        dataset = {"name": f"{asked.name} ({asked.kind})", "type": re.sub(r"\W+", "-", asked.source or asked.name)}
        if metrics:
            results.append({"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics})
    return results


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Keep what stands there; tags are added, and what was measured is renewed."""
    merged = {**new, **{key: value for key, value in old.items() if value not in (None, [], "")}}
    tags: Sequence[str] = [*(old.get("tags") or []), *new["tags"]]
    merged["tags"] = list(dict.fromkeys(tags))
    if "model-index" in new:
        merged["model-index"] = new["model-index"]
    return merged


def _placed(text: str, part: str, name: str) -> str:
    """Put the part where it was, or behind what a person has written; PEFT's empty form has nothing to keep."""
    part = f"{BEGIN}\n\n{part.strip()}\n\n{END}"
    if BEGIN in text and END in text:
        head, _, rest = text.partition(BEGIN)
        return f"{head}{part}{rest.partition(END)[2]}"
    if not text.strip() or text.count("[More Information Needed]") > 10:
        text = f"# {name}"
    return f"{text.strip()}\n\n{part}\n"


def _part(folder: Path, recipe: dict[str, Any], comparison: Comparison | None) -> str:
    import yaml

    base, methods = _base(folder, recipe), _methods(recipe)
    is_adapter = (folder / "adapter_config.json").is_file()
    protected = f", with its refusals protected by {' and '.join(m.name for m in methods)}" if methods else ""
    what = "A PEFT adapter on" if is_adapter else "A fine-tune of"
    parts = [f"{what} `{base}`, fine-tuned with [TRL](https://huggingface.co/docs/trl){protected}.", "## Use"]
    load = f'model = AutoModelForCausalLM.from_pretrained("{folder.resolve().name}")'
    imports = "from transformers import AutoModelForCausalLM"
    if is_adapter:
        imports += "\nfrom peft import PeftModel"
        load = f'model = AutoModelForCausalLM.from_pretrained("{base}")\n' + load.replace(
            "AutoModelForCausalLM.from_pretrained(", "PeftModel.from_pretrained(model, "
        )
    parts.append(f"```python\n{imports}\n\n{load}\n```")
    if comparison is not None:
        parts.append(to_markdown(comparison).strip())
    if recipe:
        written = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).strip()
        parts += ["## Recipe", f"`safe-trainer train recipe.yaml`, with\n\n```yaml\n{written}\n```"]
    papers = [method.paper for method in methods if method.paper is not None]
    if papers:
        cited = "\n\n".join(paper.citation.strip() for paper in papers)
        parts += ["## Cite", f"```bibtex\n{cited}\n```"]
    return "\n\n".join(parts)
