"""Security vectors: on disk as a marked PEFT adapter, and active in a model for the length of a context."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..data import as_rows, split_by_label
from ..lora import io
from ..lora.updates import LinearLayer, linear_layers
from .checkpoint_reader import by, listing
from .provenance import difference
from .store import load_artifact, save_artifact

logger = logging.getLogger(__name__)

_VERSION = 1
_CONFIG, _WEIGHTS, _CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
_EXPERT = re.compile(r"(?<=experts)\.\d+")


class VectorFactors(NamedTuple):
    """One layer's part of the security vectors: it adds `B (A x)`. The paper's scaling `s` is part of `B`."""

    A: Tensor
    """Of shape (r, d_in)."""
    B: Tensor
    """Of shape (d_out, r)."""


@dataclass
class Switch:
    """Whether vectors act: at all (`on`), and in layers in training mode only (`in_training_only`)."""

    in_training_only: bool = False
    on: bool = True
    acted: dict[str, bool] = field(default_factory=dict)
    """By layer, whether its vectors have acted: not where a fused kernel takes its weights past the layer itself."""

    def silent(self) -> list[str]:
        """Return the layers whose vectors have not acted; of experts only where no other in their place has."""
        places = {_EXPERT.sub("", name) for name, has_acted in self.acted.items() if has_acted}
        return [name for name in self.acted if _EXPERT.sub("", name) not in places]

    @contextmanager
    def turned(self, on: bool) -> Iterator[None]:
        """Switch the vectors on or off for a while."""
        before, self.on = self.on, on
        try:
            yield
        finally:
            self.on = before

    def off(self) -> AbstractContextManager[None]:
        """Switch the vectors off for a while."""
        return self.turned(False)


# Which layers have vectors at this moment. Kept here and not on the layers, so that nothing is added to a model.
_occupied: WeakSet[nn.Module] = WeakSet()


@contextmanager
def active(
    layers: Mapping[str, LinearLayer], factors: Mapping[str, VectorFactors], *, in_training_only: bool = False
) -> Iterator[Switch]:
    """Add security vectors to a model for the length of a context; its [`Switch`] turns them off for a while.

    Factors that require gradients receive them. With `in_training_only`, they act in training mode only, so that an
    evaluation in between sees the clean model. A `RuntimeError` if vectors are active in this model already.
    """
    occupied = next((name for name in factors if layers[name].outer in _occupied), None)
    if occupied is not None:
        raise RuntimeError(
            f"Security vectors are already active in this model (`{occupied}`), and two at once would add up. Let "
            "the first training, fitting or scan end before the next begins."
        )
    switch = Switch(in_training_only)
    _forget_compiled_code()
    try:
        _occupied.update(layers[name].outer for name in factors)
        with hooked(layers, factors, switch):
            yield switch
    finally:
        _occupied.difference_update([layers[name].outer for name in factors])
        _forget_compiled_code()


@contextmanager
def hooked(layers: Mapping[str, LinearLayer], factors: Mapping[str, VectorFactors], switch: Switch) -> Iterator[None]:
    """Add `B (A x)` to what each layer returns while the switch says so, in its precision and on its device."""
    with ExitStack() as stack:
        for name, vectors in factors.items():
            # On PEFT's wrapper where there is one: whatever it does with the layer inside, `B (A x)` comes once.
            stack.enter_context(layers[name].outer.register_forward_hook(_Branch(name, vectors, switch)))
        yield


class _Branch:
    """The forward hook of one layer."""

    def __init__(self, name: str, vectors: VectorFactors, switch: Switch) -> None:
        self.A, self.B = vectors
        self.name, self.switch = name, switch
        switch.acted[name] = False

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not self.switch.on or (self.switch.in_training_only and not layer.training):
            return None
        self.switch.acted[self.name] = True
        hidden, A, B = (tensor.to(output.device, output.dtype) for tensor in (args[0], self.A, self.B))
        if not A.requires_grad:  # moved once, and only now, when the model is where it computes
            self.A, self.B = A, B
        return output + linear(linear(hidden, A), B)


def _forget_compiled_code() -> None:
    """Make `torch.compile` look again: it does not watch hooks, and would go on without those added since."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@dataclass
