"""What a run needs and a lecture does not open: one room a file, each says in its first lines what lives there.

arguments   the flags that all scripts share
commandline how a flag is declared, checked and listed; the sentence that a user's mistake gets
files       written beside and renamed; one writer at a time
families    what differs between Qwen-VL and InternVL
rows        hub data sets and local files -> rows
pictures    a picture of any mode, opened and brought to RGB
data        rows of any usual schema -> prompts
stream      the order of the prompts
rewards     the answer in a response; a reward of the user's own
answers     is an answer right
kinds       what the tokens of a response in an embedded world say
adapters    LoRA: added, loaded, saved, merged
sharding    several processes: FSDP2, and what they do together
kernels     threads, which attention a part of the model uses, CUDA graphs
memory      --dry_run: what fits
checkpoints save, find, restore; what a resumed run may change
metrics     the log: means over tokens and processes, metrics.jsonl
curves      the picture that a run draws at its end
"""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers' own threads do not survive a fork
