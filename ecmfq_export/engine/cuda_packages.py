"""NVIDIA's CUDA compiler and runtime from PyPI, for this machine or for another platform, unpacked into a cache folder.

Used only where the plugin library is compiled for a device of another platform: its CUDA runtime is never on this machine, and its
compiler not always. Everything is fetched once with pip and kept.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ecmfq_export.errors import BuildError

# One minor version for all of them: cicc (nvvm), ptxas (nvcc) and the headers (crt, cccl, runtime) belong together.
CUDA_VERSION = "13.0"
_COMPILER = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime", "nvidia-cuda-cccl")
_WHEEL_TAGS = ("manylinux_2_28_{}", "manylinux_2_27_{}", "manylinux_2_17_{}", "manylinux2014_{}")


def cache_folder() -> Path:
    """Where compiled libraries and fetched packages are kept: ``ECMFQ_CACHE``, or ``ecmfq-export`` in the user's cache folder."""
    own = os.environ.get("ECMFQ_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ecmfq-export"


@contextmanager
def exclusively(folder: Path) -> Iterator[None]:
    """Hold a folder's lock: of two processes that want the same thing made, one makes it and the other finds it.

    Raises:
        BuildError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise BuildError(f"the cache {folder} cannot be written: {error}", "set ECMFQ_CACHE to a folder that can") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def fetch_compiler(platform: str) -> Path:
    """nvcc of :data:`CUDA_VERSION` with its headers for this machine (about 110 MB); the folder has ``bin``, ``nvvm``, ``include``.

    Raises:
        BuildError: pip cannot fetch it.
    """
    return _fetch([f"{name}=={CUDA_VERSION}.*" for name in _COMPILER], platform, f"cuda-{CUDA_VERSION}-{platform}")


def fetch_runtime(version: str, platform: str) -> Path:
    """The CUDA runtime of `version` (``13.0``) for `platform`: a folder with ``libcudart_static.a``.

    Raises:
        BuildError: pip cannot fetch it, or NVIDIA's package has no static library (those for CUDA 12 have none).
    """
    if int(version.split(".")[0]) < 13:
        raise BuildError(f"PyPI has no static CUDA {version} runtime for {platform}",
                         f"install NVIDIA's cross package for it (cuda-cross-{platform.removeprefix('linux-')}), or let CUDACXX name "
                         "nvcc 13")
    folder = _fetch([f"nvidia-cuda-runtime=={version}.*"], platform, f"cudart-{version}-{platform}") / "lib"
    if not (folder / "libcudart_static.a").is_file():
        raise BuildError(f"{folder} has no libcudart_static.a", f"remove {folder.parent} and try again")
    return folder


def _fetch(requirements: Sequence[str], platform: str, name: str) -> Path:
    """Download wheels for `platform` and unpack what is under ``nvidia/cu13`` in them, together, into the cache."""
    target = cache_folder() / name
    with exclusively(cache_folder()):
        if target.is_dir():
            return target
        with tempfile.TemporaryDirectory(dir=cache_folder()) as work:
            tags = [f"--platform={tag.format(platform.removeprefix('linux-'))}" for tag in _WHEEL_TAGS]
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                       "--only-binary=:all:", *tags, f"--dest={work}", *requirements]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
                raise BuildError(f"NVIDIA's packages {', '.join(requirements)} for {platform} cannot be fetched: {reason}",
                                 "this needs PyPI, once; by hand: " + " ".join(["pip", *command[3:-len(requirements) - 1],
                                                                               *(f"'{r}'" for r in requirements)]))
            tree = Path(work) / "tree"
            for wheel in sorted(Path(work).glob("*.whl")):
                _unpack(wheel, tree)
            (tree / "lib64").symlink_to("lib")  # nvcc.profile of 13.0 looks there
            shutil.move(tree, target)
    return target


def _unpack(wheel: Path, tree: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            parts = Path(entry.filename).parts
            if parts[:2] != ("nvidia", "cu13") or entry.is_dir() or ".." in parts:
                continue
            path = tree.joinpath(*parts[2:])
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(entry) as source, path.open("wb") as out:
                shutil.copyfileobj(source, out)
            path.chmod(0o755 if "bin" in parts else 0o644)
