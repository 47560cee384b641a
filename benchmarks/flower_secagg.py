"""What Flower's SecAgg+ client does to mask one vector, timed with Flower's own functions.

    python benchmarks/flower_secagg.py '{"values": 1000000, "sites": 15, "repeats": 3}'

Runs where flwr is installed and prints JSON. The order of calls is that of `_collect_masked_vectors` in
flwr.client.mod.secure_aggregation.secaggplus_mod, with the default parameters of SecAggPlusWorkflow: each site is
every other's neighbour, one self mask, a mask for each pair. `same_as_its_own` says whether this gives what that
function itself returns.

flwr is imported late, so that bench_secagg.py, in another environment, can share the gauges.
"""

import inspect
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

SPINS = 5
DROPPED = 0.2
"""Share of the sites that may be lost: 3 of 15."""


def spin() -> float:
    """Returns seconds for a fixed piece of work, which shows how fast the machine's clock was."""
    seconds = []
    for _ in range(SPINS):
        started = time.process_time()
        for _ in range(100):
            sum(range(1000))
        seconds.append(time.process_time() - started)
    return statistics.median(seconds)


def peak_bytes() -> int:
    """Returns the most memory that this process has held so far."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # unlike ru_maxrss this says nothing of the parent's memory
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def seconds(work: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Returns the processor time that some work took, and its result."""
    started = time.process_time()
    result = work(*arguments)
    return time.process_time() - started, result


def client_module() -> Any:
    """Returns the module of Flower's client; its package gives that name to a function in it."""
    return import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")


def neighbours(sites: int) -> Any:
    """Returns the state of Flower's client 1 of `sites` once keys are agreed and shares are dealt."""
    from flwr.server.workflow import SecAggPlusWorkflow

    mod = client_module()
    defaults = inspect.signature(SecAggPlusWorkflow.__init__).parameters
    configs = {
        "sample_num": sites,
        "share_num": sites,
        "threshold": sites - round(DROPPED * sites),
        "clipping_range": defaults["clipping_range"].default,
        "target_range": defaults["quantization_range"].default,
        "mod_range": defaults["modulus_range"].default,
        "max_weight": defaults["max_weight"].default,
    }
    states = [mod.SecAggPlusState(nid=number + 1) for number in range(sites)]
    keys = [mod._setup(state, configs) for state in states]
    named = {str(state.nid): (key["pk1"], key["pk2"]) for state, key in zip(states, keys, strict=True)}
    mod._share_keys(states[0], named)
    return states[0]


def mask(state: Any, vector: Any, examples: int) -> tuple[dict[str, float], list[bytes]]:
    """Returns the processor time of each step of masking a vector, and what the client then sends."""
    mod = client_module()

    def quantised() -> Any:
        ratio = round(examples / state.max_weight * state.target_range)
        scaled = mod.parameters_multiply([vector], ratio / state.target_range)
        return mod.factor_combine(ratio, mod.quantize(scaled, state.clipping_range, state.target_range))

    def agreed() -> dict[int, bytes]:
        own = mod.bytes_to_private_key(state.sk1)
        publics = {peer: keys[0] for peer, keys in state.public_keys_dict.items() if peer != state.nid}
        return {peer: mod.generate_shared_key(own, mod.bytes_to_public_key(key)) for peer, key in publics.items()}

    def masked() -> Any:
        total = numbers
        shapes = [array.shape for array in total]
        total = mod.parameters_addition(total, mod.pseudo_rand_gen(state.rd_seed, state.mod_range, shapes))
        for peer, key in keys.items():
            change = mod.parameters_addition if state.nid > peer else mod.parameters_subtraction
            total = change(total, mod.pseudo_rand_gen(key, state.mod_range, shapes))
        return mod.parameters_mod(total, state.mod_range)

    times: dict[str, float] = {}
    times["quantise_s"], numbers = seconds(quantised)
    times["agree_s"], keys = seconds(agreed)
    times["mask_s"], result = seconds(masked)
    times["serialise_s"], sent = seconds(lambda: [mod.ndarray_to_bytes(array) for array in result])
    return times, sent


def same_as_its_own(state: Any) -> bool:
    """Returns whether `mask` sends what Flower's own function sends, for a vector that rounding leaves as it is."""
    from flwr.common import ndarrays_to_parameters

    mod = client_module()
    vector = np.linspace(-2, 2, 65, dtype=np.float32)
    peers = [peer for peer in state.public_keys_dict if peer != state.nid]
    sealed = [
        mod.encrypt(state.ss2_dict[peer], mod.share_keys_plaintext_concat(peer, state.nid, b"share", b"share"))
        for peer in peers
    ]
    configs = {mod.Key.CIPHERTEXT_LIST: sealed, mod.Key.SOURCE_LIST: peers}
    answer = mod._collect_masked_vectors(state, configs, 1000, ndarrays_to_parameters([vector]))
    return bool(answer[mod.Key.MASKED_PARAMETERS] == mask(state, vector, 1000)[1])


def main(case: dict[str, int]) -> dict[str, Any]:
    state = neighbours(case["sites"])
    same = same_as_its_own(state)
    vector = np.arange(case["values"], dtype=np.float32)
    # in place, so that no temporary array counts as memory before the work
    vector %= 1000
    vector /= 777
    before, peak, repeats = peak_bytes(), 0, []
    for _ in range(case["repeats"]):
        times, sent = mask(state, vector, 1000)
        peak = peak or peak_bytes() - before
        repeats.append(times | {"spin_s": spin()})
    return {
        "version": version("flwr"),
        "same_as_its_own": same,
        "repeats": repeats,
        "bytes_per_value": sum(map(len, sent)) / case["values"],
        "peak_bytes": peak,
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
