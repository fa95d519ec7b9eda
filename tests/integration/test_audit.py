"""What operators change is recorded, through whichever door; what changes nothing is not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.integration.harness import Family, LoopThread, Served, start
from tests.integration.http_client import Http

from superpose_client import CallError
from superpose_proto.v1 import mix_pb2, mix_pb2_grpc


@pytest.fixture
def server(loop: LoopThread, gpt2: Family, tmp_path: Path) -> Iterator[Served]:
    server = start(loop, gpt2.base, tmp_path / "state", http_listen="127.0.0.1:0")
    yield server
    server.stop()


def test_every_change_has_a_line_with_the_mix_before_and_after(
    server: Served, gpt2: Family
) -> None:
    client, http = server.client, Http(server.server.http_address)
    base = client.mix().digest
    a = client.push("a", gpt2.adapters["a"]).adapter.digest
    client.push("a", gpt2.adapters["a"])  # The same again changes nothing.
    client.add("a", 0.5)
    half = client.mix().digest
    client.set("a=0.5")
    http.ask("PUT", "/v1/mix", {"mix": {"a": 1}})
    one = client.mix().digest
    client.name_mix("qa", "a=-1")
    client.name_mix("qa", "a=-1")
    client.unname_mix("qa")
    a2 = client.push("a", gpt2.adapters["a2"], replace=True).adapter.digest
    two = client.mix().digest
    for refused in (
        lambda: client.add("a"),
        lambda: client.remove("b"),
        lambda: client.delete("a"),
        lambda: client.set("none"),
        lambda: client.unname_mix("none"),
        lambda: client.set("base", expected_generation=77),
    ):
        with pytest.raises(CallError):
            refused()
    client.remove("a")
    client.delete("a")

    expected = [
        (f"push a {a}", 0, base, 0, base),
        ("add a=0.5", 0, base, 1, half),
        ("set a=1", 1, half, 2, one),
        ("name qa a=-1", 2, one, 2, one),
        ("unname qa", 2, one, 2, one),
        (f"push a {a2}", 2, one, 3, two),
        ("remove a", 3, two, 4, base),
        ("delete a", 4, base, 4, base),
    ]
    changes = client.changes()
    assert [
        (each.what, each.generation_before, each.digest_before, each.generation, each.digest)
        for each in changes
    ] == expected
    assert {each.who for each in changes} == {"anonymous"}
    assert all(each.peer.startswith("ipv4:127.0.0.1:") for each in changes)
    told = http.ask("GET", "/v1/audit?limit=2").json["changes"]
    assert [each["what"] for each in told] == ["remove a", "delete a"]
    assert len(client.changes(3)) == 3
    state = server.runtime.config.state_dir
    assert state is not None
    lines = (state / "audit.jsonl").read_text().splitlines()
    assert [json.loads(line)["what"] for line in lines] == [each[0] for each in expected]


@pytest.mark.parametrize("limit", ["0", "1001", "-1", "x", "1.5", "99999999999"])
def test_a_limit_is_a_number_that_is_served(server: Served, limit: str) -> None:
    assert Http(server.server.http_address).ask("GET", f"/v1/audit?limit={limit}").status == 400


def test_a_change_has_the_name_of_its_token(loop: LoopThread, gpt2: Family, tmp_path: Path) -> None:
    from tests.integration.test_access import bearer, write_tokens

    tokens = tmp_path / "tokens.json"
    write_tokens(tokens, {"alice": {"scope": "admin"}, "bob": {"scope": "admin"}})
    server = start(loop, gpt2.base, tmp_path / "state", tokens=tokens, http_listen="127.0.0.1:0")
    try:
        mixes: Any = mix_pb2_grpc.MixServiceStub(server.channel)
        request = mix_pb2.NameMixRequest(name="nothing", mix=mix_pb2.Mix())
        mixes.NameMix(request, metadata=bearer("alice"))
        http = Http(server.server.http_address, dict(bearer("bob")))
        http.ask("DELETE", "/v1/mix/names/nothing")
        with pytest.raises(grpc.RpcError):
            mixes.NameMix(request, metadata=bearer("eve"))
        found = [(each.who, each.what) for each in server.runtime.audit.newest(10)]
        assert found == [("alice", "name nothing base"), ("bob", "unname nothing")]
    finally:
        server.stop()
