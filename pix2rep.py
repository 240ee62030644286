"""Pix2Rep: Dense Self-Supervised Learning for Medical Image Segmentation (Seince et al.; MIDL 2024;
arXiv 2407.20395).

    python pix2rep.py                                     the built-in phantom, no data needed
    python pix2rep.py --loss barlow --mean-teacher        the other loss; Mean Teacher as well
    python pix2rep.py --data path/to/acdc                 real scans: pre-train, fine-tune, score
    python pix2rep.py --predict IMAGES --checkpoint FILE.pt   segment new volumes

Give every pixel a vector: f, the whole U-Net, with an output map of D channels. Moving an image by
phi must move its vectors, and changing its intensities by t must change nothing:
phi(f(t(x))) = f(phi(t'(x))), pixel by pixel. InfoNCE pulls the two vectors of a pixel together and
pushes n sampled pixels apart; Barlow Twins makes their channels agree and be uncorrelated. No label
is used. Then few labels teach a 1x1 head (linear probing) or the whole network (fine-tuning).

Paper, code, and what we chose. [paper]: MIDL 2024; [v2]: Pix2Rep-v2, arXiv 2609.01427; [code]: the
published code, which has the contrastive loss only and does not run as it stands; [ours]: silent
there, or changed by us. What came out: results/pix2rep.md.
 1. Symmetric InfoNCE (the names of the equations are ours) over the 2n vectors of n pixels sampled
    from the whole batch, without replacement, n = 1000, tau = 0.53 [code]; tau = 0.1 [ours].
 2. Barlow Twins over all valid pixels of the batch, lambda = 5e-3, d = 256 [v2]; d = 64 [ours].
 3. The ground-truth trap: the published code crops every volume with the box of its ground-truth
    mask, at test time too, and pre-trains without the slices whose mask is empty: both leak the
    answer. We crop about the image centre, keep all slices, and read labels in fine-tuning and
    scoring only. The code scores soft Dice with background on its crops: not comparable with ours.
 4. No mask in the code: it samples pixels that phi brought in from outside the image as well. We
    carry a validity mask through phi and sample only pixels whose pre-image, with its neighbours
    for the interpolation, lies inside [ours].
 5. phi is one affine per image: rotation up to pi/2, crop of side 0.33 to 0.95 at a random place,
    flips [code]; crop 0.7 to 1 [ours]. One grid moves the image and the features.
 6. phi comes after the projector g, and each view has a forward pass of its own [code]. g and our
    widening layer see single pixels, so phi comes before them, on the narrow map of the U-Net: the
    same up to interpolation and batch statistics, and a fraction of the cost [ours]. Each view has
    a pass and batch statistics of its own here too (`--one-pass`: one for both).
 7. t, t': noise, blur, gamma, bias field, inversion [code]; `common.photometric`, which all our
    methods use, without inversion (`--inversion`; it slowed learning down) [ours].
 8. U-Net of width 64 with 5 poolings; a double convolution makes its map of D = 1024 channels
    [code]; width 16, 4 poolings, and the last map of 16 channels widened to D = 64 by a 1x1 layer,
    so that the trunk starts the same U-Net as every other method's [ours].
 9. Pre-training: Adam, constant 4.7e-4, 200 epochs, batches of 8 [code]; AdamW 5e-4, warm-up,
    cosine [v2]; the same schedule with 1e-3, batches of 8 [ours].
10. Linear probing: backbone frozen, a 1x1 head on the D channels, Adam 7.6e-3, soft Dice, 200
    epochs [code]; AdamW 3e-2, cosine, cross-entropy + Dice. Its row from scratch is a frozen random
    backbone whose batch statistics are set by 20 batches of training slices [ours].
11. Fine-tuning: Adam 5e-5 backbone, 1e-2 head, soft Dice, 200 epochs, early stopping [code]; AdamW
    1e-3, 5e-3, cosine, cross-entropy + Dice, a new head on the trunk, so that the network is that
    of the row from scratch [ours].
12. Mean Teacher on top [paper]; its details are ours: half of every batch unlabelled, squared
    difference of probabilities, summed over classes; the teacher, in eval mode, sees the slice
    without change of intensities; weight 5 after a ramp of 40 % of the steps; the teacher is
    scored. So these rows see half as many labelled slices. The unlabelled half has a forward pass
    of its own: in one batch, normalisation told the halves apart (Dice 0.73 -> 0.59).
13. Few-shot: random patients, of n different groups for n < 5, else the same number from each of
    ACDC's five [code]; here the first n in the split's order, as in our other methods, or where 5
    divides n the same number of every group, in the split's order [ours].
14. The checkpoint that is best on held-out slices of the same patients is scored [code]; we score
    the last. One pre-training serves all seeds, so the spread over seeds is that of fine-tuning
    [ours].
15. Fig. 2 has several chosen queries on test images [paper]; ours the middle pixel of each class.
    Fig. 4 reduces the vectors to a plane by t-SNE [paper]; ours by PCA.

Letters: B slices in a batch, n sampled pixels, P valid pixels, C channels of an image (in Barlow
Twins the correlations), D of the output map, W of the trunk's, d of the projector, S network size,
V slices in a figure, U unlabelled slices, K classes.
"""
import copy
import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import UNet, cosine, photometric, spatial_grid, uniform, warp

