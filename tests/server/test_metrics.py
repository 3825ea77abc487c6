"""The metrics: their names, their labels, their arithmetic, and what promtool says of them."""

import shutil
import subprocess

import pytest
from prometheus_client.parser import text_string_to_metric_families

from exeunt.compression.variant import Variant
from exeunt.server.metrics import Metrics, new_registry
from exeunt.server.request import EmittedToken, ExitPolicy, FinishReason, GenerationRequest, SamplingParams

GAUGES = {
    *("num_requests_running", "num_requests_waiting", "rows_waiting", "kv_cache_usage_ratio"),
    *("exit_threshold", "resident_bytes", "ready", "build_info"),
}
COUNTERS = {
    *(
        "prompt_tokens",
        "generation_tokens",
        "exit_tokens",
        "blocks_executed",
        "blocks_skipped",
        "blocks_wasted",
    ),
    *(
        "block_passes",
        "drafts",
        "drafts_accepted",
        "token_nll",
        "audited_tokens",
        "audit_agreements",
        "audit_kl",
    ),
    *("audit_nll_full", "audit_nll_exit", "request_success", "request_failure", "admission_rejections"),
    *("compression_requests", "preemptions", "client_disconnects"),
}
HISTOGRAMS = {
    *("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"),
    *("request_queue_time_seconds", "step_duration_seconds", "step_batch_size", "request_prompt_tokens"),
    *("request_generation_tokens", "token_depth_ratio"),
}


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(new_registry(), "tiny", ["0", "1"], ["block_2"], [0.01, 0.05])


def value(metrics: Metrics, name: str, **labels: str) -> float:
    found = metrics.registry.get_sample_value(f"exeunt_{name}", {"model_name": "tiny", **labels})
    assert found is not None, f"no series {name} {labels}"
    return found


def token(depth: int, exit_name: str, logprob: float) -> EmittedToken:
    return EmittedToken(id=1, text="a", logprob=logprob, depth=depth, exit=exit_name)


def test_every_name_is_there_with_its_kind_from_the_start(metrics: Metrics) -> None:
    families = {
        family.name.removeprefix("exeunt_"): family
        for family in text_string_to_metric_families(metrics.exposition().decode())
        if family.name.startswith("exeunt_")
    }
    kinds = {
        kind: {name for name, family in families.items() if family.type == kind}
        for kind in ("gauge", "counter", "histogram")
    }
    assert kinds == {"gauge": GAUGES, "counter": COUNTERS, "histogram": HISTOGRAMS}
    for family in families.values():
        assert family.samples, f"{family.name} has no child yet"
        assert all(sample.labels["model_name"] == "tiny" for sample in family.samples)


def test_counters_end_in_total_and_nothing_is_called_created(metrics: Metrics) -> None:
    names = {
        line.split("{")[0] for line in metrics.exposition().decode().splitlines() if line[:7] == "exeunt_"
    }
    assert {f"exeunt_{name}_total" for name in COUNTERS} <= names
    assert not [name for name in names if name.endswith("_created")]


def test_process_figures_are_exported_too(metrics: Metrics) -> None:
    assert b"process_resident_memory_bytes" in metrics.exposition()


def test_a_token_counts_once_everywhere(metrics: Metrics) -> None:
    metrics.token("approximate", token(3, "block_2", -0.5), blocks=12, since_last_s=None)
    metrics.token("approximate", token(12, "final", -1.5), blocks=12, since_last_s=0.01)
    metrics.work(executed=15, skipped=9, passes=15)
    metrics.work(wasted=4, passes=2)
    assert value(metrics, "generation_tokens_total", mode="approximate") == 2
    assert value(metrics, "generation_tokens_total", mode="off") == 0
    assert value(metrics, "exit_tokens_total", exit="block_2", mode="approximate") == 1
    assert value(metrics, "exit_tokens_total", exit="final", mode="approximate") == 1
    assert value(metrics, "blocks_executed_total") == 15
    assert value(metrics, "blocks_skipped_total") == 9
    assert value(metrics, "blocks_wasted_total") == 4
    assert value(metrics, "block_passes_total") == 17
    assert value(metrics, "token_nll_total", mode="approximate") == pytest.approx(2.0)
    assert value(metrics, "token_depth_ratio_bucket", le="0.25") == 1
    assert value(metrics, "token_depth_ratio_count") == 2
    assert value(metrics, "inter_token_latency_seconds_count") == 1


