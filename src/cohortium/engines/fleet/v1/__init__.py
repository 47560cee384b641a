"""The network's contract, version 1: `fleet.proto`, and what `tools/fleet_proto.py` makes of it."""
