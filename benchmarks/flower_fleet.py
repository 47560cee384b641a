"""Flower 1.41 as a fleet of real processes on this machine: how long its rounds and runs take, what its memory is.

    .venv-flower/bin/python benchmarks/flower_fleet.py --quick

Runs where flwr is installed; the last line of its output is one JSON object. Measured with Flower's defaults: one
SuperLink with TLS and SuperNode authentication, SuperNodes that each start a process for each message, a ClientApp
that adds 1 to what it gets, a ServerApp with FedAvg. A round is the time between two marks in the ServerApp, so it
holds the sending, the ClientApps, the answers and the mean; figures are medians of rounds 2 and later. A run lasts
from the request to start it until the SuperLink says that it is finished, seen every 0.2 s; `overhead_s` is a run less
its rounds. The memory is the sum of the resident sets of a process and all below it, `running` at its peak; what they
share counts for each.

Not measured: secure aggregation (the SuperLink reads each site's update here), the start of the fleet, the start of
the `flwr` command, and the installation of an app's packages, which is off. All sites share this machine's processors,
and their links are loopback.

flwr is imported late, so that nvflare_fleet.py, in another environment, can share the gauges.
"""

import argparse
import contextlib
import ctypes
import datetime as dt
import hashlib
import ipaddress
import itertools
import json
import math
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

FIGURE_S, BENCH_S = 120, 1500
"""Seconds until one figure, or the whole bench, is given up."""
GROW_S, STOP_S = 180, 105
"""Seconds until a fleet stays as small as it is, or a run is stopped after the rounds that it has done."""
POLL_S = 0.2
SMALL, LARGE = 1_000, 10_000_000
MODEL_ROUNDS = 5
FEW, MANY = 5, 15
"""Sites of the runs with a large vector, and of those with a small one."""
IDLE_S = 2
SUBREAPER = 36
PROJECT = """[project]
name = "fleetbench"
version = "1.0.0"
dependencies = []
[tool.flwr.app]
publisher = "bench"
[tool.flwr.app.components]
serverapp = "fleetbench:server"
clientapp = "fleetbench:client"
[tool.flwr.app.config]
values = 1
sites = 1
rounds = 1
marks = ""
"""
APP = """import json
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

client, server = ClientApp(), ServerApp()


@client.train()
def train(message, context):
    arrays = [array + 1 for array in message.content["arrays"].to_numpy_ndarrays()]
    parts = {"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 1})}
    return Message(content=RecordDict(parts), reply_to=message)


@server.main()
def main(grid, context):
    config, marks = context.run_config, []

    def mark(number, arrays):
        marks.append(time.monotonic())
        state = {"marks": marks, "value": float(arrays.to_numpy_ndarrays()[0][-1])}
        Path(config["marks"] + ".new").write_text(json.dumps(state))
        Path(config["marks"] + ".new").replace(config["marks"])

    sites = int(config["sites"])
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites)
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord([np.zeros(int(config["values"]), np.float32)]),
        num_rounds=int(config["rounds"]),
        evaluate_fn=mark,
    )
"""


