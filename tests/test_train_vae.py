"""train_vae.py: losses, evaluation, codes.pt, and the script as a whole.

    Perceptual                       test_lpips_is_the_published_formula and the next two tests
    backward                         test_backward_gives_the_gradients_of_the_weighted_sum and the next test
    Discriminator, hinge_loss        test_discriminator_is_the_usual_patchgan and three more
    BatchNorm                        test_batch_norm_of_two_processes_is_that_of_one, survival/test_processes.py
    auc, evaluate                    test_auc_equals_counting_pairs, test_evaluation_of_a_dq_vae
    show                             test_the_picture_shows_originals_first
    validation_images                test_regions_with_a_tenth_of_detail_are_detailed, test_all_classes_are_evaluated
    views, recipe                    test_presets.py
    encode_dataset, write_codes      test_encoding_keeps_every_image_and_its_mirror_image and the next three tests
    recall, encode_only              test_encode_takes_what_the_checkpoint_knows and the next two tests
    main                             test_the_toy_data_needs_no_folder and the next two tests, test_wiring.py
"""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import data as reading
import dq
import train_transformer
import train_vae
from conftest import DEVICE, TRANSFORMER, VAE, call, plain
from data import ImageFolder, ToyShapes
from runs import read_log
from test_data import put, folder_with_broken_files
from train_vae import Discriminator, Perceptual, backward, hinge_loss


# ------------------------------------------------------------------------------------------------
# Losses


VGG = [(0, 3, 64), (2, 64, 64), "pool", (5, 64, 128), (7, 128, 128), "pool",
       (10, 128, 256), (12, 256, 256), (14, 256, 256), "pool", (17, 256, 512), (19, 512, 512), (21, 512, 512), "pool",
       (24, 512, 512), (26, 512, 512), (28, 512, 512)]


@pytest.fixture(scope="module")
def published():
    """Random weights in the form of the two published files."""
    torch.manual_seed(0)
    vgg = {"classifier.0.weight": torch.zeros(2, 2)}                         # an entry that LPIPS does not use
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
    """LPIPS of two images (3, S, S), one position at a time."""
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
        weight, distances = lin[f"lin{k}.model.1.weight"].flatten(), []
        for r in range(a.shape[1]):
            for c in range(a.shape[2]):
                u, v = a[:, r, c], b[:, r, c]
                u, v = u / (u.norm() + 1e-10), v / (v.norm() + 1e-10)
                distances.append(float((weight * (u - v) ** 2).sum()))
        total += sum(distances) / len(distances)
    return total


def test_lpips_is_the_published_formula(lpips, published):
    x, y = torch.rand(2, 2, 3, 16, 16) * 2 - 1
    expected = [naive_lpips(a, b, *published) for a, b in zip(x, y)]
    assert lpips(x, y).tolist() == pytest.approx(expected, rel=1e-4)
    assert lpips(x, x).tolist() == [0, 0]


def test_lpips_has_finite_gradients_for_the_image_only(lpips, published, tmp_path):
    y = (torch.rand(1, 3, 16, 16) * 2 - 1).requires_grad_()
    lpips(torch.rand(1, 3, 16, 16), y).sum().backward()
    assert y.grad.abs().sum() > 0 and all(p.grad is None for p in lpips.parameters())
    zero = {name: -tensor.abs() if name.endswith("bias") else tensor * 0 for name, tensor in published[0].items()}
    torch.save(zero, tmp_path / "zero")
    torch.save(published[1], tmp_path / "lin")
    y.grad = None
    Perceptual.load([tmp_path / "zero", tmp_path / "lin"])(torch.rand(1, 3, 16, 16), y).sum().backward()
    assert torch.isfinite(y.grad).all()


def test_without_files_the_weights_are_downloaded(published, monkeypatch):
    parts = dict(zip(Perceptual.urls, published))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **how: parts[url])
    lpips = Perceptual.load(train_vae.parse([])[0].perceptual_weights)
    assert torch.equal(lpips.weights[0], published[1]["lin0.model.1.weight"])


