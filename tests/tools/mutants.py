"""Wrong versions of the sources, each with the test that sees it.    python tests/tools/mutants.py [--only NAME ...]

A test that passes says little of what it would have noticed. So here are slips that somebody could make, a line each:
a term of the loss that is dropped, a flag that is ignored, a sign that is turned. Each is made in a copy of the
project, and the test that stands beside it must fail there; without the slip it must pass. Who changes a line that is
named here changes this table too; who adds a term, a flag or a branch adds a slip.

By hand, not with the tests: some minutes on two cores. Exit status 1 if a mutant survives or can't be made.
"""
import argparse
import gc
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 300                              # seconds that a test may take; a slip can make it run for ever


class Mutant(NamedTuple):
    name: str
    file: str                            # one of the sources
    old: str                             # what stands there, exactly once
    new: str                             # what the slip makes of it
    test: str                            # file or file::test below tests/, which must fail


def of(file, tests, *rows):
    """Rows of one source. tests: where each row's test is, unless it says so itself"""
    return [Mutant(name, file, old, new, test if ".py" in test else f"{tests}::{test}")
            for name, old, new, test in rows]


# ------------------------------------------------------------------------------------------------
# dq.py


CONFIGURATION = of(
    "dq.py", "test_vae.py",
    ("factors of any kind", "f & (f - 1) == 0", "True", "test_bad_configurations_are_refused"),
    ("factors in any order", "all(a > b", "all(True", "test_bad_configurations_are_refused"),
    ("a size that does not fit", "size % factors[0] == 0", "True", "test_bad_configurations_are_refused"),
    ("ratios of any sum", "abs(sum(self.ratios) - 1) < 1e-6", "True", "test_bad_configurations_are_refused"),
    ("negative ratios", "min(self.ratios) >= 0", "True", "test_bad_configurations_are_refused"),
    ("a router of any name", "self.router in ROUTERS", "True", "test_bad_configurations_are_refused"),
    ("an empty codebook", "self.code_dim) >= 1", "self.code_dim) >= 0", "test_bad_configurations_are_refused"),
    ("one value in a group", "self.size > self.factors[0] or least > 32", "True",
     "test_bad_configurations_are_refused"),
    ("one value in a group of the level above", ".bit_length())[-2:]", ".bit_length())[-1:]",
     "test_bad_configurations_are_refused"),
    ("channels that norms can't take", "self.channels % 32 == self.width % 32 == 0", "self.width % 32 == 0",
     "test_bad_configurations_are_refused"),
    ("widths start again", "min(level, len(self.multipliers) - 1)", "level % len(self.multipliers)",
     "test_the_last_multiplier_repeats"),
    ("heads that do not divide the width", "unit > 0 and self.width % unit == 0", "unit > 0",
     "test_transformer.py::test_bad_configurations_are_refused"),
    ("rotary with any heads", "(4 if self.rotary else 1)", "1",
     "test_transformer.py::test_bad_configurations_are_refused"),
    ("each process draws the first part", "device=device)).chunk(world)[rank]", "device=device)).chunk(world)[0]",
     "test_routers.py::test_processes_draw_together_what_one_would"),
)

ROUTING = of(
    "dq.py", "test_routers.py",
    ("another eps in norms", "nn.GroupNorm(32, channels, eps=1e-6)", "nn.GroupNorm(32, channels)",
     "test_vae.py::test_group_norm_equals_a_loop"),
    ("other groups in norms", "nn.GroupNorm(32, channels", "nn.GroupNorm(16, channels",
     "test_vae.py::test_group_norm_equals_a_loop"),
    ("maxima instead of means of regions", "F.adaptive_avg_pool2d", "F.adaptive_max_pool2d",
     "tools/test_import_authors.py::test_the_parts_land_where_they_belong"),
    ("the router without its activation", "nn.Linear(width, width), nn.SiLU(),", "nn.Linear(width, width),",
     "tools/test_import_authors.py"),
    ("the score counts nothing", "sum(k * p[:, k]", "sum(p[:, k]", "test_the_score_is_the_mean_granularity"),
    ("the gate does not sample", "- noise * exponential.log()", "",
     "test_gumbel_noise_draws_with_the_softmax_probabilities"),
    ("the scale of the noise ignored", "- noise * exponential.log()", "- exponential.log()",
     "test_straight_through_gradient_of_the_gate"),
    ("the sign of the noise", "- noise * exponential.log()", "+ noise * exponential.log()",
     "test_gumbel_noise_draws_with_the_softmax_probabilities"),
    ("a gate without a gradient", "return hard + (soft - soft.detach())", "return hard",
     "test_straight_through_gradient_of_the_gate"),
    ("a gate that is not one-hot", "return hard + (soft - soft.detach())", "return soft",
     "test_straight_through_gradient_of_the_gate"),
    ("evaluation samples the gate", "if not self.training:", "if False:",
     "test_gumbel_noise_draws_with_the_softmax_probabilities"),
    ("evaluation takes the least likely", "one_hot(logits.argmax(dim=1)", "one_hot(logits.argmin(dim=1)",
     "test_gumbel_noise_draws_with_the_softmax_probabilities"),
    ("ties go to the finer side", "torch.bucketize(self.score(x, maps), self.thresholds)",
     "torch.bucketize(self.score(x, maps), self.thresholds, right=True)", "test_blank_regions_are_coarse"),
    ("random thresholds not summed up", "torch.tensor(ratios).cumsum(0)[:-1]", "torch.tensor(ratios)[:-1]",
     "test_entropy_thresholds_and_random_routing_give_the_asked_ratios"),
    ("random routes by the batch", "key).random((side, side)", "0).random((side, side)",
     "test_random_routes_depend_on_seed_and_image_alone"),
    ("random routes without the seed", "random_numbers(torch.initial_seed(), key)", "random_numbers(0, key)",
     "test_random_routes_depend_on_seed_and_image_alone"),
    ("words of seeds exchanged", "[seed >> 32 for seed in seeds]", "[]",
     "test_sampling.py::test_no_other_seed_has_the_same_draws"),
    ("red and blue exchanged", "red, green, blue = x.float()", "blue, green, red = x.float()",
     "test_entropy_equals_a_loop_over_pixels"),
    ("wider bins of grey", "(pixels - centre) / 0.01", "(pixels - centre) / 0.02",
     "test_entropy_equals_a_loop_over_pixels"),
    ("fewer bins of grey", "torch.linspace(-1, 1, 32", "torch.linspace(-1, 1, 31",
     "test_entropy_equals_a_loop_over_pixels"),
    ("the sign of the entropy", "entropy = -(p *", "entropy = (p *", "test_entropy_equals_a_loop_over_pixels"),
    ("a budget for each image", "gate.mean(dim=(0, 2, 3)) ", "gate.mean(dim=(2, 3)).square().mean(0).sqrt() ",
     "test_budget_loss_lets_images_differ"),
    ("an absolute budget", "sum((share[k] - ratio) ** 2", "sum((share[k] - ratio).abs()",
     "test_budget_loss_equals_a_loop_and_pulls_on_all_regions_alike"),
    ("the budget of the coarsest alone", "for k, ratio in enumerate(ratios))", "for k, ratio in [(0, ratios[0])])",
     "test_budget_loss_equals_a_loop_and_pulls_on_all_regions_alike"),
)

CODEBOOK = of(
    "dq.py", "test_codebook.py",
    ("no straight-through gradient", "return z + (q - z).detach()", "return q",
     "test_straight_through_has_the_value_of_q_and_the_gradient_of_z"),
    ("the value of z", "return z + (q - z).detach()", "return z",
     "test_straight_through_has_the_value_of_q_and_the_gradient_of_z"),
    ("broken weights raise", "weight.nan_to_num(1.0)", "weight",
     "test_vae.py::test_an_image_that_is_not_finite_raises_nothing"),
    ("the cross term halved", "- 2 * (z - centre) @ codes.t()", "- (z - centre) @ codes.t()",
     "test_nearest_code_equals_a_loop"),
    ("the likest direction", "(codes.square().sum(1) - 2 *", "(-2 *", "test_nearest_code_equals_a_loop"),
    ("distances from the origin", "centre = self.codes.mean(0)", "centre = 0 * self.codes.mean(0)",
     "test_the_nearest_code_is_found_far_from_the_origin"),
    ("the same vector for several dead codes", "vectors[(dead.cumsum(0) - 1) % len(vectors)]",
     "vectors[torch.arange(len(dead)) % len(vectors)]", "test_no_vector_restarts_two_codes_while_there_are_enough"),
    ("distances in bf16", "torch.autocast(z.device.type, enabled=False)",
     "torch.autocast(z.device.type, torch.bfloat16)", "test_distances_are_in_float32"),
    ("no restart", "self.restart(flat.detach(), weight.flatten())", "pass",
     "test_the_codebook_learns_in_training_only"),
    ("the codebook is never moved", "self.update(flat.detach(), weight.flatten(), ids)", "pass",
     "test_ema_update_equals_a_loop_over_codes"),
    ("the codebook learns in evaluation", "if self.training:\n                self.update",
     "if True:\n                self.update", "test_the_codebook_learns_in_training_only"),
    ("commitment without its weight", "self.commitment * (weight * distance)", "(weight * distance)",
     "test_commitment_counts_every_code_once_and_pulls_only_the_encoder"),
    ("commitment counts cells", "self.commitment * (weight * distance)", "self.commitment * (distance)",
     "test_commitment_counts_every_code_once_and_pulls_only_the_encoder"),
    ("commitment summed over channels", "(q - flat).square().mean(1)", "(q - flat).square().sum(1)",
     "test_commitment_counts_every_code_once_and_pulls_only_the_encoder"),
    ("commitment pulls nothing", "(q - flat).square()", "(q - flat.detach()).square()",
     "test_commitment_pulls_vectors_to_their_codes"),
    ("averages over many batches from the start", "self.age / (9 + self.age)", "self.age * 0 + 1",
     "test_ema_update_equals_a_loop_over_codes"),
    ("averages over ever more batches", ".clamp(max=self.decay)", "", "test_ema_update_equals_a_loop_over_codes"),
    ("uses count cells", "index_add_(0, ids, weight)", "index_add_(0, ids, torch.ones_like(weight))",
     "test_ema_update_equals_a_loop_over_codes"),
    ("sums count cells", "weight[:, None] * z)", "z)", "test_ema_update_equals_a_loop_over_codes"),
    ("old and new uses exchanged", "self.uses.lerp_(total(uses), 1 - decay)", "self.uses.lerp_(total(uses), decay)",
     "test_ema_update_equals_a_loop_over_codes"),
    ("codes are sums", "self.codes.copy_(self.sums / ", "self.codes.copy_(self.sums + 0 * ",
     "test_ema_update_equals_a_loop_over_codes"),
    ("all codes restart", "self.uses < self.dead_below * mean_uses", "self.uses < mean_uses",
     "test_restart_revives_dead_codes_and_leaves_the_others"),
    ("nearly no code restarts", "dead_below=0.1", "dead_below=0.01",
     "test_restart_revives_dead_codes_and_leaves_the_others"),
    ("restarts without noise", "fresh + 0.01 * fresh", "fresh + 0.0 * fresh",
     "test_a_batch_of_few_different_vectors_gives_codes_that_differ"),
    ("restarts far from any vector", "fresh + 0.01 * fresh", "fresh + 1.0 * fresh", "test_restart_draws_by_weight"),
    ("restarts drawn blindly", "vectors = sample_vectors(z, weight,",
     "vectors = sample_vectors(z, torch.ones_like(weight),", "test_restart_draws_by_weight"),
    ("restarted codes stay unused", "torch.where(dead, mean_uses, self.uses)", "self.uses",
     "test_restart_revives_dead_codes_and_leaves_the_others"),
    ("restarted codes keep their sums", "torch.where(dead[:, None], fresh * mean_uses, self.sums)", "self.sums",
     "test_restart_revives_dead_codes_and_leaves_the_others"),
)

