"""What the operating system says: start-up within its limits, work done here, nothing left behind, files unchanged."""

from __future__ import annotations

from isologit.judge.audits.base import Case, Finding
from isologit.judge.evidence import RunEvidence, RunKind

_NARROW = 4.0  # how much faster eight bits are than float32, at most
_STEADY = 1.25


class StartUp:
    """Work that belongs to the run may not be done before its clock starts."""

    name = "start_up"
    title = "nothing is computed before the clock starts"
    runs: tuple[RunKind, ...] = ()

    def verify(self, case: Case) -> list[Finding]:
        """Processor time before the first request that is over the limit, or a start that failed."""
        found, limit = [], case.profile.limits.start_cpu_s
        for run in case.runs:
            if not run.process.started:
                found.append(Finding("start_up.failed", run.process.problem or "the entry did not start", run.run_id))
            elif (used := run.process.start_cpu_s) is not None and used > limit:
                message = f"used {used:.1f} s of processor time before the first request; {limit:g} are allowed"
                found.append(Finding("start_up.processor_time", message, run.run_id))
        return found


class ProcessorTime:
    """Physics: 2 operations for each parameter and token, at four times the rate of the judge's own matrix product.

    The rate is the best of all runs, in float32 on one core; narrower numbers are up to four times as fast.
    """

    name = "processor_time"
    title = "the work was done on this machine"
    runs: tuple[RunKind, ...] = ()

    def verify(self, case: Case) -> list[Finding]:
        """Runs that used less processor time than the arithmetic needs at the machine's peak."""
        for run in case.runs:
            used, floor = run.process.run_cpu_s, _least_cpu_s(case, run)
            if used is not None and floor is not None and used < floor:
                message = f"used {used:.2f} s of processor time; its tokens need at least {floor:.2f} s on this machine"
                return [Finding("processor_time.too_little", message, run.run_id)]
        return []


def _least_cpu_s(case: Case, run: RunEvidence) -> float | None:
    peak = max((other.peak_flop_per_s for other in case.runs if other.peak_flop_per_s is not None), default=None)
    if peak is None:
        return None
    tokens = sum(len(record.token_ids) for record in case.answers(run))
    return 2.0 * case.reference.num_parameters * tokens / (_NARROW * peak)


class Network:
    """In a sandbox there is no network but its own; without one, what the entry is connected to is looked at."""

    name = "network"
    title = "nobody else computes"
    runs: tuple[RunKind, ...] = ()

    def verify(self, case: Case) -> list[Finding]:
        """Runs in which the entry was connected to anything."""
        for run in case.runs:
            if run.process.peers:
                message = f"the entry was connected to {run.process.peers[0]} while it was timed"
                return [Finding("network.connected", message, run.run_id)]
        return []


class LeftBehind:
    """When an entry has been stopped, no process of it is there."""

    name = "left_behind"
    title = "no process outlives the run"
    runs: tuple[RunKind, ...] = ()

    def verify(self, case: Case) -> list[Finding]:
        """Runs after which processes had to be ended."""
        for run in case.runs:
            if run.process.left_processes:
                message = f"{run.process.left_processes} processes were still there after the entry had been stopped"
                return [Finding("left_behind.processes", message, run.run_id)]
        return []


class Frozen:
    """The files that were handed in are the files that ran, in every run."""

    name = "frozen"
    title = "files stay as they were handed in"
    runs: tuple[RunKind, ...] = ()

    def verify(self, case: Case) -> list[Finding]:
        """Hashes that differ between entry and run, or before and after."""
        for run in case.runs:
            facts = run.process
            if {facts.files_before, facts.files_after} - {None, run.entry_sha256}:
                return [Finding("frozen.changed", "the entry's files are not those that were handed in", run.run_id)]
        return []


class Mounts:
    """An entry sees its own folder, the model, the runtime and its scratch."""

    name = "mounts"
    title = "no file is in reach but those on the list"
    runs: tuple[RunKind, ...] = ()

    def verify(self, case: Case) -> list[Finding]:
        """Mounts of the entry's processes that the judge did not make, and namespaces in which there could be some."""
        for run in case.runs:
            if run.process.own_namespaces:
                message = f"a process made namespaces of its own ({', '.join(run.process.own_namespaces)})"
                return [Finding("mounts.namespaces", message, run.run_id)]
            strange = sorted(set(run.process.mounts) - set(run.process.allowed_mounts))
            if strange:
                return [Finding("mounts.other", f"the process sees {strange[0]}, which is not on the list", run.run_id)]
        return []


class Canary:
    """A fixed kernel before and after each run: an entry must leave the machine as fast as it found it."""

    name = "canary"
    title = "the machine is as fast after a run as before"
    runs: tuple[RunKind, ...] = ()

    def verify(self, case: Case) -> list[Finding]:
        """Entries after whose runs the kernel is slower: the fastest `after` against the slowest `before`."""
        pairs = [run.canary_s for run in case.runs if run.canary_s is not None]
        if not pairs:
            return []
        ratio = min(after for _, after in pairs) / max(before for before, _ in pairs)
        if ratio <= _STEADY:
            return []
        return [Finding("canary.slower", f"after each of its runs the machine was slower, by a factor of {ratio:.2f}")]


class Attempts:
    """A crash is an outcome: the run counts as failed, and is not repeated until it goes well."""

    name = "attempts"
    title = "no run is repeated after a crash of the entry"
    runs: tuple[RunKind, ...] = ()

    def verify(self, case: Case) -> list[Finding]:
        """Runs in which the entry ended by itself."""
        crashed = [run for run in case.runs if run.process.died]
        if not crashed:
            return []
        message = f"the entry ended by itself in {len(crashed)} of {len(case.runs)} runs"
        return [Finding("attempts.crashed", message, crashed[0].run_id)]


AUDITS = (StartUp(), ProcessorTime(), Network(), LeftBehind(), Frozen(), Mounts(), Canary(), Attempts())
