"""A follower: the process of one tensor parallel rank above 0. It runs what its leader sends, and ends with it.

It has no ring and no HTTP, and decides nothing. Its leader is in stage_ranks.py, their messages are in local_link.py.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from vllm.config import VllmConfig
from vllm.utils.system_utils import decorate_logs, set_process_title

from stagewire.config import StageConfig
from stagewire.errors import StagewireError
from stagewire.observe.streams import keep_writing
from stagewire.vllm_plugin.codec.schedules import decode_grammar, decode_schedule, token_digest
from stagewire.vllm_plugin.ranks.local_link import (
    Block,
    CallDone,
    Done,
    LeaderLink,
    RunCall,
    RunSample,
    RunStep,
    encode_failure,
)
from stagewire.vllm_plugin.worker.pipeline_group import RankPlace
from stagewire.vllm_plugin.worker.stage_worker import StageWorker, run_call

__all__ = ["run_follower"]

logger = logging.getLogger("vllm.stagewire")


def run_follower(
    config: StageConfig,
    vllm_config: VllmConfig,
    place: RankPlace,
    connection: Connection[Any, Any],
    failures: Connection[Any, Any],
    block: Block,
) -> NoReturn:
    """The whole process. It ends without teardown, because there is nothing to save, and with its leader
    (`watch_spawned`).

    Args:
        config: the stage's place.
        vllm_config: resolved.
        place: this rank.
        connection: requests from the leader, and answers to it.
        failures: for the reason of an early end, as a `FollowerFailure`.
        block: where the frames of requests lie.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the leader, which ends its followers in order
        signal.signal(number, signal.SIG_IGN)
    keep_writing()
    name = f"Stage{config.stage}_TP{place.rank}"
    set_process_title(name)
    decorate_logs(name)
    code = 0
    try:
        _serve(LeaderLink(connection, block), config, vllm_config, place)
    except Exception as error:
        logger.exception("Stage %d, tensor parallel rank %d failed", config.stage, place.rank)
        code = error.exit_code if isinstance(error, StagewireError) else 1
        text = str(error) if isinstance(error, StagewireError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):
            failures.send_bytes(encode_failure(code, text))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _serve(link: LeaderLink, config: StageConfig, vllm_config: VllmConfig, place: RankPlace) -> None:
    """Returns when the leader has closed its end."""
    worker = StageWorker(config, vllm_config, place)
    link.answer(Done(0))
    while True:
        try:
            request, frames = link.receive()
        except (EOFError, ConnectionError):
            worker.shutdown()
            return
        match request:
            case RunStep(digest, specs):
                schedule_bytes, *tensors = frames
                schedule = decode_schedule(schedule_bytes, worker.adapters.known)
                worker.execute(schedule, digest, specs, tensors)
                link.answer(Done(worker.digest(schedule)))
            case RunSample():
                output = worker.answer(decode_grammar(frames[0]) if frames else None)
                link.answer(Done(token_digest(output)))
            case RunCall(method, first_rank):
                link.answer(CallDone(*run_call(worker, method, frames[0], first_rank)))
