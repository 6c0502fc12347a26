"""The model's chat template, run in jinja's sandbox: a bundle may come from anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jpq_export.errors import UsageError

DEFAULT = "default"  # of several named templates, the one for plain conversation
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


def chat_text(config: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], *, where: str) -> str:
    """The prompt for the assistant's next words after `messages` ({"role": ..., "content": ...}).

    `config`: tokenizer_config.json of the bundle at `where`. UsageError when it has no template, or the template
    refuses the messages.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    template = chat_template(config)
    if template is None:
        raise UsageError(
            f"{where}: the model has no chat template; give a whole prompt instead (not --chat, /v1/completions)"
        )
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    # What transformers gives to templates; its `tojson` does not escape for HTML as jinja's own does.
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    special = {key: _token_text(config.get(key)) for key in SPECIAL}
    try:
        return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **special)
    except (TemplateError, TypeError, ValueError, OverflowError) as error:
        raise UsageError(
            f"{where}: the model's chat template fails ({error}); send other messages or a whole prompt"
        ) from error


def chat_template(config: Mapping[str, Any]) -> str | None:
    """The template's source; of several ([{"name": ..., "template": ...}]) the default one."""
    found = config.get("chat_template")
    if isinstance(found, list):
        found = next((entry["template"] for entry in found if entry.get("name") == DEFAULT), None)
    return found if isinstance(found, str) else None


def _token_text(token: str | dict[str, Any] | None) -> str:
    """A special token of tokenizer_config.json: a string, or a record with its content."""
    return token["content"] if isinstance(token, dict) else token or ""


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
