"""Stage 0, TSM: a smaller network learns the teacher's denoiser, so that one-step distillation has weights to start from [MSD Sec. 3.3].

A student of the teacher's size starts from the teacher's weights; a smaller one cannot. Teacher score matching trains it first as
a diffusion model, on real data, with the teacher's output as the target. It keeps its noise input, so G(sigma_max z; sigma_max) is
then simply that network at sigma_max. Also here: the paper's baseline for small students, post-distillation.

  teacher score matching                   [MSD Eq. 3]                      tsm_loss, train
  mu^(0) = Distill_TSM(mu_teacher, D_real)  [MSD Eq. 4, first line]          distil
  post-distillation [MSD Sec. 4.1, Table 1] post: a small student imitates the outputs of the best one-step students

One common network for all students (--tsm-common, App. B.6, the default), or one per student on its own classes
(--no-tsm-common, App. D.2.2). Real data can be the teacher's samples (--real generated, App. D.3.3).
With `--teacher exact`, which has no weights at all, TSM also makes the network of full size that the others start from.

Not here: what follows (dmd.py, adm.py), the order of the stages (msd.py), the sizes themselves (toy_mog.py, unet.py).

Departures from the paper
 1. The fake denoiser of later stages stays as large as the teacher ("re-initialized from teacher weights", App. D.2.1): only
    G is small. The paper does not say which.
 2. An average of the weights is kept, learning rates decay (toy and small images); the paper says neither.
 3. Post-distillation: the paper gives one sentence. Here: fresh latents z, loss l(G(z), G_best(z)) with the distance of the
    paired regression [MSD Eq. 9], as many updates as the three stages together, checkpoints chosen by the data, as in ADM.

Run      python tsm.py --dataset toy --student-size XS
Many GPUs    torchrun --nproc-per-node 8 tsm.py --dataset imagenet64 --student-size XS
"""
import copy
import dataclasses
from pathlib import Path

import torch
from torch import Tensor

import common
import data
import dmd
import edm
from common import flag


@dataclasses.dataclass
class Flags(dmd.Flags):
    """Flags of smaller students, beside those of the teacher and of DM."""
    student_size: str = flag("", "size of the students: B, S, XS or XXS; none = the teacher's", "size", ("", "B", "S", "XS", "XXS"))
    tsm_steps: int = flag(4000, "updates of TSM", "tsm", low=1)
    tsm_batch: int = flag(384, "batch of TSM", "tsm", low=1)
    tsm_lr: float = flag(1e-2, "its learning rate (AdamW)", "tsm", low=0)
    tsm_decay: str = flag("cosine", "its schedule after 100 warm-up updates", "tsm", ("cosine", "linear", "constant"))
    tsm_ema: float = flag(0.998, "decay of the average of its weights", "tsm", low=0)
    tsm_common: bool = flag(True, "one TSM network for all students; else one per student, on its own classes", "tsm")
    real: str = flag("data", "the real data of TSM and ADM: the dataset, or the teacher's samples (y of the pairs)", "real", ("data", "generated"))
    post_steps: int = flag(0, "updates of post-distillation; 0 = those of TSM, DM and ADM together", "post", low=0)
    post_lr: float = flag(1e-2, "its learning rate (AdamW, the schedule of DM)", "post", low=0)
    post_of: str = flag("adm", "whose outputs it imitates: this stage of the untagged students of the same K", "post", ("dm", "adm"))


PRESETS = {
    ("toy", "default"): {}, ("toy", "few-pairs"): {}, ("toy", "paper"): dict(tsm_steps=100_000, tsm_lr=1e-4, tsm_decay="constant", tsm_ema=0.0),
    ("toy", "smoke"): dict(tsm_steps=20, tsm_batch=32, post_steps=8),
    ("fashion-mnist", "default"): dict(tsm_steps=3000, tsm_batch=64, tsm_lr=2e-3, tsm_ema=0.999, post_lr=1e-3),
    ("fashion-mnist", "smoke"): dict(tsm_steps=4, tsm_batch=4, post_steps=4),
    ("cifar10", "default"): dict(tsm_steps=200_000, tsm_batch=512, tsm_lr=1e-4, tsm_decay="constant", tsm_ema=0.0, post_lr=5e-5),
    ("cifar10", "smoke"): dict(tsm_steps=2, tsm_batch=2, post_steps=2),
    # [MSD App. D.2.2]; B.6 for XS and XXS, whose number of updates is not stated: that of S
    ("imagenet64", "default"): dict(tsm_steps=400_000, tsm_batch=576, tsm_lr=1e-4, tsm_decay="constant", tsm_ema=0.0, post_lr=2e-6),
    ("imagenet64", "default", "S"): dict(tsm_common=False, batch=160),
    ("imagenet64", "default", "XS"): dict(tsm_batch=3584, batch=224),
    ("imagenet64", "default", "XXS"): dict(tsm_batch=4864, batch=256),
}
# what post-distillation takes from DM's flags
POST_SHARED = ("weight_decay", "batch", "beta1", "beta2", "decay", "warmup", "clip_norm", "ema", "distance", "select_samples", "eval_every")
PRESETS |= {("imagenet64", "paper", *key[2:]): value for key, value in list(PRESETS.items()) if key[:2] == ("imagenet64", "default")}


