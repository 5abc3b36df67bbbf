"""What differs between model families, side by side: Qwen-VL (2, 2.5 and 3) and InternVL3.

Everywhere else a picture is the same for both: `pixel_values` (patches, 3 x time x p x p), a row for each patch of the
vision tower, and `image_grid_thw` (pictures, 3), how they stand. InternVL stretches a picture over a canvas of square
tiles, and adds the whole once more as a thumbnail of one tile, where it is not one tile already: canvas and thumbnail
are two pictures here, and are cut into tiles where the tower takes them. Not here: what a method does to patches.
"""

import math

import torch
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from plumbing.commandline import UserError

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"]
DECODERS = ["qwen2", "qwen3"]  # InternVL's: of others, attention may have more to it than scores and a softmax


def is_internvl(config):
    return config.model_type == "internvl"


def refuse_family(name, config):
    """Raises UserError for a model of another family."""
    what = config.model_type
    if is_internvl(config) and config.text_config.model_type not in DECODERS:
        what = f"internvl with a {config.text_config.model_type} decoder"
    if what not in FAMILIES:
        usable = f"{', '.join(FAMILIES)} (InternVL with a {' or '.join(DECODERS)} decoder, its name ends with -hf)"
        raise UserError(f"--model {name} is {what}; use one of {usable}.")


def vision(model):
    """The modules that make a picture's tokens, the tower first, and the tower's layers."""
    if is_internvl(model.config):
        tower = model.model.vision_tower
        return [tower, model.model.multi_modal_projector], tower.encoder.layer
    return [model.model.visual], model.model.visual.blocks  # what joins it to the decoder is inside


def patch_shape(pictures):
    """(p, m, time) of an image processor: a patch's side in pixels, a token's in patches, and the times it is there."""
    if hasattr(pictures, "crop_to_patches"):
        return 14, 1, 1  # every InternVL's; the four patches of a token do not stand together
    return pictures.patch_size, pictures.merge_size, pictures.temporal_patch_size


def tile_side(config):
    """Patches of the side of InternVL's tiles."""
    return config.vision_config.image_size[0] // config.vision_config.patch_size[0]