NETWORKS = of(
    "dq.py", "test_vae.py",
    ("no first SiLU", "self.conv1(F.silu(self.norm1(x)))", "self.conv1(self.norm1(x))",
     "test_a_residual_block_is_its_formula"),
    ("no second SiLU", "self.conv2(F.silu(self.norm2(h)))", "self.conv2(self.norm2(h))",
     "test_a_residual_block_is_its_formula"),
    ("a residual block without the residual", "return self.shortcut(x) + h", "return h",
     "test_a_residual_block_is_its_formula"),
    ("attention without the residual", "return x + self.proj(y.transpose", "return self.proj(y.transpose",
     "test_attention_over_a_map_is_its_formula"),
    ("attention's scale 1/d in stage 1", "F.scaled_dot_product_attention(q, k, v)[:, 0]",
     "F.scaled_dot_product_attention(q, k, v, scale=1 / c)[:, 0]", "test_attention_over_a_map_is_its_formula"),
    ("keys and values exchanged", "q, k, v = qkv[:, None]", "q, v, k = qkv[:, None]",
     "test_attention_over_a_map_is_its_formula"),
    ("attention one level too late", "2 ** level >= config.attention_from", "2 ** level > config.attention_from",
     "tools/test_import_authors.py::test_the_authors_weights_give_the_authors_numbers"),
    ("padding on the other side", "F.pad(h, (0, 1, 0, 1))", "F.pad(h, (1, 0, 1, 0))",
     "tools/test_import_authors.py::test_the_authors_weights_give_the_authors_numbers"),
    ("bilinear upsampling", "F.interpolate(h, scale_factor=2)", "F.interpolate(h, scale_factor=2, mode='bilinear')",
     "tools/test_import_authors.py::test_the_authors_weights_give_the_authors_numbers"),
    ("no activation before the picture", "nn.Sequential(norm(c), nn.SiLU(), nn.Conv2d(c, 3,",
     "nn.Sequential(norm(c), nn.Identity(), nn.Conv2d(c, 3,",
     "tools/test_import_authors.py::test_the_authors_weights_give_the_authors_numbers"),
    ("the middle skipped", "h = self.mid(self.stem(self.position(z)))", "h = self.stem(self.position(z))",
     "tools/test_import_authors.py::test_the_authors_weights_give_the_authors_numbers"),
    ("cosines of places", "torch.sin(self.fourier(self.grid))", "torch.cos(self.fourier(self.grid))",
     "test_the_decoder_adds_the_position_of_each_cell"),
    ("x and y exchanged", "torch.stack([x, y])[None]", "torch.stack([y, x])[None]",
     "test_the_decoder_adds_the_position_of_each_cell"),
    ("rows and columns exchanged", "self.rows[:, None] + self.columns[None]", "self.rows[None] + self.columns[:, None]",
     "test_the_decoder_adds_the_position_of_each_cell"),
    ("the decoder knows no places", "self.stem(self.position(z))", "self.stem(z)",
     "test_the_decoder_adds_the_position_of_each_cell"),
    ("maps mixed without the gate", "sum(upsample(gate[:, k:k + 1], side) * upsample(m, side)", "sum(upsample(m, side)",
     "test_mix_equals_a_loop"),
    ("weights by side, not by area", "(self.config.factors[-1] / f) ** 2", "(self.config.factors[-1] / f)",
     "test_cell_weight_equals_a_loop"),
    ("weights with a gradient", "gate.detach()[:, k:k + 1]", "gate[:, k:k + 1]", "test_cell_weight_equals_a_loop"),
    ("the codebook counts cells", "self.codebook(z, self.cell_weight(gate))",
     "self.codebook(z, torch.ones_like(self.cell_weight(gate)))",
     "tools/test_import_authors.py::test_the_authors_weights_give_the_authors_numbers"),
    ("the router gets no noise", "self.router(x, maps, noise)", "self.router(x, maps)",
     "test_wiring.py::test_the_noise_of_the_gate_fades"),
    ("the model gets no noise", "self.quantize(x, noise)", "self.quantize(x)",
     "test_wiring.py::test_the_noise_of_the_gate_fades"),
    ("grains of the second", "return codes, gate.argmax(dim=1)", "return codes, gate.argmin(dim=1)",
     "test_encode_and_decode_agree_with_forward"),
    ("decoded without the last projection", "q = self.codebook.codes[codes].permute(0, 3, 1, 2).contiguous()",
     "q = self.codebook.codes[codes].permute(0, 3, 2, 1).contiguous()", "test_encode_and_decode_agree_with_forward"),
)

SEQUENCES = of(
    "dq.py", "test_layout.py",
    ("no room for the EOS ids", "self.max_len = N * self.cells[-1] + K", "self.max_len = N * self.cells[-1]",
     "test_pack_equals_a_loop"),
    ("places at corners", "dim=1) + 0.5) * (self.fine_side / side)", "dim=1) + 0.0) * (self.fine_side / side)",
     "test_places_are_the_centres_of_codes_on_the_finest_grid"),
    ("regions numbered by columns", "row // c * self.side + column // c", "column // c * self.side + row // c",
     "test_pack_equals_a_loop"),
    ("another opener", "first + row // c * c * side + column // c * c", "first + row // c * c * side + column",
     "test_packed_sequences_are_legal_at_each_step"),
    ("EOS ids left out", "there = self.is_eos | (covers", "there = (covers", "test_pack_equals_a_loop"),
    ("codes in another order than ids", ".gather(1, order)", "", "test_pack_equals_a_loop"),
    ("contents of what is not there", "code.masked_fill(~there, -1)", "code", "test_pack_equals_a_loop"),
    ("EOS writes into a region", "self.grain[pos])[:, :-1]", "self.grain[pos])[:, 1:]",
     "test_unpack_is_the_inverse_of_pack"),
    ("a hole becomes code 0", "clamp(min=0)[:, None]        #", "clamp(min=0)[:, None] * 0     #",
     "test_unpack_is_the_inverse_of_pack"),
    ("lengths without the last EOS", "(pos != self.end).sum(1) + 1", "(pos != self.end).sum(1)",
     "test_pack_equals_a_loop"),
    ("ids may repeat", "following = (prev + 1)", "following = (prev)", "test_every_legal_walk_is_a_complete_tiling"),
    ("granularities may be skipped", "(self.ids >= following) & (self.grain == self.grain[following])",
     "(self.ids >= following)", "test_packed_sequences_are_legal_at_each_step"),
    ("regions may be covered twice", "opens = ahead & (taken >= self.grain) & self.opens", "opens = ahead & self.opens",
     "test_every_legal_walk_is_a_complete_tiling"),
    ("regions may open in the middle", "(taken >= self.grain) & self.opens ", "(taken >= self.grain) ",
     "test_packed_sequences_are_legal_at_each_step"),
    ("regions may stay half written", "stops = due | opens & self.finest", "stops = opens & self.finest",
     "test_packed_sequences_are_legal_at_each_step"),
    ("the finest may leave holes", "stops = due | opens & self.finest", "stops = due",
     "test_every_legal_walk_is_a_complete_tiling"),
)