METHOD = "pix2rep"
PRETRAINED = ["probe", "pix2rep", "pix2rep-mt"]                    # rows that pre-training starts

# ---------------------------------------------------------------------------------------- options

# name, on real data, on the phantom (None: the same), in the code (None: not known), what it is
OPTIONS = [
    ("labelled", [1, 3, 7], [1], None, "numbers of labelled patients"),
    ("seeds", [0, 1, 2], [0], None, "seeds of probing and fine-tuning"),
    ("width", 16, None, 64, "channels of the first U-Net level"),
    ("depth", 4, None, 5, "poolings of the U-Net"),
    ("dim", 64, None, 1024, "D, channels of the output map"),
    ("projection", 64, None, 256, "d, width of the projector g"),
    ("spacing", None, 2.5, 1.5, "mm a pixel in plane; 2 on ACDC (1.5 for the code's size: ours)"),
    ("size", None, 64, 128, "S, crop in pixels, divisible by 2^depth; 96 on ACDC"),
    ("loss", "infonce", None, None, "infonce (MIDL 2024) or barlow (v2)"),
    ("pretrain_data", [], None, None, "folders to pre-train on instead of --data; need no labels"),
    ("pretrain_steps", 8000, 700, 32800,
     "steps of pre-training (code: 200 epochs; 32800 is that on ACDC with 8 a step)"),
    ("pretrain_batch", 8, None, 8, "B, slices a step, two views each"),
    ("pretrain_lr", 1e-3, None, 4.7e-4, "AdamW, 5 % warm-up, cosine to 0 (v2: 5e-4)"),
    ("pixels", 1000, None, 1000, "n, pixels of InfoNCE a step"),
    ("temperature", .1, None, .53, "tau of InfoNCE"),
    ("lam", 5e-3, None, None, "lambda of Barlow Twins (v2: 5e-3)"),
    ("pretrain_seed", 1000, None, None, "seed of pre-training"),
    ("pretrain_rotation", math.pi / 2, None, math.pi / 2, "largest rotation of phi in rad"),
    ("crop", [.7, 1.], None, [.33, .95],
     "smallest and largest side of phi's crop, as a share of the image's"),
    ("one_pass", False, None, None, "ablation: both views share a pass and its batch statistics"),
    ("inversion", 0., None, .35, "probability that t inverts intensities"),
    ("probe_steps", 300, 120, None, "steps of the 1x1 head (code: 200 epochs)"),
    ("probe_lr", 3e-2, None, 7.6e-3, "of the head on a frozen backbone, AdamW, cosine to 0"),
    ("steps", 4800, 240, None, "steps of fine-tuning, also from scratch (code: 200 epochs)"),
    ("batch", 8, None, 16, "labelled slices a step"),
    ("lr", 2e-3, None, None, "of the whole network from scratch, AdamW, cosine to 0"),
    ("pretrained_lr", 1e-3, None, 5e-5, "of a pre-trained backbone"),
    ("head_lr", 5e-3, 2e-3, 1e-2, "of the head on it"),
    ("rotation", .5, None, None, "largest rotation in probing and fine-tuning in rad"),
    ("mean_teacher", False, None, None, "add rows of Mean Teacher, with --resume also later"),
    ("teacher_alpha", .99, None, None, "decay of the teacher"),
    ("teacher_weight", 5., None, None, "of the consistency, after its ramp"),
]
PAPER_ALSO = ("constant Adam, soft Dice alone, a double convolution to 1024 channels, the best "
              "checkpoint on held-out slices")

# The rows without pre-training, and the options they depend on: what --scratch can read.
BASELINES = {
    "scratch": common.BASELINE,
    "random-probe": ["data", "cases", "split", "precision", "width", "depth", "dim", "spacing",
                     "size", "probe_steps", "probe_lr", "batch", "rotation"],
    "scratch-mt": [*common.BASELINE, "teacher_alpha", "teacher_weight"],
}


