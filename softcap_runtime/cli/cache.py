"""The commands on the cache itself: look at it, verify, clear, carry it to other machines."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Annotated

import typer

from softcap_runtime.checks import device_of
from softcap_runtime.cli.app import UsageError, app, counted, fail, print_json, store_of
from softcap_runtime.config import RuntimeSettings
from softcap_runtime.errors import SoftcapRuntimeError
from softcap_runtime.store import Store, fingerprint
from softcap_runtime.supply import Supply

DeviceOption = Annotated[str, typer.Option(help="Whose kernels: cpu or cuda.")]


def _existing_store(context: typer.Context) -> Store:
    """The store of an existing folder: a command that only reads must not create one for a mistyped name."""
    from softcap_runtime.store.inspection import absent

    store = store_of(context)
    if not os.path.lexists(store.folder):
        raise SoftcapRuntimeError(absent(store.folder))
    return store


@app.command()
def inspect(
    context: typer.Context,
    fields: Annotated[list[str] | None, typer.Argument(help="With --explain: key fields such as head_dim=256.")] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print a CacheReport as JSON, or with --explain an Explanation.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say whether a kernel would be found, or why not.")
    ] = False,
    counters: Annotated[bool, typer.Option("--counters", help="Show counters that are zero too.")] = False,
) -> None:
    """Show the cache's kernels, which of them fit this environment, and what is wrong."""
    from softcap_runtime.cli import tables
    from softcap_runtime.report import cache as cache_report

    if fields and not explain:
        raise UsageError(f"{fields[0]!r}: key fields go with --explain")
    settings = RuntimeSettings(**context.obj)
    store = Supply(settings).store
    if explain:
        answer = cache_report.explain(store, fields or [])
        if json:
            print_json(answer)
        else:
            tables.show_explanation(tables.console(), answer)
        return
    report = cache_report.report(store, settings.softcap_approx)
    if json:
        print_json(report)
    else:
        tables.show_report(tables.console(), report, counters)


@app.command()
def verify(
    context: typer.Context,
    repair: Annotated[bool, typer.Option("--repair", help="Move what is bad into quarantine.")] = False,
) -> None:
    """Read and check every entry.

    Exit code 1 if anything was wrong, repaired or not.
    """
    from softcap_runtime.cli import tables
    from softcap_runtime.store import inspection

    store = _existing_store(context)
    problems = inspection.verify(store, repair)
    if problems:
        tables.console().print(tables.problems_table(problems))
        raise typer.Exit(1)
    good = len(inspection.entries(store))
    print(f"{counted(good, 'entry')} {'is' if good == 1 else 'are'} good in {store.folder}")


@app.command()
def clear(context: typer.Context) -> None:
    """Remove every entry; safe while other processes run."""
    store = store_of(context)
    if not os.path.lexists(store.folder):
        print(f"nothing to clear: {store.folder} does not exist")
        return
    removed = store.clear()
    if store.fault is not None:
        raise SoftcapRuntimeError(f"not cleared: {store.fault}")
    if not store.database.writable:
        raise SoftcapRuntimeError(f"not cleared: {store.folder} is read-only")
    print(f"removed {counted(removed, 'entry')} from {store.folder}")


@app.command("export")
def export_(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="The bundle to write.")],
    device: DeviceOption = "cpu",
) -> None:
    """Write the kernels that fit this environment into one file, for machines like this one.

    If one kernel is damaged, no file is written and the exit code is 1.
    """
    from softcap_runtime.store import bundle

    environment = fingerprint(device_of(device).type)
    store = _existing_store(context)
    try:
        count = bundle.export(store, file, environment)
    except bundle.Incomplete as incomplete:
        for where, why in incomplete.bad:
            fail(f"entry {where[:12]}: {why}", 1)
        raise
    if not count:
        raise SoftcapRuntimeError(
            store.fault or f"{store.folder} has nothing for this environment and {device}; prewarm first"
        )
    print(f"exported {counted(count, 'entry')} to {file}")


@app.command("import")
def import_(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="A bundle that `export` wrote.")],
    device: DeviceOption = "cpu",
) -> None:
    """Import the kernels of a bundle that fit this environment.

    Exit code 1 if any does not fit.
    """
    from softcap_runtime.store import bundle

    expected = fingerprint(device_of(device).type)
    try:
        done = bundle.import_(store_of(context), file, expected)
    except ValueError as error:  # a bad bundle is not bad usage
        raise SoftcapRuntimeError(str(error)) from None
    except OSError as error:
        raise SoftcapRuntimeError(
            f"bundle {file} cannot be read: {error.strerror}; expected a file that `softcap-runtime export` wrote"
        ) from None
    print(f"imported {counted(done.imported, 'entry')}, {done.present} were present, {len(done.refused)} refused")
    for what, problems in itertools.groupby(done.refused, lambda problem: problem.what):
        where = [problem.where[:12] for problem in problems]
        fail(f"entry {where[0]} {what}" if len(where) == 1 else f"{len(where)} entries: {what}", 1)
    if done.refused:
        raise typer.Exit(1)
