"""What is disturbed: the consortium with everything in place to disturb it, its hospitals and its studies."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import cohortium as co
from chaos_faults import KINDS, Control, Disk, World, library
from chaos_network import Namespace, Switchboard
from cohortium.adapters import credentials
from cohortium.bootstrap import descriptive
from cohortium.bootstrap.loopback import Loopback
from cohortium.core.errors import RunFailed
from cohortium.core.protection import Aggregation
from cohortium.core.study import Sites, Study
from cohortium.core.training import Descent
from cohortium.engines.fleet.client import Consortium

HERE = Path(__file__).parent


def hospitals(folder: Path) -> dict[str, Path]:
    """Returns the data of five hospitals: the bundled ones, the largest one cut in two."""
    sites = co.example_sites()
    header, *rows = sites["cleveland"].read_text().splitlines(keepends=True)
    for name, part in (("cleveland", rows[::2]), ("lorain", rows[1::2])):
        sites[name] = folder / f"{name}.csv"
        sites[name].write_text(header + "".join(part))
    return sites


def studies(names: Sequence[str]) -> dict[str, Study]:
    """Returns the studies of the rota by kind; the number is how many sites may be lost."""
    base = co.load_example()
    base = replace(base, sites=Sites(include=tuple(sorted(names)), minimum=3))

    def of(kind: str, study: Study, dropouts: int, protocol: Any = "masking") -> Study:
        return replace(study, name=kind, aggregation=Aggregation(protocol=protocol, dropouts=dropouts))

    descent = replace(base, training=Descent(rounds=20))
    return {
        "newton-0": of("newton-0", base, 0),
        "newton-1": of("newton-1", base, 1),
        "describe-1": of("describe-1", descriptive(base), 1),
        "descent-0": of("descent-0", descent, 0),
        "descent-1": of("descent-1", descent, 1),
        "rlwe-1": of("rlwe-1", base, 1, "rlwe"),
    }


@contextmanager
def world(folder: Path, sites: dict[str, Path], asked: dict[str, Study]) -> Iterator[World]:
    """Yields a consortium with everything in place to disturb it."""
    with ExitStack() as stack:
        folder.mkdir()
        (folder / "consortium").mkdir(mode=0o700)
        disks = {"stores": Disk(folder / "consortium" / "stores", 512)}
        disks |= {name: Disk(folder / "sites" / name, 24) for name in sorted(sites)[:2]}
        for disk in disks.values():
            stack.callback(disk.close)
        board = Switchboard()
        stack.callback(board.close)
        fleet = Loopback.begin(folder, sites, "heart_disease", coordinators=3, program=HERE / "chaos_process.py")
        stack.callback(fleet.close)
        for study in asked.values():
            fleet.approve(study, 100_000)
        fleet.close()
        made = World(fleet, board, disks={name: disk for name, disk in disks.items() if disk.made})
        if len(made.disks) < len(disks):
            made.missing |= dict.fromkeys(("full-disk-agent", "full-disk-stores"), "only root mounts disks")
            made.disks.clear()
        _isolate(stack, made, sorted(sites)[-1])
        _wire(made)
        _preload(stack, made, folder)
        for daemon in [*fleet.coordinators.values(), *fleet.agents.values()]:
            daemon.start()
        with fleet.connect() as connection:
            fleet.wait(lambda: _attached(connection) == len(sites), 90.0, "the sites' links")
        yield made


def _attached(connection: Consortium) -> int:
    try:
        return sum(site.attached for site in connection.state().sites)
    except RunFailed:
        return 0


def _isolate(stack: ExitStack, made: World, site: str) -> None:
    """Moves an agent into a network namespace, where that is allowed."""
    namespace = Namespace(os.getpid())
    stack.callback(namespace.close)
    if not namespace.made:
        made.missing["link-down"] = "network namespaces are not allowed here"
        return
    made.namespace, made.isolated = namespace, site
    agent = made.fleet.agents[site]
    agent.arguments = (*namespace.prefix, *agent.arguments)


def _wire(made: World) -> None:
    """Has each agent reach its coordinators through relays."""
    places = list(zip(made.fleet.coordinators, made.fleet.addresses, strict=True))
    for site in made.fleet.agents:
        home, inside = made.fleet.site_home(site), made.isolated == site
        host = made.namespace.host if inside and made.namespace else "127.0.0.1"
        ports = [made.board.add(site, name, address, host) for name, address in places]
        if inside and made.namespace is not None:
            made.namespace.relay({port: port for port in ports})
        enrolled = credentials.load_enrolled(home)
        credentials.save_enrolled(home, replace(enrolled, fleet=tuple(f"127.0.0.1:{port}" for port in ports)))


def _preload(stack: ExitStack, made: World, folder: Path) -> None:
    """Gives each process its control file, and agents a file for what they saw accepted."""
    (folder / "acknowledged").mkdir()
    for name, agent in made.fleet.agents.items():
        agent.environment = {"CHAOS_ACKNOWLEDGED": str(folder / "acknowledged" / f"{name}.jsonl")}
    built = library()
    if built is None:
        why = "there is no gcc"
        made.missing |= {kind: why for kind in KINDS if kind.startswith(("clock-", "slow-"))}
        return
    stack.callback(shutil.rmtree, built.parent, ignore_errors=True)
    daemons = made.fleet.coordinators | made.fleet.agents
    made.controls = {name: Control(built.parent / name) for name in (*daemons, "postgres")}
    for name, daemon in daemons.items():
        mine = {"LD_PRELOAD": str(built), "CHAOS_CONTROL": str(made.controls[name].path)}
        if name in made.fleet.coordinators:
            mine["CHAOS_STORE"] = str(made.controls["postgres"].path)
        daemon.environment = {**daemon.environment, **mine}
