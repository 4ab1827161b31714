"""Mutation testing: faults in the sources, each with the test that finds it.    python tests/tools/mutants.py

A test that passes does not show which faults it would find. Each row of the tables here is a fault that somebody could
make: a term of the loss that is missing, a flag that is ignored, a wrong sign. The tool makes each fault in a copy of
the project and runs the test of that row. The test must pass without the fault and fail with it. If you add a term, a
flag or a branch, add a mutant.

A mutant replaces one fragment of code, `old`, by another, `new`. Both are expressions or statements. The tool compares
syntax trees, so comments, line breaks, quotes, redundant parentheses, the order of keyword arguments and the file do
not matter. `old` must match exactly one place in all sources, or in the class or function that `where` names.
In `old`, `...` matches any expression. In a list (arguments, statements, elements of a tuple) it matches any number of
them. In `new`, it stands for what it matched.

    --only NAME ...    runs some of the mutants
    --fit              lists the mutants that match no place or several, because a line has changed; takes a second

The ordinary tests only count these and skip. They are an error for this tool, and for the tests if the environment
variable CI is true.

The whole table takes some minutes on two cores, so run it by hand. The exit status is 1 if a mutant survives or cannot
be made.
"""
import argparse
import ast
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
LIMIT = 300                              # seconds that a test may take; a fault can make it run for ever


class Mutant(NamedTuple):
    name: str
    old: str                             # code that occurs in the sources exactly once
    new: str                             # its replacement; empty: the statements are removed
    test: str                            # file, file::test or file::test[case] below tests/, which must fail
    where: str = ""                      # "Class", "function", "Class.method" or "file.function" that contains `old`


def of(tests, *rows):
    """Rows of one topic. tests: the file of their tests, except where a row names another file"""
    return [Mutant(name, old, new, test if ".py" in test else f"{tests}::{test}", *where)
            for name, old, new, test, *where in rows]


# ------------------------------------------------------------------------------------------------
# dq.py


CONFIGURATION = of(
    "test_vae.py",
    ("factors that are not powers of two", "f & (f - 1) == 0", "True", "test_bad_configurations_are_refused"),
    ("factors that do not decrease", "a > b", "True", "test_bad_configurations_are_refused"),
    ("a size that the factors do not divide", "size % factors[0] == 0", "True", "test_bad_configurations_are_refused"),
    ("ratios that do not sum to 1", "abs(sum(self.ratios) - 1) < 1e-6", "True", "test_bad_configurations_are_refused"),
    ("negative ratios", "min(self.ratios) >= 0", "True", "test_bad_configurations_are_refused"),
    ("an unknown router", "self.router in ROUTERS", "True", "test_bad_configurations_are_refused"),
    ("an empty codebook", "min(...) >= 1", "min(...) >= 0", "test_bad_configurations_are_refused", "VAEConfig"),
    ("channels that group norms do not divide", "self.channels % 32 == self.width % 32 == 0", "self.width % 32 == 0",
     "test_bad_configurations_are_refused"),
    ("multipliers repeat from the first", "min(level, len(self.multipliers) - 1)", "level % len(self.multipliers)",
     "test_the_last_multiplier_repeats"),
    ("a width that the heads do not divide", "unit > 0 and self.width % unit == 0", "unit > 0",
     "test_transformer.py::test_bad_configurations_are_refused"),
    ("RoPE with any head size", "4 if self.rotary else 1", "1",
     "test_transformer.py::test_bad_configurations_are_refused"),
    ("each rank samples the first slice", "fill(...).chunk(world)[rank]", "(...).chunk(world)[0]",
     "test_routers.py::test_processes_draw_together_what_one_would"),
)

ROUTING = of(
    "test_routers.py",
    ("group norms with another eps", "nn.GroupNorm(..., eps=1e-6)", "nn.GroupNorm(...)",
     "test_vae.py::test_group_norm_equals_a_loop"),
    ("group norms with other groups", "nn.GroupNorm(32, ...)", "nn.GroupNorm(16, ...)",
     "test_vae.py::test_group_norm_equals_a_loop"),
    ("regions by their maximum", "F.adaptive_avg_pool2d", "F.adaptive_max_pool2d",
     "tools/test_import_authors.py::test_the_parts_land_where_they_belong"),
    ("a router without its activation", "nn.Sequential(nn.Linear(width, width), nn.SiLU(), ...)",
     "nn.Sequential(nn.Linear(width, width), ...)", "tools/test_import_authors.py"),
    ("a score without granularities", "k * p[:, k]", "p[:, k]", "test_the_score_is_the_mean_granularity", "score"),
    ("the gate does not sample", "logits - noise * exponential.log()", "logits",
     "test_gumbel_noise_draws_with_the_softmax_probabilities"),
    ("the scale of the gate noise is ignored", "noise * exponential.log()", "exponential.log()",
     "test_straight_through_gradient_of_the_gate"),
    ("the sign of the gate noise", "logits - noise * exponential.log()", "logits + noise * exponential.log()",
     "test_gumbel_noise_draws_with_the_softmax_probabilities"),
    ("a gate without a gradient", "hard + (soft - soft.detach())", "hard",
     "test_straight_through_gradient_of_the_gate", "GrainRouter"),
    ("a gate that is not one-hot", "hard + (soft - soft.detach())", "soft",
     "test_straight_through_gradient_of_the_gate", "GrainRouter"),
    ("a dial without a gradient", "one_hot(...) + (soft - soft.detach())", "one_hot(soft.argmax(dim=1), len(target))",
     "test_the_dial_gate_equals_a_loop_over_regions"),
    ("a dial without noise", "noise * torch.rand_like(scores).logit(eps=1e-6)", "0",
     "test_the_dial_gate_equals_a_loop_over_regions"),
    ("a dial whose score may grow", "3 * F.layer_norm(scores, scores.shape)", "3 * scores",
     "test_the_dial_gate_equals_a_loop_over_regions"),
    ("a dial with another soft gate", "F.pad((scores[:, None] - cuts).cumsum(1), ...)",
     "F.pad(scores[:, None] - cuts, (0, 0, 0, 0, 1, 0))", "test_the_dial_gate_equals_a_loop_over_regions"),
    ("one budget for all images", "0.4 * target + 0.6 * squares / squares.sum(...)", "target.expand(len(x), -1)",
     "test_the_dial_gate_equals_a_loop_over_regions"),
    ("budgets of the dial that ignore the target", "0.4 * target + 0.6 * squares / squares.sum(...)",
     "squares / squares.sum(1, keepdim=True)", "test_the_dial_gate_equals_a_loop_over_regions"),
    ("thresholds of the dial are not kept", "self.thresholds.lerp_(...)", "None",
     "test_the_dial_evaluates_at_its_own_budget"),
    ("the score of the dial has no odds", "logits[:, -1] - logits[:, 0]", "logits[:, -1]",
     "test_the_dial_score_is_the_log_odds_of_finest_and_coarsest"),
    ("quantiles of one rank", "parts[rank] = x", "parts[:] = x",
     "survival/test_processes.py::test_codebook_router_and_budget_are_those_of_the_global_batch"),
    ("thresholds of the dial by rank", "all_gather(self.score(x, maps))", "self.score(x, maps).repeat(world, 1, 1)",
     "survival/test_processes.py::test_codebook_router_and_budget_are_those_of_the_global_batch"),
    ("other ratios without other thresholds", "self.router.train(self.training).calibrate(...)", "None",
     "test_other_ratios_without_training"),
    ("other ratios are not kept", "replace(self.config, ratios=ratios)", "self.config",
     "test_other_ratios_without_training"),
    ("evaluation samples the gate", "not self.training", "False",
     "test_gumbel_noise_draws_with_the_softmax_probabilities", "GrainRouter"),
    ("evaluation takes the least likely granularity", "logits.argmax(dim=1)", "logits.argmin(dim=1)",
     "test_gumbel_noise_draws_with_the_softmax_probabilities"),
    ("ties are fine", "torch.bucketize(...)", "torch.bucketize(..., right=True)",
     "test_blank_regions_are_coarse"),
    ("random routing without cumulative ratios", "torch.tensor(ratios).cumsum(0)", "torch.tensor(ratios)",
     "test_entropy_thresholds_and_random_routing_give_the_asked_ratios"),
    ("random routing depends on the batch", "numpy_rng(seed).random(...)", "numpy_rng(0).random(...)",
     "test_random_routes_depend_on_the_image_alone"),
    ("random routing by torch's seed", "numpy_rng(seed).random(...)",
     "numpy_rng(torch.initial_seed(), seed).random(...)", "test_random_routes_depend_on_the_image_alone"),
    ("seeds without their upper half", "[seed >> 32 for seed in seeds]", "[]",
     "test_sampling.py::test_no_other_seed_has_the_same_draws"),
    ("red and blue are exchanged", "red, green, blue", "blue, green, red", "test_entropy_equals_a_loop_over_pixels"),
    ("wider bins of grey", "(pixels - c) / 0.01", "(pixels - c) / 0.02",
     "test_entropy_equals_a_loop_over_pixels"),
    ("fewer bins of grey", "torch.linspace(-1, 1, 32, ...)", "torch.linspace(-1, 1, 31, ...)",
     "test_entropy_equals_a_loop_over_pixels"),
    ("the sign of the entropy", "-(p * (p + 1e-10).log()).sum(-1)", "(p * (p + 1e-10).log()).sum(-1)",
     "test_entropy_equals_a_loop_over_pixels"),
    ("a budget per image", "all_gather(gate).mean(dim=(0, 2, 3))", "gate.mean(dim=(2, 3)).square().mean(0).sqrt()",
     "test_budget_loss_lets_images_differ"),
    ("an absolute budget", "(... - ratio) ** 2", "(... - ratio).abs()",
     "test_budget_loss_equals_a_loop_and_pulls_on_all_regions_alike", "budget_loss"),
    ("a budget for the coarsest granularity only", "enumerate(ratios)", "[(0, ratios[0])]",
     "test_budget_loss_equals_a_loop_and_pulls_on_all_regions_alike"),
    ("logits of the router in bf16", "self.mlp(x).permute(0, 3, 1, 2).float()", "self.mlp(x).permute(0, 3, 1, 2)",
     "test_the_gate_is_computed_in_float32"),
    ("no threshold for a ratio of 0", "np.where(below < 1e-6, -1e9, ...)", "(...)",
     "test_none_and_all_are_none_and_all"),
    ("no threshold for a ratio of 1", "np.where(below > 1 - 1e-6, 1e9, cuts)", "cuts",
     "test_none_and_all_are_none_and_all"),
    ("a budget per rank", "all_gather(gate).mean(dim=(0, 2, 3))", "gate.mean(dim=(0, 2, 3))",
     "survival/test_processes.py::test_codebook_router_and_budget_are_those_of_the_global_batch", "budget_loss"),
    ("restarts at vectors of this rank", "all_gather(z), all_gather(weight).nan_to_num(1.0)",
     "z, weight.nan_to_num(1.0)",
     "survival/test_processes.py::test_codebook_router_and_budget_are_those_of_the_global_batch", "restart"),
    ("a sum over the ranks with the gradient of one", "AllReduceSum.apply(gradient)", "gradient",
     "survival/test_processes.py::test_codebook_router_and_budget_are_those_of_the_global_batch"),
    ("a gathered tensor without a gradient", "parts[rank] = x", "parts[rank] = x.detach()",
     "survival/test_processes.py::test_codebook_router_and_budget_are_those_of_the_global_batch"),
)

CODEBOOK = of(
    "test_codebook.py",
    ("no straight-through gradient", "z + (q - z).detach()", "q",
     "test_straight_through_has_the_value_of_q_and_the_gradient_of_z"),
    ("straight-through with the value of z", "z + (q - z).detach()", "z",
     "test_straight_through_has_the_value_of_q_and_the_gradient_of_z"),
    ("weights that are NaN raise", "all_gather(weight).nan_to_num(1.0)", "all_gather(weight)",
     "test_vae.py::test_an_image_that_is_not_finite_raises_nothing"),
    ("distances with half the cross term", "2 * (z - centre)", "z - centre", "test_nearest_code_equals_a_loop"),
    ("the nearest direction", "codes.square().sum(1) - 2 * (z - centre) @ codes.t()", "-2 * (z - centre) @ codes.t()",
     "test_nearest_code_equals_a_loop"),
    ("distances are not centred", "self.codes.mean(0)", "0 * self.codes.mean(0)",
     "test_the_nearest_code_is_found_far_from_the_origin"),
    ("the same vector for several dead codes", "dead.cumsum(0) - 1", "torch.arange(len(dead))",
     "test_no_vector_restarts_two_codes_while_there_are_enough"),
    ("distances in bf16", "torch.autocast(z.device.type, enabled=False)",
     "torch.autocast(z.device.type, torch.bfloat16)", "test_distances_are_in_float32"),
    ("no restart", "self.restart(flat.detach(), weight.flatten())", "pass",
     "test_the_codebook_learns_in_training_only"),
    ("the codebook is not updated", "self.update(flat.detach(), weight.flatten(), ids)", "pass",
     "test_ema_update_equals_a_loop_over_codes"),
    ("the codebook learns in evaluation", "if self.training: self.update(...)", "self.update(...)",
     "test_the_codebook_learns_in_training_only"),
    ("commitment without its weight", "self.commitment * (weight * distance).mean()", "(weight * distance).mean()",
     "test_commitment_counts_every_code_once_and_pulls_only_the_encoder"),
    ("commitment counts cells", "weight * distance", "distance",
     "test_commitment_counts_every_code_once_and_pulls_only_the_encoder"),
    ("commitment summed over channels", "(q - flat).square().mean", "(q - flat).square().sum",
     "test_commitment_counts_every_code_once_and_pulls_only_the_encoder"),
    ("commitment without a gradient", "(q - flat).square", "(q - flat.detach()).square",
     "test_commitment_pulls_vectors_to_their_codes"),
    ("EMA without warm-up", "self.age / (9 + self.age)", "self.age * 0 + 1",
     "test_ema_update_equals_a_loop_over_codes"),
    ("EMA without its decay", "(self.age / (9 + self.age)).clamp(max=self.decay)",
     "self.age / (9 + self.age)", "test_ema_update_equals_a_loop_over_codes"),
    ("uses count cells", "torch.zeros_like(self.uses).index_add_(0, ids, weight)",
     "torch.zeros_like(self.uses).index_add_(0, ids, torch.ones_like(weight))",
     "test_ema_update_equals_a_loop_over_codes"),
    ("sums count cells", "weight[:, None] * z", "z", "test_ema_update_equals_a_loop_over_codes"),
    ("old and new uses are exchanged", "self.uses.lerp_(..., 1 - decay)", "self.uses.lerp_(..., decay)",
     "test_ema_update_equals_a_loop_over_codes"),
    ("codes are sums", "self.sums / self.uses[:, None].clamp(min=1e-6)",
     "self.sums + 0 * self.uses[:, None].clamp(min=1e-6)", "test_ema_update_equals_a_loop_over_codes"),
    ("all codes restart", "self.dead_below * mean_uses", "mean_uses",
     "test_restart_revives_dead_codes_and_leaves_the_others"),
    ("hardly any code restarts", "0.1", "0.01", "test_restart_revives_dead_codes_and_leaves_the_others", "Codebook"),
    ("restarts without noise", "0.01 * fresh.std(0, correction=0)", "0.0 * fresh.std(0, correction=0)",
     "test_a_batch_of_few_different_vectors_gives_codes_that_differ"),
    ("restarts far from any vector", "0.01 * fresh.std(0, correction=0)", "1.0 * fresh.std(0, correction=0)",
     "test_restart_draws_by_weight"),
    ("restarts ignore the weights", "torch.multinomial(weight, ...)", "torch.multinomial(torch.ones_like(weight), ...)",
     "test_restart_draws_by_weight"),
    ("restarted codes stay unused", "torch.where(dead, mean_uses, self.uses)", "self.uses",
     "test_restart_revives_dead_codes_and_leaves_the_others"),
    ("restarted codes keep their sums", "torch.where(dead[:, None], fresh * mean_uses, self.sums)", "self.sums",
     "test_restart_revives_dead_codes_and_leaves_the_others"),
    ("the codebook restarts after its update",
     "if self.training: self.restart(...)\nids = self.assign(...)\nif self.training: self.update(...)",
     "ids = self.assign(...)\nif self.training: self.update(flat.detach(), weight.flatten(), ids)\n"
     "if self.training: self.restart(flat.detach(), weight.flatten())",
     "test_the_first_batch_is_quantized_by_codes_of_its_own"),
)

