"""deploy/serve and docs/deploying.md against what they are about: settings that exist, a package that can be built, servers
that answer the probes, and a channel that loses no call. Kubernetes, Docker and systemd are not needed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import ssl
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import boto3
import grpc
import pytest
import yaml  # type: ignore[import-untyped]
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import SecretStr, ValidationError

from nlu import callers, metrics, parts
from nlu.control import controlled
from nlu.rpc import SERVICE
from nlu.serve import Alone, Server
from nlu.settings import Settings, shipped_bundle
from nlu.steward import Steward, stewarded
from nlu.trial import Limits
from nlu.v1 import nlu_pb2 as pb
from nlu.v1.nlu_pb2_grpc import NluStub
from statics.bundle import Bundle, build
from statics.locate import open_store
from statics.publish import publish
from statics.signing import Keyring, generate_key
from tests import web
from tests.pki import authority, issue, tls_settings
from tests.test_one_utterance import turn
from tests.tiny import Made

ROOT = Path(__file__).parents[1]
SERVE, DOCS = ROOT / "deploy" / "serve", ROOT / "docs"
KUBERNETES = SERVE / "kubernetes"
PAGE = (DOCS / "deploying.md").read_text(encoding="utf-8")
DOCKERFILE = (SERVE / "Dockerfile").read_text(encoding="utf-8")
UNIT = (SERVE / "chorus.service").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((SERVE / "compose.yaml").read_text(encoding="utf-8"))

OUR_VARIABLES = {f"NLU_{name.upper()}" for name in Settings.model_fields}
_SERVING = health_pb2.HealthCheckResponse.SERVING
ROUND_ROBIN = '{"loadBalancingConfig": [{"round_robin": {}}]}'
_FILE = re.compile(r"`([\w./]+)`")
_UNITS = {"Mi": 2**20, "Gi": 2**30}


# What the files say


def manifest(name: str) -> Any:
    """The one document of a file under kubernetes/."""
    return yaml.safe_load((KUBERNETES / f"{name}.yaml").read_text(encoding="utf-8"))


def secrets() -> dict[str, dict[str, str]]:
    """Values of the example's secrets, by name."""
    text = (KUBERNETES / "secret.example.yaml").read_text(encoding="utf-8")
    return {secret["metadata"]["name"]: secret["stringData"] for secret in yaml.safe_load_all(text)}


def pod() -> Any:
    """The spec of the Deployment's pods."""
    return manifest("deployment")["spec"]["template"]["spec"]


def container() -> Any:
    """Its only container."""
    (only,) = pod()["containers"]
    return only


def blocks(language: str) -> list[str]:
    """What is quoted on the page."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)


def of_image() -> dict[str, str]:
    """Variables that the image sets."""
    return dict(re.findall(r"\b([A-Z_]+)=(\S+)", "".join(re.findall(r"^ENV (.*)$", DOCKERFILE, re.M))))


def of_kubernetes() -> dict[str, str]:
    """Variables of a pod, from the image on."""
    mine = container()
    found = of_image()
    for source in mine["envFrom"]:
        if "configMapRef" in source:
            config = manifest("configmap")
            assert source["configMapRef"]["name"] == config["metadata"]["name"]
            found |= config["data"]
        else:
            found |= secrets()[source["secretRef"]["name"]]
    for variable in mine["env"]:
        kind, _, what = variable["valueFrom"]["resourceFieldRef"]["resource"].partition(".")
        found[variable["name"]] = mine["resources"][kind][what]
    return found


def of_compose() -> dict[str, str]:
    """Variables of the server on a laptop."""
    ours: dict[str, str] = COMPOSE["services"]["nlu"]["environment"]
    return of_image() | ours


def of_unit() -> dict[str, str]:
    """Variables of the systemd unit."""
    return dict(re.findall(r"^Environment=([A-Z_]+)=(\S+)$", UNIT, re.M))


def in_bytes(quantity: str) -> int:
    """Kubernetes' 4Gi."""
    return int(quantity[:-2]) * _UNITS[quantity[-2:]]


