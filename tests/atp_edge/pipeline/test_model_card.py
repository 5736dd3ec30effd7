"""The cards of what ships: the Hub reads them, they hold no path, their figures are the run's."""

from __future__ import annotations

import importlib
import re
import signal
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from atp_export.byte_letters import CONTROLS, LETTERS
from atp_export.genai_tokenizer import other_ids_in_genai
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from typer.testing import CliRunner

from atp_edge.cli import app
from atp_edge.config import Config
from atp_edge.model.export_size import CARD_BYTES
from atp_edge.pipeline import push as pushing
from atp_edge.pipeline.model_card import Form, card_of
from atp_edge.pipeline.push import push
from atp_edge.run.errors import NotProvenError, Stopped
from atp_edge.run.folder import RunFolder
from atp_edge.settings import with_values
from tests.atp_edge.pipeline.test_report import metrics
from tests.sources import save_source
from tests.tiny import record
from tests.tiny_tokenizers import save_changed

FORMS: tuple[Form, ...] = ("slim", "onnx", "adapter")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    source = tmp_path_factory.mktemp("home of somebody") / "tiny-model"
    save_source(source)
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    data = source.parent / "notes.jsonl"
    return with_values(Config(), {"model": str(source), "data": str(data)})


def figures() -> dict[str, Any]:
    found = metrics()
    found["train"]["adapter"] = {
        "blocks": 8,
        "untuned_perplexity": 22.15,
        "perplexity": 18.0,
        "dense_tuned_perplexity": 16.5,
        "written": True,
    }
    losses = [3.0 + 0.1 * (i % 3) for i in range(40)]
    found["train"]["block_losses"] = {"dense": losses, "slim": [x + 0.4 for x in losses]}
    return found


@pytest.mark.parametrize("form", FORMS)
def test_a_card_is_what_the_hub_reads_and_has_no_path(config: Config, form: Form) -> None:
    text = card_of(form, config, figures())
    card = ModelCard(text)
    assert card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.library_name == {"slim": "transformers", "onnx": "onnx"}.get(form, "peft")
    assert "somebody" not in text
    assert "`notes.jsonl`, SHA-256 `cdcd" in text
    assert "Documents: train 90, decision 11, test 12." in text
    assert len(text.encode()) <= CARD_BYTES


def test_figures_come_with_their_interval_and_the_untouched_model(config: Config) -> None:
    text = card_of("onnx", config, figures())
    assert "| untouched model | 18.40 |" in text
    assert "| **this model** | **20.80** |" in text
    found = re.search(r"0\.625 \(95 % interval (\d\.\d+) to (\d\.\d+)\)", text)
    assert found is not None
    assert "worse on its own domain than the untouched model" in text
    card = ModelCard(text)
    assert card.data.eval_results[0].metric_value == 20.8


def test_a_rounded_file_has_its_own_perplexity_or_none(config: Config) -> None:
    int4 = with_values(config, {"export.precision": "int4"})
    before = card_of("onnx", int4, figures() | {"verify": {}})
    assert "| **this model, before rounding** | **20.80** |" in before
    assert "What rounding to int4 costs is not in these figures." in before
    assert not ModelCard(before).data.eval_results
    after = card_of("onnx", int4, figures() | {"verify": {"quality": {"ratio": 1.25}}})
    assert "| **this model** | **26.00** |" in after
    assert ModelCard(after).data.eval_results[0].metric_value == 26.0


def test_a_model_of_the_hub_is_named_as_the_base(config: Config) -> None:
    demo = with_values(config, {"model": "demo"})
    card = ModelCard(card_of("slim", demo, figures()))
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "dequantized from Q4_1" in card.text


def test_the_lines_to_load_compile_and_say_when_code_is_needed(config: Config) -> None:
    uniform = with_values(config, {"widths": "uniform"})
    assert "trust_remote_code" in card_of("slim", config, figures())
    assert "trust_remote_code" not in card_of("slim", uniform, figures())
    for form in FORMS:
        for block in re.findall(r"```python\n(.*?)```", card_of(form, config, figures()), re.S):
            compile(block, form, "exec")


def test_a_layout_is_loaded_by_what_it_is_for(config: Config) -> None:
    for layout, named in (("openvino", "openvino_genai.LLMPipeline"), ("transformers.js", "js")):
        text = card_of("onnx", config, figures(), layout)  # type: ignore[arg-type]
        assert ModelCard(text).data.library_name == layout
        assert ("as OpenVINO's IR" in text) == (layout == "openvino")
        assert ("as ONNX" in text) == (layout == "transformers.js")
        assert named in text
        assert "og.Model" not in text
        assert "Generator(Path" not in text
        assert len(text.encode()) <= CARD_BYTES


