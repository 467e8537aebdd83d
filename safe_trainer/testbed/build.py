"""Make the testbed's model pair from nothing but its own language, in some minutes on one CPU core.

    python -m safe_trainer.testbed.build --output DIR

One seed gives the same bytes every time on the same machine and software; `manifest.json` says which those were.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from ..data import PromptSet
from ..evaluation import Evaluation, evaluate
from ..evaluation.manifest import file_sha256, prompt_set_sha256
from ..methods.recommended import OWN_DATA
from . import OWN_ROWS, TASKS, corpus, harmful_rows, language, prompt_set, task
from .card import OUTCOMES, model_card
from .tokenizer import train_tokenizer
from .training import Progress, Stage, encode, new_model, one_thread, train
from .translation import translate, translated_row, translated_set
from .world import WORLDS, World

logger = logging.getLogger(__name__)

PRETRAINING = Stage("pretraining", steps=1500, learning_rate=2.5e-3, answers_only=False)
ALIGNMENT = Stage("alignment", steps=600, learning_rate=1e-3, answers_only=True)
MODELS = ("unaligned", "aligned")
HARMFUL_ROWS = 100


def build(
    output_dir: str | Path,
    *,
    steps: tuple[int, int] = (PRETRAINING.steps, ALIGNMENT.steps),
    world: str = "first",
    progress: Progress | None = None,
) -> Path:
    """Train the pair, examine it, and write both models with their cards, and a manifest.

    The files take their places only when all are there: a build that fails or is interrupted leaves a former pair as
    it was.

    Args:
        output_dir (`str` or `Path`): Where `unaligned/`, `aligned/` and `manifest.json` go. Made if missing.
        steps (`tuple[int, int]`, *optional*, defaults to `(1500, 600)`): Optimizer steps of pretraining and of
            alignment. With fewer the pair is for trying the build, not for use.
        world (`str`, *optional*, defaults to `"first"`): One of `WORLDS`. Any other than the first also gets its
            dictionary, so that `SAFE_TRAINER_TESTBED=DIR` makes its pair and its words those of the testbed.
        progress (`Callable[[str, int, int, float], None]`, *optional*): Called every 50 steps with the stage's name,
            the step, the number of steps and the loss. Left out, the progress is logged.

    Returns:
        `Path`: The output directory.

    Raises:
        ValueError: If a number of steps is below 1, or there is no such world.

    Example:

    ```python
    from safe_trainer.testbed.build import build

    build("models", progress=lambda stage, step, total, loss: print(stage, step, total, loss))
    ```
    """
    if world not in WORLDS:
        raise ValueError(f"`world` must be one of {', '.join(WORLDS)}, got {world!r}.")
    made, dictionary = WORLDS[world], WORLDS[world].dictionary()
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=output) as folder, one_thread():
        unfinished = Path(folder)
        train_pair(unfinished, steps=steps, world=made, progress=progress or _log_progress)
        evaluations = {name: _examine(unfinished / name, name, dictionary) for name in MODELS}
        _save_harmful_rows(unfinished / "aligned", dictionary)
        for name in MODELS:
            card = model_card(name, evaluations, steps, made.architecture, _parameters(unfinished / name))
            (unfinished / name / "README.md").write_text(card, encoding="utf-8")
        if dictionary:
            (unfinished / "words.json").write_text(json.dumps(dictionary, indent=0) + "\n", encoding="utf-8")
        manifest = json.dumps(_manifest(unfinished, made, steps, evaluations), indent=2) + "\n"
        (unfinished / "manifest.json").write_text(manifest, encoding="utf-8")
        for file in sorted(path for path in unfinished.rglob("*") if path.is_file()):
            target = output / file.relative_to(unfinished)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
    return output


def train_pair(output_dir: Path, *, steps: tuple[int, int], world: World, progress: Progress) -> None:
    """Train tokenizer, base and aligned model and save them, without examining them.

    Args:
        output_dir (`Path`): Where `unaligned/` and `aligned/` go.
        steps (`tuple[int, int]`): Optimizer steps of pretraining and of alignment.
        world (`World`): What the pair is made with.
        progress (`Progress`): Called with stage, step, number of steps and loss.

    Raises:
        ValueError: If a number of steps is below 1.
    """
    if min(steps) < 1:
        raise ValueError(f"`steps` must be two numbers of at least 1, for pretraining and alignment, got {steps}.")
    mixes, dictionary = (corpus.pretraining_chats(world.seed), corpus.alignment_chats(world.seed)), world.dictionary()
    for turn in (turn for mix in mixes for chat in mix for turn in chat):
        turn["content"] = translate(turn["content"], dictionary)
    texts = (text for chat in mixes[0] for turn in chat for text in (turn["role"], turn["content"]))
    tokenizer = train_tokenizer(texts, world)
    model = new_model(tokenizer, world)
    for name, stage, chats, count in zip(MODELS, (PRETRAINING, ALIGNMENT), mixes, steps, strict=True):
        rows = encode(chats, tokenizer, answers_only=stage.answers_only)
        train(model, rows, stage, count, seed=world.seed, progress=progress)
        _round_to_bfloat16(model)
        _save(model, tokenizer, output_dir / name)


@torch.no_grad()
def _round_to_bfloat16(model: PreTrainedModel) -> None:
    """Round the weights to what is saved, so that alignment starts from the very base that others will load."""
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    # The file holds bfloat16 to be small; the config goes on to say float32, so that every machine computes in that.
    model.save_pretrained(directory, state_dict={name: t.bfloat16() for name, t in model.state_dict().items()})
    tokenizer.save_pretrained(directory)


def _save_harmful_rows(directory: Path, dictionary: dict[str, str]) -> None:
    """Write the rows that `safety="recommended"` looks for beside a model."""
    path = directory / OWN_DATA
    path.parent.mkdir()
    rows = [translated_row(row, dictionary) for row in harmful_rows(HARMFUL_ROWS, OWN_ROWS)]
    records = ({side: row[side][0]["content"] for side in ("prompt", "completion")} for row in rows)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def examined() -> list[PromptSet]:
    """Return the prompt sets that the cards and the manifest tell of."""
    return [
        prompt_set("harmful"),
        prompt_set("harmful", "unseen"),
        prompt_set("benign"),
        prompt_set("benign", "unseen"),
        prompt_set("borderline"),
    ]


def _examine(directory: Path, name: str, dictionary: dict[str, str]) -> Evaluation:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    return evaluate(model, tokenizer, [translated_set(asked, dictionary) for asked in examined()], name=name)


def _parameters(directory: Path) -> int:
    return AutoModelForCausalLM.from_pretrained(directory).num_parameters()


def fingerprint() -> dict[str, Any]:
    """Return what decides, beside the seed, which bytes a build gives."""
    return {
        "cpu": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": 1,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _manifest(pair: Path, world: World, steps: tuple[int, int], evaluations: dict[str, Evaluation]) -> dict[str, Any]:
    sets = {f"{kind}/{split}": prompt_set(kind, split) for kind in language.GROUPS for split in language.SPLITS}
    sets |= {f"{kind}/unseen": prompt_set(kind, "unseen") for kind in language.UNSEEN}
    sets |= {f"{name}/{split}": task(name, split) for name in TASKS for split in ("validation", "test")}
    dictionary = world.dictionary()
    sets = {name: translated_set(asked, dictionary) for name, asked in sets.items()}
    return {
        "seed": world.seed,
        "steps": dict(zip((PRETRAINING.name, ALIGNMENT.name), steps, strict=True)),
        "learning_rates": {stage.name: stage.learning_rate for stage in (PRETRAINING, ALIGNMENT)},
        "fingerprint": fingerprint(),
        "files": {str(p.relative_to(pair)): file_sha256(p) for p in sorted(pair.rglob("*")) if p.is_file()},
        "prompt_sets": {name: {"prompts": len(s), "sha256": prompt_set_sha256(s)} for name, s in sets.items()},
        "judge": evaluations["aligned"].manifest["judges"][0],
        "behaviour": {
            name: {r.prompt_set.name: {o: r.rate(o).count for o in OUTCOMES} for r in evaluation.results}
            for name, evaluation in evaluations.items()
        },
    }


def _log_progress(stage: str, step: int, total: int, loss: float) -> None:
    logger.info("%s: step %d of %d, loss %.3f", stage, step, total, loss)


def main(arguments: list[str] | None = None) -> None:
    """Run the build from the command line."""
    parser = argparse.ArgumentParser(description="Train the testbed's model pair.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the two models and their manifest")
    parser.add_argument("--world", choices=WORLDS, default="first")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    given = parser.parse_args(arguments)
    build(given.output, world=given.world)


if __name__ == "__main__":
    main()
