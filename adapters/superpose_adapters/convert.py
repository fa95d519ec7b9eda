"""`superpose-convert`: the command that makes PEFT folders of adapters in other forms."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return number


_number.__name__ = "number"  # argparse: "invalid number value"


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="superpose-convert",
        description="Convert an adapter of MLX (mlx_lm.lora) into PEFT's form, which is served.",
        epilog="The names of modules are taken as they are: MLX names those of most models as "
        "transformers does, and the server says which it does not know.",
    )
    add = parser.add_argument
    add("adapter", type=Path, metavar="MLX_DIR", help="adapters.safetensors, adapter_config.json")
    add("out", type=Path, metavar="OUT", help="PEFT folder to create")
    add("--base", help="what the result names as its base; default: what MLX_DIR names")
    add(
        "--scale",
        type=_number,
        help="factor of the deltas; default: the scale in MLX_DIR",
    )
    add("--replace", action="store_true", help="write the adapter's two files in OUT anew")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 after one line on stderr (argparse exits with 2)."""
    options = build_parser().parse_args(arguments)
    # Imported here: torch is slow to load, and not needed for the help.
    from superpose_adapters.mlx import read_mlx, write_peft

    try:
        if options.out.exists() and options.out.samefile(options.adapter):
            raise ValueError(f"{options.out} is the adapter itself: name another folder")
        adapter = read_mlx(options.adapter, options.scale)
        if options.base is not None:
            adapter = replace(adapter, base=options.base)
        write_peft(adapter, options.out, replace=options.replace)
    except (ValueError, OSError) as error:
        print(f"superpose-convert: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(
        f"wrote {options.out}: rank {adapter.rank}, scale {adapter.scale:g}, "
        f"{len(adapter.factors)} modules of {adapter.base or 'an unnamed base'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
