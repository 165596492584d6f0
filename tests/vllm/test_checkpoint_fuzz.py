"""Random checkpoints made of what folders in the wild have, each read by vLLM's own loader and by everything of ours.

Stock vLLM is the judge, called in this process: which files it takes for the same arguments, and which tensors with
which values come out of them. Plan, loader, export and fingerprint have to say the same.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from stagewire.checkpoint.export_plan import plan_export
from stagewire.checkpoint.export_writer import run_export
from stagewire.checkpoint.files import CONSOLIDATED_INDEX_NAME, INDEX_NAME, checkpoint_files
from stagewire.checkpoint.folder import Checkpoint, read_checkpoint
from stagewire.checkpoint.index import fingerprint, read_tensors
from stagewire.checkpoint.model_config import LoadFlags
from stagewire.checkpoint.ownership import is_built, is_lm_head
from stagewire.checkpoint.samples import sample_weights
from stagewire.config import Address, StageConfig
from stagewire.errors import ConfigError
from stagewire.plan.ranges import LayerRange

pytestmark = pytest.mark.vllm

NUM_LAYERS = 4
RANGES = (LayerRange(0, 2), LayerRange(2, 4))
NUM_FEW, NUM_MANY = 24, 600
APPLE_DOUBLE = b"\0\5\x16\7" + bytes(60)

Values = dict[str, float]


class Maker:
    """One folder. Every value is used once, so that it tells which copy of a tensor was read."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.load_format = "auto"
        self._last = 0.0
        folder.mkdir()

    def one_of(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def maybe(self, odds: float = 0.2) -> bool:
        return self.random.random() < odds

    def tensors(self, names: list[str]) -> dict[str, Any]:
        import torch

        values = {}
        for name in names:
            self._last += 1
            values[name] = torch.full((2, 2), self._last)
        return values

    def save(self, file: str, names: list[str]) -> None:
        import torch
        from safetensors.torch import save_file

        path = self.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if file.lower().endswith(".safetensors"):
            save_file(self.tensors(names), path, {"format": "pt"})
        else:
            torch.save(self.tensors(names), path)

    def write(self, file: str, content: bytes = b"x") -> None:
        (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / file).write_bytes(content)

    def shards(self, names: list[str], stem: str, count: int) -> dict[str, str]:
        """Writes them; tensor to file. Sometimes without leading zeros, where the order of names is another."""
        form = self.one_of("{stem}-{number:05}-of-{count:05}.safetensors", "{stem}-{number}.safetensors")
        start = self.one_of(1, 8)
        files = [form.format(stem=stem, number=start + i, count=count) for i in range(count)]
        parts: dict[str, list[str]] = {file: [] for file in files}
        for i, name in enumerate(names):
            parts[files[i % count if i < count else self.random.randrange(count)]].append(name)
        for file, own in parts.items():
            self.save(file, own)
        return {name: file for file, own in parts.items() for name in own}

    def index(self, weight_map: dict[str, str], name: str = INDEX_NAME) -> None:
        self.write(name, json.dumps({"metadata": {}, "weight_map": weight_map}).encode())

    def make(self) -> None:
        self.load_format = self.one_of("auto", "auto", "auto", "hf", "safetensors", "mistral", "pt")
        config = {
            "architectures": ["LlamaForCausalLM"],
            "num_hidden_layers": NUM_LAYERS,
            "num_attention_heads": 2,
            "hidden_size": 2,
            "tie_word_embeddings": self.maybe(0.5),
        }
        self.write("config.json", json.dumps(config).encode())
        self._weights()
        if self.maybe(0.3):
            self._mistral()
        for extra in (_beside, _hidden, _other_formats, _modules):
            if self.maybe(0.5):
                extra(self)

    def _weights(self) -> None:
        kind = self.one_of("one", "index", "index", "index", "no index", "bin", "pt", "none")
        names = hf_names(self)
        if kind == "one":
            self.save("model.safetensors", names)
        elif kind in ("bin", "pt"):
            self.save("pytorch_model.bin" if kind == "bin" else "model.pt", names)
        elif kind != "none":
            weight_map = self.shards(names, self.one_of("model", "Model", "weights"), self.random.randint(2, 4))
            if kind == "index":
                self.index(weight_map)
                self._spoil(weight_map)
            elif self.maybe():
                self._copy(weight_map)

    def _copy(self, weight_map: dict[str, str]) -> str:
        """Another copy of some tensor, in a file that holds others too."""
        name, file = self.one_of(*weight_map), self.one_of(*weight_map.values())
        self.save(file, sorted({each for each, place in weight_map.items() if place == file} | {name}))
        return str(name)

    def _spoil(self, weight_map: dict[str, str]) -> None:
        file = self.one_of(*weight_map.values())
        if self.maybe(0.3):
            self._copy(weight_map)
        if self.maybe():
            self.index(weight_map | {self.one_of("mtp.x.weight", "model.layers.0.rotary_emb.inv_freq"): file})
        if self.maybe(0.08):
            place = self.one_of(
                "../x.safetensors", "/x.safetensors", "sub/x.safetensors", f"./{file}", ".x.safetensors"
            )
            self.index(weight_map | {"model.more.weight": place})
        if self.maybe(0.08):
            (self.folder / file).unlink()
            if self.maybe(0.6):
                (self.folder / file).symlink_to("../../blobs/0f0f")
        elif self.maybe(0.05):
            self.write(file, b"")
        if self.maybe(0.05):
            (self.folder / INDEX_NAME).unlink()
            (self.folder / INDEX_NAME).symlink_to("../../blobs/0f0f")

    def _mistral(self) -> None:
        names, kind = mistral_names(self), self.one_of("one", "index", "no index", "sub-folder")
        if kind == "one":
            self.save("consolidated.safetensors", names)
        elif kind == "sub-folder":
            self.save("original/consolidated.safetensors", names)
        else:
            weight_map = self.shards(names, "consolidated", 2)
            if kind == "index":
                self.index(weight_map, CONSOLIDATED_INDEX_NAME)


def hf_names(maker: Maker) -> list[str]:
    layers = NUM_LAYERS + maker.maybe()  # one that only drafts
    names = [f"model.layers.{i}.{part}.weight" for i in range(layers) for part in ("self_attn.q_proj", "mlp.up_proj")]
    return ["model.embed_tokens.weight", *names, "model.norm.weight", *(["lm_head.weight"] if maker.maybe(0.7) else [])]


def mistral_names(maker: Maker) -> list[str]:
    names = [f"layers.{i}.attention.{part}.weight" for i in range(NUM_LAYERS) for part in ("wq", "wo")]
    return ["tok_embeddings.weight", *names, "norm.weight", "output.weight"]


def _beside(maker: Maker) -> None:
    """A file that no index names."""
    maker.save(maker.one_of("adapter.safetensors", "older.safetensors", "zz.safetensors"), ["something.else.weight"])


def _hidden(maker: Maker) -> None:
    maker.write("._model.safetensors", APPLE_DOUBLE)
    maker.write("model-00007.safetensors.incomplete")
    maker.write(".cache/huggingface/download/model.safetensors.metadata")
    maker.save(".model.safetensors", ["model.norm.weight"])


def _other_formats(maker: Maker) -> None:
    maker.write(maker.one_of("training_args.bin", "optimizer.pt", "OTHER.SAFETENSORS", "model.gguf", "m.onnx"))
    if maker.maybe(0.5):
        maker.save(maker.one_of("pytorch_model.bin", "old.pt", "original/model.safetensors"), hf_names(maker))


def _modules(maker: Maker) -> None:
    kinds = [("1_Pooling", "Pooling"), (maker.one_of("2_Dense", "deep/2_Dense"), "Dense"), ("3_Normalize", "Normalize")]
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds]
    maker.write("modules.json", json.dumps(modules).encode())
    maker.write("1_Pooling/config.json", b"{}")
    maker.write(f"{kinds[1][0]}/config.json", b"{}")
    maker.save(f"{kinds[1][0]}/{maker.one_of('model.safetensors', 'pytorch_model.bin')}", ["linear.weight"])


