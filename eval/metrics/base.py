"""A metric of explanations: which perturbed images to score, and what their scores say.

A :class:`PerturbationMetric` is one group of metrics that share perturbed images (insertion with deletion,
AD with IC). For one explanation of one image it yields the images it wants scored and returns a function
that turns the scores into values; the engine schedules the requests of all metrics and methods together and
knows nothing else about them.
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
    from xattn.eval.metrics.board.cohort import Cohort, Company
    from xattn.eval.metrics.board.table import OutcomeTable

Finish = Callable[[Mapping[str, Tensor]], Mapping["Column", float]]


class Column(NamedTuple):
    """One column of a results table: a metric, at one retained fraction where it has several."""

    metric: str
    level: float | None = None

    @property
    def key(self) -> str:
        """Such as ``"AD@15"`` or ``"deletion"``."""
        return self.metric if self.level is None else f"{self.metric}@{100 * self.level:g}"


class Reads(NamedTuple):
    """What a metric reads of a map or a photo, to compare with what a head's training read.

    ``score`` is ``"class"``, the class's score of a photo of which parts are hidden, or ``"area"``, how
    much the map covers. ``masks`` says what hides the parts: ``"the map"``, ``"thresholds of the map"``,
    ``"squares"`` or ``"superpixels"``. ``fill`` is what stands there, unless an option of the metric says
    it.
    """

    score: str
    masks: str
    fill: str = ""


class MetricInfo(NamedTuple):
    """A metric's formula in words, which direction is better, and the range of its values.

    ``reads``: see :mod:`xattn.eval.metrics.objectives`; None for a metric that no training is close to.
    ``chance``: the mean of maps that know nothing, which an invalid map scores where the protocol says so
    (``Protocol.invalid``); None where it is not known.
    """

    formula: str
    higher_is_better: bool
    low: float = 0.0
    high: float = 1.0
    kind: str = "faithfulness"
    reads: Reads | None = None
    chance: float | None = None

    @property
    def digits(self) -> int:
        """Decimals to show: percentages have two, the others four."""
        return 2 if self.high == 100 else 4


class Request(NamedTuple):
    """One perturbed image to score; scores of one ``key`` come back together, in order.

    ``image`` is (3, H, W) float32 of raw pixels. It is copied at once: the metric may change it in
    place afterwards. ``shared`` says whether some other request may want the very same image; the
    engine then looks for it by a hash of the pixels, which costs about a quarter of a millisecond. With
    ``hit`` the score is 1 where the explained class has the highest one of all, else 0.
    """

    key: str
    image: Tensor
    shared: bool = True
    hit: bool = False


@dataclass(eq=False, frozen=True)
class Sample:
    """One explanation of one image, as a metric sees it.

    Attributes:
        image: (3, H, W) float32 in [0, 1], raw pixels; the backbone normalises.
        grey: (1, H, W) float32 in [0, 1], the map min-maxed and resized as the protocol says.
        raw: (1, H, W) float32, the explainer's own map, resized only; it may be signed.
        target: the explained class.
        score: of the clean image, probability or logit as the protocol says.
        seed: a pure function of (seed of the run, position of the image), the same for all methods:
            random perturbations drawn from it are shared between methods.
        is_mask: the map is a mask as it is (the all-ones row).
        resize, normalization: how ``grey`` was made, see :class:`~xattn.eval.Protocol`.
        explain: (b, 3, H, W) -> raw maps (b, 1, h, w) by the same method for the same class.
        explain_randomized: (stage, (b, 3, H, W)) -> raw maps by the method on the network of which
            stage + 1 parts are randomised (-1: all), see :mod:`xattn.eval.metrics.randomization`; or, by
            one of :data:`xattn.backbone.halves.HALVES`, on the network that sees that half alone.
        annotation: what the image shows where.
        table: what the network answers to masks of the photo that no map has a part in.
        beside: the method's maps of other classes, photos and networks, for metrics that compare, and which
            of its photos this one is.
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
        """``table``; an error if there is none."""
        if self.table is None:
            raise ValueError("table: None; this metric reads outcomes, give Sample an OutcomeTable")
        return self.table

    @property
    def cohort(self) -> Cohort:
        """That of ``beside``; an error if there is none."""
        if self.beside is None:
            raise ValueError("beside: None; this metric compares maps, give Sample a Cohort")
        return self.beside[0]

    @property
    def place(self) -> int:
        """Of this photo in :attr:`cohort`."""
        return 0 if self.beside is None else self.beside[1]


