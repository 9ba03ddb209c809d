"""push: an export goes to the hub whole, private, and over nothing that we did not put there. The hub is a
local stand-in of its HTTP API.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, _commit_api

from lowbit_ft.export import EXPORTERS
from lowbit_ft.export.folder import check_files, replace_file
from lowbit_ft.export.writer import write_model
from lowbit_ft.files.manifest import MANIFEST
from lowbit_ft.model.checkpoint import Checkpoint
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.rundir import RunDir
from lowbit_ft.stages.push import push
from tests.packed_tools import int_grid, random_weights, tiny_checkpoint
from tests.processes import ROOT
from tests.stages.hub import TOKEN, Hub, local_hub

CARD = "---\nlibrary_name: transformers\n---\n# A card\n"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("push")
    checkpoint = Checkpoint.open(tiny_checkpoint(root / "dense"))
    weights = random_weights(checkpoint.empty_model(), int_grid())
    write_model(
        root / "exported",
        checkpoint,
        weights,
        EXPORTERS["compressed-tensors"],
        extra_files={"README.md": CARD},
        max_shard_bytes=60_000,
    )
    return root / "exported"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    # The stand-in has LFS; xet is a protocol of a library in Rust, which would ask another server.
    monkeypatch.setattr(_commit_api, "is_xet_available", lambda: False)
    with local_hub() as found:
        yield found


def api(hub: Hub, token: str = TOKEN) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=token)


def pushed(hub: Hub, folder: Path, repo: str = "org/name", **more: Any) -> str:
    return push(folder, repo, api=api(hub), say=lambda text: None, **more)


def test_an_export_arrives_whole_private_and_once(hub: Hub, exported: Path, tmp_path: Path) -> None:
    assert pushed(hub, exported) == f"{hub.endpoint}/org/name"
    repo = hub.repos["org/name"]
    assert repo.private and len(repo.commits) == 1 and "compressed-tensors" in repo.commits[0]
    mine = {path.name: path.read_bytes() for path in exported.iterdir()}
    assert {name: data for name, data in repo.files.items() if name != ".gitattributes"} == mine
    assert repo.files["README.md"].decode() == CARD and len(hub.objects) > 2
    for name, data in mine.items():
        (tmp_path / name).write_bytes(data)
    check_files(tmp_path)

    fewer = shutil.copytree(exported, tmp_path / "again")
    replace_file(fewer, "README.md", CARD + "more\n")
    sent = sum(call.startswith("PUT") for call in hub.calls)
    repo.files["old.safetensors"] = b""
    with pytest.raises(ValueError, match=r"files of others \(old.safetensors\)"):
        pushed(hub, fewer)
    del repo.files["old.safetensors"]
    pushed(hub, fewer)
    assert repo.files["README.md"].decode() == CARD + "more\n" and len(repo.commits) == 2
    assert sum(call.startswith("PUT") for call in hub.calls) == sent  # what is there is not sent again


def test_what_an_earlier_push_left_over_goes(hub: Hub, exported: Path, tmp_path: Path) -> None:
    pushed(hub, exported)
    one = tmp_path / "one"
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path / "dense"))
    weights = random_weights(checkpoint.empty_model(), int_grid())
    write_model(one, checkpoint, weights, EXPORTERS["native"])
    pushed(hub, one)
    names = set(hub.repos["org/name"].files) - {".gitattributes"}
    assert names == {path.name for path in one.iterdir()} and "model.safetensors" in names


def test_a_card_that_somebody_wrote_stays(hub: Hub, exported: Path, tmp_path: Path) -> None:
    pushed(hub, exported)
    repo, said = hub.repos["org/name"], []
    repo.files["README.md"] = b"# My own words\n"
    newer = shutil.copytree(exported, tmp_path / "newer")
    replace_file(newer, "README.md", CARD + "more\n")
    for place in ("one", "two"):  # nor does the next push take it for its own
        push(newer, "org/name", api=api(hub), say=said.append)
        assert repo.files["README.md"] == b"# My own words\n" and "README.md is not as a push" in said[-3]
        (tmp_path / place).mkdir()
        for name, data in repo.files.items():
            (tmp_path / place / name).write_bytes(data)
        check_files(tmp_path / place)  # whoever fetches it has what was pushed
    del repo.files["README.md"]
    pushed(hub, newer)
    assert repo.files["README.md"].decode() == CARD + "more\n"


def test_what_came_between_the_look_and_the_commit_stays(hub: Hub, exported: Path) -> None:
    pushed(hub, exported)
    repo = hub.repos["org/name"]
    with pytest.raises(ValueError, match="answered 412: .*somebody wrote there"):
        push(exported, "org/name", api=api(hub), say=lambda text: repo.commits.append("of another"))
    assert repo.commits[1:] == ["of another"]


def test_public_only_when_asked(hub: Hub, exported: Path) -> None:
    pushed(hub, exported, "org/open", public=True)
    assert not hub.repos["org/open"].private
    for repo, public, words in (
        ("org/open", False, "there and public.*say --public"),
        ("org/shut", True, "there and private.*leave --public out"),
    ):
        if public:
            pushed(hub, exported, repo)
        before = dict(hub.repos[repo].files)
        with pytest.raises(ValueError, match=words):
            pushed(hub, exported, repo, public=public)
        assert hub.repos[repo].files == before


def test_nothing_leaves_that_is_not_ours_or_was_changed(hub: Hub, exported: Path, tmp_path: Path) -> None:
    plain = tiny_checkpoint(tmp_path / "plain")
    with pytest.raises(ValueError, match="not a folder that lowbit_ft wrote"):
        pushed(hub, plain)
    changed = shutil.copytree(exported, tmp_path / "changed")
    (changed / "README.md").write_text("another card")
    with pytest.raises(ValueError, match="README.md: its content is not the one"):
        pushed(hub, changed)
    extra = shutil.copytree(exported, tmp_path / "extra")
    (extra / "notes.txt").write_text("a secret")
    with pytest.raises(ValueError, match="allowed: owner/name"):
        pushed(hub, extra, "name")
    assert not hub.repos
    pushed(hub, extra)
    assert "notes.txt" not in hub.repos["org/name"].files
    hub.repos["org/name"].files.pop(MANIFEST)
    with pytest.raises(ValueError, match="holds what lowbit_ft did not push"):
        pushed(hub, exported)


def test_what_the_hub_refuses_is_said(hub: Hub, exported: Path) -> None:
    with pytest.raises(ValueError, match=r"answered 401: .*hf auth login"):
        push(exported, "org/name", api=api(hub, "hf_wrong"), say=lambda text: None)
    hub.refuse["/api/repos/create"] = 403
    with pytest.raises(ValueError, match=r"answered 403: .*a name of your own"):
        pushed(hub, exported)
    hub.refuse.clear()
    hub.cut = True
    with pytest.raises(ValueError, match="the line to .* broke .*The same command goes on"):
        pushed(hub, exported)
    kept, hub.cut = len(hub.objects), False
    sent = sum(call.startswith("PUT") for call in hub.calls)
    pushed(hub, exported)
    assert kept and sum(call.startswith("PUT") for call in hub.calls) == sent


def test_a_run_pushes_its_export(hub: Hub, exported: Path, tmp_path: Path) -> None:
    def run(name: str, *overrides: str) -> RunDir:
        quick = ROOT / "recipes" / "quickstart.yaml"
        recipe = load_recipe(quick, [f"output={tmp_path / name}", *overrides], check=False)
        made = RunDir.start(recipe)
        made.close()
        return made

    bare = run("bare")
    with pytest.raises(ValueError, match="has no export yet; run `lowbit-ft export"):
        pushed(hub, bare.path)
    for name, overrides in (("whole", ()), ("unread", ("export.verify=false",))):
        one = run(name, *overrides)
        shutil.copytree(exported, one / "exported")
        with pytest.raises(ValueError, match="of other tensors than this run wrote"):
            pushed(hub, one.path)
        one.made("exported")
    for unread in (tmp_path / "unread", tmp_path / "unread" / "exported"):
        with pytest.raises(ValueError, match="export.verify: false, so nobody has read it back"):
            pushed(hub, unread)
    shutil.copytree(exported, tmp_path / "whole" / "base")
    with pytest.raises(ValueError, match="is of the run .*whole, and what that ships is .*exported"):
        pushed(hub, tmp_path / "whole" / "base")
    assert not hub.repos
    pushed(hub, tmp_path / "whole" / "exported")
    pushed(hub, tmp_path / "whole")
    assert "README.md" in hub.repos["org/name"].files
