"""For test_verl.py, by verl's interpreter: a batch through the engines of ports/verl.py, on a CPU."""

import os
import sys
from functools import partial

import torch
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import set_platform
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import ActorConfig, FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp import transformer_impl
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import response_from_nested

from common import load_processor

FP32 = {"param_dtype": "fp32", "reduce_dtype": "fp32"}


class PlatformCPU(PlatformCUDA):
    device_name, device_module, current_device = "cpu", torch.cpu, lambda _: "cpu"


def run(method, given):
    """(token weights (T,) of each response, gradients by parameter): the old log-probs' pass and an update's."""
    os.environ["VERL_ENGINE_VENDOR"] = method
    settings = {"override_config": {"attn_implementation": "sdpa"}, "enable_gradient_checkpointing": False}
    model = HFModelConfig(path=given["model"], external_lib="ports.verl", **settings)
    model.processor = load_processor(given["model"])  # without torchvision
    configs = {"model_config": model, "checkpoint_config": CheckpointConfig()}
    configs["engine_config"] = FSDPEngineConfig(strategy="fsdp2", mixed_precision=FP32, use_torch_compile=False)
    configs["optimizer_config"] = FSDPOptimizerConfig(lr=1e-4, total_training_steps=10)
    engine = EngineRegistry.new("language_model", "fsdp2", **configs)
    engine.initialize()
    engine.lr_scheduler.last_epoch = 10  # of 10: PEPO's lambda is 1
    jagged = {name: torch.nested.as_nested_tensor(rows, layout=torch.jagged) for name, rows in given["jagged"].items()}
    data = tu.get_tensordict({**jagged, "multi_modal_inputs": given["images"], "uid": given["uid"][method]})
    tu.assign_non_tensor(data, temperature=given["temperature"], calculate_entropy=True, use_remove_padding=True)
    tu.assign_non_tensor(data, max_token_len_per_gpu=300, global_batch_size=len(data))  # several micro-batches
    with engine.eval_mode():
        made = engine.infer_batch(data)["model_output"]
    data["old_log_probs"] = response_from_nested(made["log_probs"], data["response_mask"])
    data["token_weights"] = made["token_weights"]
    actor = ActorConfig(strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1, use_dynamic_bsz=True)
    with engine.train_mode():
        engine.forward_backward_batch(data, partial(ppo_loss, config=actor))
        gradients = {name: p.grad.full_tensor() for name, p in engine.module.named_parameters()}
    return [weights.clone() for weights in made["token_weights"].unbind()], gradients


if __name__ == "__main__":
    source, target = sys.argv[1:]
    given = torch.load(source, weights_only=True)
    set_platform(PlatformCPU())
    patch = transformer_impl.apply_monkey_patch  # without its attention, which needs flash-attn
    transformer_impl.apply_monkey_patch = lambda **more: patch(**more | {"use_remove_padding": False})
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    torch.save({method: run(method, given) for method in given["uid"]}, target)