TRANSFORMER = of(
    "dq.py", "test_transformer.py",
    ("no sum in the product", "torch.addmm(x[:, 0], y[:, 0]", "torch.addmm(0 * x[:, 0], y[:, 0]",
     "test_a_sum_with_a_product_equals_both"),
    ("attention's scale 1/d on CPUs", "q.shape[-1] ** -0.5", "q.shape[-1] ** -1.0",
     "test_logits_equal_a_loop_over_prefixes"),
    ("attention's scale 1 on CPUs", "* q.shape[-1] ** -0.5", "", "test_logits_equal_a_loop_over_prefixes"),
    ("attention sees one step ahead", ".triu(1)", ".triu(2)", "test_logits_equal_a_loop_over_prefixes"),
    ("attention sees not itself", ".triu(1)", ".triu(0)", "test_logits_equal_a_loop_over_prefixes"),
    ("no dropout in attention", "F.dropout(weights, dropout) @ v", "weights @ v",
     "test_dropout_acts_at_four_places_in_training"),
    ("dropout in attention in evaluation", "dropout=self.dropout if self.training else 0.0", "dropout=self.dropout",
     "test_dropout_acts_at_four_places_in_training"),
    ("no dropout behind attention", "x + self.drop(self.proj(y.transpose(1, 2).reshape(B, L, C)))",
     "x + self.proj(y.transpose(1, 2).reshape(B, L, C))", "test_dropout_acts_at_four_places_in_training"),
    ("no dropout behind the MLP", "return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))",
     "return x + self.down(F.gelu(self.up(self.norm2(x))))", "test_dropout_acts_at_four_places_in_training"),
    ("no dropout of embeddings", "self.drop(x + self.order.weight[:L])", "(x + self.order.weight[:L])",
     "test_dropout_acts_at_four_places_in_training"),
    ("slower rotations", "10.0 ** -(torch.arange", "100.0 ** -(torch.arange",
     "test_rotation_is_a_product_of_complex_numbers"),
    ("rotations backwards", "torch.cat([-angle.sin(), angle.sin()]", "torch.cat([angle.sin(), -angle.sin()]",
     "test_rotation_is_a_product_of_complex_numbers"),
    ("values turned", "torch.full_like(keys, -1)]", "keys]", "test_logits_equal_a_loop_over_prefixes"),
    ("queries and keys not normalised", "torch.cat([F.layer_norm(qk, qk.shape[-1:]).type_as(v), v], dim=2)", "qkv",
     "test_logits_equal_a_loop_over_prefixes"),
    ("all that looks is normalised", "        if self.qk_norm:\n", "        if True:\n",
     "test_logits_equal_a_loop_over_prefixes"),
    ("values normalised", "qk, v = qkv.split([2, 1], dim=2)", "qk, v = qkv, qkv[:, :, :0]",
     "test_logits_equal_a_loop_over_prefixes"),
    ("another activation in training", "return x + self.drop(self.down(F.gelu(",
     "return x + self.drop(self.down(F.silu(", "test_logits_equal_a_loop_over_prefixes"),
    ("another activation in sampling", "return add_linear(x, self.down, F.gelu(",
     "return add_linear(x, self.down, F.silu(", "test_sampling.py::test_the_step_draws_what_the_naive_loop_draws"),
    ("another eps in layer norms", "self.norm1, self.norm2 = nn.LayerNorm(C, bias=False)",
     "self.norm1, self.norm2 = nn.LayerNorm(C, eps=1e-2, bias=False)", "test_logits_equal_a_loop_over_prefixes"),
    ("pairs without granularity", "+ self.position(pos) + self.granularity(self.layout.grain[pos])",
     "+ self.position(pos)", "test_a_pair_is_the_sum_of_three_rows"),
    ("contents do not know where", "h = h + self.position(pos) ", "h = h ", "test_logits_equal_a_loop_over_prefixes"),
    ("contents look from the pair before", "self.turns_of(pos, prev) ", "self.turns_of(prev, prev) ",
     "test_logits_equal_a_loop_over_prefixes"),
    ("no order embedding", "x + self.order.weight[:L]", "x", "test_logits_equal_a_loop_over_prefixes"),
    ("large weights at first", "std=0.0 if zero else 0.02)", "std=0.0 if zero else 0.2)",
     "test_a_fresh_model_is_uniform"),
    ("branches begin as something", '("proj.weight", "down.weight", "head.weight")', '("head.weight",)',
     "test_a_fresh_model_is_uniform"),
    ("opinions at first", '("proj.weight", "down.weight", "head.weight")', '("proj.weight", "down.weight")',
     "test_a_fresh_model_is_uniform"),
    ("labels ignored in training", "start = self.condition(label % (self.n_classes + 1))",
     "start = self.condition(0 * label)", "test_logits_equal_a_loop_over_prefixes"),
    ("labels hidden in evaluation", "if self.training:\n            hide", "if True:\n            hide",
     "test_logits_equal_a_loop_over_prefixes"),
    ("labels shown by label dropout", "< self.config.label_dropout", "> self.config.label_dropout",
     "test_logits_equal_a_loop_over_prefixes"),
    ("what is not legal costs", "return position.masked_fill(~legal, -math.inf), content", "return position, content",
     "test_logits_equal_a_loop_over_prefixes"),
    ("likelihoods of position in place of content", "content=F.cross_entropy(content",
     "content=F.cross_entropy(0 * content", "test_train_transformer.py::test_evaluation_of_a_transformer"),
    ("the mean over pairs", "each.view(pos.shape).sum(1)", "each.view(pos.shape).mean(1)",
     "test_train_transformer.py::test_evaluation_of_a_transformer"),
)

SAMPLING = of(
    "dq.py", "test_sampling.py",
    ("temperature 0", "1e-6 <= self.temperature", "0 <= self.temperature", "test_options_out_of_range_are_refused"),
    ("top-p 0", "0 < self.top_p", "0 <= self.top_p", "test_options_out_of_range_are_refused"),
    ("top-p above 1", "self.top_p <= 1", "self.top_p", "test_options_out_of_range_are_refused"),
    ("top-k below 0", "require(self.top_k >= 0", "require(True", "test_options_out_of_range_are_refused"),
    ("cfg below 0", "require(0 <= self.cfg", "require(-math.inf < self.cfg", "test_options_out_of_range_are_refused"),
    ("one more than top-k", "logits.topk(top_k)", "logits.topk(top_k + 1)", "test_top_k_and_top_p_equal_a_loop"),
    ("top-k of all", "if 0 < top_k < logits", "if 1 < top_k < logits", "test_top_k_and_top_p_equal_a_loop"),
    ("fewer than top-p", "probs.cumsum(-1) - probs >= top_p", "probs.cumsum(-1) >= top_p",
     "test_top_k_and_top_p_equal_a_loop"),
    ("draws that round past the end", "* cdf.amax(-1, keepdim=True)", "* 1.001", "test_draws_follow_the_distribution"),
    ("guidance turned round", "options.cfg * (labelled - unlabelled)", "options.cfg * (unlabelled - labelled)",
     "test_the_step_draws_what_the_naive_loop_draws"),
    ("guidance without the unlabelled", "logits = unlabelled + options.cfg", "logits = labelled + options.cfg",
     "test_the_step_draws_what_the_naive_loop_draws"),
    ("temperature ignored in the step", "return logits / options.temperature", "return logits",
     "test_the_step_draws_what_the_naive_loop_draws"),
    ("filters ignored in the step", "draw(filter_logits(logits, options.top_k, options.top_p), u[1])",
     "draw(logits, u[1])", "test_the_step_draws_what_the_naive_loop_draws"),
    ("one number for two draws", "options.top_p), u[1])", "options.top_p), u[0])",
     "test_the_step_draws_what_the_naive_loop_draws"),
    ("every image has the draws of the first", "random_numbers(seed, i).random", "random_numbers(seed, first).random",
     "test_an_image_depends_on_its_number_alone"),
    ("the seed ignored in the draws", "random_numbers(seed, i).random", "random_numbers(0, i).random",
     "test_a_seed_fixes_the_images_and_another_changes_them"),
    ("`first` ignored in the draws", "for i in range(first, first + n + 1)]", "for i in range(n + 1)]",
     "test_an_image_depends_on_its_number_alone"),
    ("given pairs ignored", "torch.where(given < 0, drawn, given)", "drawn",
     "test_given_tilings_and_given_codes_are_kept"),
    ("the cache forgets the newest pair", "> at[1][:, None, None, None]", ">= at[1][:, None, None, None]",
     "test_the_step_draws_what_the_naive_loop_draws"),
    ("the step draws what is not legal",
     "logits = logits.masked_fill(~model.layout.legal(state.last, state.grains[:, :-1]), -math.inf)", "pass",
     "test_the_step_draws_what_the_naive_loop_draws"),
    ("a slot keeps what the former image knew", "state.grains.masked_fill_(done[:, None], -1)", "pass",
     "test_the_step_draws_what_the_naive_loop_draws"),
    ("a slot goes on where the former image was", "state.t.add_(1).masked_fill_(done, 0)", "state.t.add_(1)",
     "test_an_image_depends_on_its_number_alone"),
    ("slots take the same image", "state.newest + among_done", "state.newest + 1",
     "test_an_image_depends_on_its_number_alone"),
    ("options unchecked", "    options.check()\n    n, L, device", "    n, L, device",
     "test_what_can_not_be_drawn_is_refused"),
    ("all slots at once", "min(n, slots or n)", "n", "test_refilled_slots_cost_the_mean_length"),
    ("guidance without labels", "copies = 2 if options.cfg != 1 and model.n_classes else 1",
     "copies = 2 if options.cfg != 1 else 1", "test_guidance_costs_nothing_where_there_are_no_classes"),
    ("no guidance", "copies = 2 if options.cfg", "copies = 1 if options.cfg",
     "test_the_step_draws_what_the_naive_loop_draws"),
    ("the step is not compiled", "torch.compile(decode_one) if compile else decode_one", "decode_one",
     "test_the_step_is_one_graph_for_the_compiler"),
    ("labels beyond the classes", "require((label < max(1, model.n_classes)).all()", "require((label < 99).all()",
     "test_what_can_not_be_drawn_is_refused"),
    ("given positions anywhere", "require(in_front", "require(True", "test_what_can_not_be_drawn_is_refused"),
)

FILES = of(
    "dq.py", "test_checkpoints.py",
    ("what was written half takes the name", "os.replace(temporary, path)", "pass",
     "test_a_file_is_whole_or_as_it_was"),
    ("files written in place", 'path.with_name(path.name + ".tmp")', "path", "test_a_file_is_whole_or_as_it_was"),
    ("temporary files left", "temporary.unlink(missing_ok=True)", "pass", "test_a_file_is_whole_or_as_it_was"),
    ("checkpoints run code", "weights_only=True)  # runs no code", "weights_only=False)  # runs no code",
     "test_a_checkpoint_runs_no_code"),
    ("checksums not looked at", "archive.testzip() is None", "True", "test_a_flipped_bit_is_seen"),
    ("any kind of checkpoint", "require(found == kind", "require(True", "test_checkpoints"),
    ("sequences of any order", "require(layout == Layout.name", "require(True",
     "test_checkpoints_of_other_orders_are_refused"),
    ("loaded models train", ".to(device).eval()", ".to(device)", "test_checkpoints"),
    ("loaded models have gradients", ".eval().requires_grad_(False)", ".eval()", "test_checkpoints"),
)

# ------------------------------------------------------------------------------------------------
# common.py


