"""The reference of targets (docs/targets.md), made from the TOML files and from what the code says of their fields."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from typing import Any

from ecmfq_export.target import Target, choices, list_targets, load_target

_HEAD = """# Reference of targets

Made by `ecmfq-export targets --markdown` from the files in `targets/`; a test holds this page equal to them. [engine.md](engine.md)
tells what engines are and which of these targets were run.

A target of your own is a TOML file: copy the nearest one, name it as the file is named, and pass `--target ./my-board.toml`. Every
field must be there and none may be unknown.
"""


def reference() -> str:
    """The whole page."""
    targets = [load_target(name) for name in list_targets()]
    lines = [_HEAD, "## All targets\n", *_overview(targets), "\n## Fields\n", *_fields(Target, ""), ""]
    for target in targets:
        lines += [f"## {target.name}\n", f"{target.description}.\n", *_table(("field", "value"), _flat(dataclasses.asdict(target))), ""]
    return "\n".join(lines)


def _overview(targets: list[Target]) -> list[str]:
    where = {"host-aot": "any machine, without a GPU", "on-device": "the device"}
    rows = [
        (f"[{t.name}](#{t.name})", t.description, " + ".join(map(str, t.compute_capabilities)), t.platform, t.engine.runtime,
         where[t.engine.build], f"{t.limits.max_batch} x {t.limits.max_seq_len}", f"{t.limits.memory_bytes / 2**30:g} GiB")
        for t in targets
    ]  # fmt: skip
    return _table(("target", "for", "SM", "platform", "runtime", "built on", "batch x tokens", "memory"), rows)


def _fields(kind: type, prefix: str) -> list[str]:
    """One line a field, from the docstring of the dataclass that reads it."""
    hints = typing.get_type_hints(kind)
    said = _attributes(kind)
    lines = []
    for field in dataclasses.fields(kind):
        name, hint = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(hint):
            lines += _fields(typing.cast(type, hint), f"{name}.")
            continue
        allowed = choices(name)
        text = said.get(field.name, "") + (f" One of {', '.join(f'`{choice}`' for choice in allowed)}." if allowed else "")
        lines.append(f"- `{name}`: {text.strip()}" if text else f"- `{name}`")
    return lines


def _attributes(kind: type) -> dict[str, str]:
    """Field name to its text in the docstring's Attributes; a docstring without them speaks of its fields in their order."""
    doc = inspect.getdoc(kind) or ""
    if "Attributes:" not in doc:
        first, *rest = [field.name for field in dataclasses.fields(kind)]
        return {first: " ".join(doc.split()), **dict.fromkeys(rest, f"See `{first}`.")}
    found: dict[str, str] = {}
    names: list[str] = []
    for line in doc.split("Attributes:")[1].splitlines():
        if match := re.match(r"    (\w+(?:, \w+)*): (.*)", line):
            names = match[1].split(", ")
            found |= dict.fromkeys(names, match[2])
        elif line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return {name: text.replace("``", "`") for name, text in found.items()}


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        elif key not in ("name", "description") or prefix:
            rows.append((f"`{prefix}{key}`", ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)))
    return rows


def _table(head: typing.Sequence[str], rows: typing.Sequence[typing.Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]
