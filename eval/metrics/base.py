"""A metric of explanations: which perturbed images to score, and how to turn their scores into values.

A :class:`PerturbationMetric` is one group of metrics that share perturbed images (insertion with deletion,
AD with IC). For one explanation of one image it yields the images that it wants scored, and returns a
function that turns the scores into values. The engine schedules the requests of all metrics and methods
together and needs to know nothing else about them.
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
    """One column of a results table: a metric, with its retained fraction if it has several.

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
    """What a metric computes its value from; it is compared with what a head was trained on.

    ``score`` is ``"class"`` (the score of the class on a photo with parts hidden) or ``"area"`` (how much
    of the photo the map covers). ``masks`` says what hides the parts: ``"the map"``, ``"thresholds of the
    map"``, ``"squares"`` or ``"superpixels"``. ``fill`` is what replaces them, unless an option of the
    metric sets it.

    Example:
        >>> from xattn.eval import MetricInputs
        >>> MetricInputs(score="probability", masks="the map's largest values", fill="black").fill
        'black'
    """

    score: str
    masks: str
    fill: str = ""


class MetricInfo(NamedTuple):
    """The formula of a metric in words, which direction is better, and the range of its values.

    ``reads``: see :mod:`xattn.eval.metrics.objectives`; None if no training objective is close to it.
    ``chance``: the mean value of uninformative maps, None if unknown. With the protocol's
    ``invalid="chance"`` an invalid map gets this value.

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
        """Decimals to show: two for percentages, four for other values."""
        return 2 if self.high == 100 else 4


class Request(NamedTuple):
    """One perturbed image to score; the scores of one ``key`` come back together, in order.

    ``image`` is (3, H, W) float32, raw pixels. It is copied at once, so the metric may change it in
    place afterwards. ``shared`` says whether another request may want the very same image; the
    engine then looks it up by a hash of the pixels, which costs about a quarter of a millisecond. With
    ``hit`` the score is 1 if the explained class has the highest score of all classes, else 0.

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
        grey: (1, H, W) float32 in [0, 1], the map min-maxed and resized as the protocol says.
        raw: (1, H, W) float32, the explainer's map, only resized; it may be signed.
        target: the explained class.
        score: the score of the clean image, a probability or logit as the protocol says.
        seed: depends only on the run's seed and the image's position, so that all methods share the
            random perturbations drawn from it.
        is_mask: the map is used as a mask unchanged (the all-ones row).
        resize, normalization: how ``grey`` was made, see :class:`~xattn.eval.Protocol`.
        explain: (b, 3, H, W) -> raw maps (b, 1, h, w) of the same method for the same class.
        explain_randomized: (stage, (b, 3, H, W)) -> the method's raw maps on a network with stage + 1
            randomised parts (-1: all), see :mod:`xattn.eval.metrics.randomization`. A stage that is one
            of :data:`xattn.backbone.halves.HALVES` means the network that sees only that half; a stage
            such as "full 2 0", the network of :func:`xattn.eval.sanity.disconnected.disconnected`.
        annotation: where objects are in the image.
        table: the network's answers to the photo under masks that do not depend on any map.
        beside: for metrics that compare maps, the method's maps of other classes, photos and networks, and
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
        """(1, H, W): ``grey`` thresholded, see :func:`~xattn.eval.functional.threshold_mask`."""
        if (level, method) not in self._masks:
            masked = functional.threshold_mask(self.grey[None], level, method)[0]
            self._masks[level, method] = masked
        return self._masks[level, method]

    @property
    def outcomes(self) -> OutcomeTable:
        """``table``; raises a ValueError if there is none."""
        if self.table is None:
            raise ValueError("table: None; this metric reads outcomes, give Sample an OutcomeTable")
        return self.table

    @property
    def cohort(self) -> Cohort:
        """The cohort in ``beside``; raises a ValueError if there is none."""
        if self.beside is None:
            raise ValueError("beside: None; this metric compares maps, give Sample a Cohort")
        return self.beside[0]

    @property
    def place(self) -> int:
        """The index of this photo in :attr:`cohort`."""
        return 0 if self.beside is None else self.beside[1]


