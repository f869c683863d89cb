"""Prompts for the corpus: the target invents them itself, from nothing or from an opening.

A chat model that is given only the start of a user's turn writes a question of the kind it was trained on (arXiv
2406.08464). Openings steer it towards a domain; instructions with a passage are about its own earlier answers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

OPENINGS = {
    "chat": (
        "What", "How do I", "Why", "Explain", "Can you", "Tell me", "I'm planning", "Give me", "List", "Describe",
        "What is the difference between", "Write a short story about", "Write an email", "How can I", "Who was",
        "What are the benefits of", "Compare", "Help me", "I need", "Write a poem about", "Suggest", "When did",
        "Explain to a child", "Give me three tips for", "What should I", "Is it true that", "Plan",
    ),
    "code": (
        "Write a Python function", "Write a Python function that takes a list", "Write a Python class",
        "Implement", "Write a JavaScript function", "Write a SQL query", "How do I sort", "Fix this code:",
        "Write a program that reads", "Explain what this code does:", "Write a function that checks whether",
        "Write a C++ function", "Write unit tests for", "Write a bash script", "Write a regular expression",
        "Write a Python script that", "How do I parse", "Write a recursive function", "Write a HTML page",
    ),
    "summarising": (
        "Summarize the following", "Summarize this text:", "What is the main idea of", "Rewrite the following",
        "Extract the", "Make this shorter:", "Write a title for", "Give me the key points of",
    ),
    "translation": (
        "Translate", "Translate the following sentence into French:", "Translate into Spanish:",
        "Translate this to German:", "How do you say", "Translate the following text into English:",
        "What does the French word", "Translate into Italian:",
    ),
}  # fmt: skip

ON_A_PASSAGE = {
    "summarising": (
        "Summarize the following text in one sentence.\n\n{}", "Summarize this text:\n\n{}",
        "{}\n\nSummarize this.",
        "What are the key points of this text?\n\n{}", "Make this shorter:\n\n{}", "Write a title for this:\n\n{}",
        "Rewrite this text so that a child understands it:\n\n{}", "Rewrite this in a formal tone:\n\n{}",
        "Write this text again, word for word:\n\n{}", "Turn this text into a list of points:\n\n{}",
    ),
    "translation": (
        "Translate into French:\n\n{}", "Translate the following text into Spanish:\n\n{}",
        "Translate this text into German:\n\n{}", "Translate into Italian:\n\n{}",
    ),
}  # fmt: skip

DOMAINS = ("chat", "code", "summarising", "translation")
_SHARE_FREE = 0.35  # of the prompts, those written from nothing
_SHARE_DOMAIN = (0.4, 0.3, 0.2, 0.1)  # of the others, in the order of DOMAINS
_SHARE_PASSAGE = 0.7  # of summarising and translating prompts


def openings(count: int, rng: np.random.Generator, passages: Sequence[str]) -> list[tuple[str, bool]]:
    """`count` beginnings of a user's turn, and whether each is whole already.

    passages: earlier answers, for prompts about a text; there may be none yet.
    """
    found = []
    for _ in range(count):
        if rng.random() < _SHARE_FREE:
            found.append(("", False))
            continue
        domain = str(rng.choice(DOMAINS, p=_SHARE_DOMAIN))
        if domain in ON_A_PASSAGE and passages and rng.random() < _SHARE_PASSAGE:
            form, passage = rng.choice(ON_A_PASSAGE[domain]), passages[int(rng.integers(len(passages)))]
            found.append((str(form).format(passage), True))
        else:
            found.append((str(rng.choice(OPENINGS[domain])), False))
    return found
