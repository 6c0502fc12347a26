"""What a request may say: the fields of the OpenAI interface that a bundle can honour; everything else is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MOST_STOPS = 16
MOST_TEXTS = 2048
# Fields that change nothing here, and those that change nothing at the value shown.
IGNORED = frozenset(("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"))
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none",),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "presence_penalty": (0, 0.0),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}


def token_ids(value: Any) -> bool:
    """Whether this is one text as token ids."""
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def texts_or_tokens(value: Any) -> list[str | list[int]]:
    """A text, token ids, or a list of either, as a list."""
    if isinstance(value, str) or token_ids(value):
        return [value]
    many = isinstance(value, list) and 1 <= len(value) <= MOST_TEXTS
    if many and all(isinstance(text, str) or token_ids(text) for text in value):
        return value
    raise ValueError(f"expected a text, token ids, or a list of 1 to {MOST_TEXTS} of them")


def stop_texts(value: Any) -> list[str]:
    """A text or several."""
    texts = [value] if isinstance(value, str) else value
    right = isinstance(texts, list) and all(isinstance(text, str) and text for text in texts)
    if not right or len(texts) > MOST_STOPS:
        raise ValueError(f"expected a text or at most {MOST_STOPS} of them, none empty")
    return texts


Texts = Annotated[list[str | list[int]], BeforeValidator(texts_or_tokens)]


class Body(BaseModel):
    """Absent and null mean the same."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {
            key: given
            for key, given in value.items()
            if given is not None and key not in IGNORED and not _neutral(key, given)
        }


def _neutral(key: str, given: Any) -> bool:
    # By type too: logprobs = 0 asks for something, False does not.
    return any(type(given) is type(value) and given == value for value in NEUTRAL.get(key, ()))


class StreamOptions(Body):
    """`include_usage`: a last event counts the tokens."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Generation(Body):
    """What completions and chats have in common; the defaults are OpenAI's."""

    model: str
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=2**31 - 1)  # not in OpenAI's interface; `extra_body` of its client
    n: int = Field(1, ge=1, le=128)
    stop: Annotated[list[str], BeforeValidator(stop_texts)] = []
    seed: int | None = Field(None, ge=0, le=2**63 - 1)


class CompletionBody(Generation):
    """POST /v1/completions."""

    prompt: Texts
    max_tokens: int = Field(16, ge=1)


class TextPart(Body):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class Message(Body):
    """`content`: text, whole or in parts."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates want it; "developer" is OpenAI's new word for "system"."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(Generation):
    """POST /v1/chat/completions; without `max_tokens` the answer may fill the cache."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)


class EmbeddingBody(Body):
    """POST /v1/embeddings."""

    model: str
    input: Texts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
