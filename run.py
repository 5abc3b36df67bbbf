"""The run: what a script's `main` calls by name, in that order, and what happens between two steps.

    for step in run.steps():            logs, evaluates and saves after each
        with run.phase("rollout"):      draw_prompts, reward_groups, add_groups, until the step is full
        rewards, pack_rows              the step's groups as packed rows
        with run.phase("score"):        old log-probs, where a step has several updates
        with run.phase("update"):       minibatches, denominator, backward, update

No method lives here, and no arithmetic of a token (common.py); how things are sharded, counted, written and drawn
stands in plumbing/.
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

from common import (
    Reward,
    checkpoint_layers,
    filler,
    forward,
    load_processor,
    longest,
    loss_denominator,
    reference_model,
    rollout,
    split_group,
    trained_model,
)
from plumbing import checkpoints
from plumbing.arguments import model_source
from plumbing.commandline import UserError
from plumbing.curves import draw_curves, read_runs
from plumbing.data import Data, some_of
from plumbing.families import compile_layers, processor_files
from plumbing.kernels import use_cores
from plumbing.memory import choose_checkpointing, dry_run, out_of_memory
from plumbing.metrics import Metrics, means
from plumbing.sharding import full_tensor, local, on_main, start_processes, sum_gradients, total, unsharded
from plumbing.stream import Stream

ALWAYS_LOGGED = ["reward", "accuracy", "format", "response_tokens", "truncated", "zero_advantage_groups"]
ALWAYS_LOGGED += ["loss", "entropy", "clip_fraction", "approx_kl"]
RUINED = "the checkpoints are as they were; look at skipped_updates in metrics.jsonl, and lower --learning_rate"


class Run:
    """Model, data, optimiser, checkpoints and log of one training run, on one process or several."""

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
        self.seconds = {}  # of the phases of a step
        folder, state = checkpoints.find_checkpoint(args)
        args.gradient_checkpointing, why = choose_checkpointing(args, self.world_size)
        self.say(f"{why}; {use_cores()}")
        self.load_models(folder)
        self.load_data()
        self.make_optimizer()
        self.rehearse()
        self.start_or_restore(folder, state)
        self.on_signals(self.stop)
        self.open_output(folder, state)

    def on_signals(self, handler):
        """Ctrl-C, and the SIGTERM of a scheduler."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handler)

    def load_models(self, checkpoint):
        """Processor, the model that is trained, from a checkpoint where there is one, and the reference model."""
        args, source = self.args, (model_source(self.args), self.args.model_revision)
        self.processor = load_processor(*source, args.min_pixels, args.max_pixels)
        self.processor_files = on_main(lambda: processor_files(*source, self.processor.image_processor))
        self.tokenizer = self.processor.tokenizer
        self.model = trained_model(args, self.accelerator, checkpoint)
        self.reference = reference_model(args, self.accelerator, self.model) if args.kl_coef else None
        for model in filter(None, (self.model, self.reference)):
            compile_layers(model)

    def load_data(self):
        args = self.args
        self.data = Data(args.data, args.data_split, args, self.processor, self.model)
        self.eval_data = self.data.for_evaluation() if args.eval_rows else None
        self.say(f"training on {self.data}")
        if args.eval_rows:
            self.say(f"evaluating on {self.eval_data or 'nothing: too few rows to hold some out, and no --eval_data'}")
        self.reward_groups = Reward(args)

    def make_optimizer(self):
        args = self.args
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        settings = {"betas": (0.9, args.beta2), "weight_decay": args.weight_decay}
        fused = self.accelerator.device.type == "cuda"  # foreach would need another copy of the parameters
        self.optimizer = torch.optim.AdamW(self.parameters.values(), args.learning_rate, fused=fused, **settings)
        shape = "constant_with_warmup" if args.schedule == "constant" else args.schedule
        spans = args.warmup_steps * args.updates_per_step, args.steps * args.updates_per_step
        self.schedule = transformers.get_scheduler(shape, self.optimizer, *spans).lr_lambdas[0]  # of the updates so far

    def rehearse(self):
        """An update, for nothing, on the largest row that the settings allow, and a token sampled with a full cache.

        Memory runs out now, but for what a method adds; on one process checkpointing is turned on then, if it was not
        set. Learning rate and gradients are 0, the state is 0 afterwards.
        """
        args, prompt = self.args, self.data.prompt(self.data.longest_row)
        for p in self.parameters.values():
            p.grad = torch.zeros_like(p)
        self.optimizer.param_groups[0]["lr"] = 0.0
        with self.phase("update"):
            self.optimizer.step()  # its state is there when a forward pass begins, and gradients of the rows before
            for state in self.optimizer.state.values():
                state["step"].zero_()
            if not self.fits(prompt):
                args.gradient_checkpointing = True
                checkpoint_layers(self.model)
                self.say("gradient checkpointing: on, an update does not fit without it")
                self.fits(prompt)
            self.optimizer.zero_grad()
        prompts = [prompt] * min(args.rollout_prompts, args.prompts_per_step // self.world_size)
        short = dataclasses.replace(args, max_response_tokens=2)
        with self.phase("rollout"):
            rollout(self.model, self.tokenizer, prompts, short, "rehearsal", room=args.max_response_tokens)

    def fits(self, prompt):
        """Whether memory is enough for the largest row of this prompt. Raises where checkpointing cannot help."""
        try:
            logps, entropy, _ = forward(self.model, longest(prompt, self.args), self.args.temperature)
            (0 * (logps + entropy).sum()).backward()
            return True
        except torch.OutOfMemoryError:
            if self.args.gradient_checkpointing or self.world_size > 1:  # the others wait inside of the pass
                raise
        torch.cuda.empty_cache()
        return False

    def start_or_restore(self, folder, state):
        """Counters, history and the place in the data: of a new run, or as a checkpoint has them."""
        self.updates, self.step, self.saved, self.stopping, self.skipped_in_a_row = 0, 0, None, False, 0
        self.history, position = {"first_eval": None, "last_eval": None, "seconds": 0.0}, 0
        if state:
            checkpoints.refuse_changes(checkpoints.changes(self.args, state, self.data.contents), self.args)
            checkpoints.restore_optimizer(folder, self.optimizer, self.parameters, state.updates)
            self.updates, self.step, self.saved = state.updates, state.step, state.step
            self.history, position = state.history, state.position
            self.say(f"going on after step {self.step}, from {folder}")
        self.stream = Stream(self.data, self.args.seed, self.rank, self.world_size, position)

    def open_output(self, folder, state):
        """The folder, its lock and log; a resumed run that differs from what it was says so there."""
        self.lock = on_main(lambda: checkpoints.open_output(self.args, folder, state))
        if state and (changed := checkpoints.changes(self.args, state, self.data.contents)):
            self.metrics.write({"step": self.step, "changed": changed})
        if self.args.report_to:
            self.accelerator.init_trackers(self.output.name, config=dataclasses.asdict(self.args))

    # ---- what `main` calls, in this order ---------------------------------------------------------------------------

    def steps(self):
        """Yields the number of each step; logs, evaluates and saves after it; ends with the last step or on Ctrl-C."""
        if self.step == 0 and self.eval_data:
            self.evaluate()
        with tqdm(total=self.args.steps, initial=self.step, disable=not self.is_main, unit="step") as self.bar:
            for step in range(self.step + 1, self.args.steps + 1):
                self.begin = time.perf_counter()
                self.seconds = {"rollout": 0.0, "score": 0.0, "update": 0.0}
                self.groups, self.serials, self.tries, self.norms, self.skipped = [], [], 0, [], 0
                yield step
                self.step = step
                self.log()
                self.stopping = self.all_reduce(self.stopping) > 0  # all processes evaluate, or none
                due = self.args.eval_every and step % self.args.eval_every == 0
                if self.eval_data and (due or step == self.args.steps) and not self.stopping:
                    self.evaluate()
                due = self.args.save_every and step % self.args.save_every == 0
                if due or step == self.args.steps or self.stopping:
                    self.save()
                if self.stopping:
                    break
        self.close()

    @contextlib.contextmanager
    def phase(self, name):
        """Times a phase of the step, and computes in bf16 where the run does; "rollout" finds the weights gathered."""
        start = time.perf_counter()
        gather = name == "rollout" and not self.args.reshard_while_sampling
        try:
            with self.accelerator.autocast(), unsharded(self.model) if gather else contextlib.nullcontext():
                yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                if name == "rollout":
                    torch.cuda.empty_cache()  # the update finds memory in one piece
        except torch.OutOfMemoryError as error:
            raise out_of_memory(name, error, self.args) from None
        except torch._dynamo.exc.TorchDynamoException as error:  # a machine without a compiler, say
            said = " ".join(str(error).split())[:160]
            raise UserError(f"compiling failed ({said}): --compile false leaves it out.") from None
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def draw_prompts(self):
        """This process's share of the next --prompts_per_step prompts; nothing once the step is full."""
        tries = self.args.filter_tries if self.args.filter_groups else 1
        if len(self.serials) >= self.args.prompts_per_step or self.tries >= tries:
            return []
        self.tries += 1
        return self.stream.draw(self.args.prompts_per_step)

    def add_groups(self, groups):
        """Adds groups to the step; with --filter_groups (DAPO, 2503.14476, eq. 11) only those of mixed success."""

        def mixed(group):  # accuracy may mean nothing under a reward of one's own
            own = bool((group.rewards != group.rewards[0]).any())
            return own if self.args.reward else 0.01 < group.accuracy.mean() < 0.99  # as in VGPO's code

        self.sampled = groups  # the last draw, kept or not: what the log shows as a sample
        kept = [group for group in groups if not self.args.filter_groups or mixed(group)]
        add = self.metrics.add
        if self.args.filter_groups:
            add("filtered_groups", len(groups) - len(kept), len(groups))
        for group in groups:
            measured = {"accuracy": group.accuracy, "format": group.format, "reward": group.rewards}
            for name, values in {**measured, "response_tokens": group.mask, "truncated": group.truncated}.items():
                add(name, values.sum(), len(group.texts))
            add("zero_advantage_groups", float((group.rewards == group.rewards[0]).all()), 1)
        serials = sorted(gather_object([group.prompt.serial for group in kept]))
        self.serials = [*self.serials, *serials][: self.args.prompts_per_step]
        self.groups = [group for group in [*self.groups, *kept] if group.prompt.serial in self.serials]

    def rewards(self):
        """(P, G) rewards of the step's groups on this process."""
        return torch.stack([g.rewards for g in self.groups]) if self.groups else torch.zeros(0, self.args.group_size)

    def pack_rows(self, advantages, own_term=False):
        """The step's groups as packed rows: one per group, more where a group is longer than --tokens_per_row.

        Groups of equal rewards have no gradient and are left out, unless KL term, entropy bonus or a method's
        `own_term` gives them one. They count in the denominator.
        """
        rows, self.zero_advantage, terms = [], [], own_term or self.args.kl_coef or self.args.entropy_coef
        for group, group_advantage in zip(self.groups, advantages):
            group.advantages = group_advantage.to(group.mask.device)
            group.loss_mask = group.mask & ~group.truncated[:, None] if self.args.drop_truncated else group.mask
            if terms or group_advantage.any():
                rows += split_group(group, self.args.tokens_per_row)
            else:
                self.zero_advantage.append(group)
        self.groups_are_cut = self.all_reduce(len(rows) + len(self.zero_advantage) - len(self.groups)) > 0  # anywhere
        if len(self.serials) < self.args.prompts_per_step:
            self.say(f"step {self.step + 1}: {len(self.serials)} prompts of mixed success in {self.tries} draws")
        return self.with_fillers(rows)

    def minibatches(self, rows):
        """Lists of rows, --updates_per_step at most, each of an equal share of the step's prompts in stream order."""
        size = math.ceil(len(self.serials) / self.args.updates_per_step)
        for start in range(0, len(self.serials), max(size, 1)):
            serials = self.serials[start : start + size]
            self.not_trained = [group for group in self.zero_advantage if group.prompt.serial in serials]
            yield self.with_fillers([row for row in rows if row.prompt.serial in serials])

    def whole(self, rows):
        """All that the loss of the mini-batch yielded last is a mean over: its rows, and the groups left out of it."""
        return [*rows, *self.not_trained]

    def with_fillers(self, rows):
        """As many rows on each process, since sharded weights are gathered by all together; a filler counts nothing.

        The longest come first on each: all processes wait for the longest row of a turn.
        """
        rows = sorted(rows, key=lambda row: -len(row.prompt.input_ids) - sum(row.lengths))
        return rows + [filler(self.sampled[0])] * (max(gather_object([len(rows)])) - len(rows))

    def denominator(self, rows):
        """Tokens (or responses) that the loss of a mini-batch is divided by: over all its rows and all processes."""
        aggregation = self.args.aggregation
        return self.all_reduce(sum(loss_denominator(row.loss_mask, aggregation) for row in self.whole(rows)))

    def backward(self, loss, info, row, mask):
        """Gradients of one row; `info` goes to the log as the mean over tokens in `mask`, weighted by their number."""
        loss.backward()  # not accelerate's, which would divide by what its environment says
        self.metrics.add("loss", loss.detach(), 0)
        self.metrics.add_means(info, mask)

    def update(self):
        """One optimiser step on the gradients so far; one that is not finite is skipped, and counted.

        Raises UserError after 20 in a row: nothing is learned any more.
        """
        for p in self.parameters.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        sum_gradients(self.parameters.values())
        self.optimizer.param_groups[0]["lr"] = self.args.learning_rate * self.schedule(self.updates)
        foreach = self.accelerator.device.type == "cuda"  # one kernel for all, sharded or not
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.args.max_grad_norm, foreach=foreach)
        torch.clear_autocast_cache()  # bf16 copies of the weights as they were: not beside the optimiser's peak
        norm = full_tensor(norm).item()  # the one number that an update waits for
        if math.isfinite(norm):
            self.optimizer.step()
            self.norms.append(norm)
            self.skipped_in_a_row = 0
        else:
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
            self.say(f"step {self.step + 1}: the gradient is not finite; this update is skipped")
        if self.skipped_in_a_row == 20:
            raise UserError(f"20 updates in a row had no finite gradient, the last in step {self.step + 1}: {RUINED}.")
        self.optimizer.zero_grad()
        self.metrics.add("loss", 0, 1 / self.world_size)  # the log holds the mean over updates
        self.updates += 1

    def all_reduce(self, value):
        """The sum of a number over all processes."""
        return total(float(value), self.accelerator)

    def say(self, text, file=None):
        """A line on the console, by one process: on stderr, where the bar is, but for results."""
        if self.is_main:
            tqdm.write(text, file=file or sys.stderr)

    # ---- between two steps ------------------------------------------------------------------------------------------

    def log(self):
        """Writes the step's line of metrics.jsonl, moves the bar, and now and then shows a response."""
        seconds = time.perf_counter() - self.begin
        self.history["seconds"] += seconds
        sums, updates = self.metrics.sums(ALWAYS_LOGGED), len(self.norms) + self.skipped
        line = {"step": self.step, **means(sums)}
        line |= {
            "grad_norm": sum(self.norms) / len(self.norms) if self.norms else math.nan,
            "skipped_updates": self.skipped,
            "learning_rate": self.optimizer.param_groups[0]["lr"] if updates else math.nan,
            "seconds": seconds,
            **{f"seconds_{name}": value for name, value in self.seconds.items()},
            "tokens_per_second": sums["response_tokens"][0] / seconds,
        }
        self.metrics.write(line)
        self.bar.set_postfix(reward=f"{line['reward']:.2f}", refresh=False)
        self.bar.update()
        if self.args.show_every and self.step % self.args.show_every == 0:
            group = self.sampled[self.step % len(self.sampled)]
            self.say(
                f"\nstep {self.step}  {group.prompt.problem.replace('<image>', '')}\n  {group.texts[0].strip()}\n"
                f"  right answer {group.prompt.answer}, reward {group.rewards[0]:.2f}"
            )

    def evaluate(self):
        """Accuracy on --eval_data, one response per row, by the prompt, sampler and checker of training."""
        begin, args = time.perf_counter(), self.args
        order = some_of(self.eval_data.indices, args.eval_rows, args.seed)
        mine, T = order[self.rank :: self.world_size], args.max_response_tokens
        memory = args.rollout_prompts * (self.data.longest_tokens + args.group_size * T)  # of training's, in tokens
        batch = max(1, memory // (self.eval_data.longest_tokens + T))  # prompts with one response each
        wide = dataclasses.replace(args, rollout_prompts=batch)
        right = tokens = truncated = 0
        most = math.ceil(len(order) / self.world_size)  # as many rows everywhere; what fills up is not counted
        filled = mine + order[:1] * (most - len(mine))
        bar = tqdm(total=most, desc="evaluation", leave=False, disable=not self.is_main, unit="row")
        with bar, self.phase("rollout"):
            for start in range(0, most, batch):
                prompts = list(self.stream.pool.map(self.eval_data.prompt, filled[start : start + batch]))
                settings = (wide, "evaluation", slice(1), args.eval_temperature)
                groups = rollout(self.model, self.tokenizer, prompts, *settings)
                for group in groups[: len(mine) - start]:
                    right += self.reward_groups.check(group.texts[0], group.prompt.answer)
                    tokens += group.mask.sum().item()
                    truncated += group.truncated.sum().item()
                bar.update(len(prompts))
        rows = len(order)
        accuracy = self.all_reduce(right) / rows
        line = {
            "step": self.step,
            "eval_data": self.eval_data.title,
            "eval_accuracy": accuracy,
            "eval_stderr": math.sqrt(accuracy * (1 - accuracy) / rows),
            "eval_rows": rows,
            "eval_response_tokens": self.all_reduce(tokens) / rows,
            "eval_truncated": self.all_reduce(truncated) / rows,
            "eval_seconds": time.perf_counter() - begin,
        }
        self.history["first_eval"] = self.history["first_eval"] or line
        self.history["last_eval"] = line
        self.metrics.write(line)
        self.say(f"step {self.step}: accuracy {accuracy:.1%} ± {line['eval_stderr']:.1%} on {rows} rows")

    def close(self):
        """The last lines on the console: what was gained, and where the files are."""
        first, last = self.history["first_eval"], self.history["last_eval"]
        self.accelerator.end_training()
        self.reward_groups.check.close()
        self.stream.pool.shutdown()
        if first and last and last["step"] > first["step"]:
            self.say(
                f"accuracy {first['eval_accuracy']:.1%} -> {last['eval_accuracy']:.1%} ± {last['eval_stderr']:.1%} on "
                f"{last['eval_rows']} rows, {self.eval_data.title}, in {self.step} steps and "
                f"{self.history['seconds']:.0f} s of training",
                sys.stdout,
            )
        if self.reward_groups.check.timeouts:
            self.say(f"{self.reward_groups.check.timeouts} answers took the maths checker too long and count as wrong")
        if self.is_main:
            draw_curves(read_runs([self.output]), self.output / "curves")
            self.lock.release()
        self.say(f"{self.output}/: metrics.jsonl, args.json, curves.png, and the model in last/", sys.stdout)
        if self.stopping:
            self.say(f"stopped after step {self.step} of {self.args.steps}: the same command with --resume goes on")
            raise SystemExit(130)

    def stop(self, *_):
        """Ctrl-C, or a scheduler's SIGTERM: finish the step, save, stop. A second one stops at once."""
        if self.stopping:
            raise SystemExit(130)
        self.stopping = True
        self.say("stopping after this step; once more stops at once, without saving")

    def save(self):
        """<output>/step-N, a Hugging Face folder with the training state beside the weights; `last` points to it."""
        if self.saved == self.step:
            return
        self.saved = self.step
        if self.all_reduce(sum(not local(p).isfinite().all() for p in self.parameters.values())):
            raise UserError(f"after step {self.step} the weights are not finite, and are not saved: {RUINED}.")
        writers = 1 if self.args.lora_rank else self.world_size  # of the optimiser's state
        place = self.step, self.updates, self.stream.position, self.data.contents, writers
        state = checkpoints.State(*place, self.history, Path(sys.argv[0]).stem, dataclasses.asdict(self.args))
        trained, folder = (self.model, self.processor_files, self.optimizer, self.parameters), f"step-{self.step}"
        ending = self.stopping or self.step == self.args.steps
        checkpoints.save_checkpoint(self.output / folder, *trained, state, self.is_main, self.args.keep, ending)
