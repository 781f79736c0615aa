"""Which rows of a sequence each rank holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh

from softcap_runtime.distributed.ranges import Range, length, merged, pairs_of, picked
from softcap_runtime.masks.intervals import RowIntervals


@dataclass(frozen=True)
class SequenceLayout:
    """The rows of a sequence of ``seq_len`` tokens that each rank holds, as ascending half-open ranges.

    Made by ``contiguous``, ``zigzag`` or ``balanced``, without a process group; every row is on one rank, every rank
    has one at least.
    """

    seq_len: int
    ranges: tuple[tuple[Range, ...], ...]

    @classmethod
    def contiguous(cls, seq_len: int, ranks: int) -> SequenceLayout:
        """Equal chunks in order, to one row: what windows and the heads method want."""
        return cls._of_chunks(seq_len, [[rank] for rank in range(_checked(seq_len, ranks, 1))])

    @classmethod
    def zigzag(cls, seq_len: int, ranks: int) -> SequenceLayout:
        """Chunks r and 2 x ranks - 1 - r on rank r: each rank then has as many visible pairs of a causal mask."""
        return cls._of_chunks(seq_len, [[rank, 2 * ranks - 1 - rank] for rank in range(_checked(seq_len, ranks, 2))])

    @classmethod
    def balanced(cls, mask: RowIntervals, ranks: int, block: int = 1024) -> SequenceLayout:
        """Blocks of ``block`` rows dealt out so that ranks have as many visible pairs, and blocks, as one another.

        ``mask``: of the whole sequence, on the CPU (``softcap_runtime.masks.row_intervals``). The heaviest block goes
        first, each to the rank that has least so far.
        """
        if not isinstance(mask, RowIntervals):
            raise TypeError(
                f"mask: {type(mask).__name__}, expected RowIntervals of the whole sequence; make them with "
                "row_intervals(...)"
            )
        if block < 1:
            raise ValueError(f"block: {block}, expected rows of a block, at least 1")
        seq_len = mask.q_len
        _checked(seq_len, ranks, 1)
        block = min(block, seq_len // ranks)
        blocks = [(at, min(at + block, seq_len)) for at in range(0, seq_len, block)]
        weights = pairs_of(mask, blocks)
        most = -(-len(blocks) // ranks)
        given: list[list[Range]] = [[] for _ in range(ranks)]
        loads = [0] * ranks
        for at in sorted(range(len(blocks)), key=lambda at: -weights[at]):
            open_ranks = (rank for rank in range(ranks) if len(given[rank]) < most)
            rank = min(open_ranks, key=lambda rank: (loads[rank], len(given[rank]), rank))
            given[rank].append(blocks[at])
            loads[rank] += weights[at]
        return cls(seq_len, tuple(merged(own) for own in given))

    @classmethod
    def _of_chunks(cls, seq_len: int, chunks: list[list[int]]) -> SequenceLayout:
        count = sum(map(len, chunks))
        edges = [at * seq_len // count for at in range(count + 1)]
        return cls(seq_len, tuple(merged([(edges[at], edges[at + 1]) for at in own]) for own in chunks))

    @property
    def ranks(self) -> int:
        """How many ranks there are."""
        return len(self.ranges)

    def count(self, rank: int) -> int:
        """How many rows ``rank`` holds."""
        return length(self.ranges[rank])

    def rows(self, rank: int) -> Tensor:
        """The rows of ``rank``, ascending: int64 ``[rows]``; also its ``position_ids`` for rotary embeddings."""
        return torch.cat([torch.arange(*own) for own in self.ranges[rank]])

    def shard(self, x: Tensor, dim: int, rank: int) -> Tensor:
        """The rows of ``rank`` of a whole tensor; a view where they are one range."""
        if x.shape[dim] != self.seq_len:
            raise ValueError(
                f"x: {x.shape[dim]} rows in dimension {dim}, expected the layout's {self.seq_len}; pass it whole"
            )
        parts = [x.narrow(dim, start, end - start) for start, end in self.ranges[rank]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def unshard(self, x: Tensor, dim: int, mesh: DeviceMesh) -> Tensor:
        """The whole tensor on every rank, from the rows that each holds; gradients of all ranks are added up."""
        rank = check_mesh(self, mesh)
        if x.shape[dim] != self.count(rank):
            raise ValueError(
                f"x: {x.shape[dim]} rows in dimension {dim}, expected the {self.count(rank)} of rank {rank}"
            )
        most = max(self.count(rank) for rank in range(self.ranks))
        rows = x.movedim(dim, 0).contiguous()
        missing = most - rows.shape[0]
        if missing:
            rows = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
        # Named anew in torch 2.13, which warns of the old name.
        gather = getattr(collectives, "all_gather_single_autograd", collectives.all_gather_tensor_autograd)
        gathered = gather(rows, 0, mesh)
        sizes, starts = [], []
        for rank, own in enumerate(self.ranges):
            for start, end in (*own, (self.seq_len, self.seq_len + most - self.count(rank))):
                sizes.append(end - start)
                starts.append(start)
        order = [at for at in sorted(range(len(sizes)), key=starts.__getitem__) if starts[at] < self.seq_len]
        return picked(gathered.split(sizes), order).movedim(0, dim)


def check_mesh(layout: SequenceLayout, mesh: DeviceMesh) -> int:
    """This process's rank in ``mesh``. Raises ValueError unless the mesh is one dimension of the layout's ranks."""
    if mesh.ndim != 1 or mesh.size() != layout.ranks:
        raise ValueError(
            f"mesh: {mesh}, expected one dimension of the layout's {layout.ranks} ranks; pass mesh['name'] of a mesh "
            "with more dimensions"
        )
    return mesh.get_local_rank()


def _checked(seq_len: int, ranks: int, chunks: int) -> int:
    if ranks < 1 or seq_len < ranks * chunks:
        raise ValueError(
            f"ranks: {ranks} for {seq_len} tokens, expected 1 to {max(1, seq_len // chunks)} of {chunks} rows or more"
        )
    return ranks
