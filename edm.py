"""The teacher: a class-conditional denoiser trained as in EDM. Everything later distils it.

Trains D(x; sigma, label), an estimate of E[x0 | x0 + sigma n = x, label], from random weights, on all classes.

  coefficients of the preconditioning     [EDM Table 1]        Precond
  noise levels of the sampler             [EDM Eq. 5]          sigma_steps
  1000 noise levels for distillation      [MSD App. D.1]       sigma_bins
  loss weight and loss                    [EDM Eq. 2], [MSD Eq. 8]'s lambda_t      loss_weight, denoising_loss
  deterministic and stochastic sampler    [EDM Alg. 1], [EDM Alg. 2]               heun; of order 1: DDIM

Not here: loading, guidance (teacher.py), the toy's exact denoiser (toy_mog.py).

Departures from the paper
 1. Noise law of the toy: ln sigma ~ N(-2.5, 1.5^2), and one draw in ten uniform on the Karras grid, without which the
    students' level, 80, is hardly trained. EDM's (-1.2, 1.2) draws sigma < 0.005, the toy's std, once in 3 000 times.
    "1000 steps" read literally is `--noise-law bins`, the paper preset.
 2. Learning rate 2e-2 with cosine decay and 3 500 steps, not 1e-4 and 100 000 (`--preset paper`).
 3. The sampler takes 40 steps on the toy; far fewer miss the narrow modes even with the exact denoiser
    (`python msd.py --teacher exact --sampler-steps 18` shows the teacher's distance to the data).

Run      python edm.py --dataset toy
"""
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common import AdamW, Average, Batch, learning_rate
from flags import flag

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7
PYTORCH_SEED = 67280421310721  # its own default; a run's seed is added
NAME, BY, USES = "teacher", "", {}  # its group of flags; no best checkpoint is chosen; flags of others
WARMUP = 100  # steps of rising learning rate: the teacher's, TSM's, O2MKD's


@dataclass
class Flags:
    """The teacher"""
    prefix = "teacher_"
    which: str = flag("train", "train, exact (the toy's closed form), or the path of a checkpoint or of NVIDIA's .pkl",
                      name="teacher", record=False)
    size: str = flag("", "its size: B, S, XS or XXS; none = B", choices=("", "B", "S", "XS", "XXS"))
    steps: int = flag(3500, "updates of the teacher", low=1)
    batch: int = flag(1024, "batch of the teacher", low=1)
    lr: float = flag(2e-2, "its learning rate (AdamW)", low=0)
    decay: str = flag("cosine", "schedule of its learning rate, and of TSM's", choices=("cosine", "linear", "constant"))
    ema: float = flag(0.998, "decay of the average of its weights", low=0, below=1)
    noise_law: str = flag("mixed", "of sigma in training: ln sigma ~ N(P_mean, P_std^2), 1000 bins alike, or one draw "
                                   "in ten by bins", choices=("lognormal", "bins", "mixed"), name="noise_law")
    P_mean: float = flag(-2.5, "mean of ln sigma", name="P_mean")
    P_std: float = flag(1.5, "standard deviation of ln sigma", low=0, name="P_std")
    label_dropout: float = flag(0.0, "share of the batch trained without a class, for guidance (--cfg)", low=0, below=1,
                                name="label_dropout")
    cfg: float = flag(1.0, "classifier-free guidance scale, of mu_teacher and its samples alone; 1 = none", low=1e-9,
                      name="cfg", record=False)
    sampler_steps: int = flag(40, "steps of its Heun sampler (2 n - 1 evaluations)", low=2, name="sampler_steps",
                              record=False)


@dataclass
class Churn:
    """The teacher's stochastic sampler (`heun`); for samples to compare with, never for pairs"""
    prefix = ""
    S_churn: float = flag(0.0, "noise added, over all steps; 0 = the deterministic one", low=0, name="S_churn")
    S_min: float = flag(0.0, "the lowest level with it", low=0, name="S_min")
    S_max: float = flag(SIGMA_MAX, "the highest", low=0, name="S_max")
    S_noise: float = flag(1.0, "its standard deviation", low=0, name="S_noise")


