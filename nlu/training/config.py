"""One TOML file that describes one experiment completely: data, tasks, model, losses, optimizer, noise, schedule, export.

`load` refuses what it does not know, by file and key; `dump` writes every value, also those that were left to their
default, so the file saved with a run hides nothing and loads to the same Config. A setting's comment says what it costs or
changes. Whole sections that are absent (`mlm`, `distill`) are steps that are not taken. Paths are taken from the working
directory.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nlu.training import datasets
from nlu.training.datasets import TRAIN, Form, Source

Kind = Literal["pairs", "labels", "similarity", "classify", "tags", "tokens", "lesson"]
FORMS: Mapping[Kind, Form] = {  # what a task of each kind reads
    "pairs": Form.PAIRS,
    "labels": Form.LABELLED,  # phrases of equal label pull each other; no head
    "similarity": Form.SCORED,
    "classify": Form.LABELLED,  # a head: one label a phrase
    "tags": Form.LABELLED,  # a head: any number of labels a phrase
    "tokens": Form.TAGGED,  # a head over token vectors
}
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=0)]
Some = Annotated[int, Field(ge=1)]


class ConfigInvalid(ValueError):
    """A config that does not say one experiment; names file and key, what was found, expected and what to do."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=False)


class Run(_Section):
    """What the run is called and what must not change between two runs of it."""

    name: Name
    seed: Count = 0
    out: str = "runs"  # the run's folder is made in here
    ship: bool = False  # weights are meant to ship: sets whose licence does not allow that are refused
    tracking: str = ""  # MLflow store; empty: in the run's folder
    autocast: Literal["off", "bf16", "fp16"] = (
        "off"  # bf16 halves activations; on a CPU without AMX it is slower
    )
    threads: Count = 0  # of torch, per rank; 0: cores / ranks on this machine


class Data(_Section):
    """Where the public sets lie."""

    root: str = "../shared/data"


class Full(_Section):
    """Train every weight, or the layers above the first `freeze` (embeddings count as frozen from 1 on)."""

    kind: Literal["full"] = "full"
    freeze: Count = 0


class Lora(_Section):
    """Low-rank updates (Hu et al. 2021, through peft), merged into the weights at export."""

    kind: Literal["lora"]
    rank: Some = 8
    alpha: Some = 16
    dropout: Probability = 0.05
    targets: tuple[str, ...] = ("query", "value")  # module names, as the base model calls them


class LayerNorm(_Section):
    """Train the layer norms alone, with all biases if `biases` (BitFit, Ben Zaken et al. 2021)."""

    kind: Literal["layernorm"]
    biases: bool = False


class Prompt(_Section):
    """Train vectors put before every phrase; p_tuning makes them through a small network (Liu et al. 2021)."""

    kind: Literal["prompt"]
    method: Literal["prompt", "p_tuning"] = "prompt"
    tokens: Some = 16  # they take room from max_tokens, and time from every phrase
    hidden: Some = 128  # of that network


Adaptation = Annotated[Full | Lora | LayerNorm | Prompt, Field(discriminator="kind")]


class Model(_Section):
    """The encoder a run starts from."""

    base: str = "all-MiniLM-L6-v2"  # a name the exporter knows, a Hugging Face name, or a folder
    max_tokens: Annotated[int, Field(ge=8, le=8192)] = (
        64  # memory and time grow with it; utterances are short
    )
    pooling: Literal["mean", "cls"] = "mean"
    uncased: bool = True  # must agree with the base's tokenizer
    dim: Count = 0  # of a compressing layer on top; 0: none
    compress: Literal["pca", "random"] = "pca"  # its first weights; pca needs one pass over the phrases
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] | None = (
        None  # absent: the base's own; on a CPU drawing it takes a fifth of a step
    )
    adaptation: Adaptation = Full()


class Mlm(_Section):
    """Masked-language-model training of the whole base on raw text, before everything else, in a run of its own.

    `optimizer`, `batch.chunk` and `schedule` hold for it too, but for what stands here.
    """

    datasets: Annotated[tuple[str, ...], Field(min_length=1)]  # of any form; user's own: dialogs or pairs
    split: str = TRAIN
    steps: Some = 2000
    batch: Some = 64  # phrases per rank
    mask: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15  # share of tokens hidden
    learning_rate: Positive = 5e-5
    head_learning_rate: Positive = 1e-3  # of what names words; lower it where the base brings that along
    warm_up: Count = 100


class FullBatch(_Section):
    """Each anchor against the candidates of all ranks; `scale` is 1 / temperature."""

    name: Literal["full_batch"]
    scale: Positive = 20.0
    symmetric: bool = True  # also rank anchors for each candidate


