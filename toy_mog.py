"""The 2-D toy: a mixture of 64 Gaussians with an exact answer to everything [MSD App. A.2, D.1].

8 classes stand on a circle of radius 0.5; each is a ring of 8 Gaussians of radius 0.1 and standard deviation 0.005.
Their density, score and optimal denoiser are closed forms at every noise level: the toy is a lesson, a teacher
(`--teacher exact`) and the oracle of the tests.

What is here                                                    source
  sample, log_density, score, denoiser                          [MSD App. D.1], Tweedie's formula [EDM Eq. 3]
  ToyNet: the small MLP, many students in one stack             [MSD App. A.2] says only "a simple MLP"
  prompts: the same classes, asked for by embeddings            a first step towards text, without a text encoder
  histogram, l1, coverage: how good are these samples?          [MSD App. D.1]

Shapes: `...` stands for any leading dimensions: [B], or [K, B] for K stacked students. A label is a class, or a prompt,
which asks for class label % CLASSES.

Departures from the paper
 1. The rings' phase is not stated; the first Gaussian of every ring stands at angle 0, and class c at angle 2 pi c / 8.
 2. "Mean absolute difference of binned histogram values" depends on the number of samples; `l1` is the total variation,
    half the sum of absolute differences of the shares, in [0, 1]. With 100 000 samples in 200 x 200 bins the paper's
    figure is 5 times ours.
 3. The MLP is not described. Ours is residual; noise level and class enter together through a small embedding net.
"""
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PROMPTS, PROMPT_SIZE = 32, 8  # toy-prompts: conditions, and the length of their embeddings
CLASSES, MODES = 8, 8  # classes on the outer circle, Gaussians on each inner circle
OUTER, INNER, STD = 0.5, 0.1, 0.005  # radii of the two circles, std of one Gaussian
EXTENT, BINS = 0.75, 200  # the histogram covers [-EXTENT, EXTENT]^2 with BINS x BINS bins
SIZES = {"B": (64, 2), "S": (40, 2), "XS": (24, 2), "XXS": (12, 2)}  # ToyNet's width and depth


def means(device=None, dtype=torch.float32) -> Tensor:
    """Centres of the Gaussians, [CLASSES, MODES, 2]."""
    c = 2 * math.pi * torch.arange(CLASSES, dtype=torch.float64) / CLASSES
    m = 2 * math.pi * torch.arange(MODES, dtype=torch.float64) / MODES
    centre = OUTER * torch.stack([c.cos(), c.sin()], -1)  # [C, 2]
    ring = INNER * torch.stack([m.cos(), m.sin()], -1)  # [M, 2]
    return (centre[:, None] + ring).to(device=device, dtype=dtype)  # [C, M, 2]


def sample(label: Tensor, generator: torch.Generator) -> Tensor:
    """Exact samples x [..., 2] of the classes in `label` [...] (int64)."""
    mode = torch.randint(MODES, label.shape, generator=generator, device=generator.device)
    noise = torch.randn(*label.shape, 2, generator=generator, device=generator.device)
    return means(label.device)[label % CLASSES, mode] + STD * noise


