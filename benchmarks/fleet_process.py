"""A coordinator or an agent whose studies do no arithmetic of their own: what bench_fleet measures is the fleet alone.

    python fleet_process.py coordinator run FOLDER ...     as `cohortium coordinator run`
    python fleet_process.py site run HOME

The study's summary says how many values a round has and how many rounds there are: `values=1000 rounds=60`.
"""

import re
import sys

from cohortium import bootstrap
from cohortium.core.study import Study
from cohortium.plan import Plan
from ready import ready_plan


def ready(study: Study) -> Plan:
    """Returns the plan of a study whose summary says its size."""
    told = dict(re.findall(r"(\w+)=(\d+)", study.purpose.summary))
    return ready_plan(study, int(told["values"]), int(told["rounds"]))


def main(arguments: list[str]) -> None:
    options = dict(zip(arguments[3::2], arguments[4::2], strict=True))
    if arguments[0] == "coordinator":
        where = {name.removeprefix("--"): value for name, value in options.items()}
        bootstrap.run_coordinator(arguments[2], **where, compiler=ready)
    else:
        bootstrap.run_agent(arguments[2], compiler=ready)


if __name__ == "__main__":
    main(sys.argv[1:])
