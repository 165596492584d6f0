"""Reading chosen tensors: the right bytes, no other bytes, and errors that name file and tensor."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import struct
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagewire.checkpoint import reader as reader_module
from stagewire.checkpoint.index import CheckpointIndex, TensorInfo, read_files
from stagewire.checkpoint.reader import TensorReader
from stagewire.errors import ConfigError

SIZES = st.lists(st.integers(min_value=0, max_value=300), min_size=1, max_size=12)


def write(path: Path, sizes: dict[str, int]) -> dict[str, bytes]:
    """One safetensors file of U8 tensors with random content; returns it by name."""
    content = {name: random.Random(name).randbytes(size) for name, size in sizes.items()}
    entries, begin = [], 0
    for name, size in sizes.items():
        entries.append(f'"{name}":{{"dtype":"U8","shape":[{size}],"data_offsets":[{begin},{begin + size}]}}')
        begin += size
    header = ("{" + ",".join(entries) + "}").encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"".join(content.values()))
    return content


def allocate(num_bytes: int) -> memoryview:
    return memoryview(bytearray(num_bytes))


def read(folder: Path, tensors: list[TensorInfo]) -> dict[str, bytes]:
    return {tensor.name: bytes(buffer) for tensor, buffer in TensorReader(folder, tensors, allocate)}


@pytest.fixture
def index(tmp_path: Path) -> CheckpointIndex:
    """Files a and b with tensors of 10 to 50 bytes."""
    for file in "ab":
        write(tmp_path / f"{file}.safetensors", {f"{file}{i}": 10 * i for i in range(1, 6)})
    return read_files(tmp_path, ["a.safetensors", "b.safetensors"])


@pytest.fixture
def announced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of what the system was told to fetch, in order."""
    lengths: list[int] = []

    def posix_fadvise(_file: int, _offset: int, length: int, advice: int) -> None:
        if advice == os.POSIX_FADV_WILLNEED:
            lengths.append(length)

    monkeypatch.setattr(os, "posix_fadvise", posix_fadvise)
    return lengths


@given(sizes=SIZES, data=st.data())
@settings(deadline=None)
def test_any_choice_of_tensors(tmp_path_factory: pytest.TempPathFactory, sizes: list[int], data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    content = write(folder / "x.safetensors", {f"t{i}": size for i, size in enumerate(sizes)})
    chosen = data.draw(st.lists(st.sampled_from(sorted(content)), unique=True))
    tensors = read_files(folder, ["x.safetensors"]).tensors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader_module, "CHUNK_BYTES", 64)
        assert read(folder, [tensors[name] for name in chosen]) == {name: content[name] for name in chosen}


