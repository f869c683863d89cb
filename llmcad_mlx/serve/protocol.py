"""What clients send, as checked records, and how they are refused.

Requests are checked with the pydantic models below, and `/openapi.json` shows their JSON schemas. A field that
OpenAI knows and this server cannot heed is not among them, so it is refused by name; the few that change no output
(labels, for the most part) are accepted and ignored.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Json,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    create_model,
)
from pydantic_core import ErrorDetails, PydanticKnownError, from_json
from starlette.responses import JSONResponse

from llmcad_mlx.errors import UsageError
from llmcad_mlx.prompt import Prompt, template_message
from llmcad_mlx.serve import ServerSettings
from llmcad_mlx.settings import GenerationOptions, PolicyName, sampling_under

_log = logging.getLogger(__name__)
_ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


@dataclass(eq=False)
class ApiError(Exception):
    """An answer with a 4xx or 5xx status, without paths and tracebacks. `param`: the request's field; `code`: for
    programs."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] | None = None

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = _ERROR_TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be served as it is: 400."""
    return ApiError(400, message, param=param, code=code)


def shutting_down() -> ApiError:
    """The server is going away: 503."""
    return ApiError(503, "the server is shutting down", code="shutting_down")


def internal_error(error: Exception) -> ApiError:
    """Something that should not happen: 500. What it was goes into the server's own log, under the same id."""
    error_id = secrets.token_hex(4)
    _log.error("internal error %s", error_id, exc_info=error)
    return ApiError(500, f"internal error {error_id}; the server's log has the details", code="internal_error")


def to_json(value: Any) -> bytes:
    """Compact JSON; raises ValueError for NaN and infinity."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def error_response(error: ApiError) -> JSONResponse:
    """An error as the answer."""
    return JSONResponse(error.body, error.status, error.headers)


Record = TypeVar("Record", bound=BaseModel)

_MAX_TOKEN = 2**31 - 1
_MAX_TOP_LOGPROBS = 20
_MOST_KEYS = 4096  # of one object: pydantic complains of every unknown one, and a body has room for a million
_IGNORED = "Accepted and ignored: it changes no output."


def _same_type(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """Literal[1] alone would take True and 1.0 too, which equal 1 in Python."""
    found = handler(value)
    if type(found) is not type(value):
        raise PydanticKnownError("literal_error", {"expected": json.dumps(found)})
    return found


_Exactly = WrapValidator(_same_type)
_Text = Annotated[str, Field(min_length=1, max_length=1000)]
_Token = Annotated[int, Field(ge=0, le=_MAX_TOKEN)]
_TokenText = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
_Bias = Annotated[float, Field(ge=-1000, le=1000)]
_Penalty = Annotated[float, Field(ge=-100, le=100)]
_Limit = Annotated[int, Field(ge=1)]


class _Record(BaseModel):
    """JSON as it is: no field beyond the known ones, no text taken for a number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TextPart(_Record):
    type: Literal["text"]
    text: str


class CalledFunction(_Record):
    name: str = Field(min_length=1)
    arguments: Annotated[Json[dict[str, Any]], BeforeValidator(lambda text: "{}" if text == "" else text)]


class ToolCall(_Record):
    model_config = ConfigDict(extra="ignore")

    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class Message(_Record):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    refusal: str | None = Field(None, description="Ignored.")


class Function(_Record):
    name: str = Field(pattern="^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON Schema of the arguments.")
    strict: Annotated[Literal[False], _Exactly] | None = None


class Tool(_Record):
    type: Literal["function"]
    function: Function


class TextFormat(_Record):
    type: Literal["text"]


class StreamOptions(_Record):
    include_usage: bool | None = None


class Speculation(_Record):
    tokens: bool = False
    trees: bool = False


