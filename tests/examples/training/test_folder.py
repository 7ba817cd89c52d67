"""The output directory: whose it is, one run at a time, nothing of others lost."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from training import folder

EXAMPLES = Path(folder.__file__).parents[1]


def tree(directory):
    """{path: content} of all files."""
    return {
        str(p.relative_to(directory)): p.read_text()
        for p in directory.rglob("*")
        if p.is_file() and p.name != folder.LOCK
    }


def write(directory, **files):
    for name, text in files.items():
        path = directory / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


class TestForeignFolders:
    @pytest.mark.parametrize(
        "name", ["README.md", "checkpoints__step-3__weights.bin", "baseline.json", "metrics.json", ".git__HEAD"]
    )
    def test_are_refused_and_stay_as_they_are(self, tmp_path, name):
        write(tmp_path, **{name: "mine"})
        before = tree(tmp_path)
        with (
            pytest.raises(FileExistsError, match=r"has files that no run of this script wrote \(.*\).*--overwrite"),
            folder.claimed(tmp_path, overwrite=False, resume=None),
        ):
            pass
        assert tree(tmp_path) == before and not (tmp_path / folder.LOCK).exists()

    def test_a_run_json_of_something_else_makes_them_no_ours(self, tmp_path):
        for text in ("{}", "[]", "no json", '{"script": "train.py"}'):
            write(tmp_path, **{folder.MARKER: text})
            with pytest.raises(FileExistsError, match=r"\(run.json\)"):
                folder.refuse_foreign(tmp_path)

    def test_a_file(self, tmp_path):
        write(tmp_path, out="mine")
        with pytest.raises(FileExistsError, match="out is a file"):
            folder.refuse_foreign(tmp_path / "out")

    def test_ours_new_ones_and_overwritten_ones_are_taken(self, tmp_path):
        with folder.claimed(tmp_path / "new", overwrite=False, resume=None):
            folder.write_marker(tmp_path / "new", "abc", {"--seed": 1})
        (tmp_path / "new" / "notes.txt").write_text("mine")
        with folder.claimed(tmp_path / "new", overwrite=False, resume=None):
            assert folder.read_marker(tmp_path / "new")["run"] == "abc"
        write(tmp_path / "foreign", **{"README.md": "mine"})
        with folder.claimed(tmp_path / "foreign", overwrite=True, resume=None):
            pass
        assert tree(tmp_path / "foreign") == {"README.md": "mine"}

    def test_a_refused_run_leaves_no_folder_of_its_own(self, tmp_path):
        (tmp_path / "users").mkdir()
        for name in ("new", "users", "begun"):
            with pytest.raises(ValueError), folder.claimed(tmp_path / name, overwrite=False, resume=None):
                if name == "begun":
                    folder.mark(tmp_path / name, {})
                raise ValueError("no such task")
        assert not (tmp_path / "new").exists() and (tmp_path / "users").is_dir()
        assert folder.read_marker(tmp_path / "begun") is not None

    def test_checkpoints_to_go_on_from_say_whose_it_is(self, tmp_path):
        write(tmp_path, **{"checkpoints__step-2__checkpoint.json": "{}"})
        with folder.claimed(tmp_path, overwrite=False, resume="latest"):
            pass
        with pytest.raises(FileExistsError), folder.claimed(tmp_path, overwrite=False, resume=None):
            pass


class TestSettingAside:
    def test_nothing_that_was_set_aside_is_ever_lost(self, tmp_path):
        write(tmp_path, **{"checkpoints.old__mine.txt": "a user's", "README.md": "mine"})
        for run in ("first", "second", "third"):
            write(tmp_path, **{"checkpoints__step-1__checkpoint.json": run, "baseline.json": run})
            moved = folder.set_aside(tmp_path)
            assert (moved / "step-1/checkpoint.json").read_text() == run
            assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "baseline.json").exists()
        kept = tree(tmp_path)
        assert kept.pop("checkpoints.old/mine.txt") == "a user's" and kept.pop("README.md") == "mine"
        assert sorted(kept.values()) == sorted(2 * ["first", "second", "third"])
        newest = folder.earlier_checkpoints(tmp_path)[0]
        assert (newest / "step-1/checkpoint.json").read_text() == "third"

    def test_nothing_there(self, tmp_path):
        assert folder.set_aside(tmp_path) is None and tree(tmp_path) == {}

    def test_an_earlier_run_that_came_further_is_named(self, tmp_path, capsys):
        for step in ("step-9", "step-120", "step-x"):
            write(tmp_path, **{f"checkpoints.old-2__{step}__checkpoint.json": ""})
        write(tmp_path, **{"checkpoints.old__step-500__checkpoint.json": ""})
        folder.tell_of_earlier(tmp_path, 120)
        assert capsys.readouterr().out == ""
        folder.tell_of_earlier(tmp_path, 7)
        assert f"--resume {tmp_path / 'checkpoints.old-2/step-120'} resumes its last" in capsys.readouterr().out


# holds a directory until its input ends
HOLDER = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from training.folder import locked
with locked(Path(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.skipif(folder.fcntl is None, reason="needs fcntl")
def test_one_run_at_a_time_and_a_killed_one_lets_go(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(EXAMPLES), str(tmp_path)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(BlockingIOError, match=rf"another run writes into .*process {holder.pid}"),
            folder.locked(tmp_path),
        ):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with folder.locked(tmp_path):
        pass


def test_leftovers_of_killed_saves_are_removed(tmp_path):
    out = tmp_path / "out"
    write(
        out,
        **{f".out-{32 * 'a'}__x": "", ".out-ab_12xyz__x": "", ".out-mine__x": "mine", ".other-ab_12xyz__x": "mine"},
    )
    folder.remove_leftovers(out)
    assert sorted(tree(out)) == [".other-ab_12xyz/x", ".out-mine/x"]


def test_json_is_valid_whatever_the_numbers_are(tmp_path):
    values = {"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": -float("inf")}, "e": tmp_path, 3: None}
    folder.write_json(tmp_path / "metrics.json", values)

    def refuse(text):
        raise AssertionError(text)

    found = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=refuse)
    assert found == {"a": None, "b": [None, 1.5], "c": {"d": None}, "e": str(tmp_path), "3": None}


def test_an_error_names_the_disk(tmp_path):
    error = folder.disk_error("the adapter", tmp_path / "not" / "there", OSError(28, "No space left on device"))
    assert isinstance(error, OSError) and "No space left on device" in str(error)
    assert str(tmp_path / "not/there") in str(error) and "MB left" in str(error)
