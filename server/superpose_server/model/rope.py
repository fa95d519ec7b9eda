"""Rotary embeddings whose frequencies depend on the length of the text.

transformers chooses them from the longest position of a batch, so that a row would be read
otherwise beside a long text than alone. Here each row has those of its own text: as one uncached
pass over that text alone would.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from superpose_server.model.batch import BEYOND


class SwitchedRope(nn.Module):
    """LongRoPE's two sets of frequencies (arXiv 2402.13753), each token with that of its text."""

    def __init__(self, rope: Any, switch: int) -> None:
        """Take the place of `rope`, which serves texts of up to `switch` tokens as it is."""
        super().__init__()
        self._switch = switch
        self.within = _fixed(rope)
        self.beyond = _fixed(rope)
        frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](
            rope.config, rope.inv_freq.device, seq_len=switch + 1
        )
        self.beyond.inv_freq = frequencies

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, each (1, tokens, size)."""
        far = position_ids >= BEYOND
        positions = torch.where(far, position_ids - BEYOND, position_ids)
        # Some classes scale by the longest position, too: each is shown those of its side only.
        near = self.within(x, positions.clamp(max=self._switch - 1))
        last = torch.full_like(positions[:, :1], self._switch)
        long = self.beyond(x, torch.cat((positions, last), -1))
        cosine, sine = (
            torch.where(far[..., None], b[:, :-1], a) for a, b in zip(near, long, strict=True)
        )
        return cosine, sine


def fix_frequencies(module: nn.Module) -> int | None:
    """Replace what chooses frequencies from a whole batch, in place.

    `dynamic` (NTK) frequencies stay those of texts up to the base's original length, its
    max_position_embeddings, which no row may exceed.

    Returns:
        The switch-over length: longer texts are run with other frequencies. None: there is none.

    Raises:
        ValueError: Frequencies of a kind that is not known here.
    """
    switch: int | None = None
    for name, rope in list(module.named_modules()):
        kind: Any = getattr(rope, "rope_type", None)
        kinds = set(kind.values()) if isinstance(kind, dict) else {kind}
        if kind == "longrope":
            switch = int(cast(Any, rope).config.rope_parameters["original_max_position_embeddings"])
            module.set_submodule(name, SwitchedRope(rope, switch))
        elif kind == "dynamic":
            module.set_submodule(name, _fixed(rope))
        elif any(other is not None and _depends(other) for other in kinds):
            raise ValueError(
                f"its rotary embedding {name} is of kind {kind}, whose frequencies would depend on "
                "who shares a batch"
            )
    return switch


def _depends(kind: str) -> bool:
    return kind == "longrope" or "dynamic" in kind


def _fixed(rope: Any) -> Any:
    """Return a copy whose frequencies stay what they are."""
    fixed = copy.deepcopy(rope)
    fixed.rope_type = "default"
    return fixed