LAW = dict(noise_law="lognormal", P_mean=-1.2, P_std=1.2)  # [EDM Table 1]
PRESETS = {
    ("toy", "paper"): dict(steps=100_000, lr=1e-4, decay="constant", noise_law="bins", sampler_steps=256),
    ("toy", "smoke"): dict(steps=60, batch=64, sampler_steps=8),
    **{("toy-prompts", name): dict(label_dropout=0.1) for name in ("default", "paper", "smoke")},
    ("fashion-mnist", "default"): dict(LAW, steps=6000, batch=64, lr=2e-3, ema=0.999, sampler_steps=18),
    ("fashion-mnist", "smoke"): dict(size="XXS", steps=6, batch=8, sampler_steps=3),
    # not in the paper; EDM's own CIFAR-10 run: 200 million images, batch 512, 1e-3, EMA over half a million
    ("cifar10", "default"): dict(LAW, steps=390_000, batch=512, lr=1e-3, decay="constant", ema=0.9993,
                                 sampler_steps=18),
    ("cifar10", "smoke"): dict(size="XXS", steps=4, batch=4, sampler_steps=2),
    ("ffhq64", "default"): dict(sampler_steps=40), ("afhqv2-64", "default"): dict(sampler_steps=40),  # [EDM Table 2]
    # [MSD App. D.2.1]: NVIDIA's teacher, 256 Heun steps. Trained here, it would be EDM's run: batch 4096, 1e-4
    ("imagenet64", "default"): dict(LAW, which="edm-imagenet-64x64-cond-adm.pkl", steps=610_000, batch=4096, lr=1e-4,
                                    decay="constant", ema=0.99994, sampler_steps=256),
}


# ---- preconditioning, noise, loss

def like(sigma: Tensor, x: Tensor) -> Tensor:
    """sigma [...] to be broadcast over x [..., *shape]: sigma.ndim is the number of leading dimensions."""
    return sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))


def per_sample(value: Tensor) -> Tensor:
    """Mean over a sample's elements, [...]: an image is the last three dimensions, a toy point the last one."""
    return value.flatten(-3).mean(-1) if value.ndim > 3 else value.mean(-1)


class Precond(nn.Module):
    """D(x; sigma, label) = c_skip x + c_out F(c_in x, c_noise, label) [EDM Table 1, Eq. 7]; x [..., *shape].

    For data of variance sigma_data^2 the network's input and target have unit variance at every sigma. With
    sigma_min > 0 D(x; sigma_min) = x exactly: a consistency model's boundary scalings (consistency.py). sigma_in: the
    level at which it generates in one step (dmd.one_step)."""

    def __init__(self, net: nn.Module, sigma_data: float = 0.5, sigma_min: float = 0.0, sigma_in: float = SIGMA_MAX):
        super().__init__()
        self.net, self.sigma_data, self.sigma_min, self.sigma_in = net, sigma_data, sigma_min, sigma_in

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in, c_noise at sigma."""
        total, above = sigma ** 2 + self.sigma_data ** 2, sigma - self.sigma_min
        c_skip = self.sigma_data ** 2 / (above ** 2 + self.sigma_data ** 2)
        return c_skip, above * self.sigma_data / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None = None, features: bool = False):
        """D [..., *shape]; with features=True also the network's bottleneck at (x, sigma) (o2mkd.py)."""
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        out = self.net(like(c_in, x) * x, c_noise, label, features=features)
        out, middle = out if features else (out, None)
        D = like(c_skip, x) * x + like(c_out, x) * out.to(x.dtype)
        return (D, middle.to(x.dtype)) if features else D

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


@functools.lru_cache
def _levels(device) -> Tensor:
    return sigma_bins().float().to(device)


def level(bins: Tensor) -> Tensor:
    """sigma [...] of noise bins [...], 0 to 999."""
    return _levels(bins.device)[bins]


