"""Draw a token from softmax(logits / temperature), or from what top_k, top_p and min_p keep of it.

Nothing is sorted but the few tokens that top_k keeps. For the other two a token is drawn from all
of them, and drawn again if it is not one that they keep, which gives the same distribution: whether
it is kept depends on the mass of the likelier tokens alone, and for that the masses of blocks are
mostly enough. A token that is not kept rules out all that are not likelier, so that what is left
shrinks fast even where little is kept.

Ties: of equals at the end of top_k the lower ids are kept; top_p and min_p keep equals together.

A row's numbers are computed from that row alone, and how often it draws depends on it alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from superpose_server.engine.blocks import BLOCK, likeliest_tokens, tokens_of_blocks
from superpose_server.engine.sampling import SamplingParams

# Weights that are at hand at once, 1 MiB of float32: half of a core's second-level cache.
_SCRATCH = 2**18
_LARGEST = torch.finfo(torch.float32).max


def draw_from_likeliest(
    logits: Tensor,
    maxima: Tensor,
    params: Sequence[SamplingParams],
    generators: Sequence[random.Random],
) -> Tensor:
    """Return a token of each row's top_k likeliest, (rows,).

    As in transformers top_p is a share of what top_k has kept.

    Args:
        logits: float32 (rows, vocabulary).
        maxima: Those of its blocks.
        params: One a row, with a temperature and a top_k above 0.
        generators: One a row.
    """
    device = logits.device
    count = min(max(each.top_k for each in params), logits.shape[1])
    tokens = likeliest_tokens(logits, maxima, count)
    values = logits.gather(1, tokens).double()
    weights = ((values - values[:, :1]) / _column([p.temperature for p in params], device)).exp()
    weights *= torch.arange(count, device=device) < _column([p.top_k for p in params], device)
    # For each of equals counts what is likelier than the first of them.
    first = values.diff(prepend=values[:, :1]) != 0
    likelier = torch.where(first, weights.cumsum(-1) - weights, 0.0).cummax(-1).values
    floor = _column([p.min_p for p in params], device)
    kept = (likelier <= 0) | (likelier < _limit(params, weights)) & (weights >= floor)
    cumulative = (weights * kept).cumsum(-1)
    chosen = _place(cumulative, _uniform(generators, device) * cumulative[:, -1:])
    return tokens.gather(1, chosen)[:, 0]


def draw_from_all(
    logits: Tensor,
    maxima: Tensor,
    params: Sequence[SamplingParams],
    generators: Sequence[random.Random],
) -> Tensor:
    """Return a token of each row, (rows,).

    top_p keeps a token if those that are likelier have less than that share of the whole; min_p
    (arXiv 2407.01082) if it is at least so many times as likely as the likeliest, which is always
    kept.

    Args:
        logits: float32 (rows, vocabulary).
        maxima: Those of its blocks.
        params: One a row, with a temperature above 0 and no top_k.
        generators: One a row.
    """
    left = _Rows.of(logits, maxima, params)
    tokens = left.draw(generators)
    if all(p.top_p >= 1 and p.min_p == 0 for p in params):
        return tokens
    while True:
        # What is NaN, of rows that are not finite, compares as kept.
        drawn = left.logits.gather(1, tokens[left.rows][:, None])
        doubtful = (left.most_above(drawn) >= left.limit) | (drawn <= left.floor)
        (which,) = torch.nonzero(doubtful[:, 0], as_tuple=True)
        if not len(which):
            return tokens
        drawn = drawn[which]
        # Where it is min_p that refuses, all that it refuses is ruled out at once.
        left = left[which].above(torch.maximum(drawn, left.floor[which]))
        refused = (left.masses.sum(-1, keepdim=True) >= left.limit) | (drawn <= left.floor)
        (which,) = torch.nonzero(refused[:, 0], as_tuple=True)
        if not len(which):
            return tokens
        left = left[which]
        tokens[left.rows] = left.draw([generators[row] for row in left.rows.tolist()])


@dataclass(frozen=True)
class _Rows:
    """Rows whose token is sought among those above a bar.

    Attributes:
        rows: Which rows of the batch, (rows,).
        logits: Theirs, (rows, vocabulary).
        maxima: Those of their blocks, (rows, blocks).
        scale: Over the temperature, (rows, 1).
        limit: What is likelier than a token has less mass than this, if top_p keeps it, (rows, 1).
        floor: A token is above this, if min_p keeps it, (rows, 1).
        bar: As only tokens above it are left, (rows, 1).
        masses: Of what is left of each block, over the probability of the likeliest token, float64
            (rows, blocks).
    """

    rows: Tensor
    logits: Tensor
    maxima: Tensor
    scale: Tensor
    limit: Tensor
    floor: Tensor
    bar: Tensor
    masses: Tensor

    @classmethod
    def of(cls, logits: Tensor, maxima: Tensor, params: Sequence[SamplingParams]) -> _Rows:
        device = logits.device
        temperature = _column([p.temperature for p in params], device)
        # In float32 the inverse of a small temperature is infinite, and 0 times that a NaN.
        scale = temperature.reciprocal().clamp_(max=_LARGEST).float()
        peaks = maxima.amax(-1, keepdim=True)
        floor = peaks + _column([p.min_p for p in params], device).log() * temperature
        # min_p refuses nothing of a row that is not finite: a NaN is not below anything.
        floor.masked_fill_(~peaks.isfinite(), torch.nan)
        below = torch.full_like(peaks, -torch.inf)
        masses = _block_masses(logits, peaks, scale)
        return cls(
            rows=torch.arange(len(params), device=device),
            logits=logits,
            maxima=maxima,
            scale=scale,
            limit=_limit(params, masses),
            floor=torch.where(floor.float() < floor, floor.float(), floor.float().nextafter(below)),
            bar=below,
            masses=masses,
        )

    def __getitem__(self, which: Tensor) -> _Rows:
        """Return some of them, in their order."""
        if len(which) == len(self.rows):
            return self
        return _Rows(*(getattr(self, each.name)[which] for each in fields(self)))

    def above(self, bar: Tensor) -> _Rows:
        """Return them with a higher bar."""
        peaks = self.maxima.amax(-1, keepdim=True)
        masses = _block_masses(self.logits, peaks, self.scale, bar)
        return replace(self, bar=bar, masses=masses)

    def most_above(self, drawn: Tensor) -> Tensor:
        """Return the mass of the blocks that hold likelier tokens than logits `drawn` (rows, 1).

        Without a likelier token it is NaN, which is no reason to doubt.
        """
        holds = self.maxima > drawn
        mass = (self.masses * holds).sum(-1, keepdim=True)
        return mass.masked_fill_(~holds.any(-1, keepdim=True), torch.nan)

    def draw(self, generators: Sequence[random.Random]) -> Tensor:
        """Invert the cumulative sums, in the order of ids, at a number of each row's own."""
        cumulative = self.masses.cumsum(-1)
        aim = _uniform(generators, self.logits.device) * cumulative[:, -1:]
        block = _place(cumulative, aim)
        mass = self.masses.gather(1, block)
        ids, values = tokens_of_blocks(self.logits, block)
        within = _weights(values, self.maxima.amax(-1, keepdim=True), self.scale).double()
        within = (within * (values > self.bar)).cumsum(-1)
        # Of a block's two sums the one was rounded to float32.
        share = (aim - (cumulative.gather(1, block) - mass)) / mass
        token = ids.gather(1, _place(within, share.clamp_(0) * within[:, -1:]))
        return token[:, 0].clamp_(max=self.logits.shape[1] - 1)  # Beyond it where all is NaN.