def check(run):
    """Say who is labelled and what --scratch may hold, refuse impossible options (DataError)."""
    o = run.o
    counts = [o.pretrain_steps, o.pretrain_batch, o.probe_steps, o.dim, o.projection]
    run.patients = partial(few_shot, run.cases, run.split["labelled"])
    run.baselines.update(BASELINES)
    common.refuse([
        (o.loss not in ("infonce", "barlow"), f"--loss {o.loss}: use infonce or barlow"),
        (o.depth < 1, f"--depth {o.depth}: use 1 or more"),
        (o.dim < 3, f"--dim {o.dim}: use 3 or more, for the colours of Fig. 4"),
        (min(counts) < 1, "--pretrain-steps, --pretrain-batch, --probe-steps, --dim and "
         "--projection must be 1 or more"),
        (o.mean_teacher and o.batch < 2,
         f"--batch {o.batch}: --mean-teacher needs 2 or more, half of them unlabelled"),
        (o.pixels < 2, f"--pixels {o.pixels}: use 2 or more"),
        (o.temperature <= 0, f"--temperature {o.temperature}: use a number above 0"),
        (len(o.crop) != 2 or not 0 < o.crop[0] <= o.crop[-1] <= 1,
         f"--crop {' '.join(map(str, o.crop))}: use the smallest and largest side, in (0, 1]"),
    ])
    if o.paper and o.loss == "barlow" and "pretrain_lr" not in o.given:
        o.pretrain_lr = 5e-4
        print("--paper --loss barlow: --pretrain-lr 5e-4, the rate of v2")
    if o.init:                                                     # probing needs `widen` as well
        same = {"width": o.width, "depth": o.depth, "dim": o.dim}
        common.load_checkpoint(o.init, METHOD, same)


# ----------------------------------------------------------------------------------------- losses


def info_nce_loss(z_a, z_b, temperature):
    """Symmetric InfoNCE over 2n vectors: each must find its partner among the rest.

    z_a, z_b: the two views' vectors of n pixels [n, d], before normalisation; temperature tau.
    Returns a scalar; its chance level is ln(2n - 1).
    """
    n = len(z_a)
    z = torch.cat([z_a, z_b]).float()                              # [2n, d]
    z = F.normalize(z, dim=1)
    with torch.autocast(z.device.type, enabled=False):             # float32 also under autocast
        sim = z @ z.T / temperature                                # [2n, 2n] cosines / tau
    sim = sim.fill_diagonal_(-torch.inf)                           # k != v: never with itself
    # l(v, w) = - log exp(sim(v,w)/tau) / sum_{k != v} exp(sim(v,k)/tau)
    # is cross-entropy whose right answer is the partner w, n places further
    partner = (torch.arange(2 * n, device=z.device) + n) % (2 * n)         # [2n]
    # L = 1/(2n) sum_i [ l(z_i, z'_i) + l(z'_i, z_i) ]    (InfoNCE)
    return F.cross_entropy(sim, partner)


def standardise(u):
    """Vectors [P, d] with zero mean and unit std of each component over the P pixels, float32."""
    return F.batch_norm(u.float(), None, None, training=True, eps=1e-8)


def barlow_twins_loss(u_a, u_b, lam):
    """Barlow Twins over pixels: the d x d cross-correlation should be the identity.

    u_a, u_b: the two views' vectors of P pixels [P, d], before standardisation; lam = lambda.
    Returns a scalar. Cost: P d^2, and no P x P matrix anywhere.
    """
    u_a = standardise(u_a)
    u_b = standardise(u_b)
    # C[j,k] = 1/P sum_p u(p)_j u'(p)_k
    # u(p), u'(p): pixel p in the two views, here u_a, u_b, standardised; j, k: components
    with torch.autocast(u_a.device.type, enabled=False):           # float32 also under autocast
        C = u_a.T @ u_b / len(u_a)                                 # [d, d]
    # L = sum_j (C[j,j] - 1)^2 + lambda sum_j sum_{k != j} C[j,k]^2    (Barlow)
    diagonal = C.diagonal()
    on = (diagonal - 1).square().sum()
    off = C.square().sum() - diagonal.square().sum()
    return on + lam * off


@torch.no_grad()
def found_partners(z_a, z_b):
    """Share of pixels whose nearest neighbour in the other view (cosine) is their partner.

    z_a, z_b [n, d]. 1/n is chance, and collapse.
    """
    a = F.normalize(z_a.float(), dim=1)
    b = F.normalize(z_b.float(), dim=1)
    nearest = (a @ b.T).argmax(1)                                  # [n]
    right = nearest == torch.arange(len(a), device=a.device)
    return right.float().mean().item()


@torch.no_grad()
def effective_rank(z):
    """exp(entropy of the normalised singular values) of vectors [n, d] about their mean: 1 to d.

    After Roy and Vetterli 2007.
    """
    z = z.float()
    centred = z - z.mean(0)
    s = torch.linalg.svdvals(centred.cpu())                        # [d]; not there on mps
    p = s / s.sum().clamp(min=1e-12)
    entropy = -(p * p.clamp(min=1e-12).log()).sum()
    return entropy.exp().item()


# ----------------------------------------------------------------------------------- pre-training


class Backbone(nn.Module):
    """f: the whole U-Net up to its last 3x3 convolution (`trunk`), and a 1x1 layer to D channels.

    `widen` and the projector g work pixel by pixel, on vectors [n, channels]. So phi may come
    before them, on the narrow map of the trunk, and InfoNCE needs them for sampled pixels only.
    """
    def __init__(self, channels, width, depth, dim):
        super().__init__()
        self.unet = UNet(channels, 2, width, depth)                # its head is not used here
        self.widen = nn.Sequential(nn.Linear(width, dim, bias=False), nn.BatchNorm1d(dim),
                                   nn.LeakyReLU(.01))

    def trunk(self, x):                                            # [B, C, S, S]
        return self.unet.decoder(self.unet.encoder(x))             # [B, width, S, S]

    def forward(self, x):                                          # [B, C, S, S]
        x = self.trunk(x).movedim(1, -1)                           # [B, S, S, width]
        vectors = self.widen(x.flatten(0, 2))                      # [B S S, D]
        return vectors.unflatten(0, x.shape[:3]).movedim(-1, 1)    # [B, D, S, S]


