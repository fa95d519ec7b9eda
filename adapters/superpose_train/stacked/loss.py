"""The training loss of a stack and its gradient, without ever holding all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

# Positions whose logits are held at once: 24 MiB at 49,000 tokens, so that they stay in the
# processor's last cache from the output layer to its gradient. 512 took a tenth longer on
# SmolLM2 with four adapters at once, and no longer with two.
_POSITIONS = 128


def hidden_states(model: Any, ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return what the output layer is given, (rows, longest, width)."""
    states: Tensor = model.base_model(
        input_ids=ids, attention_mask=attention_mask, use_cache=False
    ).last_hidden_state
    return states


@torch.no_grad()
def check_output_layer(model: Any) -> None:
    """Refuse a base whose logits are more than its output layer of its hidden states.

    Raises:
        ValueError: it scales or caps them.
    """
    ids = torch.arange(4, device=next(model.parameters()).device).unsqueeze(0)
    mask = torch.ones_like(ids)
    expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    result = model.get_output_embeddings()(hidden_states(model, ids, mask))
    if not torch.allclose(result, expected, rtol=1e-4, atol=1e-4):
        raise ValueError(
            "this base changes its logits after the output layer, which stacked training does "
            "not know; train its adapters one by one"
        )


def backward(model: Any, ids: Tensor, mask: Tensor, labels: Tensor, adapters: int) -> Tensor:
    """Take the gradient of every adapter's mean loss; return these losses (adapters,), detached.

    Args:
        model: The base, its corrections switched on.
        ids: (adapters * rows, longest).
        mask: 1 where there is a token.
        labels: Ids where a token is trained on, else negative.
        adapters: To which the rows belong in turn, equally many to each.
    """
    targets = labels[:, 1:]
    chosen = targets >= 0
    # The output layer is most of a small base: it sees only positions that predict something.
    states = hidden_states(model, ids, mask)[:, :-1][chosen]
    targets = targets[chosen]
    counts = chosen.view(adapters, -1).sum(1)
    owners = torch.arange(adapters, device=ids.device).repeat_interleave(counts)
    weights = (1.0 / counts)[owners]
    output = model.get_output_embeddings()
    gradients, nats = [], []
    for piece, target, weight in zip(
        *(torch.split(tensor, _POSITIONS) for tensor in (states.detach(), targets, weights)),
        strict=True,
    ):
        # Gradients are taken piece by piece, so that its logits are gone before the next one's.
        leaf = piece.detach().requires_grad_()
        loss = cross_entropy(output(leaf).float(), target, reduction="none")
        (loss * weight).sum().backward()
        gradients.append(leaf.grad)
        nats.append(loss.detach())
    states.backward(torch.cat([g for g in gradients if g is not None]))  # type: ignore[no-untyped-call]
    losses = torch.zeros(adapters, dtype=torch.float64, device=ids.device)
    return losses.index_add_(0, owners, torch.cat(nats).double() * weights.double())
