"""Which cores a local CPU stage may use. Pure."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["assign_cores"]


def assign_cores(cores: Sequence[int], num_stages: int, num_ranks: int = 1) -> list[tuple[int, ...]]:
    """Contiguous groups, as even as possible, one for each stage; the first stages get the cores left over.

    With fewer cores than processes (``num_ranks`` for each stage) every group is empty: such stages run one thread each
    and are not pinned, because several processes pinned to one core wait for it in turn while another core is idle.
    """
    if len(cores) < num_stages * num_ranks:
        return [()] * num_stages
    size, left_over = divmod(len(cores), num_stages)
    ends = [size * (stage + 1) + min(stage + 1, left_over) for stage in range(num_stages)]
    return [tuple(cores[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
