"""Settings that must hold before torch or a Hugging Face library is imported."""

import os
import signal


# No test may need the network, and no library may report a test run to anybody.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["DO_NOT_TRACK"] = "1"
os.environ["WANDB_MODE"] = "disabled"
# Tokenizers would warn about every worker process that a test starts.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch


# Tiny tensors gain nothing from threads, and sums keep one order.
torch.set_num_threads(1)

# A job that a shell has put in the background ignores Ctrl-C, and so would the runs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
