"""The network's contract: its code is up to date, and what was published of it stays."""

import json
import sys
from pathlib import Path

import pytest

TOOLS = str(Path(__file__).parents[2] / "tools")


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("grpc_tools")
    monkeypatch.syspath_prepend(TOOLS)
    import fleet_proto

    yield fleet_proto
    sys.modules.pop("fleet_proto", None)


def test_the_generated_code_is_what_the_contract_gives(tool) -> None:
    assert tool.stale() == []


def test_what_was_published_is_still_there(tool) -> None:
    published = json.loads(tool.VECTORS.read_text())
    now = tool.surface(tool.described())
    assert tool.broken(published, now) == []
    assert published == now, "run python tools/fleet_proto.py: it publishes what is new"


def test_each_kind_of_change_is_found(tool) -> None:
    now = tool.surface(tool.described())
    field = "cohortium.fleet.v1.Chunk.total"
    assert tool.broken(now, now | {field: now[field].replace("3", "9")})
    assert tool.broken(now, now | {field: now[field].replace("uint64", "int64")})
    assert tool.broken(now, now | {field: now[field].replace("optional", "repeated")})
    assert tool.broken(now, {name: what for name, what in now.items() if name != field})
    method = "cohortium.fleet.v1.Fleet.Attach"
    assert tool.broken(now, now | {method: now[method].replace("stream ", "")})
    assert not tool.broken(now, now | {"cohortium.fleet.v1.Chunk.more": "9 optional bytes"})


def test_the_contract_holds_what_it_is_meant_to(tool) -> None:
    now = tool.surface(tool.described())
    methods = {name.removeprefix("cohortium.fleet.v1.") for name, what in now.items() if what.startswith("rpc")}
    consortium = {"Submit", "GetRun", "ListRuns", "SetWish", "Events", "Result", "Status"}
    assert methods >= {"Fleet.Attach", "Enrolment.Enrol", "Membership.Renew"} | {f"Consortium.{m}" for m in consortium}
