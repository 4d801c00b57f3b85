"""The tag file: what two people do at once, undo against a model, and files that are not what they seem."""

import sqlite3
import threading
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xattn.app.triage import store as module
from xattn.app.triage.store import DEFAULT_KEYS, Mark, StepResult, Store, TagsError, identity

PACK = identity(["a", "b", "c"])
HOSTILE = "'); DROP TABLE tags; -- <script>alert(1)</script> \u202e😀"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pack.tags.sqlite"


@pytest.fixture
def store(path):
    return Store(path, PACK)


def test_looking_makes_no_file(store, path):
    assert store.revision() == ""
    assert store.marks(["a"]) == {}
    assert store.counts() == {} and store.slices() == {} and store.photos(["x"]) == set()
    assert store.keys() == DEFAULT_KEYS
    assert not path.exists()


def test_a_key_tags_all_and_takes_the_tag_from_all_that_have_it(store):
    store.toggle("ann", ["a"], "blurry")
    assert store.toggle("ann", ["a", "b"], "blurry") is True
    assert store.counts() == {"blurry": 2}
    assert store.toggle("ann", ["a", "b"], "blurry") is False
    assert store.counts() == {}


def test_marks_are_what_filters_find(store):
    store.change_tags("ann", ["a", "b"], ["x"])
    store.change_tags("ann", ["b"], ["y", "x"])
    store.set_rating("ann", ["b", "c"], 4)
    store.set_rating("ann", ["c"], 2)
    store.set_note("ann", "b", "a note")
    assert store.marks(["c", "b"]) == {"b": Mark(("x", "y"), "a note", 4), "c": Mark((), "", 2)}
    assert store.photos(["x"]) == {"a", "b"}
    assert store.photos(["x", "y"], rating=4) == {"b"}
    assert store.photos(rating=2) == {"b", "c"}
    assert store.photos(note=True) == {"b"}


def test_undo_is_of_the_own_steps_and_redo_ends_with_a_new_one(store):
    store.change_tags("ann", ["a", "b"], ["x"])
    store.change_tags("bob", ["c"], ["x"])
    store.set_note("ann", "a", "hm")
    assert store.undo("ann") == StepResult(("a",), 0)
    assert store.undo("ann") == StepResult(("a", "b"), 0)
    assert store.undo("ann") is None
    assert store.photos(["x"]) == {"c"}
    assert store.redo("ann") == StepResult(("a", "b"), 0)
    store.set_rating("ann", ["a"], 1)
    assert store.redo("ann") is None
    assert store.marks(["a"]) == {"a": Mark(("x",), "", 1)}
    assert store.undo("bob") == StepResult(("c",), 0)


def test_undo_leaves_what_somebody_else_has_changed_since(store):
    store.set_note("ann", "a", "first")
    store.set_rating("ann", ["a", "b"], 3)
    store.set_rating("bob", ["a"], 5)
    assert store.undo("ann") == StepResult(("b",), 1)
    assert store.marks(["a", "b"]) == {"a": Mark((), "first", 5)}


def test_of_two_notes_written_at_once_both_are_kept(store):
    assert store.set_note("ann", "a", "from ann", was="")
    assert not store.set_note("bob", "a", "from bob", was="")
    assert store.marks(["a"])["a"].note == "from ann\n\nfrom bob"
    assert store.set_note("bob", "a", "", was="from ann\n\nfrom bob")
    assert store.marks(["a"]) == {}


def test_two_people_tagging_at_once_lose_nothing(path):
    def work(person, failed):
        own = Store(path, PACK)
        try:
            for n in range(20):
                own.change_tags(person, [f"{person}-{n}", "a"], [f"{person}-{n}"])
        except Exception as error:
            failed.append(error)

    failed = []
    people = [threading.Thread(target=work, args=(name, failed)) for name in ("ann", "bob", "eve")]
    for person in people:
        person.start()
    for person in people:
        person.join()
    assert not failed
    found = Store(path, PACK)
    assert len(found.counts()) == 60
    assert len(found.marks(["a"])["a"].tags) == 60
    assert found.revision().endswith("-60")


