"""What a study is made from, by content: the base and the data files, and the rows that are scored.

A few kilobytes of it are kept beside the results, so that a report can be made, and a run gone on
with, on a machine that has neither.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.study.config import Config
from benchmarks.study.records import write_whole
from benchmarks.study.synthetic import write_topic
from superpose_adapters.digest import checkpoint_digest
from superpose_adapters.layout import read_layout
from superpose_adapters.qa import Part, Row, Split, file_sha256, read_rows, split_rows
from superpose_adapters.scoring import EncodedText, encode_qa

# Which rows are scored follows from this and the file alone, whatever the adapters' seeds.
_SAMPLE_SEED = 0


@dataclass(frozen=True)
class DataFile:
    """One domain's file: its name, its bytes' sha256, and its rows by part."""

    name: str
    sha256: str
    rows: Mapping[str, int]


@dataclass(frozen=True)
class Inputs:
    """What determines the results, beside the config.

    Attributes:
        base: How the base is called.
        base_digest: sha256 of the checkpoint.
        parameters: How many the base has.
        modules: {module: (in, out)} of what adapters may adapt.
        files: {domain: its file}.
    """

    base: str
    base_digest: str
    parameters: int
    modules: Mapping[str, tuple[int, int]]
    files: Mapping[str, DataFile]

    def write(self, path: Path) -> None:
        """Keep it beside the results."""
        write_whole(path, (json.dumps(asdict(self), indent=1) + "\n").encode())


def read_inputs(path: Path) -> Inputs | None:
    """Return what an earlier run kept, or None."""
    if not path.exists():
        return None
    try:
        fields = json.loads(path.read_bytes())
        return Inputs(
            base=fields["base"],
            base_digest=fields["base_digest"],
            parameters=fields["parameters"],
            modules={name: (size[0], size[1]) for name, size in fields["modules"].items()},
            files={domain: DataFile(**each) for domain, each in fields["files"].items()},
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not what a run wrote; delete it and run again") from error


class Sources:
    """The base's folder and the data files on this machine."""

    def __init__(self, config: Config, base: Path, data: Path | None, made: Path) -> None:
        """Take their places.

        Args:
            config: Names them.
            base: The base's folder.
            data: Folder of the data files; None if the config makes its own.
            made: Where made-up domains are written.

        Raises:
            ValueError: A file that is not there.
        """
        self.config = config
        self.base = base
        self._tokenizer: Any = None
        self._splits: dict[str, Split] = {}
        self._encoded: dict[tuple[str, Part, str], list[EncodedText]] = {}
        self.paths: dict[str, Path] = {}
        for domain, name in config.data.files.items():
            if config.data.synthetic is not None:
                self.paths[domain] = write_topic(name, config.data.synthetic, made)
            elif data is None:
                raise ValueError(
                    f"config {config.name} reads {name}: name its folder by --data or "
                    "SUPERPOSE_DATA"
                )
            elif not (data / name).is_file():
                raise ValueError(f"{data / name}: no such file; check --data (domain {domain})")
            else:
                self.paths[domain] = data / name

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self.base)
        return self._tokenizer

    def split(self, domain: str) -> Split:
        """Return a domain's rows by part.

        Raises:
            ValueError: A row without question or answer, or a part without rows.
        """
        if domain not in self._splits:
            path = self.paths[domain]
            split = split_rows(read_rows(path))
            for part in ("train", "validation", "test"):
                if not getattr(split, part):
                    raise ValueError(
                        f"{path}: no row falls into the {part} part of the 80:10:10 split; "
                        "give more rows"
                    )
            self._splits[domain] = split
        return self._splits[domain]

    def texts(self, domain: str, part: Part, template: str) -> list[EncodedText]:
        """Return the rows of a part that are scored, encoded."""
        key = (domain, part, template)
        if key not in self._encoded:
            rows = _sample(getattr(self.split(domain), part), self._limit(part))
            length = self.config.training.max_length
            self._encoded[key] = [
                encode_qa(self.tokenizer, row.question, row.answer, length, template)
                for row in rows
            ]
        return self._encoded[key]

    def _limit(self, part: Part) -> int | None:
        evaluation = self.config.evaluation
        return evaluation.test_rows if part == "test" else evaluation.validation_rows

    def inputs(self) -> Inputs:
        """Look at base and data.

        Raises:
            ValueError: Either cannot be read.
        """
        modules, parameters = _layout_of(self.base)
        files = {}
        for domain, path in self.paths.items():
            split = self.split(domain)
            counts = {part: len(getattr(split, part)) for part in ("train", "validation", "test")}
            files[domain] = DataFile(path.name, file_sha256(path), counts)
        return Inputs(
            base=self.config.base,
            base_digest=checkpoint_digest(self.base),
            parameters=parameters,
            modules=modules,
            files=files,
        )


def _sample(rows: tuple[Row, ...], limit: int | None) -> list[Row]:
    """Return at most `limit` rows in the data's order."""
    if limit is None or limit >= len(rows):
        return list(rows)
    chosen = sorted(random.Random(_SAMPLE_SEED).sample(range(len(rows)), limit))
    return [rows[index] for index in chosen]


@cache
def _layout_of(base: Path) -> tuple[dict[str, tuple[int, int]], int]:
    """Return {module: (in, out)} of a base, and how many parameters it has; loads no weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"base {base} cannot be read: {str(error).strip().splitlines()[0]}"
        ) from error
    layout = read_layout(model)
    sizes = {
        name: (each.in_features, each.out_features)
        for name, each in layout.items()
        if not each.head
    }
    return sizes, sum(parameter.numel() for parameter in model.parameters())