# ------------------------------------------------------------------------------------------------------------ the loss

def tsm_loss(student, teacher, x: Tensor, label: Tensor | None, sigma: Tensor, noise: Tensor, sigma_data: float = 0.5) -> Tensor:
    """lambda_t ||mu_TSM(x_t, t) - mu_teacher(x_t, t)||^2 of real data x [..., *shape], per sample [...] [MSD Eq. 3].

    The denoising loss with the teacher's output for the target: no noise in the target, so it can reach 0. No gradient
    flows into the teacher."""
    x_t = x + edm.like(sigma, x) * noise
    with torch.no_grad():
        target = teacher(x_t, sigma, label)
    return edm.loss_weight(sigma, sigma_data) * edm.per_sample((student(x_t, sigma, label) - target) ** 2)


# ------------------------------------------------------------------------------------------------------------ training

def train(run: common.Stage, flags: Flags, members, teacher, net, source, device) -> edm.Precond:
    """Train the stack of denoisers that `net` initialises; returns the averaged weights.

    teacher: denoiser (x, sigma, label) -> [M, B, ...], never changed; source: real data, of each member's classes."""
    facts = data.facts(flags.dataset, flags.resolution)
    draws = common.Draws("tsm", members, device)
    D, ema = copy.deepcopy(net).requires_grad_(True), copy.deepcopy(net).requires_grad_(False)
    edm.compiled(flags, D)
    optimizer = torch.optim.AdamW(D.parameters(), betas=(0.9, 0.999), weight_decay=flags.weight_decay, fused=True)
    start = run.resume(D=D, ema=ema, optimizer=optimizer)

    B, names = flags.tsm_batch, [f"TSM of student {m.student} of {m.students}, seed {m.seed}" for m in members]
    for step in run.range(start):
        optimizer.zero_grad()
        loss = torch.zeros(len(members), device=device)
        for part in run.ranks.parts(B, flags.micro_batch):
            x, label = source.batch(draws, step, B, part)
            sigma = edm.draw_sigma(draws, step, B, flags)[:, part]                              # [M, b]
            noise = draws.normal(step, "noise", B, *facts.shape)[:, part]
            losses = tsm_loss(D, teacher, x, label, sigma, noise, facts.sigma_data)             # [M, b]
            share = losses.sum(-1) / B
            share.sum().backward()
            loss += share.detach()
        loss = run.check(step, loss, names)
        run.ranks.add_gradients(D)
        common.set_learning_rate(optimizer, common.learning_rate(flags.tsm_lr, step, flags.tsm_steps, 100, flags.tsm_decay))
        optimizer.step()
        common.ema_update(ema, D, flags.tsm_ema, step)
        if (step + 1) % 50 == 0:
            run.log(step + 1, loss=loss, **dmd.by_band(losses.detach(), sigma, "loss"))
            run.show(loss=loss.mean().item())
        run.save(step + 1, D=D, ema=ema, optimizer=optimizer)
    return ema


