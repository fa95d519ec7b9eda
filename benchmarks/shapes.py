"""Models and adapters to measure on: GPT-2's shapes, random weights, made here and kept.

Nothing is downloaded. What is made depends on its seed alone, so that two machines measure the
same thing. Speed does not depend on the weights; greedy texts do, and with these they vary.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from superpose_adapters.bundled import resolve_base
from superpose_adapters.digest import checkpoint_digest
from superpose_adapters.layout import Layout, read_layout

EOS = "<|endoftext|>"
VOCABULARY = 50257  # GPT-2's: 256 bytes, 50,000 merges, the end of text
POSITIONS = 1024

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"n_layer": 2, "n_embd": 64, "n_head": 2},
    "small": {"n_layer": 12, "n_embd": 768, "n_head": 12},
    "medium": {"n_layer": 24, "n_embd": 1024, "n_head": 16},
    "large": {"n_layer": 36, "n_embd": 1280, "n_head": 20},
}
# With GPT-2's 0.02 a random model says the same token again and again, and texts that are all alike
# show no fault.
_INITIALIZER_RANGE = 0.1
# Norm of each delta over the norm of its base parameter, about that of a trained adapter.
_DELTA_SIZE = 0.03
_GPT2_TARGETS = ["c_attn", "c_proj"]


@dataclass(frozen=True)
class Group:
    """Adapters of one rank, named PREFIX-000, PREFIX-001, ..."""

    count: int
    rank: int = 4
    prefix: str = "domain"

    @property
    def names(self) -> list[str]:
        """The domains."""
        return [f"{self.prefix}-{index:03d}" for index in range(self.count)]


def base_folder(model: str, cache: Path, tell: Callable[[str], None] = lambda text: None) -> Path:
    """Return the checkpoint of one of SIZES, made if need be, or of a base as the server names it.

    Raises:
        ValueError: No size and no base.
    """
    if model not in SIZES:
        return resolve_base(model)
    folder = cache / f"gpt2-{model}"
    if not folder.exists():
        tell(f"making {folder.name}")
        with _whole(folder) as partial:
            _write_base(partial, SIZES[model])
    return folder


def adapter_folder(
    base: Path,
    cache: Path,
    groups: Sequence[Group],
    tell: Callable[[str], None] = lambda text: None,
) -> Path:
    """Return a folder of random PEFT adapters for `base`, made if need be: an --adapter-dir."""
    # The contents of a folder that is not ours may change.
    own = base.parent == cache
    name = base.name if own else f"{base.name}-{checkpoint_digest(base)[:12]}"
    what = "+".join(f"{group.prefix}-{group.count}-rank-{group.rank}" for group in groups)
    folder = cache / f"{name}-{what}"
    if not folder.exists():
        tell(f"making {folder.name}")
        with _whole(folder) as partial:
            _write_adapters(partial, base, groups)
    return folder


def vocabulary(base: Path) -> int:
    """Return how many tokens a base knows."""
    return int(AutoConfig.from_pretrained(base).vocab_size)


def prompts(base: Path, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Return different random prompts of `length` tokens, none of them the last id, often eos."""
    draw = random.Random(seed)
    size = vocabulary(base) - 1
    return [[draw.randrange(size) for _ in range(length)] for _ in range(count)]


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """Let a folder appear when all of it is written, so that an interruption leaves no half."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)
        try:
            partial.rename(folder)
        except OSError:
            # Another benchmark made the same in the meantime.
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_base(folder: Path, size: dict[str, int]) -> None:
    eos = VOCABULARY - 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(
            **size,
            n_positions=POSITIONS,
            vocab_size=VOCABULARY,
            bos_token_id=eos,
            eos_token_id=eos,
            initializer_range=_INITIALIZER_RANGE,
        )
        model: Any = GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of GPT-2's size whose merged tokens are two to four letters.

    As in GPT-2 the first 256 ids are bytes and the last is the end of text, and every id has text.
    """
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    space = "\u0120"  # how byte-level vocabularies write a space
    pairs = [(a, b) for a in letters for b in letters]
    words = [(space, a) for a in letters]
    short = [(space + a, b + c) for a in letters for b, c in pairs]
    long = [(a + b, c + d) for a, b in pairs for c, d in pairs]
    random.Random(0).shuffle(long)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [*pairs, *words, *short, *long][: VOCABULARY - len(alphabet) - 1]
    tokens = [*alphabet, *(left + right for left, right in merges), EOS]
    tokenizer = Tokenizer(BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, unk_token=EOS
    )


def _write_adapters(folder: Path, base: Path, groups: Sequence[Group]) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    layout = read_layout(model)
    is_gpt2 = model.config.model_type == "gpt2"
    targets = _GPT2_TARGETS if is_gpt2 else sorted({n.rpartition(".")[2] for n in _inner(layout)})
    # Standard deviation of each base parameter that is adapted.
    sizes = {
        name: float(model.get_submodule(name).weight.detach().std())
        for name in _inner(layout)
        if name.rpartition(".")[2] in targets
    }
    for group in groups:
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": group.rank,
            "lora_alpha": 2 * group.rank,
            "target_modules": targets,
            "fan_in_fan_out": is_gpt2,
            "inference_mode": True,
        }
        for name in group.names:
            tensors = _factors(
                layout, sizes, group.rank, zlib.crc32(f"{name} {group.rank}".encode())
            )
            (folder / name).mkdir()
            (folder / name / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
            save_file(tensors, folder / name / "adapter_model.safetensors")


def _inner(layout: Layout) -> list[str]:
    return [name for name, module in layout.items() if not (module.head or module.tied)]


def _factors(layout: Layout, sizes: dict[str, float], rank: int, seed: int) -> dict[str, Tensor]:
    """Return A and B of every module, whose delta with scaling 2 has the size that it should."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, size in sizes.items():
        module = layout[name]
        key = f"base_model.model.{name}"
        a = torch.randn(rank, module.in_features, generator=generator)
        b = torch.randn(module.out_features, rank, generator=generator)
        tensors[f"{key}.lora_A.weight"] = a
        tensors[f"{key}.lora_B.weight"] = b * (_DELTA_SIZE * size / (2 * rank**0.5))
    return tensors