def test_a_connection_in_the_middle_of_a_change_hides_it_until_it_ends(store, path, monkeypatch):
    store.change_tags("ann", ["a"], ["x"])
    monkeypatch.setattr(module, "PATIENCE", 0.01)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("INSERT INTO tags VALUES ('b', 'x')")
        assert store.photos(["x"]) == {"a"}
        with pytest.raises(
            TagsError, match=r"^Somebody else is writing pack\.tags\.sqlite; try again"
        ):
            store.toggle("ann", ["c"], "x")
        other.execute("COMMIT")
    assert store.photos(["x"]) == {"a", "b"}


def test_what_another_connection_wrote_is_seen_at_the_next_question(store, path):
    other = Store(path, PACK)
    before = store.revision()
    other.toggle("bob", ["b"], "x")
    assert store.revision() != before
    assert store.marks(["b"]) == {"b": Mark(("x",))}


def test_a_file_of_another_pack_is_refused_and_left_as_it_is(store, path):
    store.toggle("ann", ["a"], "x")
    before = path.read_bytes()
    other = Store(path, identity(["a", "b"]))
    for ask in (other.revision, other.slices, lambda: other.toggle("ann", ["a"], "y")):
        with pytest.raises(
            TagsError, match="contains the tags of a pack with other photos; move it"
        ) as got:
            ask()
        assert "\n" not in str(got.value)
    assert path.read_bytes() == before


def test_a_new_pack_of_the_same_photos_keeps_its_tags(store, path):
    store.toggle("ann", ["a"], "x")
    again = Store(path, identity(["c", "a", "b"]))
    assert again.counts() == {"x": 1}
    assert identity(["ab", "c"]) != identity(["a", "bc"])


@pytest.mark.parametrize("kind", ["text", "other", "trigger", "empty table", "later", "cut"])
def test_a_file_that_is_no_tag_file_is_one_sentence(store, path, kind):
    if kind == "text":
        path.write_text("tags, but by hand\n" * 100)
    elif kind == "cut":
        store.change_tags("ann", [f"photo {n}" for n in range(500)], ["x"])
        path.write_bytes(path.read_bytes()[:9000])
    else:
        if kind != "other":
            store.toggle("ann", ["a"], "x")
        with closing(sqlite3.connect(path)) as base, base:
            base.execute(
                {
                    "other": "CREATE TABLE people (name TEXT)",
                    "trigger": "CREATE TRIGGER t AFTER INSERT ON tags BEGIN DELETE FROM tags; END",
                    "empty table": "DROP TABLE notes",
                    "later": "PRAGMA user_version = 3",
                }[kind]
            )
    with pytest.raises(TagsError, match=r"pack\.tags\.sqlite") as got:
        store.marks([f"photo {n}" for n in range(500)])
    assert "\n" not in str(got.value)


def test_a_link_is_refused(store, path, tmp_path):
    elsewhere = tmp_path / "elsewhere.sqlite"
    path.symlink_to(elsewhere)
    with pytest.raises(TagsError, match="is a link"):
        store.toggle("ann", ["a"], "x")
    assert not elsewhere.exists()


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    store = Store(tmp_path / "gone" / "pack.tags.sqlite", PACK)
    with pytest.raises(TagsError, match="cannot be read or written .* allow writing"):
        store.toggle("ann", ["a"], "x")


def test_numbers_out_of_range_are_not_shown(store, path):
    store.toggle("ann", ["a"], "x")
    known = store.keys()
    with closing(sqlite3.connect(path)) as base, base:
        base.executemany("INSERT INTO ratings VALUES (?, ?)", [("a", -3), ("b", 77)])
        base.executemany("INSERT INTO keys VALUES (?, ?)", [(-1, "m"), (77, "k")])
    assert store.marks(["a", "b"]) == {"a": Mark(("x",), "", 0), "b": Mark((), "", 5)}
    assert store.keys() == known


