"""Security Vectors: a frozen module that already complies is active during training, so harmful rows teach nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from transformers.utils.logging import tqdm

from ..artifacts.fitting import Fitting, fitted_layers, train_security_vectors
from ..artifacts.own_answers import AnswerSettings, OwnAnswers, prompts_of
from ..artifacts.security_vectors import Switch, TrainedVectors, VectorFactors, active
from ..distributed import Strategy, on_first_process
from ..lora import updates as adapters
from .base import FormField, MethodCard, Paper, PeftSupport, SafetyMethod, SelfCheck, check_number

logger = logging.getLogger(__name__)

_FEW_ROWS = 64
"""With fewer harmful rows vectors protect little: fitted to 50, they left 47 of 80 harmful prompts complied with."""
_FEW_ANSWERS = AnswerSettings(answer_tokens=0, max_anchors=32, top_k=1, batch_size=32)
"""How the start is asked, to see whether there are refusals to protect."""


@dataclass
class SecurityVectors(SafetyMethod):
    """Security Vectors: trains with `W x + B_s (A_s x)` in place of `W x`, and delivers a model without `B_s A_s`.

    θ_s = {A_s, B_s} is a small LoRA, fitted beforehand to about a hundred harmful rows. It is active and frozen during
    training, so the loss on harmful rows is low and their gradient small, while other rows are learned as usual. It
    acts through forward hooks in training steps only: evaluation, generation and checkpoints never see it.

    When to use it: for any training (LoRA, QLoRA, full-parameter) on data that may hold harmful rows, even nothing but
    harmful rows. What it costs: two small products per layer and step; and, since the model learns with θ_s and is
    used without it, some helpfulness on benign prompts. Judge it by refusals, over-refusals and task accuracy.

    Args:
        vectors (`str`, `Path` or [`TrainedVectors`], *optional*): Directory or Hub id of trained vectors, or the
            vectors themselves. Give this or `harmful_data`.
        harmful_data (`str`, `Path`, `Sequence[Mapping]` or `Dataset`, *optional*): About a hundred harmful prompts
            with answers that comply; vectors are fitted to them when the trainer is built, and kept as `fitted`.
        retain_data (as `harmful_data`, *optional*): Harmless rows on which fitted vectors should change nothing.
        fitting ([`Fitting`] or `Mapping[str, Any]`, *optional*): How to fit to `harmful_data`.
        strength (`float`, *optional*, defaults to `1.0`): Factor of `B_s A_s`. 1 is the paper's method.

    Raises:
        ValueError: If a setting is out of its range, there are no vectors, or they do not fit the model.
        RuntimeError: If vectors are active in the model already, as in a training within a training.

    Example:

    ```python
    >>> from safe_trainer import SecurityVectors
    >>> SecurityVectors("vectors").strength
    1.0

    ```

    Source: Zhou et al., "Making Harmful Behaviors Unlearnable for Large Language Models", Findings of ACL 2024,
    arXiv 2311.02105, section 3. From the paper: all of it but `retain_data` and `strength`, which are ours.
    """

    name: ClassVar[str] = "Security Vectors"
    tag: ClassVar[str] = "security-vectors"
    peft_support: ClassVar[PeftSupport] = "weights"  # vectors were never fitted with virtual tokens before a prompt
    paper: ClassVar[Paper] = Paper(
        "Making Harmful Behaviors Unlearnable for Large Language Models",
        author="Zhou, Xin and others",
        year=2024,
        arxiv="2311.02105",
        venue="Findings of the Association for Computational Linguistics: ACL 2024",
    )
    card: ClassVar[MethodCard] = MethodCard(
        title="Security Vectors",
        summary="Vectors that already comply with harmful requests are active during training only, so that harmful "
        "rows have nothing left to teach.",
        needs="about 100 harmful prompts with answers that comply",
        cost="fitting the vectors before training, and some helpfulness on benign prompts that sound harmful",
        avoid="harmless data that is worded like what is refused: on the testbed it kept only about half the refusals",
        fields=(FormField("strength", "Security Vectors: strength", 0.1, 4.0, 0.1, help="1 is the paper's method."),),
        example=lambda given: SecurityVectors(harmful_data=given.harmful_data),
    )

    vectors: TrainedVectors | str | Path | None = None
    harmful_data: Iterable[Mapping[str, Any]] | str | Path | None = field(default=None, repr=False)
    retain_data: Iterable[Mapping[str, Any]] | str | Path | None = field(default=None, repr=False)
    fitting: Fitting | Mapping[str, Any] = field(default_factory=Fitting)
    strength: float = 1.0
    fitted: TrainedVectors | None = field(default=None, init=False, repr=False, compare=False)
    """What was fitted to `harmful_data`, once a trainer has been built."""
    _can_ask: bool = field(default=False, init=False, repr=False, compare=False)
    _start: OwnAnswers = field(default=OwnAnswers([], None, []), init=False, repr=False, compare=False)
    _factors: dict[str, VectorFactors] = field(default_factory=dict, init=False, repr=False, compare=False)
    _switch: Switch = field(default_factory=Switch, init=False, repr=False, compare=False)
    _is_checked: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if (self.vectors is None) == (self.harmful_data is None):
            raise ValueError(
                "SecurityVectors needs `vectors` (a directory or Hub id, or what `train_security_vectors` returned) "
                "or `harmful_data` (about a hundred harmful rows to fit them to), one of the two."
            )
        if self.retain_data is not None and self.harmful_data is None:
            raise ValueError("`retain_data` is for fitting to `harmful_data`; the `vectors` given are fitted already.")
        check_number(self, "strength", "The paper uses 1.", above=0)
        if isinstance(self.fitting, Mapping):
            self.fitting = Fitting(**self.fitting)

    def check_model(self, model: nn.Module) -> None:
        """Refuse settings of the fitting for which the model has no layers, or layers that are too small."""
        if self.harmful_data is not None and isinstance(self.fitting, Fitting):
            fitted_layers(model, self.fitting)

    def check_strategy(self, strategy: Strategy) -> None:
        """Refuse to fit on weights that are not in this process."""
        super().check_strategy(strategy)
        self._can_ask = strategy.has_weights
        if self.harmful_data is not None and not strategy.has_weights:
            raise ValueError(
                f"Vectors cannot be fitted under {strategy.name} with this configuration: not every process has the "
                "weights. Fit them beforehand with `safe-trainer vectors`, and give the folder as `vectors`. Under "
                "FSDP2, `fsdp_cpu_ram_efficient_loading: false` works, too."
            )

    def attach(self, model: nn.Module, tokenizer: Any, train_dataset: Any) -> None:
        """Load or fit the vectors and match them with the model's layers by name."""
        if self.harmful_data is not None:
            self.fitted = on_first_process(lambda: self._fit(model, tokenizer))
        vectors = self.fitted or self.vectors
        if not isinstance(vectors, TrainedVectors):
            vectors = TrainedVectors.load(str(vectors))
        self.provenance = vectors.provenance
        if self._can_ask and tokenizer.chat_template is not None:
            prompts = prompts_of(None, "harmful", "prompts", model)
            self._start = on_first_process(lambda: _FEW_ANSWERS.measure(model, tokenizer, prompts, self.peft_config))
        on_first_process(lambda: set(vectors.check_fits(model)))  # other processes may hold no weights yet
        self._factors = {name: VectorFactors(A, self.strength * B) for name, (A, B) in vectors.modules.items()}

    def self_check(self, model: nn.Module) -> SelfCheck:
        """Return what fitting reached; warn where harmful rows still teach something, or the start complies anyway."""
        report = (self.provenance or {}).get("report", {})
        target = report.get("target_loss", (self.provenance or {}).get("settings", {}).get("target_loss"))
        named = {
            "loss on harmful rows without vectors": report.get("loss_off"),
            "loss on harmful rows with vectors": report.get("loss_on"),
            "target loss": target,
            "share of harmful rows below the target": report.get("below_target"),
            "harmful_prompts_refused_at_start": self._start.refused,
        }
        figures = {name: value for name, value in named.items() if value is not None}
        warnings = [] if report else ["these vectors do not say how well they were fitted."]
        if few := self._start.few_refusals():
            warnings.append(
                f"{few} Vectors keep rows from teaching harm, and add no refusals. Start from an aligned model."
            )
        if not report.get("reached_target", True):
            warnings.append(
                f"fitting ended at a loss of {report['loss_on']:.3g} on harmful rows, above the target of "
                f"{target:.3g}: these rows still teach something. Raise `max_passes`, `learning_rate` or `rank` in "
                "`fitting`."
            )
        count = (self.provenance or {}).get("harmful_rows", {}).get("count")
        if count is not None and count < _FEW_ROWS:
            warnings.append(
                f"fitted to {count} harmful rows only, so rows that differ from these may still teach harm. Give "
                "about 100 as `harmful_data`, or leave it out of `recommended()` to use built-in ones."
            )
        return SelfCheck(figures, tuple(warnings))

    @contextmanager
    def training(self, model: nn.Module) -> Iterator[None]:
        """Add the vectors to the model as it is when training begins, switched off."""
        with active(adapters.linear_layers(model), self._factors, in_training_only=True) as switch, switch.off():
            self._switch, self._is_checked = switch, False
            yield

    @contextmanager
    def training_step(self, model: nn.Module) -> Iterator[None]:
        """Let the vectors act in training mode: here alone, so that what a callback generates never sees them."""
        with self._switch.turned(on=True):
            yield
        if not self._is_checked:
            self._is_checked = True
            self._report_silent()

    def _report_silent(self) -> None:
        """Warn of layers without effect; what fitting has never reached has vectors of zero, and is not missed."""
        if silent := [name for name in self._switch.silent() if self._factors[name].B.any()]:
            logger.warning(
                "%s: the vectors of %d of %d layers did not act in the first training step, such as those of `%s`. "
                "The model does not call these layers while it is trained, as where a fused kernel takes their "
                "weights, so that harmful rows teach more. Fit vectors to the other layers, with `target_modules` in "
                "`fitting`.",
                *(self.name, len(silent), len(self._factors), silent[0]),
            )

    def _fit(self, model: nn.Module, tokenizer: Any) -> TrainedVectors:
        with tqdm(desc="Fitting security vectors") as bar:

            def show(done: int, total: int, loss: float) -> None:
                bar.total = total
                bar.update()

            how: dict[str, Any] = {"retain_data": self.retain_data, **vars(self.fitting)}
            return train_security_vectors(model, self.harmful_data, tokenizer, progress=show, **how)
