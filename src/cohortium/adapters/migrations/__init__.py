"""The database's schema and how it came to be: `migrate` brings any older one, or none, up to this version."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import sqlalchemy
from alembic import command
from alembic.config import Config
from psycopg import errors, sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from cohortium.adapters.postgres import sentence
from cohortium.coordinator.ports import Unavailable
from cohortium.core.errors import CohortiumError

OWNER, COORDINATOR, SITE = "cohortium_owner", "cohortium_coordinator", "cohortium_site"
_LOCK = 0x436F686F7274
"""The advisory lock that lets one migration run at a time; another one waits, and then finds nothing to do."""
_DATABASE = "cohortium"
_ROLES = {
    OWNER: "NOLOGIN NOSUPERUSER NOBYPASSRLS NOCREATEDB NOCREATEROLE",
    # not inheriting, so that it is a site only where it says so
    COORDINATOR: "LOGIN NOINHERIT NOSUPERUSER NOBYPASSRLS NOCREATEDB NOCREATEROLE",
    SITE: "NOLOGIN NOSUPERUSER NOBYPASSRLS NOCREATEDB NOCREATEROLE",
}


def migrate(url: str, target: str = "head") -> list[str]:
    """Makes what is missing of database, roles and tables, and returns the names of the steps that were taken.

    Several processes may call it at once; nothing happens where all is there. It blocks: call it in a thread.

    Args:
        url: a connection as the schema's owner, or as somebody who may make databases and roles.
        target: the step to stop at.

    Raises:
        Unavailable: the database cannot be reached.
        CohortiumError: this login may not do it.
    """
    with _speaking():
        url = _with_database(url)
        _ensure_database(url)
        with _connected(url) as connection, _locked(connection):
            _ensure_roles(connection)
            _ensure_schema(connection)
            return _alembic(url, target, upgrade=True)


def revert(url: str, target: str = "base") -> list[str]:
    """Undoes steps, and deletes what they held, and returns their names."""
    with _speaking():
        url = _with_database(url)
        with _connected(url) as connection, _locked(connection):
            return _alembic(url, target, upgrade=False)


@contextmanager
def _speaking() -> Iterator[None]:
    try:
        yield
    except (errors.InsufficientPrivilege, sqlalchemy.exc.ProgrammingError) as error:
        raise CohortiumError(
            f"this login may not prepare the database ({sentence(error)}); use the owner's or an administrator's"
        ) from None
    except (psycopg.OperationalError, sqlalchemy.exc.OperationalError) as error:
        raise Unavailable(f"the database cannot be reached: {sentence(error)}") from None


def _with_database(url: str) -> str:
    try:
        given = conninfo_to_dict(url)
    except psycopg.ProgrammingError:
        raise CohortiumError("the database's URL cannot be read; write postgresql://USER@HOST/DATABASE") from None
    return make_conninfo("", **{"dbname": _DATABASE, "connect_timeout": "10", **given})


@contextmanager
def _connected(url: str) -> Iterator[psycopg.Connection[tuple[Any, ...]]]:
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


@contextmanager
def _locked(connection: psycopg.Connection[tuple[Any, ...]]) -> Iterator[None]:
    # the lock belongs to the connection, so a migration that is killed lets go of it
    connection.execute("SELECT pg_advisory_lock(%s)", (_LOCK,))
    yield
    connection.execute("SELECT pg_advisory_unlock(%s)", (_LOCK,))


def _ensure_database(url: str) -> None:
    name = conninfo_to_dict(url)["dbname"]
    try:
        psycopg.connect(url).close()
    except psycopg.OperationalError as error:
        if "does not exist" not in str(error):
            raise
        with _connected(make_conninfo(url, dbname="postgres")) as connection, _locked(connection):
            if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,)).fetchone():
                query = "CREATE DATABASE {} ENCODING 'UTF8' TEMPLATE template0"
                connection.execute(sql.SQL(query).format(sql.Identifier(str(name))))


def _ensure_roles(connection: psycopg.Connection[tuple[Any, ...]]) -> None:
    there = {name for (name,) in connection.execute("SELECT rolname FROM pg_roles")}
    for role, attributes in _ROLES.items():
        if role not in there:
            # roles belong to all databases: a migration of another one may have been faster
            with suppress(errors.DuplicateObject, errors.UniqueViolation):
                connection.execute(f"CREATE ROLE {role} {attributes}")
    member = "SELECT pg_has_role(%s, %s, 'MEMBER')"
    for role, group in ((COORDINATOR, SITE), ("current_user", OWNER)):
        who = connection.info.user if role == "current_user" else role
        row = connection.execute(member, (who, group)).fetchone()
        if not (row and row[0]):
            with suppress(errors.UniqueViolation):
                connection.execute(f"GRANT {group} TO {role}")


def _ensure_schema(connection: psycopg.Connection[tuple[Any, ...]]) -> None:
    if connection.execute("SELECT 1 FROM pg_namespace WHERE nspname = 'cohortium'").fetchone():
        return
    database = sql.Identifier(connection.info.dbname)
    connection.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(database))
    grant = sql.SQL("GRANT CONNECT ON DATABASE {} TO {}")
    connection.execute(grant.format(database, sql.SQL(f"{COORDINATOR}, {OWNER}")))
    connection.execute("REVOKE ALL ON SCHEMA public FROM PUBLIC")
    connection.execute(f"CREATE SCHEMA cohortium AUTHORIZATION {OWNER}")


def _alembic(url: str, target: str, *, upgrade: bool) -> list[str]:
    taken: list[str] = []
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    engine = sqlalchemy.create_engine(
        "postgresql+psycopg://", creator=lambda: psycopg.connect(url), poolclass=sqlalchemy.pool.NullPool
    )
    with engine.begin() as connection:
        connection.exec_driver_sql(f"SET LOCAL ROLE {OWNER}")
        config.attributes.update(connection=connection, taken=taken)
        (command.upgrade if upgrade else command.downgrade)(config, target)
    return taken
