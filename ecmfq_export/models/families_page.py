"""The page docs/families.md, made from the registry: ``python -m ecmfq_export.models.families_page > docs/families.md``."""

from __future__ import annotations

from ecmfq_export.models.family_facts import FACTS, REFUSED, FamilyFacts
from ecmfq_export.models.registry import SUPPORTED

_HEAD = """# Model families

Made from the registry (`ecmfq_export/models/registry.py`, `family_facts.py`) by `python -m ecmfq_export.models.families_page`.

A family is chosen by `model_type` of `config.json`. A config field that is not known, or a value that changes the model in a way that
is not handled, a tensor that no module takes, or a module that no tensor fills is refused by name before any work.

All comparisons below are of small random models that transformers' own classes make and save, in every test run. Published
checkpoints were not run: where "headers" names one, its `config.json` and all its tensor names and shapes are checked, without weights.
"""


def render() -> str:
    """The whole page, Markdown."""
    parts = [_HEAD, _overview()]
    parts += [_section(name, FACTS[name]) for name in FACTS]
    rows = "".join(f"| `{name}` | {reason} |\n" for name, reason in REFUSED.items())
    parts.append("## Known and refused\n\nAny other `model_type` is refused too. These are told why:\n\n"
                 "| `model_type` | reason |\n|---|---|\n" + rows)
    return "\n".join(parts)


def _overview() -> str:
    rows = "".join(
        f"| {facts.title} | `{name}` | {facts.attention} | {facts.experts} | {facts.vision} |\n" for name, facts in FACTS.items()
    )
    return "| family | `model_type` | attention | routing | vision |\n|---|---|---|---|---|\n" + rows


def _section(name: str, facts: FamilyFacts) -> str:
    lines = [f"## {facts.title} (`{name}`)\n"]
    if facts.checkpoints:
        lines.append(f"- Published: {', '.join(facts.checkpoints)}")
    lines.append("- Works: every stage, from the checkpoint to text from the exported graphs")
    lines += [f"- Compared: {what}" for what in facts.compared]
    lines.append(f"- Headers: {facts.headers or 'none'}")
    lines.append(f"- Refused: {'; '.join(facts.refused)}")
    unused = ", ".join(f"`{prefix}*`" for prefix in SUPPORTED[name].unused)
    if unused:
        lines.append(f"- Left out ({unused}): {facts.left_out}")
    if facts.note:
        lines.append(f"- Note: {facts.note}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(render(), end="")
