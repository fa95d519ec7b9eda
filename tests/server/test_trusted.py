"""Which kinds of base need no second check: a kind is all that the outcome depends on."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.makers import tiny_gpt2, tiny_llama
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    Gemma3Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from superpose_server.engine import trusted
from superpose_server.engine.trusted import Kind
from superpose_server.model.kernels.family import FAMILIES

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, which is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def kind(
    config: Any = None,
    model_class: Any = LlamaForCausalLM,
    device: torch.device = CPU,
    *,
    kernels: bool = True,
) -> Kind:
    return Kind(model_class, config or tiny_llama().config, device, kernels=kernels)


def test_a_kind_is_trusted_once_it_passed(folder: Path) -> None:
    one = kind()
    assert not one.trusted
    assert not folder.exists()  # to ask leaves nothing behind
    one.trust()
    assert one.trusted
    assert kind().trusted
    one.trust()  # again
    assert [path.name for path in (folder / "superpose" / "trusted").iterdir()] == [one.digest]


def test_what_changes_the_outcome_is_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    one = kind()
    one.trust()
    others = [
        kind(LlamaConfig(**(tiny_llama().config.to_dict() | {"rms_norm_eps": 1e-5}))),
        kind(tiny_llama(n_positions=65).config),
        kind(tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 9e3}).config),
        kind(model_class=GPT2LMHeadModel),
        kind(device=torch.device("cuda")),
        kind(kernels=False),
    ]
    for place, name, other in [
        (trusted, "_our_code", lambda: "other code"),
        (trusted, "version", lambda package: "0" if package == "torch" else version(package)),
        (
            trusted,
            "version",
            lambda package: "0" if package == "transformers" else version(package),
        ),
        (torch.backends.cpu, "get_cpu_capability", lambda: "another processor"),
        (trusted, "families", lambda: FAMILIES[-1:]),
    ]:
        with monkeypatch.context() as changed:
            changed.setattr(place, name, other)
            others.append(kind())
    assert one.trusted
    assert not any(other.trusted for other in others)
    assert len({other.digest for other in others}) == len(others)


def test_what_a_configuration_says_of_files_does_not_matter() -> None:
    one = kind()
    config = LlamaConfig(**tiny_llama().config.to_dict())
    config._name_or_path = "/another/folder"
    config.architectures = ["LlamaForCausalLM"]
    config.transformers_version = "4.0.0"
    config.dtype = torch.bfloat16
    assert kind(config).digest == one.digest
    # Nor in which order it says it.
    fields = dict(reversed(tiny_llama().config.to_dict().items()))
    assert kind(LlamaConfig(**fields)).digest == one.digest


def test_the_attention_that_a_base_was_loaded_with_does_not_matter() -> None:
    """It is served with another one anyway."""
    digests = set()
    for attention in ("eager", "sdpa"):
        config = tiny_llama().config
        config._attn_implementation = attention
        digests.add(kind(config).digest)
    assert len(digests) == 1


def test_a_configuration_inside_another_counts() -> None:
    text = {"hidden_size": 32, "num_hidden_layers": 2, "sliding_window": 8}
    one = Gemma3Config(text_config=text)
    other = Gemma3Config(text_config=text | {"sliding_window": 9})
    assert kind(one).digest == kind(Gemma3Config(text_config=text)).digest
    assert kind(one).digest != kind(other).digest


def test_no_configuration_holds_what_another_process_would_spell_otherwise() -> None:
    """Such as a set, whose order is the process's, or an object that shows its address."""
    seen = 0
    for config_class in MODEL_FOR_CAUSAL_LM_MAPPING:
        try:
            fields = config_class().to_dict()
        except Exception:  # It has no defaults that fit each other.
            continue
        assert spelt_alike(fields), config_class
        seen += 1
    assert seen > 100


def spelt_alike(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str | int) and spelt_alike(x) for key, x in value.items())
    if isinstance(value, list | tuple):
        return all(map(spelt_alike, value))
    return isinstance(value, str | int | float | None)


def test_our_code_is_all_that_a_pass_runs_through(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {path.name for path in trusted._sources()}
    assert {"survey.py", "attention.py", "kernels.cpp", "linear.h", "layout.py"} <= names
    sources = sorted(trusted._sources())
    digests = {trusted._our_code()}
    for chosen in (sources, sources[1:], sources[:-1]):
        with monkeypatch.context() as changed:
            changed.setattr(trusted, "_sources", lambda c=chosen: iter(c))
            digests.add(trusted._our_code.__wrapped__())
    assert len(digests) == 3


def test_a_cache_folder_that_cannot_be_written_is_no_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.write_text("a file is in the way")
    one = kind()
    one.trust()
    assert not one.trusted
    # Root may write anywhere, so what the system would say is said for it.
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "other"))

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("no")

    monkeypatch.setattr(Path, "mkdir", refuse)
    one.trust()
    assert not one.trusted


def test_no_home_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless() -> Path:
        raise RuntimeError("could not determine home directory")

    monkeypatch.setattr(Path, "home", homeless)
    one = kind(tiny_gpt2().config, GPT2LMHeadModel)
    one.trust()
    assert not one.trusted
