"""FreeSwim on clips: a small generator of moving shapes draws clips of twice its height and width.

    python -m xattn.eval.studies larger-clips

A transformer learns to draw clips of one object of a named colour and shape by flow matching,

    x_t = (1 - t) noise + t clip,    v = (net(x_t, t, text) - x_t) / (1 - t),    dx = v dt from t = 0 to 1.

Objects are Gaussians of one colour. Each block of the network has attention over the tokens of all
frames, with rotary positions in three dimensions, attention to the text, and an MLP. Larger clips are
drawn from noise of their size, without training:

    window      each token sees a window of a training clip's size in all frames, inside the clip
    full        each token sees all tokens, with scores multiplied by sqrt(ln N / ln N_0)
    freeswim    window, but what is read of the text is that of the full branch, which runs beside it and
                is computed in every ``cache``-th step (Wu et al., arXiv 2511.14712)

Objects are counted as the connected parts of a frame that are brighter than a threshold.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from xattn.attention import create_mechanism, create_rotation
from xattn.attention.inputs import Inputs
from xattn.eval.bootstrap import t_interval
from xattn.eval.evaluation.split import Split
from xattn.eval.studies.options import OutputAt, Quick
from xattn.eval.studies.run_files import measure_rows, raw_rows, reported
from xattn.eval.studies.small_training import minimize, single_thread
from xattn.runtime.files import atomic_file


@dataclass(frozen=True)
class ClipConfig:
    """The clips, the generator and its training."""

    frames: int = 3  # Frames of every clip.
    side: int = 10  # Height and width of a training clip in pixels.
    times: int = 2  # How many times as high and wide the larger clips are.
    width: int = 48  # Channels.
    heads: int = 2  # Attention heads.
    blocks: int = 3  # Blocks of the transformer.
    steps: int = 600  # Training steps.
    batch_size: int = 16  # Clips per step.
    lr: float = 3e-3  # Peak learning rate of AdamW.
    flow_steps: int = 16  # Steps of Euler's method to draw a clip.
    clips: int = 2  # Clips to draw of each colour and shape.
    seeds: int = 5  # Generators: seeds 0, 1, ...

    def quick(self) -> ClipConfig:
        """A few steps, to see that everything runs; its figures mean nothing."""
        return replace(
            self, width=24, heads=1, blocks=1, steps=3, batch_size=4, flow_steps=2, clips=1, seeds=2
        )


COLOURS = ("red", "green", "blue")
SHAPES = {"round": (1.7, 1.7), "tall": (2.4, 1.2), "wide": (1.2, 2.4)}
"""Standard deviations of each shape's Gaussian in pixels, along height and width."""
MARGIN = 1.0  # standard deviations between the centre of an object and the border
PATCH = 2  # side of a token in pixels
LEFT = 0.1  # lower bound of 1 - t, by which errors are divided to be those of v
PACE = 0.6  # radians per token of the fastest angle, so that none wraps around on the larger grid
LEAST = 4  # fewest pixels of an object that is counted
ASPECT = 1.4  # ratio of height to width, or its inverse, above which an object is tall or wide
TEST_SEED = 1_000_000


class Clips(NamedTuple):
    """``pixels`` (B, 3, T, H, W) in [-1, 1], and the numbers of colour and shape, ``text`` (B, 2)."""

    pixels: Tensor
    text: Tensor


def draw_clips(count: int, config: ClipConfig, seed: int, times: int = 1) -> Clips:
    """Clips of one object that moves up to a pixel per frame in each direction and stays inside.

    Args:
        times: how many times as high and wide as training clips the clips are; objects keep their size.
    """
    random = torch.Generator().manual_seed(seed)
    side, last = config.side * times, config.frames - 1
    text = torch.stack([torch.randint(3, (count,), generator=random) for _ in range(2)], 1)
    sigma = torch.tensor(list(SHAPES.values()))[text[:, 1]]  # (B, 2)
    speed = 2 * torch.rand(count, 2, generator=random) - 1
    low = MARGIN * sigma + (-speed * last).clamp(min=0)
    high = side - MARGIN * sigma - (speed * last).clamp(min=0)
    start = low + torch.rand(count, 2, generator=random) * (high - low)
    centre = start[:, None] + speed[:, None] * torch.arange(config.frames)[:, None]  # (B, T, 2)
    away = (torch.arange(side) + 0.5 - centre[..., None]) / sigma[:, None, :, None]
    along = (-away.square() / 2).exp()  # (B, T, 2, side)
    shape = along[:, :, 0, :, None] * along[:, :, 1, None, :]
    pixels = shape[:, None] * F.one_hot(text[:, 0], 3)[:, :, None, None, None]
    return Clips(2 * pixels.float() - 1, text)