class SupervisedContrastive(_Section):
    """Khosla et al. 2020; `scale` is 1 / temperature."""

    name: Literal["supervised_contrastive"]
    scale: Positive = 20.0


class Triplet(_Section):
    """Mined triplets; margins fit cosine distances, which end at 2."""

    name: Literal["batch_all_triplet", "batch_hard_triplet", "batch_semi_hard_triplet"]
    margin: Positive = 0.3
    distance: Literal["cosine", "euclidean"] = "cosine"


class SoftTriplet(_Section):
    """Hardest triplets with a soft margin (Hermans et al. 2017)."""

    name: Literal["batch_hard_soft_margin_triplet"]
    distance: Literal["cosine", "euclidean"] = "cosine"


class Cosent(_Section):
    """Ranks pairs by their scores."""

    name: Literal["cosent"]
    scale: Positive = 20.0


class CosineSimilarity(_Section):
    """Squared error between cosine and score."""

    name: Literal["cosine_similarity"]


class Contrastive(_Section):
    """Hadsell et al. 2006 on scores of 0 and 1."""

    name: Literal["contrastive"]
    margin: Positive = 0.5


class CrossEntropy(_Section):
    """Of a head on phrases or on tokens."""

    name: Literal["cross_entropy", "token_cross_entropy"]
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0


class BinaryCrossEntropy(_Section):
    """Of a head whose labels are independent."""

    name: Literal["binary_cross_entropy"]


Loss = Annotated[
    FullBatch
    | SupervisedContrastive
    | Triplet
    | SoftTriplet
    | Cosent
    | CosineSimilarity
    | Contrastive
    | CrossEntropy
    | BinaryCrossEntropy,
    Field(discriminator="name"),
]

_BY_LABEL = (
    "supervised_contrastive",
    "batch_all_triplet",
    "batch_hard_triplet",
    "batch_semi_hard_triplet",
    "batch_hard_soft_margin_triplet",
)
LOSSES: Mapping[Kind, tuple[str, ...]] = {
    "pairs": ("full_batch",),
    "labels": _BY_LABEL,
    "similarity": ("cosent", "cosine_similarity", "contrastive"),
    "classify": ("cross_entropy",),
    "tags": ("binary_cross_entropy",),
    "tokens": ("token_cross_entropy",),
    "lesson": (),  # what a teacher says; [distill] makes these, a config names none
}


class Task(_Section):
    """One thing to learn. A batch holds one data set of one task, so label names of two sets never meet."""

    name: Name
    kind: Kind
    datasets: Annotated[tuple[str, ...], Field(min_length=1)]  # names of the table, or file:PATH
    loss: Loss
    split: str = TRAIN
    weight: Positive = 1.0  # of the loss; first value where weights are learnt
    share: Positive = 1.0  # of the steps, on top of what size and temperature give
    batch: Count = 0  # rows per rank; 0: batch.per_rank
    labels_per_batch: Count = 0  # with examples_per_label: P labels of K examples instead of plain rows
    examples_per_label: Count = 0
    rename: dict[str, str] = {}  # labels to other labels, or to "" to drop them
    cap_per_label: Count = 0  # examples of one label at most; 0: all
    min_chars: Count = 0  # shorter phrases are left out
    limit: Count = 0  # examples of one set at most; 0: all
    augment: bool = True  # whether [augment] applies

    @property
    def form(self) -> Form:
        """What its data sets must give."""
        return FORMS[self.kind]

    @model_validator(mode="after")
    def _consistent(self) -> Task:
        if self.kind == "lesson":
            raise ValueError("a lesson is what [distill] makes of its teacher; take another kind")
        if self.loss.name not in LOSSES[self.kind]:
            raise ValueError(
                f"loss {self.loss.name!r} is not for kind {self.kind!r}; take {' or '.join(LOSSES[self.kind])}"
            )
        by_label = bool(self.labels_per_batch or self.examples_per_label)
        if (self.kind == "labels") != by_label:
            raise ValueError(
                "labels_per_batch and examples_per_label belong to kind 'labels', which needs both; "
                f"found {self.labels_per_batch} and {self.examples_per_label} with kind {self.kind!r}"
            )
        if by_label and (self.labels_per_batch < 2 or self.examples_per_label < 2):
            raise ValueError("a batch by label needs 2 labels and 2 examples of each at least")
        if by_label and self.batch:
            raise ValueError("batch is labels_per_batch x examples_per_label here; leave batch out")
        if self.rename and self.kind in ("pairs", "similarity"):
            raise ValueError(f"rename is for labels, kind {self.kind!r} has none; leave it out")
        return self