# ---- stock vLLM ----------------------------------------------------------------------------------------------------


def stock(maker: Maker) -> tuple[list[str], list[tuple[str, float]]] | None:
    """The files, and every tensor with its value in vLLM's order; ``None`` when vLLM refuses."""
    from safetensors import SafetensorError
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    loader = DefaultModelLoader(LoadConfig(load_format=maker.load_format, use_tqdm_on_load=False))
    source = DefaultModelLoader.Source(str(maker.folder), None)
    try:
        files = loader._prepare_weights(source.model_or_path, None, None, True, None)[1]
        found = [(name, float(tensor.flatten()[0])) for name, tensor in loader._get_weights_iterator(source)]
    except (FileNotFoundError, RuntimeError, SafetensorError):
        return None
    return [Path(file).name for file in files], found


# ---- ours ----------------------------------------------------------------------------------------------------------


def load_all(maker: Maker, monkeypatch: pytest.MonkeyPatch) -> list[Values]:
    """What each stage's model is given by the loader."""
    from torch import nn
    from vllm.config.load import LoadConfig

    from stagewire.vllm_plugin.loading import range_loader
    from stagewire.vllm_plugin.loading.load_formats import OWN_LOAD_FORMATS
    from stagewire.vllm_plugin.seams.settings import KEY, RingSettings

    class Model(nn.Module):  # type: ignore[misc]
        def load_weights(self, weights: Any) -> None:
            self.given = {name: float(tensor.flatten()[0]) for name, tensor in weights}

    monkeypatch.setattr(range_loader, "get_tensor_model_parallel_rank", lambda: 0)
    config = Mock(model=str(maker.folder), revision=None, quantization=None, is_moe=False, multimodal_config=None)
    config.get_total_num_hidden_layers = lambda: NUM_LAYERS
    config.hf_config.tie_word_embeddings = config.hf_text_config.tie_word_embeddings = False
    given = []
    for i, layers in enumerate(RANGES):
        stage = StageConfig(i, len(RANGES), layers, 15550, Address("127.0.0.1", 15549))
        vllm_config = Mock(additional_config={KEY: RingSettings.of(stage)})
        monkeypatch.setattr(range_loader, "get_current_vllm_config", lambda own=vllm_config: own)
        monkeypatch.setattr("vllm.config.get_current_vllm_config", lambda own=vllm_config: own)
        loader = range_loader.RangeLoader(LoadConfig(load_format=OWN_LOAD_FORMATS[maker.load_format]))
        model = Model()
        loader.load_weights(model, config)
        given.append(model.given)
    return given


