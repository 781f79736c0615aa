"""The command line: what it prints, its exit codes, and that the command an error names does what it says."""

from __future__ import annotations

import contextlib
import json
import os
import random
import runpy
import shutil
import sqlite3
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from support.helpers import HEAD_DIM, NEEDS_FLEX

from softcap_runtime import AttentionConfig, KernelNotPrewarmed, Runtime, RuntimeSettings
from softcap_runtime.cli import main as cli
from softcap_runtime.cli import tables as cli_tables
from softcap_runtime.cpu.library import CpuLibrary, library
from softcap_runtime.engines import flex_cpu
from softcap_runtime.engines.package import Package
from softcap_runtime.report import cache as cache_report
from softcap_runtime.store import Key, Store, fingerprint
from softcap_runtime.store import bundle as bundles
from softcap_runtime.store.schema import DBNAME

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = ["--num-heads", "4", "--num-kv-heads", "2", "--head-dim", str(HEAD_DIM), "--scale", "0.125"]
DTYPES = ["--dtype", "float32", "--dtype", "bfloat16"]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs one command line in this process: exit code, standard output, standard error."""
    for name in [name for name in os.environ if name.startswith("SOFTCAP_") and "_TEST_" not in name]:
        monkeypatch.delenv(name)

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.run([str(word) for word in words])
        return (code, *capsys.readouterr())

    return run


def fill(folder: Path) -> Store:
    """A cache of three entries that nobody will load: two kernels for here, one for another machine."""
    store = Store(folder, 2**30)
    for head_dim, dtype, here in ((64, "float32", True), (128, "float32", True), (256, "float16", False)):
        spec = Package("flex_forward", "cpu", dtype, head_dim, True)
        environment = fingerprint("cpu") if here else {**fingerprint("cpu"), "torch": "1.0"}
        store.load_or_build(Key(spec.key().fields, environment), lambda: os.urandom(1000))
    return store


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A line typed into a shell that finds this environment's programs."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SOFTCAP_")}
    return subprocess.run(
        line, shell=True, env={**clean, "PATH": path, **environment}, capture_output=True, text=True, check=False
    )


CALL = """
import sys, torch
from softcap_runtime import AttentionConfig, Runtime, RuntimeSettings, reference
folder, engine, softcap, length = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
q, k, v = (torch.randn(1, heads, length, 64) for heads in (4, 2, 2))
config = AttentionConfig(scale=0.125, softcap=softcap)
runtime = Runtime(RuntimeSettings(cache_dir=folder, engine=engine, jit="forbid"))
out = runtime.attention(q, k, v, config)
seen = torch.ones(length, length, dtype=torch.bool).tril()[None]
want = reference.attention(q.double(), k.double(), v.double(), seen, scale=0.125, softcap=softcap)[0]
assert (out - want).norm() < 1e-5 * want.norm()
assert runtime.stats().builds == 0
"""


def the_command_for(folder: Path, engine: str, softcap: float, length: int) -> str:
    """What a refused call says should be run."""
    runtime = Runtime(RuntimeSettings(cache_dir=folder, engine=engine, jit="forbid"))
    q, k = torch.randn(1, 4, length, HEAD_DIM), torch.randn(1, 2, length, HEAD_DIM)
    with pytest.raises(KernelNotPrewarmed) as caught:
        runtime.attention(q, k, k, AttentionConfig(scale=0.125, softcap=softcap))
    return str(caught.value).split("run: ", 1)[1]


@pytest.mark.slow
def test_the_command_that_an_error_names_builds_the_kernel(tmp_path: Path, seed: int) -> None:
    folder, softcap = tmp_path / "a cache", random.choice([20.0, 30.5, 50.0])
    length = random.randint(1, 300)
    arguments = [sys.executable, "-c", CALL, str(folder), "blocked", str(softcap), str(length)]
    done = shell(the_command_for(folder, "blocked", softcap, length))
    assert (done.returncode, done.stdout.count("built")) == (0, 1), done.stdout + done.stderr
    served = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert served.returncode == 0, served.stderr


def test_the_command_names_every_kernel_of_the_call(tmp_path: Path, warm_cache: Path, seed: int) -> None:
    """As above for the engine that picks itself, with the session's kernels in place of a compiler."""
    softcap, length = random.uniform(1, 60), random.randint(1, 2000)
    line = the_command_for(tmp_path / "empty", "auto", softcap, length)
    line = line.replace(str(tmp_path / "empty"), str(warm_cache))
    done = shell(line)
    assert (done.returncode, done.stdout.count("loaded")) == (0, 1), done.stdout + done.stderr


