"""Ways to write vLLM's arguments, and what they mean: for the launcher's own reading and for vLLM's parser alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["SPELLINGS", "Spelling"]


@dataclass(frozen=True)
class Spelling:
    """``typed``, with FILE for a file of ``content``; ``given``: which of the launcher's flags that sets."""

    typed: str
    given: frozenset[str] = frozenset()
    num_ranks: int = 1
    content: str = ""

    def __str__(self) -> str:
        return f"{self.typed} {self.content!r}" if self.content else self.typed

    def words(self, folder: Path) -> list[str]:
        path = folder / "settings.yaml"
        path.write_text(self.content or "dtype: float32\n")
        return [str(path) if word == "FILE" else word for word in self.typed.split()]


TP = frozenset({"--tensor-parallel-size"})
OVERRIDES = frozenset({"--hf-overrides", "--config-format"})
TLS = frozenset({"--ssl-keyfile", "--ssl-certfile"})
SPELLINGS = (
    Spelling("--dtype float32"),
    Spelling("-tp 2", TP, 2),
    Spelling("-tp=2", TP, 2),
    Spelling("--tensor-parallel-size 2", TP, 2),
    Spelling("--tensor_parallel_size=2", TP, 2),
    Spelling("--tensor-par 2", TP, 2),
    Spelling("--tensor_par=2", TP, 2),
    Spelling("-tp 4 --tensor-parallel-size 2", TP, 2),
    Spelling("--tensor-parallel-size 2 --no-enable-prefix-caching -tp 4", TP, 4),
    Spelling("--served-model-name tensor-parallel-size --max-num-seqs 2"),
    Spelling("--compilation-config.mode 0 --dtype float32"),
    Spelling("--ssl_keyfile k --ssl-certfile=c_d", TLS),
    Spelling("--ssl-key k --ssl-certf c", TLS),
    Spelling("--port 9000 --host ::1", frozenset({"--port", "--host"})),
    Spelling("--uds=/tmp/a_b", frozenset({"--uds"})),
    Spelling("--pipeline_start_timeout 9", frozenset({"--pipeline-start-timeout"})),
    Spelling("--load_format=safetensors --hf-config-path a_b", frozenset({"--load-format", "--hf-config-path"})),
    Spelling("--hf-overrides.num_hidden_layers 4 --hf_overrides.text_config.a_b=x --config-format hf", OVERRIDES),
    Spelling("--config FILE", OVERRIDES, content="hf-overrides: {num_hidden_layers: 4}\nconfig_format: hf\n"),
    Spelling("--config FILE"),
    Spelling("--config FILE", TP, 2, "tensor-parallel-size: 2\n"),
    Spelling("--config FILE", TP, 2, "tensor_parallel_size: 2\ndtype: float32\n"),
    Spelling("--config FILE -tp 4", TP, 4, "tensor-parallel-size: 2\n"),
    Spelling("-tp 4 --config FILE", TP, 4, "tensor-parallel-size: 2\n"),
    Spelling("--dtype float32 --config FILE", TLS, 1, "ssl-keyfile: k\nssl_certfile: c\n"),
    Spelling("--config FILE", frozenset({"--port", "--host"}), 1, "port: 9000\nhost: 127.0.0.1\nenforce-eager: true\n"),
    Spelling("--config FILE", TP, 2, "enforce-eager: false\nserved-model-name: [a, b]\ntensor-parallel-size: 2\n"),
    Spelling("--config FILE", TP, 2, "compilation-config:\n  mode: 0\ntensor-parallel-size: 2\n"),
)
