"""NVFLARE 2.9 as a fleet of real processes on this machine, in two ways, with the figures of flower_fleet.py.

    .venv-nvflare/bin/python benchmarks/nvflare_fleet.py --quick

Runs where nvflare is installed; the last line of its output is one JSON object with the figures of each way. Both are
a provisioned project: a server and clients that each start a process for each job.

- `defaults`: mutual TLS, the FedAvg controller with its default waits, an executor that adds 1 to what it gets.
- `collab`: the Collab API, where the server calls the clients' functions, without TLS.

A round is the time between two marks in the server's job process, so it holds the sending, the executors, the answers
and the mean; figures are medians of rounds 2 and later. A run lasts from the request to submit a job until the server
says that it is finished, seen every 0.2 s; `overhead_s` is a run less its rounds. The memory is the sum of the
resident sets of a process and all below it, `running` at its peak; what they share counts for each.

Not measured: homomorphic encryption (the server reads each site's update here), the start of the fleet, and the saving
of the model, which the job leaves out. All sites share this machine's processors, and their links are loopback.
"""

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flower_fleet import (
    BENCH_S,
    MANY,
    POLL_S,
    STOP_S,
    Figures,
    environment,
    free_ports,
    measure,
    paces,
    resident_mb,
    scratch,
    settled,
)

ADMIN = "admin@bench.org"
PROTECTION = {
    "defaults": "mutual TLS; the server reads each update",
    "collab": "none on the links; the server reads each update",
}
LINKS = {"defaults": "mtls", "collab": "clear"}
BUILDERS = {
    "workspace.WorkspaceBuilder": {"template_file": ["master_template.yml"]},
    "static_file.StaticFileBuilder": {"config_folder": "config"},
    "cert.CertBuilder": {},
    "signature.SignatureBuilder": {},
}
FEDAVG = """import json
import time
from pathlib import Path

import numpy as np
from nvflare.apis.executor import Executor
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.app_common.workflows.fedavg import FedAvg


class Average(FedAvg):
    def __init__(self, values, marks, **arguments):
        super().__init__(model={"w": np.zeros(values, np.float32)}, persistor_id="", **arguments)
        self.path, self.marks = marks, []

    def run(self):
        self.marks.append(time.monotonic())
        super().run()

    def save_model(self, model):
        self.marks.append(time.monotonic())
        Path(self.path).write_text(json.dumps({"marks": self.marks, "value": float(model.params["w"][-1])}))


class Adder(Executor):
    def execute(self, task_name, shareable, fl_ctx, abort_signal):
        model = FLModelUtils.from_shareable(shareable)
        return FLModelUtils.to_shareable(FLModel(params={name: array + 1 for name, array in model.params.items()}))
"""
COLLAB = """import json
import time
from pathlib import Path

import numpy as np
from nvflare.collab import collab


class Server:
    @collab.main
    def run(self):
        vector, marks = np.zeros(collab.get_app_prop("values"), np.float32), [time.monotonic()]
        for _ in range(collab.get_app_prop("rounds")):
            results = [result for _, result in collab.clients.add(vector)]
            vector = sum(results[1:], results[0]) / len(results)
            marks.append(time.monotonic())
        value = float(vector[-1]) if len(results) == collab.get_app_prop("sites") else None
        Path(collab.get_app_prop("marks")).write_text(json.dumps({"marks": marks, "value": value}))


class Client:
    @collab.publish
    def add(self, vector):
        return vector + 1
"""


