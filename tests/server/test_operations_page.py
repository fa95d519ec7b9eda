"""docs/operations.md has every reason of an error, every metric and every flag, and no others."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import typer
from prometheus_client.metrics_core import Metric

from superpose_adapters.adapter import Reason as AdapterReason
from superpose_client.cli import app as adapterctl
from superpose_server import errors
from superpose_server.config import parse_config
from superpose_server.door.grpc.status import to_status
from superpose_server.door.http.status import HttpError, to_answer
from superpose_server.errors import FailedPrecondition, ServerError
from superpose_server.metrics import Metrics

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text()
SERVER = ROOT / "server" / "superpose_server"
KINDS = {
    name: kind
    for name, kind in {**vars(errors), "HttpError": HttpError}.items()
    if isinstance(kind, type) and issubclass(kind, ServerError)
}


class Raised(NamedTuple):
    """A reason, the error that has it, its status if it is HTTP's own, and the file."""

    reason: str
    kind: type[ServerError]
    status: int | None = None
    file: Path = SERVER

    @property
    def answers(self) -> tuple[set[str], set[str]]:
        """What clients get by gRPC and by HTTP, of which what one door raises is its own."""
        error = self.kind.__new__(self.kind)
        told: dict[str, Any] = {"message": "", "reason": self.reason, "field": None}
        vars(error).update(
            told, metadata={}, retry_after_seconds=0.0, status=self.status, headers={}
        )
        door = self.file.relative_to(SERVER).parts[:2]
        by_grpc = set() if door == ("door", "http") else {to_status(error)[0].name}
        by_http = set() if door == ("door", "grpc") else {str(to_answer(error)[0])}
        return by_grpc, by_http


def takes_a_reason(kind: type[ServerError]) -> bool:
    return "reason" in inspect.signature(kind).parameters


def own_reason(kind: type[ServerError]) -> str:
    """The reason of a class that has one of its own, whatever its constructor takes."""
    parameters = inspect.signature(kind).parameters.values()
    needed: list[Any] = [1 for each in parameters if each.default is each.empty]
    return kind(*needed).reason


def raised_in(file: Path) -> Iterator[Raised]:
    """Every reason that a file spells out in the call of an error's class."""
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.ClassDef(name=name, bases=bases):
                derives = any(isinstance(base, ast.Name) and base.id in KINDS for base in bases)
                assert name in KINDS or not derives, f"{file}: {name} is missing in KINDS"
            case ast.Call(func=ast.Name(id=name)) if name in KINDS and takes_a_reason(KINDS[name]):
                given = {each.arg: each.value for each in node.keywords if each.arg}
                arguments = inspect.signature(KINDS[name]).bind(*node.args, **given).arguments
                status = arguments.get("status")
                for reason in spelled(arguments["reason"], file):
                    code = None if status is None else ast.literal_eval(status)
                    yield Raised(reason, KINDS[name], code, file)


def spelled(argument: ast.expr, file: Path) -> set[str]:
    match argument:
        case ast.Constant(value=str(reason)):
            return {reason}
        case ast.IfExp(body=one, orelse=other):
            return spelled(one, file) | spelled(other, file)
        case ast.Attribute(attr="reason"):  # Another error's, handed on.
            return set()
    pytest.fail(f"{file}:{argument.lineno}: spell the reason out, so that it can be looked for")


def all_raised() -> Iterator[Raised]:
    for file in SERVER.rglob("*.py"):
        yield from raised_in(file)
    for kind in KINDS.values():
        if not takes_a_reason(kind):
            yield Raised(own_reason(kind), kind)
    # What a push is refused for.
    for reason in get_args(AdapterReason):
        yield Raised(reason, FailedPrecondition)


def rows(pattern: str) -> list[list[str]]:
    """The cells of every row of a table whose first cell is code that matches."""
    lines = re.findall(rf"^\| `{pattern}` \|.*\|$", PAGE, re.MULTILINE)
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]


def listed(cell: str) -> set[str]:
    return set(filter(None, cell.split(", ")))


def test_every_reason_is_there_with_what_clients_get() -> None:
    raised: dict[str, tuple[set[str], set[str]]] = {}
    for each in all_raised():
        known = raised.setdefault(each.reason, (set(), set()))
        for codes, more in zip(known, each.answers, strict=True):
            codes |= more
    table = rows("[A-Z_]+")
    assert len({reason for reason, *_ in table}) == len(table)
    assert {reason: (listed(grpc), listed(http)) for reason, grpc, http, _ in table} == raised


def test_every_metric_is_there() -> None:
    metrics = Metrics()
    metrics.follow(lambda: 0, lambda: 0)
    metrics.following(lambda: True)

    def name(metric: Metric) -> str:
        return metric.name + ("_total" if metric.type == "counter" else "")

    exposed = {name(metric) for metric in metrics.registry.collect()}
    assert {row[0].partition("{")[0] for row in rows("superpose_[a-z0-9_{}]+")} == exposed
    spoken_of = set(re.findall(r"\bsuperpose_[a-z0-9_]+", PAGE))
    assert {re.sub("_(bucket|sum|count)$", "", each) for each in spoken_of} <= exposed


def test_every_flag_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    flags = set(re.findall("^  (?:-h, )?(--[a-z][a-z-]*)", capsys.readouterr().out, re.MULTILINE))
    spoken_of = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", PAGE))
    assert flags <= spoken_of
    assert spoken_of <= flags | set(options(typer.main.get_command(adapterctl)))


def options(command: Any) -> Iterator[str]:
    """The options of a command of `adapterctl`, and of those below it."""
    for parameter in command.params:
        yield from parameter.opts
    for below in getattr(command, "commands", {}).values():
        yield from options(below)


def test_every_command_line_of_a_server_is_one_that_it_takes() -> None:
    whole = re.sub(r"\\\n\s*", "", PAGE)
    lines = re.findall(r"^(?:    |ExecStart=\S*/)superpose-server (.*)$", whole, re.MULTILINE)
    assert lines
    for line in lines:
        parse_config(shlex.split(line, comments=True))


def test_the_lines_that_are_explained_are_lines_of_the_code() -> None:
    said = {
        node.value
        for package in (SERVER, ROOT / "adapters" / "superpose_adapters")
        for file in package.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    incidents = PAGE.partition("\n## Incidents\n")[2].partition("\n## ")[0]
    seen = [row.split(" | ")[0] for row in incidents.splitlines() if row.startswith("|")]
    parts = {
        part.strip() for code in re.findall("`(.+?)`", "".join(seen)) for part in code.split("...")
    }
    assert len(parts) > 10
    assert {part for part in parts if not any(part in text for text in said)} == set()
