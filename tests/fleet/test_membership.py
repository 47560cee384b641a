"""A hospital's home and a consortium's folder through enrolment: what is written, what is refused, what stays."""

import asyncio
import json
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from cohortium import bootstrap
from cohortium.adapters import credentials
from cohortium.bootstrap import enrolment
from cohortium.coordinator.authority import principal_of
from cohortium.core.errors import CohortiumError, PolicyRefused, SiteError, StudyError
from cohortium.core.identity import fingerprint
from cohortium.core.invitation import Invitation, digest, issue, parse
from cohortium.engines.fleet.joining import Unreachable

from .registry import MemoryEnrolments, Registry


@contextmanager
def served(registry: Registry) -> Iterator[asyncio.AbstractEventLoop]:
    """Serves a coordinator beside the test, whose commands have event loops of their own."""
    loop, ready = asyncio.new_event_loop(), threading.Event()

    async def serve() -> None:
        nonlocal stop
        stop = asyncio.Event()
        async with registry.serving():
            ready.set()
            await stop.wait()

    stop: asyncio.Event | None = None
    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert ready.wait(10)
        yield loop
    finally:
        assert stop is not None
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


def invited(registry: Registry, loop: asyncio.AbstractEventLoop, site: str = "north", secret: bytes = b"s" * 32) -> str:
    made: Invitation = asyncio.run_coroutine_threadsafe(registry.invitation(site, secret), loop).result(10)
    return issue(made)


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "hospital"


class TestAHospitalEnrols:
    def test_a_new_home(self, home: Path) -> None:
        registry = Registry()
        with served(registry) as loop:
            done = bootstrap.enrol_site(invited(registry, loop), home)
        own, joined = ("policy.yaml", "site.yaml", "ledger.sqlite", "ledger.key"), ("tls.pem", "membership.yaml")
        assert files(home) == {*own, *joined, "identity.key", "consortium.pem"}
        assert {path.name for path in done.written} == files(home)
        assert modes(home) == {0o600}
        assert stat.S_IMODE(home.stat().st_mode) == 0o700
        assert done.fingerprint == fingerprint(registry.store.rows["north"].identity)
        enrolled, credential = credentials.load_enrolled(home), credentials.load_credential(home)
        assert enrolled.fleet == (registry.fleet,)
        assert enrolled.coordinator == registry.identity.public_key().public_bytes_raw()
        assert principal_of(credential.chain).name == "north"

    def test_again_after_a_lost_answer(self, home: Path) -> None:
        registry = Registry()
        with served(registry) as loop:
            token = invited(registry, loop)
            bootstrap.enrol_site(token, home)
            # the machine went down before anything but the identity was on its disk
            for name in files(home) - {"identity.key"}:
                (home / name).unlink()
            bootstrap.enrol_site(token, home)
            before = {name: (home / name).read_bytes() for name in files(home) - {"tls.pem"}}
            bootstrap.enrol_site(token, home)
            assert before == {name: (home / name).read_bytes() for name in files(home) - {"tls.pem"}}
        assert len(registry.store.rows) == 1

    def test_a_home_that_is_there_keeps_its_ledger(self, home: Path) -> None:
        bootstrap.create_home(home)
        ledger = (home / "ledger.key").read_bytes()
        registry = Registry()
        with served(registry) as loop:
            done = bootstrap.enrol_site(invited(registry, loop), home)
        assert (home / "ledger.key").read_bytes() == ledger
        assert "ledger.key" not in {path.name for path in done.written}

    def test_a_refusal_leaves_nothing(self, tmp_path: Path, home: Path) -> None:
        registry = Registry()
        with served(registry) as loop:
            token = invited(registry, loop)
            bootstrap.enrol_site(token, tmp_path / "first")
            with pytest.raises(PolicyRefused, match="used by somebody else"):
                bootstrap.enrol_site(token, home)
            assert not home.exists()
            bootstrap.create_home(home)
            there = files(home)
            with pytest.raises(PolicyRefused, match="used by somebody else"):
                bootstrap.enrol_site(token, home)
            assert files(home) == there

    def test_without_an_answer_the_identity_stays(self, home: Path) -> None:
        token = issue(Registry(enrolment="localhost:1", fleet="localhost:1").token())
        with pytest.raises(Unreachable):
            bootstrap.enrol_site(token, home)
        assert files(home) == {"identity.key"}
        assert modes(home) == {0o600}

    def test_no_home_is_given_to_two_consortia(self, home: Path) -> None:
        registry, other = Registry(), Registry()
        with served(registry) as loop, served(other) as second:
            bootstrap.enrol_site(invited(registry, loop), home)
            before = {path: path.read_bytes() for path in home.iterdir()}
            for token in (invited(other, second), invited(registry, loop, "south", b"z" * 32)):
                with pytest.raises(SiteError, match="belongs to site 'north' of consortium 'heart' already"):
                    bootstrap.enrol_site(token, home)
        assert before == {path: path.read_bytes() for path in home.iterdir()}

    @pytest.mark.parametrize("missing", ["ledger.key", "ledger.sqlite"])
    def test_half_a_home_is_restored_first(self, home: Path, missing: str) -> None:
        bootstrap.create_home(home)
        (home / missing).unlink()
        with pytest.raises(SiteError, match="restore both first"):
            bootstrap.enrol_site(issue(Registry(enrolment="localhost:1", fleet="localhost:1").token()), home)
        assert "identity.key" not in files(home)

    def test_a_folder_that_others_can_write(self, home: Path) -> None:
        home.mkdir()
        home.chmod(0o777)
        with pytest.raises(SiteError, match="can be written by others"):
            bootstrap.enrol_site(issue(Registry(enrolment="localhost:1", fleet="localhost:1").token()), home)
        assert not files(home)