class _Request(_Record):
    """The fields of both kinds. None: left out, or null."""

    model: str | None = Field(None, description="The name in /v1/models, or left out.")
    max_tokens: _Limit | None = Field(None, description="Tokens to generate at most.")
    temperature: float | None = Field(None, ge=0, le=100, description="0 is greedy.")
    top_p: float | None = Field(None, gt=0, le=1, description="Nucleus sampling; 1 is off.")
    top_k: _Token | None = Field(None, description="Sample from the k most likely tokens; 0 is off.")
    min_p: float | None = Field(None, ge=0, le=1, description="Least probability beside the best's; 0 is off.")
    repetition_penalty: float | None = Field(
        None, ge=0, le=100, description="Divides logits of the last 20 tokens; 0 is off."
    )
    presence_penalty: _Penalty | None = Field(None, description="Taken off logits of the last 20 tokens.")
    frequency_penalty: _Penalty | None = Field(None, description="The same, for each time a token occurred.")
    logit_bias: dict[_TokenText, _Bias] | None = Field(
        None, max_length=1024, description="Token id to a number added to its logit."
    )
    stop: _Text | Annotated[list[_Text], Field(fail_fast=True, max_length=16)] | None = Field(
        None, description="Ends the text before one of these."
    )
    seed: int | None = Field(
        None, ge=0, le=2**64 - 1, description="Same seed, same text; drawn at random when left out."
    )
    policy: PolicyName | None = Field(None, description="How the draft is used; changes speed, not text.")
    tree_nodes: int | None = Field(None, ge=1, le=4096, description="Nodes per target pass, root included.")
    speculation: bool | Speculation | None = Field(
        None, description="Also send which tokens came from the draft, and each round's token tree."
    )
    stream: bool | None = Field(None, description="Send the answer in pieces, as server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    n: Annotated[Literal[1], _Exactly] | None = Field(None, description="One answer per request.")
    user: str | None = Field(None, max_length=512, description="Whose turn it is in the queue.")
    metadata: dict[str, Any] | None = Field(None, description=_IGNORED)


class ChatRequest(_Request):
    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1)
    max_completion_tokens: _Limit | None = Field(None, description="The same as max_tokens.")
    logprobs: bool | None = Field(None, description="Also give the target's log probability of each token.")
    top_logprobs: int | None = Field(
        None, ge=0, le=_MAX_TOP_LOGPROBS, description="And of so many likeliest tokens."
    )
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = Field(
        None, max_length=128, description="Functions it may call."
    )
    tool_choice: Literal["auto", "none"] | None = Field(None, description="The others cannot be enforced.")
    parallel_tool_calls: Annotated[Literal[True], _Exactly] | None = Field(
        None, description="The model decides how many functions it calls."
    )
    response_format: TextFormat | None = Field(None, description="Text only.")
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = Field(
        None, description="Text only."
    )
    store: Annotated[Literal[False], _Exactly] | None = Field(None, description="Nothing is stored.")
    service_tier: str | None = Field(None, description=_IGNORED)
    safety_identifier: str | None = Field(None, description=_IGNORED)
    prompt_cache_key: str | None = Field(None, description=_IGNORED)


class CompletionRequest(_Request):
    prompt: Annotated[str, Field(min_length=1)] | Annotated[list[_Token], Field(fail_fast=True, min_length=1)] = (
        Field(description="Text, or token ids.")
    )
    logprobs: int | None = Field(
        None, ge=0, le=_MAX_TOP_LOGPROBS, description="Log probabilities of so many likeliest tokens."
    )
    echo: Annotated[Literal[False], _Exactly] | None = Field(None, description="The prompt is not repeated.")
    best_of: Annotated[Literal[1], _Exactly] | None = Field(None, description="One answer per request.")


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What a client asked for. `options` have a seed, drawn when none was asked for. `top_logprobs`: how many
    beside the chosen token's, None for none. `show_tokens`, `show_trees`: which of the speculation to send."""

    kind: Literal["chat", "completion"]
    prompt: Prompt
    options: GenerationOptions
    tools: list[dict[str, Any]] | None = None
    stream: bool = False
    include_usage: bool = False
    top_logprobs: int | None = None
    show_tokens: bool = False
    show_trees: bool = False
    user: str = ""


