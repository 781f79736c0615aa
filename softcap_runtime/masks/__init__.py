"""Masks as row intervals, and what the engines need of them in closed form."""

from softcap_runtime.masks.blocks import (
    BLOCK,
    BlockTables,
    KeyRanges,
    block_tables,
    count_blocks,
    key_ranges,
    query_tables,
)
from softcap_runtime.masks.intervals import UNBOUNDED, RowIntervals, band, dense, edges, row_intervals

__all__ = [
    "BLOCK",
    "UNBOUNDED",
    "BlockTables",
    "KeyRanges",
    "RowIntervals",
    "band",
    "block_tables",
    "count_blocks",
    "dense",
    "edges",
    "key_ranges",
    "query_tables",
    "row_intervals",
]
