"""The services of docker/compose.yaml as processes of this machine, for tests and for people.

Commands and settings are those of compose.yaml; the ports and host names of its network become
free ports of this machine. PostgreSQL is the system's, and moto stands in for the S3 store.

``python tests/cluster/topology.py`` starts everything and says how to submit a job.
"""

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self
from urllib.request import urlopen

import docker_files
import processes
import psycopg2
import ray
from environment import make_environment

ROOT = Path(__file__).resolve().parent.parent.parent
WORKERS = 2
PORTS = ("5000", "5432", "6379", "8265", "9000", "10001", "52365")
"""Of compose.yaml's services, of Ray's clients and of the agent that the health check asks."""
START_SECONDS = 180.0
Service = tuple[subprocess.Popen[bytes], Callable[[], bool]]
"""A process, and whether what it serves answers."""


def postgres_programs() -> Path | None:
    """The folder of PostgreSQL's server programs; None if there is none."""
    on_path = shutil.which("initdb")
    places = [Path(on_path).resolve().parent] if on_path else []
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((place for place in [*places, *debian] if (place / "postgres").exists()), None)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(address: str) -> bool:
    """Whether a GET succeeds."""
    try:
        with urlopen(address, timeout=5):
            return True
    except OSError:
        return False


def copy_project(folder: Path) -> None:
    """Copy what the image holds, without weights."""
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.safetensors")
    for name in ("platform", "trainers", "sweeps"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)