PICTURES = of(
    "common.py", "test_common.py",
    ("crops at the corner", "where = (0.5, 0.5) if rng", "where = (0.0, 0.0) if rng", "test_resize_crop_and_flip"),
    ("no random crops", "centering=where)", "centering=(0.5, 0.5))", "test_resize_crop_and_flip"),
    ("every image mirrored", "rng.random() < 0.5:", "rng.random() < 1.5:", "test_resize_crop_and_flip"),
    ("no antialiasing", "Image.Resampling.BICUBIC, centering", "Image.Resampling.NEAREST, centering",
     "test_resize_crop_and_flip"),
    ("images in [0, 2]", ".float() / 127.5 - 1", ".float() / 127.5", "test_images_of_every_mode"),
    ("orientation ignored", "ImageOps.exif_transpose(image, in_place=True)", "pass",
     "test_the_pixels_of_broken_metadata"),
    ("bombs are opened", 'warnings.simplefilter("error", Image.DecompressionBombWarning)', "pass",
     "survival/test_broken.py::test_images_that_are_odd_or_broken"),
    ("transparency over black", 'Image.new("RGBA", image.size, "white")', 'Image.new("RGBA", image.size, "black")',
     "test_images_of_every_mode"),
    ("keys of 2 bits unscaled", 'key * {"L;2": 85, "L;4": 17}[packing]', "key", "test_images_of_every_mode"),
    ("keys of 16 bits unscaled", "tuple(value >> 8 for value in key)", "tuple(value & 255 for value in key)",
     "test_images_of_every_mode"),
    ("overshoot makes all else black", "if bright <= 2 * scale", "if bright <= scale", "test_images_of_every_mode"),
    ("white is zero ignored", "if tags.get(262) == 0:", "if False:", "test_images_of_every_mode"),
    ("pictures cut, not rounded", "* 127.5).round().clamp(0, 255)", "* 127.5).clamp(0, 255)",
     "test_a_picture_is_its_pixels"),
    ("pictures overflow", ".round().clamp(0, 255)", ".round()", "test_a_picture_is_its_pixels"),
    ("pictures smoothed", "side // picture.width), Image.Resampling.NEAREST)",
     "side // picture.width), Image.Resampling.BICUBIC)", "test_a_picture_is_its_pixels"),
    ("boxes of fine codes everywhere", "dq.upsample(grains == k,", "dq.upsample(grains <= k,", "test_a_box_per_code"),
    ("boxes of the wrong size", "side = factor * picture.width / x.shape[-1]",
     "side = factors[0] * picture.width / x.shape[-1]", "test_a_box_per_code"),
    ("one colour for all", "GRAIN_COLOURS[k % 3]", "GRAIN_COLOURS[0]", "test_a_box_per_code"),
    ("a grid column by column", "i % columns * (w + gap), i // columns * (h + gap + top)",
     "i // columns * (w + gap), i % columns * (h + gap + top)", "test_a_grid_row_by_row"),
    ("captions of the neighbour", "captions[i], fill", "captions[i - 1], fill", "test_a_grid_row_by_row"),
    ("a grid without its last row", "math.ceil(len(pictures) / columns)", "len(pictures) // columns",
     "test_a_grid_row_by_row"),
)

PROGRAM = of(
    "common.py", "test_common.py",
    ("--device ignored", "device = torch.device(name)", 'device = torch.device("cpu")',
     "test_devices_that_are_not_here"),
    ("the GPU is not made the current one", "torch.cuda.set_device(device) ", "pass ",
     "test_the_gpu_that_is_asked_for_becomes_the_current_one"),
    ("--dtype fp32 ignored", '(dtype == "auto" and bool(fast))', "bool(fast)", "test_dtype_is_what_is_asked_for"),
    ("--dtype bf16 ignored", 'dtype == "bf16" or (dtype', "(dtype", "test_dtype_is_what_is_asked_for"),
    ("auto is fp32", 'and (cpu.get("avx512_bf16") or cpu.get("amx_bf16"))', "and False",
     "test_dtype_is_what_is_asked_for"),
    ("errors of users as tracebacks", "except (dq.UserError, OSError) as error:", "except OSError as error:",
     "test_how_a_script_ends"),
    ("full disks as tracebacks", "except (dq.UserError, OSError) as error:", "except dq.UserError as error:",
     "test_how_a_script_ends"),
    ("Ctrl-C is a success", "status = 130", "status = 0", "test_how_a_script_ends"),
    ("faults of the program hidden", "if hint is None:", "if False:", "test_how_a_script_ends"),
    ("no hint where memory runs out", '"out of memory": NO_MEMORY', '"out of memory": None', "test_how_a_script_ends"),
    ("a failure is a success", "if status:\n        sys.exit(status)", "if status:\n        sys.exit(0)",
     "test_how_a_script_ends"),
    ("numbers too low", "if not low <= kind(text) < below:", "if not kind(text) < below:", "test_numbers_of_flags"),
    ("numbers too high", "if not low <= kind(text) < below:", "if not low <= kind(text):", "test_numbers_of_flags"),
    ("0 steps", "positive, natural, weight = number(int, 1)", "positive, natural, weight = number(int, 0)",
     "test_numbers_of_flags"),
)

TRAINING_RUN = of(
    "common.py", "test_common.py",
    ("no warm-up", "return self.lr * (step + 1) / self.warmup", "return self.lr", "test_schedules"),
    ("warm-up from 0", "self.lr * (step + 1) / self.warmup", "self.lr * step / self.warmup", "test_schedules"),
    ("a learning rate that stays", "0.5 * (1 + math.cos(math.pi * done)))", "1)", "test_schedules"),
    ("a linear decay ignored", 'self.decay == "linear"', "False", "test_schedules"),
    ("a learning rate that rises again", "math.cos(math.pi * done)", "math.cos(2 * math.pi * done)", "test_schedules"),
    ("the preset's defaults ignored", "default=getattr(schedule, each.name)", "default=each.default",
     "test_wiring.py::test_every_flag_arrives"),
    ("flags ignored", "replace(preset, **flags | more)", "replace(preset, **more)",
     "test_wiring.py::test_every_flag_arrives"),
    ("--save-every ignored", "done % self.args.save_every == 0", "done % self.settings['eval_every'] == 0",
     "survival/test_resume.py::test_ten_steps_killed_and_ten_more_are_twenty_steps"),
    ("batches that have no equal parts", "dq.require(args.batch_size % parts == 0 or", "dq.require(True or",
     "test_wrong_input_ends_in_one_line"),
    ("each epoch in the same order", "dq.random_numbers(seed, e).permutation(n)",
     "dq.random_numbers(seed, 0).permutation(n)", "test_train_transformer.py::test_batches_of_stage_2"),
    ("--seed ignored in the order", "dq.random_numbers(seed, e).permutation(n)",
     "dq.random_numbers(0, e).permutation(n)", "test_train_vae.py::test_stream_is_a_function_of_seed_and_batch_number"),
    ("a resumed run starts the epoch anew", "itertools.islice(numbers, start * batch_size % n, None)",
     "itertools.islice(numbers, 0, None)", "test_train_vae.py::test_stream_is_a_function_of_seed_and_batch_number"),
    ("numbers of images without their epoch", "(e * n + int(i) for", "(int(i) for",
     "test_train_vae.py::test_each_epoch_has_other_numbers"),
    ("logged losses of the last part", "sums[name] = sums.get(name, 0.0) + scale", "sums[name] = scale",
     "test_wiring.py::test_what_is_logged_is_what_was_trained"),
    ("logged losses summed over parts", "+ scale * term.detach()", "+ term.detach()",
     "test_wiring.py::test_what_is_logged_is_what_was_trained"),
    ("losses that are no numbers", "if not math.isfinite(value))", "if False)",
     "survival/test_broken.py::test_a_loss_that_is_not_a_number_stops_the_run"),
    ("the newest losses alone looked at", "for done, sums in self.losses.items():",
     "for done, sums in list(self.losses.items())[-1:]:",
     "survival/test_broken.py::test_a_loss_that_is_not_a_number_stops_the_run"),
    ("seeds of neighbours alike", "random.seed(str(numbers)) ", "random.seed(sum(numbers)) ",
     "test_seeds_have_nothing_in_common"),
    ("one signal ends nothing", "self.number = number\n", "self.number = 0\n",
     "test_a_signal_is_noted_and_a_second_one_acts"),
    ("former handlers lost", "self.close()  ", "pass  ", "test_a_signal_is_noted_and_a_second_one_acts"),
    ("an end by a signal is a success", "sys.exit(128 + number)", "sys.exit(0)",
     "test_a_signal_is_noted_and_a_second_one_acts"),
    ("what older checkpoints lack goes on with anything", "then = asdict(type(self.config)()) | held", "then = held",
     "survival/test_resume.py::test_a_run_of_before_the_normalised_queries_is_refused"),
    ("any settings go on", "dq.require(name in self.may_change", "dq.require(True",
     "survival/test_resume.py::test_resuming_with_other_settings"),
    ("the best loss forgotten", 'self.step, self.best = held["step"], held["best"]', 'self.step = held["step"]',
     "survival/test_resume.py::test_a_checkpoint_of_before_the_settings_goes_on"),
    ("optimisers start anew", "in dict(weights=self.model, **self.parts).items():",
     "in dict(weights=self.model).items():",
     "survival/test_resume.py::test_ten_steps_killed_and_ten_more_are_twenty_steps"),
    ("logged twice", 'if line["step"] <= self.step]', "if True]",
     "survival/test_resume.py::test_ten_steps_killed_and_ten_more_are_twenty_steps"),
    ("no evaluation at the end", "evaluates = last or done", "evaluates = done",
     "test_wiring.py::test_what_is_logged_is_what_was_trained"),
    ("every process saves", "    def write(self, path, done, **more):\n        if dq.processes()[0] == 0:",
     "    def write(self, path, done, **more):\n        if True:",
     "test_wiring.py::test_no_process_but_the_first_writes"),
    ("no checkpoint at the end", "saves = last or asked or done", "saves = asked or done",
     "test_wiring.py::test_the_end_is_saved"),
    ("the worst checkpoint is the best", "if loss < self.best:", "if loss > self.best or self.best == math.inf:",
     "test_the_best_checkpoint_is_that_of_the_lowest_loss"),
    ("broken weights are saved", "dq.require(finite, f", "dq.require(True, f",
     "survival/test_broken.py::test_broken_weights_are_not_saved"),
    ("a former run overwritten", "os.replace(file, former / file.name)", "pass",
     "survival/test_resume.py::test_a_run_that_starts_anew_moves_the_former_one_aside"),
)

