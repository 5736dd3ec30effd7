"""A folder of a finished run to a model repository of the Hub."""

from __future__ import annotations

from huggingface_hub import HfApi

from atp_edge.pipeline.model_card import CARD, Form
from atp_edge.run.errors import NotProvenError
from atp_edge.run.folder import RunFolder
from atp_edge.run.hub import check_name


def push(run: RunFolder, name: str, form: Form = "onnx", *, public: bool = False) -> str:
    """Upload a run's folder of this form; returns the address.

    A new repository is private unless `public`. Raises ValueError where the folder is not there,
    and NotProvenError for an ONNX folder that was not proven.
    """
    check_name(name)
    if form == "adapter":
        if not run.adapter.is_dir():
            raise ValueError(f"{run.adapter} is not there: {_why_no_adapter(run)}")
    else:
        run.require(form)
    if form == "onnx":
        proofs = run.metrics().get("verify", {}).get("providers", {})
        if not proofs or not all(proof["passed"] for proof in proofs.values()):
            raise NotProvenError(f"{run.onnx} is not proven: run {run.command('verify')} first")
    folder, api = run.path / form, HfApi()
    if not (folder / CARD).exists():  # Of a run from before the cards.
        raise ValueError(f"{folder} has no {CARD}: write it again with {run.command('export')}")
    api.create_repo(name, private=not public, exist_ok=True)
    api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"atp-edge: {form}")
    return f"https://huggingface.co/{name}"


def _why_no_adapter(run: RunFolder) -> str:
    why: str = run.metrics().get("train", {}).get("adapter", {}).get("why", "train writes it")
    return why
