"""Federated algorithms as pure functions whose statistics are summed."""
