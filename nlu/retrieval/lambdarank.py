"""LightGBM's trees that put the true reply first, and the ONNX graph that a ranker runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import helper
from onnxmltools.convert import convert_lightgbm
from onnxmltools.convert.common.data_types import FloatTensorType

from nlu.ranker import INPUT, OUTPUT

TREES, PATIENCE = 600, 50  # at most, and without a gain on held-out dialogs before it stops

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Fitted:
    """Trees over a table of features."""

    booster: Any  # lightgbm.Booster
    trees: int
    ndcg: float  # at 10, on the exchanges that told when to stop

    def gains(self) -> NDArray[np.float64]:
        """[features] how much of what was gained each feature brought; sums to 1, or to 0 where nothing was."""
        gains = np.asarray(self.booster.feature_importance("gain", iteration=self.trees), np.float64)
        return gains / (gains.sum() or 1.0)

    def to_onnx(self) -> bytes:
        """The graph: INPUT [rows, features] to OUTPUT [rows, 1]; deterministic."""
        width = self.booster.num_feature()
        found: Any = convert_lightgbm(
            self.booster, name="ranker", initial_types=[(INPUT, FloatTensorType([None, width]))]
        )
        graph = found.graph
        (output,) = graph.output
        for node in graph.node:
            node.output[:] = [OUTPUT if name == output.name else name for name in node.output]
        output.name = OUTPUT
        model = helper.make_model(graph, opset_imports=found.opset_import, producer_name="chorus-nlu")
        model.ir_version = found.ir_version
        serialised: bytes = model.SerializeToString(deterministic=True)
        return serialised


def fit(train: FloatArray, held: FloatArray, *, seed: int, leaves: int = 31) -> Fitted:
    """Trees of tables [exchanges, candidates, features] with the true reply at column 0, by LambdaRank (Burges, 2010) in
    LightGBM (Ke et al., 2017); as many as rank the `held` exchanges best. The same input gives the same trees.

    Raises ValueError where LightGBM's library cannot be loaded.
    """
    try:
        import lightgbm  # takes half a second
    except OSError as error:
        raise ValueError(
            f"lightgbm: found {error}, expected its OpenMP library; install libgomp1 with your system's package manager"
        ) from error

    parameters = {
        "objective": "lambdarank", "metric": "ndcg", "eval_at": [10], "num_leaves": leaves, "learning_rate": 0.05,
        "min_data_in_leaf": min(50, max(1, len(train) // 20)), "feature_fraction": 0.7, "bagging_fraction": 0.8, "bagging_freq": 1,
        "lambdarank_truncation_level": train.shape[1], "verbosity": -1, "seed": seed, "deterministic": True, "force_col_wise": True,
        "num_threads": 1,
    }  # fmt: skip
    lessons = _dataset(lightgbm, train)
    stop = lightgbm.early_stopping(PATIENCE, verbose=False)
    booster = lightgbm.train(
        parameters, lessons, TREES, valid_sets=[_dataset(lightgbm, held, lessons)], callbacks=[stop]
    )
    trees = booster.best_iteration
    kept = lightgbm.Booster(model_str=booster.model_to_string(num_iteration=trees))
    return Fitted(kept, trees, float(booster.best_score["valid_0"]["ndcg@10"]))


def _dataset(lightgbm: Any, table: FloatArray, reference: Any = None) -> Any:
    """LightGBM breaks ties by place: the true reply comes last, so that they count against it."""
    exchanges, of, width = table.shape
    right = np.zeros((exchanges, of), np.int8)
    right[:, -1] = 1
    return lightgbm.Dataset(
        np.ascontiguousarray(table[:, ::-1]).reshape(-1, width), right.ravel(), group=[of] * exchanges,
        reference=reference, params={"verbosity": -1},
    )  # fmt: skip