NETWORKS = of(
    "test_vae.py",
    ("no first SiLU", "F.silu(self.norm1(x))", "self.norm1(x)", "test_a_residual_block_is_its_formula"),
    ("no second SiLU", "F.silu(self.norm2(h))", "self.norm2(h)", "test_a_residual_block_is_its_formula"),
    ("a residual block without the residual", "self.shortcut(x) + h", "h", "test_a_residual_block_is_its_formula"),
    ("attention without the residual", "x + self.proj(y.transpose(1, 2).reshape(B, c, H, W).contiguous())",
     "self.proj(y.transpose(1, 2).reshape(B, c, H, W).contiguous())", "test_attention_over_a_map_is_its_formula"),
    ("attention's scale 1/d in stage 1", "F.scaled_dot_product_attention(q, k, v)",
     "F.scaled_dot_product_attention(q, k, v, scale=1 / c)", "test_attention_over_a_map_is_its_formula"),
    ("keys and values exchanged", "q, k, v", "q, v, k", "test_attention_over_a_map_is_its_formula", "AttnBlock"),
    ("attention at one level fewer", "2 ** level >= config.attention_from", "2 ** level > config.attention_from",
     "tools/test_import_authors.py::test_the_authors_weights_give_the_authors_numbers"),
    ("padding on the other side", "F.pad(h, (0, 1, 0, 1))", "F.pad(h, (1, 0, 1, 0))",
     "tools/test_import_authors.py::test_the_authors_weights_give_the_authors_numbers"),
    ("bilinear upsampling", "F.interpolate(...)", 'F.interpolate(..., mode="bilinear")',
     "tools/test_import_authors.py::test_the_authors_weights_give_the_authors_numbers", "Decoder.forward"),
    ("no activation before the image", "nn.SiLU()", "nn.Identity()",
     "tools/test_import_authors.py::test_the_authors_weights_give_the_authors_numbers", "Decoder"),
    ("the middle blocks are skipped", "self.mid(self.stem(self.position(z)))", "self.stem(self.position(z))",
     "tools/test_import_authors.py::test_the_authors_weights_give_the_authors_numbers"),
    ("cosines instead of sines of coordinates", "torch.sin", "torch.cos",
     "test_the_decoder_adds_the_position_of_each_cell",
     "PositionEmbedding"),
    ("x and y are exchanged", "torch.stack([x, y])", "torch.stack([y, x])",
     "test_the_decoder_adds_the_position_of_each_cell"),
    ("rows and columns are exchanged", "self.rows[:, None] + self.columns[None]",
     "self.rows[None] + self.columns[:, None]",
     "test_the_decoder_adds_the_position_of_each_cell"),
    ("a decoder without position embedding", "self.position(z)", "z",
     "test_the_decoder_adds_the_position_of_each_cell"),
    ("maps are mixed without the gate", "upsample(gate[:, k:k + 1], side) * upsample(m, side)", "upsample(m, side)",
     "test_mix_equals_a_loop"),
    ("cell weights by side, not by area", "(self.config.factors[-1] / f) ** 2", "self.config.factors[-1] / f",
     "test_cell_weight_equals_a_loop"),
    ("cell weights with a gradient", "gate.detach()", "gate", "test_cell_weight_equals_a_loop"),
    ("the codebook counts cells", "self.codebook(z, self.cell_weight(gate))",
     "self.codebook(z, torch.ones_like(self.cell_weight(gate)))",
     "tools/test_import_authors.py::test_the_authors_weights_give_the_authors_numbers"),
    ("the router gets no noise", "self.router(x, maps, noise)", "self.router(x, maps)",
     "test_wiring.py::test_the_gate_noise_is_annealed"),
    ("the model gets no noise", "self.quantize(x, noise)", "self.quantize(x)",
     "test_wiring.py::test_the_gate_noise_is_annealed"),
    ("the least likely granularity is encoded", "gate.argmax", "gate.argmin",
     "test_encode_and_decode_agree_with_forward", "encode"),
    ("decoded with exchanged axes", "self.codebook.codes[codes].permute(0, 3, 1, 2)",
     "self.codebook.codes[codes].permute(0, 3, 2, 1)", "test_encode_and_decode_agree_with_forward"),
)

SEQUENCES = of(
    "test_layout.py",
    ("no space for the EOS ids", "N * self.cells[-1] + K", "N * self.cells[-1]", "test_pack_equals_a_loop"),
    ("coordinates at corners", "torch.stack([row, column], dim=1) + 0.5", "torch.stack([row, column], dim=1) + 0.0",
     "test_places_are_the_centres_of_codes_on_the_finest_grid"),
    ("regions in column order", "row // c * self.side + column // c", "column // c * self.side + row // c",
     "test_pack_equals_a_loop"),
    ("a region opens at another cell", "column // c * c", "column", "test_packed_sequences_are_legal_at_each_step"),
    ("no EOS ids", "self.is_eos | ...", "(...)", "test_pack_equals_a_loop"),
    ("codes in another order than ids", "code.masked_fill(...).gather(1, order)", "code.masked_fill(...)",
     "test_pack_equals_a_loop"),
    ("contents of absent ids", "code.masked_fill(..., -1).gather", "code.gather", "test_pack_equals_a_loop"),
    ("EOS writes into a region", "return ...[:, :-1]", "return ...[:, 1:]", "test_unpack_is_the_inverse_of_pack"),
    ("a hole becomes code 0", "upsample(grains, self.fine_side).clamp(min=0)[:, None]",
     "upsample(grains, self.fine_side).clamp(min=0)[:, None] * 0", "test_unpack_is_the_inverse_of_pack"),
    ("lengths without the last EOS", "(pos != self.end).sum(1) + 1", "(pos != self.end).sum(1)",
     "test_pack_equals_a_loop"),
    ("ids may repeat", "(prev + 1).clamp", "prev.clamp", "test_every_legal_walk_is_a_complete_tiling"),
    ("granularities may be skipped", "(self.ids >= following) & (self.grain == self.grain[following])",
     "self.ids >= following", "test_packed_sequences_are_legal_at_each_step"),
    ("regions may be covered twice", "candidate & (region_grain >= self.grain)", "candidate",
     "test_every_legal_walk_is_a_complete_tiling"),
    ("regions may open in the middle", "... & self.opens", "(...)", "test_packed_sequences_are_legal_at_each_step"),
    ("regions may stay half written", "pending | opening & self.finest", "opening & self.finest",
     "test_packed_sequences_are_legal_at_each_step"),
    ("the finest may leave holes", "pending | opening & self.finest", "pending",
     "test_every_legal_walk_is_a_complete_tiling"),
)

TRANSFORMER = of(
    "test_transformer.py",
    ("a step without the residual of attention", "torch.addmm(x, y.flatten(1), ...)",
     "torch.addmm(0 * x, y.flatten(1), ...)",
     "test_a_block_decodes_step_by_step_what_it_computes_at_once"),
    ("a step without the residual of the MLP", "torch.addmm(x, F.gelu(...), ...)",
     "torch.addmm(0 * x, F.gelu(...), ...)",
     "test_a_block_decodes_step_by_step_what_it_computes_at_once"),
    ("attention's scale 1/d on CPUs", "q.shape[-1] ** -0.5", "q.shape[-1] ** -1.0",
     "test_logits_equal_a_loop_over_prefixes"),
    ("attention's scale 1 on CPUs", "q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5", "q @ k.transpose(-1, -2)",
     "test_logits_equal_a_loop_over_prefixes"),
    ("attention sees one step ahead", "torch.full(...).triu(1)", "torch.full(...).triu(2)",
     "test_logits_equal_a_loop_over_prefixes"),
    ("attention does not see its own step", "torch.full(...).triu(1)", "torch.full(...).triu(0)",
     "test_logits_equal_a_loop_over_prefixes"),
    ("no dropout in attention", "F.dropout(weights, dropout)", "weights",
     "test_dropout_acts_at_four_places_in_training"),
    ("dropout in attention in evaluation", "self.dropout if self.training else 0.0", "self.dropout",
     "test_dropout_acts_at_four_places_in_training"),
    ("no dropout after attention", "self.drop(self.proj(...))", "self.proj(...)",
     "test_dropout_acts_at_four_places_in_training"),
    ("no dropout after the MLP", "self.drop(self.down(...))", "self.down(...)",
     "test_dropout_acts_at_four_places_in_training"),
    ("no dropout of embeddings", "self.drop(x + self.order.weight[:L])", "x + self.order.weight[:L]",
     "test_dropout_acts_at_four_places_in_training"),
    ("RoPE with other frequencies", "frequency = 10.0 ** ...", "frequency = 100.0 ** ...",
     "test_rotation_is_a_product_of_complex_numbers"),
    ("RoPE in the other direction", "[-angle.sin(), angle.sin()]", "[angle.sin(), -angle.sin()]",
     "test_rotation_is_a_product_of_complex_numbers"),
    ("RoPE on values", "torch.full_like(keys, -1)", "keys", "test_logits_equal_a_loop_over_prefixes"),
    ("no QK-norm", "torch.cat([F.layer_norm(qk, qk.shape[-1:]).type_as(v), v], dim=-3)", "qkv",
     "test_logits_equal_a_loop_over_prefixes"),
    ("QK-norm although it is off", "if self.qk_norm: ...", "if True: ...", "test_logits_equal_a_loop_over_prefixes"),
    ("QK-norm on values", "qkv.split([2, 1], dim=-3)", "qkv.split([3, 0], dim=-3)",
     "test_logits_equal_a_loop_over_prefixes"),
    ("another activation in training", "self.down(F.gelu(...))", "self.down(F.silu(...))",
     "test_logits_equal_a_loop_over_prefixes"),
    ("another activation in sampling", "F.gelu(...)", "F.silu(...)",
     "test_sampling.py::test_the_step_draws_what_the_naive_loop_draws", "Block.step"),
    ("another eps in layer norms", "(nn.LayerNorm(C, bias=False), ...)", "(nn.LayerNorm(C, eps=0.01, bias=False), ...)",
     "test_logits_equal_a_loop_over_prefixes", "Block"),
    ("pairs without granularity", "content + self.position(pos) + self.granularity(self.layout.grain[pos])",
     "content + self.position(pos)", "test_a_pair_is_the_sum_of_three_rows"),
    ("contents without the target position", "h + self.position(pos)", "h", "test_logits_equal_a_loop_over_prefixes"),
    ("content queries at the previous position", "self.rope_of(pos, prev)", "self.rope_of(prev, prev)",
     "test_logits_equal_a_loop_over_prefixes"),
    ("no order embedding", "x + self.order.weight[:L]", "x", "test_logits_equal_a_loop_over_prefixes"),
    ("larger initial weights", "0.0 if zero else 0.02", "0.0 if zero else 0.2", "test_a_fresh_model_is_uniform"),
    ("residual branches are not zero-initialised", '("proj.weight", "down.weight", "head.weight")', '("head.weight",)',
     "test_a_fresh_model_is_uniform"),
    ("heads are not zero-initialised", '("proj.weight", "down.weight", "head.weight")',
     '("proj.weight", "down.weight")', "test_a_fresh_model_is_uniform"),
    ("labels are ignored in training", "self.condition(none_last(label, ...))", "self.condition(0 * label)",
     "test_logits_equal_a_loop_over_prefixes"),
    ("label dropout in evaluation", "self.training", "True", "test_logits_equal_a_loop_over_prefixes", "logits"),
    ("label dropout keeps what it should drop", "torch.rand(B, device=pos.device) < self.config.label_dropout",
     "torch.rand(B, device=pos.device) > self.config.label_dropout", "test_logits_equal_a_loop_over_prefixes"),
    ("invalid positions are not masked", "(...).masked_fill(~legal, ...)", "(...)",
     "test_logits_equal_a_loop_over_prefixes"),
    ("the content loss is missing", "content.flatten(0, 1)", "0 * content.flatten(0, 1)",
     "test_train_transformer.py::test_evaluation_of_a_transformer"),
    ("a mean over pairs, not a sum", "each.view(pos.shape).sum", "each.view(pos.shape).mean",
     "test_train_transformer.py::test_evaluation_of_a_transformer"),
    ("RoPE without its cast", "rope.type_as(x)", "rope", "test_attention_is_computed_in_the_dtype_of_autocast"),
    ("normalised queries without their cast", "F.layer_norm(...).type_as(v)", "F.layer_norm(...)",
     "test_attention_is_computed_in_the_dtype_of_autocast"),
    ("logits of positions in bf16", "self.position_head(...).float()", "self.position_head(...)",
     "test_attention_is_computed_in_the_dtype_of_autocast"),
    ("logits of contents in bf16", "self.content_head(...).float()", "self.content_head(...)",
     "test_attention_is_computed_in_the_dtype_of_autocast"),
)

