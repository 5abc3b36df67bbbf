"""LoRA (arXiv 2106.09685): adapters in the language model's linear layers, added, loaded, saved and merged, by PEFT.

    W x  ->  W x + alpha / rank B A x          A (rank, in) random, B (out, rank) 0, both trained; W frozen

W is never changed, not for sampling either: rounded into bf16 weights, a small BA would leave most of them as they are
(tests/test_adapters.py), and the policy that samples would not be the one that is trained.
Checkpoints hold PEFT's own two files in adapter/. Not here: what is trained, and when it is saved (trainer.py).
"""

import copy
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from safetensors.torch import load_file, save_file

from plumbing.arguments import EMBEDDED, UserError

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."  # PEFT's names


class Adapted(Linear):
    """x (..., in) -> (..., out): PEFT's layer without its switches; B, factor and sum are one product, in place."""

    def forward(self, x):
        flat = x.flatten(0, -2)
        out, low = self.base_layer(flat), self.lora_A["default"](flat)
        out.addmm_(low.to(out.dtype), self.lora_B["default"].weight.to(out.dtype).T, alpha=self.scaling["default"])
        return out.view(*x.shape[:-1], -1)


def add_adapters(model, args, checkpoint=None):
    """The model itself, frozen, with adapters in every linear layer of the language model: those of a checkpoint, or
    new ones, A drawn by --seed, the same on every process, and B = 0, which changes nothing."""
    linear = [name for name, m in model.model.language_model.named_modules() if isinstance(m, torch.nn.Linear)]
    kinds = "|".join(sorted({name.rpartition(".")[2] for name in linear}))
    local = args.model not in EMBEDDED and Path(args.model).exists()
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        target_modules=rf".*language_model\..*\.({kinds})",
        base_model_name_or_path=str(Path(args.model).resolve()) if local else args.model,  # a link may change
        revision=args.model_revision,
    )
    inject(model, config, args.seed)
    return load_adapters(model, checkpoint / "adapter") if checkpoint else model


def inject(model, config, seed=0):
    """The model itself, frozen by PEFT, with fp32 adapters in the layers that the configuration names."""
    config._register_custom_module({torch.nn.Linear: Adapted})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    for p in adapters_of(model).values():
        p.data = p.data.float()
    return model


def adapters_of(model):
    """{PEFT's name: parameter} of the adapters of a model; {} where it has none."""
    named = model.named_parameters()
    return {PREFIX + name.replace(".default.", "."): p for name, p in named if ".lora_" in name}


def load_adapters(model, folder, dtype=torch.float32):
    """The model with the adapters of PEFT's folder. Raises UserError where its tensors are not exactly these."""
    own = adapters_of(model) or adapters_of(inject(model, read_config(folder)))
    found = load_file(folder / WEIGHTS)
    whole = {name: value.shape for name, value in found.items()} == {name: p.shape for name, p in own.items()}
    if not whole or any("lm_head" in name for name in own):  # whose product is computed without PEFT's layer
        raise UserError(f"the adapters in {folder} are in the head too, or not those of its {CONFIG} or of this run.")
    for name, p in own.items():
        p.data = found[name].to(dtype)
    return model


# The fields in which a configuration may differ from LoraConfig's default. The others change the formula above, or W.
PLAIN = "r lora_alpha lora_dropout target_modules exclude_modules rank_pattern alpha_pattern layers_to_transform "
PLAIN += "layers_pattern fan_in_fan_out"


def read_config(folder):
    """The LoraConfig in a folder. Raises UserError where `Adapted` would leave a part of it out."""
    config, default = LoraConfig.from_pretrained(folder), vars(LoraConfig())
    more = default.keys() - vars(PeftConfig()).keys() - {*PLAIN.split()}
    more = sorted(name for name in more if getattr(config, name) != default[name])
    if config.init_lora_weights in (False, "gaussian"):  # of A and B alone; the others change W too
        more.remove("init_lora_weights")
    if more:
        raise UserError(f"{folder} holds adapters that are more than plain LoRA ({', '.join(more)}): take others.")
    return config


def refuse_adapters(args):
    """Raises UserError for adapters as --model."""
    if resolve_model(args.model)[3]:
        raise UserError(f"--model {args.model} holds adapters: take a whole model, as in last/ of a run that ended.")


def save_adapters(model, folder, merge):
    """PEFT's files in folder/adapter; next to it config.json, or with `merge` the merged model, in fp32."""
    model.peft_config["default"].save_pretrained(folder / "adapter")
    tensors = {name: p.detach().cpu().contiguous() for name, p in adapters_of(model).items()}
    save_file(tensors, folder / "adapter" / WEIGHTS, metadata={"format": "pt"})
    if merge:
        without_adapters(model).to("meta", torch.float32).save_pretrained(folder, state_dict=merged(model))
    else:
        model.config.save_pretrained(folder)


@torch.no_grad()
def merged(model):
    """{name: W + alpha / rank B A} of all weights, fp32, in main memory; W where there is no adapter."""
    base = without_adapters(model)
    weights = {name: p.cpu().float().contiguous() for name, p in base.named_parameters()}
    for name, layer in model.named_modules():
        if isinstance(layer, Adapted):
            low, high = (part["default"].weight.cpu().float() for part in (layer.lora_A, layer.lora_B))
            name = f"{name}.weight"
            weights[name] = torch.addmm(weights[name], high, low, alpha=layer.scaling["default"])
    return weights


def without_adapters(model):
    """The frozen model itself: another tree of modules around the same weights, which take no memory twice."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    twin = copy.deepcopy(model, shared)
    for name, layer in list(twin.named_modules()):
        if isinstance(layer, Adapted):
            parent, _, own = name.rpartition(".")
            setattr(twin.get_submodule(parent), own, layer.base_layer)
    return twin.requires_grad_(False).eval()


def resolve_model(name, revision="main"):
    """(where configuration and processor are, where the weights are, revision of both, folder of adapters or None).

    `name`: a model; a checkpoint that holds adapters alone; or a folder of PEFT's, in a checkpoint or anywhere. Raises
    UserError for adapters that are not plain.
    """
    folder = Path(name)
    if (folder / "adapter" / CONFIG).exists() and not list(folder.glob("*.safetensors")):
        folder = folder / "adapter"
    if not (folder / CONFIG).exists():
        return name, name, revision, None
    config = read_config(folder)
    base = config.base_model_name_or_path
    base = str(EMBEDDED[base] / "model") if base in EMBEDDED else base
    if (Path(base) / CONFIG).exists():
        raise UserError(f"{folder} holds adapters of {base}, which holds adapters itself: merge those first.")
    processor = folder.parent if (folder.parent / "config.json").exists() else base
    return processor, base, config.revision or revision, folder
