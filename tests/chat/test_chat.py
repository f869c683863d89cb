"""The chat without a terminal: commands, settings, what joins a conversation, and what is drawn."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from rich.console import Console, RenderableType

from llmcad_mlx import Engine, UsageError, load
from llmcad_mlx.chat.commands import COMMANDS, Call, ChatSettings, parse
from llmcad_mlx.chat.lines import CommandCompleter
from llmcad_mlx.chat.screen import AnswerView, GrowingColours, GrowingMarkdown, TerminalAnswer, visible
from llmcad_mlx.chat.session import ChatSession, Conversation, Message
from llmcad_mlx.chat.tree_view import RoundTree, draw
from llmcad_mlx.cli.main import run
from llmcad_mlx.settings import GenerationOptions
from llmcad_mlx.tree.token_tree import TokenTree
from llmcad_mlx.tree.walk import walk
from tests.support.tiny_folder import EOS, make_folder

OPTIONS_USED: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "seed": 0, "policy": "throughput"}

pytestmark = pytest.mark.usefixtures("tiny_home")


def rendered(what: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(what)
    return console.file.getvalue()  # type: ignore[attr-defined]


class Interrupter(AnswerView):
    def __init__(self, stop_at: int | None) -> None:
        self._stop_at, self._count = stop_at, 0

    def progress(self, done: int, total: int) -> None:
        if self._stop_at == 0:
            raise KeyboardInterrupt

    def add(self, response: Any) -> None:
        self._count += 1
        if self._count == self._stop_at:
            raise KeyboardInterrupt


class Recorder:
    """A screen that keeps what it is shown. `stop_at`: press Ctrl-C at that token; 0: while the prompt is read."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.errors: list[str] = []
        self.stop_at: int | None = None

    def answer(self, engine: Engine, settings: ChatSettings) -> AnswerView:
        return Interrupter(self.stop_at)

    def show(self, what: RenderableType) -> None:
        self.said.append(rendered(what))

    def note(self, line: str) -> None:
        self.said.append(line)

    def error(self, line: str) -> None:
        assert "\n" not in line
        self.errors.append(line)


@pytest.fixture
def session(engine: Engine) -> ChatSession:
    return new_session(engine)


def new_session(engine: Engine) -> ChatSession:
    return ChatSession(engine, ChatSettings(GenerationOptions.of(**OPTIONS_USED)), Recorder())


def screen(session: ChatSession) -> Recorder:
    assert isinstance(session.screen, Recorder)
    return session.screen


def say(session: ChatSession, *lines: str) -> None:
    """Lines that are all obeyed or answered."""
    for line in lines:
        assert session.handle(line)
    assert screen(session).errors == []


def refused(session: ChatSession, line: str) -> str:
    """What is said to a line that cannot be."""
    before = session.conversation, session.settings
    assert session.handle(line)
    assert before == (session.conversation, session.settings)
    return screen(session).errors.pop()


def answers(session: ChatSession) -> list[str]:
    return [message.content for message in session.conversation.messages[1::2]]


def expected(engine: Engine, messages: list[dict[str, str]], **options: Any) -> str:
    engine.restore(None)
    return engine.generate(messages, **{**OPTIONS_USED, "policy": "plain", **options}).text


# --- Lines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["hello", "", " /help me", "what is 1/2?", "a\n/quit"])
def test_messages_are_no_commands(line: str) -> None:
    assert parse(line) is None


