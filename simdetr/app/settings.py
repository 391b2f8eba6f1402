"""What the app is started with: folders, address, token, limits; checked before anything is opened."""

from __future__ import annotations

import ipaddress
import secrets
from dataclasses import dataclass
from pathlib import Path

from simdetr.app.run_files import detector_in, has_clusters
from simdetr.data.storage import is_url

DATABASE_NAME = "labels.sqlite"
LEASE_S = 600.0
"""Seconds for which an image that was opened is kept from other people's queues."""
_LEAST_TOKEN = 16


@dataclass(frozen=True)
class AppSettings:
    """What the app works on, and whom it serves.

    Args:
        images: Folder or list of images; they stay where they are and are only read. None: only uploads.
        out: Folder of the app: database, uploads, thumbnails, runs.
        run: Run folder, detector folder or checkpoint that proposes boxes first and that trainings start from. A run
            that was only mined and clustered has no detector: its boxes are the first proposals.
        labels: Labels of another tool to begin with; put on images that nobody has inspected.
        host: Address to listen on; any but this machine's own needs a token.
        port: 0 takes a free one.
        token: What every request has to know; None makes one up where one is needed.
        database: URL of another database than ``out``/labels.sqlite, such as ``postgresql+psycopg://me@host/labels``.
        config: YAML files of the trainings; a recipe for few labels without any.
        propose: Where there is no detector, propose boxes that are mined from the images themselves.
        device: Torch device of the runs; the GPU if there is one.
        max_upload_mb: Largest file that is taken.
        max_pixels: Largest image that is taken.

    Raises:
        FileNotFoundError: The images or labels do not exist, or the run has no detector.
        ValueError: A limit, port or token out of range, or images on another storage.
    """

    images: Path | None = None
    out: Path = Path("runs/labelling")
    run: Path | None = None
    labels: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    database: str | None = None
    config: tuple[str, ...] = ()
    propose: bool = True
    device: str | None = None
    max_upload_mb: int = 200
    max_pixels: int = 100_000_000

    def __post_init__(self) -> None:
        if self.images is not None:
            if is_url(str(self.images)):
                raise ValueError(f"images: expected a folder or list on this machine, got {self.images}; copy them")
            if not self.images.exists():
                raise FileNotFoundError(f"images: {self.images} does not exist; give a folder of images or a list file")
        if self.run is not None and self.start is None and not has_clusters(self.run):
            raise FileNotFoundError(
                "run: expected a folder of `simdetr pretrain` (or of `simdetr mine` and `simdetr cluster`), a detector "
                f"folder or a checkpoint file, got {self.run}; if it was only mined, cluster it first"
            )
        if self.labels is not None and not self.labels.exists():
            raise FileNotFoundError(f"labels: {self.labels} does not exist; give a file or folder of labels")
        if not 0 <= self.port <= 65_535:
            raise ValueError(f"port: expected 0 to 65535, got {self.port}; 0 takes a free one")
        for name in ("max_upload_mb", "max_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.token is not None and len(self.token) < _LEAST_TOKEN:
            raise ValueError(f"token: expected at least {_LEAST_TOKEN} characters; leave it out to have one made up")
        if self.token is None and not self.on_loopback:
            object.__setattr__(self, "token", secrets.token_urlsafe(24))

    @property
    def start(self) -> Path | None:
        """The detector that trainings start from; None where there is none."""
        return None if self.run is None else detector_in(self.run)

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the app."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def database_url(self) -> str:
        """Where the labels are kept."""
        return self.database or f"sqlite:///{(self.out / DATABASE_NAME).absolute()}"
