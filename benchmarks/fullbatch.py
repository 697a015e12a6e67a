"""Do N ranks with a share of the batch each train exactly as one process with all of it?

    python -m benchmarks.fullbatch [--ranks 2 4] [--save]

Starts real ranks with horovodrun, and compares the loss and every parameter's gradient of a small transformer with
those of this one process without caching: full-batch and supervised contrastive losses, on ranks without and with
gradient caching, in float32 and float64. Two controls must differ: a gather whose gradients stop at the rank, and one that
averages them over ranks, as Horovod's own does.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.fullbatch_rank import PAIRS, Answer, Case, answer, cases, controls, make_batch
from benchmarks.result import Bar, emit
from nlu.training.distributed import Alone

ALLOWED = 1e-5
_SECONDS = 300


def main() -> None:
    """Measure and print."""
    arguments = _arguments()
    figures: dict[str, float] = {}
    bars = []
    for ranks in arguments.ranks:
        began = time.perf_counter()
        theirs = _ranks(ranks)
        figures[f"{ranks}_ranks_seconds"] = time.perf_counter() - began
        agreed = [(case, _compare(case, theirs[case], ranks)) for case in cases()]
        for case, difference in agreed:
            # emit keeps four decimals, so small things are given in billionths
            figures[f"{ranks}_ranks_{case.name.replace(' ', '_')}_difference_e-9"] = 1e9 * difference
        worst = max(difference for _, difference in agreed)
        bars.append(
            Bar(f"{ranks} ranks: largest difference of loss and gradients", worst, ALLOWED, worst <= ALLOWED)
        )
        for case in controls():
            difference = _compare(case, theirs[case], ranks)
            figures[f"{ranks}_ranks_control_{case.gather.replace(' ', '_')}_difference"] = difference
            bars.append(
                Bar(f"{ranks} ranks: a gather {case.gather} differs by more than", difference, ALLOWED, difference > ALLOWED)
            )  # fmt: skip
        figures |= _negatives(ranks, theirs[next(cases())].negatives)
    emit("fullbatch", figures, bars, horovod=importlib.metadata.version("horovod"), torch=torch.__version__)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--save", action="store_true", help="keep the result under benchmarks/results/")
    return parser.parse_args()


def _ranks(ranks: int) -> dict[Case, Answer]:
    if importlib.util.find_spec("horovod") is None:
        sys.exit("benchmarks.fullbatch: horovod is not installed; see deploy/horovod/README.md")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "answers.pt"
        horovodrun = str(Path(sys.executable).with_name("horovodrun"))
        rank = [sys.executable, "-m", "benchmarks.fullbatch_rank", str(out)]
        # One thread each: ranks of one machine share its cores, and a busy-waiting rank would starve the others.
        run = subprocess.run(
            [horovodrun, "--gloo", "-np", str(ranks), *rank],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
        if run.returncode != 0:
            sys.exit(f"benchmarks.fullbatch: {ranks} ranks failed\n{run.stdout}\n{run.stderr}")
        answers = torch.load(out, weights_only=True)
    return {case: Answer(**each) for case, each in zip((*cases(), *controls()), answers, strict=True)}


def _compare(case: Case, theirs: Answer, ranks: int) -> float:
    """The largest difference of the loss and of any element of any gradient, printed beside the largest gradient."""
    plain = dataclasses.replace(case, cached=False, gather="with gradients")
    ours = answer(plain, make_batch(PAIRS * ranks), Alone())
    if ours.gradients.keys() != theirs.gradients.keys() or not torch.equal(ours.negatives, theirs.negatives):
        return float("inf")
    gradient = max(_largest(ours.gradients[name] - theirs.gradients[name]) for name in ours.gradients)
    loss = abs(ours.loss - theirs.loss)
    scale = max(_largest(each) for each in ours.gradients.values())
    label = f"control: gather {case.gather}" if case in set(controls()) else case.name
    print(
        f"{ranks} ranks x {PAIRS}  {label:44s} loss {ours.loss:.6f}  differences: loss {loss:.1e}  "
        f"gradients {gradient:.1e} (largest gradient {scale:.2g}, {len(ours.gradients)} parameters)"
    )
    return max(gradient, loss)


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()


def _negatives(ranks: int, negatives: Tensor) -> dict[str, float]:
    most = PAIRS * ranks - 1
    masked = most - negatives
    print(
        f"{ranks} ranks x {PAIRS}  effective negatives per anchor: B*N-1 = {most}, minus {masked.min()} to {masked.max()} "
        f"masked = {negatives.min()} to {negatives.max()}, mean {negatives.double().mean():.2f}"
    )
    return {
        f"{ranks}_ranks_candidates_but_own": most,
        f"{ranks}_ranks_masked_mean": masked.double().mean().item(),
        f"{ranks}_ranks_negatives_mean": negatives.double().mean().item(),
        f"{ranks}_ranks_negatives_min": float(negatives.min()),
        f"{ranks}_ranks_negatives_max": float(negatives.max()),
    }


if __name__ == "__main__":
    main()
