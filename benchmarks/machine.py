"""What a figure was measured on: without this a figure is a rumour.

`python -m benchmarks.machine` prints it.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

_PACKAGES = ("torch", "transformers", "peft", "grpcio")
# Those that decide which matrix kernels are used.
_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Machine:
    """Hardware, versions and commit."""

    cpu: str
    cpu_features: tuple[str, ...]
    cores: int
    threads: int
    memory_gib: float
    gpu: str | None
    system: str
    versions: dict[str, str]
    commit: str
    dirty: bool
    date: str

    def as_json(self) -> dict[str, object]:
        """Return the fields as plain values."""
        return asdict(self)

    @property
    def caption(self) -> str:
        """One line for a plot or a table."""
        gpu = f"{self.gpu}, " if self.gpu else ""
        versions = " ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"{gpu}{self.cpu}, {self.cores} cores, {self.threads} threads; {versions}; "
            f"commit {self.commit}{' (changed)' if self.dirty else ''}; {self.date[:10]}"
        )


def describe() -> Machine:
    """Look at the machine, the installed packages and the checkout."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    # What a run writes is no change of what it runs.
    status = _git("status", "--porcelain", "--", ":/", ":(exclude,glob,top)**/results/**")
    return Machine(
        cpu=_cpu_field("model name") or platform.processor() or platform.machine(),
        cpu_features=tuple(f for f in _FEATURES if f in _cpu_field("flags").split()),
        cores=_cores(),
        threads=torch.get_num_threads(),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        system=f"{platform.system()} {platform.release()}",
        versions=versions,
        commit=_git("rev-parse", "--short=12", "HEAD") or "unknown",
        # Without git nobody knows.
        dirty=status is None or bool(status),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_field(name: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def main() -> None:
    """Print it."""
    for name, value in describe().as_json().items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
