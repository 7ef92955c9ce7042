"""The default model: found, converted once, kept whole."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from streamfill.errors import ConfigError, ModelError
from streamfill.models import default
from streamfill.models.home import replacing_folder, streamfill_home
from streamfill.models.progress import Progress, no_progress


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own, and a source that need not be there."""
    monkeypatch.setenv("STREAMFILL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(default, "_find_gguf", lambda: Path("model.gguf"))
    monkeypatch.setattr(default, "version", lambda name: "1")
    return tmp_path / "home"


def write_one_file(source: Path, target: Path, progress: Progress) -> None:
    """Stands for the conversion; counts its calls in a file beside the models."""
    (target / "config.json").write_text("{}")
    with (target.parent / "calls").open("a") as calls:
        calls.write("x")


def call_in_process() -> None:
    default.import_gguf = write_one_file  # type: ignore[assignment, attr-defined]
    default._find_gguf = lambda: Path("model.gguf")
    default.version = lambda name: "1"  # type: ignore[assignment, attr-defined]
    default.ensure_default_model()


def test_converts_once(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """The second call does no work and gives the same folder."""
    monkeypatch.setattr(default, "import_gguf", write_one_file)
    first = default.ensure_default_model()
    assert default.ensure_default_model() == first == default.default_model_folder()
    assert default.is_default_model_ready()
    assert (home / "models" / "calls").read_text() == "x"


def test_two_processes_convert_once(home: Path) -> None:
    """Of processes that come together one converts, the others wait and use its folder."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=call_in_process) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0] * 4
    assert (home / "models" / "calls").read_text() == "x"


def test_failed_conversion_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error there is no folder, not even a part, and the next call starts again."""

    def fail(source: Path, target: Path, progress: Progress) -> None:
        (target / "config.json").write_text("{}")
        raise ModelError("damaged")

    monkeypatch.setattr(default, "import_gguf", fail)
    with pytest.raises(ModelError, match="damaged"):
        default.ensure_default_model()
    folder = default.default_model_folder()
    assert not folder.exists()
    assert not list(folder.parent.glob("*.part-*"))
    assert not list(folder.parent.glob(".*.part-*"))


def test_full_disk_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the file system names the folder and the space that is needed."""

    def fail(source: Path, target: Path, progress: Progress) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(default, "import_gguf", fail)
    with pytest.raises(ConfigError, match="540 MB") as caught:
        default.ensure_default_model()
    assert caught.value.key == "STREAMFILL_HOME"


def test_older_format_is_made_again(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """A folder of an earlier conversion is replaced."""
    monkeypatch.setattr(default, "import_gguf", write_one_file)
    folder = default.ensure_default_model()
    (folder / "streamfill-source.json").write_text('{"format": 0}')
    (folder / "old").touch()
    default.ensure_default_model()
    assert not (folder / "old").exists()
    assert (home / "models" / "calls").read_text() == "xx"


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package the error names the option and the way out."""
    monkeypatch.undo()
    monkeypatch.setattr(default, "_MODULE", "no_such_module")
    with pytest.raises(ConfigError, match="--model PATH") as caught:
        default._find_gguf()
    assert caught.value.key == "model"


def test_home_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A home below a file stops with the variable's name."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("STREAMFILL_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(ConfigError) as caught:
        streamfill_home()
    assert caught.value.key == "STREAMFILL_HOME"


def test_replacing_sweeps_leftovers(tmp_path: Path) -> None:
    """What a killed process left behind goes with the next call."""
    (tmp_path / ".target.part-abc").mkdir()
    with replacing_folder(tmp_path / "target") as part:
        (part / "file").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["target"]


def test_no_progress_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    """The default shows nothing."""
    no_progress(1, 2)
    assert capsys.readouterr().out == ""
