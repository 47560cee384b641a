"""A whole consortium of processes on loopback: studies submitted, sites lost and back, strangers turned away."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import Encoding

import cohortium as co
from cohortium.adapters import credentials
from cohortium.bootstrap import connect, grant, load_consortium
from cohortium.bootstrap.enrolment import revoke_site
from cohortium.bootstrap.loopback import Loopback
from cohortium.coordinator.ports import Terms
from cohortium.core.document import document
from cohortium.core.errors import PolicyRefused, StudyError
from cohortium.core.protection import Aggregation
from cohortium.engines.fleet.client import Consortium
from cohortium.engines.fleet.v1 import fleet_pb2 as pb
from cohortium.engines.fleet.v1 import fleet_pb2_grpc as pb_grpc

COMMAND = (sys.executable, "-m", "cohortium")
STUDY = co.load_example()
TOLERANT = replace(STUDY, name="tolerant", aggregation=Aggregation(dropouts=1))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    """A coordinator and four hospitals' agents, for all tests of this module."""
    with Loopback.begin(tmp_path_factory.mktemp("fleet"), co.example_sites(), "heart_disease") as made:
        yield made


@pytest.fixture
def consortium(fleet: Loopback) -> Iterator[Consortium]:
    with fleet.connect() as connection:
        yield connection


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends, "it did not come about in time"
        time.sleep(0.01)


def command(*arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"COLUMNS": "120", "NO_COLOR": "1"},
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_study_over_the_network_gives_the_bits_of_a_simulation(fleet: Loopback, consortium: Consortium) -> None:
    for study in (STUDY, TOLERANT):
        fleet.approve(study)
        result = consortium.submit(study, seed=11).result()
        simulated = co.simulate(study, co.example_sites(), seed=11)
        assert result.model.to_bytes() == simulated.model.to_bytes()
        assert [one.survivors for one in result.rounds] == [one.survivors for one in simulated.rounds]
        assert result.simulated is None


def test_a_killed_site_is_left_out_of_its_round_and_joins_the_next(fleet: Loopback, consortium: Consortium) -> None:
    study = replace(TOLERANT, name="killed")
    fleet.approve(study)
    zurich = fleet.agents["zurich"]
    zurich_stopped = False
    handle = consortium.submit(study, seed=3, terms=Terms(deadline=3, patience=120))
    for event in handle.events():
        if event.kind == "began":
            # stopped and not killed first: a process that is gone could not be in the middle of a round for sure
            os.kill(zurich.pid, signal.SIGSTOP)
            zurich_stopped = True
        if event.kind == "round" and zurich_stopped and "zurich" not in event.facts["survivors"]:
            zurich.kill()
            zurich.start()
            zurich_stopped = False
    assert handle.state().status == "finished", handle.state().reason
    taken_part = ["zurich" in one.survivors for one in handle.result().rounds]
    assert not all(taken_part)
    until(zurich.ready)


def test_a_site_that_did_not_approve_takes_no_part(fleet: Loopback, consortium: Consortium) -> None:
    study = replace(STUDY, name="unapproved")
    row = consortium.submit(study).watch()
    assert row.status == "failed" and row.reason is not None
    assert "has not approved it" in row.reason


def test_runs_are_steered_and_listed_from_the_command_line(fleet: Loopback, tmp_path: Path) -> None:
    study = replace(TOLERANT, name="steered")
    fleet.approve(study)
    file = tmp_path / "study.json"
    file.write_text(json.dumps(document(study)))
    where = ("--consortium", str(fleet.home))
    printed = command("study", "submit", str(file), *where, "--seed", "7", "--run", "by-hand", "--out", str(tmp_path))
    assert "logistic regression of 920 patients" in printed
    assert (tmp_path / "report.html").exists() and (tmp_path / "model.json").exists()
    listed = json.loads(command("run", "list", *where, "--json"))["runs"]
    assert ("by-hand", "finished") in [(one["run"], one["status"]) for one in listed]
    assert "Run by-hand finished" in command("run", "watch", "by-hand", *where)
    status = json.loads(command("status", *where, "--json"))
    assert {one["name"]: one["attached"] for one in status["sites"]} == dict.fromkeys(fleet.agents, True)
    assert {one["standing"] for one in status["sites"]} == {None}
    assert "zurich" in command("status", *where)
    status = json.loads(command("status", "by-hand", *where, "--json"))
    assert [one["run"] for one in status["runs"]] == ["by-hand"]
    standings = [one["standing"] for one in status["sites"]]
    assert {(one["word"], one["round"]) for one in standings} == {("contributed", status["runs"][0]["round"])}
    shown = command("status", "by-hand", *where)
    assert "last round" in shown and "contributed" in shown
    assert "there is no run 'nothing'" in command("status", "nothing", *where, code=2)
    assert "there is no run 'nothing'" in command("run", "watch", "nothing", *where, code=2)


def test_a_process_that_ends_by_itself_is_started_again(fleet: Loopback) -> None:
    agent = fleet.agents["zurich"]
    before = agent.pid
    os.kill(before, signal.SIGSEGV)
    until(lambda: agent.pid != before and agent.ready())


def test_a_run_is_paused_resumed_and_cancelled(fleet: Loopback, consortium: Consortium) -> None:
    study = replace(STUDY, name="rested")
    fleet.approve(study, 2)
    os.kill(fleet.agents["zurich"].pid, signal.SIGSTOP)
    try:
        handle = consortium.submit(study, seed=1, terms=Terms(deadline=60, patience=120))
        until(lambda: handle.state().status == "running")
        handle.pause()
        until(lambda: handle.state().status == "paused")
    finally:
        os.kill(fleet.agents["zurich"].pid, signal.SIGCONT)
    handle.resume()
    assert handle.result().model.coef_.shape == (13,)
    other = consortium.submit(study, terms=Terms(deadline=60, patience=120))
    other.cancel()
    row = other.watch()
    assert row.status in ("cancelled", "finished")
    with pytest.raises(StudyError, match="ended"):
        other.pause()


