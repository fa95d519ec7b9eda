"""Which kinds of base are served, told from config.json and the class before a weight is read.

Each function returns why a base is not served, in words that follow `base FOLDER`, or None.
"""

from __future__ import annotations

import re
from typing import Any

import transformers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    DynamicCache,
)

from superpose_adapters.one_line import with_kind

_QUANTISED = ("quantization_config", "compression_config")
_OTHER_INPUTS = re.compile("vision|image|audio|speech|video|vq")
# Layers that keep keys and values and nothing else, or nothing at all.
_KEY_VALUE_LAYERS = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}
_CROSS_ATTENTION = re.compile("cross|encoder_attn")
_ANOTHER = "use a text-only decoder such as GPT-2 or Llama"


def refuse_settings(settings: dict[str, Any]) -> str | None:
    """Judge what config.json says of itself, before transformers makes anything of it."""
    method = _quantised_by(settings)
    if method is not None:
        return (
            f"is quantised ({method}): only unquantised checkpoints will do, in float32, "
            "bfloat16 or float16; save a dequantised checkpoint and serve that"
        )
    if settings.get("transformers_weights") is not None:
        return (
            "names other files than model.safetensors as its weights (transformers_weights in "
            "config.json): rename them and remove that line"
        )
    auto_map = settings.get("auto_map")
    if auto_map is not None and not isinstance(auto_map, dict):
        return "has an auto_map in config.json that is no JSON object: remove it or copy it again"
    model_type = settings.get("model_type")
    if not isinstance(model_type, str):
        return "names no model_type in config.json: save the model with transformers' own class"
    if model_type in CONFIG_MAPPING:
        return None
    known = f"which transformers {transformers.__version__} does not know"
    if auto_map:
        return (
            f"is of model type {model_type!r}, {known}, and needs code of its own (auto_map), "
            "which is never run: use a base that transformers has a class for"
        )
    return (
        f"is of model type {model_type!r}, {known}: upgrade transformers if a newer one does, or "
        "use another base"
    )


def _quantised_by(settings: dict[str, Any]) -> str | None:
    """Return the method of a quantisation that config.json names at any depth."""
    for key in _QUANTISED:
        found = settings.get(key)
        if found is not None:
            method = found.get("quant_method") if isinstance(found, dict) else None
            return str(method or key)
    nested = (_quantised_by(value) for value in settings.values() if isinstance(value, dict))
    return next((method for method in nested if method is not None), None)


def refuse_config(config: Any) -> str | None:
    """Judge a transformers config by the kind of model that it describes."""
    if getattr(config, "is_encoder_decoder", False) or getattr(
        config, "add_cross_attention", False
    ):
        return f"is an encoder-decoder ({config.model_type}) or a part of one: {_ANOTHER}"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return (
            f"is of model type {config.model_type!r}, for which transformers "
            f"{transformers.__version__} has no causal language model: {_ANOTHER}"
        )
    others = [
        name
        for name in type(config).sub_configs
        if _OTHER_INPUTS.search(name) and getattr(config, name, None) is not None
    ]
    if config.get_text_config() is not config:
        others = others or ["text_config"]
    if others:
        return (
            f"takes more than text ({', '.join(others)} in config.json): save its language model "
            "as a checkpoint of its own, or use a text-only base"
        )
    return None


def refuse_class(config: Any, module: nn.Module) -> str | None:
    """Judge the class that transformers would load, built without weights."""
    name = type(module).__name__
    try:
        # Not every class with another state says so, but transformers' cache knows each layer.
        layers = DynamicCache(config=config).layers
    except Exception as error:
        return (
            f"has layers that transformers has no cache for ({name}, {with_kind(error)}): correct "
            f"its config.json, or {_ANOTHER}"
        )
    state = sorted({type(layer).__name__ for layer in layers} - _KEY_VALUE_LAYERS)
    if state or getattr(module, "_is_stateful", False):
        kept = ", ".join(state) or "recurrent"
        return f"keeps a state that is no key-value cache ({name}: {kept}): {_ANOTHER}"
    if _sees_later_tokens(config, module):
        return (
            f"is no causal language model: its tokens see later ones ({name}, as config.json sets "
            f"it): {_ANOTHER}"
        )
    return _other_class(config, module)


def _sees_later_tokens(config: Any, module: nn.Module) -> bool:
    """Tell whether a token's logits depend on the tokens behind it."""
    if not getattr(config, "is_causal", True) or getattr(config, "attn_type", None) == "bi":
        return True
    # Some families of masked language models serve as decoders too, if config.json says so.
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING
    if masked and not getattr(config, "is_decoder", False) and not getattr(config, "causal", False):
        return True
    return any(
        getattr(part, "is_causal", True) is False
        for name, part in module.named_modules()
        if not _CROSS_ATTENTION.search(name)
    )


def _other_class(config: Any, module: nn.Module) -> str | None:
    """Refuse a checkpoint of another class, whose parameters may fit and mean something else."""
    name = type(module).__name__
    saved = config.architectures
    saved = saved[0] if isinstance(saved, list) and saved else saved or None
    # Some model types have no class of their own, and transformers names whose they use.
    borrowed = getattr(module, "config_class", None) is not type(config)
    if saved == name or (borrowed and str(saved).endswith("ForCausalLM")):
        return None
    if getattr(config, "auto_map", None):
        return (
            f"names {saved or 'no class'} in config.json and code of its own (auto_map), which is "
            f"never run; transformers' own class is {name}: use a checkpoint that was saved as that"
        )
    if saved is None:
        return None
    return (
        f"was saved as {saved} (architectures in config.json), and only a {name} is served: save "
        f"it as one, or name {name} there if that is what it is"
    )
