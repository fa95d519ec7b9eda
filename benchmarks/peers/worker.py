"""One peer in a process of its own: requests and answers are lines of JSON.

    python -m benchmarks.peers.worker --peer llama_cpp --model FOLDER --dtype float16

First it says {"ready": true, "peer", "version", "dtype", "weights_bits", "threads"}, or
{"ready": false, "error"} and ends. Each request {"prompts": [[ids]], "new_tokens": N} is answered
by {"seconds", "first_token_seconds", "tokens"}, or by {"error"}. It ends with its input.

Standard output holds nothing else: what libraries print there goes to standard error. Between
requests the process waits on its input and uses no processor, but for the moment that threads of
OpenMP spin after a request. They are left as the peers have them: with OMP_WAIT_POLICY=PASSIVE
llama.cpp and CTranslate2 gave a third fewer tokens/s at batch 1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

from benchmarks.peers.peer import Peer, Settings, default_cache


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run one peer, driven by lines of JSON.")
    parser.add_argument("--peer", required=True, help="module of benchmarks.peers")
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", default=2, type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", default=64, type=int, help="most rows of a request")
    parser.add_argument("--length", default=256, type=int, help="most tokens of a row")
    parser.add_argument("--cache", default=default_cache(), type=Path)
    return parser.parse_args(arguments)


def answers_to() -> TextIO:
    """Return the real standard output, and point descriptor 1 at standard error."""
    sys.stdout.flush()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def end_with_parent() -> None:
    """End this process when its parent is gone, even in the middle of a long request."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def check(tokens: list[list[int]], rows: int, new_tokens: int) -> None:
    """Refuse an answer of another shape than the request's: its speed would mean nothing."""
    if len(tokens) != rows or any(len(row) != new_tokens for row in tokens):
        raise RuntimeError(f"the peer did not give {new_tokens} tokens for each of {rows} rows")


def answer(peer: Peer, request: dict[str, Any]) -> dict[str, Any]:
    result = peer.generate(request["prompts"], request["new_tokens"])
    check(result.tokens, len(request["prompts"]), request["new_tokens"])
    return {
        "seconds": result.seconds,
        "first_token_seconds": result.first_token_seconds,
        "tokens": result.tokens,
    }


def main() -> None:
    options = parse()
    answers = answers_to()
    end_with_parent()

    def say(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")

    try:
        module = importlib.import_module(f"benchmarks.peers.{options.peer}")
        fields = {key: value for key, value in vars(options).items() if key != "peer"}
        peer: Peer = module.load(Settings(**fields))
    except Exception as error:
        say({"ready": False, "error": one_line(error)})
        sys.exit(1)
    say(
        {
            "ready": True,
            "peer": options.peer,
            "version": peer.version,
            "dtype": options.dtype,
            "weights_bits": peer.weights_bits,
            "threads": options.threads,
        }
    )
    for line in sys.stdin:
        try:
            say(answer(peer, json.loads(line)))
        except Exception as error:
            say({"error": one_line(error)})


if __name__ == "__main__":
    main()
