"""Builders and their compilers end with the work that wants them: by signal, by exit, by SIGKILL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from support.helpers import NEEDS_FLEX

from softcap_runtime.artifacts import build, children

pytestmark = pytest.mark.slow

PREWARM = """
from softcap_runtime.cli.main import main
main("prewarm --preset gemma2-2b --dtype float32 --dtype bfloat16".split())
"""
# A process that is no command line: Ctrl-C in it, its handlers its own.
LIBRARY = """
import signal
from softcap_runtime import Runtime
from softcap_runtime.presets import requests_for
handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
try:
    Runtime.get().prewarm(requests_for("gemma2-2b"), progress=False)
except KeyboardInterrupt:
    assert handlers == [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    raise SystemExit(3)
"""
# Builds behind a call that eager serves, and the process ends before they do.
BACKGROUND = """
import pathlib, sys, time, torch
from softcap_runtime import AttentionConfig, Runtime
q = torch.randn(1, 2, 8, 64)
Runtime.get().attention(q, q, q, AttentionConfig(scale=0.125, softcap=50.0))
while not pathlib.Path(sys.argv[1] + ".seen").exists():
    time.sleep(0.05)
"""


def wait_until(true: Callable[[], bool]) -> None:
    for _ in range(1200):
        if true():
            return
        time.sleep(0.1)
    raise AssertionError("it never came true")


class Started:
    """A process that builds with a compiler which never ends."""

    def __init__(self, folder: Path, code: str, **settings: str) -> None:
        self.pids, self.temporary = folder / "pids", folder / "tmp"
        self.temporary.mkdir()
        compiler = folder / "c++"
        compiler.write_text(f"#!/bin/sh\necho $$ >>{self.pids}\nsleep 600\n")
        compiler.chmod(0o755)
        environment = {
            **os.environ,
            "CXX": str(compiler),
            "TMPDIR": str(self.temporary),
            "SOFTCAP_CACHE_DIR": str(folder / "cache"),
            "SOFTCAP_ENGINE": "blocked",
            **settings,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(self.pids)],
            env=environment,
            # Jobs that a shell runs in the background ignore Ctrl-C, and hand that down.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def family(self, compilers: int) -> list[psutil.Process]:
        """Everything that runs below the process, once it runs this many compilers."""
        wait_until(lambda: self.pids.exists() and len(self.pids.read_text().split()) >= compilers)
        assert list(self.temporary.glob(f"{build.BUILD_FOLDER}*"))
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.pids.with_name("pids.seen").touch()
        return family

    def assert_gone(self, family: list[psutil.Process]) -> None:
        """None of ``family`` runs; nothing of theirs is left."""
        assert psutil.wait_procs(family, timeout=30)[1] == []
        wait_until(lambda: not list(self.temporary.iterdir()))


@pytest.mark.parametrize(
    ("number", "code", "engine", "compilers"),
    [
        (signal.SIGTERM, 143, "blocked", 1),
        pytest.param(signal.SIGINT, 130, "flex", 2, marks=NEEDS_FLEX),  # two at once, each below a builder
    ],
)
def test_a_signal_ends_prewarm_with_its_compilers(
    tmp_path: Path, number: signal.Signals, code: int, engine: str, compilers: int
) -> None:
    started = Started(tmp_path, PREWARM, SOFTCAP_ENGINE=engine)
    family = started.family(compilers)
    assert len(family) >= 2 * compilers
    started.process.send_signal(number)
    _, err = started.process.communicate(timeout=60)
    assert started.process.returncode == code
    assert err.splitlines()[-1] == "softcap-runtime: interrupted"
    assert "Traceback" not in err
    assert list(started.temporary.iterdir()) == [], "gone before the process is"
    started.assert_gone(family)


def test_an_interrupted_prewarm_of_another_program(tmp_path: Path) -> None:
    started = Started(tmp_path, LIBRARY)
    family = started.family(compilers=1)
    started.process.send_signal(signal.SIGINT)
    assert started.process.communicate(timeout=60) == ("", "")
    assert started.process.returncode == 3
    started.assert_gone(family)


def test_builds_in_the_background_end_with_their_process(tmp_path: Path) -> None:
    started = Started(tmp_path, BACKGROUND, SOFTCAP_BUILD="background")
    family = started.family(compilers=1)
    assert started.process.communicate(timeout=60) == ("", "")
    assert started.process.returncode == 0
    started.assert_gone(family)


def test_builders_end_when_their_process_is_killed(tmp_path: Path) -> None:
    started = Started(tmp_path, PREWARM)
    family = started.family(compilers=1)
    started.process.kill()
    started.process.communicate(timeout=60)
    started.assert_gone(family)


def test_builders_end_though_a_child_of_fork_outlives_their_process(tmp_path: Path) -> None:
    """As workers do of a data loader whose process runs out of memory."""
    code = (
        "import os, pathlib, sys, threading, time\n"
        "from softcap_runtime.artifacts import children\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "builder = ['sh', '-c', 'touch runs; cat; touch ended']\n"
        "run = lambda: children.current().run(builder, os.environ, folder, 600)\n"
        "threading.Thread(target=run).start()\n"
        "while not (folder / 'runs').exists(): time.sleep(0.01)\n"
        "worker = os.fork()\n"
        "if worker: print(worker, flush=True)\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    worker = psutil.Process(int(process.stdout.readline()))
    try:
        process.kill()
        process.wait()
        for _ in range(200):
            if (tmp_path / "ended").exists():
                break
            time.sleep(0.1)
        assert (tmp_path / "ended").exists()
        assert worker.is_running()
    finally:
        worker.kill()
        process.stdout.close()


def test_a_child_of_fork_leaves_its_parents_builders_alone(tmp_path: Path) -> None:
    """And work that was stopped starts no other child."""
    code = (
        "import os, pathlib, subprocess, sys, threading, time\n"
        "from softcap_runtime.artifacts import children\n"
        "own = children.Children()\n"
        "run = lambda: print(own.run(['sleep', '1'], os.environ, pathlib.Path(sys.argv[1]), 60))\n"
        "thread = threading.Thread(target=run)\n"
        "thread.start()\n"
        "while not own._live: time.sleep(0.01)\n"
        "if os.fork() == 0: sys.exit()\n"
        "os.wait()\n"
        "thread.join()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("(0, '')\n", "")
    stopped = children.Children()
    stopped.stop()
    with pytest.raises(children.Stopped):
        stopped.run(["true"], os.environ, tmp_path, 60)
