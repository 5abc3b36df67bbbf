"""What all methods share, in the order of the data flow:

    model loading -> rollout -> reward -> packed forward -> perturbed images, token scores -> advantages and policy loss

Shapes, the same everywhere: P prompts of a step on this process, G responses to each (a group), B responses in a packed
row, T tokens of the longest of them (up to and including its end-of-turn token), N response tokens of a row, L tokens
of a row, D hidden size, V vocabulary. The one idea that makes it fast: the G responses to a prompt share its long
prefix, most of which is the image. So everything after sampling runs on packed rows [prompt | response 1 | ... |
response B], one or more for a group, and sampling computes the prompt once. Not here: a method (its file), and the
steps of a training run (trainer.py).
"""

import contextlib
import copy
import dataclasses
import json
import random
import re
from dataclasses import dataclass
from functools import partial

import tokenizers
import torch
import transformers
from torch.nn.functional import linear, pad
from torch.utils.checkpoint import checkpoint

from plumbing import kernels
from plumbing.adapters import add_adapters, load_adapters, resolve_model, without_adapters
from plumbing.answers import Checker, extract_answer, load_reward
from plumbing.arguments import UserError, cannot_open, model_source
from plumbing.data import Prompt, prompt_text
from plumbing.families import (
    compile_layers,
    grey_image,
    image_inputs,
    known_family,
    limit_pixels,
    patch_attention,
    vision,
)
from plumbing.kernels import CACHE_STEP, HEAD_CHUNK, SharedPrefixCache
from plumbing.sharding import is_sharded, on_any_process, on_main, shard, with_full_params

# ---------------------------------------------------------------------------------------------------------------------
# Model and processor
# ---------------------------------------------------------------------------------------------------------------------


def image_only(cls):
    """The processor class `cls` without its video processor, which needs torchvision."""
    return type(cls.__name__, (cls,), {"get_attributes": classmethod(lambda _: ["image_processor", "tokenizer"])})


def load_config(name, revision="main"):
    """The configuration of a model of a known family, without remote code. Raises UserError for others."""
    source, _, revision, _ = resolve_model(name, revision)
    try:
        config = transformers.AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except Exception as error:  # transformers' errors of what is not a model are of many types
        more = " Of an InternVL take the name that ends with -hf or -HF." if "custom code" in str(error) else ""
        raise UserError(cannot_open("--model", name, error) + more) from None
    config = known_family(name, config)
    for part in (config.text_config, config.vision_config):
        for setting in vars(part):
            if "drop" in setting:  # the policy that is trained must be the one that samples, without dropout
                setattr(part, setting, 0.0)
    return config


def load_processor(name, revision="main", min_pixels=None, max_pixels=None):
    """The processor of a model: tokenizer and image processor.

    `min_pixels` and `max_pixels`: area of an image after resizing; None keeps the model's own. Raises UserError if
    tokenizer and chat template do not fit the model.
    """
    config = load_config(name, revision)
    source, _, revision, _ = resolve_model(name, revision)
    options = {"revision": revision, "trust_remote_code": False}
    cls = transformers.models.auto.processing_auto.PROCESSOR_MAPPING[type(config)]
    try:
        processor = cls.from_pretrained(source, **options)
    except (ImportError, OSError, ValueError):  # no torchvision here, or none where this model was saved
        processor = image_only(cls).from_pretrained(source, **options)
    tokenizer = processor.tokenizer
    processor.chat_template = processor.chat_template or tokenizer.chat_template
    untrained_tags_as_text(tokenizer, str(processor.chat_template))
    ids = tokenizer(prompt_text(processor, "<image>1 + 1?", "")).input_ids
    if ids.count(config.image_token_id) != 1 or "1 + 1" not in tokenizer.decode(ids):
        raise UserError(
            f"--model {name} has a tokenizer or chat template that loses text or image of a question: tokenizer.json "
            f"and chat_template.jinja must be the model's own."
        )
    limit_pixels(config, processor, min_pixels, max_pixels)
    return processor


