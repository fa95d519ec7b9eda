import json
import signal
import subprocess
from typing import Any

import grpc
import pytest
from tests.client.adapterctl import Ctl, one_line, printed, run_process
from tests.client.fake_server import DEFAULT, Failure, FakeServer, Hang, chunks, state, weights_of
from tests.client.terminal import Terminal

from superpose_proto.v1 import inference_pb2

NO_TEMPLATE = Failure(
    grpc.StatusCode.INVALID_ARGUMENT, "this base has no chat template", "NO_CHAT_TEMPLATE"
)


def messages(request: Any) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in request.chat.messages]


def without_template(server: FakeServer) -> None:
    server.answers["GenerateStream"] = lambda request: (
        NO_TEMPLATE if request.HasField("chat") else chunks(request)
    )


def test_a_conversation_through_a_pipe(ctl: Ctl, server: FakeServer) -> None:
    result = ctl("chat", "--max-new-tokens", "9", stdin="What is 2 + 3?\n\n  \n And 3 + 3?\n")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "The sum is 5.\nThe sum is 5.\n"
    first, second = server.requests
    assert messages(first) == [("user", "What is 2 + 3?")]
    assert messages(second) == [
        ("user", "What is 2 + 3?"),
        ("assistant", "The sum is 5."),
        ("user", " And 3 + 3?"),
    ]
    assert not first.HasField("mix")
    assert first.options == inference_pb2.GenerateOptions(temperature=0, max_new_tokens=9)


def test_a_base_without_a_chat_template_goes_on_with_the_text(ctl: Ctl, server: FakeServer) -> None:
    without_template(server)
    result = ctl("chat", stdin="Two and three:\nFour:\n/reset\nFive:\n")
    assert result.stdout.splitlines() == [
        *["The sum is 5."] * 2,
        "forgotten; the mix stays",
        "The sum is 5.",
    ]
    # Said once.
    assert result.stderr.count("\n") == 1
    assert "no chat template" in result.stderr
    asked, *rest = server.requests
    assert messages(asked) == [("user", "Two and three:")]
    assert [request.prompt for request in rest] == [
        "Two and three:",
        "Two and three:The sum is 5.\nFour:",
        "Five:",
    ]


def test_the_mix_may_change(ctl: Ctl, server: FakeServer) -> None:
    lines = "/mix\nhi\n/mix math;medicine=-0.5\nhi\n/mix base\nhi\n/mix default\nhi\n"
    result = ctl("chat", "--mix", "finance", stdin=lines)
    assert [line for line in result.stdout.splitlines() if line.startswith("mix")] == [
        "mix finance=1",
        "mix math=1,medicine=-0.5",
        "mix base",
        "mix default",
    ]
    first, second, third, last = server.requests
    assert weights_of(first.mix) == {"finance": 1.0}
    assert weights_of(second.mix) == {"math": 1.0, "medicine": -0.5}
    assert (third.HasField("mix"), weights_of(third.mix)) == (True, {})
    assert not last.HasField("mix")
    assert len(messages(last)) == 7


def test_score_under_the_mix_and_under_base(ctl: Ctl, server: FakeServer) -> None:
    result = ctl("chat", stdin="/score  a text \n/mix base\n/score a text\n")
    assert result.stdout.splitlines() == [
        "perplexity 2.0000 under math=1,medicine=0.5, 2.0000 under base; tokens 6",
        "mix base",
        "perplexity 2.0000 under base; tokens 6",
    ]
    assert [request.items[0].text for request in server.requests] == ["a text"] * 3
    assert not server.requests[0].HasField("mix")
    assert all(request.HasField("mix") for request in server.requests[1:])


@pytest.mark.parametrize(
    ("line", "words", "status"),
    [
        ("/frobnicate", "no command is called /frobnicate; /help lists them", 1),
        ("/score", "/score takes a text", 1),
        ("/mix math=", "mix 'math='", 2),
    ],
)
def test_a_command_that_cannot_be_carried_out_ends_a_pipe(
    ctl: Ctl, server: FakeServer, line: str, words: str, status: int
) -> None:
    assert words in one_line(ctl("chat", stdin=f"{line}\nhi\n"), status)
    assert server.requests == []


def test_nothing_to_score(ctl: Ctl, server: FakeServer) -> None:
    server.answers["Score"] = inference_pb2.ScoreResponse(
        items=[inference_pb2.ItemScore(perplexity=float("nan"))],
        perplexity=float("nan"),
        mix=state(),
    )
    assert "nothing to score" in one_line(ctl("chat", stdin="/score x\n"))


