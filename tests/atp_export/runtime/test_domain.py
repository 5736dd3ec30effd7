"""The profile of a domain: what it knows, what it calls outside, and files that are none."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from atp_export.runtime.domain import (
    BITS,
    DomainProfile,
    profile_bits,
    read_profile,
    write_profile,
)

EXAMPLES = Path(__file__).parents[3] / "examples" / "onnx"
DOCUMENTS = [[1, 2, 3, 4], [2, 3, 4, 5], [9, 8]]


def profile(**thresholds: float) -> DomainProfile:
    return DomainProfile(
        bits=profile_bits(DOCUMENTS), thresholds={int(k[1:]): v for k, v in thresholds.items()}
    )


def test_a_pair_is_known_that_two_documents_have() -> None:
    known = profile()
    assert known.score([2, 3, 4]) == 0.0
    assert known.score([1, 2, 3]) == 0.5, "(1, 2) is of one document alone"
    assert known.score([9, 8]) == 1.0
    assert known.score([4]) == known.score([]) == 0.0
    assert int(np.unpackbits(known.bits).sum()) == 2


def test_a_prompt_is_judged_by_the_longest_threshold_that_it_fills() -> None:
    known = profile(n2=0.9, n4=0.4)
    assert known.distance([7]).threshold is None
    assert not known.distance([7]).outside
    assert known.distance([7, 7]).outside
    assert known.distance([2, 3, 4, 9]).threshold == 0.4
    assert not known.distance([2, 3, 4, 9]).outside


Outside = Callable[[Path, Sequence[list[int]]], list[bool | None]]


def by_python(folder: Path, prompts: Sequence[list[int]]) -> list[bool | None]:
    spec = importlib.util.spec_from_file_location("example", EXAMPLES / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return [example.outside(folder, prompt) for prompt in prompts]


def by_node(folder: Path, prompts: Sequence[list[int]]) -> list[bool | None]:
    if shutil.which("node") is None:
        pytest.skip("node is not at hand")
    code = f"""
import {{ outside }} from {json.dumps(str(EXAMPLES / "outside.mjs"))};
const found = {json.dumps(prompts)}.map((ids) => outside({json.dumps(str(folder))}, ids) ?? null);
console.log(JSON.stringify(found));
"""
    done = subprocess.run(
        ["node", "--input-type=module", "-e", code], capture_output=True, text=True, check=True
    )
    found: list[bool | None] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("outside", [by_python, by_node])
def test_the_examples_say_the_same(tmp_path: Path, outside: Outside) -> None:
    (tmp_path / "onnx").mkdir()
    assert outside(tmp_path / "onnx", [[2, 3]]) == [None]
    known = profile(n2=0.4, n4=0.6)
    write_profile(known, tmp_path / "domain.npz")
    draw = np.random.default_rng(0)
    prompts = [draw.integers(1, 6, draw.integers(1, 8)).tolist() for _ in range(200)]
    prompts += [[49_151, 3, 2, 49_151]]
    distances = [known.distance(prompt) for prompt in prompts]
    wanted = [None if d.threshold is None else d.outside for d in distances]
    assert outside(tmp_path / "onnx", prompts) == wanted
    assert set(wanted) == {None, True, False}
    (tmp_path / "config.toml").touch()
    assert outside(tmp_path / "other", [[7, 7]]) == [None], "of the run's own onnx/ alone"


def test_a_written_profile_is_read_and_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "domain.npz"
    write_profile(profile(n8=0.25, n16=0.5), path)
    found = read_profile(path)
    assert found.thresholds == {8: 0.25, 16: 0.5}
    assert np.array_equal(found.bits, profile().bits)
    assert path.stat().st_size < BITS // 8
    before = path.read_bytes()
    write_profile(profile(n16=0.5, n8=0.25), path)
    assert path.read_bytes() == before, "the same bytes"
    for lengths, thresholds in (([8, 8], [0.2, 0.3]), ([8], [1.5]), ([8], [-0.1])):
        bits = np.zeros(BITS // 8, np.uint8)
        np.savez(tmp_path / "wrong.npz", bits=bits, lengths=lengths, thresholds=thresholds)
        with pytest.raises(ValueError, match=r"wrong\.npz is no profile .*(twice|between 0 and 1)"):
            read_profile(tmp_path / "wrong.npz")
    np.savez(tmp_path / "other.npz", bits=np.zeros(3, np.uint8))
    (tmp_path / "cut.npz").write_bytes(before[: len(before) // 2])
    (tmp_path / "text.npz").write_text("no")
    bits, one = np.zeros(BITS // 8, np.uint8), np.ones(1)
    odd = {
        "scalars": (np.array(8), np.array(0.5)), "texts": (np.array([8]), np.array(["a"])),
        "floats": (one, one), "table": (np.ones((1, 1), int), np.ones((1, 1))),
    }  # fmt: skip
    for name, (lengths, thresholds) in odd.items():
        np.savez(tmp_path / f"{name}.npz", bits=bits, lengths=lengths, thresholds=thresholds)
    np.save(tmp_path / "plain.npy", bits)
    (tmp_path / "plain.npy").rename(tmp_path / "plain.npz")
    for name in ("other.npz", "cut.npz", "text.npz", "plain.npz", *(f"{x}.npz" for x in odd)):
        with pytest.raises(ValueError, match=re.escape(name)):
            read_profile(tmp_path / name)