class MaskingChoices(Protocol):
    """The choices of a protocol that a metric may adopt."""

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

    Class attributes tell the engine what ``measure`` needs besides the image and its map:

    * ``explains_again``: calls ``sample.explain`` or ``sample.explain_randomized``;
    * ``explains_randomized``: calls ``sample.explain_randomized``;
    * ``needs_annotation``: reads ``sample.annotation``;
    * ``clips``: also measures clips (3, T, H, W) with maps (1, T, H, W);
    * ``compares``: reads ``sample.cohort``, that is, the map of another ``"class"``, ``"photo"`` or
      ``"network"``, or maps of a ``"mosaic"``.

    ``info`` describes each metric. A registered metric takes it from its group; your own metric has to set
    it if it is not registered.

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
        """The options that this metric adopts from a protocol."""
        return {}

    def score_problem(self, score: str) -> str | None:
        """Why the metrics are undefined for this kind of score, with a remedy; None if defined."""
        return None

    def for_network(self, network: Any) -> PerturbationMetric:
        """The metric with the options that suit the network to be scored; by default the metric is
        unchanged."""
        return self

    def for_axes(self, axes: int) -> PerturbationMetric:
        """This metric, if it can measure inputs with this number of ``axes`` (2 for photos, 3 for
        clips).

        Raises:
            ValueError: the inputs are clips and this metric measures only photos.
        """
        if axes > 2 and not self.clips:
            are = "is" if len(self.columns) == 1 else "are"
            raise ValueError(
                f"metrics: {', '.join(c.key for c in self.columns[:2])} of {type(self).__name__} {are} for "
                "photos, but the network reads clips; give 'masking' or 'insertion-deletion'"
            )
        return self

    def can_compare(self, chunk_photos: ChunkPhotos, place: int) -> bool:
        """Whether a chunk has what the metric needs to compare a photo's map with."""
        return self.compares != "photo" or chunk_photos.next_photo(place) is not None

    @property
    def photos_needed(self) -> str:
        """What :meth:`can_compare` needs in a chunk of photos, in words; empty if it needs nothing."""
        return "2 photos of different predicted classes" if self.compares == "photo" else ""

    def chance(self, column: Column) -> float | None:
        """The mean value of uninformative maps, or None if unknown."""
        info = self.info.get(column.metric)
        return None if info is None else info.chance

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns that ``measure`` returns values for; by default one for each metric in ``info``."""
        return tuple(Column(metric) for metric in self.info)

    @abstractmethod
    def measure(self, sample: Sample) -> Generator[Request, None, Finish]:
        """Yield the images to score one by one; return a function that turns their scores into values.

        The returned function gets float64 scores (T,) by key and returns a value for each column, NaN
        where the metric is undefined for this image.
        """

    def options(self) -> dict[str, Any]:
        """What a value depends on besides the protocol, as plain JSON values."""
        if not is_dataclass(self):
            return {name: _plain(value) for name, value in vars(self).items()}
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    def column_options(self, column: Column) -> dict[str, Any]:
        """The options that this column depends on."""
        return self.options()


@dataclass(frozen=True)
class MetricGroup:
    """What a metric's file declares; :mod:`xattn.eval.metrics.registry` builds all tables from it.

    Attributes:
        name: the group's name in ``--metrics``.
        metric: the class that measures the group.
        metrics: its metrics by name; each column belongs to one of them.
        words: a title and one sentence without a full stop for each of ``metrics``. In the sentence,
            ``{kept}`` and ``{removed}`` stand for the part of the photo kept or removed at the level.
        classes: its torchmetrics classes, :class:`~xattn.eval.metrics.MeanMetric`.
        cases: options that the tests of every group try; the first ones are fast.
        by_name: measured only if it is named, so not part of ``direct`` and ``all``.
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
        """A group of one metric; its column is named ``column``, or like the group by default."""
        column = column or name
        return cls(name, metric, {column: info}, words={column: (title, sentence)}, **more)

    @property
    def direct(self) -> bool:
        """Whether the group needs no annotations, does not explain again and need not be named."""
        return not (self.by_name or self.metric.explains_again or self.metric.needs_annotation)


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value
