"""The graph that is written for OpenVINO, run by a small interpreter of its operators.

The interpreter follows OpenVINO's specification of each, in torch, so that the graph can be
compared with transformers where the peers' environment is absent.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks.peers.to_openvino import Graph
from safetensors.torch import load_file, save_file
from tests.makers import save_base, tiny_gpt2
from torch import Tensor
from torch.nn import functional


class Run:
    """One run of a graph: its inputs, and the states that runs before it have left."""

    def __init__(self, inputs: dict[str, Tensor], states: dict[str, Tensor]) -> None:
        self.inputs = inputs
        self.states = states
        self.values: dict[Node, Any] = {}


class Node:
    """An operator; its value is computed when a run asks for it."""

    def __init__(self, compute: Callable[..., Any], *sources: Node) -> None:
        self.compute = compute
        self.sources = sources
        self.name = ""

    def set_friendly_name(self, name: str) -> None:
        self.name = name

    def output(self, _index: int) -> SimpleNamespace:
        return SimpleNamespace(set_names=lambda names: None)

    def outputs(self) -> list[Node]:
        return [Node(lambda run, parts, at=at: parts[at], self) for at in range(3)]

    def value(self, run: Run) -> Any:
        if self not in run.values:
            sources = [source.value(run) for source in self.sources]
            run.values[self] = self.compute(run, *sources)
        return run.values[self]


class Operators:
    """Those operators of opset13 that the graph uses."""

    def __init__(self) -> None:
        self.products: list[Node] = []

    def parameter(self, _shape: Any, _dtype: Any) -> Node:
        node = Node(lambda run: run.inputs[node.name])
        return node

    def constant(self, value: Any) -> Node:
        tensor = torch.from_numpy(value)
        return Node(lambda run: tensor)

    def matmul(self, a: Node, b: Node, first: bool, second: bool) -> Node:
        assert not first
        node = Node(lambda run, x, y: x @ (y.T if second else y), a, b)
        self.products.append(node)
        return node

    def mvn(self, x: Node, axes: Node, variance: bool, epsilon: float, mode: str) -> Node:
        assert variance
        assert mode == "inside_sqrt"

        def compute(run: Run, x: Tensor, axes: Tensor) -> Tensor:
            mean = x.mean(axes.tolist(), keepdim=True)
            spread = x.var(axes.tolist(), keepdim=True, correction=0)
            return (x - mean) / (spread + epsilon).sqrt()

        return Node(compute, x, axes)

    def reshape(self, x: Node, shape: Node, special_zero: bool) -> Node:
        assert special_zero  # a 0 keeps the dimension at its place

        def compute(run: Run, x: Tensor, shape: Tensor) -> Tensor:
            sizes = [size or x.shape[at] for at, size in enumerate(shape.tolist())]
            return x.reshape(sizes)

        return Node(compute, x, shape)

    def gather(self, x: Node, indices: Node, axis: Node) -> Node:
        def compute(run: Run, x: Tensor, indices: Tensor, axis: Tensor) -> Tensor:
            assert axis.item() == 0
            return x[indices.long()]

        return Node(compute, x, indices, axis)

    def scaled_dot_product_attention(self, q: Node, k: Node, v: Node, mask: Node) -> Node:
        def compute(run: Run, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
            weights: Tensor = scores.masked_fill(~mask, -torch.inf).softmax(-1)
            return weights @ v

        return Node(compute, q, k, v, mask)

    def read_value(self, initial: Node, name: str, _type: Any, _shape: Any) -> Node:
        return Node(lambda run, initial: run.states.get(name, initial), initial)

    def assign(self, x: Node, name: str) -> Node:
        def compute(run: Run, x: Tensor) -> None:
            run.states[name] = x

        return Node(compute, x)

    def concat(self, parts: list[Node], axis: int) -> Node:
        return Node(lambda run, *parts: torch.cat(parts, axis), *parts)

    def split(self, x: Node, axis: Node, count: int) -> Node:
        return Node(lambda run, x, axis: x.chunk(count, axis.item()), x, axis)

    def range(self, start: Node, stop: Node, step: Node, _type: str) -> Node:
        return Node(lambda run, *ends: torch.arange(*(int(end) for end in ends)), start, stop, step)

    def unsqueeze(self, x: Node, axes: Node) -> Node:
        def compute(run: Run, x: Tensor, axes: Tensor) -> Tensor:
            for axis in sorted(axes.tolist()):
                x = x.unsqueeze(axis)
            return x

        return Node(compute, x, axes)

    def gelu(self, x: Node, formula: str) -> Node:
        return Node(lambda run, x: functional.gelu(x, approximate=formula), x)

    def convert(self, x: Node, dtype: str) -> Node:
        assert dtype == "f32"
        return Node(lambda run, x: x.float(), x)

    def add(self, x: Node, y: Node) -> Node:
        return Node(lambda run, x, y: x + y, x, y)

    def multiply(self, x: Node, y: Node) -> Node:
        return Node(lambda run, x, y: x * y, x, y)

    def less_equal(self, x: Node, y: Node) -> Node:
        return Node(lambda run, x, y: x <= y, x, y)

    def transpose(self, x: Node, order: Node) -> Node:
        return Node(lambda run, x, order: x.permute(order.tolist()), x, order)

    def broadcast(self, x: Node, shape: Node) -> Node:
        return Node(lambda run, x, shape: x.expand(shape.tolist()), x, shape)

    def shape_of(self, x: Node) -> Node:
        return Node(lambda run, x: torch.tensor(x.shape), x)

    def result(self, x: Node) -> Node:
        return Node(lambda run, x: x, x)


class Model:
    """What `openvino.Model` is, with states between its runs."""

    def __init__(self, results: list[Node], sinks: list[Node], inputs: list[Node], _name: str):
        self.results = results
        self.sinks = sinks
        self.names = [node.name for node in inputs]
        self.states: dict[str, Tensor] = {}

    def __call__(self, **inputs: Tensor) -> Tensor:
        assert sorted(inputs) == sorted(self.names)
        run = Run(inputs, dict(self.states))
        logits: Tensor = self.results[0].value(run)
        for sink in self.sinks:
            sink.value(run)
        self.states = run.states
        return logits


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> Operators:
    operators = Operators()
    openvino = SimpleNamespace(Model=Model, PartialShape=list, Type=SimpleNamespace(f32="f32"))
    monkeypatch.setitem(sys.modules, "openvino", openvino)
    monkeypatch.setitem(sys.modules, "openvino.opset13", operators)
    return operators


def passes(model: Model, ids: Tensor, lengths: list[int]) -> Tensor:
    """Run tokens in passes of these lengths; return the logits of all."""
    logits, begin = [], 0
    for length in lengths:
        part = ids[:, begin : begin + length]
        positions = torch.arange(begin, begin + length).expand(part.shape)
        order = torch.arange(len(ids), dtype=torch.int32)
        logits.append(model(input_ids=part, position_ids=positions, beam_idx=order))
        begin += length
    return torch.cat(logits, 1)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_transformers_in_one_pass_and_in_several(
    operators: Operators, tmp_path: Path, tied: bool
) -> None:
    model: Any = tiny_gpt2(tie_word_embeddings=tied, layer_norm_epsilon=1e-3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero as they are made, which would hide one that is forgotten
            torch.nn.init.normal_(parameter, std=0.5)
    folder = save_base(model, tmp_path / "base")
    ids = torch.randint(257, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(ids).logits
    for lengths in ([9], [4, 3, 1, 1]):
        found = passes(Graph(folder, "float32").model(), ids, lengths)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_int8_is_off_by_half_a_step_at_most(operators: Operators, tmp_path: Path) -> None:
    model: Any = tiny_gpt2()
    folder = save_base(model, tmp_path / "base")
    kept = Graph(folder, "int8").matrix("h.0.mlp.c_fc.weight").value(Run({}, {}))
    wanted = model.transformer.h[0].mlp.c_fc.weight.detach().T
    step = wanted.abs().amax(1, keepdim=True) / 127
    assert ((kept - wanted).abs() <= step * 0.5001).all()
    assert (kept / step).round().unique().numel() > 200  # and takes nearly all 255 values

    ids = torch.arange(8)[None]
    with torch.no_grad():
        logits = model(ids).logits
    found = passes(Graph(folder, "int8").model(), ids, [8])
    assert 0 < (found - logits).norm() / logits.norm() < 0.05


def test_every_adapted_module_is_one_product_with_its_name(
    operators: Operators, tiny: Path, adapters: Path
) -> None:
    Graph(tiny, "float32").model()
    names = [node.name for node in operators.products]
    stored = load_file(adapters / "domain-000" / "adapter_model.safetensors")
    wanted = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in stored}
    assert len(wanted) == 6
    # GenAI looks for the name of the module in the name of a product.
    for module in wanted:
        assert [module in name for name in names].count(True) == 1


def test_a_tensor_that_the_graph_has_no_place_for_is_refused(
    operators: Operators, tmp_path: Path
) -> None:
    folder = save_base(tiny_gpt2(), tmp_path / "base")
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"transformer.h.0.crossattention.c_attn.bias": torch.ones(2)}, file)
    with pytest.raises(ValueError, match=r"h\.0\.crossattention\.c_attn\.bias"):
        Graph(folder, "float32").model()
