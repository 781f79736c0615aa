"""How the command line shows its answers: rich tables, and sizes and times for people."""

from __future__ import annotations

import shlex
import textwrap
import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from softcap_runtime.cli.app import counted
from softcap_runtime.engines.spec import KernelSpec, kernel_name
from softcap_runtime.prewarm.rows import PrewarmResult
from softcap_runtime.report.cache import CacheReport
from softcap_runtime.report.gpus import Gpu
from softcap_runtime.store.entry import printable
from softcap_runtime.store.key import FieldValue
from softcap_runtime.store.quarantine import FOLDER
from softcap_runtime.store.report import EntryInfo, Explanation, Problem, StoreStatus

# A pipe has no width, and 80 columns would cut off what a reader or grep looks for.
PIPE_WIDTH = 160
_COLOURS = {"built": "green", "loaded": "green", "ready": "green", "failed": "red"}


def console() -> Console:
    """Where answers go: standard output."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=PIPE_WIDTH)


def prewarm_table(results: Sequence[PrewarmResult]) -> Table:
    """What was built, loaded or failed."""
    table = _table("kernel", "device", "outcome", "seconds", "size", "error")
    for result in results:
        table.add_row(
            kernel_name(result.spec),
            result.spec.device,
            Text(result.outcome, _COLOURS[result.outcome]),
            f"{result.seconds:.2f}",
            decimal(result.bytes) if result.bytes else "-",
            plain(result.error or ""),
        )
    return table


def show_report(out: Console, report: CacheReport, counters: bool = False) -> None:
    """Show how many kernels there are, how many fit and what is wrong; then the folder, and every entry.

    ``counters``: show counters that are zero too.
    """
    status = report.status
    kernels = [info.fits for info in report.entries if info.fields.get("op") != "tuned_options"]
    problems = _wrong(status)
    state = f"{counted(len(problems), 'problem')}:" if problems else "nothing is wrong"
    _say(out, f"{counted(len(kernels), 'kernel')}, {sum(kernels)} fit this environment; {state}")
    for line in problems:  # in one piece: it may end in a command to paste
        out.print(plain(f"- {line}"), soft_wrap=True)
    access = "writable" if status.writable else "read-only" if status.exists else "none yet"
    verdict = status.verdict if status.trusted else "not trusted"
    network = ", a network filesystem" if status.network_filesystem else ""
    facts = {
        "folder": status.folder if status.exists else f"{status.folder} (does not exist)",
        "size": f"{counted(status.entries, 'entry')}, {decimal(status.bytes)} of {decimal(status.size_limit)}",
        "access": f"{access}, {status.filesystem}{network}",
        "verdict": f"{verdict} (owner {status.owner or '-'}, mode {status.mode or '-'})",
        "authenticated": "yes" if status.authenticated else "no (SOFTCAP_CACHE_KEY_FILE is not set)",
        "environment": ", ".join(f"{name} {value}" for name, value in report.fingerprint.items()),
        "counters": ", ".join(f"{name} {value}" for name, value in status.counters.items() if value or counters),
    }
    for name, text in facts.items():
        if text:
            _say(out, text, f"{name:<14}")
    if report.entries:
        out.print(_entries_table(report.entries))
        _say(
            out,
            "A kernel serves every batch, length, number of heads, window, scale, cap and stride; attention on "
            "the CPU every dtype, head_dim and mask too.",
        )
    for gpu in report.gpus:
        _show_gpu(out, gpu)


def _wrong(status: StoreStatus) -> list[str]:
    found = [status.fault or ("" if status.trusted else status.verdict)]
    if status.held_in_memory:
        found.append(f"{counted(status.held_in_memory, 'entry')} could not be written")
    if status.quarantine:
        names, seen = ", ".join(status.quarantine), f"rm -r {shlex.quote(f'{status.folder}/{FOLDER}')}"
        found.append(f"in quarantine, as they were damaged or not ours: {names}; once you have seen them, run: {seen}")
    return [line for line in found if line]


def show_explanation(out: Console, answer: Explanation) -> None:
    """Whether a key would be found, and how the nearest entry differs."""
    name = _entry_name(answer.fields)
    found = f"present: {name} would be loaded"
    _say(out, found if answer.present else f"absent: {name}: {answer.reason}")
    if answer.differences:
        table = _table("field", "wanted", "stored")
        for one in answer.differences:
            table.add_row(plain(one.field), plain(one.wanted), plain(one.stored))
        out.print(table)


def problems_table(problems: Sequence[Problem]) -> Table:
    """What ``verify`` found."""
    table = _table("where", "what", "repaired")
    for problem in problems:
        table.add_row(plain(problem.where), plain(problem.what), "in quarantine" if problem.repaired else "no")
    return table


def _say(out: Console, text: str, label: str = "") -> None:
    """Print wrapped text after ``label``; rich's own wrapping would leave blanks at the ends of lines."""
    wrapper = textwrap.TextWrapper(out.width, label, " " * len(label), break_on_hyphens=False)
    for line in wrapper.wrap(printable(text)):
        out.print(Text(line), soft_wrap=True)


def plain(value: object) -> Text:
    """Text that may come from disk, to be shown literally: without markup or control characters."""
    return Text(printable(str(value)))


def _entries_table(entries: Sequence[EntryInfo]) -> Table:
    table = _table("kernel", "size", "built, used (ago)", "build s", "loads", "fits here")
    for info in entries:
        fits = "yes" if info.fits else f"no: {', '.join(info.differs)}"
        table.add_row(
            plain(_entry_name(info.fields)),
            decimal(info.bytes),
            f"{ago(info.created)}, {ago(info.last_used)}",
            f"{info.build_seconds:.1f}",
            str(info.hits),
            plain(fits),
        )
    return table


def _entry_name(fields: Mapping[str, FieldValue]) -> str:
    """An entry's kernel as in ``kernel_name``; for keys of another form, op and dtype, then the other fields."""
    texts = all(isinstance(fields.get(name), str) for name in ("op", "dtype", "mask"))
    named = {name: value for name, value in fields.items() if name != "sources"}
    if set(named) == set(KernelSpec._fields) and texts:
        return kernel_name(KernelSpec(**named))  # type: ignore[arg-type]
    words = [str(fields[name]) for name in ("op", "dtype") if name in fields]
    words += [f"{name}={value}" for name, value in named.items() if name not in ("op", "dtype")]
    return " ".join(words)


def _table(*columns: str) -> Table:
    """A table whose cells are folded on a narrow terminal, not cut off."""
    table = Table()
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def _show_gpu(out: Console, gpu: Gpu) -> None:
    title = f"{gpu.device} {gpu.name}, sm {gpu.capability}, {gpu.shared_bytes} bytes of shared memory a block"
    _say(out, f"{title}, {gpu.tanh} tanh")
    table = _table("kernel", "dtype", "head_dim", "block", "warps", "stages", "shared memory", "from")
    for one in gpu.kernels:
        block = f"{one.block_m} x {one.block_n}"
        numbers = (one.head_dim, block, one.warps, one.stages, one.shared_bytes)
        source = "a measurement" if one.tuned else "its limits"
        table.add_row(one.kernel, one.dtype, *map(str, numbers), source)
    out.print(table)


def ago(moment: float) -> str:
    """How long ago ``moment``, in seconds since the epoch, was, in words."""
    seconds = time.time() - moment
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
