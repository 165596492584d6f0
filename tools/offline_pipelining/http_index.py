#!/usr/bin/env python3
"""One HTTP entry point before all stages of a pipeline: `stagewire front`, with this checkout's environment."""

import importlib.util
import os
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[2]
own_python = root / ".venv" / "bin" / "python"
if importlib.util.find_spec("vllm") is None and own_python.exists() and Path(sys.prefix) != own_python.parents[1]:
    os.execv(own_python, [str(own_python), *sys.argv])
sys.path.insert(0, str(root / "src"))

from stagewire.__main__ import main  # noqa: E402

sys.argv.insert(1, "front")
sys.exit(main())
