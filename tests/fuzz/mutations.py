"""Mutations of what a bundle is made of, drawn from a seeded generator: values in a JSON tree, JSON text, bytes, safetensors headers."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

LONG = "x" * 5000


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


NASTY: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 127, 2**15, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64, -(2**31), -(2**63),
    10**30, 10**400, 0.5, -0.0, 1e308, -1e308, 1e-320, float("nan"), float("inf"), float("-inf"),
    "", "x", "0", "-1", "F32", "float32", "null", LONG, "../../outside.bin", "/etc/hostname", "a/../../b", "..", ".", "./", "a\0b",
    "\ud800", "..\\..\\x", "C:\\x", "%s%n", "{0}", "[bold]x[/]", "\x1b[2J", "\u202e", "re:(", "re:(a+)+$", "re:(.*)*x",
    [], {}, [[]], [0], [-1, -1], [2**63, 2**63], ["x"], {"x": 0}, {"": ""}, [None], [1] * 300, _nested(40), {"a": {"a": {"a": {}}}},
)  # fmt: skip
"""Values that a reader may not expect at a place."""


def places(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values below a JSON tree's root."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = []
    for key, value in items:
        found += [(*at, key), *places(value, (*at, key))]
    return found


def _parent(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        tree = tree[key]
    return tree


def _change_value(draw: random.Random, value: Any) -> Any:
    kind = draw.randrange(4)
    if type(value) is int and kind:
        return draw.choice([value + 1, value - 1, -value, value * 2, value << 32, value << 61, value * 0.5 if abs(value) < 2**63 else 0.5,
                            str(value), value + 2**64])
    if type(value) is str and kind:
        return draw.choice([value[:-1], value + "x", value.upper(), value[::-1], "../" + value, "/" + value, value + "\0", value + "/",
                            value + "/..", [value], value.encode().hex()])
    if type(value) is list and value and kind:
        return draw.choice([value[:-1], value[1:], value + value, value[::-1], [value], value * 200, dict(enumerate(value[:3]))])
    if type(value) is dict and value and kind:
        return draw.choice([list(value), [value], {}, {**value, "": value}, {key.upper(): one for key, one in value.items()}])
    return draw.choice(NASTY)


def mutate_tree(draw: random.Random, tree: Any, below: tuple[Any, ...] = ()) -> tuple[Any, str]:
    """A changed copy of a JSON tree and what was done; changes stay under the path `below`."""
    tree = copy.deepcopy(tree)
    done = []
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        paths = [path for path in places(tree) if path[: len(below)] == below]
        if not paths:
            break
        path = draw.choice(paths)
        parent, key = _parent(tree, path), path[-1]
        action = draw.choice(["nasty", "nasty", "change", "change", "delete", "rename", "swap"])
        if action == "nasty":
            parent[key] = copy.deepcopy(draw.choice(NASTY))
        elif action == "change":
            parent[key] = _change_value(draw, parent[key])
        elif action == "delete":
            del parent[key]
        elif action == "rename" and isinstance(parent, dict):
            new = draw.choice([key + "x", key.upper(), "", "../" + key, "/" + key, key + "\0", LONG, "\ud800", "__class__"])
            parent[new] = parent.pop(key)
        else:
            other = draw.choice(paths)
            if other[: len(path)] != path and path[: len(other)] != other:
                swapped = _parent(tree, other)
                parent[key], swapped[other[-1]] = swapped[other[-1]], parent[key]
        done.append(f"{action} {'.'.join(map(str, path))[:80]}")
    return tree, "; ".join(done)


def mutate_bytes(draw: random.Random, data: bytes) -> tuple[bytes, str]:
    """Changed bytes, whatever they mean."""
    action = draw.choice(["flip", "flip", "flip", "truncate", "extend", "zero", "repeat", "fill", "empty", "insert"])
    at = draw.randrange(max(1, len(data)))
    size = min(len(data) - at, draw.choice([1, 4, 8, 64, 1000]))
    if action == "flip":
        changed = bytearray(data)
        for _ in range(draw.choice([1, 1, 2, 8])):
            if changed:
                changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        data = bytes(changed)
    elif action == "truncate":
        data = data[:at]
    elif action == "extend":
        data += draw.randbytes(draw.choice([1, 8, 4096]))
    elif action in ("zero", "fill"):
        data = data[:at] + (b"\0" if action == "zero" else b"\xff") * size + data[at + size :]
    elif action == "repeat":
        data = data[: at + size] + data[at:]
    elif action == "insert":
        data = data[:at] + draw.randbytes(size) + data[at:]
    else:
        data = b""
    return data, f"{action} at {at}"


def mutate_json(draw: random.Random, tree: Any, below: tuple[Any, ...] = ()) -> tuple[bytes, str]:
    """Bytes of a JSON file with one fault: in its values mostly, in its text else."""
    kind = draw.choice(["tree"] * 8 + ["text", "text"])
    if kind == "tree":
        tree, done = mutate_tree(draw, tree, below)
        return dumps(tree), done
    text = json.dumps(tree)
    action = draw.choice(["bytes", "bytes", "double", "deep", "deep object", "utf16", "bom", "latin", "garbage", "root", "digits",
                          "comment"])
    if action == "bytes":
        return mutate_bytes(draw, text.encode())
    if action == "double" and isinstance(tree, dict) and tree:
        key = draw.choice(list(tree))
        return (f"{{{json.dumps(key)}: {json.dumps(draw.choice([0, '', None, [], {}]))}, " + text[1:]).encode(), f"double key {key}"
    changed = {
        "deep": b"[" * 200_000 + b"]" * 200_000, "deep object": b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "utf16": text.encode("utf-16"),
        "bom": b"\xef\xbb\xbf" + text.encode(), "latin": text.encode().replace(b'"', b'"\xe9', 1), "garbage": text.encode() + b"}",
        "root": dumps(draw.choice(NASTY)), "digits": b'{"a":' + b"9" * 5000 + b"}", "comment": b"// x\n" + text.encode(),
    }  # fmt: skip
    return changed.get(action, b"null"), action


def dumps(tree: Any) -> bytes:
    """JSON of anything in a mutated tree; keys that are no text become text."""
    return json.dumps(tree).encode()


def split_safetensors(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and tensors' bytes of a safetensors file."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def mutate_safetensors(draw: random.Random, data: bytes) -> tuple[bytes, str]:
    """A safetensors file with a fault: in an entry, in the header's text or length, or anywhere."""
    header, body = split_safetensors(data)
    action = draw.choice(["entry"] * 6 + ["tree", "tree", "length", "bytes", "text"])
    if action == "bytes":
        return mutate_bytes(draw, data)
    if action == "length":
        length = draw.choice([0, 1, 7, len(data), len(data) - 8, 2**20, 100 << 20, 2**31, 2**40, 2**63, 2**64 - 1])
        return struct.pack("<Q", length) + data[8:], f"header length {length}"
    if action == "text":
        text, done = mutate_json(draw, header)
    elif action == "tree":
        tree, done = mutate_tree(draw, header)
        text = dumps(tree)
    else:
        done = _mutate_entry(draw, header)
        text = dumps(header)
    return struct.pack("<Q", len(text)) + text + body, done