def load_backbone(run, start=None):
    """f with random weights, or with those that pretrained.pt holds."""
    o = run.o
    f = Backbone(run.channels, o.width, o.depth, o.dim)
    if start:
        common.load_weights(f.unet, start["unet"], start["parts"])
        f.widen.load_state_dict(start["widen"])
    return f


def projector(o):
    """g: a two-layer perceptron on the vectors of pixels, [n, D] -> [n, d].

    On a map this would be two 1x1 convolutions.
    """
    return nn.Sequential(nn.Linear(o.dim, o.projection, bias=False), nn.BatchNorm1d(o.projection),
                         nn.ReLU(), nn.Linear(o.projection, o.projection))


def random_affine(n, size, rotation, scale, device):
    """phi: n random crops, rotated and flipped, as (grids [n, S, S, 2], validity masks [n, S, S]).

    scale: (smallest, largest) side of the crop, of the image's; rotation: largest angle in rad. A
    pixel is valid where its pre-image and all its neighbours for the interpolation lie inside.
    """
    angle = uniform(n, -rotation, rotation, device)
    s = uniform(n, *scale, device)
    flip_x = uniform(n, -1, 1, device).sign()
    flip_y = uniform(n, -1, 1, device).sign()
    dx = uniform(n, -1, 1, device) * (1 - s)                       # upright it lies inside
    dy = uniform(n, -1, 1, device) * (1 - s)
    cos = angle.cos() * s
    sin = angle.sin() * s
    # input place = s R(angle) Flip (output place) + offset
    theta = torch.stack([cos * flip_x, -sin * flip_y, dx, sin * flip_x, cos * flip_y, dy], 1)
    theta = theta.view(n, 2, 3)
    grid = F.affine_grid(theta, (n, 1, size, size), align_corners=False)   # [n, S, S, 2]
    inside = grid.abs() <= 1 - 1 / size + 1e-6                     # pixel centres end at 1 - 1/S
    return grid, inside.all(-1)


def random_intensity(x, inversion):
    """t: `photometric`, and with probability `inversion` black for white; [B, C, S, S]."""
    x = photometric(x)
    inverted = (torch.rand(len(x)) < inversion).to(x.device)       # [B]
    return torch.where(inverted[:, None, None, None], 1 - x, x)


def view_batch(run, pool):
    """The two views of B random slices, with phi: (t(x), phi(t'(x)), grid, valid).

    Views [B, C, S, S]; grid [B, S, S, 2]; valid [B, S, S].
    """
    o = run.o
    pick = common.random_slices(pool.numbers, o.pretrain_batch)
    x = pool.image(pick, run.device)                               # [B, C, S, S]
    grid, valid = random_affine(len(x), o.size, o.pretrain_rotation, o.crop, run.device)
    t_x = random_intensity(x, o.inversion)
    phi_t_x = warp(random_intensity(x, o.inversion), grid)
    return common.channels_last(t_x), common.channels_last(phi_t_x), grid, valid


def pixel_pairs(map_a, map_b, grid, valid, n=None):
    """The vectors of phi(map_a) and map_b at the same n valid pixels, none of them twice.

    Maps [B, W, S, S] of the trunk, W = --width; map_a is moved by the very grid that moved the
    image. Returns two [n, W]; without n, or if there are fewer, of all valid pixels, [P, W].
    """
    moved = warp(map_a, grid)                                      # phi(map_a), [B, W, S, S]
    a = moved.movedim(1, -1)[valid]                                # [P, W]
    b = map_b.movedim(1, -1)[valid]
    if n is None:
        return a, b
    some = torch.randperm(len(a))[:n].to(a.device)                 # [n], without replacement [code]
    return a[some], b[some]


def two_maps(f, t_x, phi_t_x, one_pass):
    """The trunk's maps of both views, float32 [B, W, S, S] each: a pass for each view.

    one_pass: one for both, which then share their batch statistics (an ablation).
    """
    if one_pass:
        both = torch.cat([t_x, phi_t_x])                           # [2B, C, S, S]
        return f.trunk(common.channels_last(both)).float().chunk(2)
    return f.trunk(t_x).float(), f.trunk(phi_t_x).float()


