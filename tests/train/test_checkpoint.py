"""A checkpoint folder is complete or does not exist, and damage is found and named."""

from pathlib import Path

import pytest

from clmoe.errors import ClmoeError
from clmoe.train import checkpoint
from clmoe.train.checkpoint import build_folder, is_complete, verify, work_folder


def fill(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "continual.json").write_text("{}\n")
    (folder / "state").mkdir()
    (folder / "state" / "deep.bin").write_bytes(b"deep")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "checkpoint"
    build_folder(target, fill)
    return target


def test_a_sealed_folder_is_complete_and_its_identity_follows_its_content(folder: Path, tmp_path: Path) -> None:
    assert is_complete(folder)
    twin = tmp_path / "elsewhere" / "twin"
    build_folder(twin, fill)
    assert verify(twin) == verify(folder), "equal files give the same identity wherever they lie"

    def other(path: Path) -> None:
        fill(path)
        (path / "continual.json").write_text("[]\n")

    build_folder(tmp_path / "other", other)
    assert verify(tmp_path / "other") != verify(folder)


def test_an_altered_and_an_extra_file_of_a_subfolder_are_named(folder: Path) -> None:
    (folder / "state" / "notes.txt").write_text("mine")
    with pytest.raises(ClmoeError, match=r"state/notes\.txt"):
        verify(folder)
    (folder / "state" / "notes.txt").unlink()
    (folder / "state" / "deep.bin").write_bytes(b"Deep")
    with pytest.raises(ClmoeError, match=r"state/deep\.bin is damaged"):
        is_complete(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": {}}', '{"format_version": "99", "files": {}}'])
def test_a_broken_manifest_is_named(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ClmoeError, match=r"manifest\.json"):
        verify(folder)


def test_a_folder_without_manifest_does_not_exist_for_readers(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    assert not is_complete(folder)
    with pytest.raises(ClmoeError, match="not a finished checkpoint"):
        verify(folder)
    assert not is_complete(folder / "nowhere")


def test_a_crash_while_filling_leaves_nothing_and_the_rerun_succeeds(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"

    def crash(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_folder(target, crash)
    assert not target.exists()
    build_folder(target, fill)
    assert is_complete(target)
    assert not (target / "half").exists(), "what the crash left is thrown away"
    assert not work_folder(target).exists()


def test_a_crash_before_the_rename_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "checkpoint"
    for step in ("seal", "flush", "file_sha256"):
        with monkeypatch.context() as patch:

            def stop(path: Path) -> None:
                raise OSError("power is gone")

            patch.setattr(checkpoint, step, stop)
            with pytest.raises(OSError, match="power"):
                build_folder(target, fill)
        assert not target.exists() and not (work_folder(target) / "manifest.json").exists()


def test_a_complete_folder_is_not_built_again(folder: Path) -> None:
    def never(path: Path) -> None:
        raise AssertionError("built again")

    build_folder(folder, never)