class Mix(_Section):
    """How tasks share the steps and the gradient."""

    temperature: Annotated[float, Field(ge=1.0)] = (
        2.0  # p ~ size^(1/T): 1 lets large sets rule, 5 is near even
    )
    weighting: Literal["fixed", "uncertainty"] = (
        "fixed"  # uncertainty learns task weights (Kendall et al. 2018)
    )


class Optimizer(_Section):
    """AdamW, or LAMB for large batches (You et al. 2019)."""

    name: Literal["adamw", "lamb"] = "adamw"
    learning_rate: Positive = 2e-5
    head_learning_rate: Positive = 1e-3  # of heads and the compressing layer, which start from nothing
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0  # of the rate, per layer from the top down
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    epsilon: Positive = 1e-8
    warm_up: Count = 500  # steps
    decay: Literal["constant", "linear", "cosine"] = "linear"  # after warm-up, down to 0 at the last step
    clip: Annotated[float, Field(ge=0.0)] = 1.0  # gradient norm; 0: off
    scale_with_ranks: Literal["none", "sqrt", "linear"] = "sqrt"  # of the rate; linear suits LAMB
    compression: Literal["none", "fp16", "bf16"] = "none"  # of gradients between ranks


class Batch(_Section):
    """How much a step sees."""

    per_rank: Some = 128  # rows; negatives per anchor = per_rank x ranks - 1
    chunk: Count = 0  # rows encoded at once, those of like length together; 0: all
    recompute: bool = (
        True  # hold the activations of one chunk only (gradient caching): memory for a third more time
    )


class Noise(_Section):
    """One kind of noise: how many phrases get it, and how much of such a phrase."""

    probability: Probability = 0.0
    rate: Probability = 0.1  # of characters, or of words where the kind works on words


class Augment(_Section):
    """Noise put on training phrases; the kinds are drawn one by one, so a phrase may get several."""

    keyboard: Noise = Noise()  # neighbouring keys, swaps, lost, doubled and stray characters
    ocr: Noise = Noise()  # shapes that look alike
    recogniser: Noise = Noise()  # what speech recognition does: words, not letters
    adversarial: Noise = Noise()  # another real word that is spelt nearly the same
    misspelling: Noise = Noise()  # errors people made with this very word, from `misspellings`
    misspellings: tuple[str, ...] = ()  # pair sets of error -> word
    vocabulary: Count = 20000  # most frequent training words adversarial may choose from
    both_sides: bool = False  # of a pair; else the anchor alone, so clean phrases stay the target

    @model_validator(mode="after")
    def _has_words(self) -> Augment:
        if self.misspelling.probability and not self.misspellings:
            raise ValueError("misspelling needs a set in misspellings, such as en_misspellings")
        return self


class Schedule(_Section):
    """How long, and how often what."""

    steps: Some
    evaluate_every: Count = 500  # 0: at the end only
    checkpoint_every: Count = 500  # what a kill costs at most
    keep: Some = 3  # checkpoints
    log_every: Some = 20


class Evaluate(_Section):
    """What a vectorizer is judged by; test splits of all sets, unseen sets besides."""

    suite: Literal["quick", "full"] = "quick"  # a minute, or some ten, on two quiet cores
    f_beta: Positive = 1.8
    shots: tuple[Some, ...] = (5, 10)
    seeds: Some = 3  # of the few-shot draws; their mean is reported
    noise: Probability = 0.1  # of characters, in the runs under noise
    held_out: tuple[str, ...] = ()  # sets that no task may train on


class Export(_Section):
    """The vectorizer folder a run ends in."""

    precision: Literal["fp32", "int8"] = "int8"
    base_share: Annotated[float, Field(ge=0.0, lt=1.0)] = (
        0.0  # of the base in the weights that are saved: what it knew and no task asked for comes back
    )
    word_bits: Literal[4, 8] = (
        8  # of word vectors in int8; half as many are half the megabytes of a table that takes no time
    )
    token_dim: Count = 128  # of token vectors; 0: none

    @model_validator(mode="after")
    def _rounds(self) -> Export:
        if self.word_bits == 4 and self.precision != "int8":
            raise ValueError("word_bits: 4 bits are for int8; take 8, or precision 'int8'")
        return self


