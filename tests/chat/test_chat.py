"""The chat without a terminal: commands, settings, what joins a conversation, and what is drawn."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_toolkit.completion import CompleteEvent, Completion
from prompt_toolkit.document import Document
from rich.console import Console, RenderableType

from llmcad_mlx import Engine, UsageError, load
from llmcad_mlx.chat import screen
from llmcad_mlx.chat.commands import COMMANDS, ChatSettings, parse
from llmcad_mlx.chat.lines import CommandCompleter
from llmcad_mlx.chat.screen import AnswerView, GrowingColours, GrowingMarkdown, TerminalAnswer, draw, visible
from llmcad_mlx.chat.session import ChatSession, Conversation, Message
from llmcad_mlx.engine.round import RoundTree
from llmcad_mlx.loader import load_pair
from llmcad_mlx.report import Answer, status_line
from llmcad_mlx.results import GenerationStats
from llmcad_mlx.settings import GenerationOptions, MemoryOptions
from llmcad_mlx.tree.token_tree import TokenTree
from llmcad_mlx.tree.walk import walk
from tests.support.serving import Scripted
from tests.support.tiny_folder import CHAT_TEMPLATE, EOS, byte_level_folder, copy_folder, make_folder

QUESTION = "tell me of the cat"
ASKED = [{"role": "user", "content": QUESTION}]
OPTIONS_USED: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "seed": 0, "policy": "throughput"}

pytestmark = pytest.mark.usefixtures("tiny_home")


def printed(*blocks: RenderableType, **console: Any) -> str:
    out = io.StringIO()
    for block in blocks:
        Console(file=out, **{"width": 100, "color_system": None, **console}).print(block)
    return out.getvalue()


def token(text: str, from_draft: bool = False) -> Any:
    return SimpleNamespace(text=text, from_draft=from_draft, stats=None)


class Chat(ChatSession):
    """A session that is its own screen and keeps what it is shown.

    `stop_at`: Ctrl-C is pressed at that token; 0: while the prompt is read.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine, ChatSettings(GenerationOptions.of(**OPTIONS_USED)), self)
        self.said: list[str] = []
        self.errors: list[str] = []
        self.stop_at: int | None = None

    def answer(self, engine: Engine, settings: ChatSettings, answer: Answer) -> AnswerView:
        view, tokens = AnswerView(), count(1)

        def stop(at: int) -> None:
            if at == self.stop_at:
                raise KeyboardInterrupt

        view.add, view.progress = lambda _: stop(next(tokens)), lambda *_: stop(0)
        return view

    def show(self, what: RenderableType) -> None:
        self.said.append(printed(what))

    def note(self, line: str) -> None:
        self.said.append(line)

    def error(self, line: str) -> None:
        assert "\n" not in line
        self.errors.append(line)

    def say(self, *lines: str) -> None:
        """Lines that are all obeyed or answered."""
        for line in lines:
            assert self.handle(line)
        assert self.errors == []

    def stopped(self, line: str, at: int) -> None:
        self.stop_at = at
        with pytest.raises(KeyboardInterrupt):
            self.handle(line)
        self.stop_at = None

    def refused(self, line: str) -> str:
        """What is said to a line that cannot be."""
        before = self.conversation, self.settings
        assert self.handle(line)
        assert before == (self.conversation, self.settings)
        return self.errors.pop()

    def answers(self) -> list[str]:
        return [message.content for message in self.conversation.messages[1::2]]


@pytest.fixture
def chat(engine: Engine) -> Chat:
    return Chat(engine)


def expected(engine: Engine, messages: list[dict[str, str]], **options: Any) -> str:
    engine.restore(None)
    return engine.generate(messages, **{**OPTIONS_USED, "policy": "plain", **options}).text


