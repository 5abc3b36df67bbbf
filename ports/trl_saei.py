"""SaEI in TRL's GRPOTrainer (trl 1.16), for the Qwen-VLs: half of a group is sampled from the attacked image.

    SaEITrainer(model, reward_funcs, config, train_dataset=data, processing_class=processor).train()

The attack keeps its defaults. Its entropy is the mean over the clean responses of the group on the same process.
"""

import copy
from itertools import groupby

import torch
import trl
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from trl.data_utils import prepare_multimodal_messages

import saei
from common import aggregate
from ports.trl import TokenWeights


class SaEITrainer(TokenWeights):
    """Every second response of a group sees the attacked image; training sees the clean one."""

    _generate_and_score_completions = trl.GRPOTrainer._generate_and_score_completions  # every token weighs 1

    def _generate(self, prompts):
        if not self.model.training:
            return super()._generate(prompts)
        start, G = len(prompts) * self.accelerator.process_index, self.num_generations
        if len(prompts) % 2 or G % 2:
            raise ValueError("SaEI: num_generations and the responses that a process samples must be even.")
        clean, attacked = super()._generate(prompts[::2]), []
        for _, half in groupby(range(len(prompts) // 2), lambda i: (start + 2 * i) // G):
            half = [*half]
            attacked += [self.attack(prompts[2 * half[0]], clean, half)] * len(half)
        both = zip(clean[:5], super()._generate(attacked)[:5])
        merged = [a and [x for pair in zip(a, b) for x in pair] for a, b in both]
        return *merged, clean[5], None, clean[7]  # None: training takes the images of the data

    def attack(self, prompt, clean, half):
        """The prompt, its images one step up the entropy of the middle third of its `half` of the clean responses."""
        prompt = prepare_multimodal_messages(copy.deepcopy(prompt))
        parts = [part for message in prompt for part in message["content"] if part["type"] == "image"]
        if not parts:
            return prompt
        processor, G = self.images, len(half)
        made = processor([part["image"] for part in parts], return_tensors="pt").to(self.accelerator.device)
        grids = made["image_grid_thw"]
        cut = made["pixel_values"].split(grids.prod(1).tolist())
        leaves = [saei.unpatchify(x, grid, processor).requires_grad_() for x, grid in zip(cut, grids)]
        texts = [torch.tensor(clean[0][i] + clean[1][i], device=grids.device) for i in half]  # prompt and response
        ids = pad_sequence(texts, batch_first=True, padding_value=-1)  # (G, L)
        mask = ids[:, len(clean[0][half[0]]) :] >= 0  # (G, T)
        fields = {
            "pixel_values": torch.cat([saei.patchify(x, processor) for x in leaves]).repeat(G, 1),
            "image_grid_thw": grids.repeat(G, 1),
            "mm_token_type_ids": (ids == self.model.config.image_token_id).long(),
            "num_images": [len(parts)] * G,
        }
        inputs = self.model, ids.clamp(min=0), (ids >= 0).long(), mask.shape[1]
        _, entropy, _ = self._get_per_token_logps_and_entropies(*inputs, compute_entropy=True, **fields)
        H = aggregate(entropy, saei.middle_third(entropy.detach(), mask), "sequence", G)
        for part, leaf, gradient in zip(parts, leaves, torch.autograd.grad(H, leaves)):
            pixels = 255 * saei.adversarial_step(leaf.detach(), gradient)
            part["image"] = Image.fromarray(pixels.round().byte().permute(1, 2, 0).cpu().numpy())
        return prompt
