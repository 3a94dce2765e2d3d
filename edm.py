"""The teacher: a class-conditional denoiser trained as in EDM. Everything later distils it.

Trains D(x; sigma, label), an estimate of E[x0 | x0 + sigma n = x, label], from random weights, on all classes.

  coefficients of the preconditioning     [EDM Table 1]        Precond
  noise levels of the sampler             [EDM Eq. 5]          sigma_steps
  1000 noise levels for distillation      [MSD App. D.1]       sigma_bins
  loss weight and loss                    [EDM Eq. 2], [MSD Eq. 8]'s lambda_t      loss_weight, denoising_loss
  deterministic and stochastic sampler    [EDM Alg. 1], [EDM Alg. 2]               heun
  score from denoiser                     [MSD Eq. 7]          dmd.py

Not here: the exact denoiser of the toy (toy_mog.py, `--teacher exact`), distillation (dmd.py, msd.py).

Departures from the paper
 1. Noise law of the toy: ln sigma ~ N(-2.5, 1.5^2). EDM's (-1.2, 1.2) draws sigma < 0.005, the toy's std, once in 3 000
    times; "1000 steps" read literally (`--noise-law bins`, the paper preset) draws them uniformly on the Karras grid.
 2. Learning rate 1e-2 with cosine decay and 7 000 steps, not 1e-4 and 100 000 (`--preset paper`).
 3. The sampler takes 40 steps on the toy; far fewer miss the narrow modes even with the exact denoiser
    (`python msd.py --teacher exact --sampler-steps 18` shows the teacher's distance to the data).

Run      python edm.py --dataset toy
"""
import copy
import dataclasses
import math
from pathlib import Path

import torch
from torch import Tensor, nn

import common
import data
from common import flag

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7


@dataclasses.dataclass
class Flags:
    """Flags of every run, and the teacher's."""
    dataset: str = flag("toy", "what to train on", choices=tuple(data.DATASETS))
    preset: str = flag("default", "a line of PRESETS: default, few-pairs, paper or smoke")
    out: str = flag("runs/toy", "the run folder")
    seed: int = flag(0, "first seed; seed S lives in OUT/seedS", low=0)
    seeds: int = flag(1, "number of seeds, S, S+1, …, trained as one stack", low=1)
    device: str = flag("auto", "auto (cuda if there is one), cpu, cuda or mps")
    threads: int = flag(0, "CPU threads; 0 = as many as there are cores, at most 8", low=0)
    dry_run: bool = flag(False, "print every value and its source, and stop")
    quiet: bool = flag(False, "no progress bars")
    teacher: str = flag("train", "train, exact (the toy's closed form), or a checkpoint's path")
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
    sampler_steps: int = flag(40, "steps of the teacher's Heun sampler (2 n - 1 evaluations)", "samples", low=2)
    eval_samples: int = flag(100_000, "samples of every reported distance", "samples", low=8)
    save_every: int = flag(500, "updates between checkpoints", low=1)


PRESETS = {
    ("toy", "default"): {},
    ("toy", "few-pairs"): {},
    ("toy", "paper"): dict(teacher_steps=100_000, teacher_lr=1e-4, teacher_decay="constant", noise_law="bins", sampler_steps=256),
    ("toy", "smoke"): dict(teacher_steps=60, teacher_batch=64, sampler_steps=8, eval_samples=800, save_every=20),
}


# -------------------------------------------------------------------------------------- preconditioning, noise, loss

def like(sigma: Tensor, x: Tensor) -> Tensor:
    """Reshape sigma [...] so that it broadcasts over x [..., *shape]: sigma.ndim is the number of leading dimensions."""
    return sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))


def per_sample(value: Tensor) -> Tensor:
    """Mean over one sample's elements, [...]: an image is the last three dimensions [C, H, W], a toy point the last one."""
    return value.flatten(-3).mean(-1) if value.ndim > 3 else value.mean(-1)


class Precond(nn.Module):
    """D(x; sigma, label) = c_skip x + c_out F(c_in x, c_noise, label) [EDM Table 1, Eq. 7]; x [..., *shape], sigma [...].

    With data of variance sigma_data^2 the network's input and its target have unit variance at every sigma."""

    def __init__(self, net: nn.Module, sigma_data: float = 0.5):
        super().__init__()
        self.net, self.sigma_data = net, sigma_data

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in, c_noise at sigma."""
        total = sigma ** 2 + self.sigma_data ** 2
        return self.sigma_data ** 2 / total, sigma * self.sigma_data / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        return like(c_skip, x) * x + like(c_out, x) * self.net(like(c_in, x) * x, c_noise, label).to(x.dtype)


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
         S_max: float = math.inf, S_noise: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Samples x0 [..., *shape] from unit-variance latents z [..., *shape]; 2 steps - 1 evaluations of `denoise`.

    [EDM Alg. 1] with S_churn = 0 (deterministic: the ODE that pairs z with x0); [EDM Alg. 2] with S_churn > 0.
    The state is float64 (float32 on mps); `denoise` is called in z's dtype."""
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
        if t[i + 1] > 0:                                            # the last step, to 0, stays Euler's
            d_next = (x_next - D(x_next, t[i + 1])) / t[i + 1]
            x_next = x + (t[i + 1] - t_hat) * (d + d_next) / 2
        x = x_next
    return x.to(z.dtype)


# ----------------------------------------------------------------------------------------------------------- training