def untrained_tags_as_text(tokenizer, template):
    """Encodes <think> and <answer> as plain text if they are tokens that the chat template never writes.

    Qwen3-VL Instruct has such tokens and was never trained on them. They can still be decoded.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    tags = [t for t in spec["added_tokens"] if re.fullmatch("</?(think|answer)>", t["content"])]
    untrained = [t for t in tags if t["content"] not in template]
    for token in untrained:
        spec["added_tokens"].remove(token)
        spec["model"]["vocab"][token["content"]] = token["id"]  # no merge produces it
    if untrained:
        tokenizer._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))


def load_model(name, revision="main", meta=False, dtype=torch.float32):
    """A model of a known family, also with adapters (LoRA). Raises UserError for others.

    `dtype`: of the weights; `.to` afterwards would round the rotary frequencies as well. `meta`: shapes only, no
    weights. Weights are read from safetensors only: pickled ones may run code.
    """
    options = {"dtype": dtype, "attn_implementation": {"text_config": "shared_prefix"}, "trust_remote_code": False}
    transformers.utils.logging.disable_progress_bar()  # "Loading weights", in each process
    auto = transformers.AutoModelForImageTextToText
    _, source, revision, adapters = resolve_model(name, revision)
    config = load_config(source, revision)  # that of the weights: next to adapters may be another
    if meta:
        with torch.device("meta"):
            return patch_attention(auto.from_config(config, **options))
    options |= {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    model, found = auto.from_pretrained(source, config=config, revision=revision, **options)
    wrong = {kind: list(found[f"{kind}_keys"]) for kind in ("missing", "unexpected", "mismatched")}
    if any(wrong.values()):  # transformers would initialise what is missing at random
        counts = "; ".join(f"{len(keys)} {kind}, such as {keys[0]}" for kind, keys in wrong.items() if keys)
        raise UserError(f"--model {source} is damaged, or not the model of its config.json: of its tensors {counts}.")
    if config.tie_word_embeddings != (model.lm_head.weight is model.get_input_embeddings().weight):
        raise UserError(f"--model {source}: head and embeddings differ, so tie_word_embeddings must be false.")
    return patch_attention(load_adapters(model, adapters, dtype) if adapters else model)


def load_models(args, accelerator, checkpoint=None):
    """(processor, model to train, reference model or None) of a run; the model from a checkpoint if there is one."""
    processor = load_processor(model_source(args), args.model_revision, args.min_pixels, args.max_pixels)
    model = trained_model(args, accelerator, checkpoint)
    reference = reference_model(args, accelerator, model) if args.kl_coef else None
    for each in (model, reference) if reference else (model,):
        compile_layers(each)
    return processor, model, reference


def trained_model(args, accelerator, checkpoint=None):
    """The model to train, from a checkpoint if there is one, on this process's device.

    Full training: fp32 weights, sharded over several processes. LoRA: the frozen base in the compute type and fp32
    adapters, whole on every process.
    """
    lora, source = bool(args.lora_rank), (model_source(args), args.model_revision)
    if checkpoint:  # of adapters: the base that they name
        source = resolve_model(checkpoint / "adapter")[1:3] if lora else (checkpoint, "main")
    dtype = torch.bfloat16 if lora and accelerator.mixed_precision == "bf16" else torch.float32
    model = load_model(*source, meta=accelerator.num_processes > 1 and not lora, dtype=dtype).train()
    if lora:
        add_adapters(model, args, checkpoint)
    if args.freeze_vision:
        torch.nn.ModuleList(vision(model)[0]).requires_grad_(False)
    if args.gradient_checkpointing:
        checkpoint_layers(model)
    return model.to(accelerator.device) if lora else to_device_or_shard(model, source, accelerator)


def checkpoint_layers(model):
    """Turns gradient checkpointing on."""
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()  # or a frozen tower would have a backward pass


def reference_model(args, accelerator, model):
    """The frozen reference model of the KL term: `model` before training."""
    if args.lora_rank:
        return without_adapters(model)
    source = model_source(args), args.model_revision
    reference = load_model(*source, meta=accelerator.num_processes > 1).eval().requires_grad_(False)
    if accelerator.num_processes == 1 and accelerator.mixed_precision == "bf16":
        kernels.products_in_bf16(reference)
    return to_device_or_shard(reference, source, accelerator)


def to_device_or_shard(model, source, accelerator):
    """The model on this process's device; with several processes sharded, from weights that the main one loads."""
    if accelerator.num_processes > 1:
        whole = on_main(lambda: load_model(*source))
        shard(model, whole, accelerator.device, accelerator.mixed_precision == "bf16")
    return model.to(accelerator.device)


# ---------------------------------------------------------------------------------------------------------------------
# Rollout: the prompt is computed once, its cache is shared by the G responses
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """A prompt and B = G responses to it, or B fewer ones: a slice `group[a:b]` is a group, too.

    `split_group` slices so that prompt and responses fit --tokens_per_row; the code calls such a group a row.
    responses, mask and the prompt's text never change.
    """

    prompt: Prompt
    responses: torch.Tensor  # (B, T) token ids
    mask: torch.Tensor  # (B, T) True up to and including the first end-of-turn token
    truncated: torch.Tensor  # (B,) True where there is no end-of-turn token
    texts: list  # B decoded responses, without end and padding tokens
    rewards: torch.Tensor | None = None  # (B,)
    accuracy: torch.Tensor | None = None  # (B,)
    format: torch.Tensor | None = None  # (B,)
    advantages: torch.Tensor | None = None  # (B,)
    zero_advantage: bool = False  # all rewards are equal: the policy term has no gradient
    loss_mask: torch.Tensor | None = None  # (B, T) tokens in the loss: mask, but for --drop_truncated
    old_logps: torch.Tensor | None = None  # (B, T) before the step's first update; None: on-policy
    ref_logps: torch.Tensor | None = None  # (B, T)
    scores: torch.Tensor | None = None  # (B, T) a method's score of each token
    weights: torch.Tensor | None = None  # (B, T) factors of the advantage; VEPO: True on tokens to train
    lengths: list = dataclasses.field(init=False)  # B, on the host: counting them later would wait for the GPU
    packed: dict = dataclasses.field(init=False, default_factory=dict)  # what `pack` returns, made once

    def __post_init__(self):
        self.lengths = self.mask.sum(1).tolist()

    def __getitem__(self, part):
        row = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor | list):
                setattr(row, name, value[part])
        row.packed = {}
        return row


