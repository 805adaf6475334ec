"""Chat templates: a conversation in the form that a model was trained on, rendered in a sandbox.

Templates are programs in Jinja that came with the weights, so they run where they can neither read nor write anything.
They are given the same variables and filters as in transformers.
"""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NoReturn

from ..data import Tokenizer
from ..errors import UserError

SECONDS = 5.0  # that a template may take; real ones take milliseconds
LONGEST = 1_000_000  # characters, or elements, that a product in a template may have


def render_chat(template: str, messages: Sequence[Mapping[str, str]], special: Mapping[str, str]) -> str:
    """Return the text of `messages` ({"role", "content"}), and the beginning of an answer.

    `special`: "bos_token" and the like -> name. Raises `UserError` for a template that is broken, or that refuses these
    messages.
    """
    place = _sandbox()
    place.filters["tojson"] = _to_json
    place.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    try:
        with _time_limit(SECONDS):
            return place.from_string(template).render(messages=messages, add_generation_prompt=True, **special)
    except Exception as error:  # it is a program, and may fail in any way
        why = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"the chat template of this model does not take these messages ({why}); change them, or leave --chat out"
        ) from None


def _sandbox() -> Any:
    """Return a sandbox in which no product or power is longer than LONGEST."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            counts = [each for each in (left, right) if isinstance(each, int)]
            texts = [each for each in (left, right) if isinstance(each, Sequence)]
            if operator == "**" or any(len(each) * max(counts, default=0) > LONGEST for each in texts):
                _refuse(f"it computes {operator} of what is too large")
            return super().call_binop(context, operator, left, right)

    return Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` inside after so many seconds; without a limit outside the main thread."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(number: int, frame: Any) -> NoReturn:
        raise TimeoutError(f"it takes more than {seconds:.0f} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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
