"""Asks an entry once whether it is ready: `probe.py PORT PATH`, exit code 0 for a status of 200.

Run as a file, without this package, many times while an entry starts.
"""

import http.client
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

_TIMEOUT_S = 3.0


def main(port: str, path: str) -> int:
    """The exit code."""
    try:
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=_TIMEOUT_S)
        connection.request("GET", path)
        return 0 if connection.getresponse().status == 200 else 1
    except (OSError, http.client.HTTPException):
        return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
