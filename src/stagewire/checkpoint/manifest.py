"""The manifest ``stagewire.json`` of a pre-split stage's folder: what it says, and whether the folder agrees with it.

Encodes, reads and checks manifests; ``checkpoint/export_writer.py`` writes them. Standard library only. A manifest has
a checksum of itself, so that a layer range that was edited by hand is noticed. The manifest of an unfinished export
says that, and has no files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from stagewire.errors import ConfigError
from stagewire.plan.ranges import LayerRange, find_problems

__all__ = [
    "MANIFEST_NAME",
    "FileRecord",
    "Manifest",
    "check_files",
    "check_place",
    "check_samples",
    "derive_export_id",
    "encode_manifest",
    "encode_unfinished",
    "hash_file",
    "read_export",
    "read_manifest",
    "read_manifest_if_finished",
    "stage_folder",
]

MANIFEST_NAME = "stagewire.json"
FORMAT_VERSION = 1
_CHECKSUM = "checksum"
_MAX_MANIFEST_BYTES = 16_000_000
_ID_DIGITS = 16
_CHUNK_BYTES = 1 << 20
# A small file on which the model's numbers depend, so it is hashed at every start and not only by --verify.
_HASHED_AT_START = ("config.json",)


@dataclass(frozen=True)
class FileRecord:
    """One file of a stage's folder; ``sha256`` in hexadecimal."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A finished stage's folder and its place in the export.

    ``files``: by name relative to the folder (``/``), without the manifest. ``source_fingerprint`` is
    ``index.fingerprint`` of the whole checkpoint; the folder's own differs, because it has a part of the tensors.
    ``export_id`` follows from the content and is equal on all stages of one export. ``source_samples`` and
    ``own_samples`` are the digests of `samples.sample_weights` for the checkpoint and of `samples.sample_tensors` for
    this stage; both are empty in older exports.
    """

    stage: int
    num_stages: int
    layers: LayerRange
    num_layers: int
    source_fingerprint: str
    export_id: str
    files: Mapping[str, FileRecord]
    source_samples: str = ""
    own_samples: str = ""


def stage_folder(output_dir: Path, stage: int) -> Path:
    return output_dir / f"stage_{stage}"


def derive_export_id(source_fingerprint: str, ranges: Sequence[LayerRange], files: Mapping[str, FileRecord]) -> str:
    """16 hexadecimal digits over everything that was exported.

    ``files``: of all stages, with names such as ``stage_0/config.json``.
    """
    hashes = [[name, record.num_bytes, record.sha256] for name, record in sorted(files.items())]
    content = [source_fingerprint, [str(layers) for layers in ranges], hashes]
    return hashlib.sha256(_canonical(content)).hexdigest()[:_ID_DIGITS]


def encode_manifest(manifest: Manifest) -> bytes:
    content = {
        "format_version": FORMAT_VERSION,
        "complete": True,
        "stage": manifest.stage,
        "num_stages": manifest.num_stages,
        "layer_range": str(manifest.layers),
        "num_layers": manifest.num_layers,
        "source_fingerprint": manifest.source_fingerprint,
        "export_id": manifest.export_id,
        "source_samples": manifest.source_samples,
        "own_samples": manifest.own_samples,
        "files": {
            name: {"bytes": record.num_bytes, "sha256": record.sha256}
            for name, record in sorted(manifest.files.items())
        },
    }
    return _encode(content)


def encode_unfinished(stage: int, num_stages: int) -> bytes:
    """The manifest of an unfinished export. It is written before a folder's first file, and replaced after the last
    file of all stages.
    """
    return _encode(
        {"format_version": FORMAT_VERSION, "complete": False, "stage": stage, "num_stages": num_stages, "files": {}}
    )


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a pre-split stage's folder; ``None`` for any other folder, such as a full checkpoint.

    Raises ``ConfigError`` for a manifest that is damaged, of another format version, or of an unfinished export.
    """
    path = folder / MANIFEST_NAME
    content = _read_content(path)
    if content is None:
        return None
    if content.get("complete") is not True:
        raise ConfigError(
            f"{folder} is an unfinished export ({MANIFEST_NAME} says complete: false): "
            "run the same export again, it goes on where it stopped"
        )
    try:
        return _parse(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error


def read_manifest_if_finished(folder: Path) -> Manifest | None:
    """`read_manifest` for the writer, which replaces whatever is there: ``None`` instead of an error."""
    try:
        return read_manifest(folder)
    except ConfigError:
        return None


def read_export(output_dir: Path) -> list[Manifest]:
    """The manifests of all stages of one whole export in ``output_dir``, in order.

    Raises ``ConfigError`` with every stage that is missing, unfinished, damaged, or of another export.
    """
    first = read_manifest(stage_folder(output_dir, 0))
    if first is None:
        raise ConfigError(
            f"{stage_folder(output_dir, 0)} is no pre-split stage (no {MANIFEST_NAME} in it): expected a folder "
            "made by `stagewire export --output-dir`, with stage_0, stage_1 and so on in it"
        )
    manifests, problems = [first], []
    for stage in range(first.num_stages):
        try:
            manifest = read_manifest(stage_folder(output_dir, stage))
        except ConfigError as error:
            problems.append(str(error))
            continue
        if manifest is None:
            problems.append(f"{stage_folder(output_dir, stage)} is missing, or has no {MANIFEST_NAME}")
            continue
        problems += _set_problems(first, manifest, stage)
        manifests[stage:] = [manifest]
    if not problems:
        problems = find_problems([manifest.layers for manifest in manifests], first.num_layers)
    if problems:
        raise ConfigError(f"{output_dir} is not one whole export of {first.num_stages} stages: {'; '.join(problems)}")
    return manifests


def check_files(folder: Path, manifest: Manifest) -> None:
    """Checks that every file is there with its size, config.json is unchanged, and no other weights are beside them.

    Reads no weights. Raises ``ConfigError`` naming the first file that differs, with both values.
    """
    for path in sorted(folder.glob("*.safetensors")):  # without an index, vLLM loads all of them
        if path.name not in manifest.files and not path.name.startswith("."):
            raise ConfigError(
                f"{path} is not part of this pre-split stage ({MANIFEST_NAME} does not list it): remove it"
            )
    for name, record in manifest.files.items():
        path = folder / name
        try:
            num_bytes = path.stat().st_size
        except OSError as error:
            raise ConfigError(f"{path} is missing from this pre-split stage ({error.strerror}); {_AGAIN}") from error
        if num_bytes != record.num_bytes:
            raise ConfigError(f"{path} has {num_bytes} bytes, {MANIFEST_NAME} says {record.num_bytes}; {_AGAIN}")
        if name in _HASHED_AT_START and (found := hash_file(path)) != record.sha256:
            raise ConfigError(
                f"{path} was changed after the export (sha256 {found[:12]}, {MANIFEST_NAME} says "
                f"{record.sha256[:12]}): change the full model and export it again, or give --hf-overrides on every "
                "stage"
            )


def check_place(
    manifest: Manifest, folder: Path, stage: int | None, num_stages: int | None, layers: LayerRange | None
) -> None:
    """Compares the manifest with the flags of a stage; ``None`` for a flag that was not given.

    Raises ``ConfigError``, with both values, for an index, a total or a range that the manifest contradicts.
    """
    pairs = [
        ("--pipeline-stage-idx", stage, manifest.stage),
        ("--pipeline-total-stages", num_stages, manifest.num_stages),
        ("--pipeline-layer-range", layers, manifest.layers),
    ]
    for flag, given, own in pairs:
        if given is not None and given != own:
            raise ConfigError(
                f"{flag} {given} contradicts {folder}, which was exported as stage {manifest.stage} of "
                f"{manifest.num_stages} with layers {manifest.layers}: give {flag} {own}, "
                "or the folder of the stage that is meant"
            )


def check_samples(folder: Path, manifest: Manifest, found: str) -> None:
    """Raises ``ConfigError`` when the weights changed. ``found``: the folder's digest of `samples.sample_tensors`."""
    if manifest.own_samples not in ("", found):
        raise ConfigError(
            f"{folder} does not hold the weights that were exported (a sample of their values gives {found}, "
            f"{MANIFEST_NAME} says {manifest.own_samples}): was it copied by half? {_AGAIN}"
        )


def hash_file(path: Path) -> str:
    """The file's SHA-256 in hexadecimal, read in small pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


_AGAIN = "copy the folder again, or run the export again; `stagewire export --verify --output-dir` checks every byte"


def _set_problems(first: Manifest, manifest: Manifest, stage: int) -> Iterator[str]:
    if manifest.stage != stage:
        yield f"stage_{stage} holds stage {manifest.stage}"
    for what, expected, found in (
        ("of", f"{first.num_stages} stages", f"{manifest.num_stages} stages"),
        ("of", f"a model of {first.num_layers} layers", f"a model of {manifest.num_layers} layers"),
        ("from the source", first.source_fingerprint, manifest.source_fingerprint),
        ("of export", first.export_id, manifest.export_id),
    ):
        if expected != found:
            yield f"stage_{stage} is {what} {found}, stage_0 {what} {expected}"
            return


def _encode(content: dict[str, Any]) -> bytes:
    whole = {**content, _CHECKSUM: _checksum(content)}
    return json.dumps(whole, indent=1).encode() + b"\n"


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical({key: content[key] for key in content if key != _CHECKSUM})).hexdigest()


def _canonical(content: object) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _read_content(path: Path) -> dict[str, Any] | None:
    """The JSON object, after its version and checksum were checked; ``None`` when there is no such file."""
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise _damaged(path, f"{path.stat().st_size} bytes, more than {_MAX_MANIFEST_BYTES}")
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ConfigError:  # also a ValueError, which is caught below
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(content, dict):
        raise _damaged(path, f"expected a JSON object, found {type(content).__name__}")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"{path} has format version {version!r}, this Stagewire reads {FORMAT_VERSION}: "
            "export the model again with this version, or serve it with the version that exported it"
        )
    if content.get(_CHECKSUM) != _checksum(content):
        raise _damaged(path, f"its checksum is {_checksum(content)[:12]}, it says {str(content.get(_CHECKSUM))[:12]}")
    return content


def _damaged(path: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"{path} is damaged ({reason}): it is no longer what the export wrote; copy the stage's folder again, "
        "or run the export again"
    )


def _parse(content: Mapping[str, Any]) -> Manifest:
    """Raises KeyError, TypeError, ValueError or AttributeError for a manifest that another program made.

    The checksum is right by now, so it is not damage.
    """
    stage, num_stages, num_layers = content["stage"], content["num_stages"], content["num_layers"]
    if not all(type(number) is int for number in (stage, num_stages, num_layers)) or not 0 <= stage < num_stages:
        raise ValueError(f"stage {stage!r} of {num_stages!r}, {num_layers!r} layers")
    names = list(content["files"])
    wrong = [name for name in names if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    if wrong:
        raise ValueError(f"a file outside the folder: {wrong[0]!r}")
    return Manifest(
        stage=stage,
        num_stages=num_stages,
        layers=LayerRange.parse(content["layer_range"]),
        num_layers=num_layers,
        source_fingerprint=str(content["source_fingerprint"]),
        export_id=str(content["export_id"]),
        files={name: FileRecord(int(each["bytes"]), str(each["sha256"])) for name, each in content["files"].items()},
        source_samples=str(content.get("source_samples", "")),
        own_samples=str(content.get("own_samples", "")),
    )
