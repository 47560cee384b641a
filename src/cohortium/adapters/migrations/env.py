"""Alembic's entry: runs the steps in the transaction that `migrate` opened."""

from typing import Any

from alembic import context


def _taken(*, step: Any, **_: Any) -> None:
    context.config.attributes["taken"].append(step.up_revision_id)


context.configure(
    connection=context.config.attributes["connection"],
    version_table_schema="cohortium",
    on_version_apply=_taken,  # type: ignore[arg-type]  # called with keywords
)
context.run_migrations()
