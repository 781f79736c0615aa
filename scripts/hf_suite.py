"""Hugging Face's tests with softcap in place of sdpa, compared with the same tests as they are; see hf_suite.sh."""

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
                lines = (found.get("message") or found.text or "").strip().splitlines()
                return name, Result(outcome, lines[-1].strip() if lines else "")
    return name, Result("passed")


def compare(checkout: Path, model: str, options: list[str]) -> tuple[list[object], dict[str, str]]:
    """A row of the table, and the causes of the tests that fail with softcap alone, also when they run again."""
    path = f"tests/models/{model}/test_modeling_{model}.py"
    plain, ours = (run(checkout, [path], [*more, *options]) for more in ((), ("-p", "hf_suite_plugin")))
    lost = [
        name
        for name, result in ours.items()
        if result.outcome == "failed" and plain[name].outcome == "passed"
    ]
    if lost:
        # Some of these tests draw random weights, and fail by chance.
        again = run(checkout, [f"{path}::{name}" for name in lost], ["-p", "hf_suite_plugin", *options])
        ours.update({name: again[name] for name in lost})
        lost = [name for name in lost if ours[name].outcome == "failed"]
    counts, before = (Counter(result.outcome for result in results.values()) for results in (ours, plain))
    more = [name for name, result in ours.items() if result.outcome == "failed" and name not in lost]
    failed = {name: ours[name].cause for name in lost}
    failed |= {f"{name} ({plain[name].outcome} without softcap)": ours[name].cause for name in more}
    row = [model, before["passed"], counts["passed"], len(lost), before["failed"], counts["failed"]]
    return row, failed


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
        parser.error(
            f"{arguments.checkout}: no clone of transformers with tests of {', '.join(unknown) or 'models'}"
        )
    headings = (
        "model",
        "passed as it is",
        "passed with softcap",
        "lost",
        "failed as it is",
        "failed with softcap",
    )
    table, causes = Table(*headings), {}
    for model in arguments.models or MODELS:
        row, causes[model] = compare(arguments.checkout, model, options)
        table.add_row(*map(str, row))
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(table)
    for model, failed in causes.items():
        for name, cause in failed.items():
            console.print(f"{model} {name}: {cause}")
    lost = any("without softcap)" not in name for failed in causes.values() for name in failed)
    sys.exit(lost)


if __name__ == "__main__":
    main()
