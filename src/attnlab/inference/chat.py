"""Chat templates: a conversation in the form that a model was trained on, rendered in a sandbox.

Templates are programs in Jinja that came with the weights, so they run where they can neither read nor write anything.
They are given the same variables and filters as in transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from ..data import Tokenizer
from ..errors import UserError


def render_chat(template: str, messages: Sequence[Mapping[str, str]], special: Mapping[str, str]) -> str:
    """Return the text of `messages` ({"role", "content"}), and the beginning of an answer.

    `special`: "bos_token" and the like -> name. Raises `UserError` for a template that is broken, or that refuses these
    messages.
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    place = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    place.filters["tojson"] = _to_json
    place.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    try:
        return place.from_string(template).render(messages=messages, add_generation_prompt=True, **special)
    except Exception as error:  # a template is a program of somebody else's: whatever it raises, it does not do
        raise UserError(
            f"the chat template of this model does not take these messages ({error}); change them, or leave --chat out"
        ) from None


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the token ids of a rendered template. Other than in a user's text, a special token's name is the token."""
    names = special_tokens(tokenizer)
    if not names:
        return tokenizer.encode(text)
    longest_first = sorted(names, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
    return [i for part in parts if part for i in ([names[part]] if part in names else tokenizer.encode(part))]


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the special tokens of a tokenizer: name -> id."""
    return {token["content"]: token["id"] for token in tokenizer.to_json().get("added_tokens") or []}


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)  # Jinja's own would escape for HTML


def _refuse(why: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(why)
