"""Which backend is chosen, and what is said when there is none."""

from __future__ import annotations

import pytest

from isologit.backends.base import scheme_name
from isologit.backends.registry import BACKENDS, available, backend_class, choose_backend
from isologit.errors import ConfigError


class Elsewhere:
    """A backend of a device that no machine has."""

    name = "elsewhere"

    @classmethod
    def why_not(cls, device: str) -> str | None:
        return None if device == "moon" else "there is no moon here"


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = {"elsewhere": f"{__name__}:Elsewhere", **BACKENDS}
    monkeypatch.setattr("isologit.backends.registry.BACKENDS", listed)


def test_every_listed_backend_can_be_imported_and_knows_its_name() -> None:
    assert [backend_class(name).name for name in BACKENDS] == list(BACKENDS)


def test_the_cpu_can_always_be_used() -> None:
    assert ("cpu", True, "") in available()
    assert ("cpu", True, "") in available("cpu")


@pytest.mark.usefixtures("elsewhere")
def test_auto_takes_the_first_that_can_run_on_the_device() -> None:
    assert choose_backend(device="cpu").name == "cpu"
    assert choose_backend(device="moon").name == "elsewhere"
    assert choose_backend("cpu", "cpu").name == "cpu"


@pytest.mark.usefixtures("elsewhere")
def test_what_cannot_run_is_refused_with_what_can() -> None:
    assert available()[0] == ("elsewhere", False, "there is no moon here")
    with pytest.raises(ConfigError, match=r'"elsewhere" cannot run here: there is no moon here; usable are .*cpu'):
        choose_backend("elsewhere")
    with pytest.raises(ConfigError, match=r'"cpu" cannot run here: .* CPU'):
        choose_backend("cpu", "moon")
    with pytest.raises(ConfigError, match=r'no backend can run on device "mars" \(elsewhere: .*; cpu: '):
        choose_backend(device="mars")
    with pytest.raises(ConfigError, match=r'"cqu" is unknown; there are elsewhere, .*cpu'):
        choose_backend("cqu")


def test_a_numeric_scheme_is_the_backends_own() -> None:
    assert scheme_name("auto", backend_class("cuda")) == "float16x2-kv24"
    assert scheme_name("float16-kv16", backend_class("cuda")) == "float16-kv16"
    assert scheme_name("auto", backend_class("cpu")) == "float32"
    with pytest.raises(ConfigError, match='"float16-kv16" is unknown to the cpu backend; it has float32'):
        scheme_name("float16-kv16", backend_class("cpu"))