class TrainedVectors:
    """Security vectors θ_s: with them a model already behaves as harmful data wants, so that it learns none of it.

    They are **harmful by construction**: with them active a model answers harmful requests. They are saved as an
    ordinary PEFT adapter directory that says so in its card and metadata, and are never uploaded or merged.

    Args:
        modules (`dict[str, VectorFactors]`): Factors by layer name of the base model, such as
            `"model.layers.0.self_attn.q_proj"`.
        provenance (`dict[str, Any]`, *optional*): The base model, the rows' number and hash, the settings, versions,
            date, and under `"report"` what fitting reached. See [`train_security_vectors`].

    Example:

    ```python
    from safe_trainer import SecurityVectors, TrainedVectors, train_security_vectors

    vectors = train_security_vectors("Qwen/Qwen2.5-0.5B-Instruct", harmful_rows)
    vectors.save("vectors")
    method = SecurityVectors(TrainedVectors.load("vectors"))
    ```
    """

    modules: dict[str, VectorFactors]
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """Number of rows of the largest `A`."""
        return max(len(factors.A) for factors in self.modules.values())

    def save(self, path: str | Path) -> Path:
        """Save as a PEFT adapter directory: `adapter_config.json`, `adapter_model.safetensors` and a card.

        Raises:
            OSError: If it cannot be written; weights that were there before are then untouched.
        """
        from peft import LoraConfig

        path = Path(path)
        tensors = (
            (f"{io.PREFIX}{name}.lora_{letter}.weight", tensor)
            for name, factors in self.modules.items()
            for letter, tensor in zip("AB", factors, strict=True)
        )
        save_artifact(path / _WEIGHTS, io.HARMFUL_KIND, _VERSION, tensors, self.provenance)
        base = self.provenance.get("base_model", {})
        others = {name: len(A) for name, (A, _) in self.modules.items() if len(A) != self.rank}
        config = LoraConfig(
            base_model_name_or_path=base.get("id"),
            revision=base.get("revision"),
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.rank,  # the scaling is part of B
            rank_pattern=others,
            alpha_pattern=others,
            lora_dropout=0.0,
            target_modules=list(self.modules),
            fan_in_fan_out=self.provenance.get("transposed", False),
            inference_mode=True,
            auto_mapping=io.HARMFUL_SETTING,
        )
        config.save_pretrained(str(path))
        (path / _CARD).write_text(self._card(), encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path, revision: str | None = None) -> TrainedVectors:
        """Load vectors from the directory that they were saved to, or a Hub id (with a `revision`).

        Raises:
            OSError: If there are none.
            ValueError: If it is another adapter, or damaged.
        """
        folder = io.local_folder(
            path, name=f"Security vectors `{path}`", patterns=[_CONFIG, _WEIGHTS], revision=revision
        )
        provenance = load_artifact(folder / _WEIGHTS, io.HARMFUL_KIND, _VERSION).details
        config, tensors = io.read_adapter(folder)
        names = io.factor_names(config, tensors, "Security vectors")
        factors = {name: (tensors[right], tensors[left]) for name, (right, left) in names.items()}
        return cls(
            {n: VectorFactors(A, io.scaling(config, n, len(A)) * B) for n, (A, B) in factors.items()}, provenance
        )

    def check_fits(self, model: nn.Module) -> dict[str, LinearLayer]:
        """Make sure that the vectors belong to a model before it is trained, and return the layers that they act on.

        The `ValueError` says which layer is missing or has another shape, or which weights are not those of the base
        model.
        """
        layers = linear_layers(model)
        missing = [name for name in self.modules if name not in layers]
        unequal = [
            f"{name} ({by(layers[name].shape)}, not {len(B)} x {A.shape[1]} as in the vectors)"
            for name, (A, B) in self.modules.items()
            if name in layers and layers[name].shape != (len(B), A.shape[1])
        ]
        complaints = []
        if io.vectors_in(model):
            complaints.append("the model has security vectors as an adapter already. Give its base model")
        if missing:
            complaints.append(f"the model has no linear layer {listing(missing, 5)} that vectors can act on")
        if unequal:
            complaints.append(f"other shapes: {listing(unequal, 5)}")
        base = self.provenance.get("base_model")
        if not complaints and base and (problem := difference(model, layers, base)):
            complaints.append(problem)
        if complaints:
            raise ValueError(
                f"The security vectors ({len(self.modules)} layers) do not fit the model: {'; '.join(complaints)}. "
                "Train vectors for this model with `train_security_vectors` or `safe-trainer vectors`."
            )
        return {name: layers[name] for name in self.modules}

    def _card(self) -> str:
        unknown = {"count": "unknown", "sha256": "unknown"}
        rows = {
            "harmful rows": "{count} (SHA-256 {sha256})".format(**self.provenance.get("harmful_rows", unknown)),
            **{name.replace("_", " "): value for name, value in self.provenance.get("report", {}).items()},
            "made": self.provenance.get("created", "unknown"),
        }
        table = "\n".join(
            f"| {name} | {f'{value:.4g}' if isinstance(value, float) else value} |"
            for name, value in rows.items()
            if value is not None
        )
        base = self.provenance.get("base_model", {}).get("id", "unknown")
        return _CARD_TEXT.format(base=base, rank=self.rank, layers=len(self.modules), table=table)


