"""What TRL's GRPOTrainer (trl 1.16) lacks for the methods: prompts with and without images in a batch, and sampling
half of a group from changed images."""

from itertools import groupby

import torch
import trl
from PIL import Image
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

import saei
from plumbing.families import unpatchify


def without_empty(model, args, inputs):
    """A forward pre-hook: rows that have no image, alone in a part of a batch, come with pixel_values of length 0."""
    return args, {name: x for name, x in inputs.items() if not torch.is_tensor(x) or len(x)}


class ImageTrainer(trl.GRPOTrainer):
    """A method may have `changed(pixels, grid, ids, responses)`: other pixels for every second response of a group.

    They are sampled after the others, which it is given; all are trained on the images of the data. For Qwen-VL.
    """

    changed, needs = None, {}  # settings without which something else would be trained

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name, value in self.needs.items():
            if getattr(self.args, name) != value:
                raise ValueError(f"{type(self).__name__} needs {name}={value!r}.")
        self.images = self.processing_class.image_processor
        self.processing_class.tokenizer.padding_side = "left"  # or TRL would misplace image tokens
        for model in filter(None, (self.model, self.ref_model)):
            model.register_forward_pre_hook(without_empty, with_kwargs=True)

    def _generate(self, prompts):
        *found, images, tool_images = super()._generate(prompts)
        return *found, images and [x or [] for x in images], tool_images  # TRL's None fails next to images

    def _generate_and_score_completions(self, inputs):
        inputs = [x | {"images": x["images"] or []} if "images" in x else x for x in inputs]  # as None in all rows does
        return super()._generate_and_score_completions(inputs)

    def _generate_single_turn(self, ids, images, fields, G, *more):
        if not (self.changed and self.model.training):
            return super()._generate_single_turn(ids, images, fields, G, *more)
        if G % 2 or len(ids) % 2 or self.tools:
            raise ValueError("SaEI: num_generations and the responses of a process must be even, without tools.")
        images, first = [*(images or [None] * len(ids))], len(ids) * self.accelerator.process_index
        fields = {name: x if isinstance(x, list) else torch.as_tensor(x) for name, x in fields.items()}
        rows = split_pixel_values_by_grid(fields | {"num_images": [len(x or []) for x in images]})

        def half(i):
            return ids[i::2], images[i::2], unsplit_pixel_values_by_grid({x: rows[x][i::2] for x in fields}), G // 2

        clean = super()._generate_single_turn(*half(0))
        self.model.eval()  # without the dropout of adapters
        for _, group in groupby(range(0, len(ids), 2), lambda i: (first + i) // G):  # groups may be cut
            group = [*group]
            if images[group[0]]:
                given = [rows[x][group[0]].to(self.accelerator.device) for x in ("pixel_values", "image_grid_thw")]
                pixels = self.changed(*given, ids[group[0]], [clean[0][i // 2] for i in group])
                parts = unpatchify(saei.to_pixels(pixels, self.images)[0], given[1], self.images)
                pictures = [Image.fromarray((255 * x).round().byte().permute(1, 2, 0).cpu().numpy()) for x in parts]
                for i in group:
                    rows["pixel_values"][i + 1], images[i + 1] = pixels, pictures  # vLLM takes these
        self.model.train()
        attacked = super()._generate_single_turn(*half(1))
        return [a and [x for pair in zip(a, b) for x in pair] for a, b in zip(clean, attacked)]
