"""The systems that are compared: how each is started, and the settings it may be tuned over."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
TUNED = _HERE / "tuned.json"

Settings = dict[str, Any]
Grid = dict[str, list[Any]]


@dataclass(frozen=True)
class Narrowed:
    """Variables that keep a system at AVX2, and the folder under `.venvs` that is needed besides."""

    variables: dict[str, str]
    environment: str | None = None


@dataclass(frozen=True)
class System:
    """One competitor. `environment` is its folder under `.venvs`, or None for the running interpreter.

    `grids` holds the values worth trying for requests "many" or "alone"; the first of each is the default.
    `sequential` systems have no batch, so their time on a part of the requests scales to the whole. `slow` ones are
    several times slower than the others: they run once, on a part of the requests.
    `avx2` is what makes a system leave AVX-512 alone on a CPU that has it: variables of the environment, and another
    folder where those do not suffice. None: there is no way, so it does not run with `--isa avx2`.
    """

    name: str
    label: str
    environment: str | None
    many: Grid
    alone: Grid
    sequential: bool = False
    slow: bool = False
    avx2: Narrowed | None = None
    variables: dict[str, str] = field(default_factory=dict)

    def narrowed(self) -> System:
        """The same system without AVX-512. Raises ValueError where nothing makes it."""
        if self.avx2 is None:
            raise ValueError(f"nothing keeps {self.label} from using AVX-512")
        return replace(self, environment=self.avx2.environment or self.environment, variables=self.avx2.variables)

    @property
    def python(self) -> Path:
        """The interpreter that has the system."""
        if self.environment is None:
            return Path(sys.executable)
        return _HERE / ".venvs" / self.environment / "bin" / "python"

    @property
    def adapter(self) -> Path:
        """The script that runs the system."""
        return _HERE / "adapters" / f"run_{self.name}.py"

    @property
    def is_installed(self) -> bool:
        """Whether `setup.sh` finished this system's environment."""
        return self.environment is None or (_HERE / ".venvs" / self.environment / ".installed").exists()

    def grid(self, num_requests: int) -> list[Settings]:
        """All settings worth trying, the default first."""
        choices = self.alone if num_requests == 1 else self.many
        return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


# oneDNN, ATen and MKL at AVX2. What else a system brings has switches of its own.
_LIBRARIES_AT_AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
_ORDER = ["longest-first"]
_ATTENTION = {"attn_implementation": ["sdpa"]}

SYSTEMS = {
    system.name: system
    for system in (
        System(
            "isologit",
            "isologit",
            None,
            many={"max_num_seqs": [None], "max_num_batched_tokens": [None]},
            alone={"max_num_seqs": [None], "max_num_batched_tokens": [None]},
            avx2=Narrowed({**_LIBRARIES_AT_AVX2, "ISOLOGIT_VECTOR_WIDTH": "8"}),
        ),
        System(
            "openvino",
            "OpenVINO GenAI",
            "openvino",
            many={"max_num_seqs": [128, 64], "max_num_batched_tokens": [512, 256], "order": _ORDER},
            alone={"max_num_seqs": [1], "max_num_batched_tokens": [512], "order": _ORDER},
            # Its float32 products are MLAS's, which has no switch: a copy of the plugin takes MLAS's path of AVX2.
            avx2=Narrowed({**_LIBRARIES_AT_AVX2, "OV_CPU_MAX_ISA": "AVX2"}, "openvino-avx2"),
        ),
        System(
            "vllm",
            "vLLM",
            "vllm",
            many={
                "max_num_seqs": [128, 64, 256],
                "max_num_batched_tokens": [2048, 512],
                "enforce_eager": [False],
                "order": _ORDER,
            },
            alone={
                "max_num_seqs": [1],
                "max_num_batched_tokens": [2048],
                "enforce_eager": [False, True],
                "order": _ORDER,
            },
            # Which of its own libraries it loads, and what it compiles, does not follow from these: see the adapter.
            avx2=Narrowed(_LIBRARIES_AT_AVX2),
        ),
        System(
            "transformers_cb",
            "transformers, continuous batching",
            "transformers",
            many={"slots": [128, 64], "max_batch_tokens": [512, 2048], **_ATTENTION, "order": _ORDER},
            alone={"slots": [1], "max_batch_tokens": [512], **_ATTENTION, "order": _ORDER},
            slow=True,
        ),
        System(
            "transformers",
            "transformers, one by one",
            "transformers",
            many=_ATTENTION,
            alone=_ATTENTION,
            sequential=True,
            slow=True,
        ),
        System(
            "ctranslate2",
            "CTranslate2",
            "ctranslate2",
            many={"batch_size": [64, 32, 16], "order": _ORDER},
            alone={"batch_size": [1], "order": _ORDER},
            slow=True,
        ),
        System(
            "llamacpp",
            "llama.cpp",
            "llamacpp",
            many={"slots": [8, 32, 64], "batch_tokens": [512], "flash_attention": [True, False], "order": _ORDER},
            alone={"slots": [1], "batch_tokens": [512], "flash_attention": [True, False], "order": _ORDER},
            slow=True,
        ),
    )
}


def settings_for(system: System, workload: str, num_requests: int, isa: str | None = None) -> tuple[Settings, str]:
    """The settings to run with, and whether they were "tuned" for this workload or are the "default".

    Kept to `isa` and not tuned so, a system has what was found for it with all that the CPU has.
    """
    tuned = json.loads(TUNED.read_text()) if TUNED.exists() else {}
    if isa and (found := tuned.get(tuned_as(workload, isa), {}).get(system.name)):
        return found["settings"], "tuned"
    if found := tuned.get(workload, {}).get(system.name):
        return found["settings"], f"tuned without {isa}" if isa else "tuned"
    return system.grid(num_requests)[0], "default"


def tuned_as(workload: str, isa: str | None) -> str:
    """The name under which settings are kept."""
    return f"{workload}-{isa}" if isa else workload