@pytest.mark.parametrize(
    ("line", "call"),
    [
        ("hello", None), ("", None), (" /help me", None), ("what is 1/2?", None), ("a\n/quit", None),
        ("/help", ("help", "")), ("/quit ", ("quit", "")), ("/bye", ("quit", "")),
        ("/?", ("help", "")), ("/system  be brief, be\nkind ", ("system", "be brief, be\nkind")),
        ("/save my talk.chat", ("save", "my talk.chat")),
        ("/set temperature 0.5", ("set", "temperature 0.5")),
    ],
)  # fmt: skip
def test_commands_and_what_they_take(line: str, call: tuple[str, str] | None) -> None:
    assert parse(line) == call


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/undo 2", "/undo: takes nothing, not '2'"),
        ("/save", "/save: give a file, like /save talk.chat"),
        ("/undo", "there is nothing to take back"),
        ("/regen", "there is no message to answer yet; write one"),
        ("/stats", "/stats: there is no answer yet"),
        ("/tree", "/tree: there is no answer yet"),
        ("/set temperature warm", "temperature: 'warm' is not a number"),
        ("/set top_k 1.5", "top_k: '1.5' is not an integer"),
        ("/set colour green", "colour: 'green' is neither on nor off"),
        ("/set temprature 1", "temprature: unknown option; did you mean temperature?"),
        ("/set xyzzy 1", "xyzzy: unknown option; /set lists them"),
        ("/set temperature", "/set: give a name and a value, like /set temperature VALUE"),
        ("caf\udce9", "what you typed: is not UTF-8 text"),
        ("/system caf\udce9", "what you typed: is not UTF-8 text"),
        ("/set stop caf\udce9", "what you typed: is not UTF-8 text"),
    ],
)
def test_what_cannot_be_is_said_in_one_line_and_changes_nothing(chat: Chat, line: str, message: str) -> None:
    assert chat.refused(line) == message


@pytest.mark.parametrize("name", [command.name for command in COMMANDS])
def test_every_command_is_obeyed(chat: Chat, tmp_path: Path, name: str) -> None:
    file = tmp_path / "a.chat"
    chat.say(QUESTION, f"/save {file}")
    chat.said.clear()
    argument = f" {file}" if name in ("save", "load") else ""
    assert chat.handle(f"/{name}{argument}") == (name != "quit")
    assert chat.errors == []
    assert (chat.said != []) == (name != "quit")
    if name == "help":
        assert all(command.help in chat.said[0] for command in COMMANDS)


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("temp 1", "temperature", 1.0), ("top-p 0.9", "top_p", 0.9), ("max_tokens -1", "max_tokens", -1),
        ("policy paper", "policy", "paper"), ("tree_nodes 12", "tree_nodes", 12),
        ("tree_nodes auto", "tree_nodes", None), ("pipeline off", "pipeline", False),
        ("stop \\n\\n", "stop", ("\n\n",)), ("stop none", "stop", ()),
    ],
)  # fmt: skip
def test_set_takes_over_what_was_typed(chat: Chat, line: str, name: str, value: Any) -> None:
    chat.say(f"/set {line}")
    taken = chat.settings.options.keywords()[name]
    assert (taken, type(taken)) == (value, type(value))


def test_set_lists_everything(chat: Chat) -> None:
    chat.say("/set seed 3", "/set colour on")
    chat.said.clear()
    chat.say("/set")
    (table,) = chat.said
    rows = dict(row.split() for row in table.splitlines())
    assert rows == {
        "temperature": "0.0", "top_p": "1.0", "min_p": "0.0", "top_k": "0", "seed": "3", "max_tokens": "12",
        "tree_nodes": "auto", "pipeline": "on", "tree": "on", "fallback": "on", "policy": "throughput",
        "colour": "on",
    }  # fmt: skip
    chat.said.clear()
    chat.say("/set repetition_penalty 1.5", "/set stop a", "/set", "/set stop none")
    *_, table, none = chat.said
    assert "repetition_penalty  1.5" in table
    assert "stop                a " in table
    assert none == "[stop none]"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("/s", ["/system", "/save", "/set", "/stats"]), ("/regen", ["/regen"]), ("/set te", ["temperature"]),
        ("/set col", ["colour"]), ("/undo ", []), ("/xyzzy", []), ("tell me /s", []), ("", []),
    ],
)  # fmt: skip
def test_tab_completes_commands_and_settings(text: str, found: list[str]) -> None:
    assert [completion.text for completion in completed(text)] == found


