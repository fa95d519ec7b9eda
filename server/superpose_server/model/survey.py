"""What a base asks of its attention and shows to its modules, seen in two passes before it serves.

A base is not known by its name: whether many rows can share a pass, which window each layer has and
which tokens each module sees is told by its own code, run once on a few tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.pytorch_utils import Conv1D

from superpose_adapters.layout import Layout
from superpose_server.model.attention import UnknownAttention, attend_by_torch
from superpose_server.model.batch import Batch, Span
from superpose_server.model.cache import SlotCache
from superpose_server.model.passes import shared_pass

_SURVEY = "superpose_survey"
# transformers knows attention by global names.
_ONE_AT_A_TIME = threading.Lock()
_OUTSIDE = "has attention of its own, outside transformers' interface"
# What a module sees, or that it is no plain product.
_TOKENS, _WANTED, _OTHERS, _NO_PRODUCT = "tokens", "wanted", "others", "no product"
# How far off a product may be whose bias is added apart, in bfloat16.
_ROUNDING = 0.02
# Numbers of tokens of two rows, and of wanted logits: two passes tell apart what a module sees.
_PASSES = (((3, 4), 2), ((4, 1), 3))
# Slots and their length that the passes need.
SURVEYED = (2, sum(_PASSES[0][0]))

Pass = Callable[[Batch, Tensor], Tensor]


class Unshared(ValueError):
    """Why rows cannot share a pass of this base; the message continues "it"."""


class OwnMask(ValueError):
    """Why a base is not served at all; the message continues "it"."""


@dataclass(frozen=True)
class _Mask:
    """What transformers' mask for a layer says: each token sees itself and `window` - 1 before.

    Or why it says something else, for the layers that use it.
    """

    window: int | None
    refused: Unshared | None = None

    def __getattr__(self, name: str) -> Any:
        """A class that computes with its mask chooses by it what is attended to.

        Raises:
            OwnMask: Always.
        """
        raise OwnMask(
            "computes with its attention's masks, so that one text's depend on its length"
        )


def read_mask(sees: Callable[..., Any], length: int) -> int | None:
    """Return the window of a causal mask over `length` positions, None if nothing is cut off.

    Args:
        sees: transformers' mask function of (row, head, position of the query, of the key).
        length: Tokens a row.

    Raises:
        Unshared: It is no causal mask with or without a window.
    """
    places = torch.arange(length)
    zero = torch.zeros((), dtype=torch.int64)

    def seen_from(position: int) -> Tensor:
        seen = sees(zero, zero, torch.full((length,), position), places)
        return torch.as_tensor(seen).expand(length)

    window = int(seen_from(length - 1).sum())
    near = {0, 1, length // 2, length - 1, *range(window - 2, window + 2), 2 * window, 3 * window}
    for position in sorted(near & set(range(length))):
        expected = (places <= position) & (places > position - window)
        if window < 1 or not torch.equal(seen_from(position), expected):
            raise Unshared("hides tokens from each other otherwise than by a window")
    return None if window == length else window


class _Observer:
    """A cache, a mask and an attention that note how a base uses them."""

    def __init__(self, cache: SlotCache, length: int) -> None:
        self._cache = cache
        self._length = length
        # What was written and not read yet: attention must read what the cache returned.
        self._unread: dict[int, Tensor] = {}
        self.windows: dict[nn.Module, int | None] = {}

    def select(self, batch: Batch) -> None:
        self._cache.select(batch)

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        keys, values = self._cache.update(keys, values, layer)
        self._unread[id(keys)] = values
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._cache.get_seq_length(layer_idx)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._length, 0

    def mask(self, *, mask_function: Callable[..., Any], **_: Any) -> _Mask:
        try:
            return _Mask(read_mask(mask_function, self._length))
        except Unshared as reason:
            # Some make masks for kinds of layers that they have none of.
            return _Mask(None, reason)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        attention_mask: object,
        **arguments: Any,
    ) -> tuple[Tensor, None]:
        if "batch" not in arguments:
            raise Unshared("does not hand on to its attention what it is called with")
        if self._unread.pop(id(keys), None) is not values:
            raise Unshared("changes keys or values between cache and attention")
        if attention_mask is None and getattr(module, "is_causal", True) is not True:
            raise UnknownAttention("sees later tokens")
        window = None
        if isinstance(attention_mask, _Mask):
            if attention_mask.refused is not None:
                raise attention_mask.refused
            window, attention_mask = attention_mask.window, None
        if self.windows.setdefault(module, window) != window:
            raise Unshared("has an attention module with several windows")
        # Refuses whatever else it is asked for.
        return attend_by_torch(module, query, keys, values, attention_mask, **arguments)  # type: ignore[arg-type]

    def finish(self) -> None:
        if self._unread or not self.windows:
            raise Unshared(_OUTSIDE)


@contextmanager
def _registered(observer: _Observer) -> Iterator[None]:
    with _ONE_AT_A_TIME:
        AttentionInterface.register(_SURVEY, observer.attend)
        AttentionMaskInterface.register(_SURVEY, observer.mask)
        yield


@torch.inference_mode()
def survey_attention(module: Any, length: int, device: torch.device) -> dict[nn.Module, int | None]:
    """See that rows of a transformers model can share passes.

    Args:
        module: The model, on `device`. Its attention implementation is another one afterwards.
        length: Tokens a row.
        device: Where it is.

    Returns:
        {attention module: how many tokens it sees, itself included; None: all}.

    Raises:
        Unshared: They cannot; the message continues "it".
        UnknownAttention: They cannot; the message continues "its attention".
    """
    if not module._supports_attention_backend or not module._can_set_attn_implementation():
        raise Unshared(_OUTSIDE)
    lengths, wanted = _PASSES[0]
    observer = _Observer(SlotCache(*SURVEYED), length)
    batch = _batch(lengths, device)
    with _registered(observer):
        module.set_attn_implementation(_SURVEY)
        observer.select(batch)
        shared_pass(module, observer, batch, torch.arange(wanted, device=device))
    observer.finish()
    return observer.windows


@torch.inference_mode()
def survey_rows(
    module: nn.Module, layout: Layout, run: Pass, device: torch.device, *, alone: bool
) -> tuple[Layout, frozenset[str]]:
    """See which tokens each adaptable module sees.

    Args:
        module: The model.
        layout: What could be adapted.
        run: A pass of it over a batch, (batch, keep).
        device: Where it is.
        alone: A batch may hold one span only.

    Returns:
        The layout of those that give the product with their parameter and no more, and that see a
        row of every token, or of every token whose logits are wanted, whenever they are called;
        and the names of those of the wanted. Where a row has a pass to itself, modules may see
        whatever they like of it, and none of them are set apart.
    """
    seen: dict[str, set[str]] = {name: set() for name in layout}
    for lengths, wanted in _PASSES:
        count = sum(lengths)
        kinds = {count: _TOKENS, wanted: _WANTED}
        with ExitStack() as until:
            for name, sees in seen.items():
                hook = module.get_submodule(name).register_forward_hook(_noting(sees, kinds))
                until.callback(hook.remove)
            batch = _batch((count,) if alone else lengths, device)
            run(batch, torch.arange(wanted, device=device))
    if alone:
        plain = {name for name, kind in seen.items() if kind and _NO_PRODUCT not in kind}
        uncalled = [name for name, kind in seen.items() if not kind]
        # The other half of an encoder-decoder has adapters all the same, which add nothing.
        if not _matter(module, uncalled, lambda: run(batch, torch.arange(wanted, device=device))):
            plain |= set(uncalled)
        return {name: shape for name, shape in layout.items() if name in plain}, frozenset()
    tokens, heads = (
        frozenset(name for name, kind in seen.items() if kind == {which})
        for which in (_TOKENS, _WANTED)
    )
    return {name: shape for name, shape in layout.items() if name in tokens | heads}, heads


def _matter(module: nn.Module, uncalled: list[str], run: Callable[[], Tensor]) -> bool:
    """Return whether modules that are never called matter: a class may read their parameters."""
    parameters = [module.get_submodule(name).get_parameter("weight") for name in uncalled]
    kept = [parameter.data for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data = torch.full_like(parameter, torch.nan)
        return not bool(run().isfinite().all())
    finally:
        for parameter, data in zip(parameters, kept, strict=True):
            parameter.data = data


def _noting(sees: set[str], kinds: dict[int, str]) -> Callable[..., None]:
    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        # Tokens that come by name are not corrected.
        known = bool(inputs) and _is_product(module, inputs[0], output)
        sees.add(kinds.get(inputs[0].shape[:-1].numel(), _OTHERS) if known else _NO_PRODUCT)

    return note


def _is_product(module: Any, x: Tensor, output: object) -> bool:
    """Return whether a module gives what its parameters do: some subclasses are routers."""
    if type(module) in (nn.Linear, Conv1D):
        return True
    exact = linear(x, module.weight.T if isinstance(module, Conv1D) else module.weight, module.bias)
    if not isinstance(output, Tensor) or output.shape != exact.shape:
        return False
    off = (output.double() - exact.double()).norm()
    return bool(off <= _ROUNDING * exact.double().norm())


def _batch(lengths: tuple[int, ...], device: torch.device) -> Batch:
    ids = tuple(range(1, 1 + max(lengths)))
    return Batch.of([Span(slot, ids[:n], 0) for slot, n in enumerate(lengths)], device)
