"""On what kind of disk a file lies: SQLite's locks hold on local ones alone."""

from pathlib import Path

NETWORK = (
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "9p",
    "afs",
    "ceph",
    "glusterfs",
    "lustre",
    "beegfs",
    "gpfs",
    "fuse.sshfs",
)
"""File systems of other machines, as Linux names them."""
MOUNTS = Path("/proc/self/mounts")


def file_system(path: Path, mounts: Path = MOUNTS) -> str | None:
    """The kind of file system that a file lies on, or will lie on; None where the machine does not say."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    place, found = path.resolve(), None
    for line in lines:
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        # Blanks and backslashes in names are written as octal numbers.
        point = Path(fields[1].encode().decode("unicode_escape"))
        # Of two at the same point the later one is what is seen.
        if place.is_relative_to(point) and (found is None or len(point.parts) >= found[0]):
            found = len(point.parts), fields[2]
    return None if found is None else found[1]


def warning(path: Path, mounts: Path = MOUNTS) -> str | None:
    """What is to be said of a database in this file; None where it lies on a local disk."""
    kind = file_system(path, mounts)
    if kind not in NETWORK:
        return None
    return (
        f"{path} lies on a network disk ({kind}), where locks may fail and a database be damaged: "
        "keep it on a local disk, or use a PostgreSQL server"
    )
