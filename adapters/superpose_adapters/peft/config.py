"""PEFT's adapter_config.json: what of it is understood, and what is refused.

Nothing is understood by default. Every field is either meaningful here, known to change nothing
when an adapter is served, or must hold PEFT's default, because at another value it is another
method. The tables follow `peft.LoraConfig` (0.21) and are kept honest by a test, so that a server
needs no peft.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from superpose_adapters.adapter import AdapterError
from superpose_adapters.strict_json import StrictJsonError, read_object, shorten

# Fields that say how a delta is made from the tensors, and their defaults.
UNDERSTOOD: dict[str, Any] = {
    "peft_type": None,
    "task_type": None,
    "r": 8,
    "lora_alpha": 8,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "target_modules": None,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "bias": "none",
    "base_model_name_or_path": None,
}

# Fields that change nothing of what is served here; any value is accepted and ignored.
IGNORED: dict[str, Any] = {
    "auto_mapping": None,
    "peft_version": None,
    "revision": None,
    "inference_mode": False,
    "lora_dropout": 0.0,
    # How initialisations go about it; init_lora_weights says which one it was, and counts.
    "loftq_config": {},
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
    # Parts of methods whose switches (use_qalora, megatron_config) must be off.
    "qalora_group_size": 16,
    "megatron_core": "megatron.core",
    # Where PEFT computes; it is not even saved.
    "runtime_config": {"ephemeral_gpu_offload": False},
    # Ties what is added to a tied embedding or head, and nothing may be added to those here.
    "ensure_weight_tying": False,
}

# Fields of other trainers that change nothing once an adapter is trained: the learning rates of
# LoRA+ and the dtype of training (ms-swift), whether eval mode merges (PEFT before 0.3), and words.
OF_OTHER_TRAINERS = frozenset(
    {
        "lorap_lr_ratio",
        "lorap_emb_lr",
        "lora_dtype",
        "merge_weights",
        "_name_or_path",
        "_comment",
    }
)

# Other methods. Each must hold its default.
REFUSED: dict[str, Any] = {
    "modules_to_save": None,
    "megatron_config": None,
    "trainable_token_indices": None,
    "use_dora": False,
    "velora_config": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "monteclora_config": None,
    "layer_replication": None,
    "lora_bias": False,
    "target_parameters": None,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
}

# Initialisations that leave the base as it is. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA do not.
PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")

# Tasks whose adapters mean the same on a causal language model as long as nothing but LoRA was
# trained; PEFT's other tasks come with a head of their own.
_OTHER_TASKS = ("SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", "QUESTION_ANS")
_BIASES = ("none", "lora_only", "all")
# Fields of MLX's adapter_config.json.
_MLX_FIELDS = ("lora_parameters", "lora_layers")

_INERT = IGNORED.keys() | OF_OTHER_TRAINERS

# Values by which PEFT says "off"; a field of a later PEFT that holds one changes nothing.
_OFF: tuple[Any, ...] = (None, False, {}, [], "")

# Names and dots; such a pattern is safe to give to `re`.
PLAIN_PATTERN = re.compile(r"(?:\w|\\?\.)+", re.ASCII)
_MAX_ALPHA = 1e6


def _invalid(message: str) -> AdapterError:
    return AdapterError("CONFIG_INVALID", f"adapter_config.json: {message}")


def _unsupported(message: str) -> AdapterError:
    return AdapterError("UNSUPPORTED_FEATURE", f"adapter_config.json: {message}")


@dataclass(frozen=True)
class PeftConfig:
    """The understood fields of a checked config; names and meanings are PEFT's."""

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    bias: str
    task_type: str | None
    base_model_name_or_path: str | None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What of the config an operator should know, a line each."""
        if self.task_type not in _OTHER_TASKS:
            return ()
        return (
            f"task_type is {self.task_type}: it is served on a causal language model all the same",
        )

    @property
    def effect(self) -> dict[str, Any]:
        """The fields that, with the tensors, fix every delta: the config's part of the digest.

        The target fields are not among them: they only select the modules whose tensors the file
        must hold, and the tensors' names say that already.
        """
        return {
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "use_rslora": self.use_rslora,
            # In PEFT the first pattern that matches wins, so the order is part of the effect.
            "rank_pattern": [[key, rank] for key, rank in self.rank_pattern.items()],
            "alpha_pattern": [[key, alpha] for key, alpha in self.alpha_pattern.items()],
        }

    @property
    def summary(self) -> dict[str, object]:
        """The fields that a reader wants to see, as JSON values."""
        target = self.target_modules
        return {
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "use_rslora": self.use_rslora,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "target_modules": target if isinstance(target, str) else list(target),
        }

    def scaling(self, rank: int, alpha: float) -> float:
        """Return alpha / r, or alpha / sqrt(r) with rsLoRA."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def parse_config(text: bytes) -> PeftConfig:
    """Read adapter_config.json.

    Raises:
        AdapterError: CONFIG_INVALID or UNSUPPORTED_FEATURE, naming the field.
    """
    config = _parse_object(text)
    if "peft_type" not in config and any(name in config for name in _MLX_FIELDS):
        raise _unsupported("is MLX's, not PEFT's: convert the folder with superpose-convert")
    if config.get("peft_type") != "LORA":
        raise _unsupported(f"peft_type is {shorten(config.get('peft_type'))}: only LORA is served")
    if config.get("task_type") not in (None, "CAUSAL_LM", *_OTHER_TASKS):
        raise _unsupported(f"task_type is {shorten(config['task_type'])}: only CAUSAL_LM is served")
    _check_init(config.get("init_lora_weights", True))
    for name, value in config.items():
        if name in REFUSED:
            if not _same(value, REFUSED[name]) and not (_is_off(value) and not REFUSED[name]):
                raise _unsupported(
                    f"{name} is {shorten(value)}: only {shorten(REFUSED[name])} is served, "
                    "so train a plain LoRA"
                )
        elif name not in UNDERSTOOD and name not in _INERT and not _is_off(value):
            raise _unsupported(f"field {name[:80]!r} is not known: remove it if it has no effect")
    return _understood({name: config.get(name, UNDERSTOOD[name]) for name in UNDERSTOOD})


