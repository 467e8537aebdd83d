"""Directions, bases, vectors and adapters on disk."""

from __future__ import annotations

import re

import tiny
from runs import HARMFUL, REFUSED, SHORT, even_rows

from safe_trainer import (
    AlignmentDirection,
    SafetyBasis,
    SaLoRA,
    SecurityVectors,
    compact_adapter,
    load_model,
    merge_adapter,
    train_security_vectors,
    write_model_card,
)
from safe_trainer.analysis.drift import measure_drift

from .room import (
    VIRTUAL,
    Case,
    changed,
    compared,
    damaged,
    did,
    direction,
    kept,
    on,
    orphan,
    repaired,
    saved,
    strange,
    two_adapters,
    wide,
)

ARTIFACTS: dict[str, Case] = {
    "a rank of nothing": (
        lambda at: direction(at, rank=0), "Leave it out to let `max_error` choose it", [lambda at: direction(at)]
    ),
    "a model twice": (
        lambda at: AlignmentDirection.from_checkpoints(at.aligned, at.aligned),
        "Give the aligned model and the model before its alignment",
        [lambda at: direction(at)],
    ),
    "models of other depth": (
        lambda at: AlignmentDirection.from_checkpoints(at.aligned, saved(at, layers=3)),
        "Give an aligned model and the model that it was trained from, or select the `modules` that they share",
        [
            lambda at: direction(at),
            lambda at: AlignmentDirection.from_checkpoints(at.aligned, saved(at, layers=3), modules=r".*\.[01]\..*"),
        ],
    ),
    "a folder without a model": (
        lambda at: AlignmentDirection.from_checkpoints(at.aligned, at.folder),
        "Give the folder of a transformers model",
        [lambda at: direction(at)],
    ),
    "a basis of another model": (
        lambda at: at.trainer(SaLoRA(basis=at.measured(rank=4), rank=4, task_rank=0), model=wide()),
        "give `safety_data`, or use `SafetyBasis.from_rows`",
        [
            lambda at: at.trainer(SaLoRA(safety_data=REFUSED, rank=4, task_rank=0), model=wide()),
            lambda at: at.trainer(
                SaLoRA(basis=SafetyBasis.from_rows(wide(), tiny.tokenizer(), REFUSED, rank=4), rank=4, task_rank=0),
                model=wide(),
            ),
        ],
    ),
    "inputs of rows without prompts": (
        lambda at: at.measured(rows=even_rows(4), sides=("input",), rank=2),
        "Give rows with prompts",
        [lambda at: at.measured(sides=("input",), rank=2)],
    ),
    "a direction that is not there": (
        lambda at: AlignmentDirection.load(at.folder / "absent.safetensors"),
        "Give the file that it was saved to",
        [lambda at: AlignmentDirection.load(kept(at))],
    ),
    "half a direction": (
        lambda at: AlignmentDirection.load(changed(kept(at), lambda content: content[:-99])),
        "make or copy it again",
        [lambda at: AlignmentDirection.load(kept(at))],
    ),
    "a direction with a wrong bit": (
        lambda at: AlignmentDirection.load(changed(kept(at), lambda content: content[:-1] + b"?")),
        "Make or copy it again",
        [lambda at: AlignmentDirection.load(kept(at))],
    ),
    "a direction of another format": (
        lambda at: AlignmentDirection.load(
            changed(kept(at), lambda content: re.sub(rb'("format_version":")\d', rb"\g<1>9", content))
        ),
        "Make it again",
        [lambda at: AlignmentDirection.load(kept(at))],
    ),
    "a direction in the place of a basis": (
        lambda at: SafetyBasis.load(kept(at)),
        "Give the file that the .* was saved to",
        [lambda at: SafetyBasis.load(at.measured(rank=2).save(at.folder / "basis.safetensors"))],
    ),
    "vectors of another model": (
        lambda at: at.trainer(SecurityVectors(vectors=at.vectors()), model=wide()),
        "Train vectors for this model with `train_security_vectors`",
        [
            lambda at: at.trainer(
                SecurityVectors(train_security_vectors(wide(), HARMFUL, tiny.tokenizer(), **SHORT)), model=wide()
            )
        ],
    ),
    "vectors from refusals": (
        lambda at: at.trainer(SecurityVectors(harmful_data=REFUSED, fitting=SHORT)),
        "Give rows whose answers comply",
        [lambda at: at.trainer(SecurityVectors(harmful_data=HARMFUL, fitting=SHORT))],
    ),
    "vectors without a tokenizer": (
        lambda at: train_security_vectors(tiny.model(), HARMFUL, **SHORT),
        "Give `tokenizer`",
        [lambda at: train_security_vectors(tiny.model(), HARMFUL, tiny.tokenizer(), **SHORT)],
    ),
}  # fmt: skip