def pretrain(run):
    """Train f and g on all training slices without labels; returns what pretrained.pt holds."""
    o = run.o
    T = o.pretrain_steps
    pool = common.pretraining_slices(run, run.dataset)
    torch.manual_seed(o.pretrain_seed)
    f = run.place(load_backbone(run))
    g = projector(o).to(run.device)
    parameters = [*f.unet.encoder.parameters(), *f.unet.decoder.parameters(),
                  *f.widen.parameters(), *g.parameters()]
    optimiser = torch.optim.AdamW(parameters, o.pretrain_lr, weight_decay=1e-5)
    n = o.pixels if o.loss == "infonce" else None                  # None: all valid pixels
    for step in run.steps("pretrain", T, (f, g), optimiser):
        warm_up = min(1, (step + 1) / (.05 * T))                   # 5 % of the steps [v2]
        optimiser.param_groups[0]["lr"] = o.pretrain_lr * warm_up * cosine(step, T)
        t_x, phi_t_x, grid, valid = view_batch(run, pool)          # [B, C, S, S] each, and phi
        # Z = g(phi(f(t(x)))), Z' = g(f(phi(t'(x))))    (the code: phi(g(f(t(x)))))
        # here f = widen(trunk), and phi comes before widen: see no. 6
        with run.autocast():
            map_a, map_b = two_maps(f, t_x, phi_t_x, o.one_pass)   # [B, W, S, S] each
            a, b = pixel_pairs(map_a, map_b, grid, valid, n)       # [n, W] each; Barlow: n = P
            vectors_a = f.widen(a)                                 # [n, D]
            vectors_b = f.widen(b)
            z_a = g(vectors_a)                                     # [n, d]
            z_b = g(vectors_b)
        if o.loss == "infonce":
            loss = info_nce_loss(z_a, z_b, o.temperature)
        else:
            loss = barlow_twins_loss(z_a, z_b, o.lam)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 50 == 0:
            signs = signs_of_collapse(o, z_a, z_b, vectors_a)
            run.log("pretrain", step=step, loss=loss, **signs)
    return run.save_pretrained(unet=f.unet.state_dict(), parts=["encoder", "decoder"],
                               widen=f.widen.state_dict(), projector=g.state_dict())


@torch.no_grad()
def signs_of_collapse(o, z_a, z_b, vectors):
    """For the log: chance level of the loss, share of partners found with its chance, rank in D.

    z_a, z_b: projections [n, d]; vectors [n, D]. Partners and rank of 1000 pixels at most.
    """
    n = len(z_a)
    few = torch.linspace(0, n - 1, min(1000, n), device=z_a.device).long()     # of all images
    a = z_a[few].float()
    b = z_b[few].float()
    chance = math.log(2 * n - 1)
    if o.loss == "barlow":
        a = standardise(a)                                         # as this loss compares them
        b = standardise(b)
        chance = o.projection                                      # unrelated views: d
    return {"chance": chance, "found": found_partners(a, b), "found_chance": 1 / len(few),
            "rank": effective_rank(vectors[few])}


# ------------------------------------------------------------------- linear probing, fine-tuning


def linear_probe(run, row, start=None):
    """Train a 1x1 head on the frozen maps f(x), random or pre-trained; returns both in one."""
    o = run.o
    numbers = run.dataset.of_patients(run.patients(row.labelled), labelled=True)
    torch.manual_seed(row.seed)
    f = run.place(load_backbone(run, start))
    head = nn.Conv2d(o.dim, len(run.classes), 1).to(run.device)
    if not start:
        set_statistics(run, f)
    f.eval().requires_grad_(False)                                 # frozen: weights and statistics
    groups = [{"params": head.parameters(), "peak": o.probe_lr}]
    optimiser = torch.optim.AdamW(groups, weight_decay=0)
    for step in run.steps(row.name, o.probe_steps, (head,), optimiser):
        optimiser.param_groups[0]["lr"] = o.probe_lr * cosine(step, o.probe_steps)
        image, label = common.labelled_batch(run, numbers, o.batch)        # [B, C, S, S], [B, S, S]
        with run.autocast():
            maps = f(image)                                        # [B, D, S, S]
        logits = head(maps.float())                                # [B, K, S, S]
        ce = F.cross_entropy(logits, label)
        dice = common.dice_loss(logits, label)
        optimiser.zero_grad()
        (ce + dice).backward()
        optimiser.step()
        if step % 50 == 0:
            run.log(row.name, step=step, cross_entropy=ce, dice_loss=dice,
                    cross_entropy_chance=math.log(len(run.classes)))
    return nn.Sequential(f, head)


@torch.no_grad()
def set_statistics(run, f, batches=20):
    """Give a random f, which has none of its own, the mean batch statistics of training slices."""
    for module in f.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):   # the first: of `widen`
            module.momentum = None                                 # the mean of all batches so far
    for _ in range(batches):
        pick = common.random_slices(run.train, run.o.batch)
        f(photometric(run.dataset.image(pick, run.device)))


@torch.no_grad()
def update_teacher(teacher, student, alpha):
    """Mean Teacher: theta' <- alpha theta' + (1 - alpha) theta; running statistics alike."""
    for mean, value in zip(teacher.state_dict().values(), student.state_dict().values()):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - alpha)
        else:
            mean.copy_(value)                                      # counters of batch normalisation