def seeded(*key):
    """A torch generator that depends on `key` alone: on no process, batch or earlier draw."""
    return torch.Generator().manual_seed(random.Random(" ".join(map(str, key))).getrandbits(63))


def end_tokens(model, tokenizer):
    """Ids that end a response: those of generation_config.json, and the tokenizer's end of a turn. Raises UserError."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    ends = {token for token in [*configured, tokenizer.eos_token_id] if token is not None}
    if not ends:
        raise UserError("--model names no token that ends a response: set eos_token_id in its generation_config.json.")
    return sorted(ends)


def banned_tokens(model, tokenizer):
    """(V,) True on tokens that are never sampled: embeddings beyond the tokenizer's, which have no text, and
    placeholders of images and videos, which would break the next forward pass."""
    banned = torch.ones(model.config.text_config.vocab_size, dtype=torch.bool)
    banned[list(tokenizer.get_vocab().values())] = False
    placeholders = [getattr(model.config, f"{kind}_token_id", None) for kind in ("image", "video")]
    banned[[token for token in placeholders if token is not None]] = True
    return banned.to(model.device)


def make_sampler(banned, temperature, top_p, top_k):
    """Returns `sample(logits (B, V), uniforms (B,)) -> (B,)`, by the inverse of the cumulative distribution.

    The distribution is that of transformers' `model.generate` (temperature, then top-k, then top-p), without tokens
    that are `banned` (V,). Probabilities are fp32, cumulative sums fp64, in two levels: first a block of 128 tokens,
    then a token of it. Temperature 0: argmax.
    """
    warpers, greedy = [], temperature < 1e-6  # or logits would be divided to infinity
    if temperature != 1.0 and not greedy:
        warpers.append(transformers.TemperatureLogitsWarper(temperature))
    if top_k > 0:
        warpers.append(transformers.TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(transformers.TopPLogitsWarper(top_p))
    warp = transformers.LogitsProcessorList(warpers)

    def sample(logits, uniforms):
        logits = warp(None, logits.float().masked_fill(banned, -torch.inf))
        if greedy:
            return logits.argmax(-1)
        parts = pad(logits.softmax(-1), (0, -logits.shape[-1] % 128)).unflatten(-1, (-1, 128))  # (B, V / 128, 128)
        sums = pad(parts.sum(-1, dtype=torch.double).cumsum(-1), (1, 0))  # (B, V / 128 + 1)
        target = uniforms[:, None] * sums[:, -1:]  # (B, 1)
        part = (torch.searchsorted(sums, target, right=True) - 1).clamp(max=parts.shape[1] - 1)  # (B, 1)
        own = parts.take_along_dim(part[..., None], 1)[:, 0].double().cumsum(-1)  # (B, 128)
        rest = (target - sums.gather(1, part)).minimum(own[:, -1:] * (1 - 1e-15))  # never a token of probability 0
        token = 128 * part + torch.searchsorted(own, rest, right=True)
        return token[:, 0].clamp(max=logits.shape[-1] - 1)  # of a model that computes NaN

    return sample


class Batch:
    """P prompts, computed and stored once, and the state of decoding G responses to each.

    Args: `capacity`: the cache grows by so many tokens; `prefill_tokens`: prompts are computed so many tokens at a
    time, or one by one; `sharded`: weights stay sharded and are gathered layer by layer, so all processes go on as
    long as one of them does; `graphs`: the kernels of a token are recorded as a CUDA graph, and replayed.
    """

    def __init__(
        self, model, prompts, group_size, pad_id, capacity=CACHE_STEP, prefill_tokens=1, sharded=False, graphs=False
    ):
        self.model, self.prompts, self.group_size, self.sharded = model, prompts, group_size, sharded
        self.capacity, self.prefill_tokens, device = capacity, prefill_tokens, model.device
        width = kernels.aligned(max(len(p.input_ids) for p in prompts), device)
        missing = [width - len(p.input_ids) for p in prompts]  # padding on the left
        self.ids = torch.stack([pad(p.input_ids, (n, 0), value=pad_id) for p, n in zip(prompts, missing)]).to(device)
        self.positions = torch.stack([pad(p.position_ids, (n, 0)) for p, n in zip(prompts, missing)], 1).to(device)
        self.real = torch.stack([torch.arange(width) >= n for n in missing]).to(device)  # (P, Lp)
        self.cache = SharedPrefixCache(model.config.text_config.num_hidden_layers, device)
        self.active = torch.arange(len(prompts), device=device)  # prompts with a response that has not ended
        self.after = self.positions.amax((0, 2)) + 1  # (P,) the position of a response's first token
        self.tokens, self.step, self.record = 0, None, kernels.recorded if graphs else partial
        self.check_every = kernels.tokens_between_checks(device)
        self.decode_step = self.decode_once if sharded else kernels.compiled(self.decode_once, device)

    def next_logits(self, prompts, ids, mask, positions):
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        inputs |= image_inputs(self.model, prompts)

        def compute(model):
            if self.sharded and prompts and "pixel_values" not in inputs:
                grey_image(model)
            hidden = model.model(**inputs, past_key_values=self.cache, use_cache=True).last_hidden_state
            return model.lm_head(hidden[:, -1:] if prompts else hidden)

        if prompts or self.sharded:  # compiled one by one, each layer would be a graph: the cache goes by their number
            with torch.compiler.set_stance("force_eager"):
                return with_full_params(self.model, compute) if self.sharded else compute(self.model)
        return compute(self.model)

    def prefill(self):
        """Logits (P * G, V) of the first token of each response; the prompts are computed some at a time."""
        P, width = self.ids.shape
        size = P if self.sharded else max(1, self.prefill_tokens // width)  # sharded: as often on all processes
        parts = [slice(start, start + size) for start in range(0, P, size)]
        inputs = [(self.ids[p], self.real[p], self.positions[:, p].squeeze(0)) for p in parts]
        logits = torch.cat([self.next_logits(self.prompts[p], *x) for p, x in zip(parts, inputs)])  # (P, 1, V)
        return logits[:, 0].repeat_interleave(self.group_size, 0)

    def decode_once(self, tokens, real, after):  # waits for no value of a tensor, so that it can be recorded
        cache, G = self.cache, self.group_size
        own = (torch.arange(cache.capacity, device=tokens.device) <= cache.written).expand(len(tokens), -1)
        sees = torch.cat([real, own], 1)[:, None, None]  # (P, 1, 1, Lp + capacity)
        at = (after + cache.written)[:, None].expand(len(self.positions), -1, G).squeeze(0)
        return self.next_logits([], tokens, sees, at).flatten(0, 1)

    def decode(self, tokens):
        """Logits (P * G, V) of the tokens after these, (P, G); grows the cache, and records a graph of a new shape."""
        if self.tokens % self.capacity == 0:
            self.cache.grow(self.group_size, self.tokens + self.capacity)
            self.step = None
        if self.step is None:  # the last graph is freed before the next one takes memory
            self.static_input = tokens.clone()
            self.step = self.record(self.decode_step, self.static_input, self.real, self.after)
        self.static_input.copy_(tokens)
        logits = self.step()
        self.cache.written += 1
        self.tokens += 1
        return logits

    def prune(self, ended):
        """Whether a response goes on; once half of the prompts have only ended (P, G) responses, they leave the batch.

        Looks at every `check_every`-th token: the host has to wait for the GPU to see it.
        """
        if self.tokens == 0 or self.tokens % self.check_every:
            return True
        still_active = (~ended[self.active].all(1)).nonzero()[:, 0]
        if 1 < len(still_active) <= len(self.active) // 2:  # a batch of one prompt would be compiled once more
            self.active, self.real, self.after = (x[still_active] for x in (self.active, self.real, self.after))
            self.cache.select(still_active)
            self.step = None
        return on_any_process(len(still_active), self.sharded)


@torch.no_grad()
def generate(model, prompts, group_size, sample, uniforms, eos, pad_id, **options):
    """G responses to each of P prompts, in one batch.

    Args: `sample` from `make_sampler`; `uniforms` (P * G, T) in [0, 1), one for each token to come; `eos`: tokens that
    end a response; options: see `Batch`.
    Returns responses (P * G, t) and their mask, True up to and including the first of the `eos` tokens.
    """
    batch = Batch(model, prompts, group_size, pad_id, **options)
    uniforms = uniforms.view(len(prompts), group_size, -1).to(model.device)  # (P, G, T)
    eos = torch.tensor(eos, device=model.device)
    responses = torch.full(uniforms.shape, pad_id, device=model.device)  # (P, G, T)
    ended = torch.zeros(uniforms.shape[:2], dtype=torch.bool, device=model.device)  # (P, G)
    logits = batch.prefill()
    for t in range(uniforms.shape[2]):
        active = batch.active
        tokens = sample(logits, uniforms[active, :, t].flatten()).view(-1, group_size)
        responses[active, :, t] = torch.where(ended[active], pad_id, tokens)
        ended[active] |= torch.isin(tokens, eos)
        if t + 1 == uniforms.shape[2] or not batch.prune(ended):
            break
        logits = batch.decode(responses[batch.active, :, t])
    responses = responses[:, :, : t + 1].flatten(0, 1)
    is_end = torch.isin(responses, eos)
    return responses, (is_end.cumsum(1) - is_end.long()) == 0


def rollout(model, tokenizer, prompts, args, step, part=slice(None), temperature=None, capacity=None):
    """G responses to each prompt, as a list of `Group`s, or a part of these G; equal for any batch and any processes.

    Every token's random number comes from --seed, the step and the prompt (its row, and its number in the stream).
    `capacity`: the cache grows by so many tokens; None: by 128, or by as many as a response may have.
    """
    G = len(range(args.group_size)[part])
    temperature = args.temperature if temperature is None else temperature
    sample = make_sampler(banned_tokens(model, tokenizer), temperature, args.top_p, args.top_k)
    eos, groups = end_tokens(model, tokenizer), []
    not_text = {*eos, tokenizer.pad_token_id}
    training, _ = model.training, model.eval()
    options = {
        "capacity": capacity or min(CACHE_STEP, args.max_response_tokens),
        "prefill_tokens": args.tokens_per_row,
        "sharded": args.reshard_while_sampling and is_sharded(model),
        "graphs": args.cuda_graphs,
    }
    for start in range(0, len(prompts), args.rollout_prompts):
        batch = prompts[start : start + args.rollout_prompts]
        size = (args.group_size, args.max_response_tokens)
        tables = [torch.rand(size, generator=seeded(args.seed, step, p.index, p.prompt_id)) for p in batch]
        uniforms = torch.cat([table[part] for table in tables])
        responses, mask = generate(model, batch, G, sample, uniforms, eos, tokenizer.pad_token_id, **options)
        truncated = ~torch.isin(responses, torch.tensor(eos, device=responses.device)).any(1)
        for prompt, ids, valid, cut in zip(batch, responses.split(G), mask.split(G), truncated.split(G)):
            valid = valid[:, : valid.sum(1).max()]  # (G, T)
            ids = ids[:, : valid.shape[1]].masked_fill(~valid, tokenizer.pad_token_id)  # (G, T)
            without_end = [[token for token in tokens if token not in not_text] for tokens in ids.tolist()]
            texts = [prompt.opened + tokenizer.decode(tokens) for tokens in without_end]
            groups.append(Group(prompt, ids, valid, cut, texts))
    model.train(training)
    return groups


# ---------------------------------------------------------------------------------------------------------------------
# Reward: is the answer right, and is it written as asked for
# ---------------------------------------------------------------------------------------------------------------------


def format_reward(response):
    """1.0 for one <think> </think> that comes first and a \\boxed{} that comes after it, else 0.0."""
    match = re.fullmatch(r"\s*<think>(.*?)</think>(.*)", response, re.DOTALL)
    return float(bool(match) and "<think>" not in match[1] + match[2] and extract_answer(match[2]) is not None)


class Reward:
    """The rewards of groups: a weighted sum of accuracy and format, or the user's own function."""

    def __init__(self, args):
        self.args, self.check = args, Checker(args.check_seconds)
        self.custom = load_reward(args.reward) if args.reward else None

    def __call__(self, groups):
        """The groups, with accuracy, format and rewards (G,)."""
        args = self.args
        for group in groups:
            group.accuracy = torch.tensor([float(self.check(text, group.prompt.answer)) for text in group.texts])
            group.format = torch.tensor([format_reward(text) for text in group.texts])
            group.rewards = args.accuracy_weight * group.accuracy + args.format_weight * group.format
        if self.custom:
            rows = [(g.prompt.problem, text, g.prompt.answer) for g in groups for text in g.texts]
            rewards = torch.tensor(self.custom(*map(list, zip(*rows)))).view(len(groups), -1)  # (P, G)
            for group, group_rewards in zip(groups, rewards):
                group.rewards = group_rewards
        return groups