@pytest.mark.parametrize(
    ("line", "call"),
    [
        ("/help", Call("help", "")),
        ("/quit ", Call("quit", "")),
        ("/bye", Call("quit", "")),
        ("/?", Call("help", "")),
        ("/system  be brief, be\nkind ", Call("system", "be brief, be\nkind")),
        ("/save my talk.chat", Call("save", "my talk.chat")),
        ("/set temperature 0.5", Call("set", "temperature 0.5")),
    ],
)
def test_commands_and_what_they_take(line: str, call: Call) -> None:
    assert parse(line) == call


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/sav x", "/sav: unknown command; did you mean /save?"),
        ("/regenerate", "/regenerate: unknown command; did you mean /regen?"),
        ("/quite", "/quite: unknown command; did you mean /quit?"),
        ("/xyzzy", "/xyzzy: unknown command; /help lists the commands"),
        ("/", "/: unknown command; /help lists the commands"),
        ("/undo 2", "/undo: takes nothing, not '2'"),
        ("/save", "/save: give a file, like /save talk.chat"),
        ("/load", "/load: give a file, like /load talk.chat"),
    ],
)
def test_what_is_no_command_is_said_in_one_line(session: ChatSession, line: str, message: str) -> None:
    assert refused(session, line) == message


@pytest.mark.parametrize("name", [command.name for command in COMMANDS])
def test_every_command_is_obeyed(session: ChatSession, tmp_path: Path, name: str) -> None:
    file = tmp_path / "a.chat"
    say(session, "tell me of the cat", f"/save {file}")
    screen(session).said.clear()
    argument = f" {file}" if name in ("save", "load") else ""
    assert session.handle(f"/{name}{argument}") == (name != "quit")
    assert screen(session).errors == []
    assert (screen(session).said != []) == (name != "quit")


def test_help_names_all_commands_and_the_keys(session: ChatSession) -> None:
    say(session, "/help")
    text = "".join(screen(session).said)
    assert all(f"/{command.name}" in text and command.help in text for command in COMMANDS)
    assert "Alt-Enter begins a new line" in text


# --- Settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("/set temperature 0.7", "temperature", 0.7),
        ("/set temp 1", "temperature", 1.0),
        ("/set top-p 0.9", "top_p", 0.9),
        ("/set top_k 40", "top_k", 40),
        ("/set min_p 0.05", "min_p", 0.05),
        ("/set seed 7", "seed", 7),
        ("/set max_tokens -1", "max_tokens", -1),
        ("/set policy paper", "policy", "paper"),
        ("/set tree_nodes 12", "tree_nodes", 12),
        ("/set tree_nodes auto", "tree_nodes", None),
        ("/set pipeline off", "pipeline", False),
        ("/set stop \\n\\n", "stop", ("\n\n",)),
        ("/set stop none", "stop", ()),
        ("/set repetition_penalty 1.1", "repetition_penalty", 1.1),
    ],
)
def test_set_takes_over_what_was_typed(session: ChatSession, line: str, name: str, value: Any) -> None:
    say(session, line)
    assert session.settings.options.keywords()[name] == value
    assert type(session.settings.options.keywords()[name]) is type(value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set temperature warm", "temperature: 'warm' is not a number"),
        ("/set temperature -1", "temperature: -1.0 is out of range; it must be at least 0"),
        ("/set temperature nan", "temperature: must be a finite number, not nan"),
        ("/set top_p 0", "top_p: must be above 0; use 1 to switch it off"),
        ("/set top_k 1.5", "top_k: '1.5' is not an integer"),
        ("/set max_tokens 0", "max_tokens: 0 is out of range; give 1 or more, or -1 for no limit"),
        ("/set policy fast", "policy: 'fast' is unknown; choose one of throughput, paper, chain, plain"),
        ("/set tree_nodes 0", "tree_nodes: 0 is out of range; it must be from 1 to 4096"),
        ("/set tree perhaps", "tree: 'perhaps' is neither on nor off"),
        ("/set colour green", "colour: 'green' is neither on nor off"),
        ("/set temprature 1", "temprature: unknown option; did you mean temperature?"),
        ("/set xyzzy 1", "xyzzy: unknown option; /set lists them"),
        ("/set temperature", "/set: give a name and a value, like /set temperature VALUE"),
    ],
)
def test_set_refuses_in_one_line_and_changes_nothing(session: ChatSession, line: str, message: str) -> None:
    assert refused(session, line) == message


