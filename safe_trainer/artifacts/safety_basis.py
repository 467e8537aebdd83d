"""`SafetyBasis`: the directions in which a model's layers work while it refuses, with provenance, on disk."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from ..linalg import TopDirections
from ..lora.updates import LinearLayer, linear_layers
from .calibration import Example, InputTokens, Side, examples_from, examples_sha256, top_directions
from .checkpoint_reader import listing
from .provenance import describe, difference, stamp
from .store import load_artifact, save_artifact

logger = logging.getLogger(__name__)

_KIND, _VERSION = "safety basis", 1
_FEW_REFUSALS = 0.5
DEFAULT_RANK = 64
"""More than methods take by default."""


def few_refusals(provenance: Mapping[str, Any]) -> str:
    """Return a warning if few of the answers that a basis was measured at refuse, as far as that is known."""
    found = provenance.get("refusing_answers")
    share = found["rate"] if isinstance(found, Mapping) else found  # files of earlier versions have the share only
    if share is None or share >= _FEW_REFUSALS:
        return ""
    return (
        f"only {share:.0%} of the answers in `safety_data` refuse, so its directions are not those of refusals. "
        "Give harmful prompts with refusals; rows that comply are what `harmful_data` is for."
    )


def _refusing(examples: Sequence[Example], tokenizer: Any) -> dict[str, Any]:
    """Return how many of the answers refuse, of those that the judge knows the language of."""
    from ..evaluation import PhraseJudge, Rate

    answers = [
        tokenizer.decode([i for i, answered in zip(*example, strict=True) if answered], skip_special_tokens=True)
        for example in examples
    ]
    verdicts = [verdict for verdict in PhraseJudge()([""] * len(answers), answers) if verdict is not None]
    return Rate(verdicts.count("refused"), len(verdicts)).to_dict()


@dataclass
class SafetyBasis:
    """The directions that a model's linear layers use while it reads harmful prompts and refuses, from one pass.

    Run the aligned model over harmful prompts with their refusals. With `X_s` (d_in x n) a layer's inputs at the
    tokens of the answers, its *output* directions are the top left singular vectors of `W X_s`: what it writes when it
    refuses, which SaLoRA (Li et al., ICLR 2025, arXiv 2501.01765) keeps updates from writing into. With `X_p`
    (d_in x m) its inputs at the tokens of the prompts, its *input* directions are those of `X_p`: what it reads there.

    Args:
        outputs (`dict[str, TopDirections]`): By layer, directions (d_out x k) with their singular values.
        inputs (`dict[str, TopDirections]`): By layer, directions (d_in x k) likewise. Either may be empty.
        provenance (`dict[str, Any]`, *optional*): The model with revision and some values of its weights, the hash and
            number of the tokens, the settings, the versions of the libraries, and the date.

    Example:

    ```python
    from safe_trainer import SafetyBasis, SaLoRA

    basis = SafetyBasis.from_rows(model, tokenizer, "refusals.jsonl")
    basis.save("basis.safetensors")
    method = SaLoRA(basis="basis.safetensors")
    ```
    """

    outputs: dict[str, TopDirections]
    inputs: dict[str, TopDirections] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_rows(  # noqa: PLR0913, each is a setting with a name
        cls,
        model: nn.Module,
        tokenizer: Any,
        safety_data: Any,
        *,
        modules: Collection[str] | None = None,
        sides: Sequence[Side] = ("output",),
        rank: int | None = None,
        input_tokens: InputTokens = "prompt",
        samples: int = 128,
        seed: int = 0,
        max_length: int = 1024,
        batch_size: int = 16,
    ) -> SafetyBasis:
        """Measure the directions in one forward pass over the rows, all layers at once.

        The memory needed besides the model's own is a few times `2 x rank` vectors for each layer. The same rows, seed
        and model give the same basis; several processes all take that of the first.

        Args:
            model (`PreTrainedModel` or `PeftModel`): The aligned model. Its adapters are switched off for the pass.
            tokenizer (`PreTrainedTokenizerBase`): Its tokenizer, with its chat template.
            safety_data (`str`, `Path`, `Sequence[Mapping]` or `Dataset`): Harmful prompts with safe answers, in any
                form that `load_rows` reads or that TRL takes.
            modules (`Collection[str]`, *optional*): Names of the layers; left out, every linear layer but the head.
            sides (`Sequence[str]`, *optional*, defaults to `("output",)`): `"output"`, `"input"` or both.
            rank (`int`, *optional*): Directions for each layer. Left out, 64, which is enough for the default of every
                method; or all but one where a layer is narrower.
            input_tokens (`str`, *optional*, defaults to `"prompt"`): Tokens at which inputs are taken: `"prompt"`,
                `"answer"` or `"all"`.
            samples (`int`, *optional*, defaults to `128`): How many rows to draw.
            seed (`int`, *optional*, defaults to `0`): Seed of the draw.
            max_length (`int`, *optional*, defaults to `1024`): Where a conversation is cut, in tokens.
            batch_size (`int`, *optional*, defaults to `16`): Conversations in one forward pass.

        Returns:
            [`SafetyBasis`]: With fewer than `rank` directions, and a warning, where the tokens span no more.

        Raises:
            ValueError: If there are no rows or no answers, or `rank` does not fit a layer.
            FloatingPointError: If the model's activations are infinite or NaN.
        """
        found = linear_layers(model)
        layers = found if modules is None else {name: found[name] for name in modules}
        if rank is not None:
            for side in sides:
                check_rank(layers, side, rank)
        rank = rank or DEFAULT_RANK
        settings = {"samples": samples, "seed": seed, "max_length": max_length}
        examples = examples_from(safety_data, tokenizer, argument="safety_data", **settings)
        how: dict[str, Any] = {"sides": sides, "rank": rank, "input_tokens": input_tokens}
        top = {
            side: {name: one.at_most(layers[name].shape[side == "input"] - 1) for name, one in found.items()}
            for side, found in top_directions(model, layers, examples, batch_size=batch_size, **how).items()
        }
        answer_tokens = sum(sum(example.is_answer) for example in examples)
        provenance = {
            "model": describe(model, layers),
            "rows": len(examples),
            "rows_sha256": examples_sha256(examples),
            "answer_tokens": answer_tokens,
            "prompt_tokens": sum(len(example.is_answer) for example in examples) - answer_tokens,
            "refusing_answers": _refusing(examples, tokenizer) if tokenizer is not None else None,
            **stamp(),
            "rank": rank,
            "input_tokens": input_tokens,
            **settings,
        }
        basis = cls(top.get("output", {}), top.get("input", {}), provenance)
        basis._report()
        return basis

    def side(self, side: Side) -> dict[str, TopDirections]:
        """Return the directions of one side by layer."""
        return self.outputs if side == "output" else self.inputs

    def save(self, path: str | Path) -> Path:
        """Save to one safetensors file; see [`load`]. On an `OSError` an old file of that name is untouched."""
        entries = {
            f"{name}.{side}": {"energy": top.total_variance, "captured": top.explained_variance}
            for name, side, top in self._all()
        }
        tensors = (
            (f"{name}.{side}.{part}", getattr(top, part))
            for name, side, top in self._all()
            for part in ("basis", "singular_values")
        )
        return save_artifact(path, _KIND, _VERSION, tensors, {"layers": entries, "provenance": self.provenance})

    @classmethod
    def load(cls, path: str | Path) -> SafetyBasis:
        """Load from a file, and check that it is sound: finite numbers and orthonormal directions.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged, or holds something else.
        """
        tensors, details = load_artifact(path, _KIND, _VERSION)
        held: dict[str, dict[str, TopDirections]] = {"output": {}, "input": {}}
        try:
            for key, entry in details["layers"].items():
                name, _, side = key.rpartition(".")
                basis = tensors[f"{key}.basis"]
                if not torch.allclose(basis.mT @ basis, torch.eye(basis.shape[1]), atol=1e-4):  # NaN is not close
                    raise ValueError(f"the {side} directions of `{name}` are not orthonormal")
                held[side][name] = TopDirections(basis, tensors[f"{key}.singular_values"], float(entry["energy"]))
            return cls(held["output"], held["input"], dict(details["provenance"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"The {_KIND} `{path}` is damaged ({error}). Measure or copy it again.") from error

    def check_fits(
        self,
        model: nn.Module,
        modules: Collection[str],
        sides: Sequence[Side],
        rank: int,
        input_tokens: InputTokens | None = None,
    ) -> None:
        """Make sure that the basis was measured on this model, and has `rank` directions of these sides and layers.

        Fewer will do only where the rows span no more. The `ValueError` says what does not fit, and in which layers.
        """
        layers = linear_layers(model)
        other = difference(model, layers, self.provenance.get("model", {}))
        complaints = [] if other is None else [other]
        for side in sides:
            held = self.side(side)
            missing = [name for name in modules if name not in held]
            sizes = {name: layers[name].shape[side == "input"] for name in modules}
            unequal = [name for name in modules if name in held and len(held[name].basis) != sizes[name]]
            if missing:
                complaints.append(f"there are no {side} directions of {listing(missing, 5)}")
            if unequal:
                first = unequal[0]
                found = f"{len(held[first].basis)} entries, not {sizes[first]}"
                complaints.append(f"the {side} directions of {listing(unequal, 5)} have another size ({found})")
        if self.provenance.get("rank", rank) < rank:
            complaints.append(f"they were measured with `rank={self.provenance['rank']}`, and {rank} are wanted")
        if complaints:
            raise ValueError(
                f"The directions of the safety basis do not fit the model: {'; '.join(complaints)}. Measure them on "
                "the model that is being fine-tuned: give `safety_data`, or use `SafetyBasis.from_rows`."
            )
        measured = self.provenance.get("input_tokens", input_tokens)
        if "input" in sides and input_tokens not in (None, measured):
            raise ValueError(
                f"The basis holds what layers read at `input_tokens={measured!r}`, and {input_tokens!r} is wanted. "
                f"Give `input_tokens={measured!r}`, or measure another basis."
            )

    def _all(self) -> Iterator[tuple[str, Side, TopDirections]]:
        for side in get_args(Side):
            yield from ((name, side, top) for name, top in self.side(side).items())

    def _report(self) -> None:
        rank, rows = self.provenance["rank"], self.provenance["rows"]
        short = {
            f"`{name}` ({side})": top.basis.shape[1]
            for name, side, top in self._all()
            if top.basis.shape[1] < min(rank, len(top.basis) - 1)
        }
        if short:
            logger.warning(
                f"The {rows} rows of `safety_data` span fewer than `rank={rank}` directions in {len(short)} places, "
                f"first {next(iter(short))} with {next(iter(short.values()))}; there, all of them are taken. Give "
                "more rows, or lower `rank`."
            )
        if self.outputs and (complaint := few_refusals(self.provenance)):
            logger.warning(complaint)
        shares = [top.explained_variance for _, _, top in self._all()]
        logger.info(
            f"Directions from {rows} rows explain {min(shares):.0%} to {max(shares):.0%} of a layer's variance."
        )


def check_rank(layers: Mapping[str, LinearLayer], side: Side, rank: int) -> None:
    """Make sure that every layer keeps at least one direction free; the `ValueError` names the layer."""
    for name, layer in layers.items():
        size = layer.shape[side == "input"]
        if rank >= size:
            raise ValueError(
                f"`rank` must be below {size}, the {side} size of `{name}`, got {rank}: protecting all directions "
                f"leaves none to learn in. Lower `rank`, or leave `{name.rsplit('.', 1)[-1]}` out of `target_modules`."
            )
