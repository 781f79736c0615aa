"""README and docs: they build, their examples run, their commands are commands, their tables are complete."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

import softcap_runtime
from softcap_runtime.cli import main as cli
from softcap_runtime.config import EngineName, RuntimeSettings
from softcap_runtime.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# A comment above a block that can't run here: <!-- not run: why -->
NOT_RUN = re.compile(r"^<!-- not run: .+ -->$")
LANGUAGES = {"python", "bash", "text"}
# What the README and guides take from their reader: a saved model.
PREPARED = """
import sys, torch
torch.manual_seed(0)
torch.set_num_threads(1)
"""
SAVED_MODEL = """
from transformers import Gemma2Config, Gemma2ForCausalLM
path = "a_saved_model"
Gemma2ForCausalLM(Gemma2Config(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32,
)).save_pretrained(path)
"""
# Runs the blocks of every page in one process, a namespace a page, and says which failed.
RUNNER = """
import json, sys, traceback
pages = json.load(open(sys.argv[1]))
failed = 0
for name, blocks in pages.items():
    scope = {"__name__": name}
    try:
        for where, text in blocks:
            exec(compile(text, where, "exec"), scope)
    except BaseException:
        failed += 1
        print("FAILED", where)
        traceback.print_exc(file=sys.stdout)
sys.exit(failed)
"""


class Block(NamedTuple):
    """A fenced block: its page, the line it begins at, its language, and whether a test runs it."""

    page: Path
    line: int
    language: str
    text: str
    runs: bool

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    lines = page.read_text().splitlines()
    at = 0
    while at < len(lines):
        if lines[at].startswith("```"):
            end = lines.index("```", at + 1)
            above = lines[at - 1] if at else ""
            runs = not NOT_RUN.match(above)
            # Blank lines in front keep the numbers of lines in errors those of the page.
            text = "\n" * (at + 1) + "\n".join(lines[at + 1 : end]) + "\n"
            yield Block(page, at + 1, lines[at][3:], text, runs)
            at = end
        at += 1


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
COMMANDS = [
    (block, line)
    for block in BLOCKS
    if block.language == "bash"
    for line in block.text.replace("\\\n", " ").splitlines()
    if line.strip()
]


def environment(cache_dir: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SOFTCAP_")}
    return {**kept, "SOFTCAP_CACHE_DIR": str(cache_dir), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def test_every_block_has_a_language_that_is_tested() -> None:
    odd = [(block.where, block.language) for block in BLOCKS if block.language not in LANGUAGES]
    assert not odd
    for block in PYTHON:  # those that can't run are Python all the same
        ast.parse(block.text)


def test_python_examples_run(cache_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("prometheus_client")
    pages: dict[str, list[tuple[str, str]]] = {}
    for block in PYTHON:
        if block.runs and block.page.name != "distributed.md":
            first = [("prepared", PREPARED + (SAVED_MODEL if block.page.name == "README.md" else ""))]
            pages.setdefault(block.page.name, first).append((block.where, block.text))
    assert {"README.md", "index.md", "serving.md", "training.md"} <= pages.keys()
    (tmp_path / "pages.json").write_text(json.dumps(pages))
    command = [sys.executable, "-c", RUNNER, str(tmp_path / "pages.json")]
    done = subprocess.run(command, cwd=tmp_path, env=environment(cache_dir), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_examples_of_many_devices_run_on_two_ranks(cache_dir: Path, tmp_path: Path) -> None:
    texts = [block.text for block in PYTHON if block.page.name == "distributed.md" and block.runs]
    assert len(texts) >= 3
    (tmp_path / "example.py").write_text(PREPARED + "\n".join(texts))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    variables = {**environment(cache_dir), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*launch, "example.py"], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("block", "line"), COMMANDS, ids=[line for _, line in COMMANDS])
def test_commands_are_commands(
    block: Block, line: str, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options and arguments are parsed as the command line parses them; what is cheap is run."""
    words = shlex.split(line, comments=True)
    while "=" in words[0]:
        words.pop(0)
    program, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "softcap-runtime":
        check_own_command(arguments, run=block.runs, cache_dir=cache_dir, monkeypatch=monkeypatch)
    elif program in ("bash", "python", "torchrun"):
        check_script(program, arguments)
    elif program == "pip":
        check_install(arguments)
    else:
        assert program in ("ruff", "mypy"), f"{block.where}: {line!r} is of no kind that is tested"