def test_a_logprob_a_hair_above_zero_does_not_stop_the_count(metrics: Metrics) -> None:
    metrics.token("off", token(12, "final", 1e-9), blocks=12, since_last_s=None)
    assert value(metrics, "token_nll_total", mode="off") == 0


def test_requests_and_steps(metrics: Metrics) -> None:
    metrics.step(1, 0.002, rows=3)
    metrics.started(0.1, prompt_tokens=7)
    metrics.first_token(0.2)
    metrics.finished(tokens=5, total_s=0.4)
    metrics.succeeded(FinishReason.LENGTH)
    metrics.succeeded("scored")
    metrics.failed("internal")
    metrics.rejected("queue_full")
    metrics.preempted()
    metrics.client_disconnected()
    metrics.drafts(proposed=5, accepted=3)
    metrics.audit(True, 0.25, 1.0, 1.5)
    metrics.audit(False, 0.0, 2.0, 0.5)
    assert value(metrics, "step_batch_size_sum", stage="1") == 3
    assert value(metrics, "step_duration_seconds_count", stage="0") == 0
    assert value(metrics, "prompt_tokens_total") == 7
    assert value(metrics, "request_success_total", finish_reason="length") == 1
    assert value(metrics, "request_success_total", finish_reason="scored") == 1
    assert value(metrics, "request_generation_tokens_sum") == 5
    assert value(metrics, "request_failure_total", reason="internal") == 1
    assert value(metrics, "admission_rejections_total", reason="queue_full") == 1
    assert value(metrics, "preemptions_total") == value(metrics, "client_disconnects_total") == 1
    assert value(metrics, "drafts_total") - value(metrics, "drafts_accepted_total") == 2
    assert value(metrics, "audit_kl_total") == 0.25
    assert value(metrics, "audited_tokens_total") == 2
    assert value(metrics, "audit_agreements_total") == 1
    assert value(metrics, "audit_nll_full_total") == 3.0
    assert value(metrics, "audit_nll_exit_total") == 2.0


def test_gauges_say_what_is_true_now(metrics: Metrics) -> None:
    metrics.gauges(running=2, waiting=3, rows_waiting=[1, 4], kv_usage={"int4": 0.5})
    metrics.set_ready(True)
    metrics.resident_bytes({"int4": 5, "cuda_graphs": 7})
    metrics.exit_thresholds({0.05: 0.9, 0.01: None})
    assert value(metrics, "num_requests_running") == 2
    assert value(metrics, "rows_waiting", stage="1") == 4
    assert value(metrics, "kv_cache_usage_ratio", format="int4") == 0.5
    assert value(metrics, "kv_cache_usage_ratio", format="full") == 0
    assert value(metrics, "exit_threshold", target="0.05") == 0.9
    assert value(metrics, "exit_threshold", target="0.01") != value(metrics, "exit_threshold", target="0.01")
    assert value(metrics, "ready") == 1
    assert value(metrics, "resident_bytes", kind="cuda_graphs") == 7
    assert value(metrics, "resident_bytes", kind="full") == 0


def test_savings_of_a_request_are_counted_by_method(metrics: Metrics) -> None:
    request = GenerationRequest(
        "r", (1,), SamplingParams(), Variant(weights="int4", kv_cache="full"), ExitPolicy(mode="approximate")
    )
    metrics.compression_request(request)
    expected = {"weights": "true", "kv_cache": "false", "linear_block": "false", "early_exit": "true"}
    for method, enabled in expected.items():
        assert value(metrics, "compression_requests_total", method=method, enabled=enabled) == 1


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian: prometheus)")
def test_promtool_has_nothing_to_say(metrics: Metrics) -> None:
    result = subprocess.run(
        ["promtool", "check", "metrics"], input=metrics.exposition(), capture_output=True, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