@NEEDS_FLEX
def test_prewarm_shows_each_kernel(command: Command, runtimes: dict[str, Runtime], warm_cache: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        runtimes["flex"].supply.get(Package("flex_forward", "cpu", dtype, HEAD_DIM, True))
    words = ["--cache-dir", warm_cache, "prewarm", *NUMBERS, "--softcap", "50", "--dtype", "float32"]
    code, out, _ = command(*words, "--train", "--seq-len", "100", "--seq-len", "2000")
    assert (code, out.count("attention"), out.count("loaded")) == (0, 1, 1)
    code, out, _ = command(*words, "--dtype", "bfloat16", "--engine", "flex")
    assert (code, out.count("flex_forward float32"), out.count("flex_forward bfloat16")) == (0, 1, 1)
    without_scale = [word for word in words if word not in NUMBERS[-2:]]
    code, out, _ = command(*without_scale, "--engine", "flex")
    assert (code, out.count("flex_forward float32")) == (0, 1)
    code, out, _ = command(*words, "--engine", "eager")
    assert (code, out.startswith("nothing to prewarm")) == (0, True)
    code, out, _ = command(*words, "--engine", "dense")
    assert (code, "compiled in each process" in out) == (0, True)


@pytest.fixture
def tiny_packages(monkeypatch: pytest.MonkeyPatch) -> list[Package | CpuLibrary]:
    """Builds make 1,000 bytes that nobody can run; the artifacts that were built."""
    built: list[Package | CpuLibrary] = []

    def build(spec: Package | CpuLibrary) -> bytes:
        built.append(spec)
        return os.urandom(1000)

    for artifact in (Package, CpuLibrary):
        monkeypatch.setattr(artifact, "build", build)
        monkeypatch.setattr(artifact, "load", lambda spec, data: object())
    return built


@NEEDS_FLEX
def test_prewarm_fails_when_its_kernels_evict_each_other(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_packages: list[Package | CpuLibrary]
) -> None:
    words = ["--cache-dir", tmp_path / "cache", "prewarm", "--preset", "gemma2-2b", "--engine", "flex", *DTYPES]
    monkeypatch.setenv("SOFTCAP_CACHE_SIZE_LIMIT", "1500")
    code, _, err = command(*words)
    count = len(tiny_packages)
    told = f"softcap-runtime: {count - 1} of {count} kernels did not stay in the cache: together they need "
    assert (code, err.splitlines()[-1]) == (
        1,
        f"{told}{count}000 bytes, SOFTCAP_CACHE_SIZE_LIMIT is 1500; raise it and prewarm again",
    )
    monkeypatch.setenv("SOFTCAP_CACHE_SIZE_LIMIT", f"{count}000")
    assert command(*words)[0] == 0
    assert command("--cache-dir", tmp_path / "cache", "verify")[1].startswith(f"{count} entries are good")


@pytest.mark.parametrize("other", ["clears", "has a smaller limit"])
def test_prewarm_fails_when_another_process_removes_its_kernels(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_packages: list[Package | CpuLibrary],
    other: str,
) -> None:
    folder = tmp_path / "cache"
    prewarm = Runtime.prewarm

    def then_removed(*arguments: Any, **options: Any) -> list[Any]:
        results = prewarm(*arguments, **options)
        if other == "clears":
            Store(folder, 2**20).clear()
        else:
            Store(folder, 1000).load_or_build(Key({"name": "other"}, {}), lambda: bytes(1000))
        return results

    monkeypatch.setattr(Runtime, "prewarm", then_removed)
    code, _, err = command("--cache-dir", folder, "prewarm", "--preset", "gemma2-2b")
    count = len(tiny_packages)
    told = "another process removed them: it cleared the cache, or its SOFTCAP_CACHE_SIZE_LIMIT is below"
    assert (code, err.splitlines()[-1]) == (
        1,
        f"softcap-runtime: {count} of {count} kernels did not stay in the cache: {told} {count}000; prewarm again",
    )


@NEEDS_FLEX
def test_prewarm_builds_nothing_for_a_read_only_folder(
    command: Command, tmp_path: Path, tmpfs: Callable[[str], Path], tiny_packages: list[Package | CpuLibrary]
) -> None:
    place = tmpfs("size=4m")
    what = ["prewarm", "--preset", "gemma2-2b"]
    assert command("--cache-dir", tmp_path / "other", *what)[0] == 0
    store = Store(place / "cache", 2**30)
    for spec in tiny_packages:
        store.load_or_build(spec.key(), lambda: b"a kernel")
    store.close()
    words = ["--cache-dir", place / "cache", *what]
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    tiny_packages.clear()
    assert command(*words)[0] == 0, "all of it is there"
    code, out, err = command(*words, "--engine", "flex", *DTYPES)
    assert (code, out, tiny_packages) == (1, "", [])
    told = f"softcap-runtime: 2 kernels are missing in {place / 'cache'}, which is read-only (flex_forward"
    assert err.startswith(told)
    assert err.count("\n") == 1


def test_prewarm_fails_when_a_build_does(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softcap_runtime.artifacts.build.find_compiler", lambda: None)
    words = ["--cache-dir", tmp_path / "cache", "prewarm", "--preset", "gemma2-2b", "--engine", "blocked"]
    code, out, _ = command(*words)
    assert (code, "failed" in out, "no C++ compiler found" in out) == (1, True, True)
    (tmp_path / "file").touch()
    code, out, err = command("--cache-dir", tmp_path / "file", *words[2:])
    assert (code, out) == (1, "")
    assert err.startswith("softcap-runtime: nothing could be kept: ")


def test_an_interruption_is_one_line(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Runtime, "prewarm", interrupted)
    done = command("--cache-dir", tmp_path, "prewarm", "--preset", "gemma2-2b")
    assert done == (130, "", "softcap-runtime: interrupted\n")


def test_inspect_shows_the_cache(command: Command, tmp_path: Path) -> None:
    store = fill(tmp_path / "cache")
    store.load(Package("flex_forward", "cpu", "float32", 1, True).key())
    store.close()
    code, out, err = command("--cache-dir", tmp_path / "cache", "inspect")
    assert (code, err) == (0, "")
    assert str(tmp_path / "cache") in out
    assert "trusted" in out
    assert out.count("flex_forward") == 3
    assert "no: torch" in out
    report = json.loads(command("--cache-dir", tmp_path / "cache", "inspect", "--json")[1])
    assert report["status"]["entries"] == len(report["entries"]) == 3
    assert report["status"]["counters"]["misses"] == 4
    by_dim = {entry["fields"]["head_dim"]: entry for entry in report["entries"]}
    assert [by_dim[dim]["fits"] for dim in (64, 128, 256)] == [True, True, False]
    assert by_dim[256]["differs"] == ["torch"]
    assert all(entry["bytes"] == 1000 for entry in report["entries"])


def test_inspect_hides_no_key_in_80_columns(tmp_path: Path) -> None:
    store = fill(tmp_path / "cache")
    store.load_or_build(
        Key({"op": "dq_kernel", "device": "cuda", "dtype": "bfloat16", "tensors": "*bf16 " * 9, "warps": 8}, {}),
        lambda: bytes(12_345_678),
    )
    out = Console(width=80, file=StringIO(), highlight=False)
    cli_tables.show_report(out, cache_report.report(store))
    shown = out.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert [line for line in shown.splitlines() if line != line.rstrip()] == []
    assert shown.startswith("4 kernels, 2 fit this environment; nothing is wrong\n")
    assert "counters      misses 4, builds 4\n" in shown
    rows = [line.split("│")[1].strip() for line in shown.splitlines() if line.count("│") == 7]
    words = " ".join(rows)
    for dtype, head_dim in (("float32", 64), ("float32", 128), ("float16", 256)):
        assert f"flex_forward {dtype} head_dim {head_dim} " in words
    assert "dq_kernel bfloat16 device=cuda" in words
    assert "warps=8" in words


def test_inspect_leads_with_what_is_wrong(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "a cache"
    fill(folder).close()
    (folder / DBNAME).chmod(0o622)
    code, out, _ = command("--cache-dir", folder, "inspect", "--counters")
    assert (code, out.splitlines()[0]) == (0, "0 kernels, 0 fit this environment; 1 problem:")
    assert "verdict       not trusted (owner " in out
    assert "evictions 0" in " ".join(out.split())
    assert command("--cache-dir", folder, "verify")[0] == 1  # inspect only reports
    shell(out.splitlines()[1].split("run: ")[1])
    assert command("--cache-dir", folder, "inspect")[1].startswith("3 kernels, 2 fit this environment; nothing is wr")


def test_a_quarantine_is_a_problem_until_it_was_looked_at(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "a cache"
    fill(folder).close()
    (folder / DBNAME).write_bytes(b"no database")
    code, out, _ = command("--cache-dir", folder, "inspect")
    assert (code, "1 problem:\n- in quarantine, as " in out) == (0, True)
    shell(out.splitlines()[1].split("run: ")[1])
    assert "nothing is wrong" in command("--cache-dir", folder, "inspect")[1]


def test_the_version_and_completion(command: Command) -> None:
    code, out, _ = command("--version")
    assert (code, out.startswith("softcap-runtime ")) == (0, True)
    assert f"torch {torch.__version__}" in out
    words = {"_SOFTCAP_RUNTIME_COMPLETE": "complete_bash", "COMP_WORDS": "softcap-runtime in", "COMP_CWORD": "1"}
    assert shell("softcap-runtime", **words).stdout.split() == ["inspect"]


@pytest.mark.parametrize(
    ("fields", "present", "differs"),
    [
        (["head_dim=64"], True, []),
        (["head_dim=64", "dtype=float32", "op=flex_forward", "capped=true"], True, []),
        (["head_dim=128", "dtype=bfloat16"], False, ["dtype"]),
        (["head_dim=128", "capped=false", "dtype=float16"], False, ["capped", "dtype"]),
        (["head_dim=256"], False, ["fingerprint.torch"]),
    ],
)
def test_inspect_explains(
    command: Command, tmp_path: Path, fields: list[str], present: bool, differs: list[str]
) -> None:
    fill(tmp_path / "cache").close()
    code, out, _ = command("--cache-dir", tmp_path / "cache", "inspect", "--explain", "--json", *fields)
    answer = json.loads(out)
    assert (code, answer["present"]) == (0, present)
    assert [f"{name}={answer['fields'][name]}".lower() for name in (word.split("=")[0] for word in fields)] == fields
    assert [one["field"] for one in answer["differences"]] == differs
    out = command("--cache-dir", tmp_path / "cache", "inspect", "--explain", *fields)[1]
    assert out.startswith("present: flex_forward " if present else "absent: flex_forward ")
    assert all(name in out for name in differs)


def test_a_bad_entry_is_explained_and_stays(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "cache").close()
    words = ["--cache-dir", tmp_path / "cache", "inspect", "--explain", "head_dim=64"]
    (tmp_path / "secret").write_bytes(b"a secret")
    monkeypatch.setenv("SOFTCAP_CACHE_KEY_FILE", str(tmp_path / "secret"))
    code, out, _ = command(*words)
    assert (code, out.startswith("absent: ")) == (0, True)
    assert "its HMAC is missing or made with another key" in out
    monkeypatch.delenv("SOFTCAP_CACHE_KEY_FILE")
    assert command(*words)[0] == 0
    with contextlib.closing(sqlite3.connect(tmp_path / "cache" / DBNAME)) as connection:
        connection.execute("UPDATE Cache SET value = x'00' WHERE key != 'counters'")
        connection.commit()
    for _ in range(2):
        code, out, _ = command(*words)
        assert (code, "its checksum does not match its bytes" in " ".join(out.split())) == (0, True)


def test_the_ops_that_can_be_explained_are_those_that_are_compiled() -> None:
    assert set(cache_report.OPS) == {library().describe().op, flex_cpu.FORWARD}


def test_explaining_the_library_that_depends_on_no_head_dim(command: Command, tmp_path: Path) -> None:
    store = fill(tmp_path)
    explain = ["--cache-dir", tmp_path, "inspect", "--explain"]
    assert command(*explain, "op=attention")[1].startswith("absent: attention ")
    store.load_or_build(library().key(), lambda: b"kernel")
    store.close()
    assert command(*explain, "op=attention", "head_dim=77", "dtype=float16")[1].startswith("present: attention ")
    assert "head_dim: wanted 77" in command(*explain, "head_dim=77")[1]
    store = Store(tmp_path / "alone", 2**30)
    store.load_or_build(library().key(), lambda: b"kernel")
    store.close()
    alone = command("--cache-dir", tmp_path / "alone", "inspect", "--explain", "head_dim=77")[1]
    assert alone.startswith("present: attention ")
    (tmp_path / "empty").mkdir(mode=0o700)
    assert "the cache is empty" in command("--cache-dir", tmp_path / "empty", "inspect", "--explain", "head_dim=1")[1]


def test_verify_finds_and_repairs(command: Command, tmp_path: Path, seed: int) -> None:
    store = fill(tmp_path)
    payload = store.load(Package("flex_forward", "cpu", "float32", 64, True).key())
    store.close()
    words = ["--cache-dir", tmp_path, "verify"]
    assert command(*words)[:2] == (0, f"3 entries are good in {tmp_path}\n")
    database = bytearray((tmp_path / DBNAME).read_bytes())
    assert payload is not None
    database[database.index(payload) + random.randrange(len(payload))] ^= 1 << random.randrange(8)
    (tmp_path / DBNAME).write_bytes(database)
    code, out, _ = command(*words)
    assert (code, "checksum" in out) == (1, True)
    code, out, _ = command(*words, "--repair")
    assert (code, "in quarantine" in out) == (1, True)
    assert command(*words)[0] == 0
    assert "2 entries" in command("--cache-dir", tmp_path, "inspect")[1]


def test_a_secret_that_is_open_to_others_is_told(command: Command, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"a secret")
    secret.chmod(0o640)
    told = shell(f"softcap-runtime --cache-dir {tmp_path}/cache inspect", SOFTCAP_CACHE_KEY_FILE=str(secret))
    line = f"cache_key_file: {secret} is open to others (mode 0640); run: chmod 600 {secret}\n"
    assert (told.returncode, told.stderr) == (0, line)


def test_bundles_travel_and_tampered_ones_do_not(command: Command, tmp_path: Path, seed: int) -> None:
    fill(tmp_path / "one").close()
    bundle, one, two = (tmp_path / "bundle", ["--cache-dir", tmp_path / "one"], ["--cache-dir", tmp_path / "two"])
    assert command(*two, "export", bundle)[0] == 1, "there is nothing in it"
    assert command(*one, "export", bundle)[:2] == (0, f"exported 2 entries to {bundle}\n")
    assert command(*two, "import", bundle)[:2] == (0, "imported 2 entries, 0 were present, 0 refused\n")
    assert command(*two, "import", bundle)[:2] == (0, "imported 0 entries, 2 were present, 0 refused\n")
    data = bytearray(bundle.read_bytes())
    data[random.randrange(len(data))] ^= 1
    bundle.write_bytes(data)
    code, _, err = command("--cache-dir", tmp_path / "three", "import", bundle)
    assert (code, err.count("\n")) == (1, 1)
    code, _, err = command(*two, "import", tmp_path / "none")
    assert code == 1
    assert f"bundle {tmp_path / 'none'} cannot be read: No such file" in err

    assert command(*one, "export", bundle)[0] == 0
    (tmp_path / "file").touch()
    code, _, err = command("--cache-dir", tmp_path / "file", "import", bundle)
    told = f"could not be written: cache folder {tmp_path / 'file'} is a file, expected a folder; remove it or set"
    assert (code, err) == (1, f"softcap-runtime: 2 entries: {told} another SOFTCAP_CACHE_DIR\n")

    bundles.export(Store(tmp_path / "one", 2**30), bundle)  # with the entry of another machine
    code, out, err = command("--cache-dir", tmp_path / "four", "import", bundle)
    assert (code, out) == (1, "imported 2 entries, 0 were present, 1 refused\n")
    assert "torch: bundle has '1.0'" in err


def test_an_export_names_what_is_damaged(command: Command, tmp_path: Path) -> None:
    fill(tmp_path / "cache").close()
    words = ["--cache-dir", tmp_path / "cache", "export", tmp_path / "bundle"]
    with contextlib.closing(sqlite3.connect(tmp_path / "cache" / DBNAME)) as connection:
        connection.execute("UPDATE Cache SET value = x'00' WHERE key != 'counters'")
        connection.commit()
    code, out, err = command(*words)
    assert (code, out, err.count("its checksum does not match its bytes")) == (1, "", 2)
    assert err.splitlines()[-1].startswith("softcap-runtime: nothing was exported: 2 entries are damaged; run ")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("inspect", 0),
        ("inspect --json", 0),
        ("inspect --explain head_dim=64", 0),
        ("verify", 1),
        ("verify --repair", 1),
        ("export file", 1),
        ("clear", 0),
    ],
)
def test_who_only_looks_makes_nothing(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, code: int
) -> None:
    monkeypatch.chdir(tmp_path)
    got, out, err = command("--cache-dir", tmp_path / "typing" / "error", *line.split())
    assert (got, list(tmp_path.iterdir())) == (code, [])
    assert "does not exist" in " ".join((out + err).split())
    assert line.startswith("inspect") or (out + err).count("\n") == 1
    (tmp_path / "empty").mkdir(mode=0o700)
    command("--cache-dir", tmp_path / "empty", *line.split())
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_read_only_cache_is_not_cleared(command: Command, tmpfs: Callable[[str], Path]) -> None:
    place = tmpfs("size=4m")
    fill(place / "cache").close()
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    code, out, err = command("--cache-dir", place / "cache", "clear")
    assert (code, out, err) == (1, "", f"softcap-runtime: not cleared: {place / 'cache'} is read-only\n")


def test_clear_empties_the_cache(command: Command, tmp_path: Path) -> None:
    fill(tmp_path / "cache").close()
    code, out, _ = command("--cache-dir", tmp_path / "cache", "clear")
    assert (code, out) == (0, f"removed 3 entries from {tmp_path / 'cache'}\n")
    assert json.loads(command("--cache-dir", tmp_path / "cache", "inspect", "--json")[1])["entries"] == []
    (tmp_path / "file").touch()
    assert command("--cache-dir", tmp_path / "file", "clear")[0] == 1
    code, out, _ = command("--cache-dir", tmp_path / "file", "inspect")
    assert (code, "is a file, expected a folder" in " ".join(out.split())) == (0, True)


def test_masks_are_drawn(command: Command, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "mask.png"
    code, out, _ = command("mask", "--seq-len", 512, "--window", 128, "--documents", "100,250,162", "--png", picture)
    assert (code, "512 queries x 512 keys" in out, "56% of 16 blocks skipped" in out) == (0, True, True)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert out.endswith(f"\npicture in {picture}\n")
    plain, prefix = (command("mask", "--seq-len", 300)[1], command("mask", "--seq-len", 300, "--prefix", 299)[1])
    assert "skipped" in plain
    assert plain != prefix


def printed(monkeypatch: pytest.MonkeyPatch, encoding: str, *words: object) -> str:
    """What a command line that succeeds prints to a stream of this encoding."""
    stream = TextIOWrapper(BytesIO(), encoding)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(cli, "_interrupted_by", lambda *signals: [])
        patch.setattr("gc.disable", lambda: None)  # this process goes on
        with pytest.raises(SystemExit) as ended:
            cli.main([str(word) for word in words])
    assert ended.value.code == 0
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("encoding", "full"), [("iso-8859-1", "##"), ("utf-8", "██")])
def test_masks_are_drawn_with_what_the_terminal_can_show(
    monkeypatch: pytest.MonkeyPatch, encoding: str, full: str
) -> None:
    assert f"{full} full block" in printed(monkeypatch, encoding, "mask", "--seq-len", 512)


def test_a_folder_whose_name_the_output_cannot_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was done is done, and JSON stays JSON; not even UTF-8 has the name's last byte."""
    folder = tmp_path / os.fsdecode("caf\xe9 \u732b ".encode() + b"\xff")
    fill(folder)

    words = ["--cache-dir", folder]
    document = json.loads(printed(monkeypatch, "ascii", *words, "inspect", "--json"))
    assert document["status"]["folder"].endswith("caf\xe9 \u732b \ufffd")
    printed(monkeypatch, "ascii", *words, "inspect")
    assert "removed 3 entries" in printed(monkeypatch, "utf-8", *words, "clear")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "Missing command"),
        ("--nonsense", "--nonsense"),
        ("unknown", "unknown"),
        ("prewarm", "pass one of --preset"),
        ("prewarm --preset gemma2-2b --model x", "pass one of --preset"),
        ("prewarm --preset gemma2-2b --head-dim 3", "pass one of --preset"),
        ("prewarm --preset gemma9", "'gemma9', expected gemma2-2b"),
        ("prewarm --num-heads 4", "missing --num-kv-heads, --head-dim"),
        ("prewarm --num-heads 4 --num-kv-heads 2 --head-dim 0", "head_dim"),
        ("prewarm --num-heads 4 --num-kv-heads 2 --head-dim 8 --window 0", "window"),
        ("prewarm --num-heads four", "--num-heads"),
        ("prewarm --num-heads 4 --num-kv-heads 3 --head-dim 8 --scale 1", "num_kv_heads: expected a divisor of"),
        ("prewarm --num-heads 4 --num-kv-heads 2 --head-dim 8 --scale nan", "scale"),
        ("prewarm --preset gemma2-2b --softcap 0", "pass one of"),
        ("prewarm --preset gemma2-2b --dtype int8", "dtype"),
        ("prewarm --preset gemma2-2b --seq-len 0", "seq_lens"),
        ("prewarm --preset gemma2-2b --seq-len 1000000000000", "less than or equal to 16777216"),
        ("prewarm --preset gemma2-2b --device cuda:99", "this process sees"),
        ("prewarm --preset gemma2-2b --device abacus", "'abacus', expected a torch device"),
        ("prewarm --preset gemma2-2b --engine warp", "engine"),
        ("prewarm --preset gemma2-2b --engine flex --train", "no backward"),
        ("prewarm --model /nonexistent", "does not exist"),
        ("inspect --cache-dir x", "it stands before the command"),
        ("inspect head_dim=3", "go with --explain"),
        ("inspect --explain width=3", "'width=3', expected field=value"),
        ("inspect --explain head_dim=x", "head_dim='x', expected an integer"),
        ("inspect --explain capped=2", "capped='2', expected true or false"),
        ("inspect --explain op=foo", "op='foo', expected attention, flex_forward"),
        ("inspect --explain dtype=FLOAT32", "dtype='FLOAT32', expected float32, bfloat16 or float16"),
        ("inspect --explain mask=band", "'mask=band', expected field=value with op, device, dtype, head_dim, capped"),
        ("inspect --explain dtype=foo", "dtype='foo', expected float32, bfloat16 or float16"),
        ("inspect --explain device=cuda", "device='cuda', expected cpu; inspect lists the kernels of a GPU"),
        ("export", "Missing argument"),
        ("export file --device moon", "'moon', expected a torch device"),
        ("mask", "--seq-len"),
        ("mask --seq-len 0", "--seq-len"),
        ("mask --seq-len 100000000", "--seq-len"),
        ("mask --seq-len 10 --window 0", "--window"),
        ("mask --seq-len 10 --documents 3,4", "hold 7 tokens, expected --seq-len 10"),
        ("mask --seq-len 10 --documents 1,99999999999999999999", "hold 100000000000000000000 tokens"),
        ("mask --seq-len 10 --documents 3,x", "'3,x', expected lengths"),
        ("mask --seq-len 10 --prefix 11", "prefix_lengths: 11"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(command: Command, tmp_path: Path, line: str, words: str) -> None:
    code, out, err = command("--cache-dir", tmp_path / "cache", *line.split())
    assert (code, out) == (2, ""), err
    assert err.startswith("softcap-runtime: ")
    assert err.count("\n") == 1
    assert words in err
    assert not (tmp_path / "cache").exists(), "a mistake leaves nothing behind"


def test_a_user_without_a_home(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(*arguments: object, **options: object) -> str:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("platformdirs.user_cache_dir", no_home)
    monkeypatch.setattr("softcap_runtime.config.__file__", str(tmp_path / "softcap_runtime" / "config.py"))
    code, out, err = command("inspect")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.endswith("; set SOFTCAP_CACHE_DIR\n")


def test_an_empty_cache_dir_is_not_the_current_folder(command: Command) -> None:
    code, out, err = command("--cache-dir", "", "inspect")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "cache_dir: expected a path, not an empty one" in err


def test_bad_settings_are_bad_usage(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTCAP_CACHE_SIZE_LIMIT", "-3")
    code, out, err = command("inspect")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "environment variable SOFTCAP_CACHE_SIZE_LIMIT" in err


def test_a_reader_that_has_seen_enough(tmp_path: Path) -> None:
    fill(tmp_path).close()
    done = shell("softcap-runtime inspect | head -n 1", SOFTCAP_CACHE_DIR=str(tmp_path))
    assert (done.stdout[:9], "Traceback" in done.stderr) == ("3 kernels", False)


@pytest.mark.parametrize(("script", "name"), [("prewarm", "prewarm"), ("inspect_cache", "inspect")])
def test_a_script_runs_the_package_beside_it_installed_or_not(tmp_path: Path, script: str, name: str) -> None:
    for folder in ("scripts", "softcap_runtime/cli"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / f"scripts/{script}.py", tmp_path / "scripts")
    for folder in ("softcap_runtime", "softcap_runtime/cli"):
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "softcap_runtime/cli/main.py").write_text("def main(words): print('beside it', *words)\n")
    done = shell(f"'{sys.executable}' '{tmp_path}/scripts/{script}.py' --json")
    assert done.stdout == f"beside it {name} --json\n", done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("masks --png FOLDER/a.png", "--png: plots forward and train, expected"),
        ("train --png FOLDER/none/a.png", "/none/a.png', expected a file in a folder that is there"),
        ("masks --json FOLDER", "', expected a file in a folder that is there"),
    ],
)
def test_a_benchmark_that_could_not_be_written_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    script = ROOT / "scripts/benchmark.py"
    monkeypatch.setattr(sys, "argv", [str(script), *words.replace("FOLDER", str(tmp_path)).split()])
    monkeypatch.syspath_prepend(script.parent)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert said in err.splitlines()[-1]