SAMPLING = of(
    "test_sampling.py",
    ("temperature 0", "1e-6 <= self.temperature <= 1e6", "0 <= self.temperature <= 1e6",
     "test_options_out_of_range_are_refused"),
    ("top-p 0", "0 < self.top_p <= 1", "0 <= self.top_p <= 1", "test_options_out_of_range_are_refused"),
    ("top-p above 1", "0 < self.top_p <= 1", "0 < self.top_p", "test_options_out_of_range_are_refused"),
    ("top-k below 0", "self.top_k >= 0", "True", "test_options_out_of_range_are_refused"),
    ("cfg below 0", "0 <= self.cfg <= 1e6", "-math.inf < self.cfg <= 1e6", "test_options_out_of_range_are_refused"),
    ("top-k keeps one more", "logits.topk(top_k)", "logits.topk(top_k + 1)", "test_top_k_and_top_p_equal_a_loop"),
    ("top-k 1 keeps all", "0 < top_k < logits.shape[-1]", "1 < top_k < logits.shape[-1]",
     "test_top_k_and_top_p_equal_a_loop"),
    ("top-p keeps fewer", "probs.cumsum(-1) - probs", "probs.cumsum(-1)", "test_top_k_and_top_p_equal_a_loop"),
    ("inverse CDF past the end", "cdf.amax(-1, keepdim=True)", "1.001", "test_draws_follow_the_distribution"),
    ("guidance with the wrong sign", "cond - uncond", "uncond - cond",
     "test_the_step_draws_what_the_naive_loop_draws"),
    ("guidance from the labelled logits", "logits = uncond + ...", "logits = cond + ...",
     "test_the_step_draws_what_the_naive_loop_draws"),
    ("temperature ignored in the step", "logits / options.temperature", "logits",
     "test_the_step_draws_what_the_naive_loop_draws"),
    ("filters ignored in the step", "filter_logits(logits, options.top_k, options.top_p)", "logits",
     "test_the_step_draws_what_the_naive_loop_draws"),
    ("one random number for position and content", "u[1]", "u[0]", "test_the_step_draws_what_the_naive_loop_draws"),
    ("all images share random numbers", "numpy_rng(seed, first + i)", "numpy_rng(seed, first)",
     "test_an_image_depends_on_its_number_alone"),
    ("random numbers ignore the seed", "numpy_rng(seed, first + i)", "numpy_rng(0, first + i)",
     "test_a_seed_fixes_the_images_and_another_changes_them"),
    ("random numbers ignore `first`", "numpy_rng(seed, first + i)", "numpy_rng(seed, i)",
     "test_an_image_depends_on_its_number_alone"),
    ("given pairs ignored", "torch.where(given < 0, ..., given)", "(...)",
     "test_given_tilings_and_given_codes_are_kept"),
    ("the cache forgets the newest pair", "torch.arange(M, device=t.device) > steps[:, None, None, None]",
     "torch.arange(M, device=t.device) >= steps[:, None, None, None]",
     "test_the_step_draws_what_the_naive_loop_draws"),
    ("the step samples invalid positions", "logits.masked_fill(~model.layout.legal(...), ...)", "logits",
     "test_the_step_draws_what_the_naive_loop_draws"),
    ("a slot keeps the granularities of its previous image", "state.grains.masked_fill_(done[:, None], -1)", "pass",
     "test_the_step_draws_what_the_naive_loop_draws"),
    ("a slot keeps the step of its previous image", "state.t.add_(1).masked_fill_(done, 0)", "state.t.add_(1)",
     "test_an_image_depends_on_its_number_alone"),
    ("slots take the same image", "state.newest + nth_done", "state.newest + 1",
     "test_an_image_depends_on_its_number_alone"),
    ("options unchecked", "options.check()", "", "test_what_can_not_be_drawn_is_refused", "generate"),
    ("all slots at once", "min(n, slots or n)", "n", "test_refilled_slots_cost_the_mean_length"),
    ("guidance without labels", "options.cfg != 1 and model.n_classes", "options.cfg != 1",
     "test_guidance_costs_nothing_where_there_are_no_classes"),
    ("no guidance", "copies = 2 if ... else 1", "copies = 1 if ... else 1",
     "test_the_step_draws_what_the_naive_loop_draws"),
    ("no guidance below 1", "options.cfg != 1", "options.cfg > 1", "test_guidance_0_is_no_label"),
    ("sampling in bf16", "logits = logits.float()", "pass", "test_draws_are_computed_in_float32", "apply_guidance"),
    ("the step is not compiled", "torch.compile(decode_one) if compile else decode_one", "decode_one",
     "test_the_step_is_one_graph_for_the_compiler"),
    ("labels beyond the classes", "label <= last", "label <= 99", "test_what_can_not_be_drawn_is_refused"),
    ("labels below -1", "label >= -1", "label >= -2", "test_what_can_not_be_drawn_is_refused"),
    ("given positions that are no prefix", "(known.int().diff(dim=1) <= 0).all()", "True",
     "test_given_positions_that_are_no_valid_prefix_are_refused"),
    ("given positions that leave holes", "(whole == pos)[known].all()", "True",
     "test_given_positions_that_are_no_valid_prefix_are_refused"),
    ("given contents out of range",
     "-1 <= pos.min() and pos.max() <= layout.end and -1 <= code.min() and code.max() < V",
     "-1 <= pos.min() and pos.max() <= layout.end",
     "test_given_contents_outside_the_codebook_are_refused"),
    ("another seed in the simple sampler", "numpy_rng(seed, index)", "numpy_rng(seed)",
     "test_the_simple_sampler_generates_the_same"),
    ("contents of EOS ids in the simple sampler", "torch.where(layout.is_eos[pos[:, t]], -1, ...)", "(...)",
     "test_the_simple_sampler_generates_the_same"),
)

FILES = of(
    "test_checkpoints.py",
    ("an unfinished file replaces the old one", "os.replace(temporary, path)", "pass",
     "test_a_file_is_whole_or_as_it_was"),
    ("files are written in place", 'path.with_name(path.name + ".tmp")', "path", "test_a_file_is_whole_or_as_it_was"),
    ("temporary files stay", "temporary.unlink(missing_ok=True)", "pass", "test_a_file_is_whole_or_as_it_was"),
    ("checkpoints run code", "True", "False", "test_a_checkpoint_runs_no_code", "load_checkpoint"),
    ("checksums are not verified", "archive.testzip()", "None", "test_a_flipped_bit_is_seen"),
    ("any kind of checkpoint", "found == kind", "True", "test_checkpoints"),
    ("checkpoints with another token order", "order == Layout.name or kind != 'dq-transformer'", "True",
     "test_checkpoints_of_other_orders_are_refused"),
    ("loaded models train", "model.to(device).eval()", "model.to(device)", "test_checkpoints"),
    ("loaded models have gradients", "model.to(device).eval().requires_grad_(False)", "model.to(device).eval()",
     "test_checkpoints"),
)

# ------------------------------------------------------------------------------------------------
# common.py


PICTURES = of(
    "test_common.py",
    ("pixels are truncated, not rounded", "((x.detach().float().cpu() + 1) * 127.5).round()",
     "(x.detach().float().cpu() + 1) * 127.5", "test_a_picture_has_the_pixels_of_its_image"),
    ("pixels overflow", "((x.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255)",
     "((x.detach().float().cpu() + 1) * 127.5).round()", "test_a_picture_has_the_pixels_of_its_image"),
    ("images are smoothed", "Image.Resampling.NEAREST", "Image.Resampling.BICUBIC",
     "test_a_picture_has_the_pixels_of_its_image"),
    ("boxes of fine codes everywhere", "grains == k", "grains <= k", "test_a_box_per_code", "draw_grains"),
    ("boxes of the wrong size", "factor * picture.width", "factors[0] * picture.width", "test_a_box_per_code"),
    ("one colour for all granularities", "GRAIN_COLOURS[k % 3]", "GRAIN_COLOURS[0]", "test_a_box_per_code"),
    ("a grid column by column", "i % columns * (w + gap), i // columns * (h + gap + top)",
     "i // columns * (w + gap), i % columns * (h + gap + top)", "test_a_grid_is_filled_row_by_row"),
    ("captions of the neighbour", "captions[i]", "captions[i - 1]", "test_a_grid_is_filled_row_by_row", "save_grid"),
    ("a grid without its last row", "math.ceil(len(pictures) / columns)", "len(pictures) // columns",
     "test_a_grid_is_filled_row_by_row"),
)

IMAGE_FILES = of(
    "test_data.py",
    ("centre crops at the corner", "(0.5, 0.5)", "(0.0, 0.0)", "test_resize_crop_and_flip", "crop"),
    ("no random crops", "rng.random(2)", "(0.5, 0.5)", "test_resize_crop_and_flip"),
    ("every image is mirrored", "rng.random() < 0.5", "rng.random() < 1.5", "test_resize_crop_and_flip"),
    ("no antialiasing", "ImageOps.fit(image, sides)", "ImageOps.fit(image, sides, Image.Resampling.NEAREST)",
     "test_resize_crop_and_flip"),
    ("images in [0, 2]", "square.astype(...) / 127.5 - 1", "square.astype(...) / 127.5", "test_images_of_every_mode"),
    ("orientation ignored", "ImageOps.exif_transpose(image, in_place=True)", "pass",
     "test_images_with_corrupt_metadata"),
    ("decompression bombs are opened", "np.prod(image.size) <= ...", "True",
     "survival/test_broken.py::test_images_that_are_odd_or_broken"),
    ("files of any size are read", "stat.S_ISREG(...) and info.st_size <= BYTES", "stat.S_ISREG(info.st_mode)",
     "test_a_huge_file_is_not_read"),
    ("a file too large for the memory is an I/O error", "(OSError, MemoryError)", "OSError",
     "test_a_huge_file_is_not_read"),
    ("transparency over black", '"white"', '"black"', "test_images_of_every_mode", "to_rgb"),
    ("keys of 2 bits unscaled", 'key * {"L;2": 85, "L;4": 17}[packing]', "key", "test_images_of_every_mode"),
    ("keys of 16 bits unscaled", "value >> 8", "value & 255", "test_images_of_every_mode", "to_rgb"),
    ("one bright value makes the image black", "bright <= 2 * scale", "bright <= scale", "test_images_of_every_mode"),
    ("deep greys are truncated, not rounded", "levels.round()", "levels", "test_16_bit_greys_are_rounded"),
    ("crops short of the last column", "rng.random(2)", "0.9 * rng.random(2)", "test_crops_reach_every_side"),
    ("crops without the last offset", "side - size + 1", "side - size", "test_crops_are_uniform"),
    ("crops on the diagonal", "strip.shape[1::-1]", "strip.shape[:2]", "test_crops_are_uniform"),
    ("white is zero ignored", "tags.get(262) == 0", "False", "test_images_of_every_mode"),
    ("the white of PGM is guessed", 'image.format != "PPM"', "True", "test_images_of_every_mode"),
    ("unsigned integers as signed ones", "np.uint32", "np.int32", "test_greys_of_every_type"),
    ("signed integers as unsigned ones", "bits - (kind == 2)", "bits", "test_greys_of_every_type"),
    ("compressed numbers with swapped bytes", 'codec != "libtiff" or ...', "True", "test_greys_of_every_type"),
    ("deep greys without their profile", 'image.info.get("icc_profile")',
     'None if image.mode[0] in "IF" else image.info.get("icc_profile")',
     "test_depth_then_transparency_then_colours[grey16]"),
    ("grey images with a colour profile", '("L", "RGB") if grey else ...', '("L",) if grey else ...',
     "test_depth_then_transparency_then_colours[grey8]"),
    ("colours before transparency", 'Image.new("RGBA", image.size, "white")', "image",
     "test_depth_then_transparency_then_colours[rgb8]"),
    ("premultiplied colours", "image.convert(image.mode.upper())", "image", "test_premultiplied_grey"),
    ("profiles recognised by their name", "np.max(change) > 2", 'b"sRGB" not in profile', "test_colour_profiles"),
    ("profiles of sRGB converted", "np.max(change) > 2", "True", "test_srgb_profiles_change_nothing"),
    ("photos decoded at full size", "image.draft(...)", "None", "test_jpegs_are_decoded_at_a_reduced_size"),
    ("photos decoded too small", "(2 * size, 2 * size)", "(size, size)", "test_jpegs_are_decoded_at_a_reduced_size"),
    ("panoramas are squeezed", "ImageOps.fit(image, sides)", "image.resize(sides)",
     "test_panoramas_keep_their_proportions"),
    ("panoramas of any length", "min(side * size // ..., LONGEST * size)", "side * size // min(image.size)",
     "test_panoramas_keep_their_proportions"),
    ("warnings of Pillow", 'warnings.filterwarnings("ignore", module="PIL")', "pass",
     "test_images_with_corrupt_metadata"),
    ("a pipe is read", "stat.S_ISREG(...) and info.st_size <= BYTES", "info.st_size <= BYTES",
     "test_a_pipe_is_not_read"),
    ("no retries", "for seconds in (1, 5, 0): ...", "for seconds in (0,): ...", "test_io_errors_are_retried"),
    ("I/O errors are the file's", "getattr(...) not in OF_A_FILE", "False", "test_io_errors_are_retried"),
)