def check_own_command(arguments: list[str], *, run: bool, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group: Any = typer.main.get_command(cli.app)
    if arguments[0] != "--version":
        name, *rest = arguments
        group.commands[name].make_context(name, [*rest])  # it takes what it reads out of the list
        if "--preset" in rest:
            assert rest[rest.index("--preset") + 1] in PRESETS
    if run and arguments[0] in ("--version", "inspect", "mask"):
        monkeypatch.setenv("SOFTCAP_CACHE_DIR", str(cache_dir))
        assert cli.run(arguments) == 0


def check_script(program: str, arguments: list[str]) -> None:
    if arguments[:2] == ["-m", "mkdocs"] or arguments[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in arguments if word.startswith("tests/"))
        return
    place = next(at for at, word in enumerate(arguments) if word.startswith("scripts/"))
    script = ROOT / arguments[place]
    assert script.is_file(), script
    text = script.read_text()
    for word in arguments[place + 1 :]:
        name = word.removeprefix("--").replace("-", "_")
        known = word == "--help" or word in text or f"{name}:" in text or f'"{name}"' in text
        assert known or not word.startswith("--"), f"{script.name} has no {word}"
    if script.name == "benchmark.py":
        parts = {path.stem for path in (ROOT / "scripts/benchmarks").glob("*.py")}
        named = itertools.takewhile(lambda word: not word.startswith("--"), arguments[place + 1 :])
        assert set(named) <= parts
    if program == "python" and arguments[-1] == "--help":  # cheap, and imports all of it
        done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def check_install(arguments: list[str]) -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert arguments[0] == "install"
    for word in arguments:
        if word.endswith(".txt"):
            assert (ROOT / word).is_file()
        for extra in re.findall(r"\[(.+)\]", word):
            assert all(f"\n{name} = [" in text for name in extra.split(","))


def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    """Broken links and anchors, pages that no menu holds, names that API asks for and that are not there: errors."""
    pytest.importorskip("mkdocstrings")  # of the extra "docs"; setup.sh installs it
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    api = (tmp_path / "reference/api.html").read_text()
    for name in ("Runtime.paged_attention", "AttentionConfig.from_hf", "stats.RuntimeStats", "patch"):
        assert re.search(rf'id="softcap_runtime[\w.]*{re.escape(name)}"', api), name


def public_names() -> Iterator[tuple[str, Any]]:
    import softcap_runtime.distributed as distributed

    for module in (softcap_runtime, distributed):
        for name in module.__all__:
            yield f"{module.__name__}.{name}", getattr(module, name)


@pytest.mark.parametrize(("name", "value"), [*public_names()])
def test_public_names_are_documented(name: str, value: Any) -> None:
    short = name.rpartition(".")[2]
    api = (ROOT / "docs/reference/api.md").read_text()
    assert re.search(rf"^::: softcap_runtime[\w.]*\.{short}$", api, re.M), f"docs/reference/api.md lacks {short}"
    if isinstance(value, bool):
        return
    assert inspect.getdoc(value), name
    for member, function in vars(value).items() if inspect.isclass(value) else ():
        if not member.startswith(("_", "model_")) and inspect.isfunction(function):
            assert inspect.getdoc(function), f"{name}.{member}"


def test_the_readme_is_short_and_names_every_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 900
    pages = [page for page in PAGES if ROOT / "docs" in page.parents]
    missing = [page.name for page in pages if f"({page.relative_to(ROOT)})" not in text]
    # Reached from their own pages: the report of a card, and the two that repeat files of the checkout.
    assert sorted(missing) == ["changelog.md", "contributing.md", "gpu_report.md"]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "SECURITY.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_what_the_build_includes_is_a_link_elsewhere() -> None:
    """GitHub shows the line of an include as it stands; it drops ``hidden``, which a browser obeys in the pages."""
    included = 0
    for page in PAGES:
        for name in re.findall(r'^--8<-- "([\w.]+)', page.read_text(), re.M):
            links = re.findall(rf'<p hidden>.*<a href="(.*)">{name}</a>', page.read_text())
            assert [(page.parent / link).resolve() for link in links] == [ROOT / name]
            included += 1
    assert included == 3


def test_every_setting_and_engine_and_preset_is_in_its_table() -> None:
    reference = ROOT / "docs/reference"
    settings, engines = (reference / "settings.md").read_text(), (reference / "engines.md").read_text()
    for name, field in RuntimeSettings.model_fields.items():
        variable = (field.validation_alias or name).upper().removeprefix("SOFTCAP_")  # type: ignore[union-attr]
        assert f"| `SOFTCAP_{variable}` |" in settings
    for engine in set(EngineName.__args__) - {"auto"}:  # type: ignore[attr-defined]
        assert f"| `{engine}` |" in engines
    models = (ROOT / "docs/guides/huggingface.md").read_text()
    assert all(f"`{name}`" in models for name in PRESETS)


def test_changes_are_of_the_version_that_is_built() -> None:
    """The version stands in pyproject.toml alone; its section leads the list of changes."""
    found = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert found is not None
    assert found[1] == softcap_runtime.__version__
