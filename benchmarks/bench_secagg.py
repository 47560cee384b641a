"""What the secure sum costs a site: masking beside Flower's SecAgg+, encryption beside TenSEAL's CKKS.

    python benchmarks/bench_secagg.py --flower-python .venv-flower/bin/python

Every case is a fresh process, so that its peak memory is its own, and is repeated in turn with its peers', since a
machine's clock may change within seconds; ratios are taken between neighbours in time, and all figures are medians.
Times are processor time on one thread unless they say otherwise; wall times count only where `load`, the mean number
of runnable processes, is no more than this bench's own one or two. `spin_s` beside a case is the time of a fixed piece
of work and shows the clock.

Throughput of masking is that of the streams: one for each other site and one of one's own, 4 bytes a value each,
over the time of `Member.protect`. Quantising is counted apart on both sides, and so are Flower's key agreement, which
it repeats each round, and our digest of what the coordinator broadcast. Throughput of encryption is 4 bytes a value
over the time of `Member.protect`. Flower's masks come from the Mersenne Twister with a seed of 32 bits, ours from
AES-256 and TenSEAL's from its own generator: a ratio compares costs, not strengths.
"""

import argparse
import cProfile
import json
import math
import os
import pstats
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cohortium.adapters import machine
from cohortium.core import codec
from cohortium.core.layout import Block
from cohortium.core.messages import Announcement
from cohortium.core.random import Randomness
from cohortium.secagg import keys
from cohortium.secagg.group import Group
from cohortium.secagg.masking import Masking
from cohortium.secagg.protocol import Member, Tally
from cohortium.secagg.quantise import fixed_point
from cohortium.secagg.shamir import SECRET_WORDS, share
from cohortium.secagg.stream import Means
from flower_secagg import DROPPED, peak_bytes, seconds, spin
from machine import processor

HERE = Path(__file__).resolve().parent
RUN, STUDY = "bench", "sha256:bench"
BITS = {"mask": 32, "rlwe": 25, "ckks": 32}
HEADLINE = (1_000_000, 15)
LARGEST = (10_000_000, 50)
RAW_BYTES, RAW_BLOCK = 1 << 24, 1 << 17
ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
ROOT = Randomness.of_seed(5)
NAN = float("nan")


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        vectors, sites: every pair of them is a case.
        repeats: processes for each case.
        ckks_values: TenSEAL encrypts as many, since ten million would take a minute.
        parts: sites for which the work beside the vector is measured.
        rounds: rounds of a run in the local engine.
    """

    vectors: tuple[int, ...]
    sites: tuple[int, ...]
    repeats: int
    ckks_values: int
    parts: tuple[int, ...]
    rounds: int


FULL = Size((1_000_000, 10_000_000), (5, 15, 50), 3, 1_000_000, (15, 50), 8)
QUICK = Size((20_000,), (5,), 1, 5_000, (5,), 2)


# a site's own cases, each in a process of its own


@dataclass(frozen=True)
class Stopwatch:
    """Times the parts of some work; `times` has the milliseconds of each, once for every call."""

    times: dict[str, list[float]] = field(default_factory=dict)

    def __call__(self, part: str, work: Callable[..., Any], *arguments: Any) -> Any:
        took, result = seconds(work, *arguments)
        self.times.setdefault(part, []).append(1000 * took)
        return result

    def medians(self) -> dict[str, float]:
        return {part: statistics.median(taken) for part, taken in self.times.items()}


@dataclass(frozen=True)
class Consortium:
    """Sites that agreed on keys, as each of them and the coordinator hold it."""

    group: Group
    announcements: tuple[Announcement, ...]
    identities: Mapping[str, Ed25519PrivateKey]
    private: Mapping[str, X25519PrivateKey]
    coordinator: Ed25519PrivateKey

    @property
    def session(self) -> bytes:
        return keys.session_digest(RUN, STUDY, self.group.threshold, self.announcements)

    def member(self, site: str) -> Member:
        mine = self.announcements[self.group.sites.index(site)]
        pairs = keys.agree(self.private[site], mine, self.announcements)
        return Member(RUN, site, self.group, pairs, self.session, self.coordinator.public_key().public_bytes_raw())


def consortium(sites: int) -> Consortium:
    """Returns a consortium whose sums may lose a fifth of its sites."""
    names = tuple(f"site-{index:02d}" for index in range(sites))
    identities = {name: Ed25519PrivateKey.from_private_bytes(ROOT.child(name, "identity").bytes(32)) for name in names}
    private = {name: X25519PrivateKey.from_private_bytes(ROOT.child(name, "key").bytes(32)) for name in names}
    announcements = tuple(keys.announce(identities[name], private[name], RUN, STUDY, name) for name in names)
    group = Group(names, sites - round(DROPPED * sites))
    return Consortium(group, announcements, identities, private, Ed25519PrivateKey.from_private_bytes(bytes(32)))


def scheme(kind: str, group: Group, values: int, means: Means) -> Any:
    """Returns the scheme of a case. TenSEAL's keys are made here, outside what is timed."""
    if kind == "mask":
        return Masking(group, values, BITS[kind], means)
    if kind == "rlwe":
        from cohortium.secagg.threshold import Threshold

        return Threshold(group, values, BITS[kind])
    from cohortium.secagg.ckks import SingleKey, make_keys

    return SingleKey(group, values, BITS[kind], make_keys()[0])


