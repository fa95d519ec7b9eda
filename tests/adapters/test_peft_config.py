"""Configs against PEFT itself: the table of fields, and which modules are selected."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from typing import Any

import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.makers import peft_model, tiny_gpt2, tiny_llama

from superpose_adapters.adapter import AdapterError
from superpose_adapters.layout import ModuleLayout, read_layout
from superpose_adapters.peft.config import (
    IGNORED,
    OF_OTHER_TRAINERS,
    REFUSED,
    UNDERSTOOD,
    PeftConfig,
    parse_config,
)
from superpose_adapters.peft.pattern import Budget, Pattern, PatternError
from superpose_adapters.peft.targets import select_modules

GPT2 = read_layout(tiny_gpt2())
LLAMA = read_layout(tiny_llama())


def parse(**fields: Any) -> PeftConfig:
    config = {"peft_type": "LORA", "target_modules": ["c_attn"]} | fields
    return parse_config(json.dumps(config).encode())


def test_the_tables_are_those_of_the_installed_peft() -> None:
    table = UNDERSTOOD | IGNORED | REFUSED
    assert len(table) == len(UNDERSTOOD) + len(IGNORED) + len(REFUSED)
    assert not table.keys() & OF_OTHER_TRAINERS
    for field in dataclasses.fields(peft.LoraConfig):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
            if dataclasses.is_dataclass(default) and not isinstance(default, type):
                default = dataclasses.asdict(default)
        assert field.name in table, f"peft has a new field {field.name}"
        assert table[field.name] == default, field.name


def test_what_peft_writes_by_default_is_accepted() -> None:
    written = peft.LoraConfig(target_modules=["c_attn"], task_type="CAUSAL_LM").to_dict()
    written["target_modules"] = ["c_attn"]
    config = parse_config(json.dumps(written).encode())
    assert config == PeftConfig(
        r=8,
        lora_alpha=8.0,
        use_rslora=False,
        rank_pattern={},
        alpha_pattern={},
        target_modules=("c_attn",),
        exclude_modules=(),
        layers_to_transform=(),
        layers_pattern=(),
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=None,
    )
    assert config.warnings == ()


REFUSED_VALUES: dict[str, Any] = {
    "modules_to_save": ["lm_head"],
    "megatron_config": {"tp": 1},
    "trainable_token_indices": [0],
    "use_dora": True,
    "velora_config": {"num_groups": 1},
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "monteclora_config": {"num_samples": 1},
    "layer_replication": [[0, 1]],
    "lora_bias": True,
    "target_parameters": ["mlp.experts"],
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 1.0},
}


def test_every_refused_field_is_tried() -> None:
    assert REFUSED_VALUES.keys() == REFUSED.keys()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *REFUSED_VALUES.items(),
        ("peft_type", "LOHA"),
        ("task_type", "SEQ_CLS"),
        ("some_new_method", 3),
        ("some_new_switch", True),
        *(
            ("init_lora_weights", init)
            for init in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "Eva", 1)
        ),
    ],
)
def test_other_methods_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(AdapterError, match=field) as caught:
        parse(**{field: value})
    assert caught.value.reason == "UNSUPPORTED_FEATURE"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "init", [True, False, None, "gaussian", "Gaussian", "orthogonal", "eva", "mica", "MiCA"]
)
def test_initialisations_that_leave_the_base_are_accepted(init: Any) -> None:
    assert parse(init_lora_weights=init).r == 8


def test_an_mlx_config_is_refused_with_the_way_out() -> None:
    text = json.dumps({"fine_tune_type": "lora", "lora_parameters": {"rank": 8}}).encode()
    with pytest.raises(AdapterError, match=r"MLX's, not PEFT's.* superpose-convert") as caught:
        parse_config(text)
    assert caught.value.reason == "UNSUPPORTED_FEATURE"


@pytest.mark.parametrize("field", sorted(OF_OTHER_TRAINERS))
def test_fields_of_other_trainers_that_change_nothing_are_accepted(field: str) -> None:
    assert parse(**{field: "anything"}) == parse()
    with pytest.raises(AdapterError, match=f"field '{field}_too' is not known"):
        parse(**{f"{field}_too": "anything"})


@pytest.mark.parametrize("task", ["SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", "QUESTION_ANS"])
def test_another_task_is_accepted_with_a_warning(task: str) -> None:
    (warning,) = parse(task_type=task).warnings
    assert task in warning


def test_a_field_of_a_later_peft_that_is_off_is_accepted() -> None:
    off: dict[str, Any] = {
        "new_a": None,
        "new_b": False,
        "new_c": {},
        "new_d": [],
        "use_dora": None,
    }
    assert parse(**off).r == 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r is 0"),
        ({"r": True}, "r is true"),
        ({"r": 4.0}, "r is 4.0"),
        ({"r": None}, "r is null"),
        ({"lora_alpha": "8"}, 'lora_alpha is "8"'),
        ({"lora_alpha": 1e7}, "lora_alpha is 1"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"lora_alpha": True}, "lora_alpha is true"),
        ({"use_rslora": 1}, "use_rslora is 1"),
        ({"bias": "some"}, 'bias is "some"'),
        ({"bias": None}, "bias is null"),
        ({"fan_in_fan_out": "no"}, "fan_in_fan_out is"),
        ({"rank_pattern": [1]}, "rank_pattern is"),
        ({"rank_pattern": {"c_attn": 0}}, "rank_pattern of"),
        ({"alpha_pattern": {"c_attn": "1"}}, "alpha_pattern of"),
        ({"target_modules": None}, "target_modules is null"),
        ({"target_modules": [1]}, "target_modules is"),
        ({"target_modules": 3}, "target_modules is 3"),
        ({"exclude_modules": {"a": 1}}, "exclude_modules is"),
        ({"layers_to_transform": [-1]}, "layers_to_transform is"),
        ({"layers_to_transform": [True]}, "layers_to_transform is"),
        ({"layers_pattern": "h"}, "layers_pattern needs"),
        ({"layers_to_transform": 0, "layers_pattern": "(.*)*"}, "layers_pattern "),
        ({"target_modules": ".*", "layers_to_transform": 0}, "need target_modules to be a list"),
    ],
)
def test_bad_values_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=re.escape(message)) as caught:
        parse(**fields)
    assert caught.value.reason == "CONFIG_INVALID"
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a":' * 100_000, "is not JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"r": 4, "r": 8}', 'names "r" twice'),
        (b'{"rank_pattern": {"a": 1, "a": 2}}', 'names "a" twice'),
        (b'{"lora_alpha": NaN}', "holds NaN"),
        (b'{"lora_alpha": -Infinity}', "holds -Infinity"),
        (b'{"lora_alpha": ' + b"9" * 10_000 + b"}", "is not JSON"),
        (b'{"peft_type": "LORA", "target_modules": ["x"], "lora_alpha": 1e999}', "lora_alpha is"),
    ],
)
def test_bad_json_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(AdapterError, match=re.escape(message)) as caught:
        parse_config(text)
    assert caught.value.reason == "CONFIG_INVALID"


FEATURES: dict[str, tuple[str, dict[str, Any]]] = {
    "suffixes": ("gpt2", {"target_modules": ["attn.c_proj", "c_fc"]}),
    "whole name": ("gpt2", {"target_modules": ["transformer.h.1.attn.c_attn"]}),
    "part of a name is no suffix": ("gpt2", {"target_modules": ["_attn", "proj", "c_fc"]}),
    "regex": ("gpt2", {"target_modules": r".*\.h\.[01]\.(attn|mlp)\.c_(proj|fc)"}),
    "regex with lookahead": ("llama", {"target_modules": r"^(?!.*mlp).*_proj"}),
    "all-linear": ("gpt2", {"target_modules": "all-linear"}),
    "all-linear, head untied": ("llama", {"target_modules": "All-Linear"}),
    "untied head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "exclude list": (
        "llama",
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["0.self_attn.q_proj"]},
    ),
    "exclude regex": (
        "llama",
        {"target_modules": "all-linear", "exclude_modules": r".*\.(mlp|1)\..*"},
    ),
    "one layer": ("gpt2", {"layers_to_transform": 1}),
    "no layer named means all": ("gpt2", {"layers_to_transform": []}),
    "layers and pattern": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj"],
            "layers_to_transform": [0],
            "layers_pattern": "layers",
        },
    ),
    "layers and patterns": (
        "gpt2",
        {"layers_to_transform": [1], "layers_pattern": ["layers", "h"]},
    ),
    "whole name in another layer": (
        "gpt2",
        {"target_modules": ["transformer.h.0.mlp.c_fc", "c_attn"], "layers_to_transform": [1]},
    ),
    "rsLoRA": ("gpt2", {"use_rslora": True, "r": 9}),
    "rank and alpha by suffix": (
        "gpt2",
        {
            "target_modules": ["c_attn", "c_proj"],
            "rank_pattern": {"c_proj": 2, "mlp.c_proj": 3},
            "alpha_pattern": {"mlp.c_proj": 5},
        },
    ),
    "rank and alpha by regex": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {r"layers\.0\..*": 2, "^model.*v_proj": 6},
            "alpha_pattern": {"[qk]_proj": 32, ".*": 3},
        },
    ),
    "pattern must end the name": ("gpt2", {"rank_pattern": {"attn": 2, "_attn": 3, "c": 7}}),
    "alternatives in a pattern": (
        "gpt2",
        {"target_modules": ["c_attn", "c_proj"], "rank_pattern": {"attn.c_proj|c_attn": 2}},
    ),
    "rsLoRA with patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "down_proj"],
            "use_rslora": True,
            "rank_pattern": {"down_proj": 16},
            "alpha_pattern": {"q_proj": 1},
        },
    ),
    "negative alpha": ("gpt2", {"lora_alpha": -4}),
}


@pytest.mark.parametrize(("family", "fields"), FEATURES.values(), ids=FEATURES)
def test_modules_ranks_and_scalings_are_those_of_peft(family: str, fields: dict[str, Any]) -> None:
    config = parse(**fields)
    model = tiny_gpt2() if family == "gpt2" else tiny_llama()
    found = select_modules(config, GPT2 if family == "gpt2" else LLAMA)
    reference: dict[str, Any] = {"r": 8, "target_modules": ["c_attn"]} | fields
    wrapped = peft_model(model, **reference)
    expected = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in wrapped.named_modules()
        if hasattr(module, "lora_A")
    }
    assert expected
    assert {m: (r, config.scaling(r, alpha)) for m, (r, alpha) in found.items()} == expected


def test_a_tied_head_is_refused() -> None:
    with pytest.raises(AdapterError, match="module lm_head shares its parameter") as caught:
        select_modules(parse(target_modules=["c_attn", "lm_head"]), GPT2)
    assert caught.value.reason == "TIED_PARAMETER"


@pytest.mark.parametrize("target", [["q_proj"], "nothing", [], "", ["attn"], ["wte"]])
def test_a_selection_of_nothing_is_refused(target: Any) -> None:
    with pytest.raises(AdapterError, match="select no Linear or Conv1D module") as caught:
        select_modules(parse(target_modules=target), GPT2)
    assert caught.value.reason == "TARGET_NOT_FOUND"


@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"]
)
@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "not a valid regular expression"),
        (r"(?P<a>c)(?P=b)", "not a valid regular expression"),
        ("[c", "not a valid regular expression"),
        ("a" * 5000 + "*", "characters long"),
        ("(" * 2000 + "a" + ")" * 2000, "not a valid regular expression|nested too deeply"),
    ],
)
def test_bad_patterns_are_refused_by_field(field: str, pattern: str, message: str) -> None:
    value = {pattern: 4} if field.endswith("pattern") else pattern
    with pytest.raises(AdapterError, match=rf"{field} .*({message})") as caught:
        select_modules(parse(**{field: value}), GPT2)
    assert caught.value.reason == "CONFIG_INVALID"


HOSTILE = [
    r"(.*)*x",
    r"((a|.)*)*x",
    r"(.?){40}(.?){40}x",
    r".*.*.*.*.*.*.*.*x",
    r"(?:(?:.{0,60}){0,60}){0,60}x",
    r"(?!(.*)*x)(.*)*y",
    r"(?:.|..)*[^\w.]",
]


@pytest.mark.parametrize("pattern", HOSTILE)
def test_hostile_patterns_end_soon(pattern: str) -> None:
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(20) for p in "qkvo"]
    layout = {name: ModuleLayout(4, 4, False) for name in names}
    began = time.perf_counter()
    with pytest.raises(AdapterError, match=r"select no|takes too long"):
        select_modules(parse(target_modules=pattern), layout)
    assert time.perf_counter() - began < 30


def test_a_pattern_that_would_take_too_long_is_stopped() -> None:
    with pytest.raises(PatternError, match="takes too long"):
        Pattern("(?:a|aa)*[^a]", Budget(seconds=0.01)).matches("a" * 60, full=True)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(
    "pattern",
    [r"\bab\b", r"a\Bb", "^a$", "[^a]b*?", r"\w+?\.\d{2,}", "(?:a|)+b", r"a(?=b).*", "a{0}b",
     r"\Aab?\Z", r"(.)\1", "(?i:A)b", "(?<=a)b", "a(?<=a)b",
     "[a-c._]+", r"[^\W\d]+", "(a)|(b)$", "a|b|", "(?!b).", "x*", r"\D\S\s?"],
)  # fmt: skip
def test_patterns_mean_what_they_mean_to_re(pattern: str, full: bool) -> None:
    for text in ["", "a", "b", "ab", "aab", "a.b", "ab.c", "a_b", "abc.12", "b1", "ba ", "a\n"]:
        reference = re.fullmatch if full else re.match
        found = Pattern(pattern, Budget()).matches(text, full=full)
        assert found == bool(reference(pattern, text)), text


atoms = st.sampled_from(["a", "b", ".", "[ab]", "[^a]", r"\w", r"\.", r"\b", "^", "$", "(?=a)"])
patterns = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda p: f"(?:{p[0]}|{p[1]})"),
        st.tuples(inner, st.sampled_from(["?", "*?", "{1,2}", "{2}"])).map(
            lambda p: f"(?:{p[0]}){p[1]}"
        ),
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(patterns, st.text(alphabet="ab._", max_size=6), st.booleans())
def test_random_patterns_mean_what_they_mean_to_re(pattern: str, text: str, full: bool) -> None:
    reference = re.fullmatch if full else re.match
    found = Pattern(pattern, Budget()).matches(text, full=full)
    assert found == bool(reference(pattern, text))