def _log_components(x: Tensor, sigma: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log of weight x density of each Gaussian at noise level sigma, [..., M], and their centres [..., M, 2].

    M = MODES given a label, all 64 without one. Diffused by sigma, each Gaussian has variance STD^2 + sigma^2."""
    m = means(x.device, x.dtype)
    m = m.flatten(0, 1) if label is None else m[label % CLASSES]  # [64, 2] or [..., M, 2]
    var = (STD ** 2 + sigma ** 2)[..., None]  # [..., 1]
    square = (x[..., None, :] - m).square().sum(-1)  # [..., M]
    return -square / (2 * var) - torch.log(2 * math.pi * var * m.shape[-2]), m


def log_density(x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
    """log p_sigma(x | label) [...]; sigma [...] >= 0. Without a label: of the whole mixture."""
    return _log_components(x, sigma, label)[0].logsumexp(-1)


def denoiser(x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
    """The optimal denoiser E[x0 | x] [..., 2]: D*(x; sigma) = x + sigma^2 score [EDM Eq. 3]."""
    log_w, m = _log_components(x, sigma, label)
    w_m = (log_w.softmax(-1)[..., None] * m).sum(-2)  # posterior mean of the centres
    s2, n2 = STD ** 2, (sigma ** 2)[..., None]
    return (s2 * x + n2 * w_m) / (s2 + n2)


def score(x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
    """Gradient of log_density in x [..., 2], in closed form."""
    log_w, m = _log_components(x, sigma, label)
    return ((log_w.softmax(-1)[..., None] * m).sum(-2) - x) / (STD ** 2 + sigma ** 2)[..., None]


def prompts() -> Tensor:
    """The fixed embeddings E [PROMPTS, PROMPT_SIZE] of toy-prompts: 32 wordings of the 8 classes, in no helpful order.

    The first two entries point, roughly, to where the class lies, as a text embedding's directions mean something; the
    others are a word of the class's own; every wording differs a little."""
    g = torch.Generator().manual_seed(0)
    word = 0.5 * torch.randn(CLASSES, PROMPT_SIZE, generator=g)
    angle = 2 * math.pi * (torch.arange(CLASSES) + 0.5) / CLASSES
    word[:, :2] = torch.stack([angle.cos(), angle.sin()], -1)
    return word[torch.arange(PROMPTS) % CLASSES] + 0.1 * torch.randn(PROMPTS, PROMPT_SIZE, generator=g)


class ToyNet(nn.Module):
    """The toy's network F(x, c_noise, label) -> [..., 2]: `students` MLPs side by side, one batched matmul a layer.

    embeddings: fixed rows E [classes, d] that label picks from, through a learned layer, in the place of a learned
    table.

    Every parameter has a leading student dimension K; x is [K, B, 2], c_noise [K, B], label [K, B] (None: no class).
    Student k's output depends on student k's weights and rows alone.

    The first layer is a bank of waves sin(w.x + phase) of learned frequency w, started between 0.5 and 60; noise level
    and class set their phases. Noise of std s = c_in sigma in the input shrinks a wave's mean by exp(-(|w| s)^2 / 2);
    here the fastest waves fade as exp(-(|w| s / CUTOFF)^2 / 2), gently, since a generator must draw sharp borders at
    sigma = 80, where its input is noise alone. Residual SiLU layers follow. features=True also returns a middle
    layer [K, B, width], the bottleneck; "only": it alone, without what follows."""
    LOWEST, HIGHEST, CUTOFF, SIGMA_DATA = 0.5, 60.0, 48.0, 0.5

    def __init__(self, students: int = 1, width: int = 64, depth: int = 2, embeddings: Tensor | None = None):
        super().__init__()
        self.depth, self.bottleneck = depth, (width,)
        waves, embed, octaves = 2 * width, width // 2, 8

        def parameter(value: Tensor) -> nn.Parameter:  # every student starts from the same values
            return nn.Parameter(value.repeat(students, *[1] * value.ndim))

        def normal(*shape: int, std: float) -> nn.Parameter:
            return parameter(torch.randn(shape) * std)

        angle = 2 * math.pi * torch.rand(waves)
        frequency = torch.logspace(math.log10(self.LOWEST), math.log10(self.HIGHEST), waves)
        self.register_buffer("fading", -0.5 * (frequency / self.CUTOFF) ** 2, persistent=False)  # [waves]
        self.register_buffer("octaves", math.pi / 16 * 2.0 ** torch.arange(octaves), persistent=False)
        self.w_noise = normal(2 * octaves, embed, std=octaves ** -0.5)
        self.register_buffer("E", embeddings, persistent=False)
        rows = CLASSES if embeddings is None else embeddings.shape[1]
        self.table = normal(rows, embed, std=1.0)  # the class embedding, or the layer that E[label] goes through
        self.b_embed = normal(1, embed, std=0.5)
        self.w_wave = parameter(frequency * torch.stack([angle.cos(), angle.sin()]))  # [K, 2, waves]
        self.b_phase = parameter(2 * math.pi * torch.rand(1, waves))
        self.w_phase = normal(embed, waves, std=embed ** -0.5)
        self.w_in = normal(waves + 2, width, std=waves ** -0.5)
        self.w_embed = normal(embed, width, std=embed ** -0.5)
        self.b_in = normal(1, width, std=0.3)
        self.w_hidden = nn.ParameterList([normal(width, width, std=1.4 * width ** -0.5) for _ in range(depth)])
        self.b_hidden = nn.ParameterList([normal(1, width, std=0.1) for _ in range(depth)])
        self.w_out = normal(width, 2, std=0.01)
        self.b_out = normal(1, 2, std=0.0)

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None, features: bool | str = False):
        turn = c_noise[..., None] * self.octaves
        embed = torch.baddbmm(self.b_embed, torch.cat([turn.cos(), turn.sin()], -1), self.w_noise)
        if label is not None:
            if self.E is None:
                of_label = self.table.gather(1, label[..., None].expand(-1, -1, self.table.shape[-1]))
            else:
                of_label = torch.bmm(self.E[label], self.table)
            embed = embed + of_label
        embed = F.silu(embed)  # [K, B, embed]
        sigma2 = (8 * c_noise).exp()  # c_noise = ln(sigma) / 4
        s2 = sigma2 / (sigma2 + self.SIGMA_DATA ** 2)  # (c_in sigma)^2
        fade = (s2[..., None] * self.fading).exp()  # [K, B, waves]
        wave = torch.sin(torch.baddbmm(torch.baddbmm(self.b_phase, embed, self.w_phase), x, self.w_wave)) * fade
        h = torch.baddbmm(torch.baddbmm(self.b_in, embed, self.w_embed), x, self.w_in[:, :2])
        h = F.silu(torch.baddbmm(h, wave, self.w_in[:, 2:]))
        for i, (w, b) in enumerate(zip(self.w_hidden, self.b_hidden)):
            if i == self.depth // 2:
                middle = h
                if features == "only":
                    return middle
            h = h + F.silu(torch.baddbmm(b, h, w))
        out = torch.baddbmm(self.b_out, h, self.w_out)
        return (out, middle) if features else out

    def label_embeddings(self) -> Tensor:
        """What the first member knows of each condition, [classes, d]: E, or its learned class embeddings."""
        return self.table[0].detach() if self.E is None else self.E


