"""Which modules of a base a PEFT config selects, and with what rank and alpha."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeVar

from superpose_adapters.adapter import AdapterError
from superpose_adapters.layout import Layout
from superpose_adapters.peft.config import PLAIN_PATTERN, PeftConfig
from superpose_adapters.peft.pattern import Budget, Pattern, PatternError
from superpose_adapters.strict_json import shorten

_ALL_LINEAR = "all-linear"
_Number = TypeVar("_Number", int, float)


def select_modules(
    config: PeftConfig, layout: Layout, present: Mapping[str, str] = MappingProxyType({})
) -> dict[str, tuple[int, float]]:
    """Return {module: (rank, alpha)} of the base's modules that `config` adapts, sorted by name.

    Args:
        config: Checked.
        layout: The modules that can be adapted.
        present: {module: its class} of all modules, for the words of a refusal.

    Raises:
        AdapterError: Nothing is selected, a selected parameter is tied, or a pattern is bad.
    """
    budget = Budget()
    named = not _is_all_linear(config)
    targets = _targets(config, layout, budget)
    excluded = _selector("exclude_modules", config.exclude_modules, budget)
    rank_of = _first_match("rank_pattern", config.rank_pattern, config.r, budget)
    alpha_of = _first_match("alpha_pattern", config.alpha_pattern, config.lora_alpha, budget)
    selected: dict[str, tuple[int, float]] = {}
    for module in sorted(layout):
        if excluded(module) or not targets(module):
            continue
        if layout[module].tied:
            raise AdapterError(
                "TIED_PARAMETER",
                f"module {module} shares its parameter with the embedding, which a delta would "
                f"change too: train without it in target_modules",
            )
        selected[module] = (rank_of(module), alpha_of(module))
    if not selected:
        # all-linear asks for no names.
        for module in sorted(present.keys() - layout.keys()) if named else ():
            if targets(module) and not excluded(module):
                raise AdapterError(
                    "TARGET_NOT_ADAPTABLE",
                    f"adapter_config.json: target_modules {shorten(config.target_modules)} select "
                    f"module {module} ({present[module]}), which is in this base, but cannot be "
                    "adapted here: train the Linear or Conv1D modules of its layers",
                )
        raise AdapterError(
            "TARGET_NOT_FOUND",
            f"adapter_config.json: target_modules {shorten(config.target_modules)} select no "
            "Linear or Conv1D module of this base: was the adapter trained on another base?",
        )
    return selected


def _is_all_linear(config: PeftConfig) -> bool:
    target = config.target_modules
    return isinstance(target, str) and target.lower() == _ALL_LINEAR


def _targets(config: PeftConfig, layout: Layout, budget: Budget) -> Callable[[str], bool]:
    if _is_all_linear(config):
        return lambda module: not layout[module].head
    return _selector(
        "target_modules",
        config.target_modules,
        budget,
        config.layers_to_transform,
        config.layers_pattern,
    )


def _selector(
    field: str,
    names: str | tuple[str, ...],
    budget: Budget,
    layers: tuple[int, ...] = (),
    layers_pattern: tuple[str, ...] = (),
) -> Callable[[str], bool]:
    """Return the test of a module's name that PEFT's `check_target_module_exists` makes.

    A string is a regular expression for the whole name. A list holds whole names, or ends of names
    in the given layers; a whole name is selected whatever its layer.
    """
    if isinstance(names, str):
        return _matcher(field, names, budget, full=True)
    whole, ends = frozenset(names), tuple(f".{name}" for name in names)
    indices = [
        re.compile(rf"(?:^|.*?\.){pattern}\.(\d+)\.", re.ASCII) for pattern in layers_pattern
    ] or [re.compile(r".*?\.[^.]*\.(\d+)\.", re.ASCII)]

    def layer(module: str) -> int | None:
        found = next((m for index in indices if (m := index.match(module))), None)
        return int(found[1]) if found else None

    def selects(module: str) -> bool:
        if module in whole:
            return True
        return module.endswith(ends) and (not layers or layer(module) in layers)

    return selects


def _first_match(
    field: str, values: Mapping[str, _Number], default: _Number, budget: Budget
) -> Callable[[str], _Number]:
    """Return the lookup of a module's name in rank_pattern or alpha_pattern, as PEFT does it.

    A key matches as a regular expression for the end of the name, from a dot on; the first wins
    (`peft.utils.get_pattern_key`).
    """
    table = [
        (_matcher(field, rf"(.*\.)?({key})$", budget, full=False, shown=key), value)
        for key, value in values.items()
    ]

    def lookup(module: str) -> _Number:
        for matches, value in table:
            if matches(module):
                return value
        return values.get(module, default)

    return lookup


def _matcher(
    field: str, pattern: str, budget: Budget, *, full: bool, shown: str | None = None
) -> Callable[[str], bool]:
    text = pattern if shown is None else shown
    if PLAIN_PATTERN.fullmatch(text):  # nothing repeats in it, so `re` cannot run away
        compiled = re.compile(pattern)
        find = compiled.fullmatch if full else compiled.match
        return lambda module: find(module) is not None

    def refuse(error: PatternError) -> AdapterError:
        return AdapterError(
            "CONFIG_INVALID", f"adapter_config.json: {field} {shorten(text)}: {error}"
        )

    try:
        parsed = Pattern(pattern, budget)
    except PatternError as error:
        raise refuse(error) from error

    def matches(module: str) -> bool:
        try:
            return parsed.matches(module, full=full)
        except PatternError as error:
            raise refuse(error) from error

    return matches
