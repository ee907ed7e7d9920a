"""PostgreSQL through the tunnel, while its link is cut every half second: pgbench never notices."""

from __future__ import annotations

import glob
import os
import pwd
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import pytest

from towline.testing import ChaosProxy

pytestmark = [pytest.mark.real_time, pytest.mark.program, pytest.mark.timeout(300)]


def program(name: str) -> str | None:
    """A program of PostgreSQL; Debian keeps the newest version's out of the way."""
    versions = sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"), key=lambda path: float(path.split("/")[4]))
    return versions[-1] if versions else shutil.which(name)


def unprivileged() -> list[str] | None:
    """What to put before a command so that it does not run as root, which PostgreSQL refuses; None if impossible."""
    if os.geteuid() != 0:
        return []
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        return None
    for name in ("postgres", "nobody"):
        try:
            user = pwd.getpwnam(name)
        except KeyError:
            continue
        return [setpriv, f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    return None


def run(command: Sequence[str], env: dict[str, str] | None = None) -> str:
    """Run to the end without an error, and give what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/", env=env)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout + done.stderr


@pytest.fixture
def postgres() -> Generator[tuple[str, str]]:
    """A PostgreSQL of our own that listens on a Unix socket; gives the directory of the socket, and its endpoint."""
    initdb, pg_ctl, pgbench = (program(name) for name in ("initdb", "pg_ctl", "pgbench"))
    prefix = unprivileged()
    if initdb is None or pg_ctl is None or pgbench is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql postgresql-contrib)")
    if prefix is None:
        pytest.skip("PostgreSQL does not run as root, and there is no other user to run it as")
    # Not tmp_path: another user must be able to enter every directory above it, and a socket's path must be short.
    directory = tempfile.mkdtemp(prefix="towline-pg-", dir="/tmp")
    try:
        if prefix:
            user = int(prefix[1].partition("=")[2])
            os.chown(directory, user, -1)
        data = f"{directory}/data"
        run([*prefix, initdb, "-D", data, "-A", "trust", "-U", "postgres", "-E", "UTF8", "--no-locale", "-N"])
        settings = f"-k {directory} -c listen_addresses= -c fsync=off -c max_connections=50"
        # Its log is a file: a server that inherits our pipe keeps pg_ctl's reader waiting for ever.
        run([*prefix, pg_ctl, "-D", data, "-w", "-t", "60", "-l", f"{directory}/log", "-o", settings, "start"])
        try:
            yield directory, f"unix://{directory}/.s.PGSQL.5432"
        finally:
            run([*prefix, pg_ctl, "-D", data, "-m", "immediate", "-w", "stop"])
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def test_pgbench_finishes_without_an_error(
    postgres: tuple[str, str], tunnel_to: Callable[[str], tuple[str, ChaosProxy]], tmp_path: Path
) -> None:
    directory, endpoint = postgres
    pgbench = program("pgbench")
    assert pgbench is not None
    near, proxy = tunnel_to(endpoint)
    through = ["-h", "127.0.0.1", "-p", near.rpartition(":")[2], "-U", "postgres"]
    environment = {**os.environ, "PGSSLMODE": "disable", "PGGSSENCMODE": "disable"}
    # The tables, too, are made through the tunnel: COPY is one long stream.
    run([pgbench, *through, "-i", "-s", "2", "-q", "postgres"], env=environment)
    output = run([pgbench, *through, "-c", "8", "-j", "2", "-T", "12", "postgres"], env=environment)
    assert "number of failed transactions: 0 " in output, output
    assert "aborted" not in output, output
    processed = re.search(r"number of transactions actually processed: (\d+)", output)
    assert processed is not None, output
    assert int(processed[1]) > 100, output
    assert proxy.cuts > 20
    # What pgbench was told is what the database holds: every transaction wrote one row of history, once.
    psql = program("psql")
    assert psql is not None
    rows = run([psql, "-h", directory, "-U", "postgres", "-At", "-c", "select count(*) from pgbench_history"])
    assert rows.strip() == processed[1]