class Branch(NamedTuple):
    """Which tokens see which: ``visible`` (N, N), or None for all; and the factor of the scores."""

    visible: Tensor | None
    factor: float


def branches(grid: tuple[int, int, int], config: ClipConfig) -> dict[str, Branch]:
    """The window and the full branch of the mechanism ``freeswim`` on a grid of tokens."""
    trained = config.frames, config.side // PATCH, config.side // PATCH
    mechanism = create_mechanism("freeswim", config.width, config.heads, kernel=trained)
    zeros = torch.zeros(1, config.heads, math.prod(grid), config.width // config.heads)
    inputs = Inputs(zeros, zeros, zeros, grid=grid)
    seen = mechanism.operator(inputs).rows(torch.arange(zeros.shape[2]))[0, 0] > 0
    return {
        "window": Branch(None if seen.all() else seen, 1.0),
        "full": Branch(None, mechanism.prefix_scale(inputs)),  # type: ignore[operator]
    }


class Block(nn.Module):
    """Attention over the clip, attention to the text, and an MLP; shifts and scales depend on time."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(3))
        self.modulate = nn.Linear(width, 6 * width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.query, self.pair = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.text_out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width)
        )

    def _split(self, x: Tensor, parts: int) -> Tensor:
        return x.unflatten(2, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        moment: Tensor,
        turn: Any,
        branch: Branch,
        given: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The tokens after the block, and what they read from the text; ``given`` replaces the latter."""
        changes = self.modulate(F.silu(moment))[:, None].chunk(6, -1)

        def normed(i: int) -> Tensor:
            return self.norms[i](x) * (1 + changes[2 * i]) + changes[2 * i + 1]  # type: ignore[no-any-return]

        q, k, v = self._split(self.qkv(normed(0)), 3)
        y = F.scaled_dot_product_attention(branch.factor * turn(q), turn(k), v, branch.visible)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        if given is None:
            k, v = self._split(self.pair(text), 2)
            y = F.scaled_dot_product_attention(self._split(self.query(normed(1)), 1)[0], k, v)
            given = self.text_out(y.transpose(1, 2).flatten(2))
        x = x + given
        return x + self.mlp(normed(2)), given


class Generator(nn.Module):
    """Predicts the clip from x_t, t and the text; height and width have to be multiples of a patch."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        width = config.width
        self.embed, self.read = nn.Linear(3 * PATCH**2, width), nn.Linear(width, 3 * PATCH**2)
        self.words = nn.Embedding(1 + len(COLOURS) + len(SHAPES), width)
        self.time = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(width)
        self.rotation = create_rotation("axial", width // config.heads, axes=3)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        branch: Branch,
        given: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Clips (B, 3, T, H, W) for x of that shape and t (B,), and what each block read from the text.

        Args:
            given: another branch's reading of the text, used in place of the blocks' own.
        """
        cells = x.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH))  # (B, 3, T, h, p, w, p)
        cells = cells.permute(0, 2, 3, 5, 1, 4, 6)
        grid = tuple(cells.shape[1:4])
        tokens = self.embed(cells.flatten(4).flatten(1, 3))
        places = PACE * self.rotation.places(grid, 0, tokens)

        def turn(q: Tensor) -> Tensor:
            return self.rotation(q, q, places)[0]  # type: ignore[no-any-return]

        angles = t[:, None] * 2.0 ** torch.arange(8) * math.pi / 2
        moment = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        start = torch.zeros_like(text[:, :1])
        of_text = self.words(torch.cat([start, 1 + text[:, :1], 1 + len(COLOURS) + text[:, 1:]], 1))
        kept = []
        for number, block in enumerate(self.blocks):
            over = None if given is None else given[number]
            tokens, of_block = block(tokens, of_text, moment, turn, branch, over)
            kept.append(of_block)
        clip = self.read(self.norm(tokens)).unflatten(1, grid).unflatten(4, (3, PATCH, PATCH))
        return clip.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4), kept


def train(net: Generator, config: ClipConfig, split: Split, seed: int) -> float:
    """Train ``net`` by flow matching, and return the CPU seconds."""
    every = Branch(None, 1.0)
    random = torch.Generator().manual_seed(seed)
    seeds = split.fit([seed * config.steps + step for step in range(config.steps)])

    def losses() -> Iterator[Tensor]:
        for each in seeds:
            clips = draw_clips(config.batch_size, config, each)
            noise = torch.randn(clips.pixels.shape, generator=random)
            t = torch.rand(len(noise), generator=random)
            at = t[:, None, None, None, None]
            found, _ = net((1 - at) * noise + at * clips.pixels, t, clips.text, every)
            left = (1 - at).clamp(min=LEFT)
            yield F.mse_loss(found / left, clips.pixels / left)

    return minimize(net, losses(), config.steps, config.lr, 0.01, max_norm=1.0)


