"""A whole ring in one thread: stages on a `MemoryNetwork` with a clock that only moves when it is told to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import msgspec

from stagewire.config import Address, StageConfig
from stagewire.errors import StageLost, StagewireError
from stagewire.plan.ranges import LayerRange
from stagewire.ring.observer import Delivery, Item, Observer
from stagewire.ring.ring import Ring
from stagewire.ring.rules.actions import Data
from stagewire.ring.rules.phases import Phase
from stagewire.ring.transport.memory import MemoryNetwork, MemoryTransport
from stagewire.wire.messages import Call, CallResult, Message, Reply, StageIdentity, StageReport

RANGES = ((0, 8), (8, 16), (16, 24), (24, 32))
SHARED = {"model": "m1", "--dtype": "float32", "--max-model-len": "4096", "vLLM version": "0.32.0"}
# (own port, predecessor's port) per stage, as in quickstart.md; and with a port of its own for each.
QUICKSTART_PORTS = ((15550, 15554), (15550, 15550), (15550, 15550), (15554, 15550))
OWN_PORTS = ((15550, 15553), (15551, 15550), (15552, 15551), (15553, 15552))


@dataclass
class Clock:
    seconds: float = 100.0

    def __call__(self) -> int:
        return int(self.seconds * 1e9)


@dataclass
class Record(Observer):
    """Everything that one stage's ring told its observer."""

    logs: list[str] = field(default_factory=list)
    bound: list[str] = field(default_factory=list)
    opened: list[tuple[int, tuple[StageIdentity, ...]]] = field(default_factory=list)
    broken: list[tuple[int, StageLost]] = field(default_factory=list)
    errors: list[StagewireError] = field(default_factory=list)
    stops: list[str] = field(default_factory=list)
    own_report: Callable[[], StageReport | None] = lambda: None
    reports: list[list[StageReport]] = field(default_factory=list)

    def report(self) -> StageReport | None:
        return self.own_report()

    def on_reports(self, reports: Sequence[StageReport]) -> None:
        self.reports.append(list(reports))

    def on_log(self, text: str, is_warning: bool) -> None:
        self.logs.append(text)

    def on_bound(self, address: Address) -> None:
        self.bound.append(str(address))

    def on_open(self, epoch: int, identities: tuple[StageIdentity, ...]) -> None:
        self.opened.append((epoch, identities))

    def on_broken(self, epoch: int, error: StageLost) -> None:
        self.broken.append((epoch, error))

    def on_failed(self, error: StagewireError) -> None:
        self.errors.append(error)

    def on_stopped(self, text: str) -> None:
        self.stops.append(text)

    @property
    def log(self) -> str:
        return "\n".join(self.logs)


def make_config(
    stage: int,
    ports: Sequence[tuple[int, int]] = OWN_PORTS,
    layers: tuple[int, int] | None = None,
    num_stages: int = 4,
    bind_port: int | None = None,
    predecessor_port: int | None = None,
) -> StageConfig:
    own, before = ports[stage] if stage < len(ports) else (0, 0)
    return StageConfig(
        stage=stage,
        num_stages=num_stages,
        layers=LayerRange(*(layers or RANGES[stage])),
        bind_port=bind_port or own,
        predecessor=Address("127.0.0.1", predecessor_port or before),
        start_timeout_s=60.0,
        recovery_timeout_s=120.0,
    )


def make_identity(config: StageConfig, incarnation: str = "one", pipeline_id: str = "", **shared: str) -> StageIdentity:
    return StageIdentity(
        config.stage,
        config.num_stages,
        config.layers.start,
        config.layers.end,
        1 + config.stage % 2,
        incarnation,
        pipeline_id,
        {**SHARED, **shared},
    )


def make_report(stage: int, **changes: object) -> StageReport:
    start, end = RANGES[stage]
    report = StageReport(stage, start, end, "serving", 100 + stage, "here", "127.0.0.1:1", 5, 1 << 30, 0, 10, 0, 7)
    return msgspec.structs.replace(report, **changes)


