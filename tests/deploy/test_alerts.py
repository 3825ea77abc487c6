"""The alert rules on synthetic series: each fires when it should, and none on a server that is well."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from exeunt.server.metrics import Metrics, new_registry
from tests.deploy.conftest import DEPLOY

RULES = DEPLOY / "prometheus" / "alerts.yml"
ALERTS = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
OPERATING = Path(__file__).parents[2] / "docs" / "operating.md"

_OWN = 'instance="a:1", job="exeunt", model_name="m"'


def _series(name: str, labels: str = "") -> str:
    return f"{name}{{{_OWN}{', ' + labels if labels else ''}}}"


def _rate(per_minute: float, minutes: int, start: float = 0) -> str:
    return f"{start}+{per_minute}x{minutes}"


DAY = 24 * 60
# What each alert fires on: series by minute, and the minute at which it must fire (and had not fired before).
FIRES: dict[str, tuple[dict[str, str], int]] = {
    "ExeuntDown": ({_series("up"): "1x4 0x20"}, 8),
    "ExeuntNotReady": ({_series("exeunt_ready"): "1x4 0x20"}, 11),
    "ExeuntInternalErrors": (
        {_series("exeunt_request_failure_total", 'reason="internal"'): "0x5 3x20"},
        7,
    ),
    "ExeuntTimeouts": (
        {
            _series("exeunt_request_failure_total", 'reason="timeout"'): "0x9 " + _rate(3, 40),
            _series("exeunt_request_success_total", 'finish_reason="timeout"'): "0x60",
            _series("exeunt_request_success_total", 'finish_reason="stop"'): _rate(60, 60),
        },
        45,
    ),
    "ExeuntQueueFull": (
        {_series("exeunt_admission_rejections_total", 'reason="queue_full"'): "0x4 " + _rate(30, 20)},
        12,
    ),
    "ExeuntQueueTimeHigh": (
        {
            _series("exeunt_request_queue_time_seconds_bucket", 'le="5.0"'): _rate(10, 40),
            _series("exeunt_request_queue_time_seconds_bucket", 'le="10.0"'): _rate(60, 40),
            _series("exeunt_request_queue_time_seconds_bucket", 'le="+Inf"'): _rate(60, 40),
        },
        20,
    ),
    "ExeuntTimeToFirstTokenHigh": (
        {
            _series("exeunt_time_to_first_token_seconds_bucket", 'le="10.0"'): _rate(10, 40),
            _series("exeunt_time_to_first_token_seconds_bucket", 'le="30.0"'): _rate(60, 40),
            _series("exeunt_time_to_first_token_seconds_bucket", 'le="+Inf"'): _rate(60, 40),
        },
        20,
    ),
    "ExeuntKVCacheShort": (
        {
            _series("exeunt_preemptions_total"): _rate(30, 40),
            _series("exeunt_kv_cache_usage_ratio", 'format="int4"'): "0.6x40",
            _series("exeunt_kv_cache_usage_ratio", 'format="full"'): "0.38x40",
        },
        20,
    ),
    "ExeuntAuditDisagreement": (
        {
            _series("exeunt_audited_tokens_total"): _rate(100, 120),
            _series("exeunt_audit_agreements_total"): _rate(80, 120),
        },
        90,
    ),
    "ExeuntPerplexityDrift": (
        {
            _series("exeunt_generation_tokens_total", 'mode="approximate"'): _rate(1000, DAY + 240),
            _series("exeunt_token_nll_total", 'mode="approximate"'): (
                f"{_rate(2000, DAY)} {_rate(3000, 240, 2000 * DAY)}"
            ),
        },
        DAY + 180,
    ),
    "ExeuntExitRateFell": (
        {
            _series("exeunt_generation_tokens_total", 'mode="approximate"'): _rate(1000, DAY + 240),
            _series("exeunt_exit_tokens_total", 'mode="approximate", exit="final"'): _rate(600, DAY + 240),
            _series("exeunt_exit_tokens_total", 'mode="approximate", exit="block_2"'): (
                f"{_rate(400, DAY)} {_rate(20, 240, 400 * DAY)}"
            ),
            # drafting less is the server's own choice, and no alert
            _series("exeunt_generation_tokens_total", 'mode="verified"'): _rate(1000, DAY + 240),
            _series("exeunt_exit_tokens_total", 'mode="verified", exit="lookup"'): (
                f"{_rate(400, DAY)} {_rate(0, 240, 400 * DAY)}"
            ),
        },
        DAY + 180,
    ),
}

# A busy server in good health, for two hours.
HEALTHY = {
    _series("up"): "1x120",
    _series("exeunt_ready"): "1x120",
    _series("exeunt_request_failure_total", 'reason="internal"'): "0x120",
    _series("exeunt_request_failure_total", 'reason="timeout"'): "0x120",
    _series("exeunt_request_success_total", 'finish_reason="timeout"'): "0x120",
    _series("exeunt_request_success_total", 'finish_reason="stop"'): _rate(60, 120),
    _series("exeunt_admission_rejections_total", 'reason="queue_full"'): "0x120",
    _series("exeunt_request_queue_time_seconds_bucket", 'le="5.0"'): _rate(60, 120),
    _series("exeunt_request_queue_time_seconds_bucket", 'le="+Inf"'): _rate(60, 120),
    _series("exeunt_time_to_first_token_seconds_bucket", 'le="10.0"'): _rate(60, 120),
    _series("exeunt_time_to_first_token_seconds_bucket", 'le="+Inf"'): _rate(60, 120),
    _series("exeunt_preemptions_total"): _rate(0, 120),
    _series("exeunt_kv_cache_usage_ratio", 'format="int4"'): "0.98x120",
    _series("exeunt_audited_tokens_total"): _rate(100, 120),
    _series("exeunt_audit_agreements_total"): _rate(97, 120),
    _series("exeunt_generation_tokens_total", 'mode="approximate"'): _rate(1000, 120),
    _series("exeunt_token_nll_total", 'mode="approximate"'): _rate(2000, 120),
    _series("exeunt_exit_tokens_total", 'mode="approximate", exit="block_2"'): _rate(400, 120),
}


def test_each_fires_on_its_own_trouble_and_none_on_a_healthy_server(tmp_path: Path) -> None:
    assert set(FIRES) == {alert["alert"] for alert in ALERTS}
    cases = [_case(name, series, minute) for name, (series, minute) in FIRES.items()]
    quiet = [{"eval_time": "115m", "alertname": name, "exp_alerts": []} for name in FIRES]
    cases.append({"interval": "1m", "input_series": _input(HEALTHY), "alert_rule_test": quiet})
    _promtool(tmp_path, cases)


def test_a_rule_test_can_fail(tmp_path: Path) -> None:
    """The check above is worth nothing if promtool is content with everything."""
    silent = {"eval_time": "115m", "alertname": "ExeuntDown", "exp_alerts": [_labels("ExeuntDown")]}
    with pytest.raises(pytest.fail.Exception, match="ExeuntDown"):
        _promtool(
            tmp_path, [{"interval": "1m", "input_series": _input(HEALTHY), "alert_rule_test": [silent]}]
        )


def _case(name: str, series: dict[str, str], minute: int) -> dict[str, Any]:
    return {
        "interval": "1m",
        "input_series": _input(series),
        "alert_rule_test": [
            {"eval_time": "1m", "alertname": name, "exp_alerts": []},
            {"eval_time": f"{minute}m", "alertname": name, "exp_alerts": [_labels(name)]},
        ],
    }


def _input(series: dict[str, str]) -> list[dict[str, str]]:
    return [{"series": name, "values": values} for name, values in series.items()]


_BY_MODE = {"ExeuntPerplexityDrift", "ExeuntExitRateFell"}
_AS_SCRAPED = {"ExeuntDown", "ExeuntNotReady"}


def _labels(name: str) -> dict[str, Any]:
    """The labels that the alert must carry: its own, and those that say where the trouble is."""
    own = next(alert["labels"] for alert in ALERTS if alert["alert"] == name)
    where = {"mode": "approximate"} if name in _BY_MODE else {"instance": "a:1"}
    if name in _AS_SCRAPED:
        where["job"] = "exeunt"
    return {"exp_labels": {**own, **where, "model_name": "m"}}


def _promtool(folder: Path, cases: list[dict[str, Any]]) -> None:
    binary = shutil.which("promtool")
    if binary is None:
        pytest.skip("needs promtool (Debian: apt-get install prometheus)")
    rules = yaml.safe_load(RULES.read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            rule.pop("annotations")  # their wording is not what is tested
    (folder / "rules.yml").write_text(yaml.safe_dump(rules))
    test = {"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": cases}
    (folder / "test.yml").write_text(json.dumps(test))
    result = subprocess.run(
        [binary, "test", "rules", "test.yml"], cwd=folder, capture_output=True, text=True, check=False
    )
    if result.returncode:
        pytest.fail(result.stdout + result.stderr)


@pytest.mark.parametrize("kind", ["rules", "config"])
def test_promtool_is_content(kind: str) -> None:
    binary = shutil.which("promtool")
    if binary is None:
        pytest.skip("needs promtool (Debian: apt-get install prometheus)")
    file = RULES if kind == "rules" else RULES.with_name("prometheus.yml")
    result = subprocess.run([binary, "check", kind, str(file)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_metric_they_ask_for_exists() -> None:
    exposition = Metrics(new_registry(), "m", ["0"], ["block_1"], [0.05]).exposition().decode()
    exported = {line.split("{")[0].split(" ")[0] for line in exposition.splitlines() if line[:1] != "#"}
    for alert in ALERTS:
        asked = set(re.findall(r"exeunt_[a-z0-9_]+", alert["expr"]))
        assert asked <= exported, alert["alert"]


def test_the_operating_guide_says_what_to_do_about_each() -> None:
    text = OPERATING.read_text()
    assert [alert["alert"] for alert in ALERTS if f"`{alert['alert']}`" not in text] == []


def test_the_operating_guide_lists_every_metric() -> None:
    text = OPERATING.read_text()
    exposition = Metrics(new_registry(), "m", ["0"], ["block_1"], [0.05]).exposition().decode()
    families = [line.split(" ")[2] for line in exposition.splitlines() if line.startswith("# TYPE exeunt_")]
    assert families
    assert [name for name in families if f"`{name}`" not in text] == []
