"""The gate: both models are asked everything, then every answer is judged."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from atp_bench.onnx_model import OnnxModel
from atp_export.runtime import Generator, Session, generate_tokens
from atp_export.runtime.described import described
from peft import PeftModel

from atp_edge.config import Config
from atp_edge.data.encoding import prompt_ids
from atp_edge.evaluation.scoring import LanguageModel, TorchModel
from atp_edge.gate.answered import Answered, answer
from atp_edge.gate.bias import check_bias, gaps
from atp_edge.gate.calibration import check_calibration
from atp_edge.gate.flips import flips_of
from atp_edge.gate.integrity import check_integrity
from atp_edge.gate.material import Material, material_of
from atp_edge.gate.measured_text import measure
from atp_edge.gate.memorization import (
    check_canaries,
    check_extraction,
    check_personal_data,
    continuations,
    exposures,
    returned,
)
from atp_edge.gate.outside_tasks import check_outside
from atp_edge.gate.personal_data import leaked
from atp_edge.gate.prompts import Ask, check_prompts
from atp_edge.gate.quality import check_quality
from atp_edge.gate.refusals import check_refusals
from atp_edge.gate.results import Check, Flip, GateReport
from atp_edge.gate.settings import Form, GateSettings
from atp_edge.gate.tasks import check_tasks
from atp_edge.model.checkpoint import load_narrow
from atp_edge.model.loading import load_config
from atp_edge.run.folder import RunFolder
from atp_edge.run.hashes import files_sha256
from atp_edge.training.setup import tokenizer_of

ADAPTER = "adapter"


@dataclass(frozen=True, kw_only=True)
class Rivals:
    """The dense model and what ships, with what every check needs to ask them."""

    dense: LanguageModel
    slim: LanguageModel
    tokenizer: Any
    material: Material
    settings: GateSettings
    seed: int


def judge(
    run: RunFolder, config: Config, settings: GateSettings, say: Callable[[str], None]
) -> GateReport:
    """The whole gate on a run. Raises ValueError, before a model is loaded, for files that cannot
    be read."""
    began = time.perf_counter()
    run.require("dense", settings.form)
    tokenizer = tokenizer_of(config)
    say("reading what the gate asks")
    material = material_of(config, settings, tokenizer, _window(run, settings.form))
    dense, slim, ask = _dense(run), *_ships(run, config, settings)
    rivals = Rivals(
        dense=dense, slim=slim, tokenizer=tokenizer, material=material, settings=settings,
        seed=config.seed,
    )  # fmt: skip
    checks = check_integrity(run, settings.form)
    figures: dict[str, Any] = {}
    say(f"text: {len(material.texts)} documents by both models")
    checks += _text(rivals, figures)
    say(f"tasks: {sum(len(task.items) for task in material.tasks)} items")
    found, flips, items = _tasks(rivals, figures)
    checks += found
    if material.lm_eval:
        say(f"lm-eval: {len(material.lm_eval)} tasks")
        window = load_config(run.dense).max_position_embeddings
        checks += check_outside(
            dense, slim, tokenizer, material.lm_eval, settings.tasks, settings.level, window
        )
    say(f"bias: {len(material.pairs)} pairs")
    checks += _bias(rivals, figures)
    say("memorization, refusals and prompts")
    found, said = check_prompts(material.rules, lambda p, chat: ask(p, chat))
    checks += found
    prompted = list(zip([rule.prompt for rule in material.rules], said, strict=True))
    checks += _memorization(rivals, config, items, prompted, figures)
    checks += _refusals(rivals, items)
    return GateReport(
        profile=settings.profile,
        form=settings.form,
        level=settings.level,
        checks=tuple(checks),
        figures=figures,
        flips=flips,
        files=files_sha256(run.path, [settings.form, "dense"]),
        settings=asdict(settings),
        seconds=time.perf_counter() - began,
        notes=material.notes,
        undecided_fails=settings.undecided == "fail",
    )


# The models


def _window(run: RunFolder, form: Form) -> int:
    """Tokens that both models can read."""
    own: int = load_config(run.dense).max_position_embeddings
    shipped = described(run.onnx).context if form == "onnx" else None
    return min(own, shipped or own)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _dense(run: RunFolder) -> LanguageModel:
    return TorchModel(load_narrow(run.dense).to(_device()))


def _ships(run: RunFolder, config: Config, settings: GateSettings) -> tuple[LanguageModel, Ask]:
    """The form that ships, with its adapter on where there is one, and how prompts are asked of
    it."""
    form: Form = settings.form
    kept = config.export.keep_adapter
    if form == "onnx":
        file = run.onnx / f"{ADAPTER}.onnx_adapter" if kept else None
        session = Session(run.onnx, adapter=file)
        generator = Generator(run.onnx, adapter=file, trust_remote_code=config.trust_remote_code)
        return OnnxModel(session), _ask_onnx(generator, settings.prompts.new_tokens)
    slim: Any = load_narrow(run.slim)
    if kept:
        slim = PeftModel.from_pretrained(slim, run.slim / ADAPTER)
    model = TorchModel(slim.to(_device()))
    return model, _ask_torch(model, tokenizer_of(config), settings.prompts.new_tokens)


def _rendered(tokenizer: Any, prompts: Sequence[str], chat: bool) -> list[str]:
    if not chat:
        return list(prompts)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in prompts
    ]


def _ask_onnx(generator: Generator, new_tokens: int) -> Ask:
    def ask(prompts: Sequence[str], chat: bool) -> list[str]:
        rendered = _rendered(generator.tokenizer, prompts, chat)
        rows = [prompt_ids(generator.tokenizer, p, rendered=chat) for p in rendered]
        made = generate_tokens(
            generator.session, rows, max_new_tokens=new_tokens, ends=generator.ends
        )
        return list(generator.tokenizer.batch_decode(made, skip_special_tokens=True))

    return ask


def _ask_torch(model: LanguageModel, tokenizer: Any, new_tokens: int) -> Ask:
    def ask(prompts: Sequence[str], chat: bool) -> list[str]:
        rows = [
            prompt_ids(tokenizer, p, rendered=chat) for p in _rendered(tokenizer, prompts, chat)
        ]
        made = model.generate(rows, new_tokens=new_tokens, end=tokenizer.eos_token_id)
        return list(tokenizer.batch_decode(made, skip_special_tokens=True))

    return ask


# The checks


def _text(rivals: Rivals, figures: dict[str, Any]) -> list[Check]:
    settings = rivals.settings
    measured = measure(rivals.dense, rivals.slim, rivals.material.texts)
    quality, figures["text"] = check_quality(measured, settings.quality, settings.level)
    calibration, figures["calibration"] = check_calibration(
        measured, settings.calibration, settings.level, settings.quality.fewest_documents,
        rivals.seed,
    )  # fmt: skip
    return quality + calibration


def _tasks(
    rivals: Rivals, figures: dict[str, Any]
) -> tuple[list[Check], tuple[Flip, ...], list[Answered]]:
    settings = rivals.settings
    items = answer(rivals.dense, rivals.slim, rivals.tokenizer, rivals.material.tasks)
    checks, figures["tasks"] = check_tasks(items, settings.tasks, settings.level)
    flips, figures["flips"] = flips_of(items)
    return checks, flips, items


def _bias(rivals: Rivals, figures: dict[str, Any]) -> list[Check]:
    pairs, settings = rivals.material.pairs, rivals.settings
    if not pairs:
        return []
    dense, slim = (gaps(m, rivals.tokenizer, pairs) for m in (rivals.dense, rivals.slim))
    checks, figures["bias"] = check_bias(pairs, dense, slim, settings.bias, settings.level)
    return checks


def _memorization(
    rivals: Rivals, config: Config, items: Sequence[Answered],
    prompted: Sequence[tuple[str, str]], figures: dict[str, Any],
) -> list[Check]:  # fmt: skip
    limits, tokenizer = rivals.settings.memorization, rivals.tokenizer
    models = {"dense": rivals.dense, "slim": rivals.slim}
    trained, unseen = rivals.material.passages
    counts: list[dict[str, int]] = [{}, {}]
    generated = [*prompted, *((x.prompt, x.said[1]) for x in items if x.generated)]
    for name, model in models.items():
        for passages, count in zip((trained, unseen), counts, strict=True):
            made = continuations(
                model, passages, new_tokens=limits.continued_tokens, end=tokenizer.eos_token_id
            )
            count[name] = returned(passages, made)
            if name == "slim":
                texts = tokenizer.batch_decode(made)
                starts = tokenizer.batch_decode([p.prefix for p in passages])
                generated += list(zip(starts, texts, strict=True))
    checks = [
        check_extraction(
            counts[0], counts[1], (len(trained), len(unseen)), limits, rivals.settings.level
        ),
        check_personal_data(leaked(generated, rivals.material.train_text), len(generated), limits),
    ]
    figures["memorization"] = {"train": counts[0], "test": counts[1], "passages": len(trained)}
    if planted := config.dataset.canaries:
        exposed = {
            name: exposures(
                model, tokenizer, planted=planted, candidates=limits.candidates, seed=config.seed
            )
            for name, model in models.items()
        }
        checks.append(check_canaries(exposed["dense"], exposed["slim"], limits))
        figures["memorization"]["exposure"] = exposed
    return checks


def _refusals(rivals: Rivals, items: Sequence[Answered]) -> list[Check]:
    settings, written = rivals.settings, [x for x in items if x.generated]
    dense, slim = ([x.said[i] for x in written] for i in (0, 1))
    return [check_refusals(dense, slim, rivals.material.phrases, settings.refusals, settings.level)]
