"""Where Triton keeps what it has compiled: a folder of this node, because on a network disk workers crash into each other.

The race is triton#11512. Only what Triton would choose by itself is moved; a folder that the user named is theirs.
"""

import os
import tempfile
from pathlib import Path

NETWORK = frozenset(
    {
        "9p",
        "afs",
        "beegfs",
        "ceph",
        "cifs",
        "fuse.glusterfs",
        "fuse.sshfs",
        "gpfs",
        "lustre",
        "nfs",
        "nfs4",
        "smb3",
    }
)
"""File systems that several nodes share."""
MOUNTS = Path("/proc/mounts")


def file_system(path: Path, mounts: str) -> str:
    """The type of the file system that holds a path, from the text of /proc/mounts; empty where none is named."""
    found, longest = "", -1
    for line in mounts.splitlines():
        parts = line.split()
        if len(parts) < 3:
            continue
        point = parts[1].replace("\\040", " ")
        if path.is_relative_to(point) and len(point) >= longest:
            found, longest = parts[2], len(point)
    return found


def keep_cache_local() -> Path:
    """Point Triton at a folder on this node's own disk, unless the user named one; the folder it will use."""
    from triton import knobs

    chosen = Path(knobs.cache.dir).expanduser().absolute()
    if "TRITON_CACHE_DIR" in os.environ or not MOUNTS.exists():
        return chosen
    if file_system(chosen, MOUNTS.read_text()) in NETWORK:
        chosen = Path(tempfile.gettempdir()) / f"triton-{os.getuid()}"
        knobs.cache.dir = str(chosen)
    return chosen
