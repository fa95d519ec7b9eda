"""Small random twins of a base, on which what a pass means can be checked in a moment.

A twin is of the base's own class and has its configuration, but for sizes: few layers of each kind,
few heads, experts and words, narrow matrices, windows of a few tokens. What a pass does with them
(scales, caps, biases, norms, rotations, masks) stays as it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from superpose_adapters.one_line import with_kind
from superpose_server.model.attention import own_attention

WINDOW = 6
"""Tokens: what attention windows and chunks are shrunk to."""
SWITCH = 12
"""Tokens: what lengths are shrunk to beyond which a pass computes otherwise."""

_VOCABULARY = 199
_MOST_POSITIONS = 128
_HIDDEN, _WIDEST = 128, 2
_MOST_LAYERS = 8
_MOST_PARAMETERS = 200_000_000
_TRIAL = 8
# The deviation of a matrix's outputs, how many times that where attention is capped, and that of
# other values about those that the class gives them: attention is uneven, and what it reads shows.
_GAIN, _CAPPED, _JITTER = 1.4, 1.5, 0.2

# How wide the matrices are, in the order of trying.
_NARROW, _IN_PROPORTION, _AS_BEFORE = range(3)

# The words that the fields of transformers' configurations have in common, by what they size.
_LAYERS = r"num_(hidden_)?layers(_per_stack)?|n_layers?|(de|en)coder_layers"
_LAYER_INDICES = r".*(layers|layer_ids|layer_indices|idxs)"
_FIRST_LAYERS = r"first_k_dense.*|num_dense_layers|.*layer_(start|end)_index|max_window_layers"
_LAST_LAYERS = r".*_shared_layers"
_KEY_HEADS = r".*(key_value|kv).*heads?|n_head_kv|num_query_groups"
_HEAD_WIDTH = r".*head_?dim|.*head_size|d_head|dim_head|kv_channels"
_POSITIONS = r"max_position_embeddings|n_positions|n_ctx|.*max_seq(uence)?_len.*|.*max_length"
_WIDTH = (
    r".*(hidden|intermediate|ffn|emb|d_model|inner|rank|latent|proj|feed_forward).*"
    r"|d_?ff|dim_ff|lru_width"
)
# The most of other things. Of experts more than are picked, of which more than one.
_MOST = {
    r".*(sparse_step|_period|_interval|_pattern|every_n_layers)|n_layers_per_.*": 2,
    r".*vocab.*": _VOCABULARY,
    r"floor_scale|.*n_floor": SWITCH,
    r".*window(_size|_len)?|attention_chunk_size|index_topk": WINDOW,
    r"topk_group": 1,
    r"n_group|num_expert_groups?": 2,
    r".*experts?_per_tok(en)?|.*top_?k(_experts)?|moe_k": 2,
    r".*experts|zero_expert_num": 4,
}
_ROPE_TYPE = r"rope_type|type"
# Where a configuration keeps what differs between its layers.
_DIFFERENT = "_heterogeneity_spec"


class MiniatureError(ValueError):
    """No small twin of a base can be made."""


def miniature(config: PreTrainedConfig, widths: int = _NARROW) -> PreTrainedConfig:
    """Return the configuration of a small twin, of the narrowest kind unless told otherwise."""
    small = deepcopy(config)
    _shrink(small, _Sizes.of(small, widths))
    return small


def make_miniature(
    model_class: type[nn.Module], config: PreTrainedConfig, seed: int = 0
) -> nn.Module:
    """Return a small twin in float32 that attends by its own code, with random values.

    Args:
        model_class: A causal language model of transformers.
        config: The base's. Neither it nor the state of torch's own generators changes.
        seed: Of the values.

    Raises:
        MiniatureError: The class takes none of the smaller configurations.
    """
    reasons = []
    for widths in (_NARROW, _IN_PROPORTION, _AS_BEFORE):
        try:
            return _build(model_class, miniature(config, widths), seed)
        # A class says in any way that it cannot have sizes that it was never meant for.
        except Exception as error:
            reasons.append(with_kind(error))
    raise MiniatureError(f"no small twin of {model_class.__name__} can be made: {reasons[0]}")


@dataclass(frozen=True)
class _Sizes:
    """What a configuration, and those inside it without layers of their own, are shrunk to.

    Attributes:
        hidden: The width of what runs through the layers, before and after.
        heads: Of queries, before and after.
        positions: None: as many as before, since rotations depend on their number.
        switches: True if rotations depend on whether a text is longer than those trained on.
        widths: How narrow those inside with layers of their own get.
    """

    hidden: tuple[int, int]
    heads: tuple[int, int]
    positions: int | None
    switches: bool
    widths: int

    @classmethod
    def of(cls, config: PreTrainedConfig, widths: int) -> _Sizes:
        fields = list(_fields(config))
        hidden = _number(config, "hidden_size")
        heads = _number(config, "num_attention_heads") or 1
        grouped = any(
            re.fullmatch(_KEY_HEADS, name) and isinstance(value, int) and 1 < value < heads
            for name, value in fields
        )
        few = min(heads, (4 if grouped else 2) * (1 if widths == _NARROW else 2))
        narrow = hidden
        if widths == _NARROW:
            # Where nothing else gives it, the width of a head is hidden / heads.
            free = any(re.fullmatch(_HEAD_WIDTH, name) for name, _ in fields)
            narrow = min(hidden, _HIDDEN) if free else hidden // heads * few
        elif widths == _IN_PROPORTION:
            narrow = hidden // heads * few
        else:
            few = heads
        ropes = {value for name, value in fields if re.fullmatch(_ROPE_TYPE, name)}
        return cls(
            (hidden, narrow),
            (heads, few),
            None if ropes & {"dynamic", "yarn", "longrope"} else _MOST_POSITIONS,
            "longrope" in ropes,
            widths,
        )

    def width(self, width: int) -> int:
        """Return a width in about the same proportion to hidden as before, within limits."""
        before, after = self.hidden
        if before == after or width < 16:
            return width
        if width == before:
            return after
        return max(16, (min(width, _WIDEST * before) * after // before + 7) // 8 * 8)

    def of_field(self, name: str, value: int) -> int | None:
        """Return what the integer `value` of the field `name` is shrunk to."""
        if re.fullmatch(_HEAD_WIDTH + r"|.*rotary.*", name):
            return value
        if re.fullmatch(r".*token_(id|index)", name):
            # From the end, so that different ones mostly stay different.
            return value if value < _VOCABULARY else _VOCABULARY - 1 - value % 16
        if name == "original_max_position_embeddings":
            return min(value, SWITCH) if self.switches else value
        if re.fullmatch(_POSITIONS, name):
            return min(value, self.positions or value)
        if re.fullmatch(_KEY_HEADS, name):
            before, after = self.heads
            return after if value >= before else min(value, 2 if after < before else value)
        if re.fullmatch(r".*heads?(_per_layer)?", name):
            return min(value, self.heads[1])
        for pattern, most in _MOST.items():
            if re.fullmatch(pattern, name):
                return min(value, most)
        return self.width(value) if re.fullmatch(_WIDTH, name) else value


def _number(config: PreTrainedConfig, name: str) -> int:
    """Return a field by its usual name, 0 if there is none; the greatest of a list."""
    # Not by getattr, which some configurations refuse for what differs between layers.
    value = vars(config).get(config.attribute_map.get(name, name)) or 0
    return max(value) if isinstance(value, list) else int(value)


def _fields(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the names and values of all fields, at any depth."""
    inside = vars(value) if isinstance(value, PreTrainedConfig) else value
    if isinstance(inside, dict):
        for key, field in inside.items():
            yield from _fields(field, str(key))
    elif isinstance(value, str | int | float):
        yield name, value


