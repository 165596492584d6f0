#!/usr/bin/env python3
"""Cuts a checkpoint into one folder for each stage: `stagewire export`, from a bare clone, without installing it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from stagewire.commands.export import main

sys.exit(main())
