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
import pepo  # noqa: E402
import prpo  # noqa: E402
import saei  # noqa: E402
import vepo  # noqa: E402
import vgpo  # noqa: E402
from common import compare_logits, forward, load_model, load_processor, rollout  # noqa: E402
from plumbing.arguments import TOY, SharedArgs  # noqa: E402
from plumbing.data import Data  # noqa: E402
from show import run_of  # noqa: E402


def kinds(tokens):
    """Two lists of booleans: which of a response's tokens (strings) depend on the image, and which are template.

    >>> kinds(["I count", " ", "2", " circles", ".", " So", " ", "2"])
    ([False, False, True, False, False, False, False, False], [True, True, False, True, True, True, True, False])
    """
    end = next((i for i, token in enumerate(tokens) if "." in token), len(tokens))
    number = [token.strip().isdigit() for token in tokens]
    return [is_number and i < end for i, is_number in enumerate(number)], [not is_number for is_number in number]


@torch.no_grad()
def scores(run, row):
    """{name: (1, T)} of all methods' scores of a row of one response."""
    _, entropy, hidden = forward(run.model, row)
    signals = {"entropy": entropy}
    noised = vepo.noised_hidden(row, run, vepo.Args(), 0)
    jsd, _, noised_entropy = compare_logits(vepo.divergences, run.model, row, hidden, noised)
    signals["VEPO, JSD"] = jsd
    signals["VEPO, score"] = vepo.token_scores(jsd, entropy, noised_entropy, row.mask)
    views = prpo.perturbed_hidden(row, run, prpo.Args(), 0)
    strong, weak = compare_logits(prpo.divergences, run.model, row, hidden, *views)
    signals |= {"PRPO, KL under the strong view": strong, "PRPO, KL under the weak view": weak}
    signals["PRPO, RVD"] = prpo.robust_visual_dependency(strong, weak, row.mask)
    signals["VGPO, visual focus"] = vgpo.row_focus(hidden, row, vgpo.Args())
    pepo.scoring_forward(row, run, pepo.Args())
    return signals | {"PEPO, visual similarity": row.scores, "PEPO, weight": row.weights}


def missed(entropy, jsd, mask, ratio=0.2):
    """Of the tokens with the highest JSD above 0, the share that is not among those with the highest entropy; (B,)."""
    top, uncertain = (vepo.select_top(values, mask, ratio) & (jsd > 0) for values in (jsd, entropy))
    return (top & ~uncertain).sum(1) / top.sum(1)


def attacked(run, prompts, step):
    """SaEI: H of 6 responses to each prompt before and after an attack of this step, two tensors (P,)."""
    args, changes = saei.Args(step=step, measure_every=1), {"attack_entropy_before": [], "attack_entropy_after": []}
    run.metrics.add = lambda name, value, weight: changes.get(name, []).append(float(value))
    for group in rollout(run.model, run.processor.tokenizer, prompts, args, 0, slice(args.n1)):
        saei.attack(group, run, args)
    return map(torch.tensor, changes.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TOY / "model"), help="folder of a toy model")
    parser.add_argument("--rows", type=int, default=504, help="of the test set")
    options = parser.parse_args()
    args = SharedArgs()
    model, processor = load_model(options.model), load_processor(options.model)
    data = Data("toy", "test", args, processor, model.model.get_rope_index)
    prompts = [prompt for prompt in map(data.prompt, range(options.rows)) if prompt.image_grid_thw is not None]
    run = run_of(model, processor)
    found, shares = {}, []
    for group in rollout(model, processor.tokenizer, prompts, args, 0, slice(1)):
        tokens = [processor.tokenizer.decode([token]) for token in group.responses[0][group.mask[0]].tolist()]
        image, template = map(torch.tensor, kinds(tokens))
        if image.any() and template.any():
            signals = scores(run, group)
            shares.append(missed(signals["entropy"], signals["VEPO, JSD"], group.mask).item())
            for name, values in signals.items():
                values = values[0][group.mask[0]]
                found.setdefault(name, []).append((values[image].mean().item(), values[template].mean().item()))
    print("| signal | image-dependent | template | difference, 95 % interval | responses |\n|---|---|---|---|---|")
    for name, pairs in found.items():
        image, template = torch.tensor(pairs, dtype=torch.float64).T
        difference = image - template
        error = 1.96 * difference.std().item() / math.sqrt(len(pairs))
        shown = f"{difference.mean():+.3g} ± {error:.2g}"
        print(f"| {name} | {image.mean():.3g} | {template.mean():.3g} | {shown} | {len(pairs)} |")
    share = torch.tensor([share for share in shares if math.isfinite(share)], dtype=torch.float64)
    error = 1.96 * share.std().item() / math.sqrt(len(share))
    print(f"entropy misses {share.mean():.1%} ± {error:.1%} of the 20 % of tokens with the highest JSD above 0")
    print(f"in the {len(share)} responses that have some")
    for step, wanted in ((2 / 255, "raises"), (-2 / 255, "lowers")):
        before, after = attacked(run, prompts, step)
        done = (after > before) if step > 0 else (after < before)
        ratio = (after / before).median()
        print(
            f"a step of {step * 255:+.0f}/255 {wanted} the entropy of the middle third in {done.float().mean():.1%} of"
        )
        print(f"{len(done)} prompts, with a median of {ratio:.3f} times what it was")


if __name__ == "__main__":
    main()
