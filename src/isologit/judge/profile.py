"""What an organiser sets for a round: prompts, load, limits, repeats, tolerance and audits. Read from YAML."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from isologit.errors import ConfigError
from isologit.judge.entry import first_problem


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Prompts(_Part):
    """Where prompts come from. dataset: `builtin` or a prompt file. count: of every run, whatever it is for."""

    dataset: str = "builtin"
    count: PositiveInt = 1500


class Load(_Part):
    """How requests arrive. rate: requests a second, None for all at once. max_concurrency: held back by the judge."""

    rate: PositiveFloat | None = None
    max_concurrency: PositiveInt | None = None
    warm_up: PositiveInt = 2


class Limits(_Part):
    """What an entry may use. Seconds, GiB, MiB and counts; start_cpu_s is processor time before the first request.

    build_s: of an entry's build, before the round. silence_s: without a token of any request. cores: pinned to the
    first ones that the judge has; None for all.
    """

    build_s: PositiveFloat = 1800.0
    start_s: PositiveFloat = 300.0
    start_cpu_s: PositiveFloat = 600.0
    request_s: PositiveFloat = 3600.0
    run_s: PositiveFloat = 7200.0
    stop_s: PositiveFloat = 10.0
    memory_gib: PositiveFloat = 20.0
    scratch_gib: PositiveFloat = 4.0
    output_mib: PositiveFloat = 16.0
    processes: PositiveInt = 512
    cores: PositiveInt | None = None
    silence_s: PositiveFloat = 600.0


class Panel(_Part):
    """Points a panel gives beside the time, each out of its weight (phase two of the contest)."""

    innovation: PositiveInt = 40
    complexity: PositiveInt = 30
    completeness: PositiveInt = 30


class Profile(_Part):
    """One kind of round. tolerance: largest absolute logit difference. time_bar_s: slower is INVALID."""

    name: str = Field(min_length=1, max_length=40)
    title: str = Field(min_length=1, max_length=120)
    model: str = "demo"
    prompts: Prompts = Prompts()
    load: Load = Load()
    limits: Limits = Limits()
    repeats: PositiveInt = 6
    tolerance: PositiveFloat = 5e-3
    reveal_rows: PositiveInt = 64
    held_out_ratio: PositiveFloat = 1.10
    twin_ratio: PositiveFloat = 0.80
    canary_drift: PositiveFloat = 0.03
    time_bar_s: PositiveFloat | None = None
    requires_technique: bool = False
    panel: Panel | None = None
    audits: tuple[str, ...] | Literal["all"] = "all"


def load_profile(name_or_file: str) -> Profile:
    """A bundled profile by name, or an organiser's YAML file. Raises ConfigError."""
    bundled = files("isologit.judge").joinpath("profiles", f"{name_or_file}.yaml")
    path = Path(name_or_file)
    if "/" not in name_or_file and bundled.is_file():
        text, source = bundled.read_text(encoding="utf-8"), name_or_file
    elif path.is_file():
        text, source = path.read_text(encoding="utf-8"), str(path)
    else:
        raise ConfigError(
            f"{name_or_file}: no such profile; give a YAML file or one of {', '.join(bundled_profiles())}"
        )
    try:
        found = yaml.safe_load(text)
        return Profile.model_validate(found)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not a YAML file ({' '.join(str(error).split())})") from None
    except ValidationError as error:
        raise ConfigError(f"{source}: {first_problem(error)}") from None


def bundled_profiles() -> list[str]:
    """Names of the profiles that come with the package."""
    return sorted(
        item.name.removesuffix(".yaml")
        for item in files("isologit.judge").joinpath("profiles").iterdir()
        if item.name.endswith(".yaml")
    )
