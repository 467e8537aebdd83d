"""Train the embedded model pair from its own language, in some minutes on one CPU core.

    python recipes/testbed/build/build_pair.py --output DIR

One seed gives the same bytes every time on the same machine and software, which are recorded in `manifest.json`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import platform
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from corpus import alignment_chats, pretraining_chats
from pair_card import OUTCOMES, model_card
from training import Progress, Stage, encode, one_thread, train
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from translation import translate, translated_row, translated_set
from world import EMBEDDED, World, train_tokenizer

from safe_trainer import PromptSet, evaluate
from safe_trainer.data.protection import OWN_FILES
from safe_trainer.evaluation import Evaluation
from safe_trainer.testbed import OWN_ROWS, TASKS, benign_rows, harmful_rows, language, prompt_set, task

logger = logging.getLogger(__name__)

PRETRAINING = Stage("pretraining", steps=1500, learning_rate=2.5e-3, answers_only=False)
ALIGNMENT = Stage("alignment", steps=600, learning_rate=1e-3, answers_only=True)
MODELS = ("unaligned", "aligned")
HARMFUL_ROWS, BENIGN_ROWS = 100, 64


def build(
    output_dir: str | Path,
    *,
    steps: tuple[int, int] = (PRETRAINING.steps, ALIGNMENT.steps),
    world: World = EMBEDDED,
    progress: Progress | None = None,
) -> Path:
    """Train the pair, examine it, and write both models with their cards, and a manifest.

    Files are moved into place only when all of them are complete: a build that fails or is interrupted leaves a former
    pair as it was.

    Args:
        output_dir (`str` or `Path`): Where `unaligned/`, `aligned/` and `manifest.json` go. Made if missing.
        steps (`tuple[int, int]`, *optional*, defaults to `(1500, 600)`): Optimizer steps of pretraining and of
            alignment. With fewer the pair is for trying the build, not for use.
        world ([`World`], *optional*, defaults to `EMBEDDED`): What the pair is made with. If it has words of its own,
            its dictionary is saved as `words.json`.
        progress (`Callable[[str, int, int, float], None]`, *optional*): Called every 50 steps with the stage's name,
            the step, the number of steps and the loss. Left out, the progress is logged.

    Returns:
        `Path`: The output directory.

    Raises:
        ValueError: If a number of steps is below 1.
    """
    dictionary = world.dictionary
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=output) as folder, one_thread():
        unfinished = Path(folder)
        train_pair(unfinished, steps=steps, world=world, progress=progress or _log_progress)
        evaluations = {name: _examine(unfinished / name, name, dictionary) for name in MODELS}
        _save_own_rows(unfinished / "aligned", dictionary)
        for name in MODELS:
            card = model_card(name, evaluations, steps, world.architecture, _parameters(unfinished / name))
            (unfinished / name / "README.md").write_text(card, encoding="utf-8")
        if dictionary:
            (unfinished / "words.json").write_text(json.dumps(dict(dictionary), indent=0) + "\n", encoding="utf-8")
        manifest = json.dumps(_manifest(unfinished, world, steps, evaluations), indent=2) + "\n"
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
    mixes = (pretraining_chats(world.seed), alignment_chats(world.seed))
    for turn in (turn for mix in mixes for chat in mix for turn in chat):
        turn["content"] = translate(turn["content"], world.dictionary)
    texts = (text for chat in mixes[0] for turn in chat for text in (turn["role"], turn["content"]))
    tokenizer = train_tokenizer(texts, world)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
        torch.manual_seed(world.seed)
        model = world.untrained(tokenizer)
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


def _save_own_rows(directory: Path, dictionary: Mapping[str, str]) -> None:
    """Write the rows that `safety="recommended"` finds in the model's folder."""
    found = {"harmful": harmful_rows(HARMFUL_ROWS, OWN_ROWS), "benign": benign_rows(BENIGN_ROWS, OWN_ROWS)}
    for kind, rows in found.items():
        path = directory / OWN_FILES[kind]
        path.parent.mkdir(parents=True, exist_ok=True)
        translated = [translated_row(row, dictionary) for row in rows]
        records = ({side: row[side][0]["content"] for side in ("prompt", "completion")} for row in translated)
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def examined() -> list[PromptSet]:
    """Return the prompt sets of cards and manifest."""
    return [
        prompt_set("harmful"),
        prompt_set("harmful", "unseen"),
        prompt_set("benign"),
        prompt_set("benign", "unseen"),
        prompt_set("borderline"),
    ]


def _examine(directory: Path, name: str, dictionary: Mapping[str, str]) -> Evaluation:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    return evaluate(model, tokenizer, [translated_set(asked, dictionary) for asked in examined()], name=name)


def _parameters(directory: Path) -> int:
    return AutoModelForCausalLM.from_pretrained(directory).num_parameters()


def fingerprint() -> dict[str, Any]:
    """Return what decides, besides the seed, which bytes a build gives."""
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
    sets = {name: translated_set(asked, world.dictionary) for name, asked in sets.items()}
    return {
        "seed": world.seed,
        "steps": dict(zip((PRETRAINING.name, ALIGNMENT.name), steps, strict=True)),
        "learning_rates": {stage.name: stage.learning_rate for stage in (PRETRAINING, ALIGNMENT)},
        "fingerprint": fingerprint(),
        "files": {str(p.relative_to(pair)): _sha256(p.read_bytes()) for p in sorted(pair.rglob("*")) if p.is_file()},
        "prompt_sets": {name: {"prompts": len(s), "sha256": _prompts_sha256(s)} for name, s in sets.items()},
        "judge": evaluations["aligned"].manifest["judges"][0],
        "behaviour": {
            name: {r.prompt_set.name: {o: r.rate(o).count for o in OUTCOMES} for r in evaluation.results}
            for name, evaluation in evaluations.items()
        },
    }


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _prompts_sha256(asked: PromptSet) -> str:
    content = [asked.kind, asked.prompts, asked.categories, asked.references]
    return _sha256(json.dumps(content, ensure_ascii=False).encode())


def _log_progress(stage: str, step: int, total: int, loss: float) -> None:
    logger.info("%s: step %d of %d, loss %.3f", stage, step, total, loss)


def main(world: World = EMBEDDED) -> None:
    """Run the build from the command line."""
    parser = argparse.ArgumentParser(description="Train a pair of an unaligned and an aligned model.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the two models and their manifest")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    build(parser.parse_args().output, world=world)


if __name__ == "__main__":
    main()