# ------------------------------------------------------------------------------------------------
# train_vae.py


STAGE_1_DATA = of(
    "train_vae.py", "test_train_vae.py",
    ("a signal to all ends the loaders", "lambda number, frame: signal.signal(number, signal.SIG_DFL)",
     "signal.SIG_DFL", "survival/test_kill.py::test_the_second_signal_ends_a_loader"),
    ("toy images held out are those trained on", "seed=seed + 1_000_003", "seed=seed",
     "test_held_out_toy_images_are_new"),
    ("--seed ignored by the toy data", "return ToyShapes(size, seed=seed),", "return ToyShapes(size),",
     "test_held_out_toy_images_are_new"),
    ("folders are no classes", "if len(classes) > 1 else {}", "if len(classes) > 99 else {}",
     "test_classes_splits_and_epochs"),
    ("one folder is a class", "if len(classes) > 1 else {}", "if len(classes) > 0 else {}",
     "test_what_is_understood_is_said_in_one_line"),
    ("no augmentation of the data", "train, label, size, augment, seed, left_out, flip)",
     "train, label, size, False, seed, left_out, flip)", "test_classes_splits_and_epochs"),
    ("--no-flip ignored by the data", "rng, self.flip), label", "rng), label", "test_arrows_need_not_be_mirrored"),
    ("files of two names count twice", "in files_seen:", "in ():",
     "test_a_file_of_two_names_is_one_image"),
    ("--held-out ignored by the data", "if held_out:", "if False:", "test_a_folder_can_be_held_out"),
    ("--held-out ignored without --data", "dq.require(not held_out,", "dq.require(True,",
     "test_a_folder_can_be_held_out"),
    ("what is held out below --data is trained on", "sound_images(folder, [skip, held_out], size)",
     "sound_images(folder, [skip], size)",
     "test_what_is_held_out_is_not_trained_on"),
    ("one folder is warned of as a split", "elif len(top) > 1 and {name.lower()", "elif {name.lower()",
     "test_what_is_held_out_is_not_trained_on"),
    ("another held-out folder may go on", "held_out=identity(held_out), ", "",
     "survival/test_resume.py::test_resuming_with_other_settings"),
    ("thresholds of none and all that can't be saved", "np.where(cuts < 1e-6, -1,", "np.where(cuts < 1e-6, -np.inf,",
     "test_routers.py::test_none_and_all_are_none_and_all"),
    ("held-out images of the first classes", "dq.random_numbers(0).permutation(len(data))[:512].tolist()",
     "range(len(data))[:512]", "test_all_classes_are_evaluated"),
    ("held-out images augmented", "val, label, size, left_out=left_out)",
     "val, label, size, augment, left_out=left_out)", "test_classes_splits_and_epochs"),
    ("--out is data", "for folder in skip if folder}", "for folder in skip[1:] if folder}",
     "test_what_a_folder_holds"),
    ("hidden files are data", 'if name.startswith(".") or name in NO_DATA}', "if name in NO_DATA}",
     "test_what_a_folder_holds"),
    ("own pictures are data", 'if name.startswith(".") or name in NO_DATA}', 'if name.startswith(".")}',
     "test_what_a_folder_holds"),
    ("former runs are data", "WRITTEN.isdisjoint(files)", "True", "test_what_a_folder_holds"),
    ("links are not followed", "followlinks=True", "followlinks=False", "test_what_a_folder_holds"),
    ("endings in capitals ignored", "os.path.splitext(name)[1].lower()", "os.path.splitext(name)[1]",
     "test_what_a_folder_holds"),
    ("a tenth held out", "% 20 == 0]", "% 10 == 0]", "test_classes_splits_and_epochs"),
    ("a class is held out whole", "if name != first[label]]", "]", "test_what_a_folder_holds"),
    ("held-out images are trained on", "return [pair for pair in files if pair not in held]", "return files",
     "test_classes_splits_and_epochs"),
    ("one crop for ever", "dq.random_numbers(self.seed, i) if self.augment",
     "dq.random_numbers(self.seed, k) if self.augment", "test_classes_splits_and_epochs"),
    ("the neighbour in place of a broken file", "dq.random_numbers(self.seed, i, 1).permutation(n).tolist()",
     "range(n)", "test_a_broken_file_weighs_nothing"),
    ("a broken file is read again", "if self.broken[k]:", "if False:", "test_a_broken_file_weighs_nothing"),
    ("no toy seed", "dq.random_numbers(self.seed, i % self.n)", "dq.random_numbers(0, i % self.n)", "test_toy_shapes"),
    ("another texture is named", "self._draw(i)[6])", "self._draw(i)[5] % 3)",
     "test_the_texture_that_is_named_is_the_one_that_is_drawn"),
    ("the mask of another image", "self._draw(i)[0] < 0)", "self._draw(i + 1)[0] < 0)", "test_toy_shapes"),
    ("broken images encoded as others", "if pair is None and self.augment:", "if pair is None:",
     "test_a_broken_file_weighs_nothing"),
    ("processes see the same images", "reshape(accumulate, world, -1)[:, rank]", "reshape(accumulate, world, -1)[:, 0]",
     "test_processes_share_every_part_of_a_batch"),
)

STAGE_1_LOSSES = of(
    "train_vae.py", "test_train_vae.py",
    ("LPIPS without its shift", "x, y = (x - self.shift) / self.scale, (y", "x, y = x / self.scale, (y",
     "test_lpips_is_the_published_formula"),
    ("LPIPS before the ReLU", "self.ends.append(len(layers))", "self.ends.append(len(layers) - 1)",
     "test_lpips_is_the_published_formula"),
    ("LPIPS without weights", "(weight * (a - b).square())", "((a - b).square())",
     "test_lpips_is_the_published_formula"),
    ("LPIPS unnormalised", "(F.normalize(maps.float(), dim=1, eps=1e-10) for", "(maps.float() for",
     "test_lpips_is_the_published_formula"),
    ("batch norm's variance uncorrected", "self.running_var.lerp_(var * n / (n - 1)", "self.running_var.lerp_(var",
     "test_batch_norm_of_two_processes_is_that_of_one"),
    ("batch norm of the own images", "mean, square = all_reduce(sums) / world", "mean, square = sums",
     "test_batch_norm_of_two_processes_is_that_of_one"),
    ("a critic of other patches", "(8 * width, 1)", "(8 * width, 2)", "test_discriminator_is_the_usual_patchgan"),
    ("a critic with another slope", "bias=False), BatchNorm(c_out), nn.LeakyReLU(0.2)]",
     "bias=False), BatchNorm(c_out), nn.LeakyReLU(0.02)]", "test_discriminator_equals_its_layers"),
    ("a critic with large weights", "nn.init.normal_(module.weight, 0, 0.02)", "nn.init.normal_(module.weight, 0, 0.2)",
     "test_discriminator_equals_its_layers"),
    ("norms of the critic at 0", "nn.init.normal_(module.weight, 1, 0.02)", "nn.init.normal_(module.weight, 0, 0.02)",
     "test_discriminator_equals_its_layers"),
    ("the hinge loss without its half", "return 0.5 * (F.relu(1 - real)", "return (F.relu(1 - real)",
     "test_hinge_loss"),
    ("the hinge loss turned round", "F.relu(1 - real).mean() + F.relu(1 + fake)",
     "F.relu(1 + real).mean() + F.relu(1 - fake)", "test_hinge_loss"),
    ("a hinge without a margin", "F.relu(1 - real)", "F.relu(-real)", "test_hinge_loss"),
    ("the adaptive weight upside down", "(pull / (push + 1e-4))", "(push / (pull + 1e-4))",
     "test_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer"),
    ("the adaptive weight without a cap", ".clamp(max=cap)", "",
     "test_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer"),
    ("another cap", "cap=0.75)", "cap=1.0)", "test_gradients_added_at_the_image_are_those_of_the_whole_loss"),
    ("the adaptive weight alone", "weight = gan_weight * adaptive_weight", "weight = adaptive_weight",
     "test_gradients_added_at_the_image_are_those_of_the_whole_loss"),
    ("adversarial gradients dropped", "at_y = at_y + weight * push", "pass",
     "test_gradients_added_at_the_image_are_those_of_the_whole_loss"),
    ("codes' losses dropped", "[scale * at_y, torch.full_like(other, scale)]",
     "[scale * at_y, torch.full_like(other, 0.0)]", "test_gradients_added_at_the_image_are_those_of_the_whole_loss"),
    ("codes' losses not divided by the parts", "torch.full_like(other, scale)", "torch.full_like(other, 1.0)",
     "test_gradients_added_at_the_image_are_those_of_the_whole_loss"),
    ("the image's losses not divided by the parts", "[scale * at_y,", "[at_y,",
     "test_gradients_added_at_the_image_are_those_of_the_whole_loss"),
    ("the last layer compiled", "last.forward = torch.compiler.disable(last.forward)", "pass",
     "test_a_compiled_model_gets_the_same_gradients"),
    ("noise that never fades", "max(0.0, (0.9 - step / steps) / 0.4)", "1.0", "test_common.py::test_schedules"),
    ("noise to the end", "(0.9 - step / steps) / 0.4", "(1.0 - step / steps) / 0.4", "test_common.py::test_schedules"),
)

