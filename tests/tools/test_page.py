"""tests/tools/page.py: the page computes what dq.py computes, in a real browser, and asks nobody for anything.

    numbers      test_the_page_computes_what_dq_computes, test_a_flipped_byte_fails, test_random_numbers_are_numpys,
                 test_any_map_of_granularities, test_the_costs_add_up_to_the_likelihood
    what it is   test_no_request_leaves_the_page, test_a_large_checkpoint_is_refused, test_rounding,
                 test_the_page_in_assets_is_that_of_the_template
    panels       test_every_panel_shows_an_example, test_a_click_forces_a_place, test_keys_and_paint,
                 test_sliders_stretch_the_bar_under_the_pin, test_the_address_holds_the_view,
                 test_a_broken_address_does_no_harm
Those that need Chromium are skipped where there is none; .ci/run installs it where it can.
"""
import base64
import copy
import http.server
import json
import os
import re
import select
import shutil
import subprocess
import threading
import time
import zlib
from dataclasses import asdict

import pytest
import torch
from PIL import Image

import conftest
import data
import dq
import page

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
TOY = ("circle", "square", "triangle", "cross")
#         size, factors, classes, rotary, qk_norm, router, matrices
MODELS = {"toy": (24, (8, 4), TOY, True, True, "learned", "int8"),
          "triple": (16, (8, 4, 2), ("a", "b"), False, False, "entropy", "float16"),
          "plain": (16, (8, 4), ("a", "<b>"), True, False, "random", "int8"),
          "fixed": (16, (4,), (), False, True, "learned", "float16")}
CHECKS = {"checksum of the weights", "position logits", "content logits", "sum of probabilities", "sequences drawn",
          "legal", "pixels decoded", "unpack, pack"}


# ------------------------------------------------------------------------------------------------
# A browser, and pages for it


class Browser:
    """Headless Chromium, which takes commands of the DevTools protocol from a pipe and answers through another."""

    def __init__(self, folder):
        (its_in, self.out), (self.back, its_out) = os.pipe(), os.pipe()

        def pipes():                                                         # Chromium reads from 3 and writes to 4
            a, b = os.dup(its_in), os.dup(its_out)
            os.dup2(a, 3)
            os.dup2(b, 4)
        self.process = subprocess.Popen(
            [shutil.which("chromium"), *FLAGS, f"--user-data-dir={folder}", "--remote-debugging-pipe", "about:blank"],
            preexec_fn=pipes, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(its_in)
        os.close(its_out)
        self.number, self.buffer, self.session, self.thrown = 0, b"", {}, []
        tab = next(each for each in self.send("Target.getTargets")["targetInfos"] if each["type"] == "page")
        attached = self.send("Target.attachToTarget", targetId=tab["targetId"], flatten=True)
        self.session = dict(sessionId=attached["sessionId"])
        self.send("Page.enable")
        self.send("Runtime.enable")

    def send(self, method, **params):
        """One command. -> its result; exceptions that the page did not catch are noted on the way."""
        self.number += 1
        message = dict(id=self.number, method=method, params=params) | self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                assert select.select([self.back], [], [], 120)[0], "Chromium does not answer"
                self.buffer += os.read(self.back, 1 << 20)
            message, _, self.buffer = self.buffer.partition(b"\0")
            message = json.loads(message)
            if message.get("method") == "Runtime.exceptionThrown":
                self.thrown.append(json.dumps(message["params"])[:800])
            if message.get("id") == self.number:
                assert "error" not in message, message["error"]
                return message["result"]

    def js(self, expression):
        """-> the value of a JavaScript expression, awaited"""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression):
        for _ in range(6000):
            if self.js(expression):
                return
            assert not self.thrown, self.thrown
            time.sleep(0.01)
        raise AssertionError(f"this did not become true on the page: {expression}")

    def open(self, path, address="", width=1400, dark=False, whole=True):
        """Open a page and wait until nothing is left to compute, or, unless whole, until there is a sequence."""
        self.thrown.clear()
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1,
                  mobile=width < 500)
        scheme = dict(name="prefers-color-scheme", value="dark" if dark else "light")
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=f"{path.as_uri()}#{address}")
        if address == "selftest":
            self.wait("document.readyState === 'complete' && !!document.getElementById('selftest')")
        elif not whole:
            self.wait("document.readyState === 'complete' && !!trace && !busy.B")
        else:
            self.wait("document.readyState === 'complete' && document.querySelectorAll('#eight canvas').length === 8")
            self.settle()

    def settle(self, panels="ABDEF"):
        """Wait until none of these panels computes any more. A click marks its panels as busy before it returns."""
        self.wait(f"new Promise((go) => setTimeout(go)).then(() => [...'{panels}'].every((panel) => !busy[panel]))")
        assert not self.thrown, self.thrown

    def selftest(self, path):
        self.open(path, "selftest")
        return json.loads(self.js("document.getElementById('selftest').textContent"))

    def screenshot(self):
        """-> the whole page, as the bytes of a PNG"""
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = dict(x=0, y=0, width=size["width"], height=size["height"], scale=1)
        return base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"])

    def close(self):
        self.process.terminate()
        self.process.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not shutil.which("chromium"):
        pytest.skip("no Chromium here")
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


