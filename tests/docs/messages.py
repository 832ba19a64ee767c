"""The messages that the package's source can emit: the first argument of every UserError that it makes, values as gaps."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import ecmfq_export.errors
from ecmfq_export.errors import UserError

PACKAGE = Path(ecmfq_export.errors.__file__).parent
ERRORS = {name for name, value in vars(ecmfq_export.errors).items() if isinstance(value, type) and issubclass(value, UserError)}
GAP = "\0"
"""Stands in a template where the source puts a value."""


@cache
def templates() -> dict[str, str]:
    """Template of each message to the place where the source makes it."""
    found: dict[str, str] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and node.args and _name(node.func) in ERRORS:
                for message in _messages(node.args[0], functions):
                    text = _template(message)
                    if text.strip(GAP + " :"):
                        found.setdefault(text, f"{path.relative_to(PACKAGE.parent)}:{node.lineno}")
    return found


def _messages(argument: ast.expr, functions: dict[str, ast.FunctionDef]) -> list[ast.expr]:
    """The first argument, or where message and fix come from a function of the module (``Error(*function(...))``) all that it returns."""
    if isinstance(argument, ast.Starred) and isinstance(argument.value, ast.Call) and _name(argument.value.func) in functions:
        returned = [node.value for node in ast.walk(functions[_name(argument.value.func)]) if isinstance(node, ast.Return)]
        return [value.elts[0] for value in returned if isinstance(value, ast.Tuple)]
    return [argument]


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""


def _template(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_template(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _template(node.left) + _template(node.right)
    return GAP
