"""A process that is killed while it saves leaves the old files or the new ones."""

import os
from pathlib import Path

import pytest

from peft_talora.saving import directory as files
from peft_talora.saving.directory import PENDING, finish_pending, written_aside

OLD = {"config": "old config", "weights": "old weights"}
NEW = {"config": "new config", "weights": "new weights", "card": "new card"}
# all that changes a file system, or waits for it, on the way
CALLS = ("mkdir", "open", "fsync", "chmod", "rename", "replace", "rmdir", "unlink")
KILLED = 9


def save(directory, contents):
    with written_aside(directory) as aside:
        for name, text in contents.items():
            (aside / name).write_text(text)


def read(directory):
    return {path.name: path.read_text() for path in directory.iterdir() if not path.name.startswith(".")}


def die_at(monkeypatch, step):
    """End this process at once, without `finally`, when it comes to its call number `step`."""
    left = step

    def dying(function):
        def run(*args, **kwargs):
            nonlocal left
            if left == 0:
                os._exit(KILLED)
            left -= 1
            return function(*args, **kwargs)

        return run

    for name in CALLS:
        monkeypatch.setattr(os, name, dying(getattr(os, name)))


def save_and_die(monkeypatch, directory, step):
    """Save `NEW` in a process that is killed at its call number `step`; whether it was."""
    process = os.fork()
    if process == 0:
        try:
            die_at(monkeypatch, step)
            save(directory, NEW)
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code in (0, KILLED)
    return code == KILLED


@pytest.mark.skipif(not hasattr(os, "fork"), reason="simulated kills need fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
class TestKilledAtEveryStep:
    def outcomes(self, monkeypatch, tmp_path, prepare):
        """What every kill left behind, after [`finish_pending`], and what the save that was not killed left."""
        seen = []
        for step in range(100):
            directory = prepare(tmp_path / str(step))
            killed = save_and_die(monkeypatch, directory, step)
            finish_pending(directory)
            finish_pending(directory)  # a second time changes nothing
            seen.append(read(directory) if directory.exists() else None)
            assert not (directory / PENDING).exists()
            if not killed:
                return seen
            # whatever was left does not disturb the next save
            save(directory, NEW)
            assert read(directory) == {**(seen[-1] or {}), **NEW}
        raise AssertionError("the save never came to its end")

    def test_over_an_old_one(self, monkeypatch, tmp_path):
        def prepare(directory):
            save(directory, OLD)
            (directory / "other").write_text("stays")
            return directory

        seen = self.outcomes(monkeypatch, tmp_path, prepare)
        old, new = {**OLD, "other": "stays"}, {**NEW, "other": "stays"}
        decided = seen.index(new)
        assert seen == [old] * decided + [new] * (len(seen) - decided)
        assert decided >= 8 and len(seen) - decided >= 6  # kills on either side of the one rename

    def test_into_a_new_directory(self, monkeypatch, tmp_path):
        seen = self.outcomes(monkeypatch, tmp_path, lambda directory: directory / "deep")
        decided = seen.index(NEW)
        assert seen == [None] * decided + [NEW] * (len(seen) - decided) and decided >= 8

    def test_through_a_link(self, monkeypatch, tmp_path):
        def prepare(link):
            target = tmp_path / f"target{link.name}"
            save(target, OLD)
            link.symlink_to(target)
            return link

        seen = self.outcomes(monkeypatch, tmp_path, prepare)
        assert [contents in (OLD, NEW) for contents in seen] == [True] * len(seen) and seen[0] == OLD
        assert (tmp_path / "0").is_symlink()


def test_an_exception_leaves_nothing(tmp_path):
    save(tmp_path / "old", OLD)
    for directory in (tmp_path / "old", tmp_path / "new"):
        with pytest.raises(ZeroDivisionError), written_aside(directory) as aside:
            (aside / "config").write_text("half of it")
            raise ZeroDivisionError
    assert read(tmp_path / "old") == OLD
    assert sorted(path.name for path in (tmp_path / "old").iterdir()) == sorted(OLD)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_nothing_is_renamed_across_the_directory_s_border(tmp_path, monkeypatch):
    """It may be a mount point, and its parent another volume that cannot be written."""
    save(tmp_path / "mounted", OLD)
    moved = []
    for name in ("rename", "replace"):
        function = getattr(os, name)
        monkeypatch.setattr(files.os, name, lambda a, b, function=function: (moved.extend([a, b]), function(a, b)))
    tmp_path.chmod(0o500)
    try:
        save(tmp_path / "mounted", NEW)
    finally:
        tmp_path.chmod(0o700)
    assert read(tmp_path / "mounted") == NEW
    assert len(moved) == 8 and all(tmp_path / "mounted" in Path(path).parents for path in moved)


def test_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(Path("."), NEW)
    assert read(tmp_path) == NEW


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("something")
    with pytest.raises(FileExistsError, match="file' is a file, not a directory"):
        save(tmp_path / "file", NEW)
    assert (tmp_path / "file").read_text() == "something"


def test_new_directories_are_as_readable_as_others(tmp_path):
    (tmp_path / "usual").mkdir()
    save(tmp_path / "new", NEW)
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_two_processes_finish_the_same_save(tmp_path, monkeypatch):
    (tmp_path / PENDING).mkdir()
    for name, text in NEW.items():
        (tmp_path / PENDING / name).write_text(text)
    replace, calls = os.replace, []

    def overtaken(source, target):
        calls.append(source)
        if len(calls) == 1:  # the other process does all of it in between
            finish_pending(tmp_path)
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", overtaken)
    finish_pending(tmp_path)
    assert read(tmp_path) == NEW and not (tmp_path / PENDING).exists() and len(calls) > len(NEW)
