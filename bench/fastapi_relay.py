"""Keep messages in SQLite behind FastAPI: an hour's work by hand. Started by compare.py.

Usage: python bench/fastapi_relay.py PORT DATABASE   (needs fastapi and uvicorn)

It has check, send and receive, durable like ours (synchronous=FULL), and no more: no proof that
the receiver has the key, no limits, no expiry. Everything runs in the loop: a thread for each
request cost more.
"""

from __future__ import annotations

import sqlite3
import sys
import time
from typing import Any

import fastapi  # type: ignore[import-not-found, unused-ignore]
import pydantic  # type: ignore[import-not-found, unused-ignore]
import uvicorn  # type: ignore[import-not-found, unused-ignore]

SCHEMA = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
CREATE TABLE messages (box TEXT, at INTEGER, data TEXT, PRIMARY KEY (box, at)) WITHOUT ROWID;
"""
ADD = "INSERT INTO messages VALUES (?, ?, ?)"
FIRST = "SELECT at, data FROM messages WHERE box = ? AND at > ? ORDER BY at LIMIT 1"
BACKLOG = 1_024


class Request(pydantic.BaseModel):  # type: ignore[misc, unused-ignore]
    """A request of any of the three kinds."""

    pub: str
    action: str
    at: int = 0
    data: str = ""


def build(path: str) -> Any:
    """Return the application."""
    database = sqlite3.connect(path, isolation_level=None)
    database.executescript(SCHEMA)

    async def handle(request: Request) -> dict[str, Any]:
        if request.action == "send":
            database.execute(ADD, (request.pub, time.time_ns(), request.data))
            return {"ok": True}
        row = database.execute(FIRST, (request.pub, request.at)).fetchone()
        if row is None:
            return {"ok": True, "found": False}
        if request.action == "check":
            return {"ok": True, "found": True}
        return {"ok": True, "at": row[0], "data": row[1]}

    # FastAPI reads the annotations at run time.
    handle.__annotations__["request"] = Request
    application = fastapi.FastAPI()
    application.add_api_route("/", handle, methods=["POST"])
    return application


if __name__ == "__main__":
    uvicorn.run(
        build(sys.argv[2]), host="127.0.0.1", port=int(sys.argv[1]), workers=1,
        backlog=BACKLOG, log_level="warning", access_log=False)
