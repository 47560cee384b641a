"""Cohortium: hospitals learn models and run clinical statistics together while every record stays home."""

from cohortium.bootstrap import load_model, load_study, save_model, simulate
from cohortium.coordinator.result import Result
from cohortium.core.document import json_schema, study_id
from cohortium.core.errors import CohortiumError
from cohortium.core.study import (
    Aggregation,
    Averaging,
    BinaryTarget,
    Category,
    Cohort,
    CountTarget,
    Descriptive,
    Local,
    Network,
    Newton,
    Number,
    NumberTarget,
    Penalty,
    Preprocessing,
    Privacy,
    Purpose,
    Regression,
    Server,
    Sites,
    Study,
)
from cohortium.learning.model import GlobalModel

__all__ = [
    "Aggregation",
    "Averaging",
    "BinaryTarget",
    "Category",
    "Cohort",
    "CohortiumError",
    "CountTarget",
    "Descriptive",
    "GlobalModel",
    "Local",
    "Network",
    "Newton",
    "Number",
    "NumberTarget",
    "Penalty",
    "Preprocessing",
    "Privacy",
    "Purpose",
    "Regression",
    "Result",
    "Server",
    "Sites",
    "Study",
    "json_schema",
    "load_model",
    "load_study",
    "save_model",
    "simulate",
    "study_id",
]
