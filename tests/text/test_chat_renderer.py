"""Templates that would use all time or memory are stopped, each with one clear refusal, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from isologit.errors import ModelError, RequestError
from isologit.text.chat import ChatTemplate
from isologit.text.chat_renderer import RenderError, RenderLimits, TemplateRenderer

LIMITS = RenderLimits(cpu_seconds=0.3, memory_bytes=200 << 20, max_characters=1_000_000)
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}"
QUIET = LOOPS.replace("x{%", "{% set x = a * b %}{%")

COSTLY = {
    "nested loops": (QUIET, r"takes more than 0\.3 s of processor time"),
    "nested loops that write": (LOOPS, "writes more than 1000000 characters"),
    "a long string": ("{{ 'a' * 4000000000 }}", "needs more than 200 MiB of memory"),
    "a long string, unfolded": ("{{ messages[0].content * 4000000000 }}", "needs more than 200 MiB of memory"),
    "a string that is just too long": ("{{ messages[0].content * 300000 }}", "writes more than 1000000 characters"),
    "a string doubled": (
        "{% set n = namespace(s='aa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
        "needs more than 200 MiB of memory",
    ),
    "a long range": ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    "endless macros": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "calls itself without end"),
    "branching macros": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        r"takes more than 0\.3 s of processor time",
    ),
    "a wide format": ("{{ '%1000000000d' % 1 }}", "needs more than 200 MiB of memory"),
    "a wide str.format": ("{{ '{:1000000000}'.format(1) }}", "needs more than 200 MiB of memory"),
    "a wide center": ("{{ 'a' | center(10**9) }}", "needs more than 200 MiB of memory"),
    "a wide ljust": ("{{ 'a'.ljust(10**10) }}", "needs more than 200 MiB of memory"),
    "a long list": ("{{ ([1] * 10**9) | length }}", "needs more than 200 MiB of memory"),
    "a long join": (
        "{{ (['a' * 10000] * 1000000) | join }}",
        r"takes more than 0\.3 s|needs more than",
    ),
    "a great power": ("{{ (10 ** (10 ** 8)) % 7 }}", r"takes more than 0\.3 s of processor time"),
    "a great power, unfolded": (
        "{{ (10 ** (10 ** (messages | length + 7))) % 7 }}",
        r"takes more than 0\.3 s of processor time",
    ),
    "deep nesting": ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "is nested too deeply|too many nested"),
    "indentation": ("{{ ('a\\n' * 100000) | indent(100000) }}", "needs more than 200 MiB of memory"),
    "replacement": ("{{ ('a' * 100000).replace('a', 'b' * 100000) }}", "needs more than 200 MiB of memory"),
    "a slow search": (
        "{% for i in range(99999) %}{% set x = ('a' * 30000000).count('ab') %}{% endfor %}",
        r"takes more than 0\.3 s of processor time",
    ),
}
MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def renderer() -> Iterator[TemplateRenderer]:
    result = TemplateRenderer(LIMITS)
    yield result
    result.close()


@pytest.mark.parametrize("name", COSTLY)
def test_costly_templates_are_stopped(renderer: TemplateRenderer, name: str) -> None:
    source, message = COSTLY[name]
    begin = time.monotonic()
    with pytest.raises(RenderError, match=message) as caught:
        renderer.render(source, {"messages": MESSAGES})
    assert time.monotonic() - begin < 10
    assert "\n" not in str(caught.value)
    assert renderer.render("{{ messages[0].content }}", {"messages": MESSAGES}) == "Hello"


def test_limits_stop_what_is_costly_only(renderer: TemplateRenderer) -> None:
    source = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    text = "word " * 100_000
    assert renderer.render(source, {"messages": [{"role": "user", "content": text}]}) == f"[user] {text}"
    with pytest.raises(RenderError, match="writes more"):
        renderer.render(source, {"messages": [{"role": "user", "content": text}] * 3})


def test_a_broken_limit_is_told_at_load_and_with_a_request(tmp_path: Path) -> None:
    for name, message in (("a long string", "needs more than 512 MiB"), ("endless macros", "calls itself")):
        template = ChatTemplate(tmp_path, {"chat_template": COSTLY[name][0]}, {})
        with pytest.raises(ModelError, match=f"the chat template {message}.*use another chat template"):
            template.check()
        with pytest.raises(RequestError, match=f"with these messages the model's chat template {message}.*; send less"):
            template.render(MESSAGES)
    ChatTemplate(tmp_path, {"chat_template": "{{ raise_exception('only tools') }}"}, {}).check()
    ChatTemplate(tmp_path, {}, {}).check()
    with pytest.raises(ModelError, match=r"the chat template is malformed \(line 2: "):
        ChatTemplate(tmp_path, {"chat_template": "a\n{% if %}"}, {}).check()


def test_one_process_serves_many_threads(renderer: TemplateRenderer) -> None:
    failures: list[str] = []

    def work(number: int) -> None:
        for i in range(20):
            text = renderer.render("{{ a }}", {"a": f"{number} {i}"})
            if text != f"{number} {i}":
                failures.append(text)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_process_that_died_is_replaced(renderer: TemplateRenderer) -> None:
    renderer.render("a", {})
    first = renderer._process
    assert first is not None
    first.kill()
    first.wait()
    assert renderer.render("b", {}) == "b"
    assert renderer._process is not first


def test_no_answer_in_time(renderer: TemplateRenderer) -> None:
    impatient = TemplateRenderer(RenderLimits(wall_seconds=0.2))
    with pytest.raises(RenderError, match=r"took more than 0\.2 s"):
        impatient.render(QUIET, {})
    assert impatient._process is None


def test_an_interrupted_rendering_leaves_no_answer_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = TemplateRenderer(LIMITS)
    renderer.render("a", {})

    def interrupted() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(renderer, "_read_line", interrupted)
        with pytest.raises(KeyboardInterrupt):
            renderer.render("stale", {})
    assert renderer.render("fresh", {}) == "fresh"
    renderer.close()


PROGRAM = """
import os, sys
from isologit.text.chat_renderer import renderer
assert renderer.render("{{ 1 + 1 }}", {}) == "2"
child = os.fork() if "fork" in sys.argv else None
if child == 0:
    assert renderer.render("{{ 2 + 2 }}", {}) == "4"
    sys.exit(0)
if child:
    assert os.waitpid(child, 0)[1] == 0
    assert renderer.render("{{ 3 + 3 }}", {}) == "6"
print(renderer._process.pid, flush=True)
if "hang" in sys.argv:
    import time
    time.sleep(60)
"""


def run_program(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, text=True)


def gone(pid: int) -> bool:
    """Whether a process ends within some seconds."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{pid}/stat").is_file() and Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return True  # an orphan that waits for init
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("arguments", [(), ("fork",)])
def test_the_process_ends_with_its_parent(arguments: tuple[str, ...]) -> None:
    program = run_program(*arguments)
    output, _ = program.communicate(timeout=60)
    assert program.returncode == 0
    assert gone(int(output))


def test_the_process_ends_with_a_parent_that_is_killed() -> None:
    program = run_program("hang")
    assert program.stdout is not None
    pid = int(program.stdout.readline())
    program.send_signal(signal.SIGKILL)
    program.wait()
    program.stdout.close()
    assert gone(pid)
