"""The one place where the resident weights change: folds, which others call merges.

Invariants: every adaptable parameter equals base + sum of weighted deltas of `resident`, to the
last bit a function of that mix alone; no parameter changes its address. Removal copies the base
back; it never subtracts, because (W + d) - d is not W in floating point.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from superpose_adapters.adapter import Adapter
from superpose_adapters.digest import canonical_digest, hash_bytes
from superpose_adapters.fold import concatenate_factors
from superpose_adapters.geometry import (
    MAX_FOLD_ERROR,
    Analysis,
    analyze,
    expected_fold_error,
    mix_norm,
    rounding_energy,
)
from superpose_adapters.layout import Layout
from superpose_adapters.mix import BoundMix
from superpose_server.errors import DataLoss, FailedPrecondition, Internal
from superpose_server.model.memory import give_back, lasting_copy
from superpose_server.model.packed import PackedLinear
from superpose_server.weights.parameter_format import (
    PackedFormat,
    Pair,
    ParameterFormat,
    PlainFormat,
    fold_groups,
)

_VERIFY_ATTEMPTS = 8
# Elements of a parameter on a CPU that are measured at a time: float64 scratch for all of them is
# some 200 MiB for GPT-2 Small, which the allocator would keep.
_MEASURED = 1 << 14

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedMix:
    """A bound mix with all that its fold needs, on the device, known to be finite.

    Attributes:
        mix: The mix.
        factors: {module: concatenated factors in fold order, as its `ParameterFormat` wants them}.
        groups: The modules of `factors` that are folded together.
        fold_error: Expected share of the delta that rounding loses, 0 to 1.
    """

    mix: BoundMix
    factors: dict[str, Pair] = field(default_factory=dict)
    groups: tuple[tuple[str, ...], ...] = ()
    fold_error: float = 0.0

    @property
    def foldable(self) -> bool:
        """False if rounding would swallow so much that the mix is served by correction instead.

        Rows of other mixes would then be corrected for what the weights never held.
        """
        return self.fold_error <= MAX_FOLD_ERROR


@dataclass(frozen=True)
class Verification:
    """What `verify` found; see `VerifyWeightsResponse`."""

    mix: BoundMix
    resident_hash: str
    damaged_resident: tuple[str, ...]
    damaged_base: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """True if no bit differs."""
        return not (self.damaged_resident or self.damaged_base)


class ResidentWeights:
    """The live parameters of a model, and the base that they are folded from.

    `lost` is set when a fold left them as no mix at all, and unset by whoever finds them right.

    `prepare` may run on any one thread at a time; all else belongs to the engine thread.
    """

    def __init__(
        self, module: nn.Module, layout: Layout, base_digest: str, keep_base_on: torch.device | None
    ) -> None:
        """Take over `module`, which holds the base now.

        Args:
            module: The model, on its device and in its serving dtype.
            layout: Its adaptable modules.
            base_digest: sha256 of the checkpoint.
            keep_base_on: Device of the kept base parameters; None: beside the live ones.
        """
        self._parameters = dict(module.named_parameters())
        self.layout = layout
        self._base: dict[str, Tensor] = {}
        self._rounding: dict[str, float] = {}
        self._norms: dict[str, float] = {}
        self._largest: dict[str, float] = {}
        self._keep_base_on = keep_base_on
        first = next(iter(self._parameters.values()))
        self.device, self.dtype = first.device, first.dtype
        self._formats: dict[str, ParameterFormat] = {
            name: PackedFormat(shape, self.dtype)
            if isinstance(module.get_submodule(name), PackedLinear)
            else PlainFormat(shape, self.device)
            for name, shape in layout.items()
        }
        # A tied head has no parameter of its own, and is not folded.
        self._live = {
            name: self._parameters[f"{name}.weight"] for name, m in layout.items() if not m.tied
        }
        self._hashes = {name: self._hash(name, p) for name, p in self._parameters.items()}
        self.lost = False
        self.base_digest = base_digest
        self.resident = PreparedMix(BoundMix(base_digest))

    @property
    def base_nbytes(self) -> int:
        """Bytes of the kept base parameters."""
        return sum(t.numel() * t.element_size() for t in self._base.values())

    @torch.inference_mode()
    def keep_base(self, adapter: Adapter) -> None:
        """Keep the base of every module that `adapter` adapts, so that adding it later is quick.

        Runs where `prepare` may run.
        """
        new = adapter.modules.keys() - self._base.keys()
        for module in adapter.modules:
            self._keep_base(module)
        if new:
            give_back()

    @torch.inference_mode()
    def prepare(self, mix: BoundMix) -> PreparedMix:
        """Make all that a fold of `mix` needs, and change nothing that can be seen.

        Raises:
            FailedPrecondition: The folded weights would not be finite.
        """
        weights = mix.weights
        factors: dict[str, Pair] = {}
        for module in sorted({name for adapter in weights for name in adapter.modules}):
            self._keep_base(module)
            pair = concatenate_factors(weights, module)
            if pair is not None:
                # From the factors where they are: on a GPU every norm would wait for the device.
                largest = float(pair[0].norm()) * float(pair[1].norm())
                factors[module] = self._formats[module].arrange(*pair)
                self._refuse_infinite(mix, module, factors[module], largest)
        energy = {module: self._rounding[module] for module in factors}
        error = expected_fold_error(energy, mix_norm(weights)) if factors else 0.0
        groups = tuple(fold_groups(self._formats, self._live, factors))
        return PreparedMix(mix, factors, groups, error)

    def analyze(self, prepared: PreparedMix) -> Analysis:
        """Return the geometry of a mix against this base; runs where `prepare` may run."""
        return analyze(prepared.mix, self._norms, self._rounding)

    def _keep_base(self, module: str) -> None:
        # A module that is not kept was never folded, so its live parameter is the base.
        if module not in self._base:
            live = self._live[module]
            flat = live.detach().reshape(-1)
            pieces = torch.split(flat, _MEASURED) if flat.device.type == "cpu" else (flat,)
            self._rounding[module] = sum(rounding_energy(piece) for piece in pieces)
            self._norms[module] = math.sqrt(sum(_energy(piece) for piece in pieces))
            low, high = torch.aminmax(live)
            self._largest[module] = float(torch.maximum(-low, high))
            self._base[module] = lasting_copy(live, self._keep_base_on)

    def _refuse_infinite(self, mix: BoundMix, module: str, pair: Pair, largest: float) -> None:
        limit = torch.finfo(self.dtype).max
        # |sum| <= max |W| + |B| |A|; only where this bound is no help is the sum itself formed.
        if self._largest[module] + largest < limit:
            return
        [folded] = self._fresh((module,), {module: pair})
        if not bool(torch.isfinite(folded).all()):
            domains = ", ".join(f"{e.domain}={e.weight:g}" for e in mix.entries)
            raise FailedPrecondition(
                f"{module} would not be finite in {str(self.dtype).removeprefix('torch.')} under "
                f"{domains}: use smaller weights",
                "FOLD_NOT_FINITE",
            )

    @torch.inference_mode()
    def fold(self, target: PreparedMix) -> None:
        """Make `target` resident, or leave the old mix resident.

        A mix that rounding would swallow leaves the base resident; rows are corrected.

        Raises:
            Internal: The fold failed; the mix that was resident is resident again.
            DataLoss: It failed and nothing could be put back.
        """
        if not target.foldable:
            target = PreparedMix(BoundMix(self.base_digest))
        before = self.resident
        try:
            self._write(target)
        except Exception as error:
            _log.exception("fold failed mix=%s", target.mix.digest)
            self._restore(before)
            raise Internal(
                "the fold failed, see the server's log; the mix that was served before is served "
                "still",
                "FOLD_FAILED",
            ) from error

    def _write(self, target: PreparedMix) -> None:
        stale = set(self.resident.factors) - set(target.factors)
        for group in target.groups:
            self._fold(group, [self._live[module] for module in group], target.factors)
        self._copy_base(stale)
        if self.device.type == "cuda":
            # A fault on the device must show here, where the old mix can be put back.
            torch.cuda.synchronize(self.device)
        self.resident = target

    def _fold(
        self, group: Sequence[str], outs: Sequence[Tensor], factors: Mapping[str, Pair]
    ) -> None:
        self._formats[group[0]].fold(
            outs, [self._base[module] for module in group], [factors[module] for module in group]
        )

    def _copy_base(self, modules: Iterable[str]) -> None:
        names = list(modules)
        if names:
            torch._foreach_copy_(
                [self._live[name] for name in names], [self._base[name] for name in names]
            )

    def _restore(self, before: PreparedMix) -> None:
        self._put_base_back()
        try:
            self._write(before)
        except Exception:
            _log.exception("refold failed mix=%s; serving it by correction", before.mix.digest)
            self._put_base_back()

    def _put_base_back(self) -> None:
        """Put every module that may have been written right; allocates nothing beside the base.

        Raises:
            DataLoss: Even that failed; the weights are no mix at all.
        """
        try:
            self._copy_base(list(self._base))
        except Exception as error:
            self.lost = True
            raise DataLoss(
                "a fold failed and the base could not be put back: restart the server",
                "WEIGHTS_DAMAGED",
            ) from error
        self.resident = PreparedMix(BoundMix(self.base_digest))

    def verify(self) -> Generator[bool, None, Verification]:
        """Compare every live bit with a fresh fold and every base bit with its hash at load.

        Yields after a few parameters, so that the engine can step in between; begins anew when the
        resident mix changes meanwhile.

        Raises:
            FailedPrecondition: The resident mix changed again and again.
        """
        for _ in range(_VERIFY_ATTEMPTS):
            resident = self.resident
            found = yield from self._verify_against(resident)
            if found is not None:
                return found
        raise FailedPrecondition(
            f"the mix changed {_VERIFY_ATTEMPTS} times while the weights were verified: verify "
            "again when it rests",
            "MIX_KEEPS_CHANGING",
        )

    def _verify_against(self, resident: PreparedMix) -> Generator[bool, None, Verification | None]:
        kept = set(self._base)
        expected = dict(self._hashes)
        for group in resident.groups:
            for module, fresh in zip(group, self._fresh(group, resident.factors), strict=True):
                name = f"{module}.weight"
                expected[name] = self._hash(name, fresh)
            yield True
            if self.resident is not resident:
                return None
        hashes, damaged_resident, damaged_base = {}, [], []
        for name, parameter in self._parameters.items():
            module = name.removesuffix(".weight")
            hashes[name] = self._hash(name, parameter)
            if module in kept and self._hash(name, self._base[module]) != self._hashes[name]:
                damaged_base.append(name)
            if hashes[name] != expected[name]:
                damaged_resident.append(name)
            yield True
            if self.resident is not resident:
                return None
        return Verification(
            resident.mix, canonical_digest(hashes), tuple(damaged_resident), tuple(damaged_base)
        )

    @torch.inference_mode()
    def _fresh(self, group: Sequence[str], factors: Mapping[str, Pair]) -> list[Tensor]:
        folded = [torch.empty_like(self._live[module]) for module in group]
        self._fold(group, folded, factors)
        return folded

    def _hash(self, name: str, parameter: Tensor) -> str:
        """Hash a parameter as the checkpoint has it: the same on every processor."""
        form = self._formats.get(name.removesuffix(".weight"))
        return hash_bytes(parameter if form is None else form.plain(parameter))

    def measure_fold_error(self, prepared: PreparedMix) -> Generator[bool, None, float]:
        """Return norm(W(mix) - W0 - delta) / norm(delta), measured; yields after each module.

        A delta that is 0 only because the factors' dtype has nothing as small is lost whole.
        """
        lost = total = 0.0
        for group in prepared.groups:
            for module, fresh in zip(group, self._fresh(group, prepared.factors), strict=True):
                form = self._formats[module]
                base = self._base[module].to(self.device)
                with torch.inference_mode():
                    delta = form.delta(prepared.factors[module])
                    error = form.plain(fresh).double() - form.plain(base).double() - delta
                    lost += float(error.square().sum())
                    total += float(delta.square().sum())
                yield True
        if total > 0:
            return math.sqrt(lost / total)
        return 1.0 if mix_norm(prepared.mix.weights) > 0 else 0.0


def _energy(parameter: Tensor) -> float:
    return float(parameter.double().square().sum())
