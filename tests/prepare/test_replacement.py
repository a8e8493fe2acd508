"""Links planted where `mme prepare` keeps its temporary folders are removed, never followed."""

from __future__ import annotations

from pathlib import Path

import pytest

from mme.errors import UserError
from mme.prepare.manifest import Settings
from mme.prepare.replacement import FolderReplacement
from mme.prepare.unfinished import READ_FILE, STORE_FILES, WORK_FOLDER, WorkFolder

KEPT = Path(WORK_FOLDER, READ_FILE)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A folder outside, with files like those of an interrupted run."""
    folder = tmp_path / "mine"
    (folder / WORK_FOLDER).mkdir(parents=True)
    (folder / KEPT).write_text("{}")
    return folder


def files_of(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kept", [None, KEPT])
@pytest.mark.parametrize("name", [".set.partial", ".set.older"])
def test_a_link_in_place_of_a_temporary_folder_is_removed(
    tmp_path: Path, mine: Path, name: str, kept: Path | None
) -> None:
    before = files_of(mine)
    (tmp_path / name).symlink_to(mine)
    with FolderReplacement(tmp_path / "set", kept) as replacement:
        (replacement.partial / "dataset.json").write_text("theirs")
        replacement.commit()
    assert files_of(mine) == before
    assert files_of(tmp_path / "set") == {"dataset.json": "theirs"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "set"]


def test_a_link_in_place_of_the_work_folder_is_removed(tmp_path: Path, mine: Path) -> None:
    before = files_of(mine)
    (tmp_path / ".set.partial").mkdir()
    (tmp_path / ".set.partial" / WORK_FOLDER).symlink_to(mine / WORK_FOLDER)
    with FolderReplacement(tmp_path / "set", KEPT) as replacement:
        work = WorkFolder(replacement.partial, [], Settings(), None)
        assert work.found is None and not work.path.is_symlink()
        work.keep({"rows": 1})
    assert files_of(mine) == before


@pytest.mark.parametrize("name", [*STORE_FILES, READ_FILE])
def test_links_among_the_files_of_an_interrupted_run_are_not_used(tmp_path: Path, mine: Path, name: str) -> None:
    work = WorkFolder(tmp_path, [], Settings(), None)
    for file in STORE_FILES:
        (work.path / file).write_text("events")
    work.keep({"rows": 1})
    assert WorkFolder(tmp_path, [], Settings(), None).found == {"rows": 1}
    (mine / name).write_bytes((work.path / name).read_bytes())
    (work.path / name).unlink()
    (work.path / name).symlink_to(mine / name)
    before = files_of(mine)
    again = WorkFolder(tmp_path, [], Settings(), None)
    assert again.found is None and list(again.path.iterdir()) == []
    assert files_of(mine) == before


@pytest.mark.parametrize("text", ["[]", "{}", '"identity"', "[" * 100_000, "{"])
def test_damaged_notes_of_an_interrupted_run_are_not_used(tmp_path: Path, text: str) -> None:
    work = WorkFolder(tmp_path, [], Settings(), None)
    (work.path / STORE_FILES[0]).write_text("events")
    (work.path / READ_FILE).write_text(text)
    assert WorkFolder(tmp_path, [], Settings(), None).found is None


def test_a_link_in_place_of_the_lock_is_refused(tmp_path: Path, mine: Path) -> None:
    (tmp_path / ".set.lock").symlink_to(mine / KEPT)
    with pytest.raises(UserError, match="can't be written: a symbolic link"), FolderReplacement(tmp_path / "set"):
        pass
    assert (mine / KEPT).read_text() == "{}"
