"""MACL: Multi-level Asymmetric Contrastive Learning for Medical Image Segmentation Pre-training
(Zeng et al.; IEEE JBHI; arXiv 2309.11876).

    python macl.py                                        the built-in phantom, no data needed
    python macl.py --data path/to/acdc                    real scans: pre-train, fine-tune, score
    python macl.py --data A --pretrain-data B C           pre-train on B and C, fine-tune on A
    python macl.py --predict IMAGES --checkpoint FILE.pt  segment new volumes

Contrast alone pre-trains an encoder and leaves the decoder random. MACL trains both together by
making two branches of unequal depth agree: the dominant branch sends a quarter-sized image through
the encoder e and the first two decoder blocks d, the auxiliary branch sends the full image through
the same encoder. Both maps then have one size, and are compared at three levels: whole slices
(L_g), single pixels (L_d), and the encoder's own features at the two scales (L_ER). Slices at a
like position in their volumes are positives. No label is used. Then few labels fine-tune the
U-Net, of which d gives half the decoder.

The paper's Table III, a run a line (PCL's own threshold on ACDC: `--threshold 0.35`):

    python macl.py --decoder-blocks 0 --lambda2 0 --lambda3 0 --out runs/pcl    PCL: L_g, no decoder
    python macl.py --lambda2 0 --lambda3 0 --out runs/decoder                   + decoder
    python macl.py --lambda2 0 --out runs/er                                    + L_ER
    python macl.py --out runs/macl                                              + L_d: MACL

Paper, code, and what we chose. [paper]: stated there; [code]: the authors' published code, of
which only pre-training works; [PCL]: Zeng et al., MICCAI 2021, the base method; [ours]: silent
there, or changed by us. What was measured: results/macl.md.
 1. Z^g, the dominant branch's image-level vector: Eq. 7 takes it from the encoder; Eq. 4, Fig. 2
    and the code from the decoder's output, as we do. `--eq7` takes the other.
 2. tau = 0.1 [paper]. The code multiplies L_g and L_d by tau / 0.07 = 1.43; Eqs. 9 and 10 do not,
    nor do we, so L_ER weighs 1.43 times as much as there; `--lambda3 0.7` has the code's weights.
 3. Eq. 9 sums over the anchors i; the code averages, and so do we: the chance of L_g and L_d is
    ln(2N - 1), not 2N times that.
 4. Positives: |pos_i - pos_j| < threshold; 0.1 on CHD, 0.05 on BraTS [code], 0.35 on ACDC [PCL];
    0.1 here, also for the row "pcl", and a tie is positive [ours]. With 0.35, 58 % of ACDC's pairs
    are positive and the losses hardly fall; with 0.1, 20 %, but of the next neighbours only half
    (CHD has about 257 slices a volume, ACDC about 10). No finished runs compare them yet.
 5. Z^l is the decoder's output as it is; only the auxiliary branch has a g_pix: two 3x3
    convolutions with normalisation and LeakyReLU [code]. g_ins: average pool, linear, ReLU, linear
    to 128 [code]. With 0 decoder blocks both branches are one network and share g_ins, which makes
    the script PCL [ours]. The encoder's deepest block, which makes Y, has batch normalisation and
    LeakyReLU like all others [ours]; [code]: no normalisation and ReLU, so that Y's size is free.
 6. T_fix, the change of intensities in every view, is the identity, which the paper found best;
    the code has brightness, contrast and a mild blur (`--t-fix code`); `--t-fix photometric` is
    what our other methods have. T_var moves V1 and V2: mirrored on both axes, and with p = 0.67
    rotation 0 to 2 pi, scale 0.7 to 1.3 and elastic waves [code] (`--t-var code`); shifts of 10 %
    of half the width, 0.5 rad, e^+-0.25, no mirror, not elastic [ours].
 7. down is bilinear [code], without align_corners [ours]: it reads the middle 2 x 2 of every 4 x 4
    pixels, and so L_ER never sees the outermost ring of Y~. With it [code] the 2 x 2 that we make
    from 8 x 8 would be the four corners alone. Every view has a pass, and so batch statistics, of
    its own [code].
 8. 96 / 4 = 24 pixels cannot be halved four times: we pre-train on a larger crop of the same pixel
    size, 128 x 128, where the dominant branch has maps of 32 to 2 pixels, and fine-tune on 96 x 96
    like the other methods [ours]. Beyond the scan it is black: where 96 x 96 already hold all of a
    scan (CHAOS, BTCV), take `--size 128` and a finer `--spacing`. Pre-training at 512 x 512,
    fine-tuning on ACDC at 352 x 352 and 1.25 mm [paper], width 32 [code].
 9. The paper's ACDC numbers are of transfer: pre-trained on CHD, 17 525 CT slices of 512 x 512,
    100 epochs, batch 16 on each of two GPUs. We pre-train on the training slices of the set that
    is segmented [ours], or as the paper on others with `--pretrain-data`; slices of two sets are
    never positives [ours]. SGD 0.1, cosine [paper], 0.01 [code]; AdamW 1e-3 [ours].
10. Weights taken: encoder and the k decoder blocks [paper]. Fine-tuning: Adam 5e-4 to 5e-6,
    cross-entropy, batch 5, 100 epochs [paper]; AdamW, cross-entropy + Dice [ours].
11. The code's "test" list also picks the best epoch, and its Dice pools all pixels of that set.
    Here the last checkpoint is scored, by volume; test patients choose nothing. One pre-training
    serves all seeds, so the spread over seeds is that of fine-tuning [ours].

Letters: N slices in a batch, C channels (C' at the bottom of the U-Net), S network size, k decoder
blocks, h, w size of the dense maps (S / 16), h', w' of the small image's deepest ones, P = hw, M
= 2N projections, or slices in a figure, K classes.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import conv_block, cosine, photometric, spatial_grid, uniform, warp

METHOD = "macl"

# ---------------------------------------------------------------------------------------- options

# name, on real data, on the phantom (None: the same), in the paper (None: not known), what it is
OPTIONS = [
    ("labelled", [1, 3, 7], [1], None, "numbers of labelled patients (paper: 8, 20)"),
    ("seeds", [0, 1, 2], [0], None, "seeds of fine-tuning"),
    ("width", 16, None, 32, "channels of the first U-Net level (32: the code's)"),
    ("spacing", None, 2.5, 1.25, "mm a pixel in plane; 2 on ACDC"),
    ("size", None, 64, 352, "S, crop of fine-tuning, divisible by 16; 96 on ACDC"),
    ("pretrain_size", None, None, 512,
     "S of pre-training; default: --size rounded up to a multiple of 64"),
    ("pretrain_data", [], None, None, "folders to pre-train on instead of --data; need no labels"),
    ("pretrain_steps", 4000, 1000, 8200,
     "steps of pre-training (paper: 100 epochs of CHD, 55 000 steps; 8200 are 100 epochs of ACDC)"),
    ("pretrain_batch", 16, None, 16, "N, slices a step"),
    ("pretrain_lr", 1e-3, None, .1, "of pre-training, cosine to 0 (code: 0.01)"),
    ("pretrain_seed", 1000, None, None, "seed of pre-training"),
    ("pretrain_optimiser", "adamw", None, "sgd", "adamw, or sgd with momentum 0.9"),
    ("t_var", "affine", None, "code", "affine, or code: mirrors, every angle, elastic waves"),
    ("pretrain_rotation", .5, None, None, "largest rotation of the affine T_var in rad"),
    ("t_fix", "identity", None, "identity", "T_fix: identity, code, or photometric (ours, strong)"),
    ("decoder_blocks", 2, None, 2,
     "k, decoder blocks of the dominant branch; its image is scaled by 1 / 2^k"),
    ("lambda1", 1., None, 1., "weight of L_g"),
    ("lambda2", .5, None, .5, "weight of L_d"),
    ("lambda3", 1., None, 1., "weight of L_ER"),
    ("threshold", .1, None, None,
     "slices whose positions differ by less are positives (code: 0.1 on CHD; PCL: 0.35 on ACDC)"),
    ("temperature", .1, None, .1, "tau"),
    ("eq7", False, None, None, "Z^g from the encoder, as Eq. 7 has it, instead of the decoder"),
    ("steps", 4800, 240, None, "steps of fine-tuning, also from scratch (paper: 100 epochs)"),
    ("batch", 8, None, 5, "labelled slices a step"),
    ("lr", 2e-3, None, 5e-4, "of new layers and of scratch, AdamW, cosine to 0 (paper: Adam)"),
    ("pretrained_lr", 2e-3, 1e-3, 5e-4, "of pre-trained layers"),
    ("rotation", .5, None, None, "largest rotation in fine-tuning in rad"),
]

PAPER_ALSO = ("pre-training for 100 epochs on 17 525 CT slices of another set, CHD, and none of "
              "the set that is segmented; fine-tuning for 100 epochs by Adam, 5e-4 to 5e-6, with "
              "cross-entropy alone; L_g and L_d times tau / 0.07")


def check(run):
    """Fill in the size of pre-training and refuse impossible options. Raises DataError."""
    o = run.o
    if o.pretrain_size is None:                                    # 64 = 2^(4 + 2), also for PCL
        o.pretrain_size = 64 * math.ceil(o.size / 64)
    k = o.decoder_blocks
    unit = 2 ** (4 + k) if 0 <= k <= 4 else 0
    lambdas = (o.lambda1, o.lambda2, o.lambda3)
    common.refuse([
        (not unit, f"--decoder-blocks {k}: use 0 to 4"),
        (unit and (o.pretrain_size % unit or o.pretrain_size < max(unit, 32)),
         f"--pretrain-size {o.pretrain_size}: --decoder-blocks {k} scales it by 1/{2 ** k}, and "
         f"the encoder halves that four times; use a multiple of {unit}, 32 or more"),
        (min(lambdas) < 0 or not any(lambdas),
         "--lambda1 --lambda2 --lambda3: use 0 or more, and one of them above 0"),
        (o.pretrain_optimiser not in ("adamw", "sgd"),
         f"--pretrain-optimiser {o.pretrain_optimiser}: use adamw or sgd"),
        (o.t_var not in ("affine", "code"), f"--t-var {o.t_var}: use affine or code"),
        (o.t_fix not in ("identity", "code", "photometric"),
         f"--t-fix {o.t_fix}: use identity, code or photometric"),
        (o.temperature <= 0, f"--temperature {o.temperature}: use a number above 0"),
        (not 0 < o.threshold <= 1,
         f"--threshold {o.threshold}: use a share of the volume's length in (0, 1]"),
        (o.pretrain_steps < 1 or o.pretrain_batch < 2,
         "--pretrain-steps: use 1 or more, --pretrain-batch: 2 or more"),
    ])


# ----------------------------------------------------------------------------------------- losses


def positive_pairs(position, threshold):
    """Omega+ as a matrix [2N, 2N] for N slices seen by two branches; position [N] in (0, 1].

    At least the slice's own other branch is positive. Raises ValueError if threshold <= 0.
    """
    if threshold <= 0:
        raise ValueError(f"threshold = {threshold}: use a number above 0, or no positives are left")
    position = torch.as_tensor(position).repeat(2)                 # [2N]: dominant, auxiliary
    # Omega_i+ = { j != i : |pos_i - pos_j| < threshold }
    return common.is_close(position, threshold).fill_diagonal_(False)      # [2N, 2N]


def contrastive_loss(z, positive, temperature):
    """What L_g and L_d share: z [..., M, C] of M = 2N projections, positive [M, M].

    Returns the mean over anchors and leading axes, a scalar.
    """
    z = F.normalize(z.float(), dim=-1)                             # [..., M, C], unit length
    itself = torch.eye(len(positive), dtype=torch.bool, device=z.device)
    with torch.autocast(z.device.type, enabled=False):             # float32 also under autocast
        sim = z @ z.mT / temperature                               # [..., M, M]: sim(z_i,z_j)/tau
    others = sim.masked_fill(itself, -torch.inf)                   # k != i: exp(-inf) = 0
    weight = positive / positive.sum(1, keepdim=True)              # [M, M]: 1/|Omega_i+|, else 0
    # - 1/|Omega_i+| sum_{j in Omega_i+} log( exp(sim_ij) / sum_{k != i} exp(sim_ik) )
    #     = log sum_{k != i} exp(sim_ik) - 1/|Omega_i+| sum_{j in Omega_i+} sim_ij
    repel = others.logsumexp(-1)                                   # [..., M]
    attract = (sim * weight).sum(-1)                               # [..., M]
    return (repel - attract).mean()


def global_contrastive_loss(Z_g, Z_g_aux, position, threshold, temperature):
    """L_g, Eq. (9): image-level contrast; slices at a like position are positives.

    Z_g = Z^g, Z_g_aux = Z~^g [N, d], before normalisation; position [N] in (0, 1]. Returns a
    scalar, the mean over the 2N anchors [code] (Eq. 9: sum), chance level ln(2N - 1). Raises
    ValueError if threshold <= 0.
    """
    positive = positive_pairs(position, threshold).to(Z_g.device)  # [2N, 2N]
    # L_g = - sum_i 1/|Omega_i+| sum_{j in Omega_i+} log( exp(sim(Z_i,Z~_j)/tau)
    #                                                / sum_{k != i} exp(sim(Z_i,Z~_k)/tau) )   (9)
    # the tilde looks as if j and k were of the other branch; here, as in the code, i, j, k run over
    # all 2N projections
    return contrastive_loss(torch.cat([Z_g, Z_g_aux]), positive, temperature)


def dense_contrastive_loss(Z_l, Z_l_aux, position, threshold, temperature):
    """L_d, Eq. (10): L_g at every pixel s of the maps, across the batch's 2N samples.

    Z_l = Z^l, Z_l_aux = Z~^l [N, C, h, w], before normalisation; position [N]. Returns a scalar,
    chance level ln(2N - 1). All P pixels at once. Raises ValueError if threshold <= 0.
    """
    positive = positive_pairs(position, threshold).to(Z_l.device)  # [2N, 2N]
    small = Z_l.flatten(2).permute(2, 0, 1)                        # [N, C, h, w] -> [P, N, C]
    full = Z_l_aux.flatten(2).permute(2, 0, 1)
    # L_d = 1/P sum_s L_g(Z^l at s, Z~^l at s)    (10)
    z = torch.cat([small, full], 1)                                # [P, 2N, C]
    return contrastive_loss(z, positive, temperature)


def equivariant_loss(y_small, y_full):
    """L_ER, Eq. (11): the encoder's maps of the small and of the full image should be equal.

    y_small = Y [N, C', h', w'], y_full = Y~ [N, C', h, w]. Returns a scalar, the mean absolute
    difference at the size of Y.
    """
    size = y_small.shape[2:]
    down_full = F.interpolate(y_full.float(), size, mode="bilinear")       # [N, C', h', w']
    # L_ER = || Y - down(Y~) ||_1    (11)
    return F.l1_loss(y_small.float(), down_full)


# ----------------------------------------------------------------------------------- pre-training


class Heads(nn.Module):
    """What pre-training puts on the two branches and throws away.

    widths: channels of the U-Net's levels; blocks: k; eq7: g_ins stands on the encoder.
    """
    def __init__(self, widths, blocks, eq7, dim=128):
        super().__init__()
        self.blocks = blocks
        self.eq7 = eq7
        C_enc = widths[-1]                                         # channels of e's output
        C_dec = widths[-1 - blocks]                                # and of d's

        def instance_head(n):                                      # [N, n, h, w] -> [N, 128]
            return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n, dim),
                                 nn.ReLU(), nn.Linear(dim, dim))

        self.g_ins = instance_head(C_enc if eq7 else C_dec)
        # PCL: one network, one head
        self.g_ins_aux = instance_head(C_enc) if blocks else self.g_ins
        self.g_pix_aux = conv_block(C_enc, C_dec)                  # [N, C', h, w] -> [N, C, h, w]


def trained_parts(o):
    """What pre-training trains of the U-Net, and fine-tuning takes: e, and d where a loss sees it.

    L_d does, and L_g unless it comes from the encoder (`--eq7`).
    """
    reached = o.lambda2 or (o.lambda1 and not o.eq7)
    parts = ["encoder"]
    for n in range(o.decoder_blocks if reached else 0):
        parts += [f"decoder.ups.{n}", f"decoder.blocks.{n}"]
    return parts


def code_grid(n, S, device):
    """T_var of the published code as sampling grids [n, S, S, 2].

    Both axes mirrored, each with p = 0.5; with p = 0.67 moved: rotation 0 to 2 pi, scale 0.7 to
    1.3, and elastic waves, noise on about 17 x 17 places with a std of 0.4 to 1.4 % of half the
    width (there sigma 14 to 17 and alpha 100 to 350 pixels of 512).
    """
    moved = (uniform(n, 0, 1, device) < .67).float()               # [n], 0 or 1
    angle = uniform(n, 0, 2 * math.pi, device) * moved
    scale = 1 + uniform(n, -.3, .3, device) * moved
    std = uniform(n, .004, .014, device) * moved
    flip_x = uniform(n, -1, 1, device).sign()
    flip_y = uniform(n, -1, 1, device).sign()
    cos = angle.cos() * scale
    sin = angle.sin() * scale
    zero = torch.zeros_like(cos)                                   # no shift
    row_x = torch.stack([cos * flip_x, -sin * flip_y, zero], 1)    # [n, 3]
    row_y = torch.stack([sin * flip_x, cos * flip_y, zero], 1)
    theta = torch.stack([row_x, row_y], 1)                         # [n, 2, 3]
    grid = F.affine_grid(theta, (n, 1, S, S), align_corners=False)         # [n, S, S, 2]
    waves = torch.randn(n, 2, 17, 17).to(device) * std[:, None, None, None]
    waves = F.interpolate(waves, (S, S), mode="bicubic")           # [n, 2, S, S]
    return grid + waves.movedim(1, -1)


def code_intensities(x):
    """T_fix of the published code: x [N, C, S, S] in [0, 1] -> the same, each image its own.

    Brightness 0 to 1, contrast 0.8 to 1.2, a 3 x 3 Gaussian of sigma 1 to 3, then scaled to [0, 1]
    by its least and largest value, which takes the brightness back.
    """
    def draw(lo, hi):
        return uniform(len(x), lo, hi, x.device)[:, None, None, None]      # [N, 1, 1, 1]

    x = x * draw(0, 1)
    mean = x.mean((1, 2, 3), keepdim=True)                         # [N, 1, 1, 1]
    x = (mean + (x - mean) * draw(.8, 1.2)).clamp(0, 1)
    side = (-.5 / draw(1, 3) ** 2).exp()                           # of the Gaussian; middle: 1
    padded = F.pad(x, (1, 1, 0, 0), "reflect")                     # [N, C, S, S + 2]
    x = (x + side * (padded[..., :-2] + padded[..., 2:])) / (1 + 2 * side)
    padded = F.pad(x, (0, 0, 1, 1), "reflect")                     # [N, C, S + 2, S]
    x = (x + side * (padded[..., :-2, :] + padded[..., 2:, :])) / (1 + 2 * side)
    x = x - x.amin((1, 2, 3), keepdim=True)
    return x / x.amax((1, 2, 3), keepdim=True).clamp(min=1e-6)


def T_fix(x, o):
    """Images [N, C, S, S] with their intensities changed, as --t-fix says; nothing moves."""
    if o.t_fix == "photometric":
        return photometric(x)
    if o.t_fix == "code":
        return code_intensities(x)
    return x


def T_var(x, o):
    """Images [N, C, S, S], moved as --t-var says."""
    n = len(x)
    S = x.shape[-1]
    if o.t_var == "code":
        return warp(x, code_grid(n, S, x.device))
    return warp(x, spatial_grid(n, S, o.pretrain_rotation, x.device, elastic=0.))


def four_views(X, o):
    """I1, I2, V1, V2 of the slices X, Eq. (5), each [N, C, S, S]."""
    X = common.channels_last(X)
    I1 = T_fix(X, o)
    I2 = T_fix(X, o)
    return I1, I2, T_var(I1, o), T_var(I2, o)                      # as in the code


def down(x, blocks):
    """Images [N, C, S, S] scaled so that k decoder blocks undo it: [N, C, S / 2^k, S / 2^k]."""
    return F.interpolate(x, scale_factor=.5 ** blocks, mode="bilinear")


def branches(unet, heads, views, dense=True):
    """What the losses L_g, L_d, L_ER compare, Eqs. (6) and (7): pairs (dominant, auxiliary).

    A dict: g: (Z^g, Z~^g) [N, 128]. Where `dense` also d: (Z^l, Z~^l) [N, C, h, w] and ER: (Y, Y~),
    [N, C', h', w'] of the small image and [N, C', h, w] of the full one. PCL needs g alone. A pass
    for each view, with batch statistics of its own [code].
    """
    I1, I2, V1, V2 = views                                         # [N, C, S, S] each
    k = heads.blocks
    # Z~^g = g~_ins(e(V2))    (6)
    Z_g_aux = heads.g_ins_aux(unet.encoder(V2)[-1])                # [N, 128]
    # Z^g = g_ins(d(e(down(V1))))    (4); (7) without d
    features = unet.encoder(down(V1, k))
    # [N, C, h, w], with --eq7 [N, C', h', w']
    dominant = features[-1] if heads.eq7 else unet.decoder(features, k)
    Z_g = heads.g_ins(dominant)                                    # [N, 128]
    pairs = {"g": (Z_g, Z_g_aux)}
    if dense:
        # Y~ = e(I2), Z~^l = g~_pix(Y~)    (6)
        Y_aux = unet.encoder(I2)[-1]                               # [N, C', h, w]
        Z_l_aux = heads.g_pix_aux(Y_aux)                           # [N, C, h, w]
        # Y = e(down(I1)), Z^l = d(Y)    (7)
        features = unet.encoder(down(I1, k))
        Y = features[-1]                                           # [N, C', h', w']
        Z_l = unet.decoder(features, k)                            # [N, C, h, w]
        pairs["d"] = (Z_l, Z_l_aux)
        pairs["ER"] = (Y, Y_aux)
    return pairs


def pretrain_optimiser(unet, heads, o):
    """AdamW, or the paper's SGD, of the heads and what is trained of the U-Net."""
    trained = tuple(f"{part}." for part in trained_parts(o))
    parameters = [p for k, p in unet.named_parameters() if k.startswith(trained)]
    parameters += heads.parameters()
    if o.pretrain_optimiser == "sgd":
        return torch.optim.SGD(parameters, o.pretrain_lr, momentum=.9, weight_decay=1e-5)
    return torch.optim.AdamW(parameters, o.pretrain_lr, weight_decay=1e-5)


