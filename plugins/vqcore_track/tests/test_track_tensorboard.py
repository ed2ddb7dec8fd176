"""TensorBoard's event files, read back, hold what metrics.jsonl holds."""

import json
import warnings

import numpy as np
import pytest
from PIL import Image
from toys import run_config
from vqcore_track.tensorboard import TensorBoard

from vqcore.trainer import train

pytestmark = pytest.mark.usefixtures("toy")


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = EventAccumulator(str(folder), size_guidance={"images": 0, "histograms": 0, "scalars": 0})
        found.Reload()
    return found


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_holds_what_metrics_jsonl_holds(tmp_path):
    run = train(run_config(tmp_path / "run", hooks={"tb": {"name": "track/tensorboard"}}))
    found = events(tmp_path / "run/tensorboard")
    logged = [line for line in lines(tmp_path / "run") if "loss" in line]
    for name in ("loss", "loss/pixel/mse", "codes/usage", "lr"):
        seen = [(e.step, e.value) for e in found.Scalars(name)]
        assert seen == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in logged], name
    assert [e.step for e in found.Scalars("eval/metric/psnr")] == [6]
    assert found.Scalars("eval/metric/psnr")[0].value == pytest.approx(
        run.progress.evaluation["eval/metric/psnr"], rel=1e-6
    )
    histogram = found.Histograms("codes/uses")[-1]
    assert histogram.step == 6 and sum(histogram.histogram_value.bucket) == run.tokenizer.codebook_size
    assert histogram.histogram_value.bucket[0] == (run.window.counts()[0] == 0).sum()


def test_tensorboard_keeps_one_axis_when_a_run_goes_on(tmp_path):
    hooks = {"tb": {"name": "track/tensorboard"}}
    train(run_config(tmp_path / "run", run__steps=4, hooks=hooks, optim__horizon=8))
    train(run_config(tmp_path / "run", run__steps=8, hooks=hooks, optim__horizon=8))
    found = events(tmp_path / "run/tensorboard")
    assert [e.step for e in found.Scalars("loss")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [e.step for e in found.Histograms("codes/uses")] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_tensorboard_after_a_roll_back_and_a_killed_run(tmp_path, some_run):
    """Steps 3 and 4 are made again; TensorBoard shows the second time only, and after a restart from 2 likewise."""
    hook = TensorBoard(TensorBoard.Config())
    hook.vqcore_run_started(some_run())
    for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (3, 30.0)):
        hook.vqcore_step_ended(some_run(), step, {"loss": loss})
    hook.vqcore_run_ended()
    found = [(e.step, e.value) for e in events(tmp_path / "run/tensorboard").Scalars("loss")]
    assert found == [(1, 1.0), (2, 2.0), (3, 30.0)]
    again = TensorBoard(TensorBoard.Config())
    again.vqcore_run_started(some_run(step=2))
    again.vqcore_step_ended(some_run(), 3, {"loss": 300.0})
    again.vqcore_run_ended()
    found = [(e.step, e.value) for e in events(tmp_path / "run/tensorboard").Scalars("loss")]
    assert found == [(1, 1.0), (2, 2.0), (3, 300.0)]


def test_tensorboard_pictures(tmp_path, some_run):
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(tmp_path / "row.png")
    for pictures in (True, False):
        hook = TensorBoard(
            TensorBoard.Config(dir=str(tmp_path / str(pictures)), pictures=pictures, histograms=False)
        )
        hook.vqcore_run_started(some_run())
        hook.vqcore_pictured(5, "samples", str(tmp_path / "row.png"))
        hook.vqcore_run_ended()
    (seen,) = events(tmp_path / "True").Images("samples")
    assert (seen.step, seen.width, seen.height) == (5, 4, 4)
    assert not events(tmp_path / "False").Tags()["images"]
