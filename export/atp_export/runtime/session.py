"""One exported model loaded by ONNX Runtime: its options, provider, adapter and cache's shape."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
import psutil

from atp_export.manifest import read_manifest
from atp_export.other_layouts import no_model_in
from atp_export.runtime.described import described
from atp_export.runtime.logits_from import with_input
from atp_export.runtime.providers import provider_of

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_ERRORS_ONLY = 3
PADDED_ON_THE_RIGHT = b"padded_on_the_right"
"""The node of the ort flavour by which rows may be padded anywhere (graph.flavour_ort)."""


class Session:
    """One exported model, loaded.

    provider: auto takes CUDA where there is one, else the CPU. adapter: a .onnx_adapter file, for
    folders exported with adapters. cuda_graph: replay one further token as a CUDA graph, captured
    once a generation; ONNX Runtime keeps a graph as long as the session. Raises ValueError for what
    cannot be loaded, and for a bf16 file: its cache would have to be fed as bf16.
    """

    def __init__(
        self,
        folder: Path,
        *,
        provider: str = "auto",
        threads: int | None = None,
        adapter: Path | None = None,
        cuda_graph: bool = False,
    ) -> None:
        path = folder / "model.onnx"
        if not path.is_file():
            raise no_model_in(folder)
        about = described(folder)
        self.folder, self.context, self.ends = folder, about.context, about.ends
        self.provider = provider_of(provider)
        self.device: Literal["cuda", "cpu"] = "cuda" if "CUDA" in self.provider else "cpu"
        if cuda_graph and self.device == "cpu":
            raise ValueError(f"cuda_graph needs the CUDA provider, and this is {self.provider}")
        header = path.read_bytes()
        self.session = load(path, with_input(header), self.provider, threads, cuda_graph=cuda_graph)
        inputs = {i.name: i for i in self.session.get_inputs()}
        self.shared_cache = "position_ids" not in inputs
        # Of a cache in place: older files take rows padded on the right alone.
        self.any_padding = PADDED_ON_THE_RIGHT in header
        if cuda_graph and not self.shared_cache:
            raise ValueError(
                f"{path} grows its cache by a new tensor a token, which no CUDA graph can replay; "
                "export it with --export-flavour ort, or leave cuda_graph off"
            )
        self.no_graph = _naming_graph(-1)
        self._graphs = itertools.count(1)
        self.past = {n: i for n, i in inputs.items() if n.startswith("past_key_values.")}
        self.optional = {i.name for i in self.session.get_overridable_initializers()}
        self.cache_type = _cache_type(path, [i.type for i in self.past.values()])
        self.vocabulary = self.session.get_outputs()[0].shape[2]
        self.adapter = read_adapter(adapter, self.optional) if adapter else {}

    def value(self, array: Any) -> Any:
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self.device, 0)

    def new_graph(self) -> Any:
        """Run options: with `cuda_graph` their first run is captured, and later ones replay it on
        the same buffers."""
        return _naming_graph(next(self._graphs))


def _naming_graph(graph: int) -> Any:
    """Run options of one CUDA graph; -1: of none (onnxruntime_run_options_config_keys.h)."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    return options


def load(
    path: Path,
    header: bytes,
    provider: str,
    threads: int | None = None,
    *,
    cuda_graph: bool = False,
) -> Any:
    """An InferenceSession of a serialized graph over the weights beside `path`."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    options.inter_op_num_threads = 1
    # A memory pattern is one block for all activations of a shape seen before, beside the memory
    # that the first run took. Prompts differ in length, and widths that differ by layer pack badly:
    # 512 tokens through a slim SmolLM2-135M of per-layer widths took 70 MB in the second prefill.
    # Without it 13 MB, the peak is 637 MB instead of 699, and no later prefill takes any.
    options.enable_mem_pattern = False
    # Optional inputs (where logits start, LoRA factors) make ONNX Runtime warn that they cannot be
    # folded: that is their point.
    options.log_severity_level = _ERRORS_ONLY
    header, weights = _at_its_weights(path, header)
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(weights)
    )
    try:
        of_provider = {"enable_cuda_graph": "1"} if cuda_graph else {}
        return ort.InferenceSession(header, options, providers=[(provider, of_provider)])
    except Exception as error:
        hint = ""
        if "CPU" in provider and _stated_precision(path.parent) == "bf16":
            hint = " (bf16 exports run on GPUs: the CPU provider has no bf16 MatMul)"
        raise ValueError(
            f"ONNX Runtime {ort.__version__} cannot load {path}{hint}: {error}"
        ) from error


def _at_its_weights(path: Path, header: bytes) -> tuple[bytes, Path]:
    """The header, and the folder in which ONNX Runtime finds the file of weights that it names.

    A link to that file, as in the Hub's cache, leads out of its folder, which ONNX Runtime refuses:
    the header then names the file that the link leads to.
    """
    data = path.with_name(f"{path.name}.data")
    if not data.is_symlink():
        return header, path.parent.resolve()
    import onnx  # only here: it takes 30 MB

    real = data.resolve()
    if not real.is_file():
        raise ValueError(f"{data} leads to {real}, which is not there: ship the folder again")
    model = onnx.load_from_string(header)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value == data.name:
                entry.value = real.name
    return model.SerializeToString(), real.parent


def _stated_precision(folder: Path) -> str | None:
    try:
        return read_manifest(folder).provenance.get("precision")
    except ValueError:
        return None


def usable_cores() -> int:
    """Physical cores this process may use: generation is bound by memory, so that more threads
    than cores only wait for each other."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(allowed or 1, psutil.cpu_count(logical=False) or allowed or 1)


def read_adapter(path: Path, known: set[str]) -> dict[str, Any]:
    """LoRA factors of a .onnx_adapter file by input name.

    Raises ValueError for a file that is none, or of another model.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such adapter; write it with atp_export.adapter")
    try:
        values: dict[str, Any] = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
    except RuntimeError as error:  # onnxruntime has no class for it.
        raise ValueError(
            f"{path} is no .onnx_adapter file, or it is damaged; write it with atp_export.adapter"
        ) from error
    foreign = sorted(set(values) - known)
    if foreign:
        raise ValueError(
            f"{path} holds {foreign[0]}, which the model does not take: it belongs to another "
            "model, or this one was exported without adapters"
        )
    return values


def _cache_type(path: Path, types: list[str]) -> Any:
    if not types:
        return np.float32
    if types[0] not in _TYPES:
        raise ValueError(
            f"{path} keeps its cache as {types[0]}; this runtime feeds {', '.join(_TYPES)}: export "
            "it in another precision"
        )
    return _TYPES[types[0]]
