"""What differs between model families, side by side: Qwen-VL (2, 2.5 and 3) and InternVL3.

Everywhere else a picture is the same for both: `pixel_values` (patches, 3 x 2 x p x p), a row for each patch of the
vision tower, the patch in it twice, and `image_grid_thw` (pictures, 3), their rows and columns. InternVL stretches a
picture over a canvas of square tiles, and adds the whole once more as a thumbnail of one tile, unless the canvas is one
tile: canvas and thumbnail are two pictures, cut into tiles where the tower takes them. Not here: what is done to them.
"""

import torch
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from plumbing.commandline import UserError

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl with qwen2", "internvl with qwen3"]


def is_internvl(config):
    return config.model_type == "internvl"


def known_family(name, config):
    """The configuration of a known family. Raises UserError for others: their attention may have more to it."""
    what = config.model_type
    if is_internvl(config):  # the hub's files are silent about a head of its own, and transformers takes it for tied
        config.tie_word_embeddings &= config.text_config.tie_word_embeddings
        what += f" with {config.text_config.model_type}"
    if what not in FAMILIES:
        raise UserError(f"--model {name} is {what}; use one of {', '.join(FAMILIES)}.")
    return config


def prepared(model):
    """The model with kernels.py's `window_attention` in Qwen-VL's tower, or with InternVL3's rotary frequencies fixed.

    They change in rows beyond its positions, which data.py refuses; to look would wait for the GPU at each token.
    """
    if is_internvl(model.config):
        model.model.language_model.rotary_emb.rope_type = "default"
    else:  # as an argument, transformers would look for a package
        model.model.visual.config._attn_implementation = "flash_windows"
    return model


def vision(model):
    """The modules that make a picture's tokens, the tower first, and the tower's layers."""
    if is_internvl(model.config):
        return [model.model.vision_tower, model.model.multi_modal_projector], model.model.vision_tower.encoder.layer
    return [model.model.visual], model.model.visual.blocks  # what joins it to the decoder is inside


def patch_shape(image_processor):
    """(p, m, 2): pixels of a patch's side; patches of a token's side that stand together in pixel_values; copies."""
    if hasattr(image_processor, "crop_to_patches"):
        return 14, 1, 2  # every InternVL's, whose patches stand row by row, though a token is 2 x 2 of them
    return image_processor.patch_size, image_processor.merge_size, image_processor.temporal_patch_size


def tile_side(config):
    """Patches of the side of InternVL's tiles."""
    return config.vision_config.image_size[0] // config.vision_config.patch_size[0]


def limit_pixels(config, processor, least=None, most=None):
    """Sets between how many pixels a picture is resized to; None keeps the image processor's own. Returns both.

    InternVL's are rounded down to whole tiles, which transformers calls patches there; its thumbnail is not counted.
    Raises UserError for an empty range, and for a processor that is not this model's.
    """
    own, shape = processor.image_processor, config.vision_config
    size, fits = dict(own.size), "shortest_edge" in own.size
    if is_internvl(config):
        found = [size.get("height"), size.get("width"), getattr(processor, "image_seq_length", None)]
        fits = found == [*shape.image_size, config.image_seq_length] and shape.patch_size[0] == 14
    if not fits:
        raise UserError("the image processor of --model is not made for its vision tower: take a whole copy of it.")
    if is_internvl(config):
        tile = shape.image_size[0] ** 2
        least, most = max(tile, least or tile * own.min_patches), most or tile * own.max_patches
        own.crop_to_patches, own.min_patches, own.max_patches = True, least // tile, most // tile
    else:
        least, most = least or size["shortest_edge"], most or size["longest_edge"]
        own.size = size | {"shortest_edge": least, "longest_edge": most}
    if least > most:
        raise UserError(f"no picture has {least} pixels at least and {most} at most: set --min_pixels, --max_pixels.")
    return least, most


def prompt_tensors(model, image_processor, made, sizes):
    """Of what a processor made of a prompt with pictures of these (height, width): positions, patches, and their grid.

    position_ids (3, Lp), temporal, height and width, or InternVL's (1, Lp); the others None where there is no picture.
    """
    if not is_internvl(model.config):
        kinds, grid = made["mm_token_type_ids"], made.get("image_grid_thw")
        positions, _ = model.model.get_rope_index(made["input_ids"], kinds, image_grid_thw=grid)
        return positions[:, 0], made.get("pixel_values"), grid
    positions = torch.arange(made["input_ids"].shape[1])[None]
    if not sizes:
        return positions, None, None
    grid, side, own = [], tile_side(model.config), image_processor
    for size in sizes:
        tile = own.size["height"], own.size["width"]
        columns, rows = get_optimal_tiled_canvas(size, tile, own.min_patches, own.max_patches)
        grid += [[1, rows * side, columns * side]] + [[1, side, side]] * (rows * columns > 1)
    return positions, patches_of(model.config, made["pixel_values"], torch.tensor(grid)), torch.tensor(grid)


def picture_inputs(model, prompts):
    """All prompts' pictures, one after the other, as the model's arguments; nothing where there are none."""
    prompts = [p for p in prompts if p.image_grid_thw is not None]
    if not prompts:
        return {}
    pixels = torch.cat([p.pixel_values.to(model.device) for p in prompts])  # a method may have made some there
    grid = torch.cat([p.image_grid_thw for p in prompts])
    if not is_internvl(model.config):
        return {"pixel_values": pixels, "image_grid_thw": grid.to(model.device)}
    side, p, tiles = tile_side(model.config), model.config.vision_config.patch_size[0], []
    for picture, (_, h, w) in zip(pixels.split(grid.prod(1).tolist()), grid.tolist()):
        cut = picture.view(h // side, side, w // side, side, 3, 2, p, p)[..., 0, :, :].permute(0, 2, 4, 1, 5, 3, 6)
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
    """Which place each patch of a prompt's pictures shows, (patches,) from 0 on; all, as a slice: each its own.

    A patch of InternVL's thumbnail is a block of the canvas's: with a canvas of 2 x 3 tiles, of 2 x 3 patches.
    """
    if grid is None or not is_internvl(config):
        return slice(None)
    found, count, side = [], 0, tile_side(config)
    for _, h, w in grid.tolist():
        tile = torch.arange(count, count + side**2).view(side, side)
        found.append(tile.repeat_interleave(h // side, 0).repeat_interleave(w // side, 1).flatten())
        count += side**2 * (h == w == side)  # a thumbnail, or a canvas of one tile, is a picture's last
    return torch.cat(found)


def grey_picture(model):
    """A sum over the tower's outputs for a grey picture, for rows without one, before the text model runs.

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


def largest_picture(config, pixels, tokens):
    """Patches of the largest picture: of so many pixels, or, for None, as large as a prompt of so many tokens holds."""
    shape = config.vision_config
    if not is_internvl(config):
        return pixels // shape.patch_size**2 if pixels else tokens * shape.spatial_merge_size**2
    tiles = pixels // shape.image_size[0] ** 2 if pixels else tokens // config.image_seq_length - 1
    return max(1, tiles + (tiles > 1)) * (tile_side(config) ** 2 + 1)  # with the thumbnail, and a class token for each
