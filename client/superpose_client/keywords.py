"""Signatures with their `**options: Unpack[...]` spelled out, for help and for command lines."""

import inspect
from collections.abc import Callable
from inspect import Parameter
from typing import Any, Unpack, get_args, get_origin, get_type_hints


def spelled_out(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature, each option a keyword of its own that is None unless given."""
    signature = inspect.signature(function)
    parameters: list[Parameter] = []
    for parameter in signature.parameters.values():
        if get_origin(parameter.annotation) is not Unpack:
            parameters.append(parameter)
            continue
        (options,) = get_args(parameter.annotation)
        parameters += [
            Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=kind)
            for name, kind in get_type_hints(options, include_extras=True).items()
        ]
    return signature.replace(parameters=parameters)