def draw_sigma(draws, step: int, batch: int, flags) -> Tensor:
    """Noise levels [M, batch] of the teacher's training: lognormal [EDM Table 1] or uniform over the bins."""
    if flags.noise_law == "bins":
        grid = sigma_bins().float().to(draws.device)
        return grid[draws.integers(step, "sigma", 0, len(grid), batch)]
    sigma = (flags.P_mean + flags.P_std * draws.normal(step, "sigma", batch)).exp()
    return sigma.clamp(1e-4, 1e3)                                   # the weight 1 / sigma^2 of a stray draw stays bounded


def train(run: common.Stage, flags: Flags, members: list[common.Member], device) -> Precond:
    """Train one teacher per member (per seed) as a stack; returns the averaged weights."""
    facts = data.DATASETS[flags.dataset]
    draws = common.Draws("teacher", members, device)
    D = Precond(facts.net(len(members), facts.sizes[0]), facts.sigma_data).to(device)
    ema = copy.deepcopy(D).requires_grad_(False)
    optimizer = torch.optim.AdamW(D.parameters(), betas=(0.9, 0.999), weight_decay=flags.weight_decay, fused=True)
    start = run.resume(D=D, ema=ema, optimizer=optimizer)

    for step in run.range(start):
        x, label = data.real(facts, draws, step, flags.teacher_batch)
        sigma = draw_sigma(draws, step, flags.teacher_batch, flags)                             # [M, B]
        noise = draws.normal(step, "noise", flags.teacher_batch, *facts.shape)
        loss = denoising_loss(D, x, label, sigma, noise, facts.sigma_data).mean(-1)             # [M]
        run.check(step, loss, [f"teacher of seed {m.seed}" for m in members])
        common.set_learning_rate(optimizer, common.learning_rate(
            flags.teacher_lr, step, flags.teacher_steps, 100, flags.teacher_decay))
        optimizer.zero_grad()
        loss.sum().backward()
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


def lineage(flags: Flags, seed: int) -> dict:
    """The flags that determine the teacher of a seed: part of every later stage's config.json."""
    if flags.teacher == "train":
        return {"dataset": flags.dataset, "seed": seed, "teacher": "train", **common.stage_config(flags, "teacher")}
    name = "exact" if flags.teacher == "exact" else common.fingerprint(load_teacher(flags.teacher))
    return {"dataset": flags.dataset, "seed": seed, "teacher": name}


def load_teacher(path) -> Precond:
    """A frozen Precond denoiser, a stack of one, from a checkpoint of ours (ema.pt). UserError if it is none."""
    saved = common.load_tensors(Path(path))
    try:
        facts = data.DATASETS[saved["dataset"]]
        D = Precond(facts.net(1, saved["size"]), facts.sigma_data)
        D.load_state_dict(saved["net"])
        if "partition" in saved:
            raise KeyError("a student, not a teacher")
    except (KeyError, TypeError, RuntimeError, IndexError, AttributeError, ValueError):
        raise common.UserError(f"{path}: not a teacher checkpoint of this code (give a run's seed*/teacher/ema.pt)") from None
    return D.requires_grad_(False)


def get_teachers(flags: Flags, device) -> list[Precond]:
    """One trained network per seed: loaded from --teacher PATH, reused from the run folder, or trained now as one stack.

    With `--teacher exact` the scores are exact, but a student still needs weights to start from: these."""
    if flags.teacher not in ("train", "exact"):
        return [load_teacher(flags.teacher).to(device) for _ in seeds(flags)]
    facts = data.DATASETS[flags.dataset]
    if flags.teacher == "exact" and facts.exact is None:
        raise common.UserError(f"--teacher exact: {flags.dataset} has no closed form; train one or give a checkpoint's path")
    folders = {seed: Path(flags.out) / f"seed{seed}" / "teacher" for seed in seeds(flags)}
    for seed, folder in folders.items():
        common.check_config(folder, {"dataset": flags.dataset, "seed": seed, **common.stage_config(flags, "teacher")})
        if common.finished(folder, ("ema.pt",)):
            print(f"teacher of seed {seed}: reused from {folder}")
    for group in common.unfinished(list(folders.values()), ("ema.pt",)):
        members = [common.Member(s, 1, 0, tuple(range(facts.classes))) for s, f in folders.items() if f in group]
        run = common.Stage("teacher", {f: slice(i, i + 1) for i, f in enumerate(group)}, flags.teacher_steps, flags.save_every,
                           flags.quiet)
        D = train(run, flags, members, device)
        for i, folder in enumerate(group):
            net = {k: v[i:i + 1].cpu().clone() for k, v in D.state_dict().items()}
            if facts.exact:
                one = Precond(facts.net(1, facts.sizes[0]), facts.sigma_data).requires_grad_(False)
                one.load_state_dict(net)
                compare(one, facts, members[i].seed, folder)
            common.save_tensors(folder / "ema.pt", {"dataset": flags.dataset, "size": facts.sizes[0], "net": net})
    return [load_teacher(f / "ema.pt").to(device) for f in folders.values()]


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
    if flags.dry_run:
        print(common.describe(flags))
        return
    device = common.device(flags.device, flags.threads)
    print(f"edm: teacher of {flags.dataset}, {flags.teacher_steps} steps of batch {flags.teacher_batch}, on {device}, "
          f"into {flags.out}")
    get_teachers(flags, device)
    print("\n".join(str(Path(flags.out) / f"seed{seed}" / "teacher") for seed in seeds(flags)))


if __name__ == "__main__":
    main()