# ---- how good?

def histogram(x: Tensor) -> Tensor:
    """Counts [BINS^2 + 1] of all points of x [..., 2] in [-EXTENT, EXTENT]^2, and in a last bin for those outside.

    [MSD App. D.1]. Not-a-number counts as outside."""
    cell = ((x.reshape(-1, 2).double() + EXTENT) * (BINS / (2 * EXTENT))).floor()
    inside = ((cell >= 0) & (cell < BINS)).all(-1)
    index = torch.where(inside, cell[:, 0] * BINS + cell[:, 1], BINS * BINS)
    return torch.bincount(index.long(), minlength=BINS * BINS + 1)


def l1(h: Tensor, h_ref: Tensor) -> float:
    """Half the l1 distance of the shares: total variation of two histograms, 0 (equal) to 1 (disjoint)."""
    n, n_ref = h.sum(), h_ref.sum()  # whole numbers: exact, by any number of threads
    return ((h * n_ref - h_ref * n).abs().sum().double() / (2 * n * n_ref)).item()


def astray(x: Tensor, label: Tensor) -> Tensor:
    """Which of the points x [N, 2] are not within 4 std of a Gaussian of their class label [N]? Not-a-number is."""
    return ~(nearest(x, label)[0] < 4 * STD)


def nearest(x: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Distance [N] of points x [N, 2] from the nearest Gaussian of their class label [N], and which of MODES it is."""
    return (x[:, None] - means(x.device)[label % CLASSES]).norm(dim=-1).min(-1)


def coverage(x: Tensor, label: Tensor) -> dict:
    """Where do the points x [..., 2] of the classes label [...] land?

    within: share of points that are not astray (exact samples: 0.99966)
    mode_min, mode_max: the emptiest and fullest Gaussian's share of all points, 1 = its fair share
    even: the emptiest one's share of the points within, 1 = its fair share: strays do not count
    modes: effective number of Gaussians (exp of the entropy of the shares of the points within), at most 64"""
    x, label = x.reshape(-1, 2), label.reshape(-1) % CLASSES
    distance, mode = nearest(x, label)
    near = distance < 4 * STD
    seen = label.unique()
    count = torch.bincount((label * MODES + mode)[near], minlength=CLASSES * MODES).view(CLASSES, MODES)[seen].double()
    share = count.flatten() / len(x) * count.numel()
    p = count.flatten() / count.sum().clamp(min=1)
    entropy = -(p * p.clamp(min=1e-12).log()).sum()
    return {"within": near.double().mean().item(), "mode_min": share.min().item(), "mode_max": share.max().item(),
            "even": count.min().item() / max(1.0, count.mean().item()),
            "modes": entropy.exp().item()}
