"""Every family of `docs/families.md` is served, or refused, as that table says; nothing is wrong.

The table is what is expected; `tests/families.py` measures. Served models are right to float32's
rounding in every respect, with the CPU kernels where there is a compiler.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from tests.families import BEGIN, END, README, measure, summary, table
from tests.zoo import UNBUILT, ZOO
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

pytestmark = pytest.mark.long

TABLE = table()
KERNELS = shutil.which("c++") is not None or shutil.which("g++") is not None
# The largest difference of a logit from float64, as a share of the logits' spread.
TOLERANCE = 1e-4
# Served models between which all that the kernels do differs; without kernels they take the others'
# way, and compiled they are one graph.
WITHOUT_KERNELS = ("gpt2", "mistral", "gemma2", "gpt_oss", "qwen2/window", "phi3/longrope")
COMPILED = ("gemma2", "gpt_oss")


def check(name: str, folder: Path, *, kernels: bool = KERNELS, graphs: bool = False) -> None:
    outcome = measure(name, folder, kernels=kernels, graphs=graphs)
    assert outcome.verdict == TABLE[name].verdict
    for what, distance in outcome.worst.items():
        assert distance <= TOLERANCE, what


def test_the_table_has_every_model_type_that_can_be_built() -> None:
    assert list(TABLE) == list(ZOO)
    types = {specimen.model_type for specimen in ZOO.values()}
    assert types | set(UNBUILT) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def test_every_published_figure_is_rounding() -> None:
    for name, outcome in TABLE.items():
        assert all(distance <= TOLERANCE for distance in outcome.worst.values()), name


def test_refusals_name_no_flag_and_no_file_that_is_not_there() -> None:
    for outcome in TABLE.values():
        assert not re.search(r"trust_remote_code|/tmp|Traceback|FAILED", outcome.verdict)


def test_the_readme_sums_up_the_table() -> None:
    _, _, after = README.read_text().partition(BEGIN)
    assert after.partition(END)[0] == summary(TABLE)


# In classes, since tests of a class share a worker: a quarter of the zoo each.
@pytest.mark.parametrize("name", list(ZOO)[0::4])
class TestFirst:
    def test_as_the_table_says(self, name: str, tmp_path: Path) -> None:
        check(name, tmp_path)


@pytest.mark.parametrize("name", list(ZOO)[1::4])
class TestSecond:
    def test_as_the_table_says(self, name: str, tmp_path: Path) -> None:
        check(name, tmp_path)


@pytest.mark.parametrize("name", list(ZOO)[2::4])
class TestThird:
    def test_as_the_table_says(self, name: str, tmp_path: Path) -> None:
        check(name, tmp_path)


@pytest.mark.parametrize("name", list(ZOO)[3::4])
class TestFourth:
    def test_as_the_table_says(self, name: str, tmp_path: Path) -> None:
        check(name, tmp_path)


@pytest.mark.parametrize("name", WITHOUT_KERNELS)
def test_without_kernels_too(name: str, tmp_path: Path) -> None:
    check(name, tmp_path, kernels=False)


@pytest.mark.skipif(not KERNELS, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_too(name: str, tmp_path: Path) -> None:
    # Dynamo looks at another base with the guards of the one before, and may stumble over them.
    torch.compiler.reset()
    check(name, tmp_path, graphs=True)
