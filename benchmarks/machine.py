"""What a result says of the machine it was measured on."""

import platform
from pathlib import Path


def processor() -> str:
    """Returns the processor's model, which is all that is recorded of the machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
