"""Two processes over gloo give the one-process evaluation, per image and per metric."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from xattn.eval import metrics, read_json

JOB = """
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState

from xattn import create_head, load_backbone
from xattn.runtime.distributed import processes
from xattn.eval import evaluate, metrics, sanity_rows, write_json
from xattn.explainers import create_explainer

photos, output, expected = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
backbone = load_backbone("test_resnet", weights=None, input_size=64, num_classes=5)
head = create_head("ttame", backbone, fusion="per_class").eval()
count, rank = processes(backbone.device)
assert count == expected == (PartialState().num_processes if expected > 1 else 1)
methods = {"head": create_explainer("head", backbone, head), **sanity_rows(backbone, "gradcam")}
state = output / f"{count}.sqlite"
results = evaluate(
    backbone, methods, photos, max_forward_batch=4, progress=False, state=state
)
write_json(results, output / f"{count}-{rank}.json")

p = torch.tensor([r.p for r in results.images], dtype=torch.float64)[rank::count]
values = {}
for name in ("AverageDrop", "IncreaseInConfidence", "AverageDropInDeletion", "AverageGain"):
    metric = getattr(metrics, name)()
    for key in ("head", "gradcam", "random"):
        if key in results.methods:
            q = torch.from_numpy(results.methods[key].scores["q@50"])[rank::count]
            metric.update(p, q)
    values[name] = metric.compute()
torch.save(values, output / f"{count}-{rank}.pt")

if count > 1:  # a group that was left, and one that no launcher made: every image counts once
    try:
        evaluate(backbone, {"head": methods["head"]}, photos, state=output / "broken.sqlite")
    except ValueError as error:  # of both: nobody waits for the other
        assert "broken.sqlite cannot be used" in str(error)
    else:
        raise AssertionError("a broken state was used")

    def scored():
        again = evaluate(backbone, {"head": methods["head"]}, photos, progress=False)
        return [r.id for r in again.images]

    ids = [r.id for r in results.images]
    torch.distributed.destroy_process_group()
    assert processes(backbone.device) == (1, 0) and scored() == ids
    del os.environ["WORLD_SIZE"]
    group = (output / "group").as_uri()
    torch.distributed.init_process_group("gloo", init_method=group, rank=rank, world_size=2)
    assert processes(backbone.device) == (2, rank) and scored() == ids
    torch.distributed.barrier()
    os._exit(0)  # without the end of torch's threads, which now and then aborts the process
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("two")
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(14):  # four chunks of 4: the last one is short
        pixels = np.random.default_rng(i).integers(0, 256, (40 + i, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{i:02}.png")
    (photos / "05.png").write_bytes(b"no photo")
    (tmp_path / "broken.sqlite").write_bytes(b"no database" * 100)
    (tmp_path / "job.py").write_text(JOB)
    arguments = [str(tmp_path / "job.py"), str(photos), str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*arguments, "1"])
        exec(JOB, {})
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launch, *arguments, "2"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return tmp_path


def test_two_processes_give_the_results_of_one(runs):
    one, *two = (read_json(runs / f"{name}.json") for name in ("1-0", "2-0", "2-1"))
    assert len(one.images) == 13
    for other in two:
        assert [r.id for r in other.images] == [r.id for r in one.images]
        assert [r.target for r in other.images] == [r.target for r in one.images]
        assert other.skipped == one.skipped and len(one.skipped) == 1
        assert other.protocol == one.protocol
        assert np.allclose(
            [r.p for r in other.images], [r.p for r in one.images], rtol=1e-6, atol=0
        )
        for name, method in one.methods.items():
            same = other.methods[name]
            assert np.array_equal(same.valid, method.valid) and same.tied == method.tied
            for key, expected in method.scores.items():
                assert np.allclose(same.scores[key], expected, rtol=1e-6, atol=0, equal_nan=True)
        rows = [[(r.method, r.metric, r.level, r.n) for r in x.rows()] for x in (one, other)]
        assert rows[0] == rows[1]
        means = [[r.mean for r in x.rows()] for x in (one, other)]
        assert np.allclose(*means, rtol=1e-6, atol=0, equal_nan=True)
    # the work was shared, not done twice; a shared batch may be padded once more
    assert two[0].cost["images_scored"] == one.cost["images_scored"]
    assert one.cost["forward_batches"] <= two[0].cost["forward_batches"]


def test_processes_leave_one_file_each_run(runs):
    assert {path.name for path in runs.glob("*.sqlite*")} == {
        "1.sqlite",
        "2.sqlite",
        "broken.sqlite",
    }


def test_metric_states_are_reduced_over_the_processes(runs):
    one, *two = (torch.load(runs / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert set(one) <= set(dir(metrics)) and all(v.isfinite() for v in one.values())
    for other in two:
        for name, value in one.items():
            assert torch.allclose(other[name], value, rtol=1e-6, atol=0)
