"""The commands of `dpok-trl`, one module each; see `dpok_trl.cli`."""
