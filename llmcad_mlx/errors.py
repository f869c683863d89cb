"""The exceptions users meet. Each message is one line: what happened, to which file or option, what to do."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# What MLX raises as RuntimeError: Metal's command buffers, allocators of Metal and CUDA.
_NO_MEMORY = ("OutOfMemory", "Insufficient Memory", "Unable to allocate", "maximum allowed buffer size")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the machine, or the GPU, has no more memory to give."""
    gpu = isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    return gpu or isinstance(error, MemoryError)


class LlmcadError(Exception):
    """Base of every error this package raises on purpose. The command line exits with 1."""


class UsageError(LlmcadError, ValueError):
    """An option is unknown, out of range or contradicts another. The command line exits with 2."""


class ModelError(LlmcadError):
    """A model folder or file is missing, incomplete, corrupt or of an unknown kind."""


class VocabularyError(ModelError):
    """The draft's tokens are not the target's tokens."""


class ContextLengthError(UsageError):
    """Prompt and requested tokens do not fit the model's context."""


class DownloadError(LlmcadError):
    """A file could not be fetched or is not the file that was asked for."""


class GenerationError(LlmcadError):
    """The target produced something that no token can be chosen from (NaN logits)."""


class StorageError(LlmcadError):
    """Weights could not be read, or are not what they were, while the model was in use."""


class RemoteError(LlmcadError):
    """The server that an engine is on is busy, went away, or cannot be reached."""


class BudgetError(UsageError):
    """A memory budget in which the pair cannot work."""
