"""Speed, run by hand: python tests/benchmark.py [--data PATH]. Prints tables; ratios within one run are what counts.

1. Slices a second of pre-training, and the share of a step outside forward, backward and optimiser (aim: at most 10 %).
2. Time and memory of WLA, forward and backward, against r: the paper's (hw)^2 / r^2.
3. Pix2Rep: the share of a step spent on loss and warp (aim: at most 25 %), time and memory of InfoNCE against n, and of Barlow
   Twins against the number of pixels.
4. MACL: the dense loss as one batched product against the same loss as a loop over pixels (aim: at least 20 times faster) and its
   memory; the share of a step outside forward, losses, backward and optimiser (aim: at most 10 %).
5. CCT-R: where a step goes; the class-balanced contrast by sums over classes against a loop over pixels; registering volumes in
   a batch against one by one.
6. The start: preparing a dataset, and opening the prepared one.
"""
import argparse, sys, tempfile, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F

import cct_r
import common
import data
import macl
import pix2rep
import sal


def clock(device):
    """The time in seconds, once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_by_part(one_step, parts, device, steps=20):
    """Mean seconds of a step in each part, {name: seconds}, after three steps to warm up.

    one_step(mark) does a step and calls `mark()` at the end of every part; a name that stands in `parts` twice gets both.
    """
    spent = dict.fromkeys(parts, 0.)
    for step in range(steps + 3):
        marks = [clock(device)]
        one_step(lambda: marks.append(clock(device)))
        if step >= 3:
            for part, seconds in zip(parts, np.diff(marks), strict=True):
                spent[part] += seconds / steps
    return spent


def print_parts(spent):
    """A line a part: milliseconds, and the share of the step."""
    for part, seconds in spent.items():
        print(f"  {part:30} {1000 * seconds:7.1f} ms  {100 * seconds / sum(spent.values()):5.1f} %")


def sal_shares(o, dataset, device):
    """Seconds a step in each part of SAL's pre-training: the lines of `sal.pretrain`, each part timed."""
    unet = common.UNet(1, 2, o.width).to(device, memory_format=torch.channels_last)
    heads = sal.Heads(unet.encoder.widths, o.level).to(device)
    optimiser = torch.optim.AdamW([*unet.encoder.parameters(), *heads.parameters()], 1e-3)
    numbers = np.arange(len(dataset.volume))

    def one_step(mark):
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
    return seconds_by_part(one_step, ["sample, read, augment", "forward, losses", "backward", "optimiser"], device)


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


def pix2rep_shares(o, dataset, device):
    """Seconds a step in each part of Pix2Rep's pre-training. The backward pass is cut at the maps of the trunk."""
    f, g = pix2rep.Backbone(1, o).to(device, memory_format=torch.channels_last), pix2rep.projector(o).to(device)
    parameters = [p for p in (*f.parameters(), *g.parameters()) if p is not f.unet.head.weight and p is not f.unet.head.bias]
    optimiser = torch.optim.AdamW(parameters, 1e-3)
    numbers = np.arange(len(dataset.volume))

    def one_step(mark):
        views, grid, valid = pix2rep.view_batch(dataset, numbers, o, device)
        mark()
        with torch.autocast(device.type, o.dtype, enabled=o.dtype != torch.float32):
            maps = f.trunk(views).float()
        mark()
        cut = maps.detach().requires_grad_()
        pairs = torch.cat(pix2rep.pixel_pairs(*cut.chunk(2), grid, valid, o.pixels if o.loss == "infonce" else None))
        mark()
        leaf = pairs.detach().requires_grad_()
        with torch.autocast(device.type, o.dtype, enabled=o.dtype != torch.float32):
            z = g(f.widen(leaf)).float()
        mark()
        z_leaf = z.detach().requires_grad_()
        z_a, z_b = z_leaf.chunk(2)
        nce = o.loss == "infonce"
        loss = pix2rep.info_nce_loss(z_a, z_b, o.temperature) if nce else pix2rep.barlow_twins_loss(z_a, z_b, o.lam)
        mark()
        optimiser.zero_grad()
        loss.backward()
        mark()
        z.backward(z_leaf.grad)
        mark()
        pairs.backward(leaf.grad)
        mark()
        maps.backward(cut.grad)
        mark()
        optimiser.step()
        mark()
    return seconds_by_part(one_step, [
        "read, augment, move the images", "U-Net forward", "phi on the maps: choose pixels", "widen, project", "loss",
        "backward of phi and loss", "backward of widen, project", "backward of phi and loss", "backward of the U-Net", "optimiser"],
        device)


def saved_megabytes(function):
    """(seconds, MB): the best time of `function`().backward(), and the memory its forward pass keeps for the backward pass."""
    times = []
    for _ in range(8):
        held = {}
        def keep(x):
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x
        begin = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = function()
        loss.backward()
        times.append(time.perf_counter() - begin)
    return min(times), sum(held.values()) / 1e6


