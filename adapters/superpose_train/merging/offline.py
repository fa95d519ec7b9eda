"""One merge, offline: PEFT folders in, a PEFT folder out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from superpose_adapters.merge.deviation import deviation
from superpose_adapters.merge.merge import Part, in_order, merge
from superpose_adapters.merge.method import Method
from superpose_adapters.merge.methods import DATA_METHODS, METHODS, read_method
from superpose_adapters.mix_syntax import format_mix
from superpose_adapters.peft.folder import DEFAULT_LIMITS, parse_adapter
from superpose_adapters.peft.writing import adapter_files, write_adapter
from superpose_adapters.provenance import Provenance, Source
from superpose_adapters.qa import Row, read_rows
from superpose_train.merging.one_thread import one_thread
from superpose_train.merging.parts import LIMITS, Base, find_adapters, read_base, read_parts
from superpose_train.options import base_label


@dataclass(frozen=True)
class Request:
    """What is to be merged, how, and where to.

    Attributes:
        weights: {name of an adapter: weight, not 0}, at least one.
        base: `mini`, `smollm2`, a transformers folder, or a Hub id.
        adapters: PEFT folders and folders of them, where the names are found.
        method: Its word.
        options: Of the method, as JSON values; those left out have their defaults.
        data: {domain: JSONL files of its rows}, for methods that learn; see `data_method`.
        out: The PEFT folder to create.
        replace: Write an adapter that is there anew.
    """

    weights: Mapping[str, float]
    base: str
    adapters: Sequence[Path]
    method: str
    options: Mapping[str, object]
    data: Mapping[str, Sequence[Path]]
    out: Path
    replace: bool = False


@dataclass(frozen=True)
class Outcome:
    """What was written.

    Attributes:
        line: All that a user wants to know, in one line.
        warnings: What to know of the parts, a line each.
    """

    line: str
    warnings: tuple[str, ...]


def merge_offline(request: Request) -> Outcome:
    """Merge adapters into a folder, which is there whole or not at all.

    What is quickly refused is refused first: a base may have to be fetched, and learning may take
    long.

    Raises:
        ValueError: Something is wrong with what was asked for, or with an adapter.
        FileExistsError: Something is at `out`.
        OSError: It cannot be written.
    """
    method = _method(request)
    rows = {
        name: [row for file in files for row in read_rows(file)]
        for name, files in request.data.items()
    }
    folders = find_adapters(request.weights, request.base, request.adapters)
    _check_out(request, folders.values())
    base = read_base(request.base)
    parts = in_order(read_parts(request.weights, folders, base))

    began = time.perf_counter()
    if rows:
        method = _learned(method, request.base, parts, rows)
    with one_thread():
        merged = merge(parts, method)
        off = deviation(parts, merged).whole
    seconds = time.perf_counter() - began
    mix = format_mix(request.weights)
    if not merged:
        raise ValueError(f"{method.name} leaves nothing of {mix}: use other weights")

    config, tensors = _files(request.base, base, parts, method, merged)
    # By the door that everybody's adapters come in by: what it refuses is not written.
    adapter = parse_adapter(config, tensors, base.layout, LIMITS, base=base.facts)
    write_adapter(request.out, config, tensors, replace=request.replace)
    line = (
        f"wrote {request.out}: {method.name} of {mix}, rank {adapter.rank}, "
        f"{len(merged)} modules, {seconds:.2f} s; {_off(off)}"
    )
    if adapter.rank > DEFAULT_LIMITS.max_rank:
        line += f"; to serve it a server needs --max-rank {adapter.rank}"
    return Outcome(
        line, tuple(f"{part.domain}: {said}" for part in parts for said in part.adapter.warnings)
    )


def _method(request: Request) -> Method:
    """Return the method that was asked for; what it learns from rows is still to come."""
    method = read_method(request.method, request.options, {**METHODS, **DATA_METHODS})
    if method.name in DATA_METHODS and not request.data:
        raise ValueError(f"{method.name} learns from rows: pass some by --data NAME=FILE")
    if method.name not in DATA_METHODS and request.data:
        raise ValueError(f"{method.name} learns nothing from rows: leave out --data")
    return method


def _learned(
    method: Method, base: str, parts: Sequence[Part], rows: Mapping[str, Sequence[Row]]
) -> Method:
    try:
        from superpose_train.merging.data_method import data_method
    except ImportError as error:
        raise ValueError(
            f"{method.name} needs what superpose-train needs ({error.name} is missing): "
            "pip install 'superpose[train]'"
        ) from error
    return data_method(method.name, method.options, base, parts, rows)


def _check_out(request: Request, folders: Iterable[Path]) -> None:
    if not request.out.exists():
        return
    if any(request.out.samefile(folder) for folder in folders):
        raise ValueError(f"{request.out} is one of those to be merged: name another folder")
    if not request.replace:
        raise FileExistsError(f"{request.out} exists: name another folder, or pass --replace")


def _files(
    name: str,
    base: Base,
    parts: Sequence[Part],
    method: Method,
    merged: Mapping[str, tuple[Tensor, Tensor]],
) -> tuple[bytes, bytes]:
    sources = (Source(part.domain, part.adapter.digest, part.weight) for part in parts)
    return adapter_files(
        merged,
        base=base_label(name),
        fan_in_fan_out=all(base.layout[module].transposed for module in merged),
        metadata=Provenance(method.name, method.options, tuple(sources)).metadata,
    )


def _off(share: float) -> str:
    if not math.isfinite(share):
        return "the plain sum is zero"
    return f"{100 * share:.2f} % off the plain sum"