def _shrink(config: PreTrainedConfig, sizes: _Sizes) -> None:
    """Change all fields in place, past the checks that whole configurations pass when made."""
    fields = vars(config)
    _drop_layers(config)
    if (different := fields.get(_DIFFERENT)) is not None:
        different.per_layer_overrides = _shrunk("", different.per_layer_overrides, sizes)
    for name, value in fields.items():
        fields[name] = _shrunk(name, value, sizes)


def _shrunk(name: str, value: Any, sizes: _Sizes) -> Any:
    if isinstance(value, PreTrainedConfig):
        own = _number(value, "num_hidden_layers") and _number(value, "num_attention_heads")
        _shrink(value, _Sizes.of(value, sizes.widths) if own else sizes)
    elif isinstance(value, dict):
        return {key: _shrunk(str(key), field, sizes) for key, field in value.items()}
    elif isinstance(value, list):
        return [_shrunk(name, item, sizes) for item in value]
    elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return sizes.of_field(name, value)
    return value


def _drop_layers(config: PreTrainedConfig) -> None:
    """Keep the first and the last layer of each kind, and all that is said about them."""
    fields = vars(config)
    counts = {
        name: value
        for name, value in fields.items()
        if isinstance(value, int) and re.fullmatch(_LAYERS, name)
    }
    count = max(counts.values(), default=0)
    if count <= 2:
        return
    marks = {name: _marks(name, value, count) for name, value in fields.items()}
    overrides = getattr(fields.get(_DIFFERENT), "per_layer_overrides", {})
    kinds = [
        repr([overrides.get(layer), *(mark[layer] for mark in marks.values() if mark)])
        for layer in range(count)
    ]
    firsts = {kinds.index(kind) for kind in kinds}
    keep = sorted(firsts | {count - 1 - kinds[::-1].index(kind) for kind in kinds})
    if len(keep) > _MOST_LAYERS:
        keep = sorted(firsts)[:_MOST_LAYERS]
    for name, mark in marks.items():
        if mark is not None:
            kept = [mark[layer] for layer in keep]
            if isinstance(fields[name], int):
                fields[name] = sum(kept)
            elif mark == fields[name]:
                fields[name] = kept
            else:
                fields[name] = [i for i, marked in enumerate(kept) if marked]
    if overrides:
        fields[_DIFFERENT].per_layer_overrides = {
            i: overrides[layer] for i, layer in enumerate(keep) if layer in overrides
        }
    fields |= {name: max(1, value * len(keep) // count) for name, value in counts.items()}


def _marks(name: str, value: Any, count: int) -> list[Any] | None:
    """Return what a field says about each layer; None if it is not about layers."""
    layers = range(count)
    if isinstance(value, list):
        if re.fullmatch(_LAYER_INDICES, name) and value == [i for i in layers if i in value]:
            return [layer in value for layer in layers]
        return value if len(value) == count else None
    if isinstance(value, int) and re.fullmatch(_FIRST_LAYERS, name):
        return [layer < value for layer in layers]
    if isinstance(value, int) and re.fullmatch(_LAST_LAYERS, name):
        return [layer >= count - value for layer in layers]
    return None


@torch.no_grad()
def _build(model_class: Any, config: PreTrainedConfig, seed: int) -> nn.Module:
    # Some classes draw numbers even then.
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which seeds GPUs too.
        torch.default_generator.manual_seed(seed)
        attention = own_attention(model_class)
        with torch.device("meta"):
            sketch = model_class._from_config(deepcopy(config), attn_implementation=attention)
        size = sum(parameter.numel() for parameter in sketch.parameters())
        if size > _MOST_PARAMETERS:
            raise MiniatureError(f"{size} parameters are too many")
        module: Any = model_class._from_config(
            config, dtype=torch.float32, attn_implementation=attention
        )
        module.eval().requires_grad_(False)
        _randomise(module, torch.Generator().manual_seed(seed))
        trial = torch.arange(_TRIAL)[None] % len(module.get_input_embeddings().weight)
        logits = module(input_ids=trial, use_cache=False).logits
    deviation = float(logits.std())
    if not 0 < deviation < math.inf:
        raise MiniatureError("its logits are not finite, or all the same")
    return cast(nn.Module, module)


def _randomise(module: Any, generator: torch.Generator) -> None:
    """Give every parameter values with which leaving it out, or taking another, shows."""
    embeddings, head = module.get_input_embeddings(), module.get_output_embeddings()
    tied = head is not None and embeddings is not None and head.weight is embeddings.weight
    # A cap on attention shows only on what comes near it.
    capped = any(re.fullmatch(r"attn.*softcap.*", name) for name, _ in _fields(module.config))
    gain = _GAIN * (_CAPPED if capped else 1)
    done = set()
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter in done:
                continue
            done.add(parameter)
            shape = parameter.shape
            noise = torch.randn(shape, generator=generator)
            if parameter.squeeze().dim() <= 1:
                # Norms have 1, or 0 where they add 1 themselves: the class knows.
                noise = noise if "sink" in name else parameter + _JITTER * noise
            elif isinstance(part, nn.Embedding):
                # As a head, too, what goes in at deviation 1 comes out at about 2.
                noise *= 2 / shape[-1] ** 0.5 if tied else 1
            else:
                noise *= gain / _fan_in(part, parameter) ** 0.5
            parameter.copy_(noise)


def _fan_in(part: nn.Module, parameter: Tensor) -> float:
    if isinstance(part, Conv1D):
        return parameter.shape[0]
    if isinstance(part, nn.modules.conv._ConvNd):
        return parameter[0].numel()
    # Of experts, some classes have (inputs, outputs) and some the other way round.
    return math.prod(parameter.shape[-2:]) ** 0.5 if parameter.dim() == 3 else parameter.shape[-1]
