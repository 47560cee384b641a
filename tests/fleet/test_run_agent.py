"""An agent's process: how it prepares for a run, and that it ends when it is told to."""

import asyncio
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import cohortium as co
from cohortium.adapters import credentials
from cohortium.bootstrap import create_home, fleet
from cohortium.bootstrap.fleet import _prepare
from cohortium.core import codec
from cohortium.core.document import canonical_bytes, study_id
from cohortium.core.errors import SiteError
from cohortium.core.messages import OpenRun
from cohortium.site.enrolled import Credential, Enrolled
from cohortium.site.peers import Met, Pinned

from . import wires

STUDY = co.load_example()
OPEN = codec.encode(OpenRun("run", canonical_bytes(STUDY)))
APPROVED = {study_id(STUDY): 1}
OLD = dict.fromkeys(STUDY.sites.include, b"o" * 32)
NEW = dict.fromkeys(STUDY.sites.include, b"n" * 32)


def prepared(pinned: Pinned, approved: dict[str, int] = APPROVED) -> None:
    with ThreadPoolExecutor(1, "agent") as thread:
        asyncio.run(_prepare(Path("home"), approved, pinned, thread, OPEN))


def test_identities_are_exchanged_once_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned, seen = Pinned(OLD), []

    def read(home: Path) -> dict[str, bytes]:
        seen.append((dict(pinned), threading.current_thread().name))
        return NEW

    monkeypatch.setattr(fleet.enrolment, "pinned_identities", read)
    prepared(pinned)
    assert seen == [(OLD, "agent_0")]
    assert dict(pinned) == NEW


def test_identities_stay_if_they_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(home: Path) -> dict[str, bytes]:
        raise SiteError("it cannot be read", public="no")

    pinned = Pinned(OLD)
    monkeypatch.setattr(fleet.enrolment, "pinned_identities", read)
    with pytest.raises(SiteError):
        prepared(pinned)
    assert dict(pinned) == OLD


def test_sites_that_are_not_known_are_met(monkeypatch: pytest.MonkeyPatch) -> None:
    known = [dict(list(NEW.items())[:2])]

    async def meet(home: Path) -> Met:
        known.append(NEW)
        return Met({}, (), ("zurich",))

    pinned = Pinned(OLD)
    monkeypatch.setattr(fleet.enrolment, "pinned_identities", lambda home: known[-1])
    monkeypatch.setattr(fleet.enrolment, "meet_peers", meet)
    prepared(pinned)
    assert dict(pinned) == NEW


def test_a_study_is_parsed_if_it_is_approved_and_not_where_messages_come_in(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, parse = [], fleet.from_canonical

    def parsed(data: bytes) -> Any:
        threads.append(threading.current_thread().name)
        return parse(data)

    monkeypatch.setattr(fleet, "from_canonical", parsed)
    monkeypatch.setattr(fleet.enrolment, "pinned_identities", lambda home: NEW)
    for approved in ({}, {study_id(STUDY): 0}, {"sha256:other": 1}):
        prepared(Pinned(OLD), approved)
    assert not threads
    prepared(Pinned(OLD))
    assert threads == ["agent_0"]


TRAINS = """
import asyncio, sys
from cohortium.bootstrap import fleet

def train():
    print("trains", flush=True)
    while True:
        sum(range(1000))

async def serve(self):
    await asyncio.get_running_loop().run_in_executor(self._trainers, train)

fleet.Attendant.serve = serve
fleet.run_agent(sys.argv[1])
print("ended", flush=True)
"""


def test_a_process_ends_in_the_middle_of_a_training(tmp_path: Path) -> None:
    home = tmp_path / "zurich"
    create_home(home)
    authority, chain, key = wires.Authority().person("zurich")
    credentials.begin_identity(home)
    credentials.save_credential(home, Credential(key, chain))
    nobody = ("127.0.0.1:1",)
    credentials.save_enrolled(
        home,
        Enrolled(
            site="zurich", consortium="c", enrolment=nobody, fleet=nobody, authority=authority, coordinator=bytes(32)
        ),
    )
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINS, str(home)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "trains\n"
        process.send_signal(signal.SIGTERM)
        told, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, told) == (0, "ended\n"), errors
