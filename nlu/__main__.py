"""The command line. Each command imports only what it needs, so that `nlu --help` is instant."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nlu.progress import Bar, Stages, err

if TYPE_CHECKING:
    from nlu.settings import Settings
    from nlu.training.train import Finished
    from nlu.types import Utterance
    from nlu.v1 import nlu_pb2 as pb

STARTER = Path(".cache/starter")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="One shared vectorizer, a fleet of light heads, over gRPC.",
)
vectorizer_app = typer.Typer(no_args_is_help=True, help="Make and look at vectorizers.")
cache_app = typer.Typer(no_args_is_help=True, help="Prebuilt tables of common phrases.")
bundle_app = typer.Typer(no_args_is_help=True, help="Versioned bundles of everything that is served.")
app.add_typer(vectorizer_app, name="vectorizer")
app.add_typer(cache_app, name="cache")
app.add_typer(bundle_app, name="bundle")

out = Console(highlight=False)
BundleOption = Annotated[
    Path | None,
    typer.Option(
        "--bundle",
        help="Bundle folder. Default: NLU_BUNDLE, else NLU_STORE, else the bundle shipped with the package.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object instead of a page.")]
TargetOption = Annotated[
    str, typer.Option(help="host:port of a running server; without it the bundle is loaded here.")
]


@app.command()
def serve(
    bundle: BundleOption = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes any free one.")] = None,
) -> None:
    """Serve a bundle over gRPC until told to stop. Settings come from NLU_* variables; options win."""
    _one_blas_thread()
    from nlu.serve import serve as run

    chosen = {"host": host, "port": port}
    settings = _settings(bundle).model_copy(
        update={name: value for name, value in chosen.items() if value is not None}
    )
    _log(settings.log_level)
    asyncio.run(run(settings))


@app.command()
def say(
    text: Annotated[str, typer.Argument(help="What the user said.")],
    target: TargetOption = "",
    bundle: BundleOption = None,
    context: Annotated[
        list[str] | None, typer.Option(help="An earlier turn, 'assistant: ...' or 'user: ...'; oldest first.")
    ] = None,
    hypothesis: Annotated[
        list[str] | None,
        typer.Option(help="Another reading, 'TEXT=0.3'; TEXT keeps the rest of the confidence."),
    ] = None,
    annotator: Annotated[list[str] | None, typer.Option(help="Only these heads.")] = None,
    persona: Annotated[str, typer.Option(help="Who answers.")] = "",
    surface: Annotated[str, typer.Option(help="Where the reply will be said.")] = "",
    as_of: Annotated[str, typer.Option(help="The clock promotions go by, e.g. 2026-12-24T18:00:00Z.")] = "",
    replies: Annotated[int, typer.Option(help="How many replies.")] = 5,
    explain: Annotated[bool, typer.Option(help="Thresholds and ranking features too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Say something and see what was understood."""
    from nlu import show
    from nlu.types import Hypothesis, Retrieval, Turn, Utterance

    others = [_weighted(item) for item in hypothesis or ()]
    rest = max(0.0, 1.0 - sum(other.confidence or 0.0 for other in others))
    utterance = Utterance(
        hypotheses=(Hypothesis(text, rest if others else None), *others),
        context=tuple(Turn(*_turn(item)) for item in context or ()),
        persona=persona,
        surface=surface,
        as_of=_instant(as_of) if as_of else None,
        annotators=frozenset(annotator) if annotator else None,
        retrieval=Retrieval(replies),
        explain=explain,
        raw_scores=explain,
    )
    if target:
        reply = _call(target, "Understand", _request(utterance))
    else:
        reply = asyncio.run(_understand_here(utterance, bundle))
    if as_json:
        _print_json(show.reply_json(reply))
    else:
        out.print(show.reply_page(reply, utterance.hypotheses[reply.hypothesis].text))


@app.command()
def describe(target: TargetOption = "", bundle: BundleOption = None, as_json: JsonOption = False) -> None:
    """Show what is served: versions, heads, index, limits."""
    from nlu import show, wire
    from nlu.v1 import nlu_pb2 as pb

    if target:
        description = _call(target, "Describe", pb.DescribeRequest())
    else:
        description = wire.describe_message(_load(bundle).describe())
    if as_json:
        _print_json(show.description_json(description))
    else:
        out.print(show.description_page(description))


