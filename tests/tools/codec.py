"""Stores an image in a file of a few hundred bytes, and restores it.

python tests/tools/codec.py pack PICTURE FILE [--model assets/earth64.pt] [--detail -2]
python tests/tools/codec.py unpack FILE PICTURE [--model assets/earth64.pt]

The DQ-VAE turns an image into codes, and the DQ-Transformer is a distribution over codes. So an arithmetic coder can
store an image in about -log2 p(image) bits. Both directions run the model's own sampler, `dq.generate`, in which the
coder takes the place of chance: when packing it returns the image's next position or code and narrows its interval by
their probability, when unpacking it reads which of them the file asks for. Both directions must compute the same
probabilities to the last bit. Hence one thread, and a header that names torch's version and the model.
"""
import argparse
import bisect
import math
import struct
import sys
import zlib
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402
import dq  # noqa: E402
import sample  # noqa: E402
from data import load_image  # noqa: E402

HEADER = struct.Struct(">3sIIHB")        # mark, checksums of model and codes, label + 1, length of torch's version
MARK = b"dq1"
LEAST = 1 << 48                          # of an interval's width; probabilities are multiples of about 2^-24


class Writer:
    """Arithmetic coder: every symbol narrows the interval (low, width) to a part proportional to its probability."""
    def __init__(self, symbols):
        self.symbols, self.low, self.width, self.n_bytes = iter(symbols), 0, 1 << 64, 8

    def code(self, bounds):
        """bounds: n + 1 integers; symbol i has the part from bounds[i] to bounds[i + 1] -> the symbol"""
        i, unit = next(self.symbols), self.width // bounds[-1]
        self.low, self.width = self.low + unit * bounds[i], unit * (bounds[i + 1] - bounds[i])
        assert self.width > 0, "the model gives the symbol probability 0"
        while self.width < LEAST:                                            # Python's integers are unbounded, so there
            self.low, self.width, self.n_bytes = self.low << 8, self.width << 8, self.n_bytes + 1  # are no carries
        return i

    def finish(self):
        """-> the fewest bytes that lie in the interval, read as a fraction followed by zeros"""
        for n in range(self.n_bytes + 1):
            bits = 8 * (self.n_bytes - n)
            value = -(-self.low >> bits)                                     # rounded up to n bytes
            if value << bits < self.low + self.width:
                return value.to_bytes(n, "big")


