"""The command line. Each command imports only what it needs, so that `nlu --help` is instant."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.text import Text

from nlu.commands import bundle as bundle_commands
from nlu.commands import cache as cache_commands
from nlu.commands import callers as callers_commands
from nlu.commands import heads as heads_commands
from nlu.commands import index as index_commands
from nlu.commands import release as release_commands
from nlu.commands import teach as teach_commands
from nlu.commands import vectorizer as vectorizer_commands
from nlu.commands.options import (
    BundleOption,
    JsonOption,
    load,
    one_blas_thread,
    out,
    print_json,
    settings_for,
)
from nlu.progress import err

if TYPE_CHECKING:
    import grpc

    from nlu.types import Utterance
    from nlu.v1 import nlu_pb2 as pb

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="One shared vectorizer, a fleet of light heads, over gRPC.",
)
app.add_typer(vectorizer_commands.app, name="vectorizer")
heads_commands.app.add_typer(teach_commands.app)
app.add_typer(heads_commands.app, name="heads")
app.add_typer(index_commands.app, name="index")
app.add_typer(cache_commands.app, name="cache")
app.add_typer(bundle_commands.app, name="bundle")
app.add_typer(callers_commands.app, name="callers")
app.add_typer(release_commands.app)

TargetOption = Annotated[
    str, typer.Option(help="host:port of a running server; without it the bundle is loaded here.")
]
TokenOption = Annotated[
    str, typer.Option(envvar="NLU_TOKEN", help="What `nlu callers add` printed.", show_envvar=True)
]
CaOption = Annotated[
    Path | None, typer.Option(exists=True, help="PEM of who signed the server's certificate; turns TLS on.")
]
CertOption = Annotated[Path | None, typer.Option(exists=True, help="PEM of our own certificate, for mTLS.")]
KeyOption = Annotated[Path | None, typer.Option(exists=True, help="PEM of its key.")]


@app.command()
def serve(
    bundle: BundleOption = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes any free one.")] = None,
) -> None:
    """Serve a bundle over gRPC until told to stop. Settings come from NLU_* variables; options win."""
    one_blas_thread()
    from nlu import logs
    from nlu.errand import leave

    chosen = {"host": host, "port": port}
    settings = settings_for(bundle).model_copy(
        update={name: value for name, value in chosen.items() if value is not None}
    )
    logs.configure(settings)
    if settings.processes > 1:
        from nlu.crew import supervise as run  # it loads no model, and imports nothing that could
    else:
        from nlu.serve import serve as run
    asyncio.run(run(settings))
    leave()


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
    explain: Annotated[bool, typer.Option(help="Thresholds, ranking features and tried routes too.")] = False,
    as_json: JsonOption = False,
    token: TokenOption = "",
    ca: CaOption = None,
    cert: CertOption = None,
    key: KeyOption = None,
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
        reply = _call(target, "Understand", _request(utterance), Door(token, ca, cert, key))
    else:
        reply = asyncio.run(_understand_here(utterance, bundle))
    if as_json:
        print_json(show.reply_json(reply))
    else:
        out.print(show.reply_page(reply, utterance.hypotheses[reply.hypothesis].text))


@app.command()
def describe(
    target: TargetOption = "",
    bundle: BundleOption = None,
    as_json: JsonOption = False,
    token: TokenOption = "",
    ca: CaOption = None,
    cert: CertOption = None,
    key: KeyOption = None,
) -> None:
    """Show what is served: versions, heads, index, limits."""
    from nlu import show, wire
    from nlu.types import Release
    from nlu.v1 import nlu_pb2 as pb

    if target:
        description = _call(target, "Describe", pb.DescribeRequest(), Door(token, ca, cert, key))
    else:
        description = wire.describe_message(load(bundle).describe(), Release())
        description.ClearField("release")  # nothing is served
    if as_json:
        print_json(show.description_json(description))
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
    for finding in examine(settings_for(bundle)):
        findings.append(finding)
        if not as_json:
            out.print(marks[finding.state], Text(f"{finding.check:<12}", style="bold"), finding.found)
            if finding.remedy:
                out.print(Text(f"                  -> {finding.remedy}", style="dim"))
    bad = [finding.check for finding in findings if finding.state == "bad"]
    if as_json:
        print_json({"findings": [finding.as_dict() for finding in findings], "healthy": not bad})
    raise typer.Exit(1 if bad else 0)


async def _understand_here(utterance: Utterance, folder: Path | None) -> pb.UnderstandReply:
    import time
    from datetime import UTC, datetime

    from nlu import wire
    from nlu.serve import pipeline_of

    async with pipeline_of(load(folder), settings_for()) as pipeline:
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


class Door(NamedTuple):
    """What a caller shows a server."""

    token: str = ""
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def channel(self, target: str) -> grpc.Channel:
        import grpc

        if (self.cert is None) is not (self.key is None) or (self.cert is not None and self.ca is None):
            raise typer.BadParameter("--cert: expected --cert and --key together, and --ca beside them")
        if self.ca is None:
            return grpc.insecure_channel(target)
        cert, key = (path.read_bytes() if path else None for path in (self.cert, self.key))
        return grpc.secure_channel(target, grpc.ssl_channel_credentials(self.ca.read_bytes(), key, cert))


def _call(target: str, method: str, request: Any, door: Door) -> Any:
    """One unary call; a refusal is printed in the server's words."""
    from nlu.v1.nlu_pb2_grpc import NluStub

    shown = (("authorization", f"Bearer {door.token}"),) if door.token else ()
    with door.channel(target) as channel:
        stub = NluStub(channel)  # type: ignore[no-untyped-call]
        return getattr(stub, method)(request, timeout=10, metadata=shown)


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


def main() -> None:
    """Entry point: an error we foresaw is one clear line and exit status 1, never a traceback."""
    # gRPC's core writes past logging, a line for every handshake that fails; this is read when it is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
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
