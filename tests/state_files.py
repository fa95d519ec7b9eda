"""What may lie in a server's state folder, as docs/architecture.md has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_FILES = ("audit.jsonl", "audit.jsonl.1", "mix.json", "named_mixes.json", "adapters/names.json")
_FOLDERS = ("adapters", "adapters/objects", "adapters/temporary")
_OF_AN_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def stray_files(state_dir: Path) -> list[str]:
    """Return what lies in a state folder and belongs to nothing that a server would find there."""
    belongs = {*_FOLDERS, "adapters/lock", *_FILES, *(f"{name}.previous" for name in _FILES)}
    for digest in _digests(state_dir):
        adapter = f"adapters/objects/{digest}"
        belongs |= {adapter, *(f"{adapter}/{name}" for name in _OF_AN_ADAPTER)}
    found = {str(path.relative_to(state_dir)) for path in state_dir.rglob("*")}
    return sorted(found - belongs)


def _digests(state_dir: Path) -> set[str]:
    digests = set()
    mix, names = state_dir / "mix.json", state_dir / "adapters" / "names.json"
    if mix.exists():
        digests |= {e["adapter_digest"] for e in json.loads(mix.read_bytes())["body"]["entries"]}
    if names.exists():
        digests |= set(map(_digest, json.loads(names.read_bytes()).values()))
    return digests


def _digest(named: Any) -> str:
    match named:
        case {"digest": str(digest)} | [str(digest), *_] | str(digest):
            return digest
    raise ValueError(f"{named!r} names no adapter")
