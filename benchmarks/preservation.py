"""Does it preserve knowledge? Fine-tuning by several methods on one model, and what each has forgotten at equal task loss.

    python -m benchmarks.preservation --out study --reduced --data FOLDER --workers 2      # SmolLM2-135M, two CPU cores
    python -m benchmarks.preservation --out study --model meta-llama/Llama-3.1-8B          # the paper's sizes, one GPU

The protocol of LoRA-Null (arXiv 2503.02659): calibrate on NQ-open; adapters on all linear layers but the head, α = r; transformers'
`Trainer` with AdamW, a cosine schedule with warm-up 0.03, loss on the response alone; the same data, ranks, steps and seeds for all
methods. A seed decides which examples are seen and in which order, and for plain LoRA where A starts. Before and after: NQ-open,
WebQuestions and, on request, TriviaQA (log-likelihood of the gold answer; exact match by greedy decoding, a few solved questions
standing before each), WikiText (perplexity), and the task (loss, accuracy of response tokens, GSM8K's final number on request).

Each method runs at several learning rates (`--learning-rates`), LoRA-Null on request with scaled singular values too
(`--sigma-scales`, the paper's Table 5), since methods move at different speeds for one learning rate;
`nullspace.reporting.study` compares them at equal task loss.

OUT/results.jsonl gets a line when a run is finished (its format: `nullspace.reporting.study`). OUT/runs holds the adapters before
and after, OUT/covariances and OUT/spaces the calibration. The same command resumes an interrupted study; methods, rates and
seeds may be added; other settings are refused. `--compare OTHER` compares the numbers with those of another study.

A data source is a file (text, JSON Lines, JSON, CSV, Parquet) or a hub data set, `name`, `name:configuration`, `name@split`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import evaluation
from benchmarks.children import run_child
from benchmarks.environment import environment, write_result
from nullspace.reporting import study as fronts

ADAPTERS = "runs"
# What a data set is called in a folder of files (--data), and on the hub.
KNOWN = {
    "nq-train": ("nq_open_train.jsonl", "google-research-datasets/nq_open@train"),
    "nq": ("nq_open_dev.jsonl", "google-research-datasets/nq_open@validation"),
    "webq": ("webq_test.jsonl", "stanfordnlp/web_questions@test"),
    "triviaqa": ("triviaqa.jsonl", "mandarjoshi/trivia_qa:rc.nocontext@validation"),
    "wikitext": ("wikitext2_test.txt", "Salesforce/wikitext:wikitext-2-raw-v1@test"),
    "gsm8k-train": ("gsm8k_train.jsonl", "openai/gsm8k:main@train"),
    "gsm8k-test": ("gsm8k_test.jsonl", "openai/gsm8k:main@test"),
}
PROMPT = "### Instruction:\n{}\n\n### Response:\n"


class Start(NamedTuple):
    """How a method starts: its name for `inject_adapters` (None: PEFT's own LoRA), whether A is frozen."""

    method: str | None
    frozen: bool = False


METHODS = {
    "lora": Start(None),
    "pissa": Start("pissa"),
    "milora": Start("milora"),
    "corda-kpm": Start("corda-kpm"),
    "lora-null-v1": Start("lora-null"),
    "lora-null-v2": Start("lora-null", frozen=True),
    "b-zero": Start("b-zero"),
    "b-zero-frozen": Start("b-zero", frozen=True),
}
DEFAULT_METHODS = [name for name in METHODS if name != "b-zero-frozen"]


@dataclass(frozen=True)
class Settings:
    """What all runs of a study have in common. Sizes are near the paper's: three epochs of GSM8K in batches of 128.

    `calibrate`, `train`, `test` and the second of each pair in `knowledge` and `text` are data sources. `samples` × `length` tokens
    calibrate; `steps` of `batch_size` · `accumulation` examples, out of the first `pool` of at most `max_length` tokens, train;
    `questions` a knowledge set, of which greedy decoding answers `answered` in `new_tokens` tokens, `windows` × `window` tokens a
    text, and `examples` of the task, of which it solves `solved`, measure. `layers`: look at every layer after each run.
    """

    model: str
    calibrate: str
    knowledge: tuple[tuple[str, str], ...]
    text: tuple[tuple[str, str], ...]
    train: str
    test: str
    dtype: str = "auto"
    device: str | None = None
    rank: int = 128
    samples: int = 256
    length: int = 1024
    steps: int = 175
    batch_size: int = 32
    accumulation: int = 4
    max_length: int = 512
    pool: int = 100_000
    questions: int = 1000
    answered: int = 1000
    shots: int = 3
    new_tokens: int = 12
    windows: int = 64
    window: int = 1024
    examples: int = 500
    solved: int = 0
    layers: bool = True


# For two CPU cores.
REDUCED = {
    "dtype": "float32",
    "device": "cpu",
    "rank": 16,
    "samples": 32,
    "length": 512,
    "steps": 10,
    "batch_size": 4,
    "accumulation": 1,
    "max_length": 128,
    "pool": 2000,
    "questions": 60,
    "answered": 30,
    "new_tokens": 5,
    "windows": 4,
    "window": 256,
    "examples": 16,
}


class Variant(NamedTuple):
    """A method with its setting."""

    method: str
    sigma_scale: float

    @property
    def name(self) -> str:
        return self.method if self.sigma_scale == 1 else f"{self.method} x{self.sigma_scale:g}"

    @property
    def changes_base(self) -> bool:
        from nullspace.methods import METHODS as KNOWN_METHODS

        start = METHODS[self.method]
        return start.method is not None and not start.frozen and KNOWN_METHODS[start.method].changes_base


def needs_of(method: str) -> tuple[str, ...]:
    """What a method is made of beside the weights."""
    from nullspace.methods import METHODS as KNOWN_METHODS

    start = METHODS[method]
    return () if start.method is None else KNOWN_METHODS[start.method].needs


class Data(NamedTuple):
    """What is asked and what is taught, tokenised."""

    shots: list[evaluation.Question]
    knowledge: dict[str, list[evaluation.Question]]
    text: dict[str, Any]
    train: list[dict[str, list[int]]]
    test: list[dict[str, list[int]]]
    solve: list[tuple[str, str]]


class Lines:
    """A file of JSON Lines that several processes append to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[fronts.Record]:
        return fronts.read_records(self.path) if self.path.exists() else []

    def write(self, record: Mapping[str, Any]) -> None:
        """One line, whole: a single write to a file opened for appending."""
        line = (json.dumps(record) + "\n").encode()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def mend(self) -> None:
        """Take away a last line that was cut off while it was written."""
        if self.path.exists():
            content = self.path.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                os.truncate(self.path, whole)


def parted(source: str) -> tuple[str, str]:
    """A data source as name and split."""
    name, _, split = (source, "", "") if Path(source).exists() else source.partition("@")
    return name, split or "train"


def load_data(settings: Settings, tokenizer: Any) -> Data:
    from nullspace.integrations.transformers import PackedBatches, load_rows, load_texts, prompt_and_response

    def rows(source: str, limit: int | None = None) -> list[Mapping[str, Any]]:
        name, split = parted(source)
        return load_rows(name, split=split, limit=limit)

    def texts(source: str) -> list[str]:
        name, split = parted(source)
        return load_texts(name, split=split)

    def taught(source: str, wanted: int) -> Iterator[tuple[str, str, dict[str, list[int]]]]:
        matching = 0
        for row in rows(source):
            prompt, response = prompt_and_response(row)
            ids = evaluation.tokenized(tokenizer, PROMPT.format(prompt), response + tokenizer.eos_token)
            if len(ids["input_ids"]) <= settings.max_length:
                yield prompt, response, ids
                matching += 1
            if matching == wanted:
                return

    knowledge = {name: evaluation.questions(rows(source, settings.questions)) for name, source in settings.knowledge}
    test = list(taught(settings.test, max(settings.examples, settings.solved)))
    data = Data(
        evaluation.questions(rows(settings.calibrate, settings.shots)) if settings.shots else [],
        knowledge,
        {
            name: PackedBatches(texts(source), tokenizer, samples=settings.windows, length=settings.window)
            for name, source in settings.text
        },
        [ids for _, _, ids in taught(settings.train, settings.pool)],
        [ids for _, _, ids in test[: settings.examples]],
        [(PROMPT.format(prompt), response) for prompt, response, _ in test[: settings.solved]],
    )
    for what, examples in (("--train", data.train), ("--test", data.test)):
        if not examples:
            raise SystemExit(f"{what} has no example of at most {settings.max_length} tokens (--max-length)")
    return data


def evaluate(model: Any, tokenizer: Any, data: Data, settings: Settings) -> dict[str, Any]:
    """The `scores` of a record."""
    task = evaluation.task(model, data.test)
    if data.solve:
        answers = evaluation.greedy(model, tokenizer, [prompt for prompt, _ in data.solve], new_tokens=settings.max_length)
        task["exact_match"] = statistics.fmean(
            evaluation.same_result(text, response) for text, (_, response) in zip(answers, data.solve, strict=True)
        )
    return {
        "knowledge": {
            name: evaluation.knowledge(
                model, tokenizer, asked, shots=data.shots, answered=settings.answered, new_tokens=settings.new_tokens
            )
            for name, asked in data.knowledge.items()
        },
        "text": {name: {"perplexity": evaluation.perplexity(model, batches)} for name, batches in data.text.items()},
        "task": task,
    }


def load_model(settings: Settings) -> tuple[Any, Any]:
    from nullspace.integrations import transformers as ours

    model, tokenizer = ours.load_model(settings.model, dtype=settings.dtype, device=settings.device)
    return model.eval(), tokenizer


def prepare(settings: Settings, out: Path, methods: Iterable[str]) -> None:
    """The base's scores and the calibration, once a study."""
    from nullspace import Covariances, NullSpaces, compute_covariances
    from nullspace.artifacts import checkpoint
    from nullspace.integrations.transformers import PackedBatches, load_texts

    lines = Lines(out / fronts.RESULTS)
    has_base = any(record["kind"] == "base" for record in lines.read())
    needs_calibration = settings.layers or any(needs_of(method) for method in methods)
    folders = [out / "covariances", out / "spaces"] if needs_calibration else []
    if has_base and all(folder.exists() for folder in folders):
        return
    model, tokenizer = load_model(settings)
    if not has_base:
        began = time.perf_counter()
        scores = evaluate(model, tokenizer, load_data(settings, tokenizer), settings)
        lines.write({"kind": "base", "scores": scores, "seconds": {"evaluate": time.perf_counter() - began}})
    if folders and not folders[0].exists():
        name, split = parted(settings.calibrate)
        batches = PackedBatches(load_texts(name, split=split), tokenizer, samples=settings.samples, length=settings.length)
        compute_covariances(model, batches, folders[0], precision="auto", checkpoint=out / "covariances.checkpoint")
        checkpoint.delete(out / "covariances.checkpoint")
    if folders and not folders[1].exists():
        NullSpaces.from_covariances(Covariances.load(folders[0]), rank=settings.rank, spectrum=True).save(folders[1])


def config_of(model: Any, settings: Settings) -> Any:
    """PEFT's: all linear layers but the head, α = r."""
    from peft import LoraConfig

    from nullspace.model.sites import find_targets

    return LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=sorted(find_targets(model)), task_type="CAUSAL_LM")


