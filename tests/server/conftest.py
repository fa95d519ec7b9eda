from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings
from tests.makers import save_base, tiny_gpt2, tiny_llama
from tests.server.helpers import NEEDS_COMPILER

# The machine that runs the tests is shared: a slow example is no failure. Derandomized, so that a
# red run can be repeated.
settings.register_profile("server", deadline=None, max_examples=12, derandomize=True)
settings.load_profile("server")


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoint folders of the tiny GPT-2 and the tiny Llama, by family."""
    root = tmp_path_factory.mktemp("bases")
    return {
        "gpt2": save_base(tiny_gpt2(), root / "gpt2"),
        "llama": save_base(tiny_llama(), root / "llama"),
    }


# Not a fixture of each test, which hypothesis would not reset between examples.
@pytest.fixture(scope="module", params=["torch", pytest.param("kernels", marks=NEEDS_COMPILER)])
def kernels(request: pytest.FixtureRequest) -> bool:
    """False, and then True: without the CPU kernels and with them."""
    return bool(request.param == "kernels")


@pytest.fixture(params=["gpt2", "llama"])
def base(request: pytest.FixtureRequest, bases: dict[str, Path]) -> Path:
    """Each base in turn."""
    return bases[str(request.param)]
