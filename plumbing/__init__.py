"""What a run needs and a lecture does not open: one room a file, each says in its first lines what lives there.

arguments   flags, --help, the sentence that a user's mistake gets
data        rows of any usual schema -> prompts, and their order
answers     is an answer right
sharding    several processes: FSDP2, and what they do together
kernels     which attention a part of the model uses, and CUDA graphs
memory      --dry_run: what fits
checkpoints save, find, restore
metrics     the log: means over tokens and processes, metrics.jsonl
curves      the picture that a run draws at its end
"""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers' own threads do not survive a fork
