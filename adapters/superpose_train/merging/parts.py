"""The adapters that a command line names: where they lie, and what they are on their base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from superpose_adapters.adapter import AdapterError
from superpose_adapters.base.checkpoint import load_skeleton
from superpose_adapters.base.facts import BaseFacts, read_facts
from superpose_adapters.base.tokenizer import TokenizerError, load_tokenizer
from superpose_adapters.bundled import BUNDLES, resolve_base
from superpose_adapters.layout import Layout, read_layout
from superpose_adapters.merge.merge import Part
from superpose_adapters.peft.folder import CONFIG_NAME, Limits, read_adapter
from superpose_adapters.text_encoder import TextEncoder, vocabulary_of

# What is read was named by whoever runs the command, so only what no adapter has is refused.
LIMITS = Limits(max_rank=1 << 16, max_bytes=1 << 36, max_config_bytes=1 << 24)


@dataclass(frozen=True)
class Base:
    """What of a base has to be known to merge its adapters: all but its parameters.

    Attributes:
        layout: Its modules that can be adapted.
        facts: What else a reader of adapters asks.
    """

    layout: Layout
    facts: BaseFacts


def read_base(name: str) -> Base:
    """Read a base as `resolve_base` names it.

    Raises:
        ValueError: There is none, or it could not be served.
    """
    folder = resolve_base(name)
    skeleton = load_skeleton(folder)
    try:
        texts = TextEncoder(load_tokenizer(folder), vocabulary_of(skeleton))
    except TokenizerError as error:
        raise ValueError(f"base {name} {error}") from error
    facts = read_facts(name, folder, skeleton, texts.tokens_before)
    return Base(read_layout(skeleton), facts)


def find_adapters(names: Iterable[str], base: str, folders: Sequence[Path]) -> dict[str, Path]:
    """Return {name: PEFT folder}.

    Args:
        names: Each is what the adapter's folder is called.
        base: Those that are bundled with it need no folder.
        folders: PEFT folders, and folders of them.

    Raises:
        ValueError: A folder that is missing, or a name that none or several have.
    """
    known: dict[str, set[Path]] = {}
    for folder in folders:
        for path in _adapters_in(folder):
            known.setdefault(path.name, set()).add(path)
    if base in BUNDLES:
        for name, path in BUNDLES[base].adapters().items():
            known.setdefault(name, set()).add(path)
    return {name: _only(name, known) for name in names}


def _adapters_in(folder: Path) -> list[Path]:
    # Without links, so that a folder that is named twice is one; a dot has a name then, too.
    home = folder.expanduser().resolve()
    if (home / CONFIG_NAME).is_file():
        return [home]
    if not home.is_dir():
        raise ValueError(f"--adapters {folder}: no such folder")
    return sorted(path.parent.resolve() for path in home.glob(f"*/{CONFIG_NAME}"))


def _only(name: str, known: Mapping[str, set[Path]]) -> Path:
    found = sorted(known.get(name, ()))
    if not found:
        there = ", ".join(sorted(known)[:20]) or "none"
        raise ValueError(
            f"no adapter is called {name} (there: {there}): name its folder, or the folder that "
            "it lies in, by --adapters"
        )
    if len(found) > 1:
        raise ValueError(
            f"{name} is {found[0]} and {found[1]}: rename one of the folders, or leave it out of "
            "--adapters"
        )
    return found[0]


def read_parts(weights: Mapping[str, float], folders: Mapping[str, Path], base: Base) -> list[Part]:
    """Read the adapters of a mix.

    Raises:
        ValueError: One of them is not fit for the base.
    """
    parts = []
    for name, weight in weights.items():
        folder = folders[name]
        try:
            # Links may lead anywhere: whoever runs the command has named this folder.
            root = Path(folder.anchor)
            adapter = read_adapter(folder, base.layout, LIMITS, base=base.facts, root=root)
        except AdapterError as error:
            raise ValueError(f"{name}: {error}") from error
        parts.append(Part(name, adapter, weight))
    return parts
