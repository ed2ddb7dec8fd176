"""Several processes under torchrun on gloo: ranks agree, and two ranks equal one process with the doubled batch."""

import os
import socket
import subprocess
import sys

import pytest
import torch
import yaml

from vqcore.artefacts.folder import load_tensors

pytest.importorskip("vqcore_vit")
pytest.importorskip("vqcore_quant")
pytestmark = pytest.mark.dist

TREE = {
    "data": {
        "name": "array",
        "path": "x.npy",
        "eval_path": "x.npy",
        "modality": {"name": "array", "channels": 2, "size": [16, 16], "range": [-1, 1]},
        "workers": 0,
    },
    "model": {
        "encoder": {"name": "vit/encoder", "width": 32, "depth": 1, "num_heads": 2, "patch_size": 4},
        "quantizer": {
            "name": "quant/vq",
            "codebook_size": 32,
            "latent_dim": 8,
            "kmeans_init": True,
            "kmeans_iters": 3,
        },
        "decoder": {"name": "vit/decoder", "width": 32, "depth": 1, "num_heads": 2, "patch_size": 4},
    },
    "run": {"steps": 1, "threads": 1, "log_every": 1},
    "optim": {"lr": 1e-3},
}


def launch(folder, name, ranks, batch, steps=1):
    """Start one run and return its final checkpoint."""
    tree = {
        **TREE,
        "data": {**TREE["data"], "batch_size": batch},
        "run": {**TREE["run"], "dir": name, "steps": steps},
    }
    (folder / f"{name}.yaml").write_text(yaml.dump(tree))
    torchrun = (
        ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"] if ranks > 1 else []
    )
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "vqcore", "train", f"{name}.yaml"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / name / "checkpoints" / f"step_{steps}"


@pytest.mark.slow
def test_two_ranks_equal_one_with_the_doubled_batch(tmp_path):
    import numpy as np

    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", rng.uniform(-1, 1, (40, 2, 16, 16)).astype(np.float32))
    one, two = launch(tmp_path, "one", 1, 8), launch(tmp_path, "two", 2, 4)
    ours, theirs = load_tensors(one / "model.safetensors"), load_tensors(two / "model.safetensors")
    for name in ours:
        tolerance = 1e-6 if name.startswith("quantizer") else 1e-4
        torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=tolerance, msg=name)
    metrics = [
        [yaml.safe_load(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in ("one", "two")
    ]
    for a, b in zip(*metrics):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=2e-3, abs=1e-4), key


@pytest.mark.slow
def test_ranks_end_equal_and_resume(tmp_path):
    """A hook in the run compares the weights of all ranks."""
    import numpy as np

    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", rng.uniform(-1, 1, (40, 2, 16, 16)).astype(np.float32))
    (tmp_path / "equal.py").write_text(EQUAL)
    tree = {**TREE, "data": {**TREE["data"], "batch_size": 4}, "hooks": {"equal": {"name": "local/equal"}}}
    outputs = []
    for name, steps in (("whole", (6,)), ("parts", (3, 6))):
        for stop in steps:
            run = {**TREE["run"], "dir": name, "steps": stop}
            (tmp_path / "cfg.yaml").write_text(
                yaml.dump({**tree, "run": run, "optim": {"lr": 1e-3, "horizon": 6}})
            )
            argv = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "vqcore"]
            argv += ["train", "cfg.yaml", "--plugin", "equal.py"]
            done = subprocess.run(
                [sys.executable, *argv],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=240,
                check=False,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            outputs.append(done.stdout)
    assert all(output.count("rank weights equal") == 2 for output in outputs)
    whole, parts = (tmp_path / n / "checkpoints/step_6/model.safetensors" for n in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


EQUAL = '''
from dataclasses import dataclass
import torch, torch.distributed as dist
from vqcore.config import Config
from vqcore.plugin import Component, Plugin, hookimpl

class Equal:
    @dataclass(frozen=True, kw_only=True)
    class Config(Config):
        """None."""
    def __init__(self, cfg):
        pass
    @hookimpl
    def vqcore_run_ended(self, run, error):
        for name, value in sorted(run.tokenizer.state_dict().items()):
            parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, value.contiguous())
            assert all(torch.equal(part, value) for part in parts), name
        print("rank weights equal", flush=True)

@hookimpl
def vqcore_plugin():
    return Plugin(1, "compares ranks", (Component("hook", "equal", ":Equal", "compares ranks"),))
'''


@pytest.mark.slow
def test_a_rank_that_dies_is_started_again_and_the_run_goes_on(tmp_path):
    """torchrun restarts both ranks. The run resumes from the last checkpoint and ends with the same weights."""
    import numpy as np

    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", rng.uniform(-1, 1, (40, 2, 16, 16)).astype(np.float32))
    (tmp_path / "dying.py").write_text(DYING)
    for name in ("whole", "killed"):
        tree = {
            **TREE,
            "data": {**TREE["data"], "batch_size": 4},
            "run": {**TREE["run"], "dir": name, "steps": 6, "save_every": 2},
            "hooks": {"dying": {"name": "local/dying"}} if name == "killed" else {},
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.dump(tree))
        argv = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--max-restarts=1"]
        argv += ["-m", "vqcore", "train", f"{name}.yaml", "--plugin", "dying.py"]
        done = subprocess.run(
            [sys.executable, *argv], cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "died").exists() and "resumed after step 4" in done.stdout
    whole, killed = (tmp_path / n / "checkpoints/step_6/model.safetensors" for n in ("whole", "killed"))
    assert whole.read_bytes() == killed.read_bytes()


DYING = '''
import os, signal
from dataclasses import dataclass
from pathlib import Path
from vqcore.config import Config
from vqcore.plugin import Component, Plugin, hookimpl

class Dying:
    @dataclass(frozen=True, kw_only=True)
    class Config(Config):
        """None."""
    def __init__(self, cfg):
        pass
    @hookimpl
    def vqcore_step_ended(self, run, step):
        if step == 5 and os.environ["RANK"] == "1" and not Path("died").exists():
            Path("died").touch()
            os.kill(os.getpid(), signal.SIGKILL)

@hookimpl
def vqcore_plugin():
    return Plugin(1, "dies once", (Component("hook", "dying", ":Dying", "dies once"),))
'''


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "says"),
    [
        (None, "error: data.path: x.npy: there is no such file."),
        ((40, 3, 16, 16), "error: data: 17 samples in a row cannot be read. The last one is "),
    ],
)
def test_what_one_rank_finds_wrong_ends_all_of_them_with_one_line(tmp_path, shape, says):
    """The x.npy of the second rank is missing or has another shape. Both ranks end by themselves."""
    import numpy as np

    rng = np.random.default_rng(0)
    for rank, size in enumerate(((40, 2, 16, 16), shape)):
        (tmp_path / str(rank)).mkdir()
        if size is not None:
            np.save(tmp_path / str(rank) / "x.npy", rng.uniform(-1, 1, size).astype(np.float32))
    run = {**TREE["run"], "dir": str(tmp_path / "run")}
    (tmp_path / "run.yaml").write_text(yaml.dump({**TREE, "run": run}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "vqcore", "train", "../run.yaml"],
            cwd=tmp_path / str(rank),
            env={**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=240)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [2, 2], said
    # Both ranks train and evaluate on one file here, which is said before.
    lines = [
        [line for line in text.splitlines() if "held-out samples are training samples" not in line]
        for text in said
    ]
    assert lines[0] == [] and len(lines[1]) == 1 and says in lines[1][0]
    assert not (tmp_path / "run").exists()
