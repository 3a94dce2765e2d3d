"""The teacher: a class-conditional denoiser trained as in EDM. Everything later distils it.

Trains D(x; sigma, label), an estimate of E[x0 | x0 + sigma n = x, label], from random weights, on all classes.

  coefficients of the preconditioning     [EDM Table 1]        Precond
  noise levels of the sampler             [EDM Eq. 5]          sigma_steps
  1000 noise levels for distillation      [MSD App. D.1]       sigma_bins
  loss weight and loss                    [EDM Eq. 2], [MSD Eq. 8]'s lambda_t      loss_weight, denoising_loss
  deterministic and stochastic sampler    [EDM Alg. 1], [EDM Alg. 2]               heun; of first order: ddim
  score from denoiser                     [MSD Eq. 7]          dmd.py

Not here: the exact denoiser of the toy (toy_mog.py, `--teacher exact`), distillation (dmd.py, msd.py).

Departures from the paper
 1. Noise law of the toy: ln sigma ~ N(-2.5, 1.5^2). EDM's (-1.2, 1.2) draws sigma < 0.005, the toy's std, once in 3 000
    times; "1000 steps" read literally (`--noise-law bins`, the paper preset) draws them uniformly on the Karras grid.
 2. Learning rate 1e-2 with cosine decay and 7 000 steps, not 1e-4 and 100 000 (`--preset paper`).
 3. The sampler takes 40 steps on the toy; far fewer miss the narrow modes even with the exact denoiser
    (`python msd.py --teacher exact --sampler-steps 18` shows the teacher's distance to the data).

Run      python edm.py --dataset toy
         python edm.py --dataset fashion-mnist
Many GPUs    torchrun --nproc-per-node 8 edm.py --dataset cifar10
"""
import copy
import dataclasses
import functools
import math
from pathlib import Path

import torch
from torch import Tensor, nn

import common
import data
import snapshot
import unet
from common import flag

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7
PYTORCH_SEED = 67280421310721                                       # its own default; a run's seed is added


@dataclasses.dataclass
class Flags:
    """Flags of every run, and the teacher's."""
    dataset: str = flag("toy", "what to train on", choices=tuple(data.DATASETS))
    preset: str = flag("default", "a line of PRESETS: default, few-pairs, paper or smoke")
    resolution: int = flag(0, "pixels of the images, pooled from the dataset's own; 0 = the dataset's default", low=0)
    data: str = flag("", "file or folder of the images; none = the usual places (data.py)")
    features: str = flag("", "of the Frechet distance: path of NVIDIA's TorchScript Inception; none = our own classifier")
    out: str = flag("runs/toy", "the run folder")
    seed: int = flag(0, "first seed; seed S lives in OUT/seedS", low=0)
    seeds: int = flag(1, "number of seeds, S, S+1, … (the toy's train as one stack)", low=1)
    device: str = flag("auto", "auto (cuda if there is one), cpu, cuda or mps")
    threads: int = flag(0, "CPU threads; 0 = as many as there are cores, at most 8", low=0)
    precision: str = flag("auto", "inside image networks: bf16 on a GPU and fp32 on a CPU, or one of them", choices=("auto", "fp32", "bf16"))
    compile: bool = flag(False, "torch.compile the image networks: minutes at the start, faster on a GPU")
    micro_batch: int = flag(0, "samples a rank takes through a network at a time; 0 = its whole share of the batch", low=0)
    dry_run: bool = flag(False, "print every value and its source, and stop")
    quiet: bool = flag(False, "no progress bars")
    teacher: str = flag("train", "train, exact (the toy's closed form), or the path of a checkpoint or of NVIDIA's .pkl")
    teacher_size: str = flag("", "its size: B, S, XS or XXS; none = B", "teacher", ("", "B", "S", "XS", "XXS"))
    teacher_steps: int = flag(7000, "updates of the teacher", "teacher", low=1)
    teacher_batch: int = flag(384, "batch of the teacher", "teacher", low=1)
    teacher_lr: float = flag(1e-2, "its learning rate (AdamW)", "teacher", low=0)
    teacher_decay: str = flag("cosine", "its schedule after 100 warm-up steps", "teacher", ("cosine", "constant"))
    teacher_ema: float = flag(0.998, "decay of the average of its weights", "teacher", low=0)
    weight_decay: float = flag(0.01, "of every AdamW", "teacher", low=0)
    noise_law: str = flag("lognormal", "of the teacher's sigma: ln sigma ~ N(P_mean, P_std^2), or 1000 equal bins", "teacher",
                          ("lognormal", "bins"))
    P_mean: float = flag(-2.5, "mean of ln sigma", "teacher")
    P_std: float = flag(1.5, "standard deviation of ln sigma", "teacher", low=0)
    label_dropout: float = flag(0.0, "share of the teacher's batch trained without a class, for guidance (--cfg)", "teacher", low=0, later=True)
    cfg: float = flag(1.0, "classifier-free guidance scale of the teacher: in its samples, in mu_teacher, nowhere else; 1 = none", low=0)
    sampler_steps: int = flag(40, "steps of the teacher's Heun sampler (2 n - 1 evaluations)", "samples", low=2)
    eval_samples: int = flag(100_000, "samples of every reported distance", "samples", low=8)
    save_every: int = flag(500, "updates between checkpoints", low=1)


