"""Invitations, sites and certificates in PostgreSQL (`cohortium.coordinator.ports.Enrolments`).

Only the digest of an invitation's secret is kept, so whoever reads the database cannot enrol with what he finds.
"""

import hmac
from collections.abc import Sequence
from datetime import datetime

from cohortium.adapters.postgres import CHANNEL, Connection, Database
from cohortium.adapters.postgres_rows import SITE, json, site_row
from cohortium.coordinator.ports import SiteRow
from cohortium.core.errors import PolicyRefused, StudyError

_SITE = f"SELECT {SITE} FROM sites WHERE name = %s"
_SITES = f"SELECT {SITE} FROM sites ORDER BY name"
_HOLD = "SELECT pg_advisory_xact_lock(hashtextextended(%s, 7))"
"""Whatever happens to one site happens in turn, also where it has no row yet."""
_INVITE = """
INSERT INTO invitations (site, digest, expires, invited_by) VALUES (%(name)s, %(digest)b, %(expires)s, %(by)s)
ON CONFLICT (site) DO UPDATE SET digest = excluded.digest, expires = excluded.expires,
    invited_by = excluded.invited_by, invited = clock_timestamp(), identity = NULL
"""
_INVITATION = "SELECT digest, expires, identity FROM invitations WHERE site = %s"
_USE = "UPDATE invitations SET identity = %(identity)b WHERE site = %(name)s"
_ENROL = f"""
INSERT INTO sites (name, identity, enrolled) VALUES (%(name)s, %(identity)b, %(now)s)
ON CONFLICT (name) DO UPDATE SET identity = excluded.identity, enrolled = excluded.enrolled, revoked = NULL
RETURNING {SITE}
"""
_ISSUED = """
INSERT INTO certificates (serial, site, expires) VALUES (%s::numeric, %s, %s) ON CONFLICT DO NOTHING
"""
_REVOKE = f"UPDATE sites SET revoked = coalesce(revoked, clock_timestamp()) WHERE name = %s RETURNING {SITE}"
_VOID = "DELETE FROM invitations WHERE site = %s"
_TELL = "INSERT INTO events (kind, facts) VALUES (%s, %s::jsonb)"
_NEWS = f"SELECT pg_notify('{CHANNEL}', 'sites')"
_REFUSED = "this invitation is not valid: unknown, expired or used; ask the consortium for a new one"


class PostgresEnrolments:
    """Sites of the consortium; what happens to one is an event that it may read."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def invite(self, name: str, digest: bytes, expires: datetime, by: str) -> None:
        """Keeps an invitation in place of an older one.

        Raises:
            StudyError: a site of that name is enrolled, and not revoked.
        """
        facts = {"name": name, "digest": digest, "expires": expires, "by": by}

        async def work(connection: Connection) -> None:
            async with connection.transaction():
                await connection.execute(_HOLD, (name,))
                site = await _site(connection, name)
                if site is not None and site.revoked is None:
                    raise StudyError(f"site '{name}' is enrolled already; revoke it first, or choose another name")
                await connection.execute(_INVITE, facts)
                await connection.execute(_TELL, ("invited", json({"site": name, "by": by})))

        await self._database.do(work)

    async def redeem(self, name: str, digest: bytes, identity: bytes, now: datetime) -> SiteRow:
        """Uses up an invitation and enrols the site.

        Raises:
            PolicyRefused: there is no such invitation, it has expired, or another identity used it.
        """
        facts = {"name": name, "identity": identity, "now": now}

        async def work(connection: Connection) -> SiteRow:
            async with connection.transaction():
                await connection.execute(_HOLD, (name,))
                row = await (await connection.execute(_INVITATION, (name,))).fetchone()
                # compared in any case, so that the time tells nothing of names
                same = hmac.compare_digest(bytes(row[0]) if row else bytes(32), digest)
                if row is None or not same or row[1] <= now or row[2] not in (None, identity):
                    raise PolicyRefused(_REFUSED)
                site = await _site(connection, name)
                if row[2] is not None and site is not None:
                    return site
                await connection.execute(_USE, facts)
                enrolled = await (await connection.execute(_ENROL, facts)).fetchone()
                await connection.execute(_TELL, ("enrolled", json({"site": name})))
                await connection.execute(_NEWS)
                assert enrolled is not None
                return site_row(enrolled)

        return await self._database.do(work)

    async def issued(self, name: str, serial: int, expires: datetime) -> None:
        """Records a certificate; the same one again changes nothing."""

        async def work(connection: Connection) -> None:
            await connection.execute(_ISSUED, (str(serial), name, expires))

        await self._database.do(work)

    async def site(self, name: str) -> SiteRow | None:
        """Returns a site."""

        async def work(connection: Connection) -> SiteRow | None:
            return await _site(connection, name)

        return await self._database.do(work)

    async def sites(self) -> Sequence[SiteRow]:
        """Returns all sites, revoked ones too."""

        async def work(connection: Connection) -> list[SiteRow]:
            return [site_row(row) for row in await (await connection.execute(_SITES)).fetchall()]

        return await self._database.do(work)

    async def revoke(self, name: str, by: str) -> SiteRow:
        """Revokes a site at once, and its invitation with it.

        Raises:
            StudyError: there is no such site.
        """

        async def work(connection: Connection) -> SiteRow:
            async with connection.transaction():
                await connection.execute(_HOLD, (name,))
                row = await (await connection.execute(_REVOKE, (name,))).fetchone()
                if row is None:
                    raise StudyError(f"there is no site '{name}'")
                await connection.execute(_VOID, (name,))
                await connection.execute(_TELL, ("revoked", json({"site": name, "by": by})))
                await connection.execute(_NEWS)
                return site_row(row)

        return await self._database.do(work)


async def _site(connection: Connection, name: str) -> SiteRow | None:
    row = await (await connection.execute(_SITE, (name,))).fetchone()
    return None if row is None else site_row(row)
