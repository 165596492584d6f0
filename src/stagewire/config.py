"""Parses and checks the flags that give a stage its place in the pipeline, without vLLM, a model or a socket.

Owns the names of the flags and every rule that a stage can check alone. Does not know how vLLM stores arguments.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stagewire.errors import ConfigError
from stagewire.plan.ranges import LayerRange

__all__ = [
    "ALLOW_INSECURE_FLAG",
    "DEFAULT_RECOVERY_TIMEOUT_S",
    "DEFAULT_START_TIMEOUT_S",
    "DEFAULT_STEP_TIMEOUT_S",
    "KEY_FILE_FLAG",
    "Address",
    "StageConfig",
    "is_external",
    "parse_stage",
]

DEFAULT_START_TIMEOUT_S = 600
DEFAULT_RECOVERY_TIMEOUT_S = 600
# As long as vLLM's own multiprocessing executor waits for a step (VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS).
DEFAULT_STEP_TIMEOUT_S = 300
KEY_FILE_FLAG = "--pipeline-key-file"
ALLOW_INSECURE_FLAG = "--pipeline-allow-insecure"


@dataclass(frozen=True)
class Address:
    """Host and port of a stage. The host is a name, an IPv4 address, or an IPv6 address without brackets."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str, flag: str) -> Address:
        """Reads ``host:port`` or ``[v6]:port``.

        Raises:
            ConfigError: ``text`` does not have that form. The message names ``flag``.
        """
        expected = f"{flag} {text!r} is not an address: expected HOST:PORT, for instance 192.168.1.10:15550"
        if "://" in text:
            raise ConfigError(f"{expected} (without tcp:// or another scheme)")
        host, separator, port_text = text.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
            if not _is_ipv6(host):
                raise ConfigError(expected)
        elif ":" in host:
            raise ConfigError(f"{expected}; an IPv6 address goes in brackets: [{host}]:{port_text}")
        if not separator or not host or any(c.isspace() for c in host) or not port_text.isascii():
            raise ConfigError(expected)
        if not port_text.isdigit() or len(port_text) > 5 or not 0 < int(port_text) < 65536:
            raise ConfigError(f"{flag} {text!r}: the port must be a number from 1 to 65535")
        return cls(host, int(port_text))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if _is_ipv6(self.host) else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class StageConfig:
    """The settings of one stage. ``layers`` is half-open; times are in seconds."""

    stage: int
    num_stages: int
    layers: LayerRange
    bind_port: int
    predecessor: Address
    bind_host: str | None = None
    pipeline_id: str | None = None
    start_timeout_s: float = DEFAULT_START_TIMEOUT_S
    step_timeout_s: float = DEFAULT_STEP_TIMEOUT_S
    recovery_timeout_s: float = DEFAULT_RECOVERY_TIMEOUT_S
    health_port: int | None = None  # of a stage without an API
    stands_by: bool = False  # replaces the process that has this stage's port when that one ends
    lora_roots: tuple[str, ...] = ()
    lora_modules: tuple[tuple[str, str], ...] = ()  # (name, path)
    key_file: str | None = None
    allow_insecure: bool = False

    @property
    def is_head(self) -> bool:
        return self.stage == 0

    @property
    def is_tail(self) -> bool:
        return self.stage == self.num_stages - 1

    @property
    def predecessor_stage(self) -> int:
        return (self.stage - 1) % self.num_stages

    @property
    def successor_stage(self) -> int:
        return (self.stage + 1) % self.num_stages


# Flags that need --pipeline-stage-mode external. The keys are argparse destinations.
_FLAGS = {
    "pipeline_stage_idx": "--pipeline-stage-idx",
    "pipeline_total_stages": "--pipeline-total-stages",
    "pipeline_layer_range": "--pipeline-layer-range",
    "pipeline_local_bind_port": "--pipeline-local-bind-port",
    "pipeline_local_bind_host": "--pipeline-local-bind-host",
    "pipeline_prev_stage_addr": "--pipeline-prev-stage-addr",
    "pipeline_prev_stage_service_addr": "--pipeline-prev-stage-service-addr",
    "pipeline_id": "--pipeline-id",
    "pipeline_start_timeout": "--pipeline-start-timeout",
    "pipeline_step_timeout": "--pipeline-step-timeout",
    "pipeline_recovery_timeout": "--pipeline-recovery-timeout",
    "pipeline_lora_root": "--pipeline-lora-root",
    "pipeline_standby": "--pipeline-standby",
    "pipeline_health_port": "--pipeline-health-port",
    "pipeline_key_file": KEY_FILE_FLAG,
    "pipeline_allow_insecure": ALLOW_INSECURE_FLAG,
    "external_pp_worker": "--external-pp-worker",
}


def is_external(flags: Mapping[str, Any]) -> bool:
    """Whether these arguments ask for a stage. Raises ConfigError for stage flags without the stage mode."""
    if flags.get("pipeline_stage_mode") == "external":
        return True
    given = [name for key, name in _FLAGS.items() if _is_given(flags.get(key))]
    if given:
        raise ConfigError(f"{', '.join(given)} given without --pipeline-stage-mode external: add it, or drop the rest")
    return False


def _is_given(value: Any) -> bool:
    """Whether a flag was given. ``is`` matters, because stage 0 equals False."""
    return value is not None and value is not False