STAGE_1_FIGURES = of(
    "train_vae.py", "test_train_vae.py",
    ("ties are lost", "right=ties) for ties", "right=False) for ties", "test_auc_equals_counting_pairs"),
    ("SSIM of means", "(means * structure).mean", "(means).mean", "test_ssim_is_the_published_formula"),
    ("SSIM of [-1, 1]", "x, y = (x + 1) / 2, (y + 1) / 2", "x, y = x, y", "test_ssim_is_the_published_formula"),
    ("a flat window", "side // 2) / 1.5) ** 2)", "side // 2) / 15) ** 2)", "test_ssim_is_the_published_formula"),
    ("stage 1 evaluated in training mode", "    model.eval()\n    parts = []", "    parts = []",
     "test_evaluation_of_a_dq_vae"),
    ("stage 1 trained in evaluation mode", "    model.train()\n    y, codes", "    y, codes",
     "test_evaluation_of_a_dq_vae"),
    ("PSNR of another range", "torch.log10(4 / error", "torch.log10(1 / error", "test_evaluation_of_a_dq_vae"),
    ("PSNR of the mean error", "error.square().mean(dim=(1, 2, 3)))).mean()", "error.square().mean())).mean()",
     "test_evaluation_of_a_dq_vae"),
    ("PSNR of what no screen shows", "out.reconstruction.float().clamp(-1, 1)", "out.reconstruction.float()",
     "test_evaluation_of_a_dq_vae"),
    ("grains cost nothing", "+ grains[0].numel() * math.log2(K)", "", "test_evaluation_of_a_dq_vae"),
    ("bits of three channels", "bits_per_pixel=bits / config.size ** 2,", "bits_per_pixel=bits / config.size ** 2 / 3,",
     "test_evaluation_of_a_dq_vae"),
    ("perplexity of cells", "codes.flatten().bincount(weight.flatten(), config",
     "codes.flatten().bincount(None, config", "test_evaluation_of_a_dq_vae"),
    ("LPIPS is not evaluated", 'figures["lpips"] = lpips[0].mean().item()', "pass",
     "test_wiring.py::test_what_is_logged_is_what_was_trained"),
    ("AUC of another score", "auc=auc(score, detailed)", "auc=auc(-score, detailed)", "test_evaluation_of_a_dq_vae"),
    ("original and reconstruction exchanged", "(to_picture(x), to_picture(y), draw_grains(x",
     "(to_picture(y), to_picture(x), draw_grains(x", "test_the_picture_shows_originals_first"),
)

STAGE_1_CODES = of(
    "train_vae.py", "test_train_vae.py",
    ("no mirror images", "((x, x.flip(3)) if mirrored", "((x, x) if mirrored",
     "test_encoding_keeps_every_image_and_its_mirror_image"),
    ("mirrored upside down", "x.flip(3)", "x.flip(2)", "test_encoding_keeps_every_image_and_its_mirror_image"),
    ("broken images encoded", 'sound = rows["label"] != BROKEN', 'sound = rows["label"] != -99',
     "test_broken_images_have_no_codes"),
    ("integers one too small", "high <= torch.iinfo(kind).max", "high <= torch.iinfo(kind).max + 1",
     "test_the_smallest_integers"),
    ("codes in training mode", "    vae.eval()\n    seed_all(args.seed)", "    seed_all(args.seed)",
     "test_codes_hold_all_that_stage_2_needs"),
    ("held-out codes mirrored", "(train, not args.no_flip), (held_out, False)",
     "(train, not args.no_flip), (held_out, True)", "test_codes_hold_all_that_stage_2_needs"),
    ("any codes do", "all(torch.equal(x.cpu(), weights[name]) for name, x in ours.items())", "True",
     "test_codes_of_other_weights_are_told_apart"),
    ("the preset is not noted in codes.pt", "preset=preset, classes=train.classes",
     'preset="toy64", classes=train.classes', "test_codes_hold_all_that_stage_2_needs"),
)

STAGE_1_MAIN = of(
    "train_vae.py", "test_wiring.py",
    ("ratios of the preset for any factors", "if K == len(config.factors) else [1 / K] * K", "if True else [1 / K] * K",
     "test_factors_without_ratios_have_equal_shares"),
    ("the detail of whole regions", "config.factors[0]).to(device) > 0.1", "config.factors[0]).to(device) > 0.9",
     "test_train_vae.py::test_regions_with_a_tenth_of_detail_are_detailed"),
    ("thresholds of other quantiles", "np.cumsum(ratios)[:-1]", "np.cumsum(ratios[::-1])[:-1]",
     "test_routers.py::test_entropy_thresholds_and_random_routing_give_the_asked_ratios"),
    ("no augmentation in training", "config.size, augment=True,", "config.size, augment=False,",
     "test_images_are_dealt_by_the_seed"),
    ("--seed ignored by the data of stage 1", "augment=True, seed=args.seed", "augment=True, seed=0",
     "test_images_are_dealt_by_the_seed"),
    ("--seed ignored by the weights of stage 1", "    seed_all(args.seed)\n    # GPUs", "    seed_all(0)\n    # GPUs",
     "test_the_seed_fixes_the_weights"),
    ("thresholds never measured", 'if config.router == "entropy":', "if False:",
     "test_train_vae.py::test_the_toy_data_needs_no_folder"),
    ("betas of the preset ignored", "lr=schedule.lr, betas=schedule.betas,", "lr=schedule.lr,",
     "test_the_optimisers_of_stage_1"),
    ("the router is not trained", "adam(model.parameters())",
     "adam([*model.encoder.parameters(), *model.decoder.parameters()])", "test_the_optimisers_of_stage_1"),
    ("one optimiser for the critic's last layer", "adam(critic.parameters())", "adam(critic.blocks[-1].parameters())",
     "test_the_optimisers_of_stage_1"),
    ("the critic is trained from the start", "step >= schedule.gan_start", "step >= 0", "test_the_adversarial_loss"),
    ("the critic one step late", "step >= schedule.gan_start", "step > schedule.gan_start",
     "test_the_adversarial_loss"),
    ("gradients of former steps", "optimizer.zero_grad(set_to_none=True)", "pass",
     "test_each_step_has_gradients_of_its_own"),
    ("the learning rate of stage 1 stays", 'group["lr"] = schedule.learning_rate(step)', "pass",
     "test_the_optimisers_of_stage_1"),
    ("Gumbel noise that never fades", "forward(x, gumbel_scale(step, schedule.steps))", "forward(x)",
     "test_the_noise_of_the_gate_fades"),
    ("LPIPS turned round", "perceptual(x, y).mean()", "perceptual(y, x).mean()", "test_the_loss_of_the_image"),
    ("the adversarial sign flipped", "gan = -critic(y).mean()", "gan = critic(y).mean()", "test_the_adversarial_loss"),
    ("the absolute error dropped", "of_y = l1 + schedule.l2_weight * l2", "of_y = schedule.l2_weight * l2",
     "test_the_loss_of_the_image"),
    ("the L2 term dropped", "of_y = l1 + schedule.l2_weight * l2", "of_y = l1", "test_the_loss_of_the_image"),
    ("the L2 weight ignored", "of_y = l1 + schedule.l2_weight * l2", "of_y = l1 + l2", "test_the_loss_of_the_image"),
    ("the commitment loss dropped", "of_codes = out.commitment + schedule", "of_codes = schedule",
     "test_the_loss_of_the_codes"),
    ("the budget dropped", "of_codes = out.commitment + schedule.budget_weight * budget", "of_codes = out.commitment",
     "test_the_loss_of_the_codes"),
    ("the budget weight ignored", "schedule.budget_weight * budget", "budget", "test_the_loss_of_the_codes"),
    ("the ratios ignored", "dq.budget_loss(out.gate, config.ratios)", "dq.budget_loss(out.gate, (0.5, 0.5))",
     "test_the_loss_of_the_codes"),
    ("LPIPS dropped", "of_y = of_y + schedule.perceptual_weight * lpips", "pass", "test_the_loss_of_the_image"),
    ("the weight of LPIPS ignored", "schedule.perceptual_weight * lpips", "lpips", "test_the_loss_of_the_image"),
    ("the adversarial weight ignored", "gan, of_codes, schedule.gan_weight, scale)", "gan, of_codes, 1.0, scale)",
     "test_the_adversarial_loss"),
    ("the adversarial loss dropped", "of_y, gan, of_codes,", "of_y, None, of_codes,", "test_the_adversarial_loss"),
    ("parts summed up", "gan, of_codes, schedule.gan_weight, scale)", "gan, of_codes, schedule.gan_weight)",
     "test_parts_are_averaged"),
    ("parts of the critic summed up", "(scale * critic_loss).backward()", "critic_loss.backward()",
     "test_parts_are_averaged"),
    ("real and fake exchanged", "hinge_loss(judge(x), judge(y.detach()))", "hinge_loss(judge(y.detach()), judge(x))",
     "test_the_lesson_of_the_critic"),
    ("the critic teaches the decoder", "judge(y.detach())", "judge(y)", "test_the_lesson_of_the_critic"),
    ("the critic is not trained", "optimizer.step()   ", 'optimizers["optimizer"].step()   ',
     "test_the_optimisers_of_stage_1"),
    ("the same noise in every step", "seed_all(args.seed, step)", "seed_all(args.seed)", "test_each_step_draws_anew"),
    ("the clip of stage 1 ignored", "if schedule.clip:", "if False:", "test_the_clip_of_stage_1"),
    ("clipped though 0 is no limit", "if schedule.clip:", "if True:", "test_no_clip"),
    ("--no-flip ignored in training", "flip=not args.no_flip, held", "held", "test_every_flag_arrives"),
    ("--no-flip ignored by the codes", "(train, not args.no_flip)", "(train, True)", "test_no_flip"),
    ("--held-out ignored in training", "flip=not args.no_flip, held_out=args.held_out)", "flip=not args.no_flip)",
     "test_every_flag_arrives"),
    ("parts of other images", "args.workers, schedule.accumulate)", "args.workers)", "test_every_flag_arrives"),
    ("every process draws", "if evaluates and dq.processes()[0] == 0:", "if evaluates:",
     "test_no_process_but_the_first_writes"),
    ("half of the batch", "for x in batch.chunk(schedule.accumulate):",
     "for x in batch.chunk(schedule.accumulate)[:1]:", "test_images_are_dealt_by_the_seed"),
    ("noise that depends on what was done before", "seed_all(args.seed, step)   ", "pass   ",
     "test_each_step_draws_anew"),
    ("codes of random crops", "train.augment = False", "pass",
     "test_train_vae.py::test_codes_hold_all_that_stage_2_needs"),
    ("the best by the absolute error alone", 'figures["loss"] = (figures["l1"] + schedule.l2_weight * figures["l2"]',
     'figures["loss"] = (figures["l1"]', "test_what_is_logged_is_what_was_trained"),
    ("the best without LPIPS", '+ schedule.perceptual_weight * figures.get("lpips", 0.0))', ")",
     "test_what_is_logged_is_what_was_trained"),
    ("the model stays in evaluation mode", "    model.train()\n    with Stop", "    model.eval()\n    with Stop",
     "test_stage_1_trains_in_training_mode"),
)

