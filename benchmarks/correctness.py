"""Whether the engine says what transformers says: greedy texts under several mixes in one batch.

The reference is transformers' own `generate` on a model into which the weighted sum of deltas was
added densely, from the adapters' files, with no code of the server. Two tokens whose logits are
nearer than rounding are a tie, and may fall either way.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks.inprocess import Local
from benchmarks.options import Options, make_parser, read_options
from benchmarks.progress import Tell, progress
from benchmarks.report import Cell, Check, Report, Table
from benchmarks.shapes import Group, adapter_folder, base_folder, prompts
from benchmarks.target import Weights

GROUP = Group(8)
_A, _B, _C = GROUP.names[:3]
MIXES: tuple[Weights, ...] = (
    {},
    {_A: 1.0},
    {_A: 1.0, _B: 0.5},
    {_A: 0.5, _B: -0.3, _C: 1.0},
)
PROMPT_TOKENS = 24
# Logits that are this near may be told apart differently by another order of summation.
TIE = {"float32": 1e-3, "bfloat16": 0.5}


def merged(model: Any, adapters: Path, mix: Weights) -> Any:
    """Return a copy of a float32 transformers model with the deltas of `mix` added in float64."""
    summed = copy.deepcopy(model)
    for domain, weight in mix.items():
        config = json.loads((adapters / domain / "adapter_config.json").read_text())
        tensors = load_file(adapters / domain / "adapter_model.safetensors")
        for key, a in tensors.items():
            if ".lora_A." not in key:
                continue
            name = key.removeprefix("base_model.model.").partition(".lora_A.")[0]
            b = tensors[key.replace(".lora_A.", ".lora_B.")]
            delta = weight * config["lora_alpha"] / config["r"] * (b.double() @ a.double())
            parameter = summed.get_submodule(name).weight
            delta = delta.T if config["fan_in_fan_out"] else delta
            parameter.data = (parameter.data.double() + delta).to(parameter.dtype)
    return summed


@torch.inference_mode()
def reference(model: Any, prompt: Sequence[int], length: int) -> tuple[list[int], list[float]]:
    """Return transformers' greedy tokens, and by how much each logit beat the next."""
    ids = torch.tensor([list(prompt)], device=model.device)
    result = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=length,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = torch.cat(result.logits).float().topk(2).values
    return result.sequences[0, len(prompt) :].tolist(), (best[:, 0] - best[:, 1]).tolist()


def measure(options: Options, rows: int, length: int, tell: Tell) -> Report:
    """Compare texts, first with the base resident and then with one of the mixes."""
    base = base_folder(options.model, options.cache, tell)
    adapters = adapter_folder(base, options.cache, [GROUP], tell)
    texts = prompts(base, rows, PROMPT_TOKENS)
    mixes = [MIXES[row % len(MIXES)] for row in range(rows)]
    tell("transformers")
    plain: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected: list[tuple[list[int], list[float]]] = [([], [])] * rows
    for mix in MIXES[:rows]:
        model = merged(plain, adapters, mix).to(options.torch_device, options.torch_dtype).eval()
        for row in range(rows):
            if mixes[row] == mix:
                expected[row] = reference(model, texts[row], length)
        del model
    report = Report("correctness", options.label, options.settings(rows=rows, new_tokens=length))
    cells: list[list[Cell]] = []
    wrong = 0
    with Local(options, base, adapters, max_batch=rows, max_length=256) as local:
        bound = [local.bind(mix) for mix in mixes]
        for resident in (MIXES[0], MIXES[2]):
            tell("the engine")
            local.fold(local.prepare(local.bind(resident)))
            found = [request.tokens for request in local.generate(texts, bound, length)]
            equal, ties, false = _compare(expected, found, TIE[options.dtype])
            wrong += false
            cells.append([", ".join(resident) or "base", rows, equal, ties, false])
        local.fold(local.prepare(local.bind({})))
    columns = ("resident", "texts", "equal", "part at a tie", "wrong")
    report.tables.append(Table("Greedy texts against transformers generate", columns, cells))
    report.checks.append(
        Check(
            f"every text is that of transformers, but for logits closer than {TIE[options.dtype]}",
            wrong == 0,
        )
    )
    return report


def _compare(
    expected: Sequence[tuple[list[int], list[float]]], found: Sequence[list[int]], tie: float
) -> tuple[int, int, int]:
    """Return how many texts are equal, part at a tie, and are wrong."""
    equal = ties = wrong = 0
    for (tokens, margins), other in zip(expected, found, strict=True):
        parting = next(
            (at for at, (a, b) in enumerate(zip(tokens, other, strict=True)) if a != b), None
        )
        if parting is None:
            equal += 1
        elif margins[parting] < tie:
            ties += 1
        else:
            wrong += 1
    return equal, ties, wrong


def main(arguments: list[str] | None = None) -> int:
    """Run as a command."""
    parser = make_parser("correctness", "Compare with transformers generate.", seconds=60)
    parser.add_argument("--rows", type=int, default=8, help="texts in one batch")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens of a text")
    parsed = parser.parse_args(arguments)
    options = read_options(parsed)
    with progress("correctness", options.seconds) as tell:
        report = measure(options, parsed.rows, parsed.new_tokens, tell)
    return report.finish(options)


if __name__ == "__main__":
    sys.exit(main())
