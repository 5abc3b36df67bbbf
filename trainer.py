"""The trainer: what a script's `main` calls by name, in that order, and what happens between two steps.

    for step in trainer.steps():             logs, evaluates and saves after each step
        with trainer.phase("rollout"):       draw_prompts, reward, keep_groups, until the step is full
        with trainer.phase("score"):         with_gradient: the rows that a pass is made of
        with trainer.phase("update"):        minibatches, with_gradient, record, clip_gradients, optimizer, scheduler

Not here: a method (its file), the arithmetic of a token (common.py), and how things are sharded, counted, written and
drawn (plumbing/).
"""

import contextlib
import dataclasses
import math
import signal
import sys
import time
from pathlib import Path

import torch
import transformers
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from common import Reward, checkpoint_layers, dummy_row, forward, load_models, longest_row, loss_denominator, rollout
from plumbing import checkpoints
from plumbing.arguments import UserError, model_source
from plumbing.data import Data, Stream, some_of
from plumbing.families import processor_files
from plumbing.kernels import bf16_products, use_cores
from plumbing.memory import choose_checkpointing, dry_run, errors_of_a_gpu, trial_update
from plumbing.metrics import Metrics, draw_curves, evaluation_metrics, means, read_runs, shown
from plumbing.sharding import clip_gradients, local, on_main, start_processes, unsharded

LOGGED = ["reward", "accuracy", "format", "response_tokens", "truncated", "zero_advantage_groups"]
LOGGED += ["loss", "entropy", "clip_fraction", "approx_kl"]  # in every line of metrics.jsonl, null if not measured
RUINED = "the checkpoints are intact; look at skipped_updates in metrics.jsonl, and lower --learning_rate"


