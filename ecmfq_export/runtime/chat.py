"""A conversation: turns of text and images, and the prompt that a model's chat template makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ecmfq_export.errors import UserError


@dataclass(frozen=True)
class Turn:
    """What one side says.

    Attributes:
        content: texts, and None wherever an image stands.
    """

    role: Literal["system", "user", "assistant"]
    content: tuple[str | None, ...]


def render(tokenizer: Any, turns: Sequence[Turn], image_token: str) -> str:
    """The chat template's text of `turns`, one `image_token` an image, the assistant's turn opened.

    Raises:
        UserError: the template refuses the turns, or leaves out an image or what the user or the system says.
    """
    messages = [{"role": turn.role, "content": _content(turn)} for turn in turns]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # jinja2 raises many kinds
        raise UserError(f"the model's chat template refuses the messages: {error}",
                        "most templates want a system message first and alternating turns after it") from None
    images = sum(part is None for turn in turns for part in turn.content)
    if (found := text.count(image_token)) != images:
        raise UserError(f"the model's chat template placed {found} x {image_token} for {images} images")
    at = 0
    for turn in turns:
        # A template may trim what it places, and cut thoughts out of what the assistant said.
        for part in turn.content if turn.role != "assistant" else ():
            words = (part or "").strip()
            # Most templates keep the order; looking on from the last place keeps this linear in the length of the conversation.
            if (found := text.find(words, at)) >= 0:
                at = found + len(words)
            elif words not in text:
                raise UserError(f"the model's chat template leaves out what the {turn.role} says", "put it into the user's message")
    return text


def _content(turn: Turn) -> str | list[dict[str, str]]:
    # Some templates take system and assistant messages as plain texts only.
    if turn.role != "user" and None not in turn.content:
        return "".join(part for part in turn.content if part is not None)
    return [{"type": "image"} if part is None else {"type": "text", "text": part} for part in turn.content]