class Topology:
    """Starts the services on entering and ends every process of theirs on leaving.

    Attributes:
        folder: of everything that they write.
        project: the folder that Ray's nodes start in, as the image's ``/d3etr``.
        tokenless: the environment of a client that does not have Ray's token.
        client: the environment of one that has it.
        ended: every process that was started and ended.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.project = folder / "project"
        self.ended: set[processes.Process] = set()
        self.ports = {port: str(free_port()) for port in PORTS}
        self._host = ray.util.get_node_ip_address()
        self._services = docker_files.compose()["services"]
        self._cleanup = contextlib.ExitStack()
        foreign = ("RAY_", "AWS_", "MLFLOW_", "PYTHONPATH")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        self.tokenless = kept | {
            "PATH": f"{folder / 'environment' / 'bin'}:{os.environ['PATH']}",
            "HOME": str(folder / "home"),
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.ports['8265']}",
            "RAY_USAGE_STATS_ENABLED": "0",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        self.client = self.tokenless | self.settings("head")

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.push(self.__exit__)
            self._prepare()
            self._start_postgres()
            self._await_all([self._start_s3(), self._start_mlflow(), self._start_head()])
            self._await_all([self._start_worker() for _ in range(WORKERS)])
            stack.pop_all()
        return self

    def __exit__(self, *failure: object) -> None:
        self._cleanup.close()

    @property
    def tracking_uri(self) -> str:
        """MLflow's address."""
        return self.client["MLFLOW_TRACKING_URI"]

    @property
    def gcs_address(self) -> str:
        """What nodes and drivers join."""
        return f"{self._host}:{self.ports['6379']}"

    def settings(self, service: str) -> dict[str, str]:
        """A service's environment in compose.yaml, as it is on this machine."""
        given = self._services[service]["environment"]
        return {name: self.translate(str(value)) for name, value in given.items()}

    def command(self, service: str) -> list[str]:
        """A service's command in compose.yaml, as it is on this machine."""
        return shlex.split(self.translate(self._services[service]["command"]))

    def translate(self, text: str) -> str:
        """Put this machine's places in the place of those in compose.yaml's network."""
        places = {
            **self.ports,
            "/run/secrets": str(self.folder / "secrets"),
            "head:6379": self.gcs_address,
            "//mlflow:5000": f"//127.0.0.1:{self.ports['5000']}",
            "//s3:9000": f"//127.0.0.1:{self.ports['9000']}",
            "0.0.0.0": "127.0.0.1",
        }
        # Once over the text, the longest first: what was put in is not replaced again.
        pattern = "|".join(re.escape(name) for name in sorted(places, key=len, reverse=True))
        return re.sub(rf"(?<!\d)({pattern})(?!\d)", lambda found: places[found[1]], text)

    def submit(
        self, *entrypoint: str, options: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        """``ray job submit OPTIONS -- ENTRYPOINT``, until the job ends."""
        return self.run(["ray", "job", "submit", *options, "--", *entrypoint], self.client)

    def run(
        self, command: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """Run a client's command outside the project."""
        return subprocess.run(
            command,
            env=environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=600,
        )

    def healthy(self) -> bool:
        """Whether the image's health check is content with the head."""
        command = [self.translate(part) for part in docker_files.health_check()]
        return self.run(command, self.client).returncode == 0

    def start_worker(self) -> subprocess.Popen[bytes]:
        """One more Ray node, as ``--scale worker`` adds it; returns once it is well."""
        service = self._start_worker()
        self._await_all([service])
        return service[0]

    def _start_worker(self) -> Service:
        agent = free_port()
        # Nodes that shared a folder would take each other's copies of jobs' code away.
        places = [f"--temp-dir={self.folder / f'ray-{agent}'}"]
        places += [f"--dashboard-agent-listen-port={agent}"]
        command = [*self.command("worker"), *places]
        node = self._start("worker", command, self.settings("worker"), self.project)
        return node, lambda: answers(f"http://127.0.0.1:{agent}/api/healthz")

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        """End a service and everything that came from it."""
        self.ended |= processes.end(process)

    def query(self, statement: str, database: str | None = None) -> list[tuple[Any, ...]]:
        """Ask PostgreSQL.

        Raises:
            psycopg2.OperationalError: it does not answer.
        """
        settings = self.settings("postgres")
        connection = psycopg2.connect(
            host="127.0.0.1",
            port=self.ports["5432"],
            user=settings["POSTGRES_USER"],
            password=Path(settings["POSTGRES_PASSWORD_FILE"]).read_text(),
            dbname=database or settings["POSTGRES_DB"],
        )
        with contextlib.closing(connection):
            connection.autocommit = True
            cursor = connection.cursor()
            cursor.execute(statement)
            return list(cursor.fetchall()) if cursor.description else []

    def _prepare(self) -> None:
        self.folder.chmod(0o755)  # PostgreSQL's user must get through to its own folder
        for name in ("home", "logs"):
            (self.folder / name).mkdir()
        maker = ["sh", str(ROOT / "docker" / "make-secrets.sh"), str(self.folder / "secrets")]
        subprocess.run(maker, check=True, stdout=subprocess.DEVNULL)
        make_environment(self.folder / "environment")
        copy_project(self.project)

    def _start_postgres(self) -> None:
        programs = postgres_programs()
        assert programs is not None, "PostgreSQL's server programs are not installed"
        settings = self.settings("postgres")
        folder = self.folder / "postgres"
        folder.mkdir()
        password = folder / "password"
        password.write_text(Path(settings["POSTGRES_PASSWORD_FILE"]).read_text())
        owner: list[str] = []
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            owner = ["runuser", "-u", "postgres", "--"]
            for path in (folder, password):
                shutil.chown(path, "postgres")
        data = str(folder / "data")
        initdb = [*owner, str(programs / "initdb"), f"--pgdata={data}", "--auth=scram-sha-256"]
        initdb += [f"--pwfile={password}", f"--username={settings['POSTGRES_USER']}"]
        subprocess.run(initdb, check=True, cwd=folder, stdout=subprocess.DEVNULL)
        server = [*owner, str(programs / "postgres"), "-D", data, "-p", self.ports["5432"]]
        server += ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="]
        process = self._start("postgres", server, {}, folder)
        self._await_all([(process, self._database_answers)])
        self.query(f"create database {settings['POSTGRES_DB']}", database="postgres")

    def _database_answers(self) -> bool:
        try:
            return self.query("select 1", database="postgres") == [(1,)]
        except psycopg2.OperationalError:
            return False

    def _start_s3(self) -> Service:
        command = ["python", "-m", "moto.server", "-H", "127.0.0.1", "-p", self.ports["9000"]]
        process = self._start("s3", command, {}, self.folder)
        return process, lambda: answers(f"http://127.0.0.1:{self.ports['9000']}/moto-api/")

    def _start_mlflow(self) -> Service:
        settings = self.settings("mlflow") | {"POSTGRES_HOST": "127.0.0.1"}
        process = self._start("mlflow", self.command("mlflow"), settings, ROOT)
        return process, lambda: answers(f"{self.tracking_uri}/health")

    def _start_head(self) -> Service:
        command = [
            *self.command("head"),
            f"--node-ip-address={self._host}",
            f"--dashboard-agent-listen-port={self.ports['52365']}",
            f"--ray-client-server-port={self.ports['10001']}",
            f"--temp-dir={self.folder / 'ray'}",
        ]
        head = self._start("head", command, self.settings("head"), self.project)
        return head, self.healthy

    def _start(
        self, name: str, command: Sequence[str], settings: Mapping[str, str], folder: Path
    ) -> subprocess.Popen[bytes]:
        with (self.folder / "logs" / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                env={**self.tokenless, **settings},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._cleanup.callback(self.stop, process)
        return process

    def _await_all(self, services: Sequence[Service]) -> None:
        """Wait for services that start side by side."""
        deadline = time.monotonic() + START_SECONDS
        for process, ready in services:
            while not ready():
                late = time.monotonic() > deadline
                if late or process.poll() is not None:
                    reason = "did not get ready" if late else "ended"
                    raise AssertionError(f"{process.args!r} {reason}:\n{self.logs()}")
                time.sleep(0.3)

    def logs(self) -> str:
        """The last lines of every service."""
        files = sorted((self.folder / "logs").glob("*.log"))
        tails = {file.stem: file.read_text(errors="replace").splitlines()[-15:] for file in files}
        return "\n".join(f"--- {name}\n" + "\n".join(lines) for name, lines in tails.items())


def main() -> None:
    """Start everything, say how to use it, and end it on Ctrl-C or when asked to end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="d3etr-") as folder, Topology(Path(folder)) as services:
        names = ("RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")
        for name in (*names, "MLFLOW_TRACKING_URI"):
            print(f"export {name}={services.client[name]}")
        print("ray job submit -- python trainers/run.py RECIPE")
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
