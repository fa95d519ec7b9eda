"""What every test needs: no network, and examples that may take their time on a busy machine."""

from __future__ import annotations

import os

# Read when torch and transformers are imported, and handed on to the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
# A process that a test starts forks while gRPC's threads run here; gRPC's own handling of forks can
# then abort the child before it becomes another program.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
# Threads only wait for one another on matrices as small as most here, and the other cores have
# tests of their own to run.
os.environ["OMP_NUM_THREADS"] = "1"
for name in ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy"):
    os.environ.pop(name, None)
    os.environ.pop(name.upper(), None)
# A developer's own settings must not reach the servers under test.
for name in [name for name in os.environ if name.startswith("SUPERPOSE_")]:
    del os.environ[name]

import pytest  # noqa: E402  # after the environment is set
from hypothesis import settings  # noqa: E402

settings.register_profile("superpose", deadline=None)
settings.load_profile("superpose")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take long, lest one of them runs alone at the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