def consistency_loss(logits, target):
    """Mean Teacher: squared difference of probabilities, summed over classes, mean over pixels.

    logits of the student, probabilities `target` of the teacher: [B, K, S, S]. Returns a scalar.
    """
    return (logits.softmax(1) - target).square().sum(1).mean()


def on_unlabelled(run, student, teacher, n):
    """The consistency loss on n training slices without labels; for the teacher intensities stay.

    Of all training patients, the labelled ones too. They go through the student apart from the
    labelled slices: in one batch, batch normalisation would tell the two apart.
    """
    pick = common.random_slices(run.train, n)
    grid = spatial_grid(n, run.o.size, run.o.rotation, run.device)         # [n, S, S, 2]
    x = warp(run.dataset.image(pick, run.device), grid)            # [n, C, S, S]
    changed = common.channels_last(photometric(x))                 # [n, C, S, S]
    with run.autocast():
        with torch.no_grad():
            target = teacher(common.channels_last(x)).float().softmax(1)   # [n, K, S, S]
        return consistency_loss(student(changed).float(), target)


def ramp(step, steps):
    """Mean Teacher: the share of the consistency's weight, from e^-5 to 1 after `steps`.

    exp(-5 (1 - t)^2), t: the share of the ramp that is done (Tarvainen and Valpola 2017).
    """
    t = min(1, step / steps)
    return math.exp(-5 * (1 - t) ** 2)