def pretrain(run, large):
    """Train encoder, k decoder blocks and heads on training slices without labels.

    large: the slices of --data at --pretrain-size. Writes pretrained.pt, returns its content.
    """
    o = run.o
    pool = common.pretraining_slices(run, large)
    torch.manual_seed(o.pretrain_seed)
    unet = run.place(run.unet(classes=2))
    heads = run.place(Heads(unet.encoder.widths, o.decoder_blocks, o.eq7))
    torch.manual_seed(o.pretrain_seed)                             # the same slices for any heads
    optimiser = pretrain_optimiser(unet, heads, o)
    dense = o.lambda2 > 0 or o.lambda3 > 0
    for step in run.steps("pretrain", o.pretrain_steps, (unet, heads), optimiser):
        optimiser.param_groups[0]["lr"] = o.pretrain_lr * cosine(step, o.pretrain_steps)
        pick = common.random_slices(pool.numbers, o.pretrain_batch)        # [N]
        views = four_views(pool.image(pick, run.device), o)        # 4 x [N, C, S, S]
        with run.autocast():
            pairs = branches(unet, heads, views, dense)
        position = torch.from_numpy(pool.position[pick])           # [N]
        L = {"g": global_contrastive_loss(*pairs["g"], position, o.threshold, o.temperature)}
        loss = o.lambda1 * L["g"]                                  # PCL
        if dense:
            L["d"] = dense_contrastive_loss(*pairs["d"], position, o.threshold, o.temperature)
            L["ER"] = equivariant_loss(*pairs["ER"])
            # L_MLC = lambda1 L_g + lambda2 L_d + lambda3 L_ER    (8)
            loss = o.lambda1 * L["g"] + o.lambda2 * L["d"] + o.lambda3 * L["ER"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 50 == 0:
            if dense:                                              # chance of L_ER: another slice
                Y, Y_aux = pairs["ER"]
                L["ER_strangers"] = equivariant_loss(Y, Y_aux.roll(1, 0))
            run.log("pretrain", step=step, chance=math.log(2 * o.pretrain_batch - 1), **L)
    return run.save_pretrained(unet=unet.state_dict(), parts=trained_parts(o),
                               heads=heads.state_dict())


# ------------------------------------------------------------------------------------ fine-tuning


def finetune(run, row, start=None):
    """Train a U-Net on the labelled slices of a row, from scratch or from pretrained.pt."""
    o = run.o
    numbers = run.dataset.of_patients(run.patients(row.labelled), labelled=True)
    torch.manual_seed(row.seed)
    unet = run.place(run.unet())
    taken = []
    if start:
        taken, _ = common.load_weights(unet, start["unet"], start["parts"])
    old = [p for k, p in unet.named_parameters() if k in taken]
    new = [p for k, p in unet.named_parameters() if k not in taken]
    groups = [{"params": old, "peak": o.pretrained_lr}, {"params": new, "peak": o.lr}]
    optimiser = torch.optim.AdamW(groups, weight_decay=1e-4)
    for step in run.steps(row.name, o.steps, (unet,), optimiser):
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * cosine(step, o.steps)
        image, label = common.labelled_batch(run, numbers, o.batch)        # [N, C, S, S], [N, S, S]
        with run.autocast():
            logits = unet(image).float()                           # [N, K, S, S]
        ce = F.cross_entropy(logits, label)
        dice = common.dice_loss(logits, label)
        optimiser.zero_grad()
        (ce + dice).backward()
        optimiser.step()
        if step % 50 == 0:
            run.log(row.name, step=step, cross_entropy=ce, dice_loss=dice,
                    cross_entropy_chance=math.log(len(run.classes)))
    return unet


# ---------------------------------------------------------------------------------------- figures


def heat(maps):
    """Mean size of the channels of maps [M, C, h, w], in [0, 1] by its maximum: [M, h, w]."""
    size = maps.float().abs().mean(1)                              # [M, h, w]
    most = size.amax((1, 2), keepdim=True).clamp(min=1e-9)         # [M, 1, 1]
    return (size / most).cpu()


def networks(run, start=None):
    """The U-Net and the heads as pre-training starts, or with what pretrained.pt holds."""
    o = run.o
    torch.manual_seed(o.pretrain_seed)
    unet = run.unet(classes=2).to(run.device)                      # with batch statistics
    heads = Heads(unet.encoder.widths, o.decoder_blocks, o.eq7).to(run.device)
    if start:
        common.load_weights(unet, start["unet"], start["parts"])
        heads.load_state_dict(start["heads"])
    return unet, heads


@torch.no_grad()
def draw_branches(run, large, start):
    """branches.png: inputs of the two branches, and what they make of them, a slice a row.

    Of Y~ and Y how strong they are; of Z^l and Z~^l how alike their vectors are, before and after,
    and in brackets those of two different slices: collapse would make these alike as well.
    """
    o = run.o
    # batch statistics of maps of 1 x 1 need two slices, so training patients may fill up
    patients = run.split["val"] + run.split["train"]
    numbers = common.middle_slices(large, patients[:3])
    torch.manual_seed(0)
    I1, I2, V1, V2 = four_views(large.image(numbers, run.device), o)       # [M, C, S, S] each
    inputs = {"auxiliary: I2": I2, "auxiliary: V2": V2,
              "dominant: down(I1)": down(I1, o.decoder_blocks),
              "dominant: down(V1)": down(V1, o.decoder_blocks)}
    alike = {}
    for when, weights in (("before", None), ("after", start)):
        pairs = branches(*networks(run, weights), (I1, I2, V1, V2))
        Z_l, Z_l_aux = pairs["d"]
        own = F.cosine_similarity(Z_l, Z_l_aux, dim=1)             # [M, h, w], as L_d compares
        strangers = F.cosine_similarity(Z_l, Z_l_aux.roll(1, 0), dim=1)
        alike[f"cosine Z^l, Z~^l, {when}"] = own.cpu(), strangers.mean((1, 2)).cpu()
    Y, Y_aux = pairs["ER"]
    strong = {"auxiliary: Y~ = e(I2)": heat(Y_aux), "dominant: Y = e(down(I1))": heat(Y)}
    figure, axes = common.new_figure(len(numbers), 8)
    for v, row in enumerate(axes):
        for axis, (title, x) in zip(row[:4], inputs.items()):
            common.show(axis, x[v, 0].cpu(), title=f"{title}\n{x.shape[2]} x {x.shape[3]}")
        for axis, (title, x) in zip(row[4:6], strong.items()):
            axis.imshow(x[v], cmap="magma", vmin=0, vmax=1)
            axis.set_title(f"{title}\n{x.shape[1]} x {x.shape[2]}", fontsize=8)
        for axis, (title, (x, strangers)) in zip(row[6:], alike.items()):
            axis.imshow(x[v], cmap="magma", vmin=-1, vmax=1)
            axis.set_title(f"{title}\nmean {x[v].mean():.2f} ({strangers[v]:.2f})", fontsize=8)
    common.save_figure(figure, run.out / "figures/branches.png")


@torch.no_grad()
def draw_heat(run, start):
    """heat.png: where the encoder's two deepest levels answer, before and after pre-training."""
    patients = run.split["val"][:4]
    images = run.dataset.image(common.middle_slices(run.dataset, patients), run.device)
    pictures = images[:, 0].cpu()                                  # [M, S, S] of [M, C, S, S]
    figure, axes = common.new_figure(len(patients), 5)
    for axis, picture, patient in zip(axes[:, 0], pictures, patients):
        common.show(axis, picture, title=patient)
    for column, weights in enumerate([None, start]):
        title = ["before", "after"][column]
        torch.manual_seed(run.o.pretrain_seed)
        unet = run.unet(classes=2).to(run.device)
        if weights:
            common.load_weights(unet, weights["unet"], weights["parts"])
        features = unet.encoder(images)                            # with batch statistics
        for pair, level in enumerate((3, 4)):
            maps = heat(features[level])[:, None]                  # [M, 1, S / 2^l, S / 2^l]
            maps = F.interpolate(maps, images.shape[2:], mode="bilinear")[:, 0]    # [M, S, S]
            for axis, picture, x in zip(axes[:, 1 + 2 * pair + column], pictures, maps):
                common.show(axis, picture, title=f"level {level}, {title}")
                axis.imshow(x, cmap="jet", alpha=.45, vmin=0, vmax=1)
    common.save_figure(figure, run.out / "figures/heat.png")


# ------------------------------------------------------------------------------------------- main

LOOK_INIT = """what the encoder answers to before and after pre-training, at its two deepest levels.
In the table, `gain` is what the weights of --init are worth beside scratch."""
LOOK = """the last two maps of a row: how alike the vectors are that one branch
decodes from the small image and the other encodes from the full one, before and after pre-training
(with L_d they should be; in brackets: of different slices). In the table, `gain` is what that is
worth beside the same network from scratch."""


def main(arguments=None):
    o = common.parse_options(METHOD, __doc__, OPTIONS, arguments, PAPER_ALSO)
    if o.predict:
        return common.predict_files(o)
    run = common.Run(o)
    check(run)
    is_pcl = o.decoder_blocks == o.lambda2 == o.lambda3 == 0
    ours = "pcl" if is_pcl else METHOD
    methods = run.choose("scratch", ours)
    run.begin()
    large = common.prepare(run.cases, o.spacing, o.pretrain_size, o.cache)
    start = run.pretrained()
    if start is None and ours in methods:
        start = pretrain(run, large)
    for row in run.rows():
        unet = finetune(run, row, start if row.method == ours else None)
        run.score(row, unet)
    common.draw_overlays(run, run.first_nets(common.build_unet, "scratch", ours))
    if not start:
        return run.report("overlays.png", common.LOOK_ROWS)
    draw_heat(run, start)
    if o.init:                                                     # no heads of these options
        return run.report("heat.png", LOOK_INIT)
    draw_branches(run, large, start)
    run.report("branches.png", LOOK)


if __name__ == "__main__":
    common.run_main(main)
