"""The losses of stage 1 against their definitions, computed naively."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dq
import train_vae
from train_vae import Discriminator, Perceptual, adaptive_weight, backward, hinge_loss

VGG = [(0, 3, 64), (2, 64, 64), "pool", (5, 64, 128), (7, 128, 128), "pool",
       (10, 128, 256), (12, 256, 256), (14, 256, 256), "pool", (17, 256, 512), (19, 512, 512), (21, 512, 512), "pool",
       (24, 512, 512), (26, 512, 512), (28, 512, 512)]


@pytest.fixture(scope="module")
def published():
    """Random weights in the form of the two published files."""
    torch.manual_seed(0)
    vgg = {"classifier.0.weight": torch.zeros(2, 2)}                         # there, and of no use here
    for layer in VGG:
        if layer != "pool":
            i, c_in, c_out = layer
            vgg[f"features.{i}.weight"] = torch.randn(c_out, c_in, 3, 3) * (2 / (9 * c_in)) ** 0.5
            vgg[f"features.{i}.bias"] = torch.randn(c_out) * 0.1
    return vgg, {f"lin{k}.model.1.weight": torch.rand(1, c, 1, 1) for k, c in enumerate((64, 128, 256, 512, 512))}


@pytest.fixture(scope="module")
def lpips(published, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for name, part in zip("ab", published):
        torch.save(part, folder / name)
    return Perceptual.load([folder / "b", folder / "a"])                     # in any order


def naive_lpips(x, y, vgg, lin):
    """One pair of images (3, S, S), place by place."""
    def features(image):
        channels = ((0, -0.030, 0.458), (1, -0.088, 0.448), (2, -0.188, 0.450))
        z = torch.stack([(image[c] - shift) / scale for c, shift, scale in channels])[None]
        for layer in VGG:
            if layer == "pool":
                yield z[0]
                z = F.max_pool2d(z, 2)
            else:
                weight, bias = (vgg[f"features.{layer[0]}.{kind}"] for kind in ("weight", "bias"))
                z = F.conv2d(z, weight, bias, padding=1).clamp(min=0)
        yield z[0]
    total = 0.0
    for k, (a, b) in enumerate(zip(features(x), features(y))):
        weight, places = lin[f"lin{k}.model.1.weight"].flatten(), []
        for r in range(a.shape[1]):
            for c in range(a.shape[2]):
                u, v = a[:, r, c], b[:, r, c]
                u, v = u / (u.norm() + 1e-10), v / (v.norm() + 1e-10)
                places.append(float((weight * (u - v) ** 2).sum()))
        total += sum(places) / len(places)
    return total


def test_lpips_is_the_published_formula(lpips, published):
    x, y = torch.rand(2, 2, 3, 16, 16) * 2 - 1
    expected = [naive_lpips(a, b, *published) for a, b in zip(x, y)]
    assert lpips(x, y).tolist() == pytest.approx(expected, rel=1e-4)
    assert lpips(x, x).tolist() == [0, 0]


def test_lpips_trains_the_image_alone_and_stays_finite_where_features_vanish(lpips, published, tmp_path):
    y = (torch.rand(1, 3, 16, 16) * 2 - 1).requires_grad_()
    lpips(torch.rand(1, 3, 16, 16), y).sum().backward()
    assert y.grad.abs().sum() > 0 and all(p.grad is None for p in lpips.parameters())
    zero = {name: -tensor.abs() if name.endswith("bias") else tensor * 0 for name, tensor in published[0].items()}
    torch.save(zero, tmp_path / "zero")
    torch.save(published[1], tmp_path / "lin")
    y.grad = None
    Perceptual.load([tmp_path / "zero", tmp_path / "lin"])(torch.rand(1, 3, 16, 16), y).sum().backward()
    assert torch.isfinite(y.grad).all()


def test_missing_weights_end_in_one_line_that_helps(published, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    torch.save(published[1], tmp_path / "half")
    for files in ([], [tmp_path / "nowhere"], [tmp_path / "half"]):
        with pytest.raises(dq.UserError) as error:
            Perceptual.load(files)
        text = str(error.value)
        assert "\n" not in text and "--perceptual-weights" in text and "--perceptual-weight 0" in text
        assert all(url in text for url in Perceptual.urls)


class Toy(torch.nn.Module):
    """A decoder and what hangs on it: enough to follow gradients."""

    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Conv2d(2, 4, 1), torch.nn.Conv2d(4, 3, 3, padding=1)
        self.critic = torch.nn.Conv2d(3, 1, 3)

    def forward(self, z, target):
        h = self.first(z).tanh()
        y = self.last(h)
        return y, (y - target).abs().mean(), -self.critic(y).tanh().mean(), h.square().mean()


@pytest.mark.parametrize("cap", [0.75, 1e-3])
def test_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer(cap):
    model, z, target = Toy(), torch.randn(2, 2, 5, 5), torch.randn(2, 3, 5, 5) * 0.1
    y, loss, gan, _ = model(z, target)
    a, b = (torch.autograd.grad(each, model.last.weight, retain_graph=True)[0] for each in (loss, gan))
    pull, push = (torch.autograd.grad(each, y, retain_graph=True)[0] for each in (loss, gan))
    ratio = float(a.norm() / (b.norm() + 1e-4))
    assert adaptive_weight(y, model.last.weight, pull, push, cap).item() == pytest.approx(min(ratio, cap), rel=1e-5)


def test_gradients_added_at_the_image_are_those_of_the_whole_loss():
    model, z, target = Toy(), torch.randn(2, 2, 5, 5), torch.randn(2, 3, 5, 5) * 0.1
    y, loss, gan, other = model(z, target)
    weight = backward(y, model.last.weight, loss, gan, other, gan_weight=0.3, scale=0.5)
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    y, loss, gan, other = model(z, target)
    a, b = (torch.autograd.grad(each, model.last.weight, retain_graph=True)[0].norm() for each in (loss, gan))
    assert weight.item() == pytest.approx(0.3 * min(0.75, float(a / (b + 1e-4))), rel=1e-5)
    (0.5 * (loss + weight * gan + other)).backward()
    assert set(ours) == {"first.weight", "first.bias", "last.weight", "last.bias"}  # the critic has another lesson
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad)


def test_a_compiled_model_gets_the_same_gradients():
    """torch.compile with the adversarial loss, without a compiler: the capture of the graphs is what could go wrong."""
    config = dq.VAEConfig(size=16, codebook_size=16)
    model, x, gradients = dq.DQVAE(config), torch.rand(2, 3, 16, 16) * 2 - 1, []
    model(x)                                                                 # the codebook starts from its first batch
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for forward in (model, train_vae.compiled(model, backend="aot_eager")):
        model.load_state_dict(state)
        model.zero_grad()
        torch.manual_seed(1)
        out = forward(x)
        assert "Convolution" in out.reconstruction.grad_fn.name()            # the last layer is a node of its own
        loss, gan = (out.reconstruction - x).abs().mean(), -out.reconstruction.tanh().mean()
        other = out.commitment + dq.budget_loss(out.gate, config.ratios)
        weight = backward(out.reconstruction, model.decoder.out[-1].weight, loss, gan, other)
        gradients.append([weight] + [p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 50
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_discriminator_is_the_usual_patchgan():
    with torch.device("meta"):
        critic = Discriminator()
        assert critic(torch.empty(2, 3, 256, 256)).shape == (2, 1, 30, 30)
    assert sum(p.numel() for p in critic.parameters()) == 2_765_633          # pix2pix's 70 x 70 PatchGAN, 3 channels in
    # one logit sees 70 x 70 pixels
    critic = Discriminator(width=4).eval()
    x = torch.zeros(1, 3, 128, 128, requires_grad=True)
    critic(x)[0, 0, 7, 7].backward()
    seen = x.grad.abs().sum(dim=(0, 1)).nonzero()
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [70, 70]


def test_hinge_loss():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3))


def test_discriminator_learns_to_tell_sharp_from_blurred():
    toy = train_vae.ToyShapes(32, n=256)
    real = torch.stack([toy[i][0] for i in range(256)])
    fake = F.avg_pool2d(real, 5, stride=1, padding=2, count_include_pad=False)
    critic = Discriminator(width=16)
    optimizer = torch.optim.Adam(critic.parameters(), lr=2e-3, betas=(0.5, 0.9))
    for step in range(25):
        rows = torch.randint(0, 192, (16,))
        loss = hinge_loss(critic(real[rows]), critic(fake[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():                                                    # unseen images, normalised as in training
        right = torch.cat([critic(real[192:]).mean(dim=(1, 2, 3)) > 0, critic(fake[192:]).mean(dim=(1, 2, 3)) < 0])
    assert right.float().mean() > 0.9


def test_ssim_is_the_published_formula():
    x = torch.rand(2, 3, 13, 13) * 2 - 1
    y = (x + 0.3 * torch.randn(x.shape)).clamp(-1, 1)
    g = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
    window = np.outer(g, g) / g.sum() ** 2
    for b in range(2):
        values = []
        for c in range(3):
            u, v = (t[b, c].double().numpy() * 127.5 + 127.5 for t in (x, y))  # as the paper has it: 0 to 255
            for r in range(3):
                for s in range(3):
                    p, q = u[r:r + 11, s:s + 11], v[r:r + 11, s:s + 11]
                    mp, mq = (window * p).sum(), (window * q).sum()
                    vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                    cov = (window * (p - mp) * (q - mq)).sum()
                    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
                    values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp ** 2 + mq ** 2 + c1) * (vp + vq + c2)))
        assert train_vae.ssim(x, y)[b].item() == pytest.approx(np.mean(values), abs=1e-4)
    assert train_vae.ssim(x, x).tolist() == pytest.approx([1, 1])