def stack_rewards(groups, group_size):
    """(P, G) rewards of groups; (0, G) of none."""
    return torch.stack([g.rewards for g in groups]) if groups else torch.zeros(0, group_size)


# ---------------------------------------------------------------------------------------------------------------------
# Forward: one packed row per group
# ---------------------------------------------------------------------------------------------------------------------


def pack_rows(groups, advantages, args):
    """Packed rows, one per group, or more if a group is longer than --tokens_per_row; with advantages and loss_mask.

    advantages (P, G). Groups of equal rewards become rows too: their tokens count in the loss's denominator.
    """
    rows = []
    for i, group in enumerate(groups):
        group.zero_advantage = not advantages[i].any()
        group.advantages = advantages[i].to(group.mask.device)
        group.loss_mask = group.mask & ~group.truncated[:, None] if args.drop_truncated else group.mask
        rows += split_group(group, args.tokens_per_row)
    return rows


def split_group(group, budget):
    """The group as rows of at most `budget` tokens: itself, or slices of it, each of at least one response."""
    cost, rows, start = len(group.prompt.input_ids), [], 0
    total = cost
    for i, length in enumerate(group.lengths):
        if i > start and total + length > budget:
            rows.append(group[start:i])
            start, total = i, cost
        total += length
    return [*rows, group[start:]]


