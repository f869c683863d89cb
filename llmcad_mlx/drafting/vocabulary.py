"""Whether draft and target mean the same by a token id."""

from __future__ import annotations

from collections.abc import Mapping

from llmcad_mlx.errors import VocabularyError


def check_same_tokens(target: Mapping[str, int], draft: Mapping[str, int]) -> None:
    """Compare two token maps (text -> id), as a tokenizer's `get_vocab()` gives them.

    The sizes of the logits may differ, padding has no tokens; but every id that either map names must name
    the same text in both. Raises VocabularyError with the first differing token.
    """
    if target == draft:
        return
    texts, draft_texts = ({id_: text for text, id_ in vocabulary.items()} for vocabulary in (target, draft))
    for token in sorted(texts.keys() | draft_texts.keys()):
        ours, theirs = texts.get(token), draft_texts.get(token)
        if ours != theirs:
            raise VocabularyError(
                f"the draft's tokens are not the target's: token {token} is {_shown(ours)} in the target and "
                f"{_shown(theirs)} in the draft; choose a draft of the same model family"
            )


def _shown(text: str | None) -> str:
    return "missing" if text is None else repr(text)