def loss_weight(sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 = 1 / c_out^2 [EDM Table 1], [MSD App. D.2.1]."""
    return (sigma ** 2 + sigma_data ** 2) / (sigma * sigma_data) ** 2


def denoising_loss(denoise, x: Tensor, label: Tensor | None, sigma: Tensor, noise: Tensor, sigma_data: float = 0.5):
    """lambda ||D(x + sigma noise; sigma, label) - x||^2, per sample [...] [EDM Eq. 2], [MSD Eq. 8]."""
    D = denoise(x + like(sigma, x) * noise, sigma, label)
    return loss_weight(sigma, sigma_data) * per_sample((D - x) ** 2)


@torch.no_grad()
def by_band(losses: Tensor | None, sigma: Tensor | None, name: str, edges=(0.0, 0.01, 0.1, 1.0, math.inf)) -> dict:
    """Means of losses [M, b] within bands of sigma, {name: [M]}: one number over all levels hides what moves."""
    out = {}
    for low, high in zip(edges, edges[1:]) if losses is not None else ():
        band = (sigma >= low) & (sigma < high)
        if band.any(1).all():
            out[f"{name}, {low:g} <= sigma < {high:g}"] = (losses * band).sum(1) / band.sum(1)
    return out


# ---- sampler

@torch.no_grad()
def heun(denoise, z: Tensor, label: Tensor | None, steps: int, *, S_churn: float = 0.0, S_min: float = 0.0,
         S_max: float = math.inf, S_noise: float = 1.0, generator=None, order: int = 2) -> Tensor:
    """Samples x0 [..., *shape] from unit-variance latents z [..., *shape]; 2 steps - 1 evaluations of `denoise`.

    [EDM Alg. 1] with S_churn = 0 (deterministic: the ODE that pairs z with x0); [EDM Alg. 2] with S_churn > 0.
    The state is float64 (float32 on mps); `denoise` is called in z's dtype. order 1: Euler's steps, in
    EDM's variables DDIM [Song et al. 2021]."""
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
        d = (x - D(x, t_hat)) / t_hat  # dx/dt of the probability-flow ODE
        x_next = x + (t[i + 1] - t_hat) * d
        if t[i + 1] > 0 and order == 2:  # the last step, to 0, stays Euler's
            d_next = (x_next - D(x_next, t[i + 1])) / t[i + 1]
            x_next = x + (t[i + 1] - t_hat) * (d + d_next) / 2
        x = x_next
    return x.to(z.dtype)


SAMPLERS = {"heun": 2, "ddim": 1}  # their orders


def evaluations(steps: int, sampler: str = "heun") -> int:
    """Of the network, to make one sample."""
    return 2 * steps - 1 if sampler == "heun" else steps


# ---- training

def draw_sigma(batch: Batch, f: Flags) -> Tensor:
    """Noise levels [M, b] of the teacher's training: lognormal [EDM Table 1], uniform over the bins, or mixed."""
    if f.noise_law == "bins":
        return level(batch.integers("sigma", 0, 999))
    sigma = (f.P_mean + f.P_std * batch.normal("sigma", shape=())).exp()
    sigma = sigma.clamp(1e-4, 1e3)  # the weight 1 / sigma^2 of a stray draw stays bounded
    if f.noise_law == "mixed":
        return torch.where(batch.uniform("mixed") < 0.1, level(batch.integers("sigma of bins", 0, 999)), sigma)
    return sigma


def dropped(batch: Batch, label: Tensor, share: float) -> list[tuple[slice, Tensor | None]]:
    """[(rows, their labels)]: the first `share` of the batch trains without a class."""
    free = max(0, min(label.shape[1], round(share * batch.size) - batch.part.start))
    return [(slice(free, None), label[:, free:])] + [(slice(free), None)] * (free > 0)


def length(flags) -> tuple[int, int]:
    """Updates of this stage, and its batch."""
    return flags.teacher.steps, flags.teacher.batch


def passes(flags) -> tuple[int, int]:
    """(a, b): forward passes of networks of the teacher's size and of the student's, over the whole stage, for one
    student and one sample of its batch. A backward pass counts as two."""
    return 3 * flags.teacher.steps, 0


def guided(flags) -> int:
    """Passes of one evaluation of mu_teacher."""
    return 1 + (flags.teacher.cfg != 1)


def train(run: "run.Run", flags: "msd.Flags", task: "students.Task") -> dict:
    """Train the stack of denoisers task.G, one per seed, on task.real; returns {file: the weights to keep in it}."""
    f, D = flags.teacher, task.G
    average, opt = Average(D, f.ema), AdamW(D, run)
    state = dict(D=D, **average.state(), optimizer=opt)
    for step in run.steps(state):
        for batch in run.batches(step):
            x, label = task.real(batch)  # [M, b, *shape], [M, b]
            sigma, noise = draw_sigma(batch, f), batch.normal("noise")
            for rows, y in dropped(batch, label, f.label_dropout):
                opt.backward(denoising_loss(D, x[:, rows], y, sigma[:, rows], noise[:, rows]))  # [EDM Eq. 2]
        loss = opt.step(step, learning_rate(f.lr, step, f.steps, WARMUP, f.decay))
        average.update(step)
        if (step + 1) % 50 == 0:
            run.log(step + 1, loss=loss)
        run.save(step + 1, state)
    return {"ema.pt": average.now}


if __name__ == "__main__":
    import msd
    msd.alone(NAME)