def test_health_pages_tell_how_processes_are(fleet: Loopback) -> None:
    import urllib.request

    for daemon in (*fleet.coordinators.values(), *fleet.agents.values()):
        facts = daemon.facts()
        assert facts is not None and facts["ready"] is True
        with urllib.request.urlopen(f"http://{daemon.health}/metrics") as page:
            assert b"# HELP cohortium" in page.read()
        with urllib.request.urlopen(f"http://{daemon.health}/healthz") as page:
            assert page.status == 200


def test_logs_hold_no_secret_and_no_value(fleet: Loopback) -> None:
    keys = [*fleet.folder.rglob("*.key"), *fleet.folder.rglob("tls.pem")]
    assert len(keys) >= 11
    secrets = [line for key in keys for line in key.read_bytes().split(b"\n") if len(line) > 40]
    secrets += [key.read_bytes() for key in keys if key.name == "ledger.key"]
    for log in fleet.folder.glob("*.log"):
        text = log.read_bytes()
        assert not any(secret in text for secret in secrets), log.name
        assert b"Traceback" not in text, text.decode()[-2000:]
        for line in text.splitlines():
            json.loads(line)


def stub(fleet: Loopback, certificate: tuple[bytes, bytes] | None) -> tuple[grpc.Channel, Any]:
    authority = load_consortium(fleet.home).authority_pem
    chain, key = certificate or (None, None)
    channel = grpc.secure_channel(fleet.addresses[0], grpc.ssl_channel_credentials(authority, key, chain))
    return channel, pb_grpc.ConsortiumStub(channel)


def certified(fleet: Loopback, role: Any, name: str, now: datetime, hours: float = 1.0) -> tuple[bytes, bytes]:
    """Returns a certificate of the consortium's own authority, and its key."""
    key, csr = credentials.request()
    authority = load_consortium(fleet.home).authority
    made = authority.certify(csr, role, name, now, 4711, timedelta(hours=hours))
    return made.public_bytes(Encoding.PEM), key


def test_people_are_who_their_certificates_say(fleet: Loopback, consortium: Consortium) -> None:
    now = datetime.now(UTC)
    cases = {
        "nobody": (None, {grpc.StatusCode.UNAVAILABLE}),
        "a site": (certified(fleet, "site", "zurich", now), {grpc.StatusCode.PERMISSION_DENIED}),
        "somebody of yesterday": (
            certified(fleet, "operator", "eve", now - timedelta(days=1)),
            {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAUTHENTICATED},
        ),
    }
    for who, (certificate, expected) in cases.items():
        channel, calls = stub(fleet, certificate)
        with channel, pytest.raises(grpc.RpcError) as refused:
            calls.Status(pb.StatusRequest(), timeout=5)
        assert refused.value.code() in expected, who
    run = consortium.runs()[0].run
    channel, calls = stub(fleet, certified(fleet, "researcher", "mallory", now))
    with channel:
        assert not calls.ListRuns(pb.ListRunsRequest(), timeout=5).runs
        for call, request in (
            (calls.GetRun, pb.GetRunRequest(run=run)),
            (calls.SetWish, pb.SetWishRequest(run=run, wish=pb.WISH_CANCEL)),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                call(request, timeout=5)
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_researcher_connects_with_the_folder_that_was_granted(fleet: Loopback, tmp_path: Path) -> None:
    folder = tmp_path / "ada"
    grant(load_consortium(fleet.home), "researcher", "ada", folder)
    study = replace(STUDY, name="ada")
    fleet.approve(study)
    with connect(folder) as mine:
        assert mine.submit(study).result().model.coef_.shape == (13,)
        assert [one.owner for one in mine.runs()] == ["researcher:ada"]
        with pytest.raises(PolicyRefused, match="only an operator"):
            mine.submit(study, terms=Terms(priority=1))
    (folder / "certificate.key").chmod(0o644)
    with pytest.raises(StudyError, match="can be read by others"):
        connect(folder)


def test_studies_and_seeds_that_cannot_be_are_refused_at_once(fleet: Loopback, consortium: Consortium) -> None:
    stranger = replace(STUDY, sites=replace(STUDY.sites, include=("budapest", "cleveland", "oslo", "zurich")))
    with pytest.raises(StudyError, match="oslo, not enrolled"):
        consortium.submit(stranger)
    private = replace(STUDY, training=co.Descent(clip=1.0), privacy=co.Privacy(unit="patient", epsilon=1.0, delta=1e-5))
    with pytest.raises(StudyError, match="a seed was refused"):
        consortium.submit(private, seed=1)
    single = replace(STUDY, aggregation=Aggregation(protocol="ckks-single-key"))
    with pytest.raises(StudyError, match="needs one secret key at all hospitals"):
        consortium.submit(single)
    with pytest.raises(StudyError, match="deadline"):
        consortium.submit(STUDY, terms=Terms(deadline=float("nan")))


def test_a_revoked_site_is_off_at_once(fleet: Loopback, consortium: Consortium) -> None:
    # the last test: the site does not come back
    assert revoke_site(fleet.home, "zurich").revoked is not None
    until(lambda: not {one.name: one.attached for one in consortium.state().sites}["zurich"], 10)
    with pytest.raises(StudyError, match="zurich, not enrolled"):
        consortium.submit(STUDY)
    with pytest.raises(StudyError):
        revoke_site(fleet.home, "nowhere")
