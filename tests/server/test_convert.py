"""Every option of the wire reaches the sampler under its own name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import FieldDescriptor

from superpose_proto.v1.inference_pb2 import GenerateOptions
from superpose_server.door.contract.convert import params_from_wire
from superpose_server.engine.sampling import SamplingParams
from superpose_server.errors import InvalidArgument

DEFAULT = SamplingParams()
# A value of each type that is no option's default, and that every option of the type allows.
OTHER: dict[int, Any] = {
    FieldDescriptor.CPPTYPE_UINT32: 7,
    FieldDescriptor.CPPTYPE_UINT64: 2**64 - 1,
    FieldDescriptor.CPPTYPE_DOUBLE: 0.25,
    FieldDescriptor.CPPTYPE_BOOL: True,
    FieldDescriptor.CPPTYPE_STRING: "end",
}


@pytest.mark.parametrize("option", [*GenerateOptions.DESCRIPTOR.fields], ids=lambda f: f.name)
def test_every_option_reaches_the_sampler_and_moves_no_other(option: FieldDescriptor) -> None:
    value: Any
    if option.message_type is not None:
        value = {7: -0.5, 2**32 - 1: 0.25}
    else:
        other = OTHER[option.cpp_type]
        value = (other, other) if option.is_repeated else other
    given: dict[str, Any] = {option.name: value}
    assert getattr(DEFAULT, option.name) != value
    assert params_from_wire(GenerateOptions(**given)) == dataclasses.replace(DEFAULT, **given)


def test_absent_options_take_their_defaults() -> None:
    assert params_from_wire(GenerateOptions()) == DEFAULT


def test_0_is_a_value_and_not_absent() -> None:
    assert params_from_wire(GenerateOptions(temperature=0, seed=0)) == SamplingParams(
        temperature=0.0, seed=0
    )
    with pytest.raises(InvalidArgument, match="top_p is 0") as caught:
        params_from_wire(GenerateOptions(top_p=0))
    assert caught.value.field == "options.top_p"


def test_the_sampler_has_no_option_that_the_wire_lacks() -> None:
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    assert names == set(GenerateOptions.DESCRIPTOR.fields_by_name)


def test_an_option_that_the_sampler_lacks_is_refused() -> None:
    """As a contract would have it whose new option nobody has given to the sampler yet."""
    file = descriptor_pb2.FileDescriptorProto(name="options.proto", syntax="proto3")
    message = file.message_type.add(name="Options")
    message.field.add(
        name="penalty",
        number=1,
        type=descriptor_pb2.FieldDescriptorProto.TYPE_DOUBLE,
        label=descriptor_pb2.FieldDescriptorProto.LABEL_OPTIONAL,
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    options = message_factory.GetMessageClass(pool.FindMessageTypeByName("Options"))(penalty=0.5)
    with pytest.raises(TypeError, match="penalty"):
        params_from_wire(options)
