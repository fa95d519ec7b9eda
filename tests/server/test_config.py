from __future__ import annotations

import os
import re
from dataclasses import fields
from pathlib import Path

import pytest

from superpose_server.config import ServerConfig, config_of, parse_config, split_address


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in list(os.environ):
        if name.startswith("SUPERPOSE_"):
            monkeypatch.delenv(name)
    return monkeypatch


def test_the_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_config(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "--base" in text
    assert "on a GPU 90 %" in " ".join(text.split())
    for option in fields(ServerConfig):
        assert option.name.replace("_", "-") in text


def test_a_base_is_enough() -> None:
    assert parse_config(["--base", "mini"]) == ServerConfig("mini")


def test_a_flag_beats_the_environment_which_beats_the_default(
    environment: pytest.MonkeyPatch,
) -> None:
    environment.setenv("SUPERPOSE_MAX_BATCH", "3")
    environment.setenv("SUPERPOSE_BASE", "from-environment")
    environment.setenv("SUPERPOSE_STATE_DIR", "/state")
    config = parse_config(["--max-batch", "5"])
    assert config.max_batch == 5
    assert config.base == "from-environment"
    assert config.state_dir == Path("/state")
    assert config.max_queue == ServerConfig("x").max_queue
    assert parse_config([]).max_batch == 3


@pytest.mark.parametrize(
    ("value", "on"), [("1", True), ("true", True), ("YES", True), ("0", False), ("", False)]
)
def test_switches_can_be_set_in_the_environment(
    environment: pytest.MonkeyPatch, value: str, on: bool
) -> None:
    environment.setenv("SUPERPOSE_NO_REFLECTION", value)
    environment.setenv("SUPERPOSE_INSECURE", value)
    config = parse_config(["--base", "mini"])
    assert (config.reflection, config.insecure) == (not on, on)


def test_a_flag_overrides_a_bad_choice_in_the_environment(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("SUPERPOSE_DTYPE", "float8")
    assert parse_config(["--base", "mini", "--dtype", "float32"]).dtype == "float32"


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which the command ends."""
    with pytest.raises(SystemExit) as caught:
        parse_config(arguments)
    assert caught.value.code == 2
    out, error = capsys.readouterr()
    assert out == ""
    (line,) = error.splitlines()
    assert line.startswith("superpose-server: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--base"),
        (["--base"], "--base"),
        (["--base", "mini", "--unknown", "1"], "--unknown"),
        (["--base", "mini", "--max-batch", "many"], "--max-batch"),
        (["--base", "mini", "--max-batch", "0"], "--max-batch is 0: use at least 1"),
        (["--base", "mini", "--max-queue", "-1"], "--max-queue is -1"),
        (["--base", "mini", "--grace", "-1"], "--grace is -1"),
        (["--base", "mini", "--grace", "nan"], "--grace is nan"),
        (["--base", "mini", "--grace", "inf"], "--grace is inf"),
        (["--base", "mini", "--follow", ""], "--follow is empty: name a file or a URL"),
        (["--base", "mini", "--follow-every", "0"], "--follow-every is 0: use seconds"),
        (["--base", "mini", "--follow-every", "nan"], "--follow-every is nan: use seconds"),
        (["--base", "mini", "--follow-every", "86401"], "at most a day"),
        (["--base", "mini", "--verify-every", "-1"], "--verify-every is -1: use seconds"),
        (["--base", "mini", "--verify-every", "nan"], "--verify-every is nan: use seconds"),
        (["--base", "mini", "--verify-every", "86401"], "--verify-every is 86401: use seconds, at"),
        (["--base", "mini", "--dtype", "int8"], "--dtype"),
        (["--base", "mini", "--compile", "always"], "--compile"),
        (["--base", "mini", "--residency", "never"], "--residency"),
        (["--base", "mini", "--prefill-tokens", "0"], "--prefill-tokens is 0: use at least 1"),
        (["--base", "mini", "--threads", "0"], "--threads is 0: use 1 to "),
        (["--base", "mini", "--threads", "100000"], "--threads is 100000: use 1 to "),
        (["--base", "mini", "--cache-mib", "0"], "--cache-mib is 0: use at least 1"),
        (["--base", "mini", "--max-rank", "0"], "--max-rank is 0: use at least 1"),
        (["--base", "mini", "--max-adapter-mib", "0"], "--max-adapter-mib is 0: use 1 to 2031"),
        (["--base", "mini", "--max-adapter-mib", "2032"], "2032: use 1 to 2031"),
        (["--base", "mini", "--listen", "50051"], "use HOST:PORT"),
        (["--base", "mini", "--listen", ":50051"], "use HOST:PORT"),
        (["--base", "mini", "--listen", "127.0.0.1:x"], "use HOST:PORT"),
        (["--base", "mini", "--listen", "127.0.0.1:65536"], "use HOST:PORT"),
        (["--base", "mini", "--listen", "0.0.0.0:50051"], "--insecure"),
        (["--base", "mini", "--listen", "example.org:50051"], "--insecure"),
        (["--base", "mini", "--listen", "[::]:50051"], "--insecure"),
        (["--base", "mini", "--metrics-listen", "10.0.0.1:9464"], "--metrics-listen"),
        (["--base", "mini", "--tls-cert", "c"], "--tls-cert is of no use alone: give --tls-key"),
        (["--base", "mini", "--tls-key", "k"], "--tls-key is of no use alone: give --tls-cert"),
        (["--base", "mini", "--tls-client-ca", "a"], "--tls-client-ca needs TLS"),
        (["--base", "mini", "--http-host", "box:8080"], "--http-host is 'box:8080'"),
        (["--base", "mini", "--http-host", "abc:80"], "without a port"),
        (["--base", "mini", "--http-host", "http://box"], "without http://"),
        (["--base", "mini", "--http-host", "Box"], "lower case"),
        (["--base", "mini", "--cors-origin", "*"], "there is no word for every site"),
        (["--base", "mini", "--cors-origin", "null"], "--cors-origin is 'null'"),
        (["--base", "mini", "--cors-origin", "https://chat.example/"], "SCHEME://HOST"),
        (["--base", "mini", "--cors-origin", "chat.example"], "SCHEME://HOST"),
        (["--base", "mini", "--cors-origin", "https://chat.example:443"], "the scheme's own"),
        (["--base", "mini", "--http-listen", "0.0.0.0:8080"], "--insecure"),
    ],
)
def test_a_bad_command_line_ends_with_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert words in fails(capsys, *arguments)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SUPERPOSE_DTYPE", "float8"),
        ("SUPERPOSE_RESIDENCY", "never"),
        ("SUPERPOSE_COMPILE", "maybe"),
        ("SUPERPOSE_LOG_LEVEL", "loud"),
        ("SUPERPOSE_INSECURE", "maybe"),
    ],
)
def test_a_bad_choice_in_the_environment_is_named(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str, value: str
) -> None:
    environment.setenv(variable, value)
    line = fails(capsys, "--base", "mini")
    assert variable in line
    assert value in line


def test_a_bad_number_in_the_environment_ends_with_one_line(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment.setenv("SUPERPOSE_MAX_BATCH", "many")
    assert "many" in fails(capsys, "--base", "mini")


@pytest.mark.parametrize("address", ["127.0.0.1:0", "127.9.9.9:1", "localhost:50051", "[::1]:80"])
def test_loopback_addresses_need_no_leave(address: str) -> None:
    config = ServerConfig("mini", listen=address, metrics_listen=address)
    assert config.listen == address


def test_insecure_allows_any_address() -> None:
    config = parse_config(["--base", "mini", "--listen", "0.0.0.0:1", "--insecure"])
    assert config.listen == "0.0.0.0:1"


def test_what_may_be_repeated_is_kept_in_order_and_flags_replace_the_environment(
    environment: pytest.MonkeyPatch,
) -> None:
    environment.setenv("SUPERPOSE_HTTP_HOST", "box, 10.0.0.7,fd00::1")
    environment.setenv("SUPERPOSE_CORS_ORIGIN", "http://a.example")
    config = parse_config(
        ["--base=mini", "--cors-origin=https://b.example:8443", "--cors-origin=http://[::1]:3000"]
    )
    assert config.http_host == ("box", "10.0.0.7", "fd00::1")
    assert config.cors_origin == ("https://b.example:8443", "http://[::1]:3000")
    assert ServerConfig("mini").cors_origin == ()


def test_addresses_are_split_at_the_last_colon() -> None:
    assert split_address("listen", "127.0.0.1:80") == ("127.0.0.1", 80)
    assert split_address("listen", "[::1]:0") == ("::1", 0)


TLS = ("--tls-cert", "cert.pem", "--tls-key", "key.pem")
TOKENS = ("--tokens", "tokens.json")


@pytest.mark.parametrize(
    ("given", "lacks"),
    [
        ((), "--tls-cert and --tls-key and --tokens"),
        (TOKENS, "--tls-cert and --tls-key: give"),  # Tokens would travel in clear.
        (TLS, "lacks --tokens"),
        ((*TLS, "--tls-client-ca", "ca.pem"), "lacks --tokens"),
    ],
)
@pytest.mark.parametrize("flag", ["--listen", "--http-listen", "--admin-listen"])
def test_other_machines_reach_no_door_without_tls_and_tokens(
    capsys: pytest.CaptureFixture[str], flag: str, given: tuple[str, ...], lacks: str
) -> None:
    asked = ("--base", "mini", flag, "0.0.0.0:0", *given)
    line = fails(capsys, *asked)
    assert lacks in line
    assert "--insecure" in line
    parse_config((*asked, "--insecure"))
    parse_config(("--base", "mini", flag, "0.0.0.0:0", *TLS, *TOKENS))


def test_metrics_beyond_loopback_are_open_whatever_the_doors_have(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ("--base", "mini", "--metrics-listen", "0.0.0.0:0", *TLS, *TOKENS)
    assert "--metrics-listen 0.0.0.0:0 can be reached" in fails(capsys, *asked)
    parse_config((*asked, "--insecure"))


def test_a_file_s_values_are_those_of_the_command_line() -> None:
    config = config_of(
        {
            "base": "mini",
            "state_dir": "state",
            "max_batch": 4,
            "grace": 5,
            "http_host": ["a.example", "b.example"],
            "strict": True,
            "dtype": "float32",
            "cache_mib": None,
        }
    )
    assert config == ServerConfig(
        base="mini",
        state_dir=Path("state"),
        max_batch=4,
        grace=5.0,
        http_host=("a.example", "b.example"),
        strict=True,
        dtype="float32",
    )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "base is needed"),
        ({"base": "mini", "max-batch": 4}, "max-batch is no flag"),
        ({"base": "mini", "max_batch": "4"}, "max_batch is '4': use a number"),
        ({"base": "mini", "max_batch": True}, "max_batch is True: use a number"),
        ({"base": "mini", "strict": 1}, "strict is 1: use true or false"),
        ({"base": "mini", "dtype": "int8"}, "dtype is 'int8': use one of auto"),
        ({"base": "mini", "http_host": "a.example"}, "http_host is 'a.example': use a list"),
        ({"base": 7}, "base is 7: use a text"),
        ({"base": "mini", "max_batch": 0}, "--max-batch is 0"),
    ],
)
def test_a_file_s_value_that_means_nothing_is_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        config_of(values)


def test_what_may_hold_a_password_is_in_no_repr() -> None:
    config = ServerConfig(base="mini", store="s3://me:secret@b", follow="https://me:secret@h/m")
    assert "secret" not in repr(config)