def test_a_bad_mix_at_the_start_is_wrong_usage(ctl: Ctl, server: FakeServer) -> None:
    assert "mix 'math='" in one_line(ctl("chat", "--mix", "math=", stdin="hi\n"), 2)
    assert server.requests == []


def test_help_names_every_command_and_quit_ends(ctl: Ctl, server: FakeServer) -> None:
    result = ctl("chat", stdin="/help\n/quit\nhi\n")
    assert result.exit_code == 0
    for command in ("/mix", "/score", "/reset", "/help", "/quit"):
        assert command in result.stdout
    assert server.requests == []


def test_a_line_with_a_blank_before_a_slash_is_text(ctl: Ctl, server: FakeServer) -> None:
    ctl("chat", stdin=" /etc/hosts\n")
    assert messages(server.request) == [("user", " /etc/hosts")]


def test_json_is_an_object_an_answer(ctl: Ctl) -> None:
    result = ctl("chat", "--json", stdin="hi\n/mix math\n/score x\n/reset\n")
    answer, mix, score, reset = (json.loads(line) for line in result.stdout.splitlines())
    assert (answer["text"], answer["token_ids"]) == ("The sum is 5.", [464, 2160, 318])
    assert answer["usage"] == {"prompt_tokens": 9, "completion_tokens": 3}
    assert mix == {"mix": "math=1"}
    assert [len(each["mix"]["entries"]) for each in score["scores"]] == [1, 0]
    assert reset == {}


def test_a_failure_ends_a_pipe(ctl: Ctl, server: FakeServer) -> None:
    server.answers["GenerateStream"] = Failure(grpc.StatusCode.NOT_FOUND, "no adapter", "R")
    assert one_line(ctl("chat", stdin="hi\nho\n")) == "no adapter"
    assert len(server.requests) == 1


def test_on_a_terminal(server: FakeServer) -> None:
    """Ctrl-C ends an answer, a failure is a line, Ctrl-D ends the chat."""
    said = inference_pb2.GenerateStreamResponse(text="The sum\x1b[2J")
    server.answers["GenerateStream"] = [said, Hang()]
    with Terminal(server, "chat", "--mix", "math", columns=120) as terminal:
        terminal.see("> ")
        terminal.press("two\n")
        terminal.see("The sum[2J")
        terminal.interrupt()
        assert server.cancelled.wait(10)
        terminal.see("> ", times=2)
        # What came of the answer is remembered.
        server.answers["GenerateStream"] = chunks
        terminal.press("three\n")
        terminal.see("[9 + 3 tokens, length, mix math=1")
        assert messages(server.requests[-1]) == [
            ("user", "two"),
            ("assistant", "The sum\x1b[2J"),
            ("user", "three"),
        ]
        # What failed is not.
        server.answers["GenerateStream"] = Failure(
            grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", "QUEUE_FULL"
        )
        terminal.press("four\n")
        terminal.see("adapterctl: the queue is full")
        terminal.press("/mix math=\n")
        terminal.see("adapterctl: mix 'math='")
        server.answers["GenerateStream"] = chunks
        terminal.press("five\n")
        terminal.see("[9 + 3 tokens, length, mix math=1", times=2)
        assert [content for role, content in messages(server.requests[-1]) if role == "user"] == [
            "two",
            "three",
            "five",
        ]
        # At the prompt Ctrl-C gives up the line. Python sees it at the next key where it comes just
        # after one, before readline waits.
        terminal.press("nev")
        terminal.see("> nev")
        terminal.interrupt()
        terminal.press("\n")
        terminal.press("six\n")
        terminal.see("[9 + 3 tokens, length, mix math=1", times=3)
        assert [content for role, content in messages(server.requests[-1]) if role == "user"] == [
            "two",
            "three",
            "five",
            "six",
        ]
        terminal.see_last("> ")
        terminal.press("\x04")
        assert terminal.end() == 0
    assert "Traceback" not in terminal.plain


def test_ctrl_c_ends_a_chat_that_reads_a_pipe(server: FakeServer) -> None:
    server.answers["GenerateStream"] = [
        inference_pb2.GenerateStreamResponse(text="The sum"),
        Hang(),
    ]
    with run_process(server, "chat", stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("hi\nho\n")
        process.stdin.flush()
        assert process.stdout.read(7) == "The sum"
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert process.returncode == 130
    assert len(server.requests) == 1


def test_default_mix_is_the_servers(ctl: Ctl) -> None:
    answer = printed(ctl("chat", "--json", stdin="hi\n"))
    assert {entry["domain"]: entry["weight"] for entry in answer["mix"]["entries"]} == DEFAULT