PROGRAM = of(
    "test_common.py",
    ("--device ignored", "device = torch.device(name)", 'device = torch.device("cpu")',
     "test_devices_that_do_not_exist"),
    ("the GPU is not made the current one", "torch.cuda.set_device(device)", "pass",
     "test_the_gpu_of_the_flag_becomes_the_current_one"),
    ("--dtype fp32 ignored", 'dtype == "auto" and bool(fast)', "bool(fast)", "test_the_dtype_is_that_of_the_flag"),
    ("--dtype bf16 ignored", 'dtype == "bf16" or (dtype == "auto" and bool(fast))', 'dtype == "auto" and bool(fast)',
     "test_the_dtype_is_that_of_the_flag"),
    ("auto is fp32", 'cpu.get("avx512_bf16") or cpu.get("amx_bf16")', "False", "test_the_dtype_is_that_of_the_flag"),
    ("user errors as tracebacks", "(dq.UserError, OSError)", "OSError", "test_how_a_script_ends"),
    ("full disks as tracebacks", "(dq.UserError, OSError)", "dq.UserError", "test_how_a_script_ends"),
    ("Ctrl-C is a success", 'getattr(end, "code", 130)', 'getattr(end, "code", 0)', "test_how_a_script_ends", "run"),
    ("bugs without a traceback", "not hint and not isinstance(...)", "False", "test_how_a_script_ends", "run"),
    ("hints about the words of users", "isinstance(error, dq.UserError)", "False", "test_how_a_script_ends", "run"),
    ("a user error within another", "(dq.UserError, MemoryError, torch.OutOfMemoryError)", "MemoryError",
     "test_an_exception_becomes_a_user_error"),
    ("too little memory as another fault", "(dq.UserError, MemoryError, torch.OutOfMemoryError)", "dq.UserError",
     "test_an_exception_becomes_a_user_error"),
    ("no hint about memory", 'r"^(?! ).*(out of memory|allocate memory|MemoryError|bad_alloc|ALLOC_FAILED)"',
     '"out of air"', "test_how_a_script_ends"),
    ("a failure is a success", "sys.exit(status)", "sys.exit(0)", "test_how_a_script_ends"),
    ("numbers too low", "low <= kind(text) < below", "kind(text) < below", "test_numbers_of_flags"),
    ("numbers too high", "low <= kind(text) < below", "low <= kind(text)", "test_numbers_of_flags"),
    ("0 steps", "number(int, 1)", "number(int, 0)", "test_numbers_of_flags"),
)

TRAINING_RUN = of(
    "test_common.py",
    ("no warm-up", "self.lr * (step + 1) / self.warmup", "self.lr", "test_schedules"),
    ("warm-up from 0", "self.lr * (step + 1)", "self.lr * step", "test_schedules"),
    ("a constant learning rate", "0.5 * (1 + math.cos(math.pi * done))", "1", "test_schedules"),
    ("linear decay is ignored", 'self.decay == "linear"', "False", "test_schedules"),
    ("a learning rate that rises again", "math.pi * done", "2 * math.pi * done", "test_schedules"),
    ("flags ignored", "name in names and value is not None", "False",
     "test_wiring.py::test_every_flag_reaches_the_run", "override"),
    ("a flag of 0 counts as not given", "value is not None", "value",
     "test_presets.py::test_flags_that_are_not_given_take_the_values_of_the_preset", "override"),
    ("flags that are not given are None", "value is not None", "True",
     "test_presets.py::test_flags_that_are_not_given_take_the_values_of_the_preset", "override"),
    ("a preset for a GPU on the CPU", 'name != "cpu" and torch.cuda.is_available()', "torch.cuda.is_available()",
     "test_presets.py::test_the_device_of_the_flag_chooses_the_preset", "on_gpu"),
    ("a preset for a GPU on the CPU in stage 2", "on_gpu(device)", 'on_gpu("auto")',
     "test_presets.py::test_the_device_of_the_flag_chooses_the_preset", "fit"),
    ("--save-every ignored", "self.args.save_every", 'self.settings["eval_every"]',
     "test_checkpoints_are_due_between_evaluations"),
    ("batches that cannot be split equally", "schedule.batch_size % parts == 0", "True",
     "test_wrong_input_gives_one_line"),
    ("each epoch in the same order", "dq.numpy_rng(seed, epoch)", "dq.numpy_rng(seed, 0)",
     "test_train_transformer.py::test_batches_of_stage_2"),
    ("--seed ignored in the order", "dq.numpy_rng(seed, epoch)", "dq.numpy_rng(0, epoch)",
     "test_data.py::test_stream_is_a_function_of_seed_and_batch_number"),
    ("a resumed run restarts its epoch", "start * batch_size", "start * batch_size // n * n",
     "test_data.py::test_stream_is_a_function_of_seed_and_batch_number"),
    ("image indices without the epoch", "i // n * n + int(...)", "int(...)",
     "test_data.py::test_indices_count_through_the_epochs"),
    ("logged losses of the last accumulation step", "sums.get(name, 0.0) + scale * term.detach().float()",
     "scale * term.detach().float()", "test_wiring.py::test_the_logged_losses_of_stage_1"),
    ("logged losses summed over accumulation steps", "scale * term.detach().float()", "term.detach().float()",
     "test_wiring.py::test_the_logged_losses_of_stage_1"),
    ("losses that are NaN", "not torch.as_tensor(x).isfinite().all()", "False",
     "survival/test_broken.py::test_a_loss_that_is_not_a_number_stops_the_run"),
    ("only the newest losses are checked", "self.losses.items()", "list(self.losses.items())[-1:]",
     "survival/test_broken.py::test_a_loss_that_is_not_a_number_stops_the_run"),
    ("losses are not checked before an evaluation", "number or done in due or ...", "number or ...",
     "test_losses_are_checked_before_they_are_used"),
    ("losses are not checked before a checkpoint", "done % 10 == 0 or saves", "done % 10 == 0",
     "test_losses_are_checked_before_they_are_used"),
    ("logged losses summed over ranks", "dq.all_reduce_sum(...) / dq.rank_world()[1]", "dq.all_reduce_sum(...)",
     "test_logged_losses_are_means_over_the_ranks", "newest_losses"),
    ("logged losses of one rank", "dq.all_reduce_sum(...) / dq.rank_world()[1]", "(...)",
     "test_logged_losses_are_means_over_the_ranks", "newest_losses"),
    ("a lock that is shared", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB",
     "test_only_one_run_at_a_time_writes_into_a_folder"),
    ("a lock that is not held", "fcntl.lockf(...)", "fcntl.lockf(...); file.close()",
     "test_only_one_run_at_a_time_writes_into_a_folder"),
    ("a lock that ends before the run", "args.lock = lock(args.out)", "lock(args.out)",
     "test_a_run_holds_its_lock_until_it_ends"),
    ("Python's generator without the seed", "random.seed(str(numbers))", "pass", "test_seeds_give_unrelated_numbers"),
    ("numpy's generator without the seed", "np.random.seed(...)", "(...)", "test_seeds_give_unrelated_numbers"),
    ("torch's generator without the seed", "torch.manual_seed(...)", "(...)", "test_seeds_give_unrelated_numbers",
     "seed_all"),
    ("the same seed for nearby numbers", "str(numbers)", "sum(numbers)", "test_seeds_give_unrelated_numbers",
     "seed_all"),
    ("a signal is not noted", "self.number, self.noted = number, ...", "self.number, self.noted = 0, ...",
     "test_the_first_signal_is_noted_and_the_second_one_exits"),
    ("previous signal handlers are lost", "self.callback(signal.signal, number, ...)", "(...)",
     "test_the_first_signal_is_noted_and_the_second_one_exits"),
    ("a second signal is not heard", "time.monotonic() > self.noted + 1", "False",
     "test_the_first_signal_is_noted_and_the_second_one_exits"),
    ("a signal that is sent twice ends the step", "time.monotonic() > self.noted + 1", "time.monotonic() > self.noted",
     "test_the_first_signal_is_noted_and_the_second_one_exits"),
    ("a signal gives exit status 0", "128 + number", "0",
     "test_the_first_signal_is_noted_and_the_second_one_exits", "leave"),
    ("a blocked run gives exit status 0", "os._exit", "lambda status: os._exit(0)",
     "survival/test_kill.py::test_the_first_signal_ends_a_run_that_is_blocked_in_a_step", "watch"),
    ("a blocked run is waited for", "self.over.wait(self.patience)", "self.over.wait()",
     "survival/test_kill.py::test_the_first_signal_ends_a_run_that_is_blocked_in_a_step", "watch"),
    ("ranks stop at different steps", "dq.all_gather(...)", "(...)",
     "survival/test_processes.py::test_all_processes_stop_after_the_same_step", "asked"),
    ("a lock that children inherit", "fcntl.lockf", "fcntl.flock", "test_child_processes_do_not_inherit_a_lock"),
    ("--resume needs a checkpoint", "not resumes or not self.path.exists()", "not resumes",
     "survival/test_resume.py::test_the_same_command_starts_and_resumes"),
    ("a restarted job starts from scratch", 'env_number("TORCHELASTIC_RESTART_COUNT") > 0', "False",
     "survival/test_resume.py::test_the_same_command_starts_and_resumes"),
    ("blank paths", "not text.strip()", "False", "test_paths_of_flags", "path"),
    ("~ is not expanded", "os.path.expanduser(text)", "text", "test_paths_of_flags", "path"),
    ("a closed pipe ends the run", "os.dup2(...)", "raise", "test_a_reader_that_is_gone_is_no_error"),
    ("a closed pipe fails again at the end", "os.dup2(...)", "pass", "test_a_reader_that_is_gone_is_no_error"),
    ("a rank beyond the world size", "number(int, 0, below=world)", "natural",
     "test_every_variable_of_torchrun_is_checked"),
    ("the device is not in the log", "self.write_log(first, self.news)", "None",
     "survival/test_resume.py::test_device_and_dtype_are_logged_and_a_change_is_reported"),
    ("fields that older checkpoints lack may change", 'asdict(type(self.config)()) | saved.get("config", {})',
     'saved.get("config", {})', "survival/test_resume.py::test_a_run_without_qk_norm_is_refused"),
    ("all settings may change", "name in self.may_change", "True",
     "survival/test_resume.py::test_resuming_with_other_settings"),
    ("the best loss is forgotten", 'saved["step"], saved["best"], ...', 'saved["step"], math.inf, ...',
     "survival/test_resume.py::test_a_checkpoint_without_settings_can_be_resumed"),
    ("optimisers without their saved state", "dict(..., **self.parts)", "dict(...)",
     "survival/test_resume.py::test_ten_steps_killed_and_ten_more_are_twenty_steps"),
    ("steps are logged twice", "min(file.tell(), self.log_bytes)", "file.tell()",
     "survival/test_resume.py::test_ten_steps_killed_and_ten_more_are_twenty_steps"),
    ("no evaluation at the end", "{steps, *range(every, steps, every)}", "{*range(every, steps, every)}",
     "test_evaluations_are_due_at_multiples_and_at_the_end"),
    ("every rank saves", "dq.rank_world()[0] == 0", "True", "test_wiring.py::test_only_rank_0_writes_files",
     "Record.save"),
    ("no checkpoint at the end", "number or done in due or ...", "number or ...",
     "test_wiring.py::test_the_final_state_is_saved"),
    ("the worst checkpoint is the best", "loss < self.best", "loss > self.best or self.best == math.inf",
     "test_the_best_checkpoint_is_that_of_the_lowest_loss"),
    ("broken weights are saved", 'self.require_finite(done, "weights", self.model.state_dict())', "None",
     "survival/test_broken.py::test_broken_weights_are_not_saved"),
    ("a previous run is overwritten", "os.replace(file, former / file.name)", "pass",
     "survival/test_resume.py::test_a_new_run_moves_the_previous_one_aside"),
)

# ------------------------------------------------------------------------------------------------
# train_vae.py


