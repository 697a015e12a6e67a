"""nlu.control over real sockets: who gets in, what may be asked, and what the audit log keeps."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc import StatusCode

from nlu.control import SERVICE, controlled
from nlu.serve import Alone
from nlu.settings import Settings
from nlu.steward import Steward, stewarded
from nlu.v1 import control_pb2 as pb
from nlu.v1 import nlu_pb2
from nlu.v1.control_pb2_grpc import ControlStub
from statics.bundle import Bundle
from statics.publish import publish
from statics.store import FolderStore
from tests.pki import authority, issue, tls_settings
from tests.tiny import make_bundle

NAMES = ("operator.example",)
CA, OTHER_CA = authority(), authority("another authority")


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    """Three releases of one channel."""
    folder = tmp_path_factory.mktemp("releases")
    return [make_bundle(folder / str(seq), seq=seq).bundle for seq in (1, 2, 3)]


@pytest.fixture
def settings(tmp_path: Path, releases: list[Bundle]) -> Settings:
    """Of a server that follows a store with the first release, and listens for control in a folder of its own."""
    publish(releases[0], FolderStore(tmp_path / "store"), channel="test")
    return Settings(
        store=str(tmp_path / "store"), channel="test", statics=tmp_path / "pod", port=0, metrics=False, watch_s=0,
        trial="never", control=f"unix:{tmp_path / 'run' / 'control.sock'}",
    )  # fmt: skip


class Crowd(Alone):
    """Notes how many loads were under way at once."""

    loading = most = loads = 0

    async def prepare(self, bundle: Bundle) -> None:
        self.loading += 1
        self.loads += 1
        self.most = max(self.most, self.loading)
        await super().prepare(bundle)
        self.loading -= 1


@asynccontextmanager
async def steered(settings: Settings, crew: Alone | None = None) -> AsyncIterator[tuple[str, int]]:
    """A server that serves, and its control service: address, and the public port."""
    async with (
        stewarded(settings, crew or Alone(settings)) as (port, steward, _),
        controlled(settings, steward) as address,
    ):
        await asyncio.wait_for(steward.swap(), 60)
        yield address, port


@asynccontextmanager
async def stub_of(
    address: str, credentials: grpc.ChannelCredentials | None = None
) -> AsyncIterator[ControlStub]:
    opened = (
        grpc.aio.insecure_channel(address)
        if credentials is None
        else grpc.aio.secure_channel(address, credentials)
    )
    async with opened as channel:
        yield ControlStub(channel)  # type: ignore[no-untyped-call]


def audited(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Lines about calls, oldest first."""
    lines = [record.getMessage() for record in caplog.records if record.name == "nlu.audit"]
    return [line for line in lines if " asked " in line]


@pytest.fixture(autouse=True)
def listening(caplog: pytest.LogCaptureFixture) -> None:
    """The audit log is written whatever the level of the rest."""
    caplog.set_level(logging.ERROR)
    caplog.handler.setLevel(logging.DEBUG)


