"""Loggers of a run in addition to TensorBoard: W&B, MLflow and Trackio, through one small interface.

They get the config and the rows of ``metrics.jsonl``, no pictures and no files. Each writes on this machine
unless its own environment variable names another place: ``WANDB_MODE``, ``MLFLOW_TRACKING_URI``,
``TRACKIO_SPACE_ID`` or ``TRACKIO_SERVER_URL``.
"""

from __future__ import annotations

import importlib
import io
import json
import logging
import math
import os
import posixpath
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from unittest import mock

from ..config import without_paths
from ..config.paths import without_secrets
from ..config.schema import never_read
from ..config.types import to_plain
from ..errors import UserError
from ..files import atomic_write_json, read_text
from ..text import printable, shortened
from .checkpoint import LOGGERS
from .resume import leaves

if TYPE_CHECKING:
    from ..config import Config

logger = logging.getLogger(__name__)

PROJECT = "gn-detect"

# The libraries report on their use unless these are set, and a server that does not answer would stop the
# training for 20 minutes.
_ENVIRONMENT = {
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
}
_SECONDS = 30  # to wait for W&B at the beginning and at the end

_ID = re.compile(r"[0-9A-Za-z_-]{1,64}")
_LARGEST = 1 << 16  # bytes of loggers.json

Row = Mapping[str, float]


class RunLogger(Protocol):
    """One run in a library, new or continued.

    Attributes:
        id: the library's name for the run.
        place: of the data, for people.
        last: the newest step that the library has; -1 without any.
    """

    id: str
    place: str
    last: int

    def __init__(self, cfg: Config, id: str | None) -> None:
        """Begin a run, or continue the run ``id``; a new one begins if the library does not have it."""

    def write(self, step: int, row: Row) -> None:
        """Add the finite scalars of a step, which is higher than all before."""

    def close(self, finished: bool) -> None:
        """End the run; it may be continued unless it is finished."""


class WandbLogger:
    """Weights & Biases. Offline, W&B cannot continue a run: the new folder then gets all rows again."""

    def __init__(self, cfg: Config, id: str | None) -> None:
        import wandb

        self.id = id or uuid.uuid4().hex[:16]
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", _name(cfg)),
            id=self.id,
            resume="allow" if mode == "online" else None,
            mode=mode,
            dir=cfg.output_dir,
            config=_public(cfg),
            reinit="create_new",  # a run of the user's own program goes on
            settings=wandb.Settings(
                # Nothing of the machine: host, user, command line, packages, source, console, load.
                host="",
                program="",
                console="off",
                save_code=False,
                disable_code=True,
                disable_git=True,
                x_disable_machine_info=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
                silent=True,
                init_timeout=_SECONDS,
                finish_timeout=_SECONDS,
            ),
        )
        self.place = self._run.url or f"{self._run.settings.sync_dir} (wandb sync sends it)"
        self.last = self._run.step - 1

    def write(self, step: int, row: Row) -> None:
        self._run.log(dict(row), step=step)

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class MLflowLogger:
    """MLflow, in ``OUTPUT_DIR/mlflow.db`` or on the server of ``MLFLOW_TRACKING_URI``."""

    def __init__(self, cfg: Config, id: str | None) -> None:
        from mlflow import MlflowClient, MlflowException
        from mlflow.entities import Param

        database = Path(os.path.abspath(cfg.output_dir)) / "mlflow.db"
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{database}"
        self.place = without_secrets(uri)
        self._client = MlflowClient(tracking_uri=uri)
        try:
            if id is not None:
                self._client.update_run(id, status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            id = None
        if id is None:
            experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            known = self._client.get_experiment_by_name(experiment)
            number = known.experiment_id if known else self._client.create_experiment(experiment)
            id = self._client.create_run(number, run_name=_name(cfg)).info.run_id
            params = [Param(key, str(value)[:500]) for key, value in leaves(_public(cfg))]
            for i in range(0, len(params), 100):  # MLflow's limit of a request
                self._client.log_batch(id, params=params[i : i + 100])
        self.id = id
        rows = self._client.get_metric_history(id, "lr")  # every row of a training has it
        self.last = max((metric.step for metric in rows), default=-1)

    def write(self, step: int, row: Row) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(_key_for_mlflow(key), value, now, step) for key, value in row.items()]
        for i in range(0, len(metrics), 1000):
            self._client.log_batch(self.id, metrics=metrics[i : i + 1000])

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self.id, status="FINISHED" if finished else "KILLED")