class Reader:
    """The inverse: finds the symbol in whose part of the interval the file lies. value: the file minus low"""
    def __init__(self, data):
        self.rest, self.width = iter(data[8:]), 1 << 64
        self.value = int.from_bytes(data[:8].ljust(8, b"\0"), "big")

    def code(self, bounds):
        unit = self.width // bounds[-1]
        i = bisect.bisect_right(bounds, min(self.value // unit, bounds[-1] - 1)) - 1
        self.value, self.width = self.value - unit * bounds[i], unit * (bounds[i + 1] - bounds[i])
        while self.width < LEAST:
            self.value, self.width = self.value << 8 | next(self.rest, 0), self.width << 8
        return i


def cumulated(logits):
    """Logits (n,) -> n + 1 cumulative integers from 0 to about 2^24. An entry's part is proportional to its
    probability, and at least 1; an entry of -inf has none."""
    cdf = logits.double().softmax(-1).cumsum(-1) * (2 ** 24 - len(logits))
    return [0, *(cdf.long() + (logits > -math.inf).cumsum(-1)).tolist()]


def run_model(model, label, coder):
    """Run the model's sampler on one image, with the coder in place of chance. -> pos, code, each (1, L)"""
    position = None                                                          # the last one, while its content is due

    def decide(logits, u):
        nonlocal position
        if position is None:
            i = position = coder.code(cumulated(logits[0]))
        else:                                                                # the sampler samples for EOS ids too
            i, position = 0 if model.layout.is_eos[position] else coder.code(cumulated(logits[0])), None
        return torch.tensor([i])

    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                                # changes the last digits
    try:
        with mock.patch.object(dq, "draw", decide):
            return dq.generate(model, torch.tensor([label]))
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def nats(model, pos, code):
    """pos, code (1, L) -> {label: -log p(image)} for all labels and for -1, no label."""
    return {label: sum(model(pos, code, torch.tensor([label])).values()).item() for label in range(-1, model.n_classes)}


def checksum(pos, code):
    return zlib.crc32(torch.stack([pos, code]).numpy().tobytes())


def pack(model, pos, code, model_checksum=0):
    """pos, code (1, L) of an image -> the file's bytes, under the label that the model finds likeliest."""
    length = int(model.layout.lengths(pos))
    pairs = torch.stack([pos, code])[:, :, :length]                          # 2, 1, length: up to the last EOS
    costs = nats(model, *pairs)
    label = min(costs, key=costs.get)
    coder = Writer(i for i in pairs.permute(1, 2, 0).flatten().tolist() if i >= 0)  # -1 is the content of an EOS
    run_model(model, label, coder)
    version = torch.__version__.encode()
    header = HEADER.pack(MARK, model_checksum, checksum(pos, code), label + 1, len(version)) + version
    return header + coder.finish()


def unpack(model, data, model_checksum=0):
    """The bytes from `pack` -> pos, code. UserError if they are damaged, or need another model or another torch."""
    dq.require(data[:3] == MARK and len(data) >= HEADER.size, "this is not a file of codec.py, or its header is broken")
    _, made_by, wanted, label, n = HEADER.unpack_from(data)
    version = data[HEADER.size:HEADER.size + n].decode("ascii", "replace")
    dq.require(version == torch.__version__, f"the file needs torch {version!r}; this is {torch.__version__}, whose "
                                             "sums may differ in their last digits")
    dq.require(made_by == model_checksum and label <= model.n_classes, "the file was packed with another model")
    pos, code = run_model(model, label - 1, Reader(data[HEADER.size + n:]))
    dq.require(checksum(pos, code) == wanted, "the codes are not those that were packed: the file is damaged, or this "
                                              "processor computes other sums than the processor that packed it")
    return pos, code


def shift_router(router, detail):
    """Make a router choose finer granularities (detail > 0) or coarser ones (< 0) than it was trained for."""
    if hasattr(router, "thresholds"):
        router.thresholds -= detail
    else:
        bias = router.mlp[-1].bias                                           # of the logits of K granularities
        bias += detail * torch.arange(len(bias))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["pack", "unpack"])
    parser.add_argument("source", type=Path, help="an image, or a packed file")
    parser.add_argument("target", type=Path, help="the file to write")
    parser.add_argument("--model", type=Path, default=Path("assets/earth64.pt"), help="checkpoint of stage 2")
    parser.add_argument("--detail", type=float, default=0.0, help="pack: below 0 fewer codes, above 0 more (logits)")
    args = parser.parse_args(argv)
    model, vae = dq.load_transformer(args.model, torch.device("cpu"))
    model_checksum = zlib.crc32(args.model.read_bytes())
    if args.action == "pack":
        x = load_image(args.source, vae.config.size)[None]                   # 1, 3, S, S
        shift_router(vae.router, args.detail)
        with torch.inference_mode():
            pos, code = model.layout.pack(*vae.encode(x))
        data = pack(model, pos, code, model_checksum)
        dq.write_file(args.target, lambda file: file.write(data))
        print(f"{args.target}: {len(data)} bytes for {int((code >= 0).sum())} codes, {vae.config.size} x "
              f"{vae.config.size} pixels")
    else:
        sample.check_ending("the picture", args.target)
        dq.require(args.source.is_file(), f"no such file: {args.source}")
        codes, _ = model.layout.unpack(*unpack(model, args.source.read_bytes(), model_checksum))
        with torch.inference_mode():
            common.save_picture(args.target, common.to_picture(vae.decode(codes)[0], 0))
        print(f"wrote {args.target}")


if __name__ == "__main__":
    common.run(main)