def finetune(run, row, start=None):
    """Train a U-Net on the labelled slices of a row, from scratch or from pretrained.pt.

    In rows "...-mt" half of every batch are unlabelled slices, on which the student has to agree
    with its teacher; the teacher is returned.
    """
    o = run.o
    mean_teacher = row.method.endswith("-mt")
    numbers = run.dataset.of_patients(run.patients(row.labelled), labelled=True)
    torch.manual_seed(row.seed)
    unet = run.place(run.unet())
    if start:
        common.load_weights(unet, start["unet"], start["parts"])
    backbone = [*unet.encoder.parameters(), *unet.decoder.parameters()]
    groups = [{"params": backbone, "peak": o.pretrained_lr if start else o.lr},
              {"params": unet.head.parameters(), "peak": o.head_lr if start else o.lr}]
    optimiser = torch.optim.AdamW(groups, weight_decay=1e-4)
    modules = [unet]
    if mean_teacher:                                               # eval: running statistics
        teacher = copy.deepcopy(unet).eval().requires_grad_(False)
        modules.append(teacher)
    U = o.batch // 2 if mean_teacher else 0                        # unlabelled slices of a batch
    for step in run.steps(row.name, o.steps, modules, optimiser):
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * cosine(step, o.steps)
        image, label = common.labelled_batch(run, numbers, o.batch - U)    # image [B-U, C, S, S]
        with run.autocast():
            logits = unet(image).float()                           # [B-U, K, S, S]
        terms = {"cross_entropy": F.cross_entropy(logits, label),
                 "dice_loss": common.dice_loss(logits, label)}
        loss = terms["cross_entropy"] + terms["dice_loss"]
        if mean_teacher:
            terms["consistency"] = on_unlabelled(run, unet, teacher, U)
            loss = loss + o.teacher_weight * ramp(step, .4 * o.steps) * terms["consistency"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if mean_teacher:                                           # at first the mean of all so far
            update_teacher(teacher, unet, min(o.teacher_alpha, 1 - 1 / (step + 1)))
        if step % 50 == 0:
            run.log(row.name, step=step, cross_entropy_chance=math.log(len(run.classes)), **terms)
    return teacher if mean_teacher else unet


# ----------------------------------------------------------------- few-shot and saved annotation


def few_shot(cases, patients, n):
    """The n labelled patients: the first n of `patients`, or the same number of every group.

    Of every pathology group (ACDC: five) where n >= 5 and their number divides n: the first of
    every group, then the second, ... as long as no group runs out.
    """
    group = {c.patient: c.group for c in cases}
    groups = {group[p] for p in patients}                          # "" where it is not known
    if n < 5 or len(groups) < 2 or n % len(groups) or "" in groups:
        return patients[:n]
    seen = dict.fromkeys(groups, 0)
    turn = {}                                                      # a patient's place in its group
    for p in patients:
        turn[p] = seen[group[p]]
        seen[group[p]] += 1
    return sorted(patients, key=turn.get)[:n]                      # stable: then in their own order


def dice_by_labels(summary, method):
    """[(labelled patients, mean Dice)] of a method, the fewest patients first."""
    return sorted((r["labelled"], r["mean_dice"]["mean"]) for r in summary if r["method"] == method)


def labels_needed(summary, dice, baseline="scratch"):
    """How many labelled patients the baseline needs for this mean Dice.

    Linear in log n between its runs; the fewest it had where they suffice; inf beyond the most.
    """
    runs = dice_by_labels(summary, baseline)
    if runs[0][1] >= dice:
        return float(runs[0][0])
    for (n_a, a), (n_b, b) in zip(runs, runs[1:]):
        if a < dice <= b:
            share = (dice - a) / (b - a)
            return math.exp(math.log(n_a) + share * math.log(n_b / n_a))
    return math.inf


# ---------------------------------------------------------------------------------------- figures


def build(content):
    """The network of a row's checkpoint: f and a head where it was probed, else a U-Net."""
    if not content["row"].endswith("probe"):
        return common.build_unet(content)
    o = content["options"]
    f = Backbone(content["channels"], o["width"], o["depth"], o["dim"])
    net = nn.Sequential(f, nn.Conv2d(o["dim"], len(content["classes"]), 1))
    net.load_state_dict(content["unet"])
    return net


@torch.no_grad()
def pixel_embeddings(run, images, start=None):
    """f(x) with unit length [V, D, S, S] of slices [V, C, S, S]; f random or of pretrained.pt."""
    torch.manual_seed(run.o.pretrain_seed)
    f = load_backbone(run, start).to(run.device)
    f.train(not start)                                             # random: batch statistics only
    return F.normalize(f(images).float(), dim=1).cpu()


def chosen_queries(label, S):
    """[(y, x, class)]: of each class in the label [S, S] the pixel nearest to its centre.

    At most three; without a label the middle pixel. Labels choose what is drawn, nothing else.
    """
    queries = []
    for k in range(1, min(4, int(label.max()) + 1)):
        pixels = (label == k).nonzero().float()                    # [P, 2]
        if len(pixels):
            nearest = (pixels - pixels.mean(0)).norm(dim=1).argmin()
            y, x = pixels[nearest].int().tolist()
            queries.append((y, x, k))
    return queries or [(S // 2, S // 2, 0)]


def draw_similarity(run, start):
    """similarity.png (Fig. 2): some query pixels, and how similar the pixels of others are to them.

    Cosine similarity in slices of two other scored patients, before and after pre-training; o marks
    the best match.
    """
    S = run.o.size
    patients = run.split[run.o.split][:3]
    numbers = common.middle_slices(run.dataset, patients)
    images = run.dataset.image(numbers, run.device)                # [V, C, S, S]
    picture = images[:, 0].cpu()                                   # [V, S, S]
    label = run.dataset.label(numbers)[0]                          # [S, S]
    queries = chosen_queries(label * (label < 255), S)             # 255: no label
    before = pixel_embeddings(run, images)                         # [V, D, S, S]
    after = pixel_embeddings(run, images, start)
    figure, axes = common.new_figure(len(queries), 1 + 3 * (len(images) - 1))
    for row, (y, x, k) in zip(axes, queries):
        common.show(row[0], picture[0], title=f"query in {patients[0]}\n{run.classes[k]}")
        mark_pixel(row[0], y, x)
        for v in range(1, len(images)):
            panels = row[3 * v - 2:3 * v + 1]
            common.show(panels[0], picture[v], title=f"{patients[v]}\nbest match, after")
            for axis, maps, when in zip(panels[1:], (before, after), ("before", "after")):
                sim = torch.einsum("d,dhw->hw", maps[0, :, y, x], maps[v])     # [S, S]
                best = divmod(int(sim.argmax()), S)
                axis.imshow(sim, cmap="magma", vmin=-.2, vmax=1)
                axis.set_title(f"similarity\n{when}", fontsize=8)
                mark_pixel(axis, *best)
                if when == "after":
                    mark_pixel(panels[0], *best)
    common.save_figure(figure, run.out / "figures/similarity.png")


def mark_pixel(axis, y, x):
    """A green dot at a pixel of an image."""
    axis.plot(x, y, "o", color="tab:green", mec="white")


def principal_plane(maps):
    """Vectors [V, D, S, S] in the plane of their largest variance: [V, S, S, 2].

    By PCA (the paper: t-SNE); 1 and 99 % of each coordinate come to 0 and 1, and beyond is cut.
    """
    x = maps.movedim(1, -1)                                        # [V, S, S, D]
    x = x - x.mean((0, 1, 2))
    flat = x.flatten(0, 2)                                         # [V S S, D]
    _, axis = torch.linalg.eigh(flat.T @ flat)                     # [D, D], largest variance last
    plane = x @ axis[:, -2:].flip(1)                               # [V, S, S, 2]
    ends = torch.tensor([.01, .99])
    lo, hi = plane.flatten(0, 2).quantile(ends, dim=0)             # [2] each
    return ((plane - lo) / (hi - lo)).clamp(0, 1)


def plane_colours(plane):
    """A colour for each place of the plane, the key of Fig. 4: [..., 2] in [0, 1] -> [..., 3].

    Its corners are blue, red, green and yellow, with what lies between mixed.
    """
    corners = torch.tensor([[[.1, .2, .9], [.9, .1, .2]], [[.1, .7, .4], [1., .9, .2]]])
    u = plane[..., :1]
    v = plane[..., 1:]
    low = corners[0, 0] * (1 - u) + corners[0, 1] * u              # [..., 3]
    high = corners[1, 0] * (1 - u) + corners[1, 1] * u
    return low * (1 - v) + high * v


def draw_embeddings(run, start):
    """embeddings.png (Fig. 4): the vectors of all pixels as colours, beside image and label.

    Below: the same vectors as points of the plane that gives them their colour, and by label.
    """
    patients = run.split[run.o.split][:3]
    numbers = common.middle_slices(run.dataset, patients)
    images = run.dataset.image(numbers, run.device)                # [V, C, S, S]
    label = run.dataset.label(numbers)                             # [V, S, S]
    label = label * (label < 255)                                  # 255: no label
    before = principal_plane(pixel_embeddings(run, images))        # [V, S, S, 2]
    after = principal_plane(pixel_embeddings(run, images, start))
    figure, axes = common.new_figure(len(images) + 1, 4)
    for v, patient in enumerate(patients):
        picture = images[v, 0].cpu()
        common.show(axes[v, 0], picture, title=patient)
        common.show(axes[v, 1], picture, label[v], len(run.classes), "label")
        common.show(axes[v, 2], plane_colours(before[v]), title="vectors before")
        common.show(axes[v, 3], plane_colours(after[v]), title="vectors after")
    K = len(run.classes)
    by_label = {"c": label.flatten(), "cmap": "viridis", "vmin": 0, "vmax": max(2, K - 1)}
    scatter(axes[-1, 0], before, by_label, "plane before, by label")
    scatter(axes[-1, 1], after, by_label, "plane after, by label")
    scatter(axes[-1, 2], before, {"c": plane_colours(before).flatten(0, 2)}, "before, colour key")
    scatter(axes[-1, 3], after, {"c": plane_colours(after).flatten(0, 2)}, "after, colour key")
    common.save_figure(figure, run.out / "figures/embeddings.png")


def scatter(axis, plane, colours, title):
    """The pixels of a plane [V, S, S, 2] as points."""
    u, v = plane.flatten(0, 2).T                                   # [V S S] each
    axis.scatter(u, v, s=.5, **colours)
    axis.set_title(title, fontsize=8)


def draw_annotation_saved(run):
    """annotation_saved.png (Fig. 3, read sideways), and a line for each number of patients.

    How many labelled patients scratch needs for the Dice that fine-tuning reaches with n.
    """
    figure, axes = common.new_figure(1, 1, 5, 3.4)
    axis = axes[0, 0]
    axis.axis("on")
    for method in ("scratch", METHOD):
        labelled, scores = zip(*dice_by_labels(run.summary, method))
        axis.semilogx(labelled, scores, marker="o", label=method)
    most = dice_by_labels(run.summary, "scratch")[-1][0]           # patients scratch has at most
    for n, dice in dice_by_labels(run.summary, METHOD):
        needed = labels_needed(run.summary, dice)
        words = f"{needed:.1f}" if needed < math.inf else f"more than {most}"
        end = (min(needed, 1.5 * most), dice)
        axis.annotate("", end, (n, dice), arrowprops={"arrowstyle": "->", "ls": ":"})
        axis.text(n, dice, f"{n} for {words}", ha="left", va="bottom", fontsize=8)
        print(f"annotation saved: {METHOD} with {n} labelled is as good as scratch with {words}")
    axis.set_xticks(labelled, labelled)
    axis.margins(.2, .1)
    axis.minorticks_off()
    axis.set(xlabel="labelled patients", ylabel="mean Dice",
             title="labelled patients: with pre-training for without")
    axis.grid(alpha=.3)
    axis.legend(loc="lower right")
    common.save_figure(figure, run.out / "figures/annotation_saved.png")


# ------------------------------------------------------------------------------------------- main

LOOK = """once pre-trained, one tissue has one colour in every patient, before any label
was read (similarity.png beside it: what is like one pixel). In the table, `probe` beside
`random-probe` is what the vectors teach a 1x1 layer, and `gain` what they are worth beside the same
network from scratch."""


def main(arguments=None):
    o = common.parse_options(METHOD, __doc__, OPTIONS, arguments, PAPER_ALSO, "code")
    if o.predict:
        return common.predict_files(o, build)
    run = common.Run(o)
    check(run)
    known = ["scratch", "random-probe", "probe", "pix2rep"]
    if o.mean_teacher:
        known += ["scratch-mt", "pix2rep-mt"]
    methods = run.choose(*known)
    run.begin()
    start = run.pretrained()
    if start is None and set(methods) & set(PRETRAINED):
        start = pretrain(run)
    for row in run.rows():
        train = linear_probe if row.method.endswith("probe") else finetune
        net = train(run, row, start if row.method in PRETRAINED else None)
        run.score(row, net)
    common.draw_overlays(run, run.first_nets(build, "scratch", "probe", "pix2rep"))
    if not start:
        return run.report("overlays.png", common.LOOK_ROWS)
    draw_similarity(run, start)
    draw_embeddings(run, start)
    if len(o.labelled) > 1 and {"scratch", METHOD} <= {r["method"] for r in run.runs}:
        draw_annotation_saved(run)
    run.report("embeddings.png", LOOK)


if __name__ == "__main__":
    common.run_main(main)
