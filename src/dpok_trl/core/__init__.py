"""The mathematics of DPOK: torch only, no diffusers, no transformers and no configuration."""