def _understood(fields: Mapping[str, Any]) -> PeftConfig:
    target, exclude = fields["target_modules"], fields["exclude_modules"]
    layers, layers_pattern = fields["layers_to_transform"], fields["layers_pattern"]
    # PEFT sets fan_in_fan_out by the type of the module, whatever it says here; so does the layout.
    for name in ("use_rslora", "fan_in_fan_out"):
        if fields[name] is not None and not isinstance(fields[name], bool):
            raise _invalid(f"{name} is {shorten(fields[name])}: use true or false")
    if fields["bias"] not in _BIASES:
        raise _invalid(f"bias is {shorten(fields['bias'])}: use one of {', '.join(_BIASES)}")
    name = fields["base_model_name_or_path"]
    if target is None:
        raise _invalid("target_modules is null: name the adapted modules")
    if isinstance(target, str) and (layers is not None or layers_pattern is not None):
        raise _invalid(
            "layers_to_transform and layers_pattern need target_modules to be a list of names"
        )
    if layers_pattern and layers is None:
        raise _invalid("layers_pattern needs layers_to_transform")
    for pattern in _names("layers_pattern", layers_pattern):
        if not PLAIN_PATTERN.fullmatch(pattern):
            raise _invalid(f"layers_pattern {shorten(pattern)}: use a plain name such as layers")
    return PeftConfig(
        r=_rank("r", fields["r"]),
        lora_alpha=_alpha("lora_alpha", fields["lora_alpha"]),
        use_rslora=bool(fields["use_rslora"]),
        rank_pattern={
            key: _rank(f"rank_pattern of {shorten(key)}", value)
            for key, value in _object("rank_pattern", fields["rank_pattern"])
        },
        alpha_pattern={
            key: _alpha(f"alpha_pattern of {shorten(key)}", value)
            for key, value in _object("alpha_pattern", fields["alpha_pattern"])
        },
        target_modules=target if isinstance(target, str) else _names("target_modules", target),
        exclude_modules=exclude if isinstance(exclude, str) else _names("exclude_modules", exclude),
        layers_to_transform=_layers(layers),
        layers_pattern=_names("layers_pattern", layers_pattern),
        bias=fields["bias"],
        task_type=fields["task_type"],
        base_model_name_or_path=name if isinstance(name, str) else None,
    )


def _check_init(value: Any) -> None:
    # PEFT reads these two in any case.
    known = value.lower() if str(value).lower() in ("gaussian", "mica") else value
    # 1 == True in Python; PEFT tells them apart.
    if not any(known is init or (isinstance(known, str) and known == init) for init in PLAIN_INITS):
        raise _unsupported(
            f"init_lora_weights is {shorten(value)}, which may change the base: convert it with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...), or train with true"
        )


def _parse_object(text: bytes) -> dict[str, Any]:
    try:
        return read_object(text)
    except StrictJsonError as error:
        raise _invalid(f"{error}; save the adapter again") from error


def _same(value: Any, default: Any) -> bool:
    return type(value) is type(default) and value == default


def _is_off(value: Any) -> bool:
    return any(_same(value, off) for off in _OFF)


def _rank(name: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= 2**31:
        raise _invalid(f"{name} is {shorten(value)}: use a whole number above 0")
    return value


def _alpha(name: str, value: Any) -> float:
    # Compared before the conversion: an integer of 400 digits has no float.
    if type(value) not in (int, float) or not -_MAX_ALPHA <= value <= _MAX_ALPHA:
        raise _invalid(
            f"{name} is {shorten(value)}: use a number between -{_MAX_ALPHA:g} and {_MAX_ALPHA:g}"
        )
    return float(value)


def _object(name: str, value: Any) -> Iterable[tuple[str, Any]]:
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise _invalid(f"{name} is {shorten(value)}: use an object of module patterns")
    return value.items()


def _names(name: str, value: Any) -> tuple[str, ...]:
    if value is None or value == "":
        return ()
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(item, str) for item in names):
        raise _invalid(f"{name} is {shorten(value)}: use a list of names")
    return tuple(names)


def _layers(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    layers = [value] if type(value) is int else value
    if not isinstance(layers, list) or not all(type(n) is int and n >= 0 for n in layers):
        raise _invalid(f"layers_to_transform is {shorten(value)}: use a list of layer numbers")
    return tuple(layers)
