"""The dashboard against a real Prometheus on a real server, and as a document."""

import json
import math
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import yaml

from exeunt.server.metrics import Metrics, new_registry
from tests.deploy.conftest import DEPLOY, Prometheus, running_prometheus
from tests.deploy.server_process import ServerProcess, byte_bundle, serving

DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "exeunt.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
GRAFANA = {"$__rate_interval": "30s", "$model": ".*", "$instance": ".*"}  # what Grafana puts in
MAY_BE_NAN = {"Exit thresholds"}  # where a target is not certified


def _expressions() -> list[tuple[str, str]]:
    return [(panel["title"], target["expr"]) for panel in PANELS for target in panel.get("targets", ())]


def _substituted(expression: str) -> str:
    for name, value in GRAFANA.items():
        expression = expression.replace(name, value)
    return expression


# Every mode and saving at once, so that ratios are defined; thresholds at which some tokens leave and some stay.
LOOP = "ab abc ab abc ab abc "  # what is looked up in it is right at times
REQUESTS: tuple[dict[str, Any], ...] = (
    {"prompt": LOOP, "max_new_tokens": 64},
    {"compression": {"early_exit": {"mode": "approximate", "threshold": 0.0, "skipped_kv": "propagate"}}},
    {"compression": {"early_exit": {"mode": "approximate", "threshold": 0.3}}},
    {"compression": {"early_exit": {"mode": "approximate", "threshold": 0.0}, "linear_block": True}},
    {"compression": {"weights": "full", "kv_cache": "full", "early_exit": False}, "n": 2},
)


@contextmanager
def _load(server: ServerProcess) -> Iterator[None]:
    """Keeps a server busy."""
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            for request in REQUESTS:
                body = {"prompt": "It was a dark night", "max_new_tokens": 16, "ignore_eos": True, **request}
                server.generate(**body)

    thread = threading.Thread(target=ask)
    thread.start()
    yield
    done.set()
    thread.join()


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("dashboard")
    bundle = str(byte_bundle(folder / "bundle"))
    with serving(bundle, "--audit-share", "0.5", log=folder / "serve.log") as server:
        target = str(server.client.base_url).removeprefix("http://").strip("/")
        with running_prometheus(target, folder) as found, _load(server):
            yield found


def _empty(prometheus: Prometheus) -> list[str]:
    """The expressions of the dashboard that have nothing to show, with what they returned."""
    empty = []
    for title, expression in _expressions():
        values = [float(series["value"][1]) for series in prometheus.query(_substituted(expression))]
        if not values or (not any(map(math.isfinite, values)) and title not in MAY_BE_NAN):
            empty.append(f"{title}: {_substituted(expression)} -> {values}")
    return empty


def test_every_expression_returns_data(prometheus: Prometheus) -> None:
    deadline = time.monotonic() + 60  # rates need a few scrapes of a server at work
    while (empty := _empty(prometheus)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not empty, "\n".join(empty)


def test_every_alert_is_loaded_and_evaluates(prometheus: Prometheus) -> None:
    written = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
    names = {rule["alert"] for group in written["groups"] for rule in group["rules"]}
    deadline = time.monotonic() + 20
    while any(rule["health"] == "unknown" for rule in prometheus.rules()) and time.monotonic() < deadline:
        time.sleep(0.2)
    loaded = prometheus.rules()
    assert {rule["name"] for rule in loaded} == names
    assert [rule for rule in loaded if rule["health"] != "ok"] == []
    for rule in loaded:
        prometheus.query(rule["query"])


def test_nothing_is_wrong_with_a_healthy_server(prometheus: Prometheus) -> None:
    assert [rule["name"] for rule in prometheus.rules() if rule["state"] == "firing"] == []


class TestDocument:
    def test_it_shows_what_it_promises(self) -> None:
        titles = {panel["title"] for panel in PANELS}
        assert titles >= {
            *(
                "Exit rate by mode",
                "Tokens by exit",
                "Depth distribution",
                "Compute saved",
                "Perplexity by mode",
            ),
            *("Draft acceptance", "Audited agreement", "Passes saved", "Drafts", "Audits"),
            *("Tokens per second", "Time to first token", "Inter-token latency", "Request latency"),
            *("Requests", "KV cache use", "Preemptions", "Failures and refusals"),
        }

    def test_every_metric_it_asks_for_exists(self) -> None:
        exposition = Metrics(new_registry(), "m", ["0"], ["block_1"], [0.05]).exposition().decode()
        exported = {line.split("{")[0].split(" ")[0] for line in exposition.splitlines() if line[:1] != "#"}
        asked = {
            name for _, text in _expressions() for name in re.findall(r"(?:exeunt|process)_[a-z0-9_]+", text)
        }
        assert asked
        assert asked <= exported
        own = {
            re.sub(r"_(bucket|sum|count|created)$", "", name) for name in exported if name[:7] == "exeunt_"
        }
        shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked}
        assert own - shown <= {"exeunt_build_info"}, "a metric without a panel"

    def test_every_panel_is_explained_and_in_its_place(self) -> None:
        shown = [panel for panel in PANELS if panel["type"] != "row"]
        assert all(panel["description"] and panel["title"] for panel in shown)
        assert len({panel["id"] for panel in PANELS}) == len(PANELS)
        cells: set[tuple[int, int]] = set()
        for panel in PANELS:
            at = panel["gridPos"]
            own = {
                (x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
            }
            assert max(x for x, _ in own) < 24, panel["title"]
            assert not own & cells, f"{panel['title']} lies on another panel"
            cells |= own

    def test_every_query_goes_to_the_provisioned_source_and_obeys_the_variables(self) -> None:
        sources = yaml.safe_load(
            (DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yaml").read_text()
        )["datasources"]
        variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
        assert variables["datasource"]["current"]["value"] == sources[0]["uid"]
        assert set(variables) == {"datasource", "model", "instance"}
        for panel in PANELS:
            for target in panel.get("targets", ()):
                assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
                assert "$instance" in target["expr"], f"{panel['title']} mixes all instances"