def dummy_row(group):
    """A row of weight 0, of a group's first response: for a process that has no row left while others have."""
    row = group[:1]
    zeros = torch.zeros(row.mask.shape, device=row.mask.device)
    row.advantages, row.loss_mask = zeros[:, 0], zeros.bool()
    row.old_logps = row.ref_logps = row.scores = row.weights = zeros
    return row


def longest_row(prompt, args):
    """The longest row that the settings allow for a prompt: to see, before the first step, whether it fits."""
    G, T = args.group_size, args.max_response_tokens
    tokens, mask = torch.zeros(G, T, dtype=torch.long), torch.ones(G, T, dtype=torch.bool)
    group = Group(prompt, tokens, mask, truncated=torch.ones(G), texts=[""] * G)
    return max(split_group(group, args.tokens_per_row), key=lambda row: sum(row.lengths))


def pack(row, device):
    """The row [prompt | response 1 | ... | response B] as model inputs, and indices into it; made once, on the host.

    A response attends to the prompt and to itself, and its position ids continue from the prompt's. Returns a dict:
      inputs   what the model is called with: input_ids (1, L), position_ids, and the segments for `kernels.attend`
      targets  (N,) the tokens of all responses, response by response
      read     (N,) the index in the row of the state that predicts each of them
      written  (N,) their indices in a flattened (B, T)
      images   the indices of the image tokens in the row
    """
    if row.packed:
        return row.packed
    prompt, T = row.prompt, row.mask.shape[1]
    shared = len(prompt.input_ids)
    lengths = torch.tensor([shared, *row.lengths])  # of the segments: the prompt and the responses
    L = int(lengths.sum())
    step = torch.cat([torch.arange(n) for n in row.lengths])  # (N,) the index of each token in its response
    after_prompt = (prompt.position_ids.max() + 1 + step).expand(len(prompt.position_ids), -1)
    position_ids = torch.cat([prompt.position_ids, after_prompt], 1)  # (3 or 1, L)
    first, *responses = torch.arange(L).split(lengths.tolist())  # the indices of each segment
    seen = torch.cat([first, *(indices for response in responses for indices in (first, response))])
    keys = lengths + shared * (torch.arange(len(lengths)) > 0)  # how many keys each segment attends to
    host = {
        "read": torch.where(step == 0, shared - 1, torch.arange(shared - 1, L - 1)),
        "written": torch.cat([i * T + torch.arange(n) for i, n in enumerate(row.lengths)]),
        "images": prompt.image_mask.nonzero()[:, 0],
        "position_ids": position_ids[:, None].squeeze(0),
        "attention_mask": seen[None, None, None],  # indices: transformers passes four dimensions on unchanged
        "starts": pad(lengths.cumsum(0), (1, 0)).int(),
        "key_starts": pad(keys.cumsum(0), (1, 0)).int(),
        "prompt": prompt.input_ids,
    }
    sent = {name: kernels.send(value, device) for name, value in host.items()}
    targets = row.responses.to(device).flatten()[sent["written"]]
    inputs = {
        "input_ids": torch.cat([sent["prompt"], targets])[None],
        "position_ids": sent["position_ids"],
        "attention_mask": sent["attention_mask"],
        "segments": (sent["starts"], sent["key_starts"], (int(lengths.max()), int(keys.max()))),
    }
    indices = {name: sent[name] for name in ("read", "written", "images")}
    row.packed.update(inputs=inputs, targets=targets, **indices)
    return row.packed


