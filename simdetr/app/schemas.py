"""The shapes of requests and answers, as the OpenAPI document tells them."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from simdetr.app.box_life import SHOWN_SCORE
from simdetr.app.tables import BoxSource, BoxStatus, ClassKind, ImageStatus, RejectedAs, RunKind, RunState

BIGGEST_ID = 2**31 - 1
_NO_CONTROL = r"^[^\x00-\x1f\x7f]*$"
Id = Annotated[int, Field(ge=1, le=BIGGEST_ID)]
Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200, pattern=_NO_CONTROL)]
Holder = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=_NO_CONTROL)]
Colour = Annotated[str, StringConstraints(pattern="^#[0-9a-fA-F]{6}$")]
Shortcut = Annotated[str, StringConstraints(pattern="^[0-9a-zA-Z]$")]
Version = Annotated[int, Field(ge=0, le=BIGGEST_ID)]
Score = Annotated[float, Field(ge=0, le=1)]
Coordinate = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]
Corners = Annotated[list[Coordinate], Field(min_length=4, max_length=4)]
ModelId = Annotated[str, StringConstraints(pattern=r"^(start|run-[1-9][0-9]{0,8})$")]


class Shape(BaseModel):
    """An answer."""

    model_config = ConfigDict(from_attributes=True)


class Asked(BaseModel):
    """A request; what it does not know is an error, so that a slip of the pen does not pass for a default."""

    model_config = ConfigDict(extra="forbid")


class Problem(Shape):
    """An error."""

    detail: str


COMMON: dict[int | str, dict[str, Any]] = {400: {"model": Problem}, 404: {"model": Problem}}
"""Answers that any request may get: its body cannot be read at all, or what it names is not there."""


class ProjectOut(Shape):
    """A project, with how far it is."""

    id: int
    name: str
    folder: str
    images: int
    by_status: dict[ImageStatus, int]
    boxes: int
    indexing: bool
    active_model: str | None
    rejected_as: RejectedAs
    default_device: str
    created: datetime


class ProjectList(Shape):
    """All projects."""

    projects: list[ProjectOut]


class ProjectNew(Asked):
    """A project to make: of a folder below the app's images, or of uploads."""

    name: Name
    folder: Annotated[str, StringConstraints(max_length=1000, pattern=_NO_CONTROL)] | None = None


class ProjectEdit(Asked):
    """What may change of a project."""

    name: Name | None = None
    rejected_as: RejectedAs | None = None


class ClassOut(Shape):
    """A class, and how many boxes it has that are not rejected."""

    id: int
    project_id: int
    name: str
    colour: str
    shortcut: str | None
    kind: ClassKind
    boxes: int = 0


class ClassList(Shape):
    """The classes of a project."""

    classes: list[ClassOut]


class ClassNew(Asked):
    """A class to make."""

    name: Name
    colour: Colour | None = None
    shortcut: Shortcut | None = None
    kind: ClassKind = ClassKind.NOVEL


class ClassEdit(Asked):
    """What may change of a class; ``shortcut`` null takes it away."""

    name: Name | None = None
    colour: Colour | None = None
    shortcut: Shortcut | None = None
    kind: ClassKind | None = None


class ClassInUse(Problem):
    """A class that cannot go without saying what becomes of its boxes."""

    boxes: int


class ImageOut(Shape):
    """An image and how many boxes it has by status; sizes are null until it was first opened."""

    id: int
    project_id: int
    name: str
    width: int | None
    height: int | None
    status: ImageStatus
    priority: float | None
    reason: str | None
    flags: list[str]
    split: str | None
    version: int
    uploaded: bool
    counts: dict[BoxStatus, int]


class ImagePage(Shape):
    """Some images; ``next`` asks for those after them."""

    images: list[ImageOut]
    next: str | None = None


class OrderOut(Shape):
    """Where the priorities come from."""

    run_id: int | None
    strategy: str
    images: int
    time: datetime


class Queue(Shape):
    """The images that come next."""

    images: list[ImageOut]
    left: int
    order: OrderOut | None


class Duplicate(Shape):
    """A file whose content is there already."""

    name: str
    image_id: int


class Refused(Shape):
    """A file that was not taken."""

    name: str
    reason: str


class Uploaded(Shape):
    """What became of the files of an upload."""

    added: list[ImageOut]
    duplicates: list[Duplicate]
    refused: list[Refused]


class LeaseOut(Shape):
    """Who has an image open, and until when."""

    holder: str
    until: datetime


class BoxOut(Shape):
    """A box in pixels."""

    id: int
    image_id: int
    class_id: int
    xyxy: list[float]
    score: float | None
    status: BoxStatus
    source: BoxSource
    run_id: int | None
    parent_id: int | None
    ignore: bool
    author: str
    time: datetime