def test_tab_completes_files(tmp_path: Path) -> None:
    (tmp_path / "talk.chat").touch()
    text = f"/load {tmp_path}/ta"
    (found,) = completed(text)
    assert text[: len(text) + found.start_position] + found.text == f"/load {tmp_path}/talk.chat"


def completed(text: str) -> list[Completion]:
    return [*CommandCompleter().get_completions(Document(text), CompleteEvent(completion_requested=True))]


def test_ctrl_c_keeps_the_answer_as_far_as_it_got(chat: Chat, engine: Engine) -> None:
    whole = expected(engine, ASKED)
    chat.stopped(QUESTION, at=5)
    question, answer = chat.conversation.messages
    assert question == Message("user", QUESTION)
    assert not answer.complete
    assert whole.startswith(answer.content)
    assert 0 < len(answer.content) < len(whole)
    chat.say("and then")
    assert chat.answers()[1] == expected(engine, chat.conversation.prompt()[:3])
    chat.say("/undo", "/regen")
    assert chat.conversation.messages == (question, Message("assistant", whole))


def test_ctrl_c_before_the_first_token_takes_the_message_back(chat: Chat, engine: Engine) -> None:
    engine.restore(None)
    chat.stopped(QUESTION, at=0)
    assert chat.conversation.messages == ()
    chat.say(QUESTION)
    before = chat.conversation.messages
    engine.restore(None)
    chat.stopped("/regen", at=0)
    assert chat.conversation.messages == before


def test_undo_is_as_if_it_was_never_said(chat: Chat, engine: Engine) -> None:
    chat.say(QUESTION, "something else", "/undo", "and then")
    assert "[taken back: something else]" in chat.said
    prompt = chat.conversation.prompt()
    assert [message["content"] for message in prompt[::2]] == [QUESTION, "and then"]
    assert chat.answers()[1] == expected(engine, prompt[:3])


def test_regen_goes_on_to_the_next_seed_or_says_that_nothing_changes(chat: Chat, engine: Engine) -> None:
    chat.say(QUESTION, "/regen")
    assert chat.answers() == [expected(engine, ASKED)]
    assert any("temperature is 0" in line for line in chat.said)
    chat.say("/clear", "/set temperature 0.9", "/set max_tokens 7", QUESTION)
    first = chat.answers()
    chat.say("/regen")
    assert first == [expected(engine, ASKED, temperature=0.9, max_tokens=7)]
    assert chat.answers() == [expected(engine, ASKED, temperature=0.9, max_tokens=7, seed=1)] != first
    assert "[seed 1]" in chat.said
    assert "[cut at max_tokens 7; /set max_tokens -1 takes the limit away]" in chat.said


def test_clear_forgets_messages_and_caches(chat: Chat, engine: Engine) -> None:
    chat.say("/system be kind", QUESTION, "/clear")
    assert chat.conversation == Conversation("be kind")
    assert engine.snapshot() is None
    chat.say("/system none")
    assert chat.conversation.system is None


def test_what_is_typed_is_utf8_whatever_the_locale(chat: Chat) -> None:
    chat.say("/system gr\udcc3\udcbc\udcc3\udc9fe", "Stra\udcc3\udc9fe")  # as Python reads it without a locale
    assert chat.conversation.system == "grüße"
    assert chat.conversation.messages[0].content == "Straße"


