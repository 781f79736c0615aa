"""``softcap-runtime``: prewarm kernels, look into the cache, verify it, carry it to other machines.

Exit codes: 0 for success, 1 when something failed or is wrong with the cache, 2 for bad usage, 130 and
143 when ended by Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from torch import Tensor

from softcap_runtime.cli import cache as cli_cache  # noqa: F401  # its commands
from softcap_runtime.cli.app import ClickException, UsageError, app, fail
from softcap_runtime.config import AttentionConfig, PrewarmRequest, RuntimeSettings
from softcap_runtime.errors import EngineUnavailable, SoftcapRuntimeError
from softcap_runtime.presets import PRESETS, requests_for
from softcap_runtime.runtime import Runtime

# A drawing needs an element for each pair of blocks: about 100 MB at this length, 1.6 GB at four times the length.
LONGEST_DRAWN = 2**18


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit; expected errors are one line on standard error."""
    gc.disable()  # a command is short; a collection, also the one at its end, walks all of torch's heap: 0.1 s
    caught = _interrupted_by(signal.SIGINT, signal.SIGTERM)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path that its encoding lacks must not be an error
        sys.stdout.reconfigure(errors="backslashreplace")
    code = run(arguments)
    if caught:
        _leave(caught[0])
    sys.exit(code)


def _interrupted_by(*signals: signal.Signals) -> list[int]:
    """Make the first of ``signals`` raise KeyboardInterrupt, and append it to the list that is returned.

    Later ones are ignored, as the clean-up is under way. A signal that this process was started to ignore stays
    ignored.
    """
    caught: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        if not caught:
            caught.append(number)
            raise KeyboardInterrupt

    for one in signals:
        if signal.getsignal(one) != signal.SIG_IGN:
            signal.signal(one, interrupt)
    return caught


