"""What vLLM can do on some processors only."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

_HAS_FP8 = re.search(r"\b(avx512f|amx_tile)\b", Path("/proc/cpuinfo").read_text()) is not None

needs_fp8_kv_cache = pytest.mark.skipif(
    not _HAS_FP8, reason="vLLM keeps a KV cache in fp8 only on CPUs with AVX-512 or AMX"
)