def test_options_that_contradict_each_other_are_refused(session: ChatSession) -> None:
    say(session, "/set policy plain")
    assert "the plain policy has no tree" in refused(session, "/set tree_nodes 8")


def test_set_lists_everything(session: ChatSession) -> None:
    say(session, "/set seed 3", "/set colour on")
    screen(session).said.clear()
    say(session, "/set")
    (table,) = screen(session).said
    rows = dict(row.split() for row in table.splitlines())
    assert rows == {
        "temperature": "0.0", "top_p": "1.0", "min_p": "0.0", "top_k": "0", "seed": "3", "max_tokens": "12",
        "tree_nodes": "auto", "pipeline": "on", "tree": "on", "fallback": "on", "policy": "throughput",
        "colour": "on",
    }  # fmt: skip
    screen(session).said.clear()
    say(session, "/set repetition_penalty 1.5", "/set stop a", "/set", "/set stop none")
    *_, table, none = screen(session).said
    assert "repetition_penalty  1.5" in table
    assert "stop                a " in table
    assert none == "[stop none]"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("/s", ["/system", "/save", "/set", "/stats"]),
        ("/regen", ["/regen"]),
        ("/set te", ["temperature"]),
        ("/set col", ["colour"]),
        ("/undo ", []),
        ("/xyzzy", []),
        ("tell me /s", []),
        ("", []),
    ],
)
def test_tab_completes_commands_and_settings(text: str, found: list[str]) -> None:
    completions = CommandCompleter().get_completions(Document(text), CompleteEvent(completion_requested=True))
    assert [completion.text for completion in completions] == found


def test_tab_completes_files(tmp_path: Path) -> None:
    (tmp_path / "talk.chat").touch()
    text = f"/load {tmp_path}/ta"
    (found,) = CommandCompleter().get_completions(Document(text), CompleteEvent(completion_requested=True))
    assert text[: len(text) + found.start_position] + found.text == f"/load {tmp_path}/talk.chat"


def test_settings_act(session: ChatSession, engine: Engine) -> None:
    say(session, "/set temperature 0.9", "/set seed 4", "/set max_tokens 7", "tell me of the cat")
    prompt = [{"role": "user", "content": "tell me of the cat"}]
    warm = expected(engine, prompt, temperature=0.9, seed=4, max_tokens=7)
    assert answers(session) == [warm]
    assert warm != expected(engine, prompt, max_tokens=7)
    assert "[cut at max_tokens 7; /set max_tokens -1 takes the limit away]" in screen(session).said


# --- Conversations ------------------------------------------------------------------------------------------


def test_turns_follow_each_other(session: ChatSession, engine: Engine) -> None:
    say(session, "/system be kind", "tell me of the cat", "and then")
    prompt = session.conversation.prompt()
    assert [message["role"] for message in prompt] == ["system", "user", "assistant", "user", "assistant"]
    assert session.stats is not None
    assert session.stats.reused_tokens > 0
    assert answers(session) == [expected(engine, prompt[:2]), expected(engine, prompt[:4])]


def test_ctrl_c_keeps_the_answer_as_far_as_it_got(session: ChatSession, engine: Engine) -> None:
    whole = expected(engine, [{"role": "user", "content": "tell me of the cat"}])
    screen(session).stop_at = 5
    with pytest.raises(KeyboardInterrupt):
        session.handle("tell me of the cat")
    question, answer = session.conversation.messages
    assert question == Message("user", "tell me of the cat")
    assert not answer.complete
    assert whole.startswith(answer.content)
    assert 0 < len(answer.content) < len(whole)
    screen(session).stop_at = None
    say(session, "and then")
    assert answers(session)[1] == expected(engine, session.conversation.prompt()[:3])
    say(session, "/undo", "/regen")
    assert session.conversation.messages == (question, Message("assistant", whole))