def test_the_error_for_missing_weights_says_what_to_do(published, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    torch.save(published[1], tmp_path / "half")
    for files, reason in ((None, "no route to host"), ([tmp_path / "nowhere"], "No such file"),
                          ([tmp_path / "half"], "features")):
        with pytest.raises(dq.UserError, match=reason) as error:
            Perceptual.load(files)
        text = str(error.value)
        assert "\n" not in text and "--perceptual-weights" in text and "--perceptual-weight 0" in text
        assert all(url in text for url in Perceptual.urls)


class Toy(torch.nn.Module):
    """A small model with the losses of stage 1. Its forward pass returns y, and losses that depend on y or not."""

    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Conv2d(2, 4, 1), torch.nn.Conv2d(4, 3, 3, padding=1)
        self.discriminator = torch.nn.Conv2d(3, 1, 3)

    def forward(self, z, target):
        h = self.first(z).tanh()
        y = self.last(h)
        return y, (y - target).abs().mean(), -self.discriminator(y).tanh().mean(), h.square().mean()


@pytest.mark.parametrize("steep", [1, 100])
def test_backward_gives_the_gradients_of_the_weighted_sum(steep):
    """A steep adversarial loss gets a smaller weight than 0.75."""
    model, z, target = Toy(), torch.randn(2, 2, 5, 5), torch.randn(2, 3, 5, 5) * 0.1
    y, loss, gan, other = model(z, target)
    weight = backward(y, model.last.weight, loss, steep * gan, other, gan_weight=0.3, scale=0.5)
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    y, loss, gan, other = model(z, target)
    a, b = (torch.autograd.grad(each, model.last.weight, retain_graph=True)[0].norm() for each in (loss, steep * gan))
    assert (a / b < 0.75) == (steep > 1)
    assert weight.item() == pytest.approx(0.3 * min(0.75, float(a / (b + 1e-4))), rel=1e-5)
    (0.5 * (loss + weight * steep * gan + other)).backward()
    assert set(ours) == {"first.weight", "first.bias", "last.weight", "last.bias"}  # none for the discriminator
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad)


def test_a_compiled_model_gets_the_same_gradients():
    """torch.compile captures the graphs with the adversarial loss. No compiler runs."""
    config = dq.VAEConfig(size=16, factors=(2, 1), codebook_size=16, channels=32, multipliers=(1,))
    model, x, gradients = dq.DQVAE(config), torch.rand(2, 3, 16, 16) * 2 - 1, []
    model(x)                                                                 # initialises the codebook
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for forward in (model, train_vae.compiled(model, backend="aot_eager")):
        model.load_state_dict(state)
        model.zero_grad()
        torch.manual_seed(1)
        out = forward(x)
        assert "Convolution" in out.reconstruction.grad_fn.name()            # the last layer is a separate node
        loss, gan = (out.reconstruction - x).abs().mean(), -out.reconstruction.tanh().mean()
        other = out.commitment + dq.budget_loss(out.gate, config.ratios)
        weight = backward(out.reconstruction, model.decoder.out[-1].weight, loss, gan, other)
        gradients.append([weight] + [p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 50
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_discriminator_is_the_usual_patchgan():
    with torch.device("meta"):
        discriminator = Discriminator()
        assert discriminator(torch.empty(2, 3, 256, 256)).shape == (2, 1, 30, 30)
    # pix2pix's 70 x 70 PatchGAN with 3 input channels
    assert sum(p.numel() for p in discriminator.parameters()) == 2_765_633
    # one logit sees 70 x 70 pixels
    discriminator = Discriminator(width=4).eval()
    x = torch.zeros(1, 3, 128, 128, requires_grad=True)
    discriminator(x)[0, 0, 7, 7].backward()
    seen = x.grad.abs().sum(dim=(0, 1)).nonzero()
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [70, 70]


def test_discriminator_equals_its_layers():
    discriminator, x = Discriminator(width=8), torch.randn(2, 3, 32, 32)
    convs = [module for module in discriminator.modules() if isinstance(module, torch.nn.Conv2d)]
    norms = [module for module in discriminator.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert all(abs(conv.weight.std() - 0.02) < 0.004 for conv in convs)      # as pix2pix has it
    assert all(abs(norm.weight.mean() - 1) < 0.03 and norm.weight.std() < 0.03 for norm in norms)
    for conv in convs:
        conv.weight.data.normal_(0, 0.2)                                     # large enough to tell slopes apart
    h = F.leaky_relu(F.conv2d(x, convs[0].weight, convs[0].bias, 2, 1), 0.2)
    for conv, norm, stride in zip(convs[1:], norms, (2, 2, 1)):
        h = F.conv2d(h, conv.weight, None, stride, 1)
        mean, var = h.mean(dim=(0, 2, 3), keepdim=True), h.var(dim=(0, 2, 3), correction=0, keepdim=True)
        h = (h - mean) / (var + 1e-5).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
        h = F.leaky_relu(h, 0.2)
    torch.testing.assert_close(discriminator(x), F.conv2d(h, convs[-1].weight, convs[-1].bias, padding=1))


def test_batch_norm_of_two_processes_is_that_of_one(monkeypatch):
    """Here all_reduce_sum adds what the second process would contribute."""
    x = torch.randn(4, 3, 5, 5) * torch.tensor([1.0, 2.0, 3.0])[:, None, None] + 1
    one, two = (train_vae.BatchNorm(3) for _ in range(2))
    expected = one(x)
    mine, other = x.chunk(2)
    monkeypatch.setattr(dq, "rank_world", lambda: (0, 2))
    monkeypatch.setattr(dq, "all_reduce_sum", lambda parts: parts + torch.stack([0 * other, other]))
    torch.testing.assert_close(two(mine), expected[:2], atol=1e-5, rtol=1e-5)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], value, atol=1e-5, rtol=1e-5)


def test_hinge_loss():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3))


