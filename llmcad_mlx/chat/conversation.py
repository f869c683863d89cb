"""What was said: a system message and the turns of user and model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from llmcad_mlx.errors import UsageError

USER, ASSISTANT = "user", "assistant"


@dataclass(frozen=True, slots=True)
class Message:
    """`complete`: False for an answer that was stopped."""

    role: str
    content: str
    complete: bool = True


@dataclass(slots=True)
class Conversation:
    """Messages alternate, a user's first: many chat templates accept nothing else. Between commands every message
    has its answer."""

    system: str | None = None
    messages: list[Message] = field(default_factory=list)

    def ask(self, text: str) -> None:
        """Add a user's message."""
        self.messages.append(Message(USER, text))

    def answer(self, text: str, complete: bool = True) -> None:
        """Add the model's answer to the last message."""
        self.messages.append(Message(ASSISTANT, text, complete))

    def prompt(self) -> list[dict[str, str]]:
        """What the model reads."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *({"role": m.role, "content": m.content} for m in self.messages)]

    def take_back_answer(self) -> None:
        """Forget the last answer, so that the message before it can be answered again. Raises UsageError where
        there is no message."""
        if not self.messages:
            raise UsageError("there is no message to answer yet; write one")
        if self.messages[-1].role == ASSISTANT:
            self.messages.pop()

    def take_back_turn(self) -> str:
        """Forget the last message and its answer; returns the message. Raises UsageError where there is none."""
        if not self.messages:
            raise UsageError("there is nothing to take back")
        if self.messages[-1].role == ASSISTANT:
            self.messages.pop()
        return self.messages.pop().content

    @property
    def num_turns(self) -> int:
        """Messages of the user."""
        return sum(message.role == USER for message in self.messages)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> Conversation:
        """Read what `to_dict` gave. Raises ValueError for anything else."""
        system, entries = data.get("system"), data.get("messages")
        if not isinstance(system, str | None) or not isinstance(entries, list) or len(entries) % 2:
            raise ValueError("not a conversation")
        messages = []
        for number, entry in enumerate(entries):
            message = Message(**entry)
            if message.role != (USER, ASSISTANT)[number % 2] or not isinstance(message.content, str):
                raise ValueError("not messages that alternate")
            if not isinstance(message.complete, bool):
                raise ValueError("not a message")
            messages.append(message)
        return cls(system, messages)
