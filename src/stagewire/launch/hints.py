"""Why a stage ended, from its exit status and the end of its log, when it did not say so itself. Pure."""

from __future__ import annotations

import re
import signal

__all__ = ["hint", "last_error"]

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
# "(EngineCore pid=12) ERROR 11-23 22:43:01 [core.py:123] ValueError: ..." -> "ValueError: ..."
_VLLM_PREFIX = re.compile(r"^(?:\([^)]*\bpid=\d+\)\s*)?(?:[A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]+\] ?)?")
# A line of vLLM's log that tells of no error. Some name errors that may come, or that it has dealt with.
_NO_ERROR = re.compile(r"^(?:\([^)]*\bpid=\d+\)\s*)?(?:DEBUG|INFO|WARNING) \d\d-\d\d \d\d:\d\d:\d\d ")
_EXCEPTION = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit|Compiler|Lost)\b(?:: .*)?$")
_USAGE_ERROR = re.compile(r"^[\w ./-]+: error: ")
# What a parent process says of a child whose own error is further up.
_SECOND_HAND = ("Engine core initialization failed", "EngineCore encountered an issue", "Engine core process died")
_NUM_TAIL_LINES = 5

_SAVE_MEMORY = "use more stages, a smaller --max-model-len, or a smaller KV cache (--kv-cache-memory-bytes)"
_COMPILE_CACHE = "a compilation that was stopped half-way leaves broken files: remove ~/.cache/vllm/torch_compile_cache"
_KILLED = (
    "something killed it, most often the kernel when memory runs out (`dmesg | grep -i oom` tells): " + _SAVE_MEMORY
)
_HINTS = (
    (r"was killed by SIGKILL", _KILLED),  # a head says so of its EngineCore
    (
        r"out of memory|OutOfMemoryError|Cannot allocate memory|DefaultCPUAllocator|std::bad_alloc|MemoryError"
        r"|Available memory on node",
        f"not enough memory: {_SAVE_MEMORY}",
    ),
    (
        r"Address already in use|EADDRINUSE",
        "a port is taken by another program: choose others with --port, --base-port",
    ),
    (
        r"No space left on device|Disk quota exceeded",
        "a disk is full: free some space, also in /tmp; /dev/shm of a container grows with `docker run --shm-size`",
    ),
    (
        r"Read-only file system|No usable temporary directory"
        r"|Permission denied: '[^']*(?:\.cache|\.config|\.triton|/tmp)",
        "a folder that has to be written is read-only: set HOME and TMPDIR to folders that can be written",
    ),
    (r"getpwuid\(\): uid not found", "passwd does not know this user: set USER and HOME"),
    (
        r"can't start new thread|Thread creation failed|pthread_create.*(?:failed|Resource temporarily unavailable)"
        r"|fork: Resource temporarily unavailable|BlockingIOError: \[Errno 11\]",
        "there may be no more processes and threads: raise `ulimit -u`, or `docker run --pids-limit`",
    ),
    (r"Too many open files|EMFILE", "there may be no more open files: raise `ulimit -n`"),
    (
        r"InvalidCxxCompiler|No working C\+\+ compiler",
        "compiling on CPU needs g++: install it, or add `-- --enforce-eager`",
    ),
    (
        r"Repository Not Found|is not a local folder|Can't load the configuration of|Invalid repository ID",
        "the model was not found: --model takes the folder with config.json and the weights",
    ),
    (r"InductorError.*(?:OSError|ImportError|file too short)", _COMPILE_CACHE),
    (r"Illegal instruction", "this CPU lacks instructions that this data type uses: try `-- --dtype float32`"),
)
_SIGNAL_HINTS = {
    signal.SIGKILL: _KILLED,
    signal.SIGILL: "this CPU lacks instructions (AMX, AVX-512) that this data type uses: try `-- --dtype float32`",
    signal.SIGBUS: "a file could not be read to its end, or shared memory is full: check the disk, and /dev/shm, which "
    "in a container has 64 MB unless `docker run --shm-size` says more; " + _COMPILE_CACHE,
}


def hint(returncode: int, log_tail: str) -> str | None:
    """What to try next, where the cause is known. ``returncode`` is negative for a signal."""
    for number, text in _SIGNAL_HINTS.items():
        if returncode in (-number, 128 + number):
            return text
    errors = "\n".join(line for line in log_tail.splitlines() if not _NO_ERROR.match(_ANSI.sub("", line)))
    return next((text for pattern, text in _HINTS if re.search(pattern, errors, re.IGNORECASE)), None)


def last_error(log_tail: str) -> str:
    """The last line that names an error; the last few lines when none does."""
    lines = [_VLLM_PREFIX.sub("", _ANSI.sub("", line)).rstrip() for line in log_tail.splitlines()]
    errors = [line for line in lines if _EXCEPTION.match(line) or _USAGE_ERROR.match(line)]
    first_hand = [line for line in errors if not any(text in line for text in _SECOND_HAND)]
    if errors:
        return (first_hand or errors)[-1]
    return "\n".join([line for line in lines if line][-_NUM_TAIL_LINES:])