def _mutate_entry(draw: random.Random, header: dict[str, Any]) -> str:
    names = [name for name in header if name != "__metadata__"]
    name, other = draw.choice(names), draw.choice(names)
    entry = header[name]
    start, stop = entry["data_offsets"]
    actions = {
        "overlap": lambda: entry.update(data_offsets=list(header[other]["data_offsets"])),
        "negative": lambda: entry.update(data_offsets=[-start - 8, stop]),
        "swapped": lambda: entry.update(data_offsets=[stop, start]),
        "shifted": lambda: entry.update(data_offsets=[start + 1, stop + 1]),
        "huge": lambda: entry.update(data_offsets=[start, draw.choice([2**31, 2**40, 2**63, 2**64, 10**30])]),
        "dtype": lambda: entry.update(dtype=draw.choice(["F64", "F8_E4M3", "BOOL", "f32", "", "O", "I4", 5, None, ["F32"], "C64", LONG])),
        "other dtype": lambda: entry.update(dtype=draw.choice(["F32", "F16", "BF16", "I64", "I8", "U8"])),
        "shape": lambda: entry.update(shape=draw.choice([[], [0], [-1], [2**63], [2**32, 2**32], [1] * 300, [stop - start], ["1"], [1.5],
                                                         [True], [0, 2**63], entry["shape"][::-1], [*entry["shape"], 1]])),
        "zero size": lambda: header.update({"zero": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [stop, stop]}}),
        "renamed": lambda: header.update({draw.choice([name + "x", "", "../" + name, "\ud800", LONG, "__metadata__"]): header.pop(name)}),
        "deleted": lambda: header.pop(name),
        "extra key": lambda: entry.update(surprise=1),
        "many": lambda: header.update({f"t{i}": dict(entry) for i in range(2000)}),
        "metadata": lambda: header.update(__metadata__=draw.choice([5, [], {"a": 1}, {"format": LONG}, None])),
    }  # fmt: skip
    action = draw.choice(list(actions))
    actions[action]()
    return f"{action} {name}"
