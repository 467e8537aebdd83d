"""What a model's answers cost it, token by token and row by row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from ...data.encoding import Batch


def answer_logits(model: Any, batch: Batch) -> Tensor:
    """Return the logits that predict the answer tokens of all rows, one row after the other, float32, (N, V)."""
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    # Selected before it is made float32: all positions in full precision can be larger than the model.
    return output.logits[:, :-1][batch.is_answer[:, 1:]].float()


def answer_tokens(batch: Batch) -> Tensor:
    """Return the answer tokens of all rows, one row after the other, (N,)."""
    return batch.input_ids[batch.is_answer]


def mean_loss(model: Any, batch: Batch) -> Tensor:
    """Return the mean cross entropy over all answer tokens of the batch, in nats."""
    return cross_entropy(answer_logits(model, batch), answer_tokens(batch))


@torch.no_grad()
def row_losses(model: Any, batch: Batch) -> Tensor:
    """Return for each row the mean cross entropy over its answer tokens, in nats, (B,)."""
    losses = cross_entropy(answer_logits(model, batch), answer_tokens(batch), reduction="none")
    counts = batch.is_answer.sum(1)
    owners = torch.repeat_interleave(torch.arange(len(counts), device=losses.device), counts)
    return torch.zeros(len(counts), device=losses.device).index_add_(0, owners, losses) / counts


def mean_divergence(model: Any, batch: Batch, reference: Tensor) -> Tensor:
    """Return the mean `KL(reference ‖ model)` over all answer tokens, in nats.

    Args:
        model (`PreTrainedModel`): The model.
        batch ([`Batch`]): The rows.
        reference (`Tensor`): Logits of the reference, from [`answer_logits`], (N, V).
    """
    log_p, log_q = log_softmax(reference, -1), log_softmax(answer_logits(model, batch), -1)
    return kl_div(log_q, log_p, log_target=True, reduction="batchmean")
