"""Where a database lies: a network disk is warned of."""

from pathlib import Path
from typing import Any

import pytest

from nas.cli.main import main
from storage import disks
from storage.store import Store

MOUNTS = """\
overlay / overlay rw 0 0
tmpfs /tmp tmpfs rw 0 0
server:/export /srv nfs4 rw 0 0
/dev/sda1 /srv/fast ext4 rw 0 0
//nas/share /shared/with\\040blank cifs rw 0 0
short
"""


@pytest.fixture
def mounts(tmp_path: Path) -> Path:
    path = tmp_path / "mounts"
    path.write_text(MOUNTS)
    return path


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/data/nas.db", "overlay"),
        ("/srv/me/nas.db", "nfs4"),
        ("/srv/fast/nas.db", "ext4"),
        ("/srv/faster/nas.db", "nfs4"),
        ("/shared/with blank/nas.db", "cifs"),
    ],
)
def test_the_nearest_mount_counts(mounts: Path, path: str, kind: str) -> None:
    assert disks.file_system(Path(path), mounts) == kind
    assert (disks.warning(Path(path), mounts) is not None) == (kind in disks.NETWORK)


def test_a_machine_that_does_not_say_is_not_guessed_at(tmp_path: Path) -> None:
    assert disks.file_system(tmp_path, tmp_path / "nothing") is None
    assert disks.warning(tmp_path, tmp_path / "nothing") is None


def test_fault_18_sqlite_on_a_network_disk_is_warned_of_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def everywhere(path: Path, mounts: Path = disks.MOUNTS) -> str:
        asked.append((path, mounts))
        return "nfs4"

    # The file is there already: a search that never began would make none.
    Store.open(f"sqlite:///{tmp_path}/nas.db").close()
    monkeypatch.setattr(disks, "file_system", everywhere)
    # A space that nothing satisfies ends the search before it trains.
    code = main(["search", "--storage", f"sqlite:///{tmp_path}/nas.db", "--constraint", "kv_bytes<=1B"])
    said = capsys.readouterr().err
    assert code == 2 and asked
    assert f"{tmp_path}/nas.db lies on a network disk (nfs4), where locks may fail" in said
