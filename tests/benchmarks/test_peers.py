from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.peers import PeerProcess, Settings, pool
from benchmarks.peers.pool import BARE_VARIANTS, VARIANTS, Variant


def variant(name: str) -> Variant:
    return next(variant for variant in VARIANTS if variant.name == name)


@pytest.mark.parametrize("found", [*VARIANTS, *BARE_VARIANTS], ids=lambda found: found.name)
def test_every_variant_is_a_module_that_loads_peers(found: Variant) -> None:
    assert callable(importlib.import_module(f"benchmarks.peers.{found.peer}").load)


def test_names_tell_variants_apart_and_say_who_serves_an_adapter() -> None:
    assert len({found.name for found in VARIANTS}) == len(VARIANTS)
    for found in VARIANTS:
        assert found.adapter == ("LoRA" in found.name or "PEFT" in found.name)


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = Settings(model=tmp_path, adapter=tmp_path)

    def reason(name: str, settings: Settings = settings) -> str | None:
        return PeerProcess(variant(name), settings).unavailable()

    monkeypatch.setenv(pool.PYTHON_VARIABLE, str(tmp_path / "python"))
    assert "run benchmarks/peers/install.sh" in (reason("OpenVINO int8") or "")
    # An environment that is there, without the package.
    monkeypatch.setenv(pool.PYTHON_VARIABLE, sys.executable)
    monkeypatch.setattr(pool, "installed", lambda python, package: package != "openvino_genai")
    assert reason("OpenVINO int8") == "openvino_genai is not installed"
    assert reason("CTranslate2 int8") is None
    monkeypatch.setattr(pool, "installed", lambda python, package: True)
    assert reason("OpenVINO int8 + LoRA", replace(settings, adapter=None)) == "no adapter is given"
    assert "processor only" in (reason("OpenVINO int8", replace(settings, device="cuda")) or "")
    assert reason("OpenVINO int8 + LoRA") is None


def test_an_adapter_is_for_the_variants_that_serve_one(tmp_path: Path) -> None:
    settings = Settings(model=tmp_path, adapter=tmp_path)
    assert PeerProcess(variant("OpenVINO int8"), settings).settings.adapter is None
    served = PeerProcess(variant("OpenVINO int8 + LoRA"), settings).settings
    assert (served.adapter, served.dtype) == (tmp_path, "int8")