def untrained(size, factors, classes, rotary, qk_norm, router):
    """-> DQTransformer and DQVAE with opinions, not trained"""
    torch.manual_seed(0)
    K = len(factors)
    vae = dq.DQVAE(dq.VAEConfig(size=size, factors=factors, ratios=(1 / K,) * K, router=router, codebook_size=12,
                                channels=32, multipliers=(1, 1, 1) if K > 1 else (1, 1, 2)))
    vae.codebook.codes.normal_()
    model = dq.DQTransformer(dq.TransformerConfig(
        size=size, factors=factors, codebook_size=12, classes=classes, width=32, heads=2, position_layers=1,
        content_layers=2, rotary=rotary, qk_norm=qk_norm))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=0.25)
    return model.eval(), vae.eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """-> a function: name of MODELS -> models, facts, weights and the file of the page, made once"""
    known, folder = {}, tmp_path_factory.mktemp("pages")

    def make(name):
        if name not in known:
            *how, matrices = MODELS[name]
            model, vae = untrained(*how)
            images = data.open_data(None, how[0])[1]
            with pytest.MonkeyPatch.context() as patch:                      # whatever it costs
                patch.setattr(page, "WORSE", 10 if matrices == "int8" else -10)
                facts, weights = page.make(model, vae, images, f"{name}.pt", n=8)
            assert facts["matrices"] == matrices
            path = folder / f"{name}.html"
            path.write_text(page.document(facts, weights), "utf-8")
            known[name] = (model, vae, facts, weights, path)
        return known[name]
    return make


# ------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("name", MODELS)
def test_the_page_computes_what_dq_computes(name, made, browser):
    *_, facts, _, path = made(name)
    held = facts["reference"]
    assert (len(held["logits"]), len(held["drawn"]), len(held["legal"]), len(held["decoded"])) == (3, 7, 50, 2)
    found = browser.selftest(path)
    assert found["ok"] and set(found["checks"]) == CHECKS, found
    assert all(each["value"] <= each["limit"] for each in found["checks"].values())
    limits = {name: each["limit"] for name, each in found["checks"].items() if each["limit"]}
    assert limits == {"position logits": 0.01, "content logits": 0.01, "sum of probabilities": 1e-5,
                      "pixels decoded": 2}


@pytest.mark.parametrize("checked", [True, False])
def test_a_flipped_byte_fails(checked, made, browser, tmp_path):
    """By the checksum, whichever byte it is; and by the numbers, where the checksum has been put right."""
    *_, facts, weights, path = made("toy")
    head = next(each for each in facts["tensors"] if each["name"] == "content_head.weight")
    broken = bytearray(weights)
    broken[head["start"] + 5] ^= 1 if checked else 0x80
    facts = facts | ({} if checked else {"crc": zlib.crc32(broken)})
    path = tmp_path / "flipped.html"
    path.write_text(page.document(facts, bytes(broken)), "utf-8")
    if checked:                                                              # as anyone would call it
        text = subprocess.run([shutil.which("chromium"), *FLAGS, f"--user-data-dir={tmp_path / 'user'}", "--dump-dom",
                               f"{path.as_uri()}#selftest"], capture_output=True, text=True).stdout
        found = json.loads(re.search(r'<pre id="selftest">(.*?)</pre>', text, re.DOTALL)[1])
    else:
        found = browser.selftest(path)
    failed = {name for name, each in found["checks"].items() if not each["ok"]}
    assert not found["ok"] and ("checksum of the weights" in failed) == checked
    assert checked or "content logits" in failed


