"""The U-Net: the paper's sizes to the last parameter, attention against a plain one, leading dimensions, bottleneck."""
import math

import pytest
import torch

import data
import edm
import unet

SMALL = unet.Size(16, (1, 4), 1, (8,))  # 64 channels at 8 x 8: one head of attention


def awake(net):
    """Give the zero-initialised layers weights, so that nothing is silent."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            scale = 0.5 / math.sqrt(max(1, p[0].numel()))
            p.copy_(torch.randn(p.shape, generator=g) * scale + (0.0 if p.ndim > 1 else 0.1))
    return net


@pytest.mark.parametrize("data_name, size, count", [  # the first four: [MSD Table 7]
    ("imagenet64", "B", 295_899_267), ("imagenet64", "S", 172_813_603), ("imagenet64", "XS", 85_943_555),
    ("imagenet64", "XXS", 25_990_659), ("fashion-mnist", "B", 794_609)])
def test_parameter_counts(data_name, size, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in data.facts(data_name).net(1, size).parameters()) == count


def test_attention_against_a_plain_one(double):
    block, x = awake(unet.Block(64, 128, 32, attention=True)), torch.randn(3, 128, 4, 4)
    got, qkv = block.attend(x).flatten(2), block.qkv(x).flatten(2)  # [3, 128, 16], [3, 384, 16]
    for head in range(2):
        rows = slice(64 * head, 64 * head + 64)
        q, k, v = (part[:, rows] for part in qkv.chunk(3, 1))
        weight = (q.transpose(1, 2) @ k / 8).softmax(-1)  # [3, query, key]
        torch.testing.assert_close(got[:, rows], (weight @ v.transpose(1, 2)).transpose(1, 2))


def test_silent_at_the_start_and_then_not():
    net = unet.UNet(16, 1, 10, SMALL)
    x, c, label = torch.randn(2, 1, 16, 16), torch.zeros(2), torch.tensor([0, 3])
    assert net(x, c, label).abs().max() == 0
    out = awake(net)(x, c, label)
    for other in (net(x, c, label.flip(0)), net(x, c + 1, label), net(x, c, None)):
        assert not torch.allclose(out, other), "class and noise level must matter"


def test_leading_dimensions_and_bottleneck():
    """The bottleneck is the encoder's last output."""
    net, seen = awake(unet.UNet(16, 3, 10, SMALL)), []
    net.enc["8x8_block0"].register_forward_hook(lambda m, i, o: seen.append(o))
    x, c, label = torch.randn(2, 3, 3, 16, 16), torch.randn(2, 3), torch.randint(10, (2, 3))
    out, features = net(x, c, label, features=True)
    assert out.shape == x.shape and features.shape == (2, 3, *net.bottleneck) and net.bottleneck == (64, 8, 8)
    assert torch.equal(seen[0], features.flatten(0, 1)) and torch.equal(features, net(x, c, label, features="only"))
    torch.testing.assert_close(out[1, 2], net(x[1, 2:3], c[1, 2:3], label[1, 2:3])[0])


def test_bf16_inside_float32_outside():
    net = awake(unet.UNet(16, 1, 10, SMALL))
    x, c, label = torch.randn(4, 1, 16, 16), torch.zeros(4), torch.arange(4)
    exact, net.precision = net(x, c, label), torch.bfloat16
    out = net(x, c, label)
    assert 0 < (out - exact).norm() / exact.norm() < 0.05
    out.square().mean().backward()
    assert {out.dtype, *(t.dtype for p in net.parameters() for t in (p, p.grad))} == {torch.float32}


def test_preconditioned_image_net_keeps_dtype_and_shape(double):
    D = edm.Precond(awake(unet.UNet(16, 1, 10, SMALL)), 0.5)
    x = torch.randn(1, 5, 1, 16, 16)
    assert D(x, torch.full((1, 5), 2.0), torch.zeros(1, 5, dtype=torch.int64)).dtype == torch.float64
