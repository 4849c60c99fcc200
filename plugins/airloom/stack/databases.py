"""Databases and their users, each with the rights that it needs. What is there is brought up to date."""

from __future__ import annotations

import time
from typing import Any

from airloom.errors import UnavailableError
from airloom.settings import Settings

SOURCE_DATABASE = "source"
OWN_DATABASE = "airloom"  # the prediction log and the ledger
MYSQL = ("mysql", 3306)
SOURCE_READER = "source_reader"  # of pipelines
_WAIT_SECONDS = 120.0


def ensure_postgres(settings: Settings) -> None:
    """Airflow's and MLflow's databases; each user owns its own and sees no other.

    Raises:
        UnavailableError: PostgreSQL does not answer.
    """
    import psycopg2
    from psycopg2 import sql

    connection = _patient(
        lambda: psycopg2.connect(
            host="postgres", user="postgres", password=settings.secret("postgres_password"), connect_timeout=5
        ),
        psycopg2.OperationalError,
        "PostgreSQL",
    )
    connection.autocommit = True  # a database is made outside transactions
    with connection.cursor() as cursor:
        for name in ("airflow", "mlflow"):
            user, password = sql.Identifier(name), sql.Literal(settings.secret(f"{name}_db_password"))
            cursor.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (name,))
            verb = "ALTER" if cursor.fetchone() else "CREATE"
            cursor.execute(sql.SQL(verb + " ROLE {} LOGIN PASSWORD {}").format(user, password))
            cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,))
            if not cursor.fetchone():
                cursor.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(user, user))
            cursor.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(user))
    connection.close()


def ensure_mysql(settings: Settings, address: tuple[str, int] = MYSQL) -> None:
    """GitBucket's database, the source data's with its owner and reader, Airloom's own, and the exporter's user.

    Raises:
        UnavailableError: MySQL does not answer.
    """
    connection = _mysql(settings, "root", "mysql_root_password", address)
    users = {
        "gitbucket": ("mysql_gitbucket_password", "ALL PRIVILEGES ON gitbucket.*"),
        "source": (
            "mysql_source_password",
            f"SELECT, INSERT, UPDATE, DELETE, CREATE, DROP, ALTER, INDEX ON {SOURCE_DATABASE}.*",
        ),
        SOURCE_READER: ("mysql_source_reader_password", f"SELECT ON {SOURCE_DATABASE}.*"),
        "airloom": ("mysql_airloom_password", f"ALL PRIVILEGES ON {OWN_DATABASE}.*"),
        "exporter": ("mysql_exporter_password", "PROCESS, REPLICATION CLIENT, SELECT ON *.*"),
    }
    with connection.cursor() as cursor:
        for database in ("gitbucket", SOURCE_DATABASE, OWN_DATABASE):
            cursor.execute(f"CREATE DATABASE IF NOT EXISTS {database} CHARACTER SET utf8mb4")
        for user, (secret, rights) in users.items():
            cursor.execute(f"CREATE USER IF NOT EXISTS '{user}'@'%%' IDENTIFIED BY %s", (settings.secret(secret),))
            cursor.execute(f"ALTER USER '{user}'@'%%' IDENTIFIED BY %s", (settings.secret(secret),))
            cursor.execute(f"GRANT {rights} TO '{user}'@'%'")
    connection.close()


def source_owner(settings: Settings, address: tuple[str, int] = MYSQL) -> Any:
    """A connection to the source data as its owner, once MySQL answers.

    Raises:
        UnavailableError: it does not.
    """
    return _mysql(settings, "source", "mysql_source_password", address, SOURCE_DATABASE)


def _mysql(settings: Settings, user: str, secret: str, address: tuple[str, int], database: str | None = None) -> Any:
    import pymysql

    return _patient(
        lambda: pymysql.connect(
            host=address[0],
            port=address[1],
            user=user,
            password=settings.secret(secret),
            database=database,
            connect_timeout=5,
            autocommit=True,
            charset="utf8mb4",
        ),
        pymysql.err.OperationalError,
        "MySQL",
    )


def _patient(connect: Any, error_type: type[Exception], name: str) -> Any:
    deadline = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            return connect()
        except error_type as error:
            if time.monotonic() > deadline:
                raise UnavailableError(f"{name} does not answer: {error}", hint="see: airloom status") from error
            time.sleep(1)