def pix2rep_tables(arguments, root, cases, dataset, device):
    """Print where a step of Pix2Rep goes, for both losses, and each loss's cost against the number of pixels."""
    for loss in ("infonce", "barlow"):
        real = ["--data", str(root)] if arguments.data else []
        o = pix2rep.parse_options(["--precision", arguments.precision, "--loss", loss, *real])
        pix2rep.resolve(o, cases)
        spent = pix2rep_shares(o, dataset, device)
        total = sum(spent.values())
        ours = sum(spent[k] for k in ("phi on the maps: choose pixels", "loss", "backward of phi and loss"))
        print(f"\nPix2Rep, {loss}, {o.pretrain_batch} slices of {o.size}x{o.size}, two views each, width {o.width}, D {o.dim}, "
              f"d {o.projection}, {o.precision}: {o.pretrain_batch / total:.0f} slices a second; loss and warp of the maps "
              f"{100 * ours / total:.1f} % of a step")
        print_parts(spent)
    for name, loss, sizes in (("InfoNCE", lambda z: pix2rep.info_nce_loss(*z, .1), (250, 500, 1000, 2000, 4000)),
                              ("Barlow Twins", lambda z: pix2rep.barlow_twins_loss(*z, 5e-3), (1000, 4000, 16000, 64000))):
        print(f"\n{name}, forward and backward, d = 64 (memory: what the forward pass keeps for the backward pass)\n"
              " pixels   seconds     memory   a matrix of 2n x 2n")
        for n in sizes:
            z = torch.randn(2, n, 64, device=device, requires_grad=True)
            seconds, megabytes = saved_megabytes(lambda: loss(z))
            print(f"{n:7} {seconds:9.4f} {megabytes:7.1f} MB {4 * (2 * n) ** 2 / 1e6:12.0f} MB")


def dense_loss_by_loop(z_a, z_b, position, threshold, temperature):
    """L_d as a loop over pixels, each of them one L_g, as the authors' code computes it."""
    h, w = z_a.shape[2:]
    pixels = [macl.global_contrastive_loss(z_a[:, :, y, x], z_b[:, :, y, x], position, threshold, temperature)
              for y in range(h) for x in range(w)]
    return torch.stack(pixels).mean()


