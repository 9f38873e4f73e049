"""A throw-away PostgreSQL server, for measurements and tests that need a real one."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from itertools import count
from pathlib import Path
from typing import Any

import psycopg

PASSWORD = "canary-7f3e"  # a real one: the server asks for it, and no message may repeat it


def server_binaries() -> Path | None:
    """Where PostgreSQL's programs lie; None where they are not installed."""
    candidates = [Path(found).parent for found in [shutil.which("initdb")] if found]
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next(
        (path for path in candidates if (path / "initdb").exists() and (path / "postgres").exists()), None
    )


class Server:
    """A PostgreSQL server on a free loopback port, run by an ordinary user (it refuses root).

    Only a durable one waits for the disk at each commit, as a true one does.
    """

    def __init__(self, binaries: Path, home: Path, *, durable: bool = False) -> None:
        self.binaries, self.home, self.durable = binaries, home, durable
        self._identity: dict[str, Any] = {}
        if os.geteuid() == 0:
            user = next(entry for entry in pwd.getpwall() if entry.pw_name in ("postgres", "nobody"))
            self._identity = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            os.chown(home, user.pw_uid, user.pw_gid)
        secret = home / "secret"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        options = [
            "-D",
            str(home / "data"),
            "-U",
            "nas",
            "-A",
            "scram-sha-256",
            f"--pwfile={secret}",
            "-E",
            "UTF8",
        ]
        self._call([str(binaries / "initdb"), "--locale=C", "--no-sync", *options])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._databases = count()
        self.start()

    def _call(self, command: list[str]) -> None:
        subprocess.run(command, check=True, cwd=self.home, stdout=subprocess.DEVNULL, **self._identity)

    def start(self) -> None:
        """Starts the server and waits until it answers."""
        options = ["-D", str(self.home / "data"), "-p", str(self.port), "-k", str(self.home)]
        options += ["-c", "listen_addresses=127.0.0.1", "-c", f"fsync={'on' if self.durable else 'off'}"]
        with (self.home / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(self.binaries / "postgres"), *options],
                cwd=self.home,
                stdout=log,
                stderr=log,
                **self._identity,
            )
        for _ in range(300):
            try:
                psycopg.connect(self._dsn("postgres")).close()
                return
            except psycopg.OperationalError:
                time.sleep(0.1)
        raise RuntimeError((self.home / "log").read_text())

    def stop(self, kind: signal.Signals = signal.SIGINT) -> None:
        """Stops it: SIGINT in order, SIGQUIT as a crash."""
        self.process.send_signal(kind)
        self.process.wait(30)

    def _dsn(self, database: str) -> str:
        return f"host=127.0.0.1 port={self.port} user=nas password={PASSWORD} dbname={database}"

    def url(self, database: str) -> str:
        return f"postgresql://nas:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """The URL of an empty database."""
        name = f"nas{next(self._databases)}"
        with psycopg.connect(self._dsn("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return self.url(name)
