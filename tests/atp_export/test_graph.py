"""The graph's corners: layers that are gone, odd widths, asked-for logits, memory, bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from atp_export import export
from atp_export.export import export_onnx
from atp_export.runtime import Generation, Session, generate_tokens, perplexity
from atp_export.runtime.logits_from import with_input
from atp_export.verification.first_divergence import first_divergence
from atp_export.verification.verify import verify
from onnx import TensorProto, helper

from atp_edge.data.blocks import Blocks
from atp_edge.evaluation.text_loss import perplexity as torch_perplexity
from atp_edge.model.checkpoint import save_narrow
from atp_edge.model.families import model_shape
from atp_edge.model.narrow import narrow_model
from atp_edge.model.plan import plan_of
from tests.atp_export.test_onnx import PROMPTS, Numbers, exported
from tests.tiny import tiny_model

FLAVOURS = ["ort", "standard", "portable"]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_layer_without_attention_or_mlp_passes_the_residual(
    tmp_path: Path, flavour: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = tiny_model("llama")
    layers = list(model_shape(model.config).layers)
    # Gone in the shape; in the model, an attention or MLP that adds nothing.
    for i, attention, mlp in ((0, True, False), (1, False, True), (2, False, False)):
        if not attention:
            torch.nn.init.zeros_(model.model.layers[i].self_attn.o_proj.weight)
            layers[i] = replace(layers[i], heads=0, kv_heads=0)
        if not mlp:
            torch.nn.init.zeros_(model.model.layers[i].mlp.down_proj.weight)
            layers[i] = replace(layers[i], channels=0)
    shape = replace(model_shape(model.config), layers=tuple(layers))
    monkeypatch.setattr(export, "model_shape", lambda config: shape)
    folder = exported(tmp_path, model, flavour=flavour)
    assert verify(folder, model, Numbers(), PROMPTS, new_tokens=8).passed
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    caches = [i.name for i in graph.input if i.name.startswith("past_key_values.")]
    assert caches == ["past_key_values.0.key", "past_key_values.0.value"]
    described = json.loads((folder / "genai_config.json").read_text())
    assert described["model"]["decoder"]["num_hidden_layers"] == 1


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("tied", [True, False])
def test_widths_that_no_block_divides(
    tmp_path: Path, flavour: str, precision: str, tied: bool
) -> None:
    model = tiny_model("llama", tied=tied, hidden_size=84, intermediate_size=37)
    folder = exported(tmp_path, model, flavour=flavour, precision=precision)
    report = verify(folder, model, Numbers(), PROMPTS, new_tokens=4, precision=precision)
    assert report.passed, report.failures
    assert report.logits_relative_error > 0


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_tied_embeddings_share_the_heads_blocks(
    tmp_path: Path, flavour: str, precision: str
) -> None:
    model = tiny_model("llama", tied=True, hidden_size=96, vocab_size=512)
    folder = exported(tmp_path, model, precision=precision, flavour=flavour)
    assert verify(folder, model, Numbers(), PROMPTS, new_tokens=4, precision=precision).passed
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    of_vocabulary = ("lm_head", "embed", "model.embed_tokens")
    places = [
        {entry.key: entry.value for entry in tensor.external_data}
        for tensor in graph.initializer
        if tensor.name.startswith(of_vocabulary) and tensor.external_data
    ]
    stored = {place["offset"]: int(place["length"]) for place in places}
    # A scale of four bytes for every 32 levels.
    expected = {"fp16": 512 * 96 * 2, "int8": 512 * (96 + 12), "int4": 512 * (48 + 12)}
    assert sum(stored.values()) == expected[precision]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_logits_start_where_they_are_asked_to(tmp_path: Path, flavour: str) -> None:
    session = Session(exported(tmp_path, tiny_model("qwen2"), flavour=flavour))
    ids = np.array([[1, 2, 3, 4, 5]])
    every = Generation(session, 1, 5).step(ids)
    last = Generation(session, 1, 5).step(ids, last_only=True)
    assert last.shape == (1, 1, 97)
    np.testing.assert_allclose(last[0, 0], every[0, -1], atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "int4"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_shipped_file_loads_without_a_warning(
    tmp_path: Path, flavour: str, precision: str
) -> None:
    """In a fresh process of plain ONNX Runtime, whose log goes to stderr at level WARNING."""
    folder = exported(tmp_path, tiny_model("llama"), flavour=flavour, precision=precision)
    lines = "import sys, onnxruntime as o; s = o.InferenceSession(sys.argv[1], providers="
    lines += "['CPUExecutionProvider']); print(len(s.get_overridable_initializers()))"
    done = subprocess.run(
        [sys.executable, "-c", lines, str(folder / "model.onnx")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["0"]
    assert "[W:" not in done.stderr


def test_the_input_that_our_runtime_declares_is_onnx(tmp_path: Path) -> None:
    path = exported(tmp_path, tiny_model("llama")) / "model.onnx"
    expected = onnx.load(path, load_external_data=False)
    expected.graph.input.append(
        helper.make_tensor_value_info("logits_from", TensorProto.INT64, [1])
    )
    assert onnx.load_from_string(with_input(path.read_bytes())) == expected
    assert with_input(b"another exporter's") == b"another exporter's"


def test_perplexity_is_what_torch_says(tmp_path: Path) -> None:
    model = tiny_model("llama")
    ids = torch.randint(0, 97, (3, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :4] = -100
    session = Session(exported(tmp_path, model))
    blocks = Blocks(input_ids=ids, labels=labels)
    ours = perplexity(session, ids.numpy(), labels.numpy())
    assert ours == pytest.approx(torch_perplexity(model, blocks), rel=1e-5)


@pytest.mark.parametrize(
    ("tensor", "named"),
    [
        ("model.embed_tokens.weight", "the embedding"),
        ("model.layers.1.self_attn.o_proj.weight", "layer 1"),
        ("model.norm.weight", "layer 2 or the final norm"),
        ("lm_head.weight", "the vocabulary head"),
    ],
)
@pytest.mark.parametrize("flavour", ["ort", "standard"])
def test_the_first_layer_that_departs_is_named(
    tmp_path: Path, tensor: str, named: str, flavour: str
) -> None:
    folder = exported(tmp_path, tiny_model("llama"), flavour=flavour)
    changed = tiny_model("llama")
    with torch.no_grad():
        changed.get_parameter(tensor).mul_(1.5)
    said = first_divergence(folder, changed, [1, 2, 3], provider="CPUExecutionProvider", bound=1e-4)
    assert named in said
    report = verify(folder, changed, Numbers(), PROMPTS, new_tokens=4)
    assert not report.passed
    assert report.departs in report.failures


_PREFILLS = """
import resource, sys
from pathlib import Path
import numpy as np
from atp_export.runtime import Generation, Session
session = Session(Path(sys.argv[1]), threads=1)
ids = np.random.default_rng(0).integers(0, 97, (1, 512))
for _ in range(3):
    state = Generation(session, 1, 520)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    state.step(ids, last_only=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_a_later_prefill_takes_no_further_memory(tmp_path: Path) -> None:
    """Widths that differ by layer, 512 tokens: the first prefill's memory serves the others, so
    that a first token waits for no page of the system's. Counted in pages, not in time, and in a
    process of its own, which has no page left over from other tests."""
    resource = pytest.importorskip("resource", reason="page faults are counted on Unix only")
    dense = tiny_model("llama", intermediate_size=3072, num_hidden_layers=6, hidden_size=96,
                       max_position_embeddings=1024)  # fmt: skip
    shape = model_shape(dense.config)
    widths = (3072, 1024, 2048, 512, 2560, 1536)
    kept = [range(n) for width in widths for n in (shape.layers[0].kv_heads, width)]
    slim = narrow_model(dense, plan_of(shape, [tuple(k) for k in kept]))
    pages = [int(n) for n in _printed(_PREFILLS, exported(tmp_path, slim))]
    widest = 512 * max(widths) * 4 / resource.getpagesize()
    assert pages[0] > widest
    assert max(pages[1:]) < widest / 4


def _printed(code: str, *arguments: Path | str) -> list[str]:
    """The words that this code prints in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()


_EXPORT = """
import sys
from pathlib import Path
from atp_bench.engines.memory import peak_rss_bytes
from atp_export.export import export_onnx
small, big, out, precision = sys.argv[1:]
export_onnx(Path(small), Path(out) / "small", precision=precision)
before = peak_rss_bytes()
export_onnx(Path(big), Path(out) / "big", precision=precision)
print(before, peak_rss_bytes())
"""


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_exporting_needs_little_more_memory_than_the_largest_tensors(
    tmp_path: Path, precision: str
) -> None:
    """270 MB of weights in a fresh process: the file is streamed, and the reader maps its own, so
    the peak over that of a small export stays below 1.3 times the weights."""
    save_narrow(tiny_model("llama"), None, tmp_path / "small")
    model = tiny_model(
        "llama", hidden_size=768, intermediate_size=4096, num_hidden_layers=6, vocab_size=8192
    )
    save_narrow(model, None, tmp_path / "big")
    weights = sum(f.stat().st_size for f in (tmp_path / "big").glob("*.safetensors"))
    assert weights > 250e6
    folders = [tmp_path / name for name in ("small", "big", "out")]
    before, peak = map(int, _printed(_EXPORT, *folders, precision)[-2:])
    assert peak - before < 1.3 * weights


def _model_with(opset: int, op: str, domain: str = "") -> onnx.ModelProto:
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy"]
    graph = helper.make_graph(
        [helper.make_node(op, ["x"], ["y"], domain=domain)], "g", value[:1], value[1:]
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (_model_with(23, "Unheard", "com.microsoft"), "Unheard"),
        (_model_with(99, "Identity"), "opset"),
    ],
    ids=["operator", "opset"],
)
def test_what_the_runtime_does_not_know_is_one_error(
    tmp_path: Path, model: onnx.ModelProto, message: str
) -> None:
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=f"cannot load .*{message}"):
        Session(tmp_path)


def test_truncated_onnx_weights_are_refused(tmp_path: Path) -> None:
    folder = exported(tmp_path, tiny_model("llama"))
    data = folder / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=r"cannot load .*model\.onnx"):
        Session(folder)


def test_bf16_is_for_gpus(tmp_path: Path) -> None:
    folder = exported(tmp_path, tiny_model("llama"), precision="bf16")
    with pytest.raises(ValueError, match="bf16 exports run on GPUs"):
        Session(folder, provider="CPUExecutionProvider")


def test_a_cuda_graph_wants_its_provider_and_a_cache_in_place(tmp_path: Path) -> None:
    folder = exported(tmp_path, tiny_model("llama"))
    with pytest.raises(ValueError, match="cuda_graph needs the CUDA provider, and this is CPU"):
        Session(folder, provider="CPUExecutionProvider", cuda_graph=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_replayed_graph_decodes_as_a_plain_run(tmp_path: Path) -> None:
    folder = exported(tmp_path, tiny_model("llama", head_dim=64), precision="fp16")
    prompts = [[1, 2, 3], [7, 5, 4]]
    plain, replayed = (
        Session(folder, provider="CUDAExecutionProvider", cuda_graph=on) for on in (False, True)
    )
    expected = generate_tokens(plain, prompts, max_new_tokens=12)
    # Twice: a graph belongs to one generation's buffers.
    for _ in range(2):
        assert generate_tokens(replayed, prompts, max_new_tokens=12) == expected


def test_further_tokens_read_and_write_the_same_buffers(tmp_path: Path) -> None:
    """What a CUDA graph needs, on the CPU: no value moves from step to step."""
    state = Generation(Session(exported(tmp_path, tiny_model("llama"))), 2, 16)
    state.step(np.array([[1, 2, 3], [4, 5, 6]]))

    def places() -> list[int]:
        return [v.data_ptr() for v in (*state.cache.values(), state._buffers.logits)]

    state.step(np.array([[7], [8]]))
    binding, before = state._buffers.binding, places()
    for token in (9, 10, 11):
        state.step(np.array([[token], [token]]))
        assert state._buffers.binding is binding
        assert places() == before


def test_a_head_size_the_fused_operators_refuse_is_named(tmp_path: Path) -> None:
    save_narrow(tiny_model("llama", head_dim=8), None, tmp_path / "slim")
    with pytest.raises(ValueError, match="head_dim 8 is no multiple of 16"):
        export_onnx(tmp_path / "slim", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
