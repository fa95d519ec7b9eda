"""Whatever option the contract has, the clients and `adapterctl generate` offer."""

import inspect
from typing import Any

import pytest
from tests.client.callers import Caller
from tests.client.fake_server import FakeServer
from typer.testing import CliRunner

from superpose_client.async_client import AsyncClient
from superpose_client.cli import app
from superpose_client.client import Client
from superpose_client.requests import GenerateOptions
from superpose_proto.v1 import inference_pb2

FIELDS: list[Any] = list(inference_pb2.GenerateOptions.DESCRIPTOR.fields)

NOT_ON_THE_COMMAND_LINE = {
    "stop_token_ids": "people name what ends a text by its characters: --stop",
}


def some_value(field: Any) -> Any:
    """A value that is not the one of an absent field."""
    if field.message_type is not None:
        return {3: -0.5}
    value: Any = {
        field.CPPTYPE_UINT32: 3,
        field.CPPTYPE_UINT64: 2**64 - 1,
        field.CPPTYPE_DOUBLE: 0.25,
        field.CPPTYPE_BOOL: True,
        field.CPPTYPE_STRING: "END",
    }[field.cpp_type]
    return [value] if field.is_repeated else value


def only(field: Any) -> inference_pb2.GenerateOptions:
    """The message with that value alone."""
    message: Any = inference_pb2.GenerateOptions
    made: inference_pb2.GenerateOptions = message(**{field.name: some_value(field)})
    return made


def test_the_options_are_those_of_the_contract() -> None:
    assert list(GenerateOptions.__annotations__) == [field.name for field in FIELDS]


@pytest.mark.parametrize("method", ["generate", "stream"])
@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_every_option_reaches_the_request(
    caller: Caller, server: FakeServer, method: str, field: Any
) -> None:
    options = {field.name: some_value(field)}
    if method == "stream":
        caller.collect(method, "x", **options)
    else:
        caller.generate("x", **options)
    assert server.request.options == only(field)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_an_option_that_is_none_is_absent(caller: Caller, server: FakeServer, field: Any) -> None:
    caller.generate("x", **{field.name: None})
    assert server.request.options == inference_pb2.GenerateOptions()


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_help_names_every_option(kind: Any) -> None:
    for method in (kind.generate, kind.stream):
        assert {field.name for field in FIELDS} <= inspect.signature(method).parameters.keys()


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_every_option_is_a_flag(server: FakeServer, field: Any) -> None:
    flag = "--" + field.name.replace("_", "-")
    if field.name in NOT_ON_THE_COMMAND_LINE:
        assert flag not in CliRunner().invoke(app, ["generate", "--help"]).stdout
        return
    value = some_value(field)
    if isinstance(value, dict):
        values = [f"{key}={each}" for key, each in value.items()]
    else:
        values = [] if value is True else value if field.is_repeated else [value]
    arguments = ["--server", server.address, "generate", "x", flag, *map(str, values)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    expected = only(field)
    if field.name != "temperature":
        expected.temperature = 0
    assert server.request.options == expected
