"""Entries that harm a judge, by name: `hostile.py MODE PORT SCRATCH TOKEN`. Standard library only: they start at once.

Whoever gets past the start answers the health path and the warm-up as a server would.
"""

import gzip
import json
import os
import signal
import socketserver
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODE, PORT, SCRATCH = sys.argv[1], int(sys.argv[2]), sys.argv[3]
MIB = 1 << 20


def chunk(**fields):
    choice = {"index": 0, "text": "", "finish_reason": None, **fields}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


TOKEN = chunk(token_ids=[5], text="a")
END = chunk(token_ids=[], finish_reason="length") + b"data: [DONE]\n\n"


def forever(data, pause=0.0):
    while True:
        yield data
        time.sleep(pause)


def write_until_full(*folders):
    for folder in folders:
        written = 0
        try:
            with open(os.path.join(folder, "filling"), "wb", buffering=0) as file:
                while True:
                    written += file.write(b"x" * MIB)
        except OSError as error:
            print(f"{folder}: {error.strerror} after {written // MIB} MiB", flush=True)


def keep_files():
    for i in range(40):
        with open(os.path.join(SCRATCH, str(i)), "wb") as file:
            file.write(bytes(MIB))
    time.sleep(600)


def hold_memory():
    held = []
    while True:
        held.append(b"x" * (16 * MIB))
        time.sleep(0.01)


def hold_files_in_memory():
    held = []
    while True:
        held.append(os.memfd_create("held"))
        os.write(held[-1], b"x" * (16 * MIB))
        time.sleep(0.01)


def fork_without_end():
    while True:
        try:
            os.fork()
        except OSError:
            time.sleep(0.01)


def leave_a_daemon():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(3600)
        os._exit(0)


def under_another_name():
    """Many children that are named as the judge's own helper is."""
    for _ in range(12):
        subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)", "supervisor.py"])
    time.sleep(600)


def look_around():
    """What a process can see and do from here, for the test to read."""
    parent = os.getppid()
    with open("/proc/self/status") as file:
        capabilities = next(line.split()[1] for line in file if line.startswith("CapEff"))
    seen = {
        "processes": sorted(int(name) for name in os.listdir("/proc") if name.isdigit()),
        "environment": sorted(os.environ),
        "capabilities": capabilities,
        "descriptors": sorted(os.listdir("/proc/self/fd")),
        "cores": len(os.sched_getaffinity(0)),
    }
    for name in ("environ", "mem", *(f"fd/{i}" for i in range(32))):
        try:
            os.close(os.open(f"/proc/{parent}/{name}", os.O_RDONLY))
            seen["parent"] = f"{name} can be read"
        except OSError:
            continue
    for place in ("/", "/dev", "/entry", "/model", "/usr", "/judge"):
        try:
            with open(os.path.join(place, "new file"), "w"):
                seen[f"write {place}"] = "written"
        except OSError as error:
            seen[f"write {place}"] = error.strerror
    print(json.dumps(seen), flush=True)


def deep_folders_without_rights():
    os.makedirs(os.path.join(SCRATCH, "a", "b"))
    with open(os.path.join(SCRATCH, "a", "b", "file"), "w") as file:
        file.write("x")
    os.symlink("/etc", os.path.join(SCRATCH, "a", "link"))
    os.chmod(os.path.join(SCRATCH, "a", "b"), 0)
    os.chmod(os.path.join(SCRATCH, "a"), 0)


def flood():
    while True:
        sys.stdout.write("x" * 65536)


AT_START = {
    "hangs": lambda: time.sleep(600),
    "exits": lambda: sys.exit("no such option"),
    "forks without end": fork_without_end,
    "holds memory": hold_memory,
    "holds files in memory": hold_files_in_memory,
    "floods its output": flood,
    "hides by its name": under_another_name,
    "leaves a daemon": leave_a_daemon,
    "fills what it can": lambda: write_until_full(SCRATCH, "/tmp", "/dev/shm", "/dev", "/"),
    "keeps files": keep_files,
    "takes rights away": deep_folders_without_rights,
    "looks around": look_around,
    "ignores SIGTERM": lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
}
ANSWERS = {  # the body of an answer with status 200
    "answers garbage": lambda: [os.urandom(4096)],
    "sends tokens without end": lambda: forever(TOKEN),
    "sends a line without end": lambda: forever(b"x" * 65536),
    "sends a byte a second": lambda: forever(b"d", 1.0),
    "sends comments": lambda: forever(b": still here\n\n", 0.1),
    "sends nothing": lambda: forever(b"", 1.0),
    "closes in the middle": lambda: [TOKEN],
    "nests deeply": lambda: [b"data: " + b"[" * 200_000 + b"\n\n"],
    "sends a strange id": lambda: [chunk(token_ids=[10**19]), END],
    "sends a strange number": lambda: [chunk(token_ids=[5], logprobs={"top_logprobs": [{"a": "nan"}]}), END],
    "sends half a character": lambda: [chunk(token_ids=[5], text="\ud800"), END],
}


INSTEAD = {  # of an answer
    "dies": lambda self: os._exit(9),
    "ends its supervisor": lambda self: os.kill(os.getppid(), signal.SIGKILL),
    "holds its supervisor": lambda self: (os.kill(os.getppid(), signal.SIGSTOP), self.stream([TOKEN] * 16 + [END])),
    "floods its output later": lambda self: flood(),
    "holds memory later": lambda self: hold_memory(),
    "fails": lambda self: self.send_error(500, "out of order"),
    "sends elsewhere": lambda self: self.redirect(),
    "is no server": lambda self: self.wfile.write(os.urandom(100_000)),
    "sends a huge header": lambda self: self.wfile.write(b"HTTP/1.1 200 OK\r\nX: " + b"x" * MIB + b"\r\n\r\n"),
    "sends headers without end": lambda self: self.headers_without_end(),
    "sends a bomb": lambda self: self.bomb(),
}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.send_response(503 if MODE == "is not ready" else 200)
        self.end_headers()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        first = body["prompt"] == "Warm"
        if first and MODE == "sends nothing to the warm-up":
            time.sleep(600)
        if not first and MODE in INSTEAD:
            INSTEAD[MODE](self)
            return
        whole = [TOKEN] * body["max_tokens"] + [END]
        self.stream(whole if first or MODE not in ANSWERS else ANSWERS[MODE]())

    def stream(self, parts):
        self.send_response(200)
        self.end_headers()
        for part in parts:
            self.wfile.write(part)

    def redirect(self):
        self.send_response(307)
        self.send_header("Location", "http://127.0.0.1:1/")
        self.end_headers()

    def headers_without_end(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            self.wfile.write(b"X: y\r\n" * 1000)

    def bomb(self):
        self.send_response(200)
        self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        self.wfile.write(gzip.compress(bytes(256 * MIB)))


if MODE in AT_START:
    AT_START[MODE]()
socketserver.ThreadingMixIn.daemon_threads = True
ThreadingHTTPServer.request_queue_size = 64
ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
