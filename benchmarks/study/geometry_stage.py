"""Stage: inner products of deltas, module by module, plain and weighted by the modules' inputs.

With D = s B A, <D1, D2> = s1 s2 sum((A1 A2^T) * (B1^T B2)); with the covariance C of the module's
input between them, tr(D1 C D2^T) = s1 s2 sum((A1 C A2^T) * (B1^T B2)): what the two deltas' outputs
have in common on real inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from benchmarks.study.evaluator import Local
from benchmarks.study.inputs import Sources
from benchmarks.study.steps import steps
from benchmarks.study.study import Pair, Study, covariance_domains
from benchmarks.study.workspace import Workspace
from superpose_adapters.adapter import Adapter, Factors
from superpose_adapters.geometry import grams
from superpose_adapters.mix import BoundMix

_DIGITS = 7

Products = tuple[float, float, float]
"""<D1, D2>, norm of D1, norm of D2."""


def plain_products(first: Adapter, second: Adapter) -> dict[str, Products]:
    """Return {module: products} of two adapters, from their factors in float64."""
    return {
        module: (float(g[0, 1]), math.sqrt(g[0, 0]), math.sqrt(g[1, 1]))
        for module, g in grams([first, second]).items()
    }


def weighted_products(
    first: Adapter, second: Adapter, covariances: Mapping[str, Tensor]
) -> dict[str, Products]:
    """Return {module: products} with the covariance of the module's input between the deltas."""
    found = {}
    for module in sorted(set(first.modules) & set(second.modules)):
        f, s, c = first.modules[module], second.modules[module], covariances[module]
        first_norm, second_norm = (math.sqrt(max(0.0, _product(each, each, c))) for each in (f, s))
        found[module] = (_product(f, s, c), first_norm, second_norm)
    return found


def _product(first: Factors, second: Factors, covariance: Tensor) -> float:
    over_inputs = first.a.double() @ covariance.double() @ second.a.double().T
    over_outputs = first.b.double().T @ second.b.double()
    return first.scaling * second.scaling * float((over_inputs * over_outputs).sum())


class Covariances:
    """Mean of x x^T over the inputs x of every adapted module, on a domain's validation rows."""

    def __init__(self, study: Study, sources: Sources, local: Local) -> None:
        """Keep what is needed to look."""
        self._study = study
        self._sources = sources
        self._local = local
        self._of = lru_cache(None)(self._look)

    def of(self, domains: Iterable[str], modules: Iterable[str]) -> dict[str, Tensor]:
        """Return {module: (in, in)}, the mean over domains of their covariances."""
        found = [self._of(domain, tuple(modules)) for domain in domains]
        return {m: torch.stack([each[m] for each in found]).mean(0) for m in found[0]}

    @torch.inference_mode()
    def _look(self, domain: str, modules: tuple[str, ...]) -> dict[str, Tensor]:
        local = self._local
        sums: dict[str, Tensor] = {}
        seen = 0

        def hook(name: str) -> RemovableHandle:
            def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                nonlocal seen
                x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
                seen += len(x) if name == modules[0] else 0
                sums[name] = sums.get(name, torch.zeros(())) + x.T @ x

            module: nn.Module = local.model.module.get_submodule(name)
            return module.register_forward_pre_hook(add)

        base = BoundMix(local.model.base_digest)
        local.fold(base)
        hooks = [hook(name) for name in modules]
        try:
            study = self._study
            rows = self._sources.texts(domain, "validation", study.template)
            local.score(base, rows, study.config.training.loss_scope)
        finally:
            for each in hooks:
                each.remove()
        return {name: value / seen for name, value in sums.items()}


def missing_pairs(
    study: Study, pairs: Iterable[Pair], workspace: Workspace, *, activations: bool
) -> dict[str, Pair]:
    """Return {key: pair} of what is not done."""
    keyed = {study.pair_key(pair, activations=activations): pair for pair in pairs}
    return {key: pair for key, pair in keyed.items() if key not in workspace.geometry}


def measure_missing(
    study: Study,
    plain: Mapping[str, Pair],
    activations: Mapping[str, Pair],
    local: Local,
    sources: Sources,
    workspace: Workspace,
    experiment: str,
) -> None:
    """Measure what is missing."""
    covariances = Covariances(study, sources, local)
    amount = len(plain) + len(activations)
    with (
        steps(f"geometry for {experiment}", amount) as advance,
        workspace.stage("geometry", experiment, [*plain, *activations], pairs=amount),
    ):
        for key, pair in plain.items():
            first, second = (local.adapter(folder) for folder in _folders(study, pair, workspace))
            _add(workspace, key, study, pair, plain_products(first, second))
            advance(1, "cosines")
        for key, pair in activations.items():
            first, second = (local.adapter(folder) for folder in _folders(study, pair, workspace))
            of = covariances.of(covariance_domains(pair), sorted(first.modules))
            _add(workspace, key, study, pair, weighted_products(first, second, of))
            advance(1, "cosines weighted by activations")


def _folders(study: Study, pair: Pair, workspace: Workspace) -> list[Path]:
    return [workspace.adapter(study.adapter_key(spec)) for spec in pair]


def _add(
    workspace: Workspace, key: str, study: Study, pair: Pair, products: Mapping[str, Products]
) -> None:
    # A pair is kept in the order of its keys, as its own key is.
    ordered = sorted(pair, key=study.adapter_key) == list(pair)
    workspace.geometry.add(
        {
            "key": key,
            "pair": sorted(study.adapter_key(spec) for spec in pair),
            "products": {
                module: [
                    float(f"{value:.{_DIGITS}g}")
                    for value in (inner, *((first, second) if ordered else (second, first)))
                ]
                for module, (inner, first, second) in products.items()
            },
        }
    )
