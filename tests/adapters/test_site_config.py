"""`site.yaml`: what it says, how it is refused, and what limits do to a process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cohortium.adapters import limits, site_config
from cohortium.adapters.site_config import Limits, SiteConfig
from cohortium.core.errors import SiteError

FULL = """
datasets: {heart_disease: records.csv, other: /data/other.parquet}
limits: {memory_mb: 4096, cpus: 2, nice: 10}
health: {listen: 127.0.0.1:9100}
log: {level: warning, format: text}
"""


def parsed(text: str) -> SiteConfig:
    return site_config.parse(text.encode(), Path("/home/site/site.yaml"))


def test_all_of_it() -> None:
    config = parsed(FULL)
    assert config.datasets == {
        "heart_disease": Path("/home/site/records.csv"),
        "other": Path("/data/other.parquet"),
    }
    assert config.limits == Limits(4096, 2, 10)
    assert (config.health, config.level, config.format) == (("127.0.0.1", 9100), "warning", "text")
    assert {name: source.path for name, source in config.sources().items()} == config.datasets


def test_the_example_offers_nothing_and_says_everything(tmp_path: Path) -> None:
    assert site_config.create(tmp_path) == tmp_path / "site.yaml"
    assert site_config.create(tmp_path) is None
    assert (tmp_path / "site.yaml").stat().st_mode & 0o777 == 0o600
    assert site_config.read(tmp_path) == SiteConfig()
    # what is commented out is what may be said
    _, offered = site_config.EXAMPLE.split("datasets: {}")
    stated = parsed("datasets:\n" + "\n".join(line[2:] for line in offered.splitlines()))
    assert stated.datasets == {"heart_disease": Path("/home/site/records.csv")}
    assert (stated.limits, stated.health) == (Limits(8192, 2, 10), ("127.0.0.1", 9100))


def test_without_the_file_nothing_is_offered(tmp_path: Path) -> None:
    assert site_config.read(tmp_path) == SiteConfig()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("datasets: [a]", "is wrong at 'datasets'"),
        ("dataset: {}", "unknown key 'dataset'; did you mean 'datasets'?"),
        ("limits: {memory: 1}", r"unknown key 'limits.memory'; did you mean 'memory_mb'\?"),
        ("limits: {memory_mb: 1}", "is wrong at 'limits.memory_mb'"),
        ("limits: {nice: -5}", "is wrong at 'limits.nice'"),
        ("limits: {cpus: '2'}", "is wrong at 'limits.cpus'"),
        ("health: {}", "lacks 'health.listen'"),
        ("health: {listen: 127.0.0.1:70000}", "70000 is no port"),
        ("health: {listen: everywhere}", "is wrong at 'health.listen'"),
        ("log: {format: xml}", "is wrong at 'log.format'"),
        ("a: [", "is no valid YAML"),
        ("a: 1\na: 2", "is no valid YAML"),
        ("datasets: {a: &file a.csv, b: *file}", "holds a YAML alias"),
        ("health: {listn: 127.0.0.1:80}", "unknown key 'health.listn'; did you mean 'listen'?"),
        ("- a", "is no site.yaml"),
        ("datasets: {heart: ''}", "is wrong at 'datasets.heart'"),
    ],
)
def test_what_it_may_not_say(text: str, reason: str) -> None:
    with pytest.raises(SiteError, match=reason.replace("'?", r"'\?") if r"\?" not in reason else reason):
        parsed(text)


def test_what_others_may_write_is_refused(tmp_path: Path) -> None:
    site_config.create(tmp_path)
    (tmp_path / "site.yaml").chmod(0o620)
    with pytest.raises(SiteError, match="can be written by others"):
        site_config.read(tmp_path)


def test_limits_hold_for_a_process() -> None:
    code = """
import os
from cohortium.adapters import limits
from cohortium.adapters.site_config import Limits
before = os.nice(0)
limits.impose(Limits(600, 1, 3))
assert len(os.sched_getaffinity(0)) == 1
assert os.environ["OMP_NUM_THREADS"] == "1"
assert os.nice(0) == max(before, 3)
import numpy as np
np.ones(10_000_000)
try:
    np.ones(200_000_000)
except MemoryError:
    print("refused")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "refused\n"), run.stderr


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are bound on Linux")
def test_threads_that_were_there_before_keep_to_the_processors_too() -> None:
    code = """
import os, threading
import numpy as np
from cohortium.adapters import limits
from cohortium.adapters.site_config import Limits
rest = threading.Event()
threading.Thread(target=rest.wait, daemon=True).start()
limits.impose(Limits(cpus=1))
np.ones((500, 500)) @ np.ones((500, 500))
bound = {int(thread): os.sched_getaffinity(int(thread)) for thread in os.listdir("/proc/self/task")}
assert len(bound) >= 2
assert len(set(map(frozenset, bound.values()))) == 1 and len(bound[os.getpid()]) == 1, bound
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_no_limits_change_nothing() -> None:
    environment: dict[str, str] = {}
    before = os.sched_getaffinity(0)
    limits.impose(Limits(), environment)
    assert environment == {}
    assert os.sched_getaffinity(0) == before
