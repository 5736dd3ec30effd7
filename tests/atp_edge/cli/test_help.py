"""What a user sees before any work: help, version, completion, and how much is imported for it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from atp_edge.cli.doctor import Finding, diagnose, next_step
from atp_edge.cli.flags import SHOWN, all_settings
from atp_edge.settings import keys

MAIN = "import sys; sys.argv[0] = 'atp-edge'; from atp_edge.cli import main; main()"
HEAVY = ("torch", "transformers", "peft", "accelerate", "onnx", "onnxruntime", "datasets", "numpy",
         "pandas", "pyarrow", "plotly", "huggingface_hub", "jinja2")  # fmt: skip


def shown(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", MAIN, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"COLUMNS": "80"} | environment,
    )
    return done.stdout


def test_the_help_of_run_has_the_ten_settings_that_matter_whole_at_80_columns() -> None:
    text = shown("run", "--help")
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert len(SHOWN) == 10
    for key in keys():
        assert (f"{key.flag} " in text) == (key.name in SHOWN), key.name
    for flag in ("--config", "--dry-run", "--require", "--help-all"):
        assert f"{flag} " in text


def test_help_all_has_every_setting_whole_at_80_columns() -> None:
    text = all_settings()
    assert max(map(len, text.splitlines())) <= 80
    for key in keys():
        assert key.flag in text
        assert f"({key.default})" in text
    assert shown("train", "--help-all") == text + "\n"


def test_the_version_is_the_package_s() -> None:
    from importlib.metadata import version

    assert shown("--version") == f"atp-edge {version('atp-edge')}\n"


def test_a_shell_completes_commands_and_flags() -> None:
    def completed(words: str, place: str) -> list[str]:
        return shown(_ATP_EDGE_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=place).split()

    assert completed("atp-edge re", "1") == ["report"]
    assert completed("atp-edge run --bud", "2") == ["--budget"]
    assert completed("atp-edge export --precision int", "3") == ["int8", "int4"]
    assert completed("atp-edge export --format ", "3") == ["onnx", "gguf"]
    assert completed("atp-edge run --export-precision bf", "3") == ["bf16"]
    assert completed("atp-edge run --train-precision bf", "3") == ["bf16"]


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["bench", "--help"], ["run", "--config", "no.toml"],
     ["generate", "--help"], ["run", "--require", "recovery"]],
    ids=" ".join,
)  # fmt: skip
def test_a_command_answers_without_what_only_its_work_needs(arguments: list[str]) -> None:
    """Counted in modules, not seconds: torch and transformers alone take three of them. What torch
    reads when it is imported stands by then."""
    code = f"""
import os, sys
sys.argv = ["atp-edge", *{arguments!r}]
from atp_edge.cli import main
try:
    main()
except SystemExit:
    pass
print("read by torch:", os.environ["GOMP_SPINCOUNT"], os.environ["THP_MEM_ALLOC_ENABLE"])
print("imported:", *(name for name in {HEAVY!r} if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    read, imported = done.stdout.splitlines()[-2:]
    assert imported.strip() == "imported:"
    defaults = {"GOMP_SPINCOUNT": "10000", "THP_MEM_ALLOC_ENABLE": "1"}
    assert read.split()[-2:] == [os.environ.get(*default) for default in defaults.items()]


def test_doctor_promises_no_gpu_where_there_is_none() -> None:
    found = {finding.name: finding for finding in diagnose()}
    if not torch.cuda.is_available():
        assert found["CUDA"].status == "degraded"
        assert "CUDA" not in found["ONNX Runtime"].found
    assert "CPU" in found["ONNX Runtime"].found


def test_doctor_ends_with_the_next_step() -> None:
    fine = Finding("torch", "2.13", "ok")
    missing = Finding("demo", "no gguf", "missing", "pip install '.[demo]'")
    assert next_step([fine, missing]) == "next, for demo: pip install '.[demo]'"
    assert next_step([fine]).startswith("next: atp-edge run --model MODEL")
