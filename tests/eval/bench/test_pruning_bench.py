"""python -m xattn.eval.studies bench-pruning: a row for each batch, with gains, operations and how far logits move."""

from xattn.eval.studies.benches import pruning


def test_a_row_for_each_batch_says_what_is_gained_and_what_changes():
    lines = list(
        pruning.study(
            (1, 2),
            rounds=1,
            model="test_vit",
            options={**pruning.OPTIONS, "first": 1, "last": 1, "keep": 0.25},
        )
    )
    assert "first 1, last 1" in lines[0] and len(lines) == 5
    for batch, line in zip((1, 2), lines[3:], strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert int(cells[0]) == batch and float(cells[4].rstrip("x")) > 1
        assert float(cells[5]) > 0 and 0 <= float(cells[6]) <= 100
