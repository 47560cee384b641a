"""What both ends of a site's stream have in common: the protocol's version, and how gRPC carries it."""

from typing import Any

import grpc

from cohortium.engines.fleet.chunks import MOST_FRAME

PROTOCOL = 1
KEEPALIVE = 20
"""Seconds after which a silent connection is asked whether it is there."""
EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]
OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MOST_FRAME),
    ("grpc.max_send_message_length", 2 * MOST_FRAME),
    ("grpc.http2.lookahead_bytes", 4 << 20),
    ("grpc.http2.max_frame_size", 1 << 20),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.keepalive_time_ms", KEEPALIVE * 1000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