class Stage(_Section):
    """One stage of distillation: weights of its losses, 0 where one is not used."""

    name: Name
    steps: Some
    learning_rate: Positive = 1e-4
    warm_up: Count = 100
    outputs: Annotated[float, Field(ge=0.0)] = 0.0  # squared distance to the teacher's vectors
    similarities: Annotated[float, Field(ge=0.0)] = 0.0  # KL between rows of the batch's similarity matrix
    softness: Positive = 0.05  # temperature of that KL
    attention: Annotated[float, Field(ge=0.0)] = 0.0  # squared distance to the teacher's attention
    tokens: Annotated[float, Field(ge=0.0)] = 0.0  # the same of token states, relative to their size
    tasks: Annotated[float, Field(ge=0.0, le=1.0)] = (
        0.0  # share of the steps that goes to the tasks of this config
    )
    int8: bool = False  # with numbers rounded as they will be served
    base_share: Annotated[float, Field(ge=0.0, lt=1.0)] = (
        0.0  # as in [export]; the base is what the stage began with
    )

    @model_validator(mode="after")
    def _learns(self) -> Stage:
        if self.tasks < 1.0 and not any((self.outputs, self.similarities, self.attention, self.tokens)):
            raise ValueError(
                "all its weights are 0, so it would learn nothing of the teacher; give one of them a weight, or set tasks = 1"
            )
        return self


class Distill(_Section):
    """A smaller student of a teacher. `model` says its dimensions, `run.autocast` and `batch` how it is computed."""

    teacher: str  # a name the exporter knows, or a folder such as runs/multitask/model
    layers: Annotated[
        tuple[Count, ...], Field(min_length=1)
    ]  # teacher layers the student begins with, from 0
    neurons: Count = 0  # of each layer's feed-forward part, the busiest; 0: all
    vocabulary: Count = (
        0  # most frequent words and pieces kept; 0: all. Few save megabytes and cost rare words
    )
    datasets: Annotated[tuple[str, ...], Field(min_length=1)]  # raw phrases; labels are not looked at
    split: str = TRAIN
    scripts: tuple[str, ...] = ()  # phrases with letters of others are left out, e.g. ["latin"]; empty: none
    limit: Count = 0  # phrases of one set at most; 0: all
    batch: Some = 256  # phrases per rank
    stages: Annotated[tuple[Stage, ...], Field(min_length=1, alias="stage")]


class Config(_Section):
    """The experiment."""

    run: Run
    data: Data = Data()
    model: Model = Model()
    mlm: Mlm | None = None
    tasks: tuple[Task, ...] = Field((), alias="task")
    mix: Mix = Mix()
    optimizer: Optimizer = Optimizer()
    batch: Batch = Batch()
    augment: Augment = Augment()
    schedule: Schedule
    evaluate: Evaluate = Evaluate()
    export: Export = Export()
    distill: Distill | None = None

    def batch_of(self, task: Task) -> int:
        """Rows of one task's batch on one rank."""
        return task.labels_per_batch * task.examples_per_label or task.batch or self.batch.per_rank

    def sources(self) -> dict[str, Source]:
        """Every data set the run trains on, by the name it has here. FileNotFoundError for a user's set that is not there."""
        found = {name: source_of(name, task.form) for task in self.tasks for name in task.datasets}
        raw = (*(self.mlm.datasets if self.mlm else ()), *(self.distill.datasets if self.distill else ()))
        for name in (*raw, *self.augment.misspellings):
            found.setdefault(name, source_of(name, Form.PAIRS))
        return found

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if not self.tasks and self.mlm is None and self.distill is None:
            raise ValueError("nothing to train: give it a [[task]], [mlm] or [distill]")
        names = [task.name for task in self.tasks]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two tasks are called {name!r}; rename one")
        if self.distill and any(stage.tasks for stage in self.distill.stages) and not self.tasks:
            raise ValueError("distill: a stage has a share for tasks, but there is none; add a [[task]]")
        if self.export.base_share and self.model.adaptation.kind != "full":
            raise ValueError(
                "export.base_share: an adaptation leaves the base as it is; set it to 0 or take adaptation 'full'"
            )
        for where, name, split, form in self._named():
            self._check(where, name, split, form)
        for name in self.evaluate.held_out:
            if name not in datasets.FOLDERS:
                datasets.find(name)
        return self

    def _named(self) -> Iterator[tuple[str, str, str, Form | None]]:
        """Every data set the config trains on: where it stands, its name, the split, and the form if that matters."""
        for task in self.tasks:
            yield from ((f"task {task.name!r}", name, task.split, task.form) for name in task.datasets)
        if self.mlm:
            yield from (("mlm", name, self.mlm.split, None) for name in self.mlm.datasets)
        if self.distill:
            yield from (("distill", name, self.distill.split, None) for name in self.distill.datasets)
        yield from (("augment.misspellings", name, TRAIN, Form.PAIRS) for name in self.augment.misspellings)

    def _check(self, where: str, name: str, split: str, form: Form | None) -> None:
        if name.startswith(datasets.OWN):
            return  # looked at when it is read: a config may be written before the data is there
        source = datasets.find(name)
        source.files(split)
        if form is not None and source.form is not form:
            fitting = [other for other in datasets.SOURCES if other.startswith(f"{source.folder}.")]
            raise ValueError(
                f"{where}: {name} gives {source.form.value}, not {form.value}; "
                f"of the same folder there is {', '.join(fitting) or 'nothing else'}"
            )
        if source.evaluation_only:
            raise ValueError(f"{where}: {name} is for evaluation only; leave it out")
        if self.run.ship and not source.may_ship:
            raise ValueError(
                f"{where}: {name} ({source.licence}) may not train weights that ship; "
                "leave it out or set run.ship = false"
            )
        if {name, source.folder} & set(self.evaluate.held_out):
            raise ValueError(f"{where}: {name} is held out by evaluate.held_out; leave it out of one of them")