def residues(values: int) -> Any:
    vector = np.arange(values, dtype=np.uint32)
    vector %= 1000  # in place, so that no temporary array counts as memory before the work
    return vector


def client(kind: str, values: int, sites: int, repeats: int) -> dict[str, Any]:
    """Returns what protecting one vector costs a site."""
    parties = consortium(sites)
    means = Means(machine.faster_mode())
    member = parties.member(parties.group.sites[sites // 2])
    # loads libraries and compiles
    _, member = member.protect(1, b"", scheme(kind, parties.group, 100, means), residues(100), ROOT.child("round", 1))
    subject, vector = scheme(kind, parties.group, values, means), residues(values)
    before, peak, calls = peak_bytes(), 0, []
    for number in range(2, repeats + 2):
        own = ROOT.child("round", number)
        took, (update, member) = seconds(member.protect, number, b"", subject, vector, own)
        peak = peak or peak_bytes() - before  # later calls find the last one's result still held
        calls.append({"cpu_s": took, "spin_s": spin()} | (raw_cipher() if kind == "mask" else {}))
    result = {
        "calls": calls,
        "peak_bytes": peak,
        "bytes_per_value": update.values.nbytes / values,
        "message_bytes_per_value": len(codec.encode(update)) / values,
    }
    return result | (beside_masking(member, parties.group, vector, means) if kind == "mask" else {})


def raw_cipher() -> dict[str, float]:
    """Returns GB/s of AES-256 alone, without adding: as fast as this machine can expand a stream."""
    buffer, zeros = bytearray(RAW_BLOCK + 16), memoryview(bytes(RAW_BLOCK))
    speeds = {}
    for name, mode in (("ctr", modes.CTR(bytes(16))), ("gcm", modes.GCM(bytes(12)))):
        expand = Cipher(algorithms.AES(bytes(32)), mode).encryptor().update_into

        def stream(expand: Callable[[Any, Any], int] = expand) -> None:
            for _ in range(RAW_BYTES // RAW_BLOCK):
                expand(zeros, buffer)

        speeds[f"aes_256_{name}_gbps"] = RAW_BYTES / seconds(stream)[0] / 1e9
    return speeds


def beside_masking(member: Member, group: Group, vector: Any, means: Means) -> dict[str, Any]:
    """Returns what goes with masking: quantising, the broadcast's digest, and masking on all of the threads."""
    values, number, own = len(vector), 1000, ROOT.child("round", 1000)
    _, member = member.protect(number - 1, b"", Masking(group, 100, 32), residues(100), own)
    spread = Masking(group, values, BITS["mask"], machine.means())
    started = time.perf_counter()
    member.protect(number, b"", spread, vector, own)
    wall = time.perf_counter() - started
    floats = vector / 1000.0
    stage = fixed_point((Block("values", (values,), 1.0),), len(group.sites), BITS["mask"])
    broadcast = vector.tobytes()
    return {
        "mode": means.mode,
        "all_threads_wall_s": wall,
        "load": os.getloadavg()[0],
        "threads": machine.means().tasks,
        "quantise_s": seconds(stage.encode, floats)[0],
        "broadcast_digest_s": seconds(keys.round_context, bytes(32), 1, broadcast)[0],
    }


def parts(sites: int, repeats: int) -> dict[str, Any]:
    """Returns milliseconds of a site's round beside its vector, and of its start into a run."""
    parties = consortium(sites)
    names, threshold, me = parties.group.sites, parties.group.threshold, parties.group.sites[0]
    pinned = {name: key.public_key().public_bytes_raw() for name, key in parties.identities.items()}
    mine, identity, private = parties.announcements[0], parties.identities[me], parties.private[me]
    timed = Stopwatch()
    for _ in range(repeats):
        timed("announce", keys.announce, identity, private, RUN, STUDY, me)
        timed("check_signatures", keys.check, parties.announcements, pinned, RUN, STUDY, threshold)
        pairs = timed("agree", keys.agree, private, mine, parties.announcements)
        ready = timed("seeds_of_16_rounds", pairs.at, 1)
        dealt = timed("shamir", share, np.ones((sites, SECRET_WORDS), np.uint16), sites, threshold, ROOT)
        timed("seal", seal, ready.round_seeds(1).values(), dealt)
    members = {name: parties.member(name) for name in names}
    for number in range(1, repeats + 1):
        opening(parties, members, number, 1, timed)
    medians = timed.medians()
    run = sum(medians[part] for part in ("announce", "check_signatures", "agree", "seeds_of_16_rounds"))
    # Shamir's shares and their seals are within protecting
    site_round = sum(medians[part] for part in ("protect", "endorse", "reveal"))
    return {"ms": medians, "run_ms": run, "round_ms": site_round, "spin_s": spin()}


def seal(seeds: Iterable[bytes], dealt: Any) -> None:
    for seed, one in zip(seeds, dealt, strict=False):
        AESGCM(keys.purpose_key(seed, b"cohort share", bytes(32))).encrypt(bytes(12), one.tobytes(), None)


def opening(parties: Consortium, members: dict[str, Member], number: int, values: int, timed: Stopwatch) -> None:
    """Runs a whole round in which as many sites are lost as may be, timing its steps."""
    group = parties.group
    subject, vector = Masking(group, values, BITS["mask"], Means(machine.faster_mode())), residues(values)
    tally = Tally(RUN, number, subject, keys.round_context(parties.session, number, b""))
    for name in group.sites:
        own = ROOT.child(name, number)
        update, members[name] = timed("protect", members[name].protect, number, b"", subject, vector, own)
        if name in group.sites[-group.threshold :]:
            tally = timed("coordinator_add", tally.contribute, update)
    tally, told = timed("coordinator_close", tally.close, parties.coordinator)
    for name, message in told.items():
        word, members[name] = timed("endorse", members[name].endorse, message)
        tally = tally.endorse(word)
    for name, tags in timed("coordinator_endorsed", tally.endorsed).items():
        answer, members[name] = timed("reveal", members[name].reveal, tags)
        tally = tally.reveal(answer)
    total = timed("coordinator_open", tally.opened)
    if not np.array_equal(total, vector * np.uint32(group.threshold)):
        raise AssertionError("a sum came out wrong")


def coordinator(values: int, sites: int) -> dict[str, Any]:
    """Returns milliseconds of the coordinator's steps in a round in which a fifth of the sites is lost."""
    parties = consortium(sites)
    timed = Stopwatch()
    members = {name: parties.member(name) for name in parties.group.sites}
    for number in range(1, 4):
        opening(parties, members, number, values, timed)
    streams = parties.group.threshold * (1 + sites - parties.group.threshold)
    wanted = {part: took for part, took in timed.medians().items() if part.startswith("coordinator")}
    return {"ms": wanted, "streams_opened": streams, "spin_s": spin()}


# a whole round in the local engine


COARSE = {
    "quantise": ("quantise.py", "encode"),
    "mask": ("masking.py", "protect"),
    "deal and seal shares": ("protocol.py", "_dealt"),
    "digest of the broadcast": ("keys.py", "round_context"),
    "pack": ("layout.py", "pack"),
    "encode messages": ("codec.py", "encode"),
    "decode messages": ("codec.py", "decode"),
    "add up": ("masking.py", "add"),
    "endorse": ("protocol.py", "endorse"),
    "unmask": ("masking.py", "open"),
    "decode the sum": ("quantise.py", "decode"),
}
"""Functions that do not call each other, by the name under which a round's time is told."""


def engine_run(values: int, sites: int, rounds: int, dropouts: int) -> Callable[[], Any]:
    """Returns a run in the local engine, ready to start."""
    import pandas as pd

    from bench_engine import empty_study
    from cohortium import bootstrap
    from cohortium.engines import local
    from ready import ready_plan

    names = tuple(f"site-{index:02d}" for index in range(sites))
    plan = ready_plan(empty_study(names, dropouts=dropouts), values, rounds)
    frame = pd.DataFrame({"id": np.arange(50), "x": np.linspace(0, 1, 50)})
    shared, means = machine.shared_means(), machine.means()
    agents = bootstrap.simulated_agents(plan, dict.fromkeys(names, frame), ROOT, lambda _: plan, shared)
    key, pool = bootstrap.coordinator_key(ROOT), machine.threads("sites")
    return lambda: local.run(plan, agents, RUN, time.perf_counter, key, means, pool=pool)


def engine(values: int, sites: int, rounds: int, dropouts: int) -> dict[str, Any]:
    """Returns the wall time of rounds in the local engine, and, from another run, where it goes."""
    cpu, result = seconds(engine_run(values, sites, rounds, dropouts))
    taken = [record.seconds for record in result.rounds]
    beside = {"cpu_s": cpu / rounds, "load": os.getloadavg()[0], "spin_s": spin()}
    profiled = cProfile.Profile()
    run = engine_run(values, sites, 2, dropouts)
    profiled.enable()
    profiled_rounds = [record.seconds for record in run().rounds]
    profiled.disable()
    share_of: dict[str, float] = {}
    for (file, _, function), (_, _, _, total, _) in pstats.Stats(profiled).stats.items():  # type: ignore[attr-defined]
        for name, (where, wanted) in COARSE.items():
            if (Path(file).name, function) == (where, wanted) and "cohortium" in file:
                share_of[name] = total / len(profiled_rounds)
    share_of["all else"] = statistics.mean(profiled_rounds) - sum(share_of.values())
    return {"round_s": statistics.median(taken), "rounds_s": taken, "where_s": share_of} | beside


CASES = {"client": client, "parts": parts, "coordinator": coordinator, "engine": engine}


# the bench itself


def child(name: str, **case: Any) -> Any:
    """Runs a case in a fresh process and returns what it measured."""
    command = [sys.executable, str(HERE / "bench_secagg.py"), "--case", json.dumps({"name": name, **case})]
    return answer_of(command)


def flower(python: Path | None, values: int, sites: int, repeats: int) -> Any:
    """Returns what Flower's client took, or None where Flower is not installed."""
    if python is None:
        return None
    case = {"values": values, "sites": sites, "repeats": repeats}
    return answer_of([str(python), str(HERE / "flower_secagg.py"), json.dumps(case)])


def answer_of(command: list[str]) -> Any:
    environment = os.environ | ONE_THREAD | {"FLWR_TELEMETRY_ENABLED": "0"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def median(numbers: Iterable[float]) -> float:
    known = list(numbers)
    return statistics.median(known) if known else NAN


def gbps(values: int, streams: int, cpu: float) -> float:
    return 4 * values * streams / cpu / 1e9


def compare(values: int, sites: int, size: Size, python: Path | None) -> dict[str, Any]:
    """Returns a case measured in turn: masking, Flower's masking, encryption."""
    inner = 5 if values <= HEADLINE[0] else 2
    ours, theirs, rlwe = [], [], []
    for _ in range(size.repeats):
        ours.append(child("client", kind="mask", values=values, sites=sites, repeats=inner))
        theirs.append(flower(python, values, sites, min(inner - 1, 2)))
        rlwe.append(child("client", kind="rlwe", values=values, sites=sites, repeats=inner))
    case = {"values": values, "sites": sites, "mask": masking_figures(ours, values, sites)}
    case["rlwe"] = encryption_figures(rlwe, values)
    case["flower"] = flower_figures(theirs, values, sites) if python else None
    if python:
        mine = [(median(call["cpu_s"] for call in one["calls"]), one["quantise_s"]) for one in ours]
        peer = [
            tuple(median(call[key] for call in one["repeats"]) for key in ("mask_s", "quantise_s")) for one in theirs
        ]
        case["mask_vs_flower"] = median(their[0] / my[0] for my, their in zip(mine, peer, strict=True))
        case["quantise_and_mask_vs_flower"] = median(sum(their) / sum(my) for my, their in zip(mine, peer, strict=True))
    return case


def masking_figures(answers: list[Any], values: int, sites: int) -> dict[str, Any]:
    calls = [call for one in answers for call in one["calls"]]
    cpu = median(call["cpu_s"] for call in calls)
    raw = {key: median(call[key] for call in calls) for key in ("aes_256_ctr_gbps", "aes_256_gcm_gbps")}
    faster = [max(call["aes_256_ctr_gbps"], call["aes_256_gcm_gbps"]) for call in calls]
    speeds = [gbps(values, sites, call["cpu_s"]) for call in calls]
    return {
        "cpu_s": cpu,
        "gbps": gbps(values, sites, cpu),
        **raw,
        "of_raw_cipher": median(mine / most for mine, most in zip(speeds, faster, strict=True)),
        **{key: median(one[key] for one in answers) for key in CLIENT_KEYS + MASK_KEYS},
        "threads": answers[0]["threads"],
        "modes": [one["mode"] for one in answers],
        "calls_s": [call["cpu_s"] for call in calls],
        "spins_s": [call["spin_s"] for call in calls],
    }


CLIENT_KEYS = ("peak_bytes", "bytes_per_value", "message_bytes_per_value")
MASK_KEYS = ("all_threads_wall_s", "load", "quantise_s", "broadcast_digest_s")


def encryption_figures(answers: list[Any], values: int) -> dict[str, Any]:
    calls = [call for one in answers for call in one["calls"]]
    cpu = median(call["cpu_s"] for call in calls)
    return {
        "cpu_s": cpu,
        "gbps": gbps(values, 1, cpu),
        **{key: median(one[key] for one in answers) for key in CLIENT_KEYS},
        "calls_s": [call["cpu_s"] for call in calls],
        "spins_s": [call["spin_s"] for call in calls],
    }


def flower_figures(answers: list[Any], values: int, sites: int) -> dict[str, Any]:
    calls = [call for one in answers for call in one["repeats"]]
    if not all(one["same_as_its_own"] for one in answers):
        raise AssertionError("the order of calls is not that of Flower's client: see flower_secagg.py")
    cpu = median(call["mask_s"] for call in calls)
    return {
        "version": answers[0]["version"],
        "cpu_s": cpu,
        "gbps": gbps(values, sites, cpu),
        **{key: median(call[key] for call in calls) for key in ("quantise_s", "agree_s", "serialise_s")},
        **{key: median(one[key] for one in answers) for key in ("peak_bytes", "bytes_per_value")},
        "calls_s": [call["mask_s"] for call in calls],
        "spins_s": [call["spin_s"] for call in calls],
    }


def against_tenseal(size: Size) -> dict[str, Any]:
    """Returns encryption beside TenSEAL's, in turn. Both costs grow with the values alone."""
    values, sites = size.ckks_values, size.sites[-2:][0]
    ours, theirs = [], []
    for _ in range(size.repeats):
        ours.append(child("client", kind="rlwe", values=values, sites=sites, repeats=5))
        theirs.append(child("client", kind="ckks", values=values, sites=sites, repeats=1))
    mine, peer = ([median(call["cpu_s"] for call in one["calls"]) for one in side] for side in (ours, theirs))
    return {
        "values": values,
        "sites": sites,
        "rlwe": encryption_figures(ours, values),
        "tenseal": encryption_figures(theirs, values),
        "scaled_to_10M_s": 10_000_000 / values * median(peer),
        "rlwe_vs_tenseal": median(their / my for my, their in zip(mine, peer, strict=True)),
    }


def measure(size: Size, python: Path | None) -> dict[str, Any]:
    """Returns everything that is measured, printing each case as it comes."""
    cases = []
    for values in size.vectors:
        for sites in size.sites:
            cases.append(compare(values, sites, size, python))
            print(told(cases[-1]), flush=True)
    tenseal = against_tenseal(size)
    print(f"encryption of {size.ckks_values:,} values: {tenseal['rlwe']['gbps']:.3f} GB/s, "
          f"TenSEAL {tenseal['tenseal']['gbps']:.5f} GB/s and {tenseal['tenseal']['bytes_per_value']:.0f} B a value, "
          f"ratio {tenseal['rlwe_vs_tenseal']:.0f}", flush=True)  # fmt: skip
    beside = {}
    for sites in size.parts:
        beside[str(sites)] = one = child("parts", sites=sites, repeats=5)
        one["coordinator"] = child("coordinator", values=min(size.vectors), sites=sites)
        print(f"beside the vector, {sites} sites: {one['run_ms']:.2f} ms a run and {one['round_ms']:.2f} ms a round; "
              f"coordinator opens in {one['coordinator']['ms']['coordinator_open']:.0f} ms", flush=True)  # fmt: skip
    rounds = {}
    values, sites = (HEADLINE[0], HEADLINE[1]) if size is FULL else (size.vectors[0], size.sites[0])
    for dropouts in (round(DROPPED * sites), 0):
        one = child("engine", values=values, sites=sites, rounds=size.rounds, dropouts=dropouts)
        rounds[f"dropouts_{dropouts}"] = one
        parts_told = ", ".join(
            f"{name} {took:.3f}" for name, took in sorted(one["where_s"].items(), key=lambda p: -p[1])
        )
        print(f"round of {sites} x {values:,}, dropouts {dropouts}: {one['round_s']:.3f} s, "
              f"{one['cpu_s']:.3f} s of processor time, load {one['load']:.1f} ({parts_told})", flush=True)  # fmt: skip
    return {"cases": cases, "tenseal": tenseal, "beside": beside, "rounds": rounds}


def told(case: Mapping[str, Any]) -> str:
    mask, rlwe, peer = case["mask"], case["rlwe"], case["flower"]
    beside = "Flower not installed"
    if peer:
        beside = (
            f"Flower {peer['gbps']:.2f} GB/s, {peer['bytes_per_value']:.2f} B a value, "
            f"{peer['peak_bytes'] / 1e6:.0f} MB; ratio {case['mask_vs_flower']:.1f}, "
            f"with quantising {case['quantise_and_mask_vs_flower']:.1f}"
        )
    return (
        f"{case['values']:>10,} x {case['sites']:>2}: mask {mask['cpu_s']:.4f} s, {mask['gbps']:.2f} GB/s, "
        f"{mask['of_raw_cipher']:.2f} of the cipher, {mask['bytes_per_value']:.3f} B a value, "
        f"{mask['peak_bytes'] / 1e6:.0f} MB; {beside}; rlwe {rlwe['gbps']:.2f} GB/s, "
        f"{rlwe['bytes_per_value']:.2f} B a value, {rlwe['peak_bytes'] / 1e6:.0f} MB"
    )


def key_figures(measured: Mapping[str, Any]) -> dict[str, float]:
    """Returns the figures of the last line; what was not measured is not a number."""
    by_size = {(case["values"], case["sites"]): case for case in measured["cases"]}
    head = by_size.get(HEADLINE, measured["cases"][0])
    largest = by_size.get(LARGEST)
    whole = measured["rounds"].get("dropouts_3")
    return {
        "mask_gbps": head["mask"]["gbps"],
        "mask_vs_flower": head.get("mask_vs_flower", NAN),
        "rlwe_gbps": measured["tenseal"]["rlwe"]["gbps"],
        "rlwe_vs_tenseal": measured["tenseal"]["rlwe_vs_tenseal"],
        "bytes_per_value": head["mask"]["bytes_per_value"],
        "mask_10M_50_s": largest["mask"]["cpu_s"] if largest else NAN,
        "round_15x1M_s": whole["round_s"] if whole and largest else NAN,
    }


def goals(figures: Mapping[str, float], beside: Mapping[str, Any]) -> dict[str, str]:
    """Returns for each goal whether it is met."""
    limits = {
        "mask_gbps": (">=", 12.0),
        "mask_vs_flower": (">=", 10.0),
        "rlwe_gbps": (">=", 1.0),
        "rlwe_vs_tenseal": (">=", 100.0),
        "bytes_per_value": ("<=", 4.0),
        "mask_10M_50_s": ("<=", 0.2),
        "round_15x1M_s": ("<=", 0.3),
    }
    beside_limits = {"15": 2.0, "50": 6.0}
    wanted = {key: (figures[key], *limit) for key, limit in limits.items()}
    for sites, one in beside.items():
        if sites in beside_limits:
            wanted[f"beside_vector_{sites}_sites_ms"] = (one["run_ms"] + one["round_ms"], "<=", beside_limits[sites])
    verdicts = {}
    for key, (figure, sign, limit) in wanted.items():
        reached = figure >= limit if sign == ">=" else figure <= limit
        word = "not measured" if math.isnan(figure) else "met" if reached else "MISSED"
        verdicts[key] = f"{figure:.4g} {sign} {limit:g}: {word}"
    return verdicts


def plot(measured: Mapping[str, Any], file: Path) -> None:
    """Draws throughput against the number of sites, and encryption beside TenSEAL's."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=(3, 2), layout="constrained")
    values = measured["cases"][0]["values"]
    cases = [case for case in measured["cases"] if case["values"] == values]
    sites = [case["sites"] for case in cases]
    ceiling = [max(case["mask"]["aes_256_ctr_gbps"], case["mask"]["aes_256_gcm_gbps"]) for case in cases]
    left.plot(sites, ceiling, ":", color="0.5", label="AES-256 alone")
    left.plot(sites, [case["mask"]["gbps"] for case in cases], "o-", color="C0", label="Cohortium")
    if all(case["flower"] for case in cases):
        left.plot(sites, [case["flower"]["gbps"] for case in cases], "s-", color="C1", label="Flower SecAgg+")
    left.set(xlabel="sites", ylabel="GB/s of masks, one core", title=f"Masking {values:,} values", xticks=sites)
    left.set_ylim(bottom=0)
    left.legend()
    pair = measured["tenseal"]
    speeds = [pair["rlwe"]["gbps"] * 1000, pair["tenseal"]["gbps"] * 1000]
    right.bar_label(right.bar(["Cohortium RLWE", "TenSEAL CKKS"], speeds, color=["C0", "C1"]), fmt="%.3g")
    right.set(yscale="log", ylabel="MB/s of values, one core", title=f"Encrypting {pair['values']:,} values")
    right.margins(y=0.15)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def hardware() -> dict[str, Any]:
    try:
        flags = next(
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")
        ).split()
    except (OSError, StopIteration):
        flags = []
    return {"processor": processor(), "aes": "aes" in flags, "vaes": "vaes" in flags, "cores": machine.means().tasks}


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--flower-python", default=os.environ.get("FLOWER_PYTHON"), help="a Python that has flwr 1.41")
    options.add_argument("--quick", action="store_true", help="small sizes; writes nothing unless --out is given")
    options.add_argument("--out", type=Path, help="folder of the results")
    options.add_argument("--case", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.case:
        case = json.loads(given.case)
        print(json.dumps(CASES[case.pop("name")](**case)))
        return
    python = Path(given.flower_python) if given.flower_python else None
    if python is None or not python.exists():
        print("Flower is not installed: its figures are left out (see --flower-python)")
        python = None
    measured = measure(QUICK if given.quick else FULL, python)
    figures = key_figures(measured)
    verdicts = {} if given.quick else goals(figures, measured["beside"])
    out = given.out or (None if given.quick else HERE / "results")
    if out:
        out.mkdir(exist_ok=True)
        known = {key: None if math.isnan(value) else value for key, value in figures.items()}
        content = {"machine": hardware(), "figures": known, "goals": verdicts, **measured}
        (out / "secagg.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        plot(measured, out / "secagg.png")
    for key, verdict in verdicts.items():
        print(f"{key}: {verdict}")
    print("secagg: " + " ".join(f"{key}={value:.4g}" for key, value in figures.items()))


if __name__ == "__main__":
    main()
