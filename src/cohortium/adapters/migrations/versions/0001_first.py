"""The first schema: runs and their checkpoints, rounds, sites, and who may see which rows."""

from alembic import op

revision = "0001"
down_revision = None

_TABLES = """
CREATE TABLE cohortium.studies (
    study text PRIMARY KEY,
    document bytea NOT NULL,
    kept timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE TABLE cohortium.runs (
    run text PRIMARY KEY,
    study text NOT NULL REFERENCES cohortium.studies,
    owner text NOT NULL,
    deadline double precision NOT NULL,
    patience double precision NOT NULL,
    priority integer NOT NULL,
    seed numeric,
    status text NOT NULL DEFAULT 'queued'
        CHECK (status IN ('queued', 'running', 'paused', 'finished', 'failed', 'cancelled')),
    wish text NOT NULL DEFAULT 'run' CHECK (wish IN ('run', 'pause', 'cancel')),
    leader text,
    epoch bigint NOT NULL DEFAULT 0,
    round integer NOT NULL DEFAULT 0,
    reason text,
    submitted timestamptz NOT NULL DEFAULT clock_timestamp(),
    started timestamptz,
    ended timestamptz,
    events bigint NOT NULL DEFAULT 0,
    latest bytea
) WITH (fillfactor = 70);
COMMENT ON COLUMN cohortium.runs.events IS 'how many events it has; a row lock makes their numbers follow commits';
COMMENT ON COLUMN cohortium.runs.latest IS 'digest of the last write, by which the same write is known again';
CREATE INDEX runs_open ON cohortium.runs (submitted) WHERE ended IS NULL;
CREATE INDEX runs_submitted ON cohortium.runs (submitted);

CREATE TABLE cohortium.outcomes (
    run text PRIMARY KEY REFERENCES cohortium.runs,
    data bytea NOT NULL
);
ALTER TABLE cohortium.outcomes ALTER COLUMN data SET STORAGE EXTERNAL;

CREATE TABLE cohortium.checkpoints (
    run text PRIMARY KEY REFERENCES cohortium.runs,
    round integer NOT NULL,
    state bytea NOT NULL,
    saved timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (fillfactor = 50, toast_tuple_target = 8160);
ALTER TABLE cohortium.checkpoints ALTER COLUMN state SET STORAGE EXTERNAL;

-- no foreign key: it would be checked, and the run's row locked, for each piece
CREATE TABLE cohortium.parts (
    run text NOT NULL,
    part bigint NOT NULL,
    piece integer NOT NULL,
    name text NOT NULL,
    data bytea NOT NULL,
    PRIMARY KEY (run, part, piece)
) WITH (
    autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 20,
    toast.autovacuum_vacuum_scale_factor = 0, toast.autovacuum_vacuum_threshold = 20000
);
ALTER TABLE cohortium.parts ALTER COLUMN data SET STORAGE EXTERNAL;
COMMENT ON COLUMN cohortium.parts.part IS 'drawn for each write, so that two leaders never wait for each other';

CREATE TABLE cohortium.rounds (
    run text NOT NULL REFERENCES cohortium.runs,
    number integer NOT NULL,
    epoch bigint NOT NULL,
    survivors text[] NOT NULL,
    facts jsonb NOT NULL,
    applied timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (run, number)
);

CREATE TABLE cohortium.events (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    run text REFERENCES cohortium.runs,
    seq bigint,
    kind text NOT NULL,
    facts jsonb NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    site text GENERATED ALWAYS AS (facts ->> 'site') STORED,
    UNIQUE (run, seq)
);
CREATE INDEX events_site ON cohortium.events (site) WHERE site IS NOT NULL;

CREATE TABLE cohortium.coordinators (
    name text PRIMARY KEY,
    address text NOT NULL,
    started timestamptz NOT NULL DEFAULT clock_timestamp(),
    seen timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (fillfactor = 50);

CREATE TABLE cohortium.sites (
    name text PRIMARY KEY CHECK (name <> ''),
    identity bytea NOT NULL CHECK (octet_length(identity) = 32),
    enrolled timestamptz NOT NULL,
    revoked timestamptz
);

CREATE TABLE cohortium.invitations (
    site text PRIMARY KEY CHECK (site <> ''),
    digest bytea NOT NULL CHECK (octet_length(digest) = 32),
    expires timestamptz NOT NULL,
    invited_by text NOT NULL,
    invited timestamptz NOT NULL DEFAULT clock_timestamp(),
    identity bytea
);

CREATE TABLE cohortium.certificates (
    serial numeric PRIMARY KEY,
    site text NOT NULL,
    expires timestamptz NOT NULL,
    issued timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX certificates_site ON cohortium.certificates (site);

CREATE TABLE cohortium.run_sites (
    run text NOT NULL REFERENCES cohortium.runs,
    site text NOT NULL,
    state text NOT NULL DEFAULT 'waiting',
    round integer NOT NULL DEFAULT 0,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (run, site)
) WITH (fillfactor = 70);

CREATE TABLE cohortium.contributions (
    run text NOT NULL,
    round integer NOT NULL,
    site text NOT NULL,
    PRIMARY KEY (run, round, site)
);
CREATE INDEX contributions_site ON cohortium.contributions (site);
"""

_OPEN = {"parts"}
"""No site has any right there, and row-level security would forbid to copy large parts in."""
_ROW = "SELECT, INSERT, UPDATE"
_GRANTS = {
    "studies": "SELECT, INSERT",
    "runs": _ROW,
    "outcomes": _ROW,
    "checkpoints": f"{_ROW}, DELETE",
    "parts": "SELECT, INSERT, DELETE",
    # what happened stays
    "rounds": "SELECT, INSERT",
    "events": "SELECT, INSERT",
    "contributions": "SELECT, INSERT",
    "coordinators": f"{_ROW}, DELETE",
    "sites": _ROW,
    "invitations": f"{_ROW}, DELETE",
    "certificates": "SELECT, INSERT",
    "run_sites": _ROW,
}
_OWN = {"sites": "name", "certificates": "site", "run_sites": "site", "contributions": "site", "events": "site"}
"""The tables of which a site reads its own rows, and the column that says whose a row is."""


def upgrade() -> None:
    """Makes the tables, and row-level security that holds for their owner, too."""
    op.execute(_TABLES)
    op.execute("GRANT USAGE ON SCHEMA cohortium TO cohortium_coordinator, cohortium_site")
    for table, rights in _GRANTS.items():
        name = f"cohortium.{table}"
        op.execute(f"GRANT {rights} ON {name} TO cohortium_coordinator")
        if table in _OPEN:
            continue
        op.execute(f"ALTER TABLE {name} ENABLE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {name} FORCE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY coordinator ON {name} TO cohortium_coordinator USING (true) WITH CHECK (true)")
    for table, column in _OWN.items():
        name = f"cohortium.{table}"
        op.execute(f"GRANT SELECT ON {name} TO cohortium_site")
        own = f"{column} = current_setting('cohortium.site', true)"
        op.execute(f"CREATE POLICY site ON {name} FOR SELECT TO cohortium_site USING ({own})")


def downgrade() -> None:
    """Deletes the tables and all they hold."""
    for table in reversed(_GRANTS):
        op.execute(f"DROP TABLE cohortium.{table} CASCADE")
