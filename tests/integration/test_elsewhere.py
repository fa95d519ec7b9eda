"""A server where what Linux or POSIX alone has is missing: see `elsewhere`."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.integration.harness import Family, ServerProcess, check_greedy


def server(family: Family, tmp_path: Path) -> ServerProcess:
    """One of default flags, where nothing compiles."""
    return ServerProcess(
        family.base,
        tmp_path / "state",
        *("--device=cpu", "--compile=auto", f"--adapter-dir={tmp_path / 'adapters'}"),
        module="tests.integration.elsewhere",
        XDG_CACHE_HOME=str(tmp_path / "cache"),
        CXX="no-such-compiler",
    )


def test_a_server_serves_ends_in_order_and_finds_its_mix_again(
    gpt2: Family, tmp_path: Path
) -> None:
    shutil.copytree(gpt2.adapters["c"], tmp_path / "adapters" / "c")
    with server(gpt2, tmp_path) as first, first.client() as client:
        client.push("a", gpt2.adapters["a"])
        client.push("b", gpt2.adapters["a2"])
        client.push("b", gpt2.adapters["b"], replace=True)
        client.set({"a": 1.0, "b": -0.5})
        client.add("c")
        state, adapters = client.mix(), client.adapters()
        with server(gpt2, tmp_path) as second:
            status, errors = second.wait()
        assert (status, second.ready) == (1, {})
        assert "another server uses it" in errors
        first.terminate()
        status, errors = first.wait()
    assert status == 0, errors
    assert "serving without kernels" in errors
    assert "Traceback" not in errors

    prompt = (84, 104, 101)
    with server(gpt2, tmp_path) as again, again.client() as client:
        assert client.mix() == state
        assert client.adapters() == adapters
        made = client.generate(prompt, temperature=0, max_new_tokens=8, ignore_eos=True)
        assert client.verify().ok
    check_greedy(gpt2.folded(dict(state.weights)), prompt, made.token_ids)
