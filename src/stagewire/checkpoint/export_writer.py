"""Writes a pre-split export. A kill at any moment loses at most the file that was being written.

Each file goes through four steps: data to ``NAME.partial``, fsync, a line with its hash in the journal, rename. A file
with its final name and a line in the journal is finished. All manifests say "unfinished" until the last file of all
stages is written, because the export's id is made of all hashes. docs/guide/export.md shows the result.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import IO, Any

from stagewire.checkpoint.export_plan import ExportPlan, OutputFile, Piece, SourceFile
from stagewire.checkpoint.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    derive_export_id,
    encode_manifest,
    encode_unfinished,
    hash_file,
    read_export,
    read_manifest,
    read_manifest_if_finished,
    stage_folder,
)
from stagewire.errors import ConfigError

__all__ = ["JOURNAL_NAME", "Disk", "describe_bytes", "run_export", "verify_export"]

JOURNAL_NAME = "stagewire_export.jsonl"
_JOURNAL_VERSION = 1
_PARTIAL = ".partial"
_CHUNK_BYTES = 8 << 20
# A bound for manifests, the journal, and the rounding to whole blocks of a file system.
_OVERHEAD_BYTES_PER_FILE = 16 << 10
_WAYS_OUT = "give another --output-dir, or --overwrite to throw away what is there and export anew"


class Disk:
    """Every operation of the export on a disk. Tests let one of them fail, to see what a kill there leaves."""

    def free_bytes(self, folder: Path) -> int:
        return shutil.disk_usage(folder).free

    def make_folder(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)

    def create(self, path: Path) -> IO[bytes]:
        return path.open("wb", buffering=0)

    def write(self, stream: IO[bytes], data: bytes | memoryview) -> None:
        left = memoryview(data)
        while left:
            left = left[stream.write(left) :]

    def sync(self, stream: IO[bytes]) -> None:
        os.fsync(stream.fileno())

    def rename(self, old: Path, new: Path) -> None:
        """Renames, and makes the folder's entry durable too."""
        old.replace(new)
        folder = os.open(new.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def remove(self, path: Path) -> None:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()


def run_export(
    plan: ExportPlan,
    output_dir: Path,
    say: Callable[[str], None],
    *,
    is_overwriting: bool = False,
    disk: Disk | None = None,
) -> list[Manifest]:
    """Writes the files of the export that are missing, and returns the manifests.

    Args:
        plan: all files of the export.
        output_dir: gets ``stage_0``, ``stage_1``..., and the journal.
        say: gets a line of progress for each file of weights.
        is_overwriting: whether to remove an export that is already there, of whatever model.
        disk: for tests.

    Raises:
        ConfigError: ``output_dir`` is inside the model's folder or no folder, the disk is too small, another export is
            in ``output_dir`` or being written to it, or a source file changes meanwhile.
        OSError: the disk failed. The same command continues the export afterwards.
    """
    disk = disk or Disk()
    _check_place(plan.model_dir, output_dir)
    disk.make_folder(output_dir)
    with _open_journal(output_dir) as stream:
        if is_overwriting:
            _discard(output_dir, stream, disk)
        records = _begin(plan, output_dir, stream, disk)
        missing = [file for file in plan.files if not _is_finished(file, output_dir, records)]
        if missing:
            _check_space(plan, missing, output_dir, disk)
            _mark_unfinished(plan, output_dir, disk)
            _write_files(plan, missing, output_dir, records, stream, say, disk)
        return _write_manifests(plan, output_dir, records, disk)


def verify_export(output_dir: Path, say: Callable[[str], None]) -> list[Manifest]:
    """Reads every byte of an export, or of one stage's folder alone, and compares it with the manifests.

    Raises ``ConfigError`` with every file that differs, is missing, or is not part of the export.
    """
    alone = read_manifest(output_dir)
    manifests = read_export(output_dir) if alone is None else [alone]
    problems: list[str] = []
    for manifest in manifests:
        folder = stage_folder(output_dir, manifest.stage) if alone is None else output_dir
        problems += _find_differences(folder, manifest)
        say(f"stage_{manifest.stage}: {len(manifest.files)} files read")
    if not problems and alone is None:
        problems = _check_id(manifests)
    if problems:
        lines = [f"{output_dir} is not what was exported:", *(f"  - {problem}" for problem in problems)]
        raise ConfigError("\n".join([*lines, "Copy these files again from a good export, or export with --overwrite."]))
    return manifests


def describe_bytes(num_bytes: int) -> str:
    """1 kB is 1000 bytes, 1 MB 10^6, 1 GB 10^9."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} bytes"


# ---- before the first byte -----------------------------------------------------------------------------------------


def _check_place(model_dir: Path, output_dir: Path) -> None:
    source, target = model_dir.resolve(), output_dir.resolve()
    if target == source or source in target.parents:
        raise ConfigError(
            f"--output-dir {output_dir} is {'' if target == source else 'inside '}the model's folder {model_dir}: "
            "give a folder outside of it, so that the full checkpoint stays as it is"
        )
    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigError(f"--output-dir {output_dir} is not a folder")


def _check_space(plan: ExportPlan, missing: Sequence[OutputFile], output_dir: Path, disk: Disk) -> None:
    for file in missing:
        partial = _partial_path(output_dir / file.key)
        if partial.exists():
            disk.remove(partial)
    needed = sum(file.num_bytes + _OVERHEAD_BYTES_PER_FILE for file in missing)
    free = disk.free_bytes(output_dir)
    if free < needed:
        already = plan.num_bytes - sum(file.num_bytes for file in missing)
        kept = f" beside {describe_bytes(already)} that are already there" if already else ""
        raise ConfigError(
            f"not enough space in {output_dir}: the export needs {describe_bytes(needed)}{kept}, "
            f"{describe_bytes(free)} are free; make room for {describe_bytes(needed - free)} more, or give another "
            "--output-dir"
        )


@contextmanager
def _open_journal(output_dir: Path) -> Iterator[IO[bytes]]:
    """Opens and locks the journal, so that two exports cannot write to one folder."""
    with (output_dir / JOURNAL_NAME).open("a+b", buffering=0) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another export is writing to {output_dir}: wait for it, or stop it") from error
        yield stream


def _begin(plan: ExportPlan, output_dir: Path, stream: IO[bytes], disk: Disk) -> dict[str, FileRecord]:
    """The journal's records. A new journal gets a header that describes the export."""
    lines = _read_journal(stream, output_dir)
    if not lines:
        _refuse_strangers(output_dir)
        _append(stream, _header(plan), disk)
        return {}
    _check_same(plan, lines[0], output_dir)
    return {line["file"]: FileRecord(line["bytes"], line["sha256"]) for line in lines[1:]}


def _header(plan: ExportPlan) -> dict[str, Any]:
    sources = {source.name: [source.num_bytes, source.mtime_ns] for source in plan.sources.values()}
    return {
        "journal_version": _JOURNAL_VERSION,
        "source": str(plan.model_dir.resolve()),
        "source_fingerprint": plan.source_fingerprint,
        "ranges": [str(layers) for layers in plan.ranges],
        "layout": plan.layout(),
        "source_files": sources,
    }


def _read_journal(stream: IO[bytes], output_dir: Path) -> list[dict[str, Any]]:
    """The journal's lines. An incomplete last line, which a kill left, is cut off."""
    stream.seek(0)
    whole = stream.read()
    end = whole.rfind(b"\n") + 1
    if end < len(whole):
        stream.truncate(end)
    try:
        lines = [json.loads(line) for line in whole[:end].splitlines()]
        if lines and lines[0]["journal_version"] != _JOURNAL_VERSION:
            raise ConfigError(f"{output_dir} was begun by another version of Stagewire: {_WAYS_OUT}")
        if not all(line.keys() == {"file", "bytes", "sha256"} for line in lines[1:]):
            raise ValueError("a line is not one of a file")
    except ConfigError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{output_dir / JOURNAL_NAME} is damaged ({error}): {_WAYS_OUT}") from error
    return lines


def _append(stream: IO[bytes], line: Mapping[str, Any], disk: Disk) -> None:
    disk.write(stream, json.dumps(line).encode() + b"\n")
    disk.sync(stream)


def _check_same(plan: ExportPlan, begun: Mapping[str, Any], output_dir: Path) -> None:
    """Compares the journal's header with the plan. Raises ``ConfigError`` with the most telling difference."""
    now = _header(plan)
    if begun == {**now, "source": begun.get("source")}:
        return  # the checkpoint's folder may have moved
    if begun.get("ranges") != now["ranges"]:
        reason = f"with layers {' '.join(begun.get('ranges', ()))}, now it would be {' '.join(now['ranges'])}"
    elif begun.get("source_fingerprint") != now["source_fingerprint"]:
        ids = f"{begun.get('source_fingerprint')}, {plan.model_dir} has {now['source_fingerprint']}"
        reason = f"from another model ({begun.get('source')}, fingerprint {ids})"
    elif difference := _source_difference(begun.get("source_files", {}), now["source_files"]):
        reason = f"from other files: {difference}"
    else:
        reason = "by a Stagewire that lays the files out otherwise"
    raise ConfigError(f"{output_dir} holds an export that was begun {reason}; {_WAYS_OUT}")


def _source_difference(begun: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    for name in sorted({*begun, *now}):
        if begun.get(name) == now.get(name):
            continue
        if name not in now or name not in begun:
            return f"{name} is {'gone' if name in begun else 'new'} in the model's folder"
        what = "bytes" if begun[name][0] != now[name][0] else "modification time (ns)"
        i = 0 if what == "bytes" else 1
        return f"{name} had {what} {begun[name][i]}, now {now[name][i]}"
    return None


# ---- what is already there -----------------------------------------------------------------------------------------


def _stage_folders(output_dir: Path) -> list[Path]:
    """The stage folders of any export, also of one with more stages."""
    return sorted(path for path in output_dir.glob("stage_*") if path.name.removeprefix("stage_").isdecimal())


def _is_empty(folder: Path) -> bool:
    """A folder that holds nothing, or only the unfinished first manifest that a kill left."""
    first = _partial_path(folder / MANIFEST_NAME)
    return folder.is_dir() and all(path == first for path in folder.iterdir())


def _refuse_strangers(output_dir: Path) -> None:
    for folder in _stage_folders(output_dir):
        if not _is_empty(folder):
            raise ConfigError(
                f"{folder} exists, and {JOURNAL_NAME} does not say that it is of this export: {_WAYS_OUT}"
            )


def _discard(output_dir: Path, stream: IO[bytes], disk: Disk) -> None:
    """Removes every stage folder, then empties the journal, so that a kill in between leaves the journal in place.

    Raises ``ConfigError``, before anything is removed, for a folder that no export has made.
    """
    folders = _stage_folders(output_dir)
    for folder in folders:
        if not (folder / MANIFEST_NAME).is_file() and not _is_empty(folder):
            raise ConfigError(
                f"{folder} has no {MANIFEST_NAME}, so no export has made it and --overwrite does not remove it: "
                "move it away, or give another --output-dir"
            )
    for folder in folders:
        if (folder / MANIFEST_NAME).is_file():
            _write_whole(folder / MANIFEST_NAME, encode_unfinished(0, 0), disk)
        _remove_content(folder, disk)
        disk.remove(folder)
    stream.truncate(0)


def _remove_content(folder: Path, disk: Disk) -> None:
    """Removes the manifest last, because a folder without one does not count as an export's."""
    manifest = folder / MANIFEST_NAME
    for parent, folders, names in os.walk(folder, topdown=False):
        for path in (Path(parent) / name for name in (*names, *folders)):
            if path != manifest:
                disk.remove(path)
    if manifest.exists():
        disk.remove(manifest)


def _is_finished(file: OutputFile, output_dir: Path, records: Mapping[str, FileRecord]) -> bool:
    record, path = records.get(file.key), output_dir / file.key
    return record is not None and path.is_file() and path.stat().st_size == record.num_bytes == file.num_bytes


# ---- writing -------------------------------------------------------------------------------------------------------


def _mark_unfinished(plan: ExportPlan, output_dir: Path, disk: Disk) -> None:
    for stage in range(len(plan.ranges)):
        folder = stage_folder(output_dir, stage)
        disk.make_folder(folder)
        content = encode_unfinished(stage, len(plan.ranges))
        if _content(folder / MANIFEST_NAME) != content:
            _write_whole(folder / MANIFEST_NAME, content, disk)


def _write_files(
    plan: ExportPlan,
    missing: Sequence[OutputFile],
    output_dir: Path,
    records: dict[str, FileRecord],
    stream: IO[bytes],
    say: Callable[[str], None],
    disk: Disk,
) -> None:
    total = sum(file.num_bytes for file in missing)
    written = 0
    if len(missing) < len(plan.files):
        say(f"{len(plan.files) - len(missing)} of {len(plan.files)} files are already there")
    for number, file in enumerate(missing, 1):
        records[file.key] = _write_file(plan, file, output_dir / file.key, stream, disk)
        written += file.num_bytes
        so_far = f"{number} of {len(missing)} files, {describe_bytes(written)} of {describe_bytes(total)}"
        if file.name.endswith(".safetensors"):  # the other files are many and small
            say(f"{file.key}: {describe_bytes(file.num_bytes)} ({so_far})")


def _write_file(plan: ExportPlan, file: OutputFile, path: Path, stream: IO[bytes], disk: Disk) -> FileRecord:
    disk.make_folder(path.parent)
    digest = hashlib.sha256(file.head)
    with disk.create(_partial_path(path)) as output:
        disk.write(output, file.head)
        for chunk in _read_pieces(plan.model_dir, file.pieces):
            digest.update(chunk)
            disk.write(output, chunk)
        disk.sync(output)
    for name in {piece.file: None for piece in file.pieces}:
        _check_unchanged(plan, name)
    record = FileRecord(file.num_bytes, digest.hexdigest())
    _append(stream, {"file": file.key, "bytes": record.num_bytes, "sha256": record.sha256}, disk)
    disk.rename(_partial_path(path), path)
    return record


def _read_pieces(model_dir: Path, pieces: Sequence[Piece]) -> Iterator[memoryview]:
    """Reads the pieces in chunks, each valid until the next one. The pieces of one output come from one file."""
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, max((piece.num_bytes for piece in pieces), default=0))))
    for name in {piece.file: None for piece in pieces}:
        with (model_dir / name).open("rb", buffering=0) as source:
            for piece in pieces:
                if piece.file == name:
                    yield from _read_piece(source, piece, buffer)