def limit_pixels(config, pictures, least=None, most=None):
    """Sets the area of a picture after resizing, None: as it is; returns both. Raises UserError for an empty range.

    InternVL's is one of whole tiles, of one at least, and its thumbnail is not counted.
    """
    if is_internvl(config):
        tile = pictures.size["height"] * pictures.size["width"]
        if most and most < tile:
            raise UserError(f"--max_pixels {most} is less than one tile of this model, {tile} pixels: raise it.")
        pictures.crop_to_patches = True
        pictures.min_patches = max(1, least // tile) if least else pictures.min_patches
        pictures.max_patches = most // tile if most else pictures.max_patches
        limits = tile * pictures.min_patches, tile * pictures.max_patches
    else:
        limits = least or pictures.size["shortest_edge"], most or pictures.size["longest_edge"]
        pictures.size = dict(pictures.size) | dict(zip(("shortest_edge", "longest_edge"), limits))
    if limits[0] > limits[1]:
        raise UserError(f"pictures of {limits[0]} to {limits[1]} pixels: set --min_pixels too.")
    return limits


def prompt_tensors(model, pictures, made, sizes):
    """Of what a processor made of a prompt with pictures of these (height, width): positions, patches, and their grid.

    position_ids (3, Lp), temporal, height and width, or InternVL's (1, Lp); the others None where there is no picture.
    """
    positions, grid = torch.arange(made["input_ids"].shape[1])[None], []
    if not is_internvl(model.config):
        if not sizes:
            return positions.expand(3, -1), None, None
        kinds, grid = made["mm_token_type_ids"], made["image_grid_thw"]
        positions, _ = model.model.get_rope_index(made["input_ids"], kinds, image_grid_thw=grid)
        return positions[:, 0], made["pixel_values"], grid
    if not sizes:
        return positions, None, None
    tile, side = (pictures.size["height"], pictures.size["width"]), tile_side(model.config)
    for size in sizes:
        columns, rows = get_optimal_tiled_canvas(size, tile, pictures.min_patches, pictures.max_patches)
        grid += [[1, rows * side, columns * side]] + [[1, side, side]] * (rows * columns > 1)
    return positions, patches_of(model.config, made["pixel_values"], grid := torch.tensor(grid)), grid


def picture_inputs(model, prompts):
    """All prompts' pictures, one after the other, as the model's arguments; nothing where there are none."""
    prompts = [p for p in prompts if p.image_grid_thw is not None]
    if not prompts:
        return {}
    pixels = torch.cat([p.pixel_values.to(model.device) for p in prompts])  # a method may have made some there
    grid = torch.cat([p.image_grid_thw for p in prompts])
    if not is_internvl(model.config):
        return {"pixel_values": pixels, "image_grid_thw": grid.to(model.device)}
    side, p, tiles = tile_side(model.config), math.isqrt(pixels.shape[1] // 3), []
    for picture, (_, h, w) in zip(pixels.split(grid.prod(1).tolist()), grid.tolist()):
        cut = picture.view(h // side, side, w // side, side, 3, p, p).permute(0, 2, 4, 1, 5, 3, 6)
        tiles.append(cut.reshape(-1, 3, side * p, side * p))
    return {"pixel_values": torch.cat(tiles)}


def patches_of(config, pixel_values, grid):
    """The model's argument pixel_values back as patches: InternVL's tiles (tiles, 3, H, W), side by side again."""
    if not is_internvl(config):
        return pixel_values
    side, patches = tile_side(config), []
    for tiles, (_, h, w) in zip(pixel_values.split((grid.prod(1) // side**2).tolist()), grid.tolist()):
        p = tiles.shape[2] // side
        laid = tiles.view(h // side, w // side, 3, side, p, side, p).permute(0, 3, 1, 5, 2, 4, 6)
        patches.append(laid.reshape(h * w, 3 * p * p))
    return torch.cat(patches)


def patch_places(config, grid):
    """(patches,) of a prompt's pictures, which place each patch shows, from 0 on; None: each shows its own.

    A patch of InternVL's thumbnail is a block of the canvas's: with a canvas of 2 x 3 tiles, of 2 x 3 patches.
    """
    if grid is None or not is_internvl(config):
        return None
    found, count, side = [], 0, tile_side(config)
    for _, h, w in grid.tolist():
        row, column = torch.arange(h) // (h // side), torch.arange(w) // (w // side)
        found.append((count + row[:, None] * side + column).flatten())
        count += side**2 * (h == w == side)  # a thumbnail, or a canvas of one tile, is a picture's last
    return torch.cat(found)


def grey_picture(model):
    """A sum over the vision tower's outputs for a grey picture, for rows without one, before the text model runs.

    Sharded weights are gathered by all processes together and in one order: where one has a picture, all run the tower.
    """
    shape = model.config.vision_config
    if is_internvl(model.config):
        inputs = {"pixel_values": torch.zeros(1, 3, *shape.image_size)}
    else:
        m, values = shape.spatial_merge_size, shape.in_channels * shape.temporal_patch_size * shape.patch_size**2
        inputs = {"pixel_values": torch.zeros(m * m, values), "image_grid_thw": torch.tensor([[1, m, m]])}
    out = model.model.get_image_features(**{name: value.to(model.device) for name, value in inputs.items()})
    return sum(part.sum() for part in [*out.pooler_output, *(getattr(out, "deepstack_features", None) or [])])


def vision_sizes(config, pixels, tokens):
    """(patches, depth, D, MLP) of the vision tower at the most: for pictures of so many pixels, or None: of tokens."""
    shape = config.vision_config
    if is_internvl(config):
        patches = tile_side(config) ** 2
        tiles = pixels // math.prod(shape.image_size) if pixels else tokens // config.image_seq_length
        tiles += tiles > 1 and bool(pixels)  # the thumbnail
        return tiles * (patches + 1), shape.num_hidden_layers, shape.hidden_size, shape.intermediate_size
    patches = pixels // shape.patch_size**2 if pixels else tokens * shape.spatial_merge_size**2
    D = getattr(shape, "embed_dim", None) or shape.hidden_size
    return patches, shape.depth, D, getattr(shape, "intermediate_size", 4 * D)
