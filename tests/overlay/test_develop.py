# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The working environment, made with a made-up base and a real pip."""

import subprocess
import venv
from pathlib import Path

import pytest

from overlay.base import BaseError
from overlay.develop import develop
from tests.overlay.conftest import make_wheel

PROBE = """
from importlib.metadata import distributions, entry_points, version
import vllm, vllm.cli, vllm.replaced
ours = [d.name for d in distributions() if d.name.startswith("vllm")]
print(ours, version("vllm"), vllm.__version__, len(entry_points(group="made.up")))
print(vllm.cli.main(), vllm.replaced.NAME)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """A virtual environment with nothing but pip."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder, with_pip=True)
    return folder


def run(environment: Path, *command: str) -> str:
    """Run a command of the environment and return what it prints."""
    program = [str(environment / "bin" / command[0]), *command[1:]]
    return subprocess.run(program, check=True, capture_output=True, text=True).stdout


def test_an_environment_follows_the_checkout(environment, wheel, checkout):
    assert develop(environment, wheel, checkout.fork(wheel))
    distribution, code = run(environment, "python", "-c", PROBE).splitlines()
    version = "0.32.0+cpu.reload.1.0.0"
    assert distribution == f"['vllm'] {version} {version} 1"
    assert code == "fork fork"
    checkout.write("vllm/replaced.py", "NAME = 'newer'\n")
    assert run(environment, "python", "-c", PROBE).endswith("fork newer\n")
    assert not develop(environment, wheel, checkout.fork(wheel))


def test_a_release_installed_beside_it_goes(environment, wheel, checkout):
    develop(environment, wheel, checkout.fork(wheel))
    install = ["install", "-q", "--no-deps", "--no-index", str(wheel.path)]
    run(environment, "python", "-m", "pip", *install)
    assert develop(environment, wheel, checkout.fork(wheel))
    assert run(environment, "python", "-c", PROBE).startswith("['vllm'] ")
    # pip must not have written through the links.
    assert (checkout.root / "vllm/replaced.py").read_text() == "NAME = 'fork'\n"


def test_another_base_takes_the_place_of_the_first(
    environment, wheel, checkout, tmp_path
):
    develop(environment, wheel, checkout.fork(wheel))
    left = next(environment.glob("lib/*/site-packages/vllm")) / "left.py"
    left.write_text("")
    other = make_wheel(tmp_path / "other", "py3-none-any")
    assert develop(environment, other, checkout.fork(other))
    assert not left.exists()


def test_pip_can_uninstall_it(environment, wheel, checkout):
    develop(environment, wheel, checkout.fork(wheel))
    run(environment, "python", "-m", "pip", "uninstall", "-q", "-y", "vllm")
    assert not list(environment.glob("lib/*/site-packages/vllm/**/*.py"))
    assert (checkout.root / "vllm/replaced.py").is_file()


def test_a_folder_that_is_no_environment_is_named(wheel, checkout, tmp_path):
    with pytest.raises(BaseError, match="not a virtual environment"):
        develop(tmp_path, wheel, checkout.fork(wheel))
