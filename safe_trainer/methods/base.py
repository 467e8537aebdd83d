"""The one abstraction of the house: a safety method and the moments at which it may act."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..distributed import SPLIT_AT_LOADING, Strategy

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn


@dataclass(frozen=True)
class Paper:
    """Where a method comes from; shown on the model card of everything trained with it.

    Args:
        title (`str`): Title of the paper.
        arxiv (`str`): arXiv identifier, such as `"2506.08473"`.
        citation (`str`): BibTeX entry.
    """

    title: str
    arxiv: str
    citation: str


class SafetyMethod:
    """Base of all methods: a dataclass of settings that may act at six moments, each of which does nothing here.

    A method is its own configuration. Subclass it as a dataclass whose fields are the user's settings, override the
    moments it needs, and add it to `METHODS`. In the order in which [`SafeSFTTrainer`] calls them:

    | moment | when |
    |---|---|
    | `adapt_peft_config` | before the model is wrapped by PEFT |
    | `check_strategy` | when it is known how training is spread over processes |
    | `attach` | right after it is wrapped, before any optimizer exists |
    | `training` | around `train()` |
    | `penalty` | once for every micro-batch |
    | `diagnostics` | once, when `train()` has ended well |

    Whatever a method adds to a model in `training` is gone when its context closes, however it closes.

    Example:

    ```python
    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class StayClose(SafetyMethod):
    ...     '''Weight decay towards zero of everything trainable, as the smallest possible method.'''
    ...
    ...     weight: float = 0.01
    ...
    ...     def penalty(self, model):
    ...         return self.weight * sum((p**2).sum() for p in model.parameters() if p.requires_grad)

    ```
    """

    name: ClassVar[str] = "safety method"
    """How tables and model cards call the method."""
    tag: ClassVar[str] = "safety-method"
    """Its tag on the model card and on the Hub."""
    paper: ClassVar[Paper | None] = None
    """Its source, if it has one."""
    needs_weights: ClassVar[bool] = False
    """Whether every process must hold all of the model's weights when the method is attached."""
    provenance: Mapping[str, Any] | None = None
    """Where the tensors at work come from, once the method is attached: the provenance of its basis, direction or
    vectors. Kept with checkpoints, by which they may be exchanged for the data that they were made from."""

    def adapt_peft_config(self, config: PeftConfig | None) -> PeftConfig | None:
        """Return the PEFT configuration to wrap the model with.

        Args:
            config (`PeftConfig` or `None`): A copy of the user's, free to be changed; `None` where the model is
                trained in full or is a `PeftModel` already.

        Raises:
            ValueError: If the method cannot work with it.
        """
        return config

    def check_model(self, model: nn.Module) -> None:
        """Refuse a model that the settings do not fit, as far as its layers' names and shapes tell.

        For recipes, which ask it before anything is loaded; `attach` must refuse the same.

        Args:
            model (`PreTrainedModel` or `PeftModel`): The model without weights: they are on the meta device.

        Raises:
            ValueError: With the setting in backticks, and what would fit.
        """

    def check_strategy(self, strategy: Strategy) -> None:
        """Refuse a way of spreading the training over processes under which the method would fail or be wrong.

        Args:
            strategy ([`~strategy.Strategy`]): The way.

        Raises:
            ValueError: With what to use instead. Here for FSDP1, for weights that are split as they are loaded, where
                no adapter would be saved, and for a method that needs weights which are not at hand.
        """
        if strategy.name == "FSDP1":
            raise ValueError(
                f"{self.name} does not work with FSDP1, which keeps all weights of a layer in one flat piece. Use "
                "FSDP2: `fsdp_version: 2` in the configuration of accelerate."
            )
        if strategy.name == SPLIT_AT_LOADING:
            raise ValueError(
                f"{self.name} does not work with {strategy.name} (tensor, expert, context or sequence parallelism, or "
                "a `distributed_config` of transformers). Load the model whole, and use DDP, FSDP2 or ZeRO-2."
            )
        if not strategy.saves_adapter:
            raise ValueError(
                f"Under {strategy.name} with this `fsdp_state_dict_type` no adapter would be saved at the end. Set "
                "`fsdp_state_dict_type: FULL_STATE_DICT` in the configuration of accelerate."
            )
        if self.needs_weights and not strategy.has_weights:
            raise ValueError(
                f"{self.name} needs the model's weights in every process when training begins, and under "
                f"{strategy.name} as it is set they are not there. Use FSDP2 with "
                "`fsdp_cpu_ram_efficient_loading: false`, or DDP or ZeRO-2."
            )

    def attach(self, model: nn.Module, tokenizer: Any, train_dataset: Any) -> None:
        """Prepare for this model; called once, when the trainer has been built and before any optimizer exists.

        Args:
            model (`PreTrainedModel` or `PeftModel`): The model that will be trained.
            tokenizer (`PreTrainedTokenizerBase`): Its tokenizer, with the chat template in use.
            train_dataset (`Dataset` or `IterableDataset`): The rows as TRL prepared them (`input_ids`, `labels`).

        Raises:
            ValueError: If the method does not fit the model.
        """

    @contextmanager
    def training(self, model: nn.Module) -> Iterator[None]:
        """Surround `train()`; undo on leaving whatever was done on entering, also after an exception."""
        yield

    def penalty(self, model: nn.Module) -> Tensor | None:
        """Return a scalar to add to the loss, already weighted, or `None`.

        It is a function of the weights, not of the batch. The trainer sees to it that it counts once for each
        optimizer step whatever the accumulation and the number of processes.
        """
        return None

    def diagnostics(self, model: nn.Module) -> dict[str, float]:
        """Return figures about the finished run, to be logged under their names."""
        return {}
