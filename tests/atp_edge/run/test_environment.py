"""What a measurement ran on: comparable, and nothing that names a person or a machine."""

from __future__ import annotations

import getpass
import importlib.metadata
import json
import platform
from pathlib import Path

from atp_edge.run.environment import environment, version


def test_versions_are_those_installed_and_absent_packages_are_left_out() -> None:
    versions = environment()["versions"]
    assert versions["torch"] == importlib.metadata.version("torch")
    assert None not in versions.values()
    assert version("no-such-package-of-anyone") is None


def test_the_machine_is_described_as_json_without_names_or_paths() -> None:
    found = environment()
    text = json.dumps(found)
    assert found["cpu"]
    assert found["cores"] >= 1
    assert found["memory_bytes"] > 2**28
    assert found["python"] == platform.python_version()
    assert str(Path.home()) not in text or str(Path.home()) == "/"
    assert f'"{platform.node()}"' not in text
    assert f'"{getpass.getuser()}"' not in text
