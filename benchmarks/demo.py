"""`make demo`: what a user sees, on a bundled model, with the plain commands.

Starts a server on a free port, adds math, medicine and finance one by one, scores held-out rows of
each domain under every mix on the way, generates under a mix of its own, reports interference,
removes everything and verifies that the weights are the base again, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from superpose_adapters.bundled import BUNDLES, DOMAINS, MINI, Bundle
from superpose_adapters.qa import read_rows
from superpose_client import Client

# Tokens of a row that are scored: few, so that the demo is quick.
MAX_LENGTH = 64
# Of the texts.
WORTH = {
    "mini": "(The bundled model has 5 million parameters: what it writes means nothing.)",
    "smollm2": "(SmolLM2-135M-Instruct from 4 bits, with small adapters: English, and no advice.)",
}
SERVER = (
    "superpose-server --base {base} --listen 127.0.0.1:0 --http-listen 127.0.0.1:0 "
    "--metrics-listen 127.0.0.1:0 --compile off --dtype float32 --log-level warning"
)

console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)


def heading(text: str) -> None:
    console.print(f"\n[bold]{text}[/bold]")


@contextmanager
def running_server(bundle: Bundle) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """Start the server in a state folder of its own; yield it and its addresses."""
    with tempfile.TemporaryDirectory(prefix="superpose-demo-") as folder:
        command = SERVER.format(base=bundle.name)
        console.print(f"[green]$ {command}[/green]")
        process = subprocess.Popen(
            [*shlex.split(command), "--state-dir", str(Path(folder) / "state")],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            ready = process.stdout.readline().strip()
            if not ready.startswith("ready "):
                sys.exit("demo: the server did not start; its message is above")
            console.print(ready, soft_wrap=True)
            fields = dict(part.split("=", 1) for part in ready.split()[1:])
            yield process, fields["address"], fields["http"]
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def adapterctl(command: str) -> None:
    """Show a command line and run it, as a user would."""
    console.print(f"[green]$ adapterctl {command}[/green]")
    sys.stdout.flush()
    if subprocess.run(["adapterctl", *shlex.split(command)]).returncode != 0:
        sys.exit(f"demo: adapterctl {command} failed; its message is above")


def curl(address: str, path: str, fields: dict[str, Any]) -> None:
    """Show a call over HTTP, and make it if there is curl."""
    command = [
        *("curl", "-s", f"http://{address}{path}", "-H", "Content-Type: application/json"),
        *("-d", json.dumps(fields)),
    ]
    console.print(f"[green]$ {shlex.join(command)}[/green]", soft_wrap=True)
    sys.stdout.flush()
    if shutil.which("curl") is None:
        console.print("(curl is not installed)")
    elif subprocess.run(command).returncode != 0:
        sys.exit("demo: curl failed; its message is above")
    else:
        console.print()


def keep(process: subprocess.Popen[str], http: str) -> None:
    """Say where the mixer is, and serve it until Ctrl-C, or until the server ends by itself."""
    console.print(f"the mixer is at http://{http}/ until you press Ctrl-C")
    with suppress(KeyboardInterrupt):
        process.wait()


def perplexities_of(client: Client, bundle: Bundle, mix: str | None = None) -> dict[str, float]:
    """Score the held-out rows of every domain under `mix`, or under the default mix."""
    result = {}
    for domain in DOMAINS:
        rows = [(row.question, row.answer) for row in read_rows(bundle.held_out(domain))]
        result[domain] = client.score(rows, mix=mix, max_length=MAX_LENGTH).perplexity
    return result


def matrix(measured: dict[str, dict[str, float]]) -> Table:
    """Return the table of domains x mixes: perplexity, and its change against the base."""
    table = Table(box=box.SIMPLE_HEAD, title="Perplexity of held-out rows (lower is better)")
    table.add_column("mix")
    for domain in DOMAINS:
        table.add_column(f"{domain} rows", justify="right")
    base = measured["base"]
    for mix, values in measured.items():
        cells = []
        for domain, value in values.items():
            change = value / base[domain] - 1
            inside = domain in mix.split("+") or mix == "half of each"
            style = "green" if change < -0.2 and inside else "red" if change > 0 else "default"
            shown = "" if mix == "base" else f" {change:+5.0%}"
            cells.append(f"{value:8.1f}[{style}]{shown}[/{style}]")
        table.add_row(mix, *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description="make demo")
    parser.add_argument("--base", choices=BUNDLES, default=MINI.name, help="default %(default)s")
    parser.add_argument("--keep", action="store_true", help="serve the mixer until Ctrl-C")
    args = parser.parse_args()
    bundle = BUNDLES[args.base]
    started = time.monotonic()
    heading("1. A server with a base model and three domains")
    with running_server(bundle) as (process, address, http), Client(address) as client:
        perplexities = partial(perplexities_of, client, bundle)
        os.environ["SUPERPOSE_SERVER"] = address
        adapterctl("status")
        adapterctl("list")

        heading("2. Add the domains one by one; score every domain after each")
        base = perplexities()
        folded = {}
        for count, domain in enumerate(DOMAINS, 1):
            adapterctl(f"add {domain}")
            folded["+".join(DOMAINS[:count])] = perplexities()
        # These need no change of the default mix: a request may name its own.
        alone = {domain: perplexities(domain) for domain in DOMAINS[1:]}
        halves = perplexities(",".join(f"{domain}=0.5" for domain in DOMAINS))
        measured = {"base": base, "math": folded.pop("math"), **alone, **folded}
        console.print(matrix(measured | {"half of each": halves}))
        console.print(
            "Each domain helps its own rows. Three whole deltas at once interfere; half of each "
            "helps all three. The weights of a mix are yours to choose, per request."
        )

        heading("3. Requests with mixes of their own; the resident weights stay as they are")
        console.print(WORTH[bundle.name])
        question = read_rows(bundle.held_out("medicine"))[0].question
        prompt = shlex.quote(f"Question: {question}\nAnswer:")
        for mix in ("medicine", "math=1,medicine=0.5"):
            adapterctl(f"generate {prompt} --mix {mix} --max-new-tokens 40")

        curl(
            http,
            "/v1/completions",
            {
                "model": "math=1,medicine=0.5",
                "prompt": f"Question: {question}\nAnswer:",
                "max_tokens": 40,
                "temperature": 0,
            },
        )

        heading("4. How the domains interfere")
        adapterctl("analyze math,medicine,finance")

        heading("5. Remove them in any order: the base is back, bit for bit")
        for domain in ("medicine", "math", "finance"):
            adapterctl(f"remove {domain}")
        adapterctl("verify")
        after = perplexities()
        same = after == base
        console.print(f"perplexities equal those of the base before, to the last bit: {same}")

        if args.keep:
            heading("6. The mixer")
            keep(process, http)

        heading(f"{7 if args.keep else 6}. Stop")
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=60)
        console.print(f"the server ended with exit code {code}")
    console.print(f"\ndone in {time.monotonic() - started:.0f} s")
    if code != 0 or not same:
        sys.exit("demo: the checks above failed")


if __name__ == "__main__":
    main()
