"""Ten minutes of mixed traffic against a server on this machine: does it stay right, and does it stay small?

    python -m benchmarks.serve.soak BUNDLE [--seconds 600] [--clients 24] [--output FILE]

Starts ``ecmfq-export serve BUNDLE`` on a free loopback port with an API key, sends requests of which 5% are broken (see traffic.py),
compares every answer with what the model says without a server, and reads the process's memory, threads and open files each second.
Ends by itself after ``--seconds`` or ``--requests``, whichever is first. Exit code 1: a wrong answer, an unexpected status, a crash,
growing memory, threads or files that stay.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.serve.traffic import Traffic, keep_sending, make_asks
from ecmfq_export.workflow import open_generator

ROOT = Path(__file__).resolve().parents[2]
MAX_GROWTH = 0.05
"""Of resident memory from the end of the first third to the last minute."""


def read_process(pid: int) -> dict[str, float]:
    """Resident memory in MB, threads, and open files of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {"rss_mb": round(int(status["VmRSS"].split()[0]) / 1024, 1), "threads": int(status["Threads"]),
            "files": len(os.listdir(f"/proc/{pid}/fd"))}


def cpu_name() -> str:
    """The processor's name as the kernel tells it."""
    match = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match[1] if match else platform.machine()


def main() -> int:
    """Run it; prints and returns as the module's text says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--requests", type=int, default=200_000, help="at most so many")
    parser.add_argument("--clients", type=int, default=24, help="requests at a time; more than the queue holds, so that some get 429")
    parser.add_argument("--queue", type=int, default=16)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    if args.seconds > 3600:
        parser.error("an hour at most")
    asks = make_asks(open_generator(args.bundle, threads=1), 24)
    with tempfile.TemporaryDirectory() as folder:
        key = Path(folder, "key")
        key.write_text("soak-key\n")
        command = [sys.executable, "-m", "ecmfq_export.cli", "serve", str(args.bundle), "--port", "0", "--queue", str(args.queue),
                   "--api-key-file", str(key), "--model-name", "soak", "--threads", "1"]  # fmt: skip
        log = Path(folder, "log")
        with log.open("w") as stream:
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stream, text=True)
        try:
            line = process.stdout.readline()
            url = re.search(r"http://127\.0\.0\.1:\d+", line)
            if url is None:
                raise RuntimeError(f"the server did not start: {line}{log.read_text()}")
            figures = asyncio.run(soak(url[0], process.pid, asks, args))
            figures["crashed"] = process.poll() is not None
            figures |= stop(process)
        finally:
            process.kill()
        figures["errors_in_log"] = [line for line in log.read_text().splitlines() if " ERROR " in line or "Traceback" in line][:20]
    figures["failures"] += verdict(figures)
    text = json.dumps(figures, indent=1)
    if args.output:
        args.output.write_text(text + "\n")
    print(text if len(text) < 8000 else json.dumps({key: value for key, value in figures.items() if key != "samples"}, indent=1))
    return 1 if figures["failures"] else 0


def stop(process: subprocess.Popen, seconds: float = 120.0) -> dict[str, float | None]:
    """Ask the server to stop; its exit code, None where it does not within `seconds`, and how long it took."""
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        code = None
    return {"exit_code": code, "seconds_to_stop": round(time.monotonic() - start, 1)}


async def soak(url: str, pid: int, asks: list, args: argparse.Namespace) -> dict:
    """Send, watch, and let the server come to rest; the figures."""
    traffic = Traffic(url, "soak", asks, key="soak-key", wait=0.2)
    samples, start = [], time.monotonic()

    def sample() -> None:
        samples.append({"second": round(time.monotonic() - start, 1), **read_process(pid)})
        if len(samples) % 30 == 1:
            print(samples[-1], dict(traffic.tally.outcomes), f"429: {traffic.tally.refused}", file=sys.stderr)

    before = read_process(pid)
    try:
        sent, stopped = await keep_sending(traffic, args.clients, args.seconds, args.requests, sample)
    finally:
        await traffic.close()
    busy = time.monotonic() - start
    await asyncio.sleep(8)  # idle connections are closed after five
    seconds = sorted(traffic.tally.seconds)
    return {
        "date": datetime.date.today().isoformat(), "cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version(),
        "seconds": round(busy - stopped, 1), "seconds_stopped": round(stopped, 1), "requests": sent,
        "clients": args.clients, "queue": args.queue,
        "outcomes": dict(sorted(traffic.tally.outcomes.items())), "answered_429_and_sent_again": traffic.tally.refused,
        "sent_again_as_their_connection_broke": traffic.tally.reconnected, "good_answers_compared": len(seconds),
        "seconds_to_answer": {"median": round(statistics.median(seconds), 3), "p95": round(seconds[int(0.95 * len(seconds))], 3),
                              "largest": round(seconds[-1], 3)},
        "at_start": before, "at_rest": read_process(pid), "samples": samples[:: max(1, len(samples) // 120)],
        "failures": traffic.tally.wrong[:20],
    }  # fmt: skip


def verdict(figures: dict) -> list[str]:
    """What is wrong with the figures."""
    wrong = []
    rss = np.array([sample["rss_mb"] for sample in figures["samples"]])
    third = len(rss) // 3
    settled, last = float(np.median(rss[third : third + max(1, third // 3)])), float(np.median(rss[-max(1, len(rss) // 10):]))
    figures["rss_mb_settled"], figures["rss_mb_end"] = settled, last
    minutes = np.array([sample["second"] for sample in figures["samples"]])[third:] / 60
    figures["rss_mb_per_minute_after_first_third"] = round(float(np.polyfit(minutes, rss[third:], 1)[0]), 3) if len(minutes) > 2 else None
    if last > settled * (1 + MAX_GROWTH):
        wrong.append(f"resident memory grew from {settled} to {last} MB")
    for what, spare in (("threads", 1), ("files", 0)):  # the thread that prepares requests starts with the first of them
        if figures["at_rest"][what] > figures["at_start"][what] + spare:
            wrong.append(f"{what}: {figures['at_start'][what]} at the start, {figures['at_rest'][what]} at rest")
    if figures["crashed"] or figures["exit_code"] != 0 or figures["errors_in_log"]:
        wrong.append(f"crashed: {figures['crashed']}, exit code {figures['exit_code']}, log: {figures['errors_in_log']}")
    if not figures["answered_429_and_sent_again"]:
        wrong.append("the queue was never full")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