def wrap(model: Any, variant: Variant, seed: int, settings: Settings, out: Path) -> Any:
    """The model with the variant's adapters, untrained."""
    import torch
    from peft import get_peft_model

    from nullspace import Covariances, NullSpaces
    from nullspace.integrations.peft import inject_adapters

    config = config_of(model, settings)
    start = METHODS[variant.method]
    if start.method is None:
        torch.manual_seed(seed)
        return get_peft_model(model, config)
    needs = needs_of(variant.method)
    return inject_adapters(
        model,
        config,
        NullSpaces.load(out / "spaces") if "spaces" in needs else None,
        method=start.method,
        covariances=Covariances.load(out / "covariances") if "covariances" in needs else None,
        freeze_a=start.frozen,
        sigma_scale=variant.sigma_scale,
    )


def train(
    model: Any,
    tokenizer: Any,
    data: Data,
    settings: Settings,
    rate: float,
    seed: int,
    *,
    weight_decay: float = 0.0,
    callbacks: Sequence[Any] = (),
) -> list[float]:
    """By transformers' `Trainer`, of what can be trained in a model: the loss of each step."""
    import torch
    from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainingArguments

    from nullspace.artifacts.locks import temporary_folder

    on_gpu = next(model.parameters()).is_cuda
    with temporary_folder() as folder:
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.accumulation,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            weight_decay=weight_decay,
            optim="adamw_torch",
            seed=seed,
            data_seed=seed,
            bf16=on_gpu and torch.cuda.is_bf16_supported(),
            gradient_checkpointing=on_gpu,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            use_cpu=not on_gpu,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=on_gpu,
        )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=evaluation.IGNORED)
        trainer = Trainer(model, arguments, collate, data.train, callbacks=list(callbacks))  # type: ignore[arg-type]
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def run_unit(settings: Settings, out: Path, variant: Variant, seed: int, rates: Sequence[float], first: bool) -> int:
    """All runs of one variant and seed that are not there yet; with `first`, the variant before training too."""
    from nullspace.integrations.peft.files import save_adapter

    lines = Lines(out / fronts.RESULTS)
    there = lines.read()
    done = {(r.get("variant"), r.get("seed"), r.get("learning_rate")) for r in there if r["kind"] == "run"}
    seen = {(r["kind"], r.get("variant")) for r in there}
    missing = [rate for rate in rates if (variant.name, seed, rate) not in done]
    untrained = first and (("start", variant.name) not in seen or (variant.changes_base and ("dropped", variant.name) not in seen))
    if not (missing or untrained):
        return 0
    model, tokenizer = load_model(settings)
    data = load_data(settings, tokenizer)
    began = time.perf_counter()
    peft_model = wrap(model, variant, seed, settings, out)
    injected = time.perf_counter() - began
    peft_model.eval()
    label = {"variant": variant.name, "method": variant.method, "sigma_scale": variant.sigma_scale}
    folder = folder_of(out, variant.name)
    if untrained:
        save_adapter(peft_model, "default", folder / f"initial-seed{seed}")
        scores = {"task": evaluation.task(peft_model, data.test)}
        lines.write({"kind": "start", **label, "scores": scores, "seconds": {"inject": injected}})
        if variant.changes_base:
            with peft_model.disable_adapter():
                lines.write({"kind": "dropped", **label, "scores": evaluate(peft_model, tokenizer, data, settings)})
    initial = {name: p.detach().clone() for name, p in peft_model.named_parameters() if "lora_" in name}
    for rate in missing:
        for name, parameter in peft_model.named_parameters():
            if name in initial:
                parameter.data.copy_(initial[name])
        began = time.perf_counter()
        losses = train(peft_model, tokenizer, data, settings, rate, seed)
        trained = time.perf_counter()
        scores = evaluate(peft_model, tokenizer, data, settings)
        scored = time.perf_counter()
        layers = look_at_layers(peft_model, initial, out) if settings.layers else None
        save_adapter(peft_model, "default", folder / f"lr{rate:g}-seed{seed}")
        seconds = {"train": trained - began, "evaluate": scored - trained, "layers": time.perf_counter() - scored}
        run = {"learning_rate": rate, "seed": seed, "scores": scores, "layers": layers, "train_losses": losses}
        lines.write({"kind": "run", **label, **run, "seconds": seconds})
    return len(missing)


