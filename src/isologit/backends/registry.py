"""The backends there are, which of them this machine can use, and the one that fits a wish."""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple

from isologit.backends.base import Backend, LoadOptions, scheme_name
from isologit.checkpoints.checkpoint import Checkpoint
from isologit.errors import ConfigError

AUTO = "auto"

# Name -> where its class is, imported when it is asked for. "auto" takes the first that can run.
BACKENDS = {
    "cuda": "isologit.backends.cuda.backend:CUDABackend",
    "cpu": "isologit.backends.cpu.backend:CPUBackend",
    "torch": "isologit.backends.torch.backend:TorchBackend",
}


class Availability(NamedTuple):
    """Whether this machine can use a backend; `reason` says why not, or is empty."""

    name: str
    usable: bool
    reason: str


def backend_class(name: str) -> type[Backend]:
    """The class of the backend of that name. Raises ConfigError naming what there is."""
    if name not in BACKENDS:
        raise ConfigError(f'backend "{name}" is unknown; there are {", ".join(BACKENDS)}')
    module, _, attribute = BACKENDS[name].partition(":")
    found: type[Backend] = getattr(import_module(module), attribute)
    return found


def available(device: str = AUTO) -> list[Availability]:
    """All backends in the order in which "auto" prefers them, each with whether it can run on `device`."""
    reasons = ((name, backend_class(name).why_not(device)) for name in BACKENDS)
    return [Availability(name, reason is None, reason or "") for name, reason in reasons]


def choose_backend(backend: str = AUTO, device: str = AUTO) -> type[Backend]:
    """The named backend, or with "auto" the first one that can run on `device`.

    Raises ConfigError if there is none, with the reasons and what can be used instead.
    """
    if backend != AUTO:
        chosen = backend_class(backend)
        reason = chosen.why_not(device)
        if reason is None:
            return chosen
        others = [found.name for found in available() if found.usable]
        raise ConfigError(f'backend "{backend}" cannot run here: {reason}; usable are {", ".join(others)}')
    found = available(device)
    for candidate in found:
        if candidate.usable:
            return backend_class(candidate.name)
    reasons = "; ".join(f"{candidate.name}: {candidate.reason}" for candidate in found)
    raise ConfigError(f'no backend can run on device "{device}" ({reasons})')


def load_backend(checkpoint: Checkpoint, options: LoadOptions, *, backend: str = AUTO) -> Backend:
    """The checkpoint's model on the chosen backend and `options.device`.

    Raises ConfigError as `choose_backend` does, ModelError for a model that the backend cannot compute.
    """
    chosen = choose_backend(backend, options.device)
    scheme_name(options.numerics, chosen)
    return chosen.load(checkpoint, options)