class BoxVersions(Shape):
    """A box and the versions before it."""

    boxes: list[BoxOut]


class Sheet(Shape):
    """An image with its boxes, as an editor shows it."""

    image: ImageOut
    version: int
    boxes: list[BoxOut]
    can_undo: bool
    can_redo: bool
    lease: LeaseOut | None


class Stale(Problem):
    """A write that did not know of another; nothing was changed."""

    current: Sheet


class Taken(Problem):
    """An image that another has open."""

    lease: LeaseOut


class Holding(Asked):
    """Who asks."""

    holder: Holder


class NextAsked(Asked):
    """Ask for the next image; ``after`` is the one that is done with."""

    holder: Holder
    after: Id | None = None


class StatusAsked(Asked):
    """What an image is to be."""

    status: Literal["inspected", "skipped", "new"]
    version: Version
    min_score: Score = SHOWN_SCORE


class SentBoxIn(Asked):
    """A box as the editor leaves it; one without id is new."""

    id: Id | None = None
    class_id: Id
    xyxy: Corners
    ignore: bool = False
    status: BoxStatus | None = None


class BoxesAsked(Asked):
    """All boxes that are to be on an image; of one that is inspected, proposals from ``min_score`` on were seen."""

    version: Version
    boxes: Annotated[list[SentBoxIn], Field(max_length=10_000)]
    inspected: bool = False
    min_score: Score = SHOWN_SCORE


class AcceptAsked(Asked):
    """Proposals to accept: those named, those of at least a score, or all."""

    version: Version
    box_ids: list[Id] | None = None
    min_score: Score | None = None
    inspected: bool = False


class RejectAsked(Asked):
    """Boxes to reject."""

    version: Version
    box_ids: list[Id]


class VersionAsked(Asked):
    """The state that the person sees."""

    version: Version


class EventOut(Shape):
    """Something that was done to an image."""

    id: int
    image_id: int | None
    kind: str
    what: str
    author: str
    time: datetime
    boxes: int


class EventPage(Shape):
    """Events, the newest first."""

    events: list[EventOut]
    next: int | None = None


class RunNew(Asked):
    """A run to start."""

    kind: RunKind
    parameters: dict[str, Any] = Field(default_factory=dict)


class RunOut(Shape):
    """A run and how far it is."""

    id: int
    project_id: int
    kind: RunKind
    state: RunState
    progress: float
    done: int
    total: int
    unit: str
    message: str
    error: str | None
    parameters: dict[str, Any]
    snapshot: str | None
    resumable: bool
    checkpoint: str | None
    position: int | None
    artefacts: list[str]
    created: datetime
    started: datetime | None
    ended: datetime | None


class RunPage(Shape):
    """Runs, the newest first."""

    runs: list[RunOut]
    next: int | None = None


class RunNews(Shape):
    """A run, and the rows of its metrics from a number on."""

    run: RunOut
    metrics: list[dict[str, Any]]
    next: int


class DetectAsked(Asked):
    """Detect on one image."""

    model: ModelId | None = None
    min_score: Score = 0.05


class ModelOut(Shape):
    """A detector that can propose boxes."""

    id: str
    title: str
    run_id: int | None
    active: bool
    classes: list[str]
    scores: dict[str, float | None] | None
    created: datetime | None


class ModelList(Shape):
    """All detectors of a project."""

    models: list[ModelOut]


class ModelSummary(Shape):
    """What a detector is made of, computed."""

    model: ModelOut
    detector: str
    parameters: int
    trainable: int
    layers: int
    gflops: float | None
    image_size: list[int]
    configuration: str | None
    snapshot: str | None


class MemoryOut(Shape):
    """What a training takes, about, in bytes; null where it cannot be told before."""

    bytes: int | None
    basis: str


class DetectedBox(Shape):
    """A box that a detector found."""

    class_name: str
    xyxy: list[float]
    score: float


class Detected(Shape):
    """What was found on an image."""

    image_id: int
    name: str
    boxes: list[DetectedBox]


class DetectedPage(Shape):
    """What a detection found, image by image; ``next`` asks for those after them."""

    images: list[Detected]
    next: int | None = None


class ErrorsLeft(Shape):
    """Errors among the proposals on images that nobody has seen."""

    total: float
    low: float
    high: float
    wrong: float
    missed: float
    confidence: float
    basis: str


class NextBatch(Shape):
    """What the next twenty images would buy."""

    errors_found: float
    minutes: float | None


