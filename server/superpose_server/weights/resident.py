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
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from superpose_adapters.adapter import Adapter
from superpose_adapters.digest import canonical_digest, hash_bytes, hash_slices
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
from superpose_server.weights.bits import same_bits
from superpose_server.weights.pace import Pace
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
# What a fold and a comparison take, as so many passes over a parameter.
_FOLD_PASSES = 2

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
class Findings:
    """What a check of the weights found.

    Attributes:
        damaged_resident: Live parameters that are not what they should be.
        damaged_base: Parameters whose kept base is not what it was at load.
        damaged_adapters: Digests of adapters whose factors are not what they were at load.
        lost: Parameters and adapters of which there is no whole copy here to mend them from.
    """

    damaged_resident: tuple[str, ...] = ()
    damaged_base: tuple[str, ...] = ()
    damaged_adapters: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True if no bit differs."""
        return not (self.damaged_resident or self.damaged_base or self.damaged_adapters)


@dataclass(frozen=True)
class Verification:
    """What `verify` found of the weights of one mix; see `VerifyWeightsResponse`."""

    mix: BoundMix
    resident_hash: str
    findings: Findings

    @property
    def ok(self) -> bool:
        """True if no bit differs."""
        return self.findings.ok


class ResidentWeights:
    """The live parameters of a model, and the base that they are folded from.

    Attributes:
        intact: Whether texts may be made of them. Unset by `note_damage`; set by a check that finds
            everything right.
        times_damaged: How often damage was noted.
        resident: The mix that they hold.

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
        # Of the bits in memory; only the hash that `verify` reports is of the checkpoint's layout.
        self._hashes = {name: hash_bytes(p) for name, p in self._parameters.items()}
        # Those whose factors a fold or a correction may read, each by its identity: of two with one
        # digest each has factors of its own.
        self._adapters: WeakValueDictionary[int, Adapter] = WeakValueDictionary()
        self.intact = True
        self.times_damaged = 0
        self.base_digest = base_digest
        self.resident = PreparedMix(BoundMix(base_digest))

    @property
    def base_nbytes(self) -> int:
        """Bytes of the kept base parameters."""
        return sum(t.numel() * t.element_size() for t in self._base.values())

    @property
    def adapters(self) -> list[Adapter]:
        """Those that were seen and are in use still."""
        # `values` would fail where the operator's thread adds one meanwhile; this copies at once.
        return [adapter for each in self._adapters.valuerefs() if (adapter := each()) is not None]

    @torch.inference_mode()
    def keep_base(self, adapter: Adapter) -> None:
        """Keep the base of every module that `adapter` adapts, so that adding it later is quick.

        Runs where `prepare` may run.
        """
        self._adapters[id(adapter)] = adapter
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
        self._adapters.update({id(adapter): adapter for adapter in weights})
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
            self.note_damage()
            raise DataLoss(
                "a fold failed and the base could not be put back: restart the server",
                "WEIGHTS_DAMAGED",
            ) from error
        self.resident = PreparedMix(BoundMix(self.base_digest))

    def note_damage(self) -> None:
        """Let no texts be made, as a check has found damage or a fold has left no mix at all."""
        self.intact = False
        self.times_damaged += 1

    def mend(self) -> None:
        """Write every parameter that was ever folded anew, from the kept base and the adapters.

        Whether that has helped, a check tells.

        Raises:
            DataLoss: Not even the base could be copied; the weights are no mix at all.
        """
        # Prepared factors may be what is damaged. No base is kept anew here: all were folded once.
        self._restore(self.prepare(self.resident.mix))

    def check(self) -> Generator[bool, None, Findings]:
        """Compare every live bit with a fresh fold, and base and factors with their hashes at load.

        Each parameter is compared with the mix that is resident when its turn comes, so that
        changes of the mix do not matter. Yields after a few MiB, so that the engine can step in
        between. `intact` is false from the first damage on, for rows that run meanwhile.
        """
        resident: list[str] = []
        base: list[str] = []
        lost: list[str] = []
        pace = Pace()
        todo = dict.fromkeys(self._parameters)
        while todo:
            # All of a group, as each rounds as it does in this company.
            group = self._folded_with(next(iter(todo)))
            damaged = self._damaged_of(group)
            if pace.due(_FOLD_PASSES * sum(self._parameters[name].nbytes for name in group)):
                yield True
            for name in todo.keys() & set(group):
                kept = name.removesuffix(".weight") in self._base
                whole = yield from self._is_base_whole(name, pace)
                if whole is None:  # Its base is kept from now on: look again.
                    continue
                del todo[name]
                if not whole:
                    lost.append(name)
                    (base if kept else resident).append(name)
                if name in damaged and (whole or self._was_changed(name)):
                    resident.append(name)
                if not whole or name in damaged:
                    self.note_damage()
        adapters = []
        for adapter in self.adapters:
            if not (yield from _is_whole(adapter, pace)):
                adapters.append(adapter.digest)
                self.note_damage()
        return Findings(tuple(resident), tuple(base), tuple(adapters), (*lost, *adapters))

    def verify(self) -> Generator[bool, None, Verification]:
        """Check the weights and hash them, all under one mix; see `check`.

        Begins anew when the resident mix changes meanwhile.

        Raises:
            FailedPrecondition: The resident mix changed again and again.
        """
        for _ in range(_VERIFY_ATTEMPTS):
            resident = self.resident
            findings = yield from self.check()
            hashes = {}
            for name, parameter in self._parameters.items():
                if self.resident is not resident:
                    break
                hashes[name] = self._hash(name, parameter)
                yield True
            if self.resident is resident or not findings.ok:
                return Verification(resident.mix, canonical_digest(hashes), findings)
        raise FailedPrecondition(
            f"the mix changed {_VERIFY_ATTEMPTS} times while the weights were verified: verify "
            "again when it rests",
            "MIX_KEEPS_CHANGING",
        )

    def _folded_with(self, name: str) -> list[str]:
        """Return the parameters that are folded together with one now, or that one alone."""
        module = name.removesuffix(".weight")
        group = next((group for group in self.resident.groups if module in group), None)
        return [name] if group is None else [f"{module}.weight" for module in group]

    @torch.inference_mode()
    def _damaged_of(self, group: Sequence[str]) -> set[str]:
        """Return which of the parameters of a group are not what base and adapters make of them.

        One whose base was never kept was never folded: only its hash tells.
        """
        modules = [name.removesuffix(".weight") for name in group]
        if not set(modules) <= self._base.keys():
            return set()
        expected = [self._base[module] for module in modules]
        if modules[0] in self.resident.factors:
            expected = self._fresh(modules, self._arranged(modules))
        pairs = zip(group, modules, expected, strict=True)
        return {name for name, module, bits in pairs if not same_bits(self._live[module], bits)}

    def _was_changed(self, name: str) -> bool:
        """Return whether a live parameter is damaged, whose kept base is: only it can tell now."""
        folded = name.removesuffix(".weight") in self.resident.factors
        return folded or hash_bytes(self._parameters[name]) != self._hashes[name]

    def _is_base_whole(self, name: str, pace: Pace) -> Generator[bool, None, bool | None]:
        """Return whether a base parameter has its hash; None if it became a kept one meanwhile."""
        module = name.removesuffix(".weight")
        kept = self._base.get(module)
        slices = hash_slices(self._parameters[name] if kept is None else kept)
        while True:
            try:
                done = next(slices)
            except StopIteration as end:
                return bool(end.value == self._hashes[name])
            if pace.due(done):
                yield True
            if self._base.get(module) is not kept:
                return None

    def _arranged(self, modules: Iterable[str]) -> dict[str, Pair]:
        """Return the factors of the resident mix for some modules, from the adapters themselves."""
        weights = self.resident.mix.weights
        pairs = {module: concatenate_factors(weights, module) for module in modules}
        return {
            module: self._formats[module].arrange(*pair)
            for module, pair in pairs.items()
            if pair is not None
        }

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


def _is_whole(adapter: Adapter, pace: Pace) -> Generator[bool, None, bool]:
    """Return whether no bit of an adapter's factors has changed."""
    whole = True
    for factors in adapter.modules.values():
        whole &= factors.whole
        if pace.due(factors.a.nbytes + factors.b.nbytes):
            yield True
    return whole


def _energy(parameter: Tensor) -> float:
    return float(parameter.double().square().sum())