@dataclass
class Stage:
    """One process of the pipeline, alive while ``is_running``."""

    ring: Ring
    record: Record
    transport: MemoryTransport
    is_running: bool = True
    is_frozen: bool = False

    @property
    def phase(self) -> Phase:
        return self.ring.state.phase

    @property
    def index(self) -> int:
        return self.ring.config.stage

    def send(self, message: Data, payloads: Sequence[bytes] = ()) -> None:
        """In the epoch that this stage is in."""
        self.ring.send(msgspec.structs.replace(message, epoch=self.ring.state.epoch), payloads)

    def deliveries(self) -> list[Message]:
        return [item.message for item in self._inbox() if isinstance(item, Delivery)]

    def _inbox(self) -> list[Item | StagewireError | None]:
        return [self.ring.take(0) for _ in range(self.ring.inbox.qsize())]

    @property
    def error(self) -> str:
        """The one error that it reported."""
        assert len(self.record.errors) == 1, (self.ring, self.record)
        return str(self.record.errors[0])


class MemoryRing:
    """Processes of one host and their network. Nothing moves but by `turn`, `settle` and `wait`."""

    def __init__(self, ports: Sequence[tuple[int, int]] = OWN_PORTS) -> None:
        self.ports = ports
        self.network = MemoryNetwork()
        self.clock = Clock()
        self.stages: list[Stage] = []
        self._num_started = 0

    def start(
        self,
        config: StageConfig | int,
        identity: StageIdentity | None = None,
        shared: Mapping[str, str] = MappingProxyType({}),
    ) -> Stage:
        """Starts a process for a stage, with an incarnation of its own."""
        if isinstance(config, int):
            config = make_config(config, self.ports)
        self._num_started += 1
        incarnation = f"process {self._num_started}"
        identity = msgspec.structs.replace(identity or make_identity(config, **shared), incarnation=incarnation)
        transport = MemoryTransport(self.network)
        record = Record()
        first_epoch = 1000 * self._num_started
        ring = Ring(config, identity, transport, record, clock_ns=self.clock, first_epoch=first_epoch)
        stage = Stage(ring, record, transport)
        self.stages.append(stage)
        return stage

    def start_all(self, order: Sequence[int] = (0, 1, 2, 3)) -> list[Stage]:
        """All stages, one after another, each with time to look around before the next; returned by index."""
        for index in order:
            self.start(index)
            self.settle()
        self.wait(3)
        return sorted(self.stages, key=lambda stage: stage.index)

    def start_serving(self, ports: Sequence[tuple[int, int]] | None = None) -> list[Stage]:
        self.ports = ports or self.ports
        stages = self.start_all()
        self.call(stages)
        for stage in stages:
            stage.deliveries()
        return stages

    def call(self, stages: Sequence[Stage], call_id: int = 1) -> None:
        """A call and its answers go once round, so that every stage serves."""
        stages[0].send(Call(0, call_id, "check_health"), [b"args"])
        self.settle()
        results: list[CallResult] = []
        for stage in stages[1:]:
            results.append(CallResult(stage.index, 0, "", ""))
            stage.send(Reply(0, call_id, list(results)), [b"r"] * len(results))
            self.settle()

    def turn(self) -> None:
        for stage in self.stages:
            if not stage.is_running or stage.is_frozen:
                continue
            if not stage.ring.turn(0):
                self.kill(stage)

    def settle(self) -> None:
        """Enough turns at one instant for anything to go round twice."""
        for _ in range(24):
            self.turn()

    def wait(self, seconds: float, step_s: float = 0.5) -> None:
        until = self.clock.seconds + seconds
        while self.clock.seconds < until:
            self.clock.seconds += step_s
            for _ in range(6):
                self.turn()

    def wait_until(self, condition: Callable[[], bool], limit_s: float = 90) -> None:
        until = self.clock.seconds + limit_s
        while not condition():
            assert self.clock.seconds < until, [stage.ring for stage in self.stages]
            self.wait(0.5)

    def kill(self, stage: Stage) -> None:
        """The process is gone: its connections end, nobody is told why."""
        stage.is_running = False
        stage.transport.close()


def assert_whole(stages: Sequence[Stage]) -> None:
    """All open, in one epoch; the head knows everybody in order, each other stage those before it."""
    assert [stage.phase for stage in stages] == [Phase.OPEN] * len(stages), [stage.ring for stage in stages]
    assert len({stage.ring.state.epoch for stage in stages}) == 1
    everybody = tuple(stage.ring.state.identity for stage in stages)
    for stage in stages:
        epoch, identities = stage.record.opened[-1]
        assert epoch == stages[0].ring.state.epoch
        assert identities == everybody[: stage.index or None]
    assert not any(stage.record.errors for stage in stages)
