"""A real SuperLink and two SuperNodes on this machine, with TLS and node authentication."""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fed_zoo as zoo
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from safetensors import safe_open
from safetensors.torch import load_file

from fedzo import flower_app
from fedzo.config import RunConfig, build
from fedzo.simulation import Federation

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
PEM, OPEN = serialization.Encoding.PEM, serialization.NoEncryption()

# How a SuperNode ends whose key is not registered.
REFUSED = 1

# The apps: a model small enough for processes that live for one message.
MODULE = """
import json
import torch
from flwr.serverapp import ServerApp
from safetensors.torch import save_file
from fedzo.client import Host
from fedzo.methods import make
from fedzo.simulation import Federation
from fedzo.transports.flower import FlowerTransport, Seat, client_app

ROUNDS, OPTIONS = 2, {"lr": 1e-1, "steps": 3, "density": 0.5}


class Task:
    train_size, labels, natural_ids = 12, None, None

    def batch(self, indices):
        x = torch.arange(96, dtype=torch.float32).reshape(12, 8).sin()
        return {"x": x[list(indices)]}

    def loss(self, model, batch):
        return (model(batch["x"]).sum(1) - batch["x"].cos().sum(1)).square().mean()


def model():
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))


def shards():
    return [list(range(5)), list(range(5, 12))]


def join(context):
    host = Host(model(), Task(), make("random_mask", **OPTIONS), batch_size=2, seed=5)
    number = context.node_config["client"]
    return Seat(host, number, shards()[number], context.node_config["cache"])


client = client_app(join)
server = ServerApp()


@server.main()
def main(grid, context):
    transport = FlowerTransport(grid, 2, patience=90.0, poll=0.2)
    method = make("random_mask", **OPTIONS)
    federation = Federation(model(), Task(), method, transport=transport, batch_size=2, seed=5)
    records = [record.to_dict() for record in federation.run(ROUNDS)]
    save_file(
        {name: value.clone() for name, value in federation.model.state_dict().items()},
        context.run_config["output"],
        {"records": json.dumps(records)},
    )
"""


def certificates(folder: Path) -> None:
    """An authority, and the SuperLink's certificate for this machine."""
    now = datetime.datetime.now(datetime.UTC)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

    def named(name: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])

    def sign(name: str, public: Any, authority: bool) -> x509.Certificate:
        local = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        return (
            x509.CertificateBuilder()
            .subject_name(named(name))
            .issuer_name(named("fedzo test authority"))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(hours=2))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([local]), critical=False)
            .sign(ca_key, hashes.SHA256())
        )

    authority = sign("fedzo test authority", ca_key.public_key(), True)
    (folder / "ca.crt").write_bytes(authority.public_bytes(PEM))
    (folder / "server.pem").write_bytes(
        sign("superlink", key.public_key(), False).public_bytes(PEM)
    )
    (folder / "server.key").write_bytes(
        key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, OPEN)
    )


def node_key(path: Path) -> None:
    """A SuperNode's key pair, as ``ssh-keygen -t ecdsa -b 384`` makes it."""
    key = ec.generate_private_key(ec.SECP384R1())
    path.write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.OpenSSH, OPEN))
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    path.with_suffix(".pub").write_bytes(public)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


class Place:
    """A folder with the processes that run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        self.environment = {
            **os.environ,
            "FLWR_HOME": str(folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        }

    def start(self, log: str, *command: str) -> subprocess.Popen[bytes]:
        """Run a program, with its output in a file, until the test is over."""
        with (self.folder / log).open("wb") as out:
            process = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]],
                cwd=self.folder, env=self.environment, stdout=out, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def call(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a program to its end."""
        return subprocess.run(
            [str(BIN / command[0]), *command[1:]],
            cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=100,
            check=False,
        )  # fmt: skip

    def wait(self, done: Any, seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not done():
            dead = [p.args for p in self.processes if p.poll() not in (None, REFUSED)]
            if dead or time.monotonic() > end:
                logs = "\n".join(
                    f"--- {f.name}\n{f.read_text(errors='replace')[-2500:]}"
                    for f in sorted(self.folder.glob("*.log"))
                )
                pytest.fail(f"{what}; ended: {dead}\n{logs}")
            time.sleep(0.2)

    def stop(self) -> None:
        """End every process, and those it began."""
        for how in (signal.SIGTERM, signal.SIGKILL):
            for process in self.processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, how)
            end = time.monotonic() + 5
            for process in self.processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.1, end - time.monotonic()))


