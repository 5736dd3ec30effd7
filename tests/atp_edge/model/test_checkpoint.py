"""Checkpoints load where users load them: in fresh processes, with and without atp_edge."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from atp_edge.model.checkpoint import load_narrow, save_narrow
from atp_edge.model.narrow import narrow_model
from tests.tiny import CUTS, IDS, logits, tiny_model, to_cut

LOAD = """
import json, sys
{before}
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype=torch.float32{more}).eval()
with torch.no_grad():
    logits = model(input_ids=torch.tensor({ids})).logits
    tokens = model.generate(torch.tensor({ids}), max_new_tokens=3, do_sample=False)
{after}
torch.save(logits, {out!r})
"""


AS_ENGINES_DO = """
assert not any(m.startswith('atp_') for m in sys.modules)
# An engine builds the decoder of the configuration, and puts its own attention into it.
from transformers import AutoConfig, AutoModel
config = AutoConfig.from_pretrained(model.name_or_path)
made = AutoModel.from_config(config, trust_remote_code=True)
sizes = {n: p.shape for n, p in model.model.named_parameters()}
assert {n: p.shape for n, p in made.named_parameters()} == sizes
assert type(made).__name__ == 'PerLayerLlamaModel'
"""


def load_in_fresh_process(
    folder: Path, out: Path, *, before: str = "", more: str = "", after: str = ""
) -> subprocess.CompletedProcess[str]:
    code = LOAD.format(
        folder=str(folder), out=str(out), ids=IDS.tolist(), before=before, more=more, after=after
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def saved(tmp_path: Path, family: str, policy: str) -> tuple[Path, PreTrainedModel]:
    slim = narrow_model(*to_cut(family, policy))
    save_narrow(slim, None, tmp_path / "slim")
    return tmp_path / "slim", slim


def test_uniform_loads_in_a_process_that_never_imports_atp_edge(tmp_path: Path) -> None:
    folder, slim = saved(tmp_path, "llama", "uniform")
    after = "assert not any(m.startswith('atp_') for m in sys.modules)"
    done = load_in_fresh_process(folder, tmp_path / "out.pt", after=after)
    assert done.returncode == 0, done.stderr
    # Weights mapped from a file lie at other addresses, and so sum in another order.
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), logits(slim), atol=1e-5, rtol=0)
    assert json.loads((folder / "config.json").read_text())["head_dim"] == 16


@pytest.mark.parametrize(("family", "policy"), [("qwen3", "per-layer"), ("qwen2", "uniform pairs")])
def test_per_layer_loads_after_importing_atp_edge(tmp_path: Path, family: str, policy: str) -> None:
    folder, slim = saved(tmp_path, family, policy)
    done = load_in_fresh_process(folder, tmp_path / "out.pt", before="import atp_edge")
    assert done.returncode == 0, done.stderr
    # Weights mapped from a file lie at other addresses, and so sum in another order.
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), logits(slim), atol=1e-5, rtol=0)


@pytest.mark.parametrize("policy", ["per-layer", "per-layer pairs"])
def test_per_layer_loads_by_its_own_modelling_file_for_those_who_trust_it(
    tmp_path: Path, policy: str
) -> None:
    folder, slim = saved(tmp_path, "llama", policy)
    done = load_in_fresh_process(
        folder, tmp_path / "out.pt", more=", trust_remote_code=True", after=AS_ENGINES_DO
    )
    assert done.returncode == 0, done.stderr
    # Weights mapped from a file lie at other addresses, and so sum in another order.
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), logits(slim), atol=1e-5, rtol=0)


@pytest.mark.parametrize("policy", ["per-layer", "uniform pairs"])
def test_per_layer_without_its_class_fails_instead_of_loading_wrong_weights(
    tmp_path: Path, policy: str
) -> None:
    folder, _ = saved(tmp_path, "llama", policy)
    done = load_in_fresh_process(folder, tmp_path / "out.pt")
    assert done.returncode != 0
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize(("family", "policy"), CUTS)
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, family: str, policy: str) -> None:
    folder, slim = saved(tmp_path, family, policy)
    loaded = load_narrow(folder)
    for name, weight in slim.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    torch.testing.assert_close(logits(loaded), logits(slim), atol=1e-5, rtol=0)


def test_importing_atp_edge_leaves_ordinary_models_their_class() -> None:
    assert type(tiny_model("llama")).__module__.startswith("transformers.")


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        load_narrow(tmp_path)


@pytest.mark.parametrize(
    "first",
    [
        "import atp_edge",
        "import atp_edge.model.modeling_per_layer",
        "from atp_edge.training.phases import run_part",
        "from transformers import AutoModelForCausalLM; import atp_edge",
        # These are what our classes are made of, and import the registry before they are whole.
        "import atp_edge; from transformers import LlamaForCausalLM",
        "import atp_edge; from transformers import GPT2LMHeadModel",
    ],
)
def test_per_layer_widths_are_known_whatever_is_imported_first(first: str) -> None:
    code = (
        f"{first}; from transformers import AutoModelForCausalLM, LlamaConfig; "
        "tiny = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=2); "
        "AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=1, **tiny)); "
        "assert 'PerLayer' in AutoModelForCausalLM._model_mapping[LlamaConfig].__name__"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
