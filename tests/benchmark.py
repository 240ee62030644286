"""Speed, run by hand: python tests/benchmark.py [--chapters 1 3] [--data PATH] [OPTIONS]

Prints tables; ratios within one run are what counts. OPTIONS are those of the scripts, such as
--precision bfloat16. Chapters, each of which runs by itself:

1. SAL: slices a second of pre-training, and where a step goes (aim: at most 10 % to sample, read
   and augment).
2. SAL: time and memory of WLA, forward and backward, against r: the paper's (hw)^2 / r^2.
3. Pix2Rep: where a step of pre-training goes with either loss (aim: at most 25 % to loss and warp
   of the maps); time and memory of the losses against the number of pixels.
4. MACL: the dense loss as one batched product against the same loss as a loop over pixels (aim: at
   least 20 times faster); where a step of pre-training goes.
5. CCT-R: where a step of training goes, and without REPS and contrast; the class-balanced contrast
   by sums over classes against a loop over pixels; registering volumes in a batch against one by
   one.
6. The start: preparing the slices of a dataset, and opening the prepared ones.
7. Scoring: HD95 and ASSD by searching between surface voxels against distance maps of the whole
   image, for good and for bad predictions (aim: 10 times faster for bad ones on CT).
8. Rows: four rows from scratch by one process with all threads, and by --workers, which share them
   (as many as there are threads, on a GPU eight; about 1.1 is what two cores give).
"""
import argparse
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

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
from common import clock

WARM_UP = 3                                                        # steps that are not counted


class Setup(NamedTuple):
    """What all chapters share."""
    words: list                                                    # options for the scripts
    folder: Path                                                   # removed in the end
    device: torch.device
    steps: int                                                     # of a training loop, to time
    repeats: int                                                   # of a loss: the best one counts


def opened(setup, script, *words):
    """The `Run` of a script, as its main opens it, in a folder of its own."""
    out = tempfile.mkdtemp(dir=setup.folder)
    here = ["--cache", str(setup.folder / "cache"), "--out", out + "/o"]
    options = [*setup.words, *here, *words]
    run = common.Run(common.parse_options(script.METHOD, "", script.OPTIONS, options))
    script.check(run)
    run.begin()
    return run


# ----------------------------------------------------------------------------------------- clocks


def seconds_in_loop(setup, run, train, functions, rest="forward, losses"):
    """Mean seconds of a step of the loop in train() in each part, {part: seconds}.

    functions: [(module or class, name of its function, part)], timed wherever they are called;
    rest: what remains of a step, less backward pass and optimiser, which are timed as well. The
    steps are the last of the training, when every term of a loss counts.
    """
    spent = {}

    def timed(function, part):
        def with_clock(*arguments, **options):
            begin = clock(run.device)
            result = function(*arguments, **options)
            spent[part] = spent.get(part, 0) + clock(run.device) - begin
            return result
        return with_clock

    def steps(phase, total, modules, optimiser):
        optimiser.step = timed(optimiser.step, "optimiser")
        for n in range(-WARM_UP, setup.steps):
            if n == 0:
                spent.clear()
                begin = clock(run.device)
            yield total - setup.steps + n
        whole = clock(run.device) - begin
        spent[rest] = whole - sum(spent.values())

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(run, "steps", steps))
        for owner, name, part in [*functions, (torch.Tensor, "backward", "backward")]:
            function = timed(getattr(owner, name), part)
            patches.enter_context(mock.patch.object(owner, name, function))
        train()
    return {part: seconds / setup.steps for part, seconds in spent.items()}


def seconds_by_mark(setup, one_step, parts):
    """Mean seconds of a step in each part, {name: seconds}.

    one_step(mark) does a step and calls mark() at the end of every part; a name that stands in
    `parts` twice gets both.
    """
    spent = dict.fromkeys(parts, 0.)
    for n in range(-WARM_UP, setup.steps):
        marks = [clock(setup.device)]

        def mark():
            marks.append(clock(setup.device))

        one_step(mark)
        if n >= 0:
            for part, begin, end in zip(parts, marks[:-1], marks[1:], strict=True):
                spent[part] += (end - begin) / setup.steps
    return spent