def test_ctrl_c_before_the_first_token_takes_the_message_back(session: ChatSession, engine: Engine) -> None:
    engine.restore(None)
    screen(session).stop_at = 0
    with pytest.raises(KeyboardInterrupt):
        session.handle("tell me of the cat")
    assert session.conversation.messages == ()
    screen(session).stop_at = None
    say(session, "tell me of the cat")
    screen(session).stop_at = 0
    before = session.conversation.messages
    engine.restore(None)
    with pytest.raises(KeyboardInterrupt):
        session.handle("/regen")
    assert session.conversation.messages == before


def test_undo_is_as_if_it_was_never_said(session: ChatSession, engine: Engine) -> None:
    say(session, "tell me of the cat", "something else", "/undo", "and then")
    assert "[taken back: something else]" in screen(session).said
    prompt = session.conversation.prompt()
    assert [message["content"] for message in prompt[::2]] == ["tell me of the cat", "and then"]
    assert answers(session)[1] == expected(engine, prompt[:3])


def test_undo_and_regen_with_nothing_there(session: ChatSession) -> None:
    assert refused(session, "/undo") == "there is nothing to take back"
    assert refused(session, "/regen") == "there is no message to answer yet; write one"
    assert refused(session, "/stats") == "/stats: there is no answer yet"
    assert refused(session, "/tree") == "/tree: there is no answer yet"


def test_regen_goes_on_to_the_next_seed(session: ChatSession, engine: Engine) -> None:
    say(session, "/set temperature 0.9", "tell me of the cat")
    (first,) = answers(session)
    say(session, "/regen")
    (second,) = answers(session)
    prompt = session.conversation.prompt()[:1]
    assert first == expected(engine, prompt, temperature=0.9)
    assert second == expected(engine, prompt, temperature=0.9, seed=1) != first
    assert "[seed 1]" in screen(session).said


def test_regen_without_temperature_says_that_nothing_changes(session: ChatSession) -> None:
    say(session, "tell me of the cat")
    before = answers(session)
    say(session, "/regen")
    assert answers(session) == before
    assert "temperature is 0" in screen(session).said[-2] + screen(session).said[-1]


def test_clear_forgets_messages_and_caches(session: ChatSession, engine: Engine) -> None:
    say(session, "/system be kind", "tell me of the cat", "/clear")
    assert session.conversation == Conversation("be kind")
    assert engine.snapshot() is None
    say(session, "/system none")
    assert session.conversation.system is None


def test_a_full_context_is_said_and_the_message_not_kept(session: ChatSession) -> None:
    say(session, "tell me of the cat")
    message = refused(session, "the cat " * 300)
    assert message == "the conversation no longer fits the model's context of 512 tokens; /undo or /clear"


def test_an_answer_that_reaches_the_end_of_the_context(session: ChatSession) -> None:
    session.settings = session.settings.with_values({"max_tokens": -1, "logit_bias": {EOS: -1e9}})
    say(session, "x" * 480)
    assert session.stats is not None
    assert session.stats.prompt_tokens + session.stats.generated_tokens == 512
    assert screen(session).said == ["[the model's context of 512 tokens is full; /undo or /clear]"]


