"""A folder of a finished run to a model repository of the Hub."""

from __future__ import annotations

from huggingface_hub import HfApi

from atp_edge.pipeline.model_card import CARD, Form
from atp_edge.run.errors import NotProvenError
from atp_edge.run.folder import RunFolder
from atp_edge.run.hub import check_login, check_name
from atp_edge.run.stopping import saying


def push(run: RunFolder, name: str, form: Form = "onnx", *, public: bool = False) -> str:
    """Upload a run's folder of this form; returns the address.

    A new repository is private unless `public`. Raises ValueError where the folder or a login is
    not there, NotProvenError for an ONNX folder that was not proven, OSError where the Hub is not
    reached or refuses.
    """
    check_name(name)
    if form == "adapter":
        if not run.adapter.is_dir():
            raise ValueError(f"{run.adapter} is not there: {_why_no_adapter(run)}")
    else:
        run.require(form)
    if form == "onnx" and (trouble := run.records.trouble("verify")):
        raise NotProvenError(
            f"{run.onnx} is not proven: verify: {trouble}; run {run.command('verify')} first"
        )
    folder = run.path / form
    if not (folder / CARD).exists():  # Of a run from before the cards.
        raise ValueError(f"{folder} has no {CARD}: write it again with {run.command('export')}")
    check_login()
    api = HfApi()
    again = f"`atp-edge push {name} --out {run.path} --form {form}`"
    try:
        with saying(lambda: f"{folder} may not be pushed whole; push it again with {again}"):
            api.create_repo(name, private=not public, exist_ok=True)
            api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"atp-edge: {form}")
    except Exception as error:
        if not _unreached(error):
            raise
        raise OSError(
            f"{folder} was not pushed: the Hub cannot be reached ({error}); try again with {again}"
        ) from error
    return f"https://huggingface.co/{name}"


def _unreached(error: Exception) -> bool:
    """Whether it is of the network: no OSError, as the Hub's own answers are, and of a package that
    huggingface_hub has changed before."""
    return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)


def _why_no_adapter(run: RunFolder) -> str:
    why: str = run.metrics().get("train", {}).get("adapter", {}).get("why", "train writes it")
    return why
