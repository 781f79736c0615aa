"""Masks as row intervals, and what the engines need of them in closed form."""

from softcap_runtime.masks.block_mask import block_mask, form_of, intervals_of
from softcap_runtime.masks.blocks import BLOCK, BlockTables, block_tables, count_blocks, query_tables
from softcap_runtime.masks.documents import document_ids_from_cu_seqlens, document_ids_from_position_ids
from softcap_runtime.masks.intervals import UNBOUNDED, RowIntervals, band, dense, edges, row_intervals
from softcap_runtime.masks.memo import MaskMemo
from softcap_runtime.masks.validate import check_mask_arguments

__all__ = [
    "BLOCK",
    "UNBOUNDED",
    "BlockTables",
    "MaskMemo",
    "RowIntervals",
    "band",
    "block_mask",
    "block_tables",
    "check_mask_arguments",
    "count_blocks",
    "dense",
    "document_ids_from_cu_seqlens",
    "document_ids_from_position_ids",
    "edges",
    "form_of",
    "intervals_of",
    "query_tables",
    "row_intervals",
]