def test_a_saved_conversation_goes_on_elsewhere(session: ChatSession, engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "a.chat"
    say(session, "/system be kind", "/set temperature 0.9", "/set stop xyz", "tell me of the cat", f"/save {file}")
    say(session, "and then")
    other = new_session(engine)
    say(other, "something else", f"/load {file}", "and then")
    assert other.stats is not None
    assert session.stats is not None
    assert other.stats.reused_tokens == session.stats.reused_tokens > 0
    assert other.conversation == session.conversation
    assert other.settings.options == session.settings.options
    assert "[loaded a.chat: 1 message; the last one was: tell me of the cat]" in screen(other).said


def test_a_cache_that_does_not_fit_is_read_again(session: ChatSession, engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "a.chat"
    say(session, "tell me of the cat", f"/save {file}", "and then")
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    other = new_session(engine)
    say(other, f"/load {file}", "and then")
    assert other.conversation == session.conversation
    assert other.stats is not None
    assert other.stats.reused_tokens == 0
    assert screen(other).said[0].startswith("[the saved cache is not used: its checksum is wrong")


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"conversation": {}, "settings": {}},
        {"conversation": [], "settings": {}},
        {"conversation": {"system": 3, "messages": []}, "settings": {}},
        {"conversation": {"system": None, "messages": [{"role": "user", "content": "x"}]}, "settings": {}},
        {"conversation": {"system": None, "messages": [{"role": "assistant"}] * 2}, "settings": {}},
        {"conversation": {"system": None, "messages": []}, "settings": []},
    ],
)
def test_a_file_without_a_conversation_changes_nothing(
    session: ChatSession, engine: Engine, tmp_path: Path, data: dict[str, Any]
) -> None:
    say(session, "tell me of the cat")
    engine.save_conversation(tmp_path / "a.chat", data)
    assert "holds no conversation of a chat" in refused(session, f"/load {tmp_path / 'a.chat'}")


def test_saved_settings_are_checked_like_typed_ones(session: ChatSession, engine: Engine, tmp_path: Path) -> None:
    data = {"conversation": {"system": None, "messages": []}, "settings": {"temperature": -3}}
    engine.save_conversation(tmp_path / "a.chat", data)
    assert "temperature: -3 is out of range" in refused(session, f"/load {tmp_path / 'a.chat'}")


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    raw = load(make_folder(tmp_path / "raw", template=False), None)
    with raw, pytest.raises(UsageError, match="no chat template; use `llmcad-mlx generate`"):
        new_session(raw)


# --- What is drawn ------------------------------------------------------------------------------------------


def test_the_tree_shows_what_became_of_each_node() -> None:
    r"""
    10 ─ 11 ─ 12 ─ 13     11 and 12 are accepted; 13, 14 and 15 were tested in vain; 16 was not sent; 17 was
     │    └─ 14            drafted below 12 while the target worked, and is the target's own token
     └─ 15
    """
    tree = TokenTree(10, 5)
    a = tree.add(0, 11, 0.9)
    b = tree.add(a, 12, 0.8)
    tree.add(b, 13, 0.7)
    tree.add(a, 14, 0.1, "ngram")
    tree.add(0, 15, 0.05)
    tree.add(0, 16, 0.001)
    selection = tree.select(6)
    tree.add(b, 17, 0.25)
    target = {0: 11, 1: 12, 2: 17}
    steps = walk(selection.tree, lambda node, path: target[node])
    picture = RoundTree(tree, selection, steps)
    accepted, rejected, provisional = "accepted", "rejected", "provisional"
    assert picture.states()[1:] == [accepted, accepted, rejected, rejected, rejected, provisional, provisional]
    assert rendered(draw(picture, str)).splitlines() == [
        "'10'",
        "├── ✓ '11' 0.90",
        "│   ├── ✓ '12' 0.80",
        "│   │   ├── ✗ '13' 0.70",
        "│   │   ├── · '17' 0.25",
        "│   │   └── → '17' the target's own",
        "│   └── ✗ '14' 0.10 ngram",
        "├── ✗ '15' 0.05",
        "└── · '16' 0.00",
        "✓ 2 accepted  ✗ 3 rejected  · 2 provisional",
    ]


def test_a_large_tree_is_cut_to_its_likeliest_nodes() -> None:
    tree = TokenTree(1)
    for token in range(200):
        tree.add(0, token, token / 200)
    selection = tree.select(200)
    picture = RoundTree(tree, selection, walk(selection.tree, lambda node, path: 999 if node else 3))
    lines = rendered(draw(picture, str)).splitlines()
    assert "✓ '3' 0.01" in "\n".join(lines)  # what was accepted is there, however unlikely it was
    assert "(152 less likely ones not shown)" in lines[-1]
    assert len(lines) == 1 + 48 + 1 + 1


