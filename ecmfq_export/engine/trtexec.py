"""Building a bundle's engines with TensorRT's own program, trtexec: the exact lines, and the script that holds them.

For devices where this package is not installed. Everything here is in trtexec since TensorRT 10.3: ``--stronglyTyped`` is needed by
TensorRT 10 and taken without effect by 11, ``--dynamicPlugins`` registers a library by its exported creators (``--staticPlugins``
would load ours without registering anything), and the library is not serialized into the engine, since trtexec then registers it twice.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from ecmfq_export.engine.memory import Shapes
from ecmfq_export.engine.plugin_library import LIBRARY_NAME, LOCAL_LIBRARY_NAME

TIMING_CACHE = "timing.cache"


def trtexec_arguments(onnx: PurePosixPath, engine: PurePosixPath, profiles: Sequence[Mapping[str, Shapes]], *,
                      plugin_library: PurePosixPath | None, timing_cache: PurePosixPath | None) -> list[str]:
    """Arguments that build `engine` from `onnx` as :func:`ecmfq_export.engine.build.build_engine` does.

    Args:
        profiles: one or more; for every input with a free extent its (min, opt, max) shapes.
        plugin_library: None where the graph has no plugin node.
        timing_cache: a file that is read and written; None without one.
    """
    arguments = [f"--onnx={onnx}", f"--saveEngine={engine}", "--stronglyTyped", "--skipInference", "--profilingVerbosity=detailed"]
    if plugin_library is not None:
        # With a slash, or the loader would look for it in its own folders only.
        arguments.append(f"--dynamicPlugins={plugin_library if plugin_library.is_absolute() else f'./{plugin_library}'}")
    if timing_cache is not None:
        arguments.append(f"--timingCacheFile={timing_cache}")
    for index, profile in enumerate(profiles):
        if len(profiles) > 1:
            arguments.append(f"--profile={index}")
        for which, name in enumerate(("minShapes", "optShapes", "maxShapes")):
            shapes = (f"{tensor}:{'x'.join(map(str, kinds[which]))}" for tensor, kinds in profile.items())
            arguments.append(f"--{name}=" + ",".join(shapes))
    return arguments


def trtexec_line(arguments: list[str], program: str = "trtexec") -> str:
    """One line for a shell."""
    return " ".join([program, *map(shlex.quote, arguments)])


def build_script(lines: Mapping[str, list[str]], description: str) -> str:
    """A shell script with one trtexec call for each part of the bundle, run from the script's own folder.

    The plugin library is the bundle's, or one that was compiled on the device and lies beside it as ``LOCAL_LIBRARY_NAME``.

    Args:
        lines: part to its arguments, paths relative to the script.
        description: what stands above the calls, as comment lines.
    """
    comment = "\n".join(f"# {line}".rstrip() for line in description.splitlines())
    program = '"$TRTEXEC"'
    calls = "\n".join(f"echo 'building {part}.engine'\n{trtexec_line(arguments, program)}" for part, arguments in lines.items())
    calls = calls.replace(f"--dynamicPlugins=./{LIBRARY_NAME}", '"--dynamicPlugins=$PLUGIN"')
    return f"""#!/bin/sh
{comment}
set -eu
cd "$(dirname "$0")"
TRTEXEC=${{TRTEXEC:-$(command -v trtexec || echo /usr/src/tensorrt/bin/trtexec)}}
PLUGIN=./{LIBRARY_NAME}
if [ -f {LOCAL_LIBRARY_NAME} ]; then PLUGIN=./{LOCAL_LIBRARY_NAME}; fi
{calls}
"""