PRESETS = {
    ("toy", "default"): {},
    ("toy", "few-pairs"): {},
    ("toy", "paper"): dict(teacher_steps=100_000, teacher_lr=1e-4, teacher_decay="constant", noise_law="bins", sampler_steps=256),
    ("toy", "smoke"): dict(teacher_steps=60, teacher_batch=64, sampler_steps=8, eval_samples=800, save_every=20),
    **{("toy-prompts", p): dict(like="toy", out="runs/toy-prompts", label_dropout=0.1) for p in ("default", "few-pairs", "paper", "smoke")},
    ("fashion-mnist", "default"): dict(out="runs/fashion-mnist", teacher_steps=6000, teacher_batch=64, teacher_lr=2e-3, teacher_ema=0.999,
                                       P_mean=-1.2, P_std=1.2, sampler_steps=18, eval_samples=10_000, save_every=250),
    ("fashion-mnist", "smoke"): dict(out="runs/fashion-mnist", teacher_size="XXS", teacher_steps=6, teacher_batch=8, sampler_steps=3, eval_samples=40, save_every=3),
    # no numbers of this dataset in the paper; EDM's own CIFAR-10 run: 200 million images, batch 512, 1e-3, EMA over half a million
    ("cifar10", "default"): dict(out="runs/cifar10", teacher_steps=390_000, teacher_batch=512, teacher_lr=1e-3, teacher_decay="constant", teacher_ema=0.9993,
                                 P_mean=-1.2, P_std=1.2, sampler_steps=18, eval_samples=50_000, save_every=1000),
    ("cifar10", "smoke"): dict(out="runs/cifar10", teacher_size="XXS", teacher_steps=4, teacher_batch=4, sampler_steps=2, eval_samples=20, save_every=2),
    # [MSD App. D.2.1]: NVIDIA's teacher, 256 Heun steps; App. E: 50 000 samples. Trained here, it would be EDM's run: batch 4096, 1e-4
    ("imagenet64", "default"): dict(out="runs/imagenet64", teacher="edm-imagenet-64x64-cond-adm.pkl", teacher_steps=610_000, teacher_batch=4096, teacher_lr=1e-4,
                                    teacher_decay="constant", teacher_ema=0.99994, P_mean=-1.2, P_std=1.2, sampler_steps=256, eval_samples=50_000, save_every=1000),
}
PRESETS["imagenet64", "paper"] = PRESETS["imagenet64", "default"]


# -------------------------------------------------------------------------------------- preconditioning, noise, loss

def like(sigma: Tensor, x: Tensor) -> Tensor:
    """Reshape sigma [...] so that it broadcasts over x [..., *shape]: sigma.ndim is the number of leading dimensions."""
    return sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))


