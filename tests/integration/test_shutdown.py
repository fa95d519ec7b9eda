"""The `superpose-server` command: its ready line, its end, and its refusals."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.integration.harness import (
    PATIENCE,
    PROMPT,
    Family,
    LoopThread,
    ServerProcess,
    start,
)
from tests.integration.http_client import JSON, Http

from superpose_client import Client, HealthStatus, UnavailableError
from superpose_server.errors import StartupError

NEW_WORK: list[Callable[[Client], Any]] = [
    lambda client: client.generate(PROMPT),
    lambda client: list(client.stream(PROMPT)),
    lambda client: client.score(["abc"]),
    lambda client: client.set({"a": 1.0}),
    lambda client: client.delete("a"),
]


def test_sigterm_lets_running_streams_end_and_refuses_new_work(
    gpt2: Family, tmp_path: Path
) -> None:
    with (
        ServerProcess(gpt2.base, tmp_path / "state", "--grace=60") as process,
        process.client() as client,
    ):
        assert re.fullmatch(
            rf"ready address=127\.0\.0\.1:[1-9]\d* base={re.escape(str(gpt2.base))} generation=0 "
            r"digest=[0-9a-f]{64} metrics=127\.0\.0\.1:[1-9]\d*\n",
            process.ready_line,
        )
        assert process.ready["digest"] == client.mix().digest
        client.push("a", gpt2.adapters["a"])
        streams = [
            client.stream(PROMPT, temperature=0, max_new_tokens=900, ignore_eos=True)
            for _ in range(4)
        ]
        first = [next(stream) for stream in streams]
        process.terminate()
        while client.health() is not HealthStatus.NOT_SERVING:
            pass  # the signal is on its way; pytest-timeout bounds this
        for call in NEW_WORK:
            with pytest.raises(UnavailableError, match="the server is shutting down") as caught:
                call(client)
            assert caught.value.reason == "SHUTTING_DOWN"
        for chunk, stream in zip(first, streams, strict=True):
            rest = list(stream)
            assert sum(len(c.token_ids) for c in (chunk, *rest)) == 900
            assert rest[-1].finish_reason == "FINISH_REASON_LENGTH"
        status, errors = process.wait()
    assert status == 0
    assert "Traceback" not in errors
    assert process.process.stdout is not None


def test_sigterm_lets_running_streams_over_http_end(gpt2: Family, tmp_path: Path) -> None:
    fields = {"prompt": PROMPT, "max_tokens": 900, "ignore_eos": True, "stream": True}
    flags = ("--http-listen=127.0.0.1:0", "--grace=60")
    with ServerProcess(gpt2.base, tmp_path / "state", *flags) as process:
        with closing(Http(process.ready["http"]).connect()) as connection:
            connection.request("POST", "/v1/completions", json.dumps(fields), JSON)
            stream = connection.getresponse()
            first = stream.readline()
            process.terminate()
            rest = stream.read()
        status, errors = process.wait()
    assert (status, "Traceback" in errors) == (0, False)
    assert first.startswith(b"data: {")
    assert b'"finish_reason":"length"' in rest
    assert rest.endswith(b"data: [DONE]\n\n")


def test_what_outlasts_the_grace_period_is_aborted(gpt2: Family, tmp_path: Path) -> None:
    with (
        ServerProcess(gpt2.base, tmp_path / "state", "--grace=0", "--max-batch=1") as process,
        process.client() as client,
        client.watch() as watch,
    ):
        running = client.stream(PROMPT, max_new_tokens=1000, ignore_eos=True)
        next(running)
        waiting = client.stream(PROMPT, max_new_tokens=1000, ignore_eos=True)
        next(watch)
        while client.info().waiting == 0:
            pass  # the request is on its way; pytest-timeout bounds this
        process.process.send_signal(signal.SIGHUP)  # which is one to end, like SIGTERM
        chunks = list(running)
        assert chunks[-1].finish_reason == "FINISH_REASON_ABORTED"
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens < 1000
        for stream in (waiting, watch):  # what never ran has no answer, not an empty one
            with pytest.raises(UnavailableError) as caught:
                list(stream)
            assert caught.value.reason == "SHUTTING_DOWN"
        status, errors = process.wait()
    assert status == 0
    assert "Traceback" not in errors


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "superpose_server", "--compile=off", *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env={"PYTHONPATH": ":".join(sys.path), "PATH": "", "HF_HUB_OFFLINE": "1"},
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--base is needed"),
        (("--base=mini", "--max-batch=0"), "--max-batch is 0: use at least 1"),
        (("--base=mini", "--grace=-1"), "--grace is -1: use 0 or more seconds"),
        (("--base=mini", "--listen=50051"), "use HOST:PORT, for example 127.0.0.1:0"),
        (("--base=mini", "--listen=0.0.0.0:0"), "listen on 127.0.0.1, or pass --insecure"),
        (("--base=mini", "--dtype=int8"), "invalid choice: 'int8'"),
        (("--base=mini", "--nonsense"), "unrecognized arguments: --nonsense"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what_is_right(
    arguments: tuple[str, ...], message: str
) -> None:
    result = command(*arguments)
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]
    assert result.stdout == ""


def test_a_base_that_is_not_there_exits_with_1_in_one_line(tmp_path: Path) -> None:
    result = command(
        f"--base={tmp_path}",
        f"--state-dir={tmp_path / 'state'}",
        "--listen=127.0.0.1:0",
        "--metrics-listen=127.0.0.1:0",
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(r"superpose-server: base .*: no config\.json .*\n", result.stderr)


def test_a_base_that_is_not_there_is_traced_to_its_cause_for_who_debugs(tmp_path: Path) -> None:
    result = command(
        f"--base={tmp_path}",
        f"--state-dir={tmp_path / 'state'}",
        "--listen=127.0.0.1:0",
        "--metrics-listen=127.0.0.1:0",
        "--log-level=debug",
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert "The above exception was the direct cause of the following exception" in result.stderr
    assert re.fullmatch(
        r"superpose-server: base .*: no config\.json .*", result.stderr.splitlines()[-1]
    )


def test_a_machine_without_a_compiler_is_told_of_the_remedy(gpt2: Family, tmp_path: Path) -> None:
    result = command(
        f"--base={gpt2.base}",
        f"--state-dir={tmp_path / 'state'}",
        "--listen=127.0.0.1:0",
        "--metrics-listen=127.0.0.1:0",
        "--device=cpu",
        "--compile=on",
    )
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("superpose-server: ")
    assert "install g++, or pass --compile off" in line


def test_an_adapter_in_place_of_a_folder_of_adapters_is_refused(
    loop: LoopThread, gpt2: Family, tmp_path: Path
) -> None:
    with pytest.raises(StartupError, match="is an adapter itself: name the folder that holds it"):
        start(loop, gpt2.base, tmp_path / "state", adapter_dir=gpt2.adapters["a"])


@pytest.mark.parametrize("flag", ["listen", "metrics-listen"])
def test_a_port_that_is_taken_is_refused_before_anything_is_loaded(
    flag: str, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        flags = {"listen": "127.0.0.1:0", "metrics-listen": "127.0.0.1:0"} | {flag: address}
        # No base of this name exists, but it is not what is told of.
        result = command(f"--base={tmp_path}", *(f"--{name}={at}" for name, at in flags.items()))
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(
        rf"superpose-server: cannot listen on --{flag} {address} \(.*\): choose .*\n", result.stderr
    )