def train_post(run: common.Stage, flags: Flags, members, best_G, net, judge, references: dict, device):
    """Post-distillation: G imitates one-step students, z -> G_best(z), on fresh latents; returns (last, best) averaged weights.

    best_G: stack of the members' students to imitate; the rest as in dmd.train."""
    facts = data.facts(flags.dataset, flags.resolution)
    draws, ranks = common.Draws("post", members, device), run.ranks
    names = [f"student {m.student} of {m.students}, seed {m.seed}" for m in members]
    G = copy.deepcopy(net).requires_grad_(True)
    ema, best = copy.deepcopy(net).requires_grad_(False), copy.deepcopy(net).requires_grad_(False)
    edm.compiled(flags, G, ema)
    opt_G = torch.optim.AdamW(G.parameters(), betas=(flags.beta1, flags.beta2), weight_decay=flags.weight_decay, fused=True)
    record = {"distance": torch.full((len(members),), float("inf"))}
    start = run.resume(G=G, ema=ema, best=best, opt_G=opt_G, record=record)
    distance = dmd.lpips_distance(device) if flags.distance == "lpips" else flags.distance
    B, steps = flags.batch, post_steps(flags)
    for step in run.range(start):
        opt_G.zero_grad()
        loss = torch.zeros(len(members), device=device)
        for part in ranks.parts(B, flags.micro_batch):
            label = draws.label(step, "label", B)[:, part]                                      # [M, b], from Y_k
            z = draws.normal(step, "z", B, *facts.shape)[:, part]
            with torch.no_grad():
                y = dmd.one_step(best_G, z, label)
            share = dmd.regression_loss(dmd.one_step(G, z, label), y, distance).sum(-1) / B
            share.sum().backward()
            loss += share.detach()
        loss = run.check(step, loss, names)
        ranks.add_gradients(G)
        common.clip_gradients(G, flags.clip_norm, len(members))
        common.set_learning_rate(opt_G, common.learning_rate(flags.post_lr, step, steps, flags.warmup, flags.decay))
        opt_G.step()
        common.ema_update(ema, G, flags.ema, step)
        if (step + 1) % 50 == 0:
            run.log(step + 1, regression=loss)
        if (step + 1) % flags.eval_every == 0 or step + 1 == steps:
            dmd.keep_best(run, step + 1, dmd.own_distance(ema, facts, judge, members, references, flags.select_samples, device, ranks),
                          ema, best, record, facts.metric)
        run.save(step + 1, G=G, ema=ema, best=best, opt_G=opt_G, record=record)
    return ema, best


# ------------------------------------------------------------------------------------------------------ the whole stage

def post_steps(flags) -> int:
    """--post-steps, or the updates of the three stages together: what the small student's other way costs. flags: adm.Flags."""
    return flags.post_steps or flags.tsm_steps + flags.steps + flags.adm_steps


def size_of(flags: Flags, facts: data.Facts):
    """The students' size: --student-size, or the teacher's."""
    return flags.student_size or flags.teacher_size or facts.sizes[0]


def home(flags: Flags, member: common.Member, size: str) -> Path:
    """Where a student's TSM network lies: seed0/tsm/XS-4000 for all, or in the student's own stage folder."""
    if flags.tsm_common:
        name = size if isinstance(size, str) else "teacher"
        return Path(flags.out) / f"seed{member.seed}" / "tsm" / f"{name}-{flags.tsm_steps}{'-generated' * (flags.real == 'generated')}"
    return dmd.stage_folder(flags, member.seed, member.students, "tsm")


def config(flags: Flags, seed: int, size: str) -> dict:
    """The flags that determine a TSM network, but for its classes."""
    real = {"real": flags.real, **({"sampler_steps": flags.sampler_steps, **common.stage_config(flags, "pairs")} if flags.real == "generated" else {})}
    law = {k: getattr(flags, k) for k in ("noise_law", "P_mean", "P_std", "weight_decay")}
    return {**edm.lineage(flags, seed), "size": size, **real, **law, **common.stage_config(flags, "tsm")}


def distil(flags: Flags, members: list, size: str, teachers: list, source, device, ranks) -> list[dmd.Start]:
    """mu^(0) = Distill_TSM(mu_teacher, D_real) [MSD Eq. 4]: TSM networks of this size, trained or reused; per member, its start.

    teachers: one denoiser per seed; source() gives the real data."""
    facts, seeds = data.facts(flags.dataset, flags.resolution), edm.seeds(flags)
    whole = tuple(range(facts.classes))
    trained = [common.Member(s, 1, 0, whole) for s in seeds] if flags.tsm_common else members
    homes = [home(flags, m, size) for m in trained]
    random = [dmd.random_start(facts, size, m.seed) for m in trained]

    def train_stack(run, index: list[int]) -> dict:
        stack, row = [trained[i] for i in index], [seeds.index(trained[i].seed) for i in index]
        net = dmd.generators(flags, [random[i] for i in index], device)
        teacher = dmd.teacher_of(flags, row, teachers, device)
        return {"ema.pt": train(run, flags, stack, teacher, net, source(), device)}
    dmd.train_all(flags, "tsm", trained, homes, [config(flags, m.seed, size) for m in trained], flags.tsm_steps, train_stack, random, ranks, ("ema.pt",))
    return [dmd.start_from(home(flags, m, size), "ema.pt", 0 if flags.tsm_common else m.student) for m in members]


