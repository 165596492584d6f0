"""What a stage loads: the same parameters as vLLM's own loader gives it, bit for bit, from its own tensors alone."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from stagewire.checkpoint.export_plan import plan_export
from stagewire.checkpoint.export_writer import run_export
from stagewire.checkpoint.ownership import layer_of
from stagewire.config import Address, StageConfig
from stagewire.errors import ConfigError
from stagewire.plan.ranges import LayerRange
from support.hub_server import HubServer
from support.models import copy_tokenizer, make_int8_llama, make_llama
from support.stages import Ring

pytestmark = pytest.mark.vllm

RANGES = ("0-2", "2-3", "3-6")
NUM_LAYERS = 6
SMALL: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 64,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "dtype": "float32",
}


@pytest.fixture(autouse=True)
def clean_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """vLLM's process groups and the environment as they were."""
    from vllm.distributed import cleanup_dist_env_and_memory

    # vLLM collects garbage four times for each worker, each time through all that was ever imported: not here.
    gc.freeze()
    monkeypatch.setattr(gc, "unfreeze", lambda: None)
    before = dict(os.environ)
    yield
    cleanup_dist_env_and_memory()
    os.environ.clear()
    os.environ.update(before)


class Packed:
    """A weight as vLLM's CPU kernels want it: a second copy, which does not need the first."""

    def __init__(self, weight: Any) -> None:
        self.weight = weight.detach().clone()

    def __call__(self, x: Any, weight: Any, bias: Any) -> Any:
        from torch.nn.functional import linear

        return linear(x, self.weight, bias)


def pack(monkeypatch: pytest.MonkeyPatch, *, keeps_all: bool) -> None:
    """Replaces what vLLM does where the CPU has packed kernels: the same on every machine, whatever its CPU.

    ``keeps_all``: rows stay, also where vLLM gives them up for the packed copy, so that they can be compared.
    """
    import torch

    def dispatch(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = Packed(layer.weight)
        if remove_weight and not keeps_all:
            layer.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)

    monkeypatch.setattr("vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm", dispatch)


def load(model: Path, stage: int, load_format: str, *, is_run: bool = False, **options: Any) -> dict[str, Any]:
    """Parameters and buffers of one stage's model, by name. ``is_run``: after a forward pass, as vLLM's warm-up is."""
    with loaded(model, stage, load_format, **options) as worker:
        if is_run:
            worker.runner._dummy_run(8)
        model_of_stage = worker.runner.get_model()
        values = {name: value.detach().clone() for name, value in model_of_stage.named_parameters()}
        return values | {name: value.detach().clone() for name, value in model_of_stage.named_buffers()}


@contextmanager
def loaded(model: Path, stage: int, load_format: str, **options: Any) -> Iterator[Any]:
    """One stage's worker in this process, with its weights."""
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.usage.usage_lib import UsageContext

    from stagewire.vllm_plugin.entry.external_mode import apply_external_mode
    from stagewire.vllm_plugin.ranks.stage_ranks import StageRanks
    from vllm import AsyncEngineArgs

    config = StageConfig(stage, len(RANGES), LayerRange.parse(RANGES[stage]), 15550, Address("127.0.0.1", 15549))
    arguments = AsyncEngineArgs(
        model=str(model),
        enforce_eager=True,
        max_model_len=256,
        max_num_batched_tokens=256,
        kv_cache_memory_bytes=20_000_000,
        load_format=load_format,
        **options,
    )
    apply_external_mode(arguments, config)
    if load_format == "auto":
        assert arguments.load_format == "stagewire"
    vllm_config = arguments.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    ranks = StageRanks(config, vllm_config)
    ranks.load()
    worker = ranks.own
    yield worker
    worker.shutdown()
    cleanup_dist_env_and_memory()


def stock_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on external mode leaves vLLM's own loader in place."""
    monkeypatch.setattr("stagewire.vllm_plugin.loading.load_formats.REPLACED_LOAD_FORMATS", ())


def save(config: Any, folder: Path, tokenizer_of: Path, shard: str = "200KB") -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size=shard)
    copy_tokenizer(tokenizer_of, folder)
    return folder


def llama_untied(folder: Path, tokenizer_of: Path) -> Path:
    return make_llama(folder, tokenizer_of, NUM_LAYERS, tie_word_embeddings=False)


def llama_tied(folder: Path, tokenizer_of: Path) -> Path:
    return make_llama(folder, tokenizer_of, NUM_LAYERS, tie_word_embeddings=True)


def llama_tied_by_mistake(folder: Path, tokenizer_of: Path) -> Path:
    """The config says tied, the checkpoint holds a head of its own: vLLM believes the checkpoint."""
    llama_untied(folder, tokenizer_of)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    return folder