class TrackioLogger:
    """Trackio, in its own folder on this machine or in the user's Space."""

    def __init__(self, cfg: Config, id: str | None) -> None:
        import trackio

        self.id = id or uuid.uuid4().hex[:16]
        remote = os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")
        with ExitStack() as stack:
            stack.enter_context(redirect_stdout(io.StringIO()))
            if not remote:  # it would ask Hugging Face for the name of a user who is logged in
                stack.enter_context(mock.patch.object(trackio.Run, "_get_username", return_value=None))
            self._run = trackio.init(
                project=PROJECT,
                name=f"{_name(cfg)}-{self.id}",  # it finds runs by name
                config=_public(cfg),
                resume="allow",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )
        self.place = (
            without_secrets(remote) if remote else f"{trackio.TRACKIO_DIR} (trackio show --project {PROJECT})"
        )
        self.last = self._run._next_step - 1

    def write(self, step: int, row: Row) -> None:
        # Trackio renames a metric called "time", with a warning.
        self._run.log({"iteration_time" if key == "time" else key: value for key, value in row.items()}, step)

    def close(self, finished: bool) -> None:
        import trackio

        with redirect_stdout(io.StringIO()):
            trackio.finish()  # of the run of this process: Trackio has one at a time


KINDS: dict[str, type[RunLogger]] = {"wandb": WandbLogger, "mlflow": MLflowLogger, "trackio": TrackioLogger}


def check_loggers(cfg: Config) -> None:
    """Import the packages of ``LOGGERS``.

    Raises:
        UserError: one is not installed.
    """
    for name in cfg.loggers:
        for key, value in _ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        local = name == "mlflow" and not os.environ.get("MLFLOW_TRACKING_URI")
        for package in (name, *(("sqlalchemy", "alembic") if local else ())):
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise UserError(
                    "missing-package",
                    f'LOGGERS: {name} needs {package}, not installed here: pip install "gn-detect[{name}]"',
                ) from error


class Loggers:
    """All loggers of a run, in its first process. One that fails is dropped with a warning.

    A step becomes one row, which is sent when the next one begins or the run ends: scalars of an evaluation
    belong to the row of the training step before it, and a run that is killed in between sends the row whole
    when it is resumed. Steps that a library has are not sent again, so that each is there once.

    Args:
        cfg: of the run, after :func:`check_loggers`; ``OUTPUT_DIR`` exists. Its ``loggers.json`` holds ids.
        start: the first iteration of a resumed run; 0 begins new ones.
    """

    def __init__(self, cfg: Config, start: int) -> None:
        self._open: dict[str, RunLogger] = {}
        self._step, self._row = -1, dict[str, float]()
        self._finished = False
        if not cfg.loggers:
            return
        file = Path(cfg.output_dir) / LOGGERS
        ids = _read_ids(file) if start else {}
        for name in dict.fromkeys(cfg.loggers):
            with self._dropped_on_failure(name):
                run = KINDS[name](cfg, ids.get(name))
                self._open[name], ids[name] = run, run.id
                logger.info("logger %s: %s", name, run.place)
        atomic_write_json(file, ids)

    def write(self, iteration: int, scalars: Mapping[str, float | None]) -> None:
        """Add scalars after ``iteration``; those that are not finite are left out."""
        if iteration != self._step:
            self._send()
            self._step = iteration
        finite = {key: value for key, value in scalars.items() if value is not None and math.isfinite(value)}
        self._row |= {printable(key): value for key, value in finite.items()}

    def finish(self) -> None:
        """Send the last row of a run that is at its end."""
        self._send()
        self._finished = True

    def close(self) -> None:
        for name, run in list(self._open.items()):
            with self._dropped_on_failure(name):
                run.close(self._finished)
        self._open.clear()

    def _send(self) -> None:
        row, self._row = self._row, {}
        for name, run in list(self._open.items()):
            if row and self._step > run.last:
                with self._dropped_on_failure(name):
                    run.write(self._step, row)

    @contextmanager
    def _dropped_on_failure(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of a library, a network, a server: the training goes on
            self._open.pop(name, None)
            logger.warning(
                "logger %s failed, and gets nothing more; --resume sends what it lacks: %s",
                name,
                shortened(f"{type(error).__name__}: {error}", 300),
            )


def _name(cfg: Config) -> str:
    return printable(Path(os.path.abspath(cfg.output_dir)).name)


def _public(cfg: Config) -> dict[str, Any]:
    """Return the config as a dictionary, without this machine's folders and keys that nothing reads."""
    unread = never_read()

    def read(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        return {
            key: read(value, f"{prefix}{key}.") if isinstance(value, Mapping) else value
            for key, value in tree.items()
            if f"{prefix}{key}" not in unread
        }

    return read(to_plain(without_paths(cfg)), "")


def _key_for_mlflow(key: str) -> str:
    """Return a name that MLflow takes: it refuses some characters, and what is no normal path."""
    return posixpath.normpath(re.sub(r"[^\w.\- :/]", "_", key))[:250]


def _read_ids(file: Path) -> dict[str, str]:
    """Return the ids in ``loggers.json``; none, with a warning, if it is damaged."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(read_text(file, _LARGEST))
        ids = {name: id for name, id in found.items() if name in KINDS and _ID.fullmatch(id)}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, UserError) as error:
        logger.warning("%s cannot be read, so that the loggers begin new runs: %s", file, error)
        return {}
    return ids
