"""A chat: takes lines, answers messages, obeys commands. Knows no terminal and no file format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table

from llmcad_mlx.api import Engine, Response
from llmcad_mlx.chat.commands import COMMANDS, KEYS, Call, parse
from llmcad_mlx.chat.conversation import ASSISTANT, Conversation
from llmcad_mlx.chat.screen import Screen, stats_table
from llmcad_mlx.chat.settings import ChatSettings
from llmcad_mlx.chat.tree_view import RoundTree, draw
from llmcad_mlx.conversations.file import SavedConversation, read_conversation
from llmcad_mlx.engine.round import Round
from llmcad_mlx.errors import ContextLengthError, LlmcadError, UsageError
from llmcad_mlx.results import GenerationStats
from llmcad_mlx.sizes import format_size

_NO_SYSTEM = "none"
_MAX_SEED = 2**64


class ChatSession:
    """One conversation with one engine, shown on one screen.

    `stats` and `round` are those of the last answer.
    """

    def __init__(
        self, engine: Engine, settings: ChatSettings, screen: Screen, conversation: Conversation | None = None
    ) -> None:
        """Raises UsageError for a model that cannot chat."""
        if not engine.tokenizer.has_chat_template:
            raise UsageError("target: this model has no chat template; use `llmcad-mlx generate` with it")
        self.engine, self.settings, self.screen = engine, settings, screen
        self.conversation = conversation or Conversation()
        self.stats: GenerationStats | None = None
        self.round: RoundTree | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            "help": self._help, "system": self._system, "clear": self._clear, "undo": self._undo,
            "regen": self._regen, "save": self._save, "load": self._load, "set": self._set, "stats": self._stats,
            "tree": self._tree,
        }  # fmt: skip

    def handle(self, line: str) -> bool:
        """Answer a message or obey a command; False after /quit.

        What cannot be is said in one line and changes nothing. KeyboardInterrupt goes on to the caller; a stopped
        answer stays in the conversation as far as it got.
        """
        try:
            call = parse(line)
            if call is None:
                if line.strip():
                    self._ask(line.strip())
                return True
            if call.name == "quit":
                return False
            self._obey(call)
        except LlmcadError as error:
            self.screen.error(str(error))
        return True

    def _obey(self, call: Call) -> None:
        self._commands[call.name](call.argument)

    # --- Answers --------------------------------------------------------------------------------------------

    def _ask(self, text: str) -> None:
        self.conversation.ask(text)
        try:
            self._answer()
        finally:
            if self.conversation.messages[-1].role != ASSISTANT:  # nothing came: the message is to be sent again
                self.conversation.take_back_turn()

    def _answer(self) -> None:
        """Answer the last message."""
        options = dict(self.settings.options)
        last: Response | None = None
        with (
            self._kept_text() as pieces,
            self.screen.answer(self.engine, options, self.settings.colour) as view,
        ):
            prompt = self.conversation.prompt()
            for response in self.engine.stream_generate(prompt, view.progress, self._keep_round, **options):
                pieces.append(response.text)
                last, self.stats = response, response.stats
                view.add(response)
        if last is not None and last.finish_reason == "length":
            self.screen.note(self._why_cut(options))
        elif not self.conversation.messages[-1].content:
            self.screen.note("[the answer is empty]")

    @contextmanager
    def _kept_text(self) -> Iterator[list[str]]:
        """A list for the pieces of an answer; whatever ends it, what came of it joins the conversation."""
        pieces: list[str] = []
        try:
            yield pieces
        except ContextLengthError:
            context = self.engine.pair.context_length
            raise UsageError(
                f"the conversation no longer fits the model's context of {context} tokens; /undo or /clear"
            ) from None
        except BaseException:
            text = "".join(pieces)
            if text:
                self.conversation.answer(text, complete=False)
            raise
        self.conversation.answer("".join(pieces))

    def _keep_round(self, done: Round) -> None:
        self.round = RoundTree.of(done)

    def _why_cut(self, options: dict[str, Any]) -> str:
        limit = options.get("max_tokens", 256)
        if self.stats is not None and self.stats.generated_tokens == limit:
            return f"[cut at max_tokens {limit}; /set max_tokens -1 takes the limit away]"
        return f"[the model's context of {self.engine.pair.context_length} tokens is full; /undo or /clear]"

    def _regen(self, _: str) -> None:
        messages = list(self.conversation.messages)
        self.conversation.take_back_answer()
        seed = (self.settings.options.get("seed", 0) + 1) % _MAX_SEED
        if self.settings.options.get("temperature", 0.0):
            self.settings.take_over({"seed": seed})
            self.screen.note(f"[seed {seed}]")
        else:
            self.screen.note("[temperature is 0, so the answer will be the same; /set temperature 0.7]")
        try:
            self._answer()
        finally:
            if self.conversation.messages[-1].role != ASSISTANT:  # nothing came: the old answer stays
                self.conversation.messages = messages

    # --- The conversation -----------------------------------------------------------------------------------

    def _system(self, text: str) -> None:
        if text:
            self.conversation.system = None if text == _NO_SYSTEM else text
        self.screen.note(f"[system message: {self.conversation.system or _NO_SYSTEM}]")

    def _clear(self, _: str) -> None:
        self.conversation.messages = []
        self.engine.restore(None)
        self.screen.note("[all messages are forgotten]")

    def _undo(self, _: str) -> None:
        self.screen.note(f"[taken back: {_short(self.conversation.take_back_turn())}]")

    def _save(self, name: str) -> None:
        data = {"conversation": self.conversation.to_dict(), "settings": self.settings.options}
        size = self.engine.save_conversation(Path(name), data)
        self.screen.note(f"[saved {name}: {self._size()}, {format_size(size)} with the caches]")

    def _load(self, name: str) -> None:
        self.load(read_conversation(Path(name)))

    def load(self, saved: SavedConversation, keep: tuple[str, ...] = ()) -> None:
        """Go on with a saved conversation; the settings named in `keep`, "system" one of them, stay as they are.

        Raises UsageError, and changes nothing, for a file whose contents are no conversation.
        """
        try:
            conversation = Conversation.from_dict(saved.data["conversation"])
            settings = {str(k): v for k, v in saved.data["settings"].items() if k not in keep}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UsageError(f"{saved.path}: holds no conversation of a chat; choose another file") from None
        self.settings.take_over(settings)
        if "system" in keep:
            conversation.system = self.conversation.system
        self.conversation = conversation
        self.stats = self.round = None
        for line in self.engine.restore_conversation(saved):
            self.screen.note(f"[{line}]")
        last = f"; the last one was: {_short(self._last_message())}" if conversation.messages else ""
        self.screen.note(f"[loaded {saved.path.name}: {self._size()}{last}]")

    def _last_message(self) -> str:
        users = [message for message in self.conversation.messages if message.role != ASSISTANT]
        return users[-1].content

    def _size(self) -> str:
        count = self.conversation.num_turns
        return f"{count} message{'' if count == 1 else 's'}"

    # --- What is shown --------------------------------------------------------------------------------------

    def _help(self, _: str) -> None:
        table = Table(box=None, show_header=False, pad_edge=False)
        for command in COMMANDS:
            table.add_row(f"/{command.name} {command.argument}".rstrip(), command.help)
        self.screen.show(table)
        for line in KEYS:
            self.screen.show(line)

    def _set(self, argument: str) -> None:
        if not argument:
            table = Table(box=None, show_header=False, pad_edge=False)
            for name, value in self.settings.shown():
                table.add_row(name, value)
            self.screen.show(table)
            return
        name, _, value = argument.partition(" ")
        if not value.strip():
            raise UsageError(f"/set: give a name and a value, like /set {self.settings.name_of(name)} VALUE")
        name = self.settings.set(name, value.strip())
        self.screen.note(f"[{name} {dict(self.settings.shown())[name]}]")

    def _stats(self, _: str) -> None:
        if self.stats is None:
            raise UsageError("/stats: there is no answer yet")
        self.screen.show(stats_table(self.engine, self.stats))

    def _tree(self, _: str) -> None:
        if self.round is None:
            raise UsageError("/tree: there is no answer yet")
        self.screen.show(draw(self.round, lambda token: str(self.engine.tokenizer.decode([token]))))


def _short(text: str) -> str:
    """A message in one line."""
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:57] + "…"
