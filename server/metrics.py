"""Every metric the server exports, in one place: what is counted, under which names, with which labels.

All children exist from the start, so that rates and ratios are defined before the first request. Label sets
are closed: no label ever takes a value from a request. No torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from platform import python_version
from typing import Final, Literal, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from exeunt.compression.variant import KVFormat
from exeunt.server.request import (
    FINAL_EXIT,
    LOOKUP_EXIT,
    EmittedToken,
    ExitMode,
    FinishReason,
    GenerationRequest,
    ScoreRequest,
)
from exeunt.server.step_counter import Count, StepCounter
from exeunt.server.step_histogram import Observations, StepHistogram

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

SuccessReason = FinishReason | Literal["scored"]
FailureReason = Literal["internal", "timeout", "shutdown"]
RejectionReason = Literal["invalid", "unauthorized", "body_too_large", "queue_full", "unavailable"]
CompressionMethod = Literal["weights", "kv_cache", "linear_block", "early_exit"]

ResidentKind = Literal[
    "embedding",
    "full",
    "int4",
    "norms",
    "kv_projection",
    "exit_output",
    "exit_shortlists",
    "rope",
    "linear_block",
    "exits",
    "cuda_graphs",
]

# Seconds. Small models answer in a few milliseconds, large ones under load take minutes.
_LATENCY_BUCKETS: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0),
)
_STEP_BUCKETS: Final = (0.00025, 0.0005, *_LATENCY_BUCKETS[:12])  # one stage of a small model is below 1 ms
_SIZE_BUCKETS: Final = tuple(float(2**power) for power in range(10))  # rows: 1..512
_LENGTH_BUCKETS: Final = tuple(float(2**power) for power in range(17))  # tokens: 1..65536
_DEPTH_BUCKETS: Final = tuple(step / 20 for step in range(1, 21))  # depth as a share of the model's blocks


def new_registry() -> CollectorRegistry:
    """A registry of its own with the process, platform and garbage collector figures in it."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