def read(folder: Path, flags: LoadFlags) -> Checkpoint | None:
    """``None`` when we refuse, or find nothing to read."""
    try:
        checkpoint = read_checkpoint(folder, flags)
    except ConfigError:
        return None
    return checkpoint if checkpoint.files.weights else None


def values_of(folder: Path, tensors: Any) -> Values:
    import struct

    values = {}
    for tensor in tensors:
        with (folder / tensor.file).open("rb") as stream:
            stream.seek(tensor.offset)
            values[tensor.name] = struct.unpack("<f", stream.read(4))[0]
    return values


def exported_values(folder: Path) -> Values:
    index = read_tensors(checkpoint_files(folder))
    assert index is not None
    return values_of(folder, index.tensors.values())


def check_one(folder: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """One checkpoint, compared; what it was in a word, so that a run can show that it has seen all kinds."""
    from vllm.transformers_utils.config import checkpoint_has_lm_head

    maker = Maker(folder / "model", seed)
    maker.make()
    flags = LoadFlags(load_format=maker.load_format)
    expected = stock(maker)
    checkpoint = read(maker.folder, flags)
    assert (checkpoint is None) is (expected is None)
    if checkpoint is None or expected is None:
        return "refused"
    names, yielded = expected
    files, index = checkpoint.files, checkpoint.index
    assert sorted(files.weights) == sorted(names)
    assert not files.missing
    if index is None:
        assert not files.is_safetensors
        return "pickles"
    if not index.unreadable:
        assert any(map(is_lm_head, (*index.tensors, *index.beside))) == checkpoint_has_lm_head(str(maker.folder))
    found = values_of(maker.folder, index.tensors.values())
    last = dict(yielded)
    assert found.keys() == last.keys()
    placed = {name for name in index.copies if name in files.weight_map}
    for name, value in found.items():
        assert (name, value) in yielded
        assert value == last[name] or name in placed, "only an index overrules vLLM's order"
    for name in placed:
        assert index.tensors[name].file == files.weight_map[name]
    _check_all_agree(maker, folder, flags, found, monkeypatch)
    return "copies" if placed else files.load_format


def _check_all_agree(
    maker: Maker, folder: Path, flags: LoadFlags, found: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = {name: value for name, value in found.items() if is_built(name, NUM_LAYERS)}
    if maker.load_format != "pt":
        given = load_all(maker, monkeypatch)
        assert {name: value for each in given for name, value in each.items()} == built
    plan = plan_export(maker.folder, lambda _: RANGES, flags)
    weights = {
        piece.file for file in plan.files if file.name.endswith(".safetensors") and file.head for piece in file.pieces
    }
    files = checkpoint_files(maker.folder, flags.load_format)
    assert weights <= set(files.weights)
    run_export(plan, folder / "out", lambda _: None)
    exported = [exported_values(folder / "out" / f"stage_{i}") for i in range(len(RANGES))]
    assert {name: value for each in exported for name, value in each.items()} == built
    for name in files.module_weights:
        assert all(
            (folder / "out" / f"stage_{i}" / name).read_bytes() == (maker.folder / name).read_bytes() for i in range(2)
        )
    said = (fingerprint(maker.folder, flags), sample_weights(files, read_tensors(files)).digest)
    for path in [path for path in maker.folder.iterdir() if path.is_file() and _is_no_part(path, files.weights)]:
        path.unlink()
    files = checkpoint_files(maker.folder, flags.load_format)
    assert (fingerprint(maker.folder, flags), sample_weights(files, read_tensors(files)).digest) == said


def _is_no_part(path: Path, weights: tuple[str, ...]) -> bool:
    return path.name not in weights and path.suffix != ".json"


def test_random_checkpoints_are_read_as_stock_vllm_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _run(tmp_path, range(NUM_FEW), monkeypatch)
    assert {"refused", "hf", "mistral"} <= seen


def test_a_hidden_file_ends_vllms_look_for_a_head(tmp_path: Path) -> None:
    """Which our warning says: of the weights themselves such files are none."""
    from vllm.transformers_utils.config import checkpoint_has_lm_head

    maker = Maker(tmp_path / "model", 0)
    maker.save("model.safetensors", ["model.norm.weight"])
    maker.write("._model.safetensors", APPLE_DOUBLE)
    with pytest.raises(ValueError, match="Expecting value"):
        checkpoint_has_lm_head(str(maker.folder))


@pytest.mark.slow
def test_many_random_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _run(tmp_path, range(NUM_FEW, NUM_MANY), monkeypatch)
    assert seen >= {"refused", "hf", "mistral", "safetensors", "copies", "pickles"}


def _run(folder: Path, seeds: range, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    seen = set()
    for seed in seeds:
        place = folder / str(seed)
        place.mkdir()
        seen.add(check_one(place, seed, monkeypatch))
    return seen
