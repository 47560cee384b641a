"""What the database itself enforces: who sees which rows, who may change what, and that the schema comes and goes."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import psycopg
import pytest
from psycopg import errors
from psycopg.conninfo import make_conninfo

from cohortium.adapters.embedded import Stores
from cohortium.adapters.migrations import migrate, revert
from cohortium.adapters.postgres import as_site, conninfo
from cohortium.coordinator.ports import Applied, Checkpoint, RunEvent, Terms
from cohortium.core.errors import CohortiumError

from .world import cleared, world

NOW = datetime(2031, 5, 6, 7, 8, 9, tzinfo=UTC)
APPEND_ONLY = {"events", "rounds", "contributions", "certificates", "studies"}
TABLES = "SELECT relname FROM pg_class WHERE relnamespace = 'cohortium'::regnamespace AND relkind IN ('r', 'p')"
SITE_COLUMN = {"sites": "name", "certificates": "site", "run_sites": "site", "contributions": "site", "events": "site"}


@pytest.fixture
def owner(stores: Stores) -> Iterator[psycopg.Connection]:
    async def fill() -> None:
        async with cleared(stores) as here:
            for name in ("a", "b"):
                await here.enrolments.invite(name, bytes(32), NOW.replace(year=2040), "olga")
                await here.enrolments.redeem(name, bytes(32), name.encode() * 32, NOW)
                await here.enrolments.issued(name, ord(name), NOW)
            await here.desk.submit("run", "sha256:1", b"{}", "ada", ["a", "b"], Terms(), None)
            await here.runs.beat("one", "x")
            (claim,) = await here.runs.claim("one", 30, 1)
            state = Checkpoint(round=1, state=b"s", parts={"p": b"x"})
            events = [RunEvent(kind="told", facts={"site": name}) for name in ("a", "b")]
            await here.runs.save(claim, state, Applied(number=1, survivors=("a", "b")), events)

    asyncio.run(fill())
    with psycopg.connect(stores.owner_url, autocommit=True) as connection:
        yield connection


def tables(connection: psycopg.Connection) -> list[str]:
    return [name for (name,) in connection.execute(TABLES)]


def test_every_table_shows_a_site_its_own_rows_alone(stores: Stores, owner: psycopg.Connection) -> None:
    names = tables(owner)
    assert len(names) == 14
    with psycopg.connect(conninfo(stores.database_url), autocommit=True) as service:
        for name in names:
            for site in ("a", "b", "", None):
                seen = 0
                with service.transaction(force_rollback=True):
                    if site is not None:
                        service.execute("SELECT set_config('cohortium.site', %s, true)", (site,))
                    service.execute("SET LOCAL ROLE cohortium_site")
                    try:
                        with service.transaction():
                            rows = service.execute(f"SELECT to_jsonb(t) FROM cohortium.{name} t").fetchall()
                    except errors.InsufficientPrivilege:
                        continue
                    seen = len(rows)
                    # a table that a site may read at all says whose its rows are
                    assert {row[SITE_COLUMN[name]] for (row,) in rows} == ({site} if site else set()), name
                assert seen > 0 or not site, name
            for change in (f"UPDATE cohortium.{name} SET ctid = ctid", f"DELETE FROM cohortium.{name}"):
                with service.transaction(force_rollback=True):
                    service.execute("SELECT set_config('cohortium.site', 'a', true)")
                    service.execute("SET LOCAL ROLE cohortium_site")
                    with pytest.raises(psycopg.Error) as caught:
                        with service.transaction():
                            service.execute(change)
                    assert "DELETE" not in change or isinstance(caught.value, errors.InsufficientPrivilege), name


def test_a_site_has_no_right_but_to_read(owner: psycopg.Connection) -> None:
    query = """
    SELECT table_name, privilege_type FROM information_schema.role_table_grants
    WHERE table_schema = 'cohortium' AND grantee IN ('cohortium_site', 'PUBLIC')
    """
    assert set(owner.execute(query)) == {(name, "SELECT") for name in SITE_COLUMN}


def test_row_level_security_is_forced_wherever_a_site_may_look(owner: psycopg.Connection) -> None:
    query = "SELECT relrowsecurity AND relforcerowsecurity FROM pg_class WHERE oid = %s::regclass"
    for name in set(tables(owner)) - {"alembic_version", "parts"}:
        assert owner.execute(query, (f"cohortium.{name}",)).fetchone() == (True,), name
    with owner.transaction(force_rollback=True):
        # not even the owner sees anything without a policy
        owner.execute("SET LOCAL ROLE cohortium_owner")
        assert owner.execute("SELECT count(*) FROM cohortium.sites").fetchone() == (0,)


def test_no_role_may_pass_by_the_policies(stores: Stores, owner: psycopg.Connection) -> None:
    roles = dict.fromkeys(("cohortium_owner", "cohortium_coordinator", "cohortium_site"))
    query = "SELECT rolname, rolsuper OR rolbypassrls OR rolcreaterole OR rolcreatedb, rolcanlogin FROM pg_roles"
    found = {name: rest for name, *rest in owner.execute(query) if name in roles}
    assert found == {
        "cohortium_owner": [False, False],
        "cohortium_coordinator": [False, True],
        "cohortium_site": [False, False],
    }
    owned = "SELECT count(*) FROM pg_class WHERE pg_get_userbyid(relowner) = 'cohortium_coordinator'"
    assert owner.execute(owned).fetchone() == (0,)
    assert owner.execute("SELECT pg_has_role('cohortium_coordinator', 'cohortium_owner', 'MEMBER')").fetchone() == (
        False,
    )
    with psycopg.connect(conninfo(stores.database_url), autocommit=True) as service:
        assert service.execute("SELECT current_user").fetchone() == ("cohortium_coordinator",)
        for change in (
            "SET ROLE cohortium_owner",
            "ALTER TABLE cohortium.sites DISABLE ROW LEVEL SECURITY",
            "DROP TABLE cohortium.events",
            "CREATE TABLE cohortium.mine (x int)",
            "CREATE TABLE public.mine (x int)",
            "SET session_replication_role = replica",
        ):
            with pytest.raises(errors.InsufficientPrivilege):
                service.execute(change)


def test_what_happened_cannot_be_changed_by_services(stores: Stores, owner: psycopg.Connection) -> None:
    with psycopg.connect(conninfo(stores.database_url), autocommit=True) as service:
        for name in APPEND_ONLY:
            column = owner.execute(
                "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum = 1", (f"cohortium.{name}",)
            ).fetchone()
            assert column is not None
            for change in (
                f"UPDATE cohortium.{name} SET {column[0]} = DEFAULT",
                f"DELETE FROM cohortium.{name}",
                f"TRUNCATE cohortium.{name}",
            ):
                with pytest.raises(errors.InsufficientPrivilege):
                    service.execute(change)


def test_as_site_narrows_one_transaction(stores: Stores, owner: psycopg.Connection) -> None:
    async def scenario() -> None:
        async with world(stores) as here:

            async def work(connection: psycopg.AsyncConnection) -> list[str]:
                async with as_site(connection, "a"):
                    own = [name for (name,) in await (await connection.execute("SELECT name FROM sites")).fetchall()]
                everybody = await (await connection.execute("SELECT name FROM sites")).fetchall()
                assert len(everybody) == 2
                return own

            assert await here.database.do(work) == ["a"]

    asyncio.run(scenario())


def test_the_schema_comes_once_and_goes(stores: Stores) -> None:
    url = make_conninfo(stores.owner_url, dbname="another")
    with ThreadPoolExecutor(4) as threads:
        taken = list(threads.map(migrate, [url] * 4))
    assert sorted(taken) == [[], [], [], ["0001"]]
    assert migrate(url) == []
    assert revert(url) == ["0001"]
    with psycopg.connect(url) as connection:
        assert tables(connection) == ["alembic_version"]
    assert migrate(url) == ["0001"]
    with pytest.raises(CohortiumError):
        migrate(make_conninfo(stores.database_url, dbname="third"))