class TestWhatTheHomeHolds:
    @pytest.fixture
    def enrolled(self, home: Path) -> Iterator[Registry]:
        registry = Registry()
        with served(registry) as loop:
            bootstrap.enrol_site(invited(registry, loop), home)
            yield registry

    @pytest.mark.parametrize("name", ["identity.key", "tls.pem"])
    def test_secrets_that_others_can_read(self, enrolled: Registry, home: Path, name: str) -> None:
        (home / name).chmod(0o644)
        with pytest.raises(SiteError, match="can be read by others"):
            credentials.identity_of(home)
            credentials.load_credential(home)

    @pytest.mark.parametrize("name", ["identity.key", "tls.pem", "consortium.pem", "membership.yaml", "peers.json"])
    @pytest.mark.parametrize("data", [b"", b"garbage", b"[1]", b"x" * (1 << 22), b"\xff\xfe"])
    def test_damaged_files_are_named(self, enrolled: Registry, home: Path, name: str, data: bytes) -> None:
        (home / name).write_bytes(data)
        (home / name).chmod(0o600)
        with pytest.raises(SiteError, match=name.replace(".", r"\.")):
            bootstrap.site_peers(home)
            credentials.load_credential(home)

    def test_certificates_are_renewed_and_peers_met(self, enrolled: Registry, home: Path) -> None:
        before = credentials.load_credential(home)
        fresh = asyncio.run(enrolment.renew_credential(home, before))
        credentials.save_credential(home, fresh)
        assert credentials.load_credential(home) == fresh != before
        row = enrolled.store.rows["north"]
        enrolled.store.rows["south"] = type(row)(name="south", identity=b"s" * 32, enrolled=row.enrolled)
        assert asyncio.run(enrolment.meet_peers(home)).new == ("south",)
        assert enrolment.pinned_identities(home) == {"north": row.identity, "south": b"s" * 32}
        settings = home / "membership.yaml"
        settings.write_text(settings.read_text().replace("peers: first-use", "peers: confirmed"))
        assert set(enrolment.pinned_identities(home)) == {"north"}
        bootstrap.confirm_peer(home, "south", fingerprint(b"s" * 32))
        assert set(enrolment.pinned_identities(home)) == {"north", "south"}
        assert json.loads((home / "peers.json").read_text())["south"]["confirmed"] is True


