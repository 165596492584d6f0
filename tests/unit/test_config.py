"""A stage's flags: the quick start's own lines, and everything that a person can get wrong."""

from __future__ import annotations

from typing import Any

import pytest

from stagewire.config import (
    DEFAULT_START_TIMEOUT_S,
    DEFAULT_STEP_TIMEOUT_S,
    Address,
    is_external,
    parse_stage,
)
from stagewire.errors import ConfigError
from stagewire.plan.ranges import LayerRange

HEAD: dict[str, Any] = {
    "pipeline_stage_mode": "external",
    "pipeline_stage_idx": 0,
    "pipeline_total_stages": 4,
    "pipeline_layer_range": "0-8",
    "pipeline_local_bind_port": 15550,
    "pipeline_prev_stage_addr": "127.0.0.1:15554",
}
WORKER: dict[str, Any] = {
    "pipeline_stage_mode": "external",
    "pipeline_stage_idx": 3,
    "pipeline_total_stages": 4,
    "pipeline_layer_range": "24-32",
    "pipeline_local_bind_port": 15554,
    "pipeline_prev_stage_service_addr": "127.0.0.1:15550",
    "external_pp_worker": True,
}


def without(flags: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if name not in names}


def test_the_quick_starts_head() -> None:
    config = parse_stage(HEAD)
    assert (config.stage, config.num_stages, config.layers) == (0, 4, LayerRange(0, 8))
    assert (config.bind_port, config.predecessor) == (15550, Address("127.0.0.1", 15554))
    assert (config.is_head, config.is_tail) == (True, False)
    assert (config.predecessor_stage, config.successor_stage) == (3, 1)
    assert (config.start_timeout_s, config.step_timeout_s) == (DEFAULT_START_TIMEOUT_S, DEFAULT_STEP_TIMEOUT_S)
    assert (config.bind_host, config.pipeline_id) == (None, None)


def test_the_quick_starts_tail() -> None:
    config = parse_stage(WORKER)
    assert (config.is_head, config.is_tail) == (False, True)
    assert (config.predecessor_stage, config.successor_stage) == (2, 0)


@pytest.mark.parametrize("flags", [HEAD, WORKER])
def test_either_predecessor_flag_on_any_stage(flags: dict[str, Any]) -> None:
    names = ("pipeline_prev_stage_addr", "pipeline_prev_stage_service_addr")
    for name in names:
        assert parse_stage({**without(flags, *names), name: "h:1"}).predecessor == Address("h", 1)
    assert parse_stage({**flags, **dict.fromkeys(names, "h:1")}).predecessor == Address("h", 1)


def test_how_connections_are_protected() -> None:
    assert (parse_stage(HEAD).key_file, parse_stage(HEAD).allow_insecure) == (None, False)
    assert parse_stage({**HEAD, "pipeline_key_file": "/k"}).key_file == "/k"
    assert parse_stage({**HEAD, "pipeline_allow_insecure": True}).allow_insecure
    for flag in ("--pipeline-key-file", "--pipeline-allow-insecure"):
        with pytest.raises(ConfigError, match=f"{flag} given without"):
            is_external({flag[2:].replace("-", "_"): "x"})


def test_numbers_may_be_text() -> None:
    flags = {**HEAD, "pipeline_stage_idx": "0", "pipeline_total_stages": "4", "pipeline_start_timeout": "1.5"}
    assert parse_stage(flags).start_timeout_s == 1.5