STAGE_1_DATA = of(
    "test_data.py",
    ("toy validation images are training images", "seed + 1_000_003", "seed", "test_toy_validation_images_are_new"),
    ("--seed ignored by the toy data", "ToyShapes(size, seed=seed)", "ToyShapes(size)",
     "test_toy_validation_images_are_new"),
    ("sub-folders are not classes", "len(classes) > 1", "len(classes) > 99", "test_classes_splits_and_epochs"),
    ("one sub-folder is a class", "len(classes) > 1", "len(classes) > 0", "test_description_of_a_data_set"),
    ("no augmentation of the data", "augment", "False", "test_classes_splits_and_epochs", "open_data"),
    ("--no-flip ignored by the data", "crop(strip, self.size, rng, self.flip)", "crop(strip, self.size, rng)",
     "test_flips_can_be_disabled"),
    ("files with two names count twice", "{file.key: file for _, file in sorted(rows, reverse=True)}",
     "{file.name: file for _, file in rows}", "test_a_file_with_two_names_is_one_image"),
    ("--held-out ignored by the data", "if other.files: ...", "pass",
     "test_a_folder_of_validation_images"),
    ("--held-out ignored without --data", "dq.require(held_out is None, ...)", "pass",
     "test_a_folder_of_validation_images"),
    ("validation images below --data are training images", "[skip, held_out]", "[skip]",
     "test_validation_images_below_data_are_not_trained_on"),
    ("images in both folders are training images", "file.key not in taken", "True",
     "test_images_below_both_folders_are_not_trained_on"),
    ("an empty name is the toy data", "folder is None", "not folder", "test_empty_folder_names_are_errors"),
    ("an empty --held-out is ignored", "Found(found.root, [], {}) if held_out is None else ...",
     "Found(found.root, [], {}) if not held_out else ...", "test_empty_folder_names_are_errors"),
    ("every folder is reported as train and test splits", "{name.lower() for name in train.classes} <= ...", "True",
     "test_description_of_a_data_set"),
    ("another --held-out folder may resume", "identity(val)", "0",
     "survival/test_resume.py::test_resuming_with_other_settings"),
    ("thresholds that cannot be saved", "np.where(below < 1e-6, -1e9, ...)",
     "np.where(below < 1e-6, -np.inf, ...)", "test_routers.py::test_none_and_all_are_none_and_all"),
    ("validation images of the first classes", "dq.numpy_rng(0).permutation(len(data))[:512].tolist()",
     "range(len(data))[:512]", "test_train_vae.py::test_all_classes_are_evaluated"),
    ("validation images are augmented", "ImageFolder(other.root, val, label, size, strips=strips)",
     "ImageFolder(other.root, val, label, size, augment, strips=strips)",
     "test_classes_splits_and_epochs"),
    ("--out is data", "{... for folder in skip if folder}", "{... for folder in skip[1:] if folder}",
     "test_which_files_are_images"),
    ("hidden files are data", 'each.name.startswith(".")', "False", "test_which_files_are_images"),
    ("a user's samples.png is a figure", "NO_DATA | FIGURES if ... else NO_DATA", "NO_DATA | FIGURES",
     "test_which_files_are_images[output_of_this_project]"),
    ("one thread decodes under torchrun", "max(1, os.cpu_count() // world)", "torch.get_num_threads()",
     "test_processes_share_the_cores"),
    ("own images are data", "each.name in hidden", "False", "test_which_files_are_images"),
    ("own samples are data", "holds_samples(each)", "False", "test_which_files_are_images[output_of_this_project]"),
    ("samples.json with long paths", "file.read(2 ** 20)", "file.read(4096)",
     "test_which_files_are_images[output_of_this_project]"),
    ("huge files are opened at the start", "file.size <= BYTES", "True", "test_image_side", "image_side"),
    ("samples.json of other programs", "holds_samples(each)", "True",
     "test_which_files_are_images[output_of_this_project]"),
    ("links are not followed", "(links if ... else todo).append(...)", "each.is_symlink() or todo.append(...)",
     "test_which_files_are_images[links_and_loops]"),
    ("links below links come first", "linked or each.is_symlink()", "each.is_symlink()",
     "test_files_take_precedence_over_links"),
    ("a link to nothing ends the search", "left_out[\"that can't be opened\"] += 1", "raise",
     "test_which_files_are_images[unreadable_files]"),
    ("links are visited first", "(todo or links).pop()", "(links or todo).pop()",
     "test_which_files_are_images[links_and_loops]"),
    ("the inode alone identifies a file", "info.st_nlink > 1", "True",
     "test_inode_numbers_may_be_meaningless[1]"),
    ("the outer folder of an archive is the root", "inner and inner not in parents", "False",
     "test_the_outer_folder_of_an_archive_is_the_root"),
    ("too many images are read", "... * len(files) > MEMORY", "... * len(files) > 2 * MEMORY",
     "test_a_large_folder_is_not_read_at_the_start"),
    ("images are computed again", "self[key] = image", "pass", "test_toy_shapes_are_computed_once"),
    ("more images are kept than fit", "size <= self.room", "True", "test_cached_images_equal_decoded_ones"),
    ("memory without a count", "self.room -= size", "pass", "test_cached_images_equal_decoded_ones"),
    ("the caller changes what is kept", "self.images[...].clone()", "self.images[i % self.n]",
     "test_toy_shapes_are_computed_once"),
    ("nothing is loaded ahead", "len(results) > workers", "True", "test_batches_of_the_loader[4]"),
    ("the last batches are lost", "itertools.chain(batches, ...)", "batches", "test_batches_of_the_loader[1]"),
    ("extensions in capitals are ignored", "os.path.splitext(name)[1].lower()", "os.path.splitext(name)[1]",
     "test_which_files_are_images"),
    ("one file in ten is held out", "zlib.crc32(...) % 20", "zlib.crc32(...) % 10", "test_classes_splits_and_epochs"),
    ("a class may have no training image", "[file for file in files if file not in first]", "files",
     "test_which_files_are_images"),
    ("validation images are training images", "[file for file in files if file not in held]", "files",
     "test_classes_splits_and_epochs"),
    ("the same crop in every epoch", "dq.numpy_rng(self.seed, i)", "dq.numpy_rng(self.seed, i % n)",
     "test_classes_splits_and_epochs"),
    ("a broken file is replaced by its neighbour", "dq.numpy_rng(self.seed, i, 1).permutation(n).tolist()",
     "range(n)", "test_broken_files_do_not_change_the_distribution"),
    ("a broken file is read again", 'getattr(image, "nbytes", 0)', 'getattr(image, "nbytes", 1)',
     "test_each_broken_file_is_reported_once"),
    ("crops without the seed", "dq.numpy_rng(self.seed, i)", "dq.numpy_rng(0, i)",
     "test_augmentation_depends_on_the_seed"),
    ("replacements of broken files without the seed", "dq.numpy_rng(self.seed, i, 1)", "dq.numpy_rng(0, i, 1)",
     "test_augmentation_depends_on_the_seed"),
    ("toy images ignore the seed", "self.seed", "0", "test_toy_shapes", "_draw"),
    ("another texture is named", "self._draw(i)[6]", "self._draw(i)[5] % 3",
     "test_texture_index"),
    ("the mask of another image", "self._draw(i)[0]", "self._draw(i + 1)[0]", "test_toy_shapes"),
    ("broken images encoded as others", "strip is None and self.augment", "strip is None",
     "test_broken_files_do_not_change_the_distribution"),
    ("ranks see the same images", "(...).reshape(accumulate, world, -1)[:, rank]",
     "(...).reshape(accumulate, world, -1)[:, 0]", "test_ranks_share_each_accumulation_step"),
)

STAGE_1_LOSSES = of(
    "test_train_vae.py",
    ("LPIPS without its shift", "x - self.shift", "x", "test_lpips_is_the_published_formula"),
    ("LPIPS before the ReLU", "len(layers)", "len(layers) - 1", "test_lpips_is_the_published_formula", "Perceptual"),
    ("LPIPS without weights", "weight * (a - b).square()", "(a - b).square()", "test_lpips_is_the_published_formula"),
    ("LPIPS unnormalised", "F.normalize(maps.float(), dim=1, eps=1e-10)", "maps.float()",
     "test_lpips_is_the_published_formula"),
    ("LPIPS in bf16", "F.normalize(maps.float(), ...)", "F.normalize(maps, ...)",
     "test_images_are_compared_in_float32"),
    ("the discriminator in bf16", "self.blocks(x).float()", "self.blocks(x)",
     "test_images_are_compared_in_float32"),
    ("metrics in bf16", "out.reconstruction.float().clamp(-1, 1)", "out.reconstruction.clamp(-1, 1)",
     "test_images_are_compared_in_float32"),
    ("batch norm of another rank's images", "super().forward(...).chunk(world)[rank]",
     "super().forward(...).chunk(world)[rank - 1]", "test_batch_norm_of_two_processes_is_that_of_one"),
    ("batch norm per rank", "super().forward(...).chunk(world)[rank]", "super().forward(x)",
     "test_batch_norm_of_two_processes_is_that_of_one"),
    ("a discriminator with other patches", "(8 * width, 1)", "(8 * width, 2)",
     "test_discriminator_is_the_usual_patchgan"),
    ("a discriminator with another slope", "[..., BatchNorm(c_out), nn.LeakyReLU(0.2)]",
     "[..., BatchNorm(c_out), nn.LeakyReLU(0.02)]", "test_discriminator_equals_its_layers"),
    ("a discriminator with larger initial weights", "nn.init.normal_(p, ..., 0.02)", "nn.init.normal_(p, ..., 0.2)",
     "test_discriminator_equals_its_layers"),
    ("batch-norm weights of the discriminator start at 0", "1 if p.dim() == 1 else 0", "0",
     "test_discriminator_equals_its_layers"),
    ("the hinge loss without its half", "0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())",
     "F.relu(1 - real).mean() + F.relu(1 + fake).mean()", "test_hinge_loss"),
    ("the hinge loss with the wrong sign", "F.relu(1 - real).mean() + F.relu(1 + fake).mean()",
     "F.relu(1 + real).mean() + F.relu(1 - fake).mean()", "test_hinge_loss"),
    ("a hinge without a margin", "F.relu(1 - real)", "F.relu(-real)", "test_hinge_loss"),
    ("the adaptive weight is inverted", "recon / (gan + 1e-4)", "gan / (recon + 1e-4)",
     "test_backward_gives_the_gradients_of_the_weighted_sum"),
    ("the adaptive weight without a cap", "(recon / (gan + 1e-4)).clamp(max=0.75)", "recon / (gan + 1e-4)",
     "test_backward_gives_the_gradients_of_the_weighted_sum"),
    ("another cap of the adaptive weight", "0.75", "1.0",
     "test_backward_gives_the_gradients_of_the_weighted_sum", "backward"),
    ("the adaptive weight alone", "gan_weight * (...).clamp(max=0.75)",
     "(...).clamp(max=0.75)", "test_backward_gives_the_gradients_of_the_weighted_sum"),
    ("adversarial gradients are dropped", "at_y = at_y + weight * gan_at_y", "pass",
     "test_backward_gives_the_gradients_of_the_weighted_sum"),
    ("commitment and budget losses are dropped", "torch.full_like(code_loss, scale)", "torch.full_like(code_loss, 0.0)",
     "test_backward_gives_the_gradients_of_the_weighted_sum"),
    ("commitment and budget losses are not scaled for accumulation", "torch.full_like(code_loss, scale)",
     "torch.full_like(code_loss, 1.0)",
     "test_backward_gives_the_gradients_of_the_weighted_sum"),
    ("reconstruction losses are not scaled for accumulation", "scale * at_y", "at_y",
     "test_backward_gives_the_gradients_of_the_weighted_sum", "backward"),
    ("the last layer compiled", "last.forward = torch.compiler.disable(last.forward)", "pass",
     "test_a_compiled_model_gets_the_same_gradients"),
    ("the gate noise is not annealed", "max(0.0, (0.9 - step / steps) / 0.4)", "1.0", "test_common.py::test_schedules"),
    ("the gate noise is annealed too late", "0.9 - step / steps", "1.0 - step / steps",
     "test_common.py::test_schedules"),
)

STAGE_1_FIGURES = of(
    "test_train_vae.py",
    ("AUC without ties", "torch.searchsorted(..., right=ties)", "torch.searchsorted(..., right=False)",
     "test_auc_equals_counting_pairs"),
    ("stage 1 evaluated in training mode", "model.eval()", "", "test_evaluation_of_a_dq_vae", "train_vae.evaluate"),
    ("stage 1 trained in evaluation mode", "model.train()", "", "test_evaluation_of_a_dq_vae", "train_vae.evaluate"),
    ("PSNR of another range", "torch.log10(4 / ...)", "torch.log10(1 / ...)", "test_evaluation_of_a_dq_vae"),
    ("PSNR of the mean error", "l2.clamp(min=rounding)", "l2.mean()",
     "test_evaluation_of_a_dq_vae"),
    ("PSNR of values outside [-1, 1]", "out.reconstruction.float().clamp(-1, 1)", "out.reconstruction.float()",
     "test_evaluation_of_a_dq_vae"),
    ("granularities cost no bits", "n_codes * math.log2(config.codebook_size) + grains[0].numel() * math.log2(K)",
     "n_codes * math.log2(config.codebook_size)", "test_evaluation_of_a_dq_vae"),
    ("bits of three channels", "bits / config.size ** 2", "bits / config.size ** 2 / 3", "test_evaluation_of_a_dq_vae"),
    ("perplexity of cells", "weight.flatten()", "None", "test_evaluation_of_a_dq_vae", "evaluate"),
    ("LPIPS is not evaluated", 'metrics["lpips"] = lpips[0].mean().item()', "pass",
     "test_wiring.py::test_the_logged_losses_of_stage_1"),
    ("AUC of another score", "auc(score, detailed)", "auc(-score, detailed)", "test_evaluation_of_a_dq_vae"),
    ("original and reconstruction exchanged", "(to_picture(x), to_picture(y), draw_grains(x, g, factors))",
     "(to_picture(y), to_picture(x), draw_grains(x, g, factors))", "test_the_picture_shows_originals_first"),
)

STAGE_1_CODES = of(
    "test_train_vae.py",
    ("codes.pt without mirror images", "crop.flip(3)", "crop", "test_encoding_keeps_every_image_and_its_mirror_image",
     "train_vae.views"),
    ("mirrored upside down", "crop.flip(3)", "crop.flip(2)", "test_encoding_keeps_every_image_and_its_mirror_image",
     "train_vae.views"),
    ("broken images are encoded", 'rows["label"] != BROKEN', 'rows["label"] != -99',
     "test_broken_images_have_no_codes"),
    ("integers one too small", "torch.iinfo(kind).max + 1", "torch.iinfo(kind).max + 2",
     "test_codes_are_stored_in_the_smallest_integers"),
    ("crops of many images", "len(train) < FEW", "True", "test_presets.py::test_few_images_are_cropped",
     "write_codes"),
    ("codes.pt without the PSNR", 'record.metrics.get("psnr")', "None",
     "test_the_last_line_has_the_psnr_and_the_next_command"),
    ("--encode forgets --held-out", "known |= folders", 'known |= dict(data=folders["data"])',
     "test_encode_takes_what_the_checkpoint_knows"),
    ("--encode forgets the seed", '("seed", "no_flip", "dtype")', '("no_flip", "dtype")',
     "test_encode_takes_what_the_checkpoint_knows"),
    ("codes in training mode", "vae.eval()", "", "test_codes_hold_all_that_stage_2_needs", "write_codes"),
    ("codes of validation images are mirrored", "(val, False, False)", "(val, True, False)",
     "test_codes_hold_all_that_stage_2_needs"),
    ("codes.pt of another DQ-VAE is kept", "codes.stat().st_mtime >= record.path.stat().st_mtime", "True",
     "survival/test_resume.py::test_codes_are_those_of_the_newest_weights"),
    ("the preset is not noted in codes.pt", "recipe(args.preset, vae.config)", '"custom"',
     "test_random_routing_of_codes_depends_only_on_the_images"),
    ("codes of other flags are noted as those of the preset", "recipe(args.preset, vae.config)", "args.preset",
     "test_codes_hold_all_that_stage_2_needs"),
    ("a resumed run chooses a preset again", "args.resume and not args.preset and ...", "False",
     "test_presets.py::test_a_resumed_run_keeps_its_preset"),
    ("--encode forgets the preset", 'saved.get("preset", "custom")', '"custom"',
     "test_encode_takes_what_the_checkpoint_knows"),
)