def unpack(values, row):
    """Values (N, ...), one per response token, response by response, as (B, T, ...) with 0 on padding."""
    out = values.new_zeros(row.mask.numel(), *values.shape[1:])
    return out.index_copy(0, pack(row, values.device)["written"], values).view(*row.mask.shape, *values.shape[1:])


def forward(model, row, temperature=1.0, layer_hook=None):
    """Log-probs and entropies of a row's response tokens, from one packed forward pass.

    `layer_hook`: called with the row's detached hidden states (L, D) before each layer, the embeddings first, and after
    the final norm. Returns logps (B, T) and entropy (B, T) in nats, over the full vocabulary at the sampling
    temperature, that is, before top_k and top_p cut it; hidden (L, D), the whole row's states after the final norm.
    """
    packed = pack(row, model.device)

    def compute(model):
        images = image_inputs(model, [row.prompt])
        nothing = 0  # or the tower's output times 0: its weights are gathered forward and backward on every process
        if is_sharded(model) and not images:
            nothing = 0 * grey_image(model)
        with layer_hooks(model.model.language_model.layers, layer_hook):
            hidden = model.model(**packed["inputs"], **images, use_cache=False).last_hidden_state[0] + nothing
        if layer_hook:
            layer_hook(hidden.detach())
        states = hidden.index_select(0, packed["read"])  # (N, D)
        return *token_logps(states, model.lm_head.weight, packed["targets"], temperature), hidden

    logps, entropy, hidden = with_full_params(model, compute)
    return unpack(logps, row), unpack(entropy, row), hidden


@contextlib.contextmanager
def layer_hooks(layers, hook):
    """Calls `hook`, if any, with what each layer reads; not again when the backward pass recomputes a layer."""
    handles = [layer.register_forward_pre_hook(lambda _, args: hook(args[0][0].detach())) for layer in layers if hook]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def response_and_image_states(hidden, row):
    """Of a packed row's hidden states (L, D): each response token's own (B, T, D), and those of the image (N, D)."""
    return unpack(hidden[len(row.prompt.input_ids) :], row), hidden[pack(row, hidden.device)["images"]]