def look_at_layers(peft_model: Any, initial: Mapping[str, Any], out: Path) -> dict[str, float]:
    """What training did to the layers, on the calibration input: means over the layers.

    `leak_before`, `leak_after`: of A's row space. `drift`: ‖ΔW X‖_F / ‖W₀ X‖_F. `update`: ‖ΔW‖_F / ‖W₀‖_F. `change_of_a`:
    ‖A − A₀‖_F / ‖A₀‖_F, the paper's Figure 1.
    """
    from nullspace import Covariances, analysis
    from nullspace.factors import LowRank
    from nullspace.integrations.peft.layers import lora_layers

    covariances = Covariances.load(out / "covariances")
    layers = lora_layers(peft_model, "default")
    numbers: dict[str, list[float]] = {name: [] for name in ("leak_before", "leak_after", "drift", "update", "change_of_a")}
    for site in covariances.sites:
        c = covariances[site.name].matrix()
        for name in site.members:
            layer, scaling = layers[name], layers[name].scaling["default"]
            key = f"base_model.model.{name}."
            a0, b0 = (initial[f"{key}lora_{factor}.default.weight"].double() for factor in "AB")
            a, b = (factor["default"].weight.detach().double() for factor in (layer.lora_A, layer.lora_B))
            before, after = LowRank(a0, scaling * b0), LowRank(a, scaling * b)
            weight = layer.get_base_layer().weight.detach().double()
            weight = (weight.T if layer.fan_in_fan_out else weight) + before.B @ before.A  # W₀: the base plus the first product
            delta = analysis.update(before, after)
            numbers["leak_before"].append(analysis.leak(a0, c))
            numbers["leak_after"].append(analysis.leak(a, c))
            numbers["drift"].append(analysis.drift(weight, c, delta))
            numbers["update"].append(float((delta.B @ delta.A).norm() / weight.norm()))
            numbers["change_of_a"].append(analysis.change(a, a0))
    return {name: statistics.fmean(values) for name, values in numbers.items()}


