"""A server in a process of its own, as chaos scripts start one, torment it and look after it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.chaos.footprint import Footprint
from tests.chaos.script import Record
from tests.integration.harness import ServerProcess, wait_until
from tests.makers import make_adapter, save_base, tiny_gpt2, tiny_tokenizer

CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
DOMAINS = ("a", "b", "c")


class Victim:
    """A folder with a tiny base, three adapters for it, and the state of one server after another.

    Attributes:
        folder: All of it.
        secrets: What no client may be told.
    """

    def __init__(self, folder: Path, *, context: int = 64) -> None:
        """Make base and adapters."""
        self.folder = folder
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = CHAT_TEMPLATE
        model = tiny_gpt2(n_positions=context)
        self.base = save_base(model, folder / "base", tokenizer)
        self.adapters = {
            name: make_adapter(model, folder / "adapters" / name, seed, size=0.3)
            for seed, name in enumerate(DOMAINS)
        }
        self.secrets = (str(folder), str(Path(__file__).parents[2]), "Traceback", 'File "')

    @contextmanager
    def serving(self, record: Record, *flags: str) -> Iterator[ServerProcess]:
        """Serve on both doors; afterwards end the server, and look at how it ended.

        Its log must hold no error, and it has to end by itself, with 0.
        """
        with ServerProcess(
            self.base, self.folder / "state", "--http-listen=127.0.0.1:0", *flags
        ) as server:
            assert server.ready, server.errors.read_text()
            yield server
            server.terminate()
            status, log = server.wait()
        record.check(status == 0, f"the server ended with {status}")
        faults = [line for line in log.splitlines() if " ERROR " in line or "Traceback" in line]
        record.check(not faults, f"{len(faults)} faults in its log, the first: {faults[:1]}")

    def push_all(self, server: ServerProcess) -> None:
        """Push the adapters, and make the first the default mix."""
        with server.client() as client:
            for name, folder in self.adapters.items():
                client.push(name, folder)
            client.set(DOMAINS[0])


@contextmanager
def victim(*, context: int = 64) -> Iterator[Victim]:
    """Make a victim in a folder that goes away with it."""
    with tempfile.TemporaryDirectory(prefix="superpose-chaos") as folder:
        yield Victim(Path(folder), context=context)


def settled(server: ServerProcess) -> Footprint:
    """Return what a server holds once nothing runs or waits in it."""
    with server.client() as client:

        def is_idle() -> bool:
            info = client.info()
            return info.running == 0 and info.waiting == 0

        wait_until(is_idle, "nothing runs or waits")
    return Footprint.of(server.process.pid)


def check_whole(record: Record, server: ServerProcess, target: Victim) -> None:
    """Check that a server takes an adapter, folds it in, has whole weights, and serves."""
    with server.client() as client:
        client.push("whole", target.adapters[DOMAINS[-1]], replace=True)
        client.set({"whole": -0.5})
        record.check(client.verify().ok, "the weights fail their verification")
        text = client.generate("The sum of", max_new_tokens=4, temperature=0, ignore_eos=True)
        record.check(len(text.token_ids) == 4, "no text is made any more")