# ------------------------------------------------------------------------------------------------
# train_transformer.py


STAGE_2_DATA = of(
    "train_transformer.py", "test_train_transformer.py",
    ("labels of the wrong views", 'part["label"].repeat_interleave(', 'part["label"].repeat(',
     "test_train_vae.py::test_encoding_keeps_every_image_and_its_mirror_image"),
    ("lengths without the EOS ids", "grains.split(65_536)]) + len(factors)", "grains.split(65_536)])",
     "test_train_vae.py::test_encoding_keeps_every_image_and_its_mirror_image"),
    ("--uncond ignored by the labels", "dtype=torch.int8) if uncond else label",
     "dtype=torch.int8) if False else label", "test_uncond_hides_the_labels"),
    ("batches unsorted", 'index[np.argsort(length[index], kind="stable")]', "index", "test_batches_of_stage_2"),
    ("sequences cut", "columns = -(-int(", "columns = (int(",
     "test_train_vae.py::test_encoding_keeps_every_image_and_its_mirror_image"),
    ("sequences of full length", "return pos[:, :columns], code[:, :columns], label", "return pos, code, label",
     "test_evaluation_is_no_wider_than_needed"),
    ("stage 2 evaluated in training mode", "    model.eval()\n    rank, world", "    rank, world",
     "test_evaluation_of_a_transformer"),
    ("stage 2 trained in evaluation mode", "    model.train()\n    position, content", "    position, content",
     "test_evaluation_of_a_transformer"),
    ("evaluated without labels", "nll = model(pos, code, label)", "nll = model(pos, code)",
     "test_evaluation_of_a_transformer"),
    ("the means of batches summed up", 'nll["position"].sum(), nll["content"].sum()',
     'nll["position"].mean(), nll["content"].mean()', "test_evaluation_of_a_transformer"),
    ("bits are nats", "bits = (position + content) / math.log(2)", "bits = (position + content)",
     "test_evaluation_of_a_transformer"),
    ("EOS ids are codes", "codes = (held_out.length - len(model.config.factors)).float()",
     "codes = (held_out.length).float()", "test_evaluation_of_a_transformer"),
    ("samples in training mode", "    model.eval()\n    label = torch.arange(n", "    label = torch.arange(n",
     "test_samples_of_a_run"),
    ("training in evaluation mode behind samples", "    model.train()\n    pairs =", "    pairs =",
     "test_samples_of_a_run"),
    ("samples of one class", "% max(1, len(model.config.classes))\n    codes", "% 1\n    codes",
     "test_samples_of_a_run"),
    ("samples without the seed", "dq.generate(model, label, seed=seed)", "dq.generate(model, label)",
     "test_samples_of_a_run"),
    ("processes evaluate all", "split(batch_size)[rank::world]", "split(batch_size)",
     "test_processes_share_an_evaluation"),
)

STAGE_2_MAIN = of(
    "train_transformer.py", "test_wiring.py",
    ("the preset of the codes ignored", 'preset if preset in PRESETS else "toy"', '"toy"',
     "test_train_transformer.py::test_the_preset_comes_with_the_codes"),
    ("codes of any version", 'dq.require(stored.get("version") == 1', "dq.require(True",
     "test_train_transformer.py::test_codes_that_are_none_end_in_a_line_that_helps"),
    ("Muon for nothing", 'if p.dim() == 2] if schedule.optimizer == "muon" else []',
     "if p.dim() == 2] if False else []", "test_train_transformer.py::test_which_weights_decay"),
    ("--optimizer ignored", 'if schedule.optimizer == "muon" else []', "if True else []",
     "test_train_transformer.py::test_which_weights_decay"),
    ("Muon for embeddings", "stacks = [*model.position_stack.parameters(), *model.content_stack.parameters()]",
     "stacks = [*model.parameters()]", "test_train_transformer.py::test_which_weights_decay"),
    ("weights in both optimisers", "if p not in {*inside}]", "]",
     "test_train_transformer.py::test_which_weights_decay"),
    ("no weight decay", "if p.dim() > 1], weight_decay=schedule.weight_decay)", "if p.dim() > 1], weight_decay=0.0)",
     "test_train_transformer.py::test_which_weights_decay"),
    ("weight decay on vectors", "if p.dim() <= 1], weight_decay=0.0)",
     "if p.dim() <= 1], weight_decay=schedule.weight_decay)", "test_train_transformer.py::test_which_weights_decay"),
    ("no weight decay by Muon", "lr=schedule.lr, weight_decay=schedule.weight_decay,",
     "lr=schedule.lr, weight_decay=0.0,", "test_train_transformer.py::test_which_weights_decay"),
    ("betas of AdamW ignored", "AdamW(groups, lr=schedule.lr, betas=schedule.betas", "AdamW(groups, lr=schedule.lr",
     "test_train_transformer.py::test_which_weights_decay"),
    ("Muon's steps unscaled", 'adjust_lr_fn="match_rms_adamw"', 'adjust_lr_fn="original"',
     "test_train_transformer.py::test_which_weights_decay"),
    ("flags of the model ignored", "override(config, args, size=", "replace(config, size=", "test_every_flag_arrives"),
    ("--uncond ignored by the model", "classes=() if args.uncond else classes)", "classes=classes)",
     "test_every_flag_arrives"),
    ("--seed ignored by the weights of stage 2", "seed_all(args.seed)\n    model", "seed_all(0)\n    model",
     "test_the_seed_fixes_the_weights"),
    ("--seed ignored by the order of stage 2", "schedule.batch_size, args.seed, record.step)",
     "schedule.batch_size, 0, record.step)", "test_codes_are_dealt_by_the_seed"),
    ("trained on what is held out", 'for part in ("train", "held_out"))', 'for part in ("held_out", "held_out"))',
     "test_codes_are_dealt_by_the_seed"),
    ("held out is what was trained on", 'for part in ("train", "held_out"))', 'for part in ("train", "train"))',
     "test_what_stage_2_evaluates"),
    ("trained without labels", "nll = forward(pos, code, label)", "nll = forward(pos, code)",
     "test_codes_are_dealt_by_the_seed"),
    ("the position loss not trained", "loss = (position + content) / codes_per_image",
     "loss = content / codes_per_image", "test_the_gradient_of_stage_2"),
    ("the content loss not trained", "loss = (position + content) / codes_per_image",
     "loss = position / codes_per_image", "test_the_gradient_of_stage_2"),
    ("nats per image", "loss = (position + content) / codes_per_image", "loss = (position + content)",
     "test_what_stage_2_logs"),
    ("nats per pair", "codes_per_image = (train.length - len(factors))", "codes_per_image = (train.length)",
     "test_what_stage_2_logs"),
    ("the sum over the batch", "nll[name].sum() * world / schedule.batch_size", "nll[name].sum() * world",
     "test_what_stage_2_logs"),
    ("the mean over each part", "nll[name].sum() * world / schedule.batch_size", "nll[name].mean()",
     "test_what_stage_2_logs"),
    ("gradients of former steps in stage 2", "optimizer.zero_grad(set_to_none=True)", "pass",
     "test_the_gradient_of_stage_2"),
    ("every process draws samples", "if rank == 0:", "if True:", "test_no_process_but_the_first_writes"),
    ("half of the batch in stage 2", "[rank::world].chunk(schedule.accumulate):",
     "[rank::world].chunk(schedule.accumulate)[:1]:", "test_the_gradient_of_stage_2"),
    ("the learning rate of stage 2 stays", 'group["lr"] = schedule.learning_rate(step)', "pass",
     "test_the_steps_of_stage_2"),
    ("the clip of stage 2 ignored", "if schedule.clip:", "if False:", "test_the_gradient_of_stage_2"),
    ("one of two optimisers steps", "optimizer.step()", 'optimizers["optimizer"].step()', "test_the_steps_of_stage_2"),
    ("logged nats as bits", "bits_per_code=loss / math.log(2)", "bits_per_code=loss", "test_what_stage_2_logs"),
    ("stage 2 stays in evaluation mode", "    model.train()\n    with Stop", "    model.eval()\n    with Stop",
     "test_the_steps_of_stage_2"),
    ("dropout that depends on what was done before", "seed_all(args.seed, step, rank)", "pass",
     "test_each_step_draws_anew"),
    ("all processes drop the same units", "seed_all(args.seed, step, rank)", "seed_all(args.seed, step)",
     "test_each_step_draws_anew"),
    ("the best by position alone", 'figures["nats_per_image"])', 'figures["position_nats"])',
     "survival/test_resume.py::test_the_best_checkpoint_is_that_of_the_lowest_held_out_loss"),
)

# ------------------------------------------------------------------------------------------------
# sample.py