class MaskingChoices(Protocol):
    """The choices of a protocol that a metric may take over."""

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

    Class attributes tell the engine what ``measure`` needs beside the image and its map:

    * ``explains_again``: calls ``sample.explain`` or ``sample.explain_randomized``;
    * ``explains_randomized``: calls ``sample.explain_randomized``;
    * ``needs_annotation``: reads ``sample.annotation``;
    * ``clips``: also measures clips (3, T, H, W) and their maps (1, T, H, W);
    * ``compares``: reads ``sample.cohort``: the map of another ``"class"``, ``"photo"`` or ``"network"``,
      or maps of a ``"mosaic"``.

    ``info`` says of each metric what it is. A metric of your own that is not registered needs it; those
    that are have it from their group.
    """

    info: ClassVar[Mapping[str, MetricInfo]] = {}
    explains_again: ClassVar[bool] = False
    explains_randomized: ClassVar[bool] = False
    needs_annotation: ClassVar[bool] = False
    clips: ClassVar[bool] = False
    compares: ClassVar[str] = ""

    @classmethod
    def protocol_options(cls, protocol: MaskingChoices) -> dict[str, Any]:
        """The options that this metric takes from a protocol."""
        return {}

    def score_problem(self, score: str) -> str | None:
        """Why the metrics are not defined for this kind of score, with the remedy; None if they are."""
        return None

    def for_network(self, network: Any) -> PerturbationMetric:
        """The metric with the options that it takes from the network that is scored; by default itself."""
        return self

    def for_axes(self, axes: int) -> PerturbationMetric:
        """Itself, if it measures inputs of so many ``axes``, 2 of photos, 3 of clips.

        Raises:
            ValueError: of clips, which it does not measure.
        """
        if axes > 2 and not self.clips:
            are = "is" if len(self.columns) == 1 else "are"
            raise ValueError(
                f"metrics: {', '.join(c.key for c in self.columns[:2])} of {type(self).__name__} {are} of "
                f"photos, the network reads clips; give 'masking' or 'insertion-deletion'"
            )
        return self

    def can_compare(self, company: Company, place: int) -> bool:
        """Whether a photo of a chunk has what the metric compares its map with."""
        return self.compares != "photo" or company.next_photo(place) is not None

    @property
    def company_needed(self) -> str:
        """What a chunk of photos must have for :meth:`can_compare`, in words; empty if nothing."""
        return "2 photos of different predicted classes" if self.compares == "photo" else ""

    def chance(self, column: Column) -> float | None:
        """The mean of maps that know nothing, or None."""
        info = self.info.get(column.metric)
        return None if info is None else info.chance

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns that ``measure`` has values for; by default one for each metric in ``info``."""
        return tuple(Column(metric) for metric in self.info)

    @abstractmethod
    def measure(self, sample: Sample) -> Generator[Request, None, Finish]:
        """Yield the images to score one by one; return what turns their scores into values.

        The returned function gets float64 scores (T,) by key and gives a value a column, NaN where
        the metric is undefined for this image.
        """

    def options(self) -> dict[str, Any]:
        """What a value's meaning depends on beside the protocol: JSON-plain fields."""
        if not is_dataclass(self):
            return {name: _plain(value) for name, value in vars(self).items()}
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    def column_options(self, column: Column) -> dict[str, Any]:
        """The options that this column depends on."""
        return self.options()


@dataclass(frozen=True)
class MetricGroup:
    """What a metric's file declares; :mod:`xattn.eval.metrics.registry` makes all tables of it.

    Attributes:
        name: what ``--metrics`` calls the group.
        metric: what measures it.
        metrics: its metrics by name; the columns are of these.
        words: a title and one sentence for each of ``metrics``, without a full stop; the sentence may have
            ``{kept}`` or ``{removed}``, which part of the photo that is at the metric's level.
        classes: its torchmetrics classes, :class:`~xattn.eval.metrics.MeanMetric`.
        cases: options that the tests of every group try; the first are cheap.
        by_name: measured only where it is named, not in ``direct`` and ``all``.
    """

    name: str
    metric: type[PerturbationMetric]
    metrics: Mapping[str, MetricInfo]
    classes: tuple[type[Any], ...] = ()
    cases: tuple[Mapping[str, Any], ...] = ({},)
    words: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    by_name: bool = False

    def __post_init__(self) -> None:
        if "info" not in vars(self.metric):  # a base's are its own
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
        """A group of one metric, whose column has the group's name unless it has one of its own."""
        column = column or name
        return cls(name, metric, {column: info}, words={column: (title, sentence)}, **more)

    @property
    def direct(self) -> bool:
        """Whether it needs no annotation, explains nothing again and need not be named."""
        return not (self.by_name or self.metric.explains_again or self.metric.needs_annotation)


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value
