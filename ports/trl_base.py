"""What TRL's GRPOTrainer (trl 1.16) lacks for the methods: prompts with and without images in a batch, and sampling
half of a group from changed images."""

from itertools import groupby

import torch
import trl
from accelerate.utils import gather_object
from PIL import Image
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

import saei
from plumbing.families import unpatchify


def without_empty(model, args, inputs):
    """A forward pre-hook that drops empty tensors: TRL gives rows without an image pixel_values of length 0."""
    return args, {name: x for name, x in inputs.items() if not torch.is_tensor(x) or x.numel()}


class ImageTrainer(trl.GRPOTrainer):
    """A method may have `changed(pixels, grid, ids, responses)`, which returns other pixels (patches, C) for a prompt.

    Half of a group is sampled from those of the data; these responses, the prompt's token ids (lists), pixels and
    image_grid_thw (images, 3) are given. The other half is sampled from what is returned. Training sees the data's.
    """

    changed = None
    needs, not_for = {}, ()  # settings that a method needs, and types of models that it would train in another way

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        unmet = [f"{name}={value!r}" for name, value in self.needs.items() if getattr(self.args, name) != value]
        if unmet or self.model.config.model_type.startswith(self.not_for):
            raise ValueError(f"{type(self).__name__} needs {', '.join(unmet) or f'a model that is no {self.not_for}'}.")
        odd = self.num_generations % 2 or self.args.generation_batch_size // self.accelerator.num_processes % 2
        corrected = self.use_vllm and self.vllm_importance_sampling_correction  # would weigh the changed half otherwise
        if self.changed and (odd or corrected or self.tools or self.rollout_func):
            raise ValueError("SaEI: even groups, batches; no tools, rollout_func, vllm_importance_sampling_correction.")
        self.images = self.processing_class.image_processor
        self.log_multimodal = False  # or processes would wait for one that has no image in a batch
        self.processing_class.tokenizer.padding_side = "left"  # or TRL would misplace image tokens
        for model in filter(None, (self.model, self.ref_model)):
            model.register_forward_pre_hook(without_empty, with_kwargs=True)

    def _generate(self, prompts):
        *found, images, tool_images = super()._generate(prompts)
        return *found, images and [x or [] for x in images], tool_images  # TRL's None fails next to images

    def _generate_and_score_completions(self, inputs):
        listed = [x.get("images") or [image for image in [x.get("image")] if image] for x in inputs]  # None fails, too
        return super()._generate_and_score_completions([x | {"images": y} for x, y in zip(inputs, listed)])

    def _generate_single_turn(self, ids, images, fields, G, *more):
        if not (self.changed and self.model.training):
            return super()._generate_single_turn(ids, images, fields, G, *more)
        images, first = [*(images or [None] * len(ids))], len(ids) * self.accelerator.process_index
        fields = {name: x if isinstance(x, list) else torch.as_tensor(x) for name, x in fields.items()}
        rows = split_pixel_values_by_grid(fields | {"num_images": [len(x or []) for x in images]})

        def half(i):
            return ids[i::2], images[i::2], unsplit_pixel_values_by_grid({x: rows[x][i::2] for x in fields}), G // 2

        clean = super()._generate_single_turn(*half(0))
        responses = gather_object(clean[0])  # of all processes: groups may be cut
        self.model.eval()  # without the dropout of adapters
        for group, places in groupby(range(1, len(ids), 2), lambda i: (first + i) // G):
            places = [*places]
            if images[places[0]]:
                given = [rows[x][places[0]].to(self.accelerator.device) for x in ("pixel_values", "image_grid_thw")]
                pixels = self.changed(*given, ids[places[0]], responses[group * G // 2 : (group + 1) * G // 2])
                parts = unpatchify(saei.to_pixels(pixels, self.images)[0], given[1], self.images)
                pil = [Image.fromarray((255 * x).round().byte().permute(1, 2, 0).cpu().numpy()) for x in parts]
                for i in places:
                    rows["pixel_values"][i], images[i] = pixels, pil  # vLLM takes these
        self.model.train()
        attacked = super()._generate_single_turn(*half(1))
        return [a and [x for pair in zip(a, b) for x in pair] for a, b in zip(clean, attacked)]