def test_a_full_context_is_said_and_the_message_not_kept(chat: Chat) -> None:
    full = "the conversation no longer fits the model's context of 512 tokens; /undo or /clear"
    assert chat.refused("the cat " * 300) == full
    chat.settings = chat.settings.with_values({"max_tokens": -1, "logit_bias": {EOS: -1e9}})
    chat.say("x" * 480)
    assert chat.stats.prompt_tokens + chat.stats.generated_tokens == 512
    assert chat.said == ["[the model's context of 512 tokens is full; /undo or /clear]"]


def test_a_saved_conversation_goes_on_elsewhere(chat: Chat, engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "a.chat"
    chat.say("/system be kind", "/set temperature 0.9", "/set stop xyz", QUESTION, f"/save {file}")
    chat.say("and then")
    other = Chat(engine)
    other.say("something else", f"/load {file}", "and then")
    assert other.stats.reused_tokens == chat.stats.reused_tokens > 0
    assert other.conversation == chat.conversation
    assert other.settings.options == chat.settings.options
    assert "[loaded a.chat: 2 messages; the last one was: tell me of the cat]" in other.said


def test_a_cache_that_does_not_fit_is_read_again(chat: Chat, engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "a.chat"
    chat.say(QUESTION, f"/save {file}", "and then")
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    other = Chat(engine)
    other.say(f"/load {file}", "and then")
    assert other.conversation == chat.conversation
    assert other.stats.reused_tokens == 0
    assert other.said[0].startswith("[the saved cache is not used: its checksum is wrong")


NOTHING_SAID: dict[str, Any] = {"system": None, "messages": []}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "holds no conversation"),
        ({"conversation": {}, "settings": {}}, "holds no conversation"),
        ({"conversation": [], "settings": {}}, "holds no conversation"),
        ({"conversation": {**NOTHING_SAID, "system": 3}, "settings": {}}, "holds no conversation"),
        ({"conversation": {**NOTHING_SAID, "messages": ASKED}, "settings": {}}, "holds no conversation"),
        ({"conversation": {**NOTHING_SAID, "messages": ASKED * 2}, "settings": {}}, "holds no conversation"),
        ({"conversation": NOTHING_SAID, "settings": []}, "holds no conversation"),
        ({"conversation": NOTHING_SAID, "settings": {"temperature": -3}}, "temperature: -3 is out of range"),
        ({"conversation": NOTHING_SAID, "settings": {"tempo": 3}}, "tempo: unknown option"),
    ],
)
def test_a_file_that_is_no_conversation_changes_nothing(
    chat: Chat, tmp_path: Path, data: dict[str, Any], message: str
) -> None:
    chat.say(QUESTION)
    chat.engine.save_conversation(tmp_path / "a.chat", data)
    assert message in chat.refused(f"/load {tmp_path / 'a.chat'}")


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    raw = load(make_folder(tmp_path / "raw", template=False), None)
    with raw, pytest.raises(UsageError, match="no chat template; use `llmcad-mlx generate`"):
        Chat(raw)


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
    assert picture.states() == ["root", *["accepted"] * 2, *["rejected"] * 3, *["provisional"] * 2]
    assert printed(draw(picture, str)).splitlines() == [
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
    lines = printed(draw(picture, str)).splitlines()
    assert "✓ '3' 0.01" in "\n".join(lines)  # what was accepted is there, however unlikely it was
    assert "(152 less likely ones not shown)" in lines[-1]
    assert len(lines) == 1 + 48 + 1 + 1


TEXTS = [
    "# Title\n\nA paragraph\nof two lines.\n\n- one\n- two\n\n  more of two\n\n1. first\n2. second\n",
    "Before.\n```python\ndef f():\n\n    return 1\n```\nAfter it.\n#hashtag\n",
    "a | b\n--|--\n1 | 2\n3 | 4\n\nText *with* **style** and `code`.\n\n> quote\n> goes on\n",
    '<div>\n  hello\n</div>\n\nstd::vector<int>\n\n```\na | b\n--|--\n1 | 2\n```\nlast\n\n[a](http://b "Title")\n',
    "Heading\n===\n\ntext\n-\n- item\n***\nlast line without an end",
    "\n\n\nlate",
    "",
]


def on_screen(text: GrowingMarkdown, pieces: list[str]) -> str:
    blocks: list[RenderableType] = []
    for piece in pieces:
        text.add(token(piece))
        blocks += text.finished()
    rest = text.rest()
    return printed(*blocks, *([] if rest is None else [rest]), width=40)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(TEXTS), st.lists(st.integers(1, 12), max_size=40))