def token_logps(hidden, weight, targets, temperature=1.0, chunk=HEAD_CHUNK):
    """log p(target) and entropy in nats, each (N,) fp32, from hidden states (N, D), the head's weight (V, D) and
    targets (N,).

    The (N, V) logits never exist as a whole: chunks of tokens, recomputed in the backward pass. Both values leave a
    chunk as one tensor: of two, one without a part in the loss would keep what is recomputed for it, 8 V bytes a token.
    """

    def head(hidden, targets):
        logps = (linear(hidden, weight).float() / temperature).log_softmax(-1)
        return torch.stack([logps.gather(-1, targets[:, None])[:, 0], -(logps.exp() * logps).sum(-1)])

    head = kernels.compiled(head, hidden.device)
    parts = [checkpoint(head, h, t, use_reentrant=False) for h, t in zip(hidden.split(chunk), targets.split(chunk))]
    logps, entropy = torch.cat(parts, 1)
    return logps, entropy


@torch.no_grad()
def compare_states(function, weight, *hidden, temperature=1.0, chunk=HEAD_CHUNK):
    """What `function(*logits)` says of the distributions that N tokens have under several hidden states (N, D).

    It is given fp32 logits (n, V) over the temperature, one for each hidden state, for a chunk of tokens at a time, and
    returns tensors (n,). Returns these as (N,). The (N, V) logits never exist as a whole. A token's distribution comes
    from the state of the position before it. weight: the head's, (V, D).
    """
    size = max(1, chunk // len(hidden))
    parts = []
    for states in zip(*(x.split(size) for x in hidden)):
        parts.append(function(*(linear(x, weight).float() / temperature for x in states)))
    return [torch.cat(part) for part in zip(*parts)]


def compare_logits(function, model, row, *hidden, **options):
    """`compare_states` of a row's response tokens, from hidden states (L, D); returns (B, T), 0 on padding."""
    read = pack(row, model.device)["read"]

    def compute(model):
        return compare_states(function, model.lm_head.weight, *(x[read] for x in hidden), **options)

    return [unpack(value, row) for value in with_full_params(model, compute)]


# ---------------------------------------------------------------------------------------------------------------------
# What several methods share: perturbed images, and scores of tokens
# ---------------------------------------------------------------------------------------------------------------------


def with_image(row, change):
    """The row with `change(pixel_values)` instead of its images; itself where it has none."""
    if row.prompt.pixel_values is None:
        return row
    changed = copy.copy(row)  # shares what `pack` makes
    changed.prompt = dataclasses.replace(row.prompt, pixel_values=change(row.prompt.pixel_values))
    return changed


def normal_noise(shape, generator, device):
    """Standard normal noise on a device, drawn on the generator's, which may be another."""
    return torch.randn(shape, generator=generator, device=generator.device).to(device)


def still_noise(pixel_values, generator):
    """Standard normal noise for pixel_values (patches, 3 x 2 x p x p): channel, time, height and width of a patch.

    An image is repeated in time, and both copies get the same noise.
    """
    shape = (len(pixel_values), 3, 1, pixel_values.shape[1] // 6)
    return normal_noise(shape, generator, pixel_values.device).expand(-1, -1, 2, -1).flatten(1)


def blacken(pixel_values, generator, image_mean, image_std, probability, places=slice(None)):
    """Each patch (14 or 16 pixels) black with this probability (PAPO, arXiv 2507.06448), those of a place together."""
    black = (-torch.tensor(image_mean) / torch.tensor(image_std)).repeat_interleave(pixel_values.shape[1] // 3)
    chosen = torch.rand(len(pixel_values), 1, generator=generator, device=generator.device)[places] < probability
    return torch.where(chosen.to(pixel_values.device), black.to(pixel_values.device), pixel_values)


def token_uniforms(row, seed, step):
    """Uniform numbers (B, T) in [0, 1) that depend on seed, step, prompt and response alone."""
    keys = [(seed, step, row.prompt.index, row.prompt.prompt_id, text) for text in row.texts]
    return torch.stack([torch.rand(row.mask.shape[1], generator=seeded(*key)) for key in keys]).to(row.mask.device)


def min_max(values, mask, eps=1e-8):
    """Values (B, T) to [0, 1] over the valid tokens of each response, 0 on padding and where all of them are equal.

    The range is floored at eps, not increased by it: the smallest token has exactly 0 and the largest exactly 1.

    >>> min_max(torch.tensor([[3.0, 1.0, 2.0, 9.0]]), torch.tensor([[True, True, True, False]]))
    tensor([[1.0000, 0.0000, 0.5000, 0.0000]])
    """
    low = values.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    high = values.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
    return torch.where(mask, (values - low) / (high - low).clamp(min=eps), 0.0)


def kept_tokens(mask, ratio):
    """(B,) how many tokens of each response are kept: ceil(ratio T)."""
    return (mask.sum(1).double() * ratio - 1e-9).ceil().long()  # in floats 0.07 x 100 is above 7


def select_top(scores, mask, ratio):
    """(B, T) True on the `kept_tokens` best of each response; of equal ones the earlier. Padding is never chosen.

    >>> select_top(torch.tensor([[0.1, 0.9, 0.3, 0.2, 0.9]]), torch.ones(1, 5, dtype=torch.bool), ratio=0.4)
    tensor([[False,  True, False, False,  True]])
    """
    order = scores.masked_fill(~mask, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    return order.argsort(1) < kept_tokens(mask, ratio)[:, None]  # rank < k


def quantiles(name, values, mask):
    """5, 50 and 95 % of the values (B, T) at valid tokens, named for the log."""
    valid = values.float().masked_fill(~mask, torch.nan)
    return {f"{name}_p{level:02d}": valid.nanquantile(level / 100) for level in (5, 50, 95)}


# ---------------------------------------------------------------------------------------------------------------------
# Advantages and loss: plain tensors in, plain tensors out
# ---------------------------------------------------------------------------------------------------------------------


def group_advantages(rewards, eps=1e-6):
    """(P, G) rewards -> (P, G) advantages: (r - mean) / (std + eps) in each group; 0 where all are equal.

    GRPO (arXiv 2402.03300, section 4.1.2); Bessel's correction of the std, and eps, are EasyR1's and verl's. Raises
    ValueError for G = 1, which would be a NaN.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]))
    tensor([[ 0.8660, -0.8660, -0.8660,  0.8660],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    if rewards.shape[1] < 2:
        raise ValueError(f"a group of {rewards.shape[1]} response has nothing to compare with: G must be 2 or more")
    centred = rewards - rewards.mean(1, keepdim=True)
    std = (centred.square().sum(1, keepdim=True) / (rewards.shape[1] - 1)).sqrt()
    equal = (rewards == rewards[:, :1]).all(1, keepdim=True)
    return torch.where(equal, 0.0, centred / (std + eps))


def aggregate(values, mask, aggregation="token", denominator=None):
    """(B, T) -> scalar. "token" (DAPO): sum over valid tokens / their number. "sequence" (GRPO): mean over each
    response's tokens, summed / number of responses. `denominator`: that number for the whole mini-batch over all
    processes, so that any split into micro-batches sums to the same loss; None: of this batch.

    >>> aggregate(torch.tensor([[1.0, 2.0], [6.0, 0.0]]), torch.tensor([[True, True], [True, False]]))
    tensor(3.)
    >>> aggregate(torch.tensor([[1.0, 2.0], [6.0, 0.0]]), torch.tensor([[True, True], [True, False]]), "sequence")
    tensor(3.7500)
    """
    values = torch.where(mask, values, 0.0)
    if aggregation == "sequence":
        values = values.sum(1) / mask.sum(1).clamp(min=1)
    if denominator is None:
        return values.sum() / loss_denominator(mask, aggregation).clamp(min=1)
    return values.sum() / max(denominator, 1)


def loss_denominator(mask, aggregation="token"):
    """Valid tokens, or responses with a valid token, as a tensor: what `aggregate` divides by."""
    return mask.sum() if aggregation == "token" else mask.any(1).sum()


def policy_loss(logps, old_logps, advantages, mask, clip_low=0.2, clip_high=0.2, aggregation="token", denominator=None):
    """The clipped loss of PPO and GRPO (arXiv 2402.03300, eq. 3), with DAPO's two clip ranges (2503.14476, eq. 8).

        -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A),  ratio = exp(logp - old_logp)

    Args: logps, old_logps, mask (B, T); advantages (B,) or (B, T); aggregation and denominator as in `aggregate`.
    Returns (loss, info): `clip_fraction`, the share of tokens where the clipped product is the smaller one, and
    `approx_kl`, the mean of ratio - 1 - log(ratio).

    >>> logps = torch.tensor([[0.5, -0.5]]).log1p()  # ratio 1.5 and 0.5
    >>> loss, info = policy_loss(logps, torch.zeros(1, 2), torch.ones(1), torch.ones(1, 2, dtype=torch.bool))
    >>> round(loss.item(), 4), info["clip_fraction"].item()  # -(1.2 + 0.5) / 2
    (-0.85, 0.5)
    """
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    log_ratio = torch.where(mask, logps - old_logps, 0.0).clamp(-20, 20)
    ratio = log_ratio.exp()
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    loss = aggregate(-torch.min(unclipped, clipped), mask, aggregation, denominator)
    info = {
        "clip_fraction": aggregate((clipped < unclipped).float(), mask).detach(),
        "approx_kl": aggregate(log_ratio.expm1() - log_ratio, mask).detach(),
    }
    return loss, info


def kl_penalty(logps, ref_logps):
    """(B, T) k3 estimate of KL(policy || reference): exp(ref - logp) - (ref - logp) - 1 (arXiv 2402.03300, eq. 4).

    As a loss on the policy's samples its gradient is that of the reverse, KL(reference || policy).

    >>> kl_penalty(torch.tensor([[-1.0]]), torch.tensor([[-2.0]]))
    tensor([[0.3679]])
    """
    log_ratio = (ref_logps - logps).clamp(-20, 20)
    return log_ratio.expm1() - log_ratio