def difference(ours: Sequence[fronts.Record], theirs: Sequence[fronts.Record]) -> tuple[int, str | None]:
    """How many records two studies share, and the first of them whose numbers differ; times are not looked at."""

    def by_name(records: Sequence[fronts.Record]) -> dict[str, fronts.Record]:
        names = ("kind", "variant", "seed", "learning_rate")
        return {
            " ".join(str(r[name]) for name in names if name in r): {k: v for k, v in r.items() if k != "seconds"}
            for r in records
            if r["kind"] != "study"
        }

    left, right = by_name(ours), by_name(theirs)
    shared = [name for name in left if name in right]
    return len(shared), next((name for name in shared if left[name] != right[name]), None)


def write_report(settings: Settings, out: Path, rates: Sequence[float], seed: int) -> Path:
    """OUT/report.html: the study, and the layers before and after training at the middle learning rate."""
    from nullspace import Covariances, NullSpaces, analysis
    from nullspace.integrations.peft import read_course
    from nullspace.model.sites import find_targets
    from nullspace.reporting import page, sections, verdict

    study = fronts.read_study(out / fronts.RESULTS)
    rate = sorted(rates)[len(rates) // 2]
    folders = {variant: folder_of(out, variant) for variant in study.variants}
    states = {variant: (folder / f"initial-seed{seed}", folder / f"lr{rate:g}-seed{seed}") for variant, folder in folders.items()}
    analysed = analysis.analyse(
        Covariances.load(out / "covariances"),
        NullSpaces.load(out / "spaces"),
        modules=find_targets(load_model(settings)[0]),
        courses=[read_course(variant, *each) for variant, each in states.items() if all(folder.is_dir() for folder in each)],
    )
    facts = {
        "Model": settings.model,
        "Adapters": f"rank {settings.rank}, {settings.steps} steps of {settings.batch_size} examples",
        "By layer": f"seed {seed}, learning rate {rate:g}",
    }
    head = page.Head("Preservation of knowledge", facts, [*verdict.study_verdict(study), *verdict.verdict(analysed)])
    parts = [*sections.study_sections(study), *sections.sections(analysed)]
    return page.write(out / "report.html", head, parts, overwrite=True)


def folder_of(out: Path, variant: str) -> Path:
    """Where a variant's adapters are."""
    return out / ADAPTERS / variant.replace(" ", "-")


def show(study: fronts.Study) -> None:
    """The tables, on standard output."""
    if study.base is None or not study.runs:
        print("no run is finished yet")
        return
    base = fronts.paper_columns(study.base, study.base)
    print(f"base: task loss {study.base['task']['loss']:.4f}, " + ", ".join(f"{k} {_cell(v)}" for k, v in base.items()))
    for name, scores in study.start.items():
        print(f"start of {name}: {abs(scores['task']['loss'] - study.base['task']['loss']):.1e} from the base's task loss")
    for name, scores in study.dropped.items():
        lost = ", ".join(f"{measure} {f(scores, study.base):.3f}" for measure, f in fronts.MEASURES.items())
        print(f"{name} without BA: lost {lost}; task loss {scores['task']['loss']:.4f}")
    rows = fronts.over_seeds(study)
    titles = [title for title in rows[0] if title not in ("variant", "learning_rate")]
    print("\n" + "  ".join([f"{'variant':18}", f"{'rate':>8}", *(f"{title:>17}" for title in titles)]))
    for row in rows:
        cells = [f"{_cell(row[title]) if title in row else '':>17}" for title in titles]
        print("  ".join([f"{row['variant']:18}", f"{row['learning_rate']:8.1e}", *cells]))
    for measure in fronts.MEASURES:
        rows = fronts.at_equal_loss(study, measure)
        losses = list(dict.fromkeys(row["task_loss"] for row in rows))
        print(f"\n{measure} lost at a task loss of\n{'':18}" + "".join(f"{loss:>20.4f}" for loss in losses))
        for variant in study.variants:
            own = [row for row in rows if row["variant"] == variant]
            print(f"{variant:18}" + "".join(f"{_cell(row['forgetting']):>20}" for row in own))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, fronts.Spread):
        return f"{value.mean:.4f}" + ("" if math.isnan(value.deviation) else f" ± {value.deviation:.4f}")
    return f"{value:.4f}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("preservation"))
    parser.add_argument("--model", help="hub name or folder; SmolLM2-135M-Instruct by default")
    parser.add_argument(
        "--reduced", action="store_true", help="sizes for two CPU cores: under 40 minutes for one seed of all methods"
    )
    parser.add_argument("--data", type=Path, help="folder with files named " + ", ".join(file for file, _ in KNOWN.values()))
    parser.add_argument("--calibrate", help="data source; NQ-open by default")
    parser.add_argument("--knowledge", action="append", metavar="NAME=SOURCE", help="questions; nq and webq by default")
    parser.add_argument("--text", action="append", metavar="NAME=SOURCE", help="texts; wikitext by default")
    parser.add_argument("--train", help="data source of the task; GSM8K by default")
    parser.add_argument("--test", help="data source of the task")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=DEFAULT_METHODS)
    parser.add_argument("--learning-rates", nargs="+", type=float)
    parser.add_argument("--sigma-scales", nargs="+", type=float, default=[1.0], help="of LoRA-Null")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--workers", type=int, default=1, help="processes side by side")
    parser.add_argument("--report", action="store_true", help="write OUT/report.html in the end; needs vl-convert-python")
    parser.add_argument("--compare", type=Path, help="say whether the records of another study have the same numbers, and stop")
    parser.add_argument("--show", action="store_true", help="print the tables of what is finished, and stop")
    parser.add_argument("--unit", nargs=3, metavar=("METHOD", "SIGMA", "SEED"), help=argparse.SUPPRESS)
    for field in fields(Settings):
        if field.type == "int":
            parser.add_argument(
                f"--{field.name.replace('_', '-')}", type=int, help=f"{field.default}; reduced {REDUCED.get(field.name, '')}"
            )
    parser.add_argument("--dtype")
    parser.add_argument("--device")
    parser.add_argument("--no-layers", action="store_true", help="leave out what training did to the layers")
    return parser.parse_args()


