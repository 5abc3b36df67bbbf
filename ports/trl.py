"""The methods in TRL's GRPOTrainer (trl 1.16). The policy that sampled weighs the tokens, once; TRL does the rest.

    config = trl.GRPOConfig(..., loss_type="dapo", beta=0.0)  # VEPO: also entropy_coef=1e-3
    VEPOTrainer(model, reward_funcs, config, train_dataset=data, processing_class=processor).train()

TRL's loss takes advantages (B, T): here a response's, times the weights of its tokens. The methods keep their
defaults. PRPO and SaEI are for Qwen-VL; VPPO is not here.
"""

import torch
from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid

import pepo
import prpo
import saei
import vepo
import vgpo
from common import compare_states, seeded
from ports.trl_base import ImageTrainer


class TokenWeights(ImageTrainer):
    """A method has `scores(rows)`, tensors (b, T), and `weights(*scores, mask)`, (B, T) of all rows of a process."""

    needs = {"importance_sampling_level": "token"}  # a ratio of sequences would lose tokens' weights

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        if self.model.training:
            mask = (batch["completion_mask"] * batch.get("tool_mask", 1)).bool()  # (B, T)
            ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)  # (B, L)
            prompt = torch.arange(len(ids)) + len(ids) * self.accelerator.process_index
            more = {"prompt": prompt // self.num_generations, "image": ids == self.model.config.image_token_id}
            rows = split_tensor_dict(split_pixel_values_by_grid(more | batch), self.args.steps_per_generation)
            self.model.eval()  # or adapters' dropout would count as dependence on the image
            with torch.no_grad(), self.accelerator.autocast():
                scores = [self.scores(unsplit_pixel_values_by_grid(part)) for part in rows]
            self.model.train()
            batch["advantages"] = batch["advantages"][:, None] * self.weights(*map(torch.cat, zip(*scores)), mask)
        return batch

    def states(self, rows, change=None):
        """Hidden states (b, L, D), embeddings to last, under `change(pixels, generator)`: one draw for a prompt."""
        ids, seen = (torch.cat([rows[f"prompt_{x}"], rows[f"completion_{x}"]], 1) for x in ("ids", "mask"))
        inputs = {"input_ids": ids, "attention_mask": seen, "output_hidden_states": True, "logits_to_keep": 1}
        inputs |= {x: rows[x] for x in ("pixel_values", "image_grid_thw", "mm_token_type_ids") if x in rows}
        if change and "pixel_values" in inputs:
            draws = (seeded(self.args.seed, self.state.global_step, self._step, i) for i in rows["prompt"].tolist())
            images = zip(split_pixel_values_by_grid(rows)["pixel_values"], draws)
            inputs["pixel_values"] = torch.cat([change(*each) if len(each[0]) else each[0] for each in images])
        return self.model(**inputs).hidden_states

    def compare(self, function, rows, *states):
        """`function(*logits)`, tensors (b, T): the distributions of the tokens, which come from the position before."""
        b, T = rows["completion_ids"].shape
        before = [x[:, -T - 1 : -1].flatten(0, 1) for x in states]
        found = compare_states(function, self.model.lm_head.weight, *before, temperature=self.temperature)
        return [x.view(b, T) for x in found]

    def with_image(self, function, rows, states):
        """`function(own, image)` of the states of each row's tokens (1, T, D) and image (1, N, D): (b, T)."""
        T = rows["completion_ids"].shape[1]
        return torch.cat([function(x[None, -T:], x[None, image]) for x, image in zip(states, rows["image"])])


class VEPOTrainer(TokenWeights):
    needs = TokenWeights.needs | {"loss_type": "dapo"}  # which divides by all tokens

    def scores(self, rows):
        scale = self.images.image_std
        noised = self.states(rows, lambda x, g: vepo.noised_pixels(x.flatten(1), scale, g, vepo.Args()).view_as(x))
        return *self.compare(vepo.divergences, rows, self.states(rows)[-1], noised[-1]), rows["image"].any(1)[:, None]

    def weights(self, jsd, entropy, noised_entropy, has_image, mask):
        scores = vepo.token_scores(jsd, entropy, noised_entropy, mask, has_image=has_image)
        chosen = vepo.select_top(scores, mask, vepo.Args.keep_ratio)
        tokens = self.accelerator.reduce(torch.stack([mask.sum(), chosen.sum()]))
        return chosen * (tokens[0] / tokens[1].clamp(min=1))


class VGPOTrainer(TokenWeights):
    needs = TokenWeights.needs | {"mask_truncated_completions": False}  # a group's responses are compared

    def scores(self, rows):
        return [self.with_image(vgpo.visual_focus, rows, self.states(rows)[-1])]

    def weights(self, focus, mask):
        compensated = vgpo.compensate(focus, mask)
        sums = self.accelerator.gather(compensated.sum(1)).view(-1, self.num_generations)  # groups may be cut
        alpha = vgpo.rollout_factors(sums).view(self.accelerator.num_processes, -1)[self.accelerator.process_index]
        return alpha[:, None] * vgpo.token_factors(compensated, mask)


class PRPOTrainer(TokenWeights):
    def scores(self, rows):
        own = self.images.image_mean, self.images.image_std
        views = [None, lambda *x: prpo.blacken(*x, *own, prpo.Args.blacken), lambda *x: prpo.add_pixel_noise(*x, *own)]
        return self.compare(prpo.divergences, rows, *(self.states(rows, view)[-1] for view in views))

    def weights(self, kl_strong, kl_weak, mask):
        return prpo.token_weights(prpo.robust_visual_dependency(kl_strong, kl_weak, mask), mask)


class PEPOTrainer(TokenWeights):
    not_for = ("qwen3_vl",)  # whose hidden_states lack, in transformers, the deep features of the image

    def scores(self, rows):
        states = self.states(rows)
        layers = [self.with_image(lambda own, v: pepo.visual_similarity([own], [v]), rows, x) for x in states]
        entropy = self.compare(lambda x: [torch.distributions.Categorical(logits=x).entropy()], rows, states[-1])
        return torch.stack(layers).mean(0), *entropy

    def weights(self, similarity, entropy, mask):
        strength = pepo.mixing_strength(self.state.global_step / self.state.max_steps)
        return (1 - strength) + strength * pepo.token_weights(similarity, entropy, mask)


class SaEITrainer(ImageTrainer):
    def changed(self, pixels, grid, ids, responses):
        def entropies(pixels):
            inputs = {"pixel_values": pixels, "image_grid_thw": grid, "num_images": [len(grid)]}
            for response in responses:
                row = torch.tensor([ids + response], device=pixels.device)
                inputs["mm_token_type_ids"] = (row == self.model.config.image_token_id).long()
                call = self.model, row, torch.ones_like(row), len(response)
                _, entropy, _ = self._get_per_token_logps_and_entropies(*call, compute_entropy=True, **inputs)
                yield entropy, torch.ones_like(entropy, dtype=torch.bool)

        return saei.attack_pixels(pixels, entropies, len(responses), self.model, self.images, saei.Args())[0]