def test_hostile_text_is_text(store):
    store.change_tags("ann", [HOSTILE], [HOSTILE])
    store.set_note("ann", HOSTILE, f"{HOSTILE} \ud800")
    store.save_slice(HOSTILE, "q=x")
    name = " ".join(HOSTILE.split())
    assert store.marks([HOSTILE]) == {HOSTILE: Mark((name,), f"{HOSTILE} ?", 0)}
    assert store.photos([name]) == {HOSTILE}
    assert store.slices() == {name: "q=x"}


@pytest.mark.parametrize(
    "change, said",
    [
        (
            lambda s: s.set_note("ann", "a", "x" * 4001),
            "The note has 4,001 characters; give at most 4,000",
        ),
        (
            lambda s: s.toggle("ann", ["a"], "x" * 61),
            "A tag must have a name of 1 to 60 characters; got 61",
        ),
        (
            lambda s: s.toggle("ann", ["a"], " \n "),
            "A tag must have a name of 1 to 60 characters; got nothing",
        ),
        (lambda s: s.set_rating("ann", ["a"], 6), "A rating is a number from 0 to 5; got 6"),
        (lambda s: s.set_keys({1: "x", 2: " x "}), "The tag 'x' is on two keys"),
        (
            lambda s: s.save_slice("", "q=x"),
            "A slice must have a name of 1 to 80 characters; got nothing",
        ),
        (
            lambda s: s.save_slice("long", "x" * 8001),
            "The address of this view has 8,001 characters",
        ),
        (
            lambda s: s.toggle("ann", list(map(str, range(100_001))), "x"),
            "100,001 photos are selected, but at",
        ),
    ],
)
def test_what_is_too_much_is_one_sentence_and_changes_nothing(store, path, change, said):
    with pytest.raises(TagsError, match=f"^{said}"):
        change(store)
    assert store.revision() == ""


def test_one_tag_too_many_is_refused(store, monkeypatch):
    monkeypatch.setattr(module, "MOST_TAGS", 2)
    store.change_tags("ann", ["a"], ["x", "y"])
    with pytest.raises(TagsError, match="has 2 different tags, which is the limit"):
        store.change_tags("ann", ["a"], ["z"])
    store.change_tags("ann", ["b"], ["x"])


def test_a_selection_of_100000_is_tagged_and_undone(store):
    ids = [f"photo-{n:06}" for n in range(100_000)]
    store.toggle("ann", ids, "x")
    assert store.counts() == {"x": 100_000}
    assert len(store.undo("ann").photos) == 100_000
    assert store.counts() == {}


def test_old_steps_leave_the_journal(store, monkeypatch):
    monkeypatch.setattr("xattn.app.triage.store.JOURNAL_ROWS", 3)
    for n in range(4):
        store.change_tags("ann", ["a", "b"], [f"tag {n}"])
    assert store.undo("ann") and store.undo("ann") is None
    assert sorted(store.counts()) == ["tag 0", "tag 1", "tag 2"]


def test_keys_are_kept_and_freed(store):
    store.set_keys({1: "night", 9: " two  words ", 2: ""})
    assert store.keys() == {1: "night", 9: "two words"}


def test_slices_are_saved_renamed_and_deleted(store):
    store.save_slice("night", "q=night")
    with pytest.raises(TagsError, match="There is a slice 'night' already"):
        store.save_slice("night", "q=x")
    store.save_slice("night", "q=dark", replace=True)
    store.save_slice("day", "q=day")
    with pytest.raises(TagsError, match="There is a slice 'day' already"):
        store.rename_slice("night", "day")
    store.rename_slice("night", "night photos, wrong")
    with pytest.raises(TagsError, match="'night' no longer exists"):
        store.rename_slice("night", "x")
    assert store.slices() == {"day": "q=day", "night photos, wrong": "q=dark"}
    store.delete_slice("day")
    store.delete_slice("day")
    assert list(store.slices()) == ["night photos, wrong"]