STAGE_1_MAIN = of(
    "test_wiring.py",
    ("ratios of the preset for any factors", "len(args.factors) != len(config.factors)", "False",
     "test_factors_without_ratios_get_equal_ratios"),
    ("detail masks of whole regions", "F.avg_pool2d(...) > 0.1", "F.avg_pool2d(...) > 0.9",
     "test_train_vae.py::test_regions_with_a_tenth_of_detail_are_detailed"),
    ("thresholds of other quantiles", "np.cumsum(ratios)", "np.cumsum(ratios[::-1])",
     "test_routers.py::test_entropy_thresholds_and_random_routing_give_the_asked_ratios"),
    ("no augmentation in training", "open_data(..., augment=True)", "open_data(..., augment=False)",
     "test_batches_of_images_follow_the_seed"),
    ("--seed ignored by the data of stage 1", "open_data(..., augment=True, seed=args.seed)",
     "open_data(..., augment=True, seed=0)", "test_batches_of_images_follow_the_seed"),
    ("--seed ignored by the data of --encode", "open_data(..., seed=args.seed)", "open_data(..., seed=0)",
     "test_train_vae.py::test_encode_uses_the_toy_shapes_of_the_same_seed", "encode_only"),
    ("--held-out ignored by --encode", "open_data(..., held_out=args.held_out)", "open_data(...)",
     "test_train_vae.py::test_encode_takes_what_the_checkpoint_knows", "encode_only"),
    ("--seed ignored by the weights of stage 1", "seed_all(args.seed)", "seed_all(0)",
     "test_the_seed_determines_the_initial_weights", "train_vae.main"),
    ("thresholds are not calibrated", 'config.router == "entropy"', "False",
     "test_train_vae.py::test_the_toy_data_needs_no_folder"),
    ("thresholds of 64 images", "shuffled_indices(len(train), 2048, ...)", "shuffled_indices(len(train), 64, ...)",
     "test_the_entropy_router_is_calibrated_on_2048_images"),
    ("thresholds of the first batch", "(... for x, _ in loader(...))", "(... for x, _ in list(loader(...))[:1])",
     "test_the_entropy_router_is_calibrated_on_2048_images"),
    ("thresholds of validation images", "calibration_images(train, ...)", "calibration_images(val, ...)",
     "test_the_entropy_router_is_calibrated_on_2048_images", "train_vae.main"),
    ("--ratios ignored by --encode", "if args.ratios: ...", "pass", "test_train_vae.py::test_encode_with_other_ratios"),
    ("a dial with a budget loss", "args.budget_weight = 0.0", "pass",
     "test_train_vae.py::test_encode_with_other_ratios"),
    ("a dial ignores --budget-weight", "args.budget_weight is None", "True",
     "test_train_vae.py::test_the_dial_router_needs_no_budget_loss"),
    ("thresholds without the seed", "shuffled_indices(len(train), 2048, seed)",
     "shuffled_indices(len(train), 2048, 0)", "test_the_entropy_router_is_calibrated_on_2048_images"),
    ("losses of stage 1 in bf16", "out.reconstruction.float()", "out.reconstruction",
     "test_losses_of_stage_1_are_in_float32", "train_vae.main"),
    ("stage 1 without gradient averaging", "distribute(compiled(model) if args.compile else model)",
     "compiled(model) if args.compile else model",
     "survival/test_processes.py::test_two_processes_compute_what_one_computes[vae with the entropy router]"),
    ("a discriminator without gradient averaging", "distribute(discriminator)", "discriminator",
     "survival/test_processes.py::test_two_processes_compute_what_one_computes[vae with a discriminator]"),
    ("the paper's budget weight", "VAESchedule(..., budget_weight=10.0)", "VAESchedule(..., budget_weight=1.0)",
     "test_vae.py::test_the_papers_presets_have_the_papers_settings"),
    ("the paper's budget weight of three", "replace(PAPER, budget_weight=1.0)", "PAPER",
     "test_vae.py::test_the_papers_presets_have_the_papers_settings"),
    ("the paper's betas of stage 1", "VAESchedule(..., betas=(0.5, 0.9))", "VAESchedule(...)",
     "test_vae.py::test_the_papers_presets_have_the_papers_settings"),
    ("the paper's stage 1 clipped", "VAESchedule(..., betas=(0.5, 0.9), clip=0.0)",
     "VAESchedule(..., betas=(0.5, 0.9))", "test_vae.py::test_the_papers_presets_have_the_papers_settings"),
    ("betas of the preset ignored", "dict(..., betas=schedule.betas, fused=True)", "dict(..., fused=True)",
     "test_the_optimisers_of_stage_1"),
    ("the router is not trained", "torch.optim.Adam(model.parameters(), ...)",
     "torch.optim.Adam([*model.encoder.parameters(), *model.decoder.parameters()], ...)",
     "test_the_optimisers_of_stage_1"),
    ("the discriminator's optimiser has the last layer only", "discriminator.parameters",
     "discriminator.blocks[-1].parameters",
     "test_the_optimisers_of_stage_1"),
    ("the discriminator is trained from the start", "schedule.gan_start", "0", "test_the_adversarial_loss"),
    ("the discriminator starts one step late", "step >= schedule.gan_start", "step > schedule.gan_start",
     "test_the_adversarial_loss"),
    ("gradients of previous steps", "optimizer.zero_grad(set_to_none=True)", "pass",
     "test_each_step_starts_without_gradients", "Schedule.update"),
    ("a constant learning rate in stage 1", 'group["lr"] = self.learning_rate(step)', "pass",
     "test_the_optimisers_of_stage_1", "Schedule.update"),
    ("the gate noise is constant in training", "forward(x, dq.gumbel_scale(...))", "forward(x)",
     "test_the_gate_noise_is_annealed"),
    ("LPIPS with exchanged arguments", "perceptual(x, y).mean", "perceptual(y, x).mean",
     "test_the_reconstruction_loss"),
    ("the adversarial sign flipped", "-discriminator(y).mean()", "discriminator(y).mean()",
     "test_the_adversarial_loss"),
    ("the absolute error dropped", "l1 + schedule.l2_weight * l2", "schedule.l2_weight * l2",
     "test_the_reconstruction_loss"),
    ("the L2 term dropped", "l1 + schedule.l2_weight * l2", "l1", "test_the_reconstruction_loss"),
    ("the L2 weight ignored", "schedule.l2_weight * l2", "l2", "test_the_reconstruction_loss"),
    ("the commitment loss dropped", "out.commitment + schedule.budget_weight * budget",
     "schedule.budget_weight * budget", "test_the_commitment_and_budget_losses"),
    ("the budget dropped", "out.commitment + schedule.budget_weight * budget", "out.commitment",
     "test_the_commitment_and_budget_losses"),
    ("the budget weight ignored", "schedule.budget_weight * budget", "budget", "test_the_commitment_and_budget_losses"),
    ("the ratios ignored", "dq.budget_loss(out.gate, config.ratios)", "dq.budget_loss(out.gate, (0.5, 0.5))",
     "test_the_commitment_and_budget_losses"),
    ("LPIPS dropped", "... + schedule.perceptual_weight * lpips", "...", "test_the_reconstruction_loss"),
    ("the weight of LPIPS ignored", "schedule.perceptual_weight * lpips", "lpips", "test_the_reconstruction_loss"),
    ("the adversarial weight ignored", "backward(..., schedule.gan_weight, scale)",
     "backward(..., 1.0, scale)", "test_the_adversarial_loss"),
    ("the adversarial loss dropped", "backward(y, last.weight, recon_loss, gan_loss, ...)",
     "backward(y, last.weight, recon_loss, None, ...)", "test_the_adversarial_loss"),
    ("accumulated gradients are summed", "backward(..., scale)", "backward(...)",
     "test_accumulated_gradients_are_averaged"),
    ("accumulated gradients of the discriminator are summed", "scale * critic_loss", "critic_loss",
     "test_accumulated_gradients_are_averaged"),
    ("real and fake are exchanged", "hinge_loss(discriminator_ddp(x), discriminator_ddp(y.detach()))",
     "hinge_loss(discriminator_ddp(y.detach()), discriminator_ddp(x))", "test_the_discriminator_loss"),
    ("the discriminator's loss reaches the decoder", "discriminator_ddp(y.detach())", "discriminator_ddp(y)",
     "test_the_discriminator_loss"),
    ("the discriminator is not trained", "optimizer.step", 'optimizers["optimizer"].step',
     "test_the_optimisers_of_stage_1", "Schedule.update"),
    ("the same noise in every step", "seed_all(args.seed, step)", "seed_all(args.seed)",
     "test_each_step_has_its_own_seed"),
    ("the clip of stage 1 ignored", "if self.clip: ...", "if False: ...", "test_gradient_clipping_of_stage_1",
     "Schedule.update"),
    ("--clip 0 clips", "if self.clip: ...", "if True: ...", "test_clip_0_does_not_clip", "Schedule.update"),
    ("--no-flip ignored in training", "open_data(..., flip=not args.no_flip)", "open_data(...)",
     "test_every_flag_reaches_the_run"),
    ("--no-flip ignored by the codes", "(train, not args.no_flip, ...)", "(train, True, ...)", "test_no_flip"),
    ("--held-out ignored in training", "open_data(..., held_out=args.held_out)", "open_data(...)",
     "test_every_flag_reaches_the_run", "train_vae.main"),
    ("accumulation steps with other images", "stream(..., schedule.accumulate)", "stream(...)",
     "test_every_flag_reaches_the_run"),
    ("every rank evaluates", "step in due and rank == 0", "step in due", "test_only_rank_0_writes_files"),
    ("half of the batch", "batch.chunk(schedule.accumulate)", "batch.chunk(schedule.accumulate)[:1]",
     "test_batches_of_images_follow_the_seed"),
    ("random numbers depend on earlier steps", "seed_all(args.seed, step)", "pass",
     "test_each_step_has_its_own_seed"),
    ("codes of random crops", "train.augment = False", "pass",
     "test_train_vae.py::test_codes_hold_all_that_stage_2_needs"),
    ("the best by the absolute error alone", 'metrics["l1"] + schedule.l2_weight * metrics["l2"]', 'metrics["l1"]',
     "test_the_logged_losses_of_stage_1"),
    ("the best without LPIPS", 'schedule.perceptual_weight * metrics.get("lpips", 0.0)', "0.0",
     "test_the_logged_losses_of_stage_1"),
    ("the model stays in evaluation mode", "model.train", "model.eval", "test_stage_1_trains_in_training_mode",
     "train_vae.main"),
)

# ------------------------------------------------------------------------------------------------
# train_transformer.py


STAGE_2_DATA = of(
    "test_train_transformer.py",
    ("labels of the wrong views", 'part["label"].repeat_interleave', 'part["label"].repeat',
     "test_train_vae.py::test_encoding_keeps_every_image_and_its_mirror_image"),
    ("lengths without the EOS ids", "codes + len(factors)", "codes",
     "test_train_vae.py::test_encoding_keeps_every_image_and_its_mirror_image"),
    ("--uncond ignored by the labels", "... if uncond else label", "... if False else label",
     "test_uncond_hides_the_labels"),
    ("batches unsorted", 'index[np.argsort(length[index], kind="stable")]', "index", "test_batches_of_stage_2"),
    ("sequences are truncated", "-(-int(images.length[index].max()) // multiple)",
     "int(images.length[index].max()) // multiple",
     "test_train_vae.py::test_encoding_keeps_every_image_and_its_mirror_image"),
    ("sequences of full length", "pos[:, :columns], code[:, :columns], label", "pos, code, label",
     "test_evaluation_is_no_wider_than_needed"),
    ("stage 2 evaluated in training mode", "model.eval()", "", "test_evaluation_of_a_transformer",
     "train_transformer.evaluate"),
    ("stage 2 trained in evaluation mode", "model.train()", "", "test_evaluation_of_a_transformer",
     "train_transformer.evaluate"),
    ("evaluated without labels", "model(pos, code, label)", "model(pos, code)", "test_evaluation_of_a_transformer"),
    ("means of batches are summed", '[nll["position"].sum(), nll["content"].sum()]',
     '[nll["position"].mean(), nll["content"].mean()]', "test_evaluation_of_a_transformer"),
    ("bits are nats", "(position + content) / math.log(2)", "position + content", "test_evaluation_of_a_transformer"),
    ("EOS ids count as codes", "length - len(model.config.factors)", "length",
     "test_evaluation_of_a_transformer"),
    ("samples in training mode", "model.eval()", "", "test_samples_of_a_run", "save_samples"),
    ("evaluation mode after sampling", "model.train()", "", "test_samples_of_a_run", "save_samples"),
    ("samples of one class", "max(1, len(model.config.classes))", "1", "test_samples_of_a_run"),
    ("samples without the seed", "dq.generate(model, label, options, seed, ...)",
     "dq.generate(model, label, options, ...)",
     "test_samples_of_a_run"),
    ("samples of a run without its options", "dq.generate(model, label, options, seed, ...)",
     "dq.generate(model, label, dq.SampleOptions(), seed, ...)", "test_samples_of_a_run"),
    ("samples of a run all at once", "dq.generate(model, label, options, seed, slots=batch_size)",
     "dq.generate(model, label, options, seed, slots=64)", "test_samples_of_a_run"),
    ("sampling options that prevent resuming", 'settings.pop("sampling")', 'settings["sampling"]',
     "test_checkpoints_carry_the_sampling_options_of_the_preset"),
    ("guidance without label dropout in a checkpoint", "config.classes and config.label_dropout", "config.classes",
     "test_checkpoints_carry_the_sampling_options_of_the_preset"),
    ("guidance without classes in a checkpoint", "config.classes and config.label_dropout", "config.label_dropout",
     "test_checkpoints_carry_the_sampling_options_of_the_preset"),
    ("the paper's samples from all codes", "dq.SampleOptions(top_k=300)", "dq.SampleOptions()",
     "test_sampling_options_of_presets"),
    ("toy-paper with RoPE", "dq.TransformerConfig(rotary=False)", "dq.TransformerConfig()",
     "test_the_papers_model_at_toy_size"),
    ("toy-paper with Muon", 'replace(TOY, ..., optimizer="adamw")', "replace(TOY, ...)",
     "test_the_papers_model_at_toy_size"),
    ("no note about few images", "len(train) < FEW", "False", "test_presets.py::test_few_images_are_cropped",
     "train_vae.main"),
    ("the same dropout for few images", "images < 500", "False", "test_presets.py::test_stage_2_fits_its_codes"),
    ("regions are counted, not codes", 'ratio * (vae["size"] // factor) ** 2',
     'ratio * (vae["size"] // vae["factors"][0]) ** 2', "test_presets.py::test_stage_2_counts_codes_not_regions"),
    ("transformer.pt without the PSNR", 'stored.get("psnr")', "None",
     "test_the_last_line_has_the_loss_and_the_next_command"),
    ("the limit of an evaluation ignored", "dq.numpy_rng(0).permutation(...)[:limit]",
     "dq.numpy_rng(0).permutation(...)", "test_a_limited_evaluation_takes_the_same_images"),
    ("an evaluation of the first images", "dq.numpy_rng(0).permutation(...)", "np.arange(...)",
     "test_a_limited_evaluation_takes_the_same_images", "train_transformer.evaluate"),
)

