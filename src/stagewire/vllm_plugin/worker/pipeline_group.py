"""The stand-in for vLLM's pipeline-parallel process group.

Models and workers ask `parallel_state._PP` for their place in the pipeline. This object answers without a
torch.distributed group. It hands the worker the tensors that came in, and keeps those that the worker sends. It must
not know how tensors travel.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from stagewire.config import StageConfig
from stagewire.errors import InternalError

__all__ = ["PipelineGroup", "RankPlace", "install"]

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class RankPlace:
    """One tensor parallel rank of a stage.

    ``store``: the file through which the ranks of this stage find each other. The names of their shared memory contain
    its name, so that name must be unique on the machine.
    """

    rank: int
    size: int
    store: Path

    @property
    def name(self) -> str:
        return self.store.name


class _Done:
    """A completed send, as torch.distributed's handles look."""

    def wait(self) -> None: ...

    def is_completed(self) -> bool:
        return True


class PipelineGroup:
    """One stage's view of the pipeline.

    Args:
        stage: this stage; vLLM calls it the rank in the group.
        num_stages: vLLM calls it the world size of the group.
    """

    def __init__(self, stage: int, num_stages: int) -> None:
        self.rank = stage
        self.rank_in_group = stage
        self.local_rank = 0
        self.world_size = num_stages
        self.ranks = list(range(num_stages))
        self.first_rank = 0
        self.last_rank = num_stages - 1
        self.is_first_rank = stage == 0
        self.is_last_rank = stage == num_stages - 1
        self.prev_rank = (stage - 1) % num_stages
        self.next_rank = (stage + 1) % num_stages
        self.unique_name = "pp:stagewire"
        self.use_device_communicator = False
        self.device_communicator = None
        self._incoming: tuple[dict[str, torch.Tensor], Callable[[], None]] | None = None
        self._outgoing: dict[str, torch.Tensor] | None = None

    def __repr__(self) -> str:
        return f"PipelineGroup(stage={self.rank}/{self.world_size})"

    # ---- our side --------------------------------------------------------------------------------------------------

    def put_incoming(self, tensors: dict[str, torch.Tensor], check: Callable[[], None]) -> None:
        """Sets what the next forward pass receives. ``check`` runs after vLLM updated its rows, before it computes."""
        self._incoming = (tensors, check)

    def take_outgoing(self) -> dict[str, torch.Tensor]:
        """What the last forward pass sent. Raises InternalError when it sent nothing."""
        if self._outgoing is None:
            raise InternalError(f"{self!r}: the forward pass sent no tensors")
        tensors, self._outgoing = self._outgoing, None
        return tensors

    def forget(self) -> None:
        """Drops the tensors of a forward pass that failed."""
        self._incoming = self._outgoing = None

    # ---- vLLM's side (GroupCoordinator) ----------------------------------------------------------------------------

    def irecv_tensor_dict(self, *_: Any, **__: Any) -> tuple[dict[str, torch.Tensor], list[Any], list[Any]]:
        if self._incoming is None:
            raise InternalError(f"{self!r}: a forward pass without incoming tensors")
        (tensors, check), self._incoming = self._incoming, None
        return tensors, [], [check]

    def isend_tensor_dict(self, tensors: dict[str, torch.Tensor], *_: Any, **__: Any) -> list[_Done]:
        self._outgoing = tensors
        return [_Done()]

    @contextmanager
    def graph_capture(self, graph_capture_context: Any = None) -> Iterator[Any]:
        yield graph_capture_context

    def destroy(self) -> None: ...

    def __getattr__(self, name: str) -> NoReturn:
        # vLLM probes optional attributes with getattr and hasattr, which expect AttributeError.
        raise AttributeError(f"{type(self).__name__} has no {name!r}: vLLM asks the pipeline group for something new")


def install(config: StageConfig, place: RankPlace) -> PipelineGroup:
    """Initialises torch.distributed for the ranks of one stage and puts the stand-in in place.

    Must run within ``set_current_vllm_config``, and before the worker's ``init_device``, which keeps groups that exist.
    With several ranks it returns when all of them have called it.
    """
    from vllm.distributed import parallel_state
    from vllm.platforms import current_platform

    # All ranks of a stage are on one host, so gloo need not listen on a network interface.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ["VLLM_DIST_IDENT"] = place.name
    if not current_platform.is_cpu():
        _choose_device(place)
    init_method = f"file://{place.store}"
    parallel_state.init_distributed_environment(
        place.size, place.rank, init_method, place.rank, current_platform.dist_backend
    )
    parallel_state.initialize_model_parallel(place.size, 1)
    _unlink_shared_memory(place.name)
    if parallel_state._PP is not None:
        parallel_state._PP.destroy()
    group = PipelineGroup(config.stage, config.num_stages)
    parallel_state._PP = group
    return group


def _choose_device(place: RankPlace) -> None:
    """Does what vLLM's worker does before it makes groups. Here they are made before the worker's ``init_device``."""
    from vllm.config import get_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.platforms import current_platform

    index = current_platform.logical_device_id_to_visible_device_id(place.rank)
    torch.accelerator.set_device_index(torch.device(f"{current_platform.device_type}:{index}"))
    parallel_state.set_custom_all_reduce(not get_current_vllm_config().parallel_config.disable_custom_all_reduce)


def _unlink_shared_memory(name: str) -> None:
    """Removes the names of shared memory that vLLM's CPU communicator would leave behind when a rank is killed.

    All ranks have mapped the segments by now, so only the names go.
    """
    for segment in SHARED_MEMORY.glob(f"{name}-*"):
        with suppress(FileNotFoundError):  # another rank was first
            segment.unlink()