def parse_stage(flags: Mapping[str, Any]) -> StageConfig:
    """Reads the flags of one stage.

    Args:
        flags: argparse destinations (``pipeline_stage_idx`` and so on) to values. A missing key counts as not given.

    Raises:
        ConfigError: the first flag that is wrong. The message names it and what to do.
    """
    num_stages = _required_int(flags, "pipeline_total_stages", "how many stages there are")
    if num_stages < 2:
        raise ConfigError(
            f"--pipeline-total-stages {num_stages}: a pipeline has at least 2 stages; "
            "for one process drop the --pipeline flags, vLLM serves it alone"
        )
    stage = _required_int(flags, "pipeline_stage_idx", "this stage's index, counted from 0")
    if not 0 <= stage < num_stages:
        raise ConfigError(
            f"--pipeline-stage-idx {stage} is outside --pipeline-total-stages {num_stages}: "
            f"the stages are 0 to {num_stages - 1}"
        )
    _check_worker_flag(stage, bool(flags.get("external_pp_worker")))
    if stage == 0 and flags.get("pipeline_standby"):
        raise ConfigError("--pipeline-standby on stage 0: a head's clients and requests cannot be taken over")
    layers_text = flags.get("pipeline_layer_range")
    if not layers_text:
        raise ConfigError(
            f"stage {stage} has no --pipeline-layer-range: say which layers it owns, for instance 0-8 for layers 0 to 7"
        )
    return StageConfig(
        stage=stage,
        num_stages=num_stages,
        layers=LayerRange.parse(str(layers_text)),
        bind_port=_port(flags),
        predecessor=_predecessor(flags, stage, num_stages),
        bind_host=flags.get("pipeline_local_bind_host"),
        pipeline_id=flags.get("pipeline_id"),
        start_timeout_s=_seconds(flags, "pipeline_start_timeout", DEFAULT_START_TIMEOUT_S),
        step_timeout_s=_seconds(flags, "pipeline_step_timeout", DEFAULT_STEP_TIMEOUT_S),
        recovery_timeout_s=_seconds(flags, "pipeline_recovery_timeout", DEFAULT_RECOVERY_TIMEOUT_S),
        health_port=_health_port(flags, stage),
        stands_by=bool(flags.get("pipeline_standby")),
        lora_roots=tuple(map(str, flags.get("pipeline_lora_root") or ())),
        # A flag of vLLM, which has parsed it already.
        lora_modules=tuple((module.name, module.path) for module in flags.get("lora_modules") or ()),
        key_file=_key_file(flags),
        allow_insecure=bool(flags.get("pipeline_allow_insecure")),
    )


def _key_file(flags: Mapping[str, Any]) -> str | None:
    path = flags.get("pipeline_key_file")
    if path is None:
        return None
    if not str(path).strip():
        raise ConfigError(f"{KEY_FILE_FLAG} names no file: give the path of one made by `stagewire keys FILE`")
    if flags.get("pipeline_allow_insecure"):
        raise ConfigError(f"{KEY_FILE_FLAG} and {ALLOW_INSECURE_FLAG}: with a key nothing is insecure; drop one")
    return str(path)


def _check_worker_flag(stage: int, is_worker: bool) -> None:
    if stage == 0 and is_worker:
        raise ConfigError("--external-pp-worker on stage 0: the head serves the API; only stages 1 and up are workers")
    if stage > 0 and not is_worker:
        raise ConfigError(f"stage {stage} needs --external-pp-worker: only stage 0 serves the API")


def _predecessor(flags: Mapping[str, Any], stage: int, num_stages: int) -> Address:
    """The predecessor's address. Either flag works on any stage; the quick start uses one of them only on the head."""
    given = {
        _FLAGS[key]: str(flags[key])
        for key in ("pipeline_prev_stage_addr", "pipeline_prev_stage_service_addr")
        if flags.get(key)
    }
    wanted = (stage - 1) % num_stages
    if not given:
        flag = "--pipeline-prev-stage-addr" if stage == 0 else "--pipeline-prev-stage-service-addr"
        raise ConfigError(
            f"stage {stage} has no predecessor's address: give {flag} HOST:PORT of stage {wanted}"
            + (" (the last stage: the ring ends at the head)" if stage == 0 else "")
        )
    addresses = {Address.parse(text, flag) for flag, text in given.items()}
    if len(addresses) > 1:
        pairs = " but ".join(f"{flag} says {text}" for flag, text in given.items())
        raise ConfigError(f"{pairs}: a stage has one predecessor (stage {wanted}); give one of the two flags")
    return addresses.pop()


def _port(flags: Mapping[str, Any]) -> int:
    port = _required_int(flags, "pipeline_local_bind_port", "the port on which the next stage reaches this one")
    if not 0 < port < 65536:
        raise ConfigError(f"--pipeline-local-bind-port {port}: the port must be a number from 1 to 65535")
    return port


def _health_port(flags: Mapping[str, Any], stage: int) -> int | None:
    if flags.get("pipeline_health_port") is None:
        return None
    if stage == 0:
        raise ConfigError("--pipeline-health-port on stage 0: its own --port answers /live, /health and /ready")
    port = _required_int(flags, "pipeline_health_port", "")
    if not 0 < port < 65536:
        raise ConfigError(f"--pipeline-health-port {port}: the port must be a number from 1 to 65535")
    return port


def _required_int(flags: Mapping[str, Any], key: str, meaning: str) -> int:
    value = flags.get(key)
    if value is None:
        raise ConfigError(f"--pipeline-stage-mode external needs {_FLAGS[key]}: {meaning}")
    try:
        if isinstance(value, (bool, float)):
            raise ValueError  # from a YAML file; int() would round
        return int(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{_FLAGS[key]} {value!r} is not a whole number") from None


def _seconds(flags: Mapping[str, Any], key: str, default: float) -> float:
    value = flags.get(key)
    if value is None:
        return default
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{_FLAGS[key]} {value!r} is not a number of seconds") from None
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"{_FLAGS[key]} {value}: must be more than 0 seconds, every wait ends")
    return seconds


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.partition("%")[0]).version == 6
    except ValueError:
        return False
