"""push: an export onto the hub, whole, as it was verified, and nothing else.

Private unless it is asked otherwise. What goes up is what the manifest lists, compared with it first; in one
commit, so that nobody downloads half of it. What lies in the repository is only replaced where an earlier
push of ours put it there; a README.md that was written or changed by somebody stays as it is (the manifest
there then asks nothing of it). The commit goes onto what was looked at, or nowhere. A push that broke off is
repeated: the hub keeps what has arrived, by its hash.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  (of the HTTP library that this version of it uses)
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ..export.folder import check_files
from ..files.manifest import MANIFEST, file_entry, open_sealed, sealed
from ..files.marker import is_run
from ..rundir import RunDir, shipped

# What a repository has before anybody pushed a model to it.
CARD = "README.md"
EMPTY = {".gitattributes", CARD}


def push(
    folder: Path,
    repo: str,
    public: bool = False,
    api: HfApi | None = None,
    say: Callable[[str], object] = print,
) -> str:
    """Upload the export of a run, or an exported folder, as the model `repo` (owner/name); returns its
    address. ValueError before anything is sent for a folder that is not ours, is changed, or was not
    verified, and for a repository that holds other things or is open to another circle than asked; with the
    way out when the hub refuses or the line breaks."""
    source = _verified(folder)
    manifest = check_files(source)
    files: dict[str, Path | bytes] = {name: source / name for name in sorted(manifest["files"])}
    files[MANIFEST] = source / MANIFEST
    size = sum((source / name).stat().st_size for name in files)
    written = manifest["files"].get(CARD)
    _check_name(repo)
    api = api or HfApi(library_name="lowbit_ft")
    try:
        there, parent, theirs = _open(api, repo, public)
        if theirs and written is not None:
            del files[CARD]
            files[MANIFEST] = sealed({**manifest, "files": {**manifest["files"], CARD: {}}})
            say(
                f"{repo}: its {CARD} is not as a push of ours left it, so it stays; the card of this export "
                f"is {source / CARD}"
            )
        gone = sorted(there - set(files))
        kind = "public" if public else "private"
        say(f"{source} -> {repo}: {len(files)} files, {size / 1e9:.2f} GB, {kind}")
        operations: list[Any] = [CommitOperationAdd(name, content) for name, content in files.items()]
        operations += [CommitOperationDelete(name) for name in gone]
        what = f"{manifest['format']}, {len(manifest['layers'])} packed layers, by lowbit_ft"
        made = api.create_commit(repo, operations, commit_message=what, parent_commit=parent)
    except LocalTokenNotFoundError as error:
        raise ValueError(f"{repo}: nobody is logged in here; run `hf auth login`, or set HF_TOKEN") from error
    except HfHubHTTPError as error:
        raise ValueError(f"{repo}: {_answer(error)}") from error
    except (HTTPError, ConnectionError, TimeoutError) as error:
        raise ValueError(
            f"{repo}: the line to {api.endpoint} broke ({type(error).__name__}: {error}); nothing of this "
            "push is visible there. The same command goes on: what has arrived is not sent again"
        ) from error
    address = f"{api.endpoint}/{repo}"
    say(f"pushed: {address} ({made.oid})")
    return address


def _verified(folder: Path) -> Path:
    """The exported folder. ValueError for a run that has none, or one whose export nobody compared, and for
    what a run holds besides."""
    inside = folder.resolve().parent
    if not is_run(folder) and is_run(inside):
        if (source := _verified(inside)).resolve() != folder.resolve():
            raise ValueError(
                f"{folder}: is of the run {inside}, and what that ships is {source}; push the run, or that "
                "folder"
            )
        return source
    if not is_run(folder):
        return folder
    recipe = RunDir(folder).recipe()
    source = shipped(folder)
    if not source.is_dir():
        raise ValueError(f"{folder} has no export yet; run `lowbit-ft export {folder}` first")
    if not recipe.export.verify and source.name == "exported":
        raise ValueError(
            f"{source}: was written with export.verify: false, so nobody has read it back; run `lowbit-ft "
            f"verify {source}`, set export.verify: true in {folder / 'recipe.yaml'}, and push again"
        )
    return source


def _check_name(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"repository: got {repo!r}; allowed: owner/name ({error})") from None
    if repo.count("/") != 1:
        raise ValueError(f"repository: got {repo!r}; allowed: owner/name")


def _open(api: HfApi, repo: str, public: bool) -> tuple[set[str], str | None, bool]:
    """Make the repository, or look at the one that is there: the files that an earlier push of ours left, the
    commit that was looked at (None: just made), and whether its card is somebody else's. ValueError where it
    is open to another circle than asked, or holds what we did not write."""
    try:
        found: Any = api.repo_info(repo, files_metadata=False)
    except RepositoryNotFoundError as error:
        if isinstance(error, GatedRepoError):
            raise
        api.create_repo(repo, private=not public, exist_ok=False)
        return set(), None, False
    if bool(found.private) == public:
        raise ValueError(
            f"{repo}: is there and {'private' if found.private else 'public'}, and this push is "
            f"{'public' if public else 'private'}: "
            + (
                "leave --public out, or open the repository in its settings"
                if public
                else "say --public if everybody may have the model, or give another name"
            )
        )
    names = {sibling.rfilename for sibling in found.siblings or ()}
    if MANIFEST not in names:
        if others := sorted(names - EMPTY):
            raise ValueError(
                f"{repo}: holds what lowbit_ft did not push ({', '.join(others[:4])}"
                f"{', ...' if len(others) > 4 else ''}); nothing there is overwritten: give another name"
            )
        return set(), found.sha, CARD in names
    with tempfile.TemporaryDirectory() as folder:

        def fetched(name: str) -> Path:
            return Path(api.hf_hub_download(repo, name, revision=found.sha, local_dir=folder))

        before = open_sealed(fetched(MANIFEST)).get("files", {})
        # An entry that says nothing is of a card that stayed.
        changed = CARD in names and before.get(CARD) != file_entry(fetched(CARD))
    ours = set(before) - ({CARD} if changed else set())
    if others := sorted(names - ours - EMPTY - {MANIFEST}):
        raise ValueError(
            f"{repo}: beside an earlier push there are files of others ({', '.join(others[:4])}); nothing "
            "there is overwritten: remove them there, or give another name"
        )
    return (ours | {MANIFEST}) & names, found.sha, changed


def _answer(error: HfHubHTTPError) -> str:
    """What the hub said, and what to do."""
    status = error.response.status_code if error.response is not None else 0
    said = (error.server_message or str(error)).strip().splitlines()[0]
    fix = {
        401: "log in with a token that may write (hf auth login, or HF_TOKEN)",
        403: "the token may not write there: give one that may, or a name of your own",
        404: "there is no such owner, or the token may not see it",
        412: "somebody wrote there while this looked: see what it is, and repeat the command",
        413: "the hub takes no more of this size; ask it for room, or export in fewer bits",
        429: "too many calls; wait, and repeat the command",
    }.get(status, "repeat the command: what has arrived is not sent again")
    return f"the hub answered {status}: {said}; {fix}"
