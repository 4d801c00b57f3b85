"""``xattn board``: make, join, check, audit, on a network whose classes are known by colour; what is refused."""

import csv
import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from xattn.backbone import load_backbone
from xattn.cli import main
from xattn.eval.board.check import audit_board, check_board, recompute
from xattn.eval.board.folder import Board, network_name
from xattn.eval.board.make import NewRow, join_board, make_board, mark_state
from xattn.eval.board.maps import maps_explainer
from xattn.eval.board.page import write_page
from xattn.eval.board.ranks import board_ranks
from xattn.eval.leaderboard import Comparison
from xattn.runtime.files import file_sha256

COUNT, SIDE = 8, 32


class Colours(torch.nn.Module):
    """Three classes by the mean colour of the photo, through a small convolution."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 3, 4, 4, bias=False)
        self.more = torch.nn.Sequential(*(torch.nn.Conv2d(3, 3, 1, bias=False) for _ in range(4)))
        self.pool = torch.nn.AdaptiveAvgPool2d(1)
        self.flat = torch.nn.Flatten()
        self.fc = torch.nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            self.stem.weight.copy_(torch.eye(3)[:, :, None, None].expand(3, 3, 4, 4) / 16)
            for layer in self.more:
                layer.weight.copy_(torch.eye(3)[:, :, None, None])
            self.fc.weight.copy_(30 * (torch.eye(3) - 1 / 3))

    def forward(self, x):
        return self.fc(self.flat(self.pool(torch.relu(self.more(self.stem(x))))))


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(
        Colours().eval(), input_size=SIDE, mean=(0.0,) * 3, std=(1.0,) * 3, crop=1.0,
        class_names=["red", "green", "blue"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(COUNT):
        pixels = np.random.default_rng(i).integers(0, 90, (4, 4, 3), dtype=np.uint8)
        pixels[i % 3 : i % 3 + 2, 1:3, i % 3] = 255
        Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.NEAREST).save(
            folder / f"{i}.png"
        )
    return folder


def job(backbone, explainers=("gradcam", "saliency"), **more):
    return Comparison(backbone=backbone, explainers=explainers, max_forward_batch=8, maps=4, **more)


@pytest.fixture(scope="module")
def made(backbone, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("boards") / "board"
    make_board(folder, job(backbone), str(photos), card_photos=0, progress=False)
    return folder


@pytest.fixture
def board(made, tmp_path):
    """A copy that a test may change, as others get it: without the state."""
    shutil.copytree(made, tmp_path / "copy", ignore=shutil.ignore_patterns("state"))
    return tmp_path / "copy"


def lines(folder, row):
    with (folder / "rows" / row / "values.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def rehash(folder):
    """What somebody does who changes a board and its hashes."""
    opened = Board.open(folder)
    for row in opened.row_names:
        path = folder / "rows" / row / "row.json"
        facts = json.loads(path.read_text())
        facts["sha256"] = {name: file_sha256(path.with_name(name)) for name in facts["sha256"]}
        path.write_text(json.dumps(facts))
    opened.save()


def test_a_board_passes_its_check_and_every_value_is_recomputed(made):
    said = check_board(Board.open(made), cells=10_000)
    count = int(said[-1].split()[0])
    assert count > 100 and said[-1].startswith(f"{count} of {count} values recomputed")


def test_rows_that_explain_nothing_are_class_blind_and_never_verified(made):
    ranks = board_ranks(Board.open(made))
    assert {"gradcam", "saliency", "centre", "edges", "ones", "randomized_gradcam"} <= set(ranks)
    for row in ("centre", "edges", "colour", "all_but_one", "random"):
        assert ranks[row].class_blind and not ranks[row].verified
        values = [float(x["value"]) for x in lines(made, row) if x["column"] == "network-contrast"]
        assert values == [0.0] * COUNT
    assert not ranks["gradcam"].class_blind and ranks["gradcam"].rank is None, "too few photos"
    ones = {x["column"]: float(x["value"]) for x in lines(made, "ones") if x["value"]}
    assert ones["squares"] == ones["class-contrast"] == 0, "an invalid map scores chance"


def test_a_row_that_joins_a_copy_has_the_values_of_one_made_at_once(
    backbone, photos, board, tmp_path
):
    more = ("gradcam", "saliency", "input_x_gradient")
    at_once = tmp_path / "at_once"
    make_board(at_once, job(backbone, more), str(photos), card_photos=0, progress=False)
    join_board(board, job(backbone, more[2:]), str(photos), progress=False)
    for row in more:
        name = f"rows/{row}/values.csv"
        assert (board / name).read_bytes() == (at_once / name).read_bytes()
    assert check_board(Board.open(board))
    before = Board.open(board).facts["files"]["rows/gradcam/values.csv"]
    assert before == file_sha256(at_once / "rows/gradcam/values.csv")


def test_a_killed_make_goes_on_and_measures_nothing_twice(
    made, backbone, photos, tmp_path, monkeypatch
):
    again = tmp_path / "again"
    shutil.copytree(made, again)
    mark_state(again / "state")
    shutil.rmtree(again / "rows")
    shutil.rmtree(again / "tables")
    (again / "board.json").unlink()
    monkeypatch.setattr(backbone, "logits", lambda images: pytest.fail("a pass"))
    monkeypatch.setattr("xattn.eval.board.make.print_plan", lambda *a: None)
    make_board(again, job(backbone), str(photos), card_photos=0, progress=False)
    for name in (
        "rows/gradcam/values.csv",
        "rows/gradcam/maps-Colours.safetensors",
        "tables/Colours.safetensors",
    ):
        assert (again / name).read_bytes() == (made / name).read_bytes()


@pytest.mark.parametrize(
    "name", ["rows/gradcam/values.csv", "rows/saliency/maps-Colours.safetensors",
             "tables/Colours.safetensors", "rows/gradcam/row.json", "board.csv", "index.html"],
)  # fmt: skip
def test_a_changed_byte_of_any_file_is_refused_by_its_name(board, name):
    data = bytearray((board / name).read_bytes())
    data[-2] ^= 1
    (board / name).write_bytes(bytes(data))
    with pytest.raises(ValueError, match=f"board: {name} was changed: its sha256"):
        check_board(Board.open(board))


def test_a_missing_and_an_unknown_row_are_refused(board):
    (board / "rows" / "stranger").mkdir()
    with pytest.raises(ValueError, match=r"rows/stranger is not a row"):
        check_board(Board.open(board))
    (board / "rows" / "gradcam" / "values.csv").unlink()
    with pytest.raises(ValueError, match=r"rows/gradcam/values\.csv is missing"):
        check_board(Board.open(board))


@pytest.mark.parametrize(
    "column", ["squares", "class-contrast", "network-contrast", "single-deletion"]
)
def test_a_value_that_was_changed_with_all_hashes_is_found(board, column):
    path = board / "rows/gradcam/values.csv"
    rows = path.read_text().splitlines()
    place = next(i for i, line in enumerate(rows) if f",{column}," in line)
    *rest, value = rows[place].split(",")
    rows[place] = ",".join([*rest, f"{float(value) + 1e-5:.9g}"])
    path.write_text("\n".join(rows) + "\n")
    rehash(board)
    with pytest.raises(ValueError, match=rf"gradcam, Colours, 0\.png, {column}: values\.csv has"):
        check_board(Board.open(board), cells=10_000)


def test_a_map_that_was_changed_with_all_hashes_is_found(board):
    path = board / "rows/gradcam/maps-Colours.safetensors"
    maps = load_file(path)
    maps["2/own"] = maps["2/own"].flip(2)
    save_file(maps, path)
    rehash(board)
    with pytest.raises(ValueError, match=r"gradcam, Colours, 2\.png"):
        check_board(Board.open(board), cells=10_000)


def test_recomputed_values_are_those_of_the_run(made):
    opened = Board.open(made)
    for column in ("squares", "subsets", "class-contrast", "network-contrast"):
        there = opened.values["gradcam"][column][0, 3]
        assert recompute(opened, "gradcam", "Colours", 3, column) == pytest.approx(there, abs=1e-6)


def test_maps_that_were_made_elsewhere_are_a_row(backbone, photos, board, made, tmp_path):
    maps = load_file(board / "rows/gradcam/maps-Colours.safetensors")
    arrays = {f"{i}.png": maps[f"{i}/own"][0].numpy() for i in range(COUNT)}
    arrays |= {f"{i}.png@class": maps[f"{i}/class"][0].numpy() for i in range(COUNT)}
    np.savez(tmp_path / "theirs.npz", **arrays)
    method = maps_explainer(Board.open(board), backbone, tmp_path / "theirs.npz")
    join_board(board, job(backbone, ()), str(photos), {"theirs": method}, progress=False)
    opened = Board.open(board)
    for column in ("squares", "class-contrast", "ROAD"):
        got, own = (opened.values[row][column] for row in ("theirs", "gradcam"))
        assert np.allclose(got, own, atol=1e-6), column
    assert np.isnan(opened.values["theirs"]["network-contrast"]).all()
    assert not board_ranks(opened)["theirs"].verified
    check_board(opened)
    arrays["1.png"] = np.full((2, 2), np.nan)
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=r"maps_of: 1\.png contains NaN"):
        maps_explainer(opened, backbone, tmp_path / "bad.npz")
    del arrays["1.png"]
    np.savez(tmp_path / "few.npz", **arrays)
    with pytest.raises(ValueError, match=r"has no map of 1\.png"):
        maps_explainer(opened, backbone, tmp_path / "few.npz")


def test_an_audit_finds_maps_that_repeat_the_table(backbone, photos, board):
    opened = Board.open(board)
    table = opened.table("Colours")
    squares = next(v for k, v in table.items() if k.startswith("Squares") and k.endswith(" a"))
    from xattn.eval.board.make import digest
    from xattn.eval.evaluation.stream import ImageStream
    from xattn.eval.metrics.board.masks import Squares
    from xattn.eval.metrics.measure import sample_seed

    fitted = {}
    for block in ImageStream(str(photos), backbone.preprocessing).blocks(8):
        for item in block:
            masks = (
                Squares().removed((SIDE, SIDE), sample_seed(0, item.position)).flatten(1).double()
            )
            # any answers, as a network's that these squares alone would tell
            answers = torch.randn(
                50, generator=torch.Generator().manual_seed(item.position)
            ).double()
            squares[item.position] = answers.float()
            fitted[digest(item.image)] = torch.linalg.lstsq(
                masks, answers[:, None], driver="gelsd"
            ).solution
    path = board / "tables/Colours.safetensors"
    tables = load_file(path)
    tables[next(k for k in tables if k.startswith("Squares") and k.endswith(" a"))] = squares
    save_file(tables, path)

    def fit(images, target):
        return torch.stack([fitted[digest(x)].view(1, SIDE, SIDE).float() for x in images])

    join_board(board, job(backbone, ()), str(photos), {"fit": fit}, progress=False)
    opened = Board.open(board)
    assert opened.values["fit"]["squares"].min() > 0.9
    found = {tuple(line[:3]): line[-1] for line in audit_board(opened, backbone, str(photos), 7)}
    assert found["fit", "Colours", "squares"] == "overfits the masks"
    assert found["random", "Colours", "squares"] == ""
    assert (board / "audit-7.csv").is_file() and "Audit with seed 7" in (
        board / "index.html"
    ).read_text()
    with pytest.raises(ValueError, match="seed: 0 is the board's own"):
        audit_board(opened, backbone, str(photos), 0)


# ---------------------------------------------------------------- what is refused


def test_other_photos_networks_and_settings_are_refused_before_the_work(
    backbone, photos, board, tmp_path
):
    more = tmp_path / "photos"
    shutil.copytree(photos, more)
    shutil.copy(more / "1.png", more / "2.png")
    with pytest.raises(
        ValueError, match=rf"photos: 2\.png has sha256 {file_sha256(more / '1.png')}"
    ):
        join_board(board, job(backbone), str(more))
    (more / "2.png").unlink()
    with pytest.raises(ValueError, match=r"photos: 2\.png is missing"):
        join_board(board, job(backbone), str(more))
    with pytest.raises(ValueError, match="row: gradcam is already a row of"):
        join_board(board, job(backbone, ("gradcam",)), str(photos))
    other = load_backbone(
        Colours().eval(), input_size=SIDE, mean=(0.1,) * 3, std=(1.0,) * 3, crop=1.0,
        class_names=["red", "green", "blue"],
    )  # fmt: skip
    with pytest.raises(ValueError, match="sha256: got"):
        join_board(board, job(other, ("input_x_gradient",)), str(photos))
    with pytest.raises(ValueError, match="seed: got 3, but"):
        make_board(board, job(backbone, seed=3), str(photos), card_photos=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 9}, "has schema 9, but this version reads 1"),
        ({"format": "zip"}, "is damaged or not a board"),
        ({"rows": ["../../etc"]}, "row: got '../../etc'"),
        ({"files": {"../secret": "0"}}, "'../secret' is not a file of a board"),
        ({"files": {"rows/a/b/c": "0"}}, "is not a file of a board"),
        ({"audits": ["/../../secret"]}, "is damaged"),
        ({"whole_maps": "x"}, "is damaged"),
        ({"columns": {}}, "is damaged"),
        ({"photos": {}}, "is damaged"),
        (
            {
                "networks": [
                    {"name": "n", "sha256": "", "task": "", "size": "x", "grid": None, "classes": 3}
                ]
            },
            "is damaged",
        ),
        (
            {
                "networks": [
                    {
                        "name": "n",
                        "sha256": "",
                        "task": "",
                        "size": [10**6] * 2,
                        "grid": None,
                        "classes": 3,
                    }
                ]
            },
            "is damaged",
        ),
    ],
)
def test_a_hostile_or_newer_board_is_one_line(board, change, message):
    facts = json.loads((board / "board.json").read_text())
    (board / "board.json").write_text(json.dumps(facts | change))
    with pytest.raises(ValueError, match=message):
        Board.open(board)


def test_a_link_out_of_the_folder_is_refused(board, tmp_path):
    path = board / "rows" / "gradcam"
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is outside"):
        check_board(Board.open(board))


def test_the_command_checks_shows_and_refuses(made, photos, tmp_path, capsys):
    assert main(["board", "check", str(made)]) == 0
    assert "nothing was changed" in capsys.readouterr().out
    assert main(["board", "show", str(made)]) == 0
    assert "| gradcam | code |" in capsys.readouterr().out
    for words, message in (
        (["check", str(tmp_path)], f"folder: {tmp_path} is not a board"),
        (["check", str(made), str(made)], "images: "),
        (["join", str(made), str(photos)], "explainers: got none; give the new methods"),
        (["join", str(made), str(photos), "--maps-of", "x.npz"], "row: got none"),
        (["mend", str(made)], "action: got 'mend'"),
        (["check", str(made), "--row", "x"], "row: "),
    ):
        assert main(["board", *words]) == 2
        assert message in capsys.readouterr().err


def test_two_commands_at_once_are_refused(made, backbone, photos, monkeypatch):
    from xattn.runtime.files import folder_lock

    with folder_lock(made / "state") as alone:
        assert alone
        with pytest.raises(ValueError, match="another command is working"):
            join_board(made, job(backbone, ("input_x_gradient",)), str(photos))


def test_the_page_is_one_file_and_names_are_text(made):
    page = (made / "index.html").read_text(encoding="utf-8")
    assert page.count("<img ") == page.count('<img alt="Map by ') > 0
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page
    assert "gradcam" in page and hashlib.sha256(page.encode()).hexdigest() == file_sha256(
        made / "index.html"
    )


# ---------------------------------------------------------------- what somebody forges with all hashes


def edit(folder, row, change, **facts):
    """``values.csv`` with ``change`` of each line, None to leave it out, and ``facts`` of the row."""
    rows = [change(line) for line in lines(folder, row)]
    with (folder / "rows" / row / "values.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["row", "network", "photo", "class", "column", "value"])
        writer.writeheader()
        writer.writerows(line for line in rows if line is not None)
    path = folder / "rows" / row / "row.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    rehash(folder)
    write_page(Board.open(folder))
    rehash(folder)


def test_a_row_without_its_maps_is_refused(board):
    (board / "rows/random/maps-Colours.safetensors").unlink()
    path = board / "rows/random/row.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sha256": {}}))
    edit(board, "random", lambda line: line | {"value": "1"})
    with pytest.raises(ValueError, match=r"rows/random/maps-Colours\.safetensors is missing"):
        check_board(Board.open(board))


def test_a_row_that_abstains_is_refused(board):
    at = {"photo": "3.png", "column": "squares"}
    edit(board, "gradcam", lambda x: None if at.items() <= x.items() else x)
    with pytest.raises(ValueError, match=r"gradcam, Colours, 3\.png, squares: .* has no value"):
        check_board(Board.open(board))
    edit(board, "gradcam", lambda x: x if x["column"] != "squares" else None)
    with pytest.raises(ValueError, match=r"gradcam, Colours, 0\.png, squares: .* has no value"):
        check_board(Board.open(board))


@pytest.mark.parametrize("column", ["squares", "ROAD"])
def test_a_blank_value_is_refused(board, column):
    at = {"photo": "3.png", "column": column}
    edit(board, "gradcam", lambda x: x | {"value": ""} if at.items() <= x.items() else x)
    with pytest.raises(ValueError, match=rf"gradcam, Colours, 3\.png, {column}: .* has no value"):
        check_board(Board.open(board))


def test_what_is_derived_is_made_again(board):
    def refused(message, **change):
        facts = json.loads((board / "board.json").read_text())
        (board / "board.json").write_text(json.dumps(facts | change))
        with pytest.raises(ValueError, match=message):
            check_board(Board.open(board), 1)
        (board / "board.json").write_text(json.dumps(facts))

    columns = Board.open(board).columns
    refused(
        "the directions or chance levels",
        columns=columns | {"squares": {"higher": False, "chance": 0}},
    )
    refused(
        "the directions or chance levels",
        columns=columns | {"gridpg": {"higher": True, "chance": -1}},
    )
    refused("admitted is ROAD", admitted=["ROAD"])
    files = Board.open(board).facts["files"]
    refused("no hash of board.csv", files={k: v for k, v in files.items() if k != "board.csv"})
    for name in ("board.csv", "index.html"):
        path, text = board / name, (board / name).read_text()
        path.write_text(text.replace("gradcam", "best"))
        rehash(board)
        refused(f"{name} differs from the file")
        path.write_text(text)
        rehash(board)
    assert check_board(Board.open(board), 1)
    edit(board, "random", dict, sanity=False)
    with pytest.raises(ValueError, match="sanity"):
        check_board(Board.open(board))


def test_maps_that_contradict_how_many_are_whole_are_refused_and_others_are_counted(board):
    path = board / "rows/gradcam/maps-Colours.safetensors"
    maps = {
        key: torch.nn.functional.interpolate(m[None].float(), (56, 56))[0]
        for key, m in load_file(path).items()
    }
    facts = json.loads((board / "board.json").read_text()) | {"whole_maps": 0}
    (board / "board.json").write_text(json.dumps(facts))
    save_file(maps, path)
    edit(board, "gradcam", dict)
    with pytest.raises(
        ValueError, match="size 56 x 56 or the precision of map 0/.* does not fit whole_maps 0"
    ):
        check_board(Board.open(board), 10_000)
    scales = {f"{key}/scale": torch.ones(1, dtype=torch.float16) for key in maps}
    save_file({**{k: m.half() for k, m in maps.items()}, **scales}, path)
    edit(board, "gradcam", dict)
    said = check_board(Board.open(board), 10_000)
    assert f"and {5 * COUNT} values of maps that are stored as area means" in said[-2]


def test_texts_of_a_board_are_escaped_and_links_are_not_read(board, tmp_path):
    edit(board, "gradcam", dict)
    path = board / "rows/gradcam/row.json"
    own = json.loads(path.read_text())
    path.write_text(json.dumps(own | {"kind": "<script>"}))
    with pytest.raises(ValueError, match="kind '<script>'"):
        board_ranks(Board.open(board))
    path.write_text(json.dumps(own | {"trained_on": 5}))
    with pytest.raises(ValueError, match=r"row\.json is damaged"):
        board_ranks(Board.open(board))
    path.write_text(json.dumps(own | {"title": "<script>"}))
    write_page(Board.open(board))
    assert "<script" not in (board / "index.html").read_text()
    facts = json.loads((board / "board.json").read_text())
    more = facts["columns"] | {"<script>": {"higher": True, "chance": 0}}
    (board / "board.json").write_text(json.dumps(facts | {"columns": more}))
    with pytest.raises(ValueError, match="column: got '<script>'"):
        Board.open(board)
    (tmp_path / "secret.csv").write_text("secret")
    for name in ("audit-7.csv", "report-card.csv"):
        (board / name).unlink(missing_ok=True)
        (board / name).symlink_to(tmp_path / "secret.csv")
        (board / "board.json").write_text(json.dumps(facts | {"audits": [7]}))
        with pytest.raises(ValueError, match="is outside"):
            write_page(Board.open(board))
        (board / name).unlink()


def test_tables_of_classes_that_there_are_not_are_refused(board):
    path = board / "tables/Colours.safetensors"
    tables = load_file(path)
    tables["classes"] += 10**11
    save_file(tables, path)
    rehash(board)
    with pytest.raises(ValueError, match="classes that do not exist"):
        check_board(Board.open(board))


# ---------------------------------------------------------------- joining


def test_a_state_that_came_with_a_board_is_refused(made, backbone, photos, tmp_path):
    shutil.copytree(made, tmp_path / "board")
    with pytest.raises(ValueError, match="state was copied from elsewhere; delete it"):
        join_board(tmp_path / "board", job(backbone, ("input_x_gradient",)), str(photos))
    shutil.rmtree(tmp_path / "board/state")
    (tmp_path / "board/state").symlink_to(made / "state")
    with pytest.raises(ValueError, match="state is a link"):
        join_board(tmp_path / "board", job(backbone, ("input_x_gradient",)), str(photos))


def test_a_network_that_the_board_lacks_and_a_sanity_name_are_refused(backbone, photos, board):
    other = load_backbone(
        Other().eval(), input_size=SIDE, mean=(0.0,) * 3, std=(1.0,) * 3, crop=1.0,
        class_names=["red", "green", "blue"],
    )  # fmt: skip
    with pytest.raises(ValueError, match="backbone: Other is not a network of"):
        join_board(board, job(other, ("input_x_gradient",)), str(photos))
    for row in ("randomized_mine", "edges"):
        method = {row: lambda images, target: images.mean(1, keepdim=True)}
        with pytest.raises(ValueError, match=f"row: {row} is the name of a sanity row"):
            join_board(board, job(backbone, ()), str(photos), method)


def test_names_of_networks_can_be_files():
    names = [f"{'swinv2_large_window12to24' * 2}.{end}+" for end in ("ms_in22k", "ms_in1k")]
    cut = [network_name(name) for name in names]
    assert len(set(cut)) == 2 and network_name("vit.a-") == "vit.a"
    for name in cut:
        assert Board(Path("x"), {}).path(f"rows/a/maps-{name}.safetensors").name


def test_a_join_that_was_killed_before_the_page_goes_on(backbone, photos, board, monkeypatch):
    def killed(board):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("xattn.eval.board.make._finish", killed)
        with pytest.raises(KeyboardInterrupt):
            join_board(board, job(backbone, ("input_x_gradient",)), str(photos), progress=False)
    join_board(board, job(backbone, ("input_x_gradient",)), str(photos), progress=False)
    assert "input_x_gradient" in (board / "board.csv").read_text()
    assert check_board(Board.open(board), 10_000), "pixel maps, too"


def test_a_row_that_another_join_adds_is_kept(backbone, photos, board):
    before = Board.open(board)
    join_board(board, job(backbone, ("input_x_gradient",)), str(photos), progress=False)
    audit_board(before, backbone, str(photos), 7)
    assert "input_x_gradient" in Board.open(board).row_names


def test_maps_and_code_that_are_corrected_are_measured_anew(
    backbone, photos, board, tmp_path, monkeypatch
):
    rng = np.random.default_rng(0)
    for name, values in (("bad", np.ones((8, 8))), ("good", rng.random((8, 8)))):
        np.savez(tmp_path / f"{name}.npz", **{f"{i}.png": values for i in range(COUNT)})

    def join(name):
        method = maps_explainer(Board.open(board), backbone, tmp_path / f"{name}.npz")
        about = NewRow(kind="maps")
        join_board(
            board, job(backbone, ()), str(photos), {"theirs": method}, about=about, progress=False
        )

    with pytest.raises(ValueError, match="row: 8 of .* maps of theirs are invalid"):
        join("bad")
    join("good")

    def killed(board):
        raise KeyboardInterrupt

    def add(sign, sha256):
        mine = {"mine": lambda images, target: sign * images.mean(1, keepdim=True)}
        about = NewRow(sources={"mine.py": sha256})
        join_board(board, job(backbone, ()), str(photos), mine, about=about, progress=False)

    with monkeypatch.context() as patch:
        patch.setattr("xattn.eval.board.make._finish", killed)
        with pytest.raises(KeyboardInterrupt):
            add(1.0, "a")
    add(-1.0, "b")
    assert (Board.open(board).values["mine"]["squares"] < 0).all(), "of one code alone"


def test_unclear_files_of_maps_are_one_line(backbone, board, tmp_path):
    path, good = tmp_path / "maps.npz", {f"{i}.png": np.eye(8) for i in range(COUNT)}

    def refused(message):
        with pytest.raises(ValueError, match=message):
            maps_explainer(Board.open(board), backbone, path)

    path.write_bytes(b"")
    refused("maps_of: .* is not a .npz")
    np.savez(path, **good)
    data = bytearray(path.read_bytes())
    data[200] ^= 255
    path.write_bytes(data)
    refused("maps_of: .* is not a .npz")
    np.savez(path, **good | {"0.png": np.array([{}], dtype=object)})
    refused("maps_of: .* is not a .npz")
    np.savez(path, **good | {"0.png": np.eye(8) * 1e300})
    refused(r"maps_of: 0\.png contains NaN, infinite values or values over 3\.4e38")
    with zipfile.ZipFile(path, "w") as packed, packed.open("0.png.npy", "w") as file:
        header = {"descr": "<f8", "fortran_order": False, "shape": (10**6, 10**6)}
        np.lib.format.write_array_header_1_0(file, header)
    refused("maps_of: .*more than 2 GB")


# ---------------------------------------------------------------- report cards, several networks


class Other(Colours):
    """The same with the classes of two colours less apart."""

    def __init__(self):
        super().__init__()
        with torch.no_grad():
            self.fc.weight.mul_(0.5)


def card(network, **passed):
    """Lines of a report card by column: whether it passes both ladders, or (cells, photo)."""
    return [
        [
            network,
            key.replace("_", "-"),
            f"ladder {ladder}",
            2.0,
            float("nan"),
            float("nan"),
            int(ok),
        ]
        for key, both in passed.items()
        for ladder, ok in zip(("cells", "photo"), both, strict=True)
    ]


def test_a_column_ranks_that_passes_both_ladders_on_every_network(
    backbone, photos, made, tmp_path, monkeypatch
):
    def cards(board, job, network, *rest):
        first = network["name"] == "Colours"
        return card(
            network["name"], squares=(1, 1), thinned=(1, 1) if first else (0, 1),
            ROAD=(1, 0) if first else (1, 1), gridpg=(1, 1), single_deletion=(1, 1),
        )  # fmt: skip

    monkeypatch.setattr("xattn.eval.board.make._card", cards)
    folder = tmp_path / "board"
    shutil.copytree(
        made, folder, ignore=shutil.ignore_patterns("*.json", "*.csv", "rows", "tables")
    )
    mark_state(folder / "state")
    make_board(folder, job(backbone), str(photos), progress=False)
    assert Board.open(folder).admitted == ["squares", "gridpg", "thinned"]
    second = load_backbone(
        Other().eval(), input_size=SIDE, mean=(0.0,) * 3, std=(1.0,) * 3, crop=1.0,
        class_names=["red", "green", "blue"],
    )  # fmt: skip
    make_board(folder, job(second, ("gradcam",)), str(photos), progress=False)
    opened = Board.open(folder)
    assert opened.admitted == ["squares", "gridpg"]
    assert {line["network"] for line in opened.card()} == {"Colours", "Other"}
    assert opened.values["gradcam"]["squares"].shape == (2, COUNT)
    assert np.isfinite(opened.values["gradcam"]["squares"]).all()
    assert np.isnan(opened.values["saliency"]["squares"][1]).all()
    check_board(opened, cells=50)
    assert "Colours: passed; Other: failed" in (folder / "index.html").read_text(encoding="utf-8")


def test_verified_rows_rank_and_what_is_close_to_training_does_not_count(made, tmp_path):
    folder = tmp_path / "ranked"
    shutil.copytree(made, folder)
    opened = Board.open(folder)
    rng, count = np.random.default_rng(0), 60
    opened.facts["photos"] = [{"id": f"{i}", "sha256": ""} for i in range(count)]
    opened.facts["admitted"] = ["squares", "photo-gain", "class-contrast", "ROAD"]
    opened.facts["rows"] = ["gradcam", "saliency", "edges"]

    def values(level, blind=False):
        table = {k: level + 0.1 * rng.normal(size=(1, count)) for k in opened.columns}
        return {
            k: np.zeros((1, count)) if blind and "contrast" in k else v for k, v in table.items()
        }

    tables = {"gradcam": values(0.5), "saliency": values(0.7), "edges": values(0.9, blind=True)}
    opened.__dict__["values"] = tables
    ranks = board_ranks(opened)
    assert (ranks["saliency"].rank, ranks["saliency"].places) == (1, (1, 1))
    assert (ranks["gradcam"].rank, ranks["gradcam"].places) == (2, (2, 2))
    assert ranks["edges"].class_blind and ranks["edges"].rank is None
    assert ranks["saliency"].columns == {k: (1, 1) for k in opened.admitted}
    more = [f"row{i}" for i in range(5)]
    for row in more:
        shutil.copytree(folder / "rows/gradcam", folder / "rows" / row)
        tables[row] = values(0.5)
    opened.facts["rows"] += more
    tables["gradcam"]["ROAD"] += 9.0
    ranks = board_ranks(opened)
    assert ranks["gradcam"].one_family == "map-shaped" and ranks["saliency"].one_family == ""
    assert ranks["saliency"].rank == 1, "one family does not decide"
    assert ranks["saliency"].places == (1, 1) and ranks["row1"].places == (2, 7)
    for key in ("squares", "photo-gain", "class-contrast"):
        tables["gradcam"][key] += 0.5
    assert board_ranks(opened)["gradcam"].rank == 1
    path = folder / "rows/gradcam/row.json"
    trained = {"trained_on": ["squares", "photo-gain", "class-contrast"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | trained))
    assert set(trained["trained_on"]) <= set(board_ranks(opened)["gradcam"].columns)


def ranked(made, folder, networks=1, count=60):
    """An opened board with made-up values, and a function for those of a row."""
    shutil.copytree(made, folder)
    opened, rng = Board.open(folder), np.random.default_rng(0)
    opened.facts["photos"] = [{"id": f"{i}", "sha256": ""} for i in range(count)]
    opened.facts["networks"] = [opened.networks[0] | {"name": f"n{i}"} for i in range(networks)]
    opened.facts["admitted"] = ["squares", "photo-gain", "ROAD"]
    opened.facts["rows"] = ["gradcam", "saliency"]

    def values(level):
        shape = networks, count
        return {k: level + 0.1 * rng.normal(size=shape) for k in opened.columns}

    opened.__dict__["values"] = {"gradcam": values(0.5), "saliency": values(0.7)}
    return opened


@pytest.mark.parametrize("key", ["squares", "photo-gain"])
def test_half_of_the_values_make_no_rank(made, tmp_path, key):
    opened = ranked(made, tmp_path / "b", count=100)
    opened.values["saliency"][key][:, :45] = np.nan
    assert board_ranks(opened)["saliency"].rank == 1
    opened.values["saliency"][key][:, :55] = np.nan
    assert board_ranks(opened)["saliency"].rank is None


def test_few_photos_and_a_network_that_is_lacking_make_no_rank(made, tmp_path):
    opened = ranked(made, tmp_path / "few", count=39)
    opened.facts["admitted"] = ["photo-gain", "class-contrast"]
    ranks = board_ranks(opened)
    assert ranks["saliency"].verified and ranks["saliency"].rank is None
    opened = ranked(made, tmp_path / "two", networks=2)
    assert board_ranks(opened)["saliency"].rank == 1
    for table in opened.values["saliency"].values():
        table[1] = np.nan
    ranks = board_ranks(opened)
    assert ranks["saliency"].rank is None and ranks["saliency"].lacks == "n1"
    assert ranks["gradcam"].lacks == ""


def test_a_gate_that_no_row_can_pass_is_left_out(made, tmp_path):
    opened = ranked(made, tmp_path / "b")
    for row in opened.values:
        opened.values[row]["gridpg"][:] = np.nan
    assert board_ranks(opened)["saliency"].verified
    opened.values["gradcam"]["gridpg"][:] = 0.9
    assert board_ranks(opened)["saliency"].verified is None, "too few mosaics"
    assert "No row has a value of gridpg" in (made / "index.html").read_text()