def settings_of(options: argparse.Namespace) -> Settings:
    def source(name: str) -> str:
        file, hub = KNOWN[name]
        here = options.data / file if options.data else None
        return str(here) if here is not None and here.is_file() else hub

    def named(given: list[str] | None, default: Sequence[str]) -> tuple[tuple[str, str], ...]:
        if given is None:
            return tuple((name, source(name)) for name in default)
        pairs = [text.partition("=") for text in given]
        return tuple((name, path if path else source(name)) for name, _, path in pairs)

    model = options.model
    if model is None:
        from benchmarks.peers import checkpoint_of_demo_model

        model = checkpoint_of_demo_model(Path(".venv") / "smollm2-135m")
    settings = Settings(
        model=model,
        calibrate=options.calibrate or source("nq-train"),
        knowledge=named(options.knowledge, ("nq", "webq")),
        text=named(options.text, ("wikitext",)),
        train=options.train or source("gsm8k-train"),
        test=options.test or source("gsm8k-test"),
    )
    if options.reduced:
        settings = replace(settings, **REDUCED)
    names = {field.name for field in fields(Settings)} - {"model", "calibrate", "knowledge", "text", "train", "test", "layers"}
    chosen = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return replace(settings, **chosen, layers=not options.no_layers)


def begin(settings: Settings, out: Path) -> None:
    """The study's first line, or a check that the one that is there says the same."""
    out.mkdir(parents=True, exist_ok=True)
    lines = Lines(out / fronts.RESULTS)
    lines.mend()
    mine = json.loads(json.dumps(asdict(settings)))
    there = lines.read()
    if not there:
        lines.write({"kind": "study", "settings": mine, "environment": environment()})
        return
    theirs = fronts.read_study(lines.path).settings
    differing = [f"{name} {theirs.get(name)!r}, now {value!r}" for name, value in mine.items() if theirs.get(name) != value]
    if differing:
        raise SystemExit(f"{lines.path} is of other settings: {'; '.join(differing)}. Choose another --out.")


