"""The requests under way, whether they still queue, and when their time is over. No torch."""

import heapq
from collections.abc import Callable, Iterator

from exeunt.server.answer import Job, ScoreJob


class Jobs:
    """Every request between its submission and its end, by id. Only the engine's thread asks.

    Deadlines are seconds on the `time.monotonic` clock.

    `on_started` is called when a request leaves the queue (however), `on_ended` when it is over.
    """

    def __init__(self, on_started: Callable[[], None], on_ended: Callable[[], None]) -> None:
        self._on_started, self._on_ended = on_started, on_ended
        self._jobs: dict[str, Job | ScoreJob] = {}
        self._deadlines: list[tuple[float, str]] = []
        self._running = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._jobs

    def __iter__(self) -> Iterator[Job | ScoreJob]:
        """The requests as they stand now: they may end while one goes through them."""
        return iter(list(self._jobs.values()))

    @property
    def running(self) -> int:
        """Requests that have left the queue."""
        return self._running

    @property
    def waiting(self) -> int:
        """Requests that still queue."""
        return len(self._jobs) - self._running

    def get(self, request_id: str) -> Job | ScoreJob | None:
        """The request of this id, None where it has ended or never was."""
        return self._jobs.get(request_id)

    def add(self, job: Job | ScoreJob) -> None:
        """Take in a request, which queues."""
        self._jobs[job.request.id] = job
        if job.request.deadline is not None:
            heapq.heappush(self._deadlines, (job.request.deadline, job.request.id))

    def starts(self, job: Job | ScoreJob) -> bool:
        """Note that a request runs; false where it did before, and was preempted."""
        if job.started:
            return False
        job.started = True
        self._running += 1
        self._on_started()
        return True

    def close(self, request_id: str) -> None:
        """Note that a request is over; one that is closed already may be closed again."""
        job = self._jobs.pop(request_id, None)
        if job is None:
            return
        if job.started:
            self._running -= 1
        else:
            self._on_started()  # it leaves the queue without having run
        while self._deadlines and self._deadlines[0][1] not in self._jobs:
            heapq.heappop(self._deadlines)
        self._on_ended()

    def next_deadline(self) -> float | None:
        """When the next request times out."""
        return self._deadlines[0][0] if self._deadlines else None

    def expired(self, now: float) -> Iterator[str]:
        """The ids of requests whose time is over at `now`; each is named once."""
        while self._deadlines and self._deadlines[0][0] <= now:
            yield heapq.heappop(self._deadlines)[1]
