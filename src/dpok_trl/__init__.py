"""RL fine-tuning of diffusers text-to-image pipelines with a KL term to the pretrained model (DPOK).

Users import from here alone. The names are resolved on first use (PEP 562), so that `import dpok_trl` costs
milliseconds and a reward server or ``dpok-trl --help`` need not load torch.
"""

import importlib
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0.dev0"

# public name -> the module that defines it
_MODULE_OF = {
    "DPOKConfig": "dpok_trl.training.config",
    "DPOKTrainer": "dpok_trl.training.trainer",
    "DPOKSFTConfig": "dpok_trl.training.sft_config",
    "DPOKSFTTrainer": "dpok_trl.training.sft",
    "DPOKParser": "dpok_trl.training.parsing",
    "ScriptArguments": "dpok_trl.training.parsing",
    "DefaultDPOKStableDiffusionPipeline": "dpok_trl.policy.ddpo_pipeline",
    "DPOKPipelineOutput": "dpok_trl.policy.ddpo_pipeline",
    "DPOKSchedulerOutput": "dpok_trl.policy.schedulers",
    "scheduler_step": "dpok_trl.policy.schedulers",
    "Policy": "dpok_trl.policy.policy",
    "PipelineHooks": "dpok_trl.policy.hooks",
    "UnsupportedPipelineError": "dpok_trl.policy.errors",
    "UnsupportedSchedulerError": "dpok_trl.policy.schedulers",
    "ReplayError": "dpok_trl.policy.errors",
    "RatioError": "dpok_trl.training.ratio",
    "PipelineReport": "dpok_trl.policy.check",
    "check_pipeline": "dpok_trl.policy.check",
    "load_tuned": "dpok_trl.policy.loading",
    "Gaussian": "dpok_trl.core.gaussian",
    "evaluate": "dpok_trl.results.evaluation",
    "Evaluation": "dpok_trl.results.evaluation",
    "Comparison": "dpok_trl.results.evaluation",
    "HubError": "dpok_trl.results.hub",
    "load_prompts": "dpok_trl.prompts.datasets",
    "RewardError": "dpok_trl.rewards.base",
    "RewardReport": "dpok_trl.rewards.checking",
    "check_reward": "dpok_trl.rewards.checking",
    "ImageReward": "dpok_trl.rewards.image_reward",
    "HPSv2": "dpok_trl.rewards.hps",
    "HPSv21": "dpok_trl.rewards.hps",
    "PickScore": "dpok_trl.rewards.clip",
    "CLIPScore": "dpok_trl.rewards.clip",
    "Aesthetic": "dpok_trl.rewards.aesthetic",
    "JpegCompressibility": "dpok_trl.rewards.jpeg",
    "JpegIncompressibility": "dpok_trl.rewards.jpeg",
    "PairwiseDiversity": "dpok_trl.rewards.diversity",
    "RemoteReward": "dpok_trl.rewards.remote",
    "VLMJudge": "dpok_trl.rewards.judge",
    "OCRReward": "dpok_trl.rewards.ocr",
    "Clipped": "dpok_trl.rewards.wrappers",
    "Standardized": "dpok_trl.rewards.wrappers",
    "Negated": "dpok_trl.rewards.wrappers",
    "Cached": "dpok_trl.rewards.wrappers",
}

# Written out, since type checkers read it without running the module; a test holds it equal to _MODULE_OF.
__all__ = [
    "DPOKConfig",
    "DPOKTrainer",
    "DPOKSFTConfig",
    "DPOKSFTTrainer",
    "DPOKParser",
    "ScriptArguments",
    "DefaultDPOKStableDiffusionPipeline",
    "DPOKPipelineOutput",
    "DPOKSchedulerOutput",
    "scheduler_step",
    "Policy",
    "PipelineHooks",
    "PipelineReport",
    "check_pipeline",
    "load_tuned",
    "Gaussian",
    "evaluate",
    "Evaluation",
    "Comparison",
    "load_prompts",
    "RewardReport",
    "check_reward",
    "ImageReward",
    "HPSv2",
    "HPSv21",
    "PickScore",
    "CLIPScore",
    "Aesthetic",
    "JpegCompressibility",
    "JpegIncompressibility",
    "PairwiseDiversity",
    "RemoteReward",
    "VLMJudge",
    "OCRReward",
    "Clipped",
    "Standardized",
    "Negated",
    "Cached",
    "RewardError",
    "HubError",
    "RatioError",
    "ReplayError",
    "UnsupportedPipelineError",
    "UnsupportedSchedulerError",
    "__version__",
]

if TYPE_CHECKING:
    from dpok_trl.core.gaussian import Gaussian
    from dpok_trl.policy.check import PipelineReport, check_pipeline
    from dpok_trl.policy.ddpo_pipeline import DefaultDPOKStableDiffusionPipeline, DPOKPipelineOutput
    from dpok_trl.policy.errors import ReplayError, UnsupportedPipelineError
    from dpok_trl.policy.hooks import PipelineHooks
    from dpok_trl.policy.loading import load_tuned
    from dpok_trl.policy.policy import Policy
    from dpok_trl.policy.schedulers import DPOKSchedulerOutput, UnsupportedSchedulerError, scheduler_step
    from dpok_trl.prompts.datasets import load_prompts
    from dpok_trl.results.evaluation import Comparison, Evaluation, evaluate
    from dpok_trl.results.hub import HubError
    from dpok_trl.rewards.aesthetic import Aesthetic
    from dpok_trl.rewards.base import RewardError
    from dpok_trl.rewards.checking import RewardReport, check_reward
    from dpok_trl.rewards.clip import CLIPScore, PickScore
    from dpok_trl.rewards.diversity import PairwiseDiversity
    from dpok_trl.rewards.hps import HPSv2, HPSv21
    from dpok_trl.rewards.image_reward import ImageReward
    from dpok_trl.rewards.jpeg import JpegCompressibility, JpegIncompressibility
    from dpok_trl.rewards.judge import VLMJudge
    from dpok_trl.rewards.ocr import OCRReward
    from dpok_trl.rewards.remote import RemoteReward
    from dpok_trl.rewards.wrappers import Cached, Clipped, Negated, Standardized
    from dpok_trl.training.config import DPOKConfig
    from dpok_trl.training.parsing import DPOKParser, ScriptArguments
    from dpok_trl.training.ratio import RatioError
    from dpok_trl.training.sft import DPOKSFTTrainer
    from dpok_trl.training.sft_config import DPOKSFTConfig
    from dpok_trl.training.trainer import DPOKTrainer


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        import difflib  # needed only to word this error

        close = difflib.get_close_matches(name, _MODULE_OF, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}.{hint}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
