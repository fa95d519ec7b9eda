"""The server's configuration. Flags beat SUPERPOSE_* environment variables, which beat defaults."""

from __future__ import annotations

import argparse
import ipaddress
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

_LOOPBACK_NAMES = {"localhost"}
_ON = {"1", "true", "yes", "on"}
_OFF = {"", "0", "false", "no", "off"}


@dataclass(frozen=True)
class ServerConfig:
    """Everything that `superpose-server` can be told; see `--help` for each field.

    Raises:
        ValueError: A field with a value that means nothing, with the remedy.
    """

    base: str
    adapter_dir: Path | None = None
    state_dir: Path | None = None
    listen: str = "127.0.0.1:50051"
    metrics_listen: str = "127.0.0.1:9464"
    device: str = "auto"
    dtype: str = "auto"
    base_copy: str = "device"
    max_batch: int = 16
    max_queue: int = 256
    max_length: int | None = None
    residency: str = "default"
    compile: str = "auto"
    prefill_tokens: int | None = None
    cache_mib: int | None = None
    grace: float = 30.0
    reflection: bool = True
    insecure: bool = False
    log_level: str = "info"

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        if self.max_batch < 1:
            raise ValueError(f"--max-batch is {self.max_batch}: use at least 1")
        if self.max_queue < 0:
            raise ValueError(f"--max-queue is {self.max_queue}: use 0 or more")
        if self.prefill_tokens is not None and self.prefill_tokens < 1:
            raise ValueError(f"--prefill-tokens is {self.prefill_tokens}: use at least 1")
        if self.cache_mib is not None and self.cache_mib < 1:
            raise ValueError(f"--cache-mib is {self.cache_mib}: use at least 1")
        if not (math.isfinite(self.grace) and self.grace >= 0):
            raise ValueError(f"--grace is {self.grace:g}: use 0 or more seconds")
        for flag, address in (("listen", self.listen), ("metrics-listen", self.metrics_listen)):
            host, _ = split_address(flag, address)
            if not self.insecure and not _is_loopback(host):
                raise ValueError(
                    f"--{flag} {address} can be reached from other machines and there is no access "
                    "control: listen on 127.0.0.1, or pass --insecure"
                )


def split_address(flag: str, address: str) -> tuple[str, int]:
    """Return (host, port) of HOST:PORT, brackets of an IPv6 host taken off.

    Raises:
        ValueError: Not of that form.
    """
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"--{flag} is {address!r}: use HOST:PORT, for example 127.0.0.1:0")
    return host.strip("[]"), int(port)


def _is_loopback(host: str) -> bool:
    if host in _LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def parse_config(arguments: Sequence[str] | None = None) -> ServerConfig:
    """Build the configuration from the command line and the environment.

    Exits with status 2 and one line if either is wrong.
    """
    parser = _Parser(
        prog="superpose-server",
        description="Serve a base model plus any weighted sum of LoRA adapters over gRPC.",
        epilog="Each option can also be set by an environment variable: --max-batch by "
        "SUPERPOSE_MAX_BATCH, and so on. A flag beats the environment.",
    )
    for option in _OPTIONS:
        value = os.environ.get(_variable(option.flag), option.default)
        shown = option.help if option.default is None else f"{option.help} ({option.default})"
        parser.add_argument(
            f"--{option.flag}",
            default=value,
            help=shown,
            type=option.type,
            choices=option.choices or None,
        )
    for flag, text in _SWITCHES:
        setting = os.environ.get(_variable(flag), "").lower()
        if setting not in _ON | _OFF:
            parser.error(f"{_variable(flag)} is {setting!r}: use 1 or 0")
        parser.add_argument(f"--{flag}", action="store_true", default=setting in _ON, help=text)
    values = vars(parser.parse_args(arguments))
    for option in _OPTIONS:
        # argparse checks the choices of flags, but not those of defaults.
        value = values[option.flag.replace("-", "_")]
        if option.choices and value not in option.choices:
            choices = ", ".join(option.choices)
            parser.error(f"{_variable(option.flag)} is {value!r}: use one of {choices}")
    if values["base"] is None:
        parser.error("--base is needed: a folder, a Hub id, or mini for the bundled model")
    values["reflection"] = not values.pop("no_reflection")
    try:
        return ServerConfig(**values)
    except ValueError as error:
        parser.error(str(error))


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def _variable(flag: str) -> str:
    return "SUPERPOSE_" + flag.upper().replace("-", "_")


@dataclass(frozen=True)
class _Option:
    flag: str
    default: str | None
    help: str
    type: Callable[[str], object] = str
    choices: tuple[str, ...] = ()


_OPTIONS = (
    _Option("base", None, "folder, Hub id such as openai-community/gpt2, or mini (bundled)"),
    _Option("adapter-dir", None, "PEFT folders to serve by folder name, read only", Path),
    _Option(
        "state-dir",
        None,
        "where the default mix and pushed adapters are kept; without it a folder for this base "
        "below XDG_STATE_HOME or ~/.local/state",
        Path,
    ),
    _Option("listen", "127.0.0.1:50051", "address of the gRPC server; port 0: any free one"),
    _Option("metrics-listen", "127.0.0.1:9464", "address of the Prometheus metrics"),
    _Option("device", "auto", "auto, cpu, cuda or cuda:N; auto takes a GPU if there is one"),
    _Option(
        "dtype",
        "auto",
        "of weights and cache; auto: bfloat16 on a GPU, with AMX or AVX512-BF16, else float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    ),
    _Option(
        "base-copy",
        "device",
        "where the base of adapted modules is kept",
        choices=("device", "host"),
    ),
    _Option("max-batch", "16", "rows that run at once", int),
    _Option("max-queue", "256", "requests that wait at most", int),
    _Option("max-length", None, "tokens a row; without it the base's context", int),
    _Option(
        "residency",
        "default",
        "which mix is in the weights: default: the default mix; auto: also what most rows share, "
        "when correcting them costs more than a fold",
        choices=("default", "auto"),
    ),
    _Option(
        "compile",
        "auto",
        "auto: on a CPU, kernels compiled for it (15 s, once a machine; needs g++), on a GPU "
        "captured graphs; off: neither",
        choices=("auto", "off"),
    ),
    _Option(
        "prefill-tokens",
        None,
        "prompt tokens that a step runs at most, which is how long a running stream can be kept "
        "waiting; without it 128 on a CPU, 2048 on a GPU",
        int,
    ),
    _Option(
        "cache-mib",
        None,
        "memory of the key-value cache; lowers --max-batch to the rows that fit",
        int,
    ),
    _Option("grace", "30", "seconds that running requests get at SIGTERM", float),
    _Option("log-level", "info", "what stderr gets", choices=("debug", "info", "warning", "error")),
)
_SWITCHES = (
    ("no-reflection", "do not serve gRPC reflection"),
    ("insecure", "allow an address that other machines can reach, without access control"),
)