def per_sample(value: Tensor) -> Tensor:
    """Mean over one sample's elements, [...]: an image is the last three dimensions [C, H, W], a toy point the last one."""
    return value.flatten(-3).mean(-1) if value.ndim > 3 else value.mean(-1)


class Precond(nn.Module):
    """D(x; sigma, label) = c_skip x + c_out F(c_in x, c_noise, label) [EDM Table 1, Eq. 7]; x [..., *shape], sigma [...].

    With data of variance sigma_data^2 the network's input and its target have unit variance at every sigma. With sigma_min > 0
    the output is shifted so that D(x; sigma_min) = x exactly: a consistency model's boundary scalings (consistency.py)."""

    def __init__(self, net: nn.Module, sigma_data: float = 0.5, sigma_min: float = 0.0):
        super().__init__()
        self.net, self.sigma_data, self.sigma_min = net, sigma_data, sigma_min

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in, c_noise at sigma."""
        total, above = sigma ** 2 + self.sigma_data ** 2, sigma - self.sigma_min
        return (self.sigma_data ** 2 / (above ** 2 + self.sigma_data ** 2), above * self.sigma_data / total.sqrt(), 1 / total.sqrt(),
                sigma.log() / 4)

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None = None, features: bool = False):
        """D [..., *shape]; with features=True also the network's bottleneck at (x, sigma) (o2mkd.py)."""
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        out, *middle = self.net(like(c_in, x) * x, c_noise, label, features=True) if features else (self.net(like(c_in, x) * x, c_noise, label),)
        D = like(c_skip, x) * x + like(c_out, x) * out.to(x.dtype)
        return (D, middle[0].to(x.dtype)) if features else D

    def bottleneck(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        """The network's bottleneck at (x, sigma), without what follows it: what a head sees (adm.py)."""
        _, _, c_in, c_noise = self.coefficients(sigma)
        return self.net(like(c_in, x) * x, c_noise, label, features="only").to(x.dtype)


def _karras(n: int) -> Tensor:
    """n levels from SIGMA_MAX down to SIGMA_MIN, equally spaced in sigma^(1/rho), float64, with exact ends."""
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    top, low = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    sigma = (top + ramp * (low - top)) ** RHO
    sigma[0], sigma[-1] = SIGMA_MAX, SIGMA_MIN
    return sigma


def sigma_steps(n: int) -> Tensor:
    """The sampler's n + 1 levels, 80 down to 0.002 and then 0, float64 [EDM Eq. 5]. ValueError if n < 2."""
    if n < 2:
        raise ValueError("a sampler needs at least 2 steps")
    return torch.cat([_karras(n), torch.zeros(1, dtype=torch.float64)])


def sigma_bins(n: int = 1000) -> Tensor:
    """The same grid, ascending, for distillation: [0] = 0.002 (clean), [n-1] = 80, float64 [MSD App. D.1]."""
    return _karras(n).flip(0)


def loss_weight(sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 = 1 / c_out^2 [EDM Table 1], [MSD App. D.2.1]."""
    return (sigma ** 2 + sigma_data ** 2) / (sigma * sigma_data) ** 2


def denoising_loss(denoise, x: Tensor, label: Tensor | None, sigma: Tensor, noise: Tensor, sigma_data: float = 0.5) -> Tensor:
    """lambda ||D(x + sigma noise; sigma, label) - x||^2, mean over elements, per sample [...] [EDM Eq. 2], [MSD Eq. 8]."""
    D = denoise(x + like(sigma, x) * noise, sigma, label)
    return loss_weight(sigma, sigma_data) * per_sample((D - x) ** 2)


# ------------------------------------------------------------------------------------------------------------ sampler

@torch.no_grad()
def heun(denoise, z: Tensor, label: Tensor | None, steps: int, *, S_churn: float = 0.0, S_min: float = 0.0,
         S_max: float = math.inf, S_noise: float = 1.0, generator: torch.Generator | None = None, order: int = 2) -> Tensor:
    """Samples x0 [..., *shape] from unit-variance latents z [..., *shape]; 2 steps - 1 evaluations of `denoise`.

    [EDM Alg. 1] with S_churn = 0 (deterministic: the ODE that pairs z with x0); [EDM Alg. 2] with S_churn > 0.
    The state is float64 (float32 on mps); `denoise` is called in z's dtype. order 1: without the second evaluation (`ddim`)."""
    lead = label.shape if label is not None else z.shape[:1]
    wide = torch.float32 if z.device.type == "mps" else torch.float64

    def D(x: Tensor, t: float) -> Tensor:
        return denoise(x.to(z.dtype), torch.full(lead, t, dtype=z.dtype, device=z.device), label).to(wide)

    t = sigma_steps(steps).tolist()
    x = z.to(wide) * SIGMA_MAX
    for i in range(steps):
        gamma = min(S_churn / steps, math.sqrt(2) - 1) if S_churn > 0 and S_min <= t[i] <= S_max else 0.0
        t_hat = t[i] * (1 + gamma)
        if gamma > 0:
            noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=wide)
            x = x + S_noise * math.sqrt(t_hat ** 2 - t[i] ** 2) * noise
        d = (x - D(x, t_hat)) / t_hat                               # dx/dt of the probability-flow ODE
        x_next = x + (t[i + 1] - t_hat) * d
        if t[i + 1] > 0 and order == 2:                             # the last step, to 0, stays Euler's
            d_next = (x_next - D(x_next, t[i + 1])) / t[i + 1]
            x_next = x + (t[i + 1] - t_hat) * (d + d_next) / 2
        x = x_next
    return x.to(z.dtype)


def ddim(denoise, z: Tensor, label: Tensor | None, steps: int, **churn) -> Tensor:
    """As `heun`, but of first order: one evaluation a step. DDIM [Song et al. 2021] in EDM's variables is Euler's method on its ODE."""
    return heun(denoise, z, label, steps, order=1, **churn)


SAMPLERS = {"heun": heun, "ddim": ddim}


def evaluations(steps: int, sampler: str = "heun") -> int:
    """Of the network, for one sample."""
    return 2 * steps - 1 if sampler == "heun" else steps


# ----------------------------------------------------------------------------------------------------------- training

def draw_sigma(draws, step: int, batch: int, flags) -> Tensor:
    """Noise levels [M, batch] of the teacher's training: lognormal [EDM Table 1] or uniform over the bins."""
    if flags.noise_law == "bins":
        grid = sigma_bins().float().to(draws.device)
        return grid[draws.integers(step, "sigma", 0, len(grid), batch)]
    sigma = (flags.P_mean + flags.P_std * draws.normal(step, "sigma", batch)).exp()
    return sigma.clamp(1e-4, 1e3)                                   # the weight 1 / sigma^2 of a stray draw stays bounded


def ready(net: nn.Module, sigma_data: float, flags, device, sigma_min: float = 0.0) -> Precond:
    """The denoiser around a network, on its device, an image network with the precision that the flags ask for."""
    if hasattr(net, "precision"):
        net.precision = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}[flags.precision]
    return Precond(net, sigma_data, sigma_min).to(device)


