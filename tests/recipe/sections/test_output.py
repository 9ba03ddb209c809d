"""The output key: folders that no run can be written to."""

from tests.recipe.recipe_text import GOOD, bad_recipes, refused, refused_with

BAD = [
    # (what, changed text, overrides, place and words that must be in one line)
    (
        "output is a file",
        ("runs/test", "r.yaml"),
        (),
        "r.yaml:20: output: got 'r.yaml', a file; choose a folder",
    ),
    (
        "output under a file",
        ("runs/test", "r.yaml/run"),
        (),
        "r.yaml:20: output: got 'r.yaml/run', but 'r.yaml' is not a folder",
    ),
    (
        "output of something else",
        ("runs/test", "."),
        (),
        "r.yaml:20: output: got '.', which holds other files",
    ),
    (
        "output is a list",
        ("runs/test", "[a]"),
        (),
        "r.yaml:20: output: got ['a']; allowed: the path of a folder",
    ),
]


@bad_recipes(BAD)
def test_bad_recipe_is_refused_with_its_line(change, overrides, words):
    refused_with(change, overrides, words)


def test_folder_that_cannot_be_written(monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert any("is not writable; choose another folder" in problem for problem in refused(GOOD))