def test_random_numbers_are_numpys(made, browser):
    browser.open(made("toy")[-1], "selftest")
    for seed, number in ((0, 0), (1, 5), (2 ** 32 - 1, 3), (2 ** 53 - 1, 2 ** 33 + 1)):
        wanted = 1 - dq.numpy_rng(seed, number).random((9, 2), "float32")
        assert browser.js(f"uniform({seed}, {number}, 9)") == wanted.tolist()


class Painted(torch.nn.Module):
    """A router that follows a map (h, w) of granularities."""

    def __init__(self, grains, n_grains):
        super().__init__()
        self.gate = torch.nn.functional.one_hot(grains, n_grains).permute(2, 0, 1)[None].float()

    def forward(self, x, maps, noise=1.0):
        return self.gate


@pytest.mark.parametrize("name", ["toy", "triple"])
def test_any_map_of_granularities(name, made, browser):
    """The codes of an image under a map that no one chose before, put together from the stored ones."""
    model, vae, facts, _, path = made(name)
    browser.open(path, "selftest")
    vae, layout = copy.deepcopy(vae), model.layout
    grains = torch.randint(layout.n_grains, (layout.side, layout.side))
    vae.router = Painted(grains, layout.n_grains)
    with torch.inference_mode():
        codes, _ = vae.encode(data.open_data(None, vae.config.size)[1][1][0][None])
    wanted = page.pairs(*(each[0] for each in layout.pack(codes, grains[None])), layout.end)
    flat = grains.flatten().tolist()
    assert browser.js(f"layout.pack(codes_of(1, {flat}), {flat})") == wanted


@torch.inference_mode()
def test_the_costs_add_up_to_the_likelihood(made, browser):
    model, vae, facts, _, path = made("toy")
    browser.open(path, whole=False)
    pos, code = (torch.tensor(each)[None] for each in zip(*browser.js("trace.pairs")))
    model = page.rounded(model, vae, "int8")[1]
    losses = model(pos, code, torch.tensor([facts["pictures"][0]["label"]]))
    shown = browser.js("[...document.querySelectorAll('#statsB strong')].map((x) => parseFloat(x.textContent))")
    assert shown[0] == pytest.approx(losses["position"].item(), abs=0.06)
    assert shown[1] == pytest.approx(losses["content"].item(), abs=0.06)
    assert shown[2] == pytest.approx(sum(shown[:2]) / 0.693147, abs=0.7)


# ------------------------------------------------------------------------------------------------
# What it is


ASK = """const at = "http://127.0.0.1:PORT/", body = document.body;
fetch(at + "fetch").catch(() => 0);
navigator.sendBeacon(at + "beacon", "x");
for (const [tag, name] of [["img", "src"], ["script", "src"], ["iframe", "src"], ["video", "src"], ["link", "href"]]) {
  const node = document.createElement(tag);
  node.rel = "stylesheet";
  node[name] = at + tag;
  body.append(node);
}
document.title = "asked";"""


@pytest.mark.parametrize("guarded", [True, False])
def test_no_request_leaves_the_page(guarded, made, browser, tmp_path):
    """A script that asks in every way, at home in the page, reaches nobody; without the policy it does."""
    asked = []

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)
        do_POST = do_GET

        def log_message(self, *args):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    html = page.document({}, b"", ASK.replace("PORT", str(server.server_port)))
    if not guarded:
        html = re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', "", html)
    path = tmp_path / "asks.html"
    path.write_text(html, "utf-8")
    browser.send("Page.navigate", url=path.as_uri())
    browser.wait("document.title === 'asked'")
    for _ in range(10 if guarded else 100):                                  # half a second in which none may come
        if len(asked) >= 7:
            break
        time.sleep(0.05)
    server.shutdown()
    names = {path[1:] for path in asked} - {"favicon.ico"}
    assert names == (set() if guarded else {"fetch", "beacon", "img", "script", "iframe", "video", "link"})