def stacked(nets: list[Precond], size, facts: data.Facts, flags, device) -> Precond:
    """One stack of these stacks of one, all of this size, made `ready`."""
    out = ready(facts.net(len(nets), size), nets[0].sigma_data, flags, device, nets[0].sigma_min)
    out.load_state_dict(common.stack_of(nets))
    return out


def mu_teacher(flags, D, exact=None):
    """What distillation takes for the teacher: D, or the closed form `exact` (--teacher exact), guided by --cfg.

    Guidance [Ho and Salimans 2022]: D(x; none) + scale (D(x; label) - D(x; none)). Scale 1 is D itself. Only the teacher is
    guided: students and mu_fake learn the guided distribution, and are never guided themselves."""
    D = exact if flags.teacher == "exact" else D
    if flags.cfg == 1:
        return D

    def guided(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        free = D(x, sigma, None)
        return free + flags.cfg * (D(x, sigma, label) - free)
    return guided


def check_guidance(flags) -> None:
    """--label-dropout and --cfg together, and with --teacher. UserError for what cannot be."""
    dropped = getattr(flags, "source", {}).get("label_dropout") == "flag"
    if flags.label_dropout >= 1:
        raise common.UserError(f"--label-dropout {flags.label_dropout}: must be below 1, or the teacher learns no class")
    if flags.teacher != "train" and flags.label_dropout > 0 and dropped:
        raise common.UserError(f"--label-dropout {flags.label_dropout}: of a teacher that is trained here; --teacher {flags.teacher} is not")
    if flags.cfg == 0:
        raise common.UserError("--cfg 0: would ignore the class altogether; 1 = no guidance")
    if flags.cfg != 1 and flags.teacher == "train" and flags.label_dropout == 0:
        raise common.UserError(f"--cfg {flags.cfg}: the teacher never learns to do without a class; give --label-dropout 0.1 too (a new teacher: "
                               f"another --out)")
    if flags.cfg != 1 and flags.teacher not in ("train", "exact"):
        beside = Path(flags.teacher).with_name("config.json")
        if not (beside.exists() and common.load_json(beside).get("label_dropout")):
            raise common.UserError(f"--cfg {flags.cfg}: {flags.teacher} does not say that it was trained with --label-dropout, so its answer without a class "
                                   f"means nothing; leave --cfg out")


def compiled(flags, *denoisers: Precond) -> None:
    """--compile: compile the image networks in place (a copy of a compiled network is not compiled)."""
    for D in denoisers:
        if flags.compile and hasattr(getattr(D, "net", None), "precision"):
            D.net.compile()


def train(run: common.Stage, flags: Flags, source, members: list[common.Member], device) -> Precond:
    """Train one teacher per member (per seed) as a stack; returns the averaged weights."""
    facts = data.facts(flags.dataset, flags.resolution)
    draws = common.Draws("teacher", members, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(PYTORCH_SEED + members[0].seed)
        net = facts.net(len(members), flags.teacher_size)
    D = ready(net, facts.sigma_data, flags, device)
    ema = copy.deepcopy(D).requires_grad_(False)
    compiled(flags, D)
    optimizer = torch.optim.AdamW(D.parameters(), betas=(0.9, 0.999), weight_decay=flags.weight_decay, fused=True)
    start = run.resume(D=D, ema=ema, optimizer=optimizer)

    B, names = flags.teacher_batch, [f"teacher of seed {m.seed}" for m in members]
    for step in run.range(start):
        optimizer.zero_grad()
        loss = torch.zeros(len(members), device=device)
        for part in run.ranks.parts(B, flags.micro_batch):          # one part, unless ranks or memory ask for more
            x, label = source.batch(draws, step, B, part)
            sigma = draw_sigma(draws, step, B, flags)[:, part]                                  # [M, b]
            noise = draws.normal(step, "noise", B, *facts.shape)[:, part]
            free = max(0, min(x.shape[1], round(flags.label_dropout * B) - part.start))         # the batch's first samples: no class
            share = denoising_loss(D, x[:, free:], label[:, free:], sigma[:, free:], noise[:, free:], facts.sigma_data).sum(-1) / B     # [M]
            if free:
                share = share + denoising_loss(D, x[:, :free], None, sigma[:, :free], noise[:, :free], facts.sigma_data).sum(-1) / B
            share.sum().backward()
            loss += share.detach()
        loss = run.check(step, loss, names)
        run.ranks.add_gradients(D)
        common.set_learning_rate(optimizer, common.learning_rate(
            flags.teacher_lr, step, flags.teacher_steps, 100, flags.teacher_decay))
        optimizer.step()
        common.ema_update(ema, D, flags.teacher_ema, step)
        if (step + 1) % 50 == 0:
            run.log(step + 1, loss=loss)
            run.show(loss=loss.mean().item())
        run.save(step + 1, D=D, ema=ema, optimizer=optimizer)
    return ema


def seeds(flags: Flags) -> list[int]:
    """--seed S and --seeds n: [S, …, S + n - 1]."""
    return list(range(flags.seed, flags.seed + flags.seeds))


def origin(flags: Flags, seed: int) -> dict:
    """Dataset, resolution and seed: the first lines of every config.json."""
    known = data.facts(flags.dataset, flags.resolution)
    return {"dataset": known.name, **({"resolution": known.resolution} if known.native else {}), "seed": seed}


def lineage(flags: Flags, seed: int) -> dict:
    """The flags that determine mu_teacher of a seed: part of every later stage's config.json."""
    guidance = {"cfg": flags.cfg} if flags.cfg != 1 else {}
    if flags.teacher == "train":
        return {**origin(flags, seed), "teacher": "train", **common.stage_config(flags, "teacher"), **guidance}
    return {**origin(flags, seed), "teacher": "exact" if flags.teacher == "exact" else _teacher_hash(flags.teacher), **guidance}


@functools.lru_cache
def _teacher_hash(path: str) -> str:
    return common.fingerprint(load_teacher(path))


def load_teacher(path) -> Precond:
    """A frozen denoiser from a checkpoint of ours (ema.pt), a stack of one, or from NVIDIA's EDM snapshot (.pkl).

    Its attributes `facts` (data.Facts, as far as the file tells) and `size` say what it is. Never runs code from the file.
    UserError if it is no teacher."""
    path = Path(path)
    if path.suffix == ".pkl":
        found = snapshot.read(path)
        D = Precond(unet.UNet(found.resolution, found.channels, found.classes, found.size), found.sigma_data)
        D.net.load_state_dict(found.state)
        same = [f for f in data.DATASETS.values() if (f.shape, f.classes) == ((found.channels, *[found.resolution] * 2), found.classes)]
        D.facts = same[0] if same else dataclasses.replace(data.DATASETS["imagenet64"], name=path.name, classes=found.classes,
                                                           shape=(found.channels, found.resolution, found.resolution))
        D.size = tuple(found.size)
        return D.requires_grad_(False)
    saved = common.load_tensors(path)
    try:
        facts = data.facts(saved["dataset"], saved.get("resolution", 0))
        D = Precond(facts.net(1, saved["size"]), facts.sigma_data)
        D.load_state_dict(saved["net"])
        if "partition" in saved:
            raise KeyError("a student, not a teacher")
    except (KeyError, TypeError, RuntimeError, IndexError, AttributeError, ValueError):
        raise common.UserError(f"{path}: not a teacher checkpoint of this code (give a run's seed*/teacher/ema.pt)") from None
    D.facts, D.size = facts, saved["size"]
    return D.requires_grad_(False)


def get_teachers(flags: Flags, source, device, ranks: common.Ranks) -> list[Precond]:
    """One trained network per seed: loaded from --teacher PATH, reused from the run folder, or trained now.

    source() gives the data when they are needed. The toy's seeds train as one stack. (`--teacher exact`: tsm.teachers_by_tsm.)"""
    facts = data.facts(flags.dataset, flags.resolution)
    if flags.teacher != "train":
        teachers = [load_teacher(flags.teacher) for _ in seeds(flags)]
        found = teachers[0].facts
        if (found.shape, found.classes) != (facts.shape, facts.classes):
            raise common.UserError(f"--teacher {flags.teacher}: made for {'x'.join(map(str, found.shape))}, {found.classes} classes, but "
                                   f"{facts.name} has {'x'.join(map(str, facts.shape))}, {facts.classes} classes; give the --dataset "
                                   f"and --resolution that it was trained on")
        return [ready_teacher(D, flags, device) for D in teachers]
    folders = {seed: Path(flags.out) / f"seed{seed}" / "teacher" for seed in seeds(flags)}
    for seed, folder in folders.items():
        common.check_config(folder, {**origin(flags, seed), **common.stage_config(flags, "teacher")})
        if common.finished(folder, ("ema.pt",)) and ranks.rank == 0:
            print(f"teacher of seed {seed}: reused from {folder}")
    groups = ranks.first(lambda: common.unfinished(list(folders.values()), ("ema.pt",), facts.stacked))
    for group in groups:
        members = [common.Member(s, 1, 0, tuple(range(facts.classes))) for s, f in folders.items() if f in group]
        run = common.Stage("teacher", {f: slice(i, i + 1) for i, f in enumerate(group)}, flags.teacher_steps, flags.save_every,
                           flags.quiet, ranks)
        D = train(run, flags, source(), members, device)
        for i, folder in enumerate(group if run.main else ()):
            net = common.rows_of(D, slice(i, i + 1), len(group))
            if facts.exact:
                one = Precond(facts.net(1, flags.teacher_size), facts.sigma_data).requires_grad_(False)
                one.load_state_dict(net)
                compare(one, facts, members[i].seed, folder)
            common.save_tensors(folder / "ema.pt", {"dataset": facts.name, "resolution": facts.resolution,
                                                    "size": flags.teacher_size or facts.sizes[0], "net": net})
    ranks.wait()
    return [ready_teacher(load_teacher(f / "ema.pt"), flags, device) for f in folders.values()]


def ready_teacher(D: Precond, flags: Flags, device) -> Precond:
    """A loaded teacher, made `ready`, still knowing what it is."""
    out = ready(D.net, D.sigma_data, flags, device)
    out.facts, out.size = D.facts, D.size
    return out.requires_grad_(False)


@torch.no_grad()
def error_by_level(D, exact, levels: Tensor, facts, seed: int, points: int = 20_000) -> Tensor:
    """Root-mean-square difference of D from the exact denoiser on diffused data, in units of c_out(sigma), per level.

    In these units the network's whole target has unit variance: 0.05 is 5 %."""
    g = common.generator(seed, "error by level")
    label = data.stratified(points, facts.classes)[None]
    x, noise = facts.sample(label, g), torch.randn(1, points, *facts.shape, generator=g)
    out = []
    for level in levels.tolist():
        sigma = torch.full(label.shape, level)
        x_t = x + level * noise
        square = per_sample((D(x_t, sigma, label) - exact(x_t, sigma, label)) ** 2).mean()
        out.append((square * loss_weight(sigma[0, 0], facts.sigma_data)).sqrt())
    return torch.stack(out)


def compare(D, facts, seed: int, folder: Path) -> None:
    """Print and keep (error.json) the trained teacher's error against the exact denoiser, by noise level."""
    levels = torch.tensor([0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2.0, 10.0, 80.0])
    error = error_by_level(D, facts.exact, levels, facts, seed)
    common.save_json(folder / "error.json", {"sigma": levels.tolist(), "error": error.tolist()})
    print(f"teacher of seed {seed} against the exact denoiser (RMS, in units of c_out):\n"
          "  sigma " + " ".join(f"{s:>6g}" for s in levels.tolist()) + "\n"
          "  error " + " ".join(f"{e:>6.3f}" for e in error.tolist()))


@common.command
def main(argv=None):
    """Train the teacher alone, compare it with the exact denoiser, and say where it is."""
    flags = common.parse(Flags, PRESETS, argv, __doc__)
    check_guidance(flags)
    if flags.cfg != 1:
        raise common.UserError(f"--cfg {flags.cfg}: guides the teacher when students learn from it (msd.py), not while it is trained; leave it out")
    if flags.dry_run:
        print(common.describe(flags))
        return
    device = common.device(flags.device, flags.threads)
    ranks = common.world(device)
    if flags.teacher != "train":
        raise common.UserError(f"--teacher {flags.teacher}: edm.py trains a teacher; give --teacher train (msd.py takes the others)")
    ranks.parts(flags.teacher_batch, flags.micro_batch)
    if ranks.rank == 0:
        print(f"edm: teacher of {flags.dataset}, {flags.teacher_steps} steps of batch {flags.teacher_batch}, on {device}, "
              f"into {flags.out}")
    get_teachers(flags, data.opened(flags, ranks), device, ranks)
    if ranks.rank == 0:
        print("\n".join(str(Path(flags.out) / f"seed{seed}" / "teacher") for seed in seeds(flags)))
    common.leave(ranks)


if __name__ == "__main__":
    main()
