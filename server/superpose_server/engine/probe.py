"""What the self-checks of a base compare, and how they say what they found."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from superpose_server.errors import SelfCheckError

# What a reader will want to know of a configuration, if it is set.
_UNUSUAL = re.compile("window|softcap|capping|sink|chunk|alibi|multiplier|rope_type|scal")
_USUAL: tuple[object, ...] = (None, False, 0, 1, 1.0, "default", {}, [])


def reference(module: Any, ids: tuple[int, ...]) -> Tensor:
    """Return float32 (tokens, vocabulary), what transformers' own pass gives for one text."""
    return references(module, (ids,))[0]


def references(module: Any, texts: tuple[tuple[int, ...], ...]) -> Tensor:
    """Return float32 (texts, tokens, vocabulary), the same for texts of one length."""
    device = next(module.parameters()).device
    logits: Tensor = module(input_ids=torch.tensor(texts, device=device)).logits
    return logits.float()


def distance(found: Tensor, exact: Tensor) -> Tensor:
    """Return how far logits are off at each token, as a share of their spread there."""
    spread = exact - exact.mean(-1, keepdim=True)
    # Where there is no spread at all, logits are near only if they are the same.
    least = torch.finfo(exact.dtype).tiny
    off: Tensor = (found - exact).norm(dim=-1) / spread.norm(dim=-1).clamp_min(least)
    return off


def refusal(config: Any, what: str) -> SelfCheckError:
    """Return the error of a check, with what is unusual in a base's configuration."""
    fields = config.get_text_config(decoder=True).to_dict()
    fields.update(fields.get("rope_parameters") or {})
    unusual = [
        f"{name}={value}"
        for name, value in sorted(fields.items())
        if _UNUSUAL.search(name) and value not in _USUAL
    ]
    return SelfCheckError(f"{what} ({', '.join([config.model_type, *unusual])})")


def random_ids(count: int, within: range, seed: int = 0) -> tuple[int, ...]:
    """Return tokens to probe with."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(within.start, within.stop, (count,), generator=generator)
    return tuple(drawn.tolist())


def percent(share: float) -> str:
    """Return a share as people read it."""
    return f"{100 * share:.2g} %"
