"""Damaged manifests, files and settings of a bundle: refused by our own errors, whether or not the hashes were made to fit."""

from __future__ import annotations

import io
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from ecmfq_export import bundle
from ecmfq_export.describe import describe
from ecmfq_export.describe_tables import print_description
from ecmfq_export.engine.bundle_engines import onnx_facts
from ecmfq_export.engine.graph_file import load_graph
from ecmfq_export.errors import UserError
from ecmfq_export.json_file import MAX_BYTES
from ecmfq_export.runtime.decoder_session import DecoderSession
from ecmfq_export.runtime.generate import Generator
from ecmfq_export.runtime.processor import Processor
from ecmfq_export.runtime.runtime_file import verify_export
from tests.fuzz.mutations import mutate_bytes, mutate_json
from tests.fuzz.sandbox import outcome
from tests.fuzz.subject import SEEDS, Subject, run_cases

MANIFESTS = ("manifest.json", "onnx/manifest.json")


@pytest.mark.parametrize("seed", SEEDS["manifests"])
def test_manifests(seed: int, subject: Subject) -> None:
    """What `inspect --verify` and `build` read of a manifest."""

    def mutate(draw: random.Random) -> tuple[str, bytes, str]:
        name = draw.choice(MANIFESTS)
        data, done = mutate_json(draw, json.loads(subject.bytes_of(name)))
        return name, data, done

    def read() -> None:
        stream = io.StringIO()
        console = Console(file=stream, width=120)
        for directory in (subject.root, subject.root / "onnx"):
            facts = describe(directory, verify=True)
            json.dumps(facts)
            print_description(facts, console)
        onnx_facts(bundle.open_stage(subject.root / "onnx", "onnx"), subject.root / "onnx")
        stream.getvalue().encode()

    assert len(run_cases(subject, seed, mutate, read, rehash=False)) > 50


@pytest.mark.parametrize("seed", SEEDS["changed files are not opened"])
def test_changed_files_are_not_opened(seed: int, subject: Subject) -> None:
    """Any byte of any file; the hash alone must tell."""
    names = sorted(bundle.read_manifest(subject.root / "onnx").files)

    def mutate(draw: random.Random) -> tuple[str, bytes, str]:
        name = "onnx/" + draw.choice(names)
        return name, *mutate_bytes(draw, subject.bytes_of(name))

    run_cases(subject, seed, mutate, lambda: verify_export(subject.root / "onnx"), rehash=False, may_pass=False)


@pytest.fixture(scope="module")
def opened(subject: Subject):
    from ecmfq_export.engine.ort_runner import OrtRunner

    runners = {part: OrtRunner(subject.root / "onnx" / part / name, threads=1)
               for part, name in (("decoder", "model.ref.onnx"), ("vision", "model.onnx"))}  # fmt: skip
    return lambda path: runners[path.parent.name]


@pytest.mark.parametrize("seed", SEEDS["runtime json"])
def test_runtime_json(seed: int, subject: Subject, opened) -> None:
    """Hashes made to fit: what is taken still answers a prompt, or says why not."""
    sample = Processor(subject.root / "onnx").sample("hi")

    def mutate(draw: random.Random) -> tuple[str, bytes, str]:
        return "onnx/runtime.json", *mutate_json(draw, json.loads(subject.bytes_of("onnx/runtime.json")))

    def read() -> None:
        verify_export(subject.root / "onnx")
        session = DecoderSession(subject.root / "onnx", opened)
        session.prefill([sample])

    assert len(run_cases(subject, seed, mutate, read, rehash=True)) > 50


@pytest.mark.parametrize("seed", SEEDS["processor files"])
def test_processor_files(seed: int, subject: Subject, opened) -> None:
    """Hashes made to fit: tokenizer, template and image settings."""
    names = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json")

    def mutate(draw: random.Random) -> tuple[str, bytes, str]:
        name = "onnx/" + draw.choice(names)
        return name, *mutate_json(draw, json.loads(subject.bytes_of(name)))

    def read() -> None:
        verify_export(subject.root / "onnx")
        generator = Generator.over(DecoderSession(subject.root / "onnx", opened), Processor(subject.root / "onnx"))
        generator.processor.sample("hi", [np.zeros((9, 20, 3), np.uint8)])

    assert len(run_cases(subject, seed, mutate, read, rehash=True)) > 10


@pytest.mark.parametrize("name", ["onnx/runtime.json", "onnx/decoder/weights.data", "onnx/decoder/model.onnx", "onnx/manifest.json"])
@pytest.mark.parametrize("kind", ["link outside", "pipe", "directory", "link to itself", "missing", "sparse"])
def test_things_that_are_no_files(name: str, kind: str, subject: Subject) -> None:
    """Not the bytes but the directory entry is hostile; nothing is followed, waited for, or read without end."""
    path, secret = subject.root / name, subject.root.parent / "outside.bin"
    with subject.changed(name, subject.bytes_of(name)):
        path.unlink()
        if kind == "link outside":
            path.symlink_to(secret)
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "directory":
            path.mkdir()
        elif kind == "link to itself":
            path.symlink_to(path)
        elif kind == "sparse":
            with path.open("wb") as stream:
                stream.truncate(MAX_BYTES + 1)
        try:
            error = outcome(subject.root, lambda: describe(subject.root, verify=True))
            if name.endswith(".onnx") and kind != "link outside":  # a path that a user gives may be a link
                assert isinstance(outcome(subject.root, lambda: load_graph(path)), UserError)
        finally:
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    assert error is not None


def test_a_file_that_nobody_vouched_for(subject: Subject) -> None:
    extra: Path = subject.root / "onnx" / "added_tokens.json"
    extra.write_text("{}")
    try:
        error = outcome(subject.root, lambda: verify_export(subject.root / "onnx"))
    finally:
        extra.unlink()
    assert error is not None and "added_tokens.json" in str(error)