def _read_piece(source: FileIO, piece: Piece, buffer: memoryview) -> Iterator[memoryview]:
    source.seek(piece.offset)
    left = piece.num_bytes
    while left:
        count = source.readinto(buffer[: min(left, len(buffer))])
        if not count:
            raise ConfigError(f"{source.name} became shorter while it was read; {_CHANGED}")
        yield buffer[:count]
        left -= count


_CHANGED = "let nothing write to the model's folder during the export, and run it again"


def _check_unchanged(plan: ExportPlan, name: str) -> None:
    before, now = plan.sources[name], SourceFile.of(plan.model_dir, name)
    if now != before:
        raise ConfigError(
            f"{plan.model_dir / name} changed while it was exported ({before.num_bytes} bytes, modified at "
            f"{before.mtime_ns} ns; now {now.num_bytes}, {now.mtime_ns}); {_CHANGED}"
        )


def _write_manifests(
    plan: ExportPlan, output_dir: Path, records: Mapping[str, FileRecord], disk: Disk
) -> list[Manifest]:
    """Writes the manifest of each stage that does not have it already, and returns all."""
    own = {file.key: records[file.key] for file in plan.files}
    export_id = derive_export_id(plan.source_fingerprint, plan.ranges, own)
    manifests = []
    for stage, layers in enumerate(plan.ranges):
        files = {file.name: own[file.key] for file in plan.files if file.stage == stage}
        manifest = Manifest(
            stage=stage,
            num_stages=len(plan.ranges),
            layers=layers,
            num_layers=plan.num_layers,
            source_fingerprint=plan.source_fingerprint,
            export_id=export_id,
            files=files,
            source_samples=plan.source_samples,
            own_samples=plan.stage_samples[stage],
        )
        folder = stage_folder(output_dir, stage)
        if read_manifest_if_finished(folder) != manifest:
            _write_whole(folder / MANIFEST_NAME, encode_manifest(manifest), disk)
        manifests.append(manifest)
    return manifests


