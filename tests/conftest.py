"""Small things every test file uses: the repository on the path, one thread, a tiny phantom, a script run as a user runs it."""
import os, subprocess, sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))

# a whole run in seconds: 6 tiny networks would take minutes otherwise
TINY = ["--size", "32", "--spacing", "5", "--width", "4", "--pretrain-steps", "6", "--pairs", "4", "--steps", "4",
        "--batch", "4", "--labelled", "1", "--windows", "2", "--save-every", "2"]
TINY_PIX2REP = ["--size", "32", "--spacing", "5", "--width", "4", "--dim", "8", "--projection", "8", "--pixels", "64",
                "--pretrain-steps", "6", "--pretrain-batch", "4", "--steps", "4", "--probe-steps", "4", "--batch", "4",
                "--labelled", "1", "--save-every", "2"]

TINY_MACL = ["--size", "32", "--spacing", "5", "--width", "4", "--pretrain-size", "64", "--pretrain-steps", "6", "--pretrain-batch", "4",
             "--steps", "4", "--batch", "4", "--labelled", "1", "--save-every", "2"]

TINY_CCT_R = ["--size", "32", "--spacing", "5", "--width", "4", "--swin-dim", "12", "--window", "4", "--steps", "4", "--batch", "8", "--labelled",
              "1", "--save-every", "2", "--projection", "8", "--block", "8", "--groups", "4", "--bank", "64", "--anchors", "16",
              "--peek-every", "2"]


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}                         # tiny networks; numbers repeat for one thread count


def run(script, *arguments, cwd=ROOT, **kwargs):
    """Run a script in a new process; returns what subprocess does, with text output."""
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, arguments)], cwd=cwd, text=True, timeout=300, stderr=subprocess.PIPE,
                          stdout=subprocess.PIPE, env=ONE_THREAD, **kwargs)


def refused(done, *words):
    """Assert that a run ended with exit code 2 and one clear line that holds these words."""
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    last = [line for line in done.stderr.splitlines() if line.strip()][-1]
    assert last.startswith("error: ") and all(w in last for w in words), last


def save(path, array, spacing=(1., 1., 1.), codes="LPS"):
    """A NIfTI file of `array` in file order whose axes point along `codes`, with `spacing` in mm along them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ornt = nib.orientations.axcodes2ornt(codes)
    affine = np.zeros((4, 4))
    for axis, (target, flip) in enumerate(ornt):
        affine[int(target), axis] = flip * spacing[axis]
    affine[:3, 3], affine[3, 3] = (5, -7, 11), 1
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
