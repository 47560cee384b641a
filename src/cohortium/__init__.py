"""Cohortium: hospitals learn models and run clinical statistics together while every record stays home."""

from cohortium.bootstrap import (
    compare,
    connect,
    example_sites,
    load_example,
    load_model,
    load_study,
    save_model,
    simulate,
    write_report,
    write_result,
)
from cohortium.coordinator.ports import Terms
from cohortium.coordinator.result import Result
from cohortium.core.document import json_schema, study_id
from cohortium.core.errors import CohortiumError
from cohortium.core.features import BinaryTarget, Category, CountTarget, Number, NumberTarget
from cohortium.core.models import Descriptive, Network, Penalty, Regression
from cohortium.core.protection import Aggregation, Privacy
from cohortium.core.study import Cohort, Purpose, Sites, Study
from cohortium.core.training import Asynchronous, Averaging, Descent, Local, Newton, OneShot, Preprocessing, Server
from cohortium.learning.model import GlobalModel

__all__ = [
    "Aggregation",
    "Asynchronous",
    "Averaging",
    "BinaryTarget",
    "Category",
    "Cohort",
    "CohortiumError",
    "CountTarget",
    "Descent",
    "Descriptive",
    "GlobalModel",
    "Local",
    "Network",
    "Newton",
    "Number",
    "NumberTarget",
    "OneShot",
    "Penalty",
    "Preprocessing",
    "Privacy",
    "Purpose",
    "Regression",
    "Result",
    "Server",
    "Sites",
    "Study",
    "Terms",
    "compare",
    "connect",
    "example_sites",
    "json_schema",
    "load_example",
    "load_model",
    "load_study",
    "save_model",
    "simulate",
    "study_id",
    "write_report",
    "write_result",
]
