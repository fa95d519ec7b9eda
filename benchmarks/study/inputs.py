"""What a study is made from, by content: the base and the data files, and the rows that are scored.

A few kilobytes of it are kept beside the results, so that a report can be made, and a run gone on
with, on a machine that has neither.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from benchmarks.study.config import Config
from benchmarks.study.synthetic import write_topic
from superpose_adapters.bundled import BUNDLES, resolve_base
from superpose_adapters.digest import canonical_digest, checkpoint_digest
from superpose_adapters.durable import write_file
from superpose_adapters.layout import read_layout
from superpose_adapters.qa import (
    Part,
    Row,
    Split,
    file_sha256,
    read_rows,
    split_key,
    split_rows,
)
from superpose_adapters.scoring import EncodedText
from superpose_adapters.text_encoder import TextEncoder, TokenRefused, vocabulary_of
from superpose_train.options import base_label

# Which rows are scored follows from this and the file alone, whatever the adapters' seeds.
_SAMPLE_SEED = 0

# How the Hub calls GPT-2 Small, the paper's base.
_GPT2 = ("openai-community/gpt2", "gpt2")

# What config.json says of who wrote it, and of the file's dtype, which the tensors say themselves.
_CONFIG_NOISE = ("transformers_version", "_name_or_path", "_commit_hash", "dtype", "torch_dtype")
_TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


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
        base: How the base that was used is called: `mini`, a Hub id, or a folder's own name.
        base_digest: sha256 of the checkpoint's tensors.
        setup_digest: sha256 of the rest of the base, see `setup_digest`.
        parameters: How many the base has.
        modules: {module: (in, out)} of what adapters may adapt.
        files: {domain: its file}.
        special_tokens: What stands before every row, as the base's tokenizer puts it there; none
            in studies from before rows began so.
        from_hub: The base came from the Hub or its cache, by its id.
        overrides: Flags of the command line that took the place of what the config says.
    """

    base: str
    base_digest: str
    setup_digest: str
    parameters: int
    modules: Mapping[str, tuple[int, int]]
    files: Mapping[str, DataFile]
    special_tokens: tuple[str, ...] = ()
    from_hub: bool = False
    overrides: tuple[str, ...] = ()

    @property
    def is_papers_base(self) -> bool:
        """Tell whether these are GPT-2 Small's own weights, as the Hub gives them out."""
        return self.from_hub and self.base in _GPT2

    def write(self, path: Path) -> None:
        """Keep it beside the results."""
        write_file(path, (json.dumps(asdict(self), indent=1) + "\n").encode())


def read_inputs(path: Path) -> Inputs | None:
    """Return what an earlier run kept, or None."""
    if not path.exists():
        return None
    try:
        fields = json.loads(path.read_bytes())
        return Inputs(
            base=fields["base"],
            base_digest=fields["base_digest"],
            setup_digest=fields["setup_digest"],
            parameters=fields["parameters"],
            modules={name: (size[0], size[1]) for name, size in fields["modules"].items()},
            files={domain: DataFile(**each) for domain, each in fields["files"].items()},
            special_tokens=tuple(fields.get("special_tokens", ())),
            from_hub=fields["from_hub"],
            overrides=tuple(fields["overrides"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not what a run wrote; delete it and run again") from error


class Sources:
    """The base's folder and the data files on this machine.

    Attributes:
        base: The base's folder.
    """

    def __init__(self, config: Config, base: str, data: Path | None, made: Path) -> None:
        """Take their places.

        Args:
            config: Names them.
            base: `mini`, a folder, or a Hub id, which is fetched.
            data: Folder of the data files; None if the config makes its own.
            made: Where made-up domains are written.

        Raises:
            ValueError: A base or file that is not there.
        """
        self.config = config
        self._base_name = base
        self.base = resolve_base(base)
        self._encoder: TextEncoder | None = None
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
    def encoder(self) -> TextEncoder:
        """Makes the ids of rows.

        Raises:
            ValueError: The base's tokenizer adds tokens that the base does not have.
        """
        if self._encoder is None:
            from transformers import AutoTokenizer

            self._encoder = TextEncoder(
                AutoTokenizer.from_pretrained(self.base),
                _layout_of(self.base)[2],
                special_tokens=self.config.training.special_tokens,
            )
        return self._encoder

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

    def rows(self, domain: str, part: Part) -> list[Row]:
        """Return the rows of a part that are scored."""
        return _sample(getattr(self.split(domain), part), self._limit(part))

    def groups(self, domain: str, part: Part) -> list[int]:
        """Return a number for each scored row: rows with the same one are twins (`split_key`)."""
        numbers: dict[str, int] = {}
        return [
            numbers.setdefault(split_key(row.question), len(numbers))
            for row in self.rows(domain, part)
        ]

    def texts(self, domain: str, part: Part, template: str) -> list[EncodedText]:
        """Return the rows of a part that are scored, encoded.

        Raises:
            ValueError: A row holds a token that the base has no embedding for.
        """
        key = (domain, part, template)
        if key not in self._encoded:
            length = self.config.training.max_length
            try:
                self._encoded[key] = [
                    self.encoder.row(row.question, row.answer, length, template)
                    for row in self.rows(domain, part)
                ]
            except TokenRefused as error:
                raise ValueError(f"{self.paths[domain]}: a row {error}") from error
        return self._encoded[key]

    def _limit(self, part: Part) -> int | None:
        evaluation = self.config.evaluation
        return evaluation.test_rows if part == "test" else evaluation.validation_rows

    def inputs(self) -> Inputs:
        """Look at base and data.

        Raises:
            ValueError: Either cannot be read.
        """
        modules, parameters, _ = _layout_of(self.base)
        files = {}
        for domain, path in self.paths.items():
            split = self.split(domain)
            counts = {part: len(getattr(split, part)) for part in ("train", "validation", "test")}
            files[domain] = DataFile(path.name, file_sha256(path), counts)
        name = self._base_name
        return Inputs(
            base=base_label(name),
            base_digest=checkpoint_digest(self.base),
            setup_digest=setup_digest(self.base),
            parameters=parameters,
            modules=modules,
            files=files,
            special_tokens=tuple(self.encoder.tokens_before),
            from_hub=name not in BUNDLES and not Path(name).expanduser().is_dir(),
        )


def setup_digest(base: Path) -> str:
    """Return the sha256 of what makes a model of a base's tensors: its config and its tokenizer.

    The same tensors with other heads, another activation or another tokenizer are another base.

    Args:
        base: Its folder; config.json must be there.
    """
    config = json.loads((base / "config.json").read_text("utf-8"))
    effect = {name: value for name, value in config.items() if name not in _CONFIG_NOISE}
    tokenizer = {
        name: hashlib.sha256((base / name).read_bytes()).hexdigest()
        for name in _TOKENIZER_FILES
        if (base / name).is_file()
    }
    return canonical_digest([effect, tokenizer])


def _sample(rows: tuple[Row, ...], limit: int | None) -> list[Row]:
    """Return at most `limit` rows in the data's order."""
    if limit is None or limit >= len(rows):
        return list(rows)
    chosen = sorted(random.Random(_SAMPLE_SEED).sample(range(len(rows)), limit))
    return [rows[index] for index in chosen]


@cache
def _layout_of(base: Path) -> tuple[dict[str, tuple[int, int]], int, int]:
    """Return {module: (in, out)} of a base, its number of parameters, and of tokens.

    Loads no weights.
    """
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
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return sizes, parameters, vocabulary_of(model)
