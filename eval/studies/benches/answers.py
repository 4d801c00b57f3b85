"""Measures what a pack with a map of every word costs, compared with the answer alone.

    python -m xattn.eval.studies bench-answers

There are two models with random weights: the small LLaVA of the study ``vlm``, and a Qwen2-VL for
photos of 64 x 64 tokens, whose language model has 4 layers and 4 heads of width 64 that share one key
head. Times are processor times over all threads, unaffected by other programs and the disk.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from xattn.eval.studies.small_training import single_thread
from xattn.eval.studies.vlm_evidence import Run, processor_of, scenes, untrained
from xattn.photos.images import load_image
from xattn.runtime.measuring import Job, median_ratio, processor_clock, times
from xattn.vlm.explain import explain_tokens
from xattn.vlm.loading import load_vlm
from xattn.vlm.model import VLM

PATCH, MERGE = 14, 2  # patch and merge size of Qwen2-VL's vision tower
ASKED = "what is on the table ?"
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
PLACES = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}


def qwen(side: int, seed: int = 0) -> VLM:
    """A Qwen2-VL for photos of ``side`` x ``side`` tokens."""
    import transformers as hf
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = [*SPECIAL.values(), *PLACES.values(), *ASKED.split(), *map(str, range(1000))]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pixels = (side * PATCH * MERGE) ** 2
    size = {"shortest_edge": (4 * PATCH * MERGE) ** 2, "longest_edge": pixels}
    processor = hf.Qwen2VLProcessor(
        hf.Qwen2VLImageProcessor(patch_size=PATCH, merge_size=MERGE, size=size),
        hf.PreTrainedTokenizerFast(tokenizer_object=words, extra_special_tokens=PLACES, **SPECIAL),
        hf.Qwen2VLVideoProcessor(),
    )
    tower = {"depth": 1, "embed_dim": 32, "num_heads": 1, "hidden_size": 256, "mlp_ratio": 2}
    text = {
        "vocab_size": len(vocabulary), "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 1,
        "max_position_embeddings": 2 * side**2 + 100,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]},
    }  # fmt: skip
    torch.manual_seed(seed)
    places: dict[str, Any] = {
        f"{name}_id": vocabulary.index(token) for name, token in PLACES.items()
    }
    config = hf.Qwen2VLConfig(
        vision_config={**tower, "patch_size": PATCH, "spatial_merge_size": MERGE},
        text_config=text,
        **places,
    )
    return load_vlm(hf.Qwen2VLForConditionalGeneration(config).eval(), processor)


@dataclass(frozen=True)
class Case:
    """A question about a photo, with the jobs that are timed."""

    vlm: VLM
    photo: Path
    asked: str
    tokens: int

    def inputs(self) -> dict[str, Any]:
        return self.vlm.inputs([load_image(self.photo)], self.asked)

    def tower(self) -> None:
        self.vlm.entered(self.inputs())

    def alone(self) -> None:
        fixed = {"min_new_tokens": self.tokens, "max_new_tokens": self.tokens}
        self.vlm.model.generate(**self.inputs(), **fixed, do_sample=False)

    def without_image(self) -> Job:
        """The pass that measures what each word loses without the image."""
        inputs = self.inputs()
        said = inputs["input_ids"][0, -1:].expand(self.tokens)
        entered, forced = self.vlm.entered(inputs), self.vlm.forced(inputs, said)
        mean = entered.features.mean(0).expand_as(entered.features)[None]
        return lambda: self.vlm.logits(forced, entered, mean)

    def explained(self, **more: Any) -> None:
        given = {"min_new_tokens": self.tokens}
        explain_tokens(
            self.photo, self.vlm, self.asked, max_new_tokens=self.tokens, generate=given, **more
        )

    def pack(self, overlays: bool = False) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.explained(output=Path(folder, "pack"), overlays=overlays)


def study(side: int = 64, new_tokens: int = 32, rounds: int = 9) -> Iterator[str]:
    """Yield the lines of a table: the seconds of the answer alone, and of each addition."""
    pixels = side * PATCH * MERGE
    noise = np.random.default_rng(0).integers(0, 256, (pixels // 8, pixels // 8, 3), np.uint8)
    shown = Image.fromarray(noise).resize((pixels, pixels), Image.Resampling.BICUBIC)
    small, scene = load_vlm(untrained(Run()).eval(), processor_of()), scenes(Run(), 1, 0)
    models = {
        "LLaVA": (small, Image.fromarray(scene.photos[0].numpy()), scene.question(0)),
        "Qwen2-VL": (qwen(side), shown, ASKED),
    }
    yield f"{new_tokens} tokens, a map each, float32, one thread, processor time\n"
    yield "| prompt | job | seconds | of the answer alone |"
    yield "| :-- | :-- | --: | --: |"
    with tempfile.TemporaryDirectory() as folder, single_thread(), torch.no_grad():
        for name, (vlm, photo, asked) in models.items():
            vlm.model.generation_config.suppress_tokens = vlm.tokenizer.all_special_ids
            photo.save(path := Path(folder, f"{name}.jpg"), quality=90)
            case = Case(vlm, path, asked, new_tokens)
            jobs: dict[str, Job] = {
                "photo read, through the tower": case.tower,
                "the answer alone": case.alone,
                "one pass without the image": case.without_image(),
                "with maps, in memory": case.explained,
                "with maps, in a pack": case.pack,
                "with a picture of each map, too": partial(case.pack, overlays=True),
            }
            took = times(jobs, rounds, clock=processor_clock(), of=name)
            length = case.inputs()["input_ids"].shape[1]
            for job, seconds in took.items():
                ratio = median_ratio(seconds, took["the answer alone"])
                cells = f"{name}, {length:,} tokens", job, f"{statistics.median(seconds):.3f}"
                yield f"| {' | '.join(cells)} | {ratio:.2f}x |"
