"""A metric of explanations: which perturbed images to score, and how to turn their scores into values.

A :class:`PerturbationMetric` is a group of metrics that share perturbed images (insertion with deletion, AD
with IC). For each explanation of an image, it yields the images that it needs scored and returns a function
that turns the scores into values. The engine schedules the requests of all metrics and methods together,
and this is all it needs from a metric.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from torch import Tensor

from xattn.eval import functional
from xattn.eval.annotations import Annotation

if TYPE_CHECKING:
    from xattn.eval.metrics.board.cohort import ChunkPhotos, Cohort
    from xattn.eval.metrics.board.table import OutcomeTable

Finish = Callable[[Mapping[str, Tensor]], Mapping["Column", float]]


class Column(NamedTuple):
    """One column of a results table: a metric and, if it is measured at several levels, the retained
    fraction.

    Example:
        >>> from xattn.eval import Column
        >>> Column("AD", 0.5)
        Column(metric='AD', level=0.5)
    """

    metric: str
    level: float | None = None

    @property
    def key(self) -> str:
        """The column's name, such as ``"AD@15"`` or ``"deletion"``."""
        return self.metric if self.level is None else f"{self.metric}@{100 * self.level:g}"


class MetricInputs(NamedTuple):
    """The inputs from which a metric computes its value, to be compared with those of a head's training.

    ``score`` is ``"class"`` (the score of the class on a photo with hidden parts) or ``"area"`` (how much
    of the photo the map covers). ``masks`` says what hides the parts: ``"the map"``, ``"thresholds of the
    map"``, ``"squares"`` or ``"superpixels"``. ``fill`` says what replaces the hidden parts, unless an
    option of the metric sets this.

    Example:
        >>> from xattn.eval import MetricInputs
        >>> MetricInputs(score="probability", masks="the map's largest values", fill="black").fill
        'black'
    """

    score: str
    masks: str
    fill: str = ""


class MetricInfo(NamedTuple):
    """The formula of a metric, whether higher values are better, and the range of its values.

    ``reads`` is explained in :mod:`xattn.eval.metrics.objectives`; it is None if no training objective is
    close to the metric. ``chance`` is the mean value of uninformative maps, or None if it is unknown. If
    the protocol has ``invalid="chance"``, an invalid map gets this value.

    Example:
        >>> from xattn.eval import MetricInfo
        >>> MetricInfo("mean max(0, p - q) / p", higher_is_better=False).kind
        'faithfulness'
    """

    formula: str
    higher_is_better: bool
    low: float = 0.0
    high: float = 1.0
    kind: str = "faithfulness"
    reads: MetricInputs | None = None
    chance: float | None = None

    @property
    def digits(self) -> int:
        """The number of decimals to show: two for percentages, four for other values."""
        return 2 if self.high == 100 else 4


class Request(NamedTuple):
    """One perturbed image to score. The scores of requests with the same ``key`` are returned together, in
    order.

    ``image`` is (3, H, W) float32, raw pixels. It is copied at once, so the metric may change it in place
    afterwards. Set ``shared`` if another request may contain exactly the same image. The engine then looks
    the image up by a hash of its pixels, which takes about a quarter of a millisecond. With ``hit``, the
    score is 1 if the explained class has the highest score of all classes, else 0.

    Example:
        >>> import torch
        >>> from xattn.eval import Request
        >>> Request("clean", torch.rand(3, 8, 8)).shared
        True
    """

    key: str
    image: Tensor
    shared: bool = True
    hit: bool = False


