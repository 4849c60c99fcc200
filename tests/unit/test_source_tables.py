"""How the source tables' files are read; loading them is tested against a real server in tests/docker."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest

from airloom.errors import ConfigError
from airloom.stack import source_tables
from airloom.stack.source_tables import PACKAGE, TABLES, Table

HOURLY = Table(
    "hourly", "Of a test", ("`name` CHAR(2) NOT NULL", "time_hour DATETIME NULL", "speed DOUBLE NULL"), ("KEY (name)",)
)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of files of a package that is found in place of the real one, and fails when it is imported."""
    folder = tmp_path / PACKAGE / "data"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise ImportError('this package is only read')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, PACKAGE, raising=False)
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_rows_of_a_file(data: Path, packed: bool) -> None:
    text = 'name,time_hour,speed\nAA,2013-01-01T10:00:00Z,1.5\n"B,C",NA,NA\n'
    if packed:
        with zipfile.ZipFile(data / "hourly.csv.zip", "w") as archive:
            archive.writestr("hourly.csv", text)
    else:
        (data / "hourly.csv").write_text(text)
    with source_tables._rows(HOURLY) as rows:
        assert list(rows) == [("AA", "2013-01-01T10:00:00", "1.5"), ("B,C", None, None)]


def test_other_columns_are_refused(data: Path) -> None:
    (data / "hourly.csv").write_text("name,speed\nAA,1\n")
    with pytest.raises(ConfigError, match=r"columns \['name', 'speed'\]"), source_tables._rows(HOURLY):
        pass


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_tables, "PACKAGE", "no_such_package_of_flights")
    with pytest.raises(ConfigError, match="no_such_package_of_flights is not installed"), source_tables._rows(HOURLY):
        pass


def test_every_table_tells_its_rows_apart() -> None:
    for table in TABLES:
        assert table.serial or any(key.startswith("PRIMARY KEY") for key in table.keys), table.name
        assert len(set(table.names)) == len(table.columns)