class Metrics:
    """The server's counters, gauges and histograms. Methods may be called from any thread, but `step`,
    `token`, `work`, `drafts` and `audit` from the engine's alone.

    Args:
        registry: where the metrics register themselves.
        model_name: the value of the label `model_name` on every metric.
        stages: the labels of the model's stages, in order.
        exits: the names of the model's exits, in order; `final`, the model's own head, is added.
        targets: the risk targets that the bundle's risk table names.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        model_name: str,
        stages: Sequence[str],
        exits: Sequence[str],
        targets: Sequence[float] = (),
    ) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call] # its `_created` gauges would double every series, and nobody asks for them
        self.registry = registry
        self._model_name = model_name
        modes = get_args(ExitMode)
        self._init_gauges(stages, targets)
        self._init_token_counters(modes, tuple(dict.fromkeys((*exits, FINAL_EXIT, LOOKUP_EXIT))))
        self._init_request_counters()
        self._init_histograms(stages)

    def _init_gauges(self, stages: Sequence[str], targets: Sequence[float]) -> None:
        self._running = self._gauge("num_requests_running", "Requests under way that have left the queue.")
        self._waiting = self._gauge(
            "num_requests_waiting", "Requests admitted to the queue, not yet running."
        )
        rows = self._labelled_gauge("rows_waiting", "Rows waiting at a stage.", "stage")
        self._rows_waiting = [rows.labels(self._model_name, stage) for stage in stages]
        usage = self._labelled_gauge(
            "kv_cache_usage_ratio", "Share of the KV pages in use, by format.", "format"
        )
        self._kv_usage = {name: usage.labels(self._model_name, name) for name in get_args(KVFormat)}
        thresholds = self._labelled_gauge(
            "exit_threshold",
            "Exit threshold of a risk target under the default variant now; NaN: none certified, +Inf: exits closed.",
            "target",
        )
        self._thresholds = {target: thresholds.labels(self._model_name, f"{target}") for target in targets}
        for threshold in self._thresholds.values():
            threshold.set(float("nan"))
        resident = self._labelled_gauge(
            "resident_bytes", "Bytes of the model, and of captured CUDA graphs, by kind.", "kind"
        )
        self._resident = {kind: resident.labels(self._model_name, kind) for kind in get_args(ResidentKind)}
        self._ready = self._gauge("ready", "1 while a request would be served, 0 while loading or draining.")
        build = Gauge(
            "exeunt_build_info",
            "Versions of what runs; always 1.",
            ("model_name", "version", "torch", "transformers", "python"),
            registry=self.registry,
        )
        versions = [version(package) for package in ("exeunt", "torch", "transformers")]
        build.labels(self._model_name, *versions, python_version()).set(1)

    def _init_token_counters(self, modes: Sequence[str], exits: Sequence[str]) -> None:
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of started requests.")
        self._generation_tokens = self._count_by_mode("generation_tokens", "Generated tokens.", modes)
        own = self._model_name
        exit_tokens = StepCounter(
            "exeunt_exit_tokens",
            "Generated tokens by the exit that emitted them, drafts by what proposed them (lookup: the text).",
            ("model_name", "exit", "mode"),
            [(own, name, mode) for mode in modes for name in exits],
            self.registry,
        )
        self._exit_tokens = {
            (mode, name): exit_tokens.child(own, name, mode) for mode in modes for name in exits
        }
        self._executed = self._count("blocks_executed", "Block x token pairs computed for generated tokens.")
        self._skipped = self._count("blocks_skipped", "Block x token pairs never computed.")
        self._wasted = self._count("blocks_wasted", "Block x token pairs that no answer used.")
        self._passes = self._count("block_passes", "Block x pass pairs of generating requests.")
        self._drafts = self._count(
            "drafts", "Tokens that an early exit or a look-up proposed for confirmation."
        )
        self._drafts_accepted = self._count(
            "drafts_accepted", "Proposed tokens that the full model confirmed."
        )
        self._nll = self._count_by_mode("token_nll", "Sum of -logprob of the generated tokens, nats.", modes)
        self._audited = self._count("audited_tokens", "Early tokens compared with the full model's logits.")
        self._audit_agreements = self._count(
            "audit_agreements", "Audited tokens at which exit and full model have the same most likely token."
        )
        self._audit_kl = self._count("audit_kl", "Sum of KL(full || exit) over the audited tokens, nats.")
        self._audit_nll_full = self._count(
            "audit_nll_full", "Sum of the full model's -logprob, audited tokens."
        )
        self._audit_nll_exit = self._count("audit_nll_exit", "Sum of the exit's -logprob, audited tokens.")

    def _init_request_counters(self) -> None:
        self._success = self._by_label(
            "request_success",
            "Requests answered, by why the answer ended.",
            "finish_reason",
            [*(reason.value for reason in FinishReason), "scored"],
        )
        self._failure = self._by_label(
            "request_failure", "Requests let in and not answered.", "reason", get_args(FailureReason)
        )
        self._rejections = self._by_label(
            "admission_rejections",
            "Requests not let in.",
            "reason",
            get_args(RejectionReason),
        )
        requests = Counter(
            "exeunt_compression_requests",
            "Requests that ran with a saving on (enabled true) or off, by saving.",
            ("model_name", "method", "enabled"),
            registry=self.registry,
        )
        self._compression = {
            (method, enabled): requests.labels(self._model_name, method, str(enabled).lower())
            for method in get_args(CompressionMethod)
            for enabled in (True, False)
        }
        self._preemptions = self._counter(
            "preemptions", "Sequences whose pages were taken and recomputed later."
        )
        self._disconnects = self._counter(
            "client_disconnects", "Clients gone before their answer was complete."
        )

    def _init_histograms(self, stages: Sequence[str]) -> None:
        self._ttft = self._histogram("time_to_first_token_seconds", "From arrival to the first token.")
        self._inter_token = self._step_histogram(
            "inter_token_latency_seconds", "Between two tokens of one answer.", _LATENCY_BUCKETS
        )
        self._e2e = self._histogram(
            "e2e_request_latency_seconds", "From arrival to the end of the last answer."
        )
        self._queue = self._histogram("request_queue_time_seconds", "From arrival to the first computation.")
        self._step_seconds = self._by_stage(
            "step_duration_seconds", "One run of a stage.", stages, _STEP_BUCKETS
        )
        self._step_rows = self._by_stage(
            "step_batch_size", "Rows that entered a stage in one run of it.", stages, _SIZE_BUCKETS
        )
        self._prompt_length = self._histogram("request_prompt_tokens", "Prompt length.", _LENGTH_BUCKETS)
        self._answer_length = self._histogram(
            "request_generation_tokens", "Tokens of a request's answers together.", _LENGTH_BUCKETS
        )
        self._depth = self._step_histogram(
            "token_depth_ratio", "Depth of a token / blocks of the model.", _DEPTH_BUCKETS
        )

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"exeunt_{name}", text, ("model_name",), registry=self.registry).labels(self._model_name)

    def _labelled_gauge(self, name: str, text: str, label: str) -> Gauge:
        return Gauge(f"exeunt_{name}", text, ("model_name", label), registry=self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"exeunt_{name}", text, ("model_name",), registry=self.registry).labels(
            self._model_name
        )

    def _count(self, name: str, text: str) -> Count:
        own = (self._model_name,)
        return StepCounter(f"exeunt_{name}", text, ("model_name",), [own], self.registry).child(*own)

    def _count_by_mode(self, name: str, text: str, modes: Sequence[str]) -> dict[str, Count]:
        children = {mode: (self._model_name, mode) for mode in modes}
        family = StepCounter(f"exeunt_{name}", text, ("model_name", "mode"), children.values(), self.registry)
        return {mode: family.child(*child) for mode, child in children.items()}

    def _by_label(self, name: str, text: str, label: str, values: Iterable[str]) -> dict[str, Counter]:
        counter = Counter(f"exeunt_{name}", text, ("model_name", label), registry=self.registry)
        return {value: counter.labels(self._model_name, value) for value in values}

    def _histogram(self, name: str, text: str, buckets: Sequence[float] = _LATENCY_BUCKETS) -> Histogram:
        histogram = Histogram(
            f"exeunt_{name}", text, ("model_name",), buckets=buckets, registry=self.registry
        )
        return histogram.labels(self._model_name)

    def _step_histogram(self, name: str, text: str, buckets: Sequence[float]) -> Observations:
        own = (self._model_name,)
        family = StepHistogram(f"exeunt_{name}", text, ("model_name",), [own], buckets, self.registry)
        return family.child(*own)

    def _by_stage(
        self, name: str, text: str, stages: Sequence[str], buckets: Sequence[float]
    ) -> list[Observations]:
        children = [(self._model_name, stage) for stage in stages]
        family = StepHistogram(
            f"exeunt_{name}", text, ("model_name", "stage"), children, buckets, self.registry
        )
        return [family.child(*each) for each in children]

    def step(self, stage: int, seconds: float, rows: int) -> None:
        """A stage was run once, which took `seconds`; `rows` rows entered it."""
        self._step_seconds[stage].observe(seconds)
        self._step_rows[stage].observe(rows)

    def token(self, mode: ExitMode, token: EmittedToken, blocks: int, since_last_s: float | None) -> None:
        """One token was emitted.

        Args:
            mode: the early-exit mode of its request.
            token: what the response says about it.
            blocks: blocks of the model.
            since_last_s: seconds since the answer's token before it; None for the first.
        """
        self._generation_tokens[mode].add(1)
        self._exit_tokens[mode, token.exit].add(1)
        # rounding can make a certain token's logprob a hair positive
        self._nll[mode].add(max(0.0, -token.logprob))
        self._depth.observe(token.depth / blocks)
        if since_last_s is not None:
            self._inter_token.observe(since_last_s)

    def work(self, *, executed: int = 0, skipped: int = 0, wasted: int = 0, passes: int = 0) -> None:
        """Block × token pairs run for tokens, never run, or run in vain, and block × pass pairs."""
        if executed:  # asked for every token, of whose counts most are 0
            self._executed.add(executed)
        if skipped:
            self._skipped.add(skipped)
        if wasted:
            self._wasted.add(wasted)
        if passes:
            self._passes.add(passes)

    def drafts(self, proposed: int, accepted: int) -> None:
        """Exits and look-ups proposed so many tokens, of which the full model confirmed some."""
        self._drafts.add(proposed)
        self._drafts_accepted.add(accepted)

    def audit(self, agreed: bool, kl: float, nll_full: float, nll_exit: float) -> None:
        """An early token was compared with the full model's logits.

        Args:
            agreed: exit and full model have the same most likely token.
            kl: KL(full || exit), nats, not negative.
            nll_full: -logprob of the emitted token under the full model, nats, not negative.
            nll_exit: the same under the exit.
        """
        self._audited.add(1)
        self._audit_agreements.add(int(agreed))
        self._audit_kl.add(kl)
        self._audit_nll_full.add(nll_full)
        self._audit_nll_exit.add(nll_exit)

    def started(self, queue_s: float, prompt_tokens: int) -> None:
        """A request left the queue after `queue_s` seconds."""
        self._queue.observe(queue_s)
        self._prompt_tokens.inc(prompt_tokens)
        self._prompt_length.observe(prompt_tokens)

    def first_token(self, seconds: float) -> None:
        """A request's first token came `seconds` after its arrival."""
        self._ttft.observe(seconds)

    def finished(self, tokens: int, total_s: float) -> None:
        """The last answer of a request is complete, `total_s` seconds after its arrival; `tokens` of all of them."""
        self._answer_length.observe(tokens)
        self._e2e.observe(total_s)

    def succeeded(self, reason: SuccessReason) -> None:
        """A request was answered; `cancelled` and `timeout`: as far as it got."""
        self._success[reason].inc()

    def failed(self, reason: FailureReason) -> None:
        """A request was let in and got no answer."""
        self._failure[reason].inc()

    def rejected(self, reason: RejectionReason) -> None:
        """A request was not let in."""
        self._rejections[reason].inc()

    def compression_request(self, request: GenerationRequest | ScoreRequest) -> None:
        """Count which savings an accepted request runs with."""
        self._compression["weights", request.variant.weights == "int4"].inc()
        self._compression["kv_cache", request.variant.kv_cache == "int4"].inc()
        self._compression["linear_block", request.variant.linear_block].inc()
        self._compression["early_exit", request.exits.mode != "off"].inc()

    def preempted(self) -> None:
        """A sequence lost its pages to another and will be recomputed."""
        self._preemptions.inc()

    def client_disconnected(self) -> None:
        """A client went away before its answer was complete (the 499 of proxies)."""
        self._disconnects.inc()

    def gauges(
        self, running: int, waiting: int, rows_waiting: Sequence[int], kv_usage: Mapping[str, float]
    ) -> None:
        """Set what is true now: requests, rows at each stage, and the share of KV pages in use by format."""
        self._running.set(running)
        self._waiting.set(waiting)
        for gauge, rows in zip(self._rows_waiting, rows_waiting, strict=True):
            gauge.set(rows)
        for name, gauge in self._kv_usage.items():
            gauge.set(kv_usage.get(name, 0.0))

    def resident_bytes(self, sizes: Mapping[str, int]) -> None:
        """Set the bytes held by kind; what grows while the server runs, CUDA graphs above all, is told again."""
        for kind, gauge in self._resident.items():
            gauge.set(sizes.get(kind, 0))

    def exit_thresholds(self, thresholds: Mapping[float, float | None]) -> None:
        """Set thresholds of risk targets: None where none is certified (NaN), infinity where no token may leave."""
        for target, threshold in thresholds.items():
            self._thresholds[target].set(float("nan") if threshold is None else threshold)

    def set_ready(self, ready: bool) -> None:
        """Whether a request would be served now."""
        self._ready.set(int(ready))

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format (`CONTENT_TYPE`)."""
        return generate_latest(self.registry)