@dataclass(eq=False, frozen=True)
class Sample:
    """One explanation of one image, as a metric sees it.

    Attributes:
        image: (3, H, W) float32 in [0, 1], raw pixels; the backbone normalises them.
        grey: (1, H, W) float32 in [0, 1], the map after the protocol's normalisation and resizing.
        raw: (1, H, W) float32, the explainer's map after resizing only; it may be signed.
        target: the explained class.
        score: the score of the clean image, a probability or a logit depending on the protocol.
        seed: depends only on the run's seed and the image's position, so that all methods share the
            random perturbations drawn from it.
        is_mask: whether the map is used unchanged as a mask, as in the all-ones row.
        resize, normalization: how ``grey`` was made, see :class:`~xattn.eval.Protocol`.
        explain: a function (b, 3, H, W) -> raw maps (b, 1, h, w) of the same method for the same class.
        explain_randomized: a function (stage, (b, 3, H, W)) -> the method's raw maps on a network with
            stage + 1 randomised parts (-1: all), see :mod:`xattn.eval.metrics.randomization`. A stage in
            :data:`xattn.backbone.halves.HALVES` means the network that sees only that half, and a stage
            such as "full 2 0" means the network of :func:`xattn.eval.sanity.disconnected.disconnected`.
        annotation: where the objects are in the image.
        table: the network's outputs for the photo under masks that do not depend on any map.
        beside: for metrics that compare maps: the method's maps of other classes, photos and networks, and
            the index of this photo among them.

    Example:
        >>> import torch
        >>> from xattn.eval import Sample
        >>> image, map = torch.rand(3, 8, 8), torch.rand(8, 8)
        >>> one = Sample(image, map, map, target=3, score=0.7)
        >>> one.target, one.score
        (3, 0.7)
    """

    image: Tensor
    grey: Tensor
    raw: Tensor
    target: int
    score: float
    seed: int = 0
    is_mask: bool = False
    resize: str = "bilinear"
    normalization: str = "minmax"
    explain: Callable[[Tensor], Tensor] | None = None
    explain_randomized: Callable[[int | str, Tensor], Tensor] | None = None
    annotation: Annotation | None = None
    table: OutcomeTable | None = None
    beside: tuple[Cohort, int] | None = None
    _masks: dict[tuple[float, str], Tensor] = field(default_factory=dict, repr=False)

    def mask(self, level: float, method: str) -> Tensor:
        """Threshold ``grey`` to a mask (1, H, W), see :func:`~xattn.eval.functional.threshold_mask`."""
        if (level, method) not in self._masks:
            masked = functional.threshold_mask(self.grey[None], level, method)[0]
            self._masks[level, method] = masked
        return self._masks[level, method]

    @property
    def outcomes(self) -> OutcomeTable:
        """The value of ``table``; a ValueError is raised if it is None."""
        if self.table is None:
            raise ValueError("table: None; this metric reads outcomes; give Sample an OutcomeTable")
        return self.table

    @property
    def cohort(self) -> Cohort:
        """The cohort in ``beside``. If ``beside`` is None, a ValueError is raised."""
        if self.beside is None:
            raise ValueError("beside: None; this metric compares maps; give Sample a Cohort")
        return self.beside[0]

    @property
    def place(self) -> int:
        """The index of this photo in :attr:`cohort`."""
        return 0 if self.beside is None else self.beside[1]


class MaskingChoices(Protocol):
    """The settings of a protocol that a metric may adopt."""

    @property
    def levels(self) -> tuple[float, ...]: ...
    @property
    def threshold(self) -> str: ...
    @property
    def masked_value(self) -> str: ...
    @property
    def ic_margin(self) -> float: ...