class Estimate(Shape):
    """Whether to go on: what was found, what is left."""

    inspected: int
    accepted: int
    corrected: int
    rejected: int
    drawn: int
    audited: int
    left_images: int
    left_detections: int
    errors_left: ErrorsLeft | None
    next_20: NextBatch | None
    why: str


class AuditAsked(Asked):
    """How many images to draw at random."""

    images: Annotated[int, Field(ge=2, le=1000)] = 20


class AuditOut(Shape):
    """How many images were drawn; they come first in the queue."""

    images: int


class ShotNew(Asked):
    """A box that is to stand for its class, or against it."""

    box_id: Id
    negative: bool = False


class ShotOut(Shape):
    """A shot."""

    id: int
    box: BoxOut
    negative: bool


class ShotList(Shape):
    """The shots of a project."""

    shots: list[ShotOut]


class StageRow(Shape):
    """A stage of few labels to many, and how many boxes had which fate in it."""

    stage: str
    counts: dict[str, int]
    quality: dict[str, float | None] | None = None


class StageList(Shape):
    """The stages that are done."""

    stages: list[StageRow]


class Neighbour(Shape):
    """A shot near a candidate: its place in the gallery of the run, and how alike they are."""

    shot: int
    similarity: float


class CandidateOut(Shape):
    """A detection that may become a label; ``reason`` is empty for one that was kept."""

    row: int
    image: str
    image_id: int | None
    class_name: str
    xyxy: list[float]
    score: float
    reason: str
    why: str
    vote: str | None
    margin: float | None
    nearest: list[Neighbour]


class CandidatePage(Shape):
    """Candidates of an autolabel run."""

    candidates: list[CandidateOut]
    next: int | None = None


class ClusterOut(Shape):
    """Pseudo-classes that count as one kind."""

    id: int
    name: str | None
    class_id: int | None
    boxes: int
    members: list[int]
    picked: int


class ClusterList(Shape):
    """The clusters of a project, the largest first."""

    clusters: list[ClusterOut]
    can_undo: bool
    can_redo: bool


class ClusterEdit(Asked):
    """What the kind is called; nothing takes the name away."""

    name: Annotated[str, StringConstraints(strip_whitespace=True, max_length=200, pattern=_NO_CONTROL)]


class ClusterMerge(Asked):
    """Clusters that are one kind."""

    cluster_ids: Annotated[list[Id], Field(min_length=2, max_length=1000)]


class ClusterCrop(Shape):
    """A box of a cluster, by its row in the labels of the pretraining."""

    row: int
    image: str
    xyxy: list[float]


class ClusterCrops(Shape):
    """Boxes of a cluster, in the order of its montage."""

    crops: list[ClusterCrop]
    next: int | None = None


class ClusterMove(Asked):
    """Boxes of a cluster that are of another kind; without a target, of a new one."""

    rows: Annotated[list[Annotated[int, Field(ge=0, le=BIGGEST_ID)]], Field(min_length=1, max_length=10_000)]
    target: Id | None = None


class Count(Shape):
    """How many boxes."""

    boxes: int


class ImportOut(Shape):
    """What an import found; ``imported`` says whether anything was changed."""

    format: str
    images: int
    boxes: int
    classes: list[str]
    unknown_images: int
    problems: list[str]
    notes: list[str]
    imported: bool


class ExportNew(Asked):
    """What to write."""

    format: Annotated[str, StringConstraints(max_length=40, pattern="^[a-z0-9_-]+$")] = "coco"
    statuses: list[BoxStatus] = Field(
        default_factory=lambda: [BoxStatus.INSPECTED, BoxStatus.CORRECTED, BoxStatus.MANUAL]
    )
    images: bool = False


class ExportOut(Shape):
    """What was written, and where it is."""

    id: str
    format: str
    images: int
    boxes: int
    notes: list[str]
    snapshot: str
    download: str


class FormatList(Shape):
    """Names of the formats of labels."""

    read: list[str]
    write: list[str]


class Augmentation(Shape):
    """A change of images in training that can be chosen."""

    name: str
    title: str
    kind: Literal["number", "switch", "choice"]
    default: float | bool | str
    least: float | None = None
    most: float | None = None
    choices: list[str] | None = None


class AugmentationList(Shape):
    """All of them."""

    augmentations: list[Augmentation]


class Device(Shape):
    """Something that computes."""

    name: str
    title: str
    memory_total: int
    memory_used: int


class SystemOut(Shape):
    """The machine; sizes in bytes."""

    version: str
    cores: int
    cpu_percent: float
    memory_total: int
    memory_used: int
    server_memory: int
    disk_free: int
    devices: list[Device]
    database: str
    needs_token: bool
