"""A small page for whoever looks after a process: is it alive, is it ready, and its metrics. It shows no value of data.

/healthz   200 as long as the process answers
/readyz    200 or 503, and as JSON what it rests on
/metrics   Prometheus
"""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cohortium.core.errors import SiteError

Ready = Callable[[], tuple[bool, Mapping[str, Any]]]
"""Returns whether the process can do its work now, and what that rests on."""


@contextmanager
def serving(listen: str, ready: Ready, metrics: Callable[[], bytes]) -> Iterator[str]:
    """Serves the page at `host:port` in a thread of its own; yields the address, whose port is real if 0 was asked.

    Raises:
        SiteError: the address cannot be listened at.
    """
    host, _, port = listen.rpartition(":")

    class Page(BaseHTTPRequestHandler):
        server_version, sys_version = "cohortium", ""
        timeout = 10  # seconds that a caller may take; each of them has a thread

        def do_GET(self) -> None:
            match self.path:
                case "/healthz":
                    self._send(200, "text/plain", b"alive\n")
                case "/readyz":
                    well, facts = ready()
                    self._send(200 if well else 503, "application/json", json.dumps(facts, default=str).encode())
                case "/metrics":
                    self._send(200, "text/plain; version=0.0.4", metrics())
                case _:
                    self._send(404, "text/plain", b"there are /healthz, /readyz and /metrics\n")

        def _send(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    try:
        server = ThreadingHTTPServer((host.strip("[]"), int(port)), Page)
    except (OSError, ValueError, OverflowError):
        public = f"the health page cannot listen at '{listen}': name a free host:port of this machine"
        raise SiteError(public, public=public) from None
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="health", daemon=True)
    thread.start()
    try:
        yield f"{host}:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