def test_markdown_looks_the_same_however_it_comes(text: str, sizes: list[int]) -> None:
    """What was printed for good is never what the finished text would not have had there."""
    pieces, start = [], 0
    for size in sizes:
        pieces.append(text[start : start + size])
        start += size
    pieces.append(text[start:])
    by_lines = on_screen(GrowingMarkdown(), text.splitlines(keepends=True))
    assert on_screen(GrowingMarkdown(), pieces).split() == by_lines.split()
    assert on_screen(GrowingMarkdown(), list(text)) == by_lines


WIDE = "| step | what is done there |\n|---|---|\n| 1 | an explanation that is long |\n"


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("Use std::vector<int>.\n\n<div>\nhello\n</div>\n", ["vector<int>", "<div> hello </div>"]),
        ("<think>a</think>\n\n<!-- note -->", ["<think>a</think>", "<!-- note -->"]),
        ("<script>\nx()\n</script>\n", ["<script> x() </script>"]),
        ("press <kbd>Ctrl</kbd>", ["<kbd>Ctrl</kbd>"]),
        ("&lt;b&gt; &copy;", ["&lt;b&gt; &copy;"]),
        ("![sky](http://x/y.png)", ["sky", "http://x/y.png"]),
        ("[x](http://z/ä%20b) <http://w>", ["x (http://z/ä%20b)", "http://w"]),
        ('[x](http://y "Title")', ['"Title"']),
        ("[ref]: http://y\n", ["[ref]: http://y"]),
        ("|a|b|\n|-|-|\n|1|2|lost|\n", ["lost"]),
        ("| " + "abcdefgh" * 8 + " | b |\n|-|-|\n| x | " + "stuvwxyz" * 8 + " |\n", ["abcdefgh", "stuvwxyz"]),
        ("```python title=it.py\nprint(1)\n```", ["title=it.py", "print(1)"]),
        ("a\u2028b\n\nc\n\nd\n", ["a", "b", "c", "d"]),
        (f"```\n{WIDE}```\nafter", ["explanation", "after"]),
    ],
)
def test_every_character_that_is_no_marker_is_seen(source: str, shown: list[str]) -> None:
    for pieces in ([source], list(source)):
        text = on_screen(GrowingMarkdown(), pieces)
        assert [part for part in shown if part not in text] == []


@settings(deadline=None)
@given(st.text(st.sampled_from("abé \n*_`~#>-+|:.[]()!<&;\\'\"=/"), max_size=60))
def test_no_markdown_hides_letters(source: str) -> None:
    text = on_screen(GrowingMarkdown(), [source])
    assert [text.count(letter) for letter in "abé"] == [source.count(letter) for letter in "abé"]


def test_a_table_in_a_fence_without_a_name_is_a_table() -> None:
    fenced = on_screen(GrowingMarkdown(), [f"```\n{WIDE}```"])
    assert fenced == on_screen(GrowingMarkdown(), [WIDE])
    assert "|" not in fenced
    assert "|" in on_screen(GrowingMarkdown(), [f"```sql\n{WIDE}```"])


def test_markdown_is_printed_block_by_block() -> None:
    text, blocks = GrowingMarkdown(), []
    for char in "# Title\n\nOne.\n\nTwo":
        text.add(token(char))
        blocks += [printed(block).strip() for block in text.finished()]
    assert len(blocks) == 1
    assert "Title" in blocks[0]
    text.add(token(".\n"))
    assert [printed(block).strip() for block in text.finished()] == ["One."]
    rest = text.rest()
    assert printed(rest).strip() == "Two."