def family(root: int) -> list[int]:
    """Returns a process and all below it."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(folder.name))
    found = [root]
    for parent in found:
        found += children.get(parent, [])
    return found


def resident_mb(root: int) -> float:
    """Returns the memory of a process and all below it."""
    total = 0
    for process in family(root):
        with contextlib.suppress(OSError):
            total += int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return round(total / 1e6, 1)


def free_ports(count: int) -> list[int]:
    """Returns ports of loopback that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Gives a folder; at the end all processes below this one are killed, and then the folder is removed."""
    # what a killed parent leaves behind comes to this process, so that it is found at the end
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to stop"))
    folder = Path(tempfile.mkdtemp(prefix="fleetbench-"))
    try:
        yield folder
    finally:
        while len(rest := family(os.getpid())) > 1:
            for process in rest[1:]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            time.sleep(0.05)
        shutil.rmtree(folder, ignore_errors=True)


class Figures:
    """The figures so far; those that fail or take too long are None, and `why` says so."""

    def __init__(self, seconds: float, **facts: Any) -> None:
        self.values: dict[str, Any] = facts | {"why": {}}
        self.end = time.monotonic() + seconds

    def take(self, names: tuple[str, ...], work: Callable[[], dict[str, Any]], limit: int = FIGURE_S) -> None:
        """Does some work that gives the named figures."""
        self.values |= dict.fromkeys(names)
        seconds = int(min(limit, self.end - time.monotonic()))
        try:
            if seconds < 1:
                raise TimeoutError("no time was left for it")
            signal.signal(signal.SIGALRM, _expired)
            # again and again, since a peer's own code may swallow it
            signal.setitimer(signal.ITIMER_REAL, seconds, 5)
            self.values |= work()
        except Exception as error:  # noqa: BLE001  whatever a peer does, the others are measured
            self.values["why"] |= dict.fromkeys(names, f"{type(error).__name__}: {error}"[:300])
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _expired(*_: Any) -> None:
    raise TimeoutError("not done within its time limit")


def settled(count: Callable[[], int], wanted: int) -> int:
    """Waits until something has been counted often enough, or too long; returns how often it was."""
    end = time.monotonic() + GROW_S
    while (counted := count()) < wanted and time.monotonic() < end:
        time.sleep(POLL_S)
    if not counted:
        raise TimeoutError(f"nothing came up within {GROW_S} s")
    return counted


def paces(marks: Path, rounds: int | None) -> list[float]:
    """Returns the seconds of each round from the marks of a run, whose result is right if all `rounds` are done."""
    result = json.loads(marks.read_text())
    if rounds is not None and result["value"] != rounds:
        raise RuntimeError(f"the run gave {result['value']} instead of {rounds}")
    return [later - earlier for earlier, later in itertools.pairwise(result["marks"])]


def environment(**extra: str) -> dict[str, str]:
    """Returns what the peer's processes inherit: nothing leaves this machine, one thread for each numeric library."""
    threads = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    local = {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return os.environ | threads | local | path | extra


class Fleet:
    """A SuperLink and its SuperNodes, each with a folder and a log of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (self.port,) = free_ports(1)
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.sites = 0
        self.peaks = (0.0, 0.0)
        self.link: subprocess.Popen[bytes] | None = None
        self.control: Any = None

    def _open(self) -> None:
        """Writes the app, starts the SuperLink and speaks to it as the `flwr` command does."""
        from flwr.cli.typing import SuperLinkConnection
        from flwr.cli.utils import init_http_client_from_connection

        folder = self.folder
        os.environ["FLWR_HOME"] = str(folder / "console")
        (folder / "app").mkdir()
        (folder / "app" / "pyproject.toml").write_text(PROJECT)
        (folder / "app" / "fleetbench.py").write_text(APP)
        self._certify()
        self.link = self._start(
            "superlink",
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--ssl-ca-certfile", str(folder / "tls.pem"), "--ssl-certfile", str(folder / "tls.pem")),
            *("--ssl-keyfile", str(folder / "tls.key")),
            *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
        )
        settled(self._listens, 1)
        connection = SuperLinkConnection("bench", f"127.0.0.1:{self.port}", str(folder / "tls.pem"))
        self.control = init_http_client_from_connection(connection)

    def _certify(self) -> None:
        """Writes a certificate of the SuperLink that is its own authority."""
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key, day = ec.generate_private_key(ec.SECP256R1()), dt.timedelta(days=1)
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
        now = dt.datetime.now(dt.UTC)  # noqa: TID251  certificates count from now
        hosts = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now - day, now + day)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        builder = builder.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        certificate = builder.sign(key, hashes.SHA256())
        (self.folder / "tls.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        (self.folder / "tls.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )

    def _start(self, name: str, *arguments: str) -> "subprocess.Popen[bytes]":
        command = "flower-superlink" if name == "superlink" else "flower-supernode"
        quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        with (self.folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                [str(Path(sys.executable).parent / command), *arguments],
                env=environment(FLWR_HOME=str(self.folder / name), **quiet),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _listens(self) -> int:
        if self.link.poll() is not None:
            raise RuntimeError(f"the SuperLink ended: {(self.folder / 'superlink.log').read_text()[-200:]}")
        with socket.socket() as probe:
            return int(probe.connect_ex(("127.0.0.1", self.port)) == 0)

    def grow(self, sites: int) -> int:
        """Registers and starts SuperNodes until there are as many; returns how many of them are online then."""
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest
        from flwr.supercore.primitives.asymmetric import public_key_to_bytes

        if self.link is None:
            self._open()
        for number, port in enumerate(free_ports(sites - len(self.nodes)), len(self.nodes)):
            key = ec.generate_private_key(ec.SECP384R1())
            self.control.RegisterNode(RegisterNodeRequest(public_key=public_key_to_bytes(key.public_key())))
            path, ssh = self.folder / f"site-{number}.key", serialization.PrivateFormat.OpenSSH
            path.write_bytes(key.private_bytes(serialization.Encoding.PEM, ssh, serialization.NoEncryption()))
            self.nodes.append(
                self._start(
                    f"site-{number}",
                    *("--superlink", f"127.0.0.1:{self.port}", "--root-certificates", str(self.folder / "tls.pem")),
                    *("--auth-supernode-private-key", str(path), "--host", "127.0.0.1", "--port", str(port)),
                )
            )

        def online() -> int:
            return sum(node.status == "online" for node in self.control.ListNodes(ListNodesRequest()).nodes_info)

        self.sites = settled(online, sites)
        return self.sites

    def run(self, values: int, rounds: int) -> tuple[list[float], float]:
        """Returns the seconds of each round of a run with all sites, and those of the run; infinite if stopped."""
        from flwr.cli.build import build_fab_from_disk
        from flwr.common.serde import fab_to_proto, user_config_to_proto
        from flwr.proto.control_pb2 import ListRunsRequest, StartRunRequest, StopRunRequest
        from flwr.supercore.fab import Fab

        marks = self.folder / f"marks-{time.monotonic_ns()}"
        config = {"values": values, "sites": self.sites, "rounds": rounds, "marks": str(marks)}
        started = time.monotonic()
        content = build_fab_from_disk(self.folder / "app")
        fab = fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {}))
        request = StartRunRequest(fab=fab, override_config=user_config_to_proto(config))
        number, state = self.control.StartRun(request).run_id, None
        while state is None or state.status != "finished":
            time.sleep(POLL_S)
            memory = resident_mb(self.link.pid), resident_mb(self.nodes[0].pid)
            self.peaks = max(self.peaks[0], memory[0]), max(self.peaks[1], memory[1])
            if time.monotonic() - started > STOP_S:
                self.control.StopRun(StopRunRequest(run_id=number))
                return paces(marks, None), math.inf
            state = self.control.ListRuns(ListRunsRequest(run_id=number)).run_dict[number].status
        seconds = time.monotonic() - started
        if state.sub_status != "completed":
            raise RuntimeError(f"the run {state.sub_status}: {state.details}")
        return paces(marks, rounds), seconds


def median_s(fleet: Any, values: int, rounds: int) -> float:
    """Returns the seconds of a round, of those after the first that a run has done."""
    later = fleet.run(values, rounds)[0][1:]
    if not later:
        raise TimeoutError(f"two rounds were not done within {STOP_S} s")
    return statistics.median(later)


def models(fleet: Any, runs: int) -> dict[str, Any]:
    """Returns how fast small runs go one after the other, as many as fit, and what one takes beyond its rounds."""
    started, beyond = time.monotonic(), []
    while len(beyond) < runs:
        rounds, seconds = fleet.run(SMALL, MODEL_ROUNDS)
        if seconds == math.inf:
            raise TimeoutError(f"{len(rounds)} of {MODEL_ROUNDS} rounds were done within {STOP_S} s")
        beyond.append(seconds - sum(rounds))
        passed = time.monotonic() - started
        if passed + seconds > FIGURE_S:
            break
    hourly = round(len(beyond) * 3600 / passed, 1)
    return {"overhead_s": round(statistics.median(beyond), 2), "models_per_hour": hourly, "model_runs": len(beyond)}


def memory(fleet: Any) -> dict[str, Any]:
    """Returns the memory of the coordinator and of a site's agent, idle after a run and at its peak."""
    fleet.peaks = (0.0, 0.0)
    fleet.run(SMALL, 1)
    time.sleep(IDLE_S)
    agents = statistics.median(resident_mb(node.pid) for node in fleet.nodes)
    running = {"coordinator_running_mb": fleet.peaks[0], "agent_running_mb": fleet.peaks[1]}
    return {"coordinator_mb": resident_mb(fleet.link.pid), "agent_mb": round(agents, 1)} | running


def measure(figures: Figures, fleet: Any, quick: bool) -> None:
    """Takes all figures of a fleet, those of the few sites first."""
    rounds, runs = (2, 1) if quick else (4, 2)
    figures.take(("model_sites",), lambda: {"model_sites": fleet.grow(FEW)}, 2 * GROW_S)
    figures.take(("overhead_s", "models_per_hour"), lambda: models(fleet, runs))
    figures.take(("round_5x10M_s",), lambda: {"round_5x10M_s": round(median_s(fleet, LARGE, rounds), 2)})
    figures.take(("sites",), lambda: {"sites": fleet.grow(MANY)}, 2 * GROW_S)
    figures.take(("round_15x1k_ms",), lambda: {"round_15x1k_ms": round(1000 * median_s(fleet, SMALL, rounds), 1)})
    figures.take(("coordinator_mb", "agent_mb"), lambda: memory(fleet))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and runs")
    parser.add_argument("--limit", type=int, default=BENCH_S, help="seconds until the whole bench is given up")
    options = parser.parse_args()
    protection = "TLS and SuperNode authentication; the SuperLink reads each update"
    figures = Figures(options.limit, peer=f"Flower {version('flwr')}", protection=protection, quick=options.quick)
    with scratch() as folder:
        measure(figures, Fleet(folder), options.quick)
    print(json.dumps(figures.values))


if __name__ == "__main__":
    main()
