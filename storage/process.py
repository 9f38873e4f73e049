"""Which process on which machine a driver is, so that one beside it can tell that it is gone before its lease says so."""

import os
import re
import socket
from pathlib import Path

_PROC = Path("/proc")
_NAMED = re.compile(r"^pid (?P<pid>\d+) on .*, since (?P<since>\d+) of boot (?P<where>\S+)$")


def name_of_this() -> str:
    """This process for people, and for whoever shares its machine."""
    pid, where = os.getpid(), _where()
    since = _since(pid)
    told = f"pid {pid} on {socket.gethostname()}"
    return told if where is None or since is None else f"{told}, since {since} of boot {where}"


def is_gone(name: str) -> bool:
    """Whether the process of this name ran here and does no more; False where it cannot be known from here."""
    found = _NAMED.match(name)
    if found is None or found["where"] != _where():
        return False
    return _since(int(found["pid"])) != int(found["since"])


def _where() -> str | None:
    """The machine since it was started, and the numbering of its processes: containers on one machine each have their own."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat(_PROC / 'self/ns/pid').st_ino}"
    except OSError:
        return None


def _since(pid: int) -> int | None:
    """When a process began, in ticks since the boot; None for one that has ended, waited for or not."""
    try:
        # Its name, in parentheses, may hold anything.
        fields = (_PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])
