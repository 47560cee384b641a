"""A coordinator or an agent as `cohortium` runs them; an agent also writes down whose contributions it saw accepted.

    python chaos_process.py coordinator run FOLDER ...
    python chaos_process.py site run HOME

Each line of the file CHAOS_ACKNOWLEDGED is a survivor set that the agent endorsed: [site, run, round, [sites]].
"""

import json
import os
import sys
from typing import Any

from cohortium.cli.app import main
from cohortium.core.errors import ProtocolError
from cohortium.core.messages import Endorsement, Survivors, decode_from_site, decode_to_site
from cohortium.site.agent import Agent


def keep_acknowledged(path: str) -> None:
    """Has every agent of this process keep what it says yes to before it says it."""
    receive, take = Agent.receive, Agent.take

    def kept(agent: Agent, data: bytes, answers: list[bytes]) -> None:
        try:
            message = decode_to_site(data)
            said = [decode_from_site(answer) for answer in answers] if isinstance(message, Survivors) else []
        except ProtocolError:
            return
        if isinstance(message, Survivors) and any(isinstance(answer, Endorsement) for answer in said):
            line = [agent.membership.site, message.run, message.round, sorted(message.sites)]
            with open(path, "a") as file:
                file.write(json.dumps(line) + "\n")

    def received(agent: Agent, data: bytes) -> list[bytes]:
        answers = receive(agent, data)
        kept(agent, data, answers)
        return answers

    def taken(agent: Agent, data: bytes) -> Any:
        found = take(agent, data)
        kept(agent, data, found.answers)
        return found

    Agent.receive, Agent.take = received, taken  # type: ignore[method-assign]


if __name__ == "__main__":
    if where := os.environ.get("CHAOS_ACKNOWLEDGED"):
        keep_acknowledged(where)
    sys.exit(main())
