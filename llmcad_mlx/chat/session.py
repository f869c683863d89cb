"""A chat: what was said, and what each further line does. Knows no terminal and no file format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llmcad_mlx.api import Engine
from llmcad_mlx.chat.commands import COLOUR, COMMANDS, KEYS, ChatSettings, parse, setting_name
from llmcad_mlx.chat.screen import Screen, draw
from llmcad_mlx.conversations.file import SavedConversation, read_conversation
from llmcad_mlx.engine.round import Round, RoundTree
from llmcad_mlx.errors import ContextLengthError, LlmcadError, UsageError
from llmcad_mlx.progress import interruptible
from llmcad_mlx.prompt import opened_thinking, typed_text
from llmcad_mlx.report import Answer, rows_table, stats_table
from llmcad_mlx.results import GenerationStats
from llmcad_mlx.sizes import format_size

USER, ASSISTANT = "user", "assistant"
_NO_SYSTEM = "none"
_MAX_SEED = 2**64


@dataclass(frozen=True, slots=True)
class Message:
    """`complete`: False for an answer that was stopped."""

    role: str
    content: str
    complete: bool = True


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages alternate, a user's first: many chat templates accept nothing else. Between commands every message
    has its answer."""

    system: str | None = None
    messages: tuple[Message, ...] = ()

    def prompt(self) -> list[dict[str, str]]:
        """What the model reads."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *({"role": m.role, "content": m.content} for m in self.messages)]

    @classmethod
    def from_dict(cls, data: Any) -> Conversation:
        """Read what `asdict` gave. Raises ValueError, TypeError or AttributeError for anything else."""
        system, entries = data.get("system"), data.get("messages")
        if not isinstance(system, str | None) or not isinstance(entries, list) or len(entries) % 2:
            raise ValueError("not a conversation")
        messages = tuple(Message(**entry) for entry in entries)
        if any(message.role != (USER, ASSISTANT)[number % 2] for number, message in enumerate(messages)):
            raise ValueError("not messages that alternate")
        if not all(isinstance(m.content, str) and isinstance(m.complete, bool) for m in messages):
            raise ValueError("not messages")
        return cls(system, messages)


class ChatSession:
    """One conversation with one engine on one screen. `stats`, `round`: of the last answer."""

    def __init__(
        self,
        engine: Engine,
        settings: ChatSettings,
        screen: Screen,
        system: str | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        """template_options: variables of the model's chat template. Raises UsageError for a model that cannot
        chat, and for options that this engine cannot heed."""
        if not engine.tokenizer.has_chat_template:
            raise UsageError("target: this model has no chat template; use `llmcad-mlx generate` with it")
        engine.check_options(settings.options)
        self.engine, self.settings, self.screen = engine, settings, screen
        self.conversation = Conversation(system)
        self._template_options = template_options
        self.stats: GenerationStats | None = None
        self.round: RoundTree | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            "help": self._help, "system": self._system, "clear": self._clear, "undo": self._undo,
            "load": lambda name: self.load(read_conversation(Path(name))), "regen": self._regen,
            "save": self._save, "set": self._set, "stats": self._stats, "tree": self._tree,
        }  # fmt: skip

    def handle(self, line: str) -> bool:
        """Answer a message or obey a command; False after /quit.

        What cannot be is said in one line and changes nothing. KeyboardInterrupt goes on to the caller; a stopped
        answer stays in the conversation as far as it got.
        """
        try:
            line = typed_text(line, "what you typed")
            call = parse(line)
            if call is not None:
                name, argument = call
                if name == "quit":
                    return False
                self._commands[name](argument)
            elif line.strip():
                self._answer((*self.conversation.messages, Message(USER, line.strip())))
        except LlmcadError as error:
            self.screen.error(str(error))
        return True

    def _answer(self, messages: tuple[Message, ...]) -> None:
        """Answer the last one of `messages`, which become the conversation. Whatever ends the answer, what came of
        it joins them; where nothing came, the conversation stays as it was."""
        asked, answer, complete = replace(self.conversation, messages=messages), Answer(), False
        context = self.engine.pair.context_in_words
        prompt = self.engine.encode(asked.prompt(), self._template_options)
        opened = opened_thinking(self.engine.tokenizer, prompt)
        try:
            with interruptible() as check, self.screen.answer(self.engine, self.settings, answer) as view:
                view.begin(opened)
                for response in self.engine.stream_generate(
                    prompt, view.progress, self._keep_round, options=self.settings.options
                ):
                    answer.add(response)
                    self.stats = response.stats
                    view.add(response)
                    check()
            complete = True
        except ContextLengthError:
            raise UsageError(f"the conversation no longer fits the {context}; /undo or /clear") from None
        finally:
            text = "".join(answer.pieces)
            if complete or text:
                self.conversation = replace(
                    asked, messages=(*messages, Message(ASSISTANT, opened + text, complete))
                )
        if answer.finish_reason == "length":
            limit = self.settings.options.stopping.max_tokens
            if answer.stats.generated_tokens == limit:
                self.screen.note(f"[cut at max_tokens {limit}; /set max_tokens -1 takes the limit away]")
            else:
                self.screen.note(f"[the {context} is full; /undo or /clear]")
        elif not text:
            self.screen.note("[the answer is empty]")

    def _keep_round(self, done: Round) -> None:
        self.round = RoundTree(done.drafted, done.selection, done.walk)  # without its logits

    def _regen(self, _: str) -> None:
        if not self.conversation.messages:
            raise UsageError("there is no message to answer yet; write one")
        sampling = self.settings.options.sampling
        if sampling.temperature:
            self.settings = self.settings.with_values({"seed": (sampling.seed + 1) % _MAX_SEED})
            self.screen.note(f"[seed {self.settings.options.sampling.seed}]")
        else:
            self.screen.note("[temperature is 0, so the answer will be the same; /set temperature 0.7]")
        self._answer(self.conversation.messages[:-1])

    def _system(self, text: str) -> None:
        if text:
            self.conversation = replace(self.conversation, system=None if text == _NO_SYSTEM else text)
        self.screen.note(f"[system message: {self.conversation.system or _NO_SYSTEM}]")

    def _clear(self, _: str) -> None:
        self.conversation = replace(self.conversation, messages=())
        self.engine.restore(None)
        self.screen.note("[all messages are forgotten]")

    def _undo(self, _: str) -> None:
        if not self.conversation.messages:
            raise UsageError("there is nothing to take back")
        *kept, question, _answer = self.conversation.messages
        self.conversation = replace(self.conversation, messages=tuple(kept))
        self.screen.note(f"[taken back: {_short(question.content)}]")

    def _save(self, name: str) -> None:
        data = {"conversation": asdict(self.conversation), "settings": self.settings.values(in_full=True)}
        size = self.engine.save_conversation(Path(name), data)
        self.screen.note(f"[saved {name}: {self._size()}, {format_size(size)} with the caches]")

    def load(self, saved: SavedConversation, keep: tuple[str, ...] = ()) -> None:
        """Go on with a saved conversation; the settings named in `keep`, "system" one of them, stay as they are.

        Raises UsageError, and changes nothing, for a file whose contents are no conversation.
        """
        try:
            conversation = Conversation.from_dict(saved.data["conversation"])
            values = {str(k): v for k, v in saved.data["settings"].items() if k not in keep}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UsageError(f"{saved.path}: holds no conversation of a chat; choose another file") from None
        self._change(self.settings.with_values({setting_name(name): value for name, value in values.items()}))
        if "system" in keep:
            conversation = replace(conversation, system=self.conversation.system)
        self.conversation = conversation
        self.stats = self.round = None
        for line in self.engine.restore_conversation(saved):
            self.screen.note(f"[{line}]")
        last = f"; the last one was: {_short(conversation.messages[-2].content)}" if conversation.messages else ""
        self.screen.note(f"[loaded {saved.path.name}: {self._size()}{last}]")

    def _change(self, settings: ChatSettings) -> None:
        """Take over settings that this engine can heed. Raises UsageError for others."""
        self.engine.check_options(settings.options)
        self.settings = settings

    def _size(self) -> str:
        count = len(self.conversation.messages)
        return f"{count} message{'' if count == 1 else 's'}"

    def _help(self, _: str) -> None:
        self.screen.show(rows_table({f"/{c.name} {c.argument}".rstrip(): c.help for c in COMMANDS}))
        self.screen.show("\n".join(KEYS))

    def _set(self, argument: str) -> None:
        if not argument:
            names = (*self.settings.values(), COLOUR)
            self.screen.show(rows_table({name: self.settings.text(name) for name in names}))
            return
        name, _, text = argument.partition(" ")
        name, text = setting_name(name), text.strip()
        if not text:
            raise UsageError(f"/set: give a name and a value, like /set {name} VALUE")
        self._change(self.settings.typed(name, text))
        self.screen.note(f"[{name} {self.settings.text(name)}]")

    def _stats(self, _: str) -> None:
        if self.stats is None:
            raise UsageError("/stats: there is no answer yet")
        self.screen.show(stats_table(self.engine, self.stats))

    def _tree(self, _: str) -> None:
        if self.round is None:
            raise UsageError("/tree: there is no answer yet")
        self.screen.show(draw(self.round, self.engine.token_texts.text))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:57] + "…"
