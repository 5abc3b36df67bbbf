"""PEPO, VGPO, VEPO and PRPO in verl 0.9.1 (FSDP): an engine under vendors of its own, which verl looks up first.

    python -m venv verl_env && verl_env/bin/pip install torch==2.13.0 && verl_env/bin/pip install --no-deps verl==0.9.1
    verl_env/bin/pip install accelerate codetiming datasets dill fastapi hydra-core matplotlib peft pillow ray scipy \\
        tensordict==0.10.0 "transformers==5.10.*" uvicorn

Training: actor_rollout_ref.model.external_lib=ports.verl; for all workers PYTHONPATH and VERL_ENGINE_VENDOR=pepo, vgpo,
vepo or prpo. For Qwen-VL, fsdp2, remove_padding, trainer.use_v1; not for bypass_mode, fused kernels, Ulysses. VEPO's
1/|K| is per response, as verl divides by all tokens. SaEI needs other images in sampling: in verl's agent loop.
"""

import os
from functools import partial

import torch
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

import pepo
import prpo
import vepo
import vgpo
from common import seeded

nested = partial(torch.nested.as_nested_tensor, layout=torch.jagged)


@EngineRegistry.register("language_model", ["fsdp", "fsdp2"], ["cuda", "cpu"], ["pepo", "vgpo", "vepo", "prpo"])
class TokenWeights(FSDPEngineWithLMHead):
    def prepare_model_inputs(self, micro_batch):
        inputs, args = super().prepare_model_inputs(micro_batch)
        return inputs | {"output_hidden_states": not torch.is_grad_enabled()}, args

    def prepare_model_outputs(self, output, micro_batch, **more):
        made, weights = super().prepare_model_outputs(output=output, micro_batch=micro_batch, **more), []
        if torch.is_grad_enabled() or "entropy" not in made:  # an update, or the reference model
            return made
        method, image = getattr(self, os.environ["VERL_ENGINE_VENDOR"]), self.model_config.hf_config.image_token_id
        ids, masks = micro_batch["input_ids"].unbind(), micro_batch["response_mask"].unbind()
        states, logits = output.hidden_states, [output.logits, *self.views(micro_batch)]  # each (1, all tokens, D or V)
        states, logits = (zip(*(x[0].split([*map(len, ids)]) for x in passes)) for passes in (states, logits))
        for tokens, mask, layers, views in zip(ids, masks, states, logits):  # of each prompt with its response
            own, seen = [x[None, -len(mask) :] for x in layers], [x[None, tokens == image] for x in layers]
            before = [x[None, -len(mask) - 1 : -1].float() / micro_batch["temperature"] for x in views]
            weights.append(method(own, seen, before, mask[None] > 0)[0])  # states (1, T or N, D); (1, T, V); (1, T)
        return made | {"token_weights": nested(weights)}  # next to the old log-probs, and kept with the batch as these

    def views(self, micro_batch):
        """Logits under the perturbed images of the method; the copies of a prompt share one draw."""
        scale = {x: getattr(self.model_config.processor.image_processor, x) for x in ("image_mean", "image_std")}
        noise = partial(vepo.noised_pixels, image_std=scale["image_std"], args=vepo.Args())
        black = partial(prpo.blacken, probability=prpo.Args.blacken)
        views = {"vepo": [noise], "prpo": [partial(f, **scale) for f in (black, prpo.add_pixel_noise)]}
        pixels = [(getattr(x, "data", x) or {}).get("pixel_values") for x in micro_batch.get("multi_modal_inputs", [])]
        drawn = [(x, seeded(uid)) for x, uid in zip(pixels, micro_batch["uid"]) if x is not None]
        for view in views.get(os.environ["VERL_ENGINE_VENDOR"], []):  # without images, too: processes pass together
            changed = {"pixel_values": torch.cat([view(x, generator=g) for x, g in drawn])} if drawn else {}
            yield self.module(**super().prepare_model_inputs(micro_batch)[0] | changed, use_cache=False).logits

    def forward_backward_batch(self, data, loss_function, forward_only=False):
        if not forward_only:
            data["advantages"] = nested([*map(torch.mul, data["advantages"].unbind(), data["token_weights"].unbind())])
        done = super().forward_backward_batch(data, loss_function, forward_only)
        if os.environ["VERL_ENGINE_VENDOR"] == "vgpo" and "token_weights" in (made := done["model_output"]):
            rows = [(uid, w[0].item(), w[1:]) for uid, w in zip(data["uid"], made["token_weights"].unbind())]
            parts = [None] * self.get_data_parallel_size()
            torch.distributed.all_gather_object(parts, [row[:2] for row in rows], group=self.get_data_parallel_group())
            groups = [[phi for name, phi in sum(parts, []) if name == uid] for uid, _, _ in rows]
            alpha = [vgpo.rollout_factors(torch.tensor([g]))[0, g.index(row[1])] for g, row in zip(groups, rows)]
            made["token_weights"] = nested([factor * row[2] for factor, row in zip(alpha, rows)])
        return done

    def pepo(self, own, image, logits, mask):
        assert self.model_config.hf_config.model_type != "qwen3_vl", "its hidden_states lack the image's deep features"
        strength = min(1, self.lr_scheduler.last_epoch / max(1, self.optimizer_config.total_training_steps))  # lambda
        entropy = torch.distributions.Categorical(logits=logits[0]).entropy()
        return 1 - strength + strength * pepo.token_weights(pepo.visual_similarity(own, image), entropy, mask)

    def vgpo(self, own, image, logits, mask):
        omega = vgpo.compensate(vgpo.visual_focus(own[-1], image[-1]), mask)
        return torch.cat([omega.sum(1, keepdim=True), vgpo.token_factors(omega, mask)], 1)  # (1, 1 + T): Phi, psi

    def vepo(self, own, image, logits, mask):
        scores = vepo.token_scores(*vepo.divergences(*logits), mask, has_image=mask.new_tensor(image[-1].numel() > 0))
        chosen = vepo.select_top(scores, mask, vepo.Args.keep_ratio)
        return chosen * mask.sum() / chosen.sum().clamp(min=1)

    def prpo(self, own, image, logits, mask):
        rvd = prpo.robust_visual_dependency(*prpo.divergences(*logits), mask)
        return prpo.token_weights(rvd if image[-1].numel() else 0 * rvd, mask)