def test_tree_and_stats_of_a_real_answer(session: ChatSession) -> None:
    say(session, "/set tree_nodes 8", "tell me of the cat", "/tree", "/stats")
    tree, table = screen(session).said[-2:]
    assert "✓" in tree
    assert "accepted" in tree.splitlines()[-1]
    assert session.stats is not None
    assert f"{session.stats.target_passes}, {session.stats.tokens_per_pass:.2f} tokens per pass" in table
    assert "reads emulated" not in table


TEXTS = [
    "# Title\n\nA paragraph\nof two lines.\n\n- one\n- two\n\n  more of two\n\n1. first\n2. second\n",
    "Before.\n```python\ndef f():\n\n    return 1\n```\nAfter it.\n#hashtag\n",
    "a | b\n--|--\n1 | 2\n3 | 4\n\nText *with* **style** and `code`.\n\n> quote\n> goes on\n",
    "Heading\n===\n\ntext\n-\n- item\n***\nlast line without an end",
    "\n\n\nlate",
    "",
]


def printed(text: GrowingMarkdown, pieces: list[str]) -> str:
    """What ends up on the screen."""
    console = Console(file=io.StringIO(), width=40, color_system=None)
    for piece in pieces:
        text.add(SimpleNamespace(text=piece, from_draft=False))  # type: ignore[arg-type]
        for block in text.finished():
            console.print(block)
    rest = text.rest()
    if rest is not None:
        console.print(rest)
    return console.file.getvalue()  # type: ignore[attr-defined]


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(TEXTS), st.lists(st.integers(1, 12), max_size=40))
def test_markdown_looks_the_same_however_it_comes(text: str, sizes: list[int]) -> None:
    """What was printed for good is never what the finished text would not have had there."""
    pieces, start = [], 0
    for size in sizes:
        pieces.append(text[start : start + size])
        start += size
    pieces.append(text[start:])
    by_lines = printed(GrowingMarkdown(), text.splitlines(keepends=True))
    assert printed(GrowingMarkdown(), pieces).split() == by_lines.split()
    assert printed(GrowingMarkdown(), list(text)) == by_lines


def test_markdown_is_printed_block_by_block() -> None:
    text, blocks = GrowingMarkdown(), []
    for char in "# Title\n\nOne.\n\nTwo":
        text.add(SimpleNamespace(text=char, from_draft=False))  # type: ignore[arg-type]
        blocks += [rendered(block).strip() for block in text.finished()]
    assert len(blocks) == 1
    assert "Title" in blocks[0]
    text.add(SimpleNamespace(text=".\n", from_draft=False))  # type: ignore[arg-type]
    assert [rendered(block).strip() for block in text.finished()] == ["One."]
    rest = text.rest()
    assert rest is not None
    assert rendered(rest).strip() == "Two."


def test_accepted_draft_tokens_have_a_colour() -> None:
    console = Console(file=io.StringIO(), width=40, color_system="standard", force_terminal=True)
    text = GrowingColours()
    for piece, from_draft in (("own", False), (" dra", True), ("fted\nnext", True), (" own", False)):
        text.add(SimpleNamespace(text=piece, from_draft=from_draft))  # type: ignore[arg-type]
        for block in text.finished():
            console.print(block)
    console.print(text.rest())
    assert console.file.getvalue() == (  # type: ignore[attr-defined]
        "own\x1b[32m dra\x1b[0m\x1b[32mfted\x1b[0m\n\x1b[32mnext\x1b[0m own\n"
    )