def source_of(name: str, form: Form) -> Source:
    """The data set a config means by a name: an entry of the table, or a user's own files in that form."""
    return datasets.own(name, form) if name.startswith(datasets.OWN) else datasets.find(name)


def load(path: Path) -> Config:
    """Read a config. Raises ConfigInvalid with the file and the key that is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigInvalid(
            f"{path}: found {error}, expected a TOML file in UTF-8; check the path"
        ) from error
    return parse(text, name=str(path))


def parse(text: str, *, name: str = "config") -> Config:
    """A Config from TOML text; `name` is how errors call it."""
    try:
        return Config.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigInvalid(
            f"{name}: found {error}, expected TOML; see nlu/training/configs for one"
        ) from error
    except ValidationError as error:
        complaints = [_complaint(dict(each)) for each in error.errors(include_url=False)]
        raise ConfigInvalid("\n".join(f"{name}: {complaint}" for complaint in complaints)) from error


def dump(config: Config) -> str:
    """The resolved config as TOML, with every value that is in force; `parse` gives an equal Config back."""
    lines = _tables(config.model_dump(mode="json", by_alias=True, exclude_none=True))
    return "\n".join(lines).strip() + "\n"


def _complaint(error: Mapping[str, Any]) -> str:
    key = _key(error["loc"])
    if error["type"] == "extra_forbidden":
        last = str(error["loc"][-1])
        near = difflib.get_close_matches(last, _settings(Config), n=1)
        meant = f"; did you mean {near[0]!r}?" if near else "; remove it"
        return f"{key}: found an unknown key, expected only settings that exist{meant}"
    if error["type"] == "missing":
        return f"{key}: found nothing, expected a value; add the key"
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: found {error['input']!r:.80}, {message[:1].lower()}{message[1:]}; change the value"


def _key(location: Iterable[int | str]) -> str:
    """`task[2].loss.scale`; the tag of a union, which pydantic puts into the path, is no key of the file."""
    key = ""
    tagged = False
    for step in location:
        if isinstance(step, int):
            key += f"[{step}]"
        elif not tagged:
            key += f".{step}"
        tagged = not tagged and step in ("loss", "adaptation")
    return key.lstrip(".")


def _settings(model: type[BaseModel], known: set[str] | None = None) -> list[str]:
    """Every key a config may have, anywhere."""
    keys: dict[str, None] = {}
    seen = known if known is not None else set()
    for name, field in model.model_fields.items():
        keys[field.alias or name] = None
        for inner in _models(field.annotation):
            if inner.__name__ not in seen:
                seen.add(inner.__name__)
                keys.update(dict.fromkeys(_settings(inner, seen)))
    return list(keys)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models(part)]


def _tables(values: Mapping[str, Any], path: str = "", head: str = "") -> list[str]:
    """Lines of one table: first its own values, then the tables inside it, because TOML has no way back up."""
    plain = {key: value for key, value in values.items() if not _is_table(value)}
    lines = [head] if head else []
    lines += [f"{_bare(key)} = {_value(value)}" for key, value in plain.items()]
    for key, value in values.items():
        if key in plain:
            continue
        inner = f"{path}{_bare(key)}"
        tables, brackets = (value, "[[{}]]") if isinstance(value, list) else ([value], "[{}]")
        for table in tables:
            lines += ["", *_tables(table, f"{inner}.", brackets.format(inner))]
    return lines


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) or (
        isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)
    )


def _bare(key: str) -> str:
    plain = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if plain else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return repr(value)