@pytest.mark.parametrize(
    ("base", "change", "says"),
    [
        (HEAD, {"pipeline_total_stages": None}, "needs --pipeline-total-stages"),
        (HEAD, {"pipeline_total_stages": 1}, "at least 2 stages"),
        (HEAD, {"pipeline_total_stages": 0}, "at least 2 stages"),
        (HEAD, {"pipeline_total_stages": "four"}, "--pipeline-total-stages 'four' is not a whole number"),
        (HEAD, {"pipeline_total_stages": 4.5}, "--pipeline-total-stages 4.5 is not a whole number"),
        (HEAD, {"pipeline_total_stages": [4]}, "is not a whole number"),
        (HEAD, {"pipeline_stage_idx": None}, "needs --pipeline-stage-idx"),
        (HEAD, {"pipeline_stage_idx": True}, "--pipeline-stage-idx True is not a whole number"),
        (WORKER, {"pipeline_stage_idx": 4}, "--pipeline-stage-idx 4 is outside.*the stages are 0 to 3"),
        (WORKER, {"pipeline_stage_idx": -1}, "--pipeline-stage-idx -1 is outside"),
        (HEAD, {"pipeline_layer_range": None}, "stage 0 has no --pipeline-layer-range"),
        (HEAD, {"pipeline_layer_range": ""}, "stage 0 has no --pipeline-layer-range"),
        (HEAD, {"pipeline_layer_range": "8-0"}, "reversed"),
        (HEAD, {"pipeline_layer_range": "8-8"}, "empty"),
        (HEAD, {"pipeline_layer_range": "0:8"}, "malformed"),
        (HEAD, {"external_pp_worker": True}, "--external-pp-worker on stage 0"),
        (WORKER, {"external_pp_worker": False}, "stage 3 needs --external-pp-worker"),
        (HEAD, {"pipeline_local_bind_port": None}, "needs --pipeline-local-bind-port"),
        (HEAD, {"pipeline_local_bind_port": 0}, "from 1 to 65535"),
        (HEAD, {"pipeline_local_bind_port": 65536}, "from 1 to 65535"),
        (HEAD, {"pipeline_prev_stage_addr": None}, "give --pipeline-prev-stage-addr HOST:PORT of stage 3 .the last"),
        (WORKER, {"pipeline_prev_stage_service_addr": None}, "give --pipeline-prev-stage-service-addr .* of stage 2"),
        (HEAD, {"pipeline_prev_stage_addr": "127.0.0.1"}, "expected HOST:PORT"),
        (HEAD, {"pipeline_prev_stage_service_addr": "h:2"}, "a stage has one predecessor"),
        (HEAD, {"pipeline_start_timeout": 0}, "more than 0 seconds"),
        (HEAD, {"pipeline_start_timeout": -1}, "more than 0 seconds"),
        (HEAD, {"pipeline_step_timeout": "inf"}, "more than 0 seconds"),
        (HEAD, {"pipeline_health_port": 9000}, "its own --port answers"),
        (HEAD, {"pipeline_standby": True}, "cannot be taken over"),
        (WORKER, {"pipeline_health_port": 70000}, "1 to 65535"),
        (HEAD, {"pipeline_step_timeout": "nan"}, "more than 0 seconds"),
        (HEAD, {"pipeline_key_file": ""}, "--pipeline-key-file names no file"),
        (HEAD, {"pipeline_key_file": "k", "pipeline_allow_insecure": True}, "with a key nothing is insecure"),
        (HEAD, {"pipeline_step_timeout": "soon"}, "--pipeline-step-timeout 'soon' is not a number"),
    ],
)
def test_what_is_wrong_is_named(base: dict[str, Any], change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_stage({**base, **change})


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("192.168.1.10:15550", "192.168.1.10", 15550),
        ("node-a.cluster.local:1", "node-a.cluster.local", 1),
        ("[::1]:65535", "::1", 65535),
        ("[fe80::1%eth0]:15550", "fe80::1%eth0", 15550),
    ],
)
def test_addresses_there_and_back(text: str, host: str, port: int) -> None:
    address = Address.parse(text, "--flag")
    assert address == Address(host, port)
    assert str(address) == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected HOST:PORT"),
        ("host", "expected HOST:PORT"),
        (":15550", "expected HOST:PORT"),
        ("host:", "from 1 to 65535"),
        ("host:0", "from 1 to 65535"),
        ("host:65536", "from 1 to 65535"),
        ("host:-1", "from 1 to 65535"),
        ("host:http", "from 1 to 65535"),
        ("host:" + "9" * 5000, "from 1 to 65535"),
        ("host:١٢", "expected HOST:PORT"),
        ("ho st:1", "expected HOST:PORT"),
        ("tcp://host:1", "without tcp://"),
        ("::1:15550", r"in brackets: \[::1\]:15550"),
        ("[host]:1", "expected HOST:PORT"),
        ("[::1]", "expected HOST:PORT"),
    ],
)
def test_malformed_addresses(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        Address.parse(text, "--flag")
    assert "--flag" in str(caught.value)


def test_only_the_stage_mode_makes_a_stage() -> None:
    assert is_external(HEAD)
    assert not is_external({})
    assert not is_external({"pipeline_stage_mode": None, "external_pp_worker": False, "model": "m"})


@pytest.mark.parametrize("name", [name for name in {**HEAD, **WORKER} if name != "pipeline_stage_mode"])
def test_a_stage_flag_without_the_stage_mode(name: str) -> None:
    flag = "--" + name.replace("_", "-")
    with pytest.raises(ConfigError, match=f"{flag} given without --pipeline-stage-mode external"):
        is_external({name: {**WORKER, **HEAD}[name]})