def print_parts(spent):
    """A line a part: milliseconds, and the share of the step."""
    whole = sum(spent.values())
    for part, seconds in spent.items():
        print(f"  {part:30} {1000 * seconds:7.1f} ms  {100 * seconds / whole:5.1f} %")


def seconds_and_megabytes(setup, loss_of):
    """The best time of loss_of().backward(), and the MB its forward keeps for the backward pass."""
    times = []
    for _ in range(setup.repeats):
        held = {}

        def keep(x):
            storage = x.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
            return x

        def give_back(x):
            return x

        begin = clock(setup.device)
        with torch.autograd.graph.saved_tensors_hooks(keep, give_back):
            loss = loss_of()
        loss.backward()
        times.append(clock(setup.device) - begin)
    return min(times), sum(held.values()) / 1e6


# ------------------------------------------------------------------------------------ 1 and 2: SAL


def sal_chapter(setup):
    """Where a step of SAL's pre-training goes."""
    run = opened(setup, sal)
    o = run.o

    def train():
        sal.pretrain(run)

    spent = seconds_in_loop(setup, run, train, [(sal, "pair_batch", "sample, read, augment")])
    a_second = 2 * o.pairs / sum(spent.values())
    print(f"\nSAL, {2 * o.pairs} views of {o.size}x{o.size}, width {o.width}, {o.precision}: "
          f"{a_second:.0f} slices a second")
    print_parts(spent)


def wla_chapter(setup, pairs=4, channels=64, size=48):
    """The cost of WLA against r; MB: the similarity matrices, computed."""
    print(f"\nWLA, forward and backward, {pairs} pairs of {channels} x {size} x {size} maps\n"
          "  r   seconds   of r = 1   similarity matrices   of r = 1")
    shape = (2, pairs, channels, size, size)
    x = torch.randn(shape, device=setup.device, requires_grad=True)
    first = {}
    for r in (1, 2, 3, 4, 6, 8, 12):
        def loss():
            return sal.local_alignment_loss(*x.unbind(0), r)

        seconds, _ = seconds_and_megabytes(setup, loss)
        megabytes = 4 * pairs * size ** 4 / r ** 2 / 1e6
        first = first or {"seconds": seconds, "megabytes": megabytes}
        print(f"{r:3} {seconds:9.4f} {seconds / first['seconds']:10.3f} "
              f"{megabytes:17.1f} MB {megabytes / first['megabytes']:10.4f}")


# -------------------------------------------------------------------------------------- 3: Pix2Rep

PIX2REP_PARTS = ["read, augment, move the images", "U-Net forward", "phi on the maps",
                 "widen, project", "loss", "loss, backward", "widen, project, backward",
                 "phi on the maps, backward", "U-Net backward", "optimiser"]
LOSS_AND_WARP = ["phi on the maps", "loss", "loss, backward", "phi on the maps, backward"]


def cut(x):
    """A copy of x at which the backward pass stops."""
    return x.detach().requires_grad_()


def pix2rep_loss(o, z_a, z_b):
    """The loss that the options name."""
    if o.loss == "infonce":
        return pix2rep.info_nce_loss(z_a, z_b, o.temperature)
    return pix2rep.barlow_twins_loss(z_a, z_b, o.lam)


