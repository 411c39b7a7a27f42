"""What clients send. Parameters that we do not know are ignored, as OpenAI and vLLM do, except
those that would change what is sampled: ignoring these would be a silent lie."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    ValidationInfo,
    field_validator,
)

from ...primitives.types import Message, SamplingParams
from .errors import InvalidRequest

TokenId = Annotated[int, Field(ge=0, lt=2**31), Strict()]
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    # name: values that change nothing
    "add_generation_prompt": (True,),
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "continue_final_message": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "ignore_eos": (False,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "stop_token_ids": ([],),
    "structured_outputs": (),
    "suffix": ("",),
    "use_beam_search": (False,),
    "web_search_options": (),
}


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow")

    @field_validator("*", mode="before")
    @classmethod
    def _null_is_the_default(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields.get(info.field_name or "")
        if value is None and field is not None and not field.is_required():
            return field.get_default(call_default_factory=True)
        return value


class StreamOptions(_Body):
    include_usage: bool = False


class SamplingRequest(_Body):
    """What the two sampling endpoints have in common."""

    model: str
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[Annotated[str, Field(min_length=1)]] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    trajectory_id: str | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    def check_supported(self) -> None:
        """
        Raises:
            InvalidRequest: a parameter that would change the result, and that we cannot follow.
        """
        for name, value in (self.model_extra or {}).items():
            if name in _UNSUPPORTED and value is not None and value not in _UNSUPPORTED[name]:
                raise InvalidRequest(
                    f"{name} is not supported here; leave it out", name, "unsupported_parameter"
                )

    def sampling_params(self, tokenizer: Any, max_tokens: int | None) -> SamplingParams:
        end = getattr(tokenizer, "eos_token", None)
        # Our stop strings replace the end tokens, OpenAI's are added to them. The sampler looks
        # for them in the text with its special tokens, so the end token is one more string.
        stop = [*self.stop, *([end] if end else [])] if self.stop else None
        return SamplingParams(
            max_tokens=max_tokens,
            seed=None if self.seed is None else self.seed % 2**63,
            stop=stop,
            temperature=self.temperature,
            top_k=self.top_k or -1,
            top_p=self.top_p,
        )


class CompletionRequest(SamplingRequest):
    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool = False

    def prompts(self) -> list[str | list[int]]:
        """One or more texts or lists of token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise InvalidRequest("prompt is empty", "prompt")
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class Part(_Body):
    type: Literal["text"]
    text: str


class FunctionCall(_Body):
    name: str
    arguments: str = "{}"

    @field_validator("arguments")
    @classmethod
    def _an_object(cls, value: str) -> str:
        try:
            if isinstance(json.loads(value or "{}"), dict):
                return value or "{}"
        except (ValueError, RecursionError):
            pass
        raise ValueError("arguments must be a JSON object, as a string")


class ToolCall(_Body):
    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(_Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] = ""
    name: str | None = None
    reasoning_content: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[ToolCall] = []

    def for_template(self) -> Message:
        """As chat templates read it: content is a text, a call's arguments are an object."""
        content = self.content
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        message: Message = {
            "role": "system" if self.role == "developer" else self.role,
            "content": content,
        }
        for name in ("name", "reasoning_content", "tool_call_id"):
            if getattr(self, name) is not None:
                message[name] = getattr(self, name)
        if self.tool_calls:
            message["tool_calls"] = [
                tool_call(call.id, call.function.name, json.loads(call.function.arguments))
                for call in self.tool_calls
            ]
        return message


def tool_call(call_id: str, name: str, arguments: Any) -> dict[str, Any]:
    """A call in a message; arguments are an object for chat templates, JSON text for clients."""
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def _function_schema(tool: dict[str, Any]) -> dict[str, Any]:
    function = tool.get("function")
    named = isinstance(function, dict) and isinstance(function.get("name"), str)
    if tool.get("type") != "function" or not named:
        raise ValueError('a tool must be {"type": "function", "function": {"name": ...}}')
    return tool


class ChatRequest(SamplingRequest):
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[Annotated[dict[str, Any], AfterValidator(_function_schema)]] = []
    tool_choice: Any = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = {}

    def check_supported(self) -> None:
        super().check_supported()
        if self.tool_choice not in ("auto", "none"):
            raise InvalidRequest(
                'tool_choice must be "auto" or "none": what a policy samples is not constrained',
                "tool_choice",
                "unsupported_parameter",
            )
        if "chat_template" in self.chat_template_kwargs:
            raise InvalidRequest("the model's own chat template is used", "chat_template_kwargs")
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs=true", "top_logprobs")

    def offered_tools(self) -> list[dict[str, Any]] | None:
        return self.tools if self.tools and self.tool_choice == "auto" else None