STAGE_2_MAIN = of(
    "test_wiring.py",
    ("the preset of the codes ignored", 'name in PRESETS and not name.startswith("folder")', "False",
     "test_train_transformer.py::test_the_preset_comes_with_the_codes"),
    ("odd entries of codes.pt as a traceback", "explained(...)", "torch.enable_grad()",
     "survival/test_broken.py::test_codes_with_other_entries_are_not_trained_on", "train_transformer.main"),
    ("odd entries of a checkpoint to resume as a traceback", "explained(...)", "torch.enable_grad()",
     "survival/test_broken.py::test_a_checkpoint_with_other_entries_cannot_be_resumed", "Record.begin"),
    ("codes of any version", 'stored.get("version") == 1', "True",
     "test_train_transformer.py::test_the_error_for_invalid_codes_says_what_to_do"),
    ("Muon without matrices", 'schedule.optimizer == "muon"', "False",
     "test_train_transformer.py::test_which_weights_decay"),
    ("--optimizer ignored", 'schedule.optimizer == "muon"', "True",
     "test_train_transformer.py::test_which_weights_decay"),
    ("Muon for embeddings", "[*model.position_stack.parameters(), *model.content_stack.parameters()]",
     "[*model.parameters()]", "test_train_transformer.py::test_which_weights_decay"),
    ("weights in both optimisers", "[p for p in model.parameters() if p not in {*inside}]",
     "[p for p in model.parameters()]", "test_train_transformer.py::test_which_weights_decay"),
    ("Muon's last factor alone", "factor @ product if i else factor", "factor",
     "test_train_transformer.py::test_muon_in_float32_equals_that_of_torch_up_to_rounding"),
    ("Muon's Gram matrix multiplied from one side", "factor @ gram @ factor if i else x @ x.T",
     "factor @ gram if i else x @ x.T",
     "test_train_transformer.py::test_muon_in_float32_equals_that_of_torch_up_to_rounding"),
    ("Muon without Nesterov", "muon(...)", "muon(..., nesterov=False)",
     "test_train_transformer.py::test_which_weights_decay"),
    ("Muon with another momentum", "muon(...)", "muon(..., momentum=0.9)",
     "test_train_transformer.py::test_which_weights_decay"),
    ("stage 2 with a cosine schedule", 'decay: str = "linear"', 'decay: str = "cosine"',
     "test_train_transformer.py::test_optimizer_and_decay_of_the_presets"),
    ("the paper's stage 2 without its cosine", 'TransformerSchedule(..., decay="cosine")', "TransformerSchedule(...)",
     "test_train_transformer.py::test_optimizer_and_decay_of_the_presets"),
    ("the paper's stage 2 without AdamW", 'TransformerSchedule(..., optimizer="adamw")', "TransformerSchedule(...)",
     "test_train_transformer.py::test_optimizer_and_decay_of_the_presets"),
    ("the paper's stage 2 with another weight decay", "TransformerSchedule(..., weight_decay=0.01)",
     "TransformerSchedule(..., weight_decay=0.05)", "test_vae.py::test_the_papers_presets_have_the_papers_settings"),
    ("the paper's stage 2 without dropout", "dq.TransformerConfig(..., width=1024, dropout=0.1)",
     "dq.TransformerConfig(..., width=1024)", "test_vae.py::test_the_papers_presets_have_the_papers_settings"),
    ("the paper's stage 2 with rotary", "dq.TransformerConfig(..., dropout=0.1, rotary=False)",
     "dq.TransformerConfig(..., dropout=0.1)",
     "test_vae.py::test_the_papers_presets_have_the_papers_settings"),
    ("stage 2 without gradient averaging", "distribute(torch.compile(model) if args.compile else model)",
     "torch.compile(model) if args.compile else model",
     "survival/test_processes.py::test_two_processes_compute_what_one_computes[transformer]"),
    ("gradients of stage 2 shrink with the world size", "nll[name].sum() * world", "nll[name].sum()",
     "survival/test_processes.py::test_two_processes_compute_what_one_computes[transformer]"),
    ("no weight decay", "dict(..., weight_decay=schedule.weight_decay)", "dict(..., weight_decay=0.0)",
     "test_train_transformer.py::test_which_weights_decay"),
    ("weight decay on vectors", "dict(..., weight_decay=0.0)", "dict(..., weight_decay=schedule.weight_decay)",
     "test_train_transformer.py::test_which_weights_decay"),
    ("no weight decay by Muon", "muon(..., weight_decay=schedule.weight_decay)",
     "muon(..., weight_decay=0.0)", "test_train_transformer.py::test_which_weights_decay"),
    ("betas of AdamW ignored", "torch.optim.AdamW(..., betas=schedule.betas)", "torch.optim.AdamW(...)",
     "test_train_transformer.py::test_which_weights_decay"),
    ("Muon's steps unscaled", '"match_rms_adamw"', '"original"', "test_train_transformer.py::test_which_weights_decay"),
    ("flags of the model ignored", "override(config, args)", "config", "test_every_flag_reaches_the_run",
     "train_transformer.parse"),
    ("--uncond ignored by the model", "() if args.uncond else classes", "classes", "test_every_flag_reaches_the_run"),
    ("--seed ignored by the weights of stage 2", "seed_all(args.seed)", "seed_all(0)",
     "test_the_seed_determines_the_initial_weights", "train_transformer.main"),
    ("--seed ignored by the order of stage 2", "batches(train.length.numpy(), schedule.batch_size, args.seed, ...)",
     "batches(train.length.numpy(), schedule.batch_size, 0, ...)", "test_batches_of_codes_follow_the_seed"),
    ("stage 2 is trained on validation images", '("train", "held_out")', '("held_out", "held_out")',
     "test_batches_of_codes_follow_the_seed"),
    ("stage 2 is evaluated on training images", '("train", "held_out")', '("train", "train")',
     "test_stage_2_evaluates_all_validation_images"),
    ("trained without labels", "forward(pos, code, label)", "forward(pos, code)",
     "test_batches_of_codes_follow_the_seed"),
    ("the position loss not trained", "(position + content) / codes_per_image", "content / codes_per_image",
     "test_the_gradient_of_stage_2"),
    ("the content loss not trained", "(position + content) / codes_per_image", "position / codes_per_image",
     "test_the_gradient_of_stage_2"),
    ("nats per image", "(position + content) / codes_per_image", "position + content",
     "test_the_logged_losses_of_stage_2"),
    ("nats per pair", "train.length - len(factors)", "train.length", "test_the_logged_losses_of_stage_2"),
    ("the sum over the batch", "nll[name].sum() * world / schedule.batch_size", "nll[name].sum() * world",
     "test_the_logged_losses_of_stage_2"),
    ("the mean over each part", "nll[name].sum() * world / schedule.batch_size", "nll[name].mean()",
     "test_the_logged_losses_of_stage_2"),
    ("gradients of former steps in stage 2", "optimizer.zero_grad(set_to_none=True)", "pass",
     "test_the_gradient_of_stage_2", "Schedule.update"),
    ("half of the batch in stage 2", "next(order)[rank::world].chunk(schedule.accumulate)",
     "next(order)[rank::world].chunk(schedule.accumulate)[:1]", "test_the_gradient_of_stage_2"),
    ("the learning rate of stage 2 stays", 'group["lr"] = self.learning_rate(step)', "pass",
     "test_the_optimisers_of_stage_2", "Schedule.update"),
    ("the clip of stage 2 ignored", "if self.clip: ...", "if False: ...", "test_the_gradient_of_stage_2",
     "Schedule.update"),
    ("only one of two optimisers steps", "optimizer.step", 'optimizers["optimizer"].step',
     "test_the_optimisers_of_stage_2", "Schedule.update"),
    ("logged nats as bits", "loss / math.log(2)", "loss", "test_the_logged_losses_of_stage_2"),
    ("dropout depends on earlier steps", "seed_all(args.seed, step, rank)", "pass",
     "test_each_step_has_its_own_seed"),
    ("the same dropout mask on all ranks", "seed_all(args.seed, step, rank)", "seed_all(args.seed, step)",
     "test_each_step_has_its_own_seed"),
    ("the best by position alone", 'metrics, metrics["nats_per_image"]',
     'metrics, metrics["position_nats"]',
     "survival/test_resume.py::test_the_best_checkpoint_has_the_lowest_validation_loss"),
)

# ------------------------------------------------------------------------------------------------
# sample.py


SAMPLE = of(
    "test_wiring.py",
    ("--keep without --input", "args.input or args.keep is None", "True",
     "test_common.py::test_wrong_input_gives_one_line"),
    ("--input with --grain-map", "parser.add_mutually_exclusive_group().add_argument", "parser.add_argument",
     "test_sample.py::test_a_photo_and_a_granularity_map_exclude_each_other"),
    ("--out ignored", "args.out or args.checkpoint.parent", "args.checkpoint.parent", "test_a_grid_of_samples"),
    ("an animation of any format", '(".gif", ".webp")', '(".gif", ".webp", ".jpg")',
     "test_sample.py::test_wrong_flags_are_refused_before_any_work"),
    ("an animation in a folder that does not exist", "filter(None, (args.out, args.gif, ...))",
     "filter(None, (args.out, ...))", "test_sample.py::test_animations"),
    ("two jobs with one name", 'f".{file.name}.lock"', '".sample.lock"',
     "test_sample.py::test_two_jobs_do_not_mix_their_images"),
    ("images of a larger job stay", 'args.save_dir / f"{args.n:06d}.png"', 'args.save_dir / f"{args.n + 1:06d}.png"',
     "test_images_of_a_larger_job"),
    ("a label means another class", "names.index(label)", "names.index(label) - 1", "test_flags_reach_the_sampler",
     "label_number"),
    ("class numbers out of range", "int(label) < len(names)", "int(label) <= len(names)",
     "test_common.py::test_wrong_input_gives_one_line"),
    ("numbers mean classes although classes are named by numbers", "not any(name.isdecimal() for name in names)",
     "True",
     "test_sample.py::test_a_label_is_a_name_before_it_is_a_number"),
    ("dark regions are fine", "... * layout.n_grains // 256", "layout.n_grains - 1 - ... * layout.n_grains // 256",
     "test_sample.py::test_a_bright_region_is_fine"),
    ("the granularity map is transposed", "np.asarray(grey)", "np.asarray(grey).T",
     "test_sample.py::test_a_bright_region_is_fine"),
    ("--grain-map fixes contents", "grains.new_full(..., -1)", "grains.new_full(..., 0)",
     "test_a_granularity_map_fixes_all_positions"),
    ("--keep one granularity too many", "layout.grain[pos] < keep", "layout.grain[pos] <= keep",
     "test_a_photo_fixes_its_coarse_codes"),
    ("--keep ignored", "1 if args.keep is None else args.keep", "1", "test_a_photo_fixes_its_coarse_codes"),
    ("--keep is 2 by default", "1 if ... else args.keep", "2 if ... else args.keep",
     "test_a_photo_fixes_its_coarse_codes"),
    ("the animation shows all codes from the start", "torch.tensor(steps)[:, None]",
     "torch.full((len(steps), 1), length)",
     "test_an_animation_adds_the_codes_one_by_one"),
    ("the animation shows locations without codes", "images * there", "images",
     "test_an_animation_adds_the_codes_one_by_one"),
    ("the animation lacks the last code", "int(layout.lengths(pos)) - 1", "int(layout.lengths(pos)) - 2",
     "test_an_animation_adds_the_codes_one_by_one"),
    ("--temperature ignored", "dq.SampleOptions._fields", "dq.SampleOptions._fields[1:]",
     "test_flags_reach_the_sampler"),
    ("--top-k ignored", "dq.SampleOptions._fields", '("temperature", "top_p", "cfg")', "test_flags_reach_the_sampler"),
    ("--top-p ignored", "dq.SampleOptions._fields", '("temperature", "top_k", "cfg")', "test_flags_reach_the_sampler"),
    ("--cfg ignored", "dq.SampleOptions._fields", "dq.SampleOptions._fields[:3]", "test_flags_reach_the_sampler"),
    ("options are checked too late", "dq.SampleOptions(**given).check()", "",
     "test_sample.py::test_wrong_flags_are_refused_before_any_work", "sample.load"),
    ("--label ignored", "label.fill_(label_number(args.label, classes))", "pass", "test_flags_reach_the_sampler"),
    ("samples of one class only", "max(1, len(classes))", "1", "test_flags_reach_the_sampler"),
    ("--seed ignored", "args.seed", "0", "test_flags_reach_the_sampler", "sample.main"),
    ("--batch-size ignored", "dq.generate(..., slots=args.batch_size)", "dq.generate(..., slots=64)",
     "test_flags_reach_the_sampler"),
    ("--dtype ignored by the step", "torch.bfloat16", "torch.float32", "test_flags_reach_the_sampler", "sample.main"),
    ("--compile ignored", "args.compile", "False", "test_flags_reach_the_sampler", "sample.main"),
    ("given pairs are ignored", "given and [x.expand(args.n, -1) for x in given]", "None",
     "test_a_photo_fixes_its_coarse_codes"),
    ("each batch replaces the first", "enumerate(decode(codes), n_done)", "enumerate(decode(codes))",
     "test_a_large_job_saves_what_one_batch_would"),
    ("images are saved again with each batch", "n_done = n_complete", "pass",
     "test_a_large_job_saves_what_one_batch_would"),
    ("images are enlarged", "to_picture(x, 0)", "to_picture(x)", "test_a_large_job_saves_what_one_batch_would"),
    ("captions of other classes", "enumerate(label[:n].tolist())", "enumerate(label[1:n + 1].tolist())",
     "test_a_grid_of_samples"),
    ("captions count pairs", "(code[:n] >= 0)", "(code[:n] >= -1)", "test_a_grid_of_samples"),
    ("a grid of all images", "min(n_done, 32)", "n_done", "test_a_grid_of_samples"),
    ("a stopped job draws incomplete images", "min(n_done, 32)", "min(args.n, 32)",
     "test_sample.py::test_a_stopped_job_keeps_its_complete_images"),
    ("the checkpoint's options are ignored", 'saved.get("sample_options", dict(...))', "dict(...)",
     "test_sample.py::test_options_that_are_not_given_are_those_of_the_checkpoint"),
    ("the checkpoint is read twice", "dq.load_transformer(saved, device)", "dq.load_transformer(path, device)",
     "test_sample.py::test_the_checkpoint_is_read_once"),
    ("guidance without label dropout", "bool(model.config.classes) and model.config.label_dropout > 0",
     "bool(model.config.classes)", "test_sample.py::test_no_guidance_without_a_trained_vector"),
    ("guidance without classes", "bool(model.config.classes) and model.config.label_dropout > 0",
     "model.config.label_dropout > 0", "test_sample.py::test_no_guidance_without_a_trained_vector"),
    ("--cfg of a model without guidance", "guided or options.cfg == 1", "True",
     "test_sample.py::test_no_guidance_without_a_trained_vector"),
    ("--cfg below 1 of a model without guidance", "guided or options.cfg == 1", "guided or options.cfg <= 1",
     "test_sample.py::test_no_guidance_without_a_trained_vector"),
    ("always the last checkpoint", "best.exists()", "False", "test_sample.py::test_a_folder_means_its_best_checkpoint"),
    ("class names are compared without normalisation", 'unicodedata.normalize("NFC", name)', "name",
     "test_sample.py::test_a_label_matches_in_any_unicode_normal_form"),
    ("a signal does not stop sampling", "return stop.number", "return 0",
     "test_sample.py::test_a_stopped_job_keeps_its_complete_images"),
    ("a signal loses complete images", "tqdm.write(...)", "n_complete -= n_complete % args.batch_size",
     "test_sample.py::test_a_stopped_job_keeps_its_complete_images", "save_complete"),
    ("the last images are lost", "n_complete < args.n", "True", "test_a_large_job_saves_what_one_batch_would"),
    ("images are saved at the end", "n_complete -= n_complete % args.batch_size", "n_complete = 0",
     "test_sample.py::test_images_are_saved_while_others_are_sampled"),
    ("an unknown option in a checkpoint as a traceback", "explained(...)", "torch.enable_grad()",
     "survival/test_broken.py::test_a_checkpoint_with_other_entries_cannot_be_sampled_from", "sample.load"),
    ("two jobs in one folder", 'locks.append(...)', "pass",
     "test_sample.py::test_two_jobs_do_not_mix_their_images"),
    ("no sampling while training", "lock(file.parent, ...)", "lock(file.parent)",
     "test_sample.py::test_two_jobs_do_not_mix_their_images"),
    ("every image waits for the disk", "dq.write_file(..., sync=False)", "dq.write_file(...)",
     "test_sample.py::test_no_image_is_flushed_to_disk"),
    ("samples.json without our mark", 'dict(..., written_by="dq")', "dict(...)",
     "test_sample.py::test_samples_json_describes_the_job"),
    ("sampling that cannot be stopped", "progress and progress(n_done, state.pos, state.code) or n_done == n",
     "progress and progress(n_done, state.pos, state.code) and False or n_done == n",
     "test_sample.py::test_progress_of_a_generation"),
    ("images are reported as complete too early", "state.image.min()", "state.image.max()",
     "test_sample.py::test_progress_of_a_generation"),
    ("no samples.json beside the images", 'dq.write_file(folder / "samples.json", ...)', "pass",
     "test_a_large_job_saves_what_one_batch_would"),
)

