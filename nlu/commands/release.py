"""`nlu release` and `nlu swap`: ask a running server, by its control service, what it serves, or to serve another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nlu.commands.options import JsonOption, out, print_json

if TYPE_CHECKING:
    from nlu.v1 import nlu_pb2 as pb

app = typer.Typer()

ControlOption = Annotated[
    str, typer.Option(envvar="NLU_CONTROL", show_envvar=True, help="unix:/path, or host:port with mTLS.")
]
CaOption = Annotated[
    Path | None, typer.Option(exists=True, help="PEM of who signed the server's certificate.")
]
CertOption = Annotated[Path | None, typer.Option(exists=True, help="PEM of our own certificate.")]
KeyOption = Annotated[Path | None, typer.Option(exists=True, help="PEM of its key.")]


@app.command()
def swap(
    control: ControlOption,
    digest: Annotated[
        str, typer.Argument(help="64 digits; without it, whatever the channel points to.")
    ] = "",
    wait_s: Annotated[float, typer.Option("--wait", help="Seconds; the swap goes on without us.")] = 600.0,
    ca: CaOption = None,
    cert: CertOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Look at the channel now, or serve the release with this digest. Exit status 1 where it was refused."""
    from nlu.v1 import control_pb2 as pb

    reply = _call(control, (ca, cert, key), "Swap", pb.SwapRequest(digest=digest), wait_s)
    _show(reply.release, as_json, changed=reply.changed)
    if reply.release.reason and not reply.changed:
        raise typer.Exit(1)


@app.command()
def release(
    control: ControlOption,
    ca: CaOption = None,
    cert: CertOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """What a server serves, and what it refused last."""
    from nlu.v1 import control_pb2 as pb

    _show(_call(control, (ca, cert, key), "State", pb.StateRequest(), 10.0), as_json)


def _call(
    control: str,
    files: tuple[Path | None, Path | None, Path | None],
    method: str,
    request: Any,
    wait_s: float,
) -> Any:
    import grpc

    from nlu.v1.control_pb2_grpc import ControlStub

    ca, cert, key = (None if path is None else path.read_bytes() for path in files)
    if control.startswith("unix:"):
        opened = grpc.insecure_channel(control)
    elif ca is None or cert is None or key is None:
        raise typer.BadParameter(
            f"--control {control}: expected --ca, --cert and --key beside a host and port"
        )
    else:
        opened = grpc.secure_channel(control, grpc.ssl_channel_credentials(ca, key, cert))
    with opened as channel:
        return getattr(ControlStub(channel), method)(request, timeout=wait_s)  # type: ignore[no-untyped-call]


def _show(release: pb.Release, as_json: bool, **more: bool) -> None:
    from google.protobuf.json_format import MessageToDict

    if as_json:
        shown: dict[str, Any] = MessageToDict(release, preserving_proto_field_name=True)
        print_json({**shown, **more})
        return
    since = f", since {release.since.ToJsonString()}" if release.HasField("since") else ""
    expires = f", expires {release.expires.ToJsonString()}" if release.HasField("expires") else ""
    out.print(f"{release.state} {release.bundle or 'nothing'}", soft_wrap=True)
    if release.bundle:
        out.print(f"channel {release.channel}, seq {release.seq}{since}{expires}", soft_wrap=True)
    if release.pinned:
        out.print(f"pinned to {release.pinned}", soft_wrap=True)
    if release.reason:
        out.print(
            f"refused {release.wanted or 'what the channel points to'}: {release.reason}",
            soft_wrap=True,
            markup=False,
        )