@app.command()
def doctor(bundle: BundleOption = None, as_json: JsonOption = False) -> None:
    """Check the installation and say what to do. Exit status 1 where something is bad."""
    from nlu.doctor import examine

    findings = []
    marks = {
        "ok": Text("ok", style="green"),
        "note": Text("note", style="yellow"),
        "bad": Text("bad", style="bold red"),
    }
    for finding in examine(_settings(bundle)):
        findings.append(finding)
        if not as_json:
            out.print(marks[finding.state], Text(f"{finding.check:<12}", style="bold"), finding.found)
            if finding.remedy:
                out.print(Text(f"                  -> {finding.remedy}", style="dim"))
    bad = [finding.check for finding in findings if finding.state == "bad"]
    if as_json:
        _print_json({"findings": [finding.as_dict() for finding in findings], "healthy": not bad})
    raise typer.Exit(1 if bad else 0)


@vectorizer_app.command()
def export(
    source: Annotated[str, typer.Argument(help="A folder, all-MiniLM-L6-v2, or a Hugging Face name.")],
    out_folder: Annotated[Path, typer.Option("--out", help="Where the vectorizer folder goes.")],
    precision: Annotated[
        Literal["fp32", "int8"],
        typer.Option(help="int8 is a quarter of the size and about 3x faster on a CPU."),
    ] = "int8",
    word_bits: Annotated[
        Literal["4", "8"], typer.Option(help="Bits of a word vector's component in int8; 4 halve the table.")
    ] = "8",
    token_dim: Annotated[int, typer.Option(help="Width of token vectors.")] = 128,
    phrases: Annotated[
        Path | None, typer.Option(help="Gate phrases, one a line; default: the starter content.")
    ] = None,
    min_cosine: Annotated[float | None, typer.Option(help="Lower or raise the parity gate.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Turn a sentence-transformers or Hugging Face encoder into a vectorizer folder, behind a parity gate."""
    from dataclasses import asdict, replace

    from nlu import content
    from nlu.vectorizer import fingerprint

    with _extra("train"):
        from nlu.training.export import Gates
        from nlu.training.export import export as run
    gates = Gates()
    if min_cosine is not None:
        gates = replace(gates, fp32_min_cosine=min_cosine, int8_mean_cosine=min_cosine)
    said = content.load().phrases() if phrases is None else phrases.read_text(encoding="utf-8").splitlines()
    with err.status("loading") as status:
        parity = run(
            source,
            out_folder,
            precision=precision,
            phrases=said,
            word_bits=4 if word_bits == "4" else 8,
            token_dim=token_dim,
            gates=gates,
            progress=status.update,
        )
    found = {
        "folder": str(out_folder),
        "fingerprint": fingerprint(out_folder),
        "precision": precision,
        **asdict(parity),
    }
    if as_json:
        _print_json(found)
    else:
        out.print(
            f"{out_folder}: {precision}, fingerprint {found['fingerprint'][:12]}, cosine to torch over {parity.phrases} phrases: "
            f"mean {parity.mean_cosine:.4f}, worst {parity.min_cosine:.4f}; alone and in a crowd the same bits"
        )


@vectorizer_app.command()
def evaluate(
    folders: Annotated[
        list[Path], typer.Argument(help="Vectorizer folders; the others are held against the first.")
    ],
    suite: Annotated[
        Literal["quick", "full"], typer.Option(help="A minute on small samples, or everything.")
    ] = "quick",
    data: Annotated[Path, typer.Option(help="The folder of public datasets.")] = Path("../shared/data"),
    out_folder: Annotated[Path, typer.Option("--out", help="Where evaluation.json, .md and .png go.")] = Path(
        "runs/evaluation"
    ),
    dims: Annotated[
        str, typer.Option(help="Also cut to these widths by PCA, e.g. 300,256,128; intents and STS alone.")
    ] = "",
    only: Annotated[str, typer.Option(help="Look at these sets alone, e.g. banking77,hint3.")] = "",
    store: Annotated[
        Path, typer.Option(help="Vectors are kept here, so that a second run need not encode.")
    ] = Path(".cache/vectors"),
    as_json: JsonOption = False,
) -> None:
    """Compare vectorizers side by side through light heads on frozen vectors."""
    with _extra("train"):
        from nlu.training import report
        from nlu.training.config import Evaluate
        from nlu.training.evaluate import evaluate as judge
    try:
        widths = [int(width) for width in dims.split(",") if width.strip()]
    except ValueError as error:
        raise typer.BadParameter(f"--dims {dims!r}: expected widths such as 300,256,128") from error
    names = [name.strip() for name in only.split(",") if name.strip()]
    with Bar() as track:
        found = judge(
            folders, data, Evaluate(suite=suite), dims=widths, only=names, store=store, progress=track.step
        )
    written = report.write(found, out_folder)
    if as_json:
        _print_json(report.as_json(found))
    else:
        out.print(report.table(found))
        out.print(f"{', '.join(map(str, written))}: suite {found.suite}, {found.seconds:.0f} s")


@vectorizer_app.command()
def train(
    config: Annotated[
        Path,
        typer.Argument(
            exists=True, dir_okay=False, help="An experiment, e.g. nlu/training/configs/multitask.toml."
        ),
    ],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint; begin where there is none.")
    ] = False,
    steps: Annotated[int | None, typer.Option(help="Steps in all, instead of the config's.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a vectorizer, and export it; `horovodrun -np N nlu vectorizer train CONFIG` is the same on N ranks."""
    with _extra("train"):
        from nlu.training.loop import Interrupted
        from nlu.training.train import train as run
    with Stages() as bar:
        try:
            finished = run(config, resume=resume, steps=steps, begun=bar.begun)
        except Interrupted as error:
            err.print(Text(f"nlu: {error}", style="red"))
            raise typer.Exit(1) from None
    _show_finished(finished, as_json)


@vectorizer_app.command()
def distill(
    config: Annotated[
        Path,
        typer.Argument(
            exists=True,
            dir_okay=False,
            help="An experiment with [distill], e.g. nlu/training/configs/student.toml.",
        ),
    ],
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from wherever it stopped; begin where there is nothing yet."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a smaller vectorizer that knows what a teacher knows, stage after stage, and export it."""
    with _extra("train"):
        from nlu.training.distill import distill as run
        from nlu.training.loop import Interrupted
    with Stages() as bar:
        try:
            finished = run(config, resume=resume, begun=bar.begun, encoded=bar.encoded)
        except Interrupted as error:
            err.print(Text(f"nlu: {error}", style="red"))
            raise typer.Exit(1) from None
    _show_finished(finished, as_json)


def _show_finished(finished: Finished, as_json: bool) -> None:
    """What a training run ended in."""
    from dataclasses import asdict

    from nlu.vectorizer import fingerprint

    if finished.parity is None:  # another rank exported
        return
    found = {
        "folder": str(finished.folder),
        "vectorizer": str(finished.vectorizer),
        "fingerprint": fingerprint(finished.vectorizer),
        "steps": finished.steps,
        "evaluation": {name: {measure: value} for name, (measure, value) in finished.evaluation.items()},
        **asdict(finished.parity),
    }
    if as_json:
        _print_json(found)
        return
    table = Table("held rows of", "", "", box=None, pad_edge=False, header_style="dim")
    for name, (measure, value) in finished.evaluation.items():
        table.add_row(name, measure, f"{value:.3f}")
    out.print(table)
    out.print(
        f"{finished.vectorizer}: fingerprint {found['fingerprint'][:12]} after {finished.steps} steps; "
        f"{finished.folder / 'run.md'} tells all"
    )


@cache_app.command("build")
def cache_build(
    phrases: Annotated[
        Path,
        typer.Argument(exists=True, dir_okay=False, help="Phrases, one a line, the most frequent first."),
    ],
    out_folder: Annotated[
        Path, typer.Option("--out", help="Where the cold table goes, e.g. parts/cold.phrases.")
    ],
    bundle: BundleOption = None,
    tokens: Annotated[
        bool, typer.Option(help="Keep token vectors too; without them token heads still need the model.")
    ] = True,
) -> None:
    """Encode phrases with the bundle's vectorizer into a cold table."""
    from nlu import canaries, cold
    from nlu.errors import InvalidInput
    from nlu.normalizer import normalize
    from nlu.vectorizer import Vectorizer

    vectorizer = Vectorizer(_vectorizer_folder(bundle))
    wanted: dict[str, None] = {}
    refused = 0
    for line in phrases.read_text(encoding="utf-8").splitlines():
        try:
            wanted[normalize(line, uncased=vectorizer.spec.uncased).text] = None
        except InvalidInput:
            refused += 1
    with Bar() as track:
        encodings = vectorizer.encode_corpus(list(wanted), tokens=tokens, workers=_settings().workers)
        pairs = zip(wanted, track(encodings, len(wanted), "encoding"), strict=True)
        count = cold.write(
            out_folder,
            pairs,
            fingerprint=vectorizer.fingerprint,
            dim=vectorizer.dim,
            token_dim=vectorizer.token_dim,
        )
    canaries.write(out_folder, vectorizer)
    size = sum(file.stat().st_size for file in out_folder.iterdir())
    out.print(
        f"{out_folder}: {count} phrases, {size / 2**20:.1f} MiB"
        + (f"; {refused} lines refused" if refused else "")
    )


@bundle_app.command("starter")
def bundle_starter(
    vectorizer: Annotated[
        Path | None,
        typer.Option(help="A vectorizer folder, or a bundle that holds one. Default: the shipped bundle's."),
    ] = None,
    out_folder: Annotated[Path, typer.Option("--out", help="Where the bundle goes.")] = STARTER,
    data: Annotated[
        Path | None, typer.Option(help="A folder of public datasets: also train heads on them, and compare.")
    ] = None,
    created: Annotated[
        int | None,
        typer.Option(
            envvar="SOURCE_DATE_EPOCH",
            help="Seconds since 1970 for the manifest; with it the digest repeats.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Build the starter bundle from the authored content, and print how good its heads are."""
    _one_blas_thread()
    from datetime import UTC, datetime

    from nlu import content
    from nlu.settings import shipped_bundle

    with _extra("heads"):
        from nlu import starter
    with Bar() as track:
        built = starter.build(
            content.load(),
            _vectorizer_folder(vectorizer or shipped_bundle()),
            out_folder,
            data=data,
            created=None if created is None else datetime.fromtimestamp(created, UTC),
            progress=track.step,
        )
    if as_json:
        rows = [
            {"head": r.head, "trained_on": r.trained_on, "tested_on": r.tested_on, **r.metrics}
            for r in built.table
        ]
        _print_json({"bundle": built.bundle.digest, "folder": str(out_folder), "table": rows})
        return
    columns = {"accuracy": "acc", "macro_f1": "F1", "span_f1": "span F1", "auroc": "AUROC", "ece": "ECE"}
    table = Table(
        "head",
        "trained on",
        "tested on",
        "n",
        *columns.values(),
        box=None,
        pad_edge=False,
        header_style="dim",
    )
    for row in built.table:
        numbers = [f"{row.metrics[name]:.3f}" if name in row.metrics else "" for name in columns]
        table.add_row(row.head, row.trained_on, row.tested_on, str(int(row.metrics["phrases"])), *numbers)
    out.print(table)
    size = sum(file.size for _, file in built.bundle.manifest.files())
    out.print(f"{out_folder}: bundle {built.bundle.digest[:12]}, {size / 1e6:.1f} MB")


@bundle_app.command("build")
def bundle_build(
    parts_folder: Annotated[
        Path,
        typer.Argument(
            help="A folder of parts: vectorizer.NAME, head.NAME, index.NAME, cold.NAME, ranker.NAME."
        ),
    ],
    out_folder: Annotated[Path, typer.Option("--out", help="Where the bundle goes.")],
    channel: Annotated[str, typer.Option(help="The channel it is meant for.")] = "dev",
    seq: Annotated[int, typer.Option(help="Sequence number; must grow with every publication.")] = 1,
    requires_service: Annotated[
        str, typer.Option(help="Version range of this code, e.g. '>=0.1,<0.2'.")
    ] = ">=0.1.0.dev0,<1",
    sign: Annotated[Path | None, typer.Option(help="Private key (PEM) to sign with.")] = None,
) -> None:
    """Put parts together into a bundle; refuses parts made with another vectorizer."""
    from nlu import parts
    from statics.bundle import build
    from statics.signing import load_private

    key = load_private(sign) if sign else None
    bundle = build(
        parts.collect(parts_folder),
        out_folder,
        channel=channel,
        seq=seq,
        requires_service=requires_service,
        signing_key=key,
    )
    out.print(f"{out_folder}: bundle {bundle.digest}")


@bundle_app.command("verify")
def bundle_verify(
    folder: Annotated[
        Path | None, typer.Argument(help="A bundle folder; without it, what `nlu serve` would serve.")
    ] = None,
    load: Annotated[
        bool, typer.Option(help="Also load every part, check canaries and golden phrases.")
    ] = True,
) -> None:
    """Check manifest, signature, digests and fingerprint chain, then load everything."""
    bundle = _verified(folder)
    folder = bundle.path
    out.print(
        f"{folder}: {len(bundle.manifest.components)} parts, every file as the manifest says; digest {bundle.digest}"
    )
    if load:
        from nlu import loading

        engine = loading.load(bundle)
        out.print(f"{folder}: loads; canaries and golden phrases of {len(engine.fleet.names)} heads hold")


@bundle_app.command("publish")
def bundle_publish(
    folder: Annotated[Path, typer.Argument(help="A bundle folder.")],
    store: Annotated[str, typer.Argument(help="A folder, file:///folder or s3://bucket/prefix.")],
    channel: Annotated[str | None, typer.Option(help="Default: the channel in the manifest.")] = None,
) -> None:
    """Publish a bundle: blobs, manifest, and last the channel's pointer."""
    from statics.locate import open_store
    from statics.publish import publish

    bundle = _verified(folder)
    with Bar() as track:
        digest = publish(bundle, open_store(store), channel=channel, progress=track.step)
    out.print(f"{store}: channel {channel or bundle.manifest.channel} now points to {digest}")


@bundle_app.command("pull")
def bundle_pull(
    store: Annotated[str, typer.Argument(help="A folder, file:///folder or s3://bucket/prefix.")],
    root: Annotated[Path, typer.Argument(help="Where pulled bundles are kept.")],
    channel: Annotated[str, typer.Option(help="Which channel.")] = "prod",
) -> None:
    """Pull a channel's bundle: only what is missing, verified, all or nothing."""
    from statics.locate import open_store
    from statics.pull import pull
    from statics.signing import Keyring
    from statics.version import service_version

    settings = _settings()
    with Bar() as track:
        bundle = pull(
            open_store(store), root, channel=channel, service=service_version(),
            keyring=Keyring.load(settings.keyring) if settings.keyring else None,
            require_signature=settings.require_signature, progress=track.step,
        )  # fmt: skip
    out.print(f"{bundle.path}: bundle {bundle.digest}, channel {channel}, seq {bundle.manifest.seq}")


@bundle_app.command("diff")
def bundle_diff(
    old: Annotated[Path, typer.Argument(help="A bundle folder.")],
    new: Annotated[Path, typer.Argument(help="Another.")],
    as_json: JsonOption = False,
) -> None:
    """What changed between two bundles, and the bytes a pod would pull."""
    from statics.bundle import diff

    changes = diff(_verified(old).manifest, _verified(new).manifest)
    if as_json:
        _print_json(
            {
                "changes": [
                    {"part": c.folder, "what": c.what, "bytes_to_pull": c.bytes_to_pull} for c in changes
                ]
            }
        )
        return
    table = Table("part", "", "bytes to pull", box=None, pad_edge=False, header_style="dim")
    for change in changes:
        table.add_row(change.folder, change.what, str(change.bytes_to_pull))
    out.print(table)


@bundle_app.command("keygen")
def bundle_keygen(
    private: Annotated[
        Path, typer.Argument(help="Where the private key goes; keep it in the release job alone.")
    ],
    keyring: Annotated[Path, typer.Argument(help="The JSON file of trusted public keys; this key is added.")],
) -> None:
    """Make a signing key."""
    import base64

    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    from statics.signing import generate_key, key_id, save_private

    secret, public = generate_key()
    save_private(secret, private)
    known = json.loads(keyring.read_text()) if keyring.exists() else {}
    known[key_id(public)] = base64.b64encode(public.public_bytes(Encoding.Raw, PublicFormat.Raw)).decode()
    keyring.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    out.print(f"{private}: key {key_id(public)}; trusted in {keyring}")


def _one_blas_thread() -> None:
    """The heads' products are small: a team of BLAS threads costs more than it saves. Call before numpy is imported."""
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(name, "1")


def _settings(bundle: Path | None = None) -> Settings:
    """What the environment says, with a bundle named on the command line in the place of any other."""
    from nlu.settings import Settings

    settings = Settings()
    return settings if bundle is None else settings.model_copy(update={"bundle": bundle})


def _verified(folder: Path | None) -> Any:
    """The bundle in a folder, or without one what `nlu serve` would serve."""
    from nlu.serve import find_bundle

    return find_bundle(_settings(folder))


def _load(folder: Path | None) -> Any:
    from nlu import loading

    return loading.load(_verified(folder))


def _vectorizer_folder(folder: Path | None) -> Path:
    """The vectorizer of a bundle, or the folder itself where it is one."""
    if folder is not None and (folder / "vectorizer.json").exists():
        return folder
    bundle = _verified(folder)
    found: Path = bundle.folder(bundle.of_kind("vectorizer")[0])
    return found


async def _understand_here(utterance: Utterance, folder: Path | None) -> pb.UnderstandReply:
    import time
    from datetime import UTC, datetime

    from nlu import wire
    from nlu.serve import pipeline_of

    async with pipeline_of(_load(folder), _settings()) as pipeline:
        # Through the wire's own checks, so that this answers and refuses as a server would.
        checked = wire.utterance(_request(utterance), as_of=utterance.as_of or datetime.now(UTC))
        return wire.reply_message(await pipeline.understand(checked, deadline=time.monotonic() + 30), checked)


def _request(utterance: Utterance) -> pb.UnderstandRequest:
    from nlu.v1 import nlu_pb2 as pb

    roles = {"user": pb.ROLE_USER, "assistant": pb.ROLE_ASSISTANT}
    request = pb.UnderstandRequest(
        hypotheses=[pb.Hypothesis(text=h.text, confidence=h.confidence) for h in utterance.hypotheses],
        context=[pb.Turn(role=roles[turn.role], text=turn.text) for turn in utterance.context],
        persona=utterance.persona,
        surface=utterance.surface,
        annotators=sorted(utterance.annotators or ()),
        retrieval=pb.Retrieval(top_k=utterance.retrieval.top_k),
        explain=utterance.explain,
        raw_scores=utterance.raw_scores,
    )
    if utterance.as_of is not None:
        request.as_of.FromDatetime(utterance.as_of)
    return request


def _call(target: str, method: str, request: Any) -> Any:
    """One unary call; a refusal is printed in the server's words."""
    import grpc

    from nlu.v1.nlu_pb2_grpc import NluStub

    with grpc.insecure_channel(target) as channel:
        stub = NluStub(channel)  # type: ignore[no-untyped-call]
        return getattr(stub, method)(request, timeout=10)


def _weighted(item: str) -> Any:
    from nlu.types import Hypothesis

    text, _, weight = item.rpartition("=")
    try:
        return Hypothesis(text, float(weight))
    except ValueError as error:
        raise typer.BadParameter(f"--hypothesis {item!r}: expected 'TEXT=0.3'") from error


def _turn(item: str) -> Any:
    role, _, text = item.partition(":")
    if role not in ("user", "assistant") or not text.strip():
        raise typer.BadParameter(f"--context {item!r}: expected 'assistant: ...' or 'user: ...'")
    return role, text.strip()


def _instant(text: str) -> Any:
    from datetime import UTC, datetime

    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        raise typer.BadParameter(f"--as-of {text!r}: expected a time such as 2026-12-24T18:00:00Z") from error
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _log(level: str) -> None:
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


def _print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


class _extra:
    """Turns a missing optional package into the command that installs it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ModuleNotFoundError):
            raise typer.BadParameter(
                f"found no module {error.name}, expected the '{self._name}' extra; pip install 'chorus-nlu[{self._name}]'"
            )


def main() -> None:
    """Entry point: an error we foresaw is one clear line and exit status 1, never a traceback."""
    import grpc
    from pydantic import ValidationError

    from nlu.errors import NluError
    from statics.errors import StaticsError

    run: Callable[[], None] = app
    try:
        run()
    except ValidationError as error:
        for problem in error.errors():
            name = "_".join(["NLU", *map(str, problem["loc"])]).upper()
            err.print(Text(f"nlu: {name}: {problem['msg']}", style="red"))
        sys.exit(1)
    except (NluError, StaticsError, ValueError, OSError) as error:
        err.print(Text(f"nlu: {error}", style="red"))
        sys.exit(1)
    except grpc.RpcError as error:
        code, details = error.code(), error.details()
        err.print(Text(f"nlu: {code.name}: {details}", style="red"))
        sys.exit(1)


if __name__ == "__main__":
    main()
