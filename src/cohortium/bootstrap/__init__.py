"""The only place that chooses adapters, the clock and the source of randomness."""

from cohortium.bootstrap.auditing import (
    audit_canaries,
    audit_privacy,
    write_audit,
)
from cohortium.bootstrap.documents import (
    card,
    descriptive,
    example_sites,
    example_study,
    load_example,
    load_model,
    load_study,
    save_model,
    score_file,
    source_of,
    write_file,
    write_report,
    write_result,
)
from cohortium.bootstrap.homes import (
    create_home,
    load_policy,
    open_home,
    read_accounts,
    simulated_ledger,
)
from cohortium.bootstrap.pricing import (
    tradeoff,
    write_tradeoff,
)
from cohortium.bootstrap.simulation import (
    compare,
    coordinator_key,
    simulate,
    simulated_agents,
)

__all__ = [
    "audit_canaries",
    "audit_privacy",
    "card",
    "compare",
    "coordinator_key",
    "create_home",
    "descriptive",
    "example_sites",
    "example_study",
    "load_example",
    "load_model",
    "load_policy",
    "load_study",
    "open_home",
    "read_accounts",
    "save_model",
    "score_file",
    "simulate",
    "simulated_agents",
    "simulated_ledger",
    "source_of",
    "tradeoff",
    "write_audit",
    "write_file",
    "write_report",
    "write_result",
    "write_tradeoff",
]
