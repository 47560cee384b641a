"""A short trial of faults over real processes; `make chaos` does the long one."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

CHAOS = Path(__file__).parents[2] / "benchmarks" / "chaos.py"


@pytest.mark.slow
def test_no_result_is_wrong_and_nothing_is_lost_under_twenty_faults() -> None:
    command = [sys.executable, str(CHAOS), "--quick", "--faults", "20", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    last = done.stdout.splitlines()[-1]
    found = re.fullmatch(
        r"chaos: faults=(\d+) wrong=(\d+) lost=(\d+) takeover_p95_s=([\d.]+) availability=([\d.]+)", last
    )
    assert found, last
    faults, wrong, lost = map(int, found.groups()[:3])
    assert (wrong, lost) == (0, 0), done.stdout
    assert faults >= 15
    assert re.search(r'"finished": [1-9]', done.stdout), done.stdout