def _weights(logits: Tensor, peaks: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
    """Return probabilities over that of the likeliest: nothing overflows, whatever the scale."""
    return torch.sub(logits, peaks, out=out).mul_(scale).exp_()


def _block_masses(
    logits: Tensor, peaks: Tensor, scale: Tensor, bar: Tensor | None = None
) -> Tensor:
    """Return the sum of weights of each block, float64 (rows, blocks); of what is above a bar.

    Summed in float32 within a block, which is all that float32 logits are good for.
    """
    count, vocabulary = logits.shape
    blocks = -(-vocabulary // BLOCK)
    sums = logits.new_empty(count, blocks)
    # A few rows at a time, so that a CPU finds in its cache what it has just written.
    step = count if logits.is_cuda else max(1, _SCRATCH // (blocks * BLOCK))
    for start in range(0, count, step):
        rows = slice(start, start + step)
        # Whole blocks, so that they are summed the same way in every row.
        each = logits.new_empty(len(logits[rows]), blocks, BLOCK)
        flat = each.view(len(each), -1)
        flat[:, vocabulary:] = 0.0
        flat = flat[:, :vocabulary]
        _weights(logits[rows], peaks[rows], scale[rows], out=flat)
        if bar is not None:
            # As numbers, since a comparison that gives bools is computed one by one on a CPU.
            flat.mul_(torch.gt(logits[rows], bar[rows], out=torch.empty_like(flat)))
        torch.sum(each, dim=-1, out=sums[rows])
    return sums.double()


def _limit(params: Sequence[SamplingParams], masses: Tensor) -> Tensor:
    """Return top_p of the sum of `masses` (rows, n), as (rows, 1); infinite where it is off."""
    share = _column([p.top_p for p in params], masses.device)
    return (share * masses.sum(-1, keepdim=True)).masked_fill_(share >= 1, torch.inf)


def _uniform(generators: Sequence[random.Random], device: torch.device) -> Tensor:
    return _column([generator.random() for generator in generators], device)


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    # float64, in which the wire has them.
    return torch.tensor(values, dtype=torch.float64, device=device)[:, None]


def _place(cumulative: Tensor, aim: Tensor) -> Tensor:
    """Return where cumulative sums (rows, n) pass `aim` (rows, 1), as int64 (rows, 1).

    At a term above 0, even if rounding has taken `aim` to the very end.
    """
    place = torch.searchsorted(cumulative, aim, right=True)
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.minimum(place, last).clamp_(max=cumulative.shape[1] - 1)
