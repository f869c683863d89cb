"""What clients send, as checked records, and how they are refused.

Requests are checked with the pydantic models below, and `/openapi.json` shows their JSON schemas. A field that
would change the answer and that this server cannot heed is not among them, so it is refused by name; labels and
hints are accepted and ignored, and so is every field that is null, as typed clients send them, and an option of
another server with the value with which it does nothing.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
from codecs import BOM_UTF8
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Json,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticKnownError, from_json
from starlette.responses import JSONResponse

from llmcad_mlx.errors import UsageError
from llmcad_mlx.prompt import Prompt, check_template_options, template_message, text_part
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


def _whole(value: Any) -> Any:
    """JSON Schema, and so /openapi.json, counts 64.0 as an integer; some clients have no other numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _not_zero(value: int) -> int:
    if value == 0:
        raise PydanticKnownError("greater_than_equal", {"ge": 1})
    return value


_Exactly = WrapValidator(_same_type)
_Whole = BeforeValidator(_whole)
_One = Annotated[Literal[1], _Exactly, _Whole]
_Text = Annotated[str, Field(max_length=1000)]
_Token = Annotated[int, Field(ge=0, le=_MAX_TOKEN), _Whole]
_PromptText = Annotated[str, Field(min_length=1)]
_Ids = Annotated[list[_Token], Field(fail_fast=True, min_length=1)]
_TokenText = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
_Bias = Annotated[float, Field(ge=-1000, le=1000)]
_Penalty = Annotated[float, Field(ge=-100, le=100)]
_Limit = Annotated[int, Field(ge=-1), AfterValidator(_not_zero), _Whole]
_NumLogprobs = Annotated[int, Field(ge=0, le=_MAX_TOP_LOGPROBS), _Whole]
_Hint = Annotated[dict[str, Any] | None, Field(description=_IGNORED)]
_Label = Annotated[str | None, Field(description=_IGNORED)]


