"""Train every head of the registry and a converted network, in one process or as one of two that torchrun started.

python two_process_job.py FOLDER      the folder that the test made: weights, photos
"""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path

import torch

import xattn
from xattn.config import DistillConfig, ProbeConfig, TrainConfig
from xattn.heads import (
    AttentiveHead,
    MemeTector,
    create_head,
    head_class,
    head_entry,
    head_options,
    list_heads,
)
from xattn.heads.attentive import Solvable
from xattn.training import fit
from xattn.training.distilling import distill
from xattn.training.features import cache_features
from xattn.training.probe import probe

DTYPES = {"float32": torch.float32, "float64": torch.float64}
BATCH = 4  # images a step, of all processes together
PHOTOS, PROBED = 9, 17  # neither divides evenly
CLASSES = 3
DEPTH = 4  # of test_vit
OPTIONS = {"cait": {"layer_scale": 0.1}}  # at 1e-5 BatchNorm divides by what float32 rounds off
OF_VITS = [name for name in list_heads() if head_entry(name).taps]
HEADS = [name for name in list_heads() if name not in OF_VITS]
CLASSIFIERS = [name for name in HEADS if issubclass(head_class(name), AttentiveHead)]
COUPLED = ["aim", "delf", "gap", "memetector"]  # BatchNorm of tokens or none, dropout


def cases(dtype):
    """(name, head, options, config, data) of every training: ``fit`` has photos, ``probe`` features.

    Float64 tells; in float32 a few heads show that nothing but rounding is added.
    """
    fine = dtype == "float64"
    published = {"epochs": 2, "lr": 0.05, "workers": 0}
    for name in [n for n in HEADS if n not in CLASSIFIERS and (fine or n == "ttame")]:
        fusions = ("classifier", "per_class") if "fusion" in head_options(name) else ("classifier",)
        for fusion in fusions:
            every = fine and name == "ttame" and fusion == "classifier"
            for mode in ("batch", "own", "top") if every else ("batch",):
                config = TrainConfig(**published, class_mode=mode, batch_size=BATCH)
                options = {"fusion": fusion} if len(fusions) > 1 else {}
                yield f"fit-{name}-{fusion}-{mode}", name, options, config, "photos"
        if fine and name == "ttame":
            config = TrainConfig(**published, batch_size=BATCH)
            yield f"fit-{name}-multilabel", name, {}, config, "multilabel"
    if (
        fine
    ):  # not ttame: its bias adds a constant, to which outcomes are blind, so rounding moves it
        config = TrainConfig("outcomes", epochs=6, lr=0.01, workers=0, masks=8, batch_size=BATCH)
        yield "outcomes-evidence", "evidence", {}, config, "photos"
    for name in OF_VITS if fine else []:
        config = TrainConfig(**published, batch_size=BATCH)
        yield f"fit-{name}", name, {}, config, "vit photos"
    for name in COUPLED if fine else []:  # fit takes classifiers, too, and trains their maps
        config = TrainConfig(**{**published, "epochs": 3, "lr": 5e-4}, batch_size=BATCH)
        yield f"fit-{name}", name, {}, config, "even photos"
    probing = {"epochs": 2, "warmup": 1, "lr": 1.0, "batch_size": BATCH}
    for name in CLASSIFIERS if fine else ["abmilp", "cait"]:
        yield f"probe-{name}", name, {}, ProbeConfig(**probing), "features"
    if fine:
        for name in [n for n in COUPLED if head_class(n).learns_scores]:
            config = ProbeConfig(**probing, attention="vat")
            yield f"probe-{name}-vat", name, {}, config, "features"
        for attention in ("none", "random", "iat"):
            anchors = {"reliability": {"anchors": 2}}
            config = ProbeConfig(**probing, attention=attention)
            yield f"probe-anchors-{attention}", "efficient_probe", anchors, config, "features"


def distilled(vit, folder, processes):
    """State of a distilled network."""
    size = BATCH // processes
    config = DistillConfig(batch_size=size, workers=0, epochs=2, finetune="lora", finetune_epochs=1)
    photos, options = sorted(folder.iterdir()), {"agents": 4, "window": [4, 4]}
    kept = photos[:2]
    result = distill(
        vit, "agent", "2-3", options, data=photos, validation=kept, config=config, progress=False
    )
    assert result.steps >= 5 and len(result.skipped) == 1
    return result.backbone.model.state_dict()


def trained(root: Path, processes: int) -> dict[str, dict[str, torch.Tensor]]:
    """State of the head of every case in both dtypes, after at least five steps each."""
    warnings.simplefilter("ignore")
    weights = {kind: root / f"{kind}.safetensors" for kind in ("cnn", "vit")}

    def cnn(dtype, **options):
        backbone = xattn.load_backbone(
            "test_efficientnet", weights["cnn"], input_size=64, **options
        )
        backbone.fingerprint  # noqa: B018  # of the weights before the cast
        return backbone.to(dtype)

    vit = xattn.load_backbone(
        "test_vit", weights["vit"], MemeTector.default_taps(DEPTH), input_size=64
    )
    features = cache_features(
        vit, root / "probed", root / f"features-{processes}", batch_size=6, progress=False
    )
    labels = torch.arange(len(features)) % CLASSES
    states = {}
    for kind, dtype in DTYPES.items():
        backbones = {
            "photos": cnn(dtype),
            "even photos": cnn(dtype),
            "multilabel": cnn(dtype, task="multilabel"),
            "features": vit,
            "vit photos": copy.deepcopy(vit).to(dtype),
        }
        for case, name, options, config, data in cases(kind):
            backbone = backbones[data]
            torch.manual_seed(0)
            options = {**head_entry(name).cases[0], **OPTIONS.get(name, {}), **options}
            if data == "features":
                options["classes"] = CLASSES
            elif name == "memetector":
                options["num_taps"] = 1
            head = create_head(name, backbone, **options).to(dtype)
            config = type(config)(**{**vars(config), "batch_size": BATCH // processes})
            if data == "features":
                split = {"train": range(PROBED), "validation": range(PROBED, len(features))}
                result = probe(head, features, labels, config, **split, progress=False)
            else:
                photos = sorted((root / "photos").iterdir())
                photos = photos[:8] if data == "even photos" else photos
                table = root / f"table-{processes}" if config.objective == "outcomes" else None
                result = fit(head, backbone, photos, config, progress=False, table=table)
            least = 1 if isinstance(head, Solvable) else 5
            assert result.steps >= least, (case, result.steps)
            states[f"{case}-{kind}"] = head.state_dict()
    states["distill-float64"] = distilled(copy.deepcopy(vit).double(), root / "photos", processes)
    return states


if __name__ == "__main__":
    root = Path(sys.argv[1])
    states = trained(root, 2)
    rank = torch.distributed.get_rank()
    torch.save(states, root / f"states-{rank}.pt")
    from xattn.runtime.distributed import leave_group

    leave_group()
