"""Exact unlearning: taking a block out by a fold of what is left, and by subtraction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import Cell, Table
from benchmarks.study.config import Dtype
from benchmarks.study.document import Claim, Plain, Section
from benchmarks.study.evaluator import Local
from benchmarks.study.inputs import Sources
from benchmarks.study.results import Results
from benchmarks.study.study import AdapterSpec, Needs, Study
from benchmarks.study.verdict import Verdict, every, exactly
from benchmarks.study.workspace import Workspace
from superpose_adapters.adapter import Adapter
from superpose_adapters.digest import hash_bytes
from superpose_adapters.scoring import EncodedText, Scope


def adapters(study: Study) -> tuple[AdapterSpec, ...]:
    """Return the adapters of the first arm; the second one is taken out."""
    return tuple(study.arms[0].fundamental.values())


def keys(study: Study) -> dict[str, Dtype]:
    """Return {key: dtype} of what is measured."""
    config = study.config.unlearning
    if config is None:
        return {}
    rows = study.rows_key(study.config.domains[0], "test", study.template)
    return {
        study.finding_key("unlearning", adapters(study), dtype, config.cycles, rows): dtype
        for dtype in config.dtypes
    }


def needs(study: Study) -> Needs:
    """Ask for one finding a dtype."""
    wanted = Needs()
    for key in keys(study):
        wanted.findings[key] = adapters(study)
    return wanted


def measure(study: Study, key: str, sources: Sources, workspace: Workspace) -> None:
    """Add the middle adapter to the sum of the others and take it out again, in both ways."""
    config = study.config
    assert config.unlearning is not None
    dtype = keys(study)[key]
    local = Local(sources.base, replace(config.evaluation, dtype=dtype, kernels=False))
    folders = [workspace.adapter(study.adapter_key(spec)) for spec in adapters(study)]
    everything = local.bind([(folder, 1.0) for folder in folders])
    rest = local.bind([(folder, 1.0) for folder in (folders[0], *folders[2:])])
    base = local.bind([])
    rows = sources.texts(config.domains[0], "test", study.template)
    scope = config.training.loss_scope

    before = _bits(local)
    local.fold(rest)
    never, never_nats = _bits(local), sum(local.score(rest, rows, scope))
    for _ in range(config.unlearning.cycles):
        local.fold(everything)
        with_all = _bits(local)
        local.fold(rest)
    refolded = _bits(local)
    local.fold(everything)
    local.fold(base)
    returned = _bits(local)

    local.fold(rest)
    subtracted = _subtract(local, local.adapter(folders[1]), config.unlearning.cycles)
    nats = sum(local.score(rest, rows, scope))
    workspace.findings.add(
        {
            "key": key,
            "adapters": [folder.name for folder in folders],
            "dtype": dtype,
            "cycles": config.unlearning.cycles,
            "changed_by_adding": with_all != never,
            "refold_equals_never_added": refolded == never,
            "empty_mix_equals_base": returned == before,
            "subtraction": subtracted,
            "perplexity_never_added": _perplexity(never_nats, rows, scope),
            "perplexity_subtracted": _perplexity(nats, rows, scope),
        }
    )


def _bits(local: Local) -> dict[str, str]:
    return {name: hash_bytes(each) for name, each in local.model.module.named_parameters()}


def _perplexity(nats: float, rows: list[EncodedText], scope: Scope) -> float:
    tokens = sum(len(row.ids) - row.first_scored(scope) for row in rows)
    return float(torch.tensor(nats / tokens, dtype=torch.float64).exp())


@torch.inference_mode()
def _subtract(local: Local, adapter: Adapter, cycles: int) -> list[dict[str, Any]]:
    """Add an adapter's delta to the live weights and subtract it, again and again.

    Returns:
        After 1 cycle and after all: share of the adapted weights that differ from what they were,
        and norm of the difference over norm of the delta.
    """
    parameters = dict(local.model.module.named_parameters())
    live = {module: parameters[f"{module}.weight"] for module in adapter.modules}
    before = {module: weight.clone() for module, weight in live.items()}
    deltas: dict[str, Tensor] = {}
    for module, factors in adapter.modules.items():
        product = local.model.layout[module].delta(factors.b @ factors.a) * factors.scaling
        deltas[module] = product.to(live[module].device, live[module].dtype)
    found = []
    for cycle in range(1, cycles + 1):
        for module, weight in live.items():
            weight.add_(deltas[module]).sub_(deltas[module])
        if cycle in (1, cycles):
            changed = sum(int((live[m] != before[m]).sum()) for m in live)
            left = sum(float((live[m].double() - before[m].double()).square().sum()) for m in live)
            size = sum(float(deltas[m].double().square().sum()) for m in live)
            found.append(
                {
                    "cycles": cycle,
                    "changed": changed / sum(weight.numel() for weight in live.values()),
                    "residue": (left / size) ** 0.5,
                }
            )
    return found


def section(study: Study, results: Results) -> Section:
    """Tell what is left of a block that was taken out."""
    found = Section("unlearning", "Exact unlearning")
    domains = study.config.domains
    found.text = [
        f"{domains[1]} is added to {domains[0]} + {domains[2]} and taken out again. By fold, as "
        "the server does it: base + what is left. By subtraction, as PEFT's unmerge does it: the "
        "delta is taken from the weights that hold it. A jointly trained adapter has no such "
        "operation: what it learned from one domain cannot be told from the rest. One arm "
        f"({study.arms[0].name}), one seed: bits are counted, nothing is estimated. Where adding "
        "does not change a single weight, rounding loses the block whole: the server serves such a "
        "mix by correction, and removal by fold has nothing to show.",
    ]
    by_key = {key: results.finding(key) for key in keys(study)}
    records = [record for record in by_key.values() if record]
    rows: list[list[Cell]] = []
    for record in records:
        first, last = record["subtraction"][0], record["subtraction"][-1]
        rows.append(
            [
                record["dtype"],
                record["cycles"],
                "yes" if record["changed_by_adding"] else "no: served by correction",
                "every bit" if record["refold_equals_never_added"] else "no",
                "every bit" if record["empty_mix_equals_base"] else "no",
                f"{100 * first['changed']:.1f} %",
                f"{100 * last['changed']:.1f} %",
                f"{100 * last['residue']:.2g} %",
                f"{record['perplexity_never_added']:.3f}",
                f"{record['perplexity_subtracted']:.3f}",
            ]
        )
    found.tables = [
        Table(
            "After adding and removing",
            [
                "dtype",
                "cycles",
                "adding changed the weights",
                "fold: as if never added",
                "fold: empty mix is the base",
                "subtraction: weights that differ after 1 cycle",
                "after all cycles",
                "what is left, of the delta's norm",
                f"perplexity of {domains[0]}, never added",
                "after subtraction",
            ],
            rows,
        )
    ]
    found.claims = _claims(study, by_key)
    return found


def _claims(study: Study, by_key: Mapping[str, dict[str, Any] | None]) -> list[Claim]:
    dtypes = keys(study)
    low = [record for key, record in by_key.items() if dtypes[key] == "bfloat16"]
    return [
        Claim(
            "Removal by fold is exact: the weights are, bit for bit, those of a model that never "
            "had the block, and the empty mix is the base.",
            every(exact_removal(record) for record in by_key.values()),
            ", ".join(
                f"{record['dtype']}: "
                + (
                    "compared"
                    if record["changed_by_adding"]
                    else "nothing was folded, such a mix is served by correction"
                )
                for record in by_key.values()
                if record
            ),
            Plain(
                "a block that is taken out by folding what is left leaves no trace",
                "A block that is taken out by folding what is left leaves no trace: every bit is "
                "as if it had never been there.",
                "A block that is taken out by folding what is left leaves a trace.",
            ),
        ),
        Claim(
            "Subtraction in bfloat16 is not: at least 1 % of the adapted weights are not what they "
            "were.",
            every(
                exactly(record["subtraction"][-1]["changed"] >= 0.01 if record else None)
                for record in low
            ),
            ", ".join(
                f"{100 * record['subtraction'][-1]['changed']:.1f} %" for record in low if record
            ),
        ),
    ]


def exact_removal(record: Mapping[str, Any] | None) -> Verdict:
    """Judge one dtype; where adding changed nothing, equality afterwards says nothing."""
    if record is None:
        return Verdict.NOT_RUN
    if not (record["refold_equals_never_added"] and record["empty_mix_equals_base"]):
        return Verdict.FAILS
    return Verdict.HOLDS if record["changed_by_adding"] else Verdict.OPEN
