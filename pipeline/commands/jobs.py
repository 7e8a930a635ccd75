"""Chains as jobs: the work of a job, the submission of chains, and the table of jobs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.chain.consequences import consequences
from pipeline.chain.lambda_sweep import Sweep, plan_of
from pipeline.chain.request import ChainRequest
from pipeline.chain.step_count import steps_done
from pipeline.cluster.records import ChainJobs, JobStatus, slurm_queue, status_of
from pipeline.cluster.submission import ChainJob, load_submitit, submit_to_slurm
from pipeline.common.errors import UserError
from pipeline.common.tables import Table

if TYPE_CHECKING:
    from pipeline.chain.chain import PlannedStage
    from pipeline.cluster.resources import Resources

Requests = Mapping[str, Sequence[ChainRequest]]
"""The chains of each job, by the job's title. The chains of a job share a folder, so they run one after another."""
Confirm = Callable[[list[str]], None]
"""Asks whether to continue in spite of these consequences. Raises a UserError if not."""


class JobsFailed(UserError):
    """Some jobs did not succeed; the message names them."""


@dataclass(frozen=True)
class ChainWork:
    """Builds chains in a job, one after another. It is pickled."""

    requests: tuple[ChainRequest, ...]
    accept_anyway: bool = False

    def run(self) -> None:
        """Run the chains. Raises Interrupted after a signal, and SystemExit after an error."""
        from pipeline.commands.display import plan_table, show
        from pipeline.commands.exits import plain_errors
        from pipeline.commands.running import run_chain
        from pipeline.common.processes import start_accelerator

        with plain_errors():
            for request in self.requests:
                chain = request.chain()
                show(plan_table(chain, chain.plan()))
                run_chain(chain, start_accelerator(chain.precision), self.accept_anyway)

    def progress(self) -> str:
        """The status of each stage, with the step at which it was interrupted."""
        return repr([(planned.name, planned.status, planned.reason) for planned in self.plan()])

    def plan(self) -> list[PlannedStage]:
        """The plans of all chains, without repetitions."""
        found: dict[str, PlannedStage] = {}
        for request in self.requests:
            found |= {planned.name: planned for planned in plan_of(request.chain())}
        return list(found.values())

    @property
    def is_done(self) -> bool:
        """Whether all stages are published and current."""
        return all(planned.status == "done" for planned in self.plan())


Job = ChainJob[ChainWork]


def submit_sweep(sweep: Sweep, engine: str, resources: Resources, accept_anyway: bool, confirm: Confirm) -> None:
    """Submit the chains of a sweep that are not done. A chain waits for the root that it starts from."""
    points = list(sweep.points())
    roots = {point.starts_from for point in points if point.starts_from is not None}
    title = {root: next(p.title for p in points if p.chains[0].folder == root.chain().folder) for root in roots}
    before = {root: _job(f"{title[root]} {root.stage}", (root,), accept_anyway) for root in roots}
    by_folder = {job.folder: job for job in before.values()}
    jobs = []
    for point in points:
        job = _job(point.title, point.requests, accept_anyway)
        first = before[point.starts_from] if point.starts_from else by_folder.get(job.folder)
        jobs.append(replace(job, after=(first,) if first else ()))
    _submit([*before.values(), *jobs], engine, resources, confirm)


def submit_chains(requests: Requests, engine: str, resources: Resources, accept_anyway: bool, confirm: Confirm) -> None:
    """Submit chains that do not depend on each other, except those that are done."""
    _submit([_job(title, chains, accept_anyway) for title, chains in requests.items()], engine, resources, confirm)


def _job(title: str, requests: Sequence[ChainRequest], accept_anyway: bool) -> Job:
    return ChainJob(title, requests[0].chain().folder, ChainWork(tuple(requests), accept_anyway))


def _submit(jobs: Sequence[Job], engine: str, resources: Resources, confirm: Confirm) -> None:
    """Submit the jobs that are not done and not submitted yet. Returns once local jobs have ended."""
    from pipeline.commands.display import console

    load_submitit()
    known = slurm_queue([record for job in jobs for record in ChainJobs.read(job.folder).jobs])
    todo: list[Job] = []
    for job in jobs:
        status = status_of(job.folder, known)
        if is_done(job):
            console.print(f"{job.title}: done")
        elif status.state in ("queued", "running"):
            console.print(f"{job.title}: {status.state} already (job {status.ids})")
        else:
            todo.append(job)
    if found := [line for job in todo for line in _consequences(job)]:
        confirm(found)
    for job in todo:
        ChainJobs().write(job.folder)
    todo = [replace(job, after=tuple(before for before in job.after if before in todo)) for job in todo]
    if engine == "slurm":
        for job, record in submit_to_slurm(todo, resources):
            console.print(f"{job.title}: job {record.id}; log in {job.folder / 'logs'}", soft_wrap=True)
        return

    from pipeline.cluster.local_queue import LocalQueue

    failed = LocalQueue(resources, lambda line: console.print(line, soft_wrap=True), is_done).run(todo)
    if failed:
        names = ", ".join(job.title for job in failed)
        raise JobsFailed(f"{len(failed)} of {len(todo)} jobs did not succeed: {names}. Repeat the command to continue")


def _consequences(job: Job) -> list[str]:
    """What a person must agree to. This is asked before submission, because nobody can answer questions in a job."""
    # The job may find a GPU that this machine does not have, so the device is not checked here.
    chains = [request.chain() for request in job.work.requests]
    return [line for chain in chains for line in consequences(chain, plan_of(chain), (), (), "cuda")]


def is_done(job: Job) -> bool:
    """Whether a job's chains are built."""
    return job.work.is_done


def jobs_table(requests: Requests) -> list[Table]:
    """A table of the jobs of these chains; none if no jobs were submitted."""
    folders = {title: chains[0].chain().folder for title, chains in requests.items()}
    if not any(ChainJobs.read(folder).jobs for folder in folders.values()):
        return []
    known = slurm_queue([record for folder in folders.values() for record in ChainJobs.read(folder).jobs])
    table = Table("jobs", ("chain", "job", "state", "log"), left=4)
    for title, folder in folders.items():
        status = status_of(folder, known)
        plan = ChainWork(tuple(requests[title])).plan()
        jobs = ChainJobs.read(folder).jobs
        log = str(folder / jobs[-1].log) if jobs and jobs[-1].log else "–"
        table.add(title, status.ids or "–", _state(status, plan), log)
    return [table]


def _state(status: JobStatus, plan: Sequence[PlannedStage]) -> str:
    done, total = steps_done(plan)
    at = f"at step {done:,} of {total:,}"
    if all(planned.status == "done" for planned in plan):
        return "done"
    if status.state == "running":
        return f"running {at}"
    if status.state == "queued":
        return f"queued {at}" + (f": {status.waits}" if status.waits not in ("", "None") else "")
    if status.state == "none":
        return "not submitted"
    if not status.last_line:
        return "ended without output"
    stopped = status.last_line.startswith("stopped by")
    return f"{'stopped' if stopped else 'failed'} {at}: {status.last_line}"