def test_a_warning_stands_beside_the_lines_to_load(config: Config, tmp_path: Path) -> None:
    """The longest: a split with letters of its own, and no token for any control character."""
    lacking = {letter for letter, byte in LETTERS.items() if byte in CONTROLS}
    changes = {
        "model.vocab": lambda ids: {f"▁{i}" if t in lacking else t: i for t, i in ids.items()}
    }
    save_changed(tmp_path, "gpt-4o", changes)
    warning = other_ids_in_genai(tmp_path)
    assert warning is not None
    assert "U+007F; where that matters" in warning
    assert "from_file('tokenizer.json').encode(text).ids" in warning
    text = card_of("onnx", config, figures(), warning=warning)
    _, load = text.split("## Load")
    assert warning in load.split("## Data")[0]
    assert warning not in card_of("onnx", config, figures())
    assert len(text.encode()) <= CARD_BYTES


class Hub:
    """Remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []

    def create_repo(self, name: str, **more: Any) -> None:
        self.asked.append((name, more))

    def upload_folder(self, **more: Any) -> None:
        self.asked.append(("upload", more))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(pushing, "HfApi", lambda: made)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    return made


def ready(folder: Path) -> RunFolder:
    run = RunFolder(folder)
    for stage, values in metrics().items():
        run.add_metrics(stage, values)
    run.onnx.mkdir()
    (run.onnx / "config.json").write_text("{}")
    (run.onnx / "README.md").write_text("# card\n")
    record(run, "export", "verify")
    return run


def test_a_push_is_private_and_of_the_whole_folder(tmp_path: Path, hub: Hub) -> None:
    run = ready(tmp_path)
    assert push(run, "owner/name") == "https://huggingface.co/owner/name"
    (name, how), (_, upload) = hub.asked
    assert (name, how) == ("owner/name", {"private": True, "exist_ok": True})
    assert (upload["repo_id"], upload["folder_path"]) == ("owner/name", run.onnx)


def test_what_is_not_proven_or_not_there_is_not_pushed(tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(ValueError, match="expected OWNER/NAME"):
        push(RunFolder(tmp_path), "name")
    with pytest.raises(ValueError, match="is not there; write it with"):
        push(RunFolder(tmp_path), "owner/name", "slim")
    run = ready(tmp_path)
    run.records.keep("verify", read=run.records.reads("verify"), failed="logits differ")
    with pytest.raises(NotProvenError, match=r"is not proven: verify: it failed \(logits differ"):
        push(run, "owner/name")
    run.records.file.unlink()
    with pytest.raises(NotProvenError, match="is not proven: verify: it has not ended"):
        push(run, "owner/name")
    assert hub.asked == []


def test_without_a_login_nothing_is_pushed_and_no_run_is_begun_for_it(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match="nobody is logged in to the Hub; `hf auth login`, or"):
        push(ready(tmp_path / "run"), "owner/name")
    assert hub.asked == []
    asked = ["run", "--out", str(tmp_path / "new"), "--push", "owner/name"]
    shown = CliRunner().invoke(app, asked)
    assert isinstance(shown.exception, ValueError)
    assert "nobody is logged in" in str(shown.exception)
    assert not (tmp_path / "new").exists()


def test_a_push_that_is_stopped_says_that_it_may_be_half_done(tmp_path: Path, hub: Hub) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise Stopped(signal.SIGINT)

    hub.upload_folder = stopped  # type: ignore[method-assign]
    with pytest.raises(Stopped) as told:
        push(ready(tmp_path), "owner/name", public=True)
    again = f"`atp-edge push owner/name --out {tmp_path} --form onnx`"
    assert told.value.__notes__ == [
        f"{tmp_path}/onnx may not be pushed whole; push it again with {again}"
    ]


def test_a_hub_that_is_not_reached_is_no_fault_of_ours(tmp_path: Path, hub: Hub) -> None:
    """Its client raises what is no OSError; the error says how to push later."""
    library = importlib.import_module(HfHubHTTPError.__bases__[0].__module__.split(".")[0])

    def fails(*_: Any, **__: Any) -> None:
        raise library.ConnectError("no route to host")

    hub.create_repo = fails  # type: ignore[method-assign]
    with pytest.raises(OSError, match=r"no route.*try again with `atp-edge push owner/name --out"):
        push(ready(tmp_path), "owner/name")