class _Record(BaseModel):
    """JSON as it is: no field beyond the known ones that is not null, no text taken for a number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: item for name, item in value.items() if item is not None or name in cls.model_fields}


_NEUTRAL: Mapping[str, Any] = {
    "dry_multiplier": 0, "eta_cutoff": 0, "epsilon_cutoff": 0, "ignore_eos": False, "length_penalty": 1,
    "mirostat": 0, "mirostat_mode": 0, "min_tokens": 0, "penalty_alpha": 0, "repeat_penalty": 1, "rep_pen": 1,
    "smoothing_factor": 0, "tfs": 1, "tfs_z": 1, "top_a": 0, "typical_p": 1,
    "typical": 1, "use_beam_search": False, "xtc_probability": 0,
}  # fmt: skip
"""Options of other servers, each with the value with which it does nothing; with that it is taken."""


class TextPart(_Record):
    type: Literal["text"]
    text: str
    cache_control: _Hint = None
    prompt_cache_breakpoint: _Hint = None
    annotations: Annotated[list[Any] | None, Field(description=_IGNORED)] = None

    @model_validator(mode="before")
    @classmethod
    def _from_any(cls, value: Any) -> Any:
        return text_part(value)


def _as_text(arguments: Any) -> Any:
    """Arguments that are left empty, or that a client sends back as an object."""
    if arguments is None or arguments == "":
        return "{}"
    return json.dumps(arguments) if isinstance(arguments, dict) else arguments


class CalledFunction(_Record):
    model_config = ConfigDict(extra="ignore")

    name: str = Field(min_length=1)
    arguments: Annotated[Json[dict[str, Any]], BeforeValidator(_as_text)]


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
    reasoning: str | None = Field(None, description="An answer's thinking, sent back; the template decides.")
    reasoning_content: str | None = Field(None, description="Another name of `reasoning`.")
    # What answers of some server have, and clients send back.
    id: _Label = None
    refusal: _Label = None
    annotations: Annotated[list[Any] | None, Field(description=_IGNORED)] = None
    reasoning_details: Annotated[list[Any] | None, Field(description=_IGNORED)] = None
    thinking_blocks: Annotated[list[Any] | None, Field(description=_IGNORED)] = None
    provider_specific_fields: _Hint = None
    cache_control: _Hint = None


class Function(_Record):
    name: str = Field(pattern="^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON Schema of the arguments.")
    strict: bool | None = Field(None, description="The model sees the schema; nothing enforces it.")
    type: _Label = None
    cache_control: _Hint = None


class Tool(_Record):
    type: Literal["function"]
    function: Function
    cache_control: _Hint = None


class NamedFunction(_Record):
    name: str


class NamedTool(_Record):
    type: Literal["function"]
    function: NamedFunction


class TextFormat(_Record):
    type: Literal["text"]


class StreamOptions(_Record):
    include_usage: bool | None = None
    include_obfuscation: Annotated[bool | None, Field(description=_IGNORED)] = None


class Speculation(_Record):
    tokens: bool = False
    trees: bool = False


class _Request(_Record):
    """The fields of both kinds. None: left out, or null."""

    model: str | None = Field(None, description="The name in /v1/models, or left out.")
    max_tokens: _Limit | None = Field(
        None, description="Tokens to generate at most. The server's limit where that is less, or for -1."
    )
    temperature: float | None = Field(None, ge=0, le=100, description="0 is greedy.")
    top_p: float | None = Field(None, ge=0, le=1, description="Nucleus sampling; 1 is off, 0 is greedy.")
    top_k: Annotated[int, Field(ge=-1, le=_MAX_TOKEN), _Whole] | None = Field(
        None, description="Sample from the k most likely tokens; 0 and -1 are off."
    )
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
        None, description="Ends the text before one of these; an empty one does nothing."
    )
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1), _Whole] | None = Field(
        None, description="Same seed, same text; drawn at random when left out."
    )
    policy: PolicyName | None = Field(None, description="How the draft is used; changes speed, not text.")
    tree_nodes: Annotated[int, Field(ge=1, le=4096), _Whole] | None = Field(
        None, description="Nodes per target pass, root included."
    )
    speculation: bool | Speculation | None = Field(
        None, description="Also send which tokens came from the draft, and each round's token tree."
    )
    stream: bool | None = Field(None, description="Send the answer in pieces, as server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="Heeded with stream.")
    n: _One | None = Field(None, description="One answer per request.")
    user: str | None = Field(None, description="Whose turn it is in the queue.")
    metadata: _Hint = None
    cache_prompt: Annotated[bool | None, Field(description=_IGNORED)] = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_does_nothing(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: item for name, item in value.items() if name not in _NEUTRAL or item != _NEUTRAL[name]}


class ChatRequest(_Request):
    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1)
    max_completion_tokens: _Limit | None = Field(None, description="The same as max_tokens.")
    logprobs: bool | None = Field(None, description="Also give the target's log probability of each token.")
    top_logprobs: _NumLogprobs | None = Field(None, description="And of so many likeliest tokens.")
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = Field(
        None, max_length=128, description="Functions it may call."
    )
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = Field(
        None, description="required, or a function: the answer begins as a call; nothing enforces its arguments."
    )
    parallel_tool_calls: bool | None = Field(None, description="false: the answer ends with its first call.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description='Variables of the model\'s chat template, like {"enable_thinking": false}.'
    )
    reasoning_effort: str | None = Field(None, max_length=64, description="Heeded where the template knows it.")
    response_format: TextFormat | None = Field(None, description="Text only.")
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = Field(
        None, description="Text only."
    )
    store: bool | None = Field(None, description="Nothing is stored.")
    prediction: _Hint = None
    prompt_cache_options: _Hint = None
    prompt_cache_key: _Label = None
    prompt_cache_retention: _Label = None
    safety_identifier: _Label = None
    service_tier: _Label = None
    verbosity: _Label = None


class CompletionRequest(_Request):
    prompt: (
        _PromptText
        | _Ids
        | Annotated[list[_PromptText], Field(fail_fast=True, min_length=1, json_schema_extra={"maxItems": 1})]
        | Annotated[list[_Ids], Field(fail_fast=True, min_length=1, json_schema_extra={"maxItems": 1})]
    ) = Field(description="Text, or token ids; also as the only one of a list.")
    logprobs: _NumLogprobs | None = Field(None, description="Log probabilities of so many likeliest tokens.")
    echo: Annotated[Literal[False], _Exactly] | None = Field(None, description="The prompt is not repeated.")
    best_of: _One | None = Field(None, description="One answer per request.")
    suffix: Literal[""] | None = Field(None, description="Nothing is filled in between two texts.")


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What a client asked for. `options` have a seed, drawn when none was asked for. `top_logprobs`: how many
    beside the chosen token's, None for none. `show_tokens`, `show_trees`: which of the speculation to send.
    `template_options`: variables for the chat template. `must_call`: names of the tools one of which is to be
    called; none where that is the model's choice. `one_call`: end with the first tool call."""

    kind: Literal["chat", "completion"]
    prompt: Prompt
    options: GenerationOptions
    tools: list[dict[str, Any]] | None = None
    template_options: dict[str, Any] = field(default_factory=dict)
    must_call: tuple[str, ...] = ()
    one_call: bool = False
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

    def chat(self, body: bytes) -> GenerationRequest:
        """A conversation to answer. Raises ApiError: 400 naming the field, 404 for another model."""
        asked = read_record(ChatRequest, body)
        if asked.max_tokens and asked.max_completion_tokens not in (None, asked.max_tokens):
            raise bad_request("max_completion_tokens: differs from max_tokens; give one", "max_completion_tokens")
        if asked.top_logprobs and not asked.logprobs:
            raise bad_request("top_logprobs: needs logprobs to be true", "top_logprobs")
        effort = {} if asked.reasoning_effort is None else {"reasoning_effort": asked.reasoning_effort}
        own_options = asked.chat_template_kwargs or {}
        try:
            check_template_options("chat_template_kwargs", own_options)
        except UsageError as error:
            raise bad_request(str(error), str(error).partition(":")[0]) from None
        tools, choice = asked.tools if asked.tool_choice != "none" else None, asked.tool_choice
        known = [tool.function.name for tool in tools or ()]
        wanted = [choice.function.name] if isinstance(choice, NamedTool) else known if choice == "required" else []
        if choice not in (None, "auto", "none") and not (wanted and set(wanted) <= set(known)):
            raise bad_request(
                "tool_choice: names none of the tools; give it in tools, or leave it out", "tool_choice"
            )
        return self._request(
            asked,
            asked.max_tokens or asked.max_completion_tokens,
            kind="chat",
            prompt=[_template_message(message, f"messages[{i}]") for i, message in enumerate(asked.messages)],
            tools=[_template_tool(tool) for tool in tools] if tools else None,
            template_options={**self._settings.template_options, **effort, **own_options},
            must_call=tuple(wanted),
            one_call=asked.parallel_tool_calls is False or isinstance(choice, NamedTool),
            top_logprobs=asked.top_logprobs or 0 if asked.logprobs else None,
        )

    def completion(self, body: bytes) -> GenerationRequest:
        """A text to continue. Raises as `chat` does."""
        asked = read_record(CompletionRequest, body)
        prompt = asked.prompt
        if not isinstance(prompt, str) and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise bad_request("prompt: one text per request; send each in a request of its own", "prompt")
            prompt = prompt[0]
        return self._request(
            asked, asked.max_tokens, kind="completion", prompt=prompt, top_logprobs=asked.logprobs
        )

    def _request(self, asked: _Request, max_tokens: int | None, **own: Any) -> GenerationRequest:
        """The request with what both kinds have, and what its kind has of its `own`."""
        if asked.model not in (None, self._model):
            message = f'model: "{asked.model[:80]}" is not served here; ask for "{self._model}" or leave it out'
            raise ApiError(404, message, param="model", code="model_not_found")
        shown, limit = asked.speculation, self._settings.max_tokens
        options = {
            # Drawn, not fixed: who asks twice at a temperature expects two answers. 53 bits stay exact everywhere.
            "seed": secrets.randbits(53),
            "max_tokens": min(max_tokens, limit) if max_tokens and max_tokens > 0 else limit,
            **sampling_under(self._own_sampling, {**self._given_sampling, **_engine_options(asked)}),
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


def _engine_options(asked: _Request) -> dict[str, Any]:
    """What is asked for, in the engine's words."""
    options = asked.model_dump(include=_ENGINE_OPTIONS, exclude_none=True)
    if asked.stop is not None:
        options["stop"] = [text for text in ([asked.stop] if isinstance(asked.stop, str) else asked.stop) if text]
    if asked.seed is not None:
        options["seed"] = asked.seed % 2**64  # OpenAI's are signed
    if asked.top_k == -1:
        options["top_k"] = 0
    if asked.top_p == 0:  # the smallest nucleus: the likeliest token alone
        options |= {"temperature": 0.0, "top_p": 1.0}
    return options


def refused(error: UsageError) -> ApiError:
    """An option or prompt that the engine refuses."""
    option, colon, _ = str(error).partition(":")
    return bad_request(str(error), option if colon and option.isidentifier() else None)


def _template_message(message: Message, where: str) -> dict[str, Any]:
    """A message for the chat template. Raises ApiError (400) for one that no template could take."""
    told = {"role", "content", "name", "tool_call_id", "reasoning", "reasoning_content"}
    made = message.model_dump(include=told, exclude_none=True)
    if message.tool_calls:
        calls = [call.model_dump(include={"id", "function"}, exclude_unset=True) for call in message.tool_calls]
        made["tool_calls"] = [{"type": "function", **call} for call in calls]
    try:
        return template_message(made, where)
    except UsageError as error:
        raise bad_request(str(error), str(error).partition(":")[0]) from None


def _template_tool(tool: Tool) -> dict[str, Any]:
    function = tool.function.model_dump(include={"name", "description", "parameters"}, exclude_none=True)
    return {"type": "function", "function": function}


def read_record(kind: type[Record], body: bytes) -> Record:
    """A request's body as a record. Raises ApiError (400): one line that names the field."""
    try:
        value = from_json(body.removeprefix(BOM_UTF8), allow_inf_nan=False)
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
    depth = [(len(inner), not problem["type"].endswith("_type")) for inner, problem in meant]
    chosen = [meant[depth.index(max(depth))]] if meant else of_field
    path, _ = chosen[0]
    where = "".join(f"[{step}]" if isinstance(step, int) else f".{_cut(step)}" for step in path).lstrip(".")
    wording = _wording([problem for _, problem in chosen])
    if wording == _PLAIN["extra_forbidden"] and path[-1] in _INSTEAD:
        wording = wording.replace("see /openapi.json", _INSTEAD[path[-1]])
    elif because := _BECAUSE.get(re.sub(r"\[\d+\]", "", where)):
        wording += f": {because}"
    return bad_request(f"{where or 'the body'}: {wording}", where or None)


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


_NO_FORM = "a form of the answer cannot be enforced; describe it in a message, or as a tool for tool_choice"
_BECAUSE = {
    "best_of": "one answer is made; send the request again for another",
    "echo": "the prompt is not repeated; put it before the answer, or leave echo out",
    "messages.content.type": "text only; images, audio and files are not taken",
    "modalities": "only text is written; leave it out",
    "n": "one answer is made; send the request again for another",
    "response_format.type": _NO_FORM,
    "suffix": "nothing is filled in between two texts; write the model's own markers into the prompt",
    "tool_choice.type": "name a function, or use required",
    "tools.type": "only functions can be called; leave other tools out",
}
_INSTEAD: dict[int | str, str] = {
    "audio": "only text is written; leave it out",
    "enable_thinking": 'use chat_template_kwargs, like {"enable_thinking": false}',
    "function_call": "use tool_choice, and tool_calls in messages",
    "functions": "use tools",
    **dict.fromkeys(("format", "grammar", "guided_json", "json_schema"), _NO_FORM),
    "images": "images are not taken",
    "max_new_tokens": "use max_tokens",
    "n_predict": "use max_tokens",
    "num_ctx": "the context is the server's: serve --context",
    "num_predict": "use max_tokens",
    "random_seed": "use seed",
    "reasoning": "use reasoning_effort",
    "repeat_penalty": "use repetition_penalty",
    "stop_sequences": "use stop",
    "thinking": 'use chat_template_kwargs, like {"enable_thinking": false}',
    "web_search_options": "the web is not searched; leave it out",
}


def _wording(problems: Sequence[ErrorDetails]) -> str:
    """Pydantic's words, as a sentence about the field."""
    if plain := _PLAIN.get(problems[0]["type"]):
        return plain
    said = " or ".join(dict.fromkeys(problem["msg"].removeprefix("Input should be ") for problem in problems))
    said = said.replace("False", "false")  # of a Literal: in JSON's words
    said = re.sub("dictionary( or instance of [A-Za-z]+)?", "object", said).replace(" after validation", "")
    if not problems[0]["msg"].startswith("Input should be "):
        return re.sub("^[A-Za-z]+ should", "must", said)
    value = problems[0]["input"]
    if isinstance(value, list | dict):
        return f"must be {said}, not {'a list' if isinstance(value, list) else 'an object'}"
    return f"must be {said}, not {_cut(json.dumps(value, ensure_ascii=False))}"


def _cut(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}…"
