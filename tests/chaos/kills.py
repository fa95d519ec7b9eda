"""kill -9 at random moments of storms of changes, and while the server starts.

Three operators change the default mix, the names of mixes and the adapters, each as fast as it is
answered, until the server is killed. The next one has to come back with what each operator was told
last, or with what it had asked for and was not told of: nothing else, nothing between, and nothing
left over in the state folder. `tests/integration/test_restart.py` tries every instant of a change;
this tries the whole server, its threads and its sockets.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Generic, TypeVar

from tests.chaos.forked_server import ForkedServer
from tests.chaos.script import Record, make_parser
from tests.state_files import stray_files

from superpose_client import AdapterInfo, CallError, Client, MergeResult

T = TypeVar("T")
Weights = Mapping[str, float]
# What comes next, and the call that asks for it.
Change = tuple[T, Callable[[Client], object]]

# Domains that are replaced and mixed, those that come and go, those that stay, and what of these is
# merged, and goes again.
_MIXED, _PASSING, _STAYING, _MERGED = ("a", "b", "c"), ("x", "y"), ("u", "v"), ("m", "n")
_VARIANTS = (1, 2)
# What each variant of a merged domain is merged from; by TIES, which takes longer than a sum.
_MERGES: Mapping[int, Weights] = {1: {"u": 1.0, "v": 1.0}, 2: {"u": 1.0, "v": -0.5}}
_NAMES = ("p", "q", "r")
# Seconds of a storm, at most.
_STORM = 0.7
_SHARE_OF_STARTS = 0.2


@dataclass
class Operator(Generic[T]):
    """One who changes one thing, step by step.

    Attributes:
        known: What it was told last.
        asked: What it has asked for and was not told of yet; None: nothing.
        fates: Number of changes that it was told of (acknowledged), and of those that a kill cut
            short (landed, not_landed).
    """

    change: Callable[[T, random.Random], Change[T]]
    known: T
    asked: T | None = None
    fates: Counter[str] = field(default_factory=Counter)

    def storm(self, client: Client, draw: random.Random, killed: threading.Event) -> str | None:
        """Change until the server is killed; return what it said if it refused a change."""
        while True:
            self.asked, call = self.change(self.known, draw)
            try:
                call(client)
            except CallError as error:
                return None if killed.wait(1.0) else f"{error.code}: {error}"
            self.known, self.asked = self.asked, None
            self.fates["acknowledged"] += 1

    def resume(self, found: T) -> bool:
        """Go on from what a server has come back with; return whether it may have."""
        allowed = found == self.known
        if self.asked is not None:
            allowed |= found == self.asked
            self.fates["landed" if found == self.asked else "not_landed"] += 1
        self.known, self.asked = found, None
        return allowed


def change_mix(known: Weights, draw: random.Random) -> Change[Weights]:
    """Add, remove or set."""
    weight = draw.choice((0.5, -1.0, 0.25, 2.0))
    absent = [domain for domain in _MIXED if domain not in known]
    kind = draw.choice(("add", "remove", "set"))
    if kind == "add" and absent:
        domain = draw.choice(absent)
        return {**known, domain: weight}, lambda client: client.add(domain, weight)
    if kind == "remove" and known:
        domain = draw.choice(sorted(known))
        rest = {name: value for name, value in known.items() if name != domain}
        return rest, lambda client: client.remove(domain)
    wanted = _some_weights(draw)
    return wanted, lambda client: client.set(wanted)


def change_names(
    known: Mapping[str, Weights], draw: random.Random
) -> Change[Mapping[str, Weights]]:
    """Name a mix, or take a name away."""
    name = draw.choice(_NAMES)
    if name in known and draw.random() < 0.5:
        rest = {other: mix for other, mix in known.items() if other != name}
        return rest, lambda client: client.unname_mix(name)
    wanted = _some_weights(draw)
    return {**known, name: wanted}, lambda client: client.name_mix(name, wanted)


def _some_weights(draw: random.Random) -> Weights:
    domains = draw.sample(_MIXED, draw.randint(1, len(_MIXED)))
    return {domain: draw.choice((1.0, -0.5, 3.0)) for domain in sorted(domains)}


@dataclass(frozen=True)
class Files:
    """Two adapters for each domain that changes.

    Attributes:
        folders: {(domain, variant): folder}.
        digests: {(domain, variant): digest}, as the server said it.
    """

    folders: Mapping[tuple[str, int], Path]
    digests: dict[tuple[str, int], str] = field(default_factory=dict)

    def change(self, known: Mapping[str, int], draw: random.Random) -> Change[Mapping[str, int]]:
        """Push, merge, replace or delete; `known` is {domain: variant}."""
        domain = draw.choice((*_MIXED, *_PASSING, *_MERGED))
        if domain not in _MIXED and domain in known and draw.random() < 0.5:
            rest = {other: variant for other, variant in known.items() if other != domain}
            return rest, lambda client: client.delete(domain)
        variant = draw.choice([v for v in _VARIANTS if v != known.get(domain)])
        if domain in _MERGED:
            return {**known, domain: variant}, lambda client: merge(client, domain, variant)
        folder = self.folders[domain, variant]
        return {**known, domain: variant}, lambda client: client.push(domain, folder, replace=True)

    def found(self, client: Client) -> Mapping[str, int]:
        """Return what the server has, {domain: variant}; 0 for what is neither."""
        return {
            adapter.domain: self._variant(adapter)
            for adapter in client.adapters()
            if adapter.domain not in _STAYING
        }

    def _variant(self, adapter: AdapterInfo) -> int:
        for variant in _VARIANTS:
            if self.digests.get((adapter.domain, variant)) == adapter.digest:
                made = adapter.provenance.weights if adapter.provenance else None
                expected = _MERGES[variant] if adapter.domain in _MERGED else None
                return variant if made == expected else 0
        return 0


def merge(client: Client, domain: str, variant: int) -> MergeResult:
    """Merge a variant of a domain."""
    return client.merge(domain, _MERGES[variant], method="core-ties", replace=True)


class Storms:
    """One state folder, servers on it that are killed one after the other, and what they lost."""

    def __init__(self, folder: Path, record: Record, seed: int) -> None:
        """Make a base, adapters, and the folder."""
        # Takes seconds to import, and a process that is forked imports this module.
        from tests.makers import make_adapter, save_base, tiny_gpt2

        self._record = record
        self._draw = random.Random(seed)
        self._state_dir = folder / "state"
        self._cache = folder / "cache"
        self._log = folder / "server.log"
        model = tiny_gpt2()
        self._base = save_base(model, folder / "base")
        pairs = [
            (domain, variant) for domain in (*_MIXED, *_PASSING, *_STAYING) for variant in _VARIANTS
        ]
        self._files = Files(
            {
                (domain, variant): make_adapter(
                    model, folder / "adapters" / f"{domain}{variant}", seed=number, size=0.3
                )
                for number, (domain, variant) in enumerate(pairs)
            }
        )
        self._mix: Operator[Weights] = Operator(change_mix, {})
        self._names: Operator[Mapping[str, Weights]] = Operator(change_names, {})
        self._adapters: Operator[Mapping[str, int]] = Operator(self._files.change, {})
        self._generation = 0
        self._starts: list[float] = []
        self._counted: Counter[str] = Counter()

    def run(self, kills: int) -> None:
        """Kill servers that often."""
        self._prepare()
        while self._counted["kills"] < kills:
            if self._draw.random() < _SHARE_OF_STARTS:
                self._kill_in_start()
            else:
                self._kill_in_storm()
        server, client = self._start()  # What the last kill left.
        client.close()
        server.kill()
        changes = self._mix.fates + self._names.fates + self._adapters.fates
        seconds = round(statistics.median(self._starts), 2)
        self._record.add({**self._counted, **changes, "seconds_to_start": seconds})

    def _prepare(self) -> None:
        server, client = self._start()
        for (domain, variant), folder in self._files.folders.items():
            pushed = client.push(domain, folder, replace=True)
            self._files.digests[domain, variant] = pushed.adapter.digest
        for domain, variant in product(_MERGED, _VARIANTS):
            merged = merge(client, domain, variant)
            self._files.digests[domain, variant] = merged.adapter.digest
        for domain in (*_PASSING, *_MERGED):
            client.delete(domain)
        self._adapters.known = dict.fromkeys(_MIXED, _VARIANTS[-1])
        client.close()
        server.kill()

    def _spawn(self) -> ForkedServer:
        return ForkedServer(
            [
                *(f"--base={self._base}", f"--state-dir={self._state_dir}", "--device=cpu"),
                *("--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0", "--dtype=float32"),
                *("--compile=off", "--threads=1"),
            ],
            self._log,
            XDG_CACHE_HOME=str(self._cache),
        )

    def _start(self) -> tuple[ForkedServer, Client]:
        """Start a server, and check what it comes back with."""
        began = time.monotonic()
        server = self._spawn()
        client = server.client()
        self._starts.append(time.monotonic() - began)
        self._check(client)
        return server, client

    def _kill_in_start(self) -> None:
        server = self._spawn()
        server.lives_for(self._draw.uniform(0, max(self._starts[-3:])))
        server.kill()
        self._count("kills", "kills_in_start")

    def _kill_in_storm(self) -> None:
        server, client = self._start()
        killed = threading.Event()
        refusals: list[str] = []

        def storm(operator: Operator[T], seed: int) -> None:
            refused = operator.storm(client, random.Random(seed), killed)
            if refused is not None:
                refusals.append(refused)

        threads = [
            threading.Thread(target=storm, args=(operator, self._draw.getrandbits(32)))
            for operator in (self._mix, self._names, self._adapters)
        ]
        for thread in threads:
            thread.start()
        lived = server.lives_for(self._draw.uniform(0, _STORM))
        self._record.check(lived, "a server ended by itself")
        server.kill()
        killed.set()
        for thread in threads:
            thread.join()
        client.close()
        self._count("kills", "kills_in_storm")
        for refused in refusals:
            self._record.check(False, f"a change was refused: {refused}")
        log = server.log.read_text()
        self._record.check("Traceback" not in log, f"a fault is in the log: {log[-2000:]}")

    def _check(self, client: Client) -> None:
        """Check what a server came back with; the operators go on from there."""
        mix = client.mix()
        adapters = self._files.found(client)
        names: dict[str, Weights] = {n.name: dict(n.weights) for n in client.named_mixes()}
        self._resume(self._mix, dict(mix.weights))
        self._resume(self._names, names)
        self._resume(self._adapters, adapters)
        check = self._record.check
        named = {domain: self._files.digests.get((domain, v)) for domain, v in adapters.items()}
        check(
            all(named.get(entry.domain) == entry.adapter_digest for entry in mix.entries),
            f"the mix {mix.entries} holds adapters that its domains do not name: {named}",
        )
        check(
            mix.generation >= self._generation,
            f"generation {mix.generation} came back after {self._generation}",
        )
        check(client.verify().ok, "the weights fail their verification")
        strays = stray_files(self._state_dir)
        check(not strays, f"stray files: {strays}")
        self._generation = mix.generation

    def _resume(self, operator: Operator[T], found: T) -> None:
        known, asked = operator.known, operator.asked
        right = operator.resume(found)
        self._record.check(right, f"{found} came back; acknowledged {known}, asked for {asked}")

    def _count(self, *names: str) -> None:
        self._counted.update(names)


def main(arguments: list[str] | None = None) -> int:
    """Run the script; return its exit code."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, help="200, or 6 with --short")
    options = parser.parse_args(arguments)
    kills = options.kills or (6 if options.short else 200)
    record = Record("kills", {"seed": options.seed})
    with tempfile.TemporaryDirectory(prefix="superpose-kills-") as folder:
        Storms(Path(folder), record, options.seed).run(kills)
    return record.finish()


if __name__ == "__main__":
    sys.exit(main())