def macl_shares(o, dataset, device):
    """Seconds a step in each part of MACL's pre-training: the lines of `macl.pretrain`, each part timed."""
    unet = common.UNet(1, 2, o.width).to(device, memory_format=torch.channels_last)
    heads = macl.Heads(unet.encoder.widths, o.decoder_blocks, o.eq7).to(device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW([*unet.encoder.parameters(), *unet.decoder.parameters(), *heads.parameters()], 1e-3)
    numbers = np.arange(len(dataset.volume))

    def one_step(mark):
        views, pick = macl.view_batch(dataset, numbers, o, device)
        mark()
        with torch.autocast(device.type, o.dtype, enabled=o.dtype != torch.float32):
            pair = macl.branches(unet, heads, views, o)
        mark()
        position = torch.from_numpy(dataset.position[pick])
        loss = (o.lambda1 * macl.global_contrastive_loss(*pair["g"], position, o.threshold, o.temperature)
                + o.lambda2 * macl.dense_contrastive_loss(*pair["l"], position, o.threshold, o.temperature)
                + o.lambda3 * macl.equivariant_loss(*pair["y"]))
        mark()
        optimiser.zero_grad()
        loss.backward()
        mark()
        optimiser.step()
        mark()
    return seconds_by_part(one_step, ["sample, read, augment", "forward", "losses", "backward", "optimiser"], device)


def macl_tables(arguments, root, cases, device, cache):
    """Print the dense loss against its loop at the paper's size, and where a step of MACL goes."""
    z = [torch.randn(16, 128, 32, 32, device=device, requires_grad=True) for _ in range(2)]
    position = torch.rand(16)
    print("\nL_d, forward and backward, batch 16, 32 x 32 positions, 128 channels\n              seconds     memory   times faster")
    loop = saved_megabytes(lambda: dense_loss_by_loop(*z, position, .35, .1))
    once = saved_megabytes(lambda: macl.dense_contrastive_loss(*z, position, .35, .1))
    for name, (seconds, megabytes) in (("loop", loop), ("batched", once)):
        print(f"{name:10} {seconds:10.4f} {megabytes:7.1f} MB {loop[0] / seconds:12.1f}")
    o = macl.parse_options(["--precision", arguments.precision] + (["--data", str(root)] if arguments.data else []))
    macl.resolve(o, cases)
    spent = macl_shares(o, common.prepare(cases, o.spacing, o.pretrain_size, cache), device)
    total = sum(spent.values())
    print(f"\nMACL, {o.pretrain_batch} slices of {o.pretrain_size}x{o.pretrain_size}, {o.precision}: {o.pretrain_batch / total:.0f} "
          "slices a second")
    print_parts(spent)


def balanced_loss_by_loop(z, y, temperature):
    """The class-balanced contrast of groups [G, n, d] as a loop over pixels, straight from its formula."""
    L = []
    for group, labels in zip(F.normalize(z, dim=-1), y):
        same = labels[:, None] == labels
        N = same.sum(0)                                                    # [n]: pixels of each one's class
        for i in range(len(group)):
            others = torch.arange(len(group)) != i
            sim, own = group[others] @ group[i] / temperature, same[i][others]
            log_sum = (sim.exp() / (N[others] - own.float())).sum().log()
            L.append((log_sum - sim[own]).mean())
    return torch.stack(L).mean()


def cct_shares(o, dataset, students, device):
    """Seconds a step in each part of CCT-R's training: the lines of `cct_r.train`, on made-up warped labels and places."""
    banks = torch.nn.ModuleList(cct_r.MemoryBank(o.bank, o.projection) for _ in range(2)).to(device)
    optimiser = torch.optim.AdamW(students.parameters(), 1e-3)
    N, S, numbers = len(dataset.volume), o.size, np.arange(len(dataset.volume))
    warped, places = torch.randint(4, (N, S, S)), 30 * torch.randn(N, 3, S, S)

    def one_step(mark):
        labelled = cct_r.draw_batch(dataset, numbers, o.batch // 4, None, places, o, device)
        rest = cct_r.draw_batch(dataset, numbers, o.batch // 4, warped, places, o, device)
        mark()
        L, weight = cct_r.terms(students, banks, labelled, rest, o.steps - 1, o)
        mark()
        optimiser.zero_grad()
        sum(weight[k] * L[k] for k in L).backward()
        mark()
        optimiser.step()
        mark()
    return seconds_by_part(one_step, ["sample, read, augment", "networks and losses, forward", "backward", "optimiser"], device)


def cct_tables(arguments, root, cases, device, cache):
    """Print where a step of CCT-R goes, and what its loops would cost."""
    o = cct_r.parse_options(["--precision", arguments.precision] + (["--data", str(root)] if arguments.data else []))
    cct_r.resolve(o, cases)
    dataset = common.prepare(cases, o.spacing, o.size, cache)
    students = cct_r.Students(dataset.info["channels"], 4, o).to(device, memory_format=torch.channels_last)
    every = cct_shares(o, dataset, students, device)
    print(f"\nCCT-R, two networks, {o.batch // 4} + {o.batch // 4} slices of {o.size}x{o.size}, {o.precision}: "
          f"{1000 * sum(every.values()):.0f} ms a step")
    print_parts(every)
    for part in ("no_reps", "no_contrast"):                                # one more off each time
        setattr(o, part, True)
        less = sum(cct_shares(o, dataset, students, device).values())
        print(f"  --{part.replace('_', '-'):26} {1000 * less:7.1f} ms  {100 * less / sum(every.values()):5.1f} %")
    n = 2 * (o.batch // 2) * (o.block // 2) ** 2
    z, y = torch.randn(o.groups, n, o.projection, device=device, requires_grad=True), torch.randint(4, (o.groups, n), device=device)
    loop, once = (saved_megabytes(lambda: f(z, y, .1)) for f in (balanced_loss_by_loop, cct_r.balanced_contrastive_loss))
    print(f"contrast of {o.groups} groups of {n} pixels, forward and backward: loop {loop[0]:.3f} s, {loop[1]:.0f} MB; by classes "
          f"{once[0]:.4f} s, {once[1]:.0f} MB; {loop[0] / once[0]:.0f} times faster")
    shape, step = cct_r.registration_grid(dataset)
    frame = cct_r.Frame(dataset, 0, shape, step, 4)
    grid = lambda v: cct_r.on_grid(cct_r.stack(dataset, v), cct_r.voxels(dataset, v)[1], cct_r.points(shape, step))
    moving, seconds = torch.cat([grid(v) for v in range(1, 9)]), {}
    for size in (8, 1):
        begin = clock(device)
        for some in moving.split(size):
            cct_r.register_batch(frame, some, step, o.stiffness)
        seconds[size] = clock(device) - begin
    print(f"registration of 8 volumes to one, both ways: one by one {seconds[1]:.1f} s, as a batch {seconds[8]:.1f} s")


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
        spent = sal_shares(o, dataset, device)
        total = sum(spent.values())
        print(f"pre-training, {2 * o.pairs} views of {o.size}x{o.size}, width {o.width}, {o.precision}, {device}, "
              f"{torch.get_num_threads()} threads: {2 * o.pairs / total:.0f} slices a second")
        print_parts(spent)
        print("\nWLA, forward and backward, 4 pairs of 64x48x48\n  r   seconds   of r = 1   similarity matrices   of r = 1")
        base = wla_cost(1, device)
        for r in (1, 2, 3, 4, 6, 8, 12):
            seconds, megabytes = wla_cost(r, device)
            print(f"{r:3} {seconds:9.4f} {seconds / base[0]:10.3f} {megabytes:17.1f} MB {megabytes / base[1]:10.4f}")
        pix2rep_tables(arguments, root, cases, dataset, device)
        macl_tables(arguments, root, cases, device, Path(folder) / "cache")
        cct_tables(arguments, root, cases, device, Path(folder) / "cache")


if __name__ == "__main__":
    main()
