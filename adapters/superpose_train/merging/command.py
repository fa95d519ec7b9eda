"""`superpose-merge`: the command that makes one adapter of several, offline."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from superpose_adapters.mix_syntax import parse_mix
from superpose_adapters.option_syntax import parse_options


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ValueError
    return name, value


_pair.__name__ = "NAME=FILE"  # argparse: "invalid NAME=FILE value"


class _ListMethods(argparse.Action):
    """Print what there is and exit, as --help does, whatever else is missing."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        # Imported here: torch is slow to load, and not needed for the help.
        from superpose_adapters.merge.method import option_fields
        from superpose_adapters.merge.methods import DATA_METHODS, METHODS

        for title, methods in (("", METHODS), ("with --data:", DATA_METHODS)):
            if title:
                print(title)
            for name, kind in methods.items():
                options = " ".join(f"{each.name}={each.default}" for each in option_fields(kind))
                told = (kind.__doc__ or "").partition("\n")[0]
                print(f"{name:16}{told}" + (f" [{options}]" if options else ""))
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="superpose-merge",
        description="Merge LoRA adapters of one base into one, which is a PEFT folder like any.",
        epilog="A common factor of the result is the weight that it gets in a mix: no option. "
        "docs/merging.md says what the methods do.",
    )
    add = parser.add_argument
    add("mix", metavar="MIX", help="adapters and their weights, such as math=1,medicine=0.5")
    add("--base", required=True, help="mini, smollm2, a transformers folder, or a Hub id")
    add("--method", required=True, help="how; --methods lists them")
    add("--methods", action=_ListMethods, nargs=0, help="list them with their options, and exit")
    add(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the method",
    )
    add(
        "--adapters",
        action="append",
        default=[],
        type=Path,
        metavar="FOLDER",
        help="a PEFT folder or a folder of them; an adapter is called as its folder is. May be "
        "repeated; those that come with mini or smollm2 need none",
    )
    add(
        "--data",
        action="append",
        default=[],
        type=_pair,
        metavar="NAME=FILE",
        help="rows of a domain, for methods that learn: JSONL as superpose-train reads it. May be "
        "repeated",
    )
    add("--out", required=True, type=Path, help="PEFT folder to create")
    add("--replace", action="store_true", help="write the adapter's two files in OUT anew")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 after one line on stderr (argparse exits with 2)."""
    parser = build_parser()
    parsed = parser.parse_args(arguments)
    try:
        options = parse_options(parsed.option)
    except ValueError as error:
        parser.error(f"argument --option: {error}")
    # Imported here: torch is slow to load, and not needed for the help.
    from superpose_train.merging.offline import Request, merge_offline

    try:
        outcome = merge_offline(
            Request(
                weights=_weights(parsed.mix),
                base=parsed.base,
                adapters=parsed.adapters,
                method=parsed.method,
                options=options,
                data=_files(parsed.data),
                out=parsed.out,
                replace=parsed.replace,
            )
        )
    except (ValueError, OSError) as error:
        return _complain(" ".join(str(error).split()))
    except KeyboardInterrupt:
        return _complain("interrupted")
    for warning in outcome.warnings:
        print(f"superpose-merge: warning: {warning}", file=sys.stderr)
    print(outcome.line)
    return 0


def _weights(text: str) -> dict[str, float]:
    weights = parse_mix(text)
    if weights is None:
        raise ValueError("default is a server's mix: name adapters, such as math=1,medicine=0.5")
    present = {name: weight for name, weight in weights.items() if weight != 0}
    if not present:
        raise ValueError(f"mix {text!r} is the base: name adapters, such as math=1,medicine=0.5")
    return present


def _files(pairs: Sequence[tuple[str, str]]) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for name, file in pairs:
        files.setdefault(name, []).append(Path(file))
    return files


def _complain(line: str) -> int:
    print(f"superpose-merge: {line}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
