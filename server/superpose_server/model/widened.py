"""A model run in float32 without a second copy of its parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn


@contextmanager
def widened(module: nn.Module) -> Iterator[None]:
    """Compute in float32, widening parameters only while the layer that has them runs.

    A layer is what an outermost ModuleList holds; other modules are each by themselves.
    """
    kept = {p: p.data for p in module.parameters() if p.is_floating_point()}
    owned = {part: list(part.parameters()) for part in _layers(module)}
    inside = {part for layer in owned for part in layer.modules()}
    owned |= {
        part: list(part.parameters(recurse=False))
        for part in module.modules()
        if part not in inside
    }
    with ExitStack() as until:

        def widen(part: nn.Module, *_: object) -> None:
            for parameter in owned[part]:
                if parameter in kept:
                    parameter.data = parameter.data.float()

        def narrow(part: nn.Module, *_: object) -> None:
            for parameter in owned[part]:
                if parameter in kept:
                    parameter.data = kept[parameter]

        for part, parameters in owned.items():
            if parameters:
                # Also after a pass that was not finished.
                until.callback(narrow, part)
                until.callback(part.register_forward_pre_hook(widen).remove)
                until.callback(part.register_forward_hook(narrow).remove)
        yield


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _layers(child)