def unknown(text: str) -> set[str]:
    """Variables that look like settings and are none; a last underscore stands for a family of names."""
    named = set(re.findall(r"\bNLU_[A-Z0-9_]+", text))
    families = {name for name in named if name.endswith("_")}
    return {name for name in named - families if name not in OUR_VARIABLES} | {
        family for family in families if not any(known.startswith(family) for known in OUR_VARIABLES)
    }


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the variables of whoever runs the tests."""
    for name in [name for name in os.environ if name.upper().startswith("NLU_")]:
        monkeypatch.delenv(name)


def settings_from(variables: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """As a process with these variables reads them."""
    with monkeypatch.context() as patch:
        for name, value in variables.items():
            if name.startswith("NLU_"):
                patch.setenv(name, value)
        return Settings()


# Settings


@pytest.mark.parametrize(
    "path",
    [*sorted(path for path in SERVE.rglob("*") if path.is_file()), DOCS / "configuration.md", DOCS / "deploying.md"],
    ids=lambda path: path.name,
)  # fmt: skip
def test_deploy_names_only_settings_that_exist(path: Path) -> None:
    assert unknown(path.read_text(encoding="utf-8")) == set()


def test_deploy_a_misspelt_setting_would_be_found() -> None:
    """The control of the test above: Settings itself takes no notice of variables it does not know."""
    assert unknown("NLU_REQUIRE_SIGNATURES: 'true', NLU_TSL_*") == {"NLU_REQUIRE_SIGNATURES", "NLU_TSL_"}
    assert unknown("NLU_REQUIRE_SIGNATURE: 'true', NLU_TLS_*, my NLU_") == set()


def test_deploy_page_of_the_settings_has_all_of_them() -> None:
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\bNLU_[A-Z0-9_]+", text)) >= OUR_VARIABLES


@pytest.mark.parametrize("place", [of_kubernetes, of_compose, of_unit])
def test_deploy_values_are_valid_and_fit_for_production(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = place()
    found = settings_from(variables, monkeypatch)
    assert found.host == "0.0.0.0" and found.store.startswith("s3://")
    assert found.require_signature and found.keyring == Path("/etc/chorus/trusted.json")
    assert found.statics == Path("/var/lib/chorus") and found.control.startswith("unix:/run/chorus/")
    assert variables["ORT_DISABLE_TELEMETRY"] == "1"
    if place is not of_compose:
        assert (found.reflection, found.log_format, found.min_seq > 0) == (False, "json", True)
    with pytest.raises(ValidationError):
        settings_from({**variables, "NLU_DRAIN_S": "soon"}, monkeypatch)


def test_deploy_pod_has_as_many_threads_as_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings_from(of_kubernetes(), monkeypatch).workers == int(
        container()["resources"]["limits"]["cpu"]
    )


def test_deploy_pod_takes_no_variables_from_services(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pod()["enableServiceLinks"] is False
    with pytest.raises(ValidationError):  # what Kubernetes would set for a Service called `nlu`
        settings_from({**of_kubernetes(), "NLU_PORT": "tcp://10.0.0.1:50051"}, monkeypatch)


# Time


def has_time(grace_s: float, settings: Settings) -> bool:
    """Whether a process can drain before it is killed, and every call that it accepted can end before that."""
    left_s = settings.drain_s - settings.linger_s
    return grace_s >= settings.drain_s + settings.linger_s and left_s >= settings.max_deadline_s


def test_deploy_leaves_time_to_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    graces = {
        of_kubernetes: pod()["terminationGracePeriodSeconds"],
        of_compose: COMPOSE["services"]["nlu"]["stop_grace_period"].removesuffix("s"),
        of_unit: re.findall(r"^TimeoutStopSec=(\d+)$", UNIT, re.M)[0],
    }
    for place, grace in graces.items():
        variables = place()
        assert has_time(float(grace), settings_from(variables, monkeypatch)), place
        for name, value in {"NLU_DRAIN_S": "60", "NLU_LINGER_S": "19"}.items():
            assert not has_time(float(grace), settings_from({**variables, name: value}, monkeypatch)), name


# The image


def test_deploy_image_is_built_of_what_the_package_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    ignored = (SERVE / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored[1] == "*", "all that is not named is left out: data, keys, history"
    let_in = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    assert all((ROOT / name).exists() for name in let_in)
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    needed = {package.removesuffix("*") for package in packages} | set(project["project"]["license-files"])
    assert let_in == needed | {project["project"]["readme"], "pyproject.toml", "constraints.txt"}


def test_deploy_image_installs_extras_that_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    (asked,) = re.findall(r'"\.\[(.*?)\]"', DOCKERFILE)
    variants = {
        *re.findall(r"ARG EXTRAS=(\w+)", DOCKERFILE),
        *re.findall(r"--build-arg EXTRAS=(\w+)", DOCKERFILE + PAGE),
    }
    assert variants == {"cpu", "gpu"}
    for variant in variants:
        assert set(asked.replace("${EXTRAS}", variant).split(",")) <= extras.keys()


def test_deploy_image_and_pods_agree_who_they_are() -> None:
    (number,) = re.findall(r"^ARG ID=(\d+)$", DOCKERFILE, re.M)
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.M) == ["${ID}:${ID}"]
    context = pod()["securityContext"]
    assert {context["runAsUser"], context["runAsGroup"], context["fsGroup"]} == {int(number)}
    (run,) = [mount for mount in COMPOSE["services"]["nlu"]["tmpfs"] if mount.startswith("/run/chorus")]
    assert f"uid={number},gid={number},mode=0700" in run
    assert PAGE.count(f"-o {number} -g {number}") == 1 and f"0750 {number} {number}" in PAGE


def test_deploy_ports_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    found = settings_from(of_kubernetes(), monkeypatch)
    ports = {"grpc": found.port, "metrics": found.metrics_port}
    assert {port["name"]: port["containerPort"] for port in container()["ports"]} == ports
    assert {port["targetPort"]: port["port"] for port in manifest("service")["spec"]["ports"]} == ports
    assert {container()[probe]["grpc"]["port"] for probe in probes()} == {found.port}
    (exposed,) = re.findall(r"^EXPOSE (.*)$", DOCKERFILE, re.M)
    assert {int(port) for port in exposed.split()} == set(ports.values())
    ingress = manifest("networkpolicy")["spec"]["ingress"]
    assert {port["port"] for rule in ingress for port in rule["ports"]} == ports.keys()
    assert manifest("servicemonitor")["spec"]["endpoints"][0]["port"] in ports
    laptop = settings_from(of_compose(), monkeypatch)
    published = {tuple(port.split(":")) for port in COMPOSE["services"]["nlu"]["ports"]}
    assert published == {
        ("127.0.0.1", str(port), str(port)) for port in (laptop.port, laptop.http_port, laptop.metrics_port)
    }


# The pod


def weaknesses(spec: Any) -> set[str]:
    """What Pod Security's `restricted` profile, and some sense beyond it, would say of pods."""
    told = set()
    context, (mine,) = spec.get("securityContext", {}), spec["containers"]
    inner = mine.get("securityContext", {})
    checks = {
        "runs as root": context.get("runAsNonRoot") is True and context.get("runAsUser", 0) > 0,
        "any system call": context.get("seccompProfile") == {"type": "RuntimeDefault"},
        "more privileges": inner.get("allowPrivilegeEscalation") is False and not inner.get("privileged"),
        "writable root": inner.get("readOnlyRootFilesystem") is True,
        "capabilities": inner.get("capabilities") == {"drop": ["ALL"]},
        "token": spec.get("automountServiceAccountToken") is False,
        "no limits": {"cpu", "memory"} <= mine.get("resources", {}).get("limits", {}).keys(),
        "the host's": not any(spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")),
    }
    told |= {weakness for weakness, holds in checks.items() if not holds}
    told |= {f"hostPath {volume['name']}" for volume in spec["volumes"] if "hostPath" in volume}
    return told


def test_deploy_pod_is_restricted_but_for_the_folder_of_the_node() -> None:
    assert weaknesses(pod()) == {"hostPath statics"}
    bare = {"containers": [{"name": "nlu"}], "volumes": [], "hostPID": True}
    assert len(weaknesses(bare)) == 8, "the control: each of these is missed where it is missing"


def test_deploy_pod_mounts_what_it_is_told_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    found = settings_from(of_kubernetes(), monkeypatch)
    mounts = {mount["mountPath"]: mount for mount in container()["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod()["volumes"]}
    assert {mount["name"] for mount in mounts.values()} == volumes.keys()
    assert "hostPath" in volumes[mounts[str(found.statics)]["name"]]
    assert found.keyring is not None and mounts[str(found.keyring.parent)]["readOnly"]
    keyring = volumes[mounts[str(found.keyring.parent)]["name"]]["secret"]["secretName"]
    assert found.keyring.name in secrets()[keyring]
    # A folder inside the emptyDir, which is root's itself: the control service wants one of its own.
    socket = Path(found.control.removeprefix("unix:"))
    assert "emptyDir" in volumes[mounts[str(socket.parents[1])]["name"]]


def test_deploy_memory_holds_what_serves_and_a_trial_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(path.stat().st_size for path in shipped_bundle().rglob("*") if path.is_file())
    resources = container()["resources"]
    serving, limit = in_bytes(resources["requests"]["memory"]), in_bytes(resources["limits"]["memory"])
    assert settings_from(of_kubernetes(), monkeypatch).trial == "always"
    assert serving + Limits.of(size).data_bytes <= limit
    assert serving + Limits.of(2**30).data_bytes > limit, "the control: a bundle of a GiB needs a larger pod"


def test_deploy_selectors_and_names_meet() -> None:
    labels = manifest("deployment")["spec"]["template"]["metadata"]["labels"]
    assert manifest("deployment")["spec"]["selector"]["matchLabels"] == labels
    assert manifest("service")["spec"]["selector"] == labels
    assert manifest("networkpolicy")["spec"]["podSelector"]["matchLabels"] == labels
    assert manifest("poddisruptionbudget")["spec"]["selector"]["matchLabels"] == labels
    assert (
        manifest("servicemonitor")["spec"]["selector"]["matchLabels"]
        == manifest("service")["metadata"]["labels"]
    )
    scaled = manifest("horizontalpodautoscaler")["spec"]
    assert scaled["scaleTargetRef"]["name"] == manifest("deployment")["metadata"]["name"]
    assert "replicas" not in manifest("deployment")["spec"], "they are the autoscaler's"
    assert scaled["minReplicas"] > manifest("poddisruptionbudget")["spec"]["maxUnavailable"]
    kustomization = manifest("kustomization")
    left_out = {"kustomization.yaml", "secret.example.yaml", "servicemonitor.yaml"}
    assert set(kustomization["resources"]) == {path.name for path in KUBERNETES.iterdir()} - left_out
    assert kustomization["images"][0]["name"] == container()["image"]


def test_deploy_network_policy_lets_out_to_names_store_and_cache_alone() -> None:
    policy = manifest("networkpolicy")["spec"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert sorted(port["port"] for rule in policy["egress"] for port in rule["ports"]) == [53, 53, 443, 6379]
    assert all(rule["to"] for rule in policy["egress"]), "a rule without `to` is for everybody"
    assert all(rule["from"] for rule in policy["ingress"])


def test_deploy_unit_and_laptop_give_away_no_more_than_the_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    told = dict(re.findall(r"^([A-Z]\w+)=(.*)$", UNIT, re.M))
    found = settings_from(of_unit(), monkeypatch)
    assert Path("/var/lib", told["StateDirectory"]) == found.statics
    assert Path("/run", told["RuntimeDirectory"]) == Path(found.control.removeprefix("unix:")).parent
    assert (told["RuntimeDirectoryMode"], told["ProtectSystem"], told["NoNewPrivileges"]) == (
        "0700",
        "strict",
        "true",
    )
    assert told["CapabilityBoundingSet"] == "" and told["User"] not in ("", "root")
    assert told["OOMPolicy"] == "continue", "else a trial that is killed for memory stops what serves"
    laptop = COMPOSE["services"]["nlu"]
    assert laptop["read_only"] and laptop["cap_drop"] == ["ALL"] and "user" not in laptop
    assert laptop["security_opt"] == ["no-new-privileges:true"]


# Servers


def probes() -> tuple[str, ...]:
    return ("startupProbe", "livenessProbe", "readinessProbe")


async def answers(port: int, probe: Any) -> bool:
    """Whether a server passes a gRPC probe, as the kubelet asks it; AioRpcError where it does not know the name."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        asked = health_pb2.HealthCheckRequest(service=probe["grpc"]["service"])
        reply = await health_pb2_grpc.HealthStub(channel).Check(asked)
        return bool(reply.status == _SERVING)


def mounted(folder: Path, name: str, content: bytes) -> Path:
    """A file as Kubernetes mounts a Secret: through two links, so that all files of one change in one step."""
    (folder / "..2026").mkdir(parents=True)
    (folder / "..2026" / name).write_bytes(content)
    (folder / "..data").symlink_to("..2026")
    (folder / name).symlink_to(f"..data/{name}")
    return folder / name


def here(settings: Settings, folder: Path, **more: object) -> Settings:
    """The same settings with places of this machine, and no time to wait at the end."""
    places = {
        "host": "127.0.0.1",
        "port": 0,
        "metrics": False,
        "statics": folder / "statics",
        "redis": SecretStr(""),
    }
    return settings.model_copy(update={**places, "drain_s": 0.0, "linger_s": 0.0, "workers": 2, **more})


@asynccontextmanager
async def stewarding(settings: Settings) -> AsyncIterator[tuple[int, Steward]]:
    """A whole process but for its signals; it may hold."""
    async with stewarded(settings, Alone(settings)) as (port, steward, _), controlled(settings, steward):
        yield port, steward


async def test_deploy_probes_are_answered_by_a_server_with_the_settings_of_a_pod(
    tiny: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pod that holds is not ready and not restarted; one signed release later it is ready."""
    private, public = generate_key()
    Keyring.of(public).save(tmp_path / "trusted.json")
    empty_dir = tmp_path / "run"
    empty_dir.mkdir()
    empty_dir.chmod(0o777)  # as Kubernetes makes it
    settings = here(
        settings_from(of_kubernetes(), monkeypatch),
        tmp_path,
        store=str(tmp_path / "store"),
        keyring=mounted(tmp_path / "etc", "trusted.json", (tmp_path / "trusted.json").read_bytes()),
        control=of_kubernetes()["NLU_CONTROL"].replace("/run/chorus", str(empty_dir)),
    )
    release = build(
        parts.collect(tiny.parts), tmp_path / "release", channel=settings.channel, seq=settings.min_seq,
        requires_service=">=0.1.0.dev0,<1", signing_key=private,
    )  # fmt: skip
    mine = container()
    async with stewarding(settings) as (port, steward):
        while steward.release.reason == "":  # the first look at the channel
            await asyncio.sleep(0.01)
        assert [await answers(port, mine[probe]) for probe in probes()] == [True, True, False]
        publish(release, open_store(settings.store))
        assert (await steward.swap())[0].bundle == release.digest
        assert [await answers(port, mine[probe]) for probe in probes()] == [True, True, True]
        with pytest.raises(grpc.aio.AioRpcError, match="nothing here has this name"):
            await answers(port, {"grpc": {"service": "readiness"}})
    with pytest.raises(ValueError, match="nobody else may write"):  # why the socket has a folder of its own
        async with stewarding(settings.model_copy(update={"control": f"unix:{empty_dir}/control.sock"})):
            pass


async def test_deploy_secured_pod_answers_its_probes_over_https(
    tiny: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (patch,) = [block for block in blocks("yaml") if "NLU_TLS_CERT" in block]
    (secured,) = yaml.safe_load(patch)["spec"]["template"]["spec"]["containers"]
    told = settings_from(
        {**of_kubernetes(), **{one["name"]: one["value"] for one in secured["env"]}}, monkeypatch
    )
    mounts = {mount["mountPath"] for mount in secured["volumeMounts"]}
    assert told.tls_cert and told.tls_key and told.callers
    assert {str(path.parent) for path in (told.tls_cert, told.tls_key, told.callers)} == mounts
    book = tmp_path / "callers.toml"
    callers.add(book, "dialogs")
    settings = tls_settings(
        tmp_path, issue(authority(), "localhost"), bundle=tiny.bundle.path, callers=book, http_port=0
    )
    unverified = ssl.create_default_context()
    unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE  # as the kubelet
    crew = Alone(settings)
    async with stewarded(settings, crew) as (port, steward, _):
        await steward.serving.wait()
        assert crew.server.http_port is not None
        for name in probes():
            probe = secured[name]["httpGet"]
            assert probe["port"] == told.http_port and secured[name]["grpc"] is None
            answer = await web.get(crew.server.http_port, probe["path"], secure=unverified)
            assert (probe["scheme"], answer.status) == ("HTTPS", 200)
        with pytest.raises(grpc.aio.AioRpcError):  # why they are not gRPC's, which speak no TLS
            await asyncio.wait_for(answers(port, container()["livenessProbe"]), 20)


async def test_deploy_laptop_has_its_release_pulled_and_the_next_one_too(
    s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """compose.yaml, without containers: what `release` runs, then a server with the settings of `nlu`."""
    release = COMPOSE["services"]["release"]
    for name, value in release["environment"].items():
        monkeypatch.setenv(name, s3_endpoint if name == "AWS_ENDPOINT_URL" else value)
    (script,) = release["command"]
    script = (
        script.replace("$$", "$")
        .replace("/release", f"{tmp_path}/keys")
        .replace("/etc/chorus", f"{tmp_path}/etc")
    )
    for folder in ("keys", "etc"):
        (tmp_path / folder).mkdir()

    def run() -> None:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            [*release["entrypoint"], script], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PATH": path}
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    await asyncio.to_thread(run)
    settings = here(
        settings_from(of_compose(), monkeypatch), tmp_path, http_port=0, control="", keyring=tmp_path / "etc" / "trusted.json"
    )  # fmt: skip
    async with stewarding(settings) as (_, steward):
        await steward.serving.wait()
        first = steward.release
        await asyncio.to_thread(run)
        second, changed = await steward.swap()
        assert changed and second.seq > first.seq and first.channel == settings.channel
    objects = boto3.client("s3").list_objects_v2(Bucket="chorus", Prefix="statics/channels/")
    assert [found["Key"] for found in objects["Contents"]] == [f"statics/channels/{settings.channel}.json"]


# Callers


def service_config(*, client_health: bool = True) -> str:
    """The one of the page, with a deadline for a machine that is busy with other tests."""
    (quoted,) = blocks("json")
    config = json.loads(quoted)
    config["methodConfig"][0]["timeout"] = "20s"
    if not client_health:
        del config["healthCheckConfig"]
    return json.dumps(config)


@asynccontextmanager
async def server_of(bundle: Bundle | None, **settings: object) -> AsyncIterator[Server]:
    """A listening server; without a bundle it holds."""
    server = Server(Settings(port=0, metrics=False, **settings))  # type: ignore[arg-type]
    await server.start()
    try:
        if bundle is not None:
            await server.prepare(bundle)
            await server.flip()
        yield server
    finally:
        await server.drain()


@asynccontextmanager
async def calling(*servers: Server, config: str = "") -> AsyncIterator[NluStub]:
    """A caller who is told the addresses of all of them."""
    target = "ipv4:" + ",".join(f"127.0.0.1:{server.port}" for server in servers)
    options = [("grpc.service_config", config)] if config else None
    async with grpc.aio.insecure_channel(target, options) as channel:
        yield NluStub(channel)  # type: ignore[no-untyped-call]


async def test_deploy_service_config_is_of_our_methods_and_of_none_that_streams() -> None:
    config = json.loads(service_config())
    named = {
        (name["service"], name["method"]) for policy in config["methodConfig"] for name in policy["name"]
    }
    service = pb.DESCRIPTOR.services_by_name["Nlu"]
    unary = {method.name for method in service.methods if not method.server_streaming}
    assert named == {(SERVICE, method) for method in unary - {"Describe"}}


async def refused(stub: NluStub) -> grpc.aio.AioRpcError:
    """The first refusal of many calls one after the other; connections may come about meanwhile."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        for _ in range(1000):
            await stub.Understand(turn("stop"), timeout=20)
            await asyncio.sleep(0.01)
    return error.value


async def met(stub: NluStub, *bundles: Bundle) -> None:
    """Calls until all of these have answered."""
    missing = {bundle.digest for bundle in bundles}
    while missing:
        missing.discard((await stub.Understand(turn("stop"))).versions.bundle)


async def test_deploy_service_config_finds_the_pod_that_answers(tiny: Made) -> None:
    async with server_of(None) as holding, server_of(tiny.bundle) as serving:
        async with calling(holding, serving, config=service_config()) as stub:
            for _ in range(20):
                await met(stub, tiny.bundle)
        async with calling(holding, serving, config=ROUND_ROBIN) as stub:  # the control
            assert "no bundle to serve" in str((await refused(stub)).details())


async def test_deploy_service_config_loses_no_call_to_a_pod_that_drains(tiny: Made, stranger: Made) -> None:
    async with (
        server_of(tiny.bundle, linger_s=0.5) as going,
        server_of(stranger.bundle) as staying,
        calling(going, staying, config=service_config()) as stub,
    ):
        seen: list[str] = []

        async def call() -> None:
            while True:
                seen.append((await stub.Understand(turn("stop"))).versions.bundle)

        await met(stub, tiny.bundle, stranger.bundle)
        busy = [asyncio.create_task(call()) for _ in range(4)]
        await going.drain()
        seen.clear()
        while len(seen) < 20:
            await asyncio.sleep(0.01)
            assert not any(task.done() for task in busy), "a call was lost"
        for task in busy:
            task.cancel()
        ended = await asyncio.gather(*busy, return_exceptions=True)
        assert [type(error) for error in ended] == [asyncio.CancelledError] * 4
        assert set(seen[4:]) == {stranger.bundle.digest}  # 4 may have been on their way


async def test_deploy_service_config_asks_another_pod_where_one_just_stopped(
    tiny: Made, stranger: Made
) -> None:
    """Between a pod's last call and its goodbye nobody but the call itself can know."""
    async with server_of(tiny.bundle) as going, server_of(stranger.bundle) as staying:
        for config in (service_config(), ROUND_ROBIN):
            going.desk.draining = False
            async with calling(going, staying, config=config) as stub:
                await met(stub, tiny.bundle, stranger.bundle)
                going.desk.draining = True
                if config == ROUND_ROBIN:  # the control
                    assert "is stopping" in str((await refused(stub)).details())
                    continue
                for _ in range(5):  # after 10 failures the throttle ends retries
                    assert (await stub.Understand(turn("stop"))).versions.bundle == stranger.bundle.digest


def refused_for_rate() -> float:
    return metrics.REGISTRY.get_sample_value("nlu_shed_total", {"reason": "rate"}) or 0.0


async def test_deploy_service_config_waits_as_long_as_a_full_server_says(tiny: Made, tmp_path: Path) -> None:
    """One call a second: the pause is longer than any backoff of the config, so only who heeds it comes through."""
    book = tmp_path / "callers.toml"
    shown = (("authorization", f"Bearer {callers.add(book, 'dialogs', rate=1, burst=1)}"),)

    async def two(stub: NluStub) -> list[StatusCode]:
        calls = [stub.Understand(turn("stop"), metadata=shown, timeout=20) for _ in range(2)]
        return [await call.code() for call in calls]

    async with server_of(tiny.bundle, callers=book) as server:
        before = refused_for_rate()
        async with calling(server, config=service_config(client_health=False)) as stub:
            assert await two(stub) == [StatusCode.OK, StatusCode.OK]
        assert refused_for_rate() > before
        async with calling(server) as stub:  # the control
            assert StatusCode.RESOURCE_EXHAUSTED in await two(stub)


def test_deploy_page_names_files_that_exist() -> None:
    named = set(re.findall(r"deploy/serve[\w./-]*\w", PAGE))
    named |= {
        f"deploy/serve/{name}"
        for row in re.findall(r"^\| (`.*?) \|", PAGE, re.M)
        for name in _FILE.findall(row)
    }
    assert {"deploy/serve/Dockerfile", "deploy/serve/kubernetes/"} <= named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