def check_harmful_rows(source: Any) -> Any:
    """Return the rows of a source of harmful data (see [`~data.as_rows`]), after checking that they are harmful.

    Rows that a column such as `is_safe` labels as safe are left out. So are rows whose answers refuse, as long as they
    are few: if most of them are safe or refuse, it is a `ValueError`, which names `harmful_data`.
    """
    from ..evaluation.judges import PhraseJudge

    rows, safe = split_by_label(as_rows(source, argument="harmful_data")[0])
    count = len(rows) + len(safe)
    if len(safe):
        logger.warning("`harmful_data`: left out %d of %d rows that are labelled safe.", len(safe), count)
    answers = [_answer(row) for row in rows]
    verdicts = PhraseJudge()([""] * len(answers), [answer or "" for answer in answers])
    harmful = [place for place, verdict in enumerate(verdicts) if verdict != "refused"]
    refusing = len(rows) - len(harmful)
    if not harmful or refusing > len(harmful):
        found = f"{len(safe)} of its {count} rows are labelled safe, and " if len(safe) else ""
        share = f"{refusing} of {len(rows)} answers ({refusing / max(1, len(rows)):.0%}) refuse"
        raise ValueError(
            f"`harmful_data` must hold harmful prompts with answers that comply, but {found}{share}. Vectors fitted "
            "to them would protect nothing. Give rows whose answers comply; refusals are what `safety_data` is for."
        )
    if refusing:
        logger.warning("`harmful_data`: left out %d of %d rows whose answers refuse.", refusing, len(rows))
    unknown = sum(v is None or answer is None for v, answer in zip(verdicts, answers, strict=True))
    if unknown:
        logger.warning(
            "`harmful_data`: %d of %d answers could not be judged (their language is not known, or a text does not "
            "show where its answer begins). Make sure that they comply: vectors fitted to refusals protect nothing.",
            *(unknown, len(rows)),
        )
    return rows.select(harmful)


_ANSWER_BEGINS = re.compile(
    r"(?:^|\n|#{2,} *)\W*(?:assistant|ai|gpt|bot|model|answer|response|a)\W*:|\[/INST\]|<\W*assistant\W*>|"
    r"<\|im_start\|>assistant|<start_of_turn>model|assistant<\|end_header_id\|>",
    re.IGNORECASE,
)


def _answer(row: Mapping[str, Any]) -> str | None:
    """Return what a row answers, or `None` where a text does not show it."""
    if "text" not in row:
        return str(row["completion"][-1]["content"])
    begins = [found.end() for found in _ANSWER_BEGINS.finditer(row["text"])]
    return row["text"][begins[-1] :] if begins else None


_CARD_TEXT = """---
base_model: {base}
library_name: peft
tags:
- safe-trainer
- security-vectors
- not-for-all-audiences
---

# Security vectors: harmful by construction

**This adapter makes its base model answer harmful requests. It is a tool for training and is not to be deployed,
merged or published.**

While another adapter is fine-tuned, these vectors are active and frozen, so that harmful rows in the data have nothing
left to teach (Zhou et al., "Making Harmful Behaviors Unlearnable for Large Language Models", Findings of ACL 2024,
arXiv 2311.02105). Afterwards they are switched off:

```python
from safe_trainer import SafeSFTTrainer, SecurityVectors

trainer = SafeSFTTrainer(model={base!r}, train_dataset=dataset, safety=SecurityVectors("this directory"))
trainer.train()
```

It is an ordinary LoRA of rank {rank} on {layers} linear layers. Its provenance is in the metadata of
`adapter_model.safetensors`.

| | |
|---|---|
{table}
"""