SAMPLE = of(
    "sample.py", "test_wiring.py",
    ("--keep without --input", "dq.require(args.input or args.keep is None", "dq.require(True",
     "test_common.py::test_wrong_input_ends_in_one_line"),
    ("--input with --grain-map", "dq.require(not (args.input and args.grain_map)", "dq.require(True",
     "test_sample.py::test_what_could_not_be_written_is_refused_in_one_line"),
    ("--out ignored", "out = args.out or args.checkpoint.parent", "out = args.checkpoint.parent",
     "test_a_grid_of_samples"),
    ("--gif and --out the same", "dq.require(args.gif != out", "dq.require(True",
     "test_sample.py::test_what_could_not_be_written_is_refused_in_one_line"),
    ("larger jobs mixed", "dq.require(last < args.n", "dq.require(last <= args.n", "test_images_of_a_larger_job"),
    ("classes by another number", "return classes.index(label)", "return classes.index(label) - 1",
     "test_what_sampling_asks_for"),
    ("numbers of classes out of range", "int(label) < len(classes)", "int(label) <= len(classes)",
     "test_common.py::test_wrong_input_ends_in_one_line"),
    ("dark for fine", "layout.n_grains // 256", "layout.n_grains // 256 * -1 + layout.n_grains - 1",
     "test_sample.py::test_a_grain_map_is_read_bright_for_fine"),
    ("the grain map transposed", "np.asarray(grey).astype(np.int64)", "np.asarray(grey).T.astype(np.int64)",
     "test_sample.py::test_a_grain_map_is_read_bright_for_fine"),
    ("--grain-map fixes contents", "return pos, torch.full_like(pos, -1)", "return pos, torch.full_like(pos, 0)",
     "test_what_a_grain_map_fixes"),
    ("--keep one granularity too many", "kept = layout.grain[pos] < keep", "kept = layout.grain[pos] <= keep",
     "test_what_a_photo_fixes"),
    ("--keep ignored", "keep = 1 if args.keep is None else args.keep", "keep = 1", "test_what_a_photo_fixes"),
    ("--keep is 2 by itself", "keep = 1 if args.keep is None", "keep = 2 if args.keep is None",
     "test_what_a_photo_fixes"),
    ("--keep of more than there are", "dq.require(0 <= keep <= layout.n_grains", "dq.require(0 <= keep",
     "test_what_a_photo_fixes"),
    ("the gif shows all from the start", "torch.where(order < t, pos, layout.end)",
     "torch.where(order < length, pos, layout.end)", "test_a_gif_grows"),
    ("the gif paints what is not there", "[to_picture(x, 256) for x in images * there]",
     "[to_picture(x, 256) for x in images]", "test_a_gif_grows"),
    ("the gif without its last code", "length = int(layout.lengths(pos)) - 1", "length = int(layout.lengths(pos)) - 2",
     "test_a_gif_grows"),
    ("--temperature ignored", "dq.SampleOptions(args.temperature,", "dq.SampleOptions(1.0,",
     "test_what_sampling_asks_for"),
    ("--top-k ignored", "args.temperature, args.top_k,", "args.temperature, 0,", "test_what_sampling_asks_for"),
    ("--top-p ignored", "args.top_k, args.top_p, args.cfg)", "args.top_k, 1.0, args.cfg)",
     "test_what_sampling_asks_for"),
    ("--cfg ignored", "args.top_k, args.top_p, args.cfg)", "args.top_k, args.top_p)", "test_what_sampling_asks_for"),
    ("options looked at too late", "    options.check()\n", "",
     "test_sample.py::test_what_could_not_be_written_is_refused_in_one_line"),
    ("--label ignored", "label.fill_(label_number(args.label, classes))", "pass", "test_what_sampling_asks_for"),
    ("labels of one class alone", "label = torch.arange(args.n) % max(1, len(classes))",
     "label = torch.arange(args.n) % 1", "test_what_sampling_asks_for"),
    ("--seed ignored", "dq.generate(model, y, options, args.seed,", "dq.generate(model, y, options, 0,",
     "test_what_sampling_asks_for"),
    ("sampling starts at image 0 in every call", "slots=args.batch_size, first=first,", "slots=args.batch_size,",
     "test_calls_draw_together_what_one_would"),
    ("labels of the first call", "y = label[first:first + ROUND", "y = label[0:0 + ROUND",
     "test_calls_draw_together_what_one_would"),
    ("--batch-size ignored", "slots=args.batch_size", "slots=64", "test_what_sampling_asks_for"),
    ("--dtype ignored by the step", "model.to(torch.bfloat16 if bf16", "model.to(torch.float32 if bf16",
     "test_what_sampling_asks_for"),
    ("--compile ignored", "compile=args.compile)", "compile=False)", "test_what_sampling_asks_for"),
    ("what is given ignored", "args.seed, open_pairs, slots", "args.seed, None, slots", "test_what_a_photo_fixes"),
    ("images numbered from 0 in every call", "for i, (x, g) in enumerate(zip(images, grains), first):",
     "for i, (x, g) in enumerate(zip(images, grains)):", "test_calls_draw_together_what_one_would"),
    ("images enlarged", "to_picture(x, 0))", "to_picture(x))", "test_calls_draw_together_what_one_would"),
    ("captions of other classes", "caption(int(label[i]), classes)", "caption(int(label[i - first - 1]), classes)",
     "test_a_grid_of_samples"),
    ("captions count pairs", "(code[i - first] >= 0).sum()", "(code[i - first] >= -1).sum()", "test_a_grid_of_samples"),
    ("a grid without end", "if i < 32:", "if True:", "test_a_grid_of_samples"),
    ("a gif of every call", "if args.gif and first == 0:", "if args.gif:", "test_a_gif_grows"),
    ("no mark beside the images", "if args.save_dir:                                                        # by",
     "if False:  # by", "test_calls_draw_together_what_one_would"),
)

MUTANTS = [*CONFIGURATION, *ROUTING, *CODEBOOK, *NETWORKS, *SEQUENCES, *TRANSFORMER, *SAMPLING, *FILES, *PICTURES,
           *PROGRAM, *TRAINING_RUN, *STAGE_1_DATA, *STAGE_1_LOSSES, *STAGE_1_FIGURES, *STAGE_1_CODES, *STAGE_1_MAIN,
           *STAGE_2_DATA, *STAGE_2_MAIN, *SAMPLE]


# ------------------------------------------------------------------------------------------------
# The tool


class Watch:
    """A plugin for pytest: was it a test that failed, or could something not be read at all?"""
    unreadable = False

    def pytest_collectreport(self, report):
        self.unreadable |= report.failed


def copy_project(root, folder):
    """Sources and tests, and what is already compiled of them."""
    folder.mkdir()
    for path in root.iterdir():
        if path.suffix in (".py", ".toml", ".md"):
            shutil.copy2(path, folder)
        elif path.name in ("tests", "__pycache__"):
            shutil.copytree(path, folder / path.name)


def fault(mutant, root):
    """Why this mutant can't be made, in one line, or None."""
    n = (root / mutant.file).read_text(encoding="utf-8").count(mutant.old)
    return None if n == 1 else f"{mutant.old!r} stands {n} times in {mutant.file}"


def make(mutant, folder):
    path = folder / mutant.file
    path.write_text(path.read_text(encoding="utf-8").replace(mutant.old, mutant.new), encoding="utf-8")
    for compiled in (folder / "__pycache__").glob(f"{path.stem}.*"):
        compiled.unlink()


def run_tests(folder, tests):
    """-> exit status of pytest, but 3 where a file of tests can't be read: that is no test that fails"""
    os.chdir(folder)
    sys.path[:] = [path for path in sys.path if not path.startswith(str(ROOT))]
    watch, scratch = Watch(), folder.parent / f"{os.getpid()}.tmp"
    flags = ["-x", "-q", "-p", "no:cacheprovider", "--rootdir", ".", "--basetemp", str(scratch)]
    status = pytest.main([*flags, *(f"tests/{test}" for test in tests)], plugins=[watch])
    shutil.rmtree(scratch, ignore_errors=True)
    return 3 if watch.unreadable else int(status)


def start(work, said):
    """work() -> exit status, in a process of its own that has everything imported that this one has, which takes longer
    than most tests. said: file for what it prints -> number of the process"""
    child = os.fork()
    if child:
        return child
    status = 3
    try:
        signal.alarm(LIMIT)
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(1, 2)
        sys.stdout = sys.stderr = open(1, "w", closefd=False)
        gc.freeze()                                                          # pytest looks there for garbage, twice
        status = work()
        sys.stdout.flush()
    finally:
        os._exit(status)


def in_parallel(place, works, jobs):
    """works: {name: work} -> name, exit status, seconds and the end of what it said, of each when it is done"""
    waiting, running = list(works.items()), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name, work = waiting.pop(0)
            said = place / f"{len(waiting)}.txt"
            running[start(work, said)] = name, said, time.time()
        child, status = os.wait()
        name, said, since = running.pop(child)
        yield name, os.waitstatus_to_exitcode(status), time.time() - since, said.read_text(errors="replace")[-3000:]
        said.unlink()


def try_all(mutants, root, jobs):
    """-> how many of the mutants are not killed"""
    left = 0
    for mutant in mutants:
        if reason := fault(mutant, root):
            print(f"NOT MADE           {mutant.name}: {reason}", flush=True)
            left += 1
    mutants = {mutant.name: mutant for mutant in mutants if not fault(mutant, root)}
    files = sorted({mutant.test.split("::")[0] for mutant in mutants.values()})
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        whole = place / "whole"
        copy_project(root, whole)

        def without_a_slip(file):
            tests = {mutant.test for mutant in mutants.values() if mutant.test.split("::")[0] == file}
            return lambda: run_tests(whole, sorted(tests - {file}) if file not in tests else [file])

        def with_a_slip(mutant):
            def work():
                folder = place / str(os.getpid())
                copy_project(whole, folder)
                make(mutant, folder)
                status = run_tests(folder, [mutant.test])
                shutil.rmtree(folder)
                return status
            return work

        for file, status, seconds, said in in_parallel(place, {file: without_a_slip(file) for file in files}, jobs):
            print(f"{'passes' if status == 0 else 'FAILS':9} {seconds:5.1f} s  {file}, without a slip", flush=True)
            if status:
                print(said)
                return len(mutants) + left
        works = {name: with_a_slip(mutant) for name, mutant in mutants.items()}
        for name, status, seconds, said in in_parallel(place, works, jobs):
            verdict = {0: "SURVIVED", 1: "killed"}.get(status, "NO TEST")    # one that hangs or can't be read
            print(f"{verdict:9} {seconds:5.1f} s  {name}", flush=True)
            left += status != 1
            if status not in (0, 1):
                print(said)
    return left


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", nargs="+", help="some of them, by name")
    parser.add_argument("--jobs", metavar="N", type=int, default=os.cpu_count(), help="how many at a time")
    parser.add_argument("--list", action="store_true", help="print the table and leave")
    args = parser.parse_args(argv)
    unknown = set(args.only or ()) - {mutant.name for mutant in MUTANTS}
    if unknown:
        parser.error(f"no mutant is called {', '.join(sorted(unknown))}")
    mutants = [mutant for mutant in MUTANTS if not args.only or mutant.name in args.only]
    if args.list:
        for mutant in mutants:
            print(f"{mutant.name}\n    {mutant.file}: {mutant.old!r} becomes {mutant.new!r}\n    {mutant.test}")
        return 0
    left = try_all(mutants, ROOT, args.jobs)
    print(f"{len(mutants) - left} of {len(mutants)} killed")
    return 1 if left else 0


if __name__ == "__main__":
    import PIL.Image  # noqa: F401  (what every test imports)
    import torch._dynamo  # noqa: F401  (optimisers do, and it takes longest)
    import torch.distributed.nn  # noqa: F401
    sys.exit(main())
