"""Coverage-guided fuzzing of one target of fuzz/targets.py, with atheris (`pip install atheris`, Python 3.11).

    PYTHONPATH=src:tests python tests/fuzz/run.py TARGET CORPUS [libFuzzer's options, such as -runs=1000000]

CORPUS is a folder: inputs that reach something new are kept there, and the first ones are written to it. An input that
raises, hangs or takes too much memory is written to the current folder and ends the run.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["stagewire"]):
    from fuzz.targets import TARGETS, seeds

    if sys.argv[1] not in ("decode", "tensors", "state"):
        import stagewire.vllm_plugin.codec.schedules
        import stagewire.vllm_plugin.codec.values  # noqa: F401


def main() -> None:
    name, corpus = sys.argv[1], Path(sys.argv[2])
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds(name)):
        (corpus / f"seed-{number}").write_bytes(seed)
    atheris.Setup([sys.argv[0], str(corpus), *sys.argv[3:]], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