class Fleet:
    """A provisioned server and its clients."""

    def __init__(self, folder: Path, way: str) -> None:
        self.folder, self.way = folder, way
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.sites = 0
        self.peaks = (0.0, 0.0)
        self.kits = folder / "workspace" / "fleetbench" / "prod_00"
        self.link: subprocess.Popen[bytes] | None = None
        self.session: Any = None

    def _open(self) -> None:
        """Starts the server and its console."""
        from nvflare.fuel.flare_api.flare_api import new_secure_session

        self._provision()
        self.link = self._start("localhost", "server")
        self.session = new_secure_session(ADMIN, str(self.kits / ADMIN), timeout=60)

    def _provision(self) -> None:
        """Makes the kits of all participants."""
        ports = dict(zip(("fed_learn_port", "admin_port"), free_ports(2), strict=True))
        people = [{"name": "localhost", "type": "server"} | ports, {"name": ADMIN, "type": "admin"}]
        people[1]["role"] = "project_admin"
        people += [{"name": f"site-{number}", "type": "client"} for number in range(MANY)]
        link = {"org": "bench", "connection_security": LINKS[self.way]}
        builders = [{"path": f"nvflare.lighter.impl.{name}", "args": args} for name, args in BUILDERS.items()]
        project = {"api_version": 3, "name": "fleetbench", "participants": [each | link for each in people]}
        (self.folder / "project.yml").write_text(json.dumps(project | {"description": "", "builders": builders}))
        command = [Path(sys.executable).parent / "nvflare", "provision", "-p", "project.yml", "-w", "workspace"]
        subprocess.run(command, cwd=self.folder, env=environment(), check=True, capture_output=True)
        resources = self.kits / "localhost" / "local" / "resources.json.default"
        # the server's jobs are else kept for good in a folder that all servers of this machine share
        resources.write_text(resources.read_text().replace("/tmp/nvflare", str(self.folder / "store")))

    def _start(self, name: str, role: str) -> "subprocess.Popen[bytes]":
        """Starts a participant as its own start script does."""
        arguments = ["-m", str(self.kits / name), "-s", f"fed_{role}.json", "--set", "secure_train=true"]
        arguments += ["org=bench", "config_folder=config"] + ([f"uid={name}"] if role == "client" else [])
        (self.kits / name / "transfer").mkdir(exist_ok=True)
        with (self.folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-u", "-m", f"nvflare.private.fed.app.{role}.{role}_train", *arguments],
                cwd=self.kits / name,
                env=environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def grow(self, sites: int) -> int:
        """Starts clients until there are as many; returns how many of them are registered then."""
        if self.link is None:
            self._open()
        self.nodes += [self._start(f"site-{number}", "client") for number in range(len(self.nodes), sites)]
        self.sites = settled(lambda: len(self.session.get_system_info().client_info), sites)
        return self.sites

    def _job(self, settings: dict[str, Any]) -> Path:
        """Returns the folder of a job for all sites."""
        root = self.folder / f"job-{time.monotonic_ns()}"
        if self.way == "collab":
            from nvflare.collab import CollabRecipe

            (self.folder / "fleetbench.py").write_text(COLLAB)
            sys.path.insert(0, str(self.folder))
            fleetbench = importlib.import_module("fleetbench")

            recipe = CollabRecipe("fleetbench", fleetbench.Server(), fleetbench.Client(), min_clients=settings["sites"])
            for name, value in settings.items():
                recipe.set_server_prop(name, value)
            recipe.export(str(root))
            return root / "fleetbench"
        arguments = {"num_clients": settings["sites"], "num_rounds": settings["rounds"]}
        arguments |= {"values": settings["values"], "marks": settings["marks"]}
        adder = {"tasks": ["train"], "executor": {"path": "fleetbench.Adder", "args": {}}}
        average = {"id": "controller", "path": "fleetbench.Average", "args": arguments}
        meta = {"name": "fleetbench", "deploy_map": {"app": ["@ALL"]}, "min_clients": settings["sites"]}
        parts = {
            "meta.json": meta | {"resource_spec": {}},
            "app/config/config_fed_server.json": {"format_version": 2, "workflows": [average], "components": []},
            "app/config/config_fed_client.json": {"format_version": 2, "executors": [adder], "components": []},
        }
        (root / "app" / "config").mkdir(parents=True)
        (root / "app" / "custom").mkdir()
        (root / "app" / "custom" / "fleetbench.py").write_text(FEDAVG)
        for name, part in parts.items():
            (root / name).write_text(json.dumps(part))
        return root

    def run(self, values: int, rounds: int) -> tuple[list[float], float]:
        """Returns the seconds of each round of a run with all sites, and those of the run; infinite if stopped."""
        marks = self.folder / f"marks-{time.monotonic_ns()}"
        settings = {"values": values, "sites": self.sites, "rounds": rounds, "marks": str(marks)}
        job = self._job(settings)
        started = time.monotonic()
        number, status = self.session.submit_job(str(job)), ""
        while not status.startswith("FINISHED"):
            time.sleep(POLL_S)
            memory = resident_mb(self.link.pid), resident_mb(self.nodes[0].pid)
            self.peaks = max(self.peaks[0], memory[0]), max(self.peaks[1], memory[1])
            if time.monotonic() - started > STOP_S:
                self.session.abort_job(number)
                return paces(marks, None), math.inf
            status = self.session.get_job_status(number) or ""
        seconds = time.monotonic() - started
        if status != "FINISHED:COMPLETED" or not marks.exists():
            raise RuntimeError(f"the job ended as {status}")
        return paces(marks, rounds), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and runs")
    parser.add_argument("--limit", type=int, default=BENCH_S, help="seconds until the whole bench is given up")
    options = parser.parse_args()
    report = {}
    for way, protection in PROTECTION.items():
        facts = {"peer": f"NVFLARE {version('nvflare')}", "protection": protection, "quick": options.quick}
        figures = Figures(options.limit / len(PROTECTION), **facts)
        with scratch() as folder:
            fleet = Fleet(folder, way)
            measure(figures, fleet, options.quick)
            if fleet.session:
                # it would else look for its server for ever, beside the next fleet
                fleet.session.close()
        report[way] = figures.values
    print(json.dumps(report), flush=True)
    # threads of the session would keep this process
    os._exit(0)


if __name__ == "__main__":
    main()