@torch.no_grad()
def sample(
    net: Generator,
    text: Tensor,
    config: ClipConfig,
    seed: int,
    row: str,
    times: int,
    cache: int = 1,
) -> Tensor:
    """Draw clips (B, 3, T, H, W) of ``text`` (B, 2), from noise that depends only on ``seed`` and size.

    Args:
        row: "window", "full" or "freeswim".
        cache: the full branch of "freeswim" is computed once in this many steps.
    """
    side = config.side * times
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(len(text), 3, config.frames, side, side, generator=random)
    found = branches((config.frames, side // PATCH, side // PATCH), config)
    given: list[Tensor] | None = None
    for step in range(config.flow_steps):
        t = torch.full((len(x),), step / config.flow_steps)
        if row == "freeswim" and step % cache == 0:
            given = net(x, t, text, found["full"])[1]
        branch = found["window" if row == "freeswim" else row]
        clip = net(x, t, text, branch, given)[0]
        x = x + (clip - x) / (config.flow_steps - step)
    return x


# ---------------------------------------------------------------------- counting


class Counted(NamedTuple):
    """For each clip: objects per frame, and whether every frame has one object, one of the requested
    colour, and one of the requested colour and shape."""

    objects: list[float]
    one: list[int]
    coloured: list[int]
    asked: list[int]


def count_objects(pixels: Tensor, text: Tensor) -> Counted:
    """Count the objects of clips (B, 3, T, H, W); parts that touch at a corner are one object."""
    from scipy import ndimage

    found = Counted([], [], [], [])
    for clip, (colour, shape) in zip(pixels.numpy(), text.tolist(), strict=True):
        numbers, coloured, asked = [], [], []
        for frame in clip.transpose(1, 0, 2, 3):
            parts, count = ndimage.label(frame.max(0) > 0, np.ones((3, 3)))
            masks = [parts == i for i in range(1, count + 1)]
            masks = [mask for mask in masks if mask.sum() >= LEAST]
            numbers.append(len(masks))
            same = [mask for mask in masks if frame[:, mask].mean(1).argmax() == colour]
            coloured.append(len(masks) == 1 == len(same))
            asked.append(coloured[-1] and shape_of(same[0]) == shape)
        found.objects.append(sum(numbers) / len(numbers))
        found.one.append(int(all(number == 1 for number in numbers)))
        found.coloured.append(int(all(coloured)))
        found.asked.append(int(all(asked)))
    return found


def shape_of(mask: np.ndarray[Any, Any]) -> int:
    """The number of the shape in :data:`SHAPES` that has the aspect of ``mask`` (H, W), at any size."""
    height, width = (np.ptp(np.nonzero(mask)[axis]) + 1 for axis in (0, 1))
    return 1 if height >= ASPECT * width else 2 if width >= ASPECT * height else 0


# ---------------------------------------------------------------------- the study


class Drawing(NamedTuple):
    """How clips are drawn: the row's title, the branch, the factor ``times`` of the size, the cache."""

    title: str
    row: str
    times: int
    cache: int = 1


DEFAULTS = ClipConfig()
SHOWN = 5  # clips of each row in the picture
PAIRS = (("freeswim", "window"), ("full", "freeswim"), ("cached", "freeswim"))
"""Rows, and the controls that they are compared with, seed by seed."""


def drawings(config: ClipConfig) -> dict[str, Drawing]:
    """The drawings, by the row of the tables."""
    n = config.times
    return {
        "trained size": Drawing("training size", "full", 1),
        "window": Drawing("window alone", "window", n),
        "full": Drawing("full attention alone", "full", n),
        "freeswim": Drawing("FreeSwim", "freeswim", n),
        "cached": Drawing("FreeSwim, cached 2 steps", "freeswim", n, 2),
    }


def measure(config: ClipConfig, output: Path, split: Split, seed: int) -> dict[str, Any]:
    """Train a generator, draw clips in every way, and count their objects."""
    net = Generator(config)
    found: dict[str, Any] = {"seconds": train(net, config, split, seed)}
    found["parameters"] = sum(value.numel() for value in net.parameters())
    prompts = torch.cartesian_prod(torch.arange(len(COLOURS)), torch.arange(len(SHAPES)))
    text = prompts.repeat(config.clips, 1)
    (own,) = split.score([TEST_SEED + seed])
    truth = draw_clips(len(text), config, own, config.times)
    found["true clips"] = count_objects(truth.pixels, truth.text)._asdict()
    shown = {}
    for name, way in drawings(config).items():
        with single_thread():
            start = time.process_time()
            pixels = sample(net, text, config, own, way.row, way.times, way.cache)
            seconds = time.process_time() - start
        found[name] = {"drawing": seconds, **count_objects(pixels, text)._asdict()}
        shown[way.title] = pixels[:: max(1, len(prompts) // SHOWN)][:SHOWN]
    if seed == 0:
        picture(shown, output / "larger-clips.jpg")
    return found


def picture(shown: Mapping[str, Tensor], path: Path, scale: int = 6) -> None:
    """Draw the first and last frames of some clips, a line for each way to generate them."""
    from PIL import ImageDraw

    tiles: list[tuple[str, list[Image.Image]]] = []
    for title, clips in shown.items():
        frames = torch.stack([clips[:, :, 0], clips[:, :, -1]], 1).flatten(0, 1).clamp(-1, 1)
        cells = (127.5 * (frames + 1)).byte().permute(0, 2, 3, 1).numpy()
        size = cells.shape[2] * scale, cells.shape[1] * scale
        images = [Image.fromarray(cell).resize(size, Image.Resampling.NEAREST) for cell in cells]
        tiles.append((title, images))
    widest = max(sum(image.width + 4 for image in images) for _, images in tiles)
    heights = [images[0].height + 20 for _, images in tiles]
    sheet = Image.new("RGB", (widest, sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for (title, images), height in zip(tiles, heights, strict=True):
        draw.text((2, top + 3), title, fill="black")
        for i, image in enumerate(images):
            sheet.paste(image, (i * (image.width + 4), top + 16))
        top += height
    with atomic_file(path) as temporary:
        sheet.save(temporary, "JPEG", quality=80)


def study(
    output: OutputAt = "runs/study-larger-clips",
    config: ClipConfig = DEFAULTS,
    quick: Quick = False,
) -> Iterator[str]:
    """Train and draw what is not finished yet, write report.md and a picture, and yield the report's
    lines."""
    config = config.quick() if quick else config
    output = Path(output)
    settings = {key: value for key, value in asdict(config).items() if key != "seeds"}
    found = measure_rows(
        output, settings, {"generator": partial(measure, config, output)}, config.seeds
    )
    lines, values = [*_report(found["generator"], config)], {"values": raw_rows(found)}
    yield from reported(output, lines, values, output / "larger-clips.jpg")


def _report(runs: Sequence[Mapping[str, Any]], config: ClipConfig) -> Iterator[str]:
    clips = config.clips * len(COLOURS) * len(SHAPES)
    yield (
        f"{config.steps} steps of {config.batch_size} clips of {config.frames} x {config.side} x "
        f"{config.side}; {clips} clips of each kind, {config.seeds} seeds\n"
    )
    yield (
        "| drawn by | size | one object, % | one object of the correct colour, % "
        "| of the correct colour and shape, % | objects per frame | CPU seconds |"
    )
    yield "| :-- | --: | --: | --: | --: | --: | --: |"
    for name, way in drawings(config).items():
        side = config.side * way.times
        yield f"| {way.title} | {side} x {side} | {_cells(runs, name)} | {_seconds(runs, name):.1f} |"
    side = config.side * config.times
    yield f"| true clips | {side} x {side} | {_cells(runs, 'true clips')} | |"
    yield "\n| drawn by | minus | objects per frame |"
    yield "| :-- | :-- | --: |"
    titles = {name: way.title for name, way in drawings(config).items()}
    for name, control in PAIRS:
        gaps = [np.mean(run[name]["objects"]) - np.mean(run[control]["objects"]) for run in runs]
        gap = t_interval([float(value) for value in gaps])
        cell = f"{gap.mean:+.2f} [{gap.lo:+.2f}, {gap.hi:+.2f}]"
        yield f"| {titles[name]} | {titles[control]} | {cell} |"
    trained = sum(run["seconds"] for run in runs) / len(runs)
    yield f"\n{runs[0]['parameters']:,} parameters, {trained:.1f} CPU seconds of training"


def _seconds(runs: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(sum(run[name]["drawing"] for run in runs) / len(runs))


def _cells(runs: Sequence[Mapping[str, Any]], name: str) -> str:
    """Means over the seeds, with 95 % t intervals."""
    cells = []
    for key, factor, digits in (
        ("one", 100, 1),
        ("coloured", 100, 1),
        ("asked", 100, 1),
        ("objects", 1, 2),
    ):
        means = [factor * float(np.mean(run[name][key])) for run in runs]
        mean, low, high, _ = t_interval(means)
        low, high = max(low, 0.0), high if key == "objects" else min(high, 100.0)
        same = max(means) == min(means)
        cells.append(
            f"{mean:.{digits}f}" + ("" if same else f" [{low:.{digits}f}, {high:.{digits}f}]")
        )
    return " | ".join(cells)
