"""How `adapterctl` gets in, and the one line that it says where it does not."""

from pathlib import Path

import grpc
import pytest
from tests.client.adapterctl import Ctl, one_line, run_process
from tests.client.certificates import CA, Pair, file_of, pair, server_credentials
from tests.client.fake_server import Failure, FakeServer
from tests.client.test_cli import COMMANDS
from typer.testing import CliRunner

from superpose_client import attempts
from superpose_client.cli import app

Code = grpc.StatusCode
ACCESS = ["--token-file=f", "--ca=f", "--tls", "--cert=f", "--key=f", "--insecure"]


@pytest.fixture(scope="module")
def authority() -> CA:
    return CA()


@pytest.fixture
def ca(authority: CA, tmp_path: Path) -> Path:
    return file_of(authority, tmp_path / "ca.pem")


@pytest.fixture
def client_pair(authority: CA, tmp_path: Path) -> Pair:
    return pair(authority, tmp_path)


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    (tmp_path / "token").write_text("from-file\n")
    return tmp_path / "token"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_the_options_of_access(name: str) -> None:
    result = CliRunner().invoke(app, [name, *ACCESS, "--help"])
    assert result.exit_code == 0
    assert "--ca" not in result.stdout


def test_the_options_of_access_are_explained_once() -> None:
    text = CliRunner().invoke(app, ["--help"]).stdout
    for option in ACCESS:
        assert option.removesuffix("=f") in text


@pytest.mark.parametrize(
    ("arguments", "variable", "sent"),
    [
        ("mix", None, None),
        ("mix", "", None),
        ("mix", "from-variable", "Bearer from-variable"),
        ("--token-file {} mix", None, "Bearer from-file"),
        ("mix --token-file {}", None, "Bearer from-file"),
        ("mix --token-file {}", "from-variable", "Bearer from-file"),
    ],
)
def test_where_the_token_comes_from(
    ctl: Ctl,
    server: FakeServer,
    monkeypatch: pytest.MonkeyPatch,
    token_file: Path,
    arguments: str,
    variable: str | None,
    sent: str | None,
) -> None:
    if variable is not None:
        monkeypatch.setenv("SUPERPOSE_TOKEN", variable)
    assert ctl(*arguments.format(token_file).split()).exit_code == 0
    assert server.authorizations == [sent]


def test_access_comes_from_variables_too(
    monkeypatch: pytest.MonkeyPatch, authority: CA, ca: Path, client_pair: Pair
) -> None:
    with FakeServer(credentials=server_credentials(authority, clients=authority)) as server:
        for name, value in (
            ("SERVER", server.address),
            ("CA", ca),
            ("CERT", client_pair.certificate),
            ("KEY", client_pair.key),
            ("TOKEN", "t"),
        ):
            monkeypatch.setenv(f"SUPERPOSE_{name}", str(value))
        assert CliRunner().invoke(app, ["mix"]).exit_code == 0
        assert server.authorizations == ["Bearer t"]


def test_why_there_is_no_connection(
    ctl: Ctl, authority: CA, ca: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "FIRST_PAUSE", 0.001)
    good = server_credentials(authority)
    expired = server_credentials(authority, days=-1)
    misnamed = server_credentials(authority, "model.example")
    asking = server_credentials(authority, clients=authority)
    stranger = pair(CA(), tmp_path, "stranger")
    theirs = [f"--cert={stranger.certificate}", f"--key={stranger.key}"]
    of_public = "the server's certificate is not to be trusted: unable to get local issuer"
    of_date = "the server's certificate is not to be trusted: certificate has expired"
    of_name = "the server's certificate is not to be trusted: IP address mismatch"
    of_plain = "the server does not speak TLS: leave --ca, --tls and --cert out"
    cases: list[tuple[grpc.ServerCredentials | None, list[str], str]] = [
        (good, ["--tls"], of_public),
        (expired, [f"--ca={ca}"], of_date),
        (misnamed, [f"--ca={ca}"], of_name),
        (None, [f"--ca={ca}"], of_plain),
        (good, [], "the server speaks TLS: give --ca or --tls"),
        (asking, [], "the server speaks TLS: give --ca or --tls"),
        (asking, [f"--ca={ca}"], "the server hangs up: it may want a certificate of yours"),
        (asking, [f"--ca={ca}", *theirs], "the server hangs up: it may not trust the certificate"),
    ]
    for credentials, options, why in cases:
        with FakeServer(credentials=credentials) as server:
            line = one_line(ctl("--server", server.address, *options, "mix"))
            assert line.startswith(f"no connection to {server.address}: {why}")
            assert server.requests == []