def _write_whole(path: Path, content: bytes, disk: Disk) -> None:
    with disk.create(_partial_path(path)) as output:
        disk.write(output, content)
        disk.sync(output)
    disk.rename(_partial_path(path), path)


def _partial_path(path: Path) -> Path:
    return path.with_name(path.name + _PARTIAL)


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


# ---- reading it back -----------------------------------------------------------------------------------------------


def _find_differences(folder: Path, manifest: Manifest) -> Iterator[str]:
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            yield f"{path} is missing"
        elif (num_bytes := path.stat().st_size) != record.num_bytes:
            yield f"{path} has {num_bytes} bytes, {MANIFEST_NAME} says {record.num_bytes}"
        elif (found := hash_file(path)) != record.sha256:
            yield f"{path} has sha256 {found}, {MANIFEST_NAME} says {record.sha256}"
    names = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    present = {name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts)}
    for name in sorted(present - {*manifest.files, MANIFEST_NAME}):
        yield f"{folder / name} is not part of the export"


def _check_id(manifests: Sequence[Manifest]) -> list[str]:
    """The problem, if the id in the manifests is not the one that follows from their content."""
    files = {f"stage_{each.stage}/{name}": record for each in manifests for name, record in each.files.items()}
    found = derive_export_id(manifests[0].source_fingerprint, [each.layers for each in manifests], files)
    expected = manifests[0].export_id
    return [] if found == expected else [f"the manifests give the export id {expected}, their content has {found}"]
