"""What a trained policy is published as: the adapter in a folder or on the Hub, with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers import DiffusionPipeline

from dpok_trl.policy.tuning import Tuned
from dpok_trl.results.hub import push_folder, write_model_card
from dpok_trl.rewards.combining import RewardSet
from dpok_trl.training.config import DPOKConfig


class PublishingMixin:
    """Saving and pushing, for [`DPOKTrainer`]: it reads what a trainer holds and changes nothing."""

    _tag_names: list[str]
    config: DPOKConfig
    accelerator: Accelerator
    output_dir: Path
    pipeline: DiffusionPipeline
    tuned: Tuned
    rewards: RewardSet
    first_epoch: int
    global_step: int
    last_metrics: dict[str, float]

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Writes the adapter (`pytorch_lora_weights.safetensors` with its metadata, for `pipe.load_lora_weights`), a model card and the config. After full
        fine-tuning, the whole pipeline instead of an adapter.

        Args:
            output_dir (`str` or `Path`, *optional*): Default: `output_dir` of the run.
        """
        folder = self.output_dir if output_dir is None else Path(output_dir)
        if self.accelerator.is_main_process:
            self._write_model(folder)
        self.accelerator.wait_for_everyone()

    def save_pretrained(
        self, save_directory: str | Path, *, repo_id: str | None = None, push_to_hub: bool = False
    ) -> None:
        """DDPO's name of [`~DPOKTrainer.save_model`]; with `push_to_hub`, [`~DPOKTrainer.push_to_hub`] follows."""
        self.save_model(save_directory)
        if push_to_hub:
            self.push_to_hub(repo_id or self.config.hub_model_id or Path(save_directory).name)

    def push_to_hub(
        self,
        repo_id: str | None = None,
        *,
        commit_message: str = "Upload model tuned with DPOK",
        private: bool | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> str | None:
        """Saves the model under `output_dir/model` and uploads it.

        Args:
            repo_id (`str`, *optional*): Default: `config.hub_model_id`.
            private (`bool`, *optional*): For a new repository. Default: `config.hub_private_repo`.
            dataset_name, tags (*optional*): For the model card.

        Returns:
            `str`: The URL of the commit (`None` on other processes than the main one).

        Raises:
            `ValueError`: Without a `repo_id`.
        """
        repo_id = repo_id or self.config.hub_model_id
        if not repo_id:
            raise ValueError(
                "push_to_hub needs a repository: trainer.push_to_hub('me/rabbit-lora'), or hub_model_id in the config."
            )
        if not self.accelerator.is_main_process:
            return None
        folder = self.output_dir / "model"
        self._write_model(folder, repo_id, dataset_name, tags)
        private = self.config.hub_private_repo if private is None else private
        return push_folder(folder, repo_id, commit_message=commit_message, private=private)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Writes `README.md` and `dpok_config.json` into `output_dir`."""
        if self.accelerator.is_main_process:
            self._write_model_card(self.output_dir, model_name, dataset_name, tags)

    def _write_model(self, folder: Path, *card: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.tuned.export(self.pipeline, folder)
        self._write_model_card(folder, *card)

    def _write_model_card(
        self,
        folder: Path,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        write_model_card(
            folder,
            model_name=model_name or self.config.hub_model_id or folder.resolve().name,
            pipeline=type(self.pipeline).__name__,
            base_model=self.pipeline.config.get("_name_or_path"),
            is_adapter=not self.tuned.full,
            loading_code=lambda base, repository: self.tuned.loading_code(self.pipeline, base, repository),
            dataset_name=dataset_name,
            tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
            reward=", ".join(self.rewards.names),
            config=self.config.to_dict(),
            epochs=self.first_epoch,
            updates=self.global_step,
            metrics=self.last_metrics,
        )
