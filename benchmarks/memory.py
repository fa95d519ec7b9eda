"""What the server holds in memory against what it must: model, base copy, cache, adapters.

The sum on paper comes from shapes alone. It is compared with the server's resident memory above
that of a process that has imported the same modules and loaded nothing, once when the server is
ready and once when every position of every slot of the cache has been written (memory that was
allocated but never touched does not count as resident). For servers on a CPU, on Linux.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.options import Options, make_parser, read_options
from benchmarks.progress import Tell, progress
from benchmarks.report import Cell, Check, Report, Table
from benchmarks.serverprocess import ServerProcess, resident_bytes
from benchmarks.servertarget import ServerTarget
from benchmarks.shapes import Group, adapter_folder, base_folder, prompts
from benchmarks.target import Streamed
from superpose_adapters.layout import read_layout
from superpose_client import AsyncClient

# Resident memory above that after imports may exceed the sum on paper by this much.
ALLOWED = 1.10
_MIB = 2**20
# Below this sum fixed costs (the tokenizer, the allocator) outweigh what is to be compared.
_COMPARABLE = 256 * _MIB
# Imports all that a server of the base imports (its modelling code by building it without memory),
# waits for a line, loads the tokenizer, and waits until stdin ends.
_IMPORTS = """
import sys
import torch
import superpose_server.command, superpose_server.door.server
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
with torch.device("meta"):
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1]))
torch.ones(512, 512) @ torch.ones(512, 512)
if "compiled" in sys.argv:
    import torch._inductor.compile_fx