def pix2rep_step(run, nets, optimiser, mark):
    """A step of `pix2rep.pretrain`, with its backward pass cut between the parts of PIX2REP_PARTS.

    nets: (f, g).
    """
    o = run.o
    f, g = nets
    n = o.pixels if o.loss == "infonce" else None
    pool = common.pretraining_slices(run, run.dataset)
    t_x, phi_t_x, grid, valid = pix2rep.view_batch(run, pool)      # [B, C, S, S] each, and phi
    mark()
    with run.autocast():
        maps = torch.cat(pix2rep.two_maps(f, t_x, phi_t_x, o.one_pass))    # [2B, width, S, S]
    mark()
    maps_cut = cut(maps)
    with run.autocast():
        pairs = pix2rep.pixel_pairs(*maps_cut.chunk(2), grid, valid, n)
        pairs = torch.cat(pairs)                                   # [2n, width]
    mark()
    pairs_cut = cut(pairs)
    with run.autocast():
        z = g(f.widen(pairs_cut))                                  # [2n, d]
    mark()
    z_cut = cut(z)
    loss = pix2rep_loss(o, *z_cut.chunk(2))
    mark()
    optimiser.zero_grad()
    loss.backward()
    mark()
    z.backward(z_cut.grad)
    mark()
    pairs.backward(pairs_cut.grad)
    mark()
    maps.backward(maps_cut.grad)
    mark()
    optimiser.step()
    mark()


def pix2rep_parts(setup, loss):
    """Where a step of Pix2Rep's pre-training goes with this loss."""
    run = opened(setup, pix2rep, "--loss", loss)
    o = run.o
    f = run.place(pix2rep.load_backbone(run))
    g = pix2rep.projector(o).to(run.device)
    parameters = [*f.unet.encoder.parameters(), *f.unet.decoder.parameters(),
                  *f.widen.parameters(), *g.parameters()]
    optimiser = torch.optim.AdamW(parameters, 1e-3)

    def one_step(mark):
        pix2rep_step(run, (f, g), optimiser, mark)

    spent = seconds_by_mark(setup, one_step, PIX2REP_PARTS)
    whole = sum(spent.values())
    share = sum(spent[part] for part in LOSS_AND_WARP) / whole
    print(f"\nPix2Rep, {loss}, {o.pretrain_batch} slices of {o.size}x{o.size}, two views each, "
          f"width {o.width}, D {o.dim}, d {o.projection}, {o.precision}: "
          f"{o.pretrain_batch / whole:.0f} slices a second; loss and warp of the maps "
          f"{100 * share:.1f} % of a step")
    print_parts(spent)


def info_nce(z):
    """InfoNCE of the two views in z."""
    return pix2rep.info_nce_loss(*z, .1)


def barlow_twins(z):
    """Barlow Twins of the two views in z."""
    return pix2rep.barlow_twins_loss(*z, 5e-3)


def pix2rep_chapter(setup):
    """Where a step goes with either loss, and each loss's cost against the number of pixels."""
    for loss in ("infonce", "barlow"):
        pix2rep_parts(setup, loss)
    for title, loss_of, sizes in (("InfoNCE", info_nce, (250, 500, 1000, 2000, 4000)),
                                  ("Barlow Twins", barlow_twins, (1000, 4000, 16000, 64000))):
        print(f"\n{title}, forward and backward, d = 64 (MB: kept for the backward pass)\n"
              " pixels   seconds     memory   a matrix of 2n x 2n")
        for n in sizes:
            z = torch.randn(2, n, 64, device=setup.device, requires_grad=True)

            def loss():
                return loss_of(z)

            seconds, megabytes = seconds_and_megabytes(setup, loss)
            matrix = 4 * (2 * n) ** 2 / 1e6
            print(f"{n:7} {seconds:9.4f} {megabytes:7.1f} MB {matrix:12.0f} MB")


# ----------------------------------------------------------------------------------------- 4: MACL


def dense_loss_by_loop(z_a, z_b, position):
    """L_d as a loop over pixels, each of them one L_g, as the authors' code computes it."""
    h, w = z_a.shape[2:]
    of_pixel = []
    for y in range(h):
        for x in range(w):
            a = z_a[:, :, y, x]
            b = z_b[:, :, y, x]
            of_pixel.append(macl.global_contrastive_loss(a, b, position, .35, .1))
    return torch.stack(of_pixel).mean()


