"""What a training run needs and a lecture does not open: each module says in its first lines what belongs there.

arguments   the command line: how a flag is declared and checked; the flags that all scripts share
families    what differs between Qwen-VL and InternVL
kernels     attention kernels, compiled layers, CUDA graphs, threads
data        files and hub sets -> rows -> prompts, and their order
answers     the answer in a response, and whether it is right; a custom reward
adapters    LoRA: added, loaded, saved, merged
memory      --dry_run: what fits
sharding    several processes: FSDP2, and what they do together
metrics     the log: means over tokens and processes, metrics.jsonl, curves
checkpoints save, find, restore; what a resumed run may change
"""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers' own threads do not survive a fork
