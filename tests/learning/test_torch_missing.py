"""Without PyTorch everything but networks works, and asking for a network says what to install."""

import subprocess
import sys

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import cohortium.learning.algorithm, cohortium.learning.network, cohortium.learning.server
from cohortium.core.errors import StudyError
try:
    import cohortium.learning.fedavg
except StudyError as error:
    print(error)
"""


def test_only_training_a_network_needs_torch_and_says_how_to_install_it() -> None:
    # In a process of its own: importing modules a second time in this one would leave other tests two of each class.
    run = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == (
        "training a network needs PyTorch, which is not installed here: run pip install 'cohortium[torch]'"
    )
