"""From a GGUF file, llama.cpp's format, to a checkpoint folder, read by transformers."""

from __future__ import annotations

from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from superpose_adapters.base.quiet import quiet


def read_gguf(file: Path) -> tuple[Any, Any]:
    """Return (model in float16 on the CPU, tokenizer) of a GGUF file.

    Quantised parameters are dequantised: each number becomes the float16 nearest to what its block
    stands for, and is no more exact than that.

    Raises:
        Exception: Whatever transformers raises of a file, or a package of its own, that it cannot
            use.
    """
    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    # The bar of tensors is tqdm's own, which transformers cannot turn off.
    with quiet(), redirect_stderr(StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            dtype=torch.float16,
            # Else parameters may stay in their blocks, and a model with such is not saved.
            quantization_config=GgufConfig(dequantize=True),
            **where,
        )
        return model, AutoTokenizer.from_pretrained(file.parent, **where)


def write_checkpoint(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model and its tokenizer, as transformers has them, into a folder that exists.

    Raises:
        OSError: The disk refuses.
    """
    with quiet():
        try:
            model.save_pretrained(folder)
        except SafetensorError as error:  # Of a full disk, for one.
            raise OSError(f"{folder}: cannot be written ({error})") from error
        tokenizer.save_pretrained(folder)
    for each in folder.iterdir():
        # safetensors makes its file readable to the owner alone.
        each.chmod(0o644)
