"""Schemathesis: whatever it makes of the OpenAPI document, the answer is one that this promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.integration.harness import LoopThread, start

from superpose_adapters.bundled import MINI

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
)


@pytest.mark.timeout(300)
def test_answers_are_as_the_document_says(tmp_path: Path) -> None:
    """Refusals are right, too, of what a schema allows: names that nothing has, two mixes in one.

    Nor is what the document says in words, that null is absent, in its schemas.
    """
    loop = LoopThread()
    # Of its own: the mix and the adapters are changed.
    server = start(loop, MINI.name, tmp_path / "state", http_listen="127.0.0.1:0")
    found = subprocess.run(
        [
            str(Path(sys.executable).with_name("schemathesis")),
            "run",
            f"http://{server.server.http_address}/openapi.json",
            f"--checks={','.join(CHECKS)}",
            "--phases=examples,coverage,fuzzing",
            "--max-examples=10",
            "--generation-deterministic",
            "--request-timeout=60",
            # Until its client goes away.
            "--exclude-path=/v1/mix/events",
            "--no-color",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    with server.client as client:
        assert client.verify().ok
    server.stop()
    loop.close()
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]
    assert "Tested: " in found.stdout
