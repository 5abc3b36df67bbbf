"""What differs between model families, side by side: Qwen-VL (2, 2.5 and 3) and InternVL3.

Everywhere else a picture is the same for both: `pixel_values` (patches, 3 x time x p x p), a row for each patch of the
vision tower, and `image_grid_thw` (pictures, 3), their rows and columns. InternVL stretches a picture over a canvas of
square tiles, and adds the whole once more as a thumbnail of one tile, unless the canvas is one tile: canvas and
thumbnail are two pictures here, and cut into tiles where the tower takes them. Not here: what is done to patches.
"""

import math

import torch
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from plumbing.commandline import UserError

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"]
DECODERS = ["qwen2", "qwen3"]  # InternVL's: of others, attention may have more to it than scores and a softmax


def is_internvl(config):
    return config.model_type == "internvl"


def known_family(name, config):
    """The configuration of a known family. Raises UserError for another.

    InternVL's files on the hub do not say that the head is its own, and transformers would take it for the embeddings.
    """
    what = config.model_type
    if is_internvl(config):
        config.tie_word_embeddings &= config.text_config.tie_word_embeddings
        if config.text_config.model_type not in DECODERS:
            what = f"internvl with a {config.text_config.model_type} decoder"
    if what not in FAMILIES:
        usable = f"{', '.join(FAMILIES)} (InternVL with a {' or '.join(DECODERS)} decoder, its name ends with -hf)"
        raise UserError(f"--model {name} is {what}; use one of {usable}.")
    return config


def note_head(model):
    """Writes into the model's configuration, which is saved with it, whether its head is the embeddings."""
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = tied


def refuse_more_positions(config, tokens):
    """Raises UserError for longer rows than a model is used for here whose frequencies grow with them: InternVL3."""
    text = config.text_config
    if text.rope_parameters.get("rope_type") == "dynamic" and tokens > text.max_position_embeddings:
        raise UserError(
            f"{tokens} tokens of the longest prompt and its response are more than the model's "
            f"{text.max_position_embeddings} positions: lower --max_prompt_tokens or --max_response_tokens."
        )


def vision(model):
    """The modules that make a picture's tokens, the tower first, and the tower's layers."""
    if is_internvl(model.config):
        tower = model.model.vision_tower
        return [tower, model.model.multi_modal_projector], tower.encoder.layer
    return [model.model.visual], model.model.visual.blocks  # what joins it to the decoder is inside


def patch_shape(image_processor):
    """(p, m, time): pixels of a patch's side; patches of a token's side that stand together in pixel_values; how often
    a still picture is repeated."""
    if hasattr(image_processor, "crop_to_patches"):
        return 14, 1, 1  # every InternVL's, whose patches stand row by row, though a token is 2 x 2 of them
    return image_processor.patch_size, image_processor.merge_size, image_processor.temporal_patch_size


def tile_side(config):
    """Patches of the side of InternVL's tiles."""
    return config.vision_config.image_size[0] // config.vision_config.patch_size[0]


def limit_pixels(config, processor, least=None, most=None):
    """Sets between how many pixels a picture is resized to; None keeps the image processor's own. Returns both.

    InternVL's are rounded down to whole tiles, one at least, which transformers calls patches there; its thumbnail is
    not counted. Raises UserError for an empty range, and for a processor that is not this model's.
    """
    own, shape = processor.image_processor, config.vision_config
    size, fits = dict(own.size), "shortest_edge" in own.size
    if is_internvl(config):
        tile, tokens = [size.get("height"), size.get("width")], getattr(processor, "image_seq_length", None)
        fits = [tile, tokens, shape.patch_size[0]] == [list(shape.image_size), config.image_seq_length, 14]
        fits = fits and hasattr(own, "crop_to_patches") and tile[0] == tile[1]
    if not fits:
        raise UserError("the image processor of --model is not made for its vision tower: take a whole copy of it.")
    if is_internvl(config):
        tile = tile[0] * tile[1]
        if most and most < tile:
            raise UserError(f"--max_pixels {most} is less than one tile of this model, {tile} pixels: raise it.")
        own.crop_to_patches = True
        own.min_patches = max(1, least // tile) if least else own.min_patches
        own.max_patches = most // tile if most else own.max_patches
        limits = tile * own.min_patches, tile * own.max_patches
    else:
        limits = least or size["shortest_edge"], most or size["longest_edge"]
        own.size = size | dict(zip(("shortest_edge", "longest_edge"), limits))
    if limits[0] > limits[1]:
        raise UserError(f"pictures of {limits[0]} to {limits[1]} pixels: set --min_pixels and --max_pixels.")
    return limits


def prompt_tensors(model, image_processor, made, sizes):
    """Of what a processor made of a prompt with pictures of these (height, width): positions, patches, and their grid.

    position_ids (3, Lp), temporal, height and width, or InternVL's (1, Lp); the others None where there is no picture.
    """
    positions = torch.arange(made["input_ids"].shape[1])[None]
    if not sizes:
        return positions if is_internvl(model.config) else positions.expand(3, -1), None, None
    if not is_internvl(model.config):
        kinds, grid = made["mm_token_type_ids"], made["image_grid_thw"]
        positions, _ = model.model.get_rope_index(made["input_ids"], kinds, image_grid_thw=grid)
        return positions[:, 0], made["pixel_values"], grid
    grid, side, own = [], tile_side(model.config), image_processor
    for size in sizes:
        tile = own.size["height"], own.size["width"]
        columns, rows = get_optimal_tiled_canvas(size, tile, own.min_patches, own.max_patches)
        grid += [[1, rows * side, columns * side]] + [[1, side, side]] * (rows * columns > 1)
    grid = torch.tensor(grid)
    return positions, patches_of(model.config, made["pixel_values"], grid), grid


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
    """A sum over the tower's outputs for a grey picture of the smallest size, before the text model runs.

    For rows without one: sharded weights are gathered by all processes together and in one order, and where one has a
    picture, all run the tower.
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
    """(patches, depth, D, MLP) of the vision tower for the largest picture: of so many pixels, or, for None, as large
    as a prompt of so many tokens holds. InternVL's tiles have a class token each."""
    shape = config.vision_config
    if is_internvl(config):
        tiles = tokens // config.image_seq_length  # with the thumbnail
        if pixels:
            tiles = pixels // math.prod(shape.image_size)
            tiles += tiles > 1
        patches = max(1, tiles) * (tile_side(config) ** 2 + 1)
        return patches, shape.num_hidden_layers, shape.hidden_size, shape.intermediate_size
    patches = pixels // shape.patch_size**2 if pixels else tokens * shape.spatial_merge_size**2
    D = getattr(shape, "embed_dim", None) or shape.hidden_size
    return patches, shape.depth, D, getattr(shape, "intermediate_size", 4 * D)
