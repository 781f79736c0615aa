"""Which rows of a sequence each rank holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh

from softcap_runtime.checks import check_type
from softcap_runtime.config import checked_count
from softcap_runtime.distributed.exchange import picked
from softcap_runtime.distributed.ranges import Range, length, merged, pairs_of
from softcap_runtime.masks.intervals import RowIntervals


@dataclass(frozen=True)
class SequenceLayout:
    """The rows of a sequence of ``seq_len`` tokens that each rank holds, as ascending half-open ranges.

    Made by ``contiguous``, ``zigzag`` or ``balanced``, which need no process group. Every row is on exactly one rank,
    and every rank has at least one row.
    """

    seq_len: int
    ranges: tuple[tuple[Range, ...], ...]

    @classmethod
    def contiguous(cls, seq_len: int, ranks: int) -> SequenceLayout:
        """A chunk for each rank, in order, of sizes that differ by a row at most: for windows and the heads method.

        Raises ValueError for fewer tokens than ranks.
        """
        return cls._of_chunks(seq_len, [[rank] for rank in range(_checked(seq_len, ranks, 1))])

    @classmethod
    def zigzag(cls, seq_len: int, ranks: int) -> SequenceLayout:
        """Chunks r and 2 x ranks - 1 - r on rank r: equal numbers of visible pairs of a causal mask on all ranks.

        Raises ValueError for fewer tokens than chunks.
        """
        return cls._of_chunks(seq_len, [[rank, 2 * ranks - 1 - rank] for rank in range(_checked(seq_len, ranks, 2))])

    @classmethod
    def balanced(cls, mask: RowIntervals, ranks: int, block: int = 1024) -> SequenceLayout:
        """Blocks of ``block`` rows, distributed so that all ranks have about equal numbers of visible pairs and blocks.

        ``mask``: of the whole sequence, on the CPU (``softcap_runtime.masks.row_intervals``). Blocks are assigned from
        the heaviest down, each to the rank with the fewest pairs so far. Raises ValueError for a ``block`` below 1 or
        fewer tokens than ranks.
        """
        how = "RowIntervals of the whole sequence; make them with row_intervals(...)"
        check_type("mask", mask, RowIntervals, how)
        seq_len = mask.q_len
        ranks = _checked(seq_len, ranks, 1)
        block = min(checked_count("block", block), seq_len // ranks)
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

    def _own(self, rank: int) -> tuple[Range, ...]:
        if rank not in range(self.ranks):
            raise ValueError(f"rank: {rank!r}, expected 0 to {self.ranks - 1}; pass mesh.get_local_rank()")
        return self.ranges[rank]

    def count(self, rank: int) -> int:
        """How many rows ``rank`` holds."""
        return length(self._own(rank))

    def rows(self, rank: int) -> Tensor:
        """The rows of ``rank``, ascending: int64 ``[rows]``; also its ``position_ids`` for rotary embeddings."""
        return torch.cat([torch.arange(*own) for own in self._own(rank)])

    def shard(self, x: Tensor, dim: int, rank: int) -> Tensor:
        """The rows of ``rank`` from a whole tensor; a view if they are one range.

        Raises ValueError unless dimension ``dim`` of ``x`` has ``seq_len`` rows.
        """
        _check_rows(x, dim, self.seq_len, f"the layout's {self.seq_len}; pass it whole")
        parts = [x.narrow(dim, start, end - start) for start, end in self._own(rank)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def unshard(self, x: Tensor, dim: int, mesh: DeviceMesh) -> Tensor:
        """The whole tensor on every rank, from each rank's rows in dimension ``dim``; all ranks' gradients are summed.

        Every rank of ``mesh`` calls it. Raises ValueError if ``mesh`` or the number of rows does not fit the layout.
        """
        rank = check_mesh(self, mesh)
        _check_rows(x, dim, self.count(rank), f"the {self.count(rank)} of rank {rank}")
        most = max(self.count(rank) for rank in range(self.ranks))
        rows = x.movedim(dim, 0).contiguous()
        missing = most - rows.shape[0]
        if missing:
            rows = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
        # Renamed in torch 2.13, which warns of the old name.
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
    check_type("layout", layout, SequenceLayout, "a SequenceLayout; make one with SequenceLayout.contiguous(...)")
    check_type("mesh", mesh, DeviceMesh, "a DeviceMesh; make one with torch.distributed.init_device_mesh(...)")
    if mesh.ndim != 1 or mesh.size() != layout.ranks:
        raise ValueError(
            f"mesh: {mesh}, expected one dimension of the layout's {layout.ranks} ranks; pass mesh['name'] of a mesh "
            "with more dimensions"
        )
    return mesh.get_local_rank()


def _checked(seq_len: int, ranks: int, chunks: int) -> int:
    if checked_count("seq_len", seq_len) < checked_count("ranks", ranks) * chunks:
        raise ValueError(
            f"ranks: {ranks} for {seq_len} tokens, expected 1 to {max(1, seq_len // chunks)} of {chunks} rows or more"
        )
    return ranks


def _check_rows(x: Tensor, dim: int, rows: int, expected: str) -> None:
    check_type("x", x, Tensor, "a tensor")
    if dim not in range(-x.dim(), x.dim()):
        raise ValueError(f"dim: {dim!r}, expected one of the {x.dim()} dimensions of x")
    if x.shape[dim] != rows:
        raise ValueError(f"x: {x.shape[dim]} rows in dimension {dim}, expected {expected}")
