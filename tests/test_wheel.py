"""The wheel carries recipes, their data, accelerate configs and templates, and works from an empty folder."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next(folder.glob("medibot-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The wheel in a fresh environment; what it depends on is found in this one, behind it."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip()
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "medibot"


def test_wheel_holds_what_the_clone_holds(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, pattern in (
        ("recipes", "*.yaml"),
        ("recipes/data", "*"),
        ("accelerate_configs", "*.yaml"),
        ("benchmarks/tasks", "*"),
    ):
        files = [file for file in (ROOT / folder).glob(pattern) if file.is_file()]
        assert files and {f"medibot/{file.relative_to(ROOT)}" for file in files} <= names
    for file in [*(ROOT / "medibot").rglob("*.py"), *(ROOT / "medibot" / "templates").glob("*.j2")]:
        assert str(file.relative_to(ROOT)) in names


def test_verbs_work_from_an_empty_folder(installed, make_model, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "MEDIBOT_CACHE"}}
    weights = f"model.pretrained_model_name_or_path={make_model('smollm2')}"
    said = {}
    for command in (["list"], ["validate"], ["plan", "quickstart", weights], ["inspect", "quickstart", weights]):
        empty = tmp_path / command[0]
        empty.mkdir()
        done = subprocess.run([installed, *command], cwd=empty, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)
        said[command[0]] = done.stdout
    assert "quickstart" in said["list"] and "medquad-qlora: good" in said["validate"]
    assert "micro-batch" in said["plan"] and "Loss mask" in said["inspect"]


def test_recipes_and_configs_of_the_current_folder_come_first(installed, tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "quickstart.yaml").write_text("# Mine.\nmodel: {}\n")
    done = subprocess.run([installed, "list"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "Mine." in done.stdout
