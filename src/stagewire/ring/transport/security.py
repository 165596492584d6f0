"""Who may take part in a ring: the key file, the folder of local sockets, and which address needs which protection.

    address            without a key                                     with a key
    loopback           Unix sockets in a folder of this user's own       CURVE
    private network    plain, with a warning                             CURVE
    any other          refused, or plain with --pipeline-allow-insecure  CURVE

On loopback the kernel decides who is let in: a folder of mode 0700 keeps other users from connecting, and from
listening in a stage's place. No secret is sent, and tensors cost no more than over TCP.

Knows files, modes and addresses. Connections (transport/zmq_transport.py) are not known here, and flags only by name.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import os
import re
import secrets
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path

from stagewire.config import ALLOW_INSECURE_FLAG, KEY_FILE_FLAG, StageConfig
from stagewire.errors import ConfigError
from stagewire.folders import MAX_SOCKET_PATH_BYTES
from stagewire.ring.transport import hosts
from stagewire.ring.transport.hosts import normalize

__all__ = [
    "OPEN",
    "Reach",
    "RingKey",
    "SecuredStage",
    "Security",
    "make_key_file",
    "read_key_file",
    "runtime_folder",
    "secure",
    "secure_stage",
]

KEY_BYTES = 32
MAX_KEY_FILE_BYTES = 4096
# The longest name of a local socket: a host's digest, a port, the number of a namespace (64 bits), two dashes.
DIGEST_CHARS = 12
MAX_NAME_BYTES = DIGEST_CHARS + 5 + 16 + 2

_KEY_LINE = re.compile(r"stagewire-key-1 ([0-9a-f]{64}) ([0-9a-f]{64})")
_KEY_FILE = """\
# Key of a Stagewire ring. Whoever has it can take part in the ring and read what travels there.
# Copy it to every host of the ring, readable for its owner only (chmod 600), and name it in --pipeline-key-file.
stagewire-key-1 {listener} {caller}
"""

_PRIVATE = [
    ipaddress.ip_network(text)
    for text in (
        *("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"),  # RFC 1918
        "100.64.0.0/10",  # shared address space, RFC 6598; overlays such as Tailscale use it
        *("169.254.0.0/16", "fe80::/10"),  # link-local
        "fc00::/7",  # unique local, RFC 4193
    )
]


# ---- keys ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RingKey:
    """The two secrets that all stages of a ring share, 32 bytes each: of the end that listens, of the end that calls.

    There are two, so that the two ends of CURVE's handshake never use the same pair of keys.
    """

    listener: bytes = field(repr=False)
    caller: bytes = field(repr=False)


def make_key_file(path: Path) -> None:
    """Writes a new key, readable for this user only.

    Raises:
        ConfigError: the file exists already, or cannot be written.
    """
    text = _KEY_FILE.format(listener=secrets.token_hex(KEY_BYTES), caller=secrets.token_hex(KEY_BYTES))
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise ConfigError(f"{path} exists: a ring may be using that key; choose another name, or delete it") from None
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    with os.fdopen(fd, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(fd)


def read_key_file(path: Path) -> RingKey:
    """The key in a file that belongs to this user or root and that nobody else can read.

    Raises:
        ConfigError: no such file, others could read or write it, or it holds no key.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(
            f"{KEY_FILE_FLAG} {path} cannot be read: {error.strerror}; `stagewire keys FILE` makes one, once for a ring"
        ) from error
    try:
        _check_key_file(path, os.fstat(fd))
        text = os.read(fd, MAX_KEY_FILE_BYTES).decode("ascii", "replace")
    finally:
        os.close(fd)
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    match = _KEY_LINE.fullmatch(lines[0]) if len(lines) == 1 else None
    if match is None:
        raise ConfigError(f"{KEY_FILE_FLAG} {path} holds no key of a ring: make one with `stagewire keys FILE`")
    return RingKey(bytes.fromhex(match[1]), bytes.fromhex(match[2]))


