"""Masked-language-model training of the base on raw phrases (Devlin et al. 2019), before everything else.

    phrases -> some tokens hidden, others at every step -> states of those places -> the words' own vectors name them

The stage is a training run as any (train.py) with a folder of its own, and this is its one task; the base it ends in is
what the rest of the experiment begins with. Gururangan et al. 2020 is why: a base that has read dialogues learns more
from few labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from nlu.public_data import Labelled
from nlu.training.config import Config, Full, Mlm, Task
from nlu.training.distributed import World
from nlu.training.loop import Learner, TaskData, Work
from nlu.training.losses import Outcome
from nlu.training.network import NO_WORD, Network, Tokens
from nlu.training.sampler import Pool

TASK = "mlm"
HEAD = "hidden_words"  # what the head is called in the network; a network is saved without it
SHOWN = -100  # instead of a token that is not hidden


def stage(config: Config, plan: Mlm) -> Config:
    """The training run that the stage is: the whole of the base, and nothing on top that would outlive it."""
    rates = {
        "learning_rate": plan.learning_rate,
        "head_learning_rate": plan.head_learning_rate,
        "warm_up": plan.warm_up,
    }
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"adaptation": Full(), "dim": 0}),
            "tasks": (),
            "optimizer": config.optimizer.model_copy(update=rates),
            "schedule": config.schedule.model_copy(update={"steps": plan.steps}),
            # What a vectorizer keeps of its base is for the end of the experiment.
            "export": config.export.model_copy(update={"base_share": 0.0}) if config.tasks else config.export,
        }
    )


def task_data(plan: Mlm, dataset: str, phrases: Sequence[str], held: Sequence[str], world: World) -> TaskData:
    """A pool of raw phrases, and those held back to measure perplexity on. ValueError where one of both is empty."""
    if not phrases or not held:
        raise ValueError(
            f"mlm.datasets: found {len(phrases)} phrases of {dataset} and {len(held)} to hold back, expected some of both; "
            "leave the set out or give it more rows"
        )
    task = Task.model_construct(name=TASK, kind="lesson", datasets=plan.datasets, augment=False)  # type: ignore[call-arg]
    pool = Pool(TASK, dataset, len(phrases), plan.batch)
    rows, apart = (tuple(Labelled(phrase, ()) for phrase in some) for some in (phrases, held))
    return TaskData(task, pool, rows, apart, (), Cloze(plan.mask, tuple(held), world))


def with_head(learner: Learner) -> Learner:
    """The same learner, whose network also names hidden words: through the base's own head for that, or a fresh one.

    Its last layer is the word vectors themselves. Raises ValueError for a base that cannot be trained so.
    """
    encoder, tokenizer = learner.network.graph.encoder, learner.network.tokenizer
    if tokenizer.mask_token is None:
        raise ValueError(
            "mlm: found a tokenizer without a token to hide others behind, expected a mask token; take another base"
        )
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # a fresh head is no news
    try:
        family = transformers.AutoModelForMaskedLM.from_pretrained(encoder.name_or_path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"mlm: found no masked-language-model head for a {type(encoder).__name__} "
            f"({str(error).splitlines()[0]}), expected an encoder of the BERT or RoBERTa families; take another base"
        ) from error
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    parts = [part for part in family.children() if part is not family.base_model]
    if len(parts) != 1:
        raise ValueError(
            f"mlm: found a {type(family).__name__} with a head of {len(parts)} parts, expected one, as in the BERT and "
            "RoBERTa families; take another base"
        )
    family.get_output_embeddings().weight = encoder.get_input_embeddings().weight
    learner.network.add_module(HEAD, parts[0])
    return learner


@dataclass(frozen=True, slots=True)
class Gaps(Tokens):
    """Phrases with some of their tokens hidden."""

    hidden: Tensor  # [batch, tokens] int64: the token that stood there, SHOWN where it still does


@dataclass(frozen=True, slots=True)
class Cloze:
    """The lesson: to name the hidden words. Of those, as BERT had it, 80 % are the mask token, 10 % some other token,
    and 10 % what they were."""

    mask: float  # the share of tokens that are hidden
    held: tuple[str, ...]
    world: World

    def work(
        self, rows: Sequence[int], chunks: Sequence[Tokens], order: Sequence[int], network: Network
    ) -> Work:
        """Mean cross-entropy over the hidden words of all ranks; what is hidden comes from torch's random state."""
        gaps = tuple(self._gaps(chunk, network.tokenizer) for chunk in chunks)
        hidden = torch.cat([_there(each.hidden) for each in gaps])

        def loss(columns: Sequence[Tensor]) -> Outcome:
            # Ranks hide different numbers of words; gradients are averaged over ranks, so this makes them those of all.
            everywhere = self.world.all_gather(torch.tensor([float(len(hidden))], device=hidden.device)).sum()
            total = functional.cross_entropy(named(network, columns[0]), hidden, reduction="sum")
            return Outcome(total * self.world.size / everywhere.clamp(min=1))

        return Work((gaps,), lambda chunk: _states(network, chunk), loss)

    @torch.no_grad()
    def measure(self, network: Network, *, batch: int) -> tuple[str, float]:
        """Perplexity over the same hidden words of the held phrases each time: 1 is perfect, the vocabulary a blind guess."""
        training = network.training
        network.eval()
        total, count = 0.0, 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for start in range(0, len(self.held), batch):
                tokens = network.tokenise(self.held[start : start + batch]).to(network.device)
                gaps = self._gaps(tokens, network.tokenizer)
                hidden = _there(gaps.hidden)
                logits = named(network, _states(network, gaps))
                total += float(functional.cross_entropy(logits, hidden, reduction="sum"))
                count += len(hidden)
        network.train(training)
        return "perplexity", math.exp(total / max(1, count))

    def _gaps(self, tokens: Tokens, tokenizer: Any) -> Gaps:
        collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=self.mask)
        # On the CPU, so that the same words are hidden whatever trains.
        ids, hidden = collator.torch_mask_tokens(
            tokens.ids.cpu().clone(), special_tokens_mask=(tokens.words == NO_WORD).cpu()
        )
        device = tokens.ids.device
        return Gaps(ids.to(device), tokens.mask, tokens.words, tokens.bounds, hidden.to(device))


def named(network: Network, states: Tensor) -> Tensor:
    """[places, hidden] to logits [places, vocabulary]."""
    head: nn.Module = network.get_submodule(HEAD)
    logits: Tensor = head(states)
    return logits


def _there(hidden: Tensor) -> Tensor:
    """[places] of the hidden tokens, row after row."""
    return hidden[hidden != SHOWN]


def _states(network: Network, chunk: Tokens) -> Tensor:
    """[places, hidden] of the hidden tokens: naming every token would cost more than encoding them."""
    if not isinstance(chunk, Gaps):
        raise ValueError("found phrases with nothing hidden; this is a bug")
    states: Tensor = network(chunk)[1]
    return states[chunk.hidden != SHOWN]
