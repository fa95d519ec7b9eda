"""The names of an adapter's tensors: PEFT's own, and what others are known to make of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from superpose_adapters.adapter import AdapterError

PREFIX = "base_model.model."

_FACTOR = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight")
_ADAPTER_NAME = re.compile(r"(?<=\.lora_[AB]\.)([^.]+)\.(?=weight$)")
_COMPILED = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_PARALLEL = re.compile(rf"^({re.escape(PREFIX)})?(?:module\.)+")
_DOUBLED = re.compile(rf"^(?:{re.escape(PREFIX)}){{2,}}")


@dataclass(frozen=True)
class Keys:
    """The tensors of a file, each under the name by which PEFT would have saved it.

    Attributes:
        factors: {name of a factor: its key in the file}.
        others: The same of all that is no factor.
        warnings: Which names were read as which, a line for each kind of rename.
    """

    factors: Mapping[str, str]
    others: Mapping[str, str]
    warnings: tuple[str, ...]


def factor_key(module: str, factor: str) -> str:
    """Return PEFT's name of a factor, A or B. It holds no adapter's name: that is left out."""
    return f"{PREFIX}{module}.lora_{factor}.weight"


def module_of(key: str) -> str | None:
    """Return the module whose factor has this name; None if it names none."""
    found = _FACTOR.fullmatch(key)
    return found[1] if found else None


def read_keys(stored: Iterable[str]) -> Keys:
    """Return the tensors' names as PEFT means them.

    Only what cannot mean anything else is renamed, and no base is asked: a renamed tensor that the
    base has no place for is surplus like any other.

    Raises:
        AdapterError: Two keys are one name, or the factors are those of several adapters.
    """
    names = {key: key for key in stored}
    warnings: list[str] = []
    _check_one_adapter(names)
    for what, rename in _RENAMES:
        changed = [key for key, name in names.items() if rename(name) != name]
        if changed:
            warnings.append(f"{len(changed)} tensors are named {what}, as {changed[0][:200]}")
        names = {key: rename(name) for key, name in names.items()}
    twice, count = Counter(names.values()).most_common(1)[0] if names else ("", 1)
    if count > 1:
        keys = " and ".join(sorted(key for key, name in names.items() if name == twice)[:2])
        raise AdapterError(
            "TENSOR_SURPLUS", f"tensors {keys[:400]} are both {twice[:200]}: keep one of them"
        )
    return Keys(
        factors={name: key for key, name in names.items() if module_of(name) is not None},
        others={name: key for key, name in names.items() if module_of(name) is None},
        warnings=tuple(warnings),
    )


def _check_one_adapter(names: Iterable[str]) -> None:
    adapters = sorted({found[1] for name in names if (found := _ADAPTER_NAME.search(name))})
    if len(adapters) > 1:
        raise AdapterError(
            "TENSOR_SURPLUS",
            f"the file holds several adapters ({', '.join(adapters)[:200]}): save one alone, with "
            "save_pretrained(..., selected_adapters=[NAME])",
        )


_RENAMES: tuple[tuple[str, Callable[[str], str]], ...] = (
    (
        "behind a wrapper's prefix (_orig_mod, _fsdp_wrapped_module), which is left out",
        lambda name: _COMPILED.sub("", name),
    ),
    (
        "behind DataParallel's prefix module, which is left out",
        lambda name: _PARALLEL.sub(r"\1", name),
    ),
    (f"behind {PREFIX[:-1]} twice, which is read once", lambda name: _DOUBLED.sub(PREFIX, name)),
    (
        f"without {PREFIX[:-1]} in front, which is added",
        lambda name: name if name.startswith(PREFIX) else PREFIX + name,
    ),
    ("with the adapter's name, which is left out", lambda name: _ADAPTER_NAME.sub("", name)),
)