@pytest.fixture
def place(tmp_path) -> Iterator[Place]:
    made = Place(tmp_path)
    try:
        yield made
    finally:
        made.stop()


def listening(port: int) -> bool:
    with socket.socket() as s:
        s.settimeout(1)
        return s.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_superlink_and_supernodes_come_to_the_bits_of_one_process(place):
    """Every message in a process of its own, over HTTPS, from nodes whose keys are registered."""
    folder = place.folder
    certificates(folder)
    for name in ("node0", "node1", "stranger"):
        node_key(folder / name)
    link, *ports = free_ports(4)
    (folder / "home").mkdir()
    (folder / "home" / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{link}"\n'
        f'root-certificates = "{folder / "ca.crt"}"\n'
    )
    config = build(RunConfig, {"model": "m", "data": "d", "output": str(folder / "final")})
    flower_app.write(folder / "app", config)
    (folder / "app" / "fedzo_run.py").write_text(MODULE)

    place.start(
        "superlink.log", "flower-superlink", "--port", str(link), "--ssl-ca-certfile", "ca.crt",
        "--ssl-certfile", "server.pem", "--ssl-keyfile", "server.key", "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
    )  # fmt: skip
    place.wait(lambda: listening(link), 60, "the SuperLink did not start")
    for name in ("node0", "node1"):
        done = place.call("flwr", "supernode", "register", f"{name}.pub", "here")
        assert done.returncode == 0, done.stdout + done.stderr
    common = ("--root-certificates", "ca.crt", "--superlink", f"127.0.0.1:{link}")

    def node(name: str, number: int, port: int) -> tuple[str, ...]:
        key = ("--auth-supernode-private-key", name)
        config = f'client={number} cache="{folder / name}.weights"'
        more = ("--node-config", config, "--port", str(port))
        return ("flower-supernode", *common, *key, *more)

    stranger = place.start("stranger.log", *node("stranger", 0, ports[2]))
    for number in (0, 1):
        place.start(f"node{number}.log", *node(f"node{number}", number, ports[number]))
    done = place.call("flwr", "run", "app", "here")
    assert done.returncode == 0, done.stdout + done.stderr
    final = folder / "final"
    place.wait(final.is_file, 150, "the run did not end")
    assert stranger.poll() == REFUSED, (folder / "stranger.log").read_text()

    assert all((folder / f"node{k}.weights").is_file() for k in (0, 1))
    spec = importlib.util.spec_from_file_location("fedzo_run", folder / "app" / "fedzo_run.py")
    assert spec is not None and spec.loader is not None
    run: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    method = zoo.make("random_mask", **run.OPTIONS)
    here = Federation(run.model(), run.Task(), method, run.shards(), batch_size=2, seed=5)
    start = {n: v.clone() for n, v in here.model.state_dict().items()}
    records = list(here.run(run.ROUNDS))
    assert [r.accepted for r in records] == [(0, 1)] * run.ROUNDS
    there = load_file(final)
    assert not zoo.differing(here.model.state_dict(), there)
    assert any(not torch.equal(start[n], v) for n, v in there.items())
    with safe_open(final, "pt") as file:
        told = json.loads(file.metadata()["records"])
    for mine, theirs in zip(records, told, strict=True):
        kept = json.loads(json.dumps(mine.to_dict()))
        assert {k: v for k, v in kept.items() if k != "seconds"} == {
            k: v for k, v in theirs.items() if k != "seconds"
        }
