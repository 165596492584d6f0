"""One stage's end of a ring in a process of its own, without a model: prints what happens to it, a line each.

    python ring_stage.py STAGE NUM_STAGES BIND_PORT PREDECESSOR [FLAG=VALUE]...

FLAG is one of a stage's own, such as `pipeline_local_bind_host`, or a constant of the ring, such as
`rules.timeouts.WAIT_LINE_INTERVAL_S`, which a test shortens. A line on standard input at the head is a number: a
call with a payload of so many bytes goes round, and every stage says so.
"""

from __future__ import annotations

import functools
import importlib
import os
import queue
import select
import sys
import time
from collections.abc import Sequence

from stagewire.config import Address, StageConfig, parse_stage
from stagewire.errors import ConfigError, StageLost, StagewireError
from stagewire.ring.observer import Delivery, Observer
from stagewire.ring.ring import Ring, new_incarnation
from stagewire.ring.transport import hosts
from stagewire.ring.transport.security import secure_stage
from stagewire.ring.transport.zmq_transport import ZmqTransport
from stagewire.wire.messages import Call, CallResult, Reply, StageIdentity
from unit.ring_harness import make_identity

MAX_FRAME_BYTES = 64 << 20


def say(text: str) -> None:
    print(text, flush=True)


class Teller(Observer):
    def on_log(self, text: str, is_warning: bool) -> None:
        say(text)

    def on_bound(self, address: Address) -> None:
        say(f"bound {address}")

    def on_open(self, epoch: int, identities: tuple[StageIdentity, ...]) -> None:
        say("open")

    def on_broken(self, epoch: int, error: StageLost) -> None:
        say(f"broken: {error}")

    def on_failed(self, error: StagewireError) -> None:
        say(f"failed {error.exit_code}: {error}")


def read_config(words: Sequence[str]) -> StageConfig:
    stage, num_stages, bind_port, predecessor, *others = words
    first = int(stage)
    flags = dict(word.partition("=")[::2] for word in others)
    for name in [name for name in flags if "." in name]:
        module, _, constant = name.rpartition(".")
        setattr(importlib.import_module(f"stagewire.ring.{module}"), constant, float(flags.pop(name)))
    place = {
        "pipeline_stage_idx": first,
        "pipeline_total_stages": num_stages,
        "pipeline_layer_range": f"{first}-{first + 1}",
        "pipeline_local_bind_port": bind_port,
        "pipeline_prev_stage_addr": predecessor,
        "external_pp_worker": first > 0,
    }
    return parse_stage({**place, **flags})


def main() -> int:
    config = read_config(sys.argv[1:])
    try:
        secured = secure_stage(config)
    except ConfigError as error:
        say(f"failed {error.exit_code}: {error}")
        return error.exit_code
    find_host = functools.partial(hosts.bind_host, config)
    transport = ZmqTransport(secured.host, MAX_FRAME_BYTES, secured.security, find_host=find_host)
    ring = Ring(config, make_identity(config, new_incarnation()), transport, Teller())
    ring.start()
    try:
        while True:
            serve(config, ring)
    except StagewireError as error:
        return error.exit_code


def serve(config: StageConfig, ring: Ring) -> None:
    if config.is_head and select.select([0], [], [], 0)[0]:
        if not (line := os.read(0, 100)):
            time.sleep(0.1)
            return
        ring.send(Call(ring.state.epoch, 1, "check_health"), [bytes(int(line))])
    try:
        item = ring.receive(0.1)
    except queue.Empty:
        return
    if isinstance(item, Delivery) and isinstance(item.message, (Call, Reply)):
        say(f"got {type(item.message).__name__} {sum(map(len, item.payloads))}")
        if isinstance(item.message, Call):
            results = [CallResult(stage, 0, "", "") for stage in range(1, config.stage + 1)]
            ring.send(Reply(item.message.epoch, item.message.call_id, results), [b"r"] * len(results))


if __name__ == "__main__":
    sys.exit(main())
