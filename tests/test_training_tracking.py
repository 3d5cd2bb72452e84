import sys
import types

import pytest

from activation_beacon.errors import ConfigError
from activation_beacon.training.tracking import flat, open_tracker

LINE = {"step": 3, "stage": 0, "loss": 2.5, "loss_by_ratio": {"8": 2.25}, "dev": {"2": 1.5}}


def test_a_line_is_flattened_by_ratio():
    assert flat(LINE) == {"stage": 0.0, "loss": 2.5, "loss_by_ratio/x8": 2.25, "dev/x2": 1.5}


def test_trackio_is_told_the_run_and_every_line(tmp_path, monkeypatch):
    told = []
    fake = types.SimpleNamespace(
        init=lambda **kwargs: told.append(kwargs), log=lambda values, step: told.append((step, values["loss"])),
        finish=lambda: told.append("closed"),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "trackio", fake)
    track, close = open_tracker("trackio", tmp_path / "my-run", {"seed": 1})
    track(LINE)
    close()
    assert told == [{"project": "activation-beacon", "name": "my-run", "config": {"seed": 1}}, (3, 2.5), "closed"]


def test_tensorboard_writes_its_files_under_the_run(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, name, value, step):
            written.append((self.folder, name, value, step))

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    track, close = open_tracker("tensorboard", tmp_path, {})
    track(LINE)
    close()
    assert (str(tmp_path / "tensorboard"), "loss", 2.5, 3) in written
    assert written[-1] == "closed"


@pytest.mark.parametrize("name", ["tensorboard", "trackio"])
def test_a_tracker_that_is_not_installed_is_named(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=f"report_to {name} needs a package that is not here: pip install {name}"):
        open_tracker(name, tmp_path, {})
