"""Triton's cache stays on this node's disk."""

from pathlib import Path

import pytest
from triton import knobs

from kernels import cache

MOUNTS = """overlay / overlay rw 0 0
server:/export /people nfs4 rw 0 0
tmpfs /people/me/fast tmpfs rw 0 0
disk /media/my\\040disk ext4 rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/triton", "overlay"),
        ("/people/me/.triton", "nfs4"),
        ("/people/me/fast/.triton", "tmpfs"),
        ("/peoples", "overlay"),
        ("/media/my disk/x", "ext4"),
    ],
)
def test_the_longest_mount_point_holds_a_path(path, kind):
    assert cache.file_system(Path(path), MOUNTS) == kind


@pytest.fixture
def mounts(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "MOUNTS", tmp_path / "mounts")
    # Triton writes what is set in the program to the environment too, so that processes below inherit it. Set here
    # before that, the variable is put back last, as it was: otherwise all later tests compile into this folder.
    monkeypatch.setenv("TRITON_CACHE_DIR", "set by Triton below")
    monkeypatch.setattr(knobs.cache, "dir", "/people/me/.triton/cache")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    return tmp_path / "mounts"


def test_a_shared_home_is_left_alone(mounts):
    mounts.write_text(MOUNTS)
    moved = cache.keep_cache_local()
    assert str(moved) == knobs.cache.dir
    assert not moved.is_relative_to("/people")


def test_a_local_folder_stays(mounts):
    mounts.write_text("disk / ext4 rw 0 0\n")
    assert cache.keep_cache_local() == Path("/people/me/.triton/cache")


def test_what_the_user_named_stays(mounts, monkeypatch):
    mounts.write_text(MOUNTS)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/people/me/.triton/cache")
    assert cache.keep_cache_local() == Path("/people/me/.triton/cache")
