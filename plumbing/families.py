"""What differs between model families, side by side: Qwen-VL (2, 2.5 and 3) and InternVL3.

Everywhere else both have `pixel_values` (patches, 3 x 2 x p x p), a row for each patch, the image in it twice, and
`image_grid_thw` (images, 3): 1, rows, columns. InternVL stretches an image over a canvas of square tiles, and adds
the whole once more as a thumbnail of one tile, unless the canvas is one tile: canvas and thumbnail are two images, of
which the tower takes the first copy, cut into tiles. Not here: what the methods do to patches.
"""

import json
from pathlib import Path
from types import MethodType

import torch
from torch.nn.functional import linear, unfold
from transformers import vision_utils
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from transformers.utils import cached_file

from plumbing import kernels
from plumbing.arguments import UserError

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl with qwen2", "internvl with qwen3"]


def is_internvl(config):
    return config.model_type == "internvl"


def known_family(name, config):
    """The configuration of a known family, with InternVL's head as it is. Raises UserError for another."""
    what = config.model_type + (f" with {config.text_config.model_type}" if is_internvl(config) else "")
    if what not in FAMILIES:
        raise UserError(f"--model {name} is {what}; use one of {', '.join(FAMILIES)}.")
    if is_internvl(config):  # transformers' default is a tied head, and the hub's files do not contradict it
        config.tie_word_embeddings &= config.text_config.tie_word_embeddings
    return config


