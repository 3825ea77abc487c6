"""The rules of the house: layers, packaging and pins. See docs/architecture.md and docs/decisions.md."""

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LAYERS = ("kernels", "compression", "calibration", "server", "deploy")
MAY_IMPORT = {
    "kernels": {"kernels"},
    "compression": {"kernels", "compression"},
    "calibration": {"kernels", "compression", "calibration"},
    "server": {"kernels", "compression", "server"},
    "deploy": set(LAYERS),
}
# Packages whose types and errors a declared dependency hands out: they come and go with it.
PARTS = {
    "starlette": "fastapi",
    "click": "typer",
    "h11": "uvicorn",
    "pydantic_core": "pydantic",
    "huggingface_hub": "transformers",
    "tokenizers": "transformers",
    "markupsafe": "jinja2",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def _sources(layer: str) -> list[Path]:
    return [path for path in sorted((ROOT / layer).rglob("*.py")) if "__pycache__" not in path.parts]


def _regular_packages() -> set[str]:
    """Every folder of the layers that has an __init__.py, as a module name."""
    folders = {path.parent for layer in LAYERS for path in _sources(layer) if path.name == "__init__.py"}
    return {"exeunt." + ".".join(folder.relative_to(ROOT).parts) for folder in folders}


def _modules_without_torch() -> list[str]:
    """The modules whose docstrings say that they know no torch."""
    sources = [path for layer in LAYERS for path in _sources(layer)]
    return [
        "exeunt." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sources
        if "no torch" in (ast.get_docstring(ast.parse(path.read_text())) or "").lower()
    ]


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of everything a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            if module == "exeunt":  # from exeunt import server
                yield from ((node.lineno, f"exeunt.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


class TestLayers:
    @pytest.mark.parametrize("layer", LAYERS)
    def test_imports_go_downwards_only(self, layer: str) -> None:
        sources = _sources(layer)
        assert sources
        wrong = []
        for path in sources:
            for line, module in _imports(path):
                parts = module.split(".")
                if module.startswith(".") or parts[0] in LAYERS:
                    wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}: write exeunt.<layer>...")
                elif parts[0] == "exeunt" and parts[1] not in MAY_IMPORT[layer]:
                    wrong.append(f"{path.relative_to(ROOT)}:{line}: {layer} may not import {module}")
        assert not wrong, "\n".join(wrong)

    def test_planning_needs_no_tensors(self) -> None:
        """Not even through what it imports: a plan that could touch a tensor would sooner or later."""
        modules = _modules_without_torch()
        assert {f"exeunt.server.{name}" for name in ("scheduler", "pages", "sequence", "metrics")} <= set(
            modules
        )
        code = (
            "import importlib, sys\n"
            "for name in sys.argv[1:]:\n"
            "    importlib.import_module(name)\n"
            "    if 'torch' in sys.modules: sys.exit(name)"
        )
        command = [sys.executable, "-c", code, *modules]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"torch, or a fault, comes in with {result.stderr}"

    def test_the_command_line_starts_without_tensors(self) -> None:
        """`exeunt --help` answers at once."""
        code = "import sys, exeunt.deploy.cli; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestPackaging:
    def test_no_top_folder_is_a_regular_package(self) -> None:
        """`kernels` and `compression` are names that transformers and Python look for: see docs/decisions.md."""
        assert not list(ROOT.glob("*/__init__.py"))
        assert not (ROOT / "__init__.py").exists()

    def test_transformers_works_from_the_repository_root(self) -> None:
        code = (
            "import torch; from transformers import LlamaConfig, LlamaForCausalLM;"
            "config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,"
            " num_attention_heads=1, num_key_value_heads=1);"
            "model = LlamaForCausalLM(config);"
            "assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, 8)"
        )
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr

    def test_every_package_is_listed(self) -> None:
        listed = set(PROJECT["tool"]["setuptools"]["packages"])
        assert listed == _regular_packages() | {f"exeunt.{layer}" for layer in LAYERS}
        assert PROJECT["tool"]["setuptools"]["package-dir"] == {f"exeunt.{layer}": layer for layer in LAYERS}

    def test_the_wheel_holds_all_of_exeunt_and_nothing_else(self, tmp_path: Path) -> None:
        pytest.importorskip("setuptools", minversion="77")
        source = tmp_path / "source"  # a copy, so that the build leaves nothing behind
        skip = shutil.ignore_patterns("__pycache__", "*.pyc")
        for layer in LAYERS:
            shutil.copytree(ROOT / layer, source / layer, ignore=skip)
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source)
        command = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        command += ["--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        (wheel,) = tmp_path.glob("*.whl")
        held = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
        info = f"exeunt-{PROJECT['project']['version']}.dist-info/"
        code = {name for name in held if not name.startswith(info)}
        assert code == self._expected()
        assert {f"{info}entry_points.txt", f"{info}licenses/LICENSE"} <= held

    @staticmethod
    def _expected() -> set[str]:
        """Every source, and every file of a regular package: that is where data files live."""
        files = {path for layer in LAYERS for path in _sources(layer)}
        for package in _regular_packages():
            folder = ROOT.joinpath(*package.split(".")[1:])
            files |= {
                path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
            }
        return {f"exeunt/{path.relative_to(ROOT).as_posix()}" for path in files}


class TestDependencies:
    @staticmethod
    def _direct() -> list[Requirement]:
        project = PROJECT["project"]
        extras = [text for texts in project["optional-dependencies"].values() for text in texts]
        return [Requirement(text) for text in [*project["dependencies"], *extras]]

    def test_every_direct_dependency_is_pinned_within_its_range(self) -> None:
        pins: dict[str, str] = {}
        for line in (ROOT / "constraints.txt").read_text().splitlines():
            if line.strip() and not line.startswith("#"):
                name, _, version = line.partition("==")
                assert version, f"constraints.txt: {line} is not a pin"
                pins[canonicalize_name(name)] = version.split(";")[0].strip()
        for requirement in self._direct():
            name = canonicalize_name(requirement.name)
            assert name in pins, f"{name} is not pinned in constraints.txt"
            assert requirement.specifier.contains(pins[name]), f"{name}=={pins[name]} breaks {requirement}"
        assert pins["torch"] == "2.13.0"

    def test_every_direct_dependency_has_its_reason(self) -> None:
        text = (ROOT / "docs" / "dependencies.md").read_text()
        missing = [requirement.name for requirement in self._direct() if f"`{requirement.name}`" not in text]
        assert not missing

    def test_every_import_is_of_a_direct_dependency(self) -> None:
        """What is imported is declared, by itself and not by way of another package."""
        declared = {canonicalize_name(requirement.name) for requirement in self._direct()}
        known = set(sys.stdlib_module_names) | {"exeunt"} | {name.replace("-", "_") for name in declared}
        known |= {part for part, whole in PARTS.items() if whole in declared}
        wrong = {
            f"{path.relative_to(ROOT)}:{line} imports {module}"
            for layer in LAYERS
            for path in _sources(layer)
            for line, module in _imports(path)
            if module.split(".")[0] not in known
        }
        assert not wrong
