"""Answer every check with the same words: what http.server alone costs. Started by compare.py.

Usage: python bench/stock_server.py PORT

It is ThreadingHTTPServer as it comes, but for a longer backlog, no log, and no delay of small packets.
"""

from __future__ import annotations

import http.server
import json
import sys

NOTHING = json.dumps({"ok": True, "found": False}).encode()
BACKLOG = 1_024  # connections that the kernel holds; the default of 5 would refuse some


class Handler(http.server.BaseHTTPRequestHandler):
    """Parse the JSON of a check and find nothing."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body go out in two writes; else kept connections wait 40 ms

    def do_POST(self) -> None:
        """Answer."""
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200 if request.get("action") == "check" else 400)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(NOTHING)))
        self.end_headers()
        self.wfile.write(NOTHING)

    def log_message(self, *_: object) -> None:
        """Log nothing: no other server here does."""


class Server(http.server.ThreadingHTTPServer):
    """A server that can be given many connections at once."""

    request_queue_size = BACKLOG


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].isdigit():
        sys.exit(f"usage: {sys.argv[0]} PORT")
    with Server(("127.0.0.1", int(sys.argv[1])), Handler) as server:
        server.serve_forever()