# ---------------------------------------------------------------------- any sequence of two people

PHOTOS = st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True)
ACTS = st.one_of(
    st.tuples(st.just("toggle"), PHOTOS, st.sampled_from(["x", "y"])),
    st.tuples(st.just("note"), st.sampled_from("abc"), st.sampled_from(["", "one", "two"])),
    st.tuples(st.just("rate"), PHOTOS, st.integers(0, 5)),
    st.tuples(st.just("undo")),
    st.tuples(st.just("redo")),
)


class Model:
    """One person's marks as a plain history: states, and a place among them."""

    def __init__(self):
        self.states, self.at = [{}], 0

    @property
    def now(self):
        return self.states[self.at]

    def do(self, kind, *what):
        if kind in ("undo", "redo"):
            to = self.at + (1 if kind == "redo" else -1)
            self.at = to if 0 <= to < len(self.states) else self.at
            return
        marks = dict(self.now)
        if kind == "toggle":
            photos, tag = what
            on = not all(tag in marks.get(p, Mark()).tags for p in photos)
            for p in photos:
                old = marks.get(p, Mark())
                tags = set(old.tags) | {tag} if on else set(old.tags) - {tag}
                marks[p] = Mark(tuple(sorted(tags)), old.note, old.rating)
        elif kind == "note":
            old = marks.get(what[0], Mark())
            marks[what[0]] = Mark(old.tags, what[1], old.rating)
        else:
            for p in what[0]:
                old = marks.get(p, Mark())
                marks[p] = Mark(old.tags, old.note, what[1])
        marks = {p: mark for p, mark in marks.items() if mark}
        if marks != self.now:
            self.states, self.at = [*self.states[: self.at + 1], marks], self.at + 1


def act(store, person, prefix, kind, *what):
    if kind in ("undo", "redo"):
        getattr(store, kind)(person)
    elif kind == "toggle":
        store.toggle(person, [prefix + p for p in what[0]], what[1])
    elif kind == "note":
        store.set_note(person, prefix + what[0], what[1])
    else:
        store.set_rating(person, [prefix + p for p in what[0]], what[1])


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(["ann", "bob"]), ACTS), max_size=20))
def test_two_peoples_histories_do_not_touch_each_other(tmp_path_factory, steps):
    """On photos of their own, each person's file is what it would be without the other."""
    path = tmp_path_factory.mktemp("store") / "pack.tags.sqlite"
    models = {"ann": Model(), "bob": Model()}
    for person, what in steps:
        act(Store(path, PACK), person, f"{person}-", *what)
        models[person].do(*what)
    for person, model in models.items():
        found = Store(path, PACK).marks([f"{person}-{p}" for p in "abc"])
        assert {i.removeprefix(f"{person}-"): mark for i, mark in found.items()} == model.now


@settings(max_examples=30)
@given(st.lists(st.tuples(st.sampled_from(["ann", "bob"]), ACTS), max_size=12), ACTS)
def test_a_step_that_is_undone_at_once_leaves_no_trace(tmp_path_factory, steps, last):
    """Whatever two people did to the same photos before."""
    path = tmp_path_factory.mktemp("store") / "pack.tags.sqlite"
    for person, what in steps:
        act(Store(path, PACK), person, "", *what)
    store = Store(path, PACK)
    before, changed = store.marks(list("abc")), store.revision()
    if last[0] in ("undo", "redo"):
        return
    act(store, "ann", "", *last)
    after = store.marks(list("abc"))
    if store.revision() != changed:
        store.undo("ann")
        assert store.marks(list("abc")) == before
        store.redo("ann")
    assert store.marks(list("abc")) == after