def main() -> None:
    options = parse()
    path = options.out / fronts.RESULTS
    if options.compare or options.show:
        if options.compare:
            other = options.compare / fronts.RESULTS if options.compare.is_dir() else options.compare
            shared, differs = difference(fronts.read_records(path), fronts.read_records(other))
            print(f"{shared} records are in both: " + (f"{differs} differs" if differs else "the same numbers"))
            sys.exit(1 if differs or not shared else 0)
        show(fronts.read_study(path))
        return
    rates = options.learning_rates or ([1.25e-4, 5e-4, 2e-3] if options.reduced else [2e-5, 1e-4, 5e-4])
    settings = settings_of(options)
    if options.unit:  # of a process that has begun: only one may mend the file, and none while others write
        method, sigma, seed = options.unit
        first = int(seed) == options.seeds[0]
        count = run_unit(settings, options.out, Variant(method, float(sigma)), int(seed), rates, first)
        print(json.dumps({"runs": count}))
        return
    begin(settings, options.out)
    began = time.perf_counter()
    prepare(settings, options.out, options.methods)
    print(f"base and calibration: {time.perf_counter() - began:.0f} s", flush=True)
    variants = [
        Variant(method, sigma)
        for method in options.methods
        for sigma in (options.sigma_scales if METHODS[method].method == "lora-null" else [1.0])
    ]
    units = [(variant, seed) for seed in options.seeds for variant in variants]
    if settings.device == "cpu":  # or else the workers' threads wait for each other
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // options.workers))

    def run(unit: tuple[Variant, int]) -> dict[str, Any]:
        variant, seed = unit
        arguments = [*sys.argv[1:], "--unit", variant.method, str(variant.sigma_scale), str(seed)]
        done = run_child("benchmarks.preservation", arguments)
        outcome = done.get("failed") or f"{done['runs']} runs"
        print(f"{variant.name} seed {seed}: {outcome}, {done['wall']:.0f} s", flush=True)
        return done

    with ThreadPoolExecutor(options.workers) as pool:
        failed = [done for done in pool.map(run, units) if "failed" in done]
    study = fronts.read_study(path)
    show(study)
    minutes = (time.perf_counter() - began) / 60
    print(f"\n{minutes:.1f} minutes; {path}")
    content = (
        {"settings": asdict(settings), "minutes": minutes, "rows": fronts.as_json(fronts.over_seeds(study))} if study.runs else {}
    )
    if content:
        content["equal_loss"] = {measure: fronts.as_json(fronts.at_equal_loss(study, measure)) for measure in fronts.MEASURES}
        print(f"wrote {write_result('summary', content, options.out)}")
    if options.report and study.runs and (options.out / "spaces").is_dir():
        print(f"wrote {write_report(settings, options.out, rates, options.seeds[0])}")
    if failed:
        raise SystemExit(f"{len(failed)} of {len(units)} units failed; the same command tries them again")


if __name__ == "__main__":
    main()
