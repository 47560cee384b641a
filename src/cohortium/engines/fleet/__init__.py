"""Runs over a network: hospital sites and coordinators, by gRPC with mutual TLS."""
