"""Which kernels a process uses: the best that its processor has, or those of SUPERPOSE_KERNELS.

A family is a library, compiled for some registers, and a way to compute products in bfloat16. It is
chosen once: the bits of a row must depend on nothing that changes while a server runs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

VARIABLE = "SUPERPOSE_KERNELS"


class FamilyError(ValueError):
    """SUPERPOSE_KERNELS asks for what there is not; one line with the remedy."""


@dataclass(frozen=True)
class Family:
    """Kernels for some kind of processor.

    Attributes:
        name: As SUPERPOSE_KERNELS names it.
        architecture: The compiler's `-march`.
        products: How products in bfloat16 are computed; see `use_products` in linear.h.
        needs: What the processor must have, in the words of `torch.cpu.get_capabilities`.
    """

    name: str
    architecture: str
    products: str
    needs: tuple[str, ...]


_AVX2 = ("avx2", "fma3", "bmi2", "f16c", "lzcnt")
_AVX512 = (*_AVX2, "avx512_f", "avx512_bw", "avx512_cd", "avx512_dq", "avx512_vl")

# The best first.
FAMILIES = (
    Family("amx", "x86-64-v4", "tiles", (*_AVX512, "avx512_bf16", "amx_tile", "amx_bf16")),
    Family("avx512bf16", "x86-64-v4", "pairs", (*_AVX512, "avx512_bf16")),
    Family("avx512", "x86-64-v4", "floats", _AVX512),
    Family("avx2", "x86-64-v3", "floats", _AVX2),
    Family("generic", "native", "floats", ()),
)


def families() -> list[Family]:
    """Return the families that this processor can run, the best first.

    Raises:
        FamilyError: SUPERPOSE_KERNELS, which leaves one of them, names none.
    """
    capabilities = torch.cpu.get_capabilities()
    able = [family for family in FAMILIES if all(capabilities.get(n) for n in family.needs)]
    asked = os.environ.get(VARIABLE, "")
    if not asked:
        return able
    chosen = [family for family in able if family.name == asked]
    if not chosen:
        raise FamilyError(
            f"{VARIABLE} is {asked!r}: this processor runs "
            f"{', '.join(family.name for family in able)}"
        )
    return chosen
