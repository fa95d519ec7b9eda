"""One trained LoRA adapter, checked and in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from superpose_adapters.digest import hash_bytes
from superpose_adapters.one_line import escaped
from superpose_adapters.provenance import Provenance

Reason = Literal[
    "NAME_INVALID",
    "PATH_ESCAPE",
    "FILE_MISSING",
    "FILE_CORRUPT",
    "PICKLE_REFUSED",
    "TOO_LARGE",
    "CONFIG_INVALID",
    "UNSUPPORTED_FEATURE",
    "TARGET_NOT_FOUND",
    "TARGET_NOT_ADAPTABLE",
    "TIED_PARAMETER",
    "TENSOR_MISSING",
    "TENSOR_SURPLUS",
    "SHAPE_MISMATCH",
    "RANK_TOO_HIGH",
    "DTYPE_UNSUPPORTED",
    "NOT_FINITE",
    "ZERO_EFFECT",
]


class AdapterError(ValueError):
    """An adapter that is refused: one line that names the thing at fault and the remedy."""

    def __init__(self, reason: Reason, message: str) -> None:
        """Keep `reason`, the machine-readable cause, beside the message."""
        super().__init__(escaped(message))
        self.reason: Reason = reason


@dataclass(frozen=True)
class Factors:
    """The low-rank factors of one module.

    Attributes:
        a: `lora_A`, float32, (r, in).
        b: `lora_B`, float32, (out, r); the loader keeps each rank's numbers side by side, since a
            correction reads rank by rank.
        scaling: alpha / r, or alpha / sqrt(r) with rsLoRA.
    """

    a: Tensor
    b: Tensor
    scaling: float
    _hashes: tuple[str, str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Remember what the factors are, as they are kept in memory for a long time."""
        object.__setattr__(self, "_hashes", self._hash())

    @property
    def rank(self) -> int:
        """The rank r of this module's delta."""
        return self.a.shape[0]

    @property
    def whole(self) -> bool:
        """True if no bit of them has changed since they were made; reads them all."""
        return self._hashes == self._hash()

    def _hash(self) -> tuple[str, str]:
        return hash_bytes(self.a), hash_bytes(self.b)


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter that passed every check of the loader, on the CPU in float32.

    Immutable and compared by identity of content: two adapters are equal when their digests are.

    Attributes:
        digest: sha256 of the tensors and of the config fields that change the adapter's effect.
        modules: {full module name in the base: factors}, sorted by name.
        config: The config fields that matter to a reader (r, lora_alpha, use_rslora, patterns,
            target_modules), as plain JSON values.
        nbytes: Bytes of the tensor file.
        warnings: What an operator should know of it, a line each: it is served, but was read in a
            way that its files do not quite say, or seems to be another base's.
        provenance: What it was merged from, as it says itself; None: nothing.
    """

    digest: str
    modules: Mapping[str, Factors]
    config: Mapping[str, object] = field(default_factory=dict)
    nbytes: int = 0
    warnings: tuple[str, ...] = ()
    provenance: Provenance | None = None

    def __eq__(self, other: object) -> bool:
        """Tell whether two adapters have one digest."""
        return isinstance(other, Adapter) and self.digest == other.digest

    def __hash__(self) -> int:
        """Return a hash of the digest."""
        return hash(self.digest)

    @property
    def rank(self) -> int:
        """The largest rank over the adapter's modules."""
        return max(factors.rank for factors in self.modules.values())

    @property
    def parameters(self) -> int:
        """Number of trained numbers."""
        return sum(f.a.numel() + f.b.numel() for f in self.modules.values())
