"""Every audit there is, by name. A new one is a file here and a line in this list."""

from __future__ import annotations

from isologit.errors import ConfigError
from isologit.judge.audits import (
    commitment,
    conservation,
    endings,
    entry_rules,
    fingerprint,
    first_token,
    gaps,
    held_out,
    ids_text,
    logprobs,
    nonce,
    perturbed_weights,
    process,
    request_bodies,
    rescoring,
    restart,
    stream,
    twins,
)
from isologit.judge.audits.base import Audit, Case, Finding
from isologit.judge.profile import Profile

_ALL: tuple[Audit, ...] = (
    conservation.AUDIT,
    stream.AUDIT,
    endings.AUDIT,
    ids_text.AUDIT,
    first_token.AUDIT,
    rescoring.AUDIT,
    fingerprint.AUDIT,
    commitment.AUDIT,
    logprobs.AUDIT,
    nonce.AUDIT,
    gaps.AUDIT,
    request_bodies.AUDIT,
    perturbed_weights.AUDIT,
    held_out.AUDIT,
    twins.AUDIT,
    restart.AUDIT,
    *process.AUDITS,
    entry_rules.AUDIT,
)
AUDITS: dict[str, Audit] = {audit.name: audit for audit in _ALL}


def audits_of(profile: Profile) -> list[Audit]:
    """The profile's audits, in the order of the list above. Raises ConfigError for a name that is none."""
    if profile.audits == "all":
        return list(_ALL)
    unknown = [name for name in profile.audits if name not in AUDITS]
    if unknown:
        raise ConfigError(f"profile {profile.name}: {unknown[0]} is no audit; there are {', '.join(AUDITS)}")
    return [audit for audit in _ALL if audit.name in profile.audits]


__all__ = ["AUDITS", "Audit", "Case", "Finding", "audits_of"]
