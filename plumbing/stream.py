"""The endless order in which training sees prompts, the same for any number of processes.

Not here: what a prompt is (data.py), and how many of them a step draws (run.py).
"""

import dataclasses
import random
from collections import deque
from concurrent.futures import ThreadPoolExecutor


class Stream:
    """The endless, seeded order of a data set; each process takes its turn, so the order is that of one process.

    Pictures are opened and cut into patches in threads, one draw ahead.
    """

    def __init__(self, data, seed, rank=0, world_size=1, position=0):
        self.data, self.seed, self.rank, self.world_size = data, seed, rank, world_size
        self.position = position  # prompts drawn so far, all processes together
        self.pool, self.ahead, self.order = ThreadPoolExecutor(4), deque(), {}

    def index(self, serial):
        """The row of the data set that the prompt of this number is made of."""
        epoch, offset = divmod(serial, len(self.data))
        if epoch not in self.order:
            shuffled = list(self.data.indices)
            random.Random(f"{self.seed} {epoch}").shuffle(shuffled)
            self.order[epoch] = shuffled
        return self.order[epoch][offset]

    def draw(self, count):
        """This process's share of the next `count` prompts, each with its number in the stream."""
        while len(self.ahead) < 2 * count // self.world_size:
            serial = self.position + len(self.ahead) * self.world_size + self.rank
            self.ahead.append((serial, self.pool.submit(self.data.prompt, self.index(serial))))
        self.position += count
        drawn = [self.ahead.popleft() for _ in range(count // self.world_size)]
        return [dataclasses.replace(future.result(), serial=serial) for serial, future in drawn]