def patch_attention(model):
    """Changes a model in place, and returns it.

    Patches are embedded by a matrix product. Qwen-VL's tower gets kernels.py's `window_attention`, and positions that
    are computed on the host. InternVL3's rotary frequencies are fixed: transformers would change them in rows longer
    than data.py allows, and wait for the GPU at each token to see.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
            module.forward = MethodType(patch_product, module)
    if is_internvl(model.config):
        model.model.language_model.rotary_emb.rope_type = "default"
        model.model.vision_tower._output_capturing_hooks_installed = True  # they do not compile
    else:  # registered in kernels.py; as attn_implementation=..., transformers would look for a flash-attn package
        model.model.visual.config._attn_implementation = "flash_windows"
        model.model.visual.register_forward_pre_hook(places_of_patches, with_kwargs=True)
    return model


def places_of_patches(tower, args, inputs):
    """A forward pre-hook: positions, windows and interpolation weights of patches, computed on the host from the grid.

    Qwen-VL's tower would read the grid from the GPU, and the host would wait for it.
    """
    grid, config = inputs["grid_thw"], tower.config
    made = {"position_ids": vision_utils.get_vision_position_ids(grid, config.spatial_merge_size)}
    made["cu_seqlens"] = vision_utils.get_vision_cu_seqlens(grid)
    if hasattr(config, "window_size"):
        window = {name: getattr(config, name) for name in ("spatial_merge_size", "window_size", "patch_size")}
        made["window_index"], made["cu_window_seqlens"] = vision_utils.get_vision_window_index(grid, **window)
    if hasattr(tower, "interpolation_mode"):
        table = tower.num_grid_per_side, tower.interpolation_mode, tower.interpolation_align_corners
        found = vision_utils.get_vision_interpolation_indices_and_weights(grid, *table, config.spatial_merge_size)
        made["interp_indices"], made["interp_weights"] = found
    longest = {"max_seqlen": "cu_seqlens", "max_window_seqlen": "cu_window_seqlens"}
    longest = {name: int(made[ends].diff().max()) for name, ends in longest.items() if ends in made}
    sent = {name: kernels.send(value, args[0].device) for name, value in made.items()}
    return args, {**inputs, **longest, **sent}


def patch_product(conv, pixels):
    """A convolution whose stride is its kernel, as one matrix product: pixels (N, C, ...) -> (N, D, patches).

    torch's own in bf16 is 10 to 1,000 times slower on several GPUs (pytorch #174051, #166122).
    """
    if isinstance(conv, torch.nn.Conv3d):  # Qwen-VL's pixels come patch by patch
        columns = pixels.flatten(1)[:, None]  # (N, 1, C x 2 x p x p)
    else:
        columns = unfold(pixels, conv.kernel_size, stride=conv.stride).transpose(1, 2)  # (N, patches, C x p x p)
    return linear(columns, conv.weight.flatten(1), conv.bias).transpose(1, 2)


def vision(model):
    """(the modules that make an image's tokens, the layers of the tower)."""
    if is_internvl(model.config):
        return [model.model.vision_tower, model.model.multi_modal_projector], model.model.vision_tower.encoder.layer
    return [model.model.visual], model.model.visual.blocks  # what joins it to the decoder is inside


def compile_layers(model):
    """Compiles each decoder layer and each layer of the tower; hooks (FSDP2's, common.py's) stay outside.

    To be called after sharding: FSDP2 replaces a layer's class, where transformers looks up whether to checkpoint.
    """
    for layer in [*vision(model)[1], *model.model.language_model.layers]:
        layer.forward = kernels.compiled(layer.forward, model.device)


def unpatchify(patches, image_grid_thw, image_processor):
    """The images (3, H, W) of patches (patches, 3 x 2 x p x p) that lie as in pixel_values, in groups of m x m."""
    internvl = hasattr(image_processor, "crop_to_patches")  # its patches lie row by row, and are all of 14 pixels
    p, m = (14, 1) if internvl else (image_processor.patch_size, image_processor.merge_size)
    images = []
    for image, (_, h, w) in zip(patches.split(image_grid_thw.prod(1).tolist()), image_grid_thw.tolist()):
        cut = image.view(h // m, w // m, m, m, 3, 2, p, p)[:, :, :, :, :, 0]
        images.append(cut.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, h * p, w * p))
    return images


def tile_side(config):
    """Patches along the side of InternVL's tiles."""
    return config.vision_config.image_size[0] // config.vision_config.patch_size[0]


def limit_pixels(config, processor, min_pixels=None, max_pixels=None):
    """Sets between how many pixels an image is resized to; None keeps the image processor's own. Returns both limits.

    InternVL's are rounded down to whole tiles, which transformers calls patches there; its thumbnail is not counted.
    Raises UserError for an empty range, and for InternVL's processor of another size of tiles.
    """
    own, tile = processor.image_processor, 1
    if is_internvl(config):
        side = config.vision_config.image_size
        if [own.size["height"], own.size["width"]] != [*side]:  # transformers would interpolate the tower's positions
            raise UserError("the image processor of --model is not made for its vision tower: take a whole copy of it.")
        tile = side[0] ** 2
        low, high = max(tile, min_pixels or tile * own.min_patches), max_pixels or tile * own.max_patches
        own.min_patches, own.max_patches = low // tile, high // tile
    else:
        size = dict(own.size)
        low, high = min_pixels or size["shortest_edge"], max_pixels or size["longest_edge"]
        own.size = {**size, "shortest_edge": low, "longest_edge": high}
    if low > high:
        raise UserError(f"--max_pixels {high} is below {low}, the least by --min_pixels or the model: raise it.")
    return low // tile * tile, high // tile * tile


def pixel_settings(image_processor, saved):
    """{name: value} of the limits that `limit_pixels` sets, as a `saved` image processor, a dict, names them."""
    if hasattr(image_processor, "crop_to_patches"):
        return {name: getattr(image_processor, name) for name in ("min_patches", "max_patches")}
    least, most = image_processor.size["shortest_edge"], image_processor.size["longest_edge"]
    older_names = {name: value for name, value in (("min_pixels", least), ("max_pixels", most)) if name in saved}
    return {"size": {"shortest_edge": least, "longest_edge": most}} | older_names


PROCESSOR_FILES = ["processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"]
PROCESSOR_FILES += ["chat_template.jinja", "chat_template.json", "tokenizer.json", "tokenizer_config.json"]
PROCESSOR_FILES += ["special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"]


def processor_files(source, revision, image_processor):
    """{name: text} of the files of a model's processor: its own, but for the pixel limits, which are the run's.

    transformers would save a processor that was loaded without torchvision such that it opens only without.
    """
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    found = {name: cached_file(source, name, revision=revision, **quiet) for name in PROCESSOR_FILES}
    files = {name: Path(path).read_text() for name, path in found.items() if path}
    for name in ("preprocessor_config.json", "processor_config.json"):
        saved = json.loads(files.get(name, "{}"))
        images = saved if name == "preprocessor_config.json" else saved.get("image_processor")
        if images:
            images |= pixel_settings(image_processor, images)
            files[name] = json.dumps(saved, indent=2) + "\n"
    return files


def prompt_tensors(model, own, made, images):
    """(position_ids, pixel_values, image_grid_thw) of a prompt that a processor made, its image processor being `own`.

    Positions (3, Lp), temporal, height and width, or InternVL's (1, Lp); the others None where there is no image.
    """
    if not is_internvl(model.config):
        kinds, grid = made["mm_token_type_ids"], made.get("image_grid_thw")
        positions, _ = model.model.get_rope_index(made["input_ids"], kinds, image_grid_thw=grid)
        return positions[:, 0], made.get("pixel_values"), grid
    positions = torch.arange(made["input_ids"].shape[1])[None]
    if not images:
        return positions, None, None
    grid, side, tile = [], tile_side(model.config), (own.size["height"], own.size["width"])
    for image in images:
        size = image.height, image.width
        columns, rows = get_optimal_tiled_canvas(size, tile, own.min_patches, own.max_patches)
        grid += [[1, rows * side, columns * side], [1, side, side]][: 1 + (rows * columns > 1)]
    grid = torch.tensor(grid)
    return positions, patches_of(model.config, made["pixel_values"], grid), grid


def image_inputs(model, prompts):
    """All prompts' images, one after the other, as the model's arguments; nothing where there are none."""
    prompts = [x for x in prompts if x.image_grid_thw is not None]
    if not prompts:
        return {}
    pixels = torch.cat([kernels.send(x.pixel_values, model.device) for x in prompts])  # or made there by a method
    grid = torch.cat([x.image_grid_thw for x in prompts])
    if not is_internvl(model.config):
        return {"pixel_values": pixels, "image_grid_thw": grid}
    side, p, tiles = tile_side(model.config), model.config.vision_config.patch_size[0], []
    for image, (_, h, w) in zip(pixels.split(grid.prod(1).tolist()), grid.tolist()):
        cut = image.view(h // side, side, w // side, side, 3, 2, p, p)[..., 0, :, :].permute(0, 2, 4, 1, 5, 3, 6)
        tiles.append(cut.reshape(-1, 3, side * p, side * p))
    return {"pixel_values": torch.cat(tiles)}


def patches_of(config, pixel_values, grid):
    """The model's argument pixel_values back as patches: InternVL's tiles (tiles, 3, H, W), side by side again."""
    if not is_internvl(config):
        return pixel_values
    side, p, patches = tile_side(config), config.vision_config.patch_size[0], []
    for tiles, (_, h, w) in zip(pixel_values.split((grid.prod(1) // side**2).tolist()), grid.tolist()):
        laid = tiles.view(h // side, w // side, 3, side, p, side, p).permute(0, 3, 1, 5, 2, 4, 6)
        patches.append(laid.reshape(h * w, 3, 1, p * p).expand(-1, -1, 2, -1).flatten(1))
    return torch.cat(patches)


def patch_places(config, grid):
    """The number of the image area that each patch shows, (patches,), so that canvas and thumbnail change together.

    InternVL: with a canvas of 2 x 3 tiles, 2 x 3 patches of it share their area with one patch of the thumbnail.
    Others: slice(None), each patch is its own area.
    """
    if grid is None or not is_internvl(config):
        return slice(None)
    found, count, side = [], 0, tile_side(config)
    for _, h, w in grid.tolist():
        tile = torch.arange(count, count + side**2).view(side, side)
        found.append(tile.repeat_interleave(h // side, 0).repeat_interleave(w // side, 1).flatten())
        count += side**2 * (h == w == side)  # a thumbnail, or a canvas of one tile, is an image's last
    return torch.cat(found)


def grey_image(model):
    """Runs the tower on a grey image, for a row that has none; returns the sum of its outputs.

    Sharded weights are gathered by all processes together and in one order, and another process may have an image.
    """
    tower = model.config.vision_config
    if is_internvl(model.config):
        inputs = {"pixel_values": torch.zeros(1, 3, *tower.image_size, device=model.device)}
    else:
        m, values = tower.spatial_merge_size, tower.in_channels * tower.temporal_patch_size * tower.patch_size**2
        inputs = {"pixel_values": torch.zeros(m * m, values, device=model.device)}
        inputs["image_grid_thw"] = torch.tensor([[1, m, m]])
    out = model.model.get_image_features(**inputs)
    return sum(part.sum() for part in [*out.pooler_output, *(getattr(out, "deepstack_features", None) or [])])


def largest_image(config, pixels, tokens):
    """Tokens in the tower of the largest image: of so many pixels; None: that a prompt of so many tokens can hold."""
    tower = config.vision_config
    if not is_internvl(config):
        return pixels // tower.patch_size**2 if pixels else tokens * tower.spatial_merge_size**2
    tiles = pixels // tower.image_size[0] ** 2 if pixels else tokens // config.image_seq_length - 1  # less a thumbnail
    return (tiles + 1 if tiles > 1 else 1) * (tile_side(config) ** 2 + 1)  # a class token for each
