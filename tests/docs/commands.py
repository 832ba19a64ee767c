"""Commands of a Markdown page: fenced ``sh`` blocks, each with the mark that stands above it."""

from __future__ import annotations

import argparse
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from ecmfq_export.cli_parser import build_parser

_BLOCK = re.compile(r"^(?:\*(?P<mark>[^*\n]+)\*\n\n)?```sh\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """Shell commands and the words in italics above them, empty where there are none."""

    mark: str
    text: str

    def own_commands(self) -> list[list[str]]:
        """Arguments of every call of ``ecmfq-export`` in it."""
        lines = self.text.replace("\\\n", " ").splitlines()
        words = [shlex.split(line, comments=True) for line in lines]
        return [line[1:] for line in words if line and line[0] == "ecmfq-export"]


def blocks(page: Path) -> list[Block]:
    """Every ``sh`` block of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = [Block(match["mark"] or "", match["text"]) for match in _BLOCK.finditer(text)]
    assert len(found) == text.count("```sh"), f"a block of {page} could not be read"
    return found


def parse(arguments: list[str]) -> argparse.Namespace:
    """What the command line makes of arguments; SystemExit where it refuses them."""
    return build_parser().parse_args(arguments)