class PerturbationMetric(ABC):
    """A group of metrics that share perturbed images: a frozen dataclass whose fields are options.

    Class attributes state what ``measure`` needs besides the image and its map:

    * ``explains_again``: whether it calls ``sample.explain`` or ``sample.explain_randomized``;
    * ``explains_randomized``: whether it calls ``sample.explain_randomized``;
    * ``needs_annotation``: whether it reads ``sample.annotation``;
    * ``clips``: whether it can also measure clips (3, T, H, W) with maps (1, T, H, W);
    * ``compares``: what it reads from ``sample.cohort``, if anything: the map of another ``"class"``,
      ``"photo"`` or ``"network"``, or maps of a ``"mosaic"``.

    ``info`` describes each metric. A registered metric gets it from its group. If your own metric is not
    registered, it has to set ``info`` itself.

    Example:
        >>> from xattn.eval import PerturbationMetric, create_metric
        >>> isinstance(create_metric("insertion-deletion"), PerturbationMetric)
        True
    """

    info: ClassVar[Mapping[str, MetricInfo]] = {}
    explains_again: ClassVar[bool] = False
    explains_randomized: ClassVar[bool] = False
    needs_annotation: ClassVar[bool] = False
    clips: ClassVar[bool] = False
    compares: ClassVar[str] = ""

    @classmethod
    def protocol_options(cls, protocol: MaskingChoices) -> dict[str, Any]:
        """Return the options that this metric adopts from a protocol."""
        return {}

    def score_problem(self, score: str) -> str | None:
        """Explain why the metrics are undefined for this kind of score, and what to do instead. Return None
        if they are defined."""
        return None

    def for_network(self, network: Any) -> PerturbationMetric:
        """Return the metric with the options that suit the network to be scored. By default, the metric is
        returned unchanged."""
        return self

    def for_axes(self, axes: int) -> PerturbationMetric:
        """Return this metric if it can measure inputs with ``axes`` axes (2 for photos, 3 for clips).

        Raises:
            ValueError: if the inputs are clips and this metric measures only photos.
        """
        if axes > 2 and not self.clips:
            are = "is" if len(self.columns) == 1 else "are"
            raise ValueError(
                f"metrics: {', '.join(c.key for c in self.columns[:2])} of {type(self).__name__} {are} for "
                "photos, but the network reads clips; give 'masking' or 'insertion-deletion'"
            )
        return self

    def can_compare(self, chunk_photos: ChunkPhotos, place: int) -> bool:
        """Return whether the chunk contains what the metric needs for a comparison with a photo's map."""
        return self.compares != "photo" or chunk_photos.next_photo(place) is not None

    @property
    def photos_needed(self) -> str:
        """A description of what :meth:`can_compare` needs in a chunk of photos; empty if it needs
        nothing."""
        return "2 photos of different predicted classes" if self.compares == "photo" else ""

    def chance(self, column: Column) -> float | None:
        """Return the mean value of uninformative maps, or None if it is unknown."""
        info = self.info.get(column.metric)
        return None if info is None else info.chance

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns for which ``measure`` returns values; by default one for each metric in ``info``."""
        return tuple(Column(metric) for metric in self.info)

    @abstractmethod
    def measure(self, sample: Sample) -> Generator[Request, None, Finish]:
        """Yield the images to score one by one, and return a function that turns their scores into values.

        The returned function gets a dict of float64 scores (T,) for each key. It returns a value for each
        column, which is NaN if the metric is undefined for this image.
        """

    def options(self) -> dict[str, Any]:
        """Return everything that a value depends on besides the protocol, as plain JSON values."""
        if not is_dataclass(self):
            return {name: _plain(value) for name, value in vars(self).items()}
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    def column_options(self, column: Column) -> dict[str, Any]:
        """Return the options on which this column depends."""
        return self.options()


@dataclass(frozen=True)
class MetricGroup:
    """The declaration at the end of a metric's file, from which :mod:`xattn.eval.metrics.registry` builds
    all of its tables.

    Attributes:
        name: the group's name in ``--metrics``.
        metric: the class that measures the group.
        metrics: its metrics, keyed by name; each column belongs to one of them.
        words: for each of ``metrics``, a title and one sentence without a full stop. In the sentence,
            ``{kept}`` and ``{removed}`` stand for the parts of the photo that are kept and removed at the
            column's level.
        classes: its torchmetrics classes, subclasses of :class:`~xattn.eval.metrics.MeanMetric`.
        cases: sets of options with which every group is tested; the first one is fast.
        by_name: whether it is measured only if it is named, and is not part of ``direct`` and ``all``.
    """

    name: str
    metric: type[PerturbationMetric]
    metrics: Mapping[str, MetricInfo]
    classes: tuple[type[Any], ...] = ()
    cases: tuple[Mapping[str, Any], ...] = ({},)
    words: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    by_name: bool = False

    def __post_init__(self) -> None:
        if "info" not in vars(self.metric):  # an inherited info describes the base class
            self.metric.info = self.metrics
        for cls in self.classes:
            cls.group = self

    @classmethod
    def single(
        cls,
        metric: type[PerturbationMetric],
        name: str,
        info: MetricInfo,
        title: str,
        sentence: str,
        column: str = "",
        **more: Any,
    ) -> MetricGroup:
        """Create a group with a single metric. By default, its column has the name of the group."""
        column = column or name
        return cls(name, metric, {column: info}, words={column: (title, sentence)}, **more)

    @property
    def direct(self) -> bool:
        """Whether ``--metrics direct`` includes the group. A group is included if it needs no annotations,
        computes no further explanations, and does not have ``by_name`` set."""
        return not (self.by_name or self.metric.explains_again or self.metric.needs_annotation)


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value