def macl_chapter(setup):
    """The dense loss against its loop at the paper's size, and where a step of MACL goes."""
    z = torch.randn(2, 16, 128, 32, 32, device=setup.device, requires_grad=True)
    position = torch.rand(16)

    def loop():
        return dense_loss_by_loop(*z, position)

    def batched():
        return macl.dense_contrastive_loss(*z, position, .35, .1)

    print("\nL_d, forward and backward, batch 16, 32 x 32 positions, 128 channels\n"
          "              seconds     memory   times faster")
    slow, much = seconds_and_megabytes(setup, loop)
    print(f"loop       {slow:10.4f} {much:7.1f} MB")
    seconds, megabytes = seconds_and_megabytes(setup, batched)
    print(f"batched    {seconds:10.4f} {megabytes:7.1f} MB {slow / seconds:12.1f}")
    run = opened(setup, macl)
    o = run.o
    large = common.prepare(run.cases, o.spacing, o.pretrain_size, o.cache)

    def train():
        macl.pretrain(run, large)

    parts = [(common, "random_slices", "sample, read, augment"),
             (common.SliceDataset, "image", "sample, read, augment"),
             (macl, "four_views", "sample, read, augment"),
             (macl, "global_contrastive_loss", "losses"),
             (macl, "dense_contrastive_loss", "losses"),
             (macl, "equivariant_loss", "losses")]
    spent = seconds_in_loop(setup, run, train, parts, rest="forward")
    a_second = o.pretrain_batch / sum(spent.values())
    print(f"\nMACL, {o.pretrain_batch} slices of {o.pretrain_size}x{o.pretrain_size}, width "
          f"{o.width}, {o.precision}: {a_second:.0f} slices a second")
    print_parts(spent)


# ---------------------------------------------------------------------------------------- 5: CCT-R


def contrast_by_loop(z, y, temperature):
    """`cct_r.balanced_contrastive_loss` of groups [G, n, d] as a loop over pixels."""
    L = []
    for group, labels in zip(F.normalize(z, dim=-1), y):
        same = labels[:, None] == labels                           # [n, n]
        N = same.sum(0)                                            # [n]: pixels of each one's class
        for i in range(len(group)):
            others = torch.arange(len(group), device=z.device) != i
            own = same[i][others]                                  # [n - 1]
            sim = group[others] @ group[i] / temperature
            weight = N[others] - own.float()
            log_total = (sim.exp() / weight).sum().log()
            L.append((log_total - sim[own]).mean())
    return torch.stack(L).mean()


