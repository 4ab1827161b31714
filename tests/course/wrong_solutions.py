"""Three typical wrong solutions of every exercise: what is wrong, a piece of our solution, what is there instead.

Pieces that are whole expressions or statements are compared as in variants.py, where _1 stands for anything.
"""

WRONG = {
    "GrainRouter.forward": [
        ("the gradient is detached", "hard + (soft - soft.detach())", "hard + 0 * soft"),
        ("soft instead of hard", "return hard + (soft - soft.detach())", "return soft"),
        ("normal noise instead of Gumbel's", "noise * exponential.log()", "noise * torch.randn_like(logits)"),
    ],
    "EntropyRouter.score": [
        ("bits instead of nats", ".log()", ".log2()"),
        ("grey is the mean of the colours", "_1 * red + _2 * green + _3 * blue", "x.float().mean(1, keepdim=True)"),
        ("the histogram does not sum to 1", "hist / (hist.sum(-1, keepdim=True) + 1e-10)", "hist"),
    ],
    "budget_loss": [
        ("every image has to meet the budget", "sum(_1 for k, ratio in enumerate(ratios))",
         "(gate.mean((2, 3)) - torch.tensor(ratios)).square().sum(1).mean()"),
        ("distances instead of their squares", "(_1 - _2) ** 2", "(_1 - _2).abs()"),
        ("counts of the argmax, which have no gradient", "fraction = _1",
         "fraction = one_hot(gate.argmax(1), len(ratios)).mean(dim=(0, 2, 3)).requires_grad_()"),
    ],
    "straight_through": [
        ("nothing is detached: the gradient of z cancels out", "(q - z).detach()", "(q - z)"),
        ("the wrong one is detached", "z + (q - z).detach()", "z.detach() + (q - z.detach())"),
        ("the value of z", "z + (q - z).detach()", "z + 0 * q"),
    ],
    "Codebook.assign": [
        ("the largest product: long codes win", "return _1", "return (z @ self.codes.t()).argmax(dim=1)"),
        ("the largest cosine", "return _1", "return (z @ F.normalize(self.codes).t()).argmax(dim=1)"),
        ("the 2 of the binomial is missing", "2 * (z - centre)", "(z - centre)"),
    ],
    "Codebook.update": [
        ("a coarse code counts four times", "weight[:, None] * z", "z"),
        ("the average of this batch alone", "self.sums.lerp_(_1, _2)", "self.sums.copy_(_1)"),
        ("the decay does not grow from small to large", "_1.clamp(max=self.decay)", "self.decay"),
    ],
    "Codebook.restart": [
        ("all codes are restarted", "dead = _1", "dead = torch.ones_like(self.uses, dtype=torch.bool)"),
        ("at the next update the code jumps back, since its sum is the old one", "self.sums.copy_(_1)", "pass"),
        ("a vector without weight may be drawn", "multinomial(weight,", "multinomial(torch.ones_like(weight),"),
    ],
    "DQVAE.mix": [
        ("the coarse map for every k", "upsample(m, side)", "upsample(maps[0], side)"),
        ("the largest gate alone, which has no gradient", "gate[_1]", "one_hot(gate.argmax(1), len(maps))[_1]"),
        ("coarse vectors melt into their neighbours", "upsample(m, side)", 'F.interpolate(m, side, mode="bilinear")'),
    ],
    "DQVAE.cell_weight": [
        ("all ones", "(self.config.factors[-1] / f) ** 2", "1.0"),
        ("the side of a code instead of its area",
         "(self.config.factors[-1] / f) ** 2", "self.config.factors[-1] / f"),
        ("the loss may turn the gate", "gate.detach()", "gate"),
    ],
    "Layout.pack": [
        ("raster order, whatever the granularity", "pos, order = torch.where(_1, self.ids, self.end).sort(dim=1)",
         "pos = torch.where(_1, self.ids, self.end); order = self.region[pos].sort(dim=1, stable=True)[1]; "
         "pos = pos.gather(1, order)"),
        ("column by column", "codes[:, ::s, ::s]", "codes[:, ::s, ::s].mT"),
        ("no EOS between the granularities", "self.is_eos | (_1 == self.grain)", "_1 == self.grain"),
    ],
    "Layout.unpack": [
        ("column by column", "view(-1, side, side)", "view(-1, side, side).mT"),
        ("a coarse code fills one cell of its region", "upsample(block, self.fine_side) for",
         "F.pad(block, (0, self.fine_side - block.shape[-1]) * 2, value=-1) for"),
        ("regions that are not there have code 0", "self.n_positions), -1", "self.n_positions), 0"),
    ],
    "Layout.legal": [
        ("EOS may come before a hole is filled", "return (_1 | _2) & _3",
         "return _1 | _2 | (self.ids >= following) & (self.grain == self.grain[following]) & self.is_eos"),
        ("regions that are covered may be covered again", "_1 & (_2 >= self.grain) & self.opens", "_1 & self.opens"),
        ("finer codes count as known, though they come later",
         "_1 >= self.grain", "(_1 == self.n_grains) | (_1 == self.grain)"),
    ],
    "DQTransformer.embed": [
        ("no granularity", "_1 + _2 + _3", "_1 + _2"),
        ("no position", "_1 + _2 + _3", "_1 + _3"),
        ("an EOS has the content of code 0", "self.content(_1)", "self.content(code.clamp(min=0))"),
    ],
    "DQTransformer.logits": [
        ("not shifted: each step sees its own answer",
         "self.embed(pos[:, :-1], code[:, :-1])], dim=1)", "self.embed(pos, code)], dim=1)[:, 1:]"),
        ("the content does not know its place", "h = h + self.position(pos)", "pass"),
        ("labels are hidden in evaluation too", "if self.training:", "if True:"),
    ],
    "filter_logits": [
        ("the entry that crosses p is dropped", "probs.cumsum(-1) - probs >= top_p", "probs.cumsum(-1) >= top_p"),
        ("top-p forgets that the entries were sorted", "_1.scatter(1, order, surplus)", "surplus"),
        ("k = 0 keeps the best instead of all",
         "if 0 < top_k < logits.shape[-1]:", "top_k = max(top_k, 1)\n    if top_k < logits.shape[-1]:"),
    ],
    "draw": [
        ("the likeliest, whatever u", "reached.int().argmax(-1)", "p.argmax(-1)"),
        ("noise of its own instead of u", "reached.int().argmax(-1)", "torch.multinomial(p, 1)[:, 0]"),
        ("u = 1 is never reached, and the first entry taken", "cdf >= u[:, None]", "cdf > u[:, None]"),
    ],
    "decode_one": [
        ("guidance by two labelled rows", "_1[image].t()", "job.condition[image, :1].expand(-1, R // B).t()"),
        ("the content does not know its place", "h = h + model.position(per_row(pos))", "pass"),
        ("what is given is drawn all the same", "code = unless_given(code, given[1])", "code = code"),
    ],
}