def _leave(number: int) -> NoReturn:
    """End the process with the exit code that shells expect after signal ``number``.

    Not with ``sys.exit``, which would wait for a thread that waits for another process's build.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(128 + number)


def run(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    try:
        code: int = app(args=arguments, prog_name="softcap-runtime", standalone_mode=False) or 0
        # typer 0.12 lets KeyboardInterrupt through, newer ones make it this code.
        return fail("interrupted", code) if code == 130 else code
    except ClickException as error:
        line = error.format_message()
        misplaced = "No such option: --cache-dir" in line
        return fail(f"{line}; it stands before the command" if misplaced else line, 2)
    except (ValueError, EngineUnavailable) as error:
        return fail(str(error), 2)
    except SoftcapRuntimeError as error:
        return fail(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        return fail("interrupted", 130)
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader went away, as in `inspect | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        return fail(str(error), 1)


@app.command()
def prewarm(
    context: typer.Context,
    preset: Annotated[str | None, typer.Option(help=f"A known model: {', '.join(PRESETS)}.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="A Hugging Face config.json, or the folder that holds one.")
    ] = None,
    num_heads: Annotated[int | None, typer.Option(help="Query heads.")] = None,
    num_kv_heads: Annotated[int | None, typer.Option(help="Key and value heads.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Size of a head.")] = None,
    scale: Annotated[
        float | None, typer.Option(help="Factor on q @ k.T, by default head_dim ** -0.5; kernels take any.")
    ] = None,
    softcap: Annotated[float | None, typer.Option(help="Bound of the logits; none without it.")] = None,
    window: Annotated[int | None, typer.Option(help="Visible keys, the query's own counted; kernels take any.")] = None,
    seq_len: Annotated[
        list[int] | None,
        typer.Option(
            help="With --device cuda, a length to make calls of, as kernels differ by it; on the CPU they take any. "
            "Repeatable."
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, bfloat16 (the default) or float16. Repeatable.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    engine: Annotated[str | None, typer.Option(help="Only this engine's kernels.")] = None,
    train: Annotated[bool, typer.Option("--train", help="The kernels of training too.")] = False,
    paged: Annotated[
        bool, typer.Option("--paged", help="The kernels of paged caches too; on the CPU they are the same.")
    ] = False,
    tune: Annotated[bool, typer.Option("--tune", help="Measure the blocks of GPU kernels and keep the best.")] = False,
) -> None:
    """Build or load the kernels of a model.

    Name it by --preset, --model, or its numbers.
    """
    numbers = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    given = [value for value in (*numbers.values(), scale, softcap, window) if value is not None]
    if (preset is not None) + (model is not None) + bool(given) != 1:
        raise UsageError("pass one of --preset, --model, or --num-heads --num-kv-heads --head-dim")
    if preset is not None and preset not in PRESETS:
        raise UsageError(f"--preset: {preset!r}, expected {', '.join(PRESETS)}")
    dtypes = dict.fromkeys(dtype or ["bfloat16"])
    common: dict[str, Any] = {"seq_lens": tuple(seq_len or ()), "device": device, "train": train, "paged": paged}
    if given:
        missing = [f"--{name.replace('_', '-')}" for name, value in numbers.items() if value is None]
        if missing:
            raise UsageError(f"missing {', '.join(missing)}")
        if scale is None:
            scale = max(head_dim or 1, 1) ** -0.5  # a head_dim below 1 is the request's to refuse
        config = AttentionConfig(scale=scale, softcap=softcap, window=window)
        requests = [PrewarmRequest(config=config, **numbers, **common, dtype=each) for each in dtypes]
    else:
        source = preset or model or ""
        requests = [one for each in dtypes for one in requests_for(source, **common, dtype=each)]  # type: ignore[arg-type]
    settings = RuntimeSettings(**context.obj, **({} if engine is None else {"engine": engine}))
    _prewarm(Runtime(settings), requests, tune)


def _prewarm(runtime: Runtime, requests: list[PrewarmRequest], tune: bool) -> None:
    from softcap_runtime.cli import tables
    from softcap_runtime.engines.spec import kernel_name
    from softcap_runtime.prewarm.prewarm import artifacts_of
    from softcap_runtime.report import cache as cache_report

    needed = list(dict.fromkeys(one for request in requests for one in artifacts_of(runtime.supply, request)))
    if not needed:
        print("nothing to prewarm: no kernel of the engine that would serve this is kept in the cache")
        return
    store = runtime.supply.store
    if not store.database.can_write() and store.fault is not None:
        raise SoftcapRuntimeError(f"nothing could be kept: {store.fault}")
    if not store.database.writable and (missing := cache_report.missing(store, needed)):
        first = kernel_name(missing[0].describe())
        raise SoftcapRuntimeError(
            f"{len(missing)} kernels are missing in {store.folder}, which is read-only ({first}); "
            "prewarm it as its owner or set another SOFTCAP_CACHE_DIR"
        )
    results = runtime.prewarm(requests, progress=True, tune=tune)
    store.flush()
    tables.console().print(tables.prewarm_table(results))
    if any(result.outcome == "ready" for result in results):
        print("ready: compiled in each process that uses it; nothing to keep here")
    if store.held_in_memory:
        why = store.fault or f"{store.folder} is read-only"
        fail(f"{store.held_in_memory} kernels could not be written: {why}", 1)
    not_kept = cache_report.not_kept(runtime.supply)
    if not_kept is not None:
        fail(not_kept, 1)
    if store.held_in_memory or not_kept or any(result.outcome == "failed" for result in results):
        raise typer.Exit(1)


@app.command()
def mask(
    seq_len: Annotated[int, typer.Option(min=1, max=LONGEST_DRAWN, help="Queries and keys.")],
    window: Annotated[int | None, typer.Option(min=1, help="Visible keys, the query's own counted.")] = None,
    documents: Annotated[str | None, typer.Option(help="Lengths of packed documents, such as 100,250,162.")] = None,
    prefix: Annotated[int | None, typer.Option(min=0, help="First tokens that see each other.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write a picture there.")] = None,
) -> None:
    """Draw a causal mask and its blocks: full, partial, skipped."""
    from softcap_runtime.cli.tables import console
    from softcap_runtime.masks import check_mask_arguments, draw, row_intervals

    tensors = {
        "document_ids": None if documents is None else _document_ids(documents, seq_len),
        "prefix_lengths": None if prefix is None else torch.tensor([prefix]),
    }
    check_mask_arguments(seq_len, seq_len, 1, torch.device("cpu"), causal=True, holes=False, **tensors)
    intervals = row_intervals(seq_len, seq_len, causal=True, window=window, **tensors)
    out = console()
    out.print(draw.mask_text(intervals, ascii_only=out.options.ascii_only))
    if png is not None:
        draw.save_png(png, {"Mask": intervals})
        print(f"picture in {png}")


def _document_ids(lengths: str, seq_len: int) -> Tensor:
    """Document ids ``[1, seq_len]`` from comma-separated lengths."""
    words = lengths.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise UsageError(f"--documents: {lengths!r}, expected lengths separated by commas, such as 100,250")
    counts = [int(word) for word in words]
    if sum(counts) != seq_len:  # Python's integers: the sum cannot overflow
        raise UsageError(f"--documents: they hold {sum(counts)} tokens, expected --seq-len {seq_len}")
    return torch.repeat_interleave(torch.arange(len(words)), torch.tensor(counts))[None]
