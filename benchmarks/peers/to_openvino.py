"""OpenVINO's IR of a GPT-2 checkpoint, for OpenVINO GenAI's paged attention.

    python -m benchmarks.peers.to_openvino MODEL FOLDER [--dtype int8]

Runs in the environment of the peers: it needs the packages openvino, safetensors and numpy. The
graph is written operator by operator, because the exporter, optimum-intel, is bound to other
versions of transformers than ours. The folder holds no tokenizer, since prompts are token ids.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.gpt2_checkpoint import Array, read_config, read_tensors

MODEL_FILE = "openvino_model.xml"


class Graph:
    """The graph of one checkpoint, as GenAI wants it: keys and values are states of the model.

    GenAI puts paged attention in the place of these states and of the attention that reads them, if
    it finds them put together as here. Rows are of one length, since nothing masks padding.
    """

    def __init__(self, folder: Path, dtype: str) -> None:
        """Read a checkpoint; with `int8` its matrices become integers with a scale for each row."""
        self.openvino: Any = importlib.import_module("openvino")
        self.ops: Any = importlib.import_module("openvino.opset13")
        self.config = read_config(folder)
        self.tensors = dict(read_tensors(folder, self.config))
        self.int8 = {"float32": False, "int8": True}[dtype]
        self.sinks: list[Any] = []
        self.matrices: dict[str, Any] = {}

    def constant(self, value: Any, dtype: Any = np.int64) -> Any:
        return self.ops.constant(np.array(value, dtype=dtype))

    def parameter(self, name: str, shape: list[int], dtype: Any) -> Any:
        node = self.ops.parameter(shape, dtype)
        node.set_friendly_name(name)
        node.output(0).set_names({name})
        return node

    def vector(self, name: str) -> Any:
        return self.ops.constant(self.tensors.pop(name))

    def matrix(self, name: str) -> Any:
        """Return a matrix, which two places may share; in int8 with what makes floats of it."""
        if name not in self.matrices:
            tensor = self.tensors.pop(name)
            self.matrices[name] = (
                self.compressed(tensor) if self.int8 else self.ops.constant(tensor)
            )
        return self.matrices[name]

    def compressed(self, tensor: Array) -> Any:
        scale = np.maximum(np.abs(tensor).max(axis=1, keepdims=True) / 127, np.float32(1e-12))
        integers = self.ops.constant(np.round(tensor / scale).astype(np.int8))
        return self.ops.multiply(self.ops.convert(integers, "f32"), self.ops.constant(scale))

    def linear(self, x: Any, name: str) -> Any:
        product = self.ops.matmul(x, self.matrix(f"{name}.weight"), False, True)
        # By these names GenAI finds what a PEFT adapter is for.
        product.set_friendly_name(f"transformer.{name}")
        return self.ops.add(product, self.vector(f"{name}.bias"))

    def norm(self, x: Any, name: str) -> Any:
        epsilon = self.config["layer_norm_epsilon"]
        x = self.ops.mvn(x, self.constant([-1]), True, epsilon, "inside_sqrt")
        x = self.ops.multiply(x, self.vector(f"{name}.weight"))
        return self.ops.add(x, self.vector(f"{name}.bias"))

    def heads(self, x: Any) -> Any:
        """Make (rows, heads, tokens, features of a head) of (rows, tokens, features)."""
        count = self.config["n_head"]
        shape = self.constant([0, 0, count, self.config["n_embd"] // count])
        return self.ops.transpose(self.ops.reshape(x, shape, True), self.constant([0, 2, 1, 3]))

    def remembered(self, new: Any, name: str, rows: Any, order: Any) -> Any:
        """Return the state of this name with `new` behind it, which is also what it becomes."""
        count, size = self.config["n_head"], self.config["n_embd"] // self.config["n_head"]
        axis = self.constant(0)
        shape = self.ops.concat([rows, self.constant([count, 0, size])], 0)
        empty = self.ops.broadcast(self.constant(0, np.float32), shape)
        shape = self.openvino.PartialShape([-1, count, -1, size])
        state = self.ops.read_value(empty, name, self.openvino.Type.f32, shape)
        old = self.ops.gather(state, order, axis)
        both = self.ops.concat([old, new], 2)
        self.sinks.append(self.ops.assign(both, name))
        return both

    def attention(self, x: Any, layer: int, rows: Any, positions: Any, order: Any) -> Any:
        joined = self.linear(x, f"h.{layer}.attn.c_attn")
        query, key, value = (
            self.heads(part) for part in self.ops.split(joined, self.constant(2), 3).outputs()
        )
        key = self.remembered(key, f"past.{layer}.key", rows, order)
        value = self.remembered(value, f"past.{layer}.value", rows, order)
        total = self.ops.gather(self.ops.shape_of(key), self.constant(2), self.constant(0))
        every = self.ops.range(self.constant(0), total, self.constant(1), "i64")
        visible = self.ops.less_equal(every, self.ops.unsqueeze(positions, self.constant([1, 3])))
        found = self.ops.scaled_dot_product_attention(query, key, value, visible)
        found = self.ops.transpose(found, self.constant([0, 2, 1, 3]))
        found = self.ops.reshape(found, self.constant([0, 0, self.config["n_embd"]]), True)
        return self.linear(found, f"h.{layer}.attn.c_proj")

    def model(self) -> Any:
        """Return the whole model: ids and positions in, logits out.

        Raises:
            ValueError: The checkpoint holds more than this model.
        """
        ids = self.parameter("input_ids", [-1, -1], np.int64)
        positions = self.parameter("position_ids", [-1, -1], np.int64)
        order = self.parameter("beam_idx", [-1], np.int32)
        axis = self.constant(0)
        rows = self.ops.gather(self.ops.shape_of(ids), self.constant([0]), axis)
        x = self.ops.add(
            self.ops.gather(self.matrix("wte.weight"), ids, axis),
            self.ops.gather(self.vector("wpe.weight"), positions, axis),
        )
        for layer in range(self.config["n_layer"]):
            normed = self.norm(x, f"h.{layer}.ln_1")
            x = self.ops.add(x, self.attention(normed, layer, rows, positions, order))
            inner = self.linear(self.norm(x, f"h.{layer}.ln_2"), f"h.{layer}.mlp.c_fc")
            inner = self.linear(self.ops.gelu(inner, "tanh"), f"h.{layer}.mlp.c_proj")
            x = self.ops.add(x, inner)
        head = "lm_head" if "lm_head.weight" in self.tensors else "wte"
        logits = self.ops.matmul(self.norm(x, "ln_f"), self.matrix(f"{head}.weight"), False, True)
        if self.tensors:
            raise ValueError(f"{min(self.tensors)} is not a tensor of a plain GPT-2")
        result = self.ops.result(logits)
        result.output(0).set_names({"logits"})
        return self.openvino.Model([result], self.sinks, [ids, positions, order], "gpt2")


def convert_model(folder: Path, target: Path, dtype: str = "float32") -> None:
    """Write the IR of a GPT-2 checkpoint into a folder that GenAI loads.

    Raises:
        ValueError: No GPT-2 of the usual kind.
    """
    openvino: Any = importlib.import_module("openvino")
    target.mkdir()
    openvino.save_model(Graph(folder, dtype).model(), target / MODEL_FILE, compress_to_fp16=False)
    # GenAI reads from it what kind of model it has, and the special tokens.
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description="Write OpenVINO's IR of a GPT-2.")
    parser.add_argument("source", type=Path, help="folder of the checkpoint")
    parser.add_argument("target", type=Path, help="the folder to make")
    parser.add_argument("--dtype", choices=("float32", "int8"), default="float32")
    options = parser.parse_args()
    convert_model(options.source, options.target, options.dtype)


if __name__ == "__main__":
    main()
