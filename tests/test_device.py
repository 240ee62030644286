"""Devices: which one is taken, and every script whole on a pretend GPU.

The pretend GPU needs no hardware. Its tensors lie in CPU memory, say cuda:0, and refuse to meet
those of the CPU, as CUDA's do. What it cannot show: speed, memory, and sums in another order.
"""
import contextlib
import importlib
import json
from unittest import mock

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import SCRIPTS, options
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import cct_r
import common
import data
import sal

aten = torch.ops.aten
CPU = torch.device("cpu")
GPU = torch.device("cuda:0")

# Operations that may meet tensors of both devices, and those whose indices may lie on the CPU.
MOVES = (aten._to_copy, aten.copy_)
INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)

# numpy asks a tensor for a copy in a way that our pretend tensors do not know
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

# -------------------------------------------------------------------------------- the pretend GPU


class GpuTensor(torch.Tensor):
    """The CPU tensor `inner`, said to be on cuda:0.

    PyTorch's C++ takes it for a tensor of "meta", a device that needs no driver.
    """
    device = GPU
    is_cuda = True
    is_meta = False
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        inner = inner.resolve_conj()                               # conjugated now, not later
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype,
            device="meta")
        wrapper.inner = inner
        return wrapper

    def __reduce_ex__(self, protocol):
        return self.inner.__reduce_ex__(protocol)                  # a checkpoint has plain tensors

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), named=None):
        return run_on_inner(function, arguments, dict(named or {}))


def tensors(x):
    """All tensors in nested lists, tuples and dicts."""
    return [t for t in tree_leaves(x) if isinstance(t, torch.Tensor)]


def refuse_mixed(function, arguments, named):
    """Raise where CUDA would. Single numbers (no axes) and indices may lie on the CPU."""
    operation = function.overloadpacket
    if operation in MOVES:
        return
    checked = (arguments, named)
    if operation in INDEXED and isinstance(arguments[0], GpuTensor):
        checked = (arguments[0], arguments[2:])                    # without the indices
    strangers = [t for t in tensors(checked) if t.ndim and not isinstance(t, GpuTensor)]
    if strangers:
        shapes = [tuple(t.shape) for t in strangers]
        raise RuntimeError(f"{function}: tensors on cuda:0 meet tensors on the cpu, {shapes}")


def run_on_inner(function, arguments, named):
    """Run an operation on the tensors behind; what comes out is on the device it would be on."""
    wrappers = {}
    for t in tensors((arguments, named)):
        if isinstance(t, GpuTensor):
            wrappers[id(t.inner)] = t
    if wrappers:
        refuse_mixed(function, arguments, named)
    on_gpu = bool(wrappers)
    if named.get("device") is not None:
        on_gpu = torch.device(named["device"]).type != "cpu"
        named["device"] = CPU

    def unwrap(x):
        return x.inner if isinstance(x, GpuTensor) else x

    def wrap(x):
        if id(x) in wrappers:
            return wrappers[id(x)]                                 # changed in place: the same one
        return GpuTensor(x) if on_gpu and isinstance(x, torch.Tensor) else x

    arguments, named = tree_map(unwrap, (arguments, named))
    return tree_map(wrap, function(*arguments, **named))


class PretendMode(TorchDispatchMode):
    """Sees every operation, also those that make a tensor out of none, as torch.zeros(device=)."""
    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        return run_on_inner(function, arguments, dict(named or {}))


@contextlib.contextmanager
def pretend_gpu():
    """Within it the machine has one GPU, cuda:0; yields a mock that counts synchronisations."""
    lift_only_cpu = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)                      # for torch.tensor(device=GPU)
    with (mock.patch("torch.cuda._lazy_init"),
          mock.patch("torch.cuda.device_count", return_value=1),
          mock.patch("torch.cuda.max_memory_allocated", return_value=3 * 2 ** 20),
          mock.patch("torch.cuda.get_device_name", return_value="a pretend GPU"),
          mock.patch("torch.cuda.synchronize") as synchronize,
          PretendMode()):
        try:
            yield synchronize
        finally:
            torch._C._set_only_lift_cpu_tensors(lift_only_cpu)


def test_the_pretend_gpu_takes_and_refuses_what_cuda_does():
    with pretend_gpu():
        x = torch.rand(4, 3).to(GPU)
        y = torch.rand(4, 3)
        rows = (x * torch.tensor(2.) + 1)[torch.tensor([0, 2])]    # a number, an index on the CPU
        assert rows.device == GPU
        assert torch.zeros(2, device=GPU).device == GPU
        assert torch.equal(rows.cpu(), 2 * x.cpu()[[0, 2]] + 1)

        def index_on_gpu():
            return y[torch.tensor([1]).to(GPU)]

        for wrong in (lambda: x + y, lambda: torch.cat([x, y]), index_on_gpu, lambda: x @ y.T,
                      lambda: y.add_(x.sum(0)), lambda: np.asarray(x),
                      lambda: torch.nn.Linear(3, 2)(x)):
            with pytest.raises((RuntimeError, TypeError)):
                wrong()


# --------------------------------------------------------------------------- every script, on it