MUTANTS = [*CONFIGURATION, *ROUTING, *CODEBOOK, *NETWORKS, *SEQUENCES, *TRANSFORMER, *SAMPLING, *FILES, *PICTURES,
           *IMAGE_FILES, *PROGRAM, *TRAINING_RUN, *STAGE_1_DATA, *STAGE_1_LOSSES, *STAGE_1_FIGURES, *STAGE_1_CODES,
           *STAGE_1_MAIN,
           *STAGE_2_DATA, *STAGE_2_MAIN, *SAMPLE]


# ------------------------------------------------------------------------------------------------
# Matching and replacing fragments of code


class Place(NamedTuple):
    """An expression or a statement in the syntax tree of a source."""
    node: ast.AST
    parent: ast.AST
    field: str                           # parent.field is the node or a list of nodes
    index: int                           # its index in this list, or None
    scope: tuple                         # names of the file, the classes and the functions that contain it
    words: set                           # names and constants in it


class Sources:
    """The syntax trees of a project's sources, {path: tree}, and all places in them, {type of the node: places}."""
    def __init__(self, root):
        self.trees, self.places = {}, {}
        for path in sorted(root.glob("*.py")):
            self.trees[path] = ast.parse(path.read_text(encoding="utf-8"))
            self.add(self.trees[path], (path.stem,))

    def add(self, node, scope):
        """Add all places below a node. -> the words in it"""
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            scope = (*scope, node.name)
        found = words([node])
        for field, value in ast.iter_fields(node):
            for i, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(child, ast.AST):
                    inside = self.add(child, scope)
                    found |= inside
                    if isinstance(child, (ast.expr, ast.stmt)):
                        place = Place(child, node, field, i, scope, inside)
                        self.places.setdefault(type(child), []).append(place)
        return found

    def find(self, mutant):
        """-> the places that `old` matches, the nodes there, the code that each `...` matches, and `new`"""
        old, new = fragments(mutant)
        known = words(ast.walk(old[0]))
        for place in self.places.get(type(old[0]), []):
            inside = not mutant.where or f".{mutant.where}." in f".{'.'.join(place.scope)}."
            if inside and known <= place.words:
                holes, nodes = {}, [place.node]
                if place.index is not None:
                    nodes = getattr(place.parent, place.field)[place.index:place.index + len(old)]
                if fits(old, nodes, holes):
                    yield place, nodes, holes, new


def words(nodes):
    """Names and constants of these nodes. By them, `find` skips most places quickly."""
    values = [value for node in nodes for name, value in ast.iter_fields(node) if name != "kind"]
    return {value for value in values if isinstance(value, (str, int, float))}


def fragments(mutant):
    """-> `old` and `new` as lists of nodes: one expression each, or statements. Each `...` gets an index."""
    try:
        both = [[ast.parse(text, mode="eval").body] for text in (mutant.old, mutant.new)]
    except SyntaxError:
        both = [ast.parse(text or "pass").body for text in (mutant.old, mutant.new)]
    for nodes in both:
        holes = [x for node in nodes for x in ast.walk(node) if isinstance(x, ast.Constant) and x.value is ...]
        for i, node in enumerate(sorted(holes, key=lambda node: (node.lineno, node.col_offset))):
            node.number = i
    return both


def hole(node):
    """The index of a `...` in a fragment, None for any other node."""
    return getattr(node.value if isinstance(node, ast.Expr) else node, "number", None)


def fits(old, found, holes):
    """True if the fragment matches this code. Fills holes, {index of a `...`: the nodes that it matches}."""
    if hole(old) is not None:
        holes[hole(old)] = [found]
        return isinstance(found, ast.AST)
    if type(old) is not type(found):
        return False
    if isinstance(old, list):
        gap = next((i for i, node in enumerate(old) if hole(node) is not None), None)
        if gap is None:
            return len(old) == len(found) and all(fits(a, b, holes) for a, b in zip(old, found))
        end = len(found) - len(old[gap + 1:])
        holes[hole(old[gap])] = found[gap:end]
        return gap <= end and fits(old[:gap], found[:gap], holes) and fits(old[gap + 1:], found[end:], holes)
    if isinstance(old, ast.Call):
        names = [each.arg for each in old.keywords]
        return fits(old.func, found.func, holes) and fits(arguments(old, names), arguments(found, names), holes)
    if isinstance(old, ast.AST):
        fields = set(old._fields) - {"ctx", "kind", "type_comment"}
        return all(fits(getattr(old, name), getattr(found, name), holes) for name in fields)
    return old == found


def arguments(call, names):
    """The arguments of a call. Keyword arguments with these names come last, in the order of `names`."""
    named = {each.arg: each for each in call.keywords}
    others = [each for each in call.keywords if each.arg not in names]
    return [*call.args, *others, *(named[name] for name in names if name in named)]


def fill(new, holes):
    """The fragment `new`, with the nodes that each `...` of `old` matches."""
    if isinstance(new, list):
        return [x for node in new for x in (holes[hole(node)] if hole(node) is not None else [fill(node, holes)])]
    if hole(new) is not None:
        node, = holes[hole(new)]
        return node
    if isinstance(new, ast.AST):
        for name, value in ast.iter_fields(new):
            setattr(new, name, fill(value, holes))
        if isinstance(new, ast.Call):                                        # its `...` may match keywords too
            named = [each for each in new.args if isinstance(each, ast.keyword)]
            new.args = [each for each in new.args if each not in named]
            new.keywords = named + new.keywords
    return new


# ------------------------------------------------------------------------------------------------
# The tool


class Watch:
    """A plugin for pytest that tells a failing test from a file of tests that cannot be imported."""
    unreadable = False

    def pytest_collectreport(self, report):
        self.unreadable |= report.failed


def copy_project(root, folder):
    """Copy sources, tests and compiled files."""
    folder.mkdir()
    for path in root.iterdir():
        if path.suffix in (".py", ".toml", ".md"):
            shutil.copy2(path, folder)
        elif path.name in ("tests", "__pycache__"):
            shutil.copytree(path, folder / path.name)


def fault(mutant, sources):
    """The reason why this mutant cannot be made, in one line, or None."""
    try:
        found = [".".join(place.scope) for place, *_ in sources.find(mutant)]
    except SyntaxError as error:
        return f"{error.text.strip()!r} is not valid Python"
    if len(found) != 1:
        where = f" in {mutant.where}" if mutant.where else ""
        return f"{mutant.old!r} fits {len(found)} places{where}" + (f": {', '.join(found)}" if found else "")


def misfits(mutants, root):
    """-> {name: reason, in one line} of the mutants that cannot be made or whose test does not exist"""
    sources, found = Sources(root), {}
    tests = {path: path.read_text(encoding="utf-8") for path in (root / "tests").rglob("*.py")}
    for mutant in mutants:
        file, _, name = mutant.test.partition("[")[0].partition("::")
        if reason := fault(mutant, sources):
            found[mutant.name] = reason
        elif (f"def {name}(" if name else "def ") not in tests.get(root / "tests" / file, ""):
            found[mutant.name] = f"there is no test {mutant.test}"
    return found


def make(mutant, folder):
    sources = Sources(folder)
    (place, nodes, holes, new), = sources.find(mutant)
    new = fill(new, holes)
    if place.index is None:
        setattr(place.parent, place.field, *new)
    else:
        getattr(place.parent, place.field)[place.index:place.index + len(nodes)] = new
    path = next(path for path in sources.trees if path.stem == place.scope[0])
    path.write_text(ast.unparse(sources.trees[path]), encoding="utf-8")
    for compiled in (folder / "__pycache__").glob(f"{path.stem}.*"):
        compiled.unlink()


def run_tests(folder, tests):
    """-> the exit status of pytest, or 3 if a file of tests cannot be imported, which is not a failing test"""
    os.chdir(folder)
    sys.path[:] = [path for path in sys.path if not path.startswith(str(ROOT))]
    watch, scratch = Watch(), folder.parent / f"{os.getpid()}.tmp"
    flags = ["-x", "-q", "-p", "no:cacheprovider", "--rootdir", ".", "--basetemp", str(scratch)]
    status = pytest.main([*flags, *(f"tests/{test}" for test in tests)], plugins=[watch])
    shutil.rmtree(scratch, ignore_errors=True)
    return 3 if watch.unreadable else int(status)


def start(work, output):
    """Run work(), which returns an exit status, in a forked process. It inherits all imports, which take longer than
    most tests. output: file for its output -> process id"""
    child = os.fork()
    if child:
        return child
    status = 3
    try:
        signal.alarm(LIMIT)
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(1, 2)
        sys.stdout = sys.stderr = open(1, "w", closefd=False)
        gc.freeze()                                                          # else pytest collects garbage, slowly
        status = work()
        sys.stdout.flush()
    finally:
        os._exit(status)


def in_parallel(place, works, jobs):
    """works: {name: work} -> name, exit status, seconds and the end of the output of each, as soon as it is done"""
    waiting, running = list(works.items()), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name, work = waiting.pop(0)
            output = place / f"{len(waiting)}.txt"
            running[start(work, output)] = name, output, time.time()
        child, status = os.wait()
        name, output, since = running.pop(child)
        yield name, os.waitstatus_to_exitcode(status), time.time() - since, output.read_text(errors="replace")[-3000:]
        output.unlink()


def try_all(mutants, root, jobs):
    """-> the number of mutants that are not killed"""
    not_made = misfits(mutants, root)
    for name, reason in not_made.items():
        print(f"NOT MADE           {name}: {reason}", flush=True)
    left = len(not_made)
    mutants = {mutant.name: mutant for mutant in mutants if mutant.name not in not_made}
    files = sorted({mutant.test.split("::")[0] for mutant in mutants.values()})
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        original = place / "original"
        copy_project(root, original)
        for path in original.glob("*.py"):                                   # without comments, like the mutants
            path.write_text(ast.unparse(ast.parse(path.read_text(encoding="utf-8"))), encoding="utf-8")

        def run_unchanged(file):
            tests = {mutant.test for mutant in mutants.values() if mutant.test.split("::")[0] == file}
            return lambda: run_tests(original, sorted(tests - {file}) if file not in tests else [file])

        def run_mutant(mutant):
            def work():
                folder = place / str(os.getpid())
                copy_project(original, folder)
                make(mutant, folder)
                status = run_tests(folder, [mutant.test])
                shutil.rmtree(folder)
                return status
            return work

        for file, status, seconds, output in in_parallel(place, {file: run_unchanged(file) for file in files}, jobs):
            print(f"{'passes' if status == 0 else 'FAILS':9} {seconds:5.1f} s  {file}, unchanged", flush=True)
            if status:
                print(output)
                return len(mutants) + left
        works = {name: run_mutant(mutant) for name, mutant in mutants.items()}
        for name, status, seconds, output in in_parallel(place, works, jobs):
            verdict = {0: "SURVIVED", 1: "killed"}.get(status, "NO TEST")    # the test hangs or cannot be imported
            print(f"{verdict:9} {seconds:5.1f} s  {name}", flush=True)
            left += status != 1
            if status not in (0, 1):
                print(output)
    return left


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", nargs="+", help="run these mutants only")
    parser.add_argument("--jobs", metavar="N", type=int, default=os.cpu_count(), help="number of parallel processes")
    parser.add_argument("--list", action="store_true", help="print the table and exit")
    parser.add_argument("--fit", action="store_true", help="print the mutants that do not fit and exit")
    args = parser.parse_args(argv)
    unknown = set(args.only or ()) - {mutant.name for mutant in MUTANTS}
    if unknown:
        parser.error(f"no mutant is called {', '.join(sorted(unknown))}")
    mutants = [mutant for mutant in MUTANTS if not args.only or mutant.name in args.only]
    if args.list:
        for mutant in mutants:
            where = f"in {mutant.where}: " if mutant.where else ""
            print(f"{mutant.name}\n    {where}{mutant.old!r} becomes {mutant.new!r}\n    {mutant.test}")
        return 0
    if args.fit:
        found = misfits(mutants, ROOT)
        for name, reason in found.items():
            print(f"{name}: {reason}")
        print(f"{len(mutants) - len(found)} of {len(mutants)} fit")
        return 1 if found else 0
    import PIL.Image  # noqa: F401  (imported here once, for all forked processes)
    import torch._dynamo  # noqa: F401  (optimisers import it, which takes longest)
    left = try_all(mutants, ROOT, args.jobs)
    print(f"{len(mutants) - left} of {len(mutants)} killed")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
