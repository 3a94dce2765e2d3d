"""One rank of tests/test_ranks.py: RANK and WORLD_SIZE in the environment, as torchrun sets them."""
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import adm
import common
import consistency
import data
import dmd
import edm
import msd
import o2mkd
import toy_mog
import tsm
import unet


def double_dm(out: Path, net_name: str, micro: int = 0) -> None:
    """20 updates in float64, all ranks on one batch of 8; weights to OUT/weights.pt. net_name: toy, image: DM; adm, tsm, cd: those, of images."""
    ranks = common.world(torch.device("cpu"))
    stacked = net_name == "toy"
    flags = consistency.Flags(dataset="toy" if stacked else "fashion-mnist", steps=20, batch=8, reg_warmup=8, fake_warmup=3, pairs=24, ttur=2, draws=2,
                      eval_every=10, select_samples=40, save_every=10, quiet=True, clip_norm=1.0, lr=1e-3, reg_lr=1e-3, fake_lr=1e-3,
                      micro_batch=micro, adm_steps=20, adm_batch=8, adm_fake_warmup=3, adm_lr=1e-3, adm_fake_lr=1e-3, adm_reg_weight=0.2,
                      gan_weight=0.1, tsm_steps=20, tsm_batch=8, tsm_lr=1e-3, cd_steps=20, cd_batch=8, cd_lr=1e-3, cd_points=6)
    torch.manual_seed(0)
    flags.resolution = 0 if stacked else 8
    facts = data.facts(flags.dataset, flags.resolution)
    net = toy_mog.ToyNet(2, 16) if stacked else unet.UNet(8, 1, 10, unet.Size(16, (1, 1), 1, ()))
    net = edm.Precond(net, 0.5)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.02 * torch.randn(p.shape))
    members = [common.Member(0, 2, k, tuple(range(4 * k, 4 * k + 4))) for k in range(2)] if stacked else [common.Member(0, 2, 0, (0, 1, 2))]
    label = data.stratified(flags.pairs, facts.classes)[None]
    z = torch.randn(1, flags.pairs, *facts.shape, generator=common.generator("z"))
    pairs = {"z": z, "y": z / 2, "label": label, "row": torch.zeros(len(members), dtype=torch.int64)}
    class AnyJudge:                                                 # the distance of the selection, without a classifier
        statistics = staticmethod(lambda x, label: x.mean())
        distance = staticmethod(lambda a, b, classes: float((a - b).abs()))
    judge, reference = AnyJudge, torch.zeros(())
    run = common.Stage("dm", {out: slice(0, len(members))}, flags.steps, flags.save_every, True, ranks)
    def teacher(x, sigma, label):
        return x / (1 + edm.like(sigma, x) ** 2)                    # the denoiser of a standard Gaussian
    cpu, index = torch.device("cpu"), [torch.arange(flags.pairs)] * len(members)
    real = data.Generated(pairs["y"], pairs["label"], [0])
    if net_name == "tsm":
        ema = tsm.train(run, flags, members, teacher, net, real, cpu)
    elif net_name == "o2mkd":
        flags = o2mkd.Flags(dataset=flags.dataset, resolution=8, steps=20, batch=8, lr=1e-3, micro_batch=micro)
        ema = o2mkd.train(run, flags, members, torch.tensor([200]), torch.tensor([600]), teacher, net, None, real, cpu)
    elif net_name == "cd":
        ema, _ = consistency.train(run, flags, members, teacher, consistency.student_of(net), real, judge, {0: reference}, cpu)
    elif net_name == "adm":
        ema, _ = adm.train(run, flags, members, teacher, net, net, real, judge, {0: reference}, cpu, pairs, index)
    else:
        ema, _ = dmd.train(run, flags, members, teacher, net, pairs, index, judge, {0: reference}, cpu)
    if run.main:
        torch.save({"ema": ema.state_dict()}, out / "weights.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "double":
        torch.set_default_dtype(torch.float64)
        double_dm(Path(sys.argv[2]), sys.argv[3])
    elif sys.argv[1] == "dies":                                     # the second rank is gone after a few steps
        if os.environ["RANK"] == "1":
            original, count = common.Ranks.add_gradients, []
            def average(self, net):
                count.append(1)
                if len(count) == 3:
                    os._exit(9)
                original(self, net)
            common.Ranks.add_gradients = average
        raise SystemExit(msd.main(sys.argv[2:]))
    else:
        raise SystemExit(msd.main(sys.argv[1:]))