def test_discriminator_learns_to_tell_sharp_from_blurred():
    toy = reading.ToyShapes(32, n=256)
    real = torch.stack([toy[i][0] for i in range(256)])
    fake = F.avg_pool2d(real, 5, stride=1, padding=2, count_include_pad=False)
    discriminator = Discriminator(width=16)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-3, betas=(0.5, 0.9))
    for step in range(25):
        rows = torch.randint(0, 192, (16,))
        loss = hinge_loss(discriminator(real[rows]), discriminator(fake[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():                                                    # other images, normalised as in training
        scores = [discriminator(x[192:]).mean(dim=(1, 2, 3)) for x in (real, fake)]
        right = torch.cat([scores[0] > 0, scores[1] < 0])
    assert right.float().mean() > 0.9


# ------------------------------------------------------------------------------------------------
# Evaluation


def test_auc_equals_counting_pairs():
    score, truth = torch.randint(0, 6, (7, 4)).float(), torch.rand(7, 4) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in score[truth].tolist() for b in score[~truth].tolist()]
    assert train_vae.auc(score, truth) == pytest.approx(sum(pairs) / len(pairs))


def test_evaluation_of_a_dq_vae():
    torch.manual_seed(0)
    config = dq.VAEConfig(size=16, codebook_size=8)
    model = dq.DQVAE(config)
    x = torch.rand(10, 3, 16, 16) * 2 - 1
    model.decoder.out[-1].weight.data.mul_(3)                                # some pixels are outside [-1, 1]
    model(x)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    detailed = torch.rand(10, 2, 2) < 0.5
    metrics, y, grains = train_vae.evaluate(model, x, detailed, plain, batch_size=4)
    assert model.training
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    model.eval()
    with torch.no_grad():
        out = model(x)
        score = model.router.score(x, out.maps)
    assert metrics["auc"] == pytest.approx(train_vae.auc(score, detailed), abs=1e-3) and metrics["auc"] != 0.5
    assert out.reconstruction.abs().max() > 1
    y = out.reconstruction.clamp(-1, 1)
    psnr = [10 * math.log10(1 / float(((a - b) / 2).square().mean())) for a, b in zip(x, y)]
    assert metrics["psnr"] == pytest.approx(sum(psnr) / 10, rel=1e-4)
    counts, n_codes = [0] * 8, 0
    layout = dq.Layout(16, (8, 4))
    for row in layout.pack(out.codes, out.grains)[1].tolist():               # the codes of the sequence
        for c in row:
            if c >= 0:
                counts[c] += 1
                n_codes += 1
    entropy = -sum(c / n_codes * math.log(c / n_codes) for c in counts if c)
    assert metrics["perplexity"] == pytest.approx(math.exp(entropy), rel=1e-4)
    assert metrics["codebook_used"] == sum(c > 0 for c in counts) / 8
    assert metrics["codes_per_image"] == pytest.approx(n_codes / 10)
    # each code takes 3 bits, as there are 8; the granularities of the 4 regions take 1 bit each
    assert metrics["bits_per_pixel"] == pytest.approx((n_codes / 10 * 3 + 4) / 256)
    assert metrics["share"] == pytest.approx([float((out.grains == k).float().mean()) for k in (0, 1)], abs=1e-4)


@pytest.mark.parametrize("what", ["metrics", "discriminator", "lpips"])
def test_images_are_compared_in_float32(what, lpips, monkeypatch):
    """This holds under autocast as well, where convolutions return bfloat16."""
    seen, real, x = [], F.normalize, torch.rand(1, 3, 24, 24)
    monkeypatch.setattr(F, "normalize", lambda x, **how: (seen.append(x), real(x, **how))[1])
    bf16 = torch.autocast("cpu", torch.bfloat16)
    if what == "metrics":
        seen.append(train_vae.evaluate(dq.DQVAE(dq.VAEConfig(size=24)), x, None, lambda: bf16)[1])
    with bf16:
        if what == "discriminator":
            seen.append(Discriminator(width=8)(x))
        elif what == "lpips":
            lpips(x[..., :16, :16], x[..., :16, :16])
    assert seen and {each.dtype for each in seen} == {torch.float32}


def test_the_picture_shows_originals_first(tmp_path):
    x, y = (torch.full((9, 3, 16, 16), value) for value in (-1.0, 1.0))      # black originals, white reconstructions
    train_vae.show(tmp_path / "x.png", x, y, torch.zeros(9, 2, 2, dtype=torch.long), (8, 4))
    sheet = np.asarray(Image.open(tmp_path / "x.png"))
    assert sheet.shape == (4 * 130 - 2, 6 * 130 - 2, 3)                      # 8 triples, two in a row
    assert [sheet[300, 64 + 130 * i].tolist() for i in (0, 1, 3, 4)] == [[0] * 3, [255] * 3] * 2


def test_all_classes_are_evaluated(tmp_path):
    """The 512 images are always the same, and a random sample of all."""
    val = ImageFolder(tmp_path, [(f"{i}.png", i // 16) for i in range(1600)], [str(i) for i in range(100)], 8)
    val.strips = reading.Kept(
        lambda path: np.full((8, 8, 3), [*divmod(int(path.split("/")[-1][:-4]), 256), 0], np.uint8))
    shown = []
    for _ in range(2):
        x = train_vae.validation_images(val, dq.VAEConfig(size=8, factors=(4,), ratios=(1.0,)))[0][..., 0, 0]
        high, low, _ = ((x + 1) * 127.5).round().int().unbind(1)
        shown.append((high * 256 + low).tolist())
    assert shown[0] == shown[1] and len(set(shown[0])) == 512
    assert len({i // 16 for i in shown[0]}) > 95


def test_regions_with_a_tenth_of_detail_are_detailed():
    class Corners(ToyShapes):
        def detail_mask(self, i):
            mask = torch.zeros(16, 16, dtype=torch.bool)
            mask[:2, :4] = mask[8:, 8:] = True                               # 8 of 64 pixels; all of the last region
            mask[:1, 8:14] = True                                            # 6 of 64 pixels
            return mask
    images, detailed = train_vae.validation_images(Corners(16, n=3), dq.VAEConfig(size=16))
    assert images.shape == (3, 3, 16, 16) and detailed.tolist() == [[[True, False], [False, True]]] * 3


# ------------------------------------------------------------------------------------------------
# codes.pt


def test_encoding_keeps_every_image_and_its_mirror_image():
    torch.manual_seed(0)
    model = dq.DQVAE(dq.VAEConfig(size=16, codebook_size=8))
    data = reading.ToyShapes(16, n=10)
    x = torch.stack([data[i][0] for i in range(10)])
    model(x)
    model.eval()
    device, layout = torch.device("cpu"), dq.Layout(16, (8, 4))
    with common.Stop() as stop:
        part = train_vae.encode_dataset(model, data, device, plain, workers=0, mirrored=True, stop=stop)
    assert part["codes"].shape == (10, 2, 4, 4) and part["grains"].shape == (10, 2, 2, 2)
    assert [part[name].dtype for name in ("codes", "grains", "label")] == [torch.uint8, torch.uint8, torch.int32]
    images = train_transformer.Images(part, (8, 4))
    with torch.no_grad():
        for v, view in enumerate((x, x.flip(3))):
            codes, grains = model.encode(view)
            assert torch.equal(images.codes[v::2], codes) and torch.equal(images.grains[v::2], grains)
            assert images.label[v::2].tolist() == [i % 4 for i in range(10)]
            pos, code = layout.pack(codes, grains)
            assert images.length[v::2].tolist() == ((pos != layout.end).sum(1) + 1).tolist()
            for index in (torch.tensor([3]), torch.tensor([1, 7, 4])):
                n = images.length[v::2][index].max()
                batch = train_transformer.sequences(images, 2 * index + v, layout, device)
                assert batch[0].shape[1] in (n, n + 1) and batch[2].tolist() == (index % 4).tolist()
                for ours, whole in zip(batch, (pos, code)):
                    assert torch.equal(ours, whole[index, :ours.shape[1]])


def test_broken_images_have_no_codes(tmp_path, monkeypatch, capfd):
    data = folder_with_broken_files(tmp_path / "images", monkeypatch)
    sound, data.augment = [i for i, name in enumerate(data.names) if not 5 <= int(name[:2]) < 15], False
    model = dq.DQVAE(dq.VAEConfig(size=8, factors=(4, 2), codebook_size=8)).eval()
    model.codebook.codes.normal_()
    with common.Stop() as stop:
        part = train_vae.encode_dataset(model, data, torch.device("cpu"), plain, workers=0, mirrored=False, stop=stop)
    with torch.no_grad():
        codes, grains = model.encode(torch.stack([data[i][0] for i in sound]))
    assert f"note: {len(data) - len(sound)} of {len(data)} images can't be decoded" in capfd.readouterr().out
    assert torch.equal(part["codes"][:, 0], codes) and torch.equal(part["grains"][:, 0], grains)
    assert part["label"].tolist() == [-1] * len(sound) and len(sound) < len(data)


def test_codes_hold_all_that_stage_2_needs(vae_run, images):
    """codes.pt has every image and its crops, each with its mirror image, encoded by the final weights."""
    stored, vae = dq.load_checkpoint(vae_run / "codes.pt", "dq-codes"), dq.load_vae(vae_run / "vae.pt", DEVICE)
    assert dq.VAEConfig(**stored["config"]) == vae.config and stored["preset"] == "custom" and stored["version"] == 1
    assert stored["classes"] == ("circle", "cross", "square", "triangle")
    for name, x in vae.state_dict().items():
        assert torch.equal(stored["weights"][name], x.cpu())
    for part, data in zip(("train", "held_out"), reading.open_data(images, 16)):
        x, label = zip(*map(data.__getitem__, range(len(data))))
        x, found = torch.stack(x), stored[part]
        assert found["label"].tolist() == list(label)
        with torch.no_grad(), common.pick_device(DEVICE, "auto")[1]():
            views = train_vae.views(x, cropped=True, mirrored=True) if part == "train" else [x]
            expected = [vae.encode(view.to(DEVICE)) for view in views]
        assert found["codes"].shape[:2] == (len(data), len(expected))
        for v, (codes, grains) in enumerate(expected):
            same = 0.95 if DEVICE != "cpu" else 1                            # rounding depends on the batch on GPUs
            for name, each in dict(codes=codes, grains=grains).items():
                assert (found[name][:, v] == each.cpu()).double().mean() >= same


def test_random_routing_of_codes_depends_only_on_the_images(tmp_path):
    """So `--encode` routes as training did. The size, factors and ratios are those of a preset."""
    vae, data = dq.DQVAE(dq.VAEConfig(codebook_size=16, router="random")), ToyShapes(32, n=8)
    grains = []
    for before, seed in ((1, 5), (2, 6)):
        torch.manual_seed(before)
        args = SimpleNamespace(seed=seed, workers=0, no_flip=True, part=8, preset="toy")
        stop = SimpleNamespace(asked=lambda: 0, alive=0.0)
        train_vae.write_codes(tmp_path / "codes.pt", vae, data, data, args, torch.device("cpu"), plain, stop, psnr=20.0)
        codes = dq.load_checkpoint(tmp_path / "codes.pt", "dq-codes")
        grains.append(codes["train"]["grains"].clone())
        assert codes["preset"] == "toy"
    assert torch.equal(*grains)


def test_an_exact_reconstruction_has_a_finite_psnr():
    """It is 58.9 dB, as if from rounding to 8 bits."""
    model = dq.DQVAE(dq.VAEConfig(size=16, codebook_size=8)).eval()
    with torch.no_grad():
        x = torch.rand(4, 3, 16, 16)
        x[1:] = model(x[1:]).reconstruction.clamp(-1, 1)
    real = model.forward
    model.forward = lambda x: real(x)._replace(reconstruction=x if len(x) == 1 else x + 0.5)
    metrics = train_vae.evaluate(model, torch.zeros(2, 3, 16, 16), None, plain, batch_size=1)[0]
    assert metrics["l2"] == 0 and metrics["psnr"] == pytest.approx(58.92, abs=0.01)


@pytest.mark.usefixtures("few_for_thresholds")
def test_no_more_images_at_a_time_than_in_a_step(images, tmp_path, monkeypatch):
    """This bounds the memory of training, evaluation, calibration and encoding."""
    seen, score, encode = [], dq.EntropyRouter.score, dq.DQVAE.encode
    monkeypatch.setattr(dq.EntropyRouter, "score", lambda self, x, *more: seen.append(len(x)) or score(self, x, *more))
    monkeypatch.setattr(dq.DQVAE, "encode", lambda self, x: seen.append(len(x)) or encode(self, x))
    flags = ["--data", images, "--out", tmp_path, *VAE, "--router", "entropy", "--steps", 1]
    assert call(train_vae.main, *flags, "--batch-size", 6, "--accumulate", 2) is None
    assert max(seen) == 3


def test_encode_takes_what_the_checkpoint_knows(images, tmp_path, monkeypatch):
    """So the command that stage 2 suggests for a missing codes.pt writes the same codes again."""
    first, again, out = tmp_path / "first", tmp_path / "again", tmp_path / "letters"
    put(tmp_path, *(f"held/{name}/0.png" for name in ("circle", "cross")))
    flags = ["--no-flip", "--seed", 5, "--router", "random", "--dtype", "bf16", "--held-out", tmp_path / "held", *VAE]
    flags += ["--size", 32]                                                  # that of the preset, so its name is noted
    monkeypatch.chdir(images.parent)
    assert call(train_vae.main, "--data", images.name, "--out", first, *flags, "--steps", 1) is None
    monkeypatch.chdir(tmp_path)                                              # the relative path of --data ends here
    assert call(train_vae.main, "--encode", first / "vae.pt", "--out", again) is None
    codes = [dq.load_checkpoint(folder / "codes.pt", "dq-codes") for folder in (first, again)]
    assert codes[0]["name"] == codes[1]["name"] and codes[0]["train"]["codes"].shape[1] == 5  # crops
    assert codes[0]["preset"] == codes[1]["preset"] == "folder32"
    assert torch.equal(codes[0]["held_out"]["codes"], codes[1]["held_out"]["codes"])
    assert codes[1]["psnr"] == pytest.approx(codes[0]["psnr"], abs=1e-4)
    assert call(train_vae.main, "--encode", first / "vae.pt", "--out", again, "--data", images) is None
    same = dq.load_checkpoint(again / "codes.pt", "dq-codes")                # the folder is known, and so is --held-out
    assert same["name"] == codes[0]["name"] and len(same["held_out"]["label"]) == 2
    more = ["--data", images / "circle", "--seed", 6]
    assert call(train_vae.main, "--encode", first / "vae.pt", "--out", out, *more) is None
    other = dq.load_checkpoint(out / "codes.pt", "dq-codes")
    assert len(other["train"]["label"]) + len(other["held_out"]["label"]) == 4 and other["preset"] == "folder32"


def test_a_checkpoint_of_unknown_images_is_not_used_on_the_toy_shapes(vae_run, images, tmp_path):
    """Older checkpoints do not name their folder."""
    saved = torch.load(vae_run / "vae.pt", weights_only=True)
    torch.save({name: x for name, x in saved.items() if name != "folders"}, tmp_path / "vae.pt")
    flags = ["--encode", tmp_path / "vae.pt", "--out", tmp_path, "--device", DEVICE]
    line = call(train_vae.main, *flags)
    assert "vae.pt does not name the folder of its 13 files (checksum" in line and "name it after --data" in line
    assert call(train_vae.main, *flags, "--data", images) is None


@pytest.mark.usefixtures("few_for_thresholds")
@pytest.mark.parametrize("router", ["learned", "dial", "entropy"])
def test_encode_with_other_ratios(router, images, tmp_path, capsys):
    """Without training. codes.pt holds the DQ-VAE that routes this way, and so does all that is made from it."""
    flags = ["--data", images, "--out", tmp_path, *VAE, "--router", router, "--steps", 6]
    assert call(train_vae.main, *flags) is None
    trained = dq.load_checkpoint(tmp_path / "vae.pt", "dq-vae")
    assert (trained["settings"]["budget_weight"] > 0) == (router != "dial")  # which meets the budget by itself
    encode = ["--encode", tmp_path / "vae.pt", "--out", tmp_path / "less", "--ratios"]
    assert call(train_vae.main, *encode, 0.75, 0.25) is None
    stored = dq.load_checkpoint(tmp_path / "less/codes.pt", "dq-codes")
    assert stored["config"]["ratios"] == (0.75, 0.25) and stored["preset"] == "custom"
    assert stored["config"]["router"] == ("dial" if router == "learned" else router)
    fine = stored["train"]["grains"][:, 0].float().mean()                    # of the images themselves, not of crops
    assert fine == pytest.approx(0.25, abs=0.02)
    held_out = 4 + 12 * stored["held_out"]["grains"].float().mean().item()   # 4 regions of one or four codes
    assert f"which makes {held_out:.1f} codes per image" in capsys.readouterr().out
    assert call(train_transformer.main, "--out", tmp_path / "less", *TRANSFORMER, "--steps", 1) is None
    made = dq.load_checkpoint(tmp_path / "less/transformer.pt", "dq-transformer")
    assert made["vae_config"] == stored["config"] and dq.load_transformer(tmp_path / "less/transformer.pt", DEVICE)
    assert torch.equal(made["vae_weights"]["router.thresholds"].cpu(), stored["weights"]["router.thresholds"])


def test_ratios_that_do_not_fit_the_model(vae_run, images, tmp_path):
    encode = ["--encode", vae_run / "vae.pt", "--out", tmp_path, "--ratios"]
    assert "2 factors need 2 ratios" in call(train_vae.main, *encode, 0.5, 0.2, 0.3)
    assert "sum to 1" in call(train_vae.main, *encode, 0.5, 0.6)
    assert not (tmp_path / "codes.pt").exists()


def test_the_dial_router_needs_no_budget_loss():
    """It gets one if the flag asks for it."""
    for flags, expected in (([], 0.0), (["--budget-weight", "2"], 2.0)):
        assert train_vae.parse(["--router", "dial", *flags])[2].budget_weight == expected


def test_encode_uses_the_toy_shapes_of_the_same_seed(tmp_path, monkeypatch):
    seeds = []

    def open_data(folder, size, seed, **how):
        seeds.append((folder, seed))
        return ToyShapes(size, n=8, seed=seed), ToyShapes(size, n=4, seed=seed + 1)
    monkeypatch.setattr(train_vae, "open_data", open_data)
    assert call(train_vae.main, "--out", tmp_path, *VAE, "--steps", 1, "--seed", 3) is None
    assert call(train_vae.main, "--encode", tmp_path / "vae.pt", "--out", tmp_path / "x") is None
    assert seeds == [(None, 3)] * 2


def test_the_last_line_has_the_psnr_and_the_next_command(images, tmp_path, capsys):
    assert call(train_vae.main, "--data", images, "--out", tmp_path / "my run", *VAE, "--steps", 1) is None
    metrics = read_log(tmp_path / "my run/vae.jsonl")[-1]
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"{metrics['psnr']:.1f} dB PSNR on the validation images at {metrics['codes_per_image']:.1f} codes per image; "
        f"next: python train_transformer.py --out '{tmp_path}/my run'")
    stored = dq.load_checkpoint(tmp_path / "my run/codes.pt", "dq-codes")
    assert stored["psnr"] == pytest.approx(metrics["psnr"], abs=1e-4)


@pytest.mark.parametrize("V, dtype", [(256, torch.uint8), (257, torch.int16), (2 ** 15, torch.int16),
                                      (2 ** 15 + 1, torch.int32)])
def test_codes_are_stored_in_the_smallest_integers(V, dtype):
    highest = SimpleNamespace(config=SimpleNamespace(codebook_size=V), encode=lambda x: (
        torch.full((len(x), 2, 2), V - 1), torch.ones(len(x), 1, 1, dtype=torch.long)))
    stop, device = SimpleNamespace(asked=lambda: 0), torch.device("cpu")
    part = train_vae.encode_dataset(highest, ToyShapes(8, n=3), device, plain, 0, mirrored=False, stop=stop)
    assert part["codes"].dtype == dtype and part["codes"].eq(V - 1).all()


def test_encode_moves_previous_codes_aside(vae_run, images, tmp_path):
    """It takes any DQ-VAE, here the best one, and any folder."""
    for n in (1, 2):
        flags = ["--encode", vae_run / "vae.best.pt", "--data", images / "cross", "--out", tmp_path, "--device", DEVICE]
        assert call(train_vae.main, *flags, "--batch-size", 7) is None       # has no influence on the codes
        codes = dq.load_checkpoint(tmp_path / "codes.pt", "dq-codes")
        assert codes["classes"] == () and codes["preset"] == "custom" and len(list(tmp_path.glob("former-*"))) == n - 1
        assert set(codes["train"]["label"].tolist()) == {-1}
    assert (tmp_path / "former-1/codes.pt").exists()
    assert call(train_vae.main, *VAE, "--data", images, "--out", tmp_path, "--steps", 1) is None  # there was no vae.pt
    assert dq.load_checkpoint(tmp_path / "former-2/codes.pt", "dq-codes")["name"] == codes["name"]


# ------------------------------------------------------------------------------------------------
# The script


@pytest.mark.usefixtures("few_for_thresholds")
def test_the_toy_data_needs_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ToyShapes.__init__, "__defaults__", (32, 128, 0))    # 128 instead of 8192 images
    assert call(train_vae.main, *VAE, "--steps", 2, "--router", "entropy", "--batch-size", 64) is None
    metrics = json.loads((tmp_path / "out/vae.jsonl").read_text().splitlines()[-1])
    assert 0 <= metrics["auc"] <= 1 and abs(metrics["share"][1] - 0.5) < 0.1


def test_losses_of_weight_zero_are_not_computed(images, tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError
    monkeypatch.setattr(train_vae, "Discriminator", never)
    monkeypatch.setattr(train_vae, "Perceptual", never)
    train_vae.main(["--data", str(images), "--out", str(tmp_path), "--steps", "1", *VAE])
    assert "critic" not in dq.load_checkpoint(tmp_path / "vae.pt", "dq-vae")


def test_the_discriminator_trains_from_gan_start_on(images, tmp_path, monkeypatch):
    monkeypatch.setattr(train_vae, "Discriminator", lambda: Discriminator(width=8))
    train_vae.main(["--data", str(images), "--out", str(tmp_path), "--steps", "21", *VAE, "--size", "24",
                    "--gan-weight", "1", "--gan-start", "15"])
    log = [json.loads(line) for line in (tmp_path / "vae.jsonl").read_text().splitlines()]
    assert [("gan" in line, "critic" in line) for line in log if "budget" in line] == [(False, False), (True, True)]
    checkpoint = dq.load_checkpoint(tmp_path / "vae.pt", "dq-vae")
    assert {int(state["step"]) for state in checkpoint["critic_optimizer"]["state"].values()} == {6}
    assert {int(state["step"]) for state in checkpoint["optimizer"]["state"].values()} == {21}
    rates = {checkpoint[name]["param_groups"][0]["lr"] for name in ("optimizer", "critic_optimizer")}
    assert rates == {train_vae.parse(["--steps", "21"])[2].learning_rate(20)}
