#!/usr/bin/env python3
"""Checks or calculates layer ranges: `stagewire plan`, from a bare clone, without installing it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from stagewire.commands.plan import main

sys.exit(main())