def rows_of(folder):
    """The rows of metrics.json."""
    return json.loads((folder / "metrics.json").read_text())["rows"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_whole_run_on_the_pretend_gpu(script, phantom, tmp_path, monkeypatch):
    """Pre-train, register, fine-tune, score, draw, predict: the CPU's numbers to the last digit."""
    module = importlib.import_module(script)
    starts = cct_r.affine_starts
    monkeypatch.setattr(cct_r, "affine_starts", lambda *words: starts(*words)[::15])
    monkeypatch.setattr(cct_r, "REGISTRATION_STEPS", 3)            # both spare seconds
    image = str(next(phantom.glob("imagesTr/*.nii.gz")))
    words = ["--data", str(phantom), *options(script), "--steps", "6"]
    here = ["--out", str(tmp_path / "c"), "--cache", str(tmp_path / "c_cache")]
    there = ["--out", str(tmp_path / "o"), "--cache", str(tmp_path / "o_cache")]
    module.main([*words, *here, "--device", "cpu"])
    network = str(tmp_path / f"o/{script}_n1_s0.pt")
    predict = ["--predict", image, "--checkpoint", network, "--out"]
    with pretend_gpu() as synchronize:
        module.main([*words, *there])                              # registers on it as well
        assert synchronize.call_count > 0                          # no time is read before
        module.main([*predict, str(tmp_path / "gpu")])
    module.main([*predict, str(tmp_path / "cpu"), "--device", "cpu"])
    assert rows_of(tmp_path / "o") == rows_of(tmp_path / "c")
    metrics = json.loads((tmp_path / "o/metrics.json").read_text())
    assert metrics["peak_gpu_memory_mb"] == 3
    labels = []
    for device in ("cpu", "gpu"):
        file = next((tmp_path / device / "predictions").glob("*.nii.gz"))
        labels.append(np.asarray(nib.load(file).dataobj))
    assert np.array_equal(*labels)


def weight_on_the_cpu(loss):
    """The same loss, weighted by a tensor that was made on the CPU."""
    def spoiled(*arguments, **named):
        return (loss(*arguments, **named) * torch.ones(1)).sum()
    return spoiled


def never_moved(uniform):
    """`common.uniform` without its .to(device)."""
    def spoiled(n, lo, hi, device):
        return uniform(n, lo, hi, CPU)
    return spoiled


def left_where_it_was(place):
    """`Run.place` that leaves the network on the CPU."""
    def spoiled(run, net):
        return net
    return spoiled


@pytest.mark.parametrize("owner, name, spoil", [
    (sal, "uniformity_loss", weight_on_the_cpu),
    (common, "uniform", never_moved),
    (common.Run, "place", left_where_it_was),
])
def test_a_planted_device_bug_is_caught(owner, name, spoil, phantom, tmp_path, monkeypatch):
    monkeypatch.setattr(owner, name, spoil(getattr(owner, name)))
    words = ["--data", str(phantom), *options("sal"), "--cache", str(tmp_path / "cache")]
    sal.main([*words, "--pretrain-steps", "1", "--steps", "1", "--out", str(tmp_path / "cpu"),
              "--device", "cpu"])                                  # the CPU does not see it
    with pretend_gpu(), pytest.raises(RuntimeError, match="cuda:0 meet tensors on the cpu"):
        sal.main([*words, "--out", str(tmp_path / "gpu")])


# ------------------------------------------------------------------------------ which device, how


def refusal(function, *arguments):
    """The line with which function(...) is refused."""
    with pytest.raises(data.DataError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def there(monkeypatch, cuda, mps):
    """Let the machine have so many CUDA devices, and mps or not."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


def test_auto_takes_cuda_else_the_cpu_and_never_mps(monkeypatch):
    there(monkeypatch, cuda=2, mps=False)
    assert common.pick_device() == torch.device("cuda:0")
    there(monkeypatch, cuda=0, mps=True)
    assert common.pick_device() == CPU
    assert common.pick_device("mps").type == "mps"


def test_a_device_that_is_not_there_is_refused_in_one_line(monkeypatch):
    there(monkeypatch, cuda=2, mps=False)
    assert common.pick_device("cuda:1") == torch.device("cuda:1")
    for name in ("cuda:2", "cuda:7", "cuda:x", "cuda:-1", "mps", "cpu:1", "tpu", ""):
        line = refusal(common.pick_device, name)
        assert line == f"--device {name}: not available here; use one of cpu, cuda, cuda:1"


def test_bfloat16_is_refused_where_the_gpu_emulates_it(phantom, tmp_path, monkeypatch):
    asked = []

    def supported(including_emulation=True):
        asked.append(including_emulation)
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    words = ["--data", str(phantom), *options("sal"), "--out", str(tmp_path / "o")]
    with pretend_gpu():
        line = refusal(sal.main, [*words, "--precision", "bfloat16"])
    assert line == "--precision bfloat16: cuda:0 only emulates it; use float32"
    assert asked == [False]
    assert not common.emulates_bfloat16(CPU)
    assert not (tmp_path / "o").exists()


def test_channels_stay_where_they_are_on_mps():
    x = torch.rand(2, 3, 4, 5)
    assert common.channels_last(x).stride() == (60, 1, 15, 3)
    on_mps = mock.Mock(device=torch.device("mps"))
    assert common.channels_last(on_mps) is on_mps
    on_mps.contiguous.assert_not_called()


def test_time_is_read_after_synchronising():
    with mock.patch("torch.cuda.synchronize") as synchronize:
        common.clock(CPU)
        synchronize.assert_not_called()
        common.clock(GPU)
        synchronize.assert_called_once_with(GPU)
