"""The container files as documents: what can be checked of them where nothing can be built."""

import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.dockerfile import DOCKERFILE, health_check, lineage, stages

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())


@pytest.mark.parametrize("target", ["cpu", "cuda"])
class TestImage:
    def test_it_runs_without_privileges_and_says_how_it_is(self, target: str) -> None:
        instructions = dict(lineage(target))
        assert instructions["USER"] == "exeunt"
        assert "/health" in instructions["HEALTHCHECK"]
        assert instructions["STOPSIGNAL"] == "SIGTERM"
        # The exec form: a shell in between would not pass the signal on.
        assert instructions["ENTRYPOINT"] == '["exeunt"]'
        assert instructions["CMD"] == '["serve"]'
        assert instructions["VOLUME"] == "/var/cache/exeunt"

    def test_nothing_comes_from_the_network_at_run_time(self, target: str) -> None:
        environment = " ".join(value for word, value in lineage(target) if word == "ENV")
        assert "HF_HUB_OFFLINE=1" in environment
        assert "XDG_CACHE_HOME=/var/cache/exeunt" in environment

    def test_only_the_virtual_environment_reaches_the_image(self, target: str) -> None:
        copies = [rest for word, rest in lineage(target) if word == "COPY"]
        assert copies == [f"--from=build-{target} /opt/exeunt /opt/exeunt"]

    def test_the_build_copies_everything_that_the_wheel_is_made_of(self, target: str) -> None:
        copied = {
            source
            for word, rest in lineage(f"build-{target}")
            if word == "COPY"
            for source in shlex.split(rest)[:-1]
        }
        settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
        folders = set(settings["tool"]["setuptools"]["package-dir"].values())
        files = {"pyproject.toml", settings["project"]["readme"], *settings["project"]["license-files"]}
        assert copied == folders | files | {"constraints.txt"}
        assert all((ROOT / source).exists() for source in copied - {"README.md"})
        ignored = (ROOT / ".dockerignore").read_text().splitlines()
        assert all(f"!{source}" in ignored or f"!{source}/" in ignored for source in copied)


def test_the_default_image_is_the_cpu_one() -> None:
    assert list(stages())[-1] == "cpu"


def test_the_health_check_is_run_as_the_image_has_it() -> None:
    """What it says of a server is in test_serve.py."""
    assert health_check()[:2] == ["python", "-c"]  # no curl, no shell: the image has neither for certain


class TestCompose:
    def test_the_three_services_are_provisioned_and_checked(self) -> None:
        services = COMPOSE["services"]
        assert set(services) == {"server", "prometheus", "grafana"}
        assert all("healthcheck" in services[name] for name in ("prometheus", "grafana"))
        assert "HEALTHCHECK" in DOCKERFILE  # the server's own
        assert all(":latest" not in service["image"] for service in services.values())

    def test_what_it_mounts_is_there_and_what_is_written_is_kept(self) -> None:
        for name, service in COMPOSE["services"].items():
            for mount in service["volumes"]:
                source = mount.split(":")[0]
                if source.startswith("."):
                    assert (DEPLOY / source).is_dir(), mount
                    assert mount.endswith(":ro"), mount
                else:
                    assert source in COMPOSE["volumes"], f"{name}: {mount}"

    def test_the_build_is_told_where_pytorch_without_cuda_is(self) -> None:
        build = COMPOSE["services"]["server"]["build"]
        assert build["args"] == {"TORCH_INDEX": None}, "as the environment has it"
        declared = [rest for word, rest in lineage(f"build-{build['target']}") if word == "ARG"]
        assert declared == ["TORCH_INDEX="]
        install = next(rest for word, rest in lineage("build-cpu") if word == "RUN" and "torch==" in rest)
        assert '${TORCH_INDEX:+--index-url "$TORCH_INDEX"' in install
        assert "TORCH_INDEX" in (ROOT / "docs" / "operating.md").read_text()

    def test_it_holds_no_secrets_and_is_bound_to_this_machine(self) -> None:
        for service in COMPOSE["services"].values():
            for name, value in service.get("environment", {}).items():
                if re.search(r"KEY|PASSWORD|SECRET|TOKEN|USER", name):
                    assert value is None, f"{name} has a default; it must come from the environment"
            assert all(port.startswith("127.0.0.1:") for port in service["ports"])
            assert service["cap_drop"] == ["ALL"]

    def test_prometheus_scrapes_the_server_and_grafana_asks_prometheus(self) -> None:
        config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
        targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
        assert targets["exeunt"] == ["server:8000"]
        assert config["rule_files"] == ["alerts.yml"]
        source = yaml.safe_load(
            (DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yaml").read_text()
        )["datasources"][0]
        assert source["url"] == "http://prometheus:9090"
        assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]

    def test_grafana_finds_its_dashboard(self) -> None:
        provider = yaml.safe_load(
            (DEPLOY / "grafana" / "provisioning" / "dashboards" / "exeunt.yaml").read_text()
        )["providers"][0]
        grafana = COMPOSE["services"]["grafana"]
        mounts = dict(mount.split(":")[:2] for mount in grafana["volumes"])
        folder = next(source for source, inside in mounts.items() if inside == provider["options"]["path"])
        home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
        assert (DEPLOY / folder / Path(home).name).is_file()

    def test_the_drain_has_time_before_the_kill(self) -> None:
        from exeunt.server.settings import Settings

        grace = COMPOSE["services"]["server"]["stop_grace_period"]
        assert int(grace.removesuffix("s")) > Settings.model_fields["shutdown_timeout"].default

    def test_the_settings_it_passes_exist(self) -> None:
        from exeunt.server.settings import ENV_PREFIX, Settings

        names = [name for name in COMPOSE["services"]["server"]["environment"] if name.startswith(ENV_PREFIX)]
        assert names
        assert {name.removeprefix(ENV_PREFIX).lower() for name in names} <= set(Settings.model_fields)

    def test_docker_compose_is_content(self) -> None:
        binary = shutil.which("docker")
        if (
            binary is None
            or subprocess.run([binary, "compose", "version"], capture_output=True, check=False).returncode
        ):
            pytest.skip("needs docker with the compose plugin, to check compose.yaml by docker itself")
        for files in (["compose.yaml"], ["compose.yaml", "compose.cuda.yaml"]):
            chosen = [part for file in files for part in ("-f", str(DEPLOY / file))]
            result = subprocess.run(
                [binary, "compose", *chosen, "config", "--quiet"], capture_output=True, text=True, check=False
            )
            assert result.returncode == 0, result.stderr
