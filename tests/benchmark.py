"""Speed, run by hand: python tests/benchmark.py [--data PATH]. Prints tables; ratios within one run are what counts.

1. Slices a second of pre-training, and the share of a step outside forward, backward and optimiser (aim: at most 10 %).
2. Time and memory of WLA, forward and backward, against r: the paper's (hw)^2 / r^2.
3. The start: preparing a dataset, and opening the prepared one.
"""
import argparse, sys, tempfile, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import common
import data
import sal


def step_shares(o, dataset, device, steps=20):
    """Seconds a step in each part of SAL's pre-training: the lines of `sal.pretrain`, each part timed."""
    unet = common.UNet(1, 2, o.width).to(device, memory_format=torch.channels_last)
    heads = sal.Heads(unet.encoder.widths, o.level).to(device)
    optimiser = torch.optim.AdamW([*unet.encoder.parameters(), *heads.parameters()], 1e-3)
    numbers, spent = np.arange(len(dataset.volume)), dict.fromkeys(["sample, read, augment", "forward, losses", "backward", "optimiser"], 0.)
    for step in range(steps + 3):
        marks = [time.perf_counter()]
        def mark():
            if device.type == "cuda":
                torch.cuda.synchronize()
            marks.append(time.perf_counter())
        views, pick = sal.pair_batch(dataset, numbers, o, device)
        mark()
        with torch.autocast(device.type, o.dtype, enabled=o.dtype != torch.float32):
            x, z = heads(unet.encoder(views))
        L_GP = sal.global_positional_loss(z, torch.from_numpy(dataset.position[pick]), o.threshold, o.temperature)
        loss = L_GP + sal.local_alignment_loss(*x.chunk(2), o.windows) + sal.uniformity_loss(x, dataset.volume[pick])
        mark()
        optimiser.zero_grad()
        loss.backward()
        mark()
        optimiser.step()
        mark()
        if step >= 3:                                                      # the first steps warm up
            for key, seconds in zip(spent, np.diff(marks)):
                spent[key] += seconds / steps
    return spent


def wla_cost(r, device, size=48, channels=64, batch=4):
    """(seconds, MB) of WLA forward and backward on maps [batch, channels, size, size]; MB counts the similarity matrices."""
    x = torch.randn(2, batch, channels, size, size, device=device, requires_grad=True)
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        sal.local_alignment_loss(*x.unbind(0), r).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times), batch * size ** 4 / r ** 2 * 4 / 1e6


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", help="a dataset (default: the phantom)")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device = common.pick_device(arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(arguments.data) if arguments.data else data.make_phantom(Path(folder) / "phantom")
        o = sal.parse_options(["--precision", arguments.precision] + (["--data", str(root)] if arguments.data else []))
        times = []
        for _ in range(2):
            begin = time.perf_counter()
            cases = data.find_cases(root)
            sal.resolve(o, cases)
            dataset = common.prepare(cases, o.spacing, o.size, Path(folder) / "cache")
            times.append(time.perf_counter() - begin)
        print(f"start on {len(cases)} volumes: first {times[0]:.2f} s, then {times[1]:.2f} s (ratio {times[0] / times[1]:.0f}); "
              f"cache {dataset.images.nbytes / 1e6:.0f} MB, memory-mapped\n")
        spent = step_shares(o, dataset, device)
        total = sum(spent.values())
        print(f"pre-training, {2 * o.pairs} views of {o.size}x{o.size}, width {o.width}, {o.precision}, {device}, "
              f"{torch.get_num_threads()} threads: {2 * o.pairs / total:.0f} slices a second")
        for key, seconds in spent.items():
            print(f"  {key:24} {1000 * seconds:7.1f} ms  {100 * seconds / total:5.1f} %")
        print("\nWLA, forward and backward, 4 pairs of 64x48x48\n  r   seconds   of r = 1   similarity matrices   of r = 1")
        base = wla_cost(1, device)
        for r in (1, 2, 3, 4, 6, 8, 12):
            seconds, megabytes = wla_cost(r, device)
            print(f"{r:3} {seconds:9.4f} {seconds / base[0]:10.3f} {megabytes:17.1f} MB {megabytes / base[1]:10.4f}")


if __name__ == "__main__":
    main()
