"""Pretrain a small GPT-2 and its tokenizer from plain text: how the bundled `mini` base is made.

`python -m superpose_train.bundles.pretrain --corpus FILE --out DIR` reads JSONL of
{"title", "text"}, trains a byte-level BPE, then a GPT-2 in float32, and writes DIR as a
transformers folder with float16 parameters and a record, `pretrain.json`. DIR appears only when it
is complete. Everything that a killed run needs to go on lies in the work folder; the same command
takes it up again, and ends with the same parameters as an uninterrupted run.

The schedule is warm-up, stable, decay. The stable phase does not depend on the total, so a run
may be taken up again with another `--tokens` as long as it has not begun to decay.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import logging
import math
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from superpose_adapters.durable import new_folder, replacing, write_file
from superpose_adapters.qa import file_sha256
from superpose_train.loss import check_finite
from superpose_train.work_folder import work_folder

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
HELD_OUT_PER_CENT = 1
PASSAGE_CHARACTERS = 8192

Blocks = NDArray[np.uint16]


@dataclass(frozen=True)
class Settings:
    """What fixes the trained parameters, beside the corpus and the number of tokens."""

    vocabulary: int = 8192
    layers: int = 4
    heads: int = 4
    width: int = 256
    context: int = 256
    batch_size: int = 8
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.1
    warmup_steps: int = 200
    decay_fraction: float = 0.3
    clip_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse sizes that no model can have."""
        # Token ids are kept as 16-bit numbers.
        if not 257 <= self.vocabulary <= 65536:
            raise ValueError(f"--vocabulary must lie between 257 and 65536, got {self.vocabulary}")
        for name in ("layers", "heads", "width", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.context < 2:
            raise ValueError(f"--context must be at least 2, got {self.context}")
        if self.width % self.heads:
            raise ValueError(
                f"--width {self.width} must be a multiple of the number of heads, {self.heads}"
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one batch; a step predicts all but the first of each of its blocks."""
        return self.batch_size * self.context


def read_passages(corpus: Path) -> tuple[list[str], list[str]]:
    """Cut the corpus into passages of about 8,000 characters; return (training, held out).

    Passages end where a line ends. One in a hundred is held out, by a hash of its text, so the
    choice depends neither on the order of the documents nor on a seed.

    Raises:
        ValueError: a row is not an object with a string "text", or nothing is left to train on.
    """
    training: list[str] = []
    held_out: list[str] = []
    opener = gzip.open if corpus.suffix == ".gz" else open
    with opener(corpus, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (json.JSONDecodeError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise ValueError(f'{corpus}:{number}: expected a JSON object with a string "text"')
            for passage in _cut(text):
                digest = hashlib.sha256(passage.encode()).digest()
                side = int.from_bytes(digest[:8], "big") % 100 < HELD_OUT_PER_CENT
                (held_out if side else training).append(passage)
    if not training:
        raise ValueError(f"{corpus}: no text to train on")
    return training, held_out


def _cut(text: str) -> Iterator[str]:
    """Yield passages of at least `PASSAGE_CHARACTERS`, the last one of a text excepted."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + PASSAGE_CHARACTERS)
        end = len(text) if end < 0 else end
        if passage := text[start:end].strip():
            yield passage
        start = end


def train_tokenizer(passages: Sequence[str], vocabulary: int) -> Tokenizer:
    """Train a byte-level BPE in GPT-2's manner; id 0 is the end-of-text token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(passages, trainer)
    return tokenizer


def as_transformers(tokenizer: Tokenizer, context: int) -> PreTrainedTokenizerFast:
    """Wrap the BPE so that `save_pretrained` writes what AutoTokenizer loads, as a fast one."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def pack(tokenizer: Tokenizer, passages: Sequence[str], context: int) -> Blocks:
    """Encode, end each passage with end-of-text, cut into blocks (n, context); a rest is lost."""
    stream: list[NDArray[np.uint16]] = []
    for start in range(0, len(passages), 256):
        for encoding in tokenizer.encode_batch(list(passages[start : start + 256])):
            stream.append(np.array([*encoding.ids, 0], dtype=np.uint16))
    flat = np.concatenate(stream) if stream else np.empty(0, dtype=np.uint16)
    count = len(flat) // context
    return flat[: count * context].reshape(count, context)


def build_model(settings: Settings) -> GPT2LMHeadModel:
    """Return a seeded GPT-2 in float32, output layer tied to the embedding, no dropout."""
    torch.manual_seed(settings.seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=settings.vocabulary,
            n_positions=settings.context,
            n_embd=settings.width,
            n_layer=settings.layers,
            n_head=settings.heads,
            # GPT-2's gelu_new, computed by one kernel instead of eight.
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def learning_rate_factor(step: int, total: int, settings: Settings) -> float:
    """Return the factor on the learning rate: linear warm-up, 1, then linear decay to 0."""
    decay = max(1, round(total * settings.decay_fraction))
    warm = (step + 1) / max(1, settings.warmup_steps)
    return min(1.0, warm, (total - step) / decay)


def batch_blocks(step: int, blocks: Blocks, settings: Settings) -> torch.Tensor:
    """Return the token ids (batch, context) of a step: each epoch is its own seeded permutation.

    A pure function of the step, which is what lets a run go on where it was killed.
    """
    first = step * settings.batch_size
    rows = []
    for position in range(first, first + settings.batch_size):
        epoch, index = divmod(position, len(blocks))
        rows.append(blocks[_permutation(settings.seed, epoch, len(blocks))[index]])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


_permutations: dict[tuple[int, int, int], NDArray[np.int64]] = {}


def _permutation(seed: int, epoch: int, length: int) -> NDArray[np.int64]:
    key = (seed, epoch, length)
    if key not in _permutations:
        # A batch spans at most two epochs unless the corpus is smaller than a batch.
        if len(_permutations) > 1:
            _permutations.clear()
        _permutations[key] = np.random.default_rng([seed, epoch]).permutation(length)
    return _permutations[key]


def block_loss(model: GPT2LMHeadModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of ids (batch, context) over all tokens but the first of each block."""
    hidden = model.transformer(ids, use_cache=False).last_hidden_state[:, :-1]
    logits = model.lm_head(hidden)
    return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: GPT2LMHeadModel, blocks: Blocks, batch_size: int = 8) -> float:
    """Return the mean loss over held-out blocks (n, context)."""
    model.eval()
    total = 0.0
    for start in range(0, len(blocks), batch_size):
        ids = torch.from_numpy(blocks[start : start + batch_size].astype(np.int64))
        total += block_loss(model, ids).item() * len(ids)
    model.train()
    return total / len(blocks)


def prepare(corpus: Path, work: Path, settings: Settings) -> tuple[Tokenizer, Blocks, Blocks]:
    """Return tokenizer, training blocks and held-out blocks, made once and kept in `work`.

    Raises:
        ValueError: `work` belongs to another corpus or other settings, or the corpus is too small.
    """
    identity = {**asdict(settings), "corpus_sha256": file_sha256(corpus)}
    record = work / "settings.json"
    if record.exists():
        if json.loads(record.read_text("utf-8")) != identity:
            raise ValueError(
                f"{work} holds a run with another corpus or other settings; "
                "give the same ones, another --work, or delete it"
            )
        arrays = np.load(work / "blocks.npz")
        tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
        return tokenizer, arrays["training"], arrays["held_out"]
    training_text, held_out_text = read_passages(corpus)
    tokenizer = train_tokenizer(training_text, settings.vocabulary)
    # The blocks of one passage stay neighbours in the file; batches draw them shuffled.
    training = pack(tokenizer, training_text, settings.context)
    held_out = pack(tokenizer, held_out_text, settings.context)
    if not len(training) or not len(held_out):
        raise ValueError(
            f"{corpus}: too small, training has {len(training)} and validation {len(held_out)} "
            f"blocks of {settings.context} tokens; give more text or a smaller --context"
        )
    work.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(work / "tokenizer.json"))
    np.savez(work / "blocks.npz", training=training, held_out=held_out)
    # Written last: its presence says that the other two are whole.
    write_file(record, json.dumps(identity, indent=1).encode())
    return tokenizer, training, held_out


def pretrain(
    corpus: Path,
    out: Path,
    settings: Settings,
    tokens: int,
    work: Path | None = None,
    checkpoint_steps: int = 200,
    stop_after_steps: int | None = None,
) -> dict[str, Any] | None:
    """Train and write `out`; return its record, or None when `stop_after_steps` ended it early.

    Args:
        corpus: JSONL or JSONL.gz with "text".
        out: folder to create.
        settings: what fixes the parameters.
        tokens: tokens to train on, rounded up to whole batches; above the corpus' own number,
            the corpus is read again in another order.
        work: checkpoints and packed tokens; `work_folder(out)` by default. Deleted at
            the end if it was not named.
        checkpoint_steps: steps between checkpoints and progress lines.
        stop_after_steps: leave as a kill would, with a checkpoint, after so many further steps.

    Raises:
        ValueError: bad corpus or settings, or `out` exists.
        NotFinite: the loss is not.
    """
    if out.exists():
        raise ValueError(f"{out} exists; name another --out or delete it")
    keep_work = work is not None
    work = work or work_folder(out)
    tokenizer, training, held_out = prepare(corpus, work, settings)
    total = math.ceil(tokens / settings.tokens_per_step)
    model = build_model(settings)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    step, seconds = 0, 0.0
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
        logger.info("resumed step=%d tokens=%d", step, step * settings.tokens_per_step)
    logger.info(
        "pretraining parameters=%d corpus_tokens=%d tokens=%d steps=%d",
        model.num_parameters(),
        training.size,
        total * settings.tokens_per_step,
        total,
    )
    first = step
    running, since, began = 0.0, 0, time.monotonic()
    model.train()
    while step < total:
        factor = learning_rate_factor(step, total, settings)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        loss = block_loss(model, batch_blocks(step, training, settings))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        running, since = running + loss.item(), since + 1
        stopping = stop_after_steps is not None and step - first >= stop_after_steps
        if step % checkpoint_steps == 0 or step == total or stopping:
            check_finite(running, "loss", step)
            spent = time.monotonic() - began
            seconds, began = seconds + spent, time.monotonic()
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "seconds": seconds,
            }
            with replacing(checkpoint) as fresh:
                torch.save(state, fresh)
            logger.info(
                "step=%d/%d tokens=%d loss=%.4f lr=%.2e tokens_per_s=%.0f left_min=%.1f",
                step,
                total,
                step * settings.tokens_per_step,
                running / since,
                settings.learning_rate * factor,
                since * settings.tokens_per_step / spent,
                (total - step) * spent / since / 60,
            )
            running, since = 0.0, 0
        if stopping:
            return None
    # The shipped parameters are float16, so those are the ones to measure.
    model.half().float()
    loss_value = validation_loss(model, held_out)
    record = {
        "corpus": corpus.name,
        "corpus_sha256": file_sha256(corpus),
        "settings": asdict(settings),
        "parameters": model.num_parameters(),
        "corpus_tokens": int(training.size),
        "tokens_seen": step * settings.tokens_per_step,
        "steps": step,
        "validation_tokens": int(held_out.size),
        "validation_loss": loss_value,
        "validation_perplexity": math.exp(loss_value),
        "training_seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    _publish(model, as_transformers(tokenizer, settings.context), record, out)
    if not keep_work:
        shutil.rmtree(work)
    logger.info("wrote %s validation_perplexity=%.2f", out, record["validation_perplexity"])
    return record


def _publish(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    record: dict[str, Any],
    out: Path,
) -> None:
    """Write the transformers folder."""
    with new_folder(out) as folder:
        model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "pretrain.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")
        for file in folder.iterdir():
            # safetensors makes its file readable to the owner alone.
            file.chmod(0o644)


def build_parser() -> argparse.ArgumentParser:
    """Return the command line; its defaults are those of the bundled base."""
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m superpose_train.bundles.pretrain",
        description="Train a byte-level BPE and pretrain a small GPT-2 on plain text.",
    )
    add = parser.add_argument
    add("--corpus", type=Path, required=True, metavar="FILE", help='JSONL(.gz) with "text"')
    add("--out", type=Path, required=True, help="folder to create")
    add("--work", type=Path, help="checkpoints, kept; default .OUT.work, deleted at the end")
    add("--tokens", type=int, default=4_505_600, help="to train on; default %(default)s")
    numbers = (
        ("vocabulary", "tokens of the BPE"),
        ("layers", "blocks of the model"),
        ("heads", "attention heads"),
        ("width", "of the embedding"),
        ("context", "tokens a text"),
        ("batch_size", "texts a step"),
        ("learning_rate", "its maximum"),
        ("warmup_steps", "to that maximum"),
        ("decay_fraction", "of the steps, at the end"),
        ("seed", "of parameters and order"),
    )
    for field, meaning in numbers:
        default = getattr(defaults, field)
        flag = "--" + field.replace("_", "-")
        add(flag, type=type(default), default=default, help=f"{meaning}; default {default}")
    add("--threads", type=int, help="of the CPU; default torch's choice")
    add("--checkpoint-steps", type=int, default=200, help="default %(default)s")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 after one line on stderr."""
    options = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        names = {field.name for field in fields(Settings)}
        settings = Settings(**{k: v for k, v in vars(options).items() if k in names})
        pretrain(
            options.corpus,
            options.out,
            settings,
            options.tokens,
            work=options.work,
            checkpoint_steps=options.checkpoint_steps,
        )
    except (ValueError, OSError) as error:
        print(f"pretrain: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