_ENGINE_OPTIONS = {
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "stop", "seed", "policy", "tree_nodes",
}  # fmt: skip


class RequestReader:
    """Reads the bodies of requests: checks them with the models above and with this server's limits."""

    def __init__(self, settings: ServerSettings, model: str, sampling: Mapping[str, float] | None = None) -> None:
        """`model`: the name of what is served; `sampling`: its own."""
        self._settings = settings
        self._own_sampling = sampling or {}
        self._given_sampling = {} if settings.temperature is None else {"temperature": settings.temperature}
        self._model = model
        self.default_sampling = sampling_under(self._own_sampling, self._given_sampling)
        """Of requests that ask for none."""
        self.chat_model = _with_limit(ChatRequest, settings.max_tokens)
        self.completion_model = _with_limit(CompletionRequest, settings.max_tokens)

    def chat(self, body: bytes) -> GenerationRequest:
        """A conversation to answer. Raises ApiError: 400 naming the field, 404 for another model."""
        asked = read_record(self.chat_model, body)
        if asked.max_tokens and asked.max_completion_tokens not in (None, asked.max_tokens):
            raise bad_request("max_completion_tokens: differs from max_tokens; give one", "max_completion_tokens")
        if asked.top_logprobs and not asked.logprobs:
            raise bad_request("top_logprobs: needs logprobs to be true", "top_logprobs")
        if asked.tool_choice == "auto" and not asked.tools:
            raise bad_request("tool_choice: there are no tools", "tool_choice")
        tools = asked.tools if asked.tool_choice != "none" else None
        return self._request(
            asked,
            asked.max_tokens or asked.max_completion_tokens,
            kind="chat",
            prompt=[_template_message(message, f"messages[{i}]") for i, message in enumerate(asked.messages)],
            tools=[tool.model_dump(exclude_unset=True) for tool in tools] if tools else None,
            top_logprobs=asked.top_logprobs or 0 if asked.logprobs else None,
        )

    def completion(self, body: bytes) -> GenerationRequest:
        """A text to continue. Raises as `chat` does."""
        asked = read_record(self.completion_model, body)
        return self._request(
            asked, asked.max_tokens, kind="completion", prompt=asked.prompt, top_logprobs=asked.logprobs
        )

    def _request(self, asked: _Request, max_tokens: int | None, **own: Any) -> GenerationRequest:
        """The request with what both kinds have, and what its kind has of its `own`."""
        if asked.model not in (None, self._model):
            message = f'model: "{asked.model[:80]}" is not served here; ask for "{self._model}" or leave it out'
            raise ApiError(404, message, param="model", code="model_not_found")
        if asked.stream_options is not None and not asked.stream:
            raise bad_request("stream_options: goes with stream only", "stream_options")
        shown = asked.speculation
        options = {
            # Drawn, not fixed: who asks twice at a temperature expects two answers. 53 bits stay exact everywhere.
            "seed": secrets.randbits(53),
            "max_tokens": max_tokens or self._settings.max_tokens,
            **sampling_under(
                self._own_sampling,
                {**self._given_sampling, **asked.model_dump(include=_ENGINE_OPTIONS, exclude_none=True)},
            ),
        }
        if asked.logit_bias is not None:
            options["logit_bias"] = {int(token): value for token, value in asked.logit_bias.items()}
        try:
            checked = GenerationOptions.of(**options)
        except UsageError as error:
            raise refused(error) from None
        return GenerationRequest(
            **own,
            options=checked,
            stream=bool(asked.stream),
            include_usage=bool(asked.stream_options and asked.stream_options.include_usage),
            show_tokens=shown.tokens if isinstance(shown, Speculation) else bool(shown),
            show_trees=shown.trees if isinstance(shown, Speculation) else bool(shown),
            user=asked.user or "",
        )