def teachers_by_tsm(flags: Flags, source, device, ranks) -> list[edm.Precond]:
    """For `--teacher exact`: networks of the teacher's size that match the closed form's scores, one per seed."""
    facts = data.facts(flags.dataset, flags.resolution)
    size, flags = flags.teacher_size or facts.sizes[0], dataclasses.replace(flags, tsm_common=True, real="data")
    members = [common.Member(s, 1, 0, tuple(range(facts.classes))) for s in edm.seeds(flags)]
    starts = distil(flags, members, size, [facts.exact] * len(members), source, device, ranks)
    out = [s.load() for s in starts]
    for D in out:
        D.facts, D.size = facts, size
    return [edm.ready_teacher(D, flags, device) for D in out]


def distil_post(flags: Flags, members: list, starts: list[dmd.Start], imitated: list[dmd.Start], inputs: dmd.Inputs, device, ranks) -> None:
    """Post-distillation for all members: best.pt and ema.pt in studentsK[-TAG]/post. imitated: per member, the student it copies."""
    def train_stack(run, index: list[int]) -> dict:
        stack = [members[i] for i in index]
        best_G = dmd.generators(flags, [imitated[i] for i in index], device).requires_grad_(False)
        references = {s: r["real_select"] for s, r in inputs.references.items()}
        ema, best = train_post(run, flags, stack, best_G, dmd.generators(flags, [starts[i] for i in index], device), inputs.judge, references, device)
        return {"best.pt": best, "ema.pt": ema}
    homes = [dmd.stage_folder(flags, m.seed, m.students, "post") for m in members]
    configs = [{**dmd.ancestry(flags, m.seed), "start": s.name, "imitated": i.name, **common.stage_config(flags, "size"), **common.stage_config(flags, "post"),
                "post_steps": post_steps(flags), **{n: getattr(flags, n) for n in POST_SHARED}} for m, s, i in zip(members, starts, imitated)]
    dmd.train_all(flags, "post", members, homes, configs, post_steps(flags), train_stack, starts, ranks)


def check_flags(flags: Flags) -> None:
    """Raise UserError for values that are fine alone but not together."""
    if flags.student_size not in ("", *data.DATASETS[flags.dataset].sizes):
        raise common.UserError(f"--student-size {flags.student_size}: {flags.dataset} has {', '.join(data.DATASETS[flags.dataset].sizes)}")
    if flags.tsm_ema >= 1:
        raise common.UserError(f"--tsm-ema {flags.tsm_ema}: must be below 1")


@common.command
def main(argv=None):
    """Train the common TSM network of one size, for each seed."""
    flags = common.parse(Flags, PRESETS_ALL, argv, __doc__)
    facts = data.facts(flags.dataset, flags.resolution)
    dmd.check_flags(flags)
    check_flags(flags)
    size = size_of(flags, facts)
    if flags.dry_run:
        print(common.describe(flags))
        return
    if flags.real == "generated" or not flags.tsm_common:
        raise common.UserError("tsm.py trains the common network on the dataset; for --real generated or --no-tsm-common: "
                               "python msd.py --stages tsm")
    device = common.device(flags.device, flags.threads)
    ranks = common.world(device)
    ranks.parts(flags.tsm_batch, flags.micro_batch)
    if ranks.rank == 0:
        print(f"tsm: {flags.dataset}, size {size}, {flags.tsm_steps} updates of batch {flags.tsm_batch}, on {device}, into {flags.out}")
    source = data.opened(flags, ranks)
    members = [common.Member(s, 1, 0, tuple(range(facts.classes))) for s in edm.seeds(flags)]
    with common.alone(Path(flags.out), ranks):
        teachers = [facts.exact] * len(members) if flags.teacher == "exact" else edm.get_teachers(flags, source, device, ranks)
        distil(flags, members, size, teachers, source, device, ranks)
    for m in members if ranks.rank == 0 else ():
        print(f"seed {m.seed}: {home(flags, m, size)}")
    common.leave(ranks)


PRESETS_ALL = common.merge(dmd.PRESETS_ALL, PRESETS)

if __name__ == "__main__":
    main()
