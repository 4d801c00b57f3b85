"""``xattn caption``: explain every word of a vision-language model's answers about photos or clips."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from xattn.cli.checks import check_device, check_file, rename_argument
from xattn.cli.model import device_name
from xattn.cli.outputs import pack_output
from xattn.cli.shared import PhotoArgs, registered_names
from xattn.photos.image_names import is_video
from xattn.runtime.option_checks import Count, Whole
from xattn.runtime.stores import is_remote

SHOWN = 5  # number of answers that are printed


@dataclass(frozen=True, kw_only=True)
class Caption(PhotoArgs):
    """Let a vision-language model describe photos, and explain each word by a map and by how much less
    probable the word becomes without the image."""

    vlm: str
    """A transformers model: a folder written by save_pretrained, or transformers:OWNER/NAME from the
    hub."""
    prompt: str = "Describe the image."
    """The prompt for each photo; <image> marks where the photo goes, which by default is before the
    text."""
    answer: str | None = None
    """A text to explain instead of a generated one, or a .csv file with the columns photo,text or a .json
    file with {photo: text}; where a cell is empty or null, a text is generated."""
    explainers: tuple[str, ...] = ("attention",)
    """Methods from xattn list token-explainers."""
    options: tuple[str, ...] = ()
    """Options of explainers as explainer.name=value, for example rise.masks=500."""
    words: tuple[str, ...] = ()
    """Words to explain, or "visual" for the words whose log probability falls by at least 0.1 nats without
    the image; by default all."""
    instead: tuple[str, ...] = ()
    """Explain why the model gave this word instead of another, as in cat=dog."""
    score: Literal["log_prob", "logit"] = "log_prob"
    """The quantity that gradients and perturbations explain."""
    max_new_tokens: Count = 64
    """Maximum length of the answer in tokens."""
    views: Literal["all", "base", "tiles"] = "all"
    """For a model that sees a photo both as a whole and in tiles: which tokens the maps cover (all tokens,
    those of the whole photo, or those of the tiles)."""
    frames: Count = 16
    """How many evenly spaced frames of a clip the model is shown."""
    together: bool = False
    """Show all photos in one conversation."""
    device: str = "auto"
    """Device on which the model runs, such as cuda:1; by default a GPU if there is one."""
    limit: Count | None = None
    """Use only this many photos, spread over their folders and drawn with --seed, so that every command
    uses the same ones; of clips, use the first ones."""
    max_pixels: int = 40_000_000
    """Skip photos with more pixels than this."""
    seed: int = 0
    """Seed for perturbations and for --limit."""
    output: Path | None = None
    """Folder or URL for the pack; by default runs/answers, or runs/answers-2 and so on if there are
    results already."""
    overlays: Whole = 0
    """For people without the viewer, draw pictures of the maps over the photos, for at most this many
    photos; drawing one picture per word may take longer than generating the answer."""
    overwrite: bool = False
    """Replace the results in the output folder."""
    batch_size: Count = 8
    """Number of sequences per pass."""

    def check(self) -> None:
        super().check()
        check_device(self.device)
        if self._answers:
            check_file("answer", self._answers, "a text, or a .csv or .json file of texts by photo")
        clips = self._clips
        if clips and len(clips) < len(self.images):
            raise ValueError(f"images: {clips[0]} is a clip; do not mix clips with photos")
        if clips and self.together:
            raise ValueError(f"images: {clips[0]} is a clip; leave out --together")
        if stored := [name for name in clips if is_remote(name, "images")]:
            raise ValueError(
                f"images: {stored[0]} is a clip in a store; copy it to a local folder first"
            )
        for pair in self.instead:
            if not all(pair.partition("=")):
                raise ValueError(f"instead: got {pair!r}; write word=other, as in cat=dog")

    @property
    def _clips(self) -> list[str]:
        return [name for name in self.images if is_video(name)]

    @property
    def _answers(self) -> Path | None:
        """The file of answers."""
        named = self.answer is not None and self.answer.lower().endswith((".csv", ".json"))
        return Path(str(self.answer)) if named else None

    def run(self) -> None:
        from xattn.explainers.base import options_by_name
        from xattn.explaining.naming import named_photos
        from xattn.packs.format import MANIFEST
        from xattn.photos.labels import labels_by_photo
        from xattn.photos.sources import limit_photos
        from xattn.vlm.explain import explain_tokens
        from xattn.vlm.explainers.base import TOKEN_EXPLAINERS, create_token_explainer
        from xattn.vlm.loading import load_vlm

        names = registered_names("explainers", self.explainers, TOKEN_EXPLAINERS)
        options = options_by_name(self.options, names)
        methods = [create_token_explainer(n, self.seed, **options.get(n, {})) for n in names]
        given: Any = [Path(name) for name in self._clips[: self.limit]]
        files = [str(path) for path in given]
        if not given:
            given = photos = limit_photos(self.photos, self.limit, self.seed)[0]
            files = [photos.name(i) for i in range(len(photos))]
        texts: Any = self.answer
        if self._answers:
            with rename_argument("answer"):
                texts = labels_by_photo(files, self._answers)
        if self.together:
            given = [tuple(source for _, source in named_photos(photos))]
            texts = texts[:1] if isinstance(texts, list) else texts
        with pack_output(self.output, "runs/answers", self.overwrite) as output:
            found = explain_tokens(
                given,
                load_vlm(self.vlm, device=device_name(self.device)),
                self.prompt,
                texts,
                methods,
                words=self._words(),
                instead=dict(pair.split("=", 1) for pair in self.instead),
                score=self.score,
                max_new_tokens=self.max_new_tokens,
                seed=self.seed,
                output=output.folder,
                overlays=len(files) <= self.overlays,
                batch_size=self.batch_size,
                progress=True,
                max_pixels=self.max_pixels,
                keep=SHOWN,
                views=self.views,
                frames=self.frames,
            )
        for name, reason in found.skipped:
            print(f"skipped {name}: {reason}", file=sys.stderr)
        for answer in found:
            print(f"{answer.image_id}: {answer.text}\n{answer.table()}")
        if found.total > SHOWN:
            print(f"... and {found.total - SHOWN:,} more")
        if (output.folder / MANIFEST).is_file():
            print(f"pack: {output.place}")

    def _words(self) -> Any:
        return "visual" if self.words == ("visual",) else list(self.words) or None
