"""The shared store on S3: moto's server, by s3fs, as `--store s3://...` reaches Amazon's."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest
import torch
from moto.server import ThreadedMotoServer
from safetensors.torch import save
from tests.integration.harness import LoopThread, start
from tests.makers import make_adapter, save_base, tiny_gpt2
from tests.tiny_adapters import DIGESTS, files

from superpose_adapters.cached_objects import CachedObjects
from superpose_adapters.objects import Objects
from superpose_adapters.peft.folder import CONFIG_NAME, TENSORS_NAME
from superpose_adapters.shared_objects import SharedObjects, SharedStoreError
from superpose_client import FailedPreconditionError


@pytest.fixture(scope="module")
def s3() -> Iterator[ThreadedMotoServer]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def environment(s3: ThreadedMotoServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the client of S3 looks, and nothing of this machine's own."""
    host, port = s3.get_host_and_port()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "an-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def bucket_fs() -> fsspec.AbstractFileSystem:
    return fsspec.filesystem("s3", skip_instance_cache=True)


@pytest.fixture
def url() -> str:
    """A store in a bucket of its own."""
    bucket = f"b{uuid4().hex}"
    bucket_fs().mkdir(bucket)
    return f"s3://{bucket}/adapters"


def test_what_one_puts_another_reads(url: str) -> None:
    one, other = SharedObjects(url), SharedObjects(url)
    assert DIGESTS[0] not in other
    with pytest.raises(KeyError):
        other.files(DIGESTS[0])
    assert one.put(*files(0)) == DIGESTS[0]
    # Nobody remembers that it was not there.
    assert DIGESTS[0] in other
    assert other.files(DIGESTS[0]) == files(0)
    root = f"{url.removeprefix('s3://')}/objects/{DIGESTS[0]}"
    fs = bucket_fs()
    assert sorted(fs.find(root)) == [f"{root}/{CONFIG_NAME}", f"{root}/{TENSORS_NAME}"]
    assert (fs.cat(f"{root}/{CONFIG_NAME}"), fs.cat(f"{root}/{TENSORS_NAME}")) == files(0)
    one.put(*files(0))
    assert other.files(DIGESTS[0]) == files(0)


def test_an_adapter_that_goes_up_in_parts(url: str) -> None:
    """As those do of 100 MiB and more."""
    config = files(0)[0]
    tensors = save(
        {
            "base_model.model.m.lora_A.weight": torch.arange(27_000_000.0)[None],
            "base_model.model.m.lora_B.weight": torch.ones(2, 1),
        }
    )
    digest = SharedObjects(url).put(config, tensors)
    assert SharedObjects(url).files(digest) == (config, tensors)


@pytest.mark.parametrize("name", [CONFIG_NAME, TENSORS_NAME])
def test_a_damaged_object_is_an_error_and_a_put_mends_it(url: str, name: str) -> None:
    shared, fs = SharedObjects(url), bucket_fs()
    shared.put(*files(0))
    path = f"{url}/objects/{DIGESTS[0]}/{name}"
    for spoiled in (b"", fs.cat_file(path)[:-1]):
        fs.pipe_file(path, spoiled)
        with pytest.raises(SharedStoreError, match=rf"^{url}/objects/.*: damaged"):
            shared.files(DIGESTS[0])
    fs.rm(path)
    with pytest.raises(KeyError if name == CONFIG_NAME else SharedStoreError):
        shared.files(DIGESTS[0])
    shared.put(*files(0))
    assert shared.files(DIGESTS[0]) == files(0)


def test_copies_serve_without_the_store_and_are_mended_from_it(url: str, tmp_path: Path) -> None:
    SharedObjects(url).put(*files(0))
    cached = CachedObjects(Objects(tmp_path), SharedObjects(url))
    assert cached.files(DIGESTS[0]) == files(0)
    copy = tmp_path / "objects" / DIGESTS[0] / TENSORS_NAME
    copy.write_bytes(b"")
    assert cached.files(DIGESTS[0]) == files(0)
    assert copy.read_bytes() == files(0)[1]
    bucket_fs().rm(f"{url}/objects", recursive=True)
    assert cached.files(DIGESTS[0]) == files(0)


def test_a_bucket_that_is_not_there_is_told(url: str) -> None:
    shared = SharedObjects("s3://no-such-bucket/adapters")
    for ask in (
        lambda: shared.put(*files(0)),
        lambda: shared.files(DIGESTS[0]),
        lambda: DIGESTS[0] in shared,
    ):
        with pytest.raises(SharedStoreError, match=r"^s3://no-such-bucket/adapters: it is not th"):
            ask()


def test_a_bucket_that_may_not_be_asked_for_may_be_used(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = SharedObjects(url)
    bucket, info = url.removeprefix("s3://").partition("/")[0], shared._fs.info

    def refuse(path: str) -> object:
        if path == bucket:
            raise PermissionError("secret")
        return info(path)

    monkeypatch.setattr(shared._fs, "info", refuse)
    assert DIGESTS[0] not in shared
    shared.put(*files(0))
    assert DIGESTS[0] in shared


def test_no_credentials_are_told(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(SharedStoreError, match=rf"^{url}: access is denied .*: check the cred"):
        SharedObjects(url).put(*files(0))


def test_nobody_at_the_address_is_told(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    with pytest.raises(SharedStoreError, match=rf"^{url}: ") as caught:
        SharedObjects(url, patience=20).put(*files(0))
    assert "\n" not in str(caught.value)


def test_a_server_that_never_answers_is_given_up_in_time(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        shared = SharedObjects(url)
        shared._patience = 0.5  # Of the answers alone: imports are slow.
        with pytest.raises(SharedStoreError, match=r"no answer within 0\.5 s"):
            shared.put(*files(0))


def test_many_put_and_read_one_object_at_a_time(url: str) -> None:
    def act() -> None:
        shared = SharedObjects(url)
        for _ in range(5):
            shared.put(*files(0))
            assert shared.files(DIGESTS[0]) == files(0)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(act) for _ in range(4)]:
            done.result()


def test_servers_share_what_is_pushed(url: str, tmp_path: Path) -> None:
    model = tiny_gpt2()
    base = save_base(model, tmp_path / "base")
    adapter = make_adapter(model, tmp_path / "adapters" / "a", 1, size=0.3)
    loop = LoopThread()
    try:
        first = start(loop, base, tmp_path / "state", store=url)
        try:
            pushed = first.client.push("a", adapter)
            state, bits = first.client.add("a"), first.score_bits()
        finally:
            first.stop()
        shutil.rmtree(tmp_path / "state" / "adapters" / "objects")
        again = start(loop, base, tmp_path / "state", store=url)
        try:
            assert again.client.adapter("a").digest == pushed.adapter.digest
            assert again.client.mix().digest == state.digest
            assert again.score_bits() == bits
            bucket = url.removeprefix("s3://").partition("/")[0]
            bucket_fs().rm(bucket, recursive=True)
            other = make_adapter(model, tmp_path / "adapters" / "b", 2, size=0.3)
            with pytest.raises(FailedPreconditionError, match="it is not there") as caught:
                again.client.push("b", other)
            assert caught.value.reason == "STORE_WRITE_FAILED"
            assert [each.domain for each in again.client.adapters()] == ["a"]
        finally:
            again.stop()
    finally:
        loop.close()