def test_an_answer_taller_than_the_screen_is_printed_once() -> None:
    console = Console(file=io.StringIO(), width=40, height=6, color_system=None, force_terminal=True)
    lines = [f"- line {number}" for number in range(30)]
    ticks = iter(range(10**6))
    with TerminalAnswer(console, GrowingMarkdown(), lambda _: "12.0 tokens/s", lambda: float(next(ticks))) as view:
        view.progress(3, 9)
        for line in lines:
            view.add(SimpleNamespace(text=line + "\n", from_draft=False, stats=None))  # type: ignore[arg-type]
        moving = console.file.getvalue()  # type: ignore[attr-defined]
    end = console.file.getvalue()[len(moving) :].rpartition("\x1b[2K")[2]  # type: ignore[attr-defined]
    assert "reading: 3/9 tokens" in moving
    assert "12.0 tokens/s" in moving
    assert [row.strip(" •") for row in end.splitlines() if "line" in row] == [line[2:] for line in lines]
    assert "tokens/s" not in end


def test_a_models_text_cannot_steer_the_terminal() -> None:
    assert visible("a\x1b[31mb\x07\x9b2Jc\r\nd\té😀") == "a[31mb2Jc\nd\té😀"


# --- Without a terminal -------------------------------------------------------------------------------------


class Pipe:
    """Standard input that is no terminal."""

    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)

    def isatty(self) -> bool:
        return False


def piped(monkeypatch: pytest.MonkeyPatch, data: bytes, *words: object) -> int:
    monkeypatch.setattr(sys, "stdin", Pipe(data))
    return run(["chat", *map(str, words)])


def test_json_is_one_object_for_each_answer(
    folder: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = b"tell me of the cat\n/stats\n/set temperature 0.9\nand then\n"
    assert piped(monkeypatch, lines, "--target", folder, "-m", 12, "--json", "--seed", 3) == 0
    out, err = capfd.readouterr()
    first, second = map(json.loads, out.splitlines())
    prompt = [{"role": "user", "content": "tell me of the cat"}]
    assert first["text"] == expected(engine, prompt)
    prompt += [{"role": "assistant", "content": first["text"]}, {"role": "user", "content": "and then"}]
    assert second["text"] == expected(engine, prompt, temperature=0.9, seed=3)
    assert (second["seed"], second["policy"], second["generated_tokens"]) == (
        3,
        "throughput",
        len(second["tokens"]),
    )
    assert "target passes" in err


def test_lines_that_cannot_be_are_told_and_the_others_answered(
    folder: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    data = b"/nonsense\n\xff\xfe\n\ntell me of the cat\n/quit\nnever answered\n"
    assert piped(monkeypatch, data, "--target", folder, "-m", 12) == 1
    out, err = capfd.readouterr()
    assert out == visible(expected(engine, [{"role": "user", "content": "tell me of the cat"}])) + "\n"
    assert err.splitlines()[:2] == [
        "error: /nonsense: unknown command; /help lists the commands",
        "error: line 2: is not UTF-8 text",
    ]
    assert err.splitlines()[-1] == "error: 2 lines could not be answered or obeyed; see above"


def test_the_command_line_counts_more_than_what_was_saved(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file, words = tmp_path / "a.chat", ("--target", folder, "--json")
    lines = f"/set temperature 0.5\ntell me of the cat\n/save {file}\n".encode()
    assert piped(monkeypatch, lines, *words, "-m", 5, "--seed", 2, "--system", "be kind") == 0
    capfd.readouterr()
    assert piped(monkeypatch, b"and then\n/set\n/system\n", *words, "--load", file, "--seed", 9) == 0
    out, err = capfd.readouterr()
    report = json.loads(out)
    assert (report["seed"], report["generated_tokens"]) == (9, 5)
    rows = [line.split() for line in err.splitlines()]
    assert ["temperature", "0.5"] in rows
    assert ["[system", "message:", "be", "kind]"] in rows


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temp", "-1"], "temperature: -1.0 is out of range"),
        (["--memory", "lots"], "memory: 'lots' is not a size"),
        (["--load", "nothing.chat"], "nothing.chat: cannot be read"),
        (["--policy", "plain", "--tree-nodes", "4"], "the plain policy has no tree"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_loaded(
    capfd: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert run(["chat", "--target", "/no/such/folder", *words]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err