def test_accepted_draft_tokens_have_a_colour() -> None:
    text, blocks = GrowingColours(), []
    for piece, from_draft in (("own", False), (" dra", True), ("fted\nnext", True), (" own", False)):
        text.add(token(piece, from_draft))
        blocks += text.finished()
    assert printed(*blocks, text.rest() or "", color_system="standard", force_terminal=True) == (
        "own\x1b[32m dra\x1b[0m\x1b[32mfted\x1b[0m\n\x1b[32mnext\x1b[0m own\n"
    )


@pytest.mark.parametrize(("width", "shown"), [(100, 3), (40, 2), (20, 1), (5, 1)])
def test_a_status_line_has_what_fits(engine: Engine, width: int, shown: int) -> None:
    stats = GenerationStats(generated_tokens=100, target_passes=50, decode_s=2.0)
    parts = status_line(engine, stats, width).split(" · ")
    assert parts[:2] == ["50.0 tokens/s", "2.00 tokens per pass"][:shown]
    assert len(parts) == shown
    assert status_line(engine, None, width).startswith("memory ")


def test_an_answer_taller_than_the_screen_is_printed_once(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    monkeypatch.setattr(screen, "_REDRAW_S", 0)
    monkeypatch.setattr(screen, "_SHOW_PROGRESS_S", -1)
    out = io.StringIO()
    console = Console(file=out, width=40, height=6, color_system=None, force_terminal=True)
    lines = [f"- line {number}" for number in range(30)]
    with TerminalAnswer(console, GrowingMarkdown(), engine) as view:
        view.progress(3, 9)
        for line in lines:
            view.add(token(line + "\n"))
        moving = out.getvalue()
    end = out.getvalue()[len(moving) :].rpartition("\x1b[2K")[2]
    assert "reading: 3/9 tokens" in moving
    assert "memory " in moving
    assert [row.strip(" •") for row in end.splitlines() if "line" in row] == [line[2:] for line in lines]
    assert "memory " not in end


def test_a_models_text_cannot_steer_the_terminal() -> None:
    assert visible("a\x1b[31mb\x07\x9b2Jc\r\nd\té😀") == "a[31mb2Jc\nd\té😀"


@pytest.fixture
def piped(
    monkeypatch: pytest.MonkeyPatch, output: Callable[..., tuple[str, str]]
) -> Callable[..., tuple[str, str]]:
    """As `output` runs it, `chat` with standard input that is no terminal."""

    def call(code: int, data: bytes, *words: object) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        return output("chat", *words, code=code)

    return call


def test_json_is_one_object_for_each_answer(piped: Any, folder: Path, engine: Engine) -> None:
    lines = b"tell me of the cat\n/stats\n/set temperature 0.9\nand then\n"
    out, err = piped(0, lines, "--target", folder, "-m", 12, "--json", "--seed", 3)
    first, second = map(json.loads, out.splitlines())
    assert first["text"] == expected(engine, ASKED)
    prompt = [*ASKED, {"role": "assistant", "content": first["text"]}, {"role": "user", "content": "and then"}]
    assert second["text"] == expected(engine, prompt, temperature=0.9, seed=3)
    assert (second["seed"], second["policy"]) == (3, "throughput")
    assert second["generated_tokens"] == len(second["tokens"])
    assert "target passes" in err


def test_the_models_own_sampling_is_the_default(
    piped: Any, folder: Path, tmp_path: Path, output: Callable[..., tuple[str, str]]
) -> None:
    """And `generate` and Python stay greedy."""
    sampled = copy_folder(folder, tmp_path / "sampled")
    own = {"temperature": 0.9, "top_p": 0.8}
    (sampled / "generation_config.json").write_text(json.dumps({"do_sample": True, **own}))
    words = ("--target", sampled, "--draft", "none", "-m", 12)
    with load(sampled, None) as engine:
        greedy = engine.generate(ASKED, max_tokens=12).text
        seeds = set()
        for given, used in (
            ((), own), (("--top-p", 1), {"temperature": 0.9}), (("--temp", 0.5), {**own, "temperature": 0.5}),
            (("--seed", 7), {**own, "seed": 7}), (("--temp", 0), {}),
        ):  # fmt: skip
            report = json.loads(piped(0, QUESTION.encode(), *words, *given, "--json")[0])
            seeds.add(report["seed"])
            used = {**used, "seed": report["seed"]}
            assert report["text"] == engine.generate(ASKED, max_tokens=12, **used).text
        assert len(seeds) == 4  # two were drawn, the others are 7, and 0 where the temperature was given
    assert output("generate", QUESTION, *words)[0] == greedy + "\n"
    assert greedy == report["text"]


def test_thinking_that_the_template_begins_is_shown_whole(
    piped: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And sent back so."""
    folder = byte_level_folder(tmp_path / "thinker", ("<think>", "</think>"))
    end = "{% if add_generation_prompt %}<think>\n{% endif %}"
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE + end)
    monkeypatch.setattr(Scripted, "script", "plan</think>Paris")
    whole = "<think>\nplan</think>Paris"
    with Scripted(load_pair(str(folder), "none", False, MemoryOptions())) as engine:
        chat = Chat(engine)
        chat.say("Which town?")
        assert chat.answers() == [whole]
        shown = io.StringIO()
        for text in (GrowingMarkdown(), GrowingColours()):
            with TerminalAnswer(Console(file=shown, color_system=None), text, engine) as view:
                view.begin("<think>\n")
                view.add(token("plan</think>"))
        assert shown.getvalue().split() == ["<think>", "plan</think>"] * 2
    monkeypatch.setattr("llmcad_mlx.api.Engine", Scripted)
    assert piped(0, b"Which town?\n", "--target", folder)[0] == whole + "\n"


def test_variables_of_the_template(piped: Any, folder: Path, engine: Engine, tmp_path: Path) -> None:
    model = copy_folder(folder, tmp_path / "model")
    template = "{% for message in messages %}{{ message.content }}{% endfor %}{{ spoken }}"
    (model / "chat_template.jinja").write_text(template)
    words = ("--target", model, "-m", 6, "--json", "--chat-template-config", '{"spoken": "six"}')
    first, second = map(json.loads, piped(0, b"a\nb\n", *words)[0].splitlines())
    assert first["text"] == engine.generate("asix", max_tokens=6).text
    assert second["text"] == engine.generate(f"a{first['text']}bsix", max_tokens=6).text


def test_lines_that_cannot_be_are_told_and_the_others_answered(piped: Any, folder: Path, engine: Engine) -> None:
    data = b"/nonsense\n\xff\xfe\n\ntell me of the cat\n/quit\nnever answered\n"
    out, err = piped(1, data, "--target", folder, "-m", 12)
    assert out == visible(expected(engine, ASKED)) + "\n"
    assert err.splitlines()[:2] == [
        "error: /nonsense: unknown command; /help lists the commands",
        "error: line 2: is not UTF-8 text",
    ]
    assert err.splitlines()[-1] == "error: 2 lines could not be answered or obeyed; see above"


def test_the_command_line_counts_more_than_what_was_saved(piped: Any, folder: Path, tmp_path: Path) -> None:
    file, words = tmp_path / "a.chat", ("--target", folder, "--json")
    lines = f"/set temperature 0.5\ntell me of the cat\n/save {file}\n".encode()
    piped(0, lines, *words, "-m", 5, "--seed", 2, "--system", "be kind")
    out, err = piped(0, b"and then\n/set\n/system\n", *words, "--load", file, "--seed", 9)
    report = json.loads(out)
    assert (report["seed"], report["generated_tokens"]) == (9, 5)
    rows = [line.split() for line in err.splitlines()]
    assert ["temperature", "0.5"] in rows
    assert ["[system", "message:", "be", "kind]"] in rows
