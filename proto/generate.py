"""Generate the Python stubs from the .proto files; `--check` compares instead of writing.

The generator is pinned (see the dev group of pyproject.toml): generated code refuses runtimes that
are older than its generator, so an old generator keeps the floors of grpcio and protobuf low.
"""

from __future__ import annotations

import argparse
import filecmp
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent
SOURCES = sorted(path.relative_to(ROOT) for path in ROOT.glob("superpose_proto/**/*.proto"))


def generate(out: Path) -> None:
    """Write the stubs of every .proto file below `out`."""
    from grpc_tools import protoc

    # Beside ours, the messages that every installation of protobuf has.
    arguments = ["protoc", f"-I{ROOT}", f"-I{Path(protoc.__file__).parent / '_proto'}"]
    arguments += [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    arguments += [str(source) for source in SOURCES]
    if protoc.main(arguments) != 0:
        sys.exit("generate.py: protoc failed")


def stale(fresh: Path) -> list[str]:
    """Return the generated files that differ from, or are missing beside, the sources."""
    made = {path.relative_to(fresh) for path in fresh.rglob("*_pb2*")}
    kept = {path.relative_to(ROOT) for path in ROOT.rglob("*_pb2*.py*") if path.suffix != ".pyc"}
    differing = {
        path for path in made & kept if not filecmp.cmp(fresh / path, ROOT / path, shallow=False)
    }
    return sorted(str(path) for path in (made ^ kept) | differing)


def main() -> None:
    """Run as a command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if a checked-in stub is stale")
    if not parser.parse_args().check:
        generate(ROOT)
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        if files := stale(Path(folder)):
            sys.exit(f"generate.py: stale stubs, run `make proto`: {', '.join(files)}")
    print(f"stubs of {len(SOURCES)} .proto files are up to date")


if __name__ == "__main__":
    main()