class TestAConsortiumsFolder:
    def test_it_is_begun_once(self, tmp_path: Path) -> None:
        folder = tmp_path / "heart"
        written = bootstrap.create_consortium(folder, "heart", ["fleet.example.org:7400"], ["10.0.0.7:7401"])
        assert {path.name for path in written} == files(folder)
        assert modes(folder) == {0o600}
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        before = {path: path.read_bytes() for path in folder.iterdir()}
        told = bootstrap.load_consortium(folder)
        assert told.hosts == ("fleet.example.org", "10.0.0.7")
        assert told.listen == ("0.0.0.0", 7400, 7401)
        assert told.health == "127.0.0.1:7402"
        assert "PrivateKey" not in repr(told)
        person = principal_of((folder / "operator.pem").read_bytes())
        assert (person.role, person.name) == ("operator", "operator")
        with pytest.raises(StudyError, match="is there already"):
            bootstrap.create_consortium(folder, "heart", ["localhost:1"], ["localhost:2"])
        for path in written:
            path.unlink()
            with pytest.raises(StudyError, match="is there already"):
                bootstrap.create_consortium(folder, "heart", ["localhost:1"], ["localhost:2"])
            assert not path.exists()
            if not path.name.startswith("operator"):
                with pytest.raises(StudyError, match=r"restore it|holds no consortium"):
                    bootstrap.load_consortium(folder)
            path.write_bytes(before[path])
            path.chmod(0o600)
        assert before == {path: path.read_bytes() for path in folder.iterdir()}

    @pytest.mark.parametrize("name", ["ca.key", "coordinator.key", ""])
    def test_what_others_can_read_is_refused(self, tmp_path: Path, name: str) -> None:
        folder = tmp_path / "heart"
        bootstrap.create_consortium(folder, "heart", ["localhost:7400"], ["localhost:7401"])
        os.chmod(folder / name, 0o740)
        with pytest.raises(StudyError, match="can be read"):
            bootstrap.load_consortium(folder)

    def test_a_folder_that_others_can_read_gets_no_keys(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o755)
        with pytest.raises(StudyError, match="chmod 700"):
            bootstrap.create_consortium(tmp_path, "heart", ["localhost:7400"], ["localhost:7401"])
        assert not files(tmp_path)

    def test_an_invitation_leads_to_it(self, tmp_path: Path) -> None:
        folder, store = tmp_path / "heart", MemoryEnrolments()
        bootstrap.create_consortium(folder, "heart", ["localhost:7400"], ["localhost:7401"])
        told = bootstrap.load_consortium(folder)
        token = asyncio.run(enrolment.invite(told, store, "north", 7, "me"))
        made = parse(token)
        assert store.invitations["north"][0] == digest(made.secret)
        assert made.authority == told.authority.certificate.public_bytes(Encoding.DER)
        with pytest.raises(CohortiumError, match="not a valid name"):
            asyncio.run(enrolment.invite(told, store, "no/th", 7, "me"))
        assert set(store.invitations) == {"north"}

    def test_its_own_certificate_is_fresh(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder, begin = tmp_path / "heart", datetime.now(UTC)
        bootstrap.create_consortium(folder, "heart", ["localhost:7400"], ["127.0.0.1:7401"])
        fresh = enrolment.server_certificate(bootstrap.load_consortium(folder))
        first = fresh()
        for hours, same in ((15, True), (17, False)):
            monkeypatch.setattr(enrolment, "_now", lambda hours=hours: begin + timedelta(hours=hours))
            assert (fresh() == first) == same