def refused(error: UsageError) -> ApiError:
    """An option or prompt that the engine refuses."""
    option, colon, _ = str(error).partition(":")
    return bad_request(str(error), option if colon and option.isidentifier() else None)


def _with_limit(kind: type[Record], max_tokens: int) -> type[Record]:
    """The model with the server's own limit on the length of an answer."""
    limits: dict[str, Any] = {
        name: (int | None, Field(None, ge=1, le=max_tokens, description=field.description))
        for name, field in kind.model_fields.items()
        if name in ("max_tokens", "max_completion_tokens")
    }
    return create_model(kind.__name__, __base__=kind, **limits)


def _template_message(message: Message, where: str) -> dict[str, Any]:
    """A message for the chat template. Raises ApiError (400) for one that no template could take."""
    made = message.model_dump(include={"role", "content", "name", "tool_call_id"}, exclude_none=True)
    if message.tool_calls:
        calls = [call.model_dump(include={"id", "function"}, exclude_unset=True) for call in message.tool_calls]
        made["tool_calls"] = [{"type": "function", **call} for call in calls]
    try:
        return template_message(made, where)
    except UsageError as error:
        raise bad_request(str(error), str(error).partition(":")[0]) from None


def read_record(kind: type[Record], body: bytes) -> Record:
    """A request's body as a record. Raises ApiError (400): one line that names the field."""
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise bad_request(f"the body is not valid JSON: {error}") from None
    _check_sizes(value)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _refusal(error, value) from None


def _check_sizes(body: Any) -> None:
    waiting = [body]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if len(value) > _MOST_KEYS:
                raise bad_request(f"the body: an object may have {_MOST_KEYS} keys at most")
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)


def _refusal(error: ValidationError, body: Any) -> ApiError:
    """What is wrong with the first wrong field."""
    problems = [(_path(problem, body), problem) for problem in error.errors(include_url=False)]
    path, _ = problems[0]
    # Each form that a field may have complains: one that was meant, about more than the type of the whole.
    of_field = [(inner, problem) for inner, problem in problems if inner[: len(path)] == path]
    meant = [found for found in of_field if found[0] != path or not found[1]["type"].endswith("_type")]
    chosen = [max(meant, key=lambda found: len(found[0]))] if meant else of_field
    path, _ = chosen[0]
    where = "".join(f"[{step}]" if isinstance(step, int) else f".{_cut(step)}" for step in path).lstrip(".")
    return bad_request(f"{where or 'the body'}: {_wording([problem for _, problem in chosen])}", where or None)


def _path(problem: ErrorDetails, body: Any) -> list[int | str]:
    """Keys and indices that lead to a problem; pydantic's steps also name the forms that a field may have."""
    path: list[int | str] = []
    for step in problem["loc"]:
        if step in body if isinstance(body, dict) else isinstance(body, list) and isinstance(step, int):
            path.append(step)
            body = body[step]
    return [*path, problem["loc"][-1]] if problem["type"] == "missing" else path


_PLAIN = {
    "missing": "is missing",
    "extra_forbidden": "is not a field this server knows; see /openapi.json",
    "json_invalid": "is not valid JSON",
}


def _wording(problems: Sequence[ErrorDetails]) -> str:
    """Pydantic's words, as a sentence about the field."""
    if plain := _PLAIN.get(problems[0]["type"]):
        return plain
    said = " or ".join(dict.fromkeys(problem["msg"].removeprefix("Input should be ") for problem in problems))
    said = re.sub("dictionary( or instance of [A-Za-z]+)?", "object", said).replace(" after validation", "")
    if not problems[0]["msg"].startswith("Input should be "):
        return re.sub("^[A-Za-z]+ should", "must", said)
    value = problems[0]["input"]
    if isinstance(value, list | dict):
        return f"must be {said}, not {'a list' if isinstance(value, list) else 'an object'}"
    return f"must be {said}, not {_cut(json.dumps(value, ensure_ascii=False))}"


def _cut(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}…"