def test_a_server_that_is_not_there_is_that(ctl: Ctl, server: FakeServer, ca: Path) -> None:
    server.__exit__(None, None, None)
    for options in ([], [f"--ca={ca}"]):
        assert one_line(ctl("mix", *options)).startswith(
            f"cannot reach a server at {server.address}; is superpose-server running?"
        )


@pytest.mark.parametrize(
    ("failure", "token", "line"),
    [
        (
            Failure(Code.UNAUTHENTICATED, "this call needs a token", "TOKEN_MISSING"),
            None,
            "this call needs a token; give one by --token-file or SUPERPOSE_TOKEN",
        ),
        (Failure(Code.UNAUTHENTICATED, "it ended on May 1", "TOKEN_EXPIRED"), "t", None),
        (Failure(Code.UNAUTHENTICATED, "no such token", "TOKEN_UNKNOWN"), "t", None),
        (Failure(Code.PERMISSION_DENIED, "it needs admin", "SCOPE_MISSING"), "t", None),
        (Failure(Code.RESOURCE_EXHAUSTED, "60 a minute", "RATE_LIMITED"), "t", None),
    ],
)
def test_what_the_server_says_of_the_token(
    ctl: Ctl,
    server: FakeServer,
    monkeypatch: pytest.MonkeyPatch,
    failure: Failure,
    token: str | None,
    line: str | None,
) -> None:
    if token is not None:
        monkeypatch.setenv("SUPERPOSE_TOKEN", token)
    server.answers["GetMix"] = failure
    assert one_line(ctl("mix")) == (line or failure.message)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--server=model.example:1 mix --token-file={token}", "the token would go to model.exam"),
        ("mix --token-file={gone}", "{gone}: No such file or directory"),
        ("mix --ca={gone}", "{gone}: No such file or directory"),
        ("mix --ca={token}", "{token} holds no certificate in PEM"),
        ("mix --cert={token}", "a client certificate and its key come together: give both"),
        ("--server=localhost:1,localhost:2 add math", "Mix.AddDomain is about one server"),
        ("--server=localhost:1,,localhost:2 add math", "'localhost:1,,localhost:2' are no addr"),
    ],
)
def test_what_is_refused_before_anything_is_sent(
    ctl: Ctl, server: FakeServer, token_file: Path, arguments: str, line: str
) -> None:
    places = {"token": token_file, "gone": token_file.with_name("gone")}
    assert one_line(ctl(*arguments.format(**places).split())).startswith(line.format(**places))
    assert server.requests == []


def test_texts_go_to_several_servers(ctl: Ctl, server: FakeServer) -> None:
    with FakeServer() as other:
        both = f"{server.address},{other.address}"
        assert ctl("--server", both, "compare", "x", "--mix=math", "--mix=base").exit_code == 0
        assert len(server.requests) == len(other.requests) == 1


@pytest.mark.parametrize("option", ["--set", "--name=x"])
def test_a_fit_that_would_change_one_of_several_is_not_begun(
    ctl: Ctl, server: FakeServer, token_file: Path, option: str
) -> None:
    servers = f"{server.address},{server.address}"
    result = ctl("--server", servers, "fit", str(token_file), "--domains=math", option)
    assert result.exit_code == 2
    assert "give one address" in result.stderr
    assert server.requests == []


def test_a_process_says_one_line_and_grpc_none(authority: CA, tmp_path: Path) -> None:
    other = file_of(CA(), tmp_path / "other.pem")
    with FakeServer(credentials=server_credentials(authority)) as server:
        process = run_process(server, "mix", "--ca", str(other))
        _, said = process.communicate(timeout=60)
    assert said.splitlines() == [
        f"adapterctl: no connection to {server.address}: the server's certificate is not to be "
        "trusted: unable to get local issuer certificate"
    ]


def test_public_authorities_are_those_of_grpc(authority: CA, ca: Path) -> None:
    with FakeServer(credentials=server_credentials(authority)) as server:
        process = run_process(
            server,
            "mix",
            "--tls",
            shell=["env", f"GRPC_DEFAULT_SSL_ROOTS_FILE_PATH={ca}"],
        )
        shown, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "math" in shown