def test_a_large_checkpoint_is_refused(made, tmp_path, monkeypatch):
    model, vae, *_ = made("plain")
    path = tmp_path / "transformer.pt"
    dq.save_checkpoint(path, "dq-transformer", model.config, model, vae_config=asdict(vae.config),
                       vae_weights=vae.state_dict())
    monkeypatch.setattr(page, "LARGEST", 1e5)
    line = conftest.call(page.main, path)
    assert "more than the 0 MB" in line and "train a smaller model" in line and not (tmp_path / "page.html").exists()
    monkeypatch.undo()
    monkeypatch.setattr(page, "make", lambda *args: made("plain")[2:4])      # its own making is tested elsewhere
    assert conftest.call(page.main, path) is None
    assert (tmp_path / "page.html").read_text("utf-8") == made("plain")[-1].read_text("utf-8")


def test_rounding():
    x = torch.randn(5, 40) * torch.tensor([1e-3, 1, 100, 1, 0])[:, None]
    for matrices, bound in (("int8", x.abs().amax(1, keepdim=True) / 254), ("float16", x.abs() / 2048 + 1e-7)):
        weights = page.Weights()
        y = weights.add("x", x, matrices)
        assert ((y - x).abs() <= bound * 1.001).all()
        assert weights.tensors[0]["kind"] == matrices
        assert len(weights.bytes()) == (5 * 40 + 5 * 4 if matrices == "int8" else 5 * 40 * 2)


def test_the_page_in_assets_is_that_of_the_template(browser):
    path = conftest.ROOT / "assets/page.html"
    html = path.read_text("utf-8")
    assert html == page.document(*page.read(path)), "remake it: python tests/tools/page.py assets/page.html"
    assert len(html) <= 6e6
    found = browser.selftest(path)
    assert found["ok"], found


# ------------------------------------------------------------------------------------------------
# Panels


@pytest.mark.parametrize("name, width, dark", [("toy", 390, True), ("triple", 1400, False), ("plain", 390, False),
                                               ("fixed", 1400, True)])
def test_every_panel_shows_an_example(name, width, dark, made, browser, tmp_path):
    browser.open(made(name)[-1], width=width, dark=dark)
    picture = tmp_path / "page.png"
    picture.write_bytes(browser.screenshot())
    assert browser.js("document.documentElement.scrollWidth") == width       # nothing sticks out to the side
    with Image.open(picture) as image:
        assert image.width == width and image.height > 2000
        corner = image.convert("L").getpixel((2, 2))
        assert corner < 60 if dark else corner > 200
    counts = browser.js("""({
      film: film.querySelectorAll('canvas').length, four: four.querySelectorAll('canvas, polyline').length,
      tiles: document.querySelectorAll('.tile').length, pairs: trace.pairs.length,
      canvas: document.querySelectorAll('#canvas canvas').length,
      pins: document.querySelectorAll('.bar > b').length, patches: document.querySelectorAll('#codes canvas').length,
      branches: document.querySelectorAll('.card canvas').length, eight: eight.querySelectorAll('canvas').length,
      empty: [...document.querySelectorAll('.see')].filter((x) => !x.textContent).length,
      nameless: [...document.querySelectorAll('button, input, select')].filter((x) => !x.getAttribute('aria-label') &&
        !x.textContent.trim() && !x.closest('label')).length})""")
    assert counts["film"] == 16 and counts["four"] >= 6 and counts["tiles"] == counts["pairs"] and counts["canvas"] == 1
    assert counts["pins"] >= 1 and counts["branches"] >= 2 and counts["eight"] == 8
    assert counts["empty"] == counts["nameless"] == 0
    blank = browser.js("[...document.querySelectorAll('canvas')].filter((x) => x.width > 1 && "
                       "new Set(x.getContext('2d').getImageData(0, 0, x.width, x.height).data).size < 3).length")
    assert blank <= 1                                                        # what lies behind the score
    text = browser.js("document.body.innerText")
    assert "undefined" not in text and "NaN" not in text and "Infinity" not in text