def _check_key_file(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{KEY_FILE_FLAG} {path} is not a file")
    if found.st_uid not in (os.geteuid(), 0):
        raise ConfigError(
            f"{KEY_FILE_FLAG} {path} belongs to user {found.st_uid}, not to {os.geteuid()}, who runs this stage: "
            f"copy it to a file of your own, then chmod 600"
        )
    if found.st_mode & 0o077:
        raise ConfigError(
            f"{KEY_FILE_FLAG} {path} has mode {stat.S_IMODE(found.st_mode):04o}: others than its owner can use it; "
            f"chmod 600 {path}, and if they may have read it, make a new one"
        )


# ---- addresses -----------------------------------------------------------------------------------------------------


class Reach(Enum):
    """Who can reach an address."""

    LOOPBACK = "this machine"
    PRIVATE = "a private network"
    PUBLIC = "other networks"

    @classmethod
    def of(cls, host: str) -> Reach:
        """Of a numeric address. The one that stands for all addresses of a machine can be reached from anywhere."""
        address = ipaddress.ip_address(normalize(host).partition("%")[0])
        if address.is_loopback:
            return cls.LOOPBACK
        return cls.PRIVATE if any(address in network for network in _PRIVATE) else cls.PUBLIC


# ---- local sockets -------------------------------------------------------------------------------------------------


def runtime_folder(
    environ: Mapping[str, str],
    uid: int,
    run: Path = Path("/run/user"),
    tmp: Path = Path("/tmp"),
    shm: Path = Path("/dev/shm"),
) -> Path:
    """The folder for this user's sockets, made if need be. It is the same for every process of the user.

    It is not below TMPDIR, because the launcher gives each stage its own. It is in /dev/shm if /tmp cannot be written,
    as in a container with a read-only file system.

    Raises:
        ConfigError: another user could use what is there.
    """
    for base in (environ.get("XDG_RUNTIME_DIR"), run / str(uid)):
        if base and _is_own(Path(base), uid) and _has_room(folder := Path(base) / "stagewire"):
            return _make_private(folder, uid)
    base = next((each for each in (tmp, shm) if os.access(each, os.W_OK | os.X_OK)), tmp)
    return _make_private(base / f"stagewire-{uid}", uid)


def _has_room(folder: Path) -> bool:
    """Whether every local socket's path is short enough in this folder."""
    return len(os.fsencode(folder)) + 1 + MAX_NAME_BYTES <= MAX_SOCKET_PATH_BYTES


def _is_own(folder: Path, uid: int) -> bool:
    try:
        found = folder.stat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == uid and not found.st_mode & 0o022


def _make_private(folder: Path, uid: int) -> Path:
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise ConfigError(f"cannot make {folder} for the stages' local sockets: {error.strerror}") from error
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != uid or found.st_mode & 0o077:
        raise ConfigError(
            f"{folder} must be a folder that only user {uid} can use (it is of user {found.st_uid}, mode "
            f"{stat.S_IMODE(found.st_mode):04o}): remove it, or chmod 700 if it is yours"
        )
    return folder


def _socket_name(host: str, port: int) -> str:
    return f"{host}-{port}-{_network_id():x}"


def _network_id() -> int:
    """Of this process's network namespace. Each has a loopback interface of its own."""
    return Path("/proc/self/ns/net").stat().st_ino


# ---- the rules -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Security:
    """How a stage's connections are protected.

    Args:
        key: the ring's; None: without a key.
        find_folder: gives the folder of this user's local sockets, which stages without a key use. It makes the folder
            if need be, also when it has vanished since (a log-out, tmpfiles), and raises ConfigError if it cannot.
            None: loopback is plain TCP.
        allows_insecure: whether plain connections to and from anywhere are allowed.
    """

    key: RingKey | None = None
    find_folder: Callable[[], Path] | None = None
    allows_insecure: bool = False

    @classmethod
    def of_folder(cls, folder: Path, key: RingKey | None = None, *, allows_insecure: bool = False) -> Security:
        """With local sockets in this folder, whatever the environment says."""
        return cls(key, partial(_make_private, folder, os.geteuid()), allows_insecure)

    @property
    def has_local_sockets(self) -> bool:
        """Whether stages on this machine use Unix sockets where they can."""
        return self.key is None and self.find_folder is not None

    def is_local(self, host: str) -> bool:
        """Whether a numeric host is reached by a Unix socket only."""
        return self.has_local_sockets and hosts.is_loopback(host)

    def socket_path(self, host: str, port: int) -> str:
        """The path of the Unix socket that stands for a numeric host and port of this machine.

        Raises:
            ConfigError: there is no folder for it.
        """
        assert self.find_folder is not None
        folder = self.find_folder()
        path = str(folder / _socket_name(normalize(host), port))
        if len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES:
            return path
        digest = hashlib.sha256(normalize(host).encode()).hexdigest()[:DIGEST_CHARS]
        return str(folder / _socket_name(digest, port))

    def other_paths(self, host: str, port: int) -> dict[str, str]:
        """The sockets that stand for the same port under other addresses of this machine, as path to host.

        The processes of some may be gone.
        """
        own = self.socket_path(host, port)
        suffix = _socket_name("", port)
        names = sorted(name for name in os.listdir(os.path.dirname(own)) if name.endswith(suffix))
        found = {os.path.join(os.path.dirname(own), name): name.removesuffix(suffix) for name in names}
        found.pop(own, None)
        return found

    def problem(self, host: str) -> str | None:
        """Why a numeric address must not be used with this protection; None: it may be."""
        if self.key is not None or self.allows_insecure:
            return None
        reach = Reach.of(host)
        if reach is Reach.LOOPBACK and self.find_folder is None:
            return f"{host} needs a folder for local sockets: set XDG_RUNTIME_DIR to one that only this user can use"
        if reach is not Reach.PUBLIC:
            return None
        return (
            f"{host} can be reached from {Reach.PUBLIC.value}, and without a key anybody there could read and change "
            f"what travels: give every stage the same {KEY_FILE_FLAG} (`stagewire keys FILE` makes it), use addresses "
            f"of a private network, or add {ALLOW_INSECURE_FLAG} if the network itself keeps others out"
        )

    def warning(self, host: str) -> str | None:
        """What a person must be warned of at a numeric address that is used without a key."""
        if self.key is not None or Reach.of(host) is Reach.LOOPBACK:
            return None
        return (
            f"NOT PROTECTED: connections at {host} are neither encrypted nor authenticated. Whoever can reach them or "
            f"listen on that network can read prompts and answers, change them, and take a stage's place. Make a key "
            f"with `stagewire keys FILE`, copy the file to every host, and give every stage {KEY_FILE_FLAG} FILE"
        )


# Plain TCP everywhere, for tests and measurements.
OPEN = Security(allows_insecure=True)


def secure(config: StageConfig, known_hosts: list[str]) -> Security:
    """The protection that a stage's settings ask for.

    Args:
        known_hosts: the numeric addresses that the stage listens on and calls, as far as they are known.

    Raises:
        ConfigError: an unusable key file, or an address that needs one.
    """
    key = read_key_file(Path(config.key_file).expanduser()) if config.key_file is not None else None
    find_folder: Callable[[], Path] | None = partial(runtime_folder, os.environ, os.geteuid())
    try:
        runtime_folder(os.environ, os.geteuid())
    except ConfigError:  # a stage with a key, or without a loopback address, needs no such folder
        if key is None and any(Reach.of(host) is Reach.LOOPBACK for host in known_hosts):
            raise
        find_folder = None
    security = Security(key, find_folder, config.allow_insecure)
    problems = [problem for host in known_hosts if (problem := security.problem(host))]
    if problems:
        raise ConfigError(f"stage {config.stage}: {problems[0]}")
    return security


@dataclass(frozen=True)
class SecuredStage:
    """Where a stage listens, and how it is protected.

    Args:
        host: numeric; None while the predecessor's name does not resolve, or while there is no route to it. The
            transport waits for it then, and checks it like this (`Security.problem`) before it listens or connects.
        security: how its connections are protected.
        warnings: for people.
    """

    host: str | None
    security: Security
    warnings: list[str]


def secure_stage(config: StageConfig) -> SecuredStage:
    """Checks the addresses and the key file of a stage.

    Raises:
        ConfigError: an address that needs a key, an unusable key file, or no such host to listen on.
    """
    own: str | None = None
    try:
        own = hosts.bind_host(config)
    except OSError as error:
        if config.bind_host:
            flag = f"--pipeline-local-bind-host {config.bind_host}"
            raise ConfigError(f"{flag}: {error}; give a numeric address") from error
    known = [] if own is None else [own]
    with contextlib.suppress(OSError):
        known.append(hosts.resolve(config.predecessor))
    security = secure(config, known)
    warnings = [warning for host in dict.fromkeys(known) if (warning := security.warning(host))]
    return SecuredStage(own, security, warnings)