def one_file(folder: Path, tokenizer_of: Path) -> Path:
    from transformers import Qwen2Config

    return save(Qwen2Config(**SMALL), folder, tokenizer_of, "1GB")


def gpt2(folder: Path, tokenizer_of: Path) -> Path:
    """vLLM builds its token and position embeddings on every stage."""
    from transformers import GPT2Config

    config = GPT2Config(vocab_size=49152, n_embd=64, n_layer=NUM_LAYERS, n_head=4, n_positions=512, dtype="float32")
    return save(config, folder, tokenizer_of)


def experts(folder: Path, tokenizer_of: Path) -> Path:
    from transformers import Qwen2MoeConfig

    settings = {**SMALL, "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    return save(Qwen2MoeConfig(**settings), folder, tokenizer_of)


def gemma(folder: Path, tokenizer_of: Path) -> Path:
    from transformers import Gemma2Config

    return save(Gemma2Config(**SMALL, head_dim=16), folder, tokenizer_of)


MODELS: list[Callable[[Path, Path], Path]] = [
    llama_untied,
    llama_tied,
    llama_tied_by_mistake,
    one_file,
    gpt2,
    experts,
    gemma,
    make_int8_llama,
]


@pytest.mark.parametrize("make", MODELS)
def test_a_stage_holds_what_vllms_own_loader_gives_it(
    make: Callable[[Path, Path], Path],
    tmp_path: Path,
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import torch

    model = make(tmp_path / "model", model_dir)
    pack(monkeypatch, keeps_all=True)
    ours = [load(model, stage, "auto") for stage in range(len(RANGES))]
    lines = [line for line in capfd.readouterr().out.splitlines() if "loaded layer" in line]
    assert [line.partition(":")[0] for line in lines] == ["Stage 0", "Stage 1", "Stage 2"]
    assert all(" of own bytes)" in line for line in lines)
    stock_format(monkeypatch)
    for stage, own in enumerate(ours):
        stock = load(model, stage, "safetensors")
        assert own.keys() == stock.keys()
        different = [name for name, value in own.items() if not torch.equal(value, stock[name])]
        assert not different, f"stage {stage}: {different}"
        assert own, "a stage without parameters"
        assert all(value.numel() for value in own.values()), "nothing was there to compare"


def mistral_format(folder: Path, tokenizer_of: Path, *, is_alone: bool) -> Path:
    """params.json and consolidated.safetensors; unless ``is_alone`` beside other weights in HuggingFace's format."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import MistralConfig

    save(MistralConfig(**SMALL, head_dim=16, tie_word_embeddings=False), folder, tokenizer_of, "1GB")
    tensors = load_file(folder / "model.safetensors")
    save_file({_mistral_name(name): value for name, value in tensors.items()}, folder / "consolidated.safetensors")
    params = {"dim": 64, "n_layers": NUM_LAYERS, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "hidden_dim": 96}
    more = {"vocab_size": 49152, "norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 512}
    (folder / "params.json").write_text(json.dumps({**params, **more, "dtype": "float32"}))
    if is_alone:
        (folder / "config.json").unlink()
        (folder / "model.safetensors").unlink()
    else:
        save_file({name: torch.zeros_like(value) for name, value in tensors.items()}, folder / "model.safetensors")
    return folder


def _mistral_name(name: str) -> str:
    renamed = {
        "model.": "",
        "embed_tokens": "tok_embeddings",
        "lm_head": "output",
        "self_attn": "attention",
        **{f"{letter}_proj": f"w{letter}" for letter in "qkvo"},
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for theirs, own in renamed.items():
        name = name.replace(theirs, own)
    return name


@pytest.mark.parametrize("is_alone", [True, False], ids=["alone", "beside HuggingFace's"])
def test_mistral_s_own_format_is_read_as_vllm_reads_it(
    is_alone: bool, tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    model = mistral_format(tmp_path / "model", model_dir, is_alone=is_alone)
    pack(monkeypatch, keeps_all=True)
    ours = [load(model, stage, "auto") for stage in (0, 2)]
    stock_format(monkeypatch)
    for stage, own in zip((0, 2), ours, strict=True):
        stock = load(model, stage, "mistral")
        assert own.keys() == stock.keys()
        assert not [name for name, value in own.items() if not torch.equal(value, stock[name])]
    assert ours[0]["model.embed_tokens.weight"].abs().sum() > 0, "not the zeros beside it"


@pytest.mark.parametrize(
    ("make", "vocabulary"),
    [
        (llama_untied, [{"embed_tokens": "rows"}, {}, {"lm_head": "packed"}]),
        (llama_tied, [{"embed_tokens": "rows"}, {}, {"embed_tokens": "rows", "lm_head": "packed"}]),
    ],
)
def test_of_the_vocabulary_a_stage_keeps_only_what_it_reads(
    make: Callable[[Path, Path], Path],
    vocabulary: list[dict[str, str]],
    tmp_path: Path,
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM keeps rows and a packed matrix of each, because one process may need both."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    model = make(tmp_path / "model", model_dir)
    pack(monkeypatch, keeps_all=False)
    for stage, expected in enumerate(vocabulary):
        with loaded(model, stage, "auto") as worker:
            found = {
                name.rpartition(".")[2]: " and ".join(
                    [
                        *(["rows"] if module.weight.numel() else []),
                        *(["packed"] if isinstance(module.cpu_linear, Packed) else []),
                    ]
                )
                for name, module in worker.runner.get_model().named_modules()
                if isinstance(module, VocabParallelEmbedding)
            }
        assert found == expected, f"stage {stage}"


@pytest.mark.parametrize("make", [llama_untied, llama_tied_by_mistake, gpt2, experts, gemma])
def test_a_pre_split_stage_holds_the_same(
    make: Callable[[Path, Path], Path], tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what it never uses: its forward pass runs without."""
    import torch

    model = make(tmp_path / "model", model_dir)
    pack(monkeypatch, keeps_all=True)
    full = [load(model, stage, "auto") for stage in range(len(RANGES))]
    run_export(plan_export(model, lambda _: [LayerRange.parse(text) for text in RANGES]), tmp_path / "out", print)
    model.rename(tmp_path / "gone")
    for stage, expected in enumerate(full):
        own = load(tmp_path / "out" / f"stage_{stage}", stage, "auto", is_run=True)
        assert [name for name, value in own.items() if not torch.equal(value, expected[name])] == []
        assert [name for name in expected.keys() - own.keys() if layer_of(name) is not None] == []
    if make is llama_untied:
        stock_format(monkeypatch)
        load(tmp_path / "out" / "stage_1", 1, "safetensors")


def test_no_checkpoint_is_prefetched_from_a_network(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own loader reads all of it ahead where it finds NFS or Lustre."""
    from vllm.model_executor.model_loader import weight_utils

    asked: list[Any] = []
    monkeypatch.setattr(weight_utils, "_get_fs_type", lambda files: "nfs")
    monkeypatch.setattr(weight_utils, "_prefetch_all_checkpoints", lambda *args, **options: asked.append(args))
    model = llama_untied(tmp_path / "model", model_dir)
    load(model, 1, "auto")
    assert not asked
    stock_format(monkeypatch)
    load(model, 1, "safetensors")
    assert asked, "this shows nothing"


def test_a_type_that_torch_lacks_is_refused_before_anything_is_read(tmp_path: Path, model_dir: Path) -> None:
    model = one_file(tmp_path / "model", model_dir)
    path = model / "model.safetensors"
    name = "model.layers.2.input_layernorm.weight"
    content = path.read_bytes()
    at = content.index(f'"{name}"'.encode())
    path.write_bytes(content[:at] + content[at:].replace(b'"F32"', b'"F9X"', 1))
    with pytest.raises(ConfigError, match=rf"model\.safetensors: tensor {name} is of type F9X"):
        load(model, 1, "auto")


def test_a_checkpoint_without_safetensors_takes_vllms_own_path(
    tmp_path: Path, model_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import load_file

    model = one_file(tmp_path / "model", model_dir)
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(tensors, model / "pytorch_model.bin")
    values = load(model, 1, "auto")
    assert torch.equal(
        values["model.layers.2.input_layernorm.weight"], tensors["model.layers.2.input_layernorm.weight"]
    )
    out = capfd.readouterr().out
    assert "is not safetensors: vLLM's own loader reads it, and reads all of it" in out
    assert "loaded layer" not in out


def test_a_format_that_somebody_chose_is_left_alone() -> None:
    from stagewire.vllm_plugin.entry.external_mode import apply_external_mode
    from vllm import AsyncEngineArgs

    arguments = AsyncEngineArgs(model=os.curdir, load_format="dummy")
    apply_external_mode(arguments, StageConfig(0, 2, LayerRange(0, 1), 15550, Address("127.0.0.1", 15551)))
    assert arguments.load_format == "dummy"


class HubRing(Ring):
    """Every stage with a cache of its own, as on a host of its own."""

    def command(self, stage: int) -> list[str]:
        return ["env", f"HF_HOME={self.folder / f'home_{stage}'}", *super().command(stage)]

    def weights(self, stage: int) -> set[str]:
        """The weight files that this stage has downloaded."""
        return {path.name for path in (self.folder / f"home_{stage}").rglob("*.safetensors")}


def test_of_a_model_on_a_hub_only_files_with_own_tensors_are_downloaded(tmp_path: Path, model_dir: Path) -> None:
    small = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
    folder = make_llama(tmp_path / "model", model_dir, NUM_LAYERS, "150KB", **small)
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(weight_map.values())) > 6
    own = [
        {"model.embed_tokens.weight", *(name for name in weight_map if layer_of(name) in range(2))},
        {"model.norm.weight", "lm_head.weight", *(name for name in weight_map if layer_of(name) in range(2, 6))},
    ]
    extra = ["--enforce-eager", "--max-model-len", "64", "--kv-cache-memory-bytes", "20M"]
    with HubServer("someone/tiny", folder) as server:
        env = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0"}
        ring = HubRing(Path("someone/tiny"), ("0-2", "2-6"), extra, env)
        with ring:
            for stage, names in enumerate(own):
                assert ring.weights(stage) == {weight_map[name] for name in names}
            body = {"model": "someone/tiny", "prompt": "San Francisco is a", "max_tokens": 5, "temperature": 0}
            answer = httpx.post(f"{ring.url}/v1/completions", json=body, timeout=60, trust_env=False)
            assert answer.status_code == 200, answer.text
    sent = [name for name in server.downloads if name.endswith(".safetensors")]
    assert sorted(sent) == sorted(file for names in own for file in {weight_map[name] for name in names})


class TestMemory:
    """Where tensors lie on their way: used again, but never under a tensor that somebody keeps."""

    MIB = 1 << 20

    def test_what_somebody_keeps_is_not_used_again(self) -> None:
        import torch

        from stagewire.vllm_plugin.loading.range_loader import _Memory

        memory = _Memory(100 * self.MIB)
        kept, addresses = [], set()
        for value in range(8):
            tensor = torch.frombuffer(memory.take(self.MIB), dtype=torch.uint8)
            tensor.fill_(value)
            addresses.add(tensor.data_ptr())
            if value % 2:
                kept.append((value, tensor.view(2, -1)[1]))  # a view is enough to keep it
            del tensor
        assert len(addresses) == 4, "what one does not keep the next one gets"
        assert all(bool((view == value).all()) for value, view in kept)

    @pytest.mark.parametrize(
        "keep",
        [
            lambda tensor, buffer: tensor,
            lambda tensor, buffer: tensor[5:9],
            lambda tensor, buffer: tensor.view(2, -1)[1].detach(),
            lambda tensor, buffer: tensor.numpy()[7:],
            lambda tensor, buffer: memoryview(tensor.numpy()),
            lambda tensor, buffer: tensor.untyped_storage(),
            lambda tensor, buffer: tensor.new_empty(0).set_(tensor.untyped_storage()),
            lambda tensor, buffer: buffer[1:3],
        ],
        ids=["tensor", "slice", "detached view", "numpy", "memoryview", "storage", "tensor on its storage", "buffer"],
    )
    def test_whatever_is_made_of_a_tensor_keeps_its_memory(self, keep: Callable[[Any, memoryview], object]) -> None:
        import torch

        from stagewire.vllm_plugin.loading.range_loader import _Memory

        memory = _Memory(100 * self.MIB)
        buffer = memory.take(self.MIB)
        tensor = torch.frombuffer(buffer, dtype=torch.uint8)
        address = tensor.data_ptr()
        kept = keep(tensor, buffer)
        del buffer, tensor

        def next_address() -> int:
            return int(torch.frombuffer(memory.take(self.MIB), dtype=torch.uint8).data_ptr())

        assert next_address() != address
        del kept
        assert address in (next_address(), next_address()), "nobody keeps it any more"

    def test_spare_memory_is_never_more_than_what_is_left_to_read(self) -> None:
        from stagewire.vllm_plugin.loading.range_loader import _Memory

        sizes = [size * self.MIB for size in (64, 8, 8, 8, 4, 2, 1)]
        memory = _Memory(sum(sizes))
        left = sum(sizes)
        for size in sizes:
            buffer = memory.take(size)
            left -= size
            assert sum(map(len, memory._buffers)) <= max(left, size) + size
            del buffer
        assert sum(map(len, memory._buffers)) <= 2 * sizes[-1], "what is at hand"

    def test_much_smaller_tensors_do_not_occupy_large_memory(self) -> None:
        from stagewire.vllm_plugin.loading.range_loader import _Memory

        memory = _Memory(1000 * self.MIB)
        large = memory.take(64 * self.MIB)
        del large
        small = memory.take(2 * self.MIB)
        assert len(small.obj) == 2 * self.MIB  # type: ignore[arg-type]
