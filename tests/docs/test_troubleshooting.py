"""Every message that the page quotes is one that the package's source makes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ecmfq_export.cli import main
from ecmfq_export.engine.memory import MemoryNeeds, check_memory
from ecmfq_export.errors import UserError
from ecmfq_export.target import load_target
from tests.docs.messages import GAP, templates

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
QUOTED = re.findall(r"^> `(.+)`$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def _too_large() -> None:
    check_memory(MemoryNeeds(2**50, 2, 3, 4), load_target("rtx"))


TRIGGERED = {"target '<target>' has <n>, the engine needs <m>: weights <a>, KV cache <b>, other inputs and outputs <c>, scratch <d>":
             _too_large}  # fmt: skip
"""Messages that the source puts together from pieces: they are provoked and not looked up."""


def _sources(message: str) -> list[str]:
    """Templates that could be `message`: what it quotes stands in them, in order, and its values stand at their gaps.

    A template may go on after the message, and quotes around a value are not the page's to repeat.
    """
    pieces = re.split(r"<[^<>]+>", message)
    literal = [piece for piece in pieces if piece.strip()]
    pattern = f"[' {GAP}]*".join(re.escape(piece.strip(" ")) for piece in pieces)
    return [where for template, where in templates().items() if literal and re.match(pattern, template)]


def test_there_are_messages() -> None:
    assert len(QUOTED) > 40
    assert len(QUOTED) == len(set(QUOTED)) == PAGE.read_text(encoding="utf-8").count("\n> ")
    assert len(templates()) > 300


@pytest.mark.parametrize("message", QUOTED)
def test_a_quoted_message_is_emitted(message: str) -> None:
    assert sum(len(piece) for piece in re.split(r"<[^<>]+>", message)) >= 10, "too little is quoted to find anything by it"
    if message in TRIGGERED:
        with pytest.raises(UserError, match="^" + ".+".join(map(re.escape, re.split(r"<[^<>]+>", message)))):
            TRIGGERED[message]()
        return
    assert _sources(message), f"no message of the source is {message!r}"


@pytest.mark.parametrize("message", ["<file> was eaten by the dog", "model_type <type> is supported", "<directory> lacks <n> tensors"])
def test_what_is_not_emitted_is_found_out(message: str) -> None:
    assert not _sources(message)


@pytest.mark.parametrize(("arguments", "message"), [
    (["export", "model", "-o", "out", "--target", "rtx", "--set", "nothing=1"], "--set <setting>: unknown setting"),
    (["run", "nowhere", "--prompt", "x", "--temperature", "0"], None),
    (["build", "nowhere", "--target", "rtx"], None),
])  # fmt: skip
def test_the_form_of_a_message(arguments: list[str], message: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    """As the page's first lines say: one message, exit code 2, no traceback."""
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("ecmfq-export: error: ") and "Traceback" not in error
    if message is not None:
        assert message in QUOTED
        assert re.search(re.sub(r"<[^<>]+>", ".+", message), error)
