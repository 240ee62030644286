"""What every test file uses: the path, a tiny phantom, tiny runs of the four scripts."""
import contextlib
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

# Networks this small are slower on two threads, and numbers repeat for one number of threads. It
# must be said before torch is imported, and the scripts' own processes inherit it. The tests are of
# the CPU, and of a pretend GPU (test_device.py).
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))

SCRIPTS = ["sal", "pix2rep", "macl", "cct_r"]

# A whole run in seconds. `options("sal")` is the list of words for the command line.
EVERY = "--size 32 --spacing 5 --width 4 --steps 12 --lr 1e-2 --labelled 1 --seeds 0 --save-every 4"
TINY = {
    "sal": "--batch 4 --pretrain-steps 6 --pairs 4 --windows 2",
    "pix2rep": "--batch 4 --pretrain-steps 6 --pretrain-batch 4 --probe-steps 4 --dim 8 "
               "--projection 8 --pixels 64",
    "macl": "--batch 4 --pretrain-steps 6 --pretrain-batch 4 --pretrain-size 64",
    "cct_r": "--batch 8 --swin-dim 12 --window 2 --projection 8 --block 8 --groups 4 --bank 64 "
             "--anchors 16 --peek-every 2",
}
def options(script):
    """The words of a tiny run of this script; later ones win."""
    return EVERY.split() + TINY[script].split()


def command(script, *arguments):
    """The command line of a script as a user types it."""
    return [sys.executable, str(ROOT / f"{script}.py"), *map(str, arguments)]


def run(script, *arguments, cwd=ROOT, **kwargs):
    """Run a script in a new process; returns what subprocess does, with text output.

    The limit is against a process that hangs, on however slow a machine.
    """
    return subprocess.run(command(script, *arguments), cwd=cwd, text=True, timeout=1800,
                          capture_output=True, **kwargs)


def run_here(script, *arguments, cwd=ROOT):
    """As `run`, in this process: spares the seconds that a new one needs to import torch.

    An error that is no DataError is raised.
    """
    import common
    module = importlib.import_module(script)
    words = [str(a) for a in arguments]
    out = io.StringIO()
    errors = io.StringIO()
    code = 0

    def main():
        module.main(words)

    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            common.run_main(main)
        except SystemExit as end:
            code = end.code
    return subprocess.CompletedProcess(words, code, out.getvalue(), errors.getvalue())


def started(script, *arguments):
    """The `Run` of a script in this process, ready to train: (its module, the run)."""
    import common
    module = importlib.import_module(script)
    words = options(script) + [str(a) for a in arguments]
    run = common.Run(common.parse_options(script, "", module.OPTIONS, words))
    module.check(run)
    run.begin()
    return module, run


def label_as_image(self, numbers, device="cpu"):
    """In place of `SliceDataset.image`: the label of the slices, as grey values."""
    return self.label(numbers)[:, None].float()


def noted_rates(monkeypatch):
    """A list to which every step of AdamW adds the rates of its groups."""
    import torch
    seen = []
    step = torch.optim.AdamW.step

    def noted(self, *arguments):
        seen.append([group["lr"] for group in self.param_groups])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    return seen


def lowered(loss, x, step):
    """Assert that a small step against the gradient lowers loss(x): it is there, and right."""
    x = x.clone().requires_grad_()
    before = loss(x)
    before.backward()
    assert x.grad.isfinite().all()
    assert loss(x - step * x.grad).item() < before.item() - 1e-5


def refused(done, *words):
    """Assert that a run ended with exit code 2 and one clear line that holds these words."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    last = [line for line in done.stderr.splitlines() if line.strip()][-1]
    assert last.startswith("error: ")
    for word in words:
        assert word in last


def save(path, array, spacing=(1., 1., 1.), codes="LPS"):
    """A NIfTI file of `array`, in file order: axes along `codes`, `spacing` in mm along them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.zeros((4, 4))
    for axis, (target, flip) in enumerate(nib.orientations.axcodes2ornt(codes)):
        affine[int(target), axis] = flip * spacing[axis]
    affine[:3, 3] = (5, -7, 11)
    affine[3, 3] = 1
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def volume(seed=0, shape=(20, 18, 4), classes=4):
    """A random image and a label with every class, in file order."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, shape).astype(np.uint8)
    return (rng.normal(100, 20, shape) + 30 * label).astype(np.float32), label


@pytest.fixture(scope="session")
def phantom(tmp_path_factory):
    """A phantom of 6 patients (12 volumes) as an MSD folder."""
    from data import make_phantom
    return make_phantom(tmp_path_factory.mktemp("data") / "phantom", patients=6)


@pytest.fixture(scope="session")
def finished(phantom, tmp_path_factory):
    """finished(script) -> (its folder, the work folder with the cache, what it printed).

    One tiny run of each script, made once.
    """
    work = tmp_path_factory.mktemp("work")
    made = {}

    def of(script):
        if script not in made:
            done = run(script, "--data", phantom, *options(script), "--labelled", 1, 2,
                       "--seeds", 0, 1, "--out", script, cwd=work)
            made[script] = done
        assert made[script].returncode == 0, made[script].stderr
        return work / script, work, made[script].stdout
    return of


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, whichever ran before it."""
    import torch
    torch.manual_seed(0)


def written(file):
    """Time of change of a file that another process may write, rename or remove; None: no file."""
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return None
