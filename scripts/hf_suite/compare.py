"""Hugging Face's tests with softcap in place of sdpa, compared with the same tests as they are; see ../hf_suite.sh."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

PLUGIN = "softcap_as_sdpa"  # beside this file
MODELS = ("gemma2", "gemma3", "vaultgemma", "t5gemma", "llama", "mistral")


class Result(NamedTuple):
    """How a test went: ``passed``, ``failed`` or ``skipped``, and the last line of its error."""

    outcome: str
    cause: str = ""


def run(checkout: Path, tests: list[str], options: list[str]) -> dict[str, Result]:
    """The results of ``tests`` by their names, ``Class::name``; pytest's own output goes to stderr."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command += ["-o", "junit_logging=no", *options, *tests]
        ended = subprocess.run(command, cwd=checkout, stdout=sys.stderr, check=False)
        if ended.returncode not in (0, 1) or not report.exists():
            sys.exit(f"pytest ended with code {ended.returncode} (see above): {' '.join(command)}")
        return dict(map(read, ElementTree.parse(report).iter("testcase")))


def read(case: ElementTree.Element) -> tuple[str, Result]:
    """A test's name and its result, from pytest's report."""
    name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
    for outcome, tags in (("failed", ("failure", "error")), ("skipped", ("skipped",))):
        for tag in tags:
            if (found := case.find(tag)) is not None:
                return name, Result(outcome, cause(found.get("message") or found.text or ""))
    return name, Result("passed")


def cause(error: str) -> str:
    """The last line of an error; of the compiler's, which end with hints, the one that says what stopped it."""
    lines = [line.strip() for line in error.strip().splitlines() if not line.startswith("Set TORCHDYNAMO_VERBOSE")]
    context = [line for line in lines if line.startswith("Developer debug context:")]
    return (context or lines or [""])[-1]


def compare(checkout: Path, model: str, options: list[str]) -> tuple[list[object], list[str]]:
    """A row of the table, and a line for each test that fails with softcap, also when it runs again."""
    path = f"tests/models/{model}/test_modeling_{model}.py"
    plain, ours = (run(checkout, [path], [*more, *options]) for more in ((), ("-p", PLUGIN)))
    failed = [name for name, result in ours.items() if result.outcome == "failed"]
    if failed:
        # Some of these tests draw random weights, and fail by chance.
        again = [f"{path}::{name}" for name in failed]
        ours |= run(checkout, again, ["-p", PLUGIN, *options])
    lines, lost = [], 0
    for name in failed:
        if ours[name].outcome == "failed":
            before = plain[name].outcome if name in plain else "not run"
            lost += before == "passed"
            lines.append(f"{model} {name} ({before} without softcap): {ours[name].cause}")
    counts = [Counter(result.outcome for result in results.values())["passed"] for results in (plain, ours)]
    return [model, *counts, lost], lines


def main() -> None:
    """Print the table, each test that fails, and its cause."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(MODELS))
    own, options = sys.argv[1:], []
    if "--" in own:
        own, options = own[: own.index("--")], own[own.index("--") + 1 :]
    arguments = parser.parse_args(own)
    unknown = [
        model
        for model in arguments.models
        if not (arguments.checkout / f"tests/models/{model}/test_modeling_{model}.py").exists()
    ]
    if unknown or not (arguments.checkout / "src/transformers").is_dir():
        parser.error(f"{arguments.checkout}: no clone of transformers with tests of {', '.join(unknown) or 'models'}")
    table, failures, lost = (Table("model", "passed with sdpa or eager", "passed with softcap", "lost"), [], False)
    for model in arguments.models or MODELS:
        row, lines = compare(arguments.checkout, model, options)
        table.add_row(*map(str, row))
        failures += lines
        lost |= bool(row[-1])
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(table)
    for line in failures:
        console.print(line)
    sys.exit(lost)


if __name__ == "__main__":
    main()