async def test_control_swaps_and_tells(
    settings: Settings, releases: list[Bundle], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with steered(settings) as (address, _), stub_of(address) as stub:
        assert (await stub.State(pb.StateRequest())).bundle == releases[0].digest
        same = await stub.Swap(pb.SwapRequest())
        assert (same.changed, same.release.bundle) == (False, releases[0].digest)
        publish(releases[1], FolderStore(tmp_path / "store"), channel="test")
        next_ = await stub.Swap(pb.SwapRequest())
        assert (next_.changed, next_.release.bundle, next_.release.seq) == (True, releases[1].digest, 2)
        publish(releases[2], FolderStore(tmp_path / "store"), channel="test")
        named = await stub.Swap(pb.SwapRequest(digest=releases[2].digest))
        assert (named.changed, named.release.bundle) == (True, releases[2].digest)
        older = await stub.Swap(pb.SwapRequest(digest=releases[0].digest))
        assert (older.changed, older.release.bundle, older.release.wanted) == (
            False,
            releases[2].digest,
            releases[0].digest,
        )
        assert "seq-too-old" in older.release.reason
    lines = audited(caplog)
    assert len(lines) == 5, "one line a call"
    who = f"control: unix uid {os.geteuid()} or root asked"
    assert all(line.startswith(who) and ": OK, " in line for line in lines)
    assert releases[2].digest in lines[3] and f"now serves {releases[2].digest[:12]}" in lines[3]
    assert f"{releases[0].digest[:12]} refused: seq-too-old" in lines[4]


BAD = {
    "short": "abc",
    "upper case": "A" * 64,
    "a path": "../../etc/passwd",
    "an address": "s3://bucket/manifests/x.json",
    "long": "a" * 65,
    "with a line end": "a" * 64 + "\n",
    "other digits": "\u0661" * 64,
    "huge": "a" * 2000,
}


@pytest.mark.parametrize("what", BAD)
async def test_control_takes_a_digest_and_nothing_else(
    settings: Settings, releases: list[Bundle], what: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with steered(settings) as (address, _), stub_of(address) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Swap(pb.SwapRequest(digest=BAD[what]))
        assert (await stub.State(pb.StateRequest())).bundle == releases[0].digest
    assert refused.value.code() is StatusCode.INVALID_ARGUMENT
    assert "found" in (refused.value.details() or "")
    lines = audited(caplog)
    assert len(lines) == 2 and "INVALID_ARGUMENT" in lines[0]
    assert BAD[what].strip() not in caplog.text and len(lines[0].splitlines()) == 1


async def test_control_bytes_that_do_not_parse_are_refused(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    async with steered(settings) as (address, _), grpc.aio.insecure_channel(address) as channel:
        for raw in (b"\xff" * 40, b"\x0a\x02\xff\xfe"):
            call = channel.unary_unary(
                f"/{SERVICE}/Swap", request_serializer=None, response_deserializer=None
            )(raw)
            assert await call.code() is StatusCode.INVALID_ARGUMENT
    assert len(audited(caplog)) == 2


async def test_control_is_not_on_the_public_port(settings: Settings) -> None:
    async with steered(settings) as (address, port):
        async with stub_of(f"127.0.0.1:{port}") as stub:
            for call in (stub.Swap(pb.SwapRequest()), stub.State(pb.StateRequest())):
                assert await call.code() is StatusCode.UNIMPLEMENTED
        async with stub_of(address) as stub:
            assert await stub.State(pb.StateRequest()).code() is StatusCode.OK, "where it is, it answers"
        async with grpc.aio.insecure_channel(address) as channel:
            understand = channel.unary_unary(
                "/nlu.v1.Nlu/Describe", request_serializer=None, response_deserializer=None
            )(b"")
            assert await understand.code() is StatusCode.UNIMPLEMENTED


async def test_control_many_callers_all_hear_and_one_swap_runs(
    settings: Settings, releases: list[Bundle], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, crowd, chance = FolderStore(tmp_path / "store"), Crowd(settings), random.Random(1)
    publish(releases[1], store, channel="test")
    publish(releases[2], store, channel="test")
    known = {release.digest for release in releases}
    async with steered(settings, crowd) as (address, _):

        async def ask(times: int) -> list[pb.SwapReply]:
            async with stub_of(address) as stub:
                wishes = [chance.choice(["", *known, "f" * 64]) for _ in range(times)]
                return [await stub.Swap(pb.SwapRequest(digest=wish), timeout=60) for wish in wishes]

        answers = [reply for each in await asyncio.gather(*(ask(5) for _ in range(32))) for reply in each]
        assert len(answers) == 160
        assert {reply.release.bundle for reply in answers} <= known
        async with stub_of(address) as stub:
            last = await stub.Swap(pb.SwapRequest())
            assert last.release.bundle == releases[2].digest and not last.release.reason
    assert crowd.most == 1, "one load at a time"
    assert crowd.loads <= 4, "and none that was asked for again while it was under way"
    assert len(audited(caplog)) == 161


# -- the socket ---------------------------------------------------------------------------------------------------


def at(path: Path) -> Settings:
    return Settings(control=f"unix:{path}")


async def test_control_socket_is_for_its_owner_and_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "made" / "control.sock"
    async with controlled(at(path), _steward()) as address:
        assert address == f"unix:{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not path.exists()


async def test_control_socket_of_a_dead_server_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with controlled(at(path), _steward()) as address, stub_of(address) as stub:
        assert (await stub.State(pb.StateRequest())).state == "HOLDING"


async def test_control_socket_of_a_living_server_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    async with controlled(at(path), _steward()) as address:
        with pytest.raises(OSError, match="another server"):
            async with controlled(at(path), _steward()):
                pass
        async with stub_of(address) as stub:
            assert (await stub.State(pb.StateRequest())).state == "HOLDING"


async def test_control_never_removes_what_is_no_socket(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    path.write_text("precious")
    link = tmp_path / "link.sock"
    link.symlink_to(path)
    for each in (path, link):
        with pytest.raises(ValueError, match="no socket"):
            async with controlled(at(each), _steward()):
                pass
    assert path.read_text() == "precious"


@pytest.mark.parametrize(
    ("mode", "what"), [(0o777, "with mode 777"), (0o770, "with mode 770"), (0o1777, "with mode 1777")]
)
async def test_control_refuses_a_folder_that_others_write(tmp_path: Path, mode: int, what: str) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(ValueError, match=what):
        async with controlled(at(folder / "control.sock"), _steward()):
            pass
    folder.chmod(0o755)
    async with controlled(at(folder / "control.sock"), _steward()):
        pass


@pytest.mark.parametrize(
    "address", ["unix:run/control.sock", "unix:/" + "x" * 120, "nowhere", ":", "host:http", "50052"]
)
async def test_control_refuses_an_address_that_is_none(address: str) -> None:
    with pytest.raises(ValueError, match="NLU_CONTROL"):
        async with controlled(Settings(control=address), _steward()):
            pass


# -- the network --------------------------------------------------------------------------------------------------


async def test_control_on_a_network_needs_certificates_of_both_sides(tmp_path: Path) -> None:
    server = issue(CA, "localhost")
    for each in (Settings(), tls_settings(tmp_path, server)):
        with pytest.raises(ValueError, match="NLU_TLS_CLIENT_CA"):
            chosen = each.model_copy(update={"control": "127.0.0.1:0", "control_names": NAMES})
            async with controlled(chosen, _steward()):
                pass


async def test_control_on_a_network_needs_names(tmp_path: Path) -> None:
    chosen = tls_settings(tmp_path, issue(CA, "localhost"), CA, control="127.0.0.1:0")
    with pytest.raises(ValueError, match="NLU_CONTROL_NAMES"):
        async with controlled(chosen, _steward()):
            pass


async def test_control_on_a_network_knows_its_callers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = tls_settings(tmp_path, issue(CA, "localhost"), CA, control="127.0.0.1:0", control_names=NAMES)
    operator, stranger = issue(CA, "operator.example"), issue(OTHER_CA, "operator.example")
    async with controlled(chosen, _steward()) as address:
        to = f"localhost:{address.rpartition(':')[2]}"
        good = grpc.ssl_channel_credentials(CA.cert_pem, operator.key_pem, operator.cert_pem)
        async with stub_of(to, good) as stub:
            assert (await stub.State(pb.StateRequest())).state == "HOLDING"
        for bad in (
            grpc.ssl_channel_credentials(CA.cert_pem),
            grpc.ssl_channel_credentials(CA.cert_pem, stranger.key_pem, stranger.cert_pem),
            None,
        ):
            async with stub_of(to, bad) as stub:
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await stub.State(pb.StateRequest(), timeout=5)
                assert refused.value.code() in (StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED)
        caller = issue(CA, "dialog-manager.example")  # may ask the public port, and nothing here
        known = grpc.ssl_channel_credentials(CA.cert_pem, caller.key_pem, caller.cert_pem)
        async with stub_of(to, known) as stub:
            assert await stub.State(pb.StateRequest()).code() is StatusCode.PERMISSION_DENIED
            swap = stub.Swap(pb.SwapRequest(digest="a" * 64))
            assert await swap.code() is StatusCode.PERMISSION_DENIED
    good_line, *denied = audited(caplog)
    assert "operator.example asked State: OK" in good_line
    assert len(denied) == 2 and all("PERMISSION_DENIED" in line for line in denied)
    assert "dialog-manager.example asked Swap " + "a" * 64 in denied[1]


async def test_control_port_that_is_taken_is_an_error(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        chosen = tls_settings(tmp_path, issue(CA, "localhost"), CA, control=taken, control_names=NAMES)
        with pytest.raises(OSError, match="taken"):
            async with controlled(chosen, _steward()):
                pass


async def test_control_is_off_unless_it_is_set() -> None:
    async with controlled(Settings(), _steward()) as address:
        assert address == ""


def _steward() -> Steward:
    """One that has nothing to do yet."""
    settings = Settings(port=0, metrics=False)
    return Steward(settings, Alone(settings))


def test_control_contract_has_no_field_but_a_digest() -> None:
    """A path or an address could not even be sent."""
    assert [field.name for field in pb.SwapRequest.DESCRIPTOR.fields] == ["digest"]
    assert not pb.StateRequest.DESCRIPTOR.fields
    assert pb.DESCRIPTOR.services_by_name["Control"].full_name not in nlu_pb2.DESCRIPTOR.services_by_name