ADAPTERS: dict[str, Case] = {
    "a damaged adapter": (
        lambda at: merge_adapter(damaged(at.adapter()), at.folder / "out"),
        "save or copy it again",
        [lambda at: merge_adapter(at.adapter(), at.folder / "out")],
    ),
    "an adapter one folder deeper": (
        lambda at: (at.adapter(), merge_adapter(at.folder, at.folder / "out")),
        "Give the folder of one adapter: `.*adapter`",
        [lambda at: merge_adapter(at.folder / "adapter", at.folder / "out")],
    ),
    "a file in the place of an adapter": (
        lambda at: merge_adapter(at.written(b"x"), at.folder / "out"),
        "Give the folder that it was saved to",
        [lambda at: merge_adapter(at.adapter(), at.folder / "out")],
    ),
    "a folder that is full": (
        lambda at: merge_adapter(at.adapter(), at.aligned),
        "Name a new folder",
        [lambda at: merge_adapter(at.adapter(), at.folder / "out")],
    ),
    "an adapter without a base": (
        lambda at: merge_adapter(orphan(at), at.folder / "out"),
        "Give the base model",
        [lambda at: merge_adapter(orphan(at), at.folder / "out", base=at.aligned)],
    ),
    "an adapter whose base is gone": (
        lambda at: merge_adapter(orphan(at, "/gone/away"), at.folder / "out"),
        "Say where the base model is .`base`",
        [lambda at: merge_adapter(orphan(at, "/gone/away"), at.folder / "out", base=at.aligned)],
    ),
    "vectors to merge": (
        lambda at: merge_adapter(at.vectors(), at.folder / "out"),
        "Merge the adapter that was trained with them instead",
        [lambda at: merge_adapter(at.adapter(), at.folder / "out")],
    ),
    "virtual tokens to merge": (
        lambda at: merge_adapter(at.adapter(VIRTUAL), at.folder / "out"),
        "Use it as it is",
        [lambda at: load_model(at.aligned, at.adapter(VIRTUAL))],
    ),
    "an adapter of another kind to make small": (
        lambda at: compact_adapter(at.adapter(on("embed_tokens")), at.folder / "out"),
        "Keep the adapter as it is",
        [lambda at: load_model(at.aligned, at.adapter(on("embed_tokens")))],
    ),
    "two rules of a repair": (
        lambda at: repaired(at, at.adapter(), threshold=0.5, number_of_layers=2),
        "Give `threshold` or `number_of_layers`, not both",
        [lambda at: repaired(at, at.adapter(), threshold=0.5)],
    ),
    "a repair of vectors": (
        lambda at: repaired(at, at.vectors()),
        "Give the adapter that was trained with them",
        [lambda at: repaired(at, at.adapter())],
    ),
    "a repair of what is repaired": (
        lambda at: (repaired(at, at.adapter()), repaired(at, at.folder / "repaired", "again")),
        "Give the one that it was made from, with the settings that you want",
        [lambda at: repaired(at, at.adapter(), "again", number_of_layers=3)],
    ),
    "a repair without the aligned model": (
        lambda at: repaired(at, orphan(at)),
        "Give `aligned`",
        [lambda at: repaired(at, orphan(at), aligned=at.aligned)],
    ),
    "a repair towards the same model": (
        lambda at: repaired(at, at.adapter(), unaligned=at.aligned),
        "Give a trained adapter, the aligned model and the one before its alignment",
        [lambda at: repaired(at, at.adapter())],
    ),
    "a repair with two active adapters": (
        lambda at: repaired(at, two_adapters(at, trained=True)),
        r"Call `model.set_adapter\(name\)`",
        [lambda at: repaired(at, did(two_adapters(at, trained=True), "set_adapter", "default"))],
    ),
    "a card of nothing": (
        lambda at: write_model_card(at.folder),
        "Give the folder that one was saved to",
        [lambda at: write_model_card(at.adapter())],
    ),
    "a card of another adapter": (
        lambda at: (
            compact_adapter(at.adapter(), at.folder / "compact"),
            write_model_card(at.folder / "compact", compared(at, {"a": at.folder / "adapter"})),
        ),
        "holds no rates of the adapter in `.*compact`.* Make one of this adapter with `safe-trainer compare`, or give "
        "the folder that the comparison is about",
        [
            lambda at: write_model_card(at.folder / "compact", compared(at, {"a": at.folder / "compact"})),
            lambda at: write_model_card(at.folder / "adapter", compared(at, {"a": at.folder / "adapter"})),
        ],
    ),
    "a card of vectors": (
        lambda at: write_model_card(at.vectors()),
        "give the folder of the adapter that was trained with them",
        [lambda at: write_model_card(at.adapter())],
    ),
    "a drift of no adapter": (
        lambda at: (at.adapter(), measure_drift(at.aligned, at.folder)),
        "Give the folder of one adapter: .*adapter",
        [lambda at: measure_drift(at.aligned, at.folder / "adapter")],
    ),
    "a drift by another model's direction": (
        lambda at: measure_drift(at.aligned, at.adapter(), direction=strange(at)),
        "Make them for the model that is fine-tuned",
        [lambda at: measure_drift(at.aligned, at.adapter(), direction=direction(at))],
    ),
}  # fmt: skip