class Trainer:
    """Model, data, optimizer, checkpoints and log of one training run, on one process or several."""

    def __init__(self, args):
        self.args, self.output = args, Path(args.output)
        self.on_signals(lambda *_: sys.exit(130))  # nothing is lost while the model is loading
        if args.dry_run:
            print(dry_run(args))
            raise SystemExit(0)
        self.accelerator = start_processes(args)
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main = self.rank == 0
        self.metrics = Metrics(self.accelerator, self.output / "metrics.jsonl")
        self.seconds = {}  # of each phase of a step
        folder, state = checkpoints.find_checkpoint(args)
        why = choose_checkpointing(args, self.world_size)
        self.print_main(f"{why}; {use_cores()}")
        self.processor, self.model, self.reference = load_models(args, self.accelerator, folder)
        self.tokenizer, source = self.processor.tokenizer, (model_source(args), args.model_revision)
        self.processor_files = on_main(lambda: processor_files(*source, self.processor.image_processor))
        self.load_data()
        self.make_optimizer()
        self.check_memory()
        self.restore(folder, state)
        self.on_signals(self.stop)
        self.lock = on_main(lambda: checkpoints.open_output(args, folder, state))
        if self.changed:
            self.metrics.write({"step": self.step, "changed": self.changed})
        if args.report_to:
            self.accelerator.init_trackers(self.output.name, config=dataclasses.asdict(args))

    def on_signals(self, handler):
        """Ctrl-C, and the SIGTERM of a scheduler."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handler)

    def load_data(self):
        args = self.args
        self.data = Data(args.data, args.data_split, args, self.processor, self.model)
        self.eval_data = self.data.for_evaluation() if args.eval_rows else None
        self.print_main(f"training on {self.data}")
        if args.eval_rows:
            nothing = "nothing: too few rows to hold some out, and no --eval_data"
            self.print_main(f"evaluating on {self.eval_data or nothing}")
        self.reward = Reward(args)

    def make_optimizer(self):
        args = self.args
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        settings = {"betas": (0.9, args.beta2), "weight_decay": args.weight_decay}
        fused = self.accelerator.device.type == "cuda"  # foreach would need another copy of the parameters
        self.optimizer = torch.optim.AdamW(self.parameters.values(), args.learning_rate, fused=fused, **settings)
        shape = "constant_with_warmup" if args.schedule == "constant" else args.schedule
        spans = args.warmup_steps * args.updates_per_step, args.steps * args.updates_per_step
        self.scheduler = transformers.get_scheduler(shape, self.optimizer, *spans)

    def check_memory(self):
        """Runs out of memory now and not after hours (but for what a method adds), if it is too small.

        Computes an update for nothing on the largest row that the settings allow, and samples a token with a full
        cache. On one process checkpointing is turned on first, unless it was set.
        """
        args, prompt = self.args, self.data.prompt(self.data.longest_row)

        def backward():
            with self.bf16_weights(gradients=True):
                logps, entropy, _ = forward(self.model, longest_row(prompt, args), args.temperature)
                (0 * (logps + entropy).sum()).backward()

        def less_memory():
            args.gradient_checkpointing = True
            checkpoint_layers(self.model)
            self.print_main("gradient checkpointing: on, an update does not fit without it")

        can_turn_on = not args.gradient_checkpointing and self.world_size == 1  # others would wait inside the pass
        with self.phase("update"):
            trial_update(self.optimizer, backward, less_memory if can_turn_on else None)
        prompts = [prompt] * min(args.rollout_prompts, args.prompts_per_step // self.world_size)
        short = dataclasses.replace(args, max_response_tokens=2)
        with self.phase("rollout"):
            rollout(self.model, self.tokenizer, prompts, short, "check_memory", capacity=args.max_response_tokens)

    def restore(self, folder, state):
        """Counters, history, optimizer and the position in the data: of a new run, or those of a checkpoint."""
        self.step, self.saved, self.changed, self.stopping, self.skipped_in_a_row = 0, None, {}, False, 0
        self.history, position = {"first_eval": None, "last_eval": None, "seconds": 0.0}, 0
        if state:
            self.changed = checkpoints.changes(self.args, state, self.data.contents)
            checkpoints.restore_optimizer(folder, self.optimizer, self.parameters, state)
            for _ in range(state.updates):
                self.scheduler.step()
            self.step, self.saved, self.history, position = state.step, state.step, state.history, state.position
            self.print_main(f"resuming after step {self.step}, from {folder}")
        self.stream = Stream(self.data, self.args.seed, self.rank, self.world_size, position)

    # ---- what `main` calls, in this order ---------------------------------------------------------------------------

    def steps(self):
        """Yields the number of each step; logs, evaluates and saves after it; ends with the last step or on Ctrl-C."""
        if self.step == 0 and self.eval_data:
            self.evaluate()
        with tqdm(total=self.args.steps, initial=self.step, disable=not self.is_main, unit="step") as self.bar:
            for step in range(self.step + 1, self.args.steps + 1):
                self.begin = time.perf_counter()
                self.seconds = {"rollout": 0.0, "score": 0.0, "update": 0.0}
                self.draws, self.grad_norms, self.learning_rate = 0, [], math.nan
                yield step
                self.step = step
                self.log()
                self.stopping = self.all_reduce(self.stopping) > 0  # all processes evaluate, or none
                if self.eval_data and self.due(self.args.eval_every) and not self.stopping:
                    self.evaluate()
                if self.due(self.args.save_every) or self.stopping:
                    self.save()
                if self.stopping:
                    break
        self.close()

    def due(self, every):
        """Whether something that is done every so many steps (0: never), and after the last one, is due."""
        return self.step == self.args.steps or (every > 0 and self.step % every == 0)

    @contextlib.contextmanager
    def phase(self, name):
        """Times a phase of the step, and computes in bf16 if the run does; in "rollout" the weights are unsharded."""
        start = time.perf_counter()
        with contextlib.ExitStack() as stack:
            stack.enter_context(errors_of_a_gpu(name))
            stack.enter_context(self.accelerator.autocast())
            if name == "rollout" and not self.args.reshard_while_sampling:
                stack.enter_context(unsharded(self.model))
            if name in ("rollout", "score"):
                stack.enter_context(self.bf16_weights(gradients=False))
            yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        if torch.cuda.is_available() and name == "rollout":
            torch.cuda.empty_cache()  # avoids fragmentation in the update
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def bf16_weights(self, gradients):
        """Casts the weights to bf16 once, on one process; FSDP2 does it on several, and LoRA's base is bf16 already."""
        alone = self.world_size == 1 and not self.args.lora_rank and self.accelerator.mixed_precision == "bf16"
        return bf16_products(self.model, gradients) if alone else contextlib.nullcontext()

    def draw_prompts(self, groups):
        """This process's share of the next --prompts_per_step prompts; [] when `groups` of all processes are enough.

        With --filter_groups also [] after --filter_tries draws: the step goes on with the groups there are.
        """
        args, found = self.args, self.all_reduce(len(groups))
        if found >= args.prompts_per_step:
            return []
        if self.draws >= args.filter_tries:
            self.print_main(f"step {self.step + 1}: {found:.0f} prompts of mixed success in {self.draws} draws")
            return []
        self.draws += 1
        return self.stream.draw(args.prompts_per_step)

    def keep_groups(self, groups, sampled):
        """The step's groups so far and the `sampled` ones, --prompts_per_step at most over all processes.

        With --filter_groups only those of mixed success are kept (DAPO, 2503.14476, eq. 11). Logs what was sampled.
        """
        self.sampled, kept = sampled, [*groups]
        self.metrics.add_groups(sampled)
        for group in sampled:
            mixed = 0.01 < group.accuracy.mean() < 0.99  # as in VGPO's code
            if self.args.reward:  # a custom reward: accuracy may mean nothing
                mixed = bool((group.rewards != group.rewards[0]).any())
            if mixed or not self.args.filter_groups:
                kept.append(group)
        if self.args.filter_groups:
            self.metrics.add("filtered_groups", len(groups) + len(sampled) - len(kept), len(sampled))
        ids = sorted(gather_object([group.prompt.prompt_id for group in kept]))[: self.args.prompts_per_step]
        return [group for group in kept if group.prompt.prompt_id in ids]

    def with_gradient(self, rows, keep_zero_advantage=False):
        """The rows to compute, the longest first, and as many on each process: dummy rows, of no weight, fill up.

        Groups with equal rewards have no gradient and are left out, unless a KL term, an entropy bonus (VEPO has one)
        or a method's own term (`keep_zero_advantage`) gives them one. The number is equal because sharded weights are
        gathered by all processes together; the longest come first because all wait for the longest row of a turn.
        """
        everything = keep_zero_advantage or self.args.kl_coef or self.args.entropy_coef
        rows = [row for row in rows if everything or not row.zero_advantage]
        rows = sorted(rows, key=lambda row: -len(row.prompt.input_ids) - sum(row.lengths))
        return rows + [dummy_row(self.sampled[0])] * (max(gather_object([len(rows)])) - len(rows))

    def minibatches(self, rows):
        """Lists of rows, --updates_per_step at most, each of an equal share of the step's prompts in stream order."""
        ids = sorted({*gather_object([row.prompt.prompt_id for row in rows])})
        size = max(1, math.ceil(len(ids) / self.args.updates_per_step))
        for start in range(0, len(ids), size):
            with self.bf16_weights(gradients=True):  # cast again after each step of the optimizer
                yield [row for row in rows if row.prompt.prompt_id in ids[start : start + size]]

    def denominator(self, minibatch):
        """What the loss of a mini-batch is divided by: its tokens (or responses), over all processes."""
        return self.all_reduce(sum(loss_denominator(row.loss_mask, self.args.aggregation) for row in minibatch))

    def all_reduce(self, value):
        """The sum of a number over all processes."""
        return sum(gather_object([float(value)]))

    def record(self, loss, info, mask):
        """For the log: the loss, and `info`, means of a row, weighted by its number of tokens in `mask`."""
        self.metrics.add("loss", loss.detach(), 0)  # `clip_gradients` adds the weight, once per update
        self.metrics.add_means(info, mask)

    def clip_gradients(self):
        """The norm of the gradients over all processes, before they are clipped to --max_grad_norm.

        Raises UserError after 20 norms in a row that are not finite: nothing is learned any more.
        """
        norm = clip_gradients([*self.parameters.values()], self.args.max_grad_norm)
        self.skipped_in_a_row = 0 if math.isfinite(norm) else self.skipped_in_a_row + 1
        if self.skipped_in_a_row:
            self.print_main(f"step {self.step + 1}: the gradient is not finite; this update is skipped")
        if self.skipped_in_a_row == 20:
            raise UserError(f"20 updates in a row had no finite gradient, the last in step {self.step + 1}: {RUINED}.")
        self.grad_norms.append(norm)
        self.learning_rate = self.optimizer.param_groups[0]["lr"]
        self.metrics.add("loss", 0, 1 / self.world_size)  # the log holds the mean over updates
        return norm

    # ---- between two steps ------------------------------------------------------------------------------------------

    def print_main(self, text, file=None):
        """A line on the console, by one process: on stderr, where the progress bar is, except for results."""
        if self.is_main:
            tqdm.write(text, file=file or sys.stderr)

    def log(self):
        """Writes the step's line of metrics.jsonl, moves the bar, and now and then shows a response."""
        seconds = time.perf_counter() - self.begin
        self.history["seconds"] += seconds
        sums, norms = self.metrics.sums(LOGGED), [norm for norm in self.grad_norms if math.isfinite(norm)]
        line = {
            "step": self.step,
            **means(sums),
            "grad_norm": sum(norms) / len(norms) if norms else math.nan,
            "skipped_updates": len(self.grad_norms) - len(norms),
            "learning_rate": self.learning_rate,
            "seconds": seconds,
            **{f"seconds_{name}": value for name, value in self.seconds.items()},
            "tokens_per_second": sums["response_tokens"][0] / seconds,
        }
        self.metrics.write(line)
        self.bar.set_postfix(reward=f"{line['reward']:.2f}", refresh=False)
        self.bar.update()
        if self.args.show_every and self.step % self.args.show_every == 0:
            group = self.sampled[self.step % len(self.sampled)]
            self.print_main(
                f"\nstep {self.step}  {group.prompt.problem.replace('<image>', '')}\n  {group.texts[0].strip()}\n"
                f"  right answer {group.prompt.answer}, reward {group.rewards[0]:.2f}"
            )

    def evaluate(self):
        """Accuracy on --eval_data, one response per row, by the prompt, sampler and checker of training."""
        begin, args, data = time.perf_counter(), self.args, self.eval_data
        rows = some_of(data.indices, args.eval_rows, args.seed)
        mine = rows[self.rank :: self.world_size]
        most = math.ceil(len(rows) / self.world_size)  # as many rows on each process; what fills up is not counted
        padded = mine + rows[:1] * (most - len(mine))
        T = args.max_response_tokens  # with one response to each, more prompts fit than in training
        fit = args.rollout_prompts * (self.data.longest_tokens + args.group_size * T) // (data.longest_tokens + T)
        wide = dataclasses.replace(args, rollout_prompts=max(1, fit))
        sums = torch.zeros(3)
        bar = tqdm(total=most, desc="evaluation", leave=False, disable=not self.is_main, unit="row")
        with bar, self.phase("rollout"):
            for start in range(0, most, wide.rollout_prompts):
                prompts = list(self.stream.pool.map(data.prompt, padded[start : start + wide.rollout_prompts]))
                settings = (wide, "evaluation", slice(1), args.eval_temperature)
                for group in rollout(self.model, self.tokenizer, prompts, *settings)[: len(mine) - start]:
                    right = self.reward.check(group.texts[0], group.prompt.answer)
                    sums += torch.tensor([right, group.mask.sum().item(), group.truncated.sum().item()])
                bar.update(len(prompts))
        shares = [self.all_reduce(value) / len(rows) for value in sums]
        line = {"step": self.step, "eval_data": data.title, **evaluation_metrics(len(rows), *shares)}
        line["eval_seconds"] = time.perf_counter() - begin
        self.history["first_eval"] = self.history["first_eval"] or line
        self.history["last_eval"] = line
        self.metrics.write(line)
        self.print_main(f"step {self.step}: accuracy {shown(line)}")

    def stop(self, *_):
        """Ctrl-C, or a scheduler's SIGTERM: finish the step, save, stop. A second one stops at once."""
        if self.stopping:
            raise SystemExit(130)
        self.stopping = True
        self.print_main("stopping after this step; once more stops at once, without saving")

    def save(self):
        """<output>/step-N, a Hugging Face folder with the training state next to the weights; `last` points to it."""
        if self.saved == self.step:
            return
        self.saved = self.step
        if self.all_reduce(sum(not local(p).isfinite().all() for p in self.parameters.values())):
            raise UserError(f"after step {self.step} the weights are not finite, and are not saved: {RUINED}.")
        state = checkpoints.State(
            step=self.step,
            updates=self.scheduler.last_epoch,
            position=self.stream.position,
            contents=self.data.contents,
            processes=1 if self.args.lora_rank else self.world_size,
            history=self.history,
            script=Path(sys.argv[0]).stem,
            arguments=dataclasses.asdict(self.args),
        )
        trained, folder = (self.model, self.processor_files, self.optimizer, self.parameters), f"step-{self.step}"
        ending = self.stopping or self.step == self.args.steps
        checkpoints.save_checkpoint(self.output / folder, *trained, state, self.args.keep, ending)

    def close(self):
        """The last lines on the console: what was gained, and where the files are."""
        first, last = self.history["first_eval"], self.history["last_eval"]
        self.accelerator.end_training()
        self.reward.check.close()
        self.stream.pool.shutdown()
        if first and last and last["step"] > first["step"]:
            effort = f"in {self.step} steps and {self.history['seconds']:.0f} s of training"
            gain = f"accuracy {first['eval_accuracy']:.1%} -> {shown(last)}, {last['eval_data']}"
            self.print_main(f"{gain}, {effort}", sys.stdout)
        if timeouts := self.reward.check.timeouts:
            self.print_main(f"{timeouts} answers took the maths checker too long and count as wrong")
        if self.is_main:
            draw_curves(read_runs([self.output]), self.output / "curves")
            self.lock.release()
        self.print_main(f"{self.output}/: metrics.jsonl, args.json, curves.png, and the model in last/", sys.stdout)
        if self.stopping:
            self.print_main(f"stopped after step {self.step} of {self.args.steps}: --resume continues the run")
            raise SystemExit(130)
