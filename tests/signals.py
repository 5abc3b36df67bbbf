"""Is the signal real? What each method's score says of image-dependent and of template tokens, on the toy.

    python tests/signals.py [--model runs/grpo/last] [--rows 504]

One response at T = 1 to each test prompt that has a picture. Image-dependent are the numbers of the first sentence ("I
count 2 yellow shapes and 1 circles."): the model can know them from the picture alone. Template is every token that is
no number. For each response the mean over the one kind minus the mean over the other; then the mean of these
differences over the responses, with its 95 % confidence interval (1.96 standard errors).
"""

import argparse
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
import pepo  # noqa: E402
import vgpo  # noqa: E402


def kinds(tokens):
    """Two lists of booleans: which of a response's tokens (strings) depend on the image, and which are template.

    >>> kinds(["I count", " ", "2", " circles", ".", " So", " ", "2"])
    ([False, False, True, False, False, False, False, False], [True, True, False, True, True, True, True, False])
    """
    end = next((i for i, token in enumerate(tokens) if "." in token), len(tokens))
    number = [token.strip().isdigit() for token in tokens]
    return [is_number and i < end for i, is_number in enumerate(number)], [not is_number for is_number in number]


@torch.no_grad()
def scores(model, row):
    """{name: (1, T)} of all methods' scores of a row of one response."""
    pepo.weighted_forward(model, row, pepo.Args())
    signals = {"PEPO, visual similarity": row.scores, "PEPO, weight": row.weights}
    signals["VGPO, visual focus"] = vgpo.row_focus(common.forward(model, row)[2], row, vgpo.Args())
    return signals


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(common.TOY / "model"), help="folder of a toy model")
    parser.add_argument("--rows", type=int, default=504, help="of the test set")
    options = parser.parse_args()
    args = common.Args()
    model, processor = common.load_model(options.model), common.load_processor(options.model)
    data = common.Data("toy", "test", args, processor, model.model.get_rope_index)
    prompts = [prompt for prompt in map(data.prompt, range(options.rows)) if prompt.image_grid_thw is not None]
    found = {}
    for group in common.rollout(model, processor.tokenizer, prompts, args, 0, group_size=1):
        tokens = [processor.tokenizer.decode([token]) for token in group.responses[0][group.mask[0]].tolist()]
        image, template = map(torch.tensor, kinds(tokens))
        if image.any() and template.any():
            for name, values in scores(model, group).items():
                values = values[0][group.mask[0]]
                found.setdefault(name, []).append((values[image].mean().item(), values[template].mean().item()))
    print("| signal | image-dependent | template | difference, 95 % interval | responses |\n|---|---|---|---|---|")
    for name, pairs in found.items():
        image, template = torch.tensor(pairs, dtype=torch.float64).T
        difference = image - template
        error = 1.96 * difference.std().item() / math.sqrt(len(pairs))
        shown = f"{difference.mean():+.4f} ± {error:.4f}"
        print(f"| {name} | {image.mean():.4f} | {template.mean():.4f} | {shown} | {len(pairs)} |")


if __name__ == "__main__":
    main()
