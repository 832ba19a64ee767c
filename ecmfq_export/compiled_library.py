"""Where an installation has its compiled libraries: the plugin for engines, and the host's kernels for quantizing."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import ecmfq_export
from ecmfq_export.errors import BuildError


def find_library(name: str, what: str, fix: str) -> Path:
    """The file `name` of this installation: inside the package, or the newest one in a source tree's ``build`` folder.

    Args:
        what, fix: what an error calls it, and how to get it.

    Raises:
        BuildError: there is none.
    """
    packages = [Path(folder) for folder in ecmfq_export.__path__]
    # An editable install keeps Python files in the tree and compiled ones in site-packages.
    packages += [Path(sysconfig.get_path(kind)) / "ecmfq_export" for kind in ("platlib", "purelib")]
    for package in packages:
        candidate = package / "_lib" / name
        if candidate.is_file():
            return candidate
    tree = packages[0].parent / "build"
    built = [*tree.glob(f"*/{name}"), *tree.glob(f"*/*/{name}")]
    if built:
        return max(built, key=lambda path: path.stat().st_mtime)
    raise BuildError(f"the {what} {name} is neither in {packages[0] / '_lib'} nor under {tree}", fix)
