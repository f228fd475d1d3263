"""Rendering of chat templates in a process of its own, with limits. Owns that process; knows no model.

A Jinja template can loop for ever, double a string until memory ends, or raise 10 to the power 10**8, and its sandbox
forbids none of it. In another process the kernel does, and a template in C code can still be stopped.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

_WORKER = Path(__file__).with_name("chat_worker.py")
_WAIT_FOR_EXIT_S = 1.0


@dataclass(frozen=True)
class RenderLimits:
    """What one rendering may use: processor time, wall time (a backstop), memory of the process, size of the prompt."""

    cpu_seconds: float = 2.0
    wall_seconds: float = 30.0
    memory_bytes: int = 512 << 20
    max_characters: int = 8_000_000


class RenderError(Exception):
    """`kind` is "malformed" (the template), "refused" (by the template) or "limit" (one was broken)."""

    def __init__(self, kind: Literal["malformed", "refused", "limit"], message: str) -> None:
        super().__init__(message)
        self.kind = kind


class TemplateRenderer:
    """Renders templates, one at a time, from any thread. The process starts at the first rendering and stays.

    Raises RenderError; after a broken limit the next rendering starts a new process.
    """

    def __init__(self, limits: RenderLimits | None = None) -> None:
        self._limits = limits or RenderLimits()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """The text that the template `source` makes of `variables`, which are JSON values."""
        try:
            request = json.dumps({"source": source, "variables": variables}, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise RenderError("refused", f"they are not plain JSON values ({error})") from None
        with self._lock:
            try:
                answer = self._exchange(request.encode("utf-8", "surrogatepass") + b"\n")
            except BaseException:  # Ctrl-C: an answer that comes late would be taken for the next one's
                if self._process is not None:
                    self._process.kill()
                self.close()
                raise
        if "text" in answer:
            return str(answer["text"])
        raise RenderError(answer["failure"], answer["message"])

    def close(self) -> None:
        """End the process and wait until it is gone. A later rendering starts another."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.close()  # idle, it ends by itself
        try:
            process.wait(_WAIT_FOR_EXIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def forget(self) -> None:
        """After a fork, in the child: the process and the lock are the parent's."""
        process, self._process = self._process, None
        self._lock = threading.Lock()
        if process is not None:
            process.returncode = 0  # not ours to wait for
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(OSError):
                    pipe.close()

    def _exchange(self, request: bytes) -> dict[str, Any]:
        for _ in range(2):  # a process that ended while it was idle is replaced
            process = self._process = self._process or self._start()
            assert process.stdin is not None
            try:
                process.stdin.write(request)
                process.stdin.flush()
                break
            except BrokenPipeError:
                self.close()
        line = self._read_line()
        if line is None:
            raise RenderError("limit", self._why_it_ended())
        answer: dict[str, Any] = json.loads(line.decode("utf-8", "surrogatepass"))
        if answer.get("failure") == "limit":
            self.close()  # gives back what it holds
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        limits = self._limits
        arguments = [str(limits.cpu_seconds), str(limits.memory_bytes), str(limits.max_characters)]
        return subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def _read_line(self) -> bytes | None:
        """The answer; None when the process ended or did not answer in time."""
        process = self._process
        if process is None:
            return None
        assert process.stdout is not None
        pipe = process.stdout.fileno()
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        deadline = time.monotonic() + self._limits.wall_seconds
        parts: list[bytes] = []
        while not (parts and parts[-1].endswith(b"\n")):
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                process.kill()
                return None
            part = os.read(pipe, 1 << 20)
            if not part:
                return None
            parts.append(part)
        return b"".join(parts)

    def _why_it_ended(self) -> str:
        process = self._process
        self.close()
        code = None if process is None else process.returncode
        if code == -signal.SIGPROF:
            return f"takes more than {self._limits.cpu_seconds:g} s of processor time"
        if code == -signal.SIGKILL:
            return f"was stopped: it ran out of memory, or took more than {self._limits.wall_seconds:g} s"
        return f"ended the process that renders it (exit status {code})"


renderer = TemplateRenderer()
atexit.register(renderer.close)
os.register_at_fork(after_in_child=renderer.forget)