print("imported", flush=True)
sys.stdin.readline()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
print("tokenizer", flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Paper:
    """Bytes computed from shapes."""

    model: int
    base_copy: int
    cache: int
    adapters: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.model + self.base_copy + self.cache + self.adapters


def on_paper(
    base: Path,
    adapters: Path,
    dtype: torch.dtype,
    max_batch: int,
    max_length: int,
) -> Paper:
    """Compute what a server must hold; no weights are loaded. One slot of the cache is scratch."""
    config: Any = AutoConfig.from_pretrained(base)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    size = dtype.itemsize
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layout = read_layout(model)
    adapted: set[str] = set()
    adapter_bytes = 0
    for file in adapters.glob("*/adapter_model.safetensors"):
        shapes = _shapes(file)
        # Adapters are held in float32 whatever the dtype of the base.
        adapter_bytes += 4 * sum(rows * columns for rows, columns in shapes.values())
        adapted |= {key.partition(".lora_")[0].removeprefix("base_model.model.") for key in shapes}
    return Paper(
        model=size * sum(parameter.numel() for parameter in model.parameters()),
        base_copy=size * sum(layout[n].in_features * layout[n].out_features for n in adapted),
        cache=2 * size * config.num_hidden_layers * (max_batch + 1) * heads * width * max_length,
        adapters=adapter_bytes,
    )


def _shapes(file: Path) -> dict[str, tuple[int, int]]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118  # no mapping


def without_weights(base: Path, *, compiled: bool) -> tuple[int, int]:
    """Return the resident bytes of a process after the server's imports, and with the tokenizer."""
    with subprocess.Popen(
        [sys.executable, "-c", _IMPORTS, str(base), *(["compiled"] if compiled else [])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        sizes = []
        for stage in ("imported", "tokenizer"):
            if process.stdout.readline().strip() != stage:
                raise RuntimeError("the server's modules could not be imported")
            sizes.append(resident_bytes(process.pid))
            process.stdin.write("\n")
            process.stdin.flush()
        process.communicate()
    return sizes[0], sizes[1]


async def fill(address: str, base: Path, max_batch: int, max_length: int) -> None:
    """Write every position of every slot: that many rows at once, each to its last position."""
    half = max_length // 2
    async with AsyncClient(address) as client:
        target = ServerTarget(client)
        rows = [
            Streamed(prompt, {}, max_length - half) for prompt in prompts(base, max_batch, half)
        ]
        await asyncio.gather(*(target.stream(row) for row in rows))
    failed = {row.status for row in rows} - {"OK"}
    if failed:
        raise RuntimeError(f"requests failed: {failed}")


def measure(
    options: Options, max_batch: int, max_length: int, adapters: int, tell: Tell
) -> tuple[Report, dict[str, float], Paper]:
    """Run the benchmark; the numbers are MiB."""
    base = base_folder(options.model, options.cache, tell)
    folder = adapter_folder(base, options.cache, [Group(adapters)], tell)
    packed = options.compile != "off" and options.torch_device.type == "cpu"
    paper = on_paper(base, folder, options.torch_dtype, max_batch, max_length)
    report = Report(
        "memory",
        options.label,
        options.settings(max_batch=max_batch, max_length=max_length, adapters=adapters),
    )
    tell("a process with the imports alone")
    imported, tokenizer = without_weights(base, compiled=packed)
    flags = [f"--max-batch={max_batch}", f"--max-length={max_length}"]
    tell("starting the server")
    with ServerProcess(base, folder, [*options.server_flags(), *flags]) as server:
        ready = server.memory()
        tell("filling the cache")
        asyncio.run(fill(server.address, base, max_batch, max_length))
        filled = server.memory()
    sizes = {
        "after imports": imported / _MIB,
        "ready": ready / _MIB,
        "cache filled": filled / _MIB,
    }
    above = (filled - imported) / paper.total
    rows: list[list[Cell]] = [
        ["process after imports", sizes["after imports"]],
        ["the same with the tokenizer, which paper leaves out", tokenizer / _MIB],
        ["server, ready", sizes["ready"]],
        ["server, every slot of the cache filled once", sizes["cache filled"]],
        ["on paper: model", paper.model / _MIB],
        ["on paper: base copy of the adapted modules", paper.base_copy / _MIB],
        ["on paper: cache", paper.cache / _MIB],
        ["on paper: adapters, float32", paper.adapters / _MIB],
        ["on paper: sum", paper.total / _MIB],
        ["filled, above imports", (filled - imported) / _MIB],
        ["filled, above imports / sum on paper", above],
    ]
    report.tables.append(Table("Resident memory", ("what", "MiB (last row: ratio)"), rows))
    if options.torch_device.type != "cpu":
        report.notes.append("On a GPU the resident memory of the process says little.")
    elif paper.total < _COMPARABLE:
        report.notes.append("The base is so small that fixed costs outweigh it: nothing to check.")
    else:
        report.checks.append(
            Check(
                f"memory above that after imports is at most {ALLOWED:.2f} of the sum on paper",
                above <= ALLOWED,
            )
        )
    report.data = {"mib": sizes, "paper_bytes": vars(paper)}
    return report, sizes, paper


def draw(sizes: dict[str, float], paper: Paper, figure: Any) -> None:
    """Draw the sum on paper, stacked upon the imports, beside what was measured."""
    axes = figure.subplots()
    parts = {
        "imports (measured)": sizes["after imports"],
        "model": paper.model / _MIB,
        "base copy": paper.base_copy / _MIB,
        "cache": paper.cache / _MIB,
        "adapters": paper.adapters / _MIB,
    }
    bottom = 0.0
    for name, size in parts.items():
        axes.bar("on paper", size, bottom=bottom, label=f"{name}: {size:.0f} MiB")
        bottom += size
    for name in ("ready", "cache filled"):
        axes.bar(name, sizes[name], color="tab:gray")
    for at, size in enumerate((bottom, sizes["ready"], sizes["cache filled"])):
        axes.annotate(f"{size:.0f}", (at, size), ha="center", va="bottom")
    axes.set_ylabel("MiB resident")
    axes.set_ylim(0, 1.15 * max(bottom, *sizes.values()))
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def main(arguments: list[str] | None = None) -> int:
    """Run as a command."""
    parser = make_parser("memory", "Compare the server's memory with paper.", seconds=60)
    parser.add_argument("--max-batch", type=int, default=16, help="as superpose-server's")
    parser.add_argument("--max-length", type=int, default=256, help="as superpose-server's")
    parser.add_argument("--adapters", type=int, default=24, help="adapters that are loaded")
    parsed = parser.parse_args(arguments)
    options = read_options(parsed)
    with progress("memory", options.seconds) as tell:
        report, sizes, paper = measure(
            options, parsed.max_batch, parsed.max_length, parsed.adapters, tell
        )
    return report.finish(options, lambda figure: draw(sizes, paper, figure))


if __name__ == "__main__":
    sys.exit(main())
