"""What the functions of the methods give on the responses of a group, for the pages."""

import dataclasses

import prpo
import saei
import vepo
import vgpo
import vppo
from common import compare_logits, forward
from show import image_signals


def values_of(group, trainer, args):
    """{method: {function: {label: (G, T)}}}: what functions give on a group's responses, with default constants."""
    mask, settings = group.mask, {"temperature": args.temperature}
    x, hidden, noised = image_signals(group, trainer, args)
    logps = forward(trainer.model, group, args.temperature)[0].detach()
    states = [hidden.detach(), noised]
    _, entropy, noised_entropy = compare_logits(vepo.divergences, trainer.model, group, *states, **settings)
    compensated = vgpo.compensate(x["focus"], mask)
    alpha, psi, _ = vgpo.group_factors(x["focus"], mask)
    A = group.advantages[:, None] * mask
    dependent = dataclasses.replace(group, old_logps=logps)  # VPPO's, as a mini-batch of one group
    dependent.loss_mask = mask
    vppo.set_scores([dependent], trainer, vppo.Args(seed=args.seed, **settings), 0)
    vppo.set_weights([dependent], trainer, vppo.Args())
    gap = {"JSD": x["jsd"], "H: entropy, in nats": entropy, "|H(Q) - H(P)|": (noised_entropy - entropy).abs()}
    third = saei.middle_third(x["entropy"], mask).float()
    advantage = "advantage that the token is trained with"
    weighted = {"vepo": x["kept_by_vepo"], "vgpo": alpha[:, None] * psi, "pepo": x["weight"], "grpo": 1, "saei": 1}
    weighted |= {"prpo": prpo.token_weights(x["rvd"], mask), "vppo": dependent.weights}
    gives = {
        "grpo": {"group_advantages": {"A": A}, "policy_loss": {"probability of the sampled token": logps.exp()}},
        "vepo": {"divergences": gap, "token_scores": {"score": x["vepo_score"]}},
        "vgpo": {"visual_focus": {"focus rho": x["focus"]}, "compensate": {"compensated focus omega": compensated}},
        "prpo": {"divergences": {"KL, strong view": x["kl_strong"], "KL, weak view": x["kl_weak"]}},
        "pepo": {"visual_similarity": {"VS": x["similarity"]}, "token_weights": {"H": entropy, "w": x["weight"]}},
        "saei": {"middle_third": {"H: entropy, in nats": x["entropy"], "1 on the middle third": third}},
        "vppo": {"visual_dependency": {"S": dependent.scores}, "set_weights": {"m f": dependent.weights}},
    }
    gives["vepo"]["select_top"] = {"chosen": x["kept_by_vepo"], "by entropy alone": x["kept_by_entropy"]}
    gives["vgpo"]["late_gate"] = {"gated": vgpo.late_gate(x["focus"], mask).float()}
    gives["vgpo"] |= {"token_factors": {"psi": psi}, "group_factors": {"alpha psi": alpha[:, None] * psi}}
    gives["prpo"] |= {"robust_visual_dependency": {"RVD": x["rvd"]}, "token_weights": {"w": weighted["prpo"]}}
    for method, weights in weighted.items():
        gives[method]["main"] = {advantage: A * weights}
    return gives