def test_a_click_forces_a_place(made, browser):
    model, *_, path = made("toy")
    browser.open(path, "t=2", whole=False)
    before = browser.js("trace.pairs")
    browser.js("[...document.querySelectorAll('#places button:not(.no):not(.here)')].at(-1).click()")
    browser.settle("B")
    after, given = browser.js("trace.pairs"), browser.js("view.given")
    assert after[:2] == before[:2] and given == [*before[:2], [after[2][0], -1]] and after[2][0] != before[2][0]
    pos, code = (torch.tensor(each)[None] for each in zip(*after))
    codes, grains = model.layout.unpack(pos, code)
    again = page.pairs(*(each[0] for each in model.layout.pack(codes, grains)), model.layout.end)
    assert (codes >= 0).all() and again == after                             # a complete tiling
    browser.js("document.querySelector('#codes button:not(.here)').click()")
    browser.settle("B")
    assert browser.js("trace.pairs[2]")[0] == after[2][0] and browser.js("trace.pairs[2][1]") != after[2][1]


def test_keys_and_paint(made, browser):
    """Arrow keys move by a pair; a press on the map changes a region, and every image of panel F then has this map."""
    browser.open(made("plain")[-1], "t=1")
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):
        browser.send("Input.dispatchKeyEvent", type="keyDown", key=key)
        browser.send("Input.dispatchKeyEvent", type="keyUp", key=key)
    assert browser.js("view.t") == 2
    x, y = browser.js("""(() => { const cell = document.getElementById('map').children[3];
                         cell.scrollIntoView({block: 'center', behavior: 'instant'});
                         const {x, y, width, height} = cell.getBoundingClientRect();
                         return [x + width / 2, y + height / 2]; })()""")
    before = browser.js("map()")
    for kind in ("mousePressed", "mouseReleased"):
        browser.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    browser.settle()
    assert browser.js("map()") == [*before[:3], 1 - before[3]]
    codes = 4 + 3 * sum(browser.js("map()"))
    assert browser.js("document.getElementById('seeF').textContent").startswith(f"{codes} codes per image")
    browser.js("document.querySelector('#eight button').click()")
    browser.settle()
    assert browser.js("view.kept") == 0 and browser.js("location.hash").endswith("kept=0")


def test_sliders_stretch_the_bar_under_the_pin(made, browser):
    browser.open(made("toy")[-1], "t=2", whole=False)
    look = """[[...document.querySelectorAll('#barWhere div')].map((x) => parseFloat(x.style.width)),
               document.querySelector('#barWhere > b').style.left, JSON.stringify(trace.pairs)]"""
    widths, pin, pairs = browser.js(look)
    browser.js("""(() => { const slider = document.querySelector('#options input'); slider.value = 0.3;
                  slider.dispatchEvent(new Event('input')); })()""")
    browser.settle("B")
    narrow, same_pin, same_pairs = browser.js(look)
    assert sum(widths) == pytest.approx(100, abs=0.01) and sum(narrow) == pytest.approx(100, abs=0.01)
    assert max(narrow) > max(widths) + 1 and pin == same_pin
    assert pairs == same_pairs                                               # the pairs of an image are given


def test_the_address_holds_the_view(made, browser):
    path = made("triple")[-1]
    browser.open(path, "pic=3&cut=0.4_1.2&t=2&seed=5&temperature=0.8&top_p=0.9&label=1&over=attention", whole=False)
    browser.js("change({given: trace.pairs.slice(0, 3)})")
    browser.settle("BE")
    look = """JSON.stringify([view, trace.pairs, document.getElementById('step').textContent,
              document.querySelector('#canvas canvas').toDataURL(),
              branches.map((x) => [x.pairs, x.nats.toFixed(3)])])"""
    browser.js("document.getElementById('keep').disabled || document.getElementById('keep').click()")
    browser.settle("BE")
    seen, address = browser.js(look), browser.js("location.hash")
    assert json.loads(seen)[2].startswith("pair 3 / ") and json.loads(seen)[0]["seed"] == 5
    browser.open(made("fixed")[-1], whole=False)                             # leave
    browser.open(path, address[1:], whole=False)
    browser.settle("BE")
    assert browser.js(look) == seen and browser.js("location.hash") == address


@pytest.mark.parametrize("address", ["pic=99&t=9999&given=zzzzAAAA__&temperature=x&label=77&head=9.9&over=attention",
                                     "keep=0.AAAA_1.zz&map=9_9&cut=&flip=1_9_77&kept=3&seed=-4"])
def test_a_broken_address_does_no_harm(address, made, browser):
    browser.open(made("toy")[-1], address, whole=False)
    assert browser.js("complete(trace.pairs)")
