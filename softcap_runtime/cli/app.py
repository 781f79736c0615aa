"""The base of the command line: the application, its common options, errors."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
import sys
from typing import Annotated, Any

import torch
import typer
from pydantic import BaseModel

from softcap_runtime import supply
from softcap_runtime.config import RuntimeSettings
from softcap_runtime.store import Store
from softcap_runtime.store.entry import printable
from softcap_runtime.supply import Supply

# typer 0.12 uses click's exceptions, newer versions have their own; taken from the bases, these serve both.
UsageError: Any = typer.BadParameter.__mro__[1]
ClickException: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)


def fail(line: str, code: int) -> int:
    """Print an error on standard error, in one line; returns ``code``."""
    print(f"softcap-runtime: {printable(' '.join(line.split()))}", file=sys.stderr)
    return code


def counted(count: int, noun: str) -> str:
    """``1 entry``, ``2 entries``."""
    if count != 1:
        noun = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{count} {noun}"


def print_json(answer: BaseModel) -> None:
    """Print a document as ASCII, which any encoding of a terminal or pipe can hold."""
    print(json.dumps(json.loads(answer.model_dump_json()), indent=2))


def _show_version(asked: bool) -> None:
    if asked:
        version = importlib.metadata.version("softcap-runtime")
        print(f"softcap-runtime {version} (torch {torch.__version__}, Python {platform.python_version()})")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    cache_dir: Annotated[
        str | None, typer.Option(metavar="PATH", help="Folder of the cache, in place of SOFTCAP_CACHE_DIR.")
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Prewarm and look after the kernel cache of softcap_runtime."""
    # The commands themselves report what is wrong with the cache.
    logging.getLogger("softcap_runtime").setLevel(logging.ERROR)
    logging.getLogger(supply.__name__).setLevel(logging.WARNING)  # warns of a key file that others can read
    context.obj = {} if cache_dir is None else {"cache_dir": cache_dir}


def store_of(context: typer.Context) -> Store:
    """The cache that the options and the environment name."""
    return Supply(RuntimeSettings(**context.obj)).store