def print_contrast(setup, o):
    """The class-balanced contrast by sums over classes against the loop."""
    n = 2 * (o.labelled_batch + o.unlabelled_batch) * (o.block // 2) ** 2
    shape = (o.groups, n, o.projection)
    z = torch.randn(shape, device=setup.device, requires_grad=True)
    y = torch.randint(4, (o.groups, n), device=setup.device)

    def loop():
        return contrast_by_loop(z, y, .1)

    def by_classes():
        return cct_r.balanced_contrastive_loss(z, y, .1)

    slow, much = seconds_and_megabytes(setup, loop)
    seconds, megabytes = seconds_and_megabytes(setup, by_classes)
    print(f"contrast of {o.groups} groups of {n} pixels, forward and backward: loop {slow:.3f} s, "
          f"{much:.0f} MB; by classes {seconds:.4f} s, {megabytes:.0f} MB; "
          f"{slow / seconds:.0f} times faster")


def print_registration(run):
    """Registering volumes to one in a batch against one by one."""
    shape, step = cct_r.registration_grid(run)
    grid = cct_r.points(shape, step)
    labelled = [n for n, case in enumerate(run.cases) if case.label]
    frame = cct_r.Frame(run, labelled[0])
    volumes = [cct_r.on_grid(run.dataset, n, grid) for n in labelled[1:9]]
    moving = torch.cat(volumes)                                    # [8, 2, Z, Y, X]
    seconds = []
    for size in (1, len(moving)):
        begin = time.perf_counter()
        for some in moving.split(size):
            cct_r.register_batch(frame, some, step, run.o.stiffness)
        seconds.append(time.perf_counter() - begin)
    print(f"registration of {len(moving)} volumes to one, both ways: one by one {seconds[0]:.1f} "
          f"s, as a batch {seconds[1]:.1f} s")


def cct_r_chapter(setup):
    """Where a step of CCT-R goes, on made-up warped labels and places; and its loops' cost."""
    run = opened(setup, cct_r, "--no-peek")
    o = run.o
    N = len(run.dataset.volume)
    registered = SimpleNamespace(warped=torch.randint(4, (N, o.size, o.size)),
                                 places=30 * torch.randn(N, 3, o.size, o.size))
    parts = [(cct_r, "draw_batch", "sample, read, augment")]

    def train():
        row = common.Row("cct_r", 1, 0)
        cct_r.train(run, row, registered)

    spent = seconds_in_loop(setup, run, train, parts)
    whole = sum(spent.values())
    print(f"\nCCT-R, two networks, {o.labelled_batch} + {o.unlabelled_batch} slices of "
          f"{o.size}x{o.size}, width {o.width}, {o.precision}: {1000 * whole:.0f} ms a step")
    print_parts(spent)
    for part in ("no_reps", "no_contrast"):                        # one more off each time
        setattr(o, part, True)
        less = sum(seconds_in_loop(setup, run, train, parts).values())
        flag = "--" + part.replace("_", "-")
        print(f"  {flag:30} {1000 * less:7.1f} ms  {100 * less / whole:5.1f} %")
    print_contrast(setup, o)
    print_registration(run)


# ------------------------------------------------------------------------------------ 6: the start


def start_chapter(setup):
    """Finding and preparing a dataset, and opening the prepared slices."""
    run = opened(setup, sal)
    o = run.o
    cache = tempfile.mkdtemp(dir=setup.folder)
    times = []
    for _ in range(2):
        begin = time.perf_counter()
        cases = data.find_cases(run.root)
        dataset = common.prepare(cases, o.spacing, o.size, cache)
        times.append(time.perf_counter() - begin)
    print(f"\nstart on {len(cases)} volumes: first {times[0]:.2f} s, then {times[1]:.2f} s (ratio "
          f"{times[0] / times[1]:.0f}); {dataset.images.nbytes / 1e6:.0f} MB of images, "
          "memory-mapped")


# -------------------------------------------------------------------------------------- 7: scoring


def distance_map(points, spacing):
    """Distance in mm of every voxel to the nearest True voxel, one axis after the other.

    Along an axis:  d_i = min_j  d_j + (i - j)^2   for squared distances d.
    """
    d = np.where(points, 0., np.inf)
    for axis, mm in enumerate(spacing):
        d = np.moveaxis(d, axis, 0)                                # [n, ...]
        away = (np.arange(len(d)) * mm) ** 2
        away = away.reshape(-1, *[1] * (d.ndim - 1))               # [n, 1, 1]
        out = np.full_like(d, np.inf)
        for j, row in enumerate(d):
            np.minimum(out[j:], row + away[:len(d) - j], out=out[j:])
            np.minimum(out[:j], row + away[j:0:-1], out=out[:j])
        d = np.moveaxis(out, 0, axis)
    return np.sqrt(d)


def distances_by_map(pred, truth, spacing):
    """`common.surface_distances` by distance maps of the box that holds both masks."""
    found = np.argwhere(pred | truth)
    box = tuple(slice(lo, hi + 1) for lo, hi in zip(found.min(0), found.max(0)))
    a = common._surface(pred[box])
    b = common._surface(truth[box])
    ab = distance_map(b, spacing)[a]
    ba = distance_map(a, spacing)[b]
    hd95 = max(np.percentile(ab, 95), np.percentile(ba, 95))
    return hd95, np.concatenate([ab, ba]).mean()


def made_up_predictions(truth):
    """{title: label map}: the truth moved by a voxel or two, with islands, and blobs of noise."""
    classes = int(truth.max()) + 1
    rng = np.random.default_rng(0)
    moved = np.roll(truth, (1, 2, -1), (0, 1, 2))
    islands = moved.copy()
    for k in range(1, classes):
        for corner in rng.integers(0, truth.shape, (40, 3)):
            islands[tuple(slice(n, n + 3) for n in corner)] = k
    noise = rng.normal(size=(classes, *truth.shape))
    noise = torch.from_numpy(noise).float()
    for _ in range(2):
        noise = F.avg_pool3d(noise, 5, 1, 2)
    blobs = noise.argmax(0).numpy()
    return {"moved a little": moved, "and with 40 islands a class": islands, "noise": blobs}


def scoring_chapter(setup):
    """HD95 and ASSD of every class of one test volume in both ways, and their difference."""
    run = opened(setup, sal)
    case = next(case for case in run.cases if case.patient in run.split["test"] and case.label)
    volume = data.read_case(case, run.cases)
    truth = volume.label
    print(f"\nHD95 and ASSD of {case.name}, {truth.shape}, {len(run.classes) - 1} classes\n"
          "prediction                        maps   surfaces   times faster   difference")
    for title, pred in made_up_predictions(truth).items():
        seconds = []
        results = []
        for distances in (distances_by_map, common.surface_distances):
            begin = time.process_time()
            results.append([distances(pred == k, truth == k, volume.spacing)
                            for k in np.unique(truth)[1:]])
            seconds.append(time.process_time() - begin)
        difference = np.abs(np.subtract(*results)).max()
        print(f"{title:28} {seconds[0]:7.2f} s {seconds[1]:8.2f} s "
              f"{seconds[0] / seconds[1]:14.1f} {difference:9.0e} mm")


def rows_an_hour(setup, *words):
    """Rows from scratch an hour of a run of four, as a user starts it."""
    cache = opened(setup, sal).o.cache                             # prepared, so it is not timed
    out = tempfile.mkdtemp(dir=setup.folder)
    command = [sys.executable, sal.__file__, *setup.words, "--rows", "scratch", "--labelled", "1"]
    command += ["--seeds", "0", "1", "2", "3", "--cache", cache, "--out", f"{out}/run", *words]
    begun = time.time()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return 4 * 3600 / (time.time() - begun)


def workers_chapter(setup):
    """Rows an hour by one process and by --workers."""
    workers = 8 if setup.device.type == "cuda" else torch.get_num_threads()
    print(f"\n8. Four rows from scratch, {torch.get_num_threads()} threads")
    alone = rows_an_hour(setup)
    together = rows_an_hour(setup, "--workers", str(workers))
    print(f"  one process        {alone:6.0f} rows an hour")
    ratio = together / alone
    print(f"  --workers {workers}        {together:6.0f} rows an hour, {ratio:.2f} times as many")


CHAPTERS = {1: sal_chapter, 2: wla_chapter, 3: pix2rep_chapter, 4: macl_chapter, 5: cct_r_chapter,
            6: start_chapter, 7: scoring_chapter, 8: workers_chapter}


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chapters", type=int, nargs="+", choices=CHAPTERS, default=[*CHAPTERS],
                        metavar="N", help="1 to 8 (default: all)")
    parser.add_argument("--data", help="a dataset (default: the phantom)")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--timed-steps", type=int, default=20, help="of a training loop")
    parser.add_argument("--repeats", type=int, default=8, help="of a loss: the best one counts")
    o, words = parser.parse_known_args()                           # the rest is for the scripts
    device = common.pick_device(o.device)
    words += ["--device", o.device]
    words += ["--data", o.data] if o.data else []
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(words, Path(folder), device, o.timed_steps, o.repeats)
        for n in o.chapters:
            CHAPTERS[n](setup)


if __name__ == "__main__":
    common.run_main(main)
