from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu
from transformers.activations import ACT2FN

from superpose_server.model.activation import SigmoidGELU, replace_activations


def test_it_is_gelu_s_tanh_formula() -> None:
    x = torch.linspace(-12, 12, 4801)
    exact = gelu(x.double(), approximate="tanh")
    torch.testing.assert_close(SigmoidGELU()(x).double(), exact, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("x", [float("inf"), -1e30, 1e30, float("nan")])
def test_it_is_defined_where_gelu_is(x: float) -> None:
    value = torch.tensor([x])
    torch.testing.assert_close(
        SigmoidGELU()(value), gelu(value, approximate="tanh"), equal_nan=True
    )


def test_only_activations_by_tanh_are_replaced() -> None:
    names = ("gelu_new", "gelu_pytorch_tanh", "gelu", "silu")
    module = nn.ModuleDict({name: ACT2FN[name] for name in names})
    replace_activations(module)
    assert [isinstance(module[name], SigmoidGELU) for name in names] == [True, True, False, False]
