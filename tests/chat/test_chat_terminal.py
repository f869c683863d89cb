"""The chat as people meet it: through a pseudo-terminal, and through a pipe."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pexpect
import pytest

from llmcad_mlx import load
from llmcad_mlx.conversations.file import read_conversation
from tests.support.command_line import CHILD, finished

QUESTION = "tell me of the cat"

pytestmark = pytest.mark.usefixtures("tiny_home")


class Terminal:
    def __init__(self, *words: object, **variables: str) -> None:
        environment = {**os.environ, "TERM": "xterm-256color", "NUMBA_NUM_THREADS": "1", **variables}
        self.child = pexpect.spawn(
            sys.executable, ["-c", CHILD, "chat", *map(str, words)], env=environment, encoding="utf-8",
            codec_errors="replace", timeout=30, dimensions=(40, 100),
        )  # fmt: skip

    def expect(self, text: str) -> None:
        self.child.expect_exact(text)

    def wait(self, shown: str = "") -> str:
        """Until `shown` is seen and the next message may be typed; returns the status line below it."""
        self.expect(shown)
        self.expect("\x1b[6n")  # an open prompt asks where the cursor is, and a terminal answers
        self.type("\x1b[3;1R")
        self.child.expect(r"((?:[\d.]+ tokens/s · [\d.]+ tokens per pass · )?memory [\d.]+ [MG]B)")
        return str(self.child.match[1])

    def type(self, text: str) -> None:
        self.child.send(text)

    def say(self, line: str, answer: str) -> str:
        """A line, and what must be seen before the next prompt; returns the status line."""
        self.type(line + "\r")
        return self.wait(answer)

    def close(self) -> int:
        """The exit code of a chat that has ended."""
        self.child.expect(pexpect.EOF)
        self.child.close()
        assert self.child.signalstatus is None
        return int(self.child.exitstatus or 0)


def test_a_whole_session(endless: Path, draft: Path, tiny_home: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.chat"
    words = ("--target", endless, "--draft", draft, "-m", "24")
    chat = Terminal(*words, "--tree-nodes", "8", "--system", "be kind")
    chat.wait("endless, draft")
    status = chat.say(QUESTION, "[cut at max_tokens 24")
    assert "tokens per pass" in status

    chat.say("/set max_tokens -1", "[max_tokens -1]")
    chat.type("in the\x1b\rother one\r")  # two lines
    chat.child.expect(r"\x1b\[2m[\d.]+ tokens/s · [\d.]+ tokens per pass")  # it is answering
    chat.child.sendintr()
    chat.wait("[stopped; /quit or Ctrl-D ends the chat]")
    chat.child.sendintr()  # at the prompt there is nothing to stop
    chat.wait("[/quit or Ctrl-D ends the chat]")
    chat.say("/undo", "[taken back: in the other one]")
    chat.say("/set max_tokens 24", "[max_tokens 24]")
    chat.say("/set temperature 0.8", "[temperature 0.8]")
    chat.say("/regen", "[seed 1]")
    chat.say("/stats", "tokens per pass")
    chat.say("/tree", "accepted")
    chat.say("/sav", "did you mean /save?")
    chat.type("/hel\t")  # completed
    chat.expect("p")
    chat.type("\r")
    chat.wait("Alt-Enter begins a new line")
    chat.say("/set colour on", "[colour on]")
    chat.type("\x1b[200~some\nlines\x1b[201~\r")  # pasted
    chat.wait("[cut at max_tokens 24")
    chat.say(f"/save {file}", "[saved")
    chat.type("/quit\r")
    assert chat.close() == 0

    data = read_conversation(file).data
    said = data["conversation"]["messages"]
    assert [message["content"] for message in said[::2]] == [QUESTION, "some\nlines"]
    with load(endless, None) as engine:
        prompt = [{"role": "system", "content": "be kind"}]
        for question, answer in zip(said[::2], said[1::2], strict=True):
            prompt.append({"role": "user", "content": question["content"]})
            assert answer["content"] == engine.generate(prompt, max_tokens=24, temperature=0.8, seed=1).text
            prompt.append({"role": "assistant", "content": answer["content"]})

    again = Terminal(*words, "--load", file)
    again.wait("[loaded talk.chat: 4 messages; the last one was: some lines]")
    again.say("and then", "[cut at max_tokens 24")
    again.type("/stats\r")
    again.child.expect(r"prompt +(\d+) tokens, (\d+) of them read before")
    prompted, reused = map(int, again.child.match.groups())
    assert prompted > reused > 24
    again.wait()
    again.type("\x1b[A\x1b[A\x1b[A")  # the history of both runs: /stats, and then, /quit
    again.expect("/qui")  # the t stands there already
    again.type("\x03")
    again.wait("[/quit or Ctrl-D")
    again.type("\x04")
    assert again.close() == 0
    assert (tiny_home / "chat_history").stat().st_mode & 0o777 == 0o600
    assert "+some\n+lines\n" in (tiny_home / "chat_history").read_text()


def test_a_terminal_without_a_locale(endless: Path, tmp_path: Path) -> None:
    file, locale = tmp_path / "talk.chat", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    chat = Terminal("--target", endless, "--draft", "ngram", "-m", "2", **locale, NO_COLOR="1")
    chat.wait()
    chat.say("Straße", "[cut at max_tokens 2")
    chat.type("caf")
    chat.child.buffer = ""
    os.write(chat.child.child_fd, b"\xe9\r")
    chat.wait("what you typed: is not UTF-8 text")
    chat.say("and then", "[cut at max_tokens 2")
    chat.say(f"/save {file}", "[saved")
    chat.type("\x04")
    assert chat.close() == 0
    said = read_conversation(file).data["conversation"]["messages"]
    assert [message["content"] for message in said[::2]] == ["Straße", "and then"]


def test_no_history_keeps_nothing(endless: Path, tiny_home: Path) -> None:
    chat = Terminal("--target", endless, "--draft", "ngram", "-m", "2", "--no-history")
    chat.wait()
    chat.say("a word that stays here", "[cut at max_tokens 2")
    chat.type("\x04")
    assert chat.close() == 0
    history = tiny_home / "chat_history"
    assert not history.exists() or "a word that stays here" not in history.read_text()


def test_a_pipe_gets_plain_text(endless: Path, draft: Path) -> None:
    lines = [QUESTION, "/set colour on", "/stats", "/tree", "and then"]
    environment = {**os.environ, "TERM": "xterm-256color", "FORCE_COLOR": "1"}
    words = ("--target", endless, "--draft", draft, "-m", "12")
    done = finished("chat", *words, input="\n".join(lines), env=environment)
    assert done.returncode == 0
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", done.stdout + done.stderr)
    assert "target passes" in done.stdout
    assert "accepted" in done.stdout
