"""The KV cache of a stage on CPU: what is more than its container leaves is refused with a figure that fits."""

from __future__ import annotations

import pytest

from stagewire import machine
from stagewire.config import Address, StageConfig
from stagewire.errors import ConfigError
from stagewire.plan.ranges import LayerRange
from stagewire.vllm_plugin.worker import cpu

GIB = 1 << 30


@pytest.fixture
def config() -> StageConfig:
    return StageConfig(1, 2, LayerRange(3, 6), 15551, Address("127.0.0.1", 15550))


@pytest.fixture(autouse=True)
def container(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 GiB, of which 3 are free."""
    monkeypatch.setattr(machine, "memory_bytes", lambda: 4 * GIB)
    monkeypatch.setattr(machine, "available_bytes", lambda: 3 * GIB)


@pytest.mark.parametrize("kv_bytes", [None, 0, GIB, 3 * GIB])
def test_what_fits(kv_bytes: int | None, config: StageConfig) -> None:
    cpu.check_kv_room(config, kv_bytes, 1)


@pytest.mark.parametrize(("num_ranks", "fits"), [(1, 1024), (2, 614)])
def test_what_does_not_fit_is_refused_with_what_does(num_ranks: int, fits: int, config: StageConfig) -> None:
    with pytest.raises(ConfigError) as caught:
        cpu.check_kv_room(config, 3 * GIB + 1, num_ranks)
    assert "stage 1's KV cache of 3.22 GB is more than the 3.22 GB that are free" in str(caught.value)
    assert f"--kv-cache-memory-bytes {fits}M" in str(caught.value)
    assert 2 * num_ranks * fits << 20 <= 3 * GIB, "all stages and ranks together"


def test_more_blocks_than_the_container_has_memory() -> None:
    cpu.check_kv_memory(4096, 1 << 20)
    with pytest.raises(ConfigError, match=r"take 4\.30 GB here and this machine, or this container, has 4\.29 GB"):
        cpu.check_kv_memory(4097, 1 << 20)