def test_no_byte_of_another_tensor_is_asked_for(
    tmp_path: Path, index: CheckpointIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: set[tuple[str, int]] = set()
    read_some, read_vector, advise = os.pread, os.preadv, os.posix_fadvise

    def note(file: int, offset: int, length: int) -> None:
        name = os.path.basename(os.readlink(f"/proc/self/fd/{file}"))
        asked.update((name, offset + i) for i in range(length))

    def preadv(file: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        note(file, offset, sum(len(buffer) for buffer in buffers))
        return read_vector(file, buffers, offset, flags)

    def pread(file: int, length: int, offset: int) -> bytes:
        note(file, offset, length)
        return read_some(file, length, offset)

    def posix_fadvise(file: int, offset: int, length: int, advice: int) -> None:
        if advice == os.POSIX_FADV_WILLNEED:
            note(file, offset, length)
        advise(file, offset, length, advice)

    monkeypatch.setattr(os, "pread", pread)
    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "posix_fadvise", posix_fadvise)
    monkeypatch.setattr(reader_module, "CHUNK_BYTES", 16)
    chosen = [index.tensors[name] for name in ("a2", "a3", "b5")]
    reader = TensorReader(tmp_path, chosen, allocate)
    assert [tensor.name for tensor, _ in reader] == ["a2", "a3", "b5"]
    assert reader.num_bytes_read == 20 + 30 + 50
    own = {(t.file, t.offset + i) for t in chosen for i in range(t.num_bytes)}
    assert asked == own


@pytest.mark.parametrize(("window_bytes", "from_ahead"), [(0, 100), (10, 80), (40, 20), (1000, 0)])
def test_the_system_reads_ahead_only_where_it_stays_in_the_run(
    tmp_path: Path, index: CheckpointIndex, monkeypatch: pytest.MonkeyPatch, window_bytes: int, from_ahead: int
) -> None:
    """Of a run of 100 bytes, all but twice the window at its end."""
    monkeypatch.setattr(reader_module, "_window_bytes", lambda _: window_bytes)
    exact: set[int] = set()
    read: dict[bool, int] = {True: 0, False: 0}
    read_vector, advise = os.preadv, os.posix_fadvise

    def posix_fadvise(file: int, offset: int, length: int, advice: int) -> None:
        if advice == os.POSIX_FADV_RANDOM:
            exact.add(file)
        advise(file, offset, length, advice)

    def preadv(file: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        count = read_vector(file, buffers, offset, flags)
        read[file in exact] += 0 if flags else count  # with flags it only asks whether a byte is there
        return count

    monkeypatch.setattr(os, "posix_fadvise", posix_fadvise)
    monkeypatch.setattr(os, "preadv", preadv)
    for _ in TensorReader(tmp_path, [index.tensors[name] for name in ("a1", "a2", "a3", "a4")], allocate):
        pass
    assert read == {False: from_ahead, True: 100 - from_ahead}


def test_at_the_end_of_a_file_there_is_nothing_to_read_ahead_to(
    tmp_path: Path, index: CheckpointIndex, announced: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "_window_bytes", lambda _: 20)
    read(tmp_path, [index.tensors[name] for name in ("a4", "a5", "b3", "b4")])
    assert announced == [20, 20, 40], "where a run begins; and b4, behind which is another stage's"


def test_marks_of_a_look_at_the_header_are_gone_before_anything_is_announced(
    tmp_path: Path, index: CheckpointIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    advised: list[tuple[str, int]] = []

    def posix_fadvise(file: int, _offset: int, _length: int, advice: int) -> None:
        if advice != os.POSIX_FADV_RANDOM:
            advised.append((Path(os.readlink(f"/proc/self/fd/{file}")).stem, advice))

    monkeypatch.setattr(os, "posix_fadvise", posix_fadvise)
    read(tmp_path, [index.tensors[name] for name in ("a1", "a2", "b5")])
    assert advised[0] == ("a", os.POSIX_FADV_DONTNEED)
    assert [advice for _, advice in advised[1:]] == [os.POSIX_FADV_WILLNEED] * 3, "b is read to its end: no such harm"


@pytest.mark.parametrize("is_there", [True, False])
def test_chunks_that_are_there_are_copied_beside_one_another(
    tmp_path: Path, index: CheckpointIndex, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    """What has to be waited for is copied by the thread that waited."""
    read_vector = os.preadv
    copied_by_caller: set[bool] = set()

    def preadv(file: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags == os.RWF_NOWAIT:
            if not is_there:
                raise BlockingIOError(errno.EAGAIN, "not there")
        else:
            copied_by_caller.add(threading.current_thread() is threading.main_thread())
        return read_vector(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(reader_module, "CHUNK_BYTES", 16)
    monkeypatch.setattr(reader_module, "_window_bytes", lambda _: 16)
    tensor = index.tensors["a5"]
    assert read(tmp_path, [tensor])["a5"] == random.Random("a5").randbytes(50)
    assert copied_by_caller == {not is_there}


def test_the_system_is_told_of_what_comes_but_not_too_far(
    tmp_path: Path, index: CheckpointIndex, announced: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "ANNOUNCED_BYTES", 60)
    chosen = [tensor for tensor in index.tensors.values() if not tensor.name.endswith("5")]
    walk = iter(TensorReader(tmp_path, chosen, allocate))
    assert next(walk)[0].name == "a1"
    assert announced == [10, 20, 30], "60 bytes ahead, whole tensors"
    assert next(walk)[0].name == "a2"
    assert announced == [10, 20, 30, 40]


def test_nothing_is_kept(tmp_path: Path) -> None:
    size = 4 << 20
    write(tmp_path / "x.safetensors", {f"t{i}": size for i in range(8)})
    tensors = list(read_files(tmp_path, ["x.safetensors"]).tensors.values())
    tracemalloc.start()
    for each in TensorReader(tmp_path, tensors, allocate):
        del each
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size + (1 << 20)


def test_files_are_closed(tmp_path: Path, index: CheckpointIndex) -> None:
    def open_files() -> Iterator[str]:
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # the one that listed them
                yield os.readlink(f"/proc/self/fd/{name}")

    walk = iter(TensorReader(tmp_path, list(index.tensors.values()), allocate))
    next(walk)
    assert any(str(tmp_path) in name for name in open_files())
    walk.close()  # type: ignore[attr-defined]
    assert not any(str(tmp_path) in name for name in open_files())


def test_a_file_that_was_cut_after_its_header_was_read(tmp_path: Path, index: CheckpointIndex) -> None:
    path = tmp_path / "b.safetensors"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ConfigError, match=r"b\.safetensors: tensor b5 \(50 bytes from byte \d+\) cannot be read: the "):
        read(tmp_path, list(index.tensors.values()))


def test_a_file_that_is_gone(tmp_path: Path, index: CheckpointIndex) -> None:
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"b\.safetensors: tensor b1 cannot be read: .*No such file"):
        read(tmp_path, list(index.tensors.values()))
