"""Mixes as callers write them; how, `superpose_adapters.mix_syntax` says."""

from collections.abc import Mapping

from superpose_adapters import mix_syntax
from superpose_client.errors import MixSyntaxError

MixLike = str | Mapping[str, float]
"""A mix as callers write it: MIX syntax, or {name: weight} of domains and named mixes."""

format_mix = mix_syntax.format_mix
format_weight = mix_syntax.format_weight


def parse_mix(text: str) -> dict[str, float] | None:
    """Return the {name: weight} that `text` writes in MIX syntax; None is the default mix.

    Raises:
        MixSyntaxError: One line that names the part at fault and the remedy.
    """
    try:
        return mix_syntax.parse_mix(text)
    except ValueError as error:
        raise MixSyntaxError(str(error)) from None
