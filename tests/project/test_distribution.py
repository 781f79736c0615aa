"""The wheel and the source distribution: installed into a fresh environment, nothing of the checkout is needed."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WANTED = (
    "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md",
    "constraints.txt", "mkdocs.yml", "softcap_runtime", "docs", "scripts", "tests", "cache",
)  # fmt: skip
# A kernel is found by the packaged sources, or built from them, and compared with the specification.
SMOKE = """
import sys, torch, softcap_runtime
from importlib.metadata import metadata
from softcap_runtime import AttentionConfig, Runtime
from softcap_runtime.reference import attention, visible
assert softcap_runtime.__file__.startswith(sys.prefix), softcap_runtime.__file__
assert metadata("softcap-runtime")["Version"] == softcap_runtime.__version__
config = AttentionConfig(softcap=50.0, scale=0.125, window=20)
q, k, v = (torch.randn(1, heads, 40, 64) for heads in (4, 2, 2))
out = Runtime.get().attention(q, k, v, config)
rows = torch.arange(40)[None]
mask = visible((rows - 19).clamp(min=0), rows + 1, 40)
want = attention(q.double(), k.double(), v.double(), mask, scale=0.125, softcap=50.0)[0]
error = float((out - want).norm() / want.norm())
assert error < 1e-6, error  # twice what cpu/attention.cpp says of float32
(engine,) = Runtime.get().stats().engines
print(engine.engine)
"""


def run(*words: str | Path, cwd: Path, **variables: str) -> str:
    hidden = ("SOFTCAP_", "PYTHON", "COVERAGE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    done = subprocess.run(list(map(str, words)), cwd=cwd, capture_output=True, text=True, env={**kept, **variables})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The source distribution, and the wheel built from it, of a copy: setuptools writes beside its sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in WANTED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.db*", "locks"))
        else:
            shutil.copy2(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=source)
    return {"wheel": next(out.glob("*.whl")), "sdist": next(out.glob("*.tar.gz"))}


def fresh_environment(folder: Path) -> Path:
    """Its interpreter: it sees what is installed here (torch, pydantic, ...), and no editable install of ours."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run(python, "-c", code, cwd=folder).strip())
    # Folders that a .pth file names are searched, but their own .pth files aren't read.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return python


def test_what_is_installed_works_alone(built: dict[str, Path], cache_dir: Path, tmp_path: Path) -> None:
    """Its kernels are those of the checkout's tests, if it holds the same sources: they are a part of the key."""
    python = fresh_environment(tmp_path / "env")
    options = ["--no-deps", "--no-index", "--quiet", "--disable-pip-version-check"]
    # What is installed here under the same name isn't the new environment's: pip must neither keep nor remove it.
    options += ["--ignore-installed"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, built["wheel"], cwd=tmp_path)
    cache = {"SOFTCAP_CACHE_DIR": str(cache_dir)}
    assert run(python, "-I", "-c", SMOKE, cwd=tmp_path, **cache).strip() == "blocked"
    command = python.parent / "softcap-runtime"
    assert run(command, "--version", cwd=tmp_path).startswith("softcap-runtime ")
    assert "attention" in run(command, "inspect", cwd=tmp_path, **cache)


def test_the_source_distribution_holds_what_the_tests_need(built: dict[str, Path]) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no list of what the project holds")
    listed = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    with tarfile.open(built["sdist"]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    expected = {name for name in listed if not name.startswith(".") and (ROOT / name).exists()}
    assert expected <= held, sorted(expected - held)
