"""Answer every check with the same words: what http.server alone costs. Started by compare.py.

Usage: python bench/stock_server.py PORT

It is ThreadingHTTPServer as it comes, with a longer backlog, no log and no delay of small packets.
"""

from __future__ import annotations

import http.server
import json
import sys

NOTHING = json.dumps({"ok": True, "found": False}).encode()
# Connections that the kernel holds; the default of 5 would refuse some.
BACKLOG = 1_024


class Handler(http.server.BaseHTTPRequestHandler):
    """Parse the JSON of a check and find nothing."""

    protocol_version = "HTTP/1.1"
    # Head and body go out in two writes: with the delay, kept connections would wait 40 ms.
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        """Answer."""
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status = 400
        if request.get("action") == "check":
            status = 200
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(NOTHING)))
        self.end_headers()
        self.wfile.write(NOTHING)

    def log_message(self, *_: object) -> None:
        """Log nothing: no other server here does."""


class Server(http.server.ThreadingHTTPServer):
    """A server that takes many connections at once."""

    request_queue_size = BACKLOG


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].isdigit():
        sys.exit(f"usage: {sys.argv[0]} PORT")
    with Server(("127.0.0.1", int(sys.argv[1])), Handler) as server:
        server.serve_forever()
